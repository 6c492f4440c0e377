"""Overlap of firing patterns, its nulls, and the table made of it."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from eqknobs.errors import EqknobsError
from eqknobs.stages.stability.compute import Firing, aligned, by_rate, compare_features, overlap, redrawn, shifted
from eqknobs.stages.stability.pairs import pairs_of

CFG = {
    "pairs": [],
    "homes": {},
    "split": "test",
    "selection": "clip",
    "thetas": [0.5],
    "min_firings": 20,
    "shifts": 3,
    "resamples": 50,
    "seed": 0,
}


def patterns(frames: int = 600, features: int = 40, rate: float = 0.1, seed: int = 0) -> np.ndarray:
    """Runs of firing, as speech has them, float32 [frames, features]."""
    noise = np.random.default_rng(seed).normal(size=(frames + 4, features))
    smooth = sum(noise[i : i + frames] for i in range(5))
    return (smooth > np.quantile(smooth, 1 - rate, axis=0)).astype(np.float32)


def fired(on: np.ndarray, clips: int = 6) -> Firing:
    names = [f"c{i}" for i in range(clips)]
    table = pd.DataFrame(
        {"id": names, "speaker": [f"s{i // 2}" for i in range(clips)], "split": "test", "frames": len(on) // clips}
    )
    return Firing(csr_matrix(on), table)


def by_hand(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    both = (a[:, :, None] * b[:, None, :]).sum(0)
    either = np.maximum(a[:, :, None], b[:, None, :]).sum(0)
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


@pytest.mark.parametrize("rate", [0.03, 0.5])  # by sparse and by dense products
def test_overlap_is_the_best_intersection_over_union(rate: float) -> None:
    a, b = patterns(rate=rate), patterns(rate=rate, features=25, seed=1)
    chi = by_hand(a, b)
    best, found = overlap(csr_matrix(a), csr_matrix(b))
    np.testing.assert_allclose(best, chi.max(1), atol=1e-6)
    np.testing.assert_array_equal(found[best > 0], chi.argmax(1)[best > 0])


def test_a_draw_counts_a_clip_as_often_and_keeps_the_matches() -> None:
    one, other = patterns(), patterns(seed=1)
    a, b = fired(one), fired(other)
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 0, 3, 0, 1]])
    best, found = overlap(a.on, b.on)
    drawn = redrawn(a.on, b.on[:, found], a.clips, weights)
    np.testing.assert_allclose(drawn[0], best, atol=1e-6)
    rows = np.repeat(np.arange(600), np.repeat(weights[1], 100))
    chi = by_hand(one[rows], other[rows])
    np.testing.assert_allclose(drawn[1], chi[np.arange(40), found], atol=1e-6)


def test_features_found_again_and_what_luck_finds() -> None:
    on = patterns(features=40)
    other = patterns(features=40, seed=5)
    other[:, :10] = on[:, :10][:, ::-1]  # ten of forty are the same, in another order
    found = compare_features(fired(on), fired(other), (None, None), False, CFG)
    best, shift, rate = (np.array(found["features"][name]) for name in ("best", "shift", "rate"))
    assert (best > 0.5).sum() == 10 and (shift > 0.5).sum() == 0 and (rate > 0.5).sum() == 0
    assert found["features"]["found"][:10] == list(range(9, -1, -1))
    assert found["all_covered"] == {"0.5": 10} and found["d_sae"] == 40 and found["clips"] == 6
    assert len(found["coverage"]["0.5"]) == 50 and 0.2 < np.mean(found["coverage"]["0.5"]) < 0.3


def test_rare_features_do_not_count() -> None:
    on = patterns()
    on[:, 3] = 0
    on[:19, 3] = 1
    assert 3 not in compare_features(fired(on), fired(on), (None, None), False, CFG)["features"]["feature"]


def test_duplicates_are_other_features_that_fire_alike() -> None:
    on = patterns()
    on[:, 7] = on[:, 2]
    features = pd.DataFrame(compare_features(fired(on), fired(patterns(seed=3)), (None, None), False, CFG)["features"])
    assert list(features.loc[features["duplicate"] > 0.5, "feature"]) == [2, 7]


def test_rates_alone() -> None:
    np.testing.assert_allclose(by_rate(np.array([50.0]), np.array([10.0, 50.0]), 100), [0.25 / 0.75])


def test_a_shift_stays_inside_its_clip_and_keeps_rates() -> None:
    one = fired(patterns())
    moved = shifted(one, np.random.default_rng(0))
    for first in range(0, 600, 100):
        before, after = one.on[first : first + 100].toarray(), moved[first : first + 100].toarray()
        np.testing.assert_array_equal(before.sum(0), after.sum(0))
        assert not np.array_equal(before, after)


def test_clips_of_two_models_are_cut_to_the_shorter() -> None:
    on = patterns()
    a, b = fired(on), fired(on)
    b = Firing(b.on, b.clips.assign(frames=[99, 101, 100, 100, 100, 100]))
    cut_a, cut_b = aligned(a, b)
    assert list(cut_a.clips["frames"]) == [99, 100, 100, 100, 100, 100]
    np.testing.assert_array_equal(cut_b.on[:99].toarray(), on[:99])
    np.testing.assert_array_equal(cut_b.on[99:199].toarray(), on[99:199])
    half = Firing(csr_matrix(on[::2]), a.clips.assign(frames=50))
    with pytest.raises(EqknobsError, match="number of frames a second"):
        aligned(a, half)


def test_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"kind": "whisper"}
    config = {
        "run": {"targets": ["w.layer.0", "w.layer.2", "h.layer.2"]},
        "models": {"w": model, "h": {"kind": "hubert"}},
        "saes": {"x": {}, "y": {"targets": ["w.layer.0"]}},
        "sae_seeds": [1, 0],
        "stability": {"pairs": ["seeds", "layers", "models"], "corpora": ["speech"]},
    }
    first = [tuple(pair) for pair in pairs_of(config, "w.layer.0")]
    assert ("layers", "x", "w.layer.0", 0, "w.layer.2", 0) in first
    assert ("seeds", "y", "w.layer.0", 1, "w.layer.0", 0) in first
    assert not [pair for pair in first if pair[0] == "models" or (pair[0] == "layers" and pair[1] == "y")]
    second = [tuple(pair) for pair in pairs_of(config, "w.layer.2")]
    assert [pair for pair in second if pair[0] != "seeds"] == [("models", "x", "w.layer.2", 0, "h.layer.2", 0)]
