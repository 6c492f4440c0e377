"""Look for the accent in sparse codes of a model's pooled activations."""

from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.accent.compute import AccentCfg, score_accent


def main(inputs: Any, outputs: Any, cfg: AccentCfg) -> None:
    score_accent(inputs.manifest, outputs.runs, outputs.clips, outputs.found, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
