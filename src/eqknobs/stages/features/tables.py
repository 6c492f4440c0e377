"""What single features hear: the table `features.csv`."""

from typing import Any

import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, counts, estimate, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import headline, number

STAGE = "features"
COLUMNS = {
    "features": "target sae feature why split clips speakers frames rate max top_clips onset_share offset_share "
    "onset_random onset_matched onset_share_low onset_share_high onset_random_low onset_random_high onset_matched_low "
    "onset_matched_high onset_difference onset_difference_low onset_difference_high label label_f1 phone twin "
    "twin_overlap",
}
NOTHING: dict[str, Any] = {"features": []}
ONSET = Measure("onset_share", "right", "frames", "higher", "share of energy after the frame")
NAMES = {"feature": "onset_share", "random": "onset_random", "matched": "onset_matched"}


def _said(record: dict[str, Any]) -> dict[str, Any]:
    """What other stages call a feature."""
    said: dict[str, Any] = {name: record[name] for name in ("phone", "twin", "twin_overlap")}
    if record["labels"]:
        best = record["labels"][0]
        said |= {"label": f"{best['property']}: {best['label']}", "label_f1": best["f1"]}
    return said


def _row(at: Context, sae: str, record: dict[str, Any], rows: pd.DataFrame) -> dict[str, Any]:
    """A feature's row; rows: its windows, clip by clip."""
    own = {kind: rows[rows["kind"] == kind] for kind in NAMES}
    row = {"target": at.target, "sae": sae, **{name: record[name] for name in ("feature", "why", "rate", "max")}}
    row |= {"frames": int(own["feature"]["frames"].sum()), **counts(own["feature"])}
    row["top_clips"] = " ".join(clip["id"] for clip in record["clips"])
    for kind, name in NAMES.items():
        if len(own[kind]):
            found = estimate(own[kind], ONSET, at.cfg)
            row |= {key.replace("onset_share", name): value for key, value in found.items()}
    if "onset_share" in row:
        row["offset_share"] = 1 - row["onset_share"]
    if len(own["feature"]) and (paired := compare(own["feature"], own["matched"], ONSET, at.cfg)):
        keys = {"onset_difference": "difference", "onset_difference_low": "low", "onset_difference_high": "high"}
        row |= {name: paired[key] for name, key in keys.items()}
    return row | _said(record)


def tabulate(at: Context) -> Tabulated:
    """One row a (SAE, feature with a page)."""
    rows = at.inputs.csv(f"scores/{at.target}.features.csv")
    about = at.inputs.json(f"features/{at.target}.json")
    splits = "+".join(split for split in ("train", "val", "test") if split in about["splits"])
    found = [
        _row(at, sae, record, rows[(rows["sae"] == sae) & (rows["feature"] == record["feature"])]) | {"split": splits}
        for sae, one in sorted(about["saes"].items())
        for record in one["features"]
    ]
    made = table(found, COLUMNS["features"])
    return Tabulated({"features": made}, {"features": records(made)})


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the features drawn at random, how many mark an onset or an offset; and how many have a twin."""
    lines = []
    for sae in dict.fromkeys(row["sae"] for row in facts["features"]):
        drawn = [row for row in facts["features"] if row["sae"] == sae and row["why"] == "random"]
        judged = [row for row in drawn if row["onset_difference_low"] is not None]
        onset = sum(row["onset_difference_low"] > 0 for row in judged)
        offset = sum(row["onset_difference_high"] < 0 for row in judged)
        text = (
            f"Of {len(judged)} features of {sae} drawn at random, {onset} fire where sound begins and {offset} where "
        )
        text += "it ends, against frames of the same level."
        detail = "share of a window's energy after the frame; intervals of single features, 95 %, not corrected"
        if twins := [row["twin_overlap"] for row in drawn if row["twin_overlap"] is not None]:
            detail += f"; mean overlap with the best match in the other seed {number(sum(twins) / len(twins))}"
        lines.append(headline("features", "measured", text, detail))
    return lines
