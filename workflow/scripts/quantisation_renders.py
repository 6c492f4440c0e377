"""Build the codec of every plan and run test clips through it."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.shards import sound_outputs
from eqknobs.stages.quantisation.compute import RendersCfg, render_plans


def main(inputs: Any, outputs: Any, cfg: RendersCfg) -> None:
    plans, (folder, signal) = Path(inputs.plans).parent, sound_outputs(outputs)
    render_plans(inputs.manifest, inputs.cache, plans, folder, signal, outputs.get("time"), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
