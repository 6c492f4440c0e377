"""Write the report."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.report import write_report


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    out = Path(outputs[0]).parent
    write_report(out.parent, cfg["config"]["run"]["targets"], cfg["config"], out)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
