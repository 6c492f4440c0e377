"""Score the SAEs of one target on val and test."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.saes.compute import SaeScoresCfg, score_saes


def main(inputs: Any, outputs: Any, cfg: SaeScoresCfg) -> None:
    folders: dict[str, dict[int, Path]] = {}
    for path in map(Path, inputs.saes):
        folders.setdefault(path.parts[-3], {})[int(path.parts[-2].removeprefix("seed"))] = path.parent
    score_saes(inputs.cache, folders, outputs.scores, outputs.summary, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
