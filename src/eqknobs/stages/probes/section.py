"""The probes' section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, INK, Look, figure, legend, look, sae_hue
from eqknobs.evidence.stage import Context
from eqknobs.evidence.wording import PROPERTIES, label
from eqknobs.stages.probes.tables import SPACES

STAGE, TITLE, SOUNDS = "probes", "Probes", False
ABOUT = "What linear probes read in each space, beside majority, shuffled labels and the spectrum."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "probes": (
        ["", "version 1", "rerun: raw / ReLU SAE / TopK SAE"],
        [
            ["centroid, 20 bins", ".481 (“against 5 % chance”)", ".428 / .424 / .417"],
            ["centroid, ±1 bin", "–", ".805 / .800 / .814"],
            ["centroid, ridge R²", "–", ".869 / .886 / .843"],
            ["pitch", "–", ".479 / .508 / .566"],
            ["RMS", ".461", "–"],
        ],
    ),
}
LOOKS = {
    "raw": Look(HUES["orange"]),
    "pca_l0": Look(HUES["green"]),
    "pca_d": Look(HUES["green"]),
    "random_topk": Look(HUES["grey"]),
    "logmel": Look(HUES["yellow"]),
}
ORDER = ("raw", "pca_d", "pca_l0", "random_topk", "sae", "logmel")  # SAEs in the order of their table


def _color(space: str, saes: list[str]) -> str:
    kind, _, sae = space.partition(":")
    return sae_hue(sae, saes) if kind == "sae" and sae in saes else look(space, LOOKS).color


def _figure(name: str, rows: pd.DataFrame, saes: list[str], bins: int) -> dict[str, str]:
    """Accuracy in every space; rows: of one property, quantile bins, test."""
    order = [space for kind in ORDER for space in ([f"sae:{sae}" for sae in saes] if kind == "sae" else [kind])]
    rows = rows.set_index("space").reindex([s for s in order if s in set(rows["space"])][::-1]).reset_index()

    def bars(axes: plt.Axes) -> None:
        ends = np.abs(rows[["accuracy_low", "accuracy_high"]].to_numpy().T - rows["accuracy"].to_numpy())
        y = np.arange(len(rows))
        axes.barh(y, rows["accuracy"], color=[_color(s, saes) for s in rows["space"]], height=0.62, alpha=0.85)
        axes.errorbar(rows["accuracy"], y, xerr=ends, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
        axes.plot(rows["majority"], y, "|", color=INK, ms=12, mew=1.6, label="majority class")
        axes.plot(rows["shuffled"], y, "x", color=INK, ms=5, mew=1.4, label="shuffled labels")
        axes.set_yticks(y, [label(s, SPACES) for s in rows["space"]])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy on test")
        legend(axes)

    caption = (
        f"{counted(bins, 'quantile bin')}; 95 % intervals over {counted(rows['speakers'].max(), 'test speaker')} and "
        f"{counted(rows['utterances'].max(), 'clip')}. Log-mel is the ceiling."
    )
    return figure(PROPERTIES.get(name, name), bars, caption, height=2.9)


def show(at: Context) -> dict[str, Any]:
    """A figure a property, and the table of test."""
    rows = at.inputs.csv("tables/probes.csv")
    rows = rows[(rows["target"] == at.target) & (rows["split"] == "test")]
    quantile = rows[rows["binning"] == "quantile"]
    saes = [row["sae"] for row in at.facts["sae"]]
    bins = at.own["bins"]
    columns = {
        "property": lambda r: PROPERTIES.get(r["property"], r["property"]),
        "binning": lambda r: r["binning"].replace("_", " "),
        "space": lambda r: label(r["space"], SPACES),
        "accuracy": ("accuracy", 3),
        "balanced": ("balanced_accuracy", 3),
        "±1 bin": ("within_one_bin", 3),
        "ridge R²": ("ridge_r2", 3),
        "majority": ("majority", 3),
        "shuffled": ("shuffled", 3),
        "clips / speakers": display.sample,
    }
    return {
        "drawn": [
            _figure(name, quantile[quantile["property"] == name], saes, bins) for name in rows["property"].unique()
        ],
        "probes": display.laid_out(rows, columns),
        "saes": bool(saes),
    }
