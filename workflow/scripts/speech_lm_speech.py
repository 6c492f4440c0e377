"""Speak sentences for a speech LM to learn from."""

from typing import Any, TypedDict

import pandas as pd

import eqknobs.script
from eqknobs.io import write_csv
from eqknobs.stages.speech_lm_training.synthesis import synthesise


class SynthesisCfg(TypedDict):
    clips: list[int]  # numbers of clips: the first, and the one after the last
    held_out: list[int]  # further ones, of which only val and test sentences are spoken


class JobCfg(TypedDict):
    speech: str
    synthesis: SynthesisCfg
    seed: int


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    numbers = cfg["synthesis"]
    drawn = [(numbers["clips"], ("train", "val", "test")), (numbers["held_out"], ("val", "test"))]
    parts = [synthesise(cfg["speech"], range(*ends), parts, cfg["seed"]) for ends, parts in drawn]
    write_csv(outputs[0], pd.concat(parts, ignore_index=True))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
