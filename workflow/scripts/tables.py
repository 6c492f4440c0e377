"""Compute the tables from the raw scores."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import TablesCfg
from eqknobs.report.tables import write_tables


def main(inputs: Any, outputs: Any, cfg: TablesCfg) -> None:
    folder = Path(outputs.summary).parent
    write_tables(Inputs(folder.parent, inputs), cfg, folder)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
