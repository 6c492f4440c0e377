"""The steering's section of the report, and what its players play."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence import display
from eqknobs.evidence.drawing import FAINT, HUES, INK, Look, figure, legend, look
from eqknobs.evidence.stage import Context
from eqknobs.evidence.wording import PROPERTIES, label
from eqknobs.stages.steering.tables import ARMS

STAGE, TITLE, SOUNDS = "steering", "Steering", True
ABOUT = "Directions turned at a matched shift, what they cost, and players to hear them."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "sweep": (
        ["α (raw)", "centroid (Hz), version 1, one file"],
        [["0", "2611 (original 2832)"], ["1", "2463"], ["2", "2303"], ["5", "1872"], ["10", "1241"]],
    ),
    "steering": (
        ["rerun, 50 clips, matched shift", "centroid (Hz)", "WER", "speaker similarity"],
        [
            ["original", "1594", ".019", "1.000"],
            ["codec round trip", "1442", ".018", ".923"],
            ["raw-latent probe direction", "736", ".021", ".752"],
            ["SAE probe direction (ReLU)", "774", ".027", ".752"],
            ["SAE probe direction (TopK)", "794", ".027", ".622"],
            ["difference in means", "707", ".020", ".707"],
            ["band-pass 300–3000 Hz (not matched)", "1184", ".024", ".643"],
        ],
    ),
}
LOOKS = {
    "sae_probe": Look(HUES["blue"], "o"),
    "sae_probe_error": Look(HUES["sky"], "s"),
    "sae_probe_renorm": Look(HUES["purple"], "D"),
    "sae_clamp": Look(HUES["yellow"], "^"),
    "raw_probe": Look(HUES["orange"], "v"),
    "difference_in_means": Look(HUES["green"], "o"),
    "random": Look(HUES["grey"], "X"),
    "dsp_lowpass": Look(FAINT, "s"),
}
SHORT = ARMS | {
    "sae_probe": "SAE direction",
    "sae_probe_error": "SAE direction + error",
    "sae_probe_renorm": "SAE dir., re-normed",
    "sae_clamp": "SAE clamp",
    "raw_probe": "raw-latent direction",
    "dsp_lowpass": "low-pass filter",
}


def _sweeps(rows: pd.DataFrame, saes: list[str], shift: float) -> list[dict[str, str]]:
    """The centroid against α, a figure an SAE and one without; rows: of the centroid on test."""
    sweep = rows[~rows["calibrated"].isin(["reached", "unreached"]) & rows["alpha"].notna()]
    swept = [a for a, n in sweep.groupby("arm")["alpha"].nunique().items() if n > 1]
    base = rows[rows["arm"] == "codec_roundtrip"]["centroid_hz"]

    def lines(axes: plt.Axes, arms: list[str]) -> None:
        for arm in arms:
            line = sweep[sweep["arm"] == arm].sort_values("alpha")
            color, marker = look(arm, LOOKS)
            axes.plot(
                line["alpha"], line["centroid_hz"], color=color, marker=marker, label=SHORT[arm.partition(":")[0]]
            )
            if line["alpha"].nunique() > 1:
                axes.fill_between(
                    line["alpha"], line["centroid_hz_low"], line["centroid_hz_high"], color=color, alpha=0.1, lw=0
                )
        if len(base):
            axes.axhline(base.iloc[0], color=INK, lw=1, ls="--")
            axes.axhline(base.iloc[0] * shift, color=INK, lw=1, ls=":")
        axes.set(xlabel="α (standard deviations)", ylabel="centroid of the render (Hz)")
        legend(axes)

    shown = {f"SAE {sae}": [a for a in swept if a.endswith(f":{sae}")] for sae in saes}
    shown["no SAE"] = [a for a in swept if ":" not in a]
    caption = "Dashed: codec round trip; dotted: target. Bands: 95 %."
    return [
        figure(f"α against centroid: {name}", lambda axes, arms=arms: lines(axes, arms), caption, height=3.0)
        for name, arms in shown.items()
        if arms
    ]


def _forests(rows: pd.DataFrame) -> list[dict[str, str]]:
    """What each arm that reached the shift keeps of voice and words; rows: of the centroid on test."""
    matched = rows[rows["calibrated"] == "reached"].sort_values("speaker_similarity")
    figures = []
    for measure, title in (("speaker_similarity", "Speaker similarity"), ("wer", "WER")):
        part = matched.assign(**{c: pd.to_numeric(matched[c], errors="coerce") for c in matched if c.startswith("wer")})
        part = part.dropna(subset=[measure])
        if part.empty:
            continue

        def forest(axes: plt.Axes, part: pd.DataFrame = part, measure: str = measure) -> None:
            y = np.arange(len(part))
            for i, row in zip(y, part.to_dict("records")):
                color, marker = look(row["arm"], LOOKS)
                axes.plot([row[f"{measure}_low"], row[f"{measure}_high"]], [i, i], color=color, lw=2.2)
                axes.plot(row[measure], i, marker, color=color, ms=6)
            axes.set_yticks(y, [label(arm, SHORT) for arm in part["arm"]])
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel("word error rate" if measure == "wer" else "speaker similarity")

        note = f"Arms calibrated on val to one centroid; 95 % intervals, {counted(matched['clips'].max(), 'clip')}."
        figures.append(figure(f"{title}, matched shift", forest, note, height=0.8 + 0.22 * len(part)))
    return figures


def _strength(row: dict[str, Any]) -> str:
    return display.cell(row, "alpha", 2)[0] + _unit(row["arm"])


def _unit(arm: str) -> str:
    return " kHz" if arm == "dsp_lowpass" else ""  # its α is the cutoff


def show(at: Context) -> dict[str, Any]:
    """Figures, and the tables at the matched shift, of the sweep and of the other properties."""
    rows = at.inputs.csv("tables/steering.csv")
    rows = rows[rows["target"] == at.target]
    centroid = rows[rows["property"] == "centroid"]
    matched = centroid[centroid["calibrated"] != "sweep"].sort_values("rank", na_position="last", kind="stable")
    measured = {
        "f0 error (cents)": ("f0_error_cents", 1),
        "loudness (dB)": ("loudness_change_db", 1),
        "mel (dB)": ("mel_distance", 2),
        "clips / speakers": display.sample,
    }
    arm = {"arm": lambda r: label(r["arm"], ARMS)}
    hertz = {"centroid (Hz)": ("centroid_hz", 0)}
    steered = arm | {"α": _strength, "α raw": ("alpha_raw", 2), "shift": "calibrated"} | hertz | measured
    first = {"rank": "rank", **arm, "shift": "calibrated", "α": _strength, **hertz}
    shift = at.own["shift"]
    test = centroid[centroid["split"] == "test"]
    return {
        "shift": shift,
        "measurable": at.facts["words"]["measurable"],
        "drawn": _sweeps(test, [row["sae"] for row in at.facts["sae"]], shift) + _forests(test),
        "matched": display.laid_out(matched, first | display.WORDED | measured),
        "sweep": display.laid_out(centroid[centroid["calibrated"] == "sweep"], steered),
        "rest": display.laid_out(
            rows[rows["property"] != "centroid"],
            {"property": lambda r: PROPERTIES.get(r["property"], r["property"]), **steered},
        ),
    }


def played(at: Context) -> dict[str, Any]:
    """What `eqknobs.report.players` needs: `scores` by clip and condition, words for arms in their order (`arms`), the
    conditions to switch to (`references`: button -> arm) and the unit of an arm's α (`unit`)."""
    signal = at.inputs.csv(f"scores/{at.target}.steering.signal.csv")
    words = at.inputs.csv(f"scores/{at.target}.steering.words.csv").drop(columns=["speaker", "split"])
    return {
        "scores": signal.merge(words, "left", ["id", "condition"]),
        "arms": ARMS,
        "references": {"original": "original", "codec": "codec_roundtrip"},
        "unit": _unit,
    }
