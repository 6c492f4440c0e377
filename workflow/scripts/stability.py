"""Which features of a target's SAEs are found again in others."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.stability.compute import Source, StabilityCfg, score_stability


def main(inputs: Any, outputs: Any, cfg: StabilityCfg) -> None:
    caches = {Path(path).stem: Path(path) for path in inputs.caches}
    folders = {Path(path).parent for path in inputs.saes}
    sources = {}
    for _, sae, target_a, seed_a, target_b, seed_b in cfg["pairs"]:
        for target, seed in ((target_a, seed_a), (target_b, seed_b)):
            home = cfg["homes"][f"{target} {sae}"]
            folder = next(f for f in folders if f.parts[-3:] == (home, sae, f"seed{seed}"))
            sources[target, sae, seed] = Source(caches[target], folder)
    score_stability(sources, outputs.scores, outputs.found, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
