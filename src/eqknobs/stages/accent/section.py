"""Accent in codecs: the section of the report."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, figure, legend
from eqknobs.evidence.stage import Context

STAGE, TITLE, SOUNDS = "accent", "Accent in codecs", False
ABOUT = "How much of the accent sparse codes keep: ΔF1 and retained share, beside their nulls."
PUBLISHED_SOURCE = (
    "arXiv 2603.18359, US against UK, test; ΔF1 in points. Retained share = (F1 of the code − c) / (F1 of the dense "
    "vector − c), c = 41.14 being the macro-F1 of always answering US; arithmetic on the published figures."
)
CONSTANT = 41.14  # points: always US at 69.90 %
RATIOS = ("2", "5", "10", "20")
DENSE = {"EnCodec 6 kbps": 80.20, "DAC": 79.74, "Mimi": 88.79, "SpeechTokenizer": 92.44}
# Published Table 2 (s = 5 %; q = 2, 5, 10, 20) and Table 3 (EnCodec; s = 5 %, 10 %).
TABLE_2 = {
    ("EnCodec 6 kbps", "full"): (-17.25, -15.64, -20.37, -19.70),
    ("EnCodec 6 kbps", "position"): (-39.06, -19.16, -38.90, -45.06),
    ("EnCodec 6 kbps", "magnitude"): (-19.64, -25.82, -25.58, -20.67),
    ("DAC", "full"): (-5.59, -9.46, -3.36, -7.29),
    ("DAC", "position"): (-9.80, -12.04, -9.88, -10.93),
    ("DAC", "magnitude"): (-5.00, -5.08, -4.78, -3.32),
    ("Mimi", "full"): (-6.43, -9.72, -7.69, -8.82),
    ("Mimi", "position"): (-8.12, -10.49, -8.64, -9.27),
    ("Mimi", "magnitude"): (-38.87, -19.02, -24.70, -22.46),
    ("SpeechTokenizer", "full"): (-4.54, -5.21, -5.83, -6.33),
    ("SpeechTokenizer", "position"): (-7.20, -7.09, -6.76, -7.20),
    ("SpeechTokenizer", "magnitude"): (-23.82, -29.38, -23.62, -27.03),
}
BITRATES = {"1.5 kbps": 81.11, "6 kbps": 80.20, "12 kbps": 80.17}
TABLE_3 = {
    ("1.5 kbps", "5 %"): (-7.25, -7.05, -9.66, -8.72),
    ("1.5 kbps", "10 %"): (-2.52, -2.91, -5.00, -4.40),
    ("6 kbps", "5 %"): (-17.25, -15.64, -20.37, -19.70),
    ("6 kbps", "10 %"): (-9.28, -6.81, -12.29, -6.94),
    ("12 kbps", "5 %"): (-17.78, -16.51, -16.30, -23.18),
    ("12 kbps", "10 %"): (-13.69, -11.86, -9.06, -8.06),
}


def retained(delta: float, dense: float) -> float:
    """Retained share of published figures; delta and dense in points."""
    return (dense + delta - CONSTANT) / (dense - CONSTANT)


def _reread(published: Mapping[tuple[str, str], tuple[float, ...]], dense: dict[str, float]) -> list[list[str]]:
    rows = []
    for (name, kind), deltas in published.items():
        cells = [f"{delta:.2f} | {retained(delta, dense[name]):.2f}".replace("-", "−") for delta in deltas]
        rows.append([f"{name}, {kind}", f"{dense[name]:.2f}", *cells])
    return rows


_HEAD = ["ΔF1 | retained share, q =", "F1, dense", *RATIOS]
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "table_2": (_HEAD, _reread(TABLE_2, DENSE)),
    "table_3": (_HEAD, _reread(TABLE_3, BITRATES)),
}
KINDS = {"full": "blue", "position": "orange", "magnitude": "green"}


def _grid(rows: pd.DataFrame, q: float, constant: float, dense: float) -> dict[str, str]:
    """Macro-F1 over sparsity at one size."""
    own = rows[(rows["q"] == q) & (rows["cell"] == "grid")]

    def draw(axes: plt.Axes) -> None:
        for kind, hue in KINDS.items():
            part = own[own["features"] == kind].sort_values("s")
            ends = np.clip([part["macro_f1"] - part["macro_f1_low"], part["macro_f1_high"] - part["macro_f1"]], 0, None)
            axes.errorbar(part["s"], part["macro_f1"], ends, fmt="o-", color=HUES[hue], ecolor=FAINT, lw=1, label=kind)
        axes.axhline(dense, color=INK, lw=1, label="dense")
        axes.axhline(constant, color=FAINT, lw=1, ls="--", label="constant answer")
        axes.set(xlabel="s = k / d", ylabel="macro-F1, test", ylim=(0, 1.02))
        legend(axes)

    return figure(f"Codes of q = {q:g}", draw, "Means over seeds; lines: 95 %, over speakers and clips.")


def _bitrate(rows: pd.DataFrame) -> dict[str, str]:
    """Macro-F1 over the number of codebooks, of the dense vector and of the codes of the curve's cells."""
    own = rows[(rows["weights"] == "trained") & (rows["codebooks"] > 0)]
    shared = own[(own["features"] == "full") & (own["cell"] == "grid")]
    often = shared.groupby(["q", "s"])["codebooks"].nunique()
    cells = list(often[often == own["codebooks"].nunique()].index)

    def draw(axes: plt.Axes) -> None:
        dense = own[(own["features"] == "dense") & (own["recipe"] == "")].sort_values("codebooks")
        axes.plot(dense["codebooks"], dense["macro_f1"], "o-", color=INK, label="dense")
        for (q, s), hue in zip(cells, ("blue", "sky", "orange", "green", "purple", "yellow"), strict=False):
            part = shared[(shared["q"] == q) & (shared["s"] == s)].sort_values("codebooks")
            axes.plot(part["codebooks"], part["macro_f1"], "o-", color=HUES[hue], label=f"q {q:g}, s {s:g}")
        axes.plot(dense["codebooks"], dense["constant_f1"], "--", color=FAINT, label="constant answer")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(own["codebooks"].unique()), [f"{n:g}" for n in sorted(own["codebooks"].unique())])
        axes.set(xlabel="codebooks", ylabel="macro-F1, test", ylim=(0, 1.02))
        legend(axes)

    return figure("Over codebooks", draw, "More codebooks, more bits. Means over seeds.")


