"""Stable features: the section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, figure, legend
from eqknobs.evidence.stage import Context
from eqknobs.stages.stability.tables import KINDS

STAGE, TITLE, SOUNDS = "stability", "Stability", False
ABOUT = "Which features another seed, layer or model finds again, beside what luck finds."
PUBLISHED_SOURCE = "AudioSAE (arXiv 2602.05027), tables 4 and 5."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "coverage": (
        ["found again at θ .5, % of 6,144 features, speech", "layers 1 / 4 / 7 / 10 / 12"],
        [
            ["HuBERT-base, another seed", "6.8 / 28.8 / 47.7 / 69.9 / 51.5"],
            [
                "Whisper-small, half its training against all of it (no second seed published)",
                "20.8 / 32.3 / 26.2 / 61.0 / 75.7",
            ],
            ["HuBERT-base, the next of these layers", "1.5 / 4.2 / 7.4 / 23.9"],
            ["Whisper-small, the next of these layers", "15.0 / 21.1 / 10.3 / 43.8"],
            ["HuBERT and Whisper, either way", ".8 – 2.9"],
            ["duplicates, HuBERT-base", ".4 / .8 / 1.7 / 5.7 / 3.6"],
            ["duplicates, Whisper-small", "12.9 / 12.3 / 12.8 / 3.6 / 3.7"],
        ],
    ),
}
HUE = {"seeds": "blue", "layers": "orange", "models": "green", "untrained": "grey"}


def _survival(sae: str, features: pd.DataFrame, thetas: list[float]) -> dict[str, str]:
    """Share of features whose best overlap is above θ, for every θ, by kind; first pair of each."""

    def draw(axes: plt.Axes) -> None:
        for kind, rows in features.groupby("kind", sort=False):
            first = rows[(rows["a"] == rows["a"].iloc[0]) & (rows["b"] == rows["b"].iloc[0])]
            for column, style in (("best", "-"), ("shift", ":")):
                values = np.sort(first[column].to_numpy())
                if column == "best" or kind == "seeds":
                    label = KINDS[kind] if column == "best" else "shifted in time"
                    colour = HUES[HUE[kind]] if column == "best" else INK
                    axes.plot(values, 1 - np.arange(len(values)) / len(values), style, color=colour, label=label)
        for theta in thetas:
            axes.axvline(theta, color=FAINT, lw=0.8, ls="--")
        axes.set(xlabel="overlap θ", ylabel="features found again", xlim=(0, 1), ylim=(0, 1))
        legend(axes)

    return figure(
        f"Features found again ({sae})",
        draw,
        "Share whose best overlap of firing is above θ; dashed: the θ of the table.",
    )


def show(at: Context) -> dict[str, Any]:
    """How many features are found again, at every θ, and the table."""
    rows = at.inputs.csv("tables/stability.csv")
    rows = rows[rows["target"] == at.target]
    features = at.inputs.csv(f"scores/{at.target}.stability.csv")
    drawn = [_survival(sae, own, sorted(rows["theta"].unique())) for sae, own in features.groupby("sae")]
    columns = {
        "SAE": "sae",
        "among the features of": lambda r: f"{KINDS[r['kind']]}: {r['b']}",
        "of": "a",
        "θ": ("theta", 2),
        "found again": ("coverage", 3),
        "shifted in time": ("null_shift", 3),
        "by rate": ("null_rate", 3),
        "duplicates": ("duplicates", 3),
        "of all": ("coverage_all", 3),
        "features": lambda r: f"{r['features']} of {r['d_sae']}",
        "best cosine": ("cosine", 3),
        "clips / speakers": display.sample,
    }
    about = at.inputs.json(f"stability/{at.target}.json")
    return {
        "drawn": drawn,
        "pairs": display.laid_out(rows, columns),
        "least": about["min_firings"],
        "selection": about["selection"],
    }
