"""Fit and score the probes of one property."""

from pathlib import Path
from typing import Any

from eqknobs.probes import fit_probes
from eqknobs.script import run


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    folders = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    fit_probes(
        inputs.cache,
        inputs.labels,
        folders,
        cfg["property"],
        outputs.probes,
        outputs.scores,
        outputs.ridge,
        cfg,
        cfg["seed"],
    )


if __name__ == "__main__":
    run(main, snakemake)  # noqa: F821
