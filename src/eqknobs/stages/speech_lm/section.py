"""The speech LM's section of the report."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import soundfile as sf

from eqknobs.evidence import display
from eqknobs.evidence.drawing import HUES, INK, figure, legend
from eqknobs.evidence.listening import data_uri, mp3
from eqknobs.evidence.stage import Context
from eqknobs.io import require_renders

STAGE, TITLE, SOUNDS = "speech_lm", "Speech LM", False
ABOUT = "What the speech LM says when it is told sentences, and its answers to listen to."
PUBLISHED: dict[str, tuple[list[str], list[list[str]]]] = {}  # nobody has scored such edits by what a model says
HEARD = (("wer_monologue", "orange", "heard against monologue"), ("wer_prompt", "blue", "monologue against prompt"))


def condition(name: str) -> str:
    """A condition in plain words."""
    share = name.removeprefix("heads_zeroed_")
    return name if share == name else f"{float(share):.0%} of heads off"


def _errors(rows: pd.DataFrame) -> dict[str, str]:
    def draw(axes: plt.Axes) -> None:
        y = np.arange(len(rows))[::-1]
        for shift, (measure, hue, said) in zip((0.12, -0.12), HEARD):
            ends = np.abs(rows[[f"{measure}_low", f"{measure}_high"]].to_numpy().T - rows[measure].to_numpy())
            style: dict[str, Any] = {"fmt": "o", "color": HUES[hue], "elinewidth": 2, "ms": 5}
            axes.errorbar(rows[measure], y + shift, xerr=ends, label=said, **style)
        axes.axvline(rows["codec_wer"].iloc[0], color=INK, lw=1, ls="--", label="codec alone")
        axes.set_yticks(y, [condition(name) for name in rows["condition"]])
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="word error rate", xlim=(0, None))
        legend(axes, columns=1)

    return figure("What is said, what is heard", draw, "95 % intervals: voices, then answers.", height=3.2)


def show(at: Context) -> dict[str, Any]:
    """A figure, the table, and answers to listen to."""
    rows = at.inputs.csv("tables/speech_lm.csv")
    rows = rows[rows["model"] == at.target]
    name = f"renders/{at.target}/answers/index.csv"
    index, folder = at.inputs.csv(name), at.inputs.path(name).parent
    require_renders(folder / "index.csv", index["file"])
    answers = []
    for row in index.to_dict("records"):
        wav, rate = sf.read(folder / row["file"], dtype="float32")
        said = "" if pd.isna(row["said"]) else row["said"]
        sound = data_uri("audio/mpeg", mp3(wav, rate))
        heard = "" if pd.isna(row["heard"]) else row["heard"]
        answers.append({"told": row["text"], "voice": row["speaker"], "said": said, "heard": heard, "sound": sound})
    columns = {
        "condition": lambda r: condition(r["condition"]),
        "heard against monologue": ("wer_monologue", 3),
        "monologue against prompt": ("wer_prompt", 3),
        "codec alone": ("codec_wer", 3),
        "silent": ("silent_share", 3),
        "endless": ("endless_share", 3),
        "PAD": ("pad_share", 3),
        "similarity to the voice": ("similarity_prompt", 3),
        "to the other": ("similarity_other", 3),
        "nearer to the voice": ("voice_right", 3),
        "answers / voices": lambda r: f"{r['answers']} / {r['speakers']}",
    }
    return {"drawn": [_errors(rows)], "conditions": display.laid_out(rows, columns), "answers": answers}
