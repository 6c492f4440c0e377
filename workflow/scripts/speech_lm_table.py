"""Tabulate what a speech LM that was just trained says."""

from typing import Any

import eqknobs.script
from eqknobs.evidence.estimates import IntervalsCfg
from eqknobs.io import read_csv, write_csv
from eqknobs.stages.speech_lm.tables import conditions


def main(inputs: Any, outputs: Any, cfg: IntervalsCfg) -> None:
    write_csv(outputs[0], conditions(read_csv(inputs.answers), cfg))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
