"""What removing latent dimensions costs (`importance_ablation.csv`), and how far each map agrees with removing one
dimension at a time (`importance_maps.csv`)."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from eqknobs.errors import counted
from eqknobs.evidence import stats
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import (
    MEL_DISTANCE,
    SPEAKER_SIMILARITY,
    WER,
    Measure,
    counts,
    estimate,
    groups,
    records,
    table,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, ends, headline, listed, number, numbers, said, sample
from eqknobs.evidence.words import mark_words, words_rule

STAGE = "importance"
COLUMNS = {
    "importance_ablation": "target map mode removed seed clips mel_distance latent_error wer speaker_similarity "
    "removed_dims split speakers mel_distance_low mel_distance_high latent_error_low latent_error_high "
    "wer_low wer_high speaker_similarity_low speaker_similarity_high",
    "importance_maps": "target map spearman_oracle spearman_oracle_low spearman_oracle_high val_mel_distance "
    "val_mel_distance_low val_mel_distance_high chosen clips speakers split oracle_clips oracle_speakers",
}
NOTHING: dict[str, Any] = {"importance": None, "importance_maps": []}
LATENT_ERROR = Measure("latent_error", "latent_sq_error", "latent_sq_total", "lower", "latent error")
MEASURES = (MEL_DISTANCE, LATENT_ERROR, WER, SPEAKER_SIMILARITY)
VAL_MEL_DISTANCE = Measure("val_mel_distance", "mel_distance", None, "lower", "mel distance on val")
VERSION_1 = (0.3, 0.7)  # its thresholds
ORACLE = "ablation"
# What each map needs beyond the latents: nothing, a probe, an SAE and a probe, a backward pass a clip. The oracle needs
# a decode a clip and dimension.
CHEAPEST_FIRST = tuple(
    "variance raw_probe raw_probe_scaled composition composition_raw composition_scaled gradient fisher".split()
)
RIVALS = ("raw_probe", "variance", "inverted", "random")  # of the composition map
GOOD_ENOUGH = 0.1  # dB of mel distance above the oracle's
MAPS = {
    "composition": "SAE × probe map",
    "raw_probe": "raw-probe map",
    "variance": "variance map",
    "inverted": "inverted map",
    "composition_raw": "SAE × probe map in raw units",
    "composition_scaled": "scaled SAE × probe map",
    "raw_probe_scaled": "scaled raw-probe map",
    "gradient": "gradient map",
    "fisher": "Fisher map",
    "ablation": "one-at-a-time map",
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


def rank_correlation(values: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's ρ of one order [width] with others [n, width]; nan where one of them is constant."""
    a, b = (rankdata(found, axis=-1) for found in (values, others))
    a, b = a - a.mean(), b - b.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return b @ a / np.sqrt(np.square(a).sum() * np.square(b).sum(-1))


