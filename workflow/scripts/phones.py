"""Name the features of a target's SAEs after phones."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.phones.compute import PhonesCfg, score_phones


def main(inputs: Any, outputs: Any, cfg: PhonesCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    score_phones(inputs.cache, inputs.labels, saes, outputs.scores, outputs.found, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
