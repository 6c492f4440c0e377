"""CPU seconds to train the SAEs of a Whisper layer (384 → 3072, BatchTopK, k 50) one by one, and seeds on one pass.

    .venv/bin/python benchmarks/sae_seeds.py [--frames 20000] [--epochs 2] [--seeds 3]

On sparse combinations of random directions; one thread. Prints CPU seconds a thousand frames and SAE.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from eqknobs.sae.training import train_together

WIDTH, FEATURES, DIRECTIONS, ACTIVE = 384, 3072, 800, 20


def write_cache(path: Path, frames: int) -> None:
    """A cache of one train, one val and one test clip."""
    rng = np.random.default_rng(0)
    codes = np.zeros((frames, DIRECTIONS), np.float32)
    for row in codes:
        row[rng.integers(0, DIRECTIONS, ACTIVE)] = rng.exponential(1, ACTIVE)
    acts = codes @ rng.normal(size=(DIRECTIONS, WIDTH)).astype(np.float32)
    parts = [frames - 2 * (frames // 20), frames // 20, frames // 20]
    with h5py.File(path, "w") as file:
        file["activations"], file["frame_times"], file["done"] = acts, np.arange(frames) / 50, np.ones(3, np.uint8)
        for name, values in (("id", "abc"), ("speaker", "abc"), ("split", ("train", "val", "test")), ("sha256", "abc")):
            file.create_dataset(f"utterances/{name}", data=list(values), dtype=h5py.string_dtype("utf-8"))
        file["utterances/start"], file["utterances/frames"] = np.cumsum(parts) - parts, parts
        file["utterances/samples"] = np.array(parts) * 320
        train = acts[: parts[0]].astype(np.float64)
        file.attrs.update(model="random", site="layer.0", manifest_sha256="0", mean=train.mean(0), std=train.std(0))


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("frames", 20000), ("epochs", 2), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = {"variant": "batchtopk", "d_sae": FEATURES, "k": 50, "aux_k": 0, "lr": 2e-4, "batch_size": 1024}
    cfg |= {"epochs": args.epochs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(folder / "cache.h5", args.frames)
        outputs = {folder / f"seed{seed}": {**cfg, "seed": seed} for seed in range(args.seeds)}
        alone = sum(
            seconds(lambda out=out, one=one: train_together(folder / "cache.h5", {out: one}, out))
            for out, one in outputs.items()
        )
        together = seconds(lambda: train_together(folder / "cache.h5", outputs, folder / "all"))
    work = (args.frames - 2 * (args.frames // 20)) / 1000 * args.epochs * args.seeds
    print(f"one by one {alone / work:.4f}, on one pass {together / work:.4f} CPU s a thousand frames and SAE")


if __name__ == "__main__":
    main()
