"""Draw the manifest from the configured speech."""

from pathlib import Path
from typing import Any

from eqknobs.data import build_manifest, fetch
from eqknobs.io import write_csv
from eqknobs.script import run


def main(inputs: Any, outputs: Any, cfg: dict[str, Any]) -> None:
    folder = fetch(cfg["data"], Path("work"))
    manifest, rejected = build_manifest(folder, cfg["data"], cfg["seed"])
    print(f"{len(manifest)} utterances of {manifest.speaker.nunique()} speakers, {len(rejected)} files rejected")
    write_csv(outputs.rejected, rejected)
    write_csv(outputs.manifest, manifest)


if __name__ == "__main__":
    run(main, snakemake)  # noqa: F821
