"""Train a codec from folders of speech."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.codec_training import train


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    out = Path(outputs.weights).parent
    del cfg["content"]  # decides when to train again, not how
    train(cfg, out, out.with_name("checkpoint.pt"))


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
