"""Label search: the section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, figure, legend
from eqknobs.evidence.stage import Context

STAGE, TITLE, SOUNDS = "label_search", "Label search", False
ABOUT = "The one feature that tells each label best, chosen on val and tested once."
PUBLISHED_SOURCE = "AudioSAE (arXiv 2602.05027), appendix F."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "labels": (
        ["AudioSAE", "F1, threshold chosen where it is reported"],
        [["HuBERT-base layer 4, feature 6106: whispering", ".6"], ["kept as a find", "above .5 at any threshold"]],
    ),
}


def _against(rows: pd.DataFrame, sae: str) -> dict[str, str]:
    own = rows.sort_values("f1_test", ascending=False)
    x = np.arange(len(own))

    def draw(axes: plt.Axes) -> None:
        ends = np.clip([own["f1_test"] - own["f1_test_low"], own["f1_test_high"] - own["f1_test"]], 0, None)
        axes.errorbar(x, own["f1_test"], ends, fmt="o", color=HUES["blue"], ecolor=INK, lw=1, label="best feature")
        axes.plot(x, own["raw_f1"], "v", color=HUES["orange"], label="best raw dimension")
        axes.plot(x, own["constant_f1"], "_", ms=9, color=INK, label="always yes")
        axes.plot(x, own["shuffled_f1"], "x", color=FAINT, label="shuffled labels")
        axes.set_xticks(x, own["property"] + " " + own["label"], rotation=90, fontsize=7)
        axes.set(ylabel="F1, test", ylim=(0, 1))
        legend(axes)

    width = max(4.0, min(10.0, 1 + 0.2 * len(own)))
    return figure(f"F1 of the best feature ({sae})", draw, "Chosen on val; lines: 95 %.", height=3.4, width=width)


def show(at: Context) -> dict[str, Any]:
    """Every label's best feature beside its rivals."""
    rows = at.inputs.csv("tables/label_search.csv")
    rows = rows[rows["target"] == at.target]
    columns = {
        "SAE": "sae",
        "label": lambda r: f"{r['property']}: {r['label']}",
        "feature": lambda r: f"{r['sae_feature']:g}",
        "F1, val": ("f1_val", 2),
        "F1, test": ("f1_test", 2),
        "p (Holm)": ("p_holm", 4),
        "raw dimension": ("raw_f1", 2),
        "always yes": ("constant_f1", 2),
        "shuffled": ("shuffled_f1", 2),
        "clips / speakers": display.sample,
    }
    drawn = [_against(own, sae) for sae, own in rows.groupby("sae")]
    return {"drawn": drawn, "found": display.laid_out(rows, columns)}
