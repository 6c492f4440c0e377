"""Train a speech LM on clips with word times."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.speech_lm_training.training import SpeechLMTrainingCfg, train


def main(inputs: Any, outputs: Any, cfg: SpeechLMTrainingCfg) -> None:
    del cfg["content"]  # decides when to train again, not how
    model = Path(outputs.weights).parent
    train(cfg, model, model.with_name("training"))  # no output: Snakemake deletes outputs before a job is repeated


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
