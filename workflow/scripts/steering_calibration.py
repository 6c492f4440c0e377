"""Calibrate the steering arms on val."""

from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.steering.compute import CalibrationCfg, Sources, calibrate_steering


def main(inputs: Any, outputs: Any, cfg: CalibrationCfg) -> None:
    calibrate_steering(Sources.declared(inputs), outputs.calibration, outputs.scores, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
