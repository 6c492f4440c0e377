"""What a speech LM says when it is told sentences: the table `speech_lm.csv`.

In place of a target stands the model. The speaker of an answer is the voice that the prompt asks for, so that intervals
draw voices, then answers.
"""

from typing import Any

import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence.estimates import IntervalsCfg, Measure, estimate, groups, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import ends, estimated, headline, number

STAGE = "speech_lm"
MEASURES = (
    Measure("wer_monologue", "errors_monologue", "words_monologue", "lower"),
    Measure("wer_prompt", "errors_prompt", "words_prompt", "lower"),
    Measure("codec_wer", "errors_codec", "words_prompt", "lower"),
    Measure("silent_share", "silent", None, "lower"),
    Measure("endless_share", "endless", None, "lower"),
    Measure("pad_share", "pads", "frames"),
    Measure("similarity_prompt", "similarity_prompt", None, "higher"),
    Measure("similarity_other", "similarity_other", None, "lower"),
    Measure("voice_right", "voice_right", None, "higher"),
)
COLUMNS = {
    "speech_lm": " ".join(
        [
            "model split condition seeds answers speakers",
            *(measure.name for measure in MEASURES),
            "real_time_factor",
            *(f"{measure.name}_{end}" for measure in MEASURES for end in ("low", "high")),
        ]
    )
}
NOTHING: dict[str, Any] = {}
SAMPLE = {"answers": "answer", "seeds": "seed", "speakers": "voice"}
COMPARED = {"wer_monologue": "WER, heard against monologue", "wer_prompt": "WER, monologue against prompt"}


def conditions(answers: pd.DataFrame, cfg: IntervalsCfg) -> pd.DataFrame:
    """One row a condition, seeds together, from one record an answer."""
    rows = []
    for key, mine in groups(answers, ["model", "split", "condition"]):
        row = {**key, "seeds": mine["seed"].nunique(), "answers": len(mine), "speakers": mine["speaker"].nunique()}
        for measure in MEASURES:
            row |= estimate(mine, measure, cfg)
        rows.append(row | {"real_time_factor": mine["seconds"].sum() / mine["sound"].sum()})
    return table(rows, COLUMNS["speech_lm"])


def tabulate(at: Context) -> Tabulated:
    """One row a condition."""
    rows = conditions(at.inputs.csv(f"scores/{at.target}.answers.csv"), at.cfg)
    return Tabulated({"speech_lm": rows}, {"answers": records(rows)})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """How clearly the model speaks, beside its codec; whether it says what it was told; what zeroed heads change."""
    lines = []
    for row in facts["answers"]:
        heads = row["condition"].removeprefix("heads_zeroed_")
        if row["condition"] not in ("intact", "sampled") and heads == row["condition"]:
            continue
        who = {"intact": "The model", "sampled": "The model, sampling,"}.get(row["condition"])
        who = who or f"With {float(heads):.0%} of its heads off the model"
        name = row["condition"].replace("heads_zeroed_", "heads off, share ")
        sample = ", ".join(counted(row[key], what) for key, what in SAMPLE.items())
        beside = (
            f"codec alone {number(row['codec_wer'])}; nearer to the voice it was asked for {row['voice_right']:.0%}"
        )
        for measure, what, detail in (
            ("wer_monologue", "is heard to say its own monologue", f"{beside}; {sample}"),
            ("wer_prompt", "writes what it was told", sample),
        ):
            text = f"{who} {what} with a word error rate of {number(row[measure])} "
            text += f"{ends(row[f'{measure}_low'], row[f'{measure}_high'])}."
            cell = (name, COMPARED[measure])
            lines.append(headline("speech_lm", "measured", text, detail, cell, estimated(row, measure)))
    return lines
