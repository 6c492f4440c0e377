"""Judge words and voice of rendered clips."""

from typing import Any

import eqknobs.script
from eqknobs.judges import judge_renders
from eqknobs.pieces import Pieces


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    judge = {**cfg["judges"], "device": cfg["device"]}
    judge_renders(inputs.index, inputs.originals, inputs.manifest, outputs[0], judge, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
