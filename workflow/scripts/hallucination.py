"""Keep a Whisper from writing where nobody speaks, and measure what that costs."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.hallucination.compute import HallucinationCfg, Inputs, Outputs, hallucinate


def several(files: Any) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


def main(inputs: Any, outputs: Any, cfg: HallucinationCfg) -> None:
    layers, corpora = cfg["layers"], cfg["non_speech"]
    files = Inputs(
        speech=inputs.speech,
        non_speech=dict(zip(corpora, several(inputs.non_speech), strict=True)),
        heard=inputs.heard,
        caches=dict(zip(layers, several(inputs.caches), strict=True)),
        saes={layer: Path(file).parent for layer, file in zip(layers, several(inputs.saes), strict=True)},
    )
    sounds = str(Path(outputs.index).parent)
    hallucinate(files, Outputs(outputs.scores, outputs.chosen, outputs.fitted, sounds), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
