"""The importance map against its definition, and the ablations that test it."""

import numpy as np
import pytest

from eqknobs.io import read_csv, read_json
from eqknobs.stages.importance.compute import (
    ablation,
    composition,
    importance_conditions,
    importance_maps,
    removal_orders,
    render_importance,
)
from helpers.tiny_world import WIDTH, make_world

CFG = {"codebooks": 4, "removed": [0.25, 0.5], "word_removed": [0.5], "random_sets": 5, "word_random_sets": 2}
CFG |= {"modes": ["mean", "zero"], "seed": 0}


@pytest.fixture
def weights():
    rng = np.random.default_rng(1)
    return rng.standard_normal((7, 5)), rng.standard_normal((3, 7)), rng.standard_normal((3, 5))


def test_composition_is_the_double_sum(weights):
    w_enc, w_probe, _ = weights
    expected = np.zeros(5)
    for i in range(5):
        for j in range(7):
            expected[i] += abs(w_enc[j, i]) * sum(abs(w_probe[k, j]) for k in range(3))
    np.testing.assert_allclose(composition(w_enc, w_probe), expected / expected.max())


def test_maps(weights):
    std = np.array([1, 2, 3, 4, 0.5])
    maps = importance_maps(*weights, std)
    assert sorted(maps) == ["composition", "inverted", "raw_probe", "variance"]
    raw = np.abs(weights[2]).sum(0)
    np.testing.assert_allclose(maps["raw_probe"], raw / raw.max())
    np.testing.assert_allclose(maps["variance"], std**2 / 16)


def test_orders():
    values = np.array([0.5, 0.1, 1.0, 0.5])  # with a tie
    orders = removal_orders({"composition": values, "inverted": 1 - values}, random_sets=20, seed=3)
    assert orders["composition", None].tolist() == [1, 0, 3, 2]
    assert orders["inverted", None].tolist() == [2, 3, 0, 1]
    random = [tuple(orders["random", i]) for i in range(20)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in random) and len(set(random)) > 5
    again = removal_orders({"composition": values}, random_sets=20, seed=3)
    assert [tuple(again["random", i]) for i in range(20)] == random
    other = removal_orders({"composition": values}, random_sets=20, seed=4)
    assert [tuple(other["random", i]) for i in range(20)] != random


def test_ablation_touches_only_what_it_removes():
    rng = np.random.default_rng(0)
    acts, mean = rng.standard_normal((9, 4)).astype(np.float32), np.array([1.0, 2.0, 3.0, 4.0])
    before = acts.copy()
    removed = np.array([3, 1])
    by_mean, by_zero = ablation(removed, "mean", mean)(acts), ablation(removed, "zero", mean)(acts)
    assert (by_mean[:, 3] == 4).all() and (by_mean[:, 1] == 2).all() and (by_zero[:, removed] == 0).all()
    assert (by_mean[:, [0, 2]] == acts[:, [0, 2]]).all() and (acts == before).all()
    nothing = ablation(np.array([], dtype=int), "mean", mean)(acts)
    assert (nothing == acts).all()
    # Frames whose average is the train mean keep their average.
    centred = (acts - acts.mean(0) + mean).astype(np.float32)
    np.testing.assert_allclose(ablation(removed, "mean", mean)(centred).mean(0), mean, rtol=1e-5)


def test_conditions():
    width = 20
    rng = np.random.default_rng(0)
    values = np.r_[np.full(7, 0.1), np.full(10, 0.5), np.full(3, 0.9)]  # 7 expendable, 3 critical
    values += rng.random(width) / 100
    maps = {"composition": values, "raw_probe": rng.random(width), "variance": rng.random(width)}
    maps["inverted"] = 1 - values
    conditions = importance_conditions(maps, np.zeros(width), CFG)
    columns = [{**c.columns, "keep": c.keep, "edit": c.edit} for c in conditions]
    assert len({c.key for c in conditions}) == len(conditions) == 2 + (4 + 5) * 2 * 3
    assert {c["removed_dims"] for c in columns} == {0, 17, 5, 7, 10}
    assert all(c["removed"] == c["removed_dims"] / width for c in columns)
    heard = {(c["map"], c["mode"], c["removed_dims"], c["seed"]) for c in columns if c["keep"]}
    maps_heard = [("composition", None), ("raw_probe", None), ("inverted", None), ("random", 0), ("random", 1)]
    expected = {(name, "mean", count, seed) for name, seed in maps_heard for count in (7, 10)}
    assert heard == expected | {("none", "none", 0, None), ("keep_critical", "mean", 17, None)}
    acts = np.ones((2, width), np.float32)
    for c in columns:
        if c["map"] == "none":
            assert c["edit"] is None
            continue
        removed = (c["edit"](acts) == 0).all(0)
        assert removed.sum() == c["removed_dims"]
        if c["map"] == "composition" and c["removed_dims"] == 7:
            assert removed[:7].all()
        if c["map"] == "inverted" and c["removed_dims"] == 7:
            assert removed[17:].all() and not removed[:7].any()
        if c["map"] == "keep_critical":
            assert removed[:17].all() and not removed[17:].any()


def test_stage(tmp_path):
    world = make_world(tmp_path)
    cfg = {**world.cfg, **CFG, "sae": "topk", "clips": 2, "random_sets": 2, "word_random_sets": 1}
    render_importance(
        world.manifest,
        world.cache,
        world.saes,
        world.probes["centroid"],
        tmp_path / "map.json",
        tmp_path / "sounds",
        tmp_path / "signal.csv",
        cfg,
    )
    found = read_json(tmp_path / "map.json")
    values = np.array(found["maps"]["composition"])
    assert len(values) == found["width"] == sum(found["counts"].values()) == WIDTH and values.max() == 1
    assert found["counts"]["expendable"] == (values < 0.3).sum()
    assert found["counts"]["critical"] == (values >= 0.7).sum()
    signal, index = read_csv(tmp_path / "signal.csv"), read_csv(tmp_path / "sounds/index.csv")
    assert {"map", "mode", "removed", "removed_dims", "seed"} <= set(signal)
    # Removing more never lowers the latent error: the sets of one map are nested.
    mean = signal[signal["mode"] == "mean"]
    for _, rows in mean[mean["map"] != "keep_critical"].groupby(["map", "seed", "id"], dropna=False):
        assert rows.sort_values("removed")["latent_sq_error"].is_monotonic_increasing
    nothing = signal[signal["map"] == "none"]
    assert (nothing["latent_sq_error"] == 0).all() and len(nothing) == 2
    assert index["judged"].all() and {"none", "keep_critical", "composition"} <= set(index["map"])
