"""Draw the manifest from the configured speech."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.data import build_manifest, fetch
from eqknobs.errors import counted
from eqknobs.io import write_csv


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    folder = fetch(cfg["data"], Path("work"))
    manifest, rejected = build_manifest(folder, cfg["data"], cfg["seed"])
    drawn = f"{counted(len(manifest), 'utterance')} of {counted(manifest.speaker.nunique(), 'speaker')}"
    print(f"{drawn}, {counted(len(rejected), 'file')} rejected")
    write_csv(outputs.rejected, rejected)
    write_csv(outputs.manifest, manifest)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
