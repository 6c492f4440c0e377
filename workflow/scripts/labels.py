"""Label the frames of one target."""

from typing import Any

from eqknobs.labels import write_labels
from eqknobs.script import run


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    write_labels(inputs.manifest, inputs.cache, outputs[0], cfg)


if __name__ == "__main__":
    run(main, snakemake)  # noqa: F821
