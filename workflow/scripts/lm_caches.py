"""Cache every layer and head of a speech LM, and those of a random network."""

from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.lm_layers.turns import cache_turns


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    cache_turns(inputs.manifest, outputs.turns, outputs.index, {**cfg, **cfg["judges"]}, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
