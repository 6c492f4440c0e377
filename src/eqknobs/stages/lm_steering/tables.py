"""What steering a speech LM does to what it says: the table `lm_steering.csv`.

In place of a target stands the model. Intervals and comparisons resample prompts, then draws; shifts and differences
are paired with the intact model's answers to the same prompts and draws.
"""

from typing import Any

import numpy as np
import pandas as pd

from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import Measure, groups, records, table
from eqknobs.evidence.spoken import (
    DELTAS,
    SILENT_SHARE,
    SIMILARITY_INTACT,
    SIMILARITY_PROMPT,
    WORDS,
    WORDS_PER_SECOND,
    answered,
    bounds_of,
    by_prompt,
    counted_prompts,
    measurable,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, ends, headline, listed, number, said

STAGE = "lm_steering"
CONDITION = ["split", "layer", "property", "direction", "seed", "matched", "beside", "alpha", "wanted"]
SHIFT = Measure("shift", "shift", None, "higher", "shift")
SHIFTS = (
    Measure("pitch_shift", "pitch_shift"),
    Measure("level_shift", "level_shift"),
    Measure("voice_shift", "voice_shift"),
)
OTHERS = (
    SILENT_SHARE,
    WORDS_PER_SECOND,
    SIMILARITY_PROMPT,
    SIMILARITY_INTACT,
)
MEASURES = (SHIFT, *WORDS, *SHIFTS, *OTHERS)
COLUMNS = {
    "lm_steering": " ".join(
        [
            "model",
            *CONDITION,
            "answers prompts speakers",
            *(m.name for m in MEASURES),
            *DELTAS,
            *bounds_of(MEASURES),
        ]
    )
}
NOTHING: dict[str, Any] = {}
OWN = {"pitch": "pitch_shift", "rms": "level_shift", "voice": "voice_shift"}  # property -> the column that is its shift
PROPERTIES = {"pitch": "pitch", "rms": "level", "voice": "voice"}
UNITS = {"pitch": "semitones", "rms": "dB", "voice": "of similarity"}
DIRECTIONS = {
    "probe": "probe direction",
    "difference_in_means": "difference in means",
    "sae_probe": "SAE's probe direction",
    "sae_feature": "one SAE feature",
    "random": "random direction",
    "gain": "gain on the sound",
    "vocoder": "phase vocoder on the sound",
    "prompt": "the other voice's prompt",
    "intact": "intact",
}
CLAIMED = ("probe", "difference_in_means", "sae_probe", "sae_feature")
BASELINE = "difference_in_means"  # the cheapest one that is strong
PAIRS = ["id", "draw"]


def with_shifts(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers with how far each is from the intact one of its prompt and draw; the intact model's own, from its answer
    of draw 0: the null."""
    raw = ["f0", "level_db", "similarity_to", "similarity_from"]
    intact = answers[answers["direction"] == "intact"].set_index(PAIRS)[raw]
    base = answers[PAIRS].assign(draw=answers["draw"].where(answers["direction"] != "intact", 0))
    before = intact.reindex(pd.MultiIndex.from_frame(base)).set_index(answers.index)
    found = answers.assign(
        pitch_shift=12 * np.log2(answers["f0"] / before["f0"]),
        level_shift=answers["level_db"] - before["level_db"],
        voice_shift=(answers["similarity_to"] - answers["similarity_from"])
        - (before["similarity_to"] - before["similarity_from"]),
    )
    own = [found[OWN[name]].loc[i] if name in OWN else np.nan for i, name in found["property"].items()]
    return found.assign(shift=own)


def steering_table(at: Context, tried: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """One row a condition: what was tried on val, then what spoke on test."""
    intact, found = answers[answers["direction"] == "intact"], []
    for rows in (tried, answers):
        # of the intact model a draw is a row: the second one's shift is the null
        rows = rows.assign(seed=rows["seed"].where(rows["direction"] != "intact", rows.get("draw", 0)))
        for key, mine in groups(rows, ["model", *CONDITION]):
            beside = intact if key["split"] == "test" and key["direction"] != "intact" else None
            found.append({**key, **answered(mine, beside, MEASURES, at.cfg)})
    return table(found, COLUMNS["lm_steering"])


def compared(at: Context, answers: pd.DataFrame) -> list[dict[str, Any]]:
    """Directions at the α of val: how far they shift against random ones of their length (all seeds pooled); words
    against the intact model and, where both reach the shift, against the difference in means."""
    found, intact = [], answers[answers["direction"] == "intact"]
    words = measurable(intact, at.cfg)
    intact = intact[intact["draw"].isin(answers.loc[answers["direction"] != "intact", "draw"])]
    for name, rows in answers.groupby("property"):
        at_alpha = rows[rows["matched"].isin(["reached", "unreached"])]
        reached = dict(list(rows[rows["matched"] == "reached"].groupby("direction")))
        for direction in [d for d in CLAIMED if d in set(at_alpha["direction"])]:
            mine = at_alpha[at_alpha["direction"] == direction]
            upwards = np.sign(mine["wanted"].iloc[0])  # a shift downwards is as good as it is large
            random = rows[(rows["direction"] == "random") & (rows["beside"] == direction)]
            sides = [by_prompt(part.assign(shift=upwards * part["shift"])) for part in (mine, random)]
            pairs = [("random", SHIFT, *sides)] if len(random) else []
            pairs += [("intact", measure, by_prompt(mine), by_prompt(intact)) for measure in words]
            if direction != BASELINE and direction in reached and BASELINE in reached:
                pairs += [(BASELINE, measure, by_prompt(mine), by_prompt(reached[BASELINE])) for measure in words]
            for rival, measure, a, b in pairs:
                if record := compare(a, b, measure, at.cfg):
                    about = {"property": str(name), "binning": None, "a": direction, "b": rival}
                    about |= {"reached": bool(direction in reached), "layer": int(mine["layer"].iloc[0])}
                    family = f"lm_steering, {measure.name}, minus {rival}"
                    found.append({**record, **about, "family": family, "speakers": mine["speaker"].nunique()})
    return found


def tabulate(at: Context) -> Tabulated:
    """The table, what spoke at the α of val, and comparisons."""
    tried = at.inputs.csv(f"scores/{at.target}.lm_steering_calibration.csv")
    answers = with_shifts(at.inputs.csv(f"scores/{at.target}.lm_steered_answers.csv"))
    rows = steering_table(at, tried, answers)
    shown = rows[(rows["split"] == "test") & rows["matched"].isin(["reached", "unreached", "plain"])]
    return Tabulated({"lm_steering": rows}, {"lm_steering": records(shown)}, compared(at, answers))


def amount(name: str, value: float) -> str:
    """A shift in the property's unit."""
    return f"{value:+.2f}".replace("-", "−") + f" {UNITS[name]}"


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What reaches the shift; whether directions shift more than random ones; what they cost in words."""
    lines = [line for name in OWN for line in _reached(name, facts["lm_steering"])]
    names = {measure.name: measure for measure in (SHIFT, *WORDS)}
    for record in facts["comparisons"]:
        if not record["family"].startswith("lm_steering,"):
            continue
        measure, (verdict, words) = names[record["measure"]], said(record)
        what, who = PROPERTIES[record["property"]], DIRECTIONS[record["a"]]
        rivals = {"random": "random directions of the same length", "intact": "the intact model"}
        rival = rivals.get(record["b"], f"the {DIRECTIONS.get(record['b'], record['b'])}")
        where = "at the matched shift" if record["reached"] else "at its nearest shift"
        if record["b"] == "intact" and verdict == "positive":
            verdict = "measured"  # fewer word errors than intact: chance or not, no claim of steering
        text = f"Steering {what} in layer {record['layer']}, {where}: the {who} {words} {rival}, in {measure.said}."
        cell = (f"{who} against {rival}", f"{what}: {measure.said}")
        lines.append(headline(STAGE, verdict, text, counted_prompts(record, measure), cell, difference(record)))
    return lines


def _reached(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two sentences on one property: what reached the shift, and which of these costs the fewest words."""
    mine = [row for row in rows if row["property"] == name and row["matched"] != "plain"]
    if not mine:
        return []
    yes, no = ([row for row in mine if row["matched"] == matched] for matched in ("reached", "unreached"))
    text = (
        f"Added behind layer {mine[0]['layer']:g}, {len(yes)} of {len(mine)} directions shift the {PROPERTIES[name]} "
    )
    text += f"by {amount(name, mine[0]['wanted'])} on val"
    text += f"; not reached by {listed('the ' + DIRECTIONS[row['direction']] for row in no)}." if no else "."
    detail = "on test: " + "; ".join(
        f"{DIRECTIONS[row['direction']]} {amount(name, row['shift'])} {ends(row['shift_low'], row['shift_high'], True)}"
        for row in mine
        if row["shift"] is not None
    )
    lines = [headline(STAGE, "measured", text, f"{detail}; {mine[0]['prompts']} prompts")]
    known = [row for row in yes if row["delta_wer_monologue"] is not None]
    if known:
        best = min(known, key=_cost)
        text = (
            f"Of those that shift the {PROPERTIES[name]} as far, the {DIRECTIONS[best['direction']]} has the smallest "
        )
        text += "estimate of words lost."
        plain = [row for row in rows if row["property"] == name and row["matched"] == "plain"]
        lines.append(headline(STAGE, "measured", text, "; ".join(map(_words, [*sorted(known, key=_cost), *plain]))))
    return lines


def _cost(row: dict[str, Any]) -> float:
    """Word errors that are more than the intact model's, of both kinds."""
    return float(sum(row[f"delta_{measure.name}"] or 0 for measure in WORDS))


def _words(row: dict[str, Any]) -> str:
    found = [
        f"{number(row[f'delta_{m.name}'], True)} {ends(row[f'delta_{m.name}_low'], row[f'delta_{m.name}_high'], True)}"
        for m in WORDS
        if row[f"delta_{m.name}"] is not None
    ]
    return f"{DIRECTIONS[row['direction']]} {' and '.join(found)}"
