"""The dictionaries' section of the report."""

import itertools
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import figure, legend, sae_hue
from eqknobs.evidence.stage import Context

STAGE, TITLE, SOUNDS = "saes", "Dictionaries", False
ABOUT = "How sparse the dictionaries are and what they leave unexplained, over seeds."
ARMS = {
    "unspliced": "itself",
    "mean": "the train mean",
    "sae": "the SAE's reconstruction",
    "untrained": "that of the SAE before training",
}
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "sae": (
        ["", "version 1", "rerun"],
        [
            ["ReLU + L1 + RMS, 512 → 4096", "“sparsity 0.328, 100 % alive”", "L0 2,903 of 4,096, FVU .005: not sparse"],
            ["TopK, 512 → 8192, k = 32", "–", "L0 32, FVU .142, 0 dead"],
        ],
    ),
}


def _style(sae: str, seed: int, saes: list[str], first: int) -> dict[str, Any]:
    """Of a line; only the first seed's is full and named."""
    return {
        "color": sae_hue(sae, saes),
        "alpha": 1 if seed == first else 0.45,
        "label": sae if seed == first else None,
    }


def _learning(
    logs: dict[tuple[str, int], pd.DataFrame], saes: list[str], first: int, pale: str
) -> list[dict[str, str]]:
    """Learning curves; logs: (SAE, seed) -> its training log."""

    def curves(axes: plt.Axes, column: str, said: str) -> None:
        for (sae, seed), log in logs.items():
            look = _style(sae, seed, saes, first)
            on_val = log.dropna(subset=[f"val_{column}"])
            axes.plot(on_val["epoch"], on_val[f"val_{column}"], **look)
            train = log.groupby("epoch")[column].mean()
            axes.plot(train.index, train, linestyle=":", linewidth=1.2, **(look | {"label": None}))
        axes.set(xlabel="epoch", ylabel=said, ylim=(0, None))
        legend(axes)

    caption = f"Solid: val; dotted: training{f'; pale: {pale}' if pale else ''}."
    return [
        figure("Learning curves: FVU", lambda axes: curves(axes, "fvu", "FVU"), caption),
        figure("Learning curves: L0", lambda axes: curves(axes, "l0", "features on in a frame (L0)"), caption),
    ]


def fronts(at: Context, saes: list[str]) -> dict[str, pd.DataFrame]:
    """SAE -> the points of its grid, by falling sparsity; of SAEs that have one."""
    files = {sae: f"saes/{at.target}/{sae}/grid/front.csv" for sae in saes}
    return {sae: at.inputs.csv(path).sort_values("val_l0") for sae, path in files.items() if at.inputs.has(path)}


def points(found: dict[str, pd.DataFrame]) -> dict[str, Any] | None:
    """The table of all points of all grids, in the order of the lists; found: see `fronts`."""
    if not found:
        return None
    rows = pd.concat([own.sort_index().assign(sae=sae) for sae, own in found.items()])
    measured = ["val_l0", "val_fvu", "dead_share", "sae"]
    keys = sorted((key for key in rows if key not in measured), key=lambda key: key != "d_sae")
    columns: dict[str, Any] = {"SAE": "sae", **{key: key for key in keys}}
    columns |= {"L0, val": ("val_l0", 1), "FVU, val": ("val_fvu", 3), "dead share": ("dead_share", 3)}
    return display.laid_out(rows, columns)


