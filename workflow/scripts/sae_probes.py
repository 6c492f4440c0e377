"""Fit and score the probes of one property on the code of one SAE."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.probes.compute import fit_probes


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    fit_probes(
        inputs.cache,
        inputs.labels,
        {Path(path).parts[-3]: Path(path).parent for path in inputs.saes},
        cfg["property"],
        outputs.probes,
        outputs.scores,
        outputs.ridge,
        cfg,
        cfg["seed"],
        ["sae"],
        inputs.manifest,
        Pieces(),
    )


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
