"""Let a speech LM say held-out sentences and judge what is heard."""

import tempfile
from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.speech_lm.compute import AnswersCfg, answer_sentences


def main(inputs: Any, outputs: Any, cfg: AnswersCfg) -> None:
    with tempfile.TemporaryDirectory() as folder:
        codes = Path(folder) / "codes.npz"
        answer_sentences(cfg, outputs.answers, Path(outputs.index).parent, codes, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
