"""What judging a whole run costs, checkout against checkout: CPU seconds of all its jobs, and whether the tables agree.

usage: judging_run.py RUN NAME=CHECKOUT … [--workers 1] [--rounds 1] [--out benchmarks/results/judging_run.csv]

RUN is a finished `results/<run>`; its clips are found from here. Each checkout's own scripts judge it in a fresh folder
with an empty store, one process a job, checkouts in turn, so that a busy machine hits all alike. The first is what the
others are compared with: `equal` is whether every table has its bytes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from eqknobs.io import output_file, write_csv

JOB = """
import json, runpy, sys
from types import SimpleNamespace
script, inputs, outputs, cfg = json.loads(sys.argv[1])
runpy.run_path(script)["main"](SimpleNamespace(**inputs), outputs, cfg)
"""
CFG = {"judges": {"asr": "tiny.en", "beam": 1}, "device": "cpu", "dnsmos": []}


def jobs(run: Path, checkout: Path, out: Path) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Script, inputs and outputs of the jobs of a checkout: a render stage of a target has one, or one has them all."""
    manifest, originals = str(run / "manifest/manifest.csv"), str(out / "originals.csv")
    indexes = sorted(index for index in run.glob("renders/*/*/index.csv") if index.parent.name != "answers")
    words = [str(out / f"{index.parent.parent.name}.{index.parent.name}.words.csv") for index in indexes]
    first = ("originals.py", {"manifest": manifest}, [originals])
    if "indexes" not in (checkout / "workflow/scripts/judgements.py").read_text():
        each = [
            ("judgements.py", {"index": str(index), "originals": originals, "manifest": manifest}, [table])
            for index, table in zip(indexes, words, strict=True)
        ]
        return [first, *each]
    several = {"originals": [originals] * len(indexes), "manifests": [manifest] * len(indexes)}
    return [first, ("judgements.py", several | {"indexes": list(map(str, indexes))}, words)]


def judge(run: Path, checkout: Path, workers: int) -> tuple[float, float, dict[str, bytes]]:
    """CPU seconds, seconds and tables of a run that a checkout judges from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "resources").symlink_to(Path("resources").resolve())  # where a manifest finds its clips
        used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for script, inputs, outputs in jobs(run.resolve(), checkout, Path(folder)):
            given = json.dumps([str(checkout.resolve() / "workflow/scripts" / script), inputs, outputs, CFG])
            threads = workers if script == "judgements.py" else 1
            env = os.environ | {"PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": str(threads)}
            subprocess.run([sys.executable, "-c", JOB, given], check=True, cwd=folder, env=env)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        tables = {path.name: path.read_bytes() for path in Path(folder).glob("*.csv")}
        return cpu, time.perf_counter() - begun, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkouts", nargs="+", metavar="NAME=CHECKOUT")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=output_file, default="benchmarks/results/judging_run.csv")
    args = parser.parse_args()
    checkouts = dict(item.split("=", 1) for item in args.checkouts)
    found: dict[str, list[tuple[float, float, dict[str, bytes]]]] = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, checkout in checkouts.items():
            found[name].append(judge(args.run, Path(checkout), args.workers))
    first = found[next(iter(found))]
    rows = [
        {
            "checkout": name,
            "rows": sum(table.count(b"\n") - 1 for table in rounds[0][2].values()),
            "cpu_seconds": sum(cpu for cpu, _, _ in rounds) / len(rounds),
            "ratio": sum(cpu for cpu, _, _ in rounds) / sum(cpu for cpu, _, _ in first),
            "seconds": sum(seconds for _, seconds, _ in rounds) / len(rounds),
            "equal": all(tables == first[0][2] for _, _, tables in rounds),
        }
        for name, rounds in found.items()
    ]
    write_csv(args.out, pd.DataFrame(rows))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
