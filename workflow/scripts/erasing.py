"""Probe and erase what a target's SAEs tell of its clips."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.erasing.compute import ErasingCfg, Read, Written, score_erasing


def main(inputs: Any, outputs: Any, cfg: ErasingCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    labels = str(inputs.labels) or None  # only where vowels are a task
    read = Read(inputs.manifest, inputs.cache, labels, saes)
    score_erasing(read, Written(outputs.probes, outputs.clips, outputs.swaps, outputs.found), cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
