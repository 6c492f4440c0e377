"""Features of domains: labels, their nulls, and what leaving a source out does."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from eqknobs.errors import EqknobsError
from eqknobs.stages.domains import checks
from eqknobs.stages.domains.compute import (
    _map,
    find_domains,
    firing_counts,
    labelled,
    permuted_domains,
    shares,
)

CFG = {
    "splits": ["test"],
    "sources": "source",
    "selection": "clip",
    "frame_taus": [0.2, 0.04],
    "clip_taus": [0.5],
    "permutations": 30,
    "resamples": 30,
    "map_features": 200,
    "seed": 0,
}
NAMES = ["music", "sounds", "speech"]


def world(features: int = 60, clips: int = 10) -> tuple[np.ndarray, pd.DataFrame]:
    """Counts of three domains of three sources each: features 0–9 fire in speech, 10–19 in one source of music only,
    the others anywhere, half of them never."""
    rng = np.random.default_rng(0)
    rows = [(domain, f"{domain}{s}") for domain in NAMES for s in range(3) for _ in range(clips)]
    table = pd.DataFrame(rows, columns=["domain", "source"]).assign(frames=100)
    rate = np.full((len(rows), features), 0.1)
    rate[:, 40:] = 0
    rate[:, :20] = 0.02
    rate[(table["domain"] == "speech").to_numpy(), :10] = 0.4
    rate[(table["source"] == "music0").to_numpy(), 10:20] = 0.9
    return rng.binomial(100, rate).astype(float), table


def test_frames_on_which_a_feature_fires_are_counted_clip_by_clip() -> None:
    code = np.array([[0, 2.0], [1, 0], [1, 3], [0, 0], [0, 1]])
    np.testing.assert_array_equal(firing_counts(csr_matrix(code), np.array([3, 2])), [[2, 2], [0, 1]])


def test_a_share_is_the_mean_over_sources() -> None:
    counts = np.array([[10.0], [0], [0], [5]])
    of, source = np.array([0, 0, 0, 1]), np.array(["a", "b", "b", "c"])
    by_frame, by_clip = shares(counts, np.array([10.0, 10, 30, 10]), of, source)
    np.testing.assert_allclose(by_frame[:, 0], [0.5, 0.5])  # source a: 1, b: 0
    np.testing.assert_allclose(by_clip[:, 0], [0.5, 1])
    by_frame, _ = shares(counts, np.array([10.0, 10, 30, 10]), of, source, np.array([0, 1, 1, 1.0]))
    np.testing.assert_allclose(by_frame[:, 0], [0, 0.5])  # without a source the others stand for the domain


def test_labels_are_those_of_all_sets_of_domains() -> None:
    f = np.array([[0.5, 0.5, 0.1, 0.0], [0.1, 0.45, 0.1, 0.0], [0.1, 0.1, 0.1, 0.0]])
    assert labelled(f, 0.2).T.tolist() == [[True, False, False], [True, True, False], [False] * 3, [False] * 3]


def test_features_of_a_domain_are_found_and_those_of_one_source_fall() -> None:
    counts, clips = world()
    rows, found, members = find_domains(counts, clips, NAMES, CFG)
    label = {(r["level"], r["tau"], r["domain"]): r for r in found}
    has = rows.pivot(index="feature", columns="domain", values="frame_0.2")
    assert has.index[has["speech"]].tolist() == list(range(10))
    assert has.index[has["music"]].tolist() == list(range(10, 20))
    speech, music = label["frame", 0.2, "speech"], label["frame", 0.2, "music"]
    assert speech["left_out"] == 1 and music["left_out"] == 0
    assert speech["permuted_clips"] and np.mean(speech["permuted_clips"]) < 0.02 < 10 / 60
    assert np.mean(music["permuted"]) >= np.mean(music["permuted_clips"])  # one source makes labels wherever it goes
    assert abs(np.mean(speech["draws"]) - 10 / 60) < 0.02
    assert members.shape == (3, 60) and members[2, :10].all()
    assert not rows.loc[rows["feature"] >= 40, "frame_0.04"].any()  # a dead feature has no domain


def test_permuted_domains_keep_sources_whole() -> None:
    _, clips = world()
    of = clips["domain"].map({name: i for i, name in enumerate(NAMES)}).to_numpy()
    moved = permuted_domains(of, clips["source"].to_numpy(), np.random.default_rng(3))
    assert (clips.assign(moved=moved).groupby("source")["moved"].nunique() == 1).all()
    assert np.bincount(moved).tolist() == np.bincount(of).tolist() and (moved != of).any()


def test_the_map_tells_labels_apart_where_rows_do() -> None:
    rng = np.random.default_rng(0)
    members = np.zeros((2, 140), bool)
    members[0, :70], members[1, 70:130] = True, True
    rows = rng.normal(size=(140, 12)) + np.where(members[0], 2, -2)[:, None] * np.eye(12)[0]
    drawn = _map(rows, members, 200, 0)
    assert drawn and len(drawn["x"]) == 130 and drawn["silhouette"] > max(drawn["silhouette_shuffled"]) + 0.1
    assert _map(rows, members[:, :20], 200, 0) is None


@pytest.mark.parametrize("corpora", [{}, {"mix": {"of": ["speech"]}}])
def test_a_corpus_that_is_no_union(corpora: dict) -> None:
    config = {
        "run": {"targets": ["w.layer.0"]},
        "models": {"w": {"kind": "whisper"}},
        "saes": {"x": {}},
        "corpora": corpora,
        "domains": {"corpus": "mix"},
    }
    with pytest.raises(EqknobsError, match=r"domains\.corpus: .*'mix'"):
        checks.check(config)
