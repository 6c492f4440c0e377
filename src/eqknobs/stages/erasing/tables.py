"""What few features tell, what their removal erases, and what goes with them to another clip: `topk_probing.csv`,
`unlearning.csv`, `ravel.csv`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import IntervalsCfg, Measure, counts, estimate, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.stats import bootstrap_weights, interval
from eqknobs.evidence.wording import difference, ends, headline, number, numbers, said, sample

STAGE = "erasing"
COLUMNS = {
    "topk_probing": "target sae task space order k score majority split clips speakers samples score_low score_high "
    "shuffled shuffled_low shuffled_high width converged",
    "unlearning": "target sae task space order removed score off_target split clips speakers samples score_low "
    "score_high majority intact off_target_low off_target_high off_change off_change_low off_change_high gone gone_low "
    "gone_high share width penalty converged",
    "ravel": "target sae task space order k cause isolation split clips speakers pairs cause_low cause_high "
    "isolation_low isolation_high both both_low both_high",
}
NOTHING: dict[str, Any] = {"topk_probing": [], "unlearning": [], "ravel": []}
CURVE = ["sae", "task", "space", "order", "penalty"]
CAUSE = Measure("cause", "caused", "pairs", "higher", "cause")
ISOLATION = Measure("isolation", "kept", "asked", "higher", "isolation")
BOTH = Measure("both", "both", None, "higher", "mean of cause and isolation")
SIDE_EFFECT = Measure("side_effect", "change", "asked", "higher", "change of accuracy")
ACCURACY = Measure("accuracy", "correct", "asked", "higher", "accuracy")
SPACES = {
    "features": "features",
    "reconstruction": "reconstructions",
    "raw": "raw dimensions",
    "pca": "principal components",
    "whole": "the whole clip",
    "nothing": "nothing",
}
ORDERS = {"fisher": "Fisher order", "classifier": "a classifier's order", "random": "random order", "leace": "LEACE"}


@dataclass(frozen=True)
class Told:
    """The test samples of a task, on which every score is drawn.

    clips: id, speaker, true, one row a sample; mcc: whether label 1 is judged by Matthews' correlation, as vowels are,
    else labels by accuracy.
    """

    clips: pd.DataFrame
    mcc: bool
    cfg: IntervalsCfg

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Place of each sample's clip [n], and how often each clip counts [1 + draws, clips]: once, then as drawn."""
        ids, first, place = np.unique(self.clips["id"].to_numpy(str), return_index=True, return_inverse=True)
        speakers = self.clips["speaker"].to_numpy(str)[first].tolist()
        drawn = bootstrap_weights(speakers, self.cfg["bootstrap"], self.cfg["seed"])
        return place, np.vstack([np.ones(len(ids)), drawn])

    def _sum(self, values: np.ndarray) -> np.ndarray:
        place, weights = self.places
        return weights @ np.bincount(place, weights=values.astype(float), minlength=weights.shape[1])

    def scores(self, told: np.ndarray) -> np.ndarray:
        """Score of labels told [n]: as it is, then in each draw, [1 + draws]."""
        true = self.clips["true"].to_numpy()
        if not self.mcc:
            return self._sum(told == true) / self._sum(np.ones(len(told)))
        yes, has = told == 1, true == 1
        tp, fp, fn, tn = (self._sum(one) for one in (yes & has, yes & ~has, ~yes & has, ~yes & ~has))
        root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return np.divide(tp * tn - fp * fn, root, out=np.zeros_like(root), where=root > 0)

    def by_clip(self, told: np.ndarray, before: np.ndarray | None = None) -> pd.DataFrame:
        """id, speaker, asked, correct of each clip; with labels told before an edit also `change`."""
        hit = (told == self.clips["true"].to_numpy()).astype(int)
        found = self.clips[["id", "speaker"]].assign(asked=1, correct=hit)
        if before is not None:
            found["change"] = hit - (before == self.clips["true"].to_numpy())
        return found.groupby(["id", "speaker"], as_index=False).sum()


