"""Recover a pruned speech LM by a short training and write the smallest model that still says what it is told."""

import tempfile
from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.lm_recipe.compute import Inputs, Outputs, recover_and_score


def main(inputs: Any, outputs: Any, cfg: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Inputs(orders=inputs.orders, codes=Path(folder) / "codes.npz")
        out = Outputs(
            answers=outputs.answers,
            paces=outputs.paces,
            recipe=outputs.recipe,
            whole=outputs.whole,
            model=outputs.model,
            sounds=str(Path(outputs.index).parent),
        )
        recover_and_score(cfg, files, out, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
