"""Render codec round trips."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.shards import sound_outputs
from eqknobs.stages.codec.compute import CodecCfg, render_codec


def main(inputs: Any, outputs: Any, cfg: CodecCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    render_codec(inputs.manifest, inputs.cache, saes, *sound_outputs(outputs), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
