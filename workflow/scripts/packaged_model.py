"""Make a model that comes inside a package into one that transformers loads."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.models.ctranslate2 import convert_whisper
from eqknobs.models.packaged import PACKAGED, package_files


def main(_inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    parts = package_files(cfg["name"])
    convert_whisper(parts, parts[-1].parent, Path(outputs[0]).parent, PACKAGED[cfg["name"]].sha256)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
