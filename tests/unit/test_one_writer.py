"""Two jobs of one rule, as after a Snakemake that was killed without its job: one writes at a time."""

import subprocess
import sys
from pathlib import Path

JOB = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from eqknobs.script import run

def main(inputs, outputs, cfg):
    print("begins", flush=True)
    with open(outputs[0], "a") as file:
        file.write(cfg["name"] + " begins\\n")
        file.flush()
        while cfg["waits"] and not Path(cfg["waits"]).exists():
            time.sleep(0.05)
        file.write(cfg["name"] + " ends\\n")

name, waits, folder = sys.argv[1:]
params = SimpleNamespace(cfg={"name": name, "waits": waits})
run(main, SimpleNamespace(threads=1, resources={}, log=[folder + "/logs/a.log"], input=[], output=[folder + "/out"],
                          params=params, config={"hardware": {"device": "cpu"}}))
"""


def start(name: str, folder: Path, waits: str = "") -> subprocess.Popen:
    """A job that begins to write and goes on when the file `waits` is there."""
    command = [sys.executable, "-c", JOB, name, waits, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_waits_and_says_for_whom(tmp_path: Path) -> None:
    first = start("orphan", tmp_path, str(tmp_path / "go"))
    assert first.stdout.readline() == "begins\n"
    second = start("second", tmp_path)
    said = second.stderr.readline()
    assert f"process {first.pid}" in said and "waiting" in said
    (tmp_path / "go").touch()
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert first.wait() == 0
    lines = (tmp_path / "out").read_text().split("\n")
    assert lines[:4] == ["orphan begins", "orphan ends", "second begins", "second ends"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["a.log"]


def test_a_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    first = start("killed", tmp_path, "never")
    assert first.stdout.readline() == "begins\n"
    first.kill()
    first.communicate()
    second = start("second", tmp_path)
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert (tmp_path / "out").read_text().endswith("second ends\n")
