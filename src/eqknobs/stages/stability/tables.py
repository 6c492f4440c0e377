"""How many features are found again in another SAE: the table `stability.csv`."""

import math
from typing import Any

import pandas as pd

from eqknobs.evidence.estimates import records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.stats import interval
from eqknobs.evidence.wording import ends, headline, number, sample

STAGE = "stability"
COLUMNS = {
    "stability": "target kind sae a b theta split clips speakers coverage null_shift null_rate duplicates "
    "coverage_low coverage_high null_shift_low null_shift_high features d_sae coverage_all cosine",
}
NOTHING: dict[str, Any] = {"stability": []}
KINDS = {
    "seeds": "another seed",
    "layers": "the next layer",
    "models": "another model",
    "untrained": "never trained, another seed",
}


def _share(values: pd.Series, theta: float) -> float:
    """Of features, those above θ; NaN of none."""
    return float((values > theta).mean()) if len(values) else math.nan


def tabulate(at: Context) -> Tabulated:
    """One row a (pair, θ)."""
    features = at.inputs.csv(f"scores/{at.target}.stability.csv")
    rows = []
    for pair in at.inputs.json(f"stability/{at.target}.json")["pairs"]:
        keys = {name: pair[name] for name in ("kind", "sae", "a", "b")}
        own = features[(features[list(keys)] == list(keys.values())).all(axis=1)]
        for theta in sorted(map(float, pair["coverage"])):
            name = f"{theta:g}"
            coverage, null = interval(pair["coverage"][name]), pair["shifted"][name]
            row = {"target": at.target, **keys, "theta": theta, "split": pair["split"]}
            row |= {"clips": pair["clips"], "speakers": pair["speakers"], "coverage": _share(own["best"], theta)}
            row |= {
                "null_shift": sum(null) / len(null),
                "null_rate": _share(own["rate"], theta),
                "duplicates": _share(own["duplicate"], theta),
            }
            row |= dict(zip(("coverage_low", "coverage_high"), coverage, strict=True))
            row |= {"null_shift_low": min(null), "null_shift_high": max(null), "features": len(own)}
            row |= {"d_sae": pair["d_sae"], "coverage_all": pair["all_covered"][name] / pair["d_sae"]}
            rows.append(row | {"cosine": own["cosine"].mean()})
    found = table(rows, COLUMNS["stability"])
    return Tabulated({"stability": found}, {"stability": records(found)})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """How much of each SAE another seed finds again, against the better null and against training itself."""
    lines = []
    rows = facts["stability"]
    for row in rows:
        if row["kind"] == "untrained" or row["coverage"] is None:
            continue
        alike = [r for r in rows if r["kind"] == "untrained" and (r["sae"], r["theta"]) == (row["sae"], row["theta"])]
        untrained = alike[0]["coverage"] if alike and row["kind"] == "seeds" else None
        null = max(row["null_shift_high"], row["null_rate"], untrained or 0)
        verdict = (
            "positive" if row["coverage_low"] > null else "negative" if row["coverage_high"] < null else "undecided"
        )
        one, other = (row[side].replace(" #", ", seed ") for side in "ab")
        text = f"Of the features of {row['sae']} ({one}), {number(row['coverage'])} are found again in "
        text += f"{KINDS[row['kind']]} ({other}) at θ {row['theta']:g}."
        detail = (
            f"95 % {ends(row['coverage_low'], row['coverage_high'])}; shifted in time {number(row['null_shift'])}, "
        )
        detail += f"by rate {number(row['null_rate'])}"
        detail += f", never trained {number(untrained)}" if untrained is not None else ""
        detail += f"; duplicates inside it {number(row['duplicates'])}; {sample(row)}"
        cell = (f"SAE {row['sae']}, found again in {KINDS[row['kind']]}", f"θ {row['theta']:g}")
        if row["kind"] != "seeds" or row["a"].endswith(f"#{_first(rows)}"):
            estimate = tuple(row[name] - null for name in ("coverage", "coverage_low", "coverage_high"))
            lines.append(headline("stability", verdict, text, detail, cell, estimate))
    return _one_a_cell(lines)


def _first(rows: list[dict[str, Any]]) -> str:
    return min((row["a"].rpartition("#")[2] for row in rows), key=int)


def _one_a_cell(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The matrix has one number a cell: of several seeds the first one's."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for line in lines:
        if (line["row"], line["column"]) not in seen:
            seen.add((line["row"], line["column"]))
            kept.append(line)
    return kept
