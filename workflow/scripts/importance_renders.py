"""Ablate by the importance maps."""

from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.shards import sound_outputs
from eqknobs.stages.importance.compute import ImportanceCfg, render_importance


def main(inputs: Any, outputs: Any, cfg: ImportanceCfg) -> None:
    render_importance(inputs.manifest, inputs.cache, inputs.maps, *sound_outputs(outputs), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
