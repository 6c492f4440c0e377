"""Train one SAE with every seed."""

from pathlib import Path
from typing import Any, TypedDict

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.sae import SAECfg
from eqknobs.sae.seeds import train_seeds


class JobCfg(TypedDict):
    sae: SAECfg
    content: Any  # digests of the code
    device: str


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    folders = [Path(path).parent for path in outputs.config]
    seeds = {int(folder.name.removeprefix("seed")): folder for folder in folders}
    train_seeds(inputs.cache, seeds, cfg["sae"], cfg["content"], Pieces(), cfg["device"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
