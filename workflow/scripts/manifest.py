"""Draw the manifest of a corpus from the configured sound."""

from pathlib import Path
from typing import Any

import eqknobs.script
from eqknobs.corpus.manifest import build_manifest, fetch, unite
from eqknobs.errors import counted
from eqknobs.io import read_csv, write_csv


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    if cfg["data"]["source"] == "union":
        manifest, rejected = unite({name: read_csv(path) for name, path in zip(cfg["data"]["of"], inputs.parts)})
    else:
        folder = fetch(cfg["data"], Path("work"))
        manifest, rejected = build_manifest(folder, cfg["data"], cfg["seed"])
    drawn = f"{counted(len(manifest), 'utterance')} of {counted(manifest.speaker.nunique(), 'speaker')}"
    print(f"{drawn}, {counted(len(rejected), 'file')} rejected")
    write_csv(outputs.rejected, rejected)
    write_csv(outputs.manifest, manifest)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
