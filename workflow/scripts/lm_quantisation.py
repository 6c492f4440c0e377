"""Pack a speech LM in many ways and judge what it says."""

import tempfile
from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.lm_quantisation.compute import Inputs, Outputs, quantise_and_score


def main(inputs: Any, outputs: Any, cfg: Any) -> None:
    probes = list(inputs.probes) if not isinstance(inputs.probes, str) else [inputs.probes]
    manifest = inputs.manifest if isinstance(inputs.manifest, str) else next(iter(inputs.manifest), None)
    with tempfile.TemporaryDirectory() as folder:
        layers, heads = probes or (None, None)
        files = Inputs(layers=layers, heads=heads, manifest=manifest, codes=Path(folder) / "codes.npz")
        out = Outputs(
            sensitivity=outputs.sensitivity,
            nats=outputs.nats,
            answers=outputs.answers,
            plans=str(Path(outputs.index).parent),
            sounds=str(Path(outputs.sounds).parent),
        )
        quantise_and_score(cfg, files, out, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
