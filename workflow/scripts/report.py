"""Write the report."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import ReportCfg
from eqknobs.report.page import write_report


def main(inputs: Any, outputs: Any, cfg: ReportCfg) -> None:
    folder = Path(outputs[0]).parent
    write_report(Inputs(folder.parent, inputs), cfg, folder)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
