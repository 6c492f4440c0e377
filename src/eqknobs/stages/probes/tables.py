"""What linear probes read in each space: the table `probes.csv`."""

import math
from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, counts, divide, estimate, groups, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import (
    PROPERTIES,
    difference,
    ends,
    estimated,
    headline,
    label,
    number,
    numbers,
    said,
    sample,
)

STAGE = "probes"
COLUMNS = {
    "probes": "target space property binning split frames utterances speakers accuracy accuracy_low accuracy_high "
    "balanced_accuracy within_one_bin ridge_r2 majority shuffled within_one_bin_low within_one_bin_high",
}
NOTHING: dict[str, Any] = {"probes": []}
ACCURACY = Measure("accuracy", "correct", "frames", "higher", "accuracy")
WITHIN_ONE_BIN = Measure("within_one_bin", "within_one", "frames", "higher")
SPACES = {
    "raw": "raw latents",
    "pca_l0": "PCA at L0",
    "pca_d": "PCA at d",
    "random_topk": "random projection + TopK",
    "logmel": "log-mel",
    "sae": "SAE",
}
RIVALS = ("raw", "random_topk")  # what an SAE's probe is compared with


def _per_clip(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby(["id", "speaker"], as_index=False)[["frames", "correct", "within_one"]].sum(min_count=1)


def _share(rows: pd.DataFrame) -> float:
    return float(divide(rows["correct"].sum(), rows["frames"].sum()))


def _row(
    at: Context, key: dict[str, Any], rows: pd.DataFrame, majority: pd.DataFrame, ridge: pd.DataFrame
) -> dict[str, Any]:
    """One row of the table. rows, majority, ridge: the raw scores of one property, the first of one key."""
    true, shuffled = (rows[rows["labels"] == kind] for kind in ("true", "shuffled"))
    clips = _per_clip(true)
    counted = counts(clips)
    same = (majority["binning"] == key["binning"]) & (majority["split"] == key["split"])
    if (majority["space"] == key["space"]).any():
        same &= majority["space"] == key["space"]
    by_class = true.groupby("class")[["correct", "frames"]].sum()
    line = ridge[(ridge["space"] == key["space"]) & (ridge["split"] == key["split"])]
    spread = line["sum_yy"].sum() - line["sum_y"].sum() ** 2 / max(line["frames"].sum(), 1)
    return {
        "target": at.target,
        **key,
        "frames": int(clips["frames"].sum()),
        "utterances": counted["clips"],
        "speakers": counted["speakers"],
        **estimate(clips, ACCURACY, at.cfg),
        **estimate(clips, WITHIN_ONE_BIN, at.cfg),
        "balanced_accuracy": float((by_class["correct"] / by_class["frames"]).mean()),
        "ridge_r2": float(1 - line["sse"].sum() / spread) if spread > 0 else math.nan,
        "majority": _share(majority[same]),
        "shuffled": _share(shuffled),
    }


def _compared(at: Context, name: str, scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Accuracy of each SAE's probe of one property on test against those on its rivals."""
    found = []
    scores = scores[(scores["labels"] == "true") & (scores["split"] == "test")]
    for (binning, space), rows in scores.groupby(["binning", "space"]):
        for other in RIVALS if space.startswith("sae:") else ():
            rival = scores[(scores["binning"] == binning) & (scores["space"] == other)]
            if record := compare(_per_clip(rows), _per_clip(rival), ACCURACY, at.cfg):
                what = {"property": name, "binning": binning, "a": space, "b": other}
                found.append({"family": f"probe, {binning}, minus {other}", **what, **record})
    return found


def _read(at: Context, kind: str, name: str) -> pd.DataFrame:
    """Raw scores (kind `probes` or `ridge`) of one property on all spaces, the SAEs' before `logmel`."""
    base = at.inputs.csv(f"scores/{at.target}.{kind}.{name}.csv")
    last = base["space"] == "logmel"
    saes = at.own.get("saes", {}).get(at.target, [])
    codes = [at.inputs.csv(f"scores/{at.target}.{kind}.{sae}.{name}.csv") for sae in saes]
    return pd.concat([base[~last], *codes, base[last]], ignore_index=True)


def tabulate(at: Context) -> Tabulated:
    """One row a (space, property, binning, split)."""
    found, comparisons = [], []
    for name in sorted(at.own["properties"]):
        scores, ridge = (_read(at, kind, name) for kind in ("probes", "ridge"))
        majority = scores[scores["labels"] == "majority"]
        for key, rows in groups(scores[scores["labels"] != "majority"], ["space", "binning", "split"]):
            found.append({**_row(at, key, rows, majority, ridge), "property": name})
        comparisons += _compared(at, name, scores)
    rows = table(found, COLUMNS["probes"])
    shown = (rows["split"] == "test") & rows["binning"].isin(["quantile", "category"])
    return Tabulated({"probes": rows}, {"probes": records(rows[shown])}, comparisons)


def _nulls(row: dict[str, Any]) -> str:
    return f"majority {number(row['majority'])}, shuffled labels {number(row['shuffled'])}"


def _classes(row: dict[str, Any]) -> str:
    return "categories" if row["binning"] == "category" else "quantile bins"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the SAEs' probes read more than their rivals; without SAEs, what the latents' own probes read."""
    if not facts.get("sae"):
        return _readable(facts)
    lines = []
    for record in facts["comparisons"]:
        if record["family"] not in [
            f"probe, {kind}, minus {other}" for kind in ("quantile", "category") for other in RIVALS
        ]:
            continue
        null = next(r for r in facts["probes"] if (r["space"], r["property"]) == (record["a"], record["property"]))
        verdict, words = said(record)
        name = PROPERTIES.get(record["property"], record["property"])
        text = f"{name}: the probe on {label(record['a'], SPACES)} {words} the one on {label(record['b'], SPACES)}."
        detail = f"{numbers(record, ACCURACY)}; {_nulls(null)}; {_classes(null)}"
        cell = (f"{label(record['a'], SPACES)} over {label(record['b'], SPACES)}", f"{name}, accuracy")
        lines.append(headline("probe", verdict, text, detail, cell, difference(record)))
    return lines


def _readable(facts: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    spaces = {(row["space"], row["property"]): row for row in facts["probes"]}
    for (space, name), row in spaces.items():
        if space != "raw":
            continue
        text = f"{PROPERTIES.get(name, name)}: the probe on {label(space, SPACES)} names the right class in "
        text += f"{number(row['accuracy'])} {ends(row['accuracy_low'], row['accuracy_high'])} of the frames"
        if rival := spaces.get(("logmel", name)):
            text += f"; the one on {label('logmel', SPACES)} in {number(rival['accuracy'])}"
        detail = f"{_nulls(row)}; {sample(row)}; {_classes(row)}"
        cell = (label(space, SPACES), f"{PROPERTIES.get(name, name)}, accuracy")
        lines.append(headline("probe", "measured", f"{text}.", detail, cell, estimated(row, "accuracy")))
    return lines
