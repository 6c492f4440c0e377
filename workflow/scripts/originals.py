"""Transcribe the untouched test clips."""

from typing import Any

import eqknobs.script
from eqknobs.judges import judge_originals
from eqknobs.pieces import Pieces


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    judge_originals(inputs.manifest, outputs[0], {**cfg["judges"], "device": cfg["device"]}, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
