"""Draw the manifest of a corpus from the configured sound."""

from pathlib import Path
from typing import Any, Literal, TypedDict

import pandas as pd

import eqknobs.script
from eqknobs.corpus.manifest import CorpusCfg, build_manifest, fetch, unite
from eqknobs.corpus.mixtures import MixtureCfg, mix
from eqknobs.corpus.synthesis import SynthesisCfg, synthesise
from eqknobs.errors import counted
from eqknobs.io import read_csv, write_csv, write_json


class UnionCfg(TypedDict):
    source: Literal["union"]
    of: list[str]  # corpora


class SyntheticCfg(SynthesisCfg):
    source: Literal["synthesis"]


class JobCfg(TypedDict):
    data: CorpusCfg | UnionCfg | MixtureCfg | SyntheticCfg
    max_minutes: float | None  # as the last draw had it, where neither limits that
    seed: int


def main(inputs: Any, outputs: Any, cfg: JobCfg) -> None:
    data = cfg["data"]
    if data["source"] == "union":
        manifest, rejected = unite({name: read_csv(path) for name, path in zip(data["of"], inputs.parts)})
    elif data["source"] == "mixture":
        parts = {name: read_csv(path) for name, path in zip([*data["of"], *data["noise"]], inputs.parts, strict=True)}
        manifest, rejected = mix(parts, data, Path(outputs.manifest).parent, cfg["seed"])
    elif data["source"] == "synthesis":
        manifest = synthesise(Path(outputs.manifest).parent, data, cfg["seed"])
        rejected = pd.DataFrame(columns=["path", "reason"])
    else:
        folder = fetch(data, Path("work"))
        manifest, rejected = build_manifest(folder, data, cfg["seed"])
    drawn = f"{counted(len(manifest), 'utterance')} of {counted(manifest.speaker.nunique(), 'speaker')}"
    print(f"{drawn}, {counted(len(rejected), 'file')} rejected")
    record = {"max_minutes": cfg["max_minutes"], "seconds": float(manifest.seconds.sum())}
    write_json(outputs.drawn, record | {"limited": manifest.attrs.get("limited", True)})
    write_csv(outputs.rejected, rejected)
    write_csv(outputs.manifest, manifest)


if __name__ == "__main__":
    eqknobs.script.run(main, snakemake)  # noqa: F821
