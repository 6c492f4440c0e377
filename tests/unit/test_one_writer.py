"""Two jobs of one rule, as after a Snakemake that was killed without its job: one writes at a time."""

import subprocess
import sys
import time
from pathlib import Path

JOB = """
import sys, time
from types import SimpleNamespace
from eqknobs.script import run

def main(inputs, outputs, cfg):
    print("begins", flush=True)
    with open(outputs[0], "a") as file:
        file.write(cfg["name"] + " begins\\n")
        file.flush()
        time.sleep(cfg["seconds"])
        file.write(cfg["name"] + " ends\\n")

name, seconds, folder = sys.argv[1], float(sys.argv[2]), sys.argv[3]
params = SimpleNamespace(cfg={"name": name, "seconds": seconds})
run(main, SimpleNamespace(threads=1, resources={}, log=[folder + "/logs/a.log"], input=[], output=[folder + "/out"],
                          params=params))
"""


def start(name: str, seconds: float, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", JOB, name, str(seconds), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_waits_and_says_for_whom(tmp_path: Path) -> None:
    first = start("orphan", 1.5, tmp_path)
    assert first.stdout.readline() == "begins\n"
    second = start("second", 0, tmp_path)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0 and f"process {first.pid}" in said and "waiting" in said
    assert first.wait() == 0
    lines = (tmp_path / "out").read_text().split("\n")
    assert lines[:4] == ["orphan begins", "orphan ends", "second begins", "second ends"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["a.log"]


def test_a_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    first = start("killed", 60, tmp_path)
    assert first.stdout.readline() == "begins\n"
    first.kill()
    first.communicate()
    begun = time.monotonic()
    second = start("second", 0, tmp_path)
    second.communicate(timeout=60)
    assert second.returncode == 0 and time.monotonic() - begun < 30
    assert (tmp_path / "out").read_text().endswith("second ends\n")
