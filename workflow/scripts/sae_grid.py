"""Train a grid of SAEs on one pass over the activations."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.sae import train_grid


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    train_grid(inputs.cache, Path(outputs.front).parent, {**cfg["sae"], "device": cfg["device"]}, cfg["seed"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
