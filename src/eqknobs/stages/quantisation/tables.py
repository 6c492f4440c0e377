"""What packed codecs cost (`quantisation.csv`), and how many bytes each plan needs to sound as the unquantised codec
does (`quantisation_equal_quality.csv`)."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from eqknobs.evidence import stats
from eqknobs.evidence.comparisons import compare
from eqknobs.evidence.estimates import (
    MEL_DISTANCE,
    SPEAKER_SIMILARITY,
    WER,
    IntervalsCfg,
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

STAGE = "quantisation"
COLUMNS = {
    "quantisation": "target part plan seed rounding bits_mean bytes bytes_resident mel_distance latent_error "
    "token_flip_rate wer speaker_similarity dnsmos decode_ratio budget clips heard_clips split speakers "
    "mel_distance_low mel_distance_high latent_error_low latent_error_high token_flip_rate_low token_flip_rate_high "
    "wer_low wer_high speaker_similarity_low speaker_similarity_high dnsmos_low dnsmos_high",
    "quantisation_equal_quality": "target part plan bytes_needed bytes_needed_low bytes_needed_high bytes_full "
    "bytes_needed_mel bytes_needed_similarity wer_difference wer_difference_low wer_difference_high wer_power clips "
    "heard_clips split speakers",
}
NOTHING: dict[str, Any] = {"quantisation": []}
LATENT_ERROR = Measure("latent_error", "latent_sq_error", "latent_sq_total", "lower", "latent error")
TOKEN_FLIP_RATE = Measure("token_flip_rate", "tokens_flipped", "tokens", "lower", "tokens changed")
DNSMOS = Measure("dnsmos", "dnsmos", None, "higher", "DNSMOS")
MEASURES = (MEL_DISTANCE, LATENT_ERROR, TOKEN_FLIP_RATE, WER, SPEAKER_SIMILARITY, DNSMOS)
MEL_WITHIN, SIMILARITY_WITHIN, WER_WITHIN = 0.2, 0.02, 0.05  # of the unquantised codec
PLANS = {
    "none": "not quantised",
    "uniform": "uniform",
    "guided": "SAE-guided",
    "map": "best map",
    "sensitivity": "measured sensitivity",
    "inverted": "inverted",
    "random": "random",
}
CLAIMED = ("guided", "map", "sensitivity")
RIVALS = ("uniform", "random", "inverted")
PARTS = {"decoder": "decoder alone", "codec": "whole codec"}
SHOWN = (MEL_DISTANCE.name, SPEAKER_SIMILARITY.name)  # of the comparisons, as findings; all are in summary.json
FEWEST = 5  # clips of a comparison: a bootstrap of fewer is far too sure
TOUCHING = 0.01  # of the log of bytes: as near as this to a uniform plan its own values count


def quantisation_table(at: Context, scores: pd.DataFrame, times: pd.DataFrame, measurable: bool) -> pd.DataFrame:
    """One row a condition."""
    ratios = (times["decode_seconds"] / times["decode_seconds_full"]).groupby(times["condition"]).mean()
    found = []
    keys = ["condition", "part", "plan", "seed", "rounding", "budget", "bits_mean", "bytes", "bytes_resident", "split"]
    for key, clips in groups(scores, keys):
        row = {"target": at.target, **key, **counts(clips), "heard_clips": _heard(clips)}
        for measure in MEASURES:
            row |= estimate(clips, measure, at.cfg)
        row["decode_ratio"] = float(ratios.get(key["condition"], 1.0 if key["plan"] == "none" else math.nan))
        found.append(row)
    return mark_words(table(found, COLUMNS["quantisation"]), measurable)


def _heard(clips: pd.DataFrame) -> int:
    if "speaker_similarity" not in clips:
        return 0
    return int(clips.loc[clips["speaker_similarity"].notna(), "id"].nunique())


# --- at equal bytes ----------------------------------------------------------------------------------------------


def at_bytes(rows: pd.DataFrame, size: float, measure: Measure) -> pd.DataFrame | None:
    """Clips of a curve of plans at a number of bytes: between the two plans around it each clip's numerator and
    denominator by a straight line in the logarithm of bytes.

    rows: of the curve. None where no two plans on which the measure was taken are around it.
    """
    needed = [measure.numerator, *([measure.denominator] if measure.denominator else [])]
    if not set(needed) <= set(rows):
        return None
    known = rows[rows[needed].notna().all(axis=1)]
    sizes = np.sort(known["bytes"].unique())
    if not len(sizes):
        return None
    gap = np.abs(np.log(sizes / size))
    nearest = sizes[gap.argmin()]
    if gap.min() <= TOUCHING:
        return known[known["bytes"] == nearest]
    if not sizes[0] < size < sizes[-1]:
        return None
    above = int(np.searchsorted(sizes, size))
    low, high = sizes[above - 1], sizes[above]
    share = math.log(size / low) / math.log(high / low)
    under, over = (known[known["bytes"] == end].set_index(["id", "speaker"])[needed] for end in (low, high))
    under, over = under.align(over, join="inner")
    return (under * (1 - share) + over * share).reset_index()


def _curve(rows: pd.DataFrame, plan: str, rounding: str) -> pd.DataFrame:
    """A plan's rows by the rounding that all share; at the ends, where all plans are one, the uniform ones."""
    rows = rows[rows["rounding"] == rounding]
    uniform = rows[rows["plan"] == "uniform"]
    if plan == "uniform":
        return uniform
    ends = uniform[uniform["budget"].isin([uniform["budget"].min(), uniform["budget"].max()])]
    return pd.concat([rows[rows["plan"] == plan], ends])


