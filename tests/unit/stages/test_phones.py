"""Features named after phones."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from eqknobs.config import DEFAULT, merge
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv
from eqknobs.stages.phones import checks
from eqknobs.stages.phones.compute import PhonesCfg, judged, named, score_phones, shifted_labels
from eqknobs.strict_yaml import read_yaml
from helpers.tiny_world import World, make_world

PHONE = np.array([0, 0, 0, 1, 1, 1, -1, -1, 2, 2])


def test_a_feature_is_named_after_the_phone_on_which_it_fires_most() -> None:
    code = np.zeros((10, 5))
    code[[0, 1, 2, 6, 7], 0] = 1  # phone 0; frames without a phone do not count
    code[[0, 3], 1] = 1  # half and half
    code[[8], 2] = 1  # too rare
    code[[3, 4, 0], 3] = 1  # two thirds phone 1
    assert named(csr_matrix(code), PHONE, 3, 0.5, 2).tolist() == [0, -1, -1, 1, -1]
    assert named(csr_matrix(code), PHONE, 3, 0.7, 2).tolist() == [0, -1, -1, -1, -1]


def test_any_match_and_the_strongest_named_feature() -> None:
    names = np.array([0, 1, -1, 2])
    code = np.zeros((10, 4))
    code[0, [0, 1]] = 1, 2  # the right name is there, the strongest is wrong
    code[3, [0, 1]] = 1, 2  # both right
    code[4, 2] = 9  # without a name
    code[6, 0] = 1  # no phone
    code[8, [2, 3]] = 9, 1  # the strongest has no name
    found = judged(csr_matrix(code), PHONE, names)
    assert np.flatnonzero(found["any_match"]).tolist() == [0, 3, 8]
    assert np.flatnonzero(found["top_feature"]).tolist() == [3, 8]


def test_shifted_labels_stay_in_their_clip() -> None:
    moved = shifted_labels(PHONE, np.array([6, 4]), np.random.default_rng(0))
    assert sorted(moved[:6]) == [0, 0, 0, 1, 1, 1] and sorted(moved[6:]) == [-1, -1, 2, 2]
    assert not np.array_equal(moved, PHONE)


def test_a_corpus_without_phones_is_refused_before_work() -> None:
    config = merge(read_yaml(DEFAULT), {"phones": {"purity": 0.5}, "saes": {"topk": {"targets": ["tiny-mimi.*"]}}})
    with pytest.raises(EqknobsError, match=r"hears a corpus of which no phones are known; give data\.phones"):
        checks.check(config)
    config["data"]["phones"] = "resources/corpus/phones.csv"
    checks.check(config)
    mix = {"none": {"source": "folder"}, "mix": {"source": "union", "of": ["none", "speech"]}}
    checks.check(merge(config, {"corpora": mix, "phones": {"corpora": ["mix"]}}))
    with pytest.raises(EqknobsError, match=r"give corpora\.none\.phones"):
        checks.check(merge(config, {"corpora": mix, "phones": {"corpora": ["none"]}}))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world whose labels have three phones, of which one is the sign of the first dimension."""
    made = make_world(tmp_path)
    with made.open() as cache:
        phone = (cache.acts[:, 0] > cache.mean[0]).astype(np.int16)
    phone[::7] = -1
    with h5py.File(made.labels, "r+") as file:
        file["phone"] = phone
        file["phone"].attrs["names"] = ["aa", "iy"]
    return made


def test_names_and_probes_are_scored_on_the_same_clips_of_test(world: World, tmp_path: Path) -> None:
    cfg: PhonesCfg = {"selection": "clip", "purity": 0.5, "min_firings": 2, "shifts": 1, "seed": 0}
    cfg |= {"l2": [0.01], "epochs": 20}
    score_phones(world.cache, world.labels, world.saes, tmp_path / "s.csv", tmp_path / "s.json", cfg)
    rows = read_csv(tmp_path / "s.csv")
    assert set(rows["split"]) == {"test"} and rows.groupby(["space", "method", "labels"]).size().nunique() == 1
    accuracy = rows.groupby(["space", "labels"])[["frames", "correct"]].sum().eval("correct / frames")
    assert set(rows.loc[rows["method"] == "probe", "space"]) == {"raw", "logmel", "sae:topk", "sae:rms_l1"}
    assert accuracy["raw", "true"] > accuracy["majority", "true"] + 0.1
    assert accuracy["raw", "shuffled"] < accuracy["raw", "true"] - 0.1
