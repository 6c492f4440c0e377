"""The importance map's section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, INK, Look, figure, legend, look
from eqknobs.evidence.stage import Context
from eqknobs.evidence.wording import label
from eqknobs.stages.importance.tables import MAPS, thresholds

STAGE, TITLE, SOUNDS = "importance", "Importance", True
ABOUT = "Which latent dimensions can go, against rival maps and random sets."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "importance": (
        ["", "version 1", "rerun (WER / speaker similarity)"],
        [
            ["expendable / moderate / critical of 512", "285 / 220 / 7", "298 expendable"],
            ["expendable set to the mean", "never ablated", ".024 / .723"],
            ["raw-probe map, same size", "–", ".036 / .492"],
            ["298 at random, 3 seeds", "–", ".085–.152 / .261–.422"],
            ["keep only critical", "–", ".986 / −.020"],
        ],
    ),
}
LOOKS = {
    "composition": Look(HUES["blue"], "o"),
    "raw_probe": Look(HUES["orange"], "v"),
    "variance": Look(HUES["green"], "s"),
    "inverted": Look(HUES["purple"], "D"),
    "random": Look(HUES["grey"], "X"),
}


def _map(importance: dict[str, Any]) -> dict[str, str]:
    values = np.sort(np.asarray(importance["maps"]["composition"]))[::-1]
    low, high = importance["thresholds"]["expendable"], importance["thresholds"]["critical"]

    def ranked(axes: plt.Axes) -> None:
        bands = [
            (high, np.inf, "orange", "critical"),
            (low, high, "yellow", "moderate"),
            (-np.inf, low, "sky", "expendable"),
        ]
        x = np.arange(len(values))
        for bottom, top, hue, name in bands:
            part = (values >= bottom) & (values < top)
            axes.fill_between(x, np.where(part, values, 0), step="mid", color=HUES[hue], label=f"{name}: {part.sum()}")
        for threshold in (low, high):
            axes.axhline(threshold, color=INK, lw=0.8, ls=":")
        axes.set(xlabel="latent dimension, by rank", ylabel="importance / maximum")
        legend(axes)

    said = thresholds(importance)
    return figure("Importance map (SAE × probe)", ranked, f"{said[0].upper()}{said[1:]}.")


def _ablation(rows: pd.DataFrame, untouched: pd.DataFrame, mode: str, measure: str, unit: str) -> dict[str, str]:
    """A measure against the share removed; rows: of one mode."""

    def curves(axes: plt.Axes) -> None:
        sets = rows[rows["map"] == "random"].groupby("removed")[measure]
        if len(sets):
            spread = sets.agg(["min", "max", "mean"])
            color = LOOKS["random"].color
            axes.fill_between(spread.index, spread["min"], spread["max"], color=color, alpha=0.25, lw=0)
            axes.plot(spread.index, spread["mean"], color=color, label=f"random sets ({sets.size().max()})")
        for name in [m for m in rows["map"].unique() if m != "random"]:
            line = rows[rows["map"] == name].groupby("removed")[measure].mean()
            color, marker = look(name, LOOKS)
            axes.plot(line.index, line, color=color, marker=marker, label=label(name, MAPS))
        for value in untouched[measure]:
            axes.axhline(value, color=INK, lw=1, ls="--")
        axes.set(xlabel="share of dimensions removed", ylabel=unit, ylim=(0, None))
        legend(axes)

    title = f"Ablation to {'the mean' if mode == 'mean' else mode}: {unit}"
    caption = "Grey band: smallest to largest of the random sets; dashed: nothing removed."
    return figure(title, curves, caption, height=2.9)


def show(at: Context) -> dict[str, Any]:
    """The map, what ablations cost, and the table of those that were listened to."""
    rows = at.inputs.csv("tables/importance_ablation.csv")
    rows = rows[rows["target"] == at.target]
    untouched = rows[rows["map"] == "none"]
    drawn = [_map(at.inputs.json(f"importance/{at.target}.json"))]
    for mode in [mode for mode in rows["mode"].unique() if mode != "none"]:
        part = rows[(rows["mode"] == mode) & (rows["map"] != "keep_critical")]
        for measure, unit in (("mel_distance", "mel distance (dB)"), ("latent_error", "latent error (share)")):
            drawn.append(_ablation(part, untouched, mode, measure, unit))
    columns = {
        "map": lambda r: label(r["map"], MAPS) + ("" if pd.isna(r["seed"]) else f" #{r['seed']:g}"),
        "set to": "mode",
        "removed": lambda r: f"{r['removed_dims']:g}",
        **{name: column for name, column in display.WORDED.items() if name != "WER, text"},
        "mel (dB)": ("mel_distance", 2),
        "latent error": ("latent_error", 3),
        "clips / speakers": display.sample,
    }
    return {"drawn": drawn, "judged": display.laid_out(rows[rows["speaker_similarity"].notna()], columns)}
