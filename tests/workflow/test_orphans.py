"""A Snakemake that was killed without its job, and what the next one does: it is refused, then waits for the orphan."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT

SNAKEFILE = """
config = {"hardware": {"device": "cpu"}}


rule job:
    output:
        "out.txt",
    log:
        "job.log",
    params:
        cfg={},
    script:
        "job.py"
"""
JOB = """
import os
import time
from pathlib import Path

import eqknobs.script


def main(inputs, outputs, cfg):
    with open("said.txt", "a") as said:
        print("begins", os.getpid(), file=said, flush=True)
        while not Path("go").exists():
            time.sleep(0.05)
        Path(outputs[0]).write_text(str(os.getpid()))
        print("ends", os.getpid(), file=said, flush=True)


eqknobs.script.run(main, snakemake)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(folder: Path, count: int) -> list[list[str]]:
    """Lines that jobs said, once there are so many."""
    file, end = folder / "said.txt", time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    return [line.split() for line in file.read_text().splitlines()]


def test_the_next_start_is_refused_and_once_unlocked_waits_for_the_orphan(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "job.py").write_text(JOB)
    first = start(tmp_path)
    ((_, orphan),) = said(tmp_path, 1)
    try:
        second = start(tmp_path)  # two on one folder
        refused, _ = second.communicate(timeout=120)
        assert second.returncode and "cannot be locked" in refused and "--unlock" in refused
        first.send_signal(signal.SIGKILL)
        first.wait()
        os.kill(int(orphan), 0)  # its job goes on
        assert start(tmp_path, "--unlock").wait(timeout=120) == 0
        third = start(tmp_path)
        for line in third.stdout:
            if "waiting for it" in line:
                assert f"being written by process {orphan} on " in line
                break
        else:
            raise AssertionError("it did not wait")
    finally:
        (tmp_path / "go").touch()
    third.communicate(timeout=120)
    assert third.returncode == 0
    told = said(tmp_path, 4)
    assert [what for what, _ in told] == ["begins", "ends"] * 2 and told[1][1] == orphan
    assert (tmp_path / "out.txt").read_text() == told[3][1] != orphan
