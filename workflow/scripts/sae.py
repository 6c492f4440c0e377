"""Train one SAE."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.sae import train_sae


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    train_sae(inputs.cache, Path(outputs.config).parent, {**cfg["sae"], "device": cfg["device"]}, cfg["seed"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
