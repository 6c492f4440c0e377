"""What is read linearly from a speech LM: the tables `lm_layers.csv`, `lm_heads.csv`, `lm_stability.csv`,
`lm_saes.csv` and `lm_features.csv`.

In place of a target stands the model; layers count from 0.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from eqknobs.evidence import stats
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, counts, divide, estimate, groups, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import (
    PROPERTIES,
    difference,
    ends,
    estimated,
    headline,
    number,
    numbers,
    said,
    sample,
)
from eqknobs.stages.lm_layers.ranking import KEYS, accuracies, heads_in, rank_heads

STAGE = "lm_layers"
COLUMNS = {
    "lm_layers": "model stream layer property lag split clips speakers frames accuracy accuracy_low accuracy_high "
    "majority shuffled logmel embeddings random_network",
    "lm_heads": "model stream layer head property lag split clips speakers accuracy accuracy_low accuracy_high "
    "selectivity half_a half_b majority shuffled",
    "lm_stability": "model stream property split heads clips speakers spearman spearman_low spearman_high",
    "lm_saes": "model layer space stream split clips speakers accuracy accuracy_low accuracy_high features "
    "low_share low_share_low low_share_high high_share high_share_low high_share_high low_shuffled high_shuffled "
    "user_tagged agent_tagged text_tagged mixed",
    "lm_features": "model layer feature tag fired user_share agent_share text_share user_class agent_class classes "
    "clips speakers",
}
NOTHING: dict[str, Any] = {}
ACCURACY = Measure("accuracy", "correct", "frames", "higher", "accuracy")
STREAMS = {"user": "heard from the user", "agent": "said by the agent", "both": "in either stream"}
RIVALS = {
    "embeddings": "the summed embeddings that the model is given",
    "logmel": "log-mel spectra",
    "random_network": "the same layer of a random network",
}
BRIEF = {"embeddings": "embeddings", "logmel": "log-mel", "random_network": "random network"}  # in the matrix
TAGS = ("user", "agent", "text", "mixed")


def _share(rows: pd.DataFrame, column: str) -> float:
    return float(divide(rows[column].sum(), rows["frames"].sum()))


def _columns(layer: int) -> dict[str, str]:
    """What stands beside a layer -> its column in the raw scores."""
    return {"embeddings": "embeddings", "logmel": "logmel", "random_network": f"random.residual.{layer}"}


def _layers(at: Context, scores: pd.DataFrame) -> pd.DataFrame:
    layers = sorted(int(name.rpartition(".")[2]) for name in scores if name.startswith("residual."))
    shuffled = scores[scores["labels"] == "shuffled"]
    found = []
    for key, rows in groups(scores[scores["labels"] == "true"], ["stream", "property", "lag", "split"]):
        about = {"model": at.target, **key, **counts(rows), "frames": int(rows["frames"].sum())}
        null = shuffled
        for name in ("stream", "property", "split"):
            null = null[null[name] == key[name]]
        for layer in layers:
            own = rows.assign(correct=rows[f"residual.{layer}"])
            beside = {name: _share(rows, column) for name, column in _columns(layer).items()}
            beside |= {"majority": _share(rows, "majority"), "shuffled": _share(null, f"residual.{layer}")}
            found.append({**about, "layer": layer, **estimate(own, ACCURACY, at.cfg), **beside})
    return table(found, COLUMNS["lm_layers"])


def _best(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The layer and lag of each stream and property that are best on val: (the first of equals), as on test."""
    found = []
    for key, mine in groups(rows, ["stream", "property"]):
        val, test = (mine[mine["split"] == split] for split in ("val", "test"))
        if val["accuracy"].notna().any() and len(test):
            best = val.loc[val["accuracy"].idxmax()]
            same = test[(test["layer"] == best["layer"]) & (test["lag"] == best["lag"])]
            found += [{**key, **row} for row in records(same)]
    return found


