"""Cache the activations of one target."""

from typing import Any

import eqknobs.script
from eqknobs.activations import cache_activations


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    cache_activations(inputs.manifest, outputs[0], cfg["model"], cfg["site"], cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
