"""Label what a speech LM hears and says."""

from typing import Any

import eqknobs.script
from eqknobs.stages.lm_layers.turns import TurnLabelsCfg, label_turns


def main(inputs: Any, outputs: Any, cfg: TurnLabelsCfg) -> None:
    label_turns(inputs.turns, inputs.index, outputs[0], cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
