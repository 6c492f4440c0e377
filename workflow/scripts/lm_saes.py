"""Train SAEs on layers of a speech LM and say what their features stand for."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.lm_layers.dictionaries import DictionariesCfg, train_dictionaries


def main(inputs: Any, outputs: Any, cfg: DictionariesCfg) -> None:
    folder = Path(outputs.saes[0]).parents[1]
    train_dictionaries(inputs.turns, inputs.index, inputs.labels, folder, outputs.scores, outputs.features, cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