def _compared(at: Context, scores: pd.DataFrame, measurable: bool) -> list[dict[str, Any]]:
    """Each claimed plan against uniform (its curve at the same bytes), random and inverted, at every budget.

    A family is the claims of one plan against one rival by one measure: all parts and budgets. There are none of fewer
    than FEWEST clips.
    """
    rounding, found = at.own["rounding"], []
    measures = (MEL_DISTANCE, SPEAKER_SIMILARITY, *([WER] if measurable else []), DNSMOS)
    for part, rows in scores.groupby("part", sort=False):
        uniform = _curve(rows, "uniform", rounding)
        mixed = rows[rows["plan"] != "uniform"]
        for (name, budget), clips in mixed[mixed["plan"].isin(CLAIMED)].groupby(["plan", "budget"], sort=False):
            beside = mixed[mixed["budget"] == budget]
            for rival in RIVALS:
                for measure in measures:
                    if rival == "uniform":
                        others = at_bytes(uniform, clips["bytes"].iloc[0], measure)
                    else:
                        others = beside[beside["plan"] == rival]
                    if others is None or others.empty:
                        continue
                    record = compare(clips, others, measure, at.cfg)
                    if record and record["clips"] >= FEWEST:
                        family = f"quantisation, {name} against {rival}, {measure.name}"
                        what = {"property": None, "binning": None, "a": name, "b": rival}
                        where = {"part": part, "budget": float(budget), "bytes": int(clips["bytes"].iloc[0])}
                        found.append({"family": family, **where, **what, **record})
    return found


# --- equal quality -----------------------------------------------------------------------------------------------


class Lost(NamedTuple):
    """What a curve loses against the unquantised codec: by its bytes, descending, [plans, clips]."""

    bytes: NDArray[np.float64]
    lost: NDArray[np.float64]
    speakers: list[str]


def lost(curve: pd.DataFrame, full: pd.DataFrame, measure: Measure) -> Lost | None:
    """Of each plan of a curve (random ones: their mean) what each clip loses; None where nothing was measured."""
    if measure.numerator not in curve or measure.numerator not in full:
        return None
    sign = 1 if measure.better == "lower" else -1
    base = full.set_index("id")[measure.numerator].dropna()
    known = curve[curve[measure.numerator].notna() & curve["id"].isin(base.index)]
    if known.empty:
        return None
    merged = known.assign(lost=sign * (known[measure.numerator] - known["id"].map(base)))
    by_budget = merged.groupby(["budget", "id"])["lost"].mean().unstack()
    by_budget = by_budget.loc[:, by_budget.notna().all()]
    if by_budget.empty:
        return None
    sizes = known.groupby("budget")["bytes"].mean().loc[by_budget.index]
    order = np.argsort(-sizes.to_numpy(), kind="stable")
    speakers = full.drop_duplicates("id").set_index("id").loc[by_budget.columns, "speaker"].tolist()
    return Lost(sizes.to_numpy()[order].astype(float), by_budget.to_numpy()[order], speakers)


