"""The section of the report on a speech LM's layers and heads."""

import html
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from eqknobs.errors import counted
from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, INK, figure, legend
from eqknobs.evidence.stage import Context
from eqknobs.evidence.wording import PROPERTIES
from eqknobs.stages.lm_layers.tables import STREAMS, TAGS

STAGE, TITLE, SOUNDS = "lm_layers", "Speech LM, layers and heads", False
ABOUT = "What every layer and every attention head of the speech LM holds of the speech that it hears and says."
PUBLISHED_SOURCE = "PersonaPlex and Moshi 7B on LibriSpeech: the blog post of version 1, and its follow-up of May 2026."
# Of Moshi and PersonaPlex 7B, by others; what is not stated there is left open.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "lm_layers": (
        ["", "version 1: PersonaPlex in 4 bits, 100 files", "follow-up: Moshi in bfloat16, 100 files"],
        [
            ["centroid, 20 bins: embeddings", ".178", "–"],
            ["layer 0 / 1", ".201 / .212", ".213 / .216"],
            ["the other layers", ".276–.316", ".268–.314"],
            ["peak", "layer 14", "layer 9"],
            ["level, 20 bins", "–", ".216 (layer 0) to .278 (layer 8)"],
            ["heads: centroid", ".19–.33", "–"],
            ["SAE features, low frequency, layers 0 / 14 / 31", "22 / 12 / 7 %", "–"],
            ["SAE features, high frequency", "49 / 71 / 85 %", "–"],
        ],
    ),
}
CELL = 14  # of a heat map, in its own units
BESIDE = (
    ("embeddings", "green", "-", "summed embeddings"),
    ("random_network", "grey", "-", "random network, same layer"),
    ("logmel", "yellow", "-", "log-mel"),
)


def _title(name: str, stream: str) -> str:
    return f"{PROPERTIES.get(name, name)}, {STREAMS[stream]}"


