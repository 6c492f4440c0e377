"""Steer a speech LM while it speaks and judge what it says."""

import tempfile
from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.lm_steering.compute import Inputs, Outputs, SteeringCfg, steer_and_score


def main(inputs: Any, outputs: Any, cfg: SteeringCfg) -> None:
    saes = [inputs.saes] if isinstance(inputs.saes, str) else list(inputs.saes)
    manifest = inputs.manifest if isinstance(inputs.manifest, str) else next(iter(inputs.manifest), None)
    with tempfile.TemporaryDirectory() as folder:
        files = Inputs(
            turns=inputs.turns,
            index=inputs.index,
            labels=inputs.labels,
            saes=Path(saes[0]).parents[1] if saes else None,
            manifest=manifest,
            codes=Path(folder) / "codes.npz",
        )
        out = Outputs(calibration=outputs.calibration, answers=outputs.answers, sounds=str(Path(outputs.index).parent))
        steer_and_score(cfg, files, out, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
