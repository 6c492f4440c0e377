"""Let a speech LM that was just trained say held-out sentences and judge what is heard."""

from pathlib import Path
from typing import Any, TypedDict

import eqknobs.script
from eqknobs.models import ModelCfg
from eqknobs.pieces import Pieces
from eqknobs.stages.speech_lm.compute import AnswersCfg, ScoresCfg, answer_sentences


class JobCfg(TypedDict):
    speech: str
    codec: str
    scores: ScoresCfg
    device: str


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    folder = Path(inputs.weights).parent
    model: ModelCfg = {"name": "tiny-moshi", "kind": "moshi", "path": str(folder), "codec": cfg["codec"]}
    model["device"] = cfg["device"]
    codes = folder.with_name("training") / "codes.npz"  # what the training encoded
    scores: AnswersCfg = {**cfg["scores"], "model": model, "speech": cfg["speech"]}
    answer_sentences(scores, outputs.answers, Path(outputs.index).parent, codes, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
