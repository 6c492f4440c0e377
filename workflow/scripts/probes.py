"""Fit and score the probes of one property, on the spaces that no SAE makes or on the code of one SAE."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.probes.compute import Outputs, ProbesCfg, Sources, fit_probes


def main(inputs: Any, outputs: Any, cfg: ProbesCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    sources = Sources(inputs.cache, inputs.labels, saes, inputs.manifest)
    fit_probes(sources, Outputs(outputs.probes, outputs.scores, outputs.ridge), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
