"""Answers of a speech LM as evidence: measures, margins, and pairs of the same prompts and draws.

Intervals and comparisons resample prompts, then draws: with two voices, resampling voices would say little.
"""

from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import IntervalsCfg, Measure
from eqknobs.evidence.wording import ends, number

MARGIN = 0.05  # of word error rate that a smaller model may lose
WER_MONOLOGUE = Measure("wer_monologue", "errors_monologue", "words_monologue", "lower", "WER against the monologue")
WER_PROMPT = Measure("wer_prompt", "errors_prompt", "words_prompt", "lower", "WER of the monologue against the prompt")
SIMILARITY_PROMPT = Measure(
    "similarity_prompt", "similarity_prompt", None, "higher", "similarity to the prompted voice"
)
SIMILARITY_INTACT = Measure("similarity_intact", "similarity_intact", None, "higher", "similarity to the intact answer")
WORDS = (WER_MONOLOGUE, WER_PROMPT)
NATS = (
    Measure("nll_text", "nll_text", None, "lower"),
    Measure("nll_audio", "nll_audio", None, "lower"),
)


def by_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose unit of resampling is the prompt."""
    return rows.assign(speaker=rows["id"])


def paired(intact: pd.DataFrame, mine: pd.DataFrame, measure: Measure, cfg: IntervalsCfg) -> dict[str, Any] | None:
    """`compare` of answers with the intact model's of the same prompts and draws."""
    same = intact[intact["draw"].isin(mine["draw"].unique()) & intact["id"].isin(mine["id"].unique())]
    return compare(by_prompt(mine), by_prompt(same), measure, cfg)


def counted_prompts(record: dict[str, Any], measure: Measure, unit: str = "prompts") -> str:
    """Both values, the difference, p and how many prompts (of what is measured teacher-forced: clips)."""
    p = f"p = {record['p_holm']:.3f}" + (f" (Holm, {record['compared']})" if record["compared"] > 1 else "")
    values = f"{number(record['value_a'])} against {number(record['value_b'])}"
    apart = f"{number(record['difference'], True)} {ends(record['low'], record['high'], True)}"
    return f"{measure.said} {values}; difference {apart}; {p}; {record['clips']} {unit}"
