"""Probe every layer and every head of a speech LM."""

from typing import Any

import eqknobs.script
from eqknobs.stages.lm_layers.compute import LmLayersCfg, probe_layers


def main(inputs: Any, outputs: Any, cfg: LmLayersCfg) -> None:
    probe_layers(inputs.turns, inputs.index, inputs.labels, outputs.layers, outputs.clips, outputs.heads, cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
