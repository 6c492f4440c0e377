"""Train a codec from folders of speech."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.stages.codec_training.training import CodecTrainingCfg, train


def main(inputs: Any, outputs: Any, cfg: CodecTrainingCfg) -> None:
    out = Path(outputs.weights).parent
    train(cfg, out, out.with_name("checkpoint.pt"))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
