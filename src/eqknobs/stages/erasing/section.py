"""Probing and erasing: the section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, Look, figure, legend
from eqknobs.evidence.stage import Context
from eqknobs.stages.erasing.tables import ORDERS, SPACES

STAGE, TITLE, SOUNDS = "erasing", "Probing and erasing", False
ABOUT = "From how few features a label is told, how many must go until it is gone, and what goes with it."
PUBLISHED_SOURCE = "AudioSAE (arXiv 2602.05027), 6,144 features; notes in docs/method.md say what it does not."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "erasing": (
        ["AudioSAE", "features"],
        [
            ["two classes are told as well as from all, with", "10–150"],
            ["five classes", "500–3000"],
            ["a task is erased by removing about", "2000 (a third)"],
            ["vowel A gone (HuBERT-base, layer 12) at", "1152 (19 %), with an L2 penalty 160–400"],
            ["the other vowels keep an MCC above .75 until", "27 %"],
        ],
    ),
}
LOOKS = {
    ("features", "fisher"): Look(HUES["blue"]),
    ("features", "classifier"): Look(HUES["sky"], "s"),
    ("features", "random"): Look(FAINT, "x"),
    ("reconstruction", "fisher"): Look(HUES["purple"], "v"),
    ("raw", "fisher"): Look(HUES["orange"], "^"),
    ("pca", "fisher"): Look(HUES["green"], "D"),
    ("raw", "leace"): Look(INK, "*"),
}


SHORT = {"fisher": "", "classifier": ", by weight", "random": ", random"}


def _name(space: str, order: str) -> str:
    if order == "leace":
        return "raw, LEACE"
    return f"{SPACES[space]}, {ORDERS[order]}" if order else SPACES[space]


def _label(space: str, order: str) -> str:
    """In a figure's legend; without another order Fisher's."""
    return "LEACE" if order == "leace" else SPACES[space] + SHORT[order]


def _curves(axes: plt.Axes, rows: pd.DataFrame, x: str, start: bool) -> None:
    """Scores over x, a line a (space, order); start: from the intact score at 0."""
    for (space, order), look in LOOKS.items():
        own = rows[(rows["space"] == space) & (rows["order"] == order)].sort_values(x)
        if own.empty:
            continue
        line = "-" if len(own) > 1 else ""
        points = list(zip(own[x], own["score"], strict=True))
        if start and line:
            points.insert(0, (0.0, own["intact"].iloc[0]))
        if (space, order) == ("features", "fisher"):
            axes.fill_between(own[x], own["score_low"], own["score_high"], color=look.color, alpha=0.15, lw=0)
        axes.plot(*zip(*points, strict=True), look.marker + line, color=look.color, label=_label(space, order))


def _few(rows: pd.DataFrame, title: str) -> dict[str, str]:
    kept = rows[rows["order"] != ""]
    whole = rows[(rows["order"] == "") & rows["space"].isin(["features", "raw"])]

    def draw(axes: plt.Axes) -> None:
        _curves(axes, kept, "k", False)
        for row in whole.itertuples():
            axes.axhline(row.score, color=LOOKS[row.space, "fisher"].color, lw=0.8, ls=":")
        axes.axhline(rows["majority"].iloc[0], color=FAINT, lw=0.8, ls="--")
        axes.set_xscale("log")
        axes.set(xlabel="features or dimensions kept", ylabel="score, test")
        legend(axes)

    caption = "In Fisher order but where said. Dotted: all of them. Dashed: the most frequent label. Shaded: 95 %."
    return figure(f"{title}: told from few", draw, caption, height=3.6, width=4.4)


def _gone(rows: pd.DataFrame, title: str) -> dict[str, str]:
    def draw(axes: plt.Axes) -> None:
        _curves(axes, rows[rows["penalty"] == "l2"], "share", True)
        other = rows[(rows["space"] == "features") & (rows["order"] == "fisher") & (rows["penalty"] == "l2")]
        if other["off_target"].notna().any():
            axes.plot(other["share"], other["off_target"], ":", color=HUES["blue"], label="other tasks")
        axes.axhline(rows["majority"].iloc[0], color=FAINT, lw=0.8, ls="--")
        axes.set(xlabel="share removed", ylabel="score, test", xlim=(0, 1))
        legend(axes)

    return figure(
        f"{title}: erased",
        draw,
        "In Fisher order but where said. Dashed: the most frequent label. Shaded: 95 %.",
        height=3.6,
        width=4.4,
    )


def _share(row: dict[str, Any]) -> str:
    if pd.isna(row["gone"]):
        return "not told"
    if row["gone"] == 1:
        return "not before all"
    ends = (100 * row[name] for name in ("gone", "gone_low", "gone_high"))
    share, low, high = (f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in ends)
    return f"{share} % [{low}, {high}]"


def _ends_of_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each curve the point at which its label is gone, else its last."""
    found = []
    for _, own in rows.groupby(["sae", "task", "space", "order", "penalty"], sort=False):
        own = own.sort_values("share")
        there = own[own["share"] >= own["gone"] - 1e-9]
        found.append(there.iloc[0] if len(there) else own.iloc[-1])
    return pd.DataFrame(found)


def show(at: Context) -> dict[str, Any]:
    """Two curves a task, where each curve ends, and what goes with features to another clip."""
    few, gone, ravel = (
        rows[rows["target"] == at.target].assign(order=rows["order"].fillna(""))
        for rows in (at.inputs.csv(f"tables/{name}.csv") for name in ("topk_probing", "unlearning", "ravel"))
    )
    about = at.inputs.json(f"erasing/{at.target}.json")
    drawn: list[dict[str, str]] = []
    erased: list[dict[str, str]] = []
    for (sae, task), own in few.groupby(["sae", "task"], sort=False):
        title = f"{task[:1].upper()}{task[1:]}" + (f" ({sae})" if few["sae"].nunique() > 1 else "")
        if not task.startswith("vowel "):
            drawn.append(_few(own, title))
        erased.append(_gone(gone[(gone["sae"] == sae) & (gone["task"] == task)], title))
    many = few["sae"].nunique() > 1
    first: dict[str, Any] = {"SAE": "sae"} if many else {}
    ended = {
        **first,
        "task": "task",
        "removed from": lambda r: _label(r["space"], r["order"]) + (", no penalty" if r["penalty"] == "none" else ""),
        "intact": ("intact", 2),
        "majority": ("majority", 2),
        "gone at": _share,
        "columns": lambda r: f"{r['removed']:.0f} / {r['width']:.0f}",
        "score": ("score", 2),
        "others": ("off_target", 2),
        "change": ("off_change", 2),
        "clips": display.sample,
    }
    swapped = {
        **first,
        "task": "task",
        "taken over": lambda r: _name(r["space"], r["order"]),
        "columns": lambda r: f"{r['k']:.0f}",
        "cause": ("cause", 2),
        "isolation": ("isolation", 2),
        "mean": ("both", 2),
        "pairs": lambda r: f"{r['pairs']:.0f}",
        "clips / speakers": display.sample,
    }
    return {
        "drawn": drawn + erased,
        "gone": display.laid_out(_ends_of_curves(gone), ended),
        "swapped": display.laid_out(ravel, swapped) if len(ravel) else None,
        "tolerance": at.own["tolerance"],
        "fits": about["fits"],
        "vowels": any(task.startswith("vowel ") for task in few["task"]),
    }
