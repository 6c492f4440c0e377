"""Tell the features of a target's SAEs apart by domain."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.domains.compute import DomainsCfg, score_domains


def main(inputs: Any, outputs: Any, cfg: DomainsCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    score_domains(inputs.manifest, inputs.cache, saes, outputs.scores, outputs.found, cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
