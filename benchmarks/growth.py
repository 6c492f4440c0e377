"""How time and memory of planning, manifest, activations and labels grow with the number of clips.

    .venv/bin/python benchmarks/growth.py [--clips 625] [--times 1 4 16] [--plan] [--out growth.csv]

The clips are half a second of noise each, the model is tiny-mimi on the CPU, pitch is not asked for. `plan` is
`snakemake -n` before anything is read (with each clip's digest), `plan again` the same afterwards; the others are jobs,
with what Snakemake's own benchmark says of them: of a stage in shards the sum of seconds and the largest memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile as sf
import yaml

from eqknobs.io import output_file, write_csv

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "rules", "workflow", "src", "config", "profiles", "envs", "resources")
TARGET, RATE, SECONDS, SPEAKERS = "tiny-mimi.encoder_transformer", 24000, 0.5, 20
STAGES = {"manifest": "manifest*", "activations": "activations.*", "labels": "labels.*"}  # and their benchmarks
OFF = (
    "stability domains probes phones label_search erasing features hallucination codec steering importance "
    "quantisation accent speech_lm lm_layers lm_pruning lm_quantisation lm_recipe lm_steering splicing saes"
).split()


def lay_out(folder: Path, clips: int, shard_clips: int | None) -> None:
    """The workflow by links, noise in folders of speakers, and the configuration."""
    for part in PARTS:
        (folder / part).symlink_to(ROOT / part)
    rng = np.random.default_rng(0)
    for i in range(clips):
        path = folder / f"sound/s{i % SPEAKERS:02d}/s{i % SPEAKERS:02d}-{i:06d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, rng.normal(0, 0.1, round(SECONDS * RATE)), RATE)
    data = {"path": "sound", "labels": None, "max_utterances": clips, "max_minutes": clips, "min_seconds": 0.1}
    config: dict[str, Any] = {"run": {"name": "growth", "targets": [TARGET]}, "data": data}
    config |= {"hardware": {"device": "cpu", "shard_clips": shard_clips}}
    (folder / "growth.yaml").write_text(yaml.safe_dump(config | dict.fromkeys(OFF)))


def snakemake(folder: Path, *arguments: str) -> dict[str, float]:
    """Seconds, CPU seconds and peak MiB of a Snakemake and its children."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", "--configfile", "growth.yaml", *arguments]
    start, pipes = time.monotonic(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=env, **pipes)
    assert process.stderr
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(said)
    spent = {"seconds": time.monotonic() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
    return {**spent, "peak_memory_mib": used.ru_maxrss / 1024}


def measured(clips: int, shard_clips: int | None, work: Path | None, plan: bool) -> list[dict[str, Any]]:
    """A row a stage."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        lay_out(folder, clips, shard_clips)
        labels = f"results/growth/labels/{TARGET}.h5"
        rows = [{"stage": stage, "jobs": 1, **snakemake(folder, "-n", labels)} for stage in ("plan", "plan again")]
        if plan:
            return [{"clips": clips, **row} for row in rows]
        snakemake(folder, "--cores", "1", labels)
        for stage, pattern in STAGES.items():
            files = sorted((folder / "results/growth/benchmarks").glob(f"{pattern}tsv"))
            table = pd.concat([pd.read_csv(file, sep="\t", na_values="-") for file in files])
            spent = {"seconds": table["s"].sum(), "cpu_seconds": table["cpu_time"].sum()}
            rows.append({"stage": stage, "jobs": len(files), **spent, "peak_memory_mib": table["max_rss"].max()})
    return [{"clips": clips, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=625, help="the fewest clips")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16], help="how often as many")
    parser.add_argument("--shard-clips", type=int, help="hardware.shard_clips; by default there are no shards")
    parser.add_argument("--plan", action="store_true", help="plan only")
    parser.add_argument("--work", type=Path, help="where the sound may lie meanwhile")
    parser.add_argument("--out", type=output_file, help="a CSV file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for times in args.times:
        rows += measured(args.clips * times, args.shard_clips, args.work, args.plan)
        print(pd.DataFrame(rows).round(1).to_string(index=False), flush=True)
    if args.out:
        write_csv(args.out, pd.DataFrame(rows).round(2))


if __name__ == "__main__":
    main()