def _by_layer(name: str, stream: str, rows: pd.DataFrame) -> dict[str, str]:
    """Accuracy of every layer. rows: of one property and stream, at one lag, test."""
    rows = rows.sort_values("layer")

    def draw(axes: plt.Axes) -> None:
        axes.fill_between(
            rows["layer"], rows["accuracy_low"], rows["accuracy_high"], color=HUES["blue"], alpha=0.18, lw=0
        )
        axes.plot(rows["layer"], rows["accuracy"], "o-", color=HUES["blue"], label="layer")
        for column, hue, line, said in BESIDE:
            axes.plot(rows["layer"], rows[column], line, color=HUES[hue], label=said)
        axes.plot(rows["layer"], rows["majority"], "--", color=INK, lw=1, label="majority")
        axes.plot(rows["layer"], rows["shuffled"], ":", color=INK, lw=1, label="shuffled labels")
        axes.set(xlabel="layer", ylabel="accuracy on test", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(axes)

    lag, first = int(rows["lag"].iloc[0]), rows.iloc[0]
    caption = (
        f"Lag {lag}; 95 % intervals over {counted(first['speakers'], 'speaker')} and {counted(first['clips'], 'clip')}."
    )
    return figure(_title(name, stream), draw, caption, height=3.3)


def _by_lag(stream: str, best: list[dict[str, Any]], rows: pd.DataFrame) -> dict[str, str]:
    """Accuracy at every lag, of the layer of each property that is best on val."""

    def draw(axes: plt.Axes) -> None:
        for hue, row in zip(HUES.values(), best, strict=False):
            mine = rows[(rows["property"] == row["property"]) & (rows["layer"] == row["layer"])].sort_values("lag")
            label = f"{PROPERTIES[row['property']]}, layer {row['layer']}"
            axes.plot(mine["lag"], mine["accuracy"], "o-", color=hue, label=label)
        axes.set(xlabel="lag: frames from activation to label", ylabel="accuracy on test", ylim=(0, None))
        legend(axes)

    return figure(f"Lag, {STREAMS[stream]}", draw, "Above 0: what is yet to come. Chosen on val.", height=3.2)


def heatmap(title: str, caption: str, rows: pd.DataFrame, column: str) -> dict[str, str]:
    """{title, svg, caption}: layers × heads; hovering over a cell tells its value. rows: layer, head, column."""
    values = rows[column].to_numpy(float)
    low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if np.isfinite(values).any() else (0.0, 1.0)
    layers, heads = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1
    width, height = CELL * heads + 46, CELL * layers + 22
    cells = []
    for row in rows.to_dict("records"):
        value = row[column]
        x, y = 40 + CELL * int(row["head"]), 4 + CELL * int(row["layer"])
        share = 0.0 if not np.isfinite(value) else (value - low) / max(high - low, 1e-12)
        words = f"layer {row['layer']}, head {row['head']}: {value:.3f}"
        place = f'x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}"'
        cells.append(
            f'<rect {place} fill="var(--blue)" fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{words}</title></rect>'
        )
    text = 'font-size="9" fill="var(--ink)"'
    cells += [
        f'<text x="34" y="{4 + CELL * i + 10}" text-anchor="end" {text}>{i}</text>'
        for i in range(0, layers, max(1, layers // 8))
    ]
    cells += [
        f'<text x="{40 + CELL * i + 6}" y="{CELL * layers + 15}" text-anchor="middle" {text}>{i}</text>'
        for i in range(0, heads, max(1, heads // 8))
    ]
    opening = f'<svg role="img" aria-label="{html.escape(title, quote=True)}" viewBox="0 0 {width} {height}">'
    scale = f"Layers downwards, heads across; pale {low:.3f}, full {high:.3f}: point at a cell.".replace("-", "−")
    return {"title": title, "svg": opening + "".join(cells) + "</svg>", "caption": f"{caption} {scale}"}


def _heatmaps(heads: pd.DataFrame) -> list[dict[str, str]]:
    drawn = []
    for stream, rows in heads.groupby("stream"):
        for name, mine in rows.groupby("property"):
            caption = f"Accuracy on val, lag {int(mine['lag'].iloc[0])}; majority {mine['majority'].iloc[0]:.3f}."
            drawn.append(heatmap(f"Heads: {_title(name, stream)}", caption, mine, "accuracy"))
        one = rows[rows["property"] == rows["property"].iloc[0]]
        caption = "Acoustic less semantic: centroid's accuracy less the text token's, each from 0 (majority) to 1."
        drawn.append(heatmap(f"Heads: selectivity, {STREAMS[stream]}", caption, one, "selectivity"))
    return drawn


def show(at: Context) -> dict[str, Any]:
    """Figures by layer and lag, heat maps of heads, and the tables."""
    tables = {
        name: at.inputs.csv(f"tables/{name}.csv") for name in ("lm_layers", "lm_heads", "lm_stability", "lm_saes")
    }
    tables = {name: rows[rows["model"] == at.target] for name, rows in tables.items()}
    layers, heads, best = tables["lm_layers"], tables["lm_heads"], at.facts["lm_best"]
    test = layers[layers["split"] == "test"]
    drawn = []
    for row in best:
        same = test[(test["stream"] == row["stream"]) & (test["property"] == row["property"])]
        drawn.append(_by_layer(row["property"], row["stream"], same[same["lag"] == row["lag"]]))
    swept = test[test.groupby(["stream", "property"])["lag"].transform("nunique") > 1]
    lags = [
        _by_lag(
            stream, [row for row in best if row["stream"] == stream and row["property"] in set(rows["property"])], rows
        )
        for stream, rows in swept.groupby("stream")
    ]
    columns: dict[str, Any] = {
        "property": lambda r: PROPERTIES.get(r["property"], r["property"]),
        "stream": lambda r: STREAMS[r["stream"]],
        "layer": "layer",
        "lag": "lag",
        "accuracy": ("accuracy", 3),
        "majority": ("majority", 3),
        "shuffled": ("shuffled", 3),
        "log-mel": ("logmel", 3),
        "embeddings": ("embeddings", 3),
        "random network": ("random_network", 3),
        "clips / speakers": display.sample,
    }
    stability = {
        "property": columns["property"],
        "stream": columns["stream"],
        "split": "split",
        "heads": "heads",
        "rank correlation of the halves": ("spearman", 3),
        "clips / speakers": display.sample,
    }
    saes: dict[str, Any] = {
        "layer": "layer",
        "features of": lambda r: "SAE" if r["space"] == "sae" else "random projection + TopK",
        "stream": columns["stream"],
        "features": "features",
        "high-frequency": ("high_share", 3),
        "shuffled probe, high": ("high_shuffled", 3),
        "low-frequency": ("low_share", 3),
        "shuffled probe, low": ("low_shuffled", 3),
        **{tag: ("mixed" if tag == "mixed" else f"{tag}_tagged", 3) for tag in TAGS},
        "centroid": ("accuracy", 3),
        "clips / speakers": display.sample,
    }
    split = tables["lm_saes"][tables["lm_saes"]["split"] == "test"]
    return {
        "drawn": drawn,
        "lags": lags,
        "heatmaps": _heatmaps(heads[heads["split"] == "val"]),
        "layers": display.laid_out(pd.DataFrame(best), columns),
        "stability": display.laid_out(tables["lm_stability"], stability),
        "saes": display.laid_out(split, saes),
    }
