"""Measure how sensitive each tensor is, and make the plans."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.quantisation.compute import PlansCfg, make_plans


def main(inputs: Any, outputs: Any, cfg: PlansCfg) -> None:
    maps = inputs.maps[0] if inputs.maps else None
    folder = Path(outputs.index).parent
    make_plans(inputs.manifest, inputs.cache, maps, folder, outputs.sensitivity, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
