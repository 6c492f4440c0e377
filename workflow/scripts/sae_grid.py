"""Train a grid of SAEs on one pass over the activations."""

from pathlib import Path
from typing import Any, TypedDict

import eqknobs.script
from eqknobs.sae import GridCfg, train_grid


class JobCfg(TypedDict):
    sae: GridCfg
    seed: int
    device: str


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    train_grid(inputs.cache, Path(outputs.front).parent, cfg["sae"], cfg["seed"], cfg["device"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