class Probes:
    """What all probes of a target told, by row."""

    def __init__(self, at: Context):
        rows = at.inputs.csv(f"scores/{at.target}.erasing.csv")
        self.rows = rows.assign(order=rows["order"].fillna(""), said=rows["said"].astype(str))
        self.clips = at.inputs.csv(f"scores/{at.target}.erasing_clips.csv")
        self.about = at.inputs.json(f"erasing/{at.target}.json")
        self.cfg = at.cfg
        self._told: dict[tuple[str, str], Told] = {}

    def told(self, sae: str, task: str) -> Told:
        """The test samples of a task."""
        if (sae, task) not in self._told:
            own = self.clips[(self.clips["sae"] == sae) & (self.clips["task"] == task)]
            self._told[sae, task] = Told(own.reset_index(drop=True), task.startswith("vowel "), self.cfg)
        return self._told[sae, task]

    def pick(self, **wanted: Any) -> pd.DataFrame:
        rows = self.rows
        for name, value in wanted.items():
            rows = rows[rows[name] == value]
        return rows

    def intact(self, sae: str, task: str, space: str, penalty: str = "l2") -> np.ndarray:
        """Labels told of a task from a whole space."""
        return _labels(self.pick(sae=sae, task=task, space=space, edit="all", penalty=penalty)["said"].iloc[0])

    def majority(self, sae: str, task: str) -> np.ndarray:
        return _labels(self.pick(sae=sae, task=task, space="majority")["said"].iloc[0])

    def own(self, **wanted: Any) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        """Probes of an edit that tell the edit's own task, seeds together: (keys, rows)."""
        rows = self.pick(**wanted)
        rows = rows[(rows["property"] == rows["task"]) & (rows["space"] != "majority")]
        for keys, own in rows.groupby([*CURVE, "count"], sort=False):
            yield dict(zip([*CURVE, "count"], keys, strict=True)), own


def _labels(text: str) -> np.ndarray:
    return np.array(text.split(), np.int64)


def _mean(told: Told, rows: pd.DataFrame) -> np.ndarray:
    return np.mean([told.scores(_labels(text)) for text in rows["said"]], axis=0)


def _cells(name: str, draws: np.ndarray | None) -> dict[str, float]:
    names = (name, f"{name}_low", f"{name}_high")
    return dict(zip(names, (math.nan,) * 3 if draws is None else (float(draws[0]), *interval(draws[1:])), strict=True))


def _row(probes: Probes, keys: dict[str, Any], own: pd.DataFrame, target: str) -> dict[str, Any]:
    told = probes.told(keys["sae"], keys["task"])
    row = {"target": target, **keys, "split": "test", **counts(told.clips), "samples": len(told.clips)}
    row |= {"width": int(own["width"].iloc[0]), "converged": float(own["converged"].mean())}
    row["majority"] = float(told.scores(probes.majority(keys["sae"], keys["task"]))[0])
    return row


def _topk(probes: Probes, target: str) -> list[dict[str, Any]]:
    """One row a (task, space, order, k); k of all columns has no order."""
    found = []
    for keys, own in [*probes.own(edit="all", penalty="l2"), *probes.own(edit="kept", labels="true")]:
        told = probes.told(keys["sae"], keys["task"])
        row = _row(probes, keys, own, target) | {"k": keys["count"], **_cells("score", _mean(told, own))}
        null = probes.pick(**{**keys, "edit": "kept", "labels": "shuffled"})
        if len(null):
            values = [told.scores(_labels(text))[0] for text in null["said"]]
            row |= {"shuffled": np.mean(values), "shuffled_low": min(values), "shuffled_high": max(values)}
        found.append(row)
    return found


def gone_at(shares: np.ndarray, excess: np.ndarray, tolerance: float) -> np.ndarray:
    """Share of the columns from which on a label is gone, [draws].

    shares: rising [points]; excess: what is told more than by the most frequent label, [points, draws]. Where all is
    removed nothing is told, so the answer is 1 where no point is enough.
    """
    below = excess <= tolerance
    still = ~np.logical_and.accumulate(below[::-1], axis=0)[::-1]  # not yet, or told again further on
    return np.concatenate([shares, [1.0]])[still.sum(0)]


