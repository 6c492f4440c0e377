"""Features named after phones."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from eqknobs.errors import EqknobsError
from eqknobs.stages.phones import checks
from eqknobs.stages.phones.compute import judged, named, shifted_labels

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


def test_phones_that_are_not_probed() -> None:
    config = {"phones": {"purity": 0.5}, "saes": {"x": {}}, "probes": {"properties": ["centroid"]}}
    with pytest.raises(EqknobsError, match=r"phones: needs the property phone in probes\.properties"):
        checks.check(config)
