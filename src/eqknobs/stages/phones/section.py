"""Features named after phones: the section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, figure
from eqknobs.evidence.stage import Context
from eqknobs.stages.phones.tables import METHODS

STAGE, TITLE, SOUNDS = "phones", "Phones", False
ABOUT = "Whether features can be named after phones, and what their names tell."
PUBLISHED_SOURCE = "AudioSAE (arXiv 2602.05027), and an independent reproduction on wav2vec2 of September 2026."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "phones": (
        ["", "accuracy on frames"],
        [
            ["AudioSAE, Whisper-small, any feature on", ".92 (fit and test clips not said to differ)"],
            ["AudioSAE, HuBERT-base, any feature on", ".89"],
            ["reproduction on wav2vec2-large layer 15: any feature on", ".798"],
            ["the same: strongest named feature", ".677"],
            ["the same: linear probe of codes / of raw activations", ".736 / .802"],
            ["the same: most frequent phone", ".074"],
        ],
    ),
}


def _names(found: dict[str, Any], sae: str) -> dict[str, str]:
    counts = pd.Series(found["names"]).sort_values(ascending=False)

    def draw(axes: plt.Axes) -> None:
        axes.bar(range(len(counts)), counts, color=HUES["blue"])
        axes.set_xticks(range(len(counts)), counts.index, rotation=90, fontsize=7)
        axes.set(ylabel="features")

    on = f"{found['on']:.1f} features are on in a frame, {found['named_on']:.1f} of them have a name."
    return figure(f"Features named after each phone ({sae})", draw, on, width=5.0)


def show(at: Context) -> dict[str, Any]:
    """How many features each phone has, and the table."""
    rows, about = at.inputs.csv("tables/phones.csv"), at.inputs.json(f"phones/{at.target}.json")
    columns = {
        "how": lambda r: METHODS[r["method"]],
        "of": "space",
        "frames told right": ("accuracy", 3),
        "by luck": ("null", 3),
        "features with a name": lambda r: "–" if pd.isna(r["named"]) else f"{r['named']:.0f} of {r['features']:.0f}",
        "clips / speakers": display.sample,
    }
    return {
        "drawn": [_names(found, sae) for sae, found in about["saes"].items() if found["names"]],
        "found": display.laid_out(rows[rows["target"] == at.target], columns),
        "purity": about["purity"],
        "least": about["min_firings"],
    }
