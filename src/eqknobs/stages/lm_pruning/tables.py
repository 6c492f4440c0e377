"""What a pruned speech LM says: the tables `lm_pruning.csv`, `lm_prunable.csv`, `lm_codebooks.csv`, `lm_removal.csv`
and `lm_gates.csv`.

In place of a target stands the model. Intervals and comparisons resample prompts (of nats: clips), then draws: with two
voices, resampling voices would say little. Differences are paired: the same prompts and draws, intact and pruned.
"""

from typing import Any

import numpy as np
import pandas as pd

from eqknobs.evidence.estimates import Measure, estimate, groups, records, table
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
    WORDS_PER_SECOND,
    bounds_of,
    by_prompt,
    counted_prompts,
    measurable,
    paired,
    screened,
    versus,
)
from eqknobs.evidence.stage import Context, Tabulated
from eqknobs.evidence.wording import difference, headline, listed, said
from eqknobs.speaking.gates import GATES, Gate

STAGE = "lm_pruning"
CONDITION = ["granularity", "order", "share", "repair", "seed"]
MEASURES = (
    *WORDS,
    NLL_INTACT,
    Measure("divergence", "divergence"),
    Measure("pad_share", "pad_frames", "frames"),
    SILENT_SHARE,
    WORDS_PER_SECOND,
    SIMILARITY_PROMPT,
    SIMILARITY_INTACT,
    DNSMOS,
    Measure("f0_hz", "f0"),
    Measure("gates_published", "gates_published", None, "higher"),
    Measure("gates_calibrated", "gates_calibrated", None, "higher"),
)
COLUMNS = {
    "lm_pruning": " ".join(
        [
            "model split granularity order seed share repair removed answers prompts speakers clips",
            *(m.name for m in (*MEASURES, *NATS)),
            *DELTAS,
            *bounds_of((*MEASURES, *NATS)),
        ]
    ),
    "lm_prunable": "model split granularity order repair measure largest_share bound tested answers prompts speakers "
    "random_low random_high",
    "lm_codebooks": "model split reading codebooks answers speakers wer_monologue wer_prompt similarity_prompt "
    "step_ratio wer_monologue_low wer_monologue_high wer_prompt_low wer_prompt_high similarity_prompt_low "
    "similarity_prompt_high",
    "lm_removal": "model split format order share removed parameters bytes peak_bytes step_seconds difference exact "
    "clips speakers",
    "lm_gates": "model split gate low high calibrated_low calibrated_high intact intact_calibrated speech "
    "speech_calibrated answers clips speakers",
}
NOTHING: dict[str, Any] = {}
ORDERS = {
    "acoustic_first": "most acoustic first",
    "acoustic_last": "least acoustic first",
    "random": "at random",
    "random_layers": "at random, as many of each layer",
    "norm": "smallest weight norm first",
    "gradient": "smallest gradient first",
    "damage": "least damage one at a time first",
    "uniform": "as much of every layer",
    "guided": "most from the most acoustic layers",
    "inverted": "most from the least acoustic layers",
    "first": "from the first layer on",
    "last": "from the last layer on",
}
RIVALS = ("acoustic_last", "random", "random_layers", "norm", "gradient", "damage")
SHIFTED = 0.05  # share of heads at which the blog heard another voice


