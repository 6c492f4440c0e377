import numpy as np
import pytest

from eqknobs.errors import EqknobsError
from eqknobs.evidence.stats import bootstrap_weights, holm, interval, paired_difference, ratio_interval


def test_weights_resample_speakers_then_their_utterances():
    speakers = ["a"] * 3 + ["b"] * 5
    weights = bootstrap_weights(speakers, 4000, seed=1)
    assert weights.shape == (4000, 8)
    copies_a, copies_b = weights[:, :3].sum(1) / 3, weights[:, 3:].sum(1) / 5
    assert np.array_equal(copies_a + copies_b, np.full(4000, 2.0))  # two speakers drawn each time, whole copies
    assert copies_a.mean() == pytest.approx(1, abs=0.05)
    assert weights.mean(0) == pytest.approx(np.ones(8), abs=0.1)
    assert len(np.unique(weights[copies_a == 1][:, :3], axis=0)) == 10  # multisets of 3 out of 3


def test_weights_follow_the_seed():
    speakers = ["a", "a", "b", "c"]
    assert np.array_equal(bootstrap_weights(speakers, 50, 3), bootstrap_weights(speakers, 50, 3))
    assert not np.array_equal(bootstrap_weights(speakers, 50, 3), bootstrap_weights(speakers, 50, 4))
    with pytest.raises(EqknobsError, match="empty"):
        bootstrap_weights([], 10, 0)


def test_interval_percentiles_and_nan():
    low, high = interval(np.arange(1001))
    assert (low, high) == (25, 975)
    assert interval([1.0, 1.0, np.nan]) == (1.0, 1.0)
    assert np.isnan(interval([np.nan])).all()


def test_interval_covers_the_truth_and_speakers_matter():
    """Accuracy differs between speakers: an interval that resamples utterances alone is too narrow."""
    rng = np.random.default_rng(0)
    covered = {"speakers": 0, "utterances": 0}
    trials, n_speakers, each = 150, 15, 12
    for trial in range(trials):
        level = np.clip(0.5 + 0.15 * rng.standard_normal(n_speakers), 0, 1)
        correct = rng.binomial(20, np.repeat(level, each))
        frames = np.full(n_speakers * each, 20)
        names = np.repeat(np.arange(n_speakers), each).astype(str)
        for kind, units in (("speakers", names), ("utterances", np.arange(len(names)).astype(str))):
            low, high = ratio_interval(correct, frames, units, n=300, seed=trial)
            covered[kind] += low <= 0.5 <= high
    assert covered["speakers"] / trials > 0.86
    assert covered["utterances"] / trials < 0.6


def test_ratio_interval_of_a_constant_and_of_one_speaker():
    assert ratio_interval([1, 2, 3], [2, 4, 6], ["a", "b", "b"], n=50) == (0.5, 0.5)
    low, high = ratio_interval([0, 1, 0, 1], [1, 1, 1, 1], ["a"] * 4, n=500)
    assert low < 0.5 < high  # utterances still vary


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(20), 5).astype(str)
    base = rng.integers(10, 90, 100)  # varies much more between utterances than between the two systems
    frames = np.full(100, 100)
    better = paired_difference(base + 2, frames, base, frames, names, n=500, seed=0)
    assert better.difference == pytest.approx(0.02)
    assert better.low == pytest.approx(0.02) and better.high == pytest.approx(0.02)
    assert better.p == pytest.approx(2 / 501)
    noise = rng.integers(-5, 6, 100)
    equal = paired_difference(base + noise, frames, base, frames, names, n=500, seed=0)
    assert equal.low < 0 < equal.high and equal.p > 0.05
    same = paired_difference(base, frames, base, frames, names, n=100, seed=0)
    assert same.p == 1 and same.difference == 0


def test_holm():
    # Worked example: sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04 -> monotone .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    adjusted = holm([0.01, np.nan, 0.04])
    assert np.isnan(adjusted[1]) and adjusted[[0, 2]] == pytest.approx([0.02, 0.04])
    assert len(holm([])) == 0
