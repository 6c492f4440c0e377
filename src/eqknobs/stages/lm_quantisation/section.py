"""The section of the report on a speech LM in mixed precision."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, Look, figure, legend, look
from eqknobs.evidence.listening import side_by_side
from eqknobs.evidence.spoken import MARGIN
from eqknobs.evidence.stage import Context
from eqknobs.stages.lm_quantisation.tables import PARTS, PLANS, megabytes

STAGE, TITLE, SOUNDS = "lm_quantisation", "Quantised speech LM", False
ABOUT = "How few bits the speech LM's weights can have before it says something else, by what decides which get more."
PUBLISHED_SOURCE = "Moshi 7B, fake quantisation without a judged answer: the follow-up of May 2026."
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "recipes": (
        ["recipe", "mean bits", "cosine of the last layer"],
        [
            ["uniform 4 / 3 / 2", "4 / 3 / 2", ".747 / .359 / .031"],
            ["by layers' probes", "2.94", ".271"],
            ["8 layers × 4, 16 × 3, 8 × 2 bits", "", ".135"],
            ["20 / 16 / 12 / 8 layers kept at 4 by sensitivity", "", ".543 / .480 / .461 / .404"],
            ["20 / 16 / 12 / 8 layers kept at 4 by probes", "", ".551 / .504 / .461 / .438"],
            ["12 layers kept at 4, probes turned round", "", ".428"],
            ["MLPs at 4, the least sensitive 25 / 50 / 75 / 100 % of heads at 3", "", ".639 / .575 / .461 / .393"],
            ["MLPs at 4, the most sensitive 50 % of heads at 3", "", ".493"],
            ["by block: L0, L31's MLP and attention of L1–6 at 4, else 3", "3.10", ".446 (+.024 over its rival)"],
        ],
    ),
    "drift": (
        ["layer", "0", "1", "2", "3", "4", "8", "9", "17", "26", "30", "31"],
        [
            ["1 − cosine, alone at 3 bits", *".108 .099 .145 .075 .067 .034 .037 .054 .028 .026 .043".split()],
            ["of it attention", *".017 .080 .139 .070 .065 – – – – – –".split()],
            ["of it MLP", *".079 .030 .007 .005 .006 – – – – – 68%".split()],
        ],
    ),
}
NOTES = (
    (
        "recipes",
        "Symmetric, groups of 128, nearest, the temporal transformer's linears; 12 and 21 clips, no interval.",
    ),
    ("drift", "Probe accuracy of a layer against its drift: Pearson −.741, Spearman −.424, 32 layers."),
)
LOOKS = {
    "uniform": Look(INK, "o"),
    "layer": Look(HUES["orange"], "o"),
    "head": Look(HUES["yellow"], "P"),
    "sensitivity": Look(HUES["blue"], "v"),
    "block": Look(HUES["green"], "s"),
    "inverted": Look(HUES["purple"], "D"),
    "head_inverted": Look(HUES["sky"], "^"),
    "random": Look(HUES["grey"], "X"),
    "nf4": Look(FAINT, "*"),
}


def curves(rows: pd.DataFrame, intact: float, measure: str, unit: str, title: str) -> dict[str, str]:
    """A measure against the bytes, one line a plan; random ones as a band."""

    def draw(axes: plt.Axes) -> None:
        for plan in [name for name in LOOKS if name in set(rows["plan"])]:
            color, marker = look(plan, LOOKS)
            mine = (
                rows[rows["plan"] == plan]
                .groupby("budget")
                .agg(size=("bytes", "mean"), low=(measure, "min"), high=(measure, "max"), mean=(measure, "mean"))
            )
            mine = mine.dropna().sort_values("size")
            if plan == "random":
                axes.fill_between(mine["size"] / 1e6, mine["low"], mine["high"], color=color, alpha=0.2, lw=0)
            axes.plot(mine["size"] / 1e6, mine["mean"], color=color, marker=marker, label=PLANS[plan])
        axes.axhline(intact, color=INK, lw=1, ls="--")
        axes.set(xlabel="MB", ylabel=unit)
        legend(axes, columns=2)

    return figure(title, draw, "Dashed: the intact model. Band: lowest to highest of the random plans.", height=4.0)


def drifts(rows: pd.DataFrame) -> dict[str, str]:
    """How far the last layer moves with one block alone at the narrowest width, layer by layer."""
    bits = int(rows["bits"].min())
    mine = rows[(rows["kind"] == "block") & (rows["bits"] == bits)].copy()
    mine[["layer", "block"]] = mine["tensor"].str.split(".", expand=True)
    layers = mine["layer"].astype(int)

    def draw(axes: plt.Axes) -> None:
        for shift, (block, hue) in zip((-0.2, 0.2), (("attention", "orange"), ("mlp", "blue")), strict=True):
            here = mine["block"] == block
            axes.bar(layers[here] + shift, mine["drift"][here], width=0.4, color=HUES[hue], label=block)
        axes.set(xlabel="layer", ylabel="1 − cosine, last layer", xticks=np.unique(layers))
        legend(axes, columns=2)

    return figure(f"One block alone at {bits} bits", draw, "Calibration speech, teacher-forced.", height=3.2)


def figures(at: Context, rows: pd.DataFrame) -> list[dict[str, str]]:
    """Cosine, nats and word errors against bytes, by part; drifts of the blocks."""
    rows, drawn = rows.assign(nats=rows["nll_text"] + rows["nll_audio"]), []
    intact = rows[rows["plan"] == "intact"].iloc[0]
    for part in [name for name in PARTS if name in set(rows["part"])]:
        mine = rows[(rows["part"] == part) & (rows["plan"] != "intact")]
        shown = [("cosine", "cosine of the last layer", mine), ("nats", "nats a frame", mine)]
        shown += [
            (m, f"WER against the {m.split('_')[1]}", mine[mine["answers"] > 0])
            for m in ("wer_monologue", "wer_prompt")
        ]
        for measure, unit, some in shown:
            if some["budget"].nunique() > 1 and some[measure].notna().any():
                drawn.append(curves(some, intact[measure], measure, unit, f"{PARTS[part].capitalize()}: {unit}"))
    sensitivity = at.inputs.csv(f"scores/{at.target}.lm_quantisation.sensitivity.csv")
    return drawn + ([drifts(sensitivity)] if (sensitivity["kind"] == "block").any() else [])


def _take(row: dict[str, Any]) -> str:
    if row["plan"] == "intact":
        return "intact"
    return f"{row['bits_mean']:.2f} bits, {PLANS[row['plan']]} ({PARTS[row['part']]})"


def show(at: Context) -> dict[str, Any]:
    """Figures, tables, and answers to listen to side by side."""

    def read(name: str) -> pd.DataFrame:
        found = at.inputs.csv(f"tables/{name}.csv")
        return found[found["model"] == at.target]

    def plan(row: dict[str, Any]) -> str:
        if row["plan"] == "intact":
            return "intact"
        drawn = f" #{row['seed']:g}" if row["plan"] == "random" and pd.notna(row["seed"]) else ""
        return f"{PARTS[row['part']]}, {PLANS[row['plan']]}{drawn}"

    rows = read("lm_quantisation")
    columns = {
        "plan": plan,
        "budget": lambda r: "–" if r["plan"] in ("intact", "nf4") else f"{r['budget']:g} bits",
        "mean bits": ("bits_mean", 2),
        "file": lambda r: megabytes(r["bytes"]),
        "in memory": lambda r: megabytes(r["bytes_resident"]),
        "heard against monologue": ("wer_monologue", 3),
        "monologue against prompt": ("wer_prompt", 3),
        "nats, intact model": ("nll_intact", 3),
        "similarity to the voice": ("similarity_prompt", 3),
        "cosine": ("cosine", 3),
        "nats of text": ("nll_text", 3),
        "of codes": ("nll_audio", 3),
        "prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}",
    }
    small = {
        "plan": plan,
        "by": lambda r: "heard against monologue" if r["measure"] == "wer_monologue" else "monologue against prompt",
        "smallest": lambda r: "–" if pd.isna(r["bytes"]) else megabytes(r["bytes"]),
        "mean bits": ("bits_mean", 2),
        "bound there": ("bound", 3),
        "sizes that spoke": "tested",
        "prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}",
    }
    return {
        "margin": MARGIN,
        "small": display.laid_out(read("lm_quantisable").assign(seed=np.nan), small),
        "rows": display.laid_out(rows, columns),
        "drawn": figures(at, rows),
        "answers": side_by_side(at, "quantised", _take),
        "notes": NOTES,
    }
