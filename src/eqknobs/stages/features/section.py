"""Features: the section of the report, and a page an SAE beside it."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, figure, legend
from eqknobs.evidence.stage import Context, Page
from eqknobs.io import read_text_csv, require_renders
from eqknobs.stages.features.pages import WHY, entry

STAGE, TITLE, SOUNDS = "features", "Features", False
TEMPLATE = "features/pages.html.j2"
ABOUT = (
    "Single features to hear: their strongest moments, the sound around the frames they fire on, what others call them."
)
PUBLISHED_SOURCE = "AudioSAE (arXiv 2602.05027)."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "onsets": (
        ["AudioSAE", "features of HuBERT-base layer 11, of 6144"],
        [["onset", "3249"], ["offset", "3081"], ["random or energy-matched frames", "not shown"]],
    ),
}


def page_file(target: str, sae: str) -> str:
    """The name of an SAE's page below the report."""
    return f"features.{target}.{sae}.html"


def _onsets(rows: pd.DataFrame, sae: str) -> dict[str, str]:
    own = rows.dropna(subset=["onset_share"]).sort_values("onset_share", ascending=False)
    x = np.arange(len(own))

    def draw(axes: plt.Axes) -> None:
        ends = np.clip(
            [own["onset_share"] - own["onset_share_low"], own["onset_share_high"] - own["onset_share"]], 0, 1
        )
        axes.errorbar(
            x, own["onset_share"], ends, fmt="o", color=HUES["blue"], ecolor=INK, lw=1, label="where it fires"
        )
        axes.plot(x, own["onset_matched"], "v", color=HUES["orange"], label="frames of the same level")
        axes.plot(x, own["onset_random"], "x", color=FAINT, label="random frames")
        axes.axhline(0.5, color=INK, lw=1, ls="--")
        axes.set_xticks(x, own["feature"].astype(int), rotation=90, fontsize=7)
        axes.set(xlabel="feature", ylabel="energy after the frame", ylim=(0, 1))
        legend(axes)

    width = max(4.0, min(10.0, 1 + 0.2 * len(own)))
    caption = "Share of a 1-s window; above a half: an onset. Lines: 95 %."
    return figure(f"Onset or offset ({sae})", draw, caption, height=3.0, width=width)


def show(at: Context) -> dict[str, Any]:
    """Links to the pages, the table and a figure."""
    rows = at.inputs.csv("tables/features.csv")
    rows = rows[rows["target"] == at.target]
    about = at.inputs.json(f"features/{at.target}.json")["saes"]
    columns = {
        "SAE": "sae",
        "feature": lambda r: f"{r['feature']:g}",
        "why": lambda r: WHY[r["why"]],
        "fires on": ("rate", 4),
        "energy after": ("onset_share", 2),
        "same level": ("onset_matched", 2),
        "random": ("onset_random", 2),
        "label": "label",
        "phone": "phone",
        "twin": "twin",
        "overlap": ("twin_overlap", 2),
        "clips / speakers": display.sample,
    }
    links = [
        {"href": page_file(at.target, sae), "sae": sae, "shown": len(one["features"]), **one}
        for sae, one in about.items()
    ]
    drawn = [_onsets(own, sae) for sae, own in rows.groupby("sae") if own["onset_share"].notna().any()]
    return {"drawn": drawn, "found": display.laid_out(rows, columns), "links": links}


def _captions(path: str | None, target: str) -> dict[tuple[str, str], list[str]]:
    """(SAE, feature) -> the user's captions."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in read_text_csv(path).to_dict("records") if path else []:
        if row.get("target", "") in ("", target) and row["caption"].strip():
            found.setdefault((row["sae"].strip(), row["feature"].strip()), []).append(row["caption"].strip())
    return found


def pages(at: Context) -> list[Page]:
    """A page an SAE, with an entry a feature."""
    about = at.inputs.json(f"features/{at.target}.json")["saes"]
    index = f"renders/{at.target}/features/index.csv"
    require_renders(at.inputs.path(index), at.inputs.csv(index)["file"])
    path = at.own["captions"]
    captions = _captions(str(at.inputs.path(path)) if path else None, at.target)
    return [
        Page(page_file(at.target, sae), f"Features of {sae}", TEMPLATE, _shown(at, sae, one, captions))
        for sae, one in sorted(about.items())
    ]


def _shown(at: Context, sae: str, one: dict[str, Any], captions: dict[tuple[str, str], list[str]]) -> dict[str, Any]:
    """What the page of an SAE shows."""
    table = at.inputs.csv("tables/features.csv")
    table = table[(table["target"] == at.target) & (table["sae"] == sae)]
    rows = {int(row["feature"]): row for row in table.to_dict("records")}
    folder = at.inputs.path(f"renders/{at.target}/features/index.csv").parent
    with np.load(at.inputs.path(f"features/{at.target}.npz")) as kept:
        maps = kept[sae]
    entries = [
        entry(record, rows[record["feature"]], means, folder, captions.get((sae, str(record["feature"])), []))
        for record, means in zip(one["features"], maps, strict=True)
    ]
    return {"target": at.target, "sae": sae, "entries": entries, "about": one}
