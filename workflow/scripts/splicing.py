"""Let a Whisper go on from its SAEs' reconstructions of one layer."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.saes.splicing import SplicingCfg, score_splicing


def main(inputs: Any, outputs: Any, cfg: SplicingCfg) -> None:
    saes = {(path.parts[-3], int(path.parts[-2].removeprefix("seed"))): path.parent for path in map(Path, inputs.saes)}
    manifests = dict(zip([cfg["corpus"], *cfg["others"]], [inputs.speech, *inputs.others], strict=True))
    score_splicing(manifests, inputs.cache, saes, outputs.scores, cfg)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
