"""The importance map against its definition, and the ablations that test it."""

from itertools import product

import numpy as np
import pytest

from eqknobs.io import read_csv, read_json
from eqknobs.models.mimi import Mimi
from eqknobs.schema import schema
from eqknobs.sound import mel
from eqknobs.sound.metrics import mel_distance
from eqknobs.sound.renders import load_clip
from eqknobs.stages.importance.compute import importance_conditions, render_importance
from eqknobs.stages.importance.maps import (
    GRADIENTS,
    MAPS,
    SCALED,
    WEIGHTS,
    MapFiles,
    ablation,
    ablation_effects,
    choose,
    composition,
    compute_maps,
    gradient_effects,
    importance_maps,
    removal_orders,
    segment,
    val_parts,
)
from eqknobs.stages.importance.tables import MAPS as SAID
from eqknobs.stages.importance.tables import good_enough, rank_correlation
from helpers.tiny_world import SITE, WIDTH, make_world

CFG = {"codebooks": 4, "removed": [0.25, 0.5], "word_removed": [0.5], "random_sets": 5, "word_random_sets": 2}
CFG |= {"modes": ["mean", "zero"], "seed": 0}
MAKING = {"sae": "topk", "maps": list(MAPS), "gradient_clips": 2, "oracle_clips": 1, "segment_seconds": 0.2}
MAKING |= {"val_clips": 1, "word_random_sets": 2}


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
    assert tuple(maps) == (*WEIGHTS, *SCALED)
    raw = np.abs(weights[2]).sum(0)
    np.testing.assert_allclose(maps["raw_probe"], raw / raw.max())
    np.testing.assert_allclose(maps["variance"], std**2 / 16)


def test_maps_in_raw_units_undo_the_normaliser(weights):
    w_enc, w_probe, w_raw = weights
    std = np.array([1, 2, 3, 4, 0.5])
    maps = importance_maps(w_enc, w_probe, w_raw, std)
    # An encoder of raw latents has the weights W / std; its probe's are those on features, which have no unit.
    np.testing.assert_allclose(maps["composition_raw"], composition(w_enc / std, w_probe))
    # var_i · (W / std)_i: the pattern of a readout, whose filter are the weights.
    np.testing.assert_allclose(maps["composition_scaled"], composition(w_enc / std * std**2, w_probe))
    pattern = np.abs(w_raw / std * std**2).sum(0)
    np.testing.assert_allclose(maps["raw_probe_scaled"], pattern / pattern.max())


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
    conditions = importance_conditions(maps, "raw_probe", np.zeros(width), CFG)
    columns = [{**c.columns, "keep": c.keep, "edit": c.edit} for c in conditions]
    assert len({c.key for c in conditions}) == len(conditions) == 2 + (4 + 5) * 2 * 3
    assert {c["removed_dims"] for c in columns} == {0, 17, 5, 7, 10}
    assert all(c["removed"] == c["removed_dims"] / width for c in columns)
    heard = {(c["map"], c["mode"], c["removed_dims"], c["seed"]) for c in columns if c["keep"]}
    maps_heard = [(name, None) for name in ("composition", "raw_probe", "inverted", "variance")]
    maps_heard += [("random", 0), ("random", 1)]
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


def test_what_val_chooses_is_heard_too():
    maps = {name: np.random.default_rng(i).random(8) for i, name in enumerate(MAPS)}
    for chosen in ("gradient", "fisher"):
        heard = {c.columns["map"] for c in importance_conditions(maps, chosen, np.zeros(8), CFG) if c.keep}
        assert heard & set(GRADIENTS) == {chosen} and "ablation" in heard


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("importance"))


@pytest.fixture
def opened(world):
    with world.open() as cache:
        model = world.model()
        (_, row, *_) = world.clips("val").itertuples(index=False)
        yield model, cache, load_clip(model, cache, row)


def test_a_segment_is_the_middle_of_sound_and_activations(opened):
    model, _, clip = opened
    part = segment(model, SITE, clip, 0.2)
    hop, frames = model.site(SITE).hop, part.acts.shape[1]
    assert frames == model.frames(round(0.2 * model.sample_rate), SITE) < len(clip.acts)
    first = next(i for i in range(len(clip.acts)) if (clip.acts[i : i + frames] == part.acts[0].numpy()).all())
    assert first > 0 and (part.wav[0].numpy() == clip.wav[first * hop : (first + frames) * hop]).all()
    assert (segment(model, SITE, clip, 60).acts[0].numpy() == clip.acts).all()


