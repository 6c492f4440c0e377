"""Another codec through the stages: they know the `Model` protocol only, so EnCodec needs no code of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from eqknobs.corpus.activations import cache_activations
from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.labels import write_labels
from eqknobs.corpus.manifest import build_manifest
from eqknobs.io import read_csv, read_json, write_csv
from eqknobs.sae import train_sae
from eqknobs.stages.probes.compute import Outputs, Sources, fit_probes
from eqknobs.stages.steering.compute import Sources as SteeringSources
from eqknobs.stages.steering.compute import calibrate_steering, render_steering
from helpers import ROOT

DATA = {
    "labels": str(ROOT / "resources/corpus/labels.csv"),
    "max_utterances": 10,
    "max_minutes": 2,
    "min_seconds": 1,
    "max_seconds": 30,
    "splits": {"train": 0.5, "val": 0.25, "test": 0.25},
}
LABELS = {"crepe": "tiny", "periodicity": 0.5, "floor_db": 40, "fmin": 50, "fmax": 550, "n_mels": 16}
STEERING = {
    "saes": ["topk"],
    "codebooks": 2,
    "binning": "quantile",
    "low_bin": 0,
    "high_bin": 4,
    "clamp_features": [2],
    "seed": 0,
}


@pytest.fixture(scope="module")
def encodec(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A random-weight EnCodec on disk, as the configuration names it."""
    torch.manual_seed(0)
    config = EncodecConfig(
        sampling_rate=16000,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=4,
        hidden_size=32,
        codebook_size=64,
        codebook_dim=32,
        target_bandwidths=[0.3, 0.6],
        num_lstm_layers=1,
    )
    folder = tmp_path_factory.mktemp("encodec")
    EncodecModel(config).save_pretrained(folder)
    return {"name": "rand", "kind": "encodec", "path": str(folder), "revision": None, "device": "cpu"}


def test_encodec_runs_through_caching_probes_and_steering(encodec: dict, tmp_path: Path) -> None:
    manifest, _ = build_manifest(ROOT / "resources/corpus", DATA, 0)
    write_csv(tmp_path / "manifest.csv", manifest)
    cache, labels = tmp_path / "cache.h5", tmp_path / "labels.h5"
    cache_activations(tmp_path / "manifest.csv", cache, encodec, "encoder", {})
    with ActivationCache(cache) as opened:
        assert opened.acts.shape[1] == 32 and opened.attrs["hop"] == 640
        assert np.array_equal(opened.utterances["frames"], -(-opened.utterances["samples"] // 640))
    write_labels(tmp_path / "manifest.csv", cache, labels, LABELS)

    sae = {"variant": "topk", "d_sae": 64, "k": 4, "aux_k": 8, "dead_epochs": 1, "lr": 1e-3}
    train_sae(cache, tmp_path / "topk", {**sae, "batch_size": 128, "epochs": 2}, 0)
    probes = tmp_path / "centroid.npz"
    cfg = {"property": "centroid", "seed": 0, "bins": 5, "lags": [0], "l2": [0.01], "epochs": 3, "device": "cpu"}
    scores = (tmp_path / "probes.csv", tmp_path / "ridge.csv")
    saes = {"topk": tmp_path / "topk"}
    fit_probes(Sources(cache, labels, saes), Outputs(probes, *scores), cfg)
    assert {"raw", "sae:topk", "logmel", "majority"} <= set(read_csv(scores[0])["space"])

    sources = SteeringSources(tmp_path / "manifest.csv", cache, labels, saes, {"centroid": probes})
    steering = {"model": encodec, "site": "encoder", **STEERING}
    calibration = tmp_path / "calibration.json"
    limits = {"val_clips": 1, "shift": 0.9, "tolerance": 0.05, "alpha_max": 4}
    calibrate_steering(sources, calibration, tmp_path / "calibration.csv", {**steering, **limits})
    assert read_json(calibration)
    counts = {"clips": 1, "alphas": [0, 2], "other_alpha": {}, "listen": 1}
    render_steering(sources, calibration, tmp_path / "renders", tmp_path / "signal.csv", {**steering, **counts})
    signal = read_csv(tmp_path / "signal.csv").set_index("condition")
    assert signal["mel_distance"].notna().all()
    index = pd_index(tmp_path / "renders/index.csv")
    assert len(index) and all((tmp_path / "renders" / file).is_file() for file in index)


def pd_index(path: Path) -> list[str]:
    return read_csv(path)["file"].tolist()
