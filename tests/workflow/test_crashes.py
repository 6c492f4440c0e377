"""Killed without warning at moments over the whole chain and taken up again: the same files, and little done twice."""

import ctypes
import filecmp
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.workflow import copy_workflow, write_config

pytestmark = pytest.mark.slow
KILLS, SEED = 12, 0
PR_SET_CHILD_SUBREAPER = 36
MADE = ("manifest", "labels", "saes", "probes", "steering", "importance", "renders", "scores", "lm", "accent", "tables")


@pytest.fixture(scope="module", autouse=True)
def orphans_are_ours() -> None:
    """Jobs that outlive their Snakemake become this process's children, so that their CPU time is counted."""
    assert not ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started(folder: Path, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    with (folder / "said.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def cpu_seconds() -> float:
    """Of all children that have ended, with theirs."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ended_jobs(folder: Path) -> int:
    return sum(path.stat().st_size > 0 for path in (folder / "results/small/benchmarks").rglob("*.tsv"))


def run(folder: Path, *arguments: str) -> float:
    """CPU seconds of a whole run."""
    before = cpu_seconds()
    assert started(folder, *arguments).wait() == 0, (folder / "said.log").read_text()[-5000:]
    return cpu_seconds() - before


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float, float]:
    """An untouched run and one that was killed; the CPU seconds of both, less those that Snakemake takes to start."""
    whole, broken = (copy_workflow(tmp_path_factory.mktemp(name) / "work") for name in ("whole", "broken"))
    write_config(whole)
    write_config(broken)
    needed = run(whole)
    jobs, start = ended_jobs(whole), run(whole)  # nothing to be done
    rng = random.Random(SEED)
    moments = sorted(rng.sample(range(jobs - 1), KILLS))
    used = 0.0
    for moment in moments:
        before = cpu_seconds()
        process, patience = started(broken), time.monotonic() + 900
        while ended_jobs(broken) < moment and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 8))
        assert process.poll() is None, (broken / "said.log").read_text()[-5000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)  # until the jobs are dead too
        used += cpu_seconds() - before - start
        assert started(broken, "--unlock").wait() == 0
    return whole, broken, needed - start, used + run(broken) - start


def test_what_was_killed_and_taken_up_again_is_the_same_byte_for_byte(folders) -> None:
    whole, broken, *_ = folders
    for part in MADE:
        here, there = (folder / "results/small" / part for folder in (whole, broken))
        names = sorted(str(p.relative_to(here)) for p in here.rglob("*") if p.is_file() and not p.name.startswith("."))
        found = sorted(
            str(p.relative_to(there)) for p in there.rglob("*") if p.is_file() and not p.name.startswith(".")
        )
        assert names == found, part
        same, other, failed = filecmp.cmpfiles(here, there, names, shallow=False)
        assert same and not failed and not [name for name in other if not name.endswith(".h5")], (part, other)


def test_little_is_done_twice(folders) -> None:
    _, _, needed, used = folders
    print(f"{KILLS} kills: {used:.0f} CPU seconds where a whole run takes {needed:.0f}")
    assert used <= 1.1 * needed


def test_no_half_written_file_is_left(folders) -> None:
    assert not [path for path in (folders[1] / "results").rglob(".*.tmp*")]