@pytest.mark.parametrize("codebooks", [4, None])
def test_the_oracle_is_the_change_of_the_decode(opened, codebooks):
    model, cache, clip = opened
    part = segment(model, SITE, clip, 0.2)
    effects = ablation_effects(model, SITE, part, cache.mean, codebooks)
    acts, samples = part.acts[0].numpy(), part.wav.shape[1]
    intact = model.decode(acts, SITE, samples, codebooks)
    for i in (0, 7, 8, WIDTH - 1):  # across batches
        removed = ablation(np.array([i]), "mean", cache.mean)(acts)
        wanted = mel_distance(intact, model.decode(removed, SITE, samples, codebooks), model.sample_rate)
        assert effects[i] == pytest.approx(wanted, rel=2e-3, abs=2e-4)
    assert (effects > 0).mean() > 0.5


def test_gradients_say_to_first_order_what_a_dimension_does(opened):
    model, cache, clip = opened
    part = segment(model, SITE, clip, 0.1)
    found = gradient_effects(model, SITE, part, part.acts[0].mean(0).numpy(), seed=[0])
    assert set(found) == set(GRADIENTS) and all((values >= 0).all() for values in found.values())
    again, other = (gradient_effects(model, SITE, part, cache.mean, seed=[seed]) for seed in (0, 1))
    assert (again["fisher"] == found["fisher"]).all() and (other["fisher"] != found["fisher"]).all()
    # Of what never leaves its mean nothing is lost.
    still = segment(model, SITE, clip, 0.1)
    still.acts[0, :, 3] = 5.0
    mean = still.acts[0].mean(0).numpy()
    assert gradient_effects(model, SITE, still, mean, [0])["gradient"][3] == pytest.approx(0, abs=1e-6)


def test_fisher_is_the_sum_over_bands_of_squared_derivatives_of_the_spectrum(opened):
    model, cache, clip = opened
    part, step = segment(model, SITE, clip, 0.1), 1e-2
    power = mel.mel_power(model.decode_batch(part.acts, SITE), model.sample_rate)
    frames, exact = part.acts.shape[1], np.zeros(6)
    for i, frame in product(range(len(exact)), range(frames)):
        moved = part.acts.repeat(2, 1, 1)
        moved[0, frame, i] += step
        moved[1, frame, i] -= step
        up, down = mel.mel_db(mel.mel_power(model.decode_batch(moved, SITE), model.sample_rate), power)
        exact[i] += float(((up - down) / (2 * step)).square().sum()) / frames
    drawn = [gradient_effects(model, SITE, part, cache.mean, [seed])["fisher"][: len(exact)] for seed in range(20)]
    np.testing.assert_allclose(np.mean(drawn, 0), exact, rtol=0.5)


def test_val_clips_of_the_oracle_and_of_the_choice_are_others(world):
    manifest = read_csv(world.manifest)
    for oracle, val, sizes in ((1, 1, (1, 1)), (5, 5, (1, 1)), (0, 1, (0, 1)), (0, 9, (0, 2)), (9, 1, (1, 1))):
        parts = val_parts(manifest, oracle, val)
        assert tuple(map(len, parts)) == sizes and not set(parts[0]["id"]) & set(parts[1]["id"])
    alone = manifest[manifest["id"] != "c-1"]
    assert [list(part["id"]) for part in val_parts(alone, 3, 3)] == [["c-0"], ["c-0"]]


def test_the_choice_is_the_least_harm_on_val_and_never_a_control():
    scores = {"composition": 9.0, "variance": 4.0, "fisher": 4.0, "inverted": 3.0, "ablation": 4.1}
    assert choose(scores) == "variance"
    assert choose({**scores, "fisher": 3.9}) == "fisher"


def test_good_enough_is_the_cheapest_map_near_the_oracle():
    def rows(**scores):
        return [{"map": name, "val_mel_distance": value} for name, value in scores.items()]

    assert good_enough(rows(fisher=4.0, raw_probe=4.09, variance=4.11, ablation=4.0)) == "raw_probe"
    assert good_enough(rows(fisher=4.2, inverted=4.0, ablation=4.0)) is None
    assert good_enough(rows(fisher=4.0)) is None


