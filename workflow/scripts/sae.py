"""Train one SAE."""

from pathlib import Path
from typing import Any, TypedDict

import eqknobs.script
from eqknobs.sae import SAECfg, train_sae


class JobCfg(TypedDict):
    sae: SAECfg
    seed: int
    device: str


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    train_sae(inputs.cache, Path(outputs.config).parent, cfg["sae"], cfg["seed"], cfg["device"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
