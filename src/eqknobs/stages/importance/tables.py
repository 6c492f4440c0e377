"""What removing latent dimensions costs: the table `importance_ablation.csv`."""

from typing import Any

import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import (
    MEL_DISTANCE,
    SPEAKER_SIMILARITY,
    WER,
    Measure,
    counts,
    estimate,
    groups,
    table,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, numbers, said
from eqknobs.evidence.words import mark_words, words_rule

STAGE = "importance"
COLUMNS = {
    "importance_ablation": "target map mode removed seed clips mel_distance latent_error wer speaker_similarity "
    "removed_dims split speakers mel_distance_low mel_distance_high latent_error_low latent_error_high "
    "wer_low wer_high speaker_similarity_low speaker_similarity_high",
}
NOTHING: dict[str, Any] = {"importance": None}
LATENT_ERROR = Measure("latent_error", "latent_sq_error", "latent_sq_total", "lower", "latent error")
MEASURES = (MEL_DISTANCE, LATENT_ERROR, WER, SPEAKER_SIMILARITY)
VERSION_1 = (0.3, 0.7)  # its thresholds
MAPS = {
    "composition": "SAE × probe map",
    "raw_probe": "raw-probe map",
    "variance": "variance map",
    "inverted": "inverted map",
    "random": "random sets",
    "keep_critical": "keep only critical",
    "none": "nothing removed",
}


def importance_table(at: Context, scores: pd.DataFrame, measurable: bool) -> pd.DataFrame:
    """One row a (map, mode, share removed, seed)."""
    found = []
    for key, clips in groups(scores, ["map", "mode", "removed", "removed_dims", "seed", "split"]):
        row = {"target": at.target, **key, **counts(clips)}
        for measure in MEASURES:
            row |= estimate(clips, measure, at.cfg)
        found.append(row)
    return mark_words(table(found, COLUMNS["importance_ablation"]), measurable)


def _compared(at: Context, rows: pd.DataFrame, measurable: bool) -> list[dict[str, Any]]:
    """What the composition map removes first against every rival set of the same size, at the sizes listened to: the
    map's own count of expendable dimensions (where it has any) and the shares `word_removed`."""
    chosen = rows["map"] == "composition"
    heard = rows.loc[chosen & rows["speaker_similarity"].notna(), "removed_dims"].unique()
    rivals = rows[rows["removed_dims"].isin(heard) & ~rows["map"].isin(["composition", "keep_critical", "none"])]
    found = []
    for (count, mode, rival), clips in rivals.groupby(["removed_dims", "mode", "map"]):
        claimed = rows[chosen & (rows["mode"] == mode) & (rows["removed_dims"] == count)]
        for measure in MEASURES if len(claimed) else ():
            if measure is WER and not measurable:
                continue
            if record := compare(claimed, clips, measure, at.cfg):
                family = f"importance, {measure.name}, {mode}, {count} removed"
                what = {"property": "centroid", "binning": None, "a": "composition", "b": rival}
                found.append({"family": family, "mode": mode, "removed_dims": int(count), **what, **record})
    return found


def tabulate(at: Context) -> Tabulated:
    """Table, counts of the map and comparisons of one target."""
    words, scores = words_rule(at), at.inputs.scores(at.target, "importance")
    found = at.inputs.json(f"importance/{at.target}.json")["counts"]
    return Tabulated(
        {"importance_ablation": importance_table(at, scores, words["measurable"])},
        {"words": words, "importance": {**found, "width": sum(found.values())}},
        _compared(at, scores, words["measurable"]),
    )


def thresholds(importance: dict[str, Any]) -> str:
    """In words, from a target's `importance.json`."""
    found = tuple(importance["thresholds"][name] for name in ("expendable", "critical"))
    low, high = (f"{value:g}".lstrip("0") for value in found)
    same = ", as in version 1" if found == VERSION_1 else ""
    return f"thresholds {low} and {high} of the maximum{same}"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """How many dimensions the map calls expendable, and whether removing them costs less than removing others."""
    found, names = facts["importance"], {measure.name: measure for measure in MEASURES}
    text = f"The map calls {found['expendable']} of {found['width']} latent dimensions expendable, "
    text += f"{found['moderate']} moderate and {found['critical']} critical."
    detail = thresholds(at.inputs.json(f"importance/{at.target}.json"))
    lines = [headline("importance", "measured", text, detail)]
    for record in facts["comparisons"]:
        if record.get("mode") != "mean" or record["b"] not in ("random", "raw_probe"):
            continue
        if record["measure"] == LATENT_ERROR.name:
            continue
        verdict, words = said(record)
        measure = names[record["measure"]]
        rival = "at random" if record["b"] == "random" else "by the raw-probe map"
        text = f"Removing the {counted(record['removed_dims'], 'dimension')} the map ranks lowest {words} removing as "
        text += f"many {rival}, in {measure.said}."
        cell = (f"lowest {record['removed_dims']} removed, against as many {rival}", measure.said)
        lines.append(headline("importance", verdict, text, numbers(record, measure), cell, difference(record)))
    return lines
