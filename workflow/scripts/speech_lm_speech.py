"""Speak sentences for a speech LM to learn from."""

from typing import Any

import pandas as pd

import eqknobs.script
from eqknobs.io import write_csv
from eqknobs.stages.speech_lm_training.synthesis import synthesise


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    drawn = [("clips", ("train", "val", "test")), ("held_out", ("val", "test"))]
    parts = [synthesise(cfg["speech"], range(*cfg["synthesis"][key]), parts, cfg["seed"]) for key, parts in drawn]
    write_csv(outputs[0], pd.concat(parts, ignore_index=True))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
