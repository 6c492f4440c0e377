"""Gather what the pages of a target's features show."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.features.compute import FeaturesCfg, Out, page_features, read_names

STAGES = ("label_search", "phones", "domains", "stability")  # what they say of features is an input where they are on


def main(inputs: Any, outputs: Any, cfg: FeaturesCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    said = {stage: Path(file) for stage in STAGES for file in getattr(inputs, stage)}
    names = {sae: read_names(sae, **said) for sae in saes}
    where = Out(outputs.scores, outputs.found, outputs.maps, outputs.index)
    page_features(inputs.manifest, inputs.cache, saes, names, where, cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