def _agreement(at: Context, maps: dict[str, NDArray[Any]], oracle: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """Map -> (ρ with the oracle, low, high): 95 % interval over clips of the oracle. Of `random` the mean and the band
    that 95 % of random orders keep to."""
    if oracle.empty:
        return {}
    effects = oracle.pivot(index=["id", "speaker"], columns="dimension", values="mel_change").sort_index()
    draws, seed = at.cfg["bootstrap"], at.cfg["seed"]
    weights = stats.bootstrap_weights(effects.index.get_level_values("speaker").tolist(), draws, seed)
    mean, drawn = effects.to_numpy().mean(0), weights @ effects.to_numpy()
    found: dict[str, tuple[float, ...]] = {
        name: (rank_correlation(values, mean[None]).item(), *stats.interval(rank_correlation(values, drawn)))
        for name, values in maps.items()
    }
    random = np.random.default_rng([seed, 15]).permuted(np.tile(mean, (draws, 1)), axis=1)
    null = rank_correlation(mean, random)
    return found | {"random": (float(null.mean()), *stats.interval(null))}


def maps_table(at: Context, importance: dict[str, Any], oracle: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """One row a map, and of random sets and of nothing removed.

    importance: a target's `importance.json`. oracle, val: the raw rows of `eqknobs.stages.importance.maps`.
    """
    maps = {str(name): np.asarray(values) for name, values in importance["maps"].items()}
    agreement = _agreement(at, maps, oracle)
    heard = {f"oracle_{name}": count for name, count in counts(oracle).items()}
    found = []
    for key, rows in groups(val, ["map", "split"]):
        rho = agreement.get(key["map"], (np.nan,) * 3)
        clips = rows.groupby(["id", "speaker"], as_index=False)["mel_distance"].mean()
        row: dict[str, Any] = dict(zip(("spearman_oracle", "spearman_oracle_low", "spearman_oracle_high"), rho))
        row |= {"target": at.target, **key, "chosen": int(key["map"] == importance["chosen"]), **counts(clips), **heard}
        found.append(row | estimate(clips, VAL_MEL_DISTANCE, at.cfg))
    return table(found, COLUMNS["importance_maps"])


def good_enough(rows: list[dict[str, Any]]) -> str | None:
    """The cheapest map whose mel distance on val is at most GOOD_ENOUGH above the oracle's; rows: of `maps_table`."""
    score = {row["map"]: row["val_mel_distance"] for row in rows}
    if ORACLE not in score:
        return None
    fair = (name for name in CHEAPEST_FIRST if name in score and score[name] <= score[ORACLE] + GOOD_ENOUGH)
    return next(fair, None)


def _maps_compared(
    at: Context, rows: pd.DataFrame, maps: list[dict[str, Any]], measurable: bool
) -> list[dict[str, Any]]:
    """What each other map removes first against random sets of the same size, and the cheapest good one against the
    oracle; by mean ablation, at the sizes listened to."""
    rows = rows[rows["mode"] == "mean"]
    heard = rows.loc[(rows["map"] == "composition") & rows["speaker_similarity"].notna(), "removed_dims"].unique()
    pairs = [(row["map"], "random") for row in maps if row["map"] not in ("composition", "random", "none")]
    if cheap := good_enough(maps):
        pairs.append((cheap, ORACLE))
    found = []
    for count in sorted(heard):
        at_count = rows[rows["removed_dims"] == count]
        for a, b in pairs:
            for measure in (MEL_DISTANCE, SPEAKER_SIMILARITY, *([WER] if measurable else [])):
                if record := compare(at_count[at_count["map"] == a], at_count[at_count["map"] == b], measure, at.cfg):
                    family = f"importance maps, {measure.name}, mean, {count} removed"
                    what = {"property": None, "binning": None, "a": a, "b": b}
                    found.append({"family": family, "mode": "mean", "removed_dims": int(count), **what, **record})
    return found


def _compared(at: Context, rows: pd.DataFrame, measurable: bool) -> list[dict[str, Any]]:
    """What the composition map removes first against every rival set of the same size, at the sizes listened to: the
    map's own count of expendable dimensions (where it has any) and the shares `word_removed`."""
    chosen = rows["map"] == "composition"
    heard = rows.loc[chosen & rows["speaker_similarity"].notna(), "removed_dims"].unique()
    rivals = rows[rows["removed_dims"].isin(heard) & rows["map"].isin(RIVALS)]
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
    """Tables, counts of the map and comparisons of one target."""
    words, scores = words_rule(at), at.inputs.scores(at.target, "importance")
    importance = at.inputs.json(f"importance/{at.target}.json")
    raw = (at.inputs.csv(f"scores/{at.target}.importance_maps.{part}.csv") for part in ("oracle", "val"))
    maps = maps_table(at, importance, *raw)
    compared = _compared(at, scores, words["measurable"])
    return Tabulated(
        {"importance_ablation": importance_table(at, scores, words["measurable"]), "importance_maps": maps},
        {
            "words": words,
            "importance": {**importance["counts"], "width": sum(importance["counts"].values())},
            "importance_maps": records(maps),
        },
        compared + _maps_compared(at, scores, records(maps), words["measurable"]),
    )


def thresholds(importance: dict[str, Any]) -> str:
    """In words, from a target's `importance.json`."""
    found = tuple(importance["thresholds"][name] for name in ("expendable", "critical"))
    low, high = (f"{value:g}".lstrip("0") for value in found)
    same = ", as in version 1" if found == VERSION_1 else ""
    return f"thresholds {low} and {high} of the maximum{same}"


def _maps_measured(at: Context, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which map val chooses, how each stands to the oracle, and which maps there are not."""
    by_map = {row["map"]: row for row in rows}
    lines = []
    if chosen := next((row for row in rows if row["chosen"]), None):
        text = f"Val chooses the {MAPS[chosen['map']]}: with its lowest dimensions removed, mel distance there is "
        text += f"{number(chosen['val_mel_distance'])} dB (nothing removed {number(by_map['none']['val_mel_distance'])}"
        text += f", random sets {number(by_map['random']['val_mel_distance'])})." if "random" in by_map else ")."
        shown = ((row["map"], row["val_mel_distance"]) for row in rows if row["map"] not in ("none", "random"))
        ranked = sorted(shown, key=lambda pair: pair[1])
        near = sum(value - chosen["val_mel_distance"] <= GOOD_ENOUGH for name, value in ranked if name != chosen["map"])
        text += f" {near} of the {len(ranked) - 1} other maps are within {GOOD_ENOUGH:g} dB of it."
        detail = "; ".join(f"{MAPS[name]} {number(value)}" for name, value in ranked)
        lines.append(headline("importance", "measured", text, f"{detail}; {sample(chosen)}"))
    known = [row for row in rows if row["map"] in CHEAPEST_FIRST and row["spearman_oracle"] is not None]
    if known and "random" in by_map:
        said_of = (f"{MAPS[row['map']]} {number(row['spearman_oracle'], True)}" for row in known)
        text = f"Rank correlation with the sound that each dimension alone takes away: {listed(said_of)}."
        null = by_map["random"]
        detail = f"95 % of random orders: {ends(null['spearman_oracle_low'], null['spearman_oracle_high'], True)}; "
        detail += f"{counted(null['oracle_clips'], 'clip')}, {counted(null['oracle_speakers'], 'speaker')} of val"
        lines.append(headline("importance", "measured", text, detail))
    absent = at.inputs.json(f"importance/{at.target}.json")["absent"]
    for why in sorted(set(absent.values())):
        names = listed(MAPS[name] for name in sorted(absent) if absent[name] == why)
        lines.append(headline("importance", "measured", f"There is no {names} here: {why}."))
    return lines


def _maps_found(record: dict[str, Any], claimed: set[str]) -> dict[str, Any] | None:
    """The headline of a comparison between maps, in mel distance; of those with random sets the maps `claimed` to be
    of use."""
    measure = MEL_DISTANCE
    count, name = counted(record["removed_dims"], "dimension"), MAPS[record["a"]]
    if record["measure"] != measure.name:
        return None
    if record["b"] == ORACLE:
        text = (
            f"The {name} is the cheapest that is good enough: on val at most {GOOD_ENOUGH:g} dB of mel distance above "
        )
        text += f"the {MAPS[ORACLE]}. On test, with {count} removed, the difference is "
        text += f"{number(record['difference'], True)} dB."
        return headline("importance", "measured", text, numbers(record, measure))
    if record["a"] not in claimed:
        return None
    verdict, words = said(record)
    text = f"Removing the {count} that the {name} ranks lowest {words} removing as many at random, in {measure.said}."
    cell = (f"lowest {record['removed_dims']} by the {name} removed, against as many at random", measure.said)
    return headline("importance", verdict, text, numbers(record, measure), cell, difference(record))


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """How many dimensions the map calls expendable, and whether removing them costs less than removing others; then
    which map val chooses, which cheap one is good enough, and the same of these two."""
    found, names = facts["importance"], {measure.name: measure for measure in MEASURES}
    text = f"The map calls {found['expendable']} of {found['width']} latent dimensions expendable, "
    text += f"{found['moderate']} moderate and {found['critical']} critical."
    detail = thresholds(at.inputs.json(f"importance/{at.target}.json"))
    lines = [headline("importance", "measured", text, detail)]
    maps, others = facts["importance_maps"], []
    claimed = {*(row["map"] for row in maps if row["chosen"]), good_enough(maps) or ""}
    for record in facts["comparisons"]:
        if record["family"].startswith("importance maps,"):
            others.append(_maps_found(record, claimed))
            continue
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
    lines += _maps_measured(at, maps)
    return [*lines, *(line for line in others if line is not None)]
