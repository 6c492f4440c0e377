"""What sparse codes keep of the accent: the table `accent.csv`."""

from typing import Any

import numpy as np
import pandas as pd

from eqknobs.errors import counted
from eqknobs.evidence.estimates import counts, records, table
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.stats import bootstrap_weights, interval
from eqknobs.evidence.wording import ends, headline, number

STAGE = "accent"
COLUMNS = {
    "accent": "codec weights codebooks site task q s k d_z cell recipe seed features split clips speakers macro_f1 "
    "delta_f1 retained_share constant_f1 fvu converged macro_f1_low macro_f1_high delta_f1_low delta_f1_high "
    "retained_share_low retained_share_high balanced_accuracy nonzero flat lr padded gini effective dead",
}
NOTHING: dict[str, Any] = {"accent": []}
READING = ["weights", "site", "codebooks", "task"]
ROW = [*READING, "q", "s", "k", "d_z", "cell", "recipe", "features"]
GUESSES = {"constant": "constant answer", "stratified": "guesses by share", "shuffled": "shuffled labels"}
LEAST = 0.02  # a reference this close to the constant answer leaves no share to retain


def confusion(said: np.ndarray, true: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted counts [true, said, draws, runs]; said [runs, clips], true [clips]: 0 or 1; weight [draws, clips]."""
    return np.array(
        [[weight @ ((true == a) * (said == b)).T.astype(float) for b in (0, 1)] for a in (0, 1)],
    )


def macro_f1(counted: np.ndarray) -> np.ndarray:
    """Mean F1 of the two labels, 0 for one that is neither there nor told, [draws, runs]."""
    found = []
    for label in (0, 1):
        both = counted[label, label]
        all_of = 2 * both + counted[label, 1 - label] + counted[1 - label, label]
        found.append(np.where(all_of > 0, 2 * both / np.where(all_of > 0, all_of, 1), 0.0))
    return np.mean(found, axis=0)


def balanced(counted: np.ndarray) -> np.ndarray:
    """Mean recall of the two labels, [draws, runs]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.mean([counted[a, a] / counted[a].sum(0) for a in (0, 1)], axis=0)


def retained(f1: Any, reference: Any, constant: Any) -> Any:
    """(F1 − constant) / (reference − constant); NaN where the reference hardly passes the constant answer."""
    room = np.asarray(reference) - constant
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(room > LEAST, (f1 - constant) / room, np.nan)


def _said(rows: pd.DataFrame) -> np.ndarray:
    return np.array([[int(one) for one in told] for told in rows["said"]])


def _measured(rows: pd.DataFrame, clips: pd.DataFrame, at: Context) -> list[dict[str, Any]]:
    """Rows of one reading and task, each with its measures; draws of speakers, then of their clips, shared by all."""
    true = clips["true"].to_numpy()
    weight = bootstrap_weights(clips["speaker"].tolist(), at.cfg["bootstrap"], at.cfg["seed"])
    weight = np.concatenate([np.ones((1, len(true))), weight])  # first, the clips as they are
    tables = confusion(_said(rows), true, weight)
    f1, fair = macro_f1(tables), balanced(tables)[0]
    features, recipe = rows["features"].to_numpy(), rows["recipe"].to_numpy()
    reference = f1[:, np.flatnonzero((features == "dense") & (recipe == ""))[0]][:, None]
    constant = f1[:, np.flatnonzero(features == "constant")[0]][:, None]
    delta, share = f1 - reference, retained(f1, reference, constant)
    made = []
    for i, row in enumerate(rows.to_dict("records")):
        row |= {"constant_f1": constant[0, 0], "balanced_accuracy": fair[i]}
        for name, drawn in (("macro_f1", f1), ("delta_f1", delta), ("retained_share", share)):
            low, high = interval(drawn[1:, i])
            row |= {name: drawn[0, i], f"{name}_low": low, f"{name}_high": high}
        made.append(row | {"draws": {"f1": f1[:, i], "delta": delta[:, i], "share": share[:, i]}})
    return made


def _averaged(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page and the findings show: each measure averaged over seeds, with the interval of that average."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in made:
        groups.setdefault(tuple(str(row[name]) for name in ROW), []).append(row)
    found = []
    for own in groups.values():
        row = {name: own[0][name] for name in ROW}
        row |= {"seeds": len(own), "constant_f1": own[0]["constant_f1"]}
        row |= {"converged": float(np.mean([one["converged"] for one in own]))}
        row |= {
            "fvu": float(np.mean([one["fvu"] for one in own])),
            "flat": float(np.mean([one["flat"] for one in own])),
        }
        for name, short in (("macro_f1", "f1"), ("delta_f1", "delta"), ("retained_share", "share")):
            drawn = np.mean([one["draws"][short] for one in own], axis=0)
            low, high = interval(drawn[1:])
            row |= {name: float(drawn[0]), f"{name}_low": low, f"{name}_high": high}
            row["draws"] = drawn if short == "f1" else row.get("draws")
        found.append(row)
    random = {_size(row): row["draws"] for row in found if row["features"] == "random_topk"}
    for row in found:
        if row["features"] == "full" and row["recipe"] == "paper" and _size(row) in random:
            drawn = row["draws"] - random[_size(row)]  # on the same draws
            row |= dict(zip(("gain", "gain_low", "gain_high"), (float(drawn[0]), *interval(drawn[1:]))))
    return [{name: value for name, value in row.items() if name != "draws"} for row in found]


def _size(row: dict[str, Any]) -> tuple[Any, ...]:
    """The reading and the cell of a row."""
    return tuple(row[name] for name in (*READING, "q", "k", "cell"))


def tabulate(at: Context) -> Tabulated:
    """One row a classifier; the facts average over seeds."""
    runs, clips = at.inputs.csv(f"scores/{at.target}.accent.csv"), at.inputs.csv(f"scores/{at.target}.accent_clips.csv")
    runs[["recipe", "cell"]] = runs[["recipe", "cell"]].fillna("")
    rows: list[dict[str, Any]] = []
    for _, own in runs.groupby(READING, sort=False):
        told = clips[clips["task"] == own["task"].iloc[0]]
        rows += [row | {"split": "test", **counts(told)} for row in _measured(own, told, at)]
    for row in rows:
        row |= {"codec": at.target, "flat": np.nan if pd.isna(row["flat"]) else float(row["flat"])}
    made = table([{k: v for k, v in row.items() if k != "draws"} for row in rows], COLUMNS["accent"])
    averaged = pd.DataFrame([row | counts(clips) for row in _averaged(rows)])
    return Tabulated({"accent": made}, {"accent": records(averaged)})


def _one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _retained(row: dict[str, Any]) -> str:
    if row["retained_share"] is None:
        return "no share is defined"
    return f"{number(row['retained_share'])} {ends(row['retained_share_low'], row['retained_share_high'])}"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the reference cell keeps, beside a random encoder of its size; whether u tells the accent at all."""
    lines = []
    reference = at.own["reference"]
    cell = {"q": reference["ratio"], "s": reference["sparsity"]}
    every = facts["accent"]
    for task in dict.fromkeys(row["task"] for row in every):
        rows = [row for row in every if row["task"] == task and row["weights"] == "trained"]
        rows = [row for row in rows if (row["site"], row["codebooks"]) == (rows[0]["site"], rows[0]["codebooks"])]
        dense = _one(rows, features="dense", recipe="")
        guesses = [row for row in rows if row["features"] in GUESSES]
        if dense and guesses:
            chance = max(guess["macro_f1"] for guess in guesses)
            text = f"{at.target}'s pooled vectors tell {task} with a macro-F1 of {number(dense['macro_f1'])}."
            told = ", ".join(f"{GUESSES[guess['features']]} {number(guess['macro_f1'])}" for guess in guesses)
            detail = f"95 % {ends(dense['macro_f1_low'], dense['macro_f1_high'])}; {told}; "
            detail += f"{counted(dense['clips'], 'clip')}, {counted(dense['speakers'], 'speaker')} never heard before"
            estimate = tuple(dense[n] - chance for n in ("macro_f1", "macro_f1_low", "macro_f1_high"))
            verdict = "positive" if estimate[1] > 0 else "undecided"
            lines.append(headline("accent", verdict, text, detail, (f"accent, {task}", "pooled vectors"), estimate))
        full, random = (_one(rows, features=name, **cell, cell="grid") for name in ("full", "random_topk"))
        if full and random and "gain" in full:
            gained = (
                f"F1 {number(full['gain'], True)} {ends(full['gain_low'], full['gain_high'], True)} to that encoder's"
            )
            text = (
                f"Codes of q = {cell['q']:g}, s = {cell['s']:g} keep a share {_retained(full)} of what {at.target}'s "
            )
            text += (
                f"vectors tell of {task} above the constant answer; a random encoder of that size, {_retained(random)}."
            )
            lost = ends(full["delta_f1_low"], full["delta_f1_high"], True)
            detail = f"{gained}; ΔF1 {number(full['delta_f1'], True)} {lost}; "
            detail += f"FVU {number(full['fvu'])}; saga converged in {number(full['converged'])} of "
            detail += f"{counted(full['seeds'], 'seed')}; {number(full['flat'])} of the SAEs' losses were flat"
            estimate = (full["gain"], full["gain_low"], full["gain_high"])
            verdict = "positive" if estimate[1] > 0 else "negative" if estimate[2] < 0 else "undecided"
            lines.append(
                headline("accent", verdict, text, detail, (f"accent, {task}", "codes, random encoder"), estimate)
            )
    return lines
