"""Map importance and choose a map on val."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.stages.importance.maps import MapFiles, MapsCfg, compute_maps


def main(inputs: Any, outputs: Any, cfg: MapsCfg) -> None:
    saes = {Path(path).parts[-3]: Path(path).parent for path in inputs.saes}
    out = MapFiles(outputs.maps, outputs.oracle, outputs.val)
    compute_maps(inputs.manifest, inputs.cache, saes, inputs.probes, out, cfg, Pieces())


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