def _density(rates: dict[str, list[float]]) -> dict[str, str]:
    """Firing rates of features, falling."""

    def draw(axes: plt.Axes) -> None:
        for place, (_cell, curve) in enumerate(
            sorted(rates.items(), key=lambda pair: tuple(map(float, pair[0].split())))
        ):
            axes.plot(
                np.linspace(0, 1, len(curve)), curve, color=HUES["blue"], lw=0.8, alpha=0.3 + 0.7 * place / len(rates)
            )
        axes.set(xlabel="share of features, the busiest first", ylabel="share of clips", ylim=(0, None))

    return figure("How evenly features fire", draw, "Test clips, a line a cell of the grid; pale: small q.")


ORDER = (
    "dense norm loudness duration constant stratified shuffled full position magnitude random_topk pca top_k l1 frames"
)


def show(at: Context) -> dict[str, Any]:
    """The grid, the curve over codebooks, how evenly features fire, and every row beside its nulls."""
    rows = pd.DataFrame(at.facts["accent"]).replace({None: np.nan})
    about = at.inputs.json(f"accent/{at.target}.json")
    tasks = []
    for task, own in rows.groupby("task", sort=False):
        first = own.iloc[0]
        same = (own["weights"] == first["weights"]) & (own["site"] == first["site"])
        main = own[same & (own["codebooks"] == first["codebooks"])]
        dense = main[(main["features"] == "dense") & (main["recipe"] == "")].iloc[0]
        drawn = [_grid(main, q, dense["constant_f1"], dense["macro_f1"]) for q in sorted(main["q"].dropna().unique())]
        if own[own["weights"] == "trained"]["codebooks"].nunique() > 2:
            drawn.append(_bitrate(own))
        if about["rates"]:
            drawn.append(_density(about["rates"]))
        place = {name: i for i, name in enumerate(ORDER.split())}
        own = own.assign(order=own["features"].map(place))
        tasks.append({"name": task, "drawn": drawn, "found": _laid_out(own.sort_values("order", kind="stable"))})
    return {"tasks": tasks, "clips": about["clips"], "d": about["d"], "synthetic": at.own["synthetic"]}


def _laid_out(rows: pd.DataFrame) -> dict[str, Any]:
    def number(name: str) -> Any:
        return lambda row: "–" if pd.isna(row[name]) else f"{row[name]:g}"

    columns = {
        "features": lambda row: row["features"] + (f" ({row['recipe']})" if row["recipe"] not in ("", "paper") else ""),
        "weights": "weights",
        "site": "site",
        "codebooks": "codebooks",
        "q": number("q"),
        "s": number("s"),
        "k": number("k"),
        "macro-F1": ("macro_f1", 3),
        "ΔF1": ("delta_f1", 3),
        "retained share": ("retained_share", 2),
        "FVU": ("fvu", 3),
        "converged": ("converged", 2),
        "seeds": "seeds",
        "clips / speakers": display.sample,
    }
    return display.laid_out(rows, columns)
