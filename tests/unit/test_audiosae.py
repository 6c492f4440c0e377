"""AudioSAE's primitives on a cache whose features are known: latent j is feature j."""

import numpy as np
import pytest
import torch

from eqknobs import audiosae
from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.sae import make_config, new_sae
from helpers.synthetic import write_cache

D = 6


def identity(features: int = D):
    """An SAE whose feature j is latent j; further ones never fire."""
    config = make_config({"variant": "batchtopk", "d_in": D, "d_sae": features, "k": 1, "input_scale": "raw"})
    sae = new_sae(config, np.zeros(D), np.ones(D)).requires_grad_(False)
    eye = torch.eye(features, D)
    sae.W_enc.copy_(eye)
    sae.W_dec.copy_(eye)
    return sae


@pytest.fixture
def cache(tmp_path):
    """Three clips: feature 0 on half of a's frames, 1 on all of b's, 2 everywhere, weak; c also has 1 once."""
    acts = np.zeros((120, D))
    acts[:40:2, 0], acts[10, 0] = 1.0, 9.0
    acts[40:80, 1] = 2.0
    acts[:, 2] = 0.5
    acts[100, 1] = 5.0
    acts[:, 3] = -1.0  # no feature of the code stands for what is below 0
    clips = [("a", "s", "train", 40), ("b", "t", "val", 40), ("c", "u", "test", 40)]
    with ActivationCache(write_cache(tmp_path / "cache.h5", acts, clips)) as read:
        yield read


def test_metrics_of_a_reconstruction(cache) -> None:
    found = audiosae.reconstruction_metrics(cache, identity(), ["val"])
    norm = np.sqrt(4 + 0.25 + 1)  # the error is latent 3
    assert found == pytest.approx(
        {"l0": 2, "l2": 1, "normalized_l2": 1 / norm, "frac_var_explained": -np.inf}, rel=1e-5
    )
    whole = audiosae.reconstruction_metrics(cache, identity(), ["train", "val", "test"])
    raw = np.array(cache.acts, np.float64)
    assert whole["frac_var_explained"] == pytest.approx(1 - 120 / np.square(raw - raw.mean(0)).sum(), rel=1e-5)
    strict = audiosae.reconstruction_metrics(cache, identity(), ["val"], k=1)
    assert strict["l0"] == 1


def test_strongest_clips_and_dead_features(cache) -> None:
    most = audiosae.aggregate_max_activations(cache, identity(8))
    np.testing.assert_allclose(most.values[:, :3], [[9, 0, 0.5], [0, 2, 0.5], [0, 5, 0.5]])
    top = audiosae.top_clips_for_feature(most, 1)
    assert list(top["id"]) == ["c", "b"] and list(top["activation"]) == [5, 2]
    assert len(audiosae.top_clips_for_feature(most, 1, n=1)) == 1
    assert list(audiosae.dead_features(most)) == [3, 4, 5, 6, 7]
    with pytest.raises(EqknobsError, match="no feature 8"):
        audiosae.top_clips_for_feature(most, 8)


def test_windows_lie_around_the_strongest_frame(cache) -> None:
    rate = 16000
    wav = np.zeros(40 * 640, np.float32)
    middle = round(cache.frame_times[10] * rate)
    wav[middle - 80 : middle + 80] = 1.0  # a click where feature 0 is strongest
    found = audiosae.feature_activation_windows(cache, identity(), 0, {"a": wav, "b": wav}, rate, 0.4)
    assert found.shape == (1, 20, 80)
    assert found[0].mean(1).argmax() in (9, 10)
    first = audiosae.feature_activation_windows(cache, identity(), 1, {"b": wav, "c": wav}, rate, 4.0)
    assert first.shape == (2, 200, 80) and np.isfinite(first).all()
    assert audiosae.feature_activation_windows(cache, identity(8), 7, {"a": wav}, rate).shape == (0, 50, 80)
    with pytest.raises(EqknobsError, match="no clip x"):
        audiosae.feature_activation_windows(cache, identity(), 0, {"x": wav}, rate)


def test_shares_by_data_set_and_domains_of_features(cache) -> None:
    sets = {"talk": ["a"], "song": ["b"], "band": ["c"]}
    stats = audiosae.collect_dataset_stats(cache, identity(), sets)
    assert stats["talk"].frame_share[0] == pytest.approx(0.5) and stats["band"].clip_share[1] == 1
    assert stats["song"].frames == 40 and stats["song"].clips == 1
    domains = {"speech": ["talk"], "music": ["song", "band"]}
    labels = audiosae.classify_features(stats, domains)
    assert list(labels.columns) == ["speech", "music"]
    assert labels.loc[0].tolist() == [0.2, 0] and labels.loc[1].tolist() == [0, 0.2]  # 1: (1 + 1/40) / 2
    assert not labels.loc[[2, 3]].to_numpy().any()
    assert audiosae.classify_features(stats, domains, "clip").loc[0].tolist() == [0.5, 0]
    with pytest.raises(EqknobsError, match="two domains or more"):
        audiosae.classify_features(stats, {"speech": ["talk"]})
    with pytest.raises(EqknobsError, match="data set none: no frames"):
        audiosae.collect_dataset_stats(cache, identity(), {"none": ["z"]})


def test_a_map_of_labelled_features(tmp_path) -> None:
    import pandas as pd

    config = make_config({"variant": "topk", "d_in": D, "d_sae": 120, "k": 1})
    sae = new_sae(config, np.zeros(D), np.ones(D))
    values = np.zeros((120, 2))
    values[:60, 0], values[60:110, 1] = 0.2, 0.1
    labels = pd.DataFrame(values, columns=["speech", "music"])
    places = audiosae.plot_feature_tsne(sae, labels, tmp_path / "map.png")
    assert places.shape == (110, 2) and (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    np.testing.assert_array_equal(places, audiosae.plot_feature_tsne(sae, labels, tmp_path / "again.png"))
    with pytest.raises(EqknobsError, match="50 features have a label"):
        audiosae.plot_feature_tsne(
            sae, labels[["speech"]].iloc[10:60].reindex(range(120), fill_value=0), tmp_path / "x.png"
        )
