"""Ablate by the importance maps."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.importance.compute import ImportanceCfg, render_importance


def main(inputs: Any, outputs: Any, cfg: ImportanceCfg) -> None:
    folder = Path(outputs.index).parent
    render_importance(inputs.manifest, inputs.cache, inputs.maps, folder, outputs.signal, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