def bytes_needed(sizes: NDArray[Any], values: NDArray[Any], within: float) -> float:
    """The fewest bytes from which on a loss stays within a limit: down the curve to where it first leaves it, there by
    a straight line in the logarithm of bytes.

    sizes: descending [plans]; values [plans]. NaN where even the largest plan loses more; the smallest plan's bytes
    where none does.
    """
    out = np.flatnonzero(~(values <= within))
    if not len(out):
        return float(sizes[-1])
    if out[0] == 0:
        return math.nan
    after, before = out[0], out[0] - 1
    share = (within - values[before]) / (values[after] - values[before])
    return float(np.exp(np.log(sizes[before]) + share * np.log(sizes[after] / sizes[before])))


def _draws(found: Lost, cfg: IntervalsCfg, within: float) -> NDArray[np.float64]:
    """Bytes needed: the estimate, then one a bootstrap draw; infinite where even the largest plan loses more."""
    weights = stats.bootstrap_weights(found.speakers, cfg["bootstrap"], cfg["seed"])
    weights = np.vstack([np.ones(weights.shape[1]), weights])
    means = weights @ found.lost.T / weights.sum(1, keepdims=True)
    needed = np.array([bytes_needed(found.bytes, values, within) for values in means])
    return np.where(np.isnan(needed), np.inf, needed)


def power(low: float, high: float, effect: float) -> float:
    """Of a two-sided test at 5 %, whose 95 % interval is that wide, to find a difference of `effect`."""
    error = (high - low) / (2 * norm.ppf(0.975))
    if not math.isfinite(error) or error <= 0:
        return math.nan
    return float(norm.sf(norm.ppf(0.975) - effect / error) + norm.cdf(-norm.ppf(0.975) - effect / error))


def equal_quality(at: Context, scores: pd.DataFrame, measurable: bool) -> pd.DataFrame:
    """One row a part and plan: the bytes that it needs to stay within MEL_WITHIN and SIMILARITY_WITHIN of the
    unquantised codec, by its curve, and what the smallest heard plan with as many bytes costs in words."""
    found = []
    for part, rows in scores.groupby("part", sort=False):
        full = rows[rows["plan"] == "none"]
        for plan in [name for name in PLANS if name != "none" and (rows["plan"] == name).any()]:
            curve = _curve(rows, plan, at.own["rounding"])
            heard = _heard(rows[(rows["plan"] == plan)])
            row = {"target": at.target, "part": part, "plan": plan, "bytes_full": full["bytes"].iloc[0]}
            row |= {**counts(full), "heard_clips": heard, "split": full["split"].iloc[0]}
            losses = {
                "mel": (lost(curve, full, MEL_DISTANCE), MEL_WITHIN),
                "similarity": (lost(curve, full, SPEAKER_SIMILARITY) if heard else None, SIMILARITY_WITHIN),
            }
            drawn = {name: _draws(loss, at.cfg, within) for name, (loss, within) in losses.items() if loss is not None}
            row |= {f"bytes_needed_{name}": _finite(values[0]) for name, values in drawn.items()}
            both = np.maximum.reduce(list(drawn.values()))
            low, high = np.percentile(both[1:], [2.5, 97.5], method="inverted_cdf")
            row |= {"bytes_needed": _finite(both[0]), "bytes_needed_low": _finite(low)}
            row |= {"bytes_needed_high": _finite(high)}
            found.append(row | (_words(at, curve, full, both[0]) if measurable and heard else {}))
    return table(found, COLUMNS["quantisation_equal_quality"])


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _words(at: Context, curve: pd.DataFrame, full: pd.DataFrame, needed: float) -> dict[str, float]:
    """What the smallest heard plan of the curve with at least the bytes needed adds to WER, and the power to find
    WER_WITHIN with so many clips."""
    heard = curve[curve["errors"].notna() & (curve["bytes"] >= needed * (1 - TOUCHING))]
    if heard.empty:
        return {}
    record = compare(heard[heard["budget"] == heard["budget"].min()], full, WER, at.cfg)
    if record is None or record["clips"] < FEWEST:
        return {}
    names = ("wer_difference", "wer_difference_low", "wer_difference_high")
    found = dict(zip(names, (record["difference"], record["low"], record["high"]), strict=True))
    return found | {"wer_power": power(record["low"], record["high"], WER_WITHIN)}


