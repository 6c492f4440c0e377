"""Render steered sound on test."""

from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.shards import sound_outputs
from eqknobs.stages.steering.compute import Sources, SteeringRendersCfg, render_steering


def main(inputs: Any, outputs: Any, cfg: SteeringRendersCfg) -> None:
    render_steering(Sources.declared(inputs), inputs.calibration, *sound_outputs(outputs), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
