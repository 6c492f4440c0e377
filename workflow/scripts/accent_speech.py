"""Let espeak-ng say the same sentences in every accent with every voice."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.accent.speech import SynthesisCfg, synthesise


def main(inputs: Any, outputs: Any, cfg: SynthesisCfg) -> None:
    synthesise(Path(outputs.manifest).parent, outputs.manifest, cfg, cfg["seed"])


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
