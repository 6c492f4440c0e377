"""Compute the tables from the raw scores."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.tables import write_tables


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    write_tables(Path(outputs.summary).parents[1], cfg["targets"], cfg, cfg["models"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
