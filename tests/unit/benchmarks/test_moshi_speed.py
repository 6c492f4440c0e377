"""The speed benchmark beside the moshi package: it runs, and the committed table has its cases, none slower."""

import re
import subprocess
import sys

import pandas as pd

from helpers import ROOT


def cases(table: pd.DataFrame) -> list[str]:
    return [re.sub(r"\d+ frames", "frames", case) for case in table["case"]]


def test_it_runs_and_times_the_committed_cases(tmp_path):
    committed = pd.read_csv(ROOT / "benchmarks/results/moshi_speed.csv")
    command = [sys.executable, str(ROOT / "benchmarks/moshi_speed.py"), "--quick", "--out", str(tmp_path / "out.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "out.csv")
    assert list(found.columns) == list(committed.columns) and cases(found) == cases(committed)
    assert (found[["ours_ms", "moshi_ms", "ratio"]] > 0).all(axis=None) and set(found["size"]) == {"tiny"}
    # twice as slow would be a mistake of ours, whatever else the machine does: turns alternate
    assert (found["ratio"] > 0.5).all()
    assert (committed["ratio"] >= 1).all() and set(committed["size"]) == {"small"}