# --- the stage ---------------------------------------------------------------------------------------------------


def tabulate(at: Context) -> Tabulated:
    """Tables and comparisons of one target."""
    words, scores = words_rule(at), at.inputs.scores(at.target, "quantisation")
    times = at.inputs.csv(f"scores/{at.target}.quantisation.time.csv")
    needed = equal_quality(at, scores, words["measurable"])
    return Tabulated(
        {
            "quantisation": quantisation_table(at, scores, times, words["measurable"]),
            "quantisation_equal_quality": needed,
        },
        {"words": words, "quantisation": records(needed)},
        _compared(at, scores, words["measurable"]),
    )


def megabytes(size: float | None) -> str:
    return "–" if size is None or not math.isfinite(size) else f"{size / 1e6:.2f} MB"


def _needed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many bytes each plan needs, and what the words then show; rows: of `equal_quality`."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        judged = any(row["bytes_needed_similarity"] is not None for row in own)
        limits = f"{MEL_WITHIN:g} dB of mel distance"
        limits += f" and {SIMILARITY_WITHIN:g} of speaker similarity" if judged else ""
        reached = [row for row in own if row["bytes_needed"] is not None]
        text = f"To stay within {limits} of the unquantised codec, the {PARTS[part]} "
        if reached:
            told = (f"{megabytes(row['bytes_needed'])} by the {PLANS[row['plan']]} plan" for row in reached)
            text += f"({megabytes(own[0]['bytes_full'])}) needs {listed(told)}."
        else:
            text += "is not small by any plan: none stays so near at the widths that were tried."
        missed = [row for row in own if row["bytes_needed"] is None]
        detail = []
        if missed and reached:
            names = listed(PLANS[row["plan"]] for row in missed)
            detail.append(f"not reached by what was tried{' or heard' if judged else ''}: {names}")
        if near := [row for row in missed if row["bytes_needed_mel"] is not None]:
            alone = listed(f"{PLANS[row['plan']]} {megabytes(row['bytes_needed_mel'])}" for row in near)
            detail.append(f"by mel distance alone: {alone}")
        detail += [
            f"95 % of {PLANS[row['plan']]}: "
            + " to ".join(megabytes(row[f"bytes_needed_{end}"]) for end in ("low", "high"))
            for row in reached
        ]
        detail.append(sample(own[0]) + (f", of which {own[0]['heard_clips']} heard" if judged else ", none heard"))
        lines.append(headline(STAGE, "measured", text, "; ".join(detail)))
        for row in own:
            if row["wer_difference"] is not None and row["wer_power"] is not None:
                text = f"By the {PLANS[row['plan']]} plan the {PARTS[part]} then adds "
                text += f"{number(row['wer_difference'], True)} to WER "
                text += f"{ends(row['wer_difference_low'], row['wer_difference_high'], True)}; a test with so many "
                text += f"clips finds a difference of {WER_WITHIN:g} with a power of {number(row['wer_power'])}."
                lines.append(headline(STAGE, "measured", text, f"{row['heard_clips']} clips heard"))
    return lines


def findings(at: Context, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes at equal quality, then whether each claimed plan beats uniform, random and inverted at equal bytes."""
    lines, measures = _needed(facts["quantisation"]), {measure.name: measure for measure in MEASURES}
    for record in facts["comparisons"]:
        if not record["family"].startswith("quantisation,") or record["measure"] not in SHOWN:
            continue
        measure, (verdict, words) = measures[record["measure"]], said(record)
        rival = f"the {PLANS[record['b']]} plan{'s' if record['b'] == 'random' else ''}"
        rival += " (its curve)" if record["b"] == "uniform" else ""
        text = (
            f"At {megabytes(record['bytes'])} ({record['budget']:g} bits on average) the {PLANS[record['a']]} plan of "
        )
        text += f"the {PARTS[record['part']]} {words} {rival}, in {measure.said}."
        row = f"{PLANS[record['a']]} against {PLANS[record['b']]}, {PARTS[record['part']]}"
        column = f"{record['budget']:g} bits, {measure.said}"
        lines.append(headline(STAGE, verdict, text, numbers(record, measure), (row, column), difference(record)))
    return lines