def _front(
    found: dict[str, pd.DataFrame], logs: dict[tuple[str, int], pd.DataFrame], saes: list[str], first: int
) -> dict[str, str]:
    def draw(axes: plt.Axes) -> None:
        for sae in saes:
            color = sae_hue(sae, saes)
            if sae in found:
                wide = found[sae].groupby("d_sae") if "d_sae" in found[sae] else [("", found[sae])]
                for (width, points), style in zip(wide, itertools.cycle(["o-", "s--", "^:", "v-."])):
                    said = f"{sae}, {width} features" if width else None
                    axes.plot(points["val_l0"], points["val_fvu"], style, ms=3.5, lw=1.2, color=color, label=said)
            chosen = logs[sae, first].iloc[-1]
            axes.plot(chosen["val_l0"], chosen["val_fvu"], "*", ms=11, color=color, label=sae)
        axes.set(xlabel="features on in a frame (L0), val", ylabel="FVU, val", xscale="log", ylim=(0, None))
        legend(axes)

    lines = "; lines: the grids they were chosen from" if found else ""
    return figure("L0 against FVU", draw, f"Stars: the SAEs of this run{lines}.")


def _density(details: dict[str, Any], saes: list[str], first: int, pale: str) -> dict[str, str]:
    def draw(axes: plt.Axes) -> None:
        for sae, seeds in details.items():
            for seed, found in seeds.items():
                look = _style(sae, int(seed), saes, first)
                axes.stairs(found["density"]["counts"], found["density"]["log10_edges"], lw=1.6, **look)
        axes.set(xlabel="log₁₀ of the share of frames on which a feature fires", ylabel="features")
        legend(axes)

    return figure("Firing density on val", draw, f"Dead features are left out.{f' Pale: {pale}.' if pale else ''}")


def show(at: Context) -> dict[str, Any]:
    """Figures, the table, and how two seeds' dictionaries match."""
    rows = at.inputs.csv("tables/sae.csv")
    rows = rows[rows["target"] == at.target]
    saes, seeds = rows["sae"].unique().tolist(), sorted(rows["seed"].unique().tolist())
    first, pale = seeds[0], ", ".join(f"seed {seed:g}" for seed in seeds[1:])
    logs = {
        (sae, seed): at.inputs.csv(f"saes/{at.target}/{sae}/seed{seed}/log.csv")
        for sae, seed in rows[["sae", "seed"]].drop_duplicates().itertuples(index=False)
    }
    found, grids = at.inputs.json(f"saes/{at.target}/saes.json"), fronts(at, saes)
    columns = {
        "SAE": "sae",
        "seed": "seed",
        "d": lambda r: f"{r['d_in']} → {r['d_sae']}",
        **({"input": "input_scale"} if rows["input_scale"].nunique() > 1 else {}),
        "split": "split",
        "L0": ("l0", 1),
        "FVU": ("fvu", 3),
        "cosine": ("cosine", 3),
        "dead share": ("dead_share", 3),
        "clips / speakers": display.sample,
    }
    return {
        "drawn": [
            _front(grids, logs, saes, first),
            *_learning(logs, saes, first, pale),
            _density(found["saes"], saes, first, pale),
        ],
        "dictionaries": display.laid_out(rows, columns),
        "points": points(grids),
        "cross_seed": found["cross_seed"],
        "spliced": _spliced(at),
        "spliced_reference": _reference(at),
    }


def _reference(at: Context) -> str:
    """What the words are held against downstream: `text`, or a model."""
    rows = at.inputs.csv("tables/splicing.csv")
    return next(iter(rows.loc[rows["target"] == at.target, "reference"]), "text")


def _spliced(at: Context) -> dict[str, Any] | None:
    """The table of what is lost downstream, where that was measured."""
    rows = at.inputs.csv("tables/splicing.csv")
    rows = rows[rows["target"] == at.target]
    columns = {
        "in the layer's place": lambda r: ARMS[r["arm"]],
        "SAE": lambda r: "–" if pd.isna(r["sae"]) else f"{r['sae']}, seed {r['seed']:g}",
        "WER": ("wer_text", 3),
        "nats a token": ("nll", 3),
        "difference": ("nll_difference", 3),
        "AUC, no speech": ("no_speech_auc", 3),
        "clips / speakers": display.sample,
    }
    return display.laid_out(rows, columns) if len(rows) else None
