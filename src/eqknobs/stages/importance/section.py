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
    "composition_raw": Look(HUES["sky"], "o"),
    "composition_scaled": Look(HUES["blue"], "^"),
    "raw_probe_scaled": Look(HUES["orange"], "^"),
    "gradient": Look(HUES["yellow"], "P"),
    "fisher": Look(HUES["yellow"], "*"),
    "ablation": Look(INK, "h"),
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


def _agreement(maps: pd.DataFrame) -> dict[str, str]:
    """Rank correlation of each map with the oracle, best on val at the top. maps: of `importance_maps.csv`."""
    known = maps[maps["spearman_oracle"].notna()]
    null = known[known["map"] == "random"]
    shown = known[~known["map"].isin(["random", "ablation"])].sort_values("val_mel_distance", ascending=False)

    def dots(axes: plt.Axes) -> None:
        for low, high in null[["spearman_oracle_low", "spearman_oracle_high"]].itertuples(index=False):
            axes.axvspan(low, high, color=LOOKS["random"].color, alpha=0.25, lw=0)
        for place, row in enumerate(shown.to_dict("records")):
            color, marker = look(row["map"], LOOKS)
            ends = [row["spearman_oracle_low"], row["spearman_oracle_high"]]
            axes.plot(ends, [place, place], color=color, lw=1.4)
            axes.plot(row["spearman_oracle"], place, color=color, marker=marker, lw=0)
        names = [f"{label(row['map'], MAPS)}: {row['val_mel_distance']:.2f} dB" for row in shown.to_dict("records")]
        axes.set(xlabel="rank correlation", xlim=(-1.05, 1.05))
        axes.set_yticks(range(len(names)), names)

    caption = (
        "Lines: 95 % over the clips of the one-at-a-time map, which is noisier in each draw than in all; grey: 95 % "
    )
    caption += "of random orders. Beside the names, mel distance on val with the lowest dimensions removed."
    return figure("Maps against removing one dimension at a time", dots, caption, height=2.9, width=4.8)


def _ablation(rows: pd.DataFrame, untouched: pd.DataFrame, mode: str, measure: str, unit: str) -> dict[str, str]:
    """A measure against the share removed; rows: of one mode."""

    def curves(axes: plt.Axes) -> None:
        sets = rows[rows["map"] == "random"].groupby("removed")[measure]
        if len(sets):
            spread = sets.agg(["min", "max", "mean"])
            color = LOOKS["random"].color
            axes.fill_between(spread.index, spread["min"], spread["max"], color=color, alpha=0.25, lw=0)
            axes.plot(spread.index, spread["mean"], color=color, label=f"random sets ({sets.size().max()})")
        names = [m for m in rows["map"].unique() if m != "random"]
        shares = np.unique(rows["removed"])
        step = 0.5 * (np.diff(shares).min() if len(shares) > 1 else 0.1) / len(names)  # side by side, as many coincide
        for place, name in enumerate(names):
            line = rows[rows["map"] == name].groupby("removed")[measure].mean()
            color, marker = look(name, LOOKS)
            x = line.index + (place - (len(names) - 1) / 2) * step
            axes.plot(x, line, color=color, marker=marker, lw=1.2, alpha=0.9, label=label(name, MAPS))
        for value in untouched[measure]:
            axes.axhline(value, color=INK, lw=1, ls="--")
        axes.set(xlabel="share of dimensions removed", xticks=shares, ylabel=unit, ylim=(0, None))
        legend(axes)

    title = f"Ablation to {'the mean' if mode == 'mean' else mode}: {unit}"
    caption = (
        "Grey band: smallest to largest of the random sets; dashed: nothing removed. Maps side by side at each share."
    )
    return figure(title, curves, caption, height=4.2, width=4.8)


def show(at: Context) -> dict[str, Any]:
    """The map, what ablations cost, and the table of those that were listened to."""
    rows = at.inputs.csv("tables/importance_ablation.csv")
    rows = rows[rows["target"] == at.target]
    untouched = rows[rows["map"] == "none"]
    maps = at.inputs.csv("tables/importance_maps.csv")
    maps = maps[maps["target"] == at.target]
    drawn = [_map(at.inputs.json(f"importance/{at.target}.json"))]
    if maps["spearman_oracle"].notna().any():
        drawn.append(_agreement(maps))
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
    about = {
        "map": lambda r: label(r["map"], MAPS) + (" (chosen)" if r["chosen"] else ""),
        "mel, val (dB)": ("val_mel_distance", 3),
        "rank correlation": ("spearman_oracle", 2),
        "clips / speakers": display.sample,
    }
    return {
        "drawn": drawn,
        "maps": display.laid_out(maps.sort_values("val_mel_distance"), about),
        "judged": display.laid_out(rows[rows["speaker_similarity"].notna()], columns),
    }
