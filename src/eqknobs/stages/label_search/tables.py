"""The feature that tells a label best: the table `label_search.csv`."""

from typing import Any

import numpy as np
import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, counts, estimate, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.stats import holm
from eqknobs.evidence.wording import ends, headline, listed, number

STAGE = "label_search"
COLUMNS = {
    "label_search": "target sae property label split clips speakers sae_feature f1_val f1_test p_holm raw_f1 "
    "constant_f1 shuffled_f1 f1_test_low f1_test_high raw_f1_low raw_f1_high shuffled_f1_low shuffled_f1_high p "
    "threshold raw_dimension raw_difference raw_difference_low raw_difference_high",
}
NOTHING: dict[str, Any] = {"label_search": []}
F1 = Measure("f1_test", "twice", "asked", "higher", "F1")
LEVELS = (0.05, 0.005)


def _f1(rows: pd.DataFrame) -> pd.DataFrame:
    """Clips of a search with the numerator and the denominator of F1."""
    return rows.assign(twice=2 * rows["both"], asked=rows["true"] + rows["told"])


def tabulate(at: Context) -> Tabulated:
    """One row a (SAE, label)."""
    rows = _f1(at.inputs.csv(f"scores/{at.target}.label_search.csv"))
    rows["sae"] = rows["sae"].fillna("")
    searches = pd.DataFrame(at.inputs.json(f"label_search/{at.target}.json")["searches"])
    found = []
    if len(searches):
        raw = {(s.property, s.label): s for s in searches[searches["sae"] == ""].itertuples()}
        for search in searches[searches["sae"] != ""].itertuples():
            keys = {"property": search.property, "label": search.label}
            own, other = (rows[(rows[[*keys, "sae"]] == [*keys.values(), sae]).all(axis=1)] for sae in (search.sae, ""))
            share = own["true"].sum() / search.samples
            row = {"target": at.target, "sae": search.sae, **keys, "split": "test", **counts(own)}
            row |= {"sae_feature": search.column, "f1_val": search.f1_val, "threshold": search.threshold}
            row |= estimate(own, F1, at.cfg)
            row |= {"p": search.p, "constant_f1": 2 * share / (1 + share)}
            row |= {"shuffled_f1": np.mean(search.shuffled), "shuffled_f1_low": min(search.shuffled)}
            row |= {"shuffled_f1_high": max(search.shuffled)}
            row |= {name.replace("f1_test", "raw_f1"): value for name, value in estimate(other, F1, at.cfg).items()}
            best = raw[search.property, search.label]
            row["raw_dimension"] = best.column % best.d_in
            if record := compare(own, other, F1, at.cfg):
                names = {"raw_difference": "difference", "raw_difference_low": "low", "raw_difference_high": "high"}
                row |= {name: record[key] for name, key in names.items()}
            found.append(row)
    made = table(found, COLUMNS["label_search"])
    for _, own in made.groupby("sae"):  # a family: all labels that an SAE was searched for
        made.loc[own.index, "p_holm"] = holm(own["p"])
    return Tabulated({"label_search": made}, {"label_search": records(made)})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """For how many labels an SAE has a feature, at two levels, and for how many it is better than a raw dimension."""
    lines = []
    for sae in dict.fromkeys(row["sae"] for row in facts["label_search"]):
        own = [row for row in facts["label_search"] if row["sae"] == sae]
        passed = {level: [row for row in own if row["p_holm"] < level] for level in LEVELS}
        better = [row for row in passed[LEVELS[0]] if (row["raw_difference_low"] or 0) > 0]
        worse = [row for row in own if (row["raw_difference_high"] or 0) < 0]
        useful = [row for row in passed[LEVELS[0]] if row["f1_test"] > row["constant_f1"]]
        text = f"Of {len(own)} labels, {len(passed[LEVELS[0]])} have a feature of {sae} that tells them on test better "
        text += f"than chance (Holm {LEVELS[0]:g}; {len(passed[LEVELS[1]])} at {LEVELS[1]:g}), {len(useful)} of them "
        text += "better than always saying yes."
        text += f" It does better than the best raw dimension for {len(better)}, worse for {len(worse)}."
        strongest = sorted(passed[LEVELS[0]], key=lambda row: -row["f1_test"])[:3]
        named = [f"{row['property']} {row['label']} {number(row['f1_test'])} {_ends(row)}" for row in strongest]
        detail = f"F1 of the best: {listed(named)}" if named else "no label passes"
        verdict = "positive" if better and not worse else "negative" if worse and not better else "undecided"
        lines.append(headline("label_search", verdict, text, detail))
    return lines


def _ends(row: dict[str, Any]) -> str:
    return ends(row["f1_test_low"], row["f1_test_high"])
