"""Paired differences between two conditions, and Holm's correction of a family of them."""

from typing import Any

import pandas as pd

from eqknobs.evidence import stats
from eqknobs.evidence.estimates import IntervalsCfg, Measure, counts, sums


def _pool(clips: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """One row a clip: numerators and denominators summed over repeats (the random sets' seeds)."""
    top, bottom = sums(clips, measure)
    rows = pd.DataFrame({"id": clips["id"], "speaker": clips["speaker"], "top": top, "bottom": bottom})
    return rows.groupby(["id", "speaker"], as_index=False).sum().query("bottom > 0")


def compare(a: pd.DataFrame, b: pd.DataFrame, measure: Measure, cfg: IntervalsCfg) -> dict[str, Any] | None:
    """Paired bootstrap difference a − b of one measure on the clips that both hold.

    Returns `measure`, value_a, value_b, difference, low, high (95 %), p (two-sided), clips, speakers and the verdict
    on a; or None where the measure was not taken on both.
    """
    needed = {measure.numerator, measure.denominator or measure.numerator}
    if not needed <= set(a) or not needed <= set(b):
        return None
    both = _pool(a, measure).merge(_pool(b, measure), on=["id", "speaker"], suffixes=("_a", "_b")).sort_values("id")
    if both.empty:
        return None
    a1, a0, b1, b0 = (both[name].to_numpy(float) for name in ("top_a", "bottom_a", "top_b", "bottom_b"))
    found = stats.paired_difference(a1, a0, b1, b0, both["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    values = {"value_a": a1.sum() / a0.sum(), "value_b": b1.sum() / b0.sum()}
    numbers = {name: float(value) for name, value in {**values, **found._asdict()}.items()}
    return {"measure": measure.name, "verdict": _verdict(numbers, measure), **numbers, **counts(both)}


def compare_changes(
    after: pd.DataFrame,
    before: pd.DataFrame,
    control_after: pd.DataFrame,
    control_before: pd.DataFrame,
    measure: Measure,
    cfg: IntervalsCfg,
) -> dict[str, Any] | None:
    """As `compare`, of two changes on the clips that all four hold: value_a = after − before, value_b that of the
    control, difference = value_a − value_b (difference in differences)."""
    parts = (after, before, control_after, control_before)
    needed = {measure.numerator, measure.denominator or measure.numerator}
    if not all(needed <= set(part) for part in parts):
        return None
    every = _pool(parts[0], measure).rename(columns={"top": "top0", "bottom": "bottom0"})
    for i, part in enumerate(parts[1:], start=1):
        named = _pool(part, measure).rename(columns={"top": f"top{i}", "bottom": f"bottom{i}"})
        every = every.merge(named, on=["id", "speaker"])
    if every.empty:
        return None
    every = every.sort_values("id")
    terms = [(sign, every[f"top{i}"], every[f"bottom{i}"]) for i, sign in enumerate((1, -1, -1, 1))]
    found = stats.combined_difference(terms, every["speaker"].tolist(), cfg["bootstrap"], cfg["seed"])
    rates = [top.sum() / bottom.sum() for _, top, bottom in terms]
    numbers = {"value_a": float(rates[0] - rates[1]), "value_b": float(rates[2] - rates[3])}
    numbers |= {name: float(value) for name, value in found._asdict().items()}
    return {"measure": measure.name, "verdict": _verdict(numbers, measure), **numbers, **counts(every)}


def _verdict(numbers: dict[str, float], measure: Measure) -> str:
    """ "better", "worse" or "undecided" (the interval holds 0) for a against b."""
    if not (numbers["low"] > 0 or numbers["high"] < 0):  # NaN shows nothing either
        return "undecided"
    return "better" if (numbers["low"] > 0) == (measure.better == "higher") else "worse"


def with_holm(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, each with its Holm-corrected p inside its `family`, and how many that family compares."""
    for family in sorted({r["family"] for r in records}):
        members = [r for r in records if r["family"] == family]
        for record, p in zip(members, stats.holm([r["p"] for r in members])):
            record |= {"p_holm": float(p), "compared": len(members)}
    return records
