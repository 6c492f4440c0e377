"""Intervals that respect how speech is sampled (utterances nested in speakers), and Holm's correction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eqknobs.errors import EqknobsError


def bootstrap_weights(speakers: Sequence[str], n: int, seed: int) -> NDArray[np.float64]:
    """Multiplicities of each utterance in `n` two-stage bootstrap draws, [n, utterances].

    Speakers are drawn with replacement, then utterances with replacement inside every drawn copy of a
    speaker (Davison & Hinkley 1997, §3.8). `speakers` holds the speaker of each utterance. A statistic that
    is a ratio of sums is then `(weights @ numerator) / (weights @ denominator)`. Raises EqknobsError when
    there is no utterance.
    """
    _, index, sizes = np.unique(np.asarray(speakers, dtype=str), return_inverse=True, return_counts=True)
    if len(index) == 0:
        raise EqknobsError("no utterance to bootstrap: the split is empty; raise data.max_utterances")
    rng = np.random.default_rng(seed)
    copies = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=n)  # [n, speakers]
    weights = np.empty((n, len(index)))
    for speaker, size in enumerate(sizes):
        # m copies, each an independent draw of `size` utterances, are together one draw of m * size.
        weights[:, index == speaker] = rng.multinomial(copies[:, speaker] * size, np.full(size, 1 / size))
    return weights


def interval(values: ArrayLike) -> tuple[float, float]:
    """95 % percentile interval of bootstrap values; undefined draws (NaN) are left out."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if len(found) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _ratios(weights: NDArray, numerator: ArrayLike, denominator: ArrayLike) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights @ np.asarray(numerator, float)) / (weights @ np.asarray(denominator, float))


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, speakers: Sequence[str], n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of Σ numerator / Σ denominator (accuracy, WER, FVU), one entry per utterance."""
    return interval(_ratios(bootstrap_weights(speakers, n, seed), numerator, denominator))


class Difference(NamedTuple):
    """A paired difference with its 95 % interval and two-sided bootstrap p-value."""

    difference: float
    low: float
    high: float
    p: float


def paired_difference(
    numerator_a: ArrayLike,
    denominator_a: ArrayLike,
    numerator_b: ArrayLike,
    denominator_b: ArrayLike,
    speakers: Sequence[str],
    n: int = 1000,
    seed: int = 0,
) -> Difference:
    """Difference of two ratios of sums, a − b, measured on the same utterances and resampled together.

    p is twice the smaller share of draws on either side of zero, (count + 1) / (n + 1), at most 1.
    """
    terms = [(1, numerator_a, denominator_a), (-1, numerator_b, denominator_b)]
    return combined_difference(terms, speakers, n, seed)


def combined_difference(
    terms: Sequence[tuple[int, ArrayLike, ArrayLike]], speakers: Sequence[str], n: int = 1000, seed: int = 0
) -> Difference:
    """As `paired_difference`, of any signed sum of ratios of sums: terms (sign, numerator, denominator)."""
    weights = bootstrap_weights(speakers, n, seed)
    ones = np.ones((1, weights.shape[1]))
    draws = np.sum([sign * _ratios(weights, top, bottom) for sign, top, bottom in terms], axis=0)
    difference = np.sum([sign * _ratios(ones, top, bottom) for sign, top, bottom in terms], axis=0).item()
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0 or not np.isfinite(difference):
        return Difference(difference, float("nan"), float("nan"), float("nan"))
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return Difference(difference, *interval(draws), min(1.0, 2 * (tail + 1) / (len(draws) + 1)))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down adjusted p-values, in the order given; NaN stays NaN and counts as no test."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted
