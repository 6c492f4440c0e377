"""Words for numbers: how sentences are made from the summary, phrased by the sign of each interval."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from eqknobs.corpus.properties import PROPERTIES as REGISTERED
from eqknobs.errors import counted
from eqknobs.evidence.estimates import Measure

PROPERTIES = {name: found.title for name, found in REGISTERED.items()}


FEW = 5


def label(name: str, words: Mapping[str, str]) -> str:
    """Plain words for an arm, a space or a map: "sae_clamp:topk" -> "SAE feature clamp (topk)"."""
    kind, _, sae = name.partition(":")
    return f"{words.get(kind, kind)} ({sae})" if sae else words.get(kind, kind)


def number(value: float, signed: bool = False) -> str:
    """Three decimals and a true minus sign."""
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "−")


def ends(low: float, high: float, signed: bool = False) -> str:
    """An interval: "[0.100, 0.200]"."""
    return f"[{number(low, signed)}, {number(high, signed)}]"


def sample(row: dict[str, Any]) -> str:
    """How many clips and speakers a row rests on."""
    clips, speakers = row["clips"] if "clips" in row else row["utterances"], row["speakers"]
    return f"{counted(clips, 'clip')}, {counted(speakers, 'speaker')}"


def listed(names: Iterable[str]) -> str:
    """ "a, b and c"."""
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def said(record: dict[str, Any]) -> tuple[str, str]:
    """What a comparison does to the claim that a is the better one: (verdict, words).

    An interval that holds 0, or a p that fails Holm's correction, shows nothing; nor do fewer than `FEW` clips, whose
    resamples hardly differ.
    """
    if record["verdict"] == "undecided" or record.get("clips", FEW) < FEW:
        return "undecided", "is not shown to differ from"
    if record["p_holm"] >= 0.05:
        return "undecided", f"looks {record['verdict']} than, but after Holm's correction is not shown to differ from,"
    return ("positive" if record["verdict"] == "better" else "negative"), f"does {record['verdict']} than"


def numbers(record: dict[str, Any], measure: Measure) -> str:
    """Both values, the paired difference with its interval, p and counts."""
    p = f"p = {record['p_holm']:.3f}" + (f" (Holm, {record['compared']})" if record["compared"] > 1 else "")
    return (
        f"{measure.said} {number(record['value_a'])} against {number(record['value_b'])}; "
        f"difference {number(record['difference'], True)} {ends(record['low'], record['high'], True)}; {p}; "
        f"{sample(record)}"
    )


def headline(
    topic: str,
    verdict: str,
    text: str,
    detail: str = "",
    cell: tuple[str, str] | None = None,
    estimate: tuple[float, float, float] | None = None,
) -> dict[str, Any]:
    """A finding. verdict: "positive" or "negative" (for the method's claims) where the interval excludes 0 and Holm's
    correction holds, "undecided" where not, "measured" for figures that test no claim.

    cell: (row, column), the claim and the condition under which it stands in the report's matrix; without, it stands
    below as a sentence. estimate: (value, low, high), the paired difference of a comparison, else what was measured.
    """
    line: dict[str, Any] = {"topic": topic, "verdict": verdict, "text": text, "detail": detail}
    if cell is not None:
        line |= dict(zip(("row", "column"), cell))
    if estimate is not None and all(number is not None and math.isfinite(number) for number in estimate):
        line |= dict(zip(("value", "low", "high"), estimate))
    return line


def difference(record: dict[str, Any]) -> tuple[float, float, float]:
    """The `estimate` of a comparison's headline."""
    return record["difference"], record["low"], record["high"]


def estimated(row: dict[str, Any], name: str) -> tuple[float, float, float]:
    """The `estimate` of a measured one, from a row of a table."""
    return row[name], row[f"{name}_low"], row[f"{name}_high"]
