"""Render steered sound on test."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.steering.compute import render_steering


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    probes: dict[str, list[str]] = {}
    for path in inputs.probes:
        probes.setdefault(Path(path).stem, []).append(path)
    render_steering(
        inputs.manifest,
        inputs.cache,
        inputs.labels,
        saes,
        probes,
        inputs.calibration,
        Path(outputs.index).parent,
        outputs.signal,
        cfg,
        Pieces(),
    )


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
