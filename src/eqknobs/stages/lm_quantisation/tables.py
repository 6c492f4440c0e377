"""What a speech LM in mixed precision says: the tables `lm_quantisation.csv` and `lm_quantisable.csv`.

In place of a target stands the model. Intervals and comparisons resample prompts (of nats and cosine: clips), then
draws; differences are paired: the same prompts and draws, intact and packed.
"""

from typing import Any

import numpy as np
import pandas as pd

from eqknobs.evidence.estimates import Measure, groups, records, table
from eqknobs.evidence.spoken import (
    DELTAS,
    DNSMOS,
    MARGIN,
    NATS,
    NLL_INTACT,
    SILENT_SHARE,
    SIMILARITY_INTACT,
    SIMILARITY_PROMPT,
    WORDS,
    bounds_of,
    counted_prompts,
    measurable,
    paired,
    screened,
    versus,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, listed, number, said

STAGE = "lm_quantisation"
CONDITION = ["part", "plan", "budget", "seed"]
SIZES = ["bits_mean", "bytes", "bytes_resident"]
COSINE = Measure("cosine", "cosine", None, "higher", "cosine of the last layer")
SCREENED = (*NATS, COSINE)
MEASURES = (
    *WORDS,
    NLL_INTACT,
    SILENT_SHARE,
    SIMILARITY_PROMPT,
    SIMILARITY_INTACT,
    DNSMOS,
)
COLUMNS = {
    "lm_quantisation": " ".join(
        [
            "model split part plan seed budget bits_mean bytes bytes_resident answers prompts speakers clips",
            *(m.name for m in (*MEASURES, *SCREENED)),
            *DELTAS,
            *bounds_of((*MEASURES, *SCREENED)),
        ]
    ),
    "lm_quantisable": "model split part plan measure bits_mean bytes bound tested answers prompts speakers",
}
NOTHING: dict[str, Any] = {}
PLANS = {
    "intact": "intact",
    "nf4": "NF4",
    "uniform": "uniform",
    "layer": "by layers' probes",
    "head": "by heads' probes",
    "sensitivity": "by each tensor's damage",
    "block": "by each block's drift",
    "inverted": "layers' probes turned round",
    "head_inverted": "heads' probes turned round",
    "random": "random",
}
PARTS = {"temporal": "temporal transformer", "whole": "whole model"}
CLAIMED = ("layer", "head", "block", "sensitivity")
TURNED = {"layer": "inverted", "head": "head_inverted"}  # a plan -> its inverse


def quantisation_table(at: Context, nats: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """One row a plan, the intact model first; answers are counted, and measures given, of those that speak."""
    measures = (SCREENED, MEASURES)
    found = screened(nats, answers, CONDITION, [*SIZES, "model", "split"], measures, at.cfg)
    return table(found, COLUMNS["lm_quantisation"])


def smallest(bounds: dict[float, float]) -> tuple[float, float]:
    """(budget, bound): the smallest budget down to which the bound of every one that spoke stays within `MARGIN`; NaN
    and the largest budget's bound where that is already beyond it."""
    found = (float("nan"), bounds[max(bounds)])
    for budget in sorted(bounds, reverse=True):
        if not bounds[budget] <= MARGIN:
            break
        found = (budget, bounds[budget])
    return found


def quantisable_table(at: Context, sizes: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """How small each plan can be: one row a part, plan and measure; random plans are pooled, with their mean size. No
    row of a measure by which the intact model itself is above `tables.unmeasurable_wer`."""
    intact, packed = answers[answers["plan"] == "intact"], answers[answers["plan"] != "intact"]
    mean, found = sizes.groupby(["part", "plan", "budget"])[["bits_mean", "bytes"]].mean(), []
    for measure in measurable(intact, at.cfg):
        for key, rows in groups(packed, ["model", "split", "part", "plan"]):
            tried = {budget: paired(intact, mine, measure, at.cfg) for budget, mine in rows.groupby("budget")}
            bounds = {float(budget): record["high"] for budget, record in tried.items() if record}
            if not bounds:
                continue
            budget, bound = smallest(bounds)
            row = {**key, "measure": measure.name, "bound": bound, "tested": len(bounds), "answers": len(rows)}
            row |= {"prompts": rows["id"].nunique(), "speakers": rows["speaker"].nunique()}
            if np.isfinite(budget):
                row |= mean.loc[(key["part"], key["plan"], budget)].to_dict()
            found.append(row)
    return table(found, COLUMNS["lm_quantisable"])


def compared(at: Context, nats: pd.DataFrame, answers: pd.DataFrame) -> list[dict[str, Any]]:
    """At each budget the guided plans against uniform, random (all draws pooled) and their inverse, at equal bytes.

    Where a plan speaks with more draws than its rival, the common ones count.
    """
    found = []
    for rows, measures in ((answers, WORDS), (nats.assign(draw=0), (COSINE,))):
        for (part, budget), mine in rows[rows["plan"].isin(CLAIMED)].groupby(["part", "budget"]):
            same = rows[(rows["part"] == part) & (rows["budget"] == budget)]
            for plan in [name for name in CLAIMED if name in set(mine["plan"])]:
                for rival in ("uniform", "random", *([TURNED[plan]] if plan in TURNED else [])):
                    sides = [same[same["plan"] == name] for name in (plan, rival)]
                    about = {"family": STAGE, "a": plan, "b": rival, "part": part, "budget": float(budget)}
                    found += versus(sides[0], sides[1], measures, at.cfg, about)
    return found


def tabulate(at: Context) -> Tabulated:
    """The stage's tables, and what its findings rest on."""
    nats = at.inputs.csv(f"scores/{at.target}.lm_quantised_nats.csv")
    answers = at.inputs.csv(f"scores/{at.target}.lm_quantised_answers.csv")
    rows = quantisation_table(at, nats, answers)
    small = quantisable_table(at, rows, answers)
    whole = rows[rows["plan"] == "intact"].iloc[0]
    facts = {
        "quantisable": records(small),
        "bytes": int(whole["bytes"]),
        "rows": records(rows[["part", "plan", *SIZES]]),
    }
    return Tabulated(
        {"lm_quantisation": rows, "lm_quantisable": small}, {"lm_quantisation": facts}, compared(at, nats, answers)
    )


def megabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """How small each plan can be; whether guidance beats uniform, random and inverted at equal bytes."""
    own, lines = facts["lm_quantisation"], []
    for measure in WORDS:
        lines += _how_small(own, measure)
    names = {m.name: m for m in (*WORDS, COSINE)}
    for record in facts["comparisons"]:
        if not record["family"].startswith("lm_quantisation,"):
            continue
        measure, (verdict, words) = names[record["measure"]], said(record)
        rival = f"the {PLANS[record['b']]} plan{'s' if record['b'] == 'random' else ''}"
        text = f"At the bytes of {record['budget']:g} bits ({PARTS[record['part']]}) the plan {PLANS[record['a']]} "
        text += f"{words} {rival}, in {measure.said}."
        cell = (f"{PLANS[record['a']]} against {PLANS[record['b']]}, {PARTS[record['part']]}",)
        unit = "clips" if measure is COSINE else "prompts"
        column = f"{measure.said}, {record['budget']:g} bits"
        lines.append(
            headline(STAGE, verdict, text, counted_prompts(record, measure, unit), (*cell, column), difference(record))
        )
    return lines


def _how_small(own: dict[str, Any], measure: Measure) -> list[dict[str, Any]]:
    """One sentence on every plan that spoke."""
    rows = [row for row in own["quantisable"] if row["measure"] == measure.name]
    if not rows:
        return []
    text = f"Smallest of {megabytes(own['bytes'])} before {measure.said} may be {MARGIN:.2f} worse (upper 95 % bound): "
    small = [row for row in rows if row["bytes"] is not None]
    text += (
        listed(
            f"{PLANS[row['plan']]} ({PARTS[row['part']]}) {megabytes(row['bytes'])}"
            for row in sorted(small, key=lambda row: row["bytes"])
        )
        if small
        else "none that spoke"
    )
    few = [f"{PLANS[row['plan']]} ({PARTS[row['part']]})" for row in rows if row["bytes"] is None]
    detail = f"not even the largest that spoke: {listed(few)}; " if few and small else ""
    detail += f"{min(row['prompts'] for row in rows)} prompts; bound of the smallest "
    detail += number(min(small, key=lambda row: row["bytes"])["bound"], True) if small else "beyond the margin"
    return [headline(STAGE, "measured", text + ".", detail)]
