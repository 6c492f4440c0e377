"""The packed codec's section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile as sf
from matplotlib.ticker import FuncFormatter, NullFormatter

from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, INK, Look, figure, legend, look
from eqknobs.evidence.listening import data_uri, mp3
from eqknobs.evidence.stage import Context
from eqknobs.io import require_renders
from eqknobs.stages.quantisation.tables import MEL_WITHIN, PARTS, PLANS, SIMILARITY_WITHIN, megabytes

STAGE, TITLE, SOUNDS = "quantisation", "Quantisation", True
ABOUT = "The codec as packed files: what each plan costs at equal bytes, to see and to hear."
PUBLISHED_SOURCE = "Mimi by arithmetic, and Moshi 7B: the blog post of version 1, and its follow-up of May 2026."
# Published by others, for other models and other speech; notes in docs/tables.md.
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {
    "quantisation": (
        ["", "version 1 (arithmetic, no file was built)", "follow-up, the speech LM's last layer"],
        [
            ["uniform 8 bits", "76 MB", "–"],
            ["uniform 4 bits", "38 MB", "cosine .747"],
            ["uniform 3 bits", "–", "cosine .359"],
            ["uniform 2 bits", "–", "cosine .031"],
            ["SAE-guided, about 3 bits", "29 MB", "cosine .271 at 2.94 bits: below uniform 3"],
            ["SAE-guided, about 2.5 bits", "23 MB", "–"],
            ["block-aware, 3.10 bits", "–", "+.024 above uniform's line"],
        ],
    ),
}
LOOKS = {
    "uniform": Look(INK, "s"),
    "guided": Look(HUES["blue"], "o"),
    "map": Look(HUES["sky"], "v"),
    "sensitivity": Look(HUES["green"], "^"),
    "inverted": Look(HUES["purple"], "D"),
    "random": Look(HUES["grey"], "X"),
}
PLAYED = 2  # clips
HEARD = (("none", None), ("uniform", 4.0), ("guided", 3.0), ("inverted", 3.0))  # what the players play


def _curves(rows: pd.DataFrame, measure: str, unit: str, title: str) -> dict[str, str] | None:
    """A measure against bytes; rows: of one part, by the shared rounding, and of nothing quantised."""
    rows = rows[rows[measure].notna()]
    plans = rows[rows["plan"] != "none"]
    if plans.empty:
        return None
    uniform = plans[plans["plan"] == "uniform"]
    ends = uniform[uniform["budget"].isin([uniform["budget"].min(), uniform["budget"].max()])]

    def draw(axes: plt.Axes) -> None:
        sets = plans[plans["plan"] == "random"].groupby("budget")
        if len(sets):
            spread = sets[measure].agg(["min", "max", "mean"])
            sizes, color = sets["bytes"].mean() / 1e6, LOOKS["random"].color
            axes.fill_between(sizes, spread["min"], spread["max"], color=color, alpha=0.25, lw=0)
            axes.plot(sizes, spread["mean"], color=color, marker="X", label="random")
        for name in [name for name in PLANS if name in set(plans["plan"]) - {"random"}]:
            own = plans[plans["plan"] == name]
            line = pd.concat([own, ends]) if name != "uniform" and len(own) > 1 else own
            line = line.sort_values("bytes")
            color, marker = look(name, LOOKS)
            style: dict[str, Any] = {"ls": "--", "lw": 1.4} if name == "uniform" else {}
            axes.plot(line["bytes"] / 1e6, line[measure], color=color, marker=marker, label=PLANS[name], **style)
        for value in rows.loc[rows["plan"] == "none", measure]:
            axes.axhline(value, color=INK, lw=1, ls=":")
        axes.set_xscale("log")
        ticks = np.sort(uniform["bytes"].unique()) / 1e6
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.2g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="bytes of the packed file (MB)", ylabel=unit)
        legend(axes)

    caption = "Dashed: uniform, the line to beat; dotted: not quantised; band: random plans, smallest to largest."
    return figure(title, draw, caption, height=3.2)


def _players(at: Context) -> list[dict[str, Any]]:
    """Of each clip that was kept: [{clip, voice, part, sounds: [{said, sound}]}]."""
    name = f"renders/{at.target}/quantisation/index.csv"
    index, folder = at.inputs.csv(name), at.inputs.path(name).parent
    if index.empty:
        return []
    require_renders(folder / "index.csv", index["file"])
    found = []
    clips = list(dict.fromkeys(index["id"]))[:PLAYED]
    for (part, clip), rows in index[index["id"].isin(clips)].groupby(["part", "id"], sort=False):
        sounds = []
        for plan, budget in HEARD:
            own = rows[(rows["plan"] == plan) & (rows["budget"].isna() if budget is None else rows["budget"] == budget)]
            for row in own.head(1).to_dict("records"):
                wav, rate = sf.read(folder / row["file"], dtype="float32")
                said = PLANS[plan] if budget is None else f"{PLANS[plan]}, {budget:g} bits"
                sounds.append({"said": said, "sound": data_uri("audio/mpeg", mp3(wav, rate))})
        found.append({"clip": clip, "part": PARTS[part], "sounds": sounds})
    return found


def _plan(row: dict[str, Any]) -> str:
    seed = "" if pd.isna(row["seed"]) else f" #{row['seed']:g}"
    rounding = f", {row['rounding']}" if row["plan"] == "uniform" else ""
    return PLANS[row["plan"]] + seed + rounding


def _range(row: dict[str, Any]) -> str:
    low, high = (megabytes(row[f"bytes_needed_{end}"]) for end in ("low", "high"))
    return low if low == high else f"{low} to {high}"


def show(at: Context) -> dict[str, Any]:
    """Rate and quality of each part, bytes at equal quality, sounds to compare, all conditions."""
    rows, needed = (at.inputs.csv(f"tables/{name}.csv") for name in ("quantisation", "quantisation_equal_quality"))
    rows, needed = rows[rows["target"] == at.target], needed[needed["target"] == at.target]
    drawn = []
    for part in rows["part"].unique():
        own = rows[(rows["part"] == part) & ((rows["rounding"] == at.own["rounding"]) | (rows["plan"] == "none"))]
        own = own.assign(speaker_similarity=pd.to_numeric(own["speaker_similarity"], errors="coerce"))
        for measure, unit in (
            ("mel_distance", "mel distance (dB)"),
            ("token_flip_rate", "tokens changed (share)"),
            ("speaker_similarity", "speaker similarity"),
            ("dnsmos", "DNSMOS"),
        ):
            if measure != "token_flip_rate" or part == "codec":
                drawn.append(_curves(own, measure, unit, f"{PARTS[part].capitalize()}: {unit}"))
    size = lambda name: lambda r: megabytes(r[name])  # noqa: E731
    quality = {
        "part": lambda r: PARTS[r["part"]],
        "plan": lambda r: PLANS[r["plan"]],
        "bytes needed": size("bytes_needed"),
        "95 %": _range,
        "by mel distance": size("bytes_needed_mel"),
        "by similarity": size("bytes_needed_similarity"),
        "WER added": ("wer_difference", 3),
        f"power at {0.05:g}": ("wer_power", 2),
        "clips / speakers": display.sample,
        "heard": "heard_clips",
    }
    columns = {
        "part": lambda r: PARTS[r["part"]],
        "plan": _plan,
        "bits": ("bits_mean", 2),
        "file": size("bytes"),
        "in memory": size("bytes_resident"),
        "mel (dB)": ("mel_distance", 2),
        "latent error": ("latent_error", 3),
        "tokens changed": ("token_flip_rate", 3),
        **{name: column for name, column in display.WORDED.items() if name != "WER, text"},
        "DNSMOS": ("dnsmos", 2),
        "decode time": ("decode_ratio", 2),
        "clips / speakers": display.sample,
    }
    return {
        "drawn": [one for one in drawn if one is not None],
        "mel_within": MEL_WITHIN,
        "similarity_within": SIMILARITY_WITHIN,
        "needed": display.laid_out(needed, quality),
        "players": _players(at),
        "judged": display.laid_out(rows[rows["heard_clips"] > 0], columns),
        "rest": display.laid_out(rows[rows["heard_clips"] == 0], columns),
    }