def is_intact(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of the intact model."""
    return rows["granularity"] == "intact"


def gates_of(answers: pd.DataFrame) -> list[tuple[Gate, Gate]]:
    """Each gate as published and as calibrated on the intact model's answers."""
    intact = answers[is_intact(answers)]
    return [(gate, gate.calibrated(intact[gate.name].to_numpy(float))) for gate in GATES]


def with_gates(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers, and whether each passes all gates, as published and as calibrated."""
    pairs = gates_of(answers)
    passed = [np.all([g[i].passes(answers[g[0].name].to_numpy(float)) for g in pairs], axis=0) for i in (0, 1)]
    return answers.assign(gates_published=passed[0].astype(int), gates_calibrated=passed[1].astype(int))


def pruning_table(at: Context, nats: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """One row a condition; answers are counted, and measures given, of those that speak."""
    measures = (NATS, MEASURES)
    found = screened(nats, answers, CONDITION, ["removed", "model", "split"], measures, at.cfg)
    return table(found, COLUMNS["lm_pruning"])


def largest_share(bounds: dict[float, float]) -> tuple[float, float]:
    """(share, bound): the largest share up to which the bound of every share that was tried stays within `MARGIN`; 0
    and the smallest share's bound where that is already beyond it."""
    found = (0.0, bounds[min(bounds)])
    for share in sorted(bounds):
        if not bounds[share] <= MARGIN:
            break
        found = (share, bounds[share])
    return found


def prunable_table(at: Context, answers: pd.DataFrame) -> pd.DataFrame:
    """How far each order can go: one row an order, repair and measure; of drawn orders the draws are pooled, and their
    band is from the draw that can go least far to the one that can go farthest. No row of a measure by which the intact
    model itself is above `tables.unmeasurable_wer`."""
    intact, found = answers[is_intact(answers)], []
    pruned = answers[~is_intact(answers)]
    for measure in measurable(intact, at.cfg):

        def bounds(rows: pd.DataFrame, measure: Measure = measure) -> dict[float, float]:
            records = {share: paired(intact, mine, measure, at.cfg) for share, mine in rows.groupby("share")}
            return {float(share): record["high"] for share, record in records.items() if record}

        bands: dict[tuple[str, str], tuple[float, float]] = {}
        for key, rows in groups(pruned[pruned["order"] == "random"], ["granularity", "repair"]):
            each = [largest_share(bounds(mine))[0] for _, mine in rows.groupby("seed") if bounds(mine)]
            if each:
                bands[key["granularity"], key["repair"]] = (min(each), max(each))
        for key, rows in groups(pruned, ["model", "split", "granularity", "order", "repair"]):
            if not (tried := bounds(rows)):
                continue
            share, bound = largest_share(tried)
            low, high = bands.get((key["granularity"], key["repair"]), (np.nan, np.nan))
            about = {"largest_share": share, "bound": bound, "tested": len(tried), "answers": len(rows)}
            about |= {"prompts": rows["id"].nunique(), "speakers": rows["speaker"].nunique()}
            found.append({**key, "measure": measure.name, **about, "random_low": low, "random_high": high})
    return table(found, COLUMNS["lm_prunable"])


def codebooks_table(at: Context, answers: pd.DataFrame) -> pd.DataFrame:
    """One row a reading and number of codebooks."""
    found = []
    for key, rows in groups(answers, ["model", "split", "reading", "codebooks"]) if "reading" in answers else ():
        row = {
            **key,
            "answers": len(rows),
            "speakers": rows["speaker"].nunique(),
            "step_ratio": rows["step_ratio"].iloc[0],
        }
        for measure in (*WORDS, SIMILARITY_PROMPT):
            row |= estimate(by_prompt(rows), measure, at.cfg)
        found.append(row)
    return table(found, COLUMNS["lm_codebooks"])


def gates_table(answers: pd.DataFrame, real: pd.DataFrame) -> pd.DataFrame:
    """One row a gate: its bounds, and the share of the intact model's answers and of real speech that passes it."""
    intact, found = answers[is_intact(answers)], []
    for gate, calibrated in gates_of(answers):
        row = {"model": answers["model"].iloc[0], "split": answers["split"].iloc[0], "gate": gate.name}
        row |= {
            "low": gate.low,
            "high": gate.high,
            "calibrated_low": calibrated.low,
            "calibrated_high": calibrated.high,
        }
        for name, rows in (("intact", intact), ("speech", real)):
            values = rows[gate.name].to_numpy(float)
            known = np.isfinite(values)
            row[name] = gate.passes(values[known]).mean() if known.any() else np.nan
            row[f"{name}_calibrated"] = calibrated.passes(values[known]).mean() if known.any() else np.nan
        found.append(row | {"answers": len(intact), "clips": len(real), "speakers": intact["speaker"].nunique()})
    return table(found, COLUMNS["lm_gates"]).replace([np.inf, -np.inf], np.nan)


def compared(at: Context, answers: pd.DataFrame) -> list[dict[str, Any]]:
    """The most acoustic heads off, against as many that another order takes; and the voice with a few of them off.

    Where an order speaks with more draws than its rival, the common ones count.
    """
    heads = answers[(answers["granularity"] == "heads") & (answers["repair"] == "zero")]
    guided, found = heads[heads["order"] == "acoustic_first"], []
    for share, mine in guided.groupby("share"):
        for rival in RIVALS:
            other = heads[(heads["order"] == rival) & (heads["share"] == share)]
            about = {"family": STAGE, "a": "acoustic_first", "b": rival, "share": share}
            found += versus(mine, other, WORDS, at.cfg, about)
        found += _voice(at, answers, heads, mine, float(share))
    return found


def _voice(
    at: Context, answers: pd.DataFrame, heads: pd.DataFrame, mine: pd.DataFrame, share: float
) -> list[dict[str, Any]]:
    """Whether the voice shifts: against the intact model's, and against as many heads off at random."""
    found = []
    random = heads[(heads["order"] == "random") & (heads["share"] == share)]
    for name, rows in (("intact", answers[is_intact(answers)]), ("random", random)):
        about = {"family": STAGE, "a": "acoustic_first", "b": name, "share": share}
        records = versus(mine, rows, (SIMILARITY_PROMPT, SIMILARITY_INTACT), at.cfg, about)
        found += [{**record, "family": "lm_pruning, voice"} for record in records]  # corrected together
    return found


def tabulate(at: Context) -> Tabulated:
    """The stage's tables, and what its findings rest on."""
    read = {name: at.inputs.csv(f"scores/{at.target}.lm_{name}.csv") for name in RAW}
    answers = with_gates(read["pruned_answers"])
    rows, prunable = pruning_table(at, read["nats"], answers), prunable_table(at, answers)
    removal = read["removal"]
    heard = {"clips": read["nats"]["id"].nunique(), "speakers": read["nats"]["speaker"].nunique()}
    found = {
        "lm_pruning": rows,
        "lm_prunable": prunable,
        "lm_codebooks": codebooks_table(at, read["codebook_answers"]),
        "lm_removal": table(records(removal.assign(**heard)), COLUMNS["lm_removal"]),
        "lm_gates": gates_table(answers, read["real_speech"]),
    }
    facts = {"prunable": records(prunable), "removal": records(found["lm_removal"])}
    facts["codebooks"] = records(found["lm_codebooks"])
    return Tabulated(found, {"pruning": facts}, compared(at, answers))


RAW = ("nats", "pruned_answers", "real_speech", "codebook_answers", "removal")


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """How far the orders of heads can go; whether guidance beats its rivals; whether the voice shifts."""
    lines = [line for measure in WORDS for line in _how_far(facts["pruning"]["prunable"], measure)]
    names = {m.name: m for m in (*WORDS, SIMILARITY_PROMPT, SIMILARITY_INTACT)}
    for record in facts["comparisons"]:
        if not record["family"].startswith("lm_pruning") or record.get("a") != "acoustic_first":
            continue
        measure, (verdict, words) = names[record["measure"]], said(record)
        if record["family"].endswith("voice"):
            if record["share"] <= SHIFTED or record["b"] == "intact":
                lines.append(_shift(record, measure, verdict))
            continue
        text = (
            f"With {record['share']:.0%} of its heads off, the most acoustic first {words} {ORDERS[record['b']]}, in "
        )
        text += f"{measure.said}."
        cell = (f"most acoustic first against {ORDERS[record['b']]}", f"{measure.said}, {record['share']:.0%} off")
        lines.append(headline(STAGE, verdict, text, counted_prompts(record, measure), cell, difference(record)))
    return lines


def _shift(record: dict[str, Any], measure: Measure, verdict: str) -> dict[str, Any]:
    """Whether the voice is another; version 1 heard one at 5 % of heads. A shift speaks for its claim."""
    rival = "the intact model" if record["b"] == "intact" else "as many heads off at random"
    shifted = verdict == "negative"
    text = f"With the most acoustic {record['share']:.0%} of heads off, the voice "
    text += "shifts" if shifted else "is not shown to shift"
    text += f" against {rival}, in {measure.said}."
    cell = (f"the voice shifts against {rival}", f"{measure.said}, {record['share']:.0%} off")
    verdict = "positive" if shifted else "negative" if verdict == "positive" else "undecided"
    return headline(STAGE, verdict, text, counted_prompts(record, measure), cell, difference(record))


def _how_far(rows: list[dict[str, Any]], measure: Measure) -> list[dict[str, Any]]:
    """One sentence on every order of heads that are zeroed."""
    found = [r for r in rows if (r["granularity"], r["repair"], r["measure"]) == ("heads", "zero", measure.name)]
    if not found:
        return []
    said = [f"{ORDERS[row['order']]} {row['largest_share']:.0%}" for row in found if row["order"] != "random"]
    text = f"Heads that can be off before {measure.said} may be {MARGIN:.2f} worse (upper 95 % bound): "
    text += listed(said or [f"at random {found[0]['largest_share']:.0%}"]) + "."
    low, high = found[0]["random_low"], found[0]["random_high"]
    detail = "" if low is None else f"at random, by the draw, {low:.0%} to {high:.0%}; "
    detail += f"{min(r['prompts'] for r in found)} prompts, {min(r['answers'] for r in found)} answers or more an order"
    return [headline(STAGE, "measured", text, detail)]