def test_rank_correlation():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    values, others = rng.integers(0, 5, 30), rng.integers(0, 5, (4, 30))  # with ties
    wanted = [spearmanr(values, other).statistic for other in others]
    np.testing.assert_allclose(rank_correlation(values, others), wanted)
    assert np.isnan(rank_correlation(values, np.ones((1, 30)))).all()


def test_the_schema_knows_every_map_and_the_tables_say_it():
    section = schema()["properties"]["importance"]
    assert set(section["properties"]["maps"]["items"]["enum"]) == set(MAPS) <= set(SAID)


def stage(world, folder, **changes):
    """Run both jobs of the stage; the JSON, and the tables of raw rows by name."""
    cfg = {**world.cfg, **CFG, **MAKING, "clips": 2, "random_sets": 2, "word_random_sets": 1, **changes}
    out = MapFiles(folder / "map.json", folder / "oracle.csv", folder / "val.csv")
    compute_maps(world.manifest, world.cache, world.saes, world.probes["centroid"], out, cfg)
    signal_csv = folder / "signal.csv"
    render_importance(world.manifest, world.cache, out.maps, folder / "sounds", signal_csv, cfg)
    files = {name: read_csv(folder / f"{name}.csv") for name in ("oracle", "val", "signal")}
    return read_json(out.maps), {**files, "index": read_csv(folder / "sounds/index.csv")}


def test_stage(world, tmp_path):
    found, rows = stage(world, tmp_path)
    values = np.array(found["maps"]["composition"])
    assert len(values) == found["width"] == sum(found["counts"].values()) == WIDTH and values.max() == 1
    assert found["counts"]["expendable"] == (values < 0.3).sum()
    assert found["counts"]["critical"] == (values >= 0.7).sum()
    assert set(found["maps"]) == set(MAPS) and found["absent"] == {}
    assert all(len(v) == WIDTH and max(v) == 1 and min(v) >= 0 for k, v in found["maps"].items() if k != "inverted")
    # The oracle is the mean of its clips, and the choice the smallest mean of val.
    effects = rows["oracle"].groupby("dimension")["mel_change"].mean().to_numpy()
    np.testing.assert_allclose(found["maps"]["ablation"], effects / effects.max(), rtol=1e-5)
    val = rows["val"]
    assert set(val["split"]) == set(rows["oracle"]["split"]) == {"val"} and not set(val["id"]) & set(
        rows["oracle"]["id"]
    )
    means = val.groupby("map")["mel_distance"].mean()
    assert means.drop(["none", "random"]).to_dict() == pytest.approx(found["val_mel_distance"], rel=1e-7)
    assert found["chosen"] == means.drop(["none", "random", "inverted"]).idxmin()
    assert sorted(val.loc[val["map"] == "fisher", "removed_dims"]) == [8, 16]
    signal, index = rows["signal"], rows["index"]
    assert {"map", "mode", "removed", "removed_dims", "seed"} <= set(signal)
    assert list(signal["map"].unique()) == ["none", "keep_critical", *MAPS, "random"]
    # Removing more never lowers the latent error: the sets of one map are nested.
    mean = signal[signal["mode"] == "mean"]
    for _, rows in mean[mean["map"] != "keep_critical"].groupby(["map", "seed", "id"], dropna=False):
        assert rows.sort_values("removed")["latent_sq_error"].is_monotonic_increasing
    nothing = signal[signal["map"] == "none"]
    assert (nothing["latent_sq_error"] == 0).all() and len(nothing) == 2
    assert index["judged"].all() and {"none", "keep_critical", "composition"} <= set(index["map"])


def test_a_model_without_gradients_lacks_the_maps_that_need_them(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Mimi, "gradients", False)
    found, rows = stage(world, tmp_path, maps=["composition", "variance", "gradient", "fisher"], modes=["mean"])
    assert set(found["maps"]) == {"composition", "variance"} and set(rows["signal"]["map"]) & set(GRADIENTS) == set()
    assert found["absent"] == dict.fromkeys(GRADIENTS, "model tiny gives no gradients")
    assert rows["oracle"].empty and "mel_change" in rows["oracle"]  # not asked for
