"""Prune a speech LM in many ways and judge what it says."""

import tempfile
from pathlib import Path
from typing import Any, cast

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.lm_pruning.compute import Inputs, Outputs, prune_and_score


def main(inputs: Any, outputs: Any, cfg: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Inputs(heads=only(inputs.heads), manifest=only(inputs.manifest), codes=Path(folder) / "codes.npz")
        out = {name: str(path) for name, path in outputs.items() if name != "index"}
        out["sounds"] = str(Path(outputs.index).parent)
        prune_and_score(cfg, files, cast(Outputs, out), Pieces())


def only(files: Any) -> str | None:
    """The one file of an input that may be left out."""
    return files if isinstance(files, str) else next(iter(files), None)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
