"""Let espeak-ng say the same sentences in every accent with every voice."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.corpus.synthesis import SynthesisCfg, synthesise
from eqknobs.io import write_csv


def main(inputs: Any, outputs: Any, cfg: SynthesisCfg) -> None:
    write_csv(outputs.manifest, synthesise(Path(outputs.manifest).parent, cfg, cfg["seed"]))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
