"""Measures over clips and their intervals.

Every mean and ratio is `sum(numerator) / sum(denominator)` over clips, and every interval resamples speakers, then
utterances inside each drawn speaker (`eqknobs.evidence.stats`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from eqknobs.evidence import stats


class IntervalsCfg(TypedDict):
    """How intervals are drawn."""

    bootstrap: int  # resamples
    seed: int


@dataclass(frozen=True)
class Measure:
    """How a measure is made of per-clip columns.

    denominator: None for the mean over clips. better: "lower", "higher" or None. said: its name in a sentence.
    """

    name: str
    numerator: str
    denominator: str | None = None
    better: str | None = None
    said: str = ""


# What several stages measure; a stage's own are in its `tables.py`.
WER = Measure("wer", "errors", "words", "lower", "WER")
WER_TEXT = Measure("wer_text", "errors_text", "words_text", "lower", "WER against the text")
SPEAKER_SIMILARITY = Measure("speaker_similarity", "speaker_similarity", None, "higher", "speaker similarity")
MEL_DISTANCE = Measure("mel_distance", "mel_distance", None, "lower", "mel distance")
CENTROID_HZ = Measure("centroid_hz", "centroid_hz")


def sums(clips: pd.DataFrame, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Per-clip numerator and denominator of a measure, [clips] each; where it is undefined a clip weighs nothing."""
    top = clips[measure.numerator].to_numpy(float)
    bottom = np.ones(len(top)) if measure.denominator is None else clips[measure.denominator].to_numpy(float)
    known = np.isfinite(top) & np.isfinite(bottom)
    return np.where(known, top, 0.0), np.where(known, bottom, 0.0)


def divide(top: Any, bottom: Any) -> Any:
    """top / bottom, NaN where nothing is below the line."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(bottom) > 0, np.asarray(top) / np.asarray(bottom), np.nan)


def estimate(clips: pd.DataFrame, measure: Measure, cfg: IntervalsCfg, interval: bool = True) -> dict[str, float]:
    """{measure, measure_low, measure_high} over clips; NaN where the raw scores do not hold it.

    clips: `id`, `speaker` and the measure's columns. interval: False leaves the value alone.
    """
    name = measure.name
    names = (name, f"{name}_low", f"{name}_high")
    needed = {measure.numerator, measure.denominator or measure.numerator}
    if not needed <= set(clips) or clips[measure.numerator].notna().sum() == 0:
        return dict.fromkeys(names if interval else names[:1], math.nan)
    clips = clips.sort_values("id")
    top, bottom = sums(clips, measure)
    value = float(divide(top.sum(), bottom.sum()))
    if not interval:
        return {name: value}
    ends = stats.ratio_interval(top, bottom, clips["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    return dict(zip(names, (value, *ends)))


def counts(clips: pd.DataFrame) -> dict[str, int]:
    """{clips, speakers}."""
    return {"clips": int(clips["id"].nunique()), "speakers": int(clips["speaker"].nunique())}


def groups(rows: pd.DataFrame, keys: list[str]) -> Iterable[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows of each combination of keys, in order of appearance; a key that is no column counts as empty."""
    for key in keys:
        if key not in rows:
            rows = rows.assign(**{key: math.nan})
    for values, group in rows.groupby(keys, dropna=False, sort=False):
        yield dict(zip(keys, values)), group


def table(rows: list[dict[str, Any]], columns: str) -> pd.DataFrame:
    """A table with just these columns, named in one string, in this order."""
    return pd.DataFrame(rows, columns=columns.split())


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON values; missing cells become None."""
    found = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return [{k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()} for row in found]
