"""Seek the feature that tells each label of a target best."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.label_search.compute import LabelSearchCfg, search_labels


def main(inputs: Any, outputs: Any, cfg: LabelSearchCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    labels = str(inputs.labels) or None  # only of frames
    search_labels(inputs.cache, labels, inputs.manifest, saes, outputs.scores, outputs.found, cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
