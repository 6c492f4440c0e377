"""Fit and score the probes of one property."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.probes import fit_probes


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    folders = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    fit_probes(
        inputs.cache,
        inputs.labels,
        folders,
        cfg["property"],
        outputs.probes,
        outputs.scores,
        outputs.ridge,
        cfg,
        cfg["seed"],
    )


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
