"""The pruned speech LM's section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, Look, figure, legend, look
from eqknobs.evidence.listening import side_by_side
from eqknobs.evidence.spoken import MARGIN
from eqknobs.evidence.stage import Context
from eqknobs.stages.lm_pruning.tables import ORDERS

STAGE, TITLE, SOUNDS = "lm_pruning", "Pruned speech LM", False
ABOUT = (
    "How much of the speech LM can go before it says something else, or says it worse, by what decides which part goes."
)
PUBLISHED_SOURCE = "PersonaPlex 7B, one prompt, by ear: the blog post of version 1."
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "heads": (
        ["heads off, most acoustic first", "text", "voice", "quality"],
        [
            ["0 of 1024", "Hey let me know if you have", "female", "clean"],
            ["50 (4.9 %)", "Hey let me", "shifted", "shorter"],
            ["100 (9.8 %)", "Hey let me", "female", "clean"],
            ["200 (19.5 %)", "Heeey, let me kno-", "female", "slight stretch"],
            ["300 (29.3 %)", "Hello, this is your show", "female", "cadence breaks"],
            ["weights, guided by layer: 2.4 %", "Hey, let me know if you have...", "–", "as before"],
            ["weights, guided by layer: 37.5 %", "all PAD", "–", "silence"],
        ],
    ),
}
LOOKS = {
    "acoustic_first": Look(HUES["orange"], "o"),
    "acoustic_last": Look(HUES["purple"], "D"),
    "random": Look(HUES["grey"], "X"),
    "random_layers": Look(HUES["yellow"], "P"),
    "norm": Look(HUES["green"], "s"),
    "gradient": Look(HUES["sky"], "^"),
    "damage": Look(HUES["blue"], "v"),
    "uniform": Look(HUES["blue"], "v"),
    "guided": Look(HUES["orange"], "o"),
    "inverted": Look(HUES["purple"], "D"),
    "first": Look(HUES["sky"], "^"),
    "last": Look(HUES["green"], "s"),
}
GRANULARITIES = {"heads": "heads", "weights": "weights", "layers": "layers"}
READINGS = {
    "a": "a: fewer decoded",
    "b": "b: nothing fed back",
    "c": "c: silence fed back",
    "d": "d: shorter depformer",
    "user": "fewer of the user's",
}
DRAWN = ("random", "random_layers")
BANDS = ((0.1, "orange"), (0.25, "yellow"), (0.5, "sky"))  # shares of heads that have gone, in the picture of orders


def condition(row: dict[str, Any]) -> str:
    """A condition in plain words."""
    if row["granularity"] == "intact":
        return "intact"
    drawn = f" #{row['seed']:g}" if row["order"] in DRAWN else ""
    repair = ", mean instead" if row["repair"] == "mean" else ""
    return f"{row['share']:.1%} of {GRANULARITIES[row['granularity']]}, {ORDERS[row['order']]}{drawn}{repair}"


def curves(rows: pd.DataFrame, intact: float, measure: str, unit: str, title: str) -> dict[str, str]:
    """A measure against the share that is gone, one line an order; drawn orders as bands."""

    def draw(axes: plt.Axes) -> None:
        for order in [name for name in ORDERS if name in set(rows["order"])]:
            color, marker = look(order, LOOKS)
            spread = rows[rows["order"] == order].groupby("share")[measure].agg(["min", "max", "mean"]).dropna()
            if order in DRAWN:
                axes.fill_between(spread.index, spread["min"], spread["max"], color=color, alpha=0.2, lw=0)
            axes.plot(spread.index, spread["mean"], color=color, marker=marker, label=ORDERS[order])
        axes.axhline(intact, color=INK, lw=1, ls="--")
        axes.set(xlabel="share that is gone", ylabel=unit, ylim=(0, None))
        legend(axes, columns=1)

    caption = "Dashed: the intact model. Bands: lowest to highest of the random draws."
    return figure(title, draw, caption, height=4.2)


def removed_heads(orders: pd.DataFrame, order: str) -> dict[str, str]:
    """Which heads go when: layers by heads."""
    mine = orders[(orders["order"] == order) & (orders["seed"] == 0)]
    share = (mine["rank"] + 1) / len(mine)

    def draw(axes: plt.Axes) -> None:
        left = pd.Series(True, index=mine.index)
        for most, hue in BANDS:
            now = left & (share <= most + 1e-9)
            _squares(axes, mine[now], HUES[hue], f"by {most:.0%}", len(mine))
            left &= ~now
        _squares(axes, mine[left], FAINT, "later", len(mine))
        axes.set(xlabel="head", ylabel="layer")
        axes.grid(False)
        axes.invert_yaxis()
        legend(axes, columns=4)

    return figure(f"When heads go: {ORDERS[order]}", draw, "Share of heads off by which each is gone.", height=3.0)


def _squares(axes: plt.Axes, heads: pd.DataFrame, color: str, name: str, count: int) -> None:
    axes.scatter(heads["head"], heads["layer"], color=color, marker="s", s=np.clip(9000 / count, 6, 110), label=name)


def codebooks(rows: pd.DataFrame) -> dict[str, str]:
    """Word errors against the number of codebooks, one line a reading."""

    def draw(axes: plt.Axes) -> None:
        hues = dict(zip(READINGS, ("blue", "orange", "green", "purple", "grey")))
        for reading, mine in rows.groupby("reading"):
            mine = mine.sort_values("codebooks")
            ends = np.abs(
                mine[["wer_monologue_low", "wer_monologue_high"]].to_numpy().T - mine["wer_monologue"].to_numpy()
            )
            style: dict[str, Any] = {"color": HUES[hues[reading]], "marker": "o", "label": READINGS[reading]}
            axes.errorbar(mine["codebooks"], mine["wer_monologue"], yerr=ends, elinewidth=1, **style)
        axes.set(xlabel="codebooks", ylabel="WER against the monologue", ylim=(0, None))
        legend(axes, columns=2)

    return figure("Fewer codebooks", draw, "95 % intervals over prompts.", height=3.4)


def _take(row: dict[str, Any]) -> str:
    return "intact" if row["order"] == "none" else f"{row['share']:.0%} of heads off, {ORDERS[row['order']]}"


def figures(at: Context, rows: pd.DataFrame) -> list[dict[str, str]]:
    """Curves of nats and word errors, pictures of orders, codebooks."""
    rows, drawn = rows.assign(nats=rows["nll_text"] + rows["nll_audio"]), []
    intact = rows[rows["granularity"] == "intact"].iloc[0]
    for kind in [kind for kind in GRANULARITIES if kind in set(rows["granularity"])]:
        mine = rows[(rows["granularity"] == kind) & (rows["repair"] == "zero")]
        spoken = mine[mine["answers"] > 0]
        for measure, unit in (("wer_monologue", "WER against the monologue"), ("wer_prompt", "WER against the prompt")):
            if spoken["share"].nunique() > 1 and spoken[measure].notna().any():
                drawn.append(curves(spoken, intact[measure], measure, unit, f"Pruned {kind}: {unit}"))
        if mine["share"].nunique() > 1:
            drawn.append(
                curves(mine, intact["nats"], "nats", "nats a frame", f"Pruned {kind}: nats of held-out speech")
            )
    orders = at.inputs.csv(f"scores/{at.target}.lm_orders.csv")
    drawn += [removed_heads(orders, order) for order in ("acoustic_first", "damage") if order in set(orders["order"])]
    books = at.inputs.csv("tables/lm_codebooks.csv")
    books = books[books["model"] == at.target]
    return drawn + ([codebooks(books)] if len(books) else [])


def show(at: Context) -> dict[str, Any]:
    """Figures, tables, and answers to listen to side by side."""

    def read(name: str) -> pd.DataFrame:
        found = at.inputs.csv(f"tables/{name}.csv")
        return found[found["model"] == at.target]

    rows = read("lm_pruning")
    far = {
        "what goes": lambda r: f"{r['granularity']}, {ORDERS[r['order']]}",
        "instead": "repair",
        "by": lambda r: "heard against monologue" if r["measure"] == "wer_monologue" else "monologue against prompt",
        "largest share": lambda r: f"{r['largest_share']:.1%}",
        "bound there": ("bound", 3),
        "random draws": lambda r: (
            "–" if pd.isna(r["random_low"]) else f"{r['random_low']:.1%} to {r['random_high']:.1%}"
        ),
        "shares tried": "tested",
        "prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}",
    }
    spoken = {
        "condition": condition,
        "heard against monologue": ("wer_monologue", 3),
        "monologue against prompt": ("wer_prompt", 3),
        "nats, intact model": ("nll_intact", 3),
        "similarity to the voice": ("similarity_prompt", 3),
        "to the intact answer": ("similarity_intact", 3),
        "silent": ("silent_share", 3),
        "PAD": ("pad_share", 3),
        "words a second": ("words_per_second", 2),
        "F0 (Hz)": ("f0_hz", 0),
        "DNSMOS": ("dnsmos", 2),
        "gates": ("gates_published", 2),
        "gates, calibrated": ("gates_calibrated", 2),
        "first other frame": ("divergence", 1),
        "prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}",
    }
    removal = {
        "format": "format",
        "heads out": "removed",
        "parameters": lambda r: f"{r['parameters'] / 1e6:.3f} M",
        "file": lambda r: f"{r['bytes'] / 1e6:.2f} MB",
        "peak memory": lambda r: f"{r['peak_bytes'] / 1e6:.1f} MB",
        "a step": lambda r: f"{1000 * r['step_seconds']:.1f} ms",
        "nats from zeroing": ("difference", 6),
        "weights left the same": lambda r: "yes" if r["exact"] else "no",
    }
    gates = {
        "gate": "gate",
        "from": ("low", 2),
        "to": ("high", 2),
        "calibrated from": ("calibrated_low", 2),
        "calibrated to": ("calibrated_high", 2),
        "intact passes": ("intact", 2),
        "calibrated: intact": ("intact_calibrated", 2),
        "speech passes": ("speech", 2),
        "calibrated: speech": ("speech_calibrated", 2),
    }
    books = {
        "reading": lambda r: READINGS[r["reading"]],
        "codebooks": "codebooks",
        "heard against monologue": ("wer_monologue", 3),
        "monologue against prompt": ("wer_prompt", 3),
        "similarity to the voice": ("similarity_prompt", 3),
        "time of a step": ("step_ratio", 2),
        "answers": "answers",
    }
    return {
        "drawn": figures(at, rows),
        "margin": MARGIN,
        "far": display.laid_out(read("lm_prunable"), far),
        "spoken": display.laid_out(rows[rows["answers"] > 0], spoken),
        "removal": display.laid_out(read("lm_removal"), removal),
        "gates": display.laid_out(read("lm_gates"), gates),
        "books": display.laid_out(read("lm_codebooks"), books),
        "answers": side_by_side(at, "pruned", _take),
    }
