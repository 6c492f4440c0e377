"""The feature that tells a label best."""

import numpy as np
import pandas as pd
import pytest

from eqknobs.errors import EqknobsError
from eqknobs.stages.label_search import checks
from eqknobs.stages.label_search.compute import Samples, Thresholds, f1_of, permuted, search

CFG = {"properties": ["sex"], "frames": 100, "least": 3, "shuffles": 10, "permutations": 199, "seed": 0}


def by_hand(values: np.ndarray, has: np.ndarray, floor: float) -> float:
    found = 0.0
    for column in values.T:
        limits = np.unique(column)
        for limit in [*limits[limits >= floor], max(floor, limits[0] - 1)]:
            found = max(found, f1_of(column > limit, has))
    return found


@pytest.mark.parametrize("floor", [0.0, -np.inf])
def test_the_best_threshold_is_the_best_of_all(floor: float) -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        values = rng.normal(size=(25, 6)).round(1)
        if floor == 0:
            values = np.maximum(values, 0)
        has = np.random.default_rng(seed).random(25) < 0.4
        column, threshold, f1 = Thresholds(values, floor).best(has)
        assert f1 == pytest.approx(by_hand(values, has, floor))
        assert f1_of(values[:, column] > threshold, has) == pytest.approx(f1)
        assert threshold >= floor


def samples(values: np.ndarray, speakers: int = 7) -> Samples:
    names = [f"s{i % speakers}" for i in range(len(values))]
    clips = pd.DataFrame({"id": [f"c{i:02}" for i in range(len(values))], "speaker": names, "split": "val"})
    return Samples(values, np.arange(len(values)), clips)


def test_a_label_of_speakers_moves_with_whole_speakers_one_of_clips_alone() -> None:
    one = samples(np.zeros((40, 1)))
    speaker = one.clips["speaker"].to_numpy()
    has = np.isin(speaker, ["s0", "s1", "s2"])
    moved = permuted(has, one, False, np.random.default_rng(1))
    assert moved.sum() == has.sum() and pd.Series(moved).groupby(speaker).nunique().max() == 1
    mixed = np.arange(40) % 3 == 0
    moved = permuted(mixed, one, False, np.random.default_rng(1))
    assert moved.sum() == mixed.sum() and pd.Series(moved).groupby(speaker).nunique().max() == 2


def test_labels_of_frames_are_shifted_inside_their_clip() -> None:
    one = samples(np.zeros((4, 1)))
    frames = Samples(np.zeros((40, 1)), np.repeat(np.arange(4), 10), one.clips)
    has = np.zeros(40, bool)
    has[:5] = True
    moved = permuted(has, frames, True, np.random.default_rng(0))
    assert moved[:10].sum() == 5 and not moved[10:].any() and (moved != has).any()


def test_a_real_feature_passes_and_noise_does_not() -> None:
    rng = np.random.default_rng(3)
    has = np.arange(60) % 2 == 0
    values = np.maximum(rng.normal(size=(60, 50)), 0)
    val, test = values.copy(), np.maximum(rng.normal(size=(60, 50)), 0)
    noise = search((samples(val), Thresholds(val, 0.0), has), (samples(test), has), False, CFG)
    assert noise["p"] > 0.02 and abs(noise["f1_test"] - np.mean(noise["shuffled"])) < 0.25
    val[:, 7] += 3 * has
    test[:, 7] += 3 * has
    found = search((samples(val), Thresholds(val, 0.0), has), (samples(test), has), False, CFG)
    assert found["column"] == 7 and found["f1_test"] > 0.85 and found["p"] == 1 / 200
    assert max(found["shuffled"]) < found["f1_test"] and noise["f1_val"] > noise["f1_test"]  # chosen on val


def test_a_property_that_is_no_category() -> None:
    config = {
        "run": {"targets": ["w.layer.0"]},
        "models": {"w": {"kind": "whisper"}},
        "saes": {"x": {}},
        "label_search": {"properties": ["centroid"]},
    }
    with pytest.raises(EqknobsError, match=r"label_search\.properties: 'centroid' is no category"):
        checks.check(config)