def _compared(at: Context, scores: pd.DataFrame, best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best layer of each stream and property against its rivals at the same lag, on test."""
    found = []
    true = scores[(scores["labels"] == "true") & (scores["split"] == "test")]
    for row in best:
        rows = true[
            (true["stream"] == row["stream"]) & (true["property"] == row["property"]) & (true["lag"] == row["lag"])
        ]
        for rival, column in _columns(row["layer"]).items():
            own, other = (rows.assign(correct=rows[name]) for name in (f"residual.{row['layer']}", column))
            if record := compare(own, other, ACCURACY, at.cfg):
                what = {key: row[key] for key in ("stream", "property", "layer", "lag")}
                found.append({"family": f"lm layers minus {rival}", **what, "b": rival, **record})
    return found


def _heads(at: Context, clips: pd.DataFrame) -> pd.DataFrame:
    found = []
    ranked = rank_heads(clips).set_index(KEYS)
    true = clips[(clips["labels"] == "true") & (clips["half"] == "all")]
    for key, rows in groups(true, KEYS):
        about = {"model": at.target, **key, **counts(rows)}
        for row in records(ranked.loc[[tuple(key.values())]].reset_index(drop=True)):
            own = rows.assign(correct=rows[f"{row['layer']}.{row['head']}"])
            found.append({**about, **row, **estimate(own, ACCURACY, at.cfg)})
    return table(found, COLUMNS["lm_heads"])


def _spearman(at: Context, clips: pd.DataFrame) -> list[dict[str, Any]]:
    """Rank correlation of the heads' accuracies in the two halves; the interval resamples the clips of each half."""
    heads, found = heads_in(clips), []
    for key, rows in groups(clips[clips["labels"] == "true"], ["stream", "property", "split"]):
        halves = [rows[rows["half"] == half].sort_values("id") for half in ("a", "b")]
        if any(half.empty for half in halves):
            continue
        value = _correlation(*(accuracies(half, heads) for half in halves))
        draws = []
        for half in halves:
            weights = stats.bootstrap_weights(half["speaker"].tolist(), at.cfg["bootstrap"], at.cfg["seed"])
            frames = np.maximum(weights @ half["frames"].to_numpy(float), 1e-12)
            draws.append(weights @ half[heads].to_numpy(float) / frames[:, None])
        low, high = stats.interval([_correlation(a, b) for a, b in zip(*draws, strict=True)])
        counted = counts(rows[rows["half"] != "all"])
        about = {"model": at.target, **key, "heads": len(heads), **counted}
        found.append({**about, "spearman": value, "spearman_low": low, "spearman_high": high})
    return found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(scipy.stats.spearmanr(a, b).statistic)


def _wilson(name: str, hits: pd.Series) -> dict[str, float]:
    """A share of features with its 95 % interval (Wilson 1927)."""
    if hits.empty:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    found = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {name: float(hits.mean()), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}


def _saes(at: Context, scores: pd.DataFrame, features: pd.DataFrame) -> pd.DataFrame:
    found = []
    for key, rows in groups(scores, ["layer", "space", "stream", "split"]):
        own = features[(features["layer"] == key["layer"]) & (features["space"] == key["space"])]
        alive = own[own[f"{key['stream']}_class"].notna()]
        row = {"model": at.target, **key, **counts(rows), **estimate(rows, ACCURACY, at.cfg), "features": len(alive)}
        true, shuffled = (alive[f"{key['stream']}_{kind}"] for kind in ("class", "shuffled"))
        low, high = (alive["classes"] * part for part in (1 / 3, 2 / 3))
        row |= _wilson("low_share", true < low) | _wilson("high_share", true >= high)
        row |= {"low_shuffled": float((shuffled < low).mean()), "high_shuffled": float((shuffled >= high).mean())}
        tagged = {"mixed" if tag == "mixed" else f"{tag}_tagged": float((own["tag"] == tag).mean()) for tag in TAGS}
        found.append(row | tagged)
    return table(found, COLUMNS["lm_saes"])


def tabulate(at: Context) -> Tabulated:
    """One row a (stream, layer, property, lag, split), a head, a rank correlation, an SAE and stream, and a feature."""
    scores, clips, saes, features = (
        at.inputs.csv(f"scores/{at.target}.{part}.csv")
        for part in ("lm_layers", "lm_heads.clips", "lm_saes", "lm_features")
    )
    layers = _layers(at, scores)
    best = _best(layers)
    stability, tagged = _spearman(at, clips), features[features["space"] == "sae"]
    rows = {
        "lm_layers": layers,
        "lm_heads": _heads(at, clips),
        "lm_stability": table(stability, COLUMNS["lm_stability"]),
        "lm_saes": _saes(at, saes, features),
        "lm_features": table(tagged.assign(model=at.target, **counts(saes)).to_dict("records"), COLUMNS["lm_features"]),
    }
    shown = rows["lm_saes"][(rows["lm_saes"]["split"] == "test")]
    facts = {"lm_best": best, "lm_stability": stability, "lm_saes": records(shown)}
    return Tabulated(rows, facts, _compared(at, scores, best))


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the layers hold more than what they are given; whether a ranking of heads can be used; what SAEs add."""
    lines = []
    best = {(row["stream"], row["property"]): row for row in facts["lm_best"]}
    for record in facts["comparisons"]:
        if not record["family"].startswith("lm layers minus "):
            continue
        row = best[record["stream"], record["property"]]
        verdict, words = said(record)
        what = f"{PROPERTIES[record['property']]}, {STREAMS[record['stream']]}"
        text = f"{what}: the probe on layer {record['layer']} (lag {record['lag']}, both chosen on val) {words} "
        text += f"the one on {RIVALS[record['b']]}."
        nulls = f"majority {number(row['majority'])}, shuffled labels {number(row['shuffled'])}"
        cell = (f"best layer over {BRIEF[record['b']]}", what)
        lines.append(
            headline("lm_layers", verdict, text, f"{numbers(record, ACCURACY)}; {nulls}", cell, difference(record))
        )
    for row in facts["lm_stability"]:
        if row["split"] != "val" or row["spearman"] is None:
            continue
        verdict = "positive" if row["spearman_low"] > 0 else "undecided"
        name = f"{PROPERTIES[row['property']]}, {STREAMS[row['stream']]}"
        text = f"{name}: the order of the {row['heads']} heads in one half of the clips has a rank correlation of "
        text += f"{number(row['spearman'])} {ends(row['spearman_low'], row['spearman_high'])} with that in the other: "
        text += "heads differ by more than luck." if verdict == "positive" else "not shown to be more than luck."
        cell = ("order of heads, half against half", name)
        lines.append(headline("lm_heads", verdict, text, sample(row), cell, estimated(row, "spearman")))
    return lines + _of_features(facts["lm_saes"])


def _of_features(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """High-frequency features of each SAE beside those of random features and of a shuffled probe."""
    lines = []
    random = {(row["layer"], row["stream"]): row for row in rows if row["space"] == "random"}
    for row in rows:
        if row["space"] != "sae":
            continue
        null = random[row["layer"], row["stream"]]
        text = f"Layer {row['layer']}, {STREAMS[row['stream']]}: of {row['features']} SAE features "
        text += (
            f"{row['high_share']:.0%} {ends(row['high_share_low'], row['high_share_high'])} weigh most for the upper "
        )
        text += f"third of centroids; of random features {null['high_share']:.0%}, by a probe of shuffled labels "
        text += f"{row['high_shuffled']:.0%}."
        detail = (
            f"lower third {row['low_share']:.0%}, random {null['low_share']:.0%}, shuffled {row['low_shuffled']:.0%}"
        )
        cell = (f"SAE of layer {row['layer']}: high-frequency features", STREAMS[row["stream"]])
        lines.append(headline("lm_saes", "measured", text, detail, cell, estimated(row, "high_share")))
    return lines
