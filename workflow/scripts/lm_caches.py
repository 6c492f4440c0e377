"""Cache every layer and head of a speech LM, and those of a random network."""

from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.lm_layers.turns import TurnsCfg, cache_turns


def main(inputs: Any, outputs: Any, cfg: TurnsCfg) -> None:
    cache_turns(inputs.manifest, outputs.turns, outputs.index, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
