"""Label the frames of one target."""

from typing import Any

import eqknobs.script
from eqknobs.corpus.labels import LabelsCfg, write_labels


def main(inputs: Any, outputs: Any, cfg: LabelsCfg) -> None:
    write_labels(inputs.manifest, inputs.cache, outputs[0], cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
