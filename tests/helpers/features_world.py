"""A run's folder with pages of features: a random codec, tones, two random SAEs, what other stages say of a feature."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from eqknobs.evidence.inputs import Inputs
from eqknobs.evidence.stage import Context
from eqknobs.io import write_csv, write_json
from eqknobs.report.page import environment, frame_of
from eqknobs.stages.features import section, tables
from eqknobs.stages.features.compute import FeaturesCfg, Out, page_features, read_names
from helpers.tiny_world import SITE, World, make_world

TARGET = f"tiny.{SITE}"
CFG: FeaturesCfg = {
    "count": 4,
    "random": 3,
    "min_firings": 2,
    "splits": ["train", "val", "test"],
    "clips": 3,
    "seconds": 0.6,
    "map_clips": 6,
    "map_frames": 5,
    "seed": 0,
}
NAMED = 5  # the feature that other stages name


@dataclass
class Paged:
    """The folder of the run and what it was made of."""

    run: Path
    world: World

    def context(self, captions: Path | None = None) -> Context:
        """Where its tables and pages are made."""
        inputs = Inputs.below(self.run, *([captions] if captions else []))
        own = {"targets": [TARGET], "captions": str(captions) if captions else None}
        return Context(TARGET, inputs, {"bootstrap": 100, "seed": 0}, own)

    def write_pages(self, captions: Path | None = None) -> dict[str, Path]:
        """SAE -> its page, below `report/`."""
        templates, found = environment(), {}
        frame = {**frame_of("tiny"), "pages": [], "here": "features", "playing": {"made": {}}}
        for page in section.pages(self.context(captions)):
            text = templates.get_template(page.template).render(**frame, title=page.title, **page.shown)
            path = found[page.shown["sae"]] = self.run / "report" / page.file
            path.write_text(text)
        return found


def make_paged(root: Path) -> Paged:
    """The run, below `root/results/tiny`, as the rules would leave it."""
    world, run = make_world(root), root / "results" / "tiny"
    for path, old in {
        f"activations/{TARGET}.h5": world.cache,
        "manifest/manifest.csv": world.manifest,
        **{f"saes/{TARGET}/{sae}/seed0": folder for sae, folder in world.saes.items()},
    }.items():
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).symlink_to(old)
    searches = [
        {"sae": "topk", "property": "sex", "label": "F", "column": NAMED, "p": 0.01, "f1_test": 0.9},
        {"sae": "", "property": "sex", "label": "F", "column": 1, "p": 0.01, "f1_test": 0.9},
    ]
    write_json(run / "label_search" / f"{TARGET}.json", {"searches": searches})
    twins = {"kind": "seeds", "sae": "topk", "a": f"{TARGET} #0", "b": f"{TARGET} #1", "feature": [NAMED, 6]}
    write_csv(run / "scores" / f"{TARGET}.stability.csv", pd.DataFrame({**twins, "best": [0.75, 0.2], "found": [9, 3]}))
    config = {
        "run": {"name": "tiny", "targets": [TARGET]},
        "sae_seeds": [0, 1],
        "saes": {name: {} for name in world.saes},
    }
    config["models"] = {"tiny": {key: world.cfg["model"][key] for key in ("kind", "path", "revision")}}
    (run / "report").mkdir()
    (run / "report" / "config.yaml").write_text(yaml.safe_dump(config))
    said = {
        "label_search": run / "label_search" / f"{TARGET}.json",
        "stability": run / "scores" / f"{TARGET}.stability.csv",
    }
    names = {sae: read_names(sae, **said) for sae in world.saes}
    files = f"scores/{TARGET}.features.csv", f"features/{TARGET}.json", f"features/{TARGET}.npz"
    out = Out(*(run / file for file in files), run / "renders" / TARGET / "features" / "index.csv")
    page_features(world.manifest, world.cache, world.saes, names, out, CFG)
    paged = Paged(run, world)
    made = tables.tabulate(paged.context())
    write_csv(run / "tables" / "features.csv", made.tables["features"])
    return paged
