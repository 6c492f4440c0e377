"""Judge words and voice of a run's renders."""

import os
from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.sound.judges import JudgesCfg
from eqknobs.sound.judging import Renders, judge_renders


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    shard = cfg.get("shard")  # declares a mark, no table
    tables = [""] * len(inputs.indexes) if shard else outputs
    files = zip(inputs.indexes, inputs.originals, inputs.manifests, tables, strict=True)
    renders = [Renders(*paths, quality=Path(paths[0]).parent.name in cfg["dnsmos"]) for paths in files]
    judges: JudgesCfg = cfg["judges"] | {"device": cfg["device"]}
    judge_renders(renders, judges, Pieces(), workers=int(os.environ["OMP_NUM_THREADS"]), shard=shard)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
