"""Probes of all attention heads in one batch against scikit-learn's logistic regression head by head.

usage: lm_heads.py FOLDER [--out benchmarks/results/lm_heads.csv]; FOLDER is results/<run>/lm/<model> of a finished run

Both choose a regularisation on val, ours of four, scikit-learn's of three (`cpu_one` is one fit with its default). Rows
`large` are synthetic heads of Moshi's width, of which scikit-learn fits a sample. One thread, CPU seconds; the batch is
timed five times, in between scikit-learn's heads, and its median taken.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression

from eqknobs.io import output_file, write_csv
from eqknobs.stages.lm_layers.batched import scored, told_right
from eqknobs.stages.lm_layers.compute import Turns
from eqknobs.stages.probes.compute import LabelledFrames

L2S = (0.001, 0.01, 0.1)
ROUNDS = 5
LARGE = {"heads": 64, "width": 128, "frames": 6000, "classes": 20, "sample": 8}


def ours(x: torch.Tensor, labels: np.ndarray, classes: int, frames: LabelledFrames) -> tuple[float, np.ndarray]:
    """CPU seconds of all heads, and their accuracies on test."""
    begun = time.process_time()
    right = told_right(x, labels, labels, classes, frames)
    spent = time.process_time() - begun
    return spent, right[:, frames.split[scored(frames)] == "test"].mean(1)


def theirs(x: np.ndarray, labels: np.ndarray, frames: LabelledFrames) -> tuple[float, float, float]:
    """(CPU seconds with the choice of l2, of one fit, accuracy on test) of one head."""
    train, val, test = (frames.of(split) for split in ("train", "val", "test"))
    begun = time.process_time()
    LogisticRegression(max_iter=1000).fit(x[train], labels[train])
    one = time.process_time() - begun
    begun = time.process_time()
    fits = [LogisticRegression(C=1 / (l2 * len(train)), max_iter=1000).fit(x[train], labels[train]) for l2 in L2S]
    best = max(fits, key=lambda fit: fit.score(x[val], labels[val]))
    return time.process_time() - begun, one, float(best.score(x[test], labels[test]))


def compared(
    what: str, x: torch.Tensor, labels: np.ndarray, classes: int, frames: LabelledFrames, sample: int
) -> dict[str, Any]:
    """One row of the table."""
    ours(x, labels, classes, frames)  # what is had once
    seconds, found = [], []
    places = np.linspace(0, len(x) - 1, sample).round().astype(int)
    for i, head in enumerate(places):
        if i % -(-sample // ROUNDS) == 0:
            spent, accuracy = ours(x, labels, classes, frames)
            seconds.append(spent)
        found.append(theirs(x[head].numpy(), labels, frames))
    many, one, other = np.array(found).T
    mine, cost = accuracy[places], float(np.median(seconds)) / len(x)
    return {
        "case": what,
        "heads": len(x),
        "width": x.shape[2],
        "train_frames": len(frames.of("train")),
        "classes": classes,
        "cpu_ms_ours": 1000 * cost,
        "cpu_ms_sklearn": 1000 * many.mean(),
        "cpu_ms_one": 1000 * one.mean(),
        "ratio": many.mean() / cost,
        "ratio_one": one.mean() / cost,
        "accuracy_ours": mine.mean(),
        "accuracy_sklearn": other.mean(),
        "difference": (mine - other).mean(),
        "rank_correlation": float(scipy.stats.spearmanr(mine, other).statistic),
        "sample": sample,
    }


def large(sizes: dict[str, int]) -> tuple[torch.Tensor, np.ndarray, int, LabelledFrames, int]:
    """Synthetic heads, some of which tell more than others, with correlated dimensions."""
    rng = np.random.default_rng(0)
    heads, width, frames, classes = (sizes[key] for key in ("heads", "width", "frames", "classes"))
    labels = rng.integers(classes, size=frames)
    centres = rng.standard_normal((heads, classes, width)) * np.linspace(0, 0.3, heads)[:, None, None]
    mixed = rng.standard_normal((width, width)) * np.logspace(0, -1.5, width)  # a spectrum that falls, as real ones do
    x = (centres[:, labels] + rng.standard_normal((heads, frames, width))) @ mixed
    x = (x / x.std(1, keepdims=True)).astype(np.float32)
    split = np.repeat(["train", "val", "test"], [frames // 2, frames // 4, frames - frames // 2 - frames // 4])
    of = LabelledFrames(np.arange(frames), labels.astype(float), split, np.zeros(frames, int))
    return torch.from_numpy(x), labels, classes, of, sizes["sample"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=output_file, default="benchmarks/results/lm_heads.csv")
    parser.add_argument("--quick", action="store_true", help="three heads and a small synthetic case")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="sklearn")
    cfg: Any = {"properties": ["centroid", "token"], "bins": 20, "lags": [0], "seed": 0}
    turns = Turns(args.folder / "turns.csv", args.folder / "caches.json", args.folder / "labels.h5", cfg)
    sites = {f"heads.{layer}": len(left) for layer, left in enumerate(turns.heads)}
    x = torch.cat([block for _, block in turns.matrices("trained", list(sites), "cpu", min(sites.values()))])
    rows = []
    for asked in turns.asked:
        part = x[:, torch.from_numpy(asked.frames.rows)]
        frames = asked.part(np.arange(len(asked.labels))).frames
        sample = 3 if args.quick else len(x)
        rows.append(compared(f"{asked.stream}, {asked.name}", part, asked.labels, asked.classes, frames, sample))
        print(rows[-1], flush=True)
    sizes = LARGE | ({"heads": 6, "width": 16, "frames": 400, "sample": 2} if args.quick else {})
    rows.append(compared("large, synthetic", *large(sizes)))
    print(rows[-1], flush=True)
    write_csv(args.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
