"""How well features named after phones tell them: the table `phones.csv`."""

from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, counts, estimate, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, number, numbers, said, sample

STAGE = "phones"
COLUMNS = {
    "phones": "target method space split clips speakers frames accuracy null accuracy_low accuracy_high null_low "
    "null_high features named",
}
NOTHING: dict[str, Any] = {"phones": []}
ACCURACY = Measure("accuracy", "correct", "frames", "higher", "accuracy")
METHODS = {
    "any_match": "any feature on has the right name",
    "top_feature": "the strongest named feature",
    "probe": "linear probe",
    "majority": "the most frequent phone",
}


def scores(at: Context) -> tuple[pd.DataFrame, dict[str, Any]]:
    """All rows: id, speaker, split, method, space, labels (true | null), frames, correct; and the JSON."""
    rows = at.inputs.csv(f"scores/{at.target}.phones.csv")
    labels = rows["labels"].replace({"shifted": "null", "shuffled": "null"})
    return rows.assign(labels=labels), at.inputs.json(f"phones/{at.target}.json")


def tabulate(at: Context) -> Tabulated:
    """One row a (method, space)."""
    rows, about = scores(at)
    found, comparisons = [], []
    for (method, space), own in rows.groupby(["method", "space"], sort=False):
        true, null = own[own["labels"] == "true"], own[own["labels"] == "null"]
        row = {"target": at.target, "method": method, "space": space, "split": "test", **counts(true)}
        row |= {"frames": int(true["frames"].sum()), **estimate(true, ACCURACY, at.cfg)}
        if len(null):
            values = estimate(null, ACCURACY, at.cfg)
            row |= {name.replace("accuracy", "null"): value for name, value in values.items()}
        sae = about["saes"].get(space.removeprefix("sae:"))
        if sae and method in ("any_match", "top_feature"):
            row |= {"features": sae["d_sae"], "named": sae["named"]}
        found.append(row)
        if method == "top_feature":
            for rival, other in (("majority", "majority"), ("probe", "raw")):
                b = rows[(rows["method"] == rival) & (rows["space"] == other) & (rows["labels"] == "true")]
                if record := compare(true, b, ACCURACY, at.cfg):
                    what = {"family": f"phones, {space}", "a": method, "b": f"{rival}:{other}", "space": space}
                    comparisons.append(what | record)
    made = table(found, COLUMNS["phones"])
    return Tabulated({"phones": made}, {"phones": records(made)}, comparisons)


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What names of features tell, beside luck; the strongest one against a guess and a probe of raw activations."""
    lines = []
    for row in facts["phones"]:
        if row["method"] != "any_match":
            continue
        sae = row["space"].removeprefix("sae:")
        text = f"{row['named']} of {row['features']} features of {sae} are named after a phone; on "
        text += f"{number(row['accuracy'])} of the frames some feature has the right name."
        detail = f"with labels shifted in time {number(row['null'])}: of many names one is right by luck; {sample(row)}"
        cell = (f"phones, names of {sae}", "any feature on")
        verdict = "positive" if row["accuracy_low"] > row["null_high"] else "undecided"
        estimate = tuple(row[name] - row["null"] for name in ("accuracy", "accuracy_low", "accuracy_high"))
        lines.append(headline("phones", verdict, text, detail, cell, estimate))
    for record in facts["comparisons"]:
        if not str(record.get("family", "")).startswith("phones"):
            continue
        verdict, words = said(record)
        rival = (
            "always saying the most frequent phone"
            if record["b"] == "majority:majority"
            else "a probe of raw activations"
        )
        text = f"Taking the name of the strongest feature of {record['space'].removeprefix('sae:')} {words} {rival}."
        cell = (f"phones, strongest feature of {record['space'].removeprefix('sae:')}", f"against {rival}")
        lines.append(headline("phones", verdict, text, numbers(record, ACCURACY), cell, difference(record)))
    return lines
