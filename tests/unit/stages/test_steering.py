"""Directions, arms, calibration and the steering stages."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, read_json
from eqknobs.sae import SAE, make_config, new_sae
from eqknobs.stages.steering.compute import (
    Direction,
    Sources,
    bandpass,
    calibrate,
    calibrate_steering,
    clamp_arm,
    directions,
    latent_arm,
    lowpass,
    mean_difference,
    render_steering,
    sae_arms,
    train_moments,
    unit,
)
from helpers.synthetic import write_cache, write_labels
from helpers.tiny_world import CLASSES, RATE, make_world

BINS = {"binning": "quantile", "low_bin": 0, "high_bin": CLASSES - 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=["topk", "rms_l1"])
def sae(request, world):
    return SAE.load(world.saes[request.param])


@pytest.fixture
def acts(world):
    with world.open() as cache:
        return np.array(cache.acts[:40])


# --- directions ------------------------------------------------------------------------------------------------


def test_unit_refuses_nothing_to_steer():
    np.testing.assert_allclose(unit(np.array([3.0, 4.0]), "x"), [0.6, 0.8], rtol=1e-6)
    for bad in (np.zeros(3), np.array([np.nan, 1])):
        with pytest.raises(EqknobsError, match=r"pitch, raw_probe.*nothing to steer"):
            unit(bad, "pitch, raw_probe")


def test_moments_are_of_train_frames_only(world):
    with world.open() as cache:
        mean, std = train_moments(cache, lambda acts: acts[:, :3] * 2)
        train = np.array(cache.acts[cache.rows("train")], np.float64)[:, :3] * 2
    np.testing.assert_allclose(mean, train.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, train.std(0), rtol=1e-5)


@pytest.mark.parametrize("lag", [0, 2])
def test_mean_difference_finds_a_planted_axis(tmp_path, lag):
    """Dimension 2 carries the label (of `lag` frames later), on a scale of its own; the others are noise."""
    rng = np.random.default_rng(0)
    utterances = [(f"u{i}", f"s{i}", split, 400) for i, split in enumerate(["train", "train", "val", "test"])]
    label = rng.random(1600)
    acts = rng.standard_normal((1600, 5)) * [1, 5, 1, 1, 1]
    acts[:, 2] = 30 * np.roll(label, -lag)
    write_cache(tmp_path / "c.h5", acts, utterances)
    write_labels(tmp_path / "l.h5", np.zeros((1600, 2)), centroid=label)
    np.savez(tmp_path / "p.npz", **{"edges:quantile": np.linspace(0, 1, 5), "lag:raw": np.array(lag)})
    cfg = {"binning": "quantile", "low_bin": 0, "high_bin": 3}
    with ActivationCache(tmp_path / "c.h5") as cache:
        found = unit(mean_difference(cache, tmp_path / "l.h5", tmp_path / "p.npz", "centroid", cfg), "x")
        np.savez(tmp_path / "p.npz", **{"edges:quantile": np.linspace(0, 1, 5), "lag:raw": np.array(-lag)})
        wrong = unit(mean_difference(cache, tmp_path / "l.h5", tmp_path / "p.npz", "centroid", cfg), "x")
    assert found[2] < -0.97  # low minus high
    assert lag == 0 or abs(wrong[2]) < 0.9


def test_directions(world):
    saes = {name: SAE.load(folder) for name, folder in world.saes.items()}
    cfg = BINS | {"seed": 0}
    with world.open() as cache:
        found = directions(cache, world.labels, world.probes["centroid"], saes, "centroid", cfg)
        z = (cache.acts[cache.rows("train")] - cache.mean) / cache.std
        code = saes["topk"].encode(np.array(cache.acts[cache.rows("train")]))
        pitch = directions(cache, world.labels, world.probes["pitch"], saes, "pitch", cfg)
        other = directions(cache, world.labels, world.probes["centroid"], saes, "centroid", BINS | {"seed": 1})
        with pytest.raises(EqknobsError, match=r"4 classes.*lower steering.high_bin"):
            directions(cache, world.labels, world.probes["centroid"], saes, "centroid", cfg | {"high_bin": 19})
    assert sorted(found) == ["difference_in_means", "random", "raw_probe", "sae_probe:rms_l1", "sae_probe:topk"]
    assert all(np.linalg.norm(d.v) == pytest.approx(1, abs=1e-5) for d in found.values())
    with np.load(world.probes["centroid"]) as probes:
        w = probes["sae:topk:quantile:W"]
        np.testing.assert_allclose(found["sae_probe:topk"].v, (w[0] - w[-1]) / np.linalg.norm(w[0] - w[-1]), rtol=1e-4)
    assert found["raw_probe"].sd == pytest.approx((z @ found["raw_probe"].v).std(), rel=1e-3)
    assert found["sae_probe:topk"].sd == pytest.approx((code @ found["sae_probe:topk"].v).std(), rel=1e-3)
    assert (found["random"].v == pitch["random"].v).all() and (found["random"].v != other["random"].v).any()
    assert (found["raw_probe"].v != pitch["raw_probe"].v).any()


# --- arms ------------------------------------------------------------------------------------------------------


def test_latent_arm_moves_only_along_v(acts):
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 3, acts.shape[1])
    v = unit(rng.standard_normal(acts.shape[1]), "v")
    arm = latent_arm(Direction(v, 1.7), std)
    step = (arm.edit(acts, 2 * arm.sd) - acts) / std
    np.testing.assert_allclose(step @ v, 2 * 1.7, rtol=1e-3)
    np.testing.assert_allclose(step - np.outer(step @ v, v), 0, atol=1e-4)
    assert (arm.edit(acts, 0.0) == acts).all()


def random_direction(sae):
    return Direction(unit(np.random.default_rng(0).standard_normal(sae.config.d_sae), "v"), 0.5)


def test_sae_arms_at_zero_are_the_round_trips(sae, acts):
    arms = {
        name.partition(":")[0]: arm.edit(acts, 0.0) for name, arm in sae_arms(sae, "x", random_direction(sae)).items()
    }
    assert (arms["sae_probe"] == sae(acts)).all()
    assert (arms["sae_probe_renorm"] == sae(acts)).all()
    assert (arms["sae_probe_error"] == acts).all() and (arms["sae_probe"] != acts).any()


def test_sae_arms_follow_their_formulas(sae, acts):
    direction = random_direction(sae)
    arms = {name.partition(":")[0]: arm for name, arm in sae_arms(sae, "x", direction).items()}
    assert all(arm.sd == direction.sd for arm in arms.values())
    code = sae.encode(acts)
    steered = np.maximum(code + 3 * direction.v, 0)
    assert ((steered - code) @ direction.v > 0).all()
    np.testing.assert_allclose(arms["sae_probe"].edit(acts, 3.0), sae.decode(steered), rtol=1e-5, atol=1e-5)
    error = acts - sae.decode(code)
    np.testing.assert_allclose(arms["sae_probe_error"].edit(acts, 3.0), sae.decode(steered) + error, atol=1e-4)
    scale = np.sqrt((code**2).mean(1) / (steered**2).mean(1))[:, None]
    np.testing.assert_allclose(arms["sae_probe_renorm"].edit(acts, 3.0), sae.decode(steered * scale), atol=1e-4)


def test_clamp_sets_only_the_chosen_features(acts):
    """An SAE whose code can be read back: identity encoder and decoder on shifted latents."""
    d = acts.shape[1]
    sae = identity_sae(d)
    positive = np.abs(acts) + 1
    difference, mean, std = np.zeros(d), np.full(d, 5.0), np.ones(d)
    difference[[3, 7, 9]] = [2.0, -1.5, 100.0]
    std[9] = 1e-4  # hardly ever varies: a large weight and no say
    arm = clamp_arm(sae, difference, mean, std, 2)
    assert arm.features == 2
    steered = arm.edit(positive, 2.0)
    np.testing.assert_allclose(steered[:, 3], 7, rtol=1e-5)
    np.testing.assert_allclose(steered[:, 7], 3, rtol=1e-5)
    others = np.setdiff1d(np.arange(d), [3, 7])
    np.testing.assert_allclose(steered[:, others], positive[:, others], rtol=1e-5)
    assert (arm.edit(positive, 50.0)[:, 7] == 0).all()  # a code is never negative


def identity_sae(d):
    sae = new_sae(
        make_config({"variant": "topk", "d_in": d, "d_sae": d, "k": d}), np.zeros(d), np.ones(d)
    ).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(d))
    sae.W_dec.copy_(torch.eye(d))
    return sae


def gain_db(function, frequency):
    t = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * frequency * t).astype(np.float32)
    middle = slice(RATE // 4, 3 * RATE // 4)
    return 20 * np.log10(np.std(function(tone)[middle]) / np.std(tone[middle]) + 1e-9)


def test_lowpass_response():
    def at(frequency):
        return gain_db(lambda wav: lowpass(wav, RATE, 1000), frequency)

    assert at(200) == pytest.approx(0, abs=0.05)
    assert at(1000) == pytest.approx(-6.02, abs=0.1)
    # Butterworth of order 4, applied twice, after the bilinear transform's warping of frequencies.
    warped = math.tan(math.pi * 2000 / RATE) / math.tan(math.pi * 1000 / RATE)
    assert at(2000) == pytest.approx(-20 * math.log10(1 + warped**8), abs=0.5)
    wav = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    assert (lowpass(wav, RATE, RATE / 2) == wav).all()
    # Zero phase: a pulse stays where it is.
    pulse = np.zeros(4001, np.float32)
    pulse[2000] = 1
    assert np.argmax(lowpass(pulse, RATE, 1000)) == 2000


def test_bandpass_response():
    assert gain_db(lambda wav: bandpass(wav, RATE), 1000) == pytest.approx(0, abs=0.1)
    for edge in (300, 3000):
        assert gain_db(lambda wav: bandpass(wav, RATE), edge) == pytest.approx(-6.02, abs=0.2)
    for outside in (75, 7000):
        assert gain_db(lambda wav: bandpass(wav, RATE), outside) < -40


# --- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "curve",
    [
        lambda a: 2000 * math.exp(-a / 3),
        lambda a: 2000 - 3 * a**3,
        lambda a: 2000 / (1 + math.exp(4 * (a - 20))),
        lambda a: 2000 - 1200 * math.tanh(a * 20),
        lambda a: 1000.0 if a < 5 else 2000 * math.exp(-a),
    ],
)
def test_calibrate_reaches_the_target(curve):
    calls = []
    found = calibrate(lambda a: calls.append(a) or curve(a), 1000, 0.05, 32)
    assert found.reached and 950 <= found.value <= 1050 and found.value == curve(found.alpha)
    assert len(calls) == len(set(calls)) <= 16


def test_calibrate_starts_where_it_is_told():
    calls = []
    found = calibrate(lambda a: calls.append(a) or 2000 - 100 * a, 1000, 0.05, 32, start=9.8)
    assert found.reached and calls == [0.0, 9.8]


@pytest.mark.parametrize(
    ("curve", "alpha"),
    [
        (lambda a: 2000 - a, 32.0),  # too weak: the strongest comes closest
        (lambda a: 2000 + 10 * a, 0.0),  # the wrong way
        (lambda a: 800 - a, 0.0),  # below the target before it begins
        (lambda a: 2000.0 if a < 3.3 else 300.0, None),  # jumps over it
        (lambda a: 2000.0 if a < 3.3 else math.nan, None),  # falls silent
    ],
)
def test_calibrate_reports_unreached(curve, alpha):
    found = calibrate(curve, 1000, 0.05, 32)
    assert not found.reached and abs(found.value / 1000 - 1) > 0.05
    assert alpha is None or found.alpha == alpha


# --- stages ----------------------------------------------------------------------------------------------------


def sources(world, **changes) -> Sources:
    return replace(Sources(world.manifest, world.cache, world.labels, world.saes, world.probes), **changes)


@pytest.fixture(scope="module")
def calibrated(world):
    cfg = {**world.cfg, **BINS, "saes": ["topk", "rms_l1"], "clamp_features": [1, 6], "val_clips": 2}
    # A random decoder's sound hardly depends on its latents: a small shift, finely measured.
    cfg |= {"shift": 0.99, "tolerance": 0.002, "alpha_max": 8}
    out = world.root / "calibration.json", world.root / "calibration.csv"
    calibrate_steering(sources(world), *out, cfg)
    return cfg, *out


def test_calibration_stage(world, calibrated):
    cfg, path, csv = calibrated
    found, tried = read_json(path), read_csv(csv)
    assert found["target_hz_ratio"] == 0.99
    arms = found["arms"]
    kinds = ("sae_probe", "sae_probe_error", "sae_probe_renorm", "sae_clamp")
    steered = {f"{kind}:{sae}" for kind in kinds for sae in cfg["saes"]}
    steered |= {"raw_probe", "difference_in_means", "random", "dsp_lowpass"}
    fixed = {"codec_roundtrip", "sae_roundtrip:topk", "sae_roundtrip:rms_l1", "dsp_bandpass"}
    assert set(arms) == steered | fixed
    target = 0.99 * arms["codec_roundtrip"]["centroid_val_hz"]
    for name in steered:
        arm = arms[name]
        close = abs(arm["centroid_val_hz"] / target - 1) <= 0.002
        assert arm["calibrated"] == ("reached" if close else "unreached"), name
        rows = tried[tried["arm"] == (name + f"#{arm['features']}" if "clamp" in name else name)]
        at = rows[np.isclose(rows["alpha"], arm["alpha"])]
        assert len(at) == 2 and at["centroid_hz"].mean() == pytest.approx(arm["centroid_val_hz"], rel=1e-6)
        assert arm["alpha"] <= 8 and (not close or arm["alpha_raw"] > 0)
    assert {arms[name]["calibrated"] for name in fixed} == {"fixed"}
    # Else this test would show nothing.
    assert {arms[name]["calibrated"] for name in steered} == {"reached", "unreached"}
    assert set(tried["split"]) == {"val"} and arms["sae_clamp:topk"]["features"] in (1, 6)


def test_render_stage(world, calibrated, tmp_path):
    cfg, calibration, _ = calibrated
    cfg = {**cfg, "clips": 2, "alphas": [0, 2], "other_alpha": {"pitch": 2}, "listen": 1}
    render_steering(sources(world), calibration, tmp_path / "sounds", tmp_path / "signal.csv", cfg)
    signal, index = read_csv(tmp_path / "signal.csv"), read_csv(tmp_path / "sounds/index.csv")
    assert {"property", "arm", "alpha", "alpha_raw", "calibrated"} <= set(signal)
    assert set(signal["split"]) == {"test"} and (signal.groupby("condition")["id"].nunique() == 2).all()
    found = read_json(calibration)["arms"]
    centroid = signal[signal["property"] == "centroid"]
    matched = centroid[centroid["calibrated"].isin(["reached", "unreached"])].groupby("arm").first()
    assert len(matched) == 12
    for arm, row in matched.iterrows():
        assert row["calibrated"] == found[arm]["calibrated"]
        assert row["alpha"] == pytest.approx(found[arm]["alpha"], rel=1e-6)
        assert row["alpha_raw"] == pytest.approx(found[arm]["alpha_raw"], rel=1e-6)
    sweep = centroid[centroid["calibrated"] == "sweep"]
    assert sweep.groupby("arm")["alpha"].unique().map(sorted).map(tuple).to_dict() == dict.fromkeys(
        set(matched.index) - {"dsp_lowpass"}, (0, 2)
    )
    references = centroid[centroid["calibrated"] == "fixed"].set_index(["arm", "id"])["mel_distance"]
    assert set(references.index.levels[0]) == {
        "original", "codec_roundtrip", "dsp_bandpass", "sae_roundtrip:topk", "sae_roundtrip:rms_l1"
    }  # fmt: skip
    at_zero = sweep[sweep["alpha"] == 0].set_index(["arm", "id"])["mel_distance"]
    for arm, same in [
        ("raw_probe", "codec_roundtrip"),
        ("random", "codec_roundtrip"),
        ("sae_probe_error:topk", "codec_roundtrip"),
        ("sae_probe:topk", "sae_roundtrip:topk"),
        ("sae_probe_renorm:rms_l1", "sae_roundtrip:rms_l1"),
    ]:
        assert at_zero[arm].to_dict() == references[same].to_dict(), arm
    pitch = signal[signal["property"] == "pitch"]
    assert set(pitch["calibrated"]) == {"fixed"} and set(pitch["alpha"]) == {2}
    assert set(pitch["arm"]) == {"sae_probe:topk", "sae_probe:rms_l1", "raw_probe", "difference_in_means", "random"}
    counts = index.groupby(["judged", "calibrated"])["id"].count()
    assert counts[True].to_dict().keys() == {"fixed", "reached", "unreached"} & set(signal["calibrated"])
    assert index[index["judged"]].groupby("condition")["id"].nunique().eq(2).all()
    assert index[~index["judged"]].groupby("condition")["id"].nunique().eq(1).all()


def test_render_needs_its_probe(world, calibrated, tmp_path):
    cfg, calibration, _ = calibrated
    cfg = {**cfg, "clips": 1, "alphas": [], "other_alpha": {"pitch": 2}, "listen": 0, "binning": "semitone"}
    with pytest.raises(EqknobsError, match="fit the probes again"):
        render_steering(sources(world), calibration, tmp_path / "out", tmp_path / "s.csv", cfg)
    assert not (tmp_path / "out").exists() and not (tmp_path / "s.csv").exists()


def test_without_saes_raw_latents_are_steered(world, calibrated, tmp_path):
    cfg = {**calibrated[0], "saes": [], "clips": 1, "alphas": [1], "other_alpha": {}, "listen": 1}
    without = sources(world, saes={})
    calibration = tmp_path / "calibration.json"
    calibrate_steering(without, calibration, tmp_path / "calibration.csv", cfg)
    render_steering(without, calibration, tmp_path / "sounds", tmp_path / "signal.csv", cfg)
    arms = set(read_csv(tmp_path / "signal.csv")["arm"])
    assert {"raw_probe", "difference_in_means", "random", "dsp_lowpass", "codec_roundtrip"} <= arms
    assert not any(":" in arm for arm in arms)
