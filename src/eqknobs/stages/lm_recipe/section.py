"""The section of the report on a speech LM that was made smaller and trained again."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, INK, Look, figure, legend, look
from eqknobs.evidence.listening import side_by_side
from eqknobs.evidence.stage import Context
from eqknobs.stages.lm_recipe.tables import DATA, INTACT, ORDERS, described, megabytes

STAGE, TITLE, SOUNDS = "lm_recipe", "Recovered speech LM", False
ABOUT = "How much a short training gives back to a pruned speech LM, and the smallest model that still says its words."
PUBLISHED_SOURCE = "PersonaPlex 7B with 24 of 32 layers, Q4_K, for WebGPU (idle-intelligence): judged by listening."
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "recovery": (
        ["model", "out", "training", "size", "result"],
        [
            [
                "PersonaPlex-24L Q4_K",
                "layers 12–19",
                "LoRA of rank 32 on out_proj (9.6 M), 333 self-distilled files, 3 epochs",
                "6.74 B, 3.5 GB (whole: 8.37 B, 4.4 GB)",
                "meaning lost before, back after; no metric",
            ]
        ],
    ),
}
STATES = {
    "intact": Look(INK, "o"),
    "trained": Look(HUES["grey"], "X"),
    "pruned": Look(HUES["orange"], "v"),
    "recovered": Look(HUES["green"], "^"),
    "shortened": Look(HUES["purple"], "D"),
    "packed": Look(HUES["blue"], "s"),
}


def sizes(rows: pd.DataFrame, measure: str, unit: str, margin: float) -> dict[str, str]:
    """A measure against the bytes of the file, one dot a model, with its interval; the recipe is ringed."""

    def draw(axes: plt.Axes) -> None:
        for state in [name for name in STATES if name in set(rows["state"])]:
            color, marker = look(state, STATES)
            mine = rows[rows["state"] == state]
            low, high = (mine[measure] - mine[f"{measure}_low"], mine[f"{measure}_high"] - mine[measure])
            axes.errorbar(
                mine["bytes"] / 1e6,
                mine[measure],
                [low.clip(lower=0), high.clip(lower=0)],
                ls="",
                marker=marker,
                color=color,
                label=state,
                elinewidth=0.8,
            )
        recipe = rows[rows["chosen"] == 1]
        axes.plot(recipe["bytes"] / 1e6, recipe[measure], "o", ms=14, mfc="none", color=INK, label="recipe")
        axes.axhline(margin, color=INK, lw=1, ls=":")
        axes.set(xlabel="MB", ylabel=unit)
        legend(axes, columns=3)

    return figure(f"Size and {unit}", draw, "Test prompts, paired. Dotted: the margin.", height=4.0)


def _take(row: dict[str, Any]) -> str:
    most = 99  # told apart by `kept`: 0 where all are left
    title = described({**row, "codebooks": row["kept"] or most}, most)
    return title + (" (the recipe)" if row["chosen"] and row["condition"] != INTACT else "")


def recovery(at: Context) -> dict[str, Any]:
    """What training gives back, and by which pace that was chosen."""
    rows = at.inputs.csv("tables/lm_recovery.csv")
    rows = rows[rows["model"] == at.target]
    about: dict[str, Any] = {
        "heads out": lambda r: f"{r['share']:.0%}, {ORDERS[r['order']]}" if r["share"] else "none",
        "trained on": lambda r: DATA[r["trained"]],
        "by": lambda r: "heard against monologue" if r["measure"] == "wer_monologue" else "monologue against prompt",
    }
    changed = {"before": ("before", 3), "after": ("after", 3), "change": ("change", 3)}
    net = {"intact model's change": ("control", 3), "net": ("net", 3), "verdict": "verdict"}
    pace = {"steps": "steps", "learning rate": "learning_rate", "taken": lambda r: "→" if r["chosen"] else ""}
    count = {"prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}"}
    return {
        "net": display.laid_out(rows[rows["split"] == "test"], about | changed | net | count),
        "paces": display.laid_out(rows[rows["split"] == "val"], about | pace | changed | count),
    }


def show(at: Context) -> dict[str, Any]:
    """Figures, the table of both splits, and answers to listen to."""
    rows = at.inputs.csv("tables/lm_recipe.csv")
    rows = rows[rows["model"] == at.target]
    codebooks = int(rows.loc[rows["state"] == "intact", "codebooks"].iloc[0])
    columns = {
        "model": lambda r: ("→ " if r["chosen"] else "") + described(r, codebooks),
        "heads out": "heads_removed",
        "codebooks": "codebooks",
        "mean bits": ("bits_mean", 2),
        "file": lambda r: megabytes(r["bytes"]),
        "in memory": lambda r: megabytes(r["bytes_resident"]),
        "time of a frame": ("step_ratio", 2),
        "heard against monologue": ("wer_monologue", 3),
        "Δ": ("delta_wer_monologue", 3),
        "monologue against prompt": ("wer_prompt", 3),
        "Δ to the prompt": ("delta_wer_prompt", 3),
        "nats, intact model": ("nll_intact", 3),
        "similarity to the voice": ("similarity_prompt", 3),
        "prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}",
    }
    margin = at.facts["lm_recipe"]["margin"]
    test = rows[rows["split"] == "test"]
    drawn = [
        sizes(test[test["state"] != "intact"], f"delta_wer_{name}", f"ΔWER against the {name}", margin)
        for name in ("monologue", "prompt")
        if test[f"delta_wer_{name}"].notna().any()
    ]
    return {
        "margin": margin,
        "drawn": drawn,
        "test": display.laid_out(test, columns),
        "val": display.laid_out(rows[rows["split"] == "val"], columns),
        **recovery(at),
        "answers": side_by_side(at, "recipe", _take),
        "folder": f"lm/{at.target}/recipe",
    }
