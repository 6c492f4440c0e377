"""Train a speech LM on clips with word times."""

from pathlib import Path
from typing import Any

from eqknobs.script import run
from eqknobs.speech_lm.training import train


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    model = Path(outputs.weights).parent
    train(cfg, model, model.with_name("training"))  # no output: Snakemake deletes outputs before a job is repeated


if __name__ == "__main__":
    run(main, snakemake)  # noqa: F821
