"""Transcribe the untouched test clips."""

import os
from typing import Any

import eqknobs.script
from eqknobs.pieces import Pieces
from eqknobs.sound.judges import JudgesCfg
from eqknobs.sound.judging import judge_originals


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    judges: JudgesCfg = cfg["judges"] | {"device": cfg["device"]}
    workers = int(os.environ["OMP_NUM_THREADS"])
    judge_originals(inputs.manifest, outputs[0], judges, Pieces(), workers, cfg.get("shard"))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
