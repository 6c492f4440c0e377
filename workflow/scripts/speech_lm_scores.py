"""Let a speech LM say held-out sentences and judge what it says."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.speech_lm_training.evaluation import evaluate


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    model = Path(inputs.weights).parent
    evaluate(cfg, model, model.with_name("training") / "codes.npz", outputs.table)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