def _off_target(probes: Probes, keys: dict[str, Any]) -> dict[str, float]:
    """Mean score of the other tasks after an edit, and its change."""
    rows = probes.pick(edit="removed", **keys)
    rows = rows[rows["property"] != keys["task"]]
    if rows.empty:
        return _cells("off_target", None) | _cells("off_change", None)
    told = [(probes.told(keys["sae"], row.property), row) for row in rows.itertuples()]
    after = np.mean([one.scores(_labels(row.said)) for one, row in told], axis=0)
    whole = [one.scores(probes.intact(keys["sae"], row.property, keys["space"])) for one, row in told]
    return _cells("off_target", after) | _cells("off_change", after - np.mean(whole, axis=0))


def _unlearning(probes: Probes, target: str, tolerance: float) -> list[dict[str, Any]]:
    """One row a (task, space, order, number removed), each with where its curve ends."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for keys, own in probes.own(edit="removed"):
        told = probes.told(keys["sae"], keys["task"])
        row = _row(probes, keys, own, target) | {
            "removed": keys["count"],
            "share": keys["count"] / own["width"].iloc[0],
        }
        row["draws"] = _mean(told, own)
        row |= _cells("score", row["draws"]) | _off_target(probes, keys)
        found.setdefault(tuple(keys[name] for name in CURVE), []).append(row)
    for (sae, task, space, _, penalty), curve in found.items():
        told = probes.told(sae, task)
        intact, most = told.scores(probes.intact(sae, task, space, penalty)), told.scores(probes.majority(sae, task))
        curve.sort(key=lambda row: row["removed"])
        excess = np.array([intact, *(row["draws"] for row in curve)]) - most
        gone = gone_at(np.array([0.0, *(row["share"] for row in curve)]), excess, tolerance)
        nothing = excess[0, 0] <= tolerance  # there was nothing to erase
        for row in curve:
            row |= {"intact": float(intact[0]), **_cells("gone", None if nothing else gone)}
    return [row for curve in found.values() for row in curve]


def _swapped(swaps: pd.DataFrame) -> pd.DataFrame:
    """Seeds of an intervention together, clip by clip, with `both`: of the clips that other tasks ask about, if any."""
    own = swaps.groupby(["id", "speaker"], as_index=False)[["pairs", "caused", "asked", "kept"]].sum()
    cause = own["caused"] / own["pairs"]
    if not own["asked"].any():
        return own.assign(both=cause)
    return own.assign(both=(cause + own["kept"] / own["asked"].where(own["asked"] > 0)) / 2)


def _ravel(at: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a (task, intervention); and features against LEACE and raw dimensions."""
    swaps = at.inputs.csv(f"scores/{at.target}.erasing_swaps.csv")
    swaps["order"] = swaps["order"].fillna("")
    found, compared = [], []
    for (sae, task), mine in swaps.groupby(["sae", "task"], sort=False):
        arms = {}
        for (space, order), rows in mine.groupby(["space", "order"], sort=False):
            arms[space, order] = own = _swapped(rows)
            row = {"target": at.target, "sae": sae, "task": task, "space": space, "order": order, "split": "test"}
            row |= {"k": int(rows["count"].iloc[0]), **counts(own), "pairs": int(own["pairs"].sum())}
            for measure in (CAUSE, ISOLATION, BOTH):
                row |= estimate(own, measure, at.cfg)
            found.append(row)
        for rival in (("raw", "leace"), ("raw", "fisher")):
            record = compare(arms["features", "fisher"], arms[rival], BOTH, at.cfg) if rival in arms else None
            if record and ("features", "fisher") in arms:
                what = {"family": f"swaps, {sae}", "sae": sae, "task": task, "a": "features", "b": " ".join(rival)}
                compared.append(what | record)
    return found, compared


