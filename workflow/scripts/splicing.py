"""Let a model transcribe from the reconstructions of one target's SAEs."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.saes.splicing import SplicingCfg, score_splicing


class JobCfg(SplicingCfg):
    non_speech: list[str]  # corpora, in the order of their manifests


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    saes = {}
    for path in map(Path, inputs.saes):
        saes[path.parts[-3], int(path.parts[-2].removeprefix("seed"))] = path.parent
    others = dict(zip(cfg["non_speech"], inputs.non_speech, strict=True))
    score_splicing(inputs.speech, others, inputs.cache, saes, outputs[0], cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
