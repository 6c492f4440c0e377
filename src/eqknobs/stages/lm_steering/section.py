"""The section of the report on steering a speech LM."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, Look, figure, legend, look
from eqknobs.evidence.listening import side_by_side
from eqknobs.evidence.stage import Context
from eqknobs.stages.lm_steering.tables import DIRECTIONS, OWN, PROPERTIES, UNITS, amount

STAGE, TITLE, SOUNDS = "lm_steering", "Steered speech LM", False
ABOUT = "Directions added to a layer of the speech LM while it speaks: what they shift, and what that costs in words."
PUBLISHED_SOURCE = "CosyVoice3's LM, 24 layers, an SAE each (arXiv 2606.10029): neither words nor listeners."
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "lm_steering": (
        ["SAE features of CosyVoice3's LM", "before", "steered"],
        [
            ["share with laughter", ".015", ".79"],
            ["P(male)", ".063", ".944"],
            ["voiced time (s)", "2.75", "10.57"],
        ],
    ),
}
LOOKS = {
    "probe": Look(HUES["orange"], "v"),
    "difference_in_means": Look(HUES["green"], "o"),
    "sae_probe": Look(HUES["blue"], "s"),
    "sae_feature": Look(HUES["purple"], "D"),
    "random": Look(HUES["grey"], "X"),
    "gain": Look(FAINT, "P"),
    "vocoder": Look(FAINT, "P"),
    "prompt": Look(FAINT, "P"),
}
MATCHED = {
    "reached": "reached",
    "unreached": "not reached",
    "multiple": "multiple of its α",
    "same_length": "as long",
    "plain": "not steered",
    "intact": "intact",
    "tried": "tried",
}


def _unit(name: str) -> str:
    return UNITS[name].removeprefix("of ")


def costs(name: str, rows: pd.DataFrame, wanted: float) -> dict[str, str]:
    """Words lost against the shift, on test: a line a direction through its multiples of α, a dot where α is val's."""

    def draw(axes: plt.Axes) -> None:
        for direction in [d for d in LOOKS if d in set(rows["direction"])]:
            color, marker = look(direction, LOOKS)
            mine = rows[rows["direction"] == direction].sort_values("alpha")
            style: dict[str, Any] = {"color": color, "marker": marker, "label": DIRECTIONS[direction]}
            at = mine[mine["matched"] != "multiple"]
            if direction not in ("random", "gain", "vocoder", "prompt"):
                axes.plot(mine["shift"], mine["delta_wer_monologue"], color=color, lw=1, alpha=0.6)
            x, y = at["shift"], at["delta_wer_monologue"]
            ends = [[v - at[f"{c}_low"], at[f"{c}_high"] - v] for v, c in ((x, "shift"), (y, "delta_wer_monologue"))]
            axes.errorbar(x, y, xerr=ends[0], yerr=ends[1], ls="", elinewidth=0.8, **style)
        axes.axhline(0, color=INK, lw=1, ls="--")
        axes.axvline(wanted, color=INK, lw=1, ls=":")
        axes.set(xlabel=f"shift of {PROPERTIES[name]} ({_unit(name)})", ylabel="words lost (WER, minus intact)")
        legend(axes)

    caption = "Test prompts, 95 % intervals; words heard against the monologue. "
    caption += "Dotted: the shift that α was chosen for on val; lines: multiples of α."
    return figure(f"{PROPERTIES[name].capitalize()}: shift and words lost", draw, caption, height=3.8)


def tries(name: str, rows: pd.DataFrame, layer: float, wanted: float) -> dict[str, str]:
    """The shift against α on val, in the chosen layer."""

    def draw(axes: plt.Axes) -> None:
        for direction, mine in rows.groupby("direction", sort=False):
            color, marker = look(str(direction), LOOKS)
            mine = mine.sort_values("alpha")
            axes.plot(
                [0, *mine["alpha"]], [0, *mine["shift"]], color=color, marker=marker, label=DIRECTIONS[str(direction)]
            )
        axes.axhline(wanted, color=INK, lw=1, ls=":")
        axes.set(xlabel="α", ylabel=f"shift ({_unit(name)})")
        legend(axes)

    return figure(f"{PROPERTIES[name].capitalize()}: α on val, layer {layer:g}", draw, "Dotted: asked for.", height=3.2)


def _place(row: dict[str, Any]) -> int:
    """The intact model first, then properties."""
    return {"none": -1, **{name: i for i, name in enumerate(OWN)}}.get(row["property"], 0)


def _take(row: dict[str, Any]) -> str:
    if row["direction"] == "intact":
        return "intact"
    matched = "" if row["matched"] == "plain" else f", {MATCHED[row['matched']]}"
    what = f"{PROPERTIES[row['property']]} {amount(row['property'], row['wanted'])}"
    return f"{what}: {DIRECTIONS[row['direction']]}{matched}"


def show(at: Context) -> dict[str, Any]:
    """Figures, tables of val and test, and answers to listen to."""
    rows = at.inputs.csv("tables/lm_steering.csv")
    rows = rows[rows["model"] == at.target]
    test, val = (rows[rows["split"] == split] for split in ("test", "val"))
    drawn = []
    for name in [name for name in OWN if name in set(test["property"])]:
        mine = test[test["property"] == name]
        wanted, layer = mine["wanted"].iloc[0], mine["layer"].dropna().iloc[0]
        drawn.append(costs(name, mine.dropna(subset=["shift", "delta_wer_monologue"]), wanted))
        tried = val[(val["property"] == name) & (val["layer"] == layer)].dropna(subset=["shift"])
        if len(tried):
            drawn.append(tries(name, tried, layer, wanted))
    steered: dict[str, Any] = {
        "property": lambda r: "–" if r["direction"] == "intact" else PROPERTIES[r["property"]],
        "layer": "layer",
        "direction": lambda r: (
            DIRECTIONS[r["direction"]]
            + (f" #{r['seed']:g}, {DIRECTIONS[r['beside']]}" if r["direction"] == "random" else "")
            + (", another draw" if r["direction"] == "intact" and r["seed"] else "")
        ),
        "α": ("alpha", 3),
        "shift asked for": lambda r: MATCHED[r["matched"]],
        "shift": ("shift", 2),
    }
    measured: dict[str, Any] = {
        "WER, heard against monologue": ("wer_monologue", 3),
        "minus intact": ("delta_wer_monologue", 3),
        "WER, monologue against prompt": ("wer_prompt", 3),
        "minus intact ": ("delta_wer_prompt", 3),
        "pitch (semitones)": ("pitch_shift", 2),
        "level (dB)": ("level_shift", 2),
        "voice": ("voice_shift", 3),
        "to the intact answer": ("similarity_intact", 3),
        "silent": ("silent_share", 3),
        "prompts / answers": lambda r: f"{r['prompts']} / {r['answers']}",
    }
    words = {"WER, heard against monologue": ("wer_monologue", 3), "WER, monologue against prompt": ("wer_prompt", 3)}
    return {
        "drawn": drawn,
        "test": display.laid_out(test, steered | measured),
        "val": display.laid_out(val, steered | words | {"prompts": "prompts"}),
        "answers": side_by_side(at, "steered", _take, _place),
    }