def _comparisons(probes: Probes, unlearning: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many features as raw dimensions; and, where a label is gone, what else is told less than after LEACE."""
    found = []
    for keys, own in probes.own(edit="kept", labels="true", space="features", order="fisher"):
        sae, task = keys["sae"], keys["task"]
        told = probes.told(sae, task)
        rival = probes.pick(**{**keys, "space": "raw", "edit": "kept", "labels": "true"})
        if len(rival):
            a, b = (told.by_clip(_labels(rows["said"].iloc[0])) for rows in (own, rival))
            if record := compare(a, b, ACCURACY, probes.cfg):
                what = {"family": f"few columns, {sae}, {task}", "sae": sae, "task": task, "k": keys["count"]}
                found.append(what | {"a": "features", "b": "raw"} | record)
    for row in unlearning:
        wanted = (row["space"], row["order"], row["penalty"]) == ("features", "fisher", "l2")
        if wanted and math.isclose(row["share"], row["gone"] or math.nan):
            found += _side_effects(probes, row)
    return found


def _side_effects(probes: Probes, row: dict[str, Any]) -> list[dict[str, Any]]:
    sae, task = row["sae"], row["task"]
    sides = []
    for keys in (
        {"space": "features", "order": "fisher", "count": row["removed"], "penalty": "l2"},
        {"space": "raw", "order": "leace"},
    ):
        sides.append((keys["space"], probes.pick(sae=sae, task=task, edit="removed", **keys)))
    found: dict[str, list[tuple[pd.DataFrame, ...]]] = {}
    for other in probes.about["saes"][sae][task]["others"]:
        told = probes.told(sae, other)
        changed = []
        for space, rows in sides:
            after = _labels(rows.loc[rows["property"] == other, "said"].iloc[0])
            changed.append(told.by_clip(after, probes.intact(sae, other, space)))
        found.setdefault("other vowels" if told.mcc else other, []).append(tuple(changed))
    made = []
    for beside, parts in found.items():
        a, b = (pd.concat(side, ignore_index=True) for side in zip(*parts, strict=True))
        if record := compare(a, b, SIDE_EFFECT, probes.cfg):
            what = {"family": f"side effects, {sae}", "sae": sae, "task": task, "a": "features", "b": "leace"}
            made.append(what | {"beside": beside} | record)
    return made


def tabulate(at: Context) -> Tabulated:
    """The three tables of a target."""
    probes = Probes(at)
    unlearning = _unlearning(probes, at.target, at.own["tolerance"])
    swaps, compared = _ravel(at)
    found = {"topk_probing": _topk(probes, at.target), "unlearning": unlearning, "ravel": swaps}
    made = {name: table(rows, COLUMNS[name]) for name, rows in found.items()}
    facts = {name: records(rows) for name, rows in made.items()}
    return Tabulated(made, facts, _comparisons(probes, unlearning) + compared)


# --- findings


def _one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _few(own: list[dict[str, Any]], sae: str, task: str, compared: list[dict[str, Any]], tolerance: float) -> Any:
    """From how many features a task is told as well as from all, beside as many raw dimensions."""
    whole, raw = (_one(own, space=space, order="") for space in ("features", "raw"))
    curve = [row for row in own if (row["space"], row["order"]) == ("features", "fisher")]
    if not (whole and raw and curve):
        return None
    cell = (f"{task}, from few features of {sae}", "against as many raw dimensions")
    detail = (
        f"from all {whole['width']} features {number(whole['score'])} {ends(whole['score_low'], whole['score_high'])}"
    )
    detail += f", all {raw['width']} raw dimensions {number(raw['score'])}, most frequent value "
    detail += f"{number(whole['majority'])}; {sample(whole)}"
    enough = next((row for row in curve if row["score"] >= whole["score"] - tolerance), None)
    if whole["score"] <= whole["majority"] + tolerance:
        return headline(
            STAGE,
            "undecided",
            f"From all features of {sae}, {task} is told no better than by its most frequent value.",
            detail,
            cell,
        )
    if enough is None:
        text = f"{curve[-1]['k']} features of {sae} tell {task} with {number(curve[-1]['score'])}, all of them better."
    else:
        text = f"{counted(enough['k'], 'feature')} of {sae} tell {task} about as well as all, with a score of "
        text += f"{number(enough['score'])} {ends(enough['score_low'], enough['score_high'])}."
    shown = enough or curve[-1]
    if shown["shuffled"] is not None:
        detail += f"; {counted(shown['k'], 'feature')} in Fisher order with shuffled labels {number(shown['shuffled'])}"
    # There are fewer raw dimensions than features.
    alike = [row for row in compared if (row["sae"], row["task"]) == (sae, task) and row["k"] <= shown["k"]]
    k = max((row["k"] for row in alike), default=shown["k"])
    rival = _one(own, space="raw", order="fisher", k=k)
    at_random = _one(own, space="features", order="random", k=k)
    for row, word in ((rival, "raw dimension"), (at_random, "random feature")):
        detail += f"; {counted(k, word)} {number(row['score'])}" if row else ""
    record = _one(alike, k=k)
    if record is None:
        return headline(STAGE, "measured", text, detail, cell)
    verdict, words = said(record)
    text += f" Taking {counted(k, 'feature')} {words} taking as many raw dimensions."
    return headline(STAGE, verdict, text, detail, cell, difference(record))


def _gone(row: dict[str, Any] | None) -> str:
    """When something is gone, in words."""
    if row is None or row["gone"] is None:
        return "is not told to begin with"
    if row["gone"] == 1:
        return "is not gone before all are removed"
    share, low, high = (100 * row[name] for name in _names("gone"))
    return f"is gone at {share:.3g} % [{low:.3g}, {high:.3g}]"


def _erased(own: list[dict[str, Any]], sae: str, task: str) -> Any:
    """At which share of features a task is gone, beside what else erases it."""
    curve = {(row["space"], row["order"]): row for row in own if row["penalty"] == "l2"}
    mine, leace = curve.get(("features", "fisher")), curve.get(("raw", "leace"))
    if not (mine and leace) or mine["gone"] is None:
        return None
    text = f"With the features of {sae} removed in Fisher order, {task} {_gone(mine)}"
    text += f"; LEACE takes out {counted(leace['removed'], 'dimension')} of {leace['width']} and leaves "
    text += f"{number(leace['score'])} (most frequent value {number(leace['majority'])})."
    rivals = [("reconstruction", "fisher"), ("features", "classifier"), ("raw", "fisher"), ("pca", "fisher")]
    detail = "; ".join(
        f"{SPACES[space]}, {ORDERS[order]}: {_gone(curve[space, order]).removeprefix('is ')}"
        for space, order in rivals
        if (space, order) in curve
    )
    cell = (f"{task}, erased from features of {sae}", "share removed")
    return headline(STAGE, "measured", text, f"{detail}; {sample(mine)}", cell, tuple(mine[n] for n in _names("gone")))


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Task by task: from how few features it is told, when it is gone, what goes with it, what a swap changes."""
    lines = []
    tolerance = at.own["tolerance"]
    few = [record for record in facts["comparisons"] if str(record.get("family", "")).startswith("few columns")]
    for sae, task in dict.fromkeys((row["sae"], row["task"]) for row in facts["topk_probing"]):
        top, gone = ([row for row in facts[name] if (row["sae"], row["task"]) == (sae, task)] for name in _TABLES)
        lines += [line for line in (_few(top, sae, task, few, tolerance), _erased(gone, sae, task)) if line]
    for record in facts["comparisons"]:
        family = str(record.get("family", ""))
        if family.startswith("side effects"):
            verdict, words = said(record)
            text = f"As to {record['beside']}, erasing {record['task']} from the features of {record['sae']} {words} "
            text += "erasing it from the raw activations by LEACE."
            cell = (f"{record['task']}, erased from features of {record['sae']}", f"{record['beside']}, against LEACE")
            lines.append(headline(STAGE, verdict, text, numbers(record, SIDE_EFFECT), cell, difference(record)))
        if family.startswith("swaps"):
            verdict, words = said(record)
            rival = "what LEACE erases" if record["b"] == "raw leace" else "raw dimensions in Fisher order"
            text = f"To carry {record['task']}, and nothing else, to another clip, taking features of {record['sae']} "
            text += f"{words} taking {rival}."
            cell = (f"{record['task']}, swapped with features of {record['sae']}", f"against {rival}")
            lines.append(headline(STAGE, verdict, text, numbers(record, BOTH), cell, difference(record)))
    return lines


_TABLES = ("topk_probing", "unlearning")
