"""Render steered sound on test."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.steering.compute import Sources, SteeringRendersCfg, render_steering


def main(inputs: Any, outputs: Any, cfg: SteeringRendersCfg) -> None:
    out_dir = Path(outputs.index).parent
    render_steering(Sources.declared(inputs), inputs.calibration, out_dir, outputs.signal, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
