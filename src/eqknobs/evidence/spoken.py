"""Answers of a speech LM as evidence: measures, margins, and pairs of the same prompts and draws.

Intervals and comparisons resample prompts, then draws: with two voices, resampling voices would say little.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import IntervalsCfg, Measure, estimate, groups
from eqknobs.evidence.stage import TablesCfg
from eqknobs.evidence.wording import ends, number

MARGIN = 0.05  # of word error rate that a smaller model may lose
WER_MONOLOGUE = Measure("wer_monologue", "errors_monologue", "words_monologue", "lower", "WER against the monologue")
WER_PROMPT = Measure("wer_prompt", "errors_prompt", "words_prompt", "lower", "WER of the monologue against the prompt")
SIMILARITY_PROMPT = Measure(
    "similarity_prompt", "similarity_prompt", None, "higher", "similarity to the prompted voice"
)
SIMILARITY_INTACT = Measure("similarity_intact", "similarity_intact", None, "higher", "similarity to the intact answer")
WORDS = (WER_MONOLOGUE, WER_PROMPT)
NLL_INTACT = Measure("nll_intact", "nll_intact", None, "lower")
SILENT_SHARE = Measure("silent_share", "silent", None, "lower")
WORDS_PER_SECOND = Measure("words_per_second", "words_heard", "active_seconds")
DNSMOS = Measure("dnsmos", "dnsmos", None, "higher")
NATS = (
    Measure("nll_text", "nll_text", None, "lower"),
    Measure("nll_audio", "nll_audio", None, "lower"),
)


DELTAS = [f"delta_{m.name}{end}" for m in WORDS for end in ("", "_low", "_high")]  # minus the intact model's


def bounds_of(measures: Sequence[Measure]) -> list[str]:
    """The columns of their intervals."""
    return [f"{m.name}{end}" for m in measures for end in ("_low", "_high")]


def by_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose unit of resampling is the prompt."""
    return rows.assign(speaker=rows["id"])


def paired(intact: pd.DataFrame, mine: pd.DataFrame, measure: Measure, cfg: IntervalsCfg) -> dict[str, Any] | None:
    """`compare` of answers with the intact model's of the same prompts and draws."""
    same = intact[intact["draw"].isin(mine["draw"].unique()) & intact["id"].isin(mine["id"].unique())]
    return compare(by_prompt(mine), by_prompt(same), measure, cfg)


def answered(
    mine: pd.DataFrame, intact: pd.DataFrame | None, measures: Sequence[Measure], cfg: IntervalsCfg
) -> dict[str, Any]:
    """Of one condition's answers: how many there are, measures with intervals and, beside the intact model's (None:
    they are its own), the paired differences of both word error rates (`DELTAS`)."""
    row = {"answers": len(mine), "prompts": mine["id"].nunique(), "speakers": mine["speaker"].nunique()}
    for measure in measures:
        row |= estimate(by_prompt(mine), measure, cfg)
    for measure in WORDS if intact is not None else ():
        if record := paired(intact, mine, measure, cfg):
            name = f"delta_{measure.name}"
            row |= {name: record["difference"], f"{name}_low": record["low"], f"{name}_high": record["high"]}
    return row


def screened(
    nats: pd.DataFrame,
    answers: pd.DataFrame,
    condition: list[str],
    about: list[str],
    measures: tuple[Sequence[Measure], Sequence[Measure]],
    cfg: IntervalsCfg,
) -> list[dict[str, Any]]:
    """A row a condition of a stage that screens all, teacher-forced, and lets some speak, the intact model first.

    condition: columns that tell one from another; about: others that its rows of `nats` have in common; measures: of
    held-out clips, and of answers, which are empty where a condition does not speak.
    """
    spoken = {tuple(key.values()): rows for key, rows in groups(answers, condition)}
    found: list[dict[str, Any]] = []
    intact: pd.DataFrame | None = None
    for key, clips in groups(nats, [*condition, *about]):
        row = {**key, "clips": len(clips), "answers": 0, "prompts": 0, "speakers": clips["speaker"].nunique()}
        for measure in measures[0]:
            row |= estimate(by_prompt(clips), measure, cfg)
        mine = spoken.get(tuple(key[name] for name in condition))
        if mine is not None:
            row |= answered(mine, intact, measures[1], cfg)
            intact = mine if intact is None else intact
        found.append(row)
    return found


def measurable(intact: pd.DataFrame, cfg: TablesCfg) -> list[Measure]:
    """The word error rates that say something: where the intact model itself is understood, and something was told."""
    values = {m: estimate(intact, m, cfg, interval=False)[m.name] for m in WORDS}
    return [measure for measure, value in values.items() if value <= cfg["unmeasurable_wer"]]


def versus(
    a: pd.DataFrame, b: pd.DataFrame, measures: Sequence[Measure], cfg: IntervalsCfg, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Comparisons of two conditions' answers to the same prompts with the draws that both have, one a measure.

    about: columns of the records; of `family`, that of Holm's correction, the measure is a part too.
    """
    draws, found = set(a["draw"]) & set(b["draw"]), []
    parts = [by_prompt(rows[rows["draw"].isin(draws)]) for rows in (a, b)]
    for measure in measures if draws else ():
        if record := compare(parts[0], parts[1], measure, cfg):
            own = {"property": None, "binning": None, **about, "speakers": a["speaker"].nunique()}
            found.append({**record, **own, "family": f"{about['family']}, {measure.name}"})
    return found


def counted_prompts(record: dict[str, Any], measure: Measure, unit: str = "prompts") -> str:
    """Both values, the difference, p and how many prompts (of what is measured teacher-forced: clips)."""
    p = f"p = {record['p_holm']:.3f}" + (f" (Holm, {record['compared']})" if record["compared"] > 1 else "")
    values = f"{number(record['value_a'])} against {number(record['value_b'])}"
    apart = f"{number(record['difference'], True)} {ends(record['low'], record['high'], True)}"
    return f"{measure.said} {values}; difference {apart}; {p}; {record['clips']} {unit}"
