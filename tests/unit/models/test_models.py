"""Models: explicit paths against the networks' own forward, exact chunking, loading and its errors.

Networks are small and random; transformer weights are drawn large enough for attention to matter.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertModel,
    MimiConfig,
    MimiModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from eqknobs.device import gpu_lock
from eqknobs.errors import EqknobsError
from eqknobs.models import load_model
from eqknobs.models.checks import check_codebooks
from helpers import ROOT

BUNDLED = ROOT / "resources/models/tiny-mimi"
RATE = 16000


def mimi_config(**changes):
    sizes = dict(
        sampling_rate=RATE,
        hidden_size=32,
        num_filters=4,
        upsampling_ratios=[8, 5, 4, 4],
        codebook_size=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=6,
        upsample_groups=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=10,
        layer_scale_initial_scale=0.5,
        initializer_range=0.3,
    )
    return MimiConfig(**sizes | changes)


def encodec_config(**changes):
    sizes = dict(
        sampling_rate=RATE,
        hidden_size=24,
        num_filters=4,
        codebook_size=64,
        codebook_dim=24,
        target_bandwidths=[1.2, 2.4],
    )
    return EncodecConfig(**sizes | changes)


def dac_config():
    return DacConfig(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4, 5, 8],
        decoder_hidden_size=32,
        n_codebooks=4,
        codebook_size=32,
    )


def hubert_config():
    return HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        initializer_range=0.2,
    )


def whisper_config():
    return WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def save(net, folder):
    """Give the codebooks random entries (they start as zeros), DAC livelier weights, and write the folder."""
    for module in net.modules():
        if isinstance(net, DacModel) and isinstance(module, torch.nn.Conv1d):
            module.reset_parameters()
        for name in ("embed_sum", "embed"):
            if isinstance(getattr(module, name, None), torch.Tensor) and hasattr(module, "codebook_size"):
                torch.nn.init.normal_(getattr(module, name))
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small model folder a kind."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save(MimiModel(mimi_config()), root / "mimi")
    save(EncodecModel(encodec_config()), root / "encodec")
    save(DacModel(dac_config()), root / "dac")
    save(HubertModel(hubert_config()), root / "hubert")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(root / "hubert")
    save(WhisperModel(whisper_config()), root / "whisper")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(root / "whisper")
    return root


def load(folder, kind=None, **changes):
    cfg = {
        "name": "small",
        "kind": kind or folder.name,
        "path": str(folder),
        "revision": None,
        "device": "cpu",
    }
    return load_model(cfg | changes)


@pytest.fixture(scope="module")
def mimi(folders):
    return load(folders / "mimi")


def close(a, b, tolerance):
    """Largest difference relative to the largest value (never below absolute 1)."""
    return a.shape == b.shape and np.abs(a - b).max(initial=0) <= tolerance * max(1, np.abs(b).max(initial=0))


def noise(seconds, seed=0, rate=RATE):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


def padded(wav, block):
    return pad(torch.from_numpy(wav), (0, -len(wav) % block))[None, None]


# Mimi


def test_mimi_sizes_come_from_the_config(mimi, folders, tmp_path):
    site = mimi.site("encoder_transformer")
    assert (site.hop, site.frame_rate, site.width, mimi.sample_rate) == (640, 25.0, 32, RATE)
    assert (mimi.n_codebooks, mimi.decodes, mimi.stride) == (6, True, 2)
    assert list(mimi.sites) == ["encoder_transformer", *(f"encoder_layer.{i}" for i in range(3))]
    other = load(save(MimiModel(mimi_config(sampling_rate=24000, upsampling_ratios=[8, 6, 5, 4])), tmp_path), "mimi")
    site = other.site("encoder_transformer")
    assert (site.hop, site.frame_rate, other.sample_rate) == (960, 25.0, 24000)
    wav = noise(1.01, rate=24000)
    assert other.encode(wav, site.name).shape == (other.frames(len(wav), site.name), 32) == (26, 32)


@pytest.mark.parametrize("site", ["encoder_transformer", "encoder_layer.0", "encoder_layer.1", "encoder_layer.2"])
@pytest.mark.parametrize("codebooks", [1, 3, 6])
def test_mimi_explicit_path_equals_forward(mimi, site, codebooks):
    wav = noise(2.013)
    own = mimi.net(padded(wav, 1280), num_quantizers=codebooks).audio_values[0, 0, : len(wav)].numpy()
    acts = mimi.encode(wav, site)
    ours = mimi.decode(acts, site, len(wav), codebooks)
    assert ours.shape == wav.shape and ours.dtype == acts.dtype == np.float32
    assert close(ours, own, 1e-6)
    assert own.std() > 1e-3
    codes = mimi.net.encode(padded(wav, 1280), num_quantizers=codebooks).audio_codes[0].numpy()
    assert np.array_equal(mimi.tokens(acts, site, codebooks), codes)


@pytest.mark.parametrize("site", ["encoder_transformer", "encoder_layer.1"])
def test_mimi_unquantised_path_skips_only_the_quantiser(mimi, site):
    wav = noise(1.5)
    with torch.inference_mode():
        latents = mimi.net.encoder(padded(wav, 1280)).latents
        own = mimi.net.decoder(latents).audio_values[0, 0, : len(wav)].numpy()
    acts = mimi.encode(wav, site)
    ours = mimi.decode(acts, site, len(wav))
    assert close(ours, own, 1e-6)
    assert np.abs(ours - mimi.decode(acts, site, len(wav), 6)).max() > 1e-3


def test_mimi_layer_site_is_where_the_edit_enters(mimi):
    """An edit at layer 1 must pass through layer 2, and layer 0 must not matter any more."""
    wav = noise(1.5)
    acts = mimi.encode(wav, "encoder_layer.1")
    edited = acts + np.float32(0.5) * noise(acts.size / RATE, 5).reshape(acts.shape)
    layer = mimi.net.encoder.encoder_transformer.layers[2]
    with torch.inference_mode():
        seen = {}
        hook = layer.register_forward_hook(
            lambda m, args, kwargs, out: seen.update(x=args[0], **kwargs), with_kwargs=True
        )
        mimi.net.encoder(padded(wav, 1280))
        hook.remove()
        own = layer(torch.from_numpy(edited)[None], **{k: v for k, v in seen.items() if k != "x"})
    assert np.allclose(seen["x"][0].numpy(), acts, atol=1e-6)
    ours = mimi.decode(edited, "encoder_layer.1", len(wav), 6)
    assert np.allclose(ours, mimi.decode(own[0].numpy(), "encoder_transformer", len(wav), 6), atol=1e-6)
    assert np.abs(ours - mimi.decode(acts, "encoder_layer.1", len(wav), 6)).max() > 1e-3


@pytest.mark.parametrize("samples", [1, 639, 1279, 1280, 1281, 15000, 31999])
def test_mimi_padding_is_never_returned_and_never_harms(mimi, samples):
    long = noise(2.2, 1)
    acts = mimi.encode(long[:samples], "encoder_transformer")
    assert len(acts) == mimi.frames(samples, "encoder_transformer") == 2 * -(-samples // 1280)
    # frames whose hop is inside the clip do not change with what follows
    whole = samples // 640
    longer = mimi.encode(long, "encoder_transformer")
    assert close(acts[:whole], longer[:whole], 1e-5)
    silence = np.concatenate([long[:samples], np.zeros(4001, np.float32)])
    assert close(acts, mimi.encode(silence, "encoder_transformer")[: len(acts)], 1e-5)
    assert mimi.decode(acts, "encoder_transformer", samples, 2).shape == (samples,)


@pytest.mark.parametrize("site", ["encoder_transformer", "encoder_layer.0"])
@pytest.mark.parametrize(("chunk_seconds", "samples"), [(0.01, 16321), (0.3, 40321), (1.0, 48000)])
def test_mimi_chunks_are_exact(mimi, monkeypatch, site, chunk_seconds, samples):
    wav = noise(3, 2)[:samples]
    with torch.inference_mode():
        hidden = mimi.net.encoder.encoder_seanet(padded(wav, 1280)).transpose(1, 2)
        out = mimi.net.encoder.encoder_transformer(hidden, use_cache=False)[0]
    whole = mimi.encode(wav, site)
    monkeypatch.setattr(mimi, "chunk_seconds", chunk_seconds)
    chunked = mimi.encode(wav, site)
    assert chunked.shape == whole.shape
    assert close(chunked, whole, 1e-5)
    if site == "encoder_transformer":
        assert close(chunked, out[0].numpy(), 1e-5)


@pytest.mark.parametrize("chunk_seconds", [0.01, 0.3, 1.0])
def test_mimi_decodes_in_chunks_exactly(mimi, monkeypatch, chunk_seconds):
    acts, samples = mimi.encode(noise(3, 4), "encoder_transformer"), 3 * RATE
    whole = mimi.decode(acts, "encoder_transformer", samples, 6)
    with torch.inference_mode():
        latents = mimi.net.quantizer.decode(torch.from_numpy(mimi.tokens(acts, "encoder_transformer"))[None])
        assert np.array_equal(whole, mimi.net.decoder(latents).audio_values[0, 0, :samples])
    monkeypatch.setattr(mimi, "chunk_seconds", chunk_seconds)
    chunked = mimi.decode(acts, "encoder_transformer", samples, 6)
    assert close(chunked, whole, 1e-5) and whole.std() > 1e-2
    monkeypatch.setattr("eqknobs.models.mimi.convolution_reach", lambda _net, hop: hop)
    assert not close(mimi.decode(acts, "encoder_transformer", samples, 6), whole, 1e-3)


def test_mimi_needs_its_context(mimi):
    """The test above could fail: a chunk encoded by itself is wrong by much more than its tolerance."""
    wav = noise(4, 2)
    alone = mimi.encode(wav[32000:], "encoder_transformer")
    assert np.abs(alone - mimi.encode(wav, "encoder_transformer")[50:]).max() > 0.05


def test_mimi_context_is_enough(mimi):
    """Recomputing `site.context` seconds of left context gives the frames of the whole clip."""
    wav, site = noise(6, 3), mimi.site("encoder_layer.2")
    start = 2 * int(np.ceil(site.context * site.frame_rate / 2))
    part = mimi.encode(wav[32000 : 32000 + (start + 20) * site.hop], site.name)
    assert 0 < site.context < 2
    assert np.abs(part[start:] - mimi.encode(wav, site.name)[50 + start : 70 + start]).max() <= 1e-4


def test_mimi_bad_input(mimi, tmp_path):
    acts = mimi.encode(noise(1), "encoder_transformer")
    for name in ("encoder_layer.3", "encoder_layer", "decoder"):
        with pytest.raises(EqknobsError, match=r"no site .*encoder_layer\.2"):
            mimi.encode(noise(1), name)
    for count in (0, 7):
        with pytest.raises(EqknobsError, match="1 to 6 codebooks"):
            mimi.decode(acts, "encoder_transformer", RATE, count)
    with pytest.raises(EqknobsError, match="whole code frames"):
        mimi.decode(acts[:3], "encoder_transformer", RATE, 6)
    with pytest.raises(EqknobsError, match=r"takes activations \[frames, 32\]"):
        mimi.decode(acts[:, :8], "encoder_transformer", RATE, 6)
    for wav in (np.zeros(0), np.zeros((2, 100))):
        with pytest.raises(EqknobsError, match="mono waveform"):
            mimi.encode(wav, "encoder_transformer")
    with pytest.raises(EqknobsError, match=r"no module encoder\.gone"):
        mimi.resolve("encoder.gone")
    with pytest.raises(EqknobsError, match="only mono, causal"):
        load(save(MimiModel(mimi_config(use_causal_conv=False)), tmp_path / "noncausal"), "mimi")


def test_bundled_codec():
    """The folder that ships with the repository loads by the code that loads kyutai/mimi."""
    if not BUNDLED.exists():
        pytest.skip("the bundled codec is not there yet")
    model = load(BUNDLED, "mimi")
    site = model.site("encoder_transformer")
    assert (model.sample_rate, site.frame_rate, site.width, model.n_codebooks) == (16000, 25.0, 256, 16)
    assert model.net.quantizer.codebook_size == 512
    wav = noise(1.7)
    acts = model.encode(wav, site.name)
    assert acts.shape == (2 * int(np.ceil(len(wav) / 1280)), 256) and np.isfinite(acts).all()
    assert model.tokens(acts, site.name).shape == (16, len(acts) // 2)
    with torch.inference_mode():
        own = model.net(padded(wav, 1280), num_quantizers=8).audio_values[0, 0, : len(wav)].numpy()
    assert np.abs(model.decode(acts, site.name, len(wav), 8) - own).max() <= 1e-5


# EnCodec and DAC


@pytest.mark.parametrize("kind", ["mimi", "encodec", "dac"])
def test_codebooks_are_counted_before_a_codec_is_loaded(folders, kind):
    config = {"models": {"c": {"kind": kind, "path": str(folders / kind), "revision": None}}}
    most = load(folders / kind).n_codebooks
    check_codebooks(config, "codec.codebooks", most, ["c.encoder"])
    with pytest.raises(EqknobsError, match=rf"codec.codebooks: {most + 1} is more than the {most} codebooks of c"):
        check_codebooks(config, "codec.codebooks", most + 1, ["c.encoder"])


def test_codebooks_that_no_config_tells_of_are_left_to_loading(tmp_path):
    (tmp_path / "config.json").write_text('{"sampling_rate": 24000, "target_bandwidths": []}')
    for path in (str(tmp_path), "nobody/here", "no name/of-the hub's"):
        config = {"models": {"c": {"kind": "encodec", "path": path, "revision": None}}}
        check_codebooks(config, "codec.codebooks", 99, ["c.encoder"])


@pytest.mark.parametrize(("kind", "count"), [("encodec", 8), ("dac", 4)])
def test_codec_path_equals_forward(folders, kind, count):
    model, wav = load(folders / kind), noise(1.2345)
    site = model.site("encoder")
    assert (site.hop, model.n_codebooks, model.decodes) == (320, count, True)
    block = padded(wav, 320)
    acts = model.encode(wav, "encoder")
    assert acts.shape == (model.frames(len(wav), "encoder"), site.width) == (62, site.width)
    for n in (count // 2, count):
        with torch.inference_mode():
            if kind == "encodec":
                out = model.net(block, bandwidth=n * 0.3)
                own, codes = out.audio_values[0, 0], out.audio_codes[0, 0]
            else:
                out = model.net(block, n_quantizers=n)
                own, codes = out.audio_values[0], out.audio_codes[0]
        ours = model.decode(acts, "encoder", len(wav), n)
        own = pad(own, (0, max(0, len(wav) - len(own))))[: len(wav)].numpy()
        assert close(ours, own, 1e-6)
        assert np.array_equal(model.tokens(acts, "encoder", n), codes.numpy())
    unquantised = model.decode(acts, "encoder", len(wav))
    assert unquantised.shape == wav.shape and np.abs(unquantised - ours).max() > 1e-4
    with pytest.raises(EqknobsError, match="codebooks"):
        model.tokens(acts, "encoder", count + 1)


@pytest.mark.parametrize("kind", ["encodec", "dac"])
@pytest.mark.parametrize("samples", [24000, 24123])
def test_codec_chunks_are_exact(folders, kind, samples):
    model, wav = load(folders / kind), noise(2, 4)[:samples]
    with torch.inference_mode():
        whole = model.net.encoder(padded(wav, 320))[0].T.numpy()
    for seconds in (0.1, 0.7):
        model.chunk_seconds = seconds
        chunked = model.encode(wav, "encoder")
        assert chunked.shape == whole.shape
        assert close(chunked, whole, 1e-5)
    assert np.abs(model.encode(wav[16000:17000], "encoder")[0] - whole[50]).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("kind", "site"),
    [("mimi", "encoder_transformer"), ("mimi", "encoder_layer.0"), ("encodec", "encoder"), ("dac", "encoder")],
)
def test_batches_decode_as_clips_do_and_have_gradients(folders, kind, site):
    model = load(folders / kind)
    wav = noise(0.8)
    acts = np.stack([model.encode(part, site) for part in (wav[:6400], wav[6400:12800])])
    for codebooks in (model.n_codebooks, None):
        given = torch.from_numpy(acts).requires_grad_()
        wavs = model.decode_batch(given, site, codebooks)
        for ours, each in zip(wavs.detach().numpy(), acts):
            assert close(ours, model.decode(each, site, len(ours), codebooks), 1e-5)
        assert model.gradients and wavs.requires_grad == (codebooks is None)
    wavs[0].square().sum().backward()
    assert given.grad[0].abs().sum() > 0 and (given.grad[1] == 0).all()
    with pytest.raises(EqknobsError, match=r"takes batches \[batch, frames, \d+\], got"):
        model.decode_batch(given[0], site)


def test_encodec_with_level_normalisation_is_refused(tmp_path):
    save(EncodecModel(encodec_config(normalize=True)), tmp_path)
    with pytest.raises(EqknobsError, match="without normalisation"):
        load(tmp_path, "encodec")


# Encoders


def test_hubert_layers(folders):
    model, wav = load(folders / "hubert"), noise(1.03)
    values = torch.from_numpy((wav - wav.mean()) / np.sqrt(wav.var() + 1e-7))[None]
    with torch.inference_mode():
        own = model.net(values, output_hidden_states=True).hidden_states
    for i in range(2):
        acts = model.encode(wav, f"layer.{i}")
        assert acts.shape == (model.frames(len(wav), f"layer.{i}"), 32)
        assert np.abs(acts - own[i + 1][0].numpy()).max() <= 1e-5
    assert (model.site("layer.0").hop, model.site("layer.0").frame_rate, model.decodes) == (320, 50.0, False)
    assert model.n_codebooks == 0
    batch = torch.from_numpy(acts)[None]
    for call in (
        lambda: model.decode_batch(batch, "layer.0"),
        lambda: model.decode(acts, "layer.0", 10),
        lambda: model.tokens(acts, "layer.0"),
    ):
        with pytest.raises(EqknobsError, match=r"small (is an encoder|has no codebooks)"):
            call()
    model.max_seconds = 1.0
    for wav in (noise(1.1), noise(0.01)):
        with pytest.raises(EqknobsError, match="takes clips up to 1 s"):
            model.encode(wav, "layer.0")


def test_whisper_drops_padding_and_cuts_windows(folders):
    model = load(folders / "whisper")
    short, long = noise(1.03), noise(31.5, 6)
    features = model._extract(short, sampling_rate=RATE, return_tensors="pt").input_features
    with torch.inference_mode():
        own = model.net.encoder(features, output_hidden_states=True).hidden_states
    acts = model.encode(short, "layer.0")
    assert acts.shape == (52, 32) and model.frames(len(short), "layer.0") == 52
    assert np.abs(acts - own[1][0, :52].numpy()).max() <= 1e-5
    acts = model.encode(long, "layer.1")
    assert acts.shape == (1575, 32)
    assert np.abs(acts[1500:] - model.encode(long[30 * RATE :], "layer.1")).max() <= 1e-6
    assert np.abs(acts[:1500] - model.encode(long[: 30 * RATE], "layer.1")).max() <= 1e-6


# Several sites, and edits, of every kind


@pytest.mark.parametrize("kind", ["mimi", "encodec", "dac", "hubert", "whisper"])
def test_one_pass_reads_all_sites_bit_for_bit(folders, kind, monkeypatch):
    model, wav = load(folders / kind), noise(1.3, 8)
    if kind == "mimi":
        model.chunk_seconds = 0.5
    runs = []
    model.net.encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    for sites in (list(model.sites), list(model.sites)[::-1][:2]):
        runs.clear()
        found = model.encode_sites(wav, sites)
        passes = len(runs)
        assert found.keys() == set(sites)
        for site in sites:
            runs.clear()
            assert np.array_equal(model.encode(wav, site), found[site]) and len(runs) == passes
    with pytest.raises(EqknobsError, match="no site"):
        model.encode_sites(wav, [sites[0], "nowhere"])


@pytest.mark.parametrize("kind", ["hubert", "whisper"])
def test_layers_above_the_last_site_do_not_run(folders, kind):
    model, ran = load(folders / kind), []
    layers = model.net.encoder.layers
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_args, i=i: ran.append(i))
    model.encode(noise(1), "layer.0")
    assert ran == [0] and not layers[0]._forward_hooks
    model.encode(noise(1), "layer.1")
    assert ran == [0, 0, 1]


def by_hand(module, change):
    """A plain hook, to compare with; other outputs of the module stay."""

    def hook(_module, _inputs, output):
        return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])

    return module.register_forward_hook(hook)


def louder(acts):
    return 1.5 * acts + 0.1


@pytest.mark.parametrize("site", ["encoder_layer.0", "encoder_layer.2", "encoder_transformer"])
def test_mimi_reconstructs_from_edited_activations(mimi, site):
    wav = noise(1.5, 9)
    plain = mimi.reconstruct(wav, 6)
    assert np.array_equal(plain, mimi.decode(mimi.encode(wav, site), site, len(wav), 6))
    edited = louder(mimi.encode(wav, site))
    expected = mimi.decode(edited, site, len(wav), 6)
    with mimi.editing(site, louder):
        assert close(mimi.reconstruct(wav, 6), expected, 1e-5)
        acts = mimi.encode(wav, site)
        assert close(acts, edited, 1e-5)
        assert close(mimi.decode(acts, site, len(wav), 6), expected, 1e-5)  # an edit acts once
    assert np.abs(expected - plain).max() > 1e-3
    assert np.array_equal(mimi.reconstruct(wav, 6), plain)


def test_mimi_edits_of_later_sites_act_on_decoding(mimi):
    wav = noise(1.2, 3)
    acts = mimi.encode(wav, "encoder_layer.0")
    with mimi.editing("encoder_layer.2", louder):
        ours = mimi.decode(acts, "encoder_layer.0", len(wav))
        whole = mimi.reconstruct(wav)
    assert close(ours, whole, 1e-5) and np.abs(ours - mimi.reconstruct(wav)).max() > 1e-3


@pytest.mark.parametrize("kind", ["encodec", "dac"])
def test_codecs_reconstruct_from_edited_activations(folders, kind):
    model, wav = load(folders / kind), noise(1.2, 4)
    acts, shapes = model.encode(wav, "encoder"), []

    def edit(found):
        shapes.append(tuple(found.shape))
        return louder(found)

    model.chunk_seconds = 0.4
    with model.editing("encoder", edit), model.editing("encoder", lambda found: 2 * found):
        ours = model.reconstruct(wav)
    assert shapes == [(1, *acts.shape)]  # the whole clip at once
    assert close(ours, model.decode(2 * louder(acts), "encoder", len(wav)), 1e-4)
    assert np.abs(ours - model.reconstruct(wav)).max() > 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize("kind", ["hubert", "whisper"])
def test_encoders_go_on_from_edited_layers(folders, kind):
    model, wav = load(folders / kind), noise(1.03, 5)
    before = model.encode(wav, "layer.1")
    hook = by_hand(model.net.encoder.layers[0], louder)
    expected = model.encode_sites(wav, ["layer.0", "layer.1"])
    hook.remove()
    with model.editing("layer.0", louder):
        ours = model.encode_sites(wav, ["layer.0", "layer.1"])
    assert all(np.array_equal(ours[site], acts) for site, acts in expected.items())
    assert np.abs(before - ours["layer.1"]).max() > 1e-3 and np.array_equal(model.encode(wav, "layer.1"), before)
    with pytest.raises(EqknobsError, match="is an encoder"):
        model.reconstruct(wav)
    with pytest.raises(EqknobsError, match="no site"), model.editing("layer.2", louder):
        pass
    with (
        pytest.raises(EqknobsError, match=r"edit at small\.layer\.0 turned"),
        model.editing("layer.0", lambda x: x[:, 1:]),
    ):
        model.encode(wav, "layer.0")
    assert not model.net.encoder.layers[0]._forward_hooks


def test_whisper_decodes_words_from_edited_layers(folders):
    """What the decoder reads, and what it makes of it, is the same as with a hook by hand."""
    model, wav = load(folders / "whisper"), noise(1.03, 5)
    tokens = torch.tensor([[1, 5, 7]])

    def heard():
        with torch.inference_mode():
            memory = model.hear([wav]).states
            return memory, model.net.decoder(tokens, encoder_hidden_states=memory).last_hidden_state

    plain, hook = heard(), by_hand(model.net.encoder.layers[1], louder)
    expected = heard()
    hook.remove()
    with model.editing("layer.1", louder):
        ours = heard()
    assert ours[0].shape == (1, 1500, 32)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected)) and not torch.equal(ours[1], plain[1])


# Loading


def test_revision_of_a_folder_is_its_weights_hash(folders, mimi, tmp_path):
    from eqknobs.io import file_sha256

    expected = file_sha256(folders / "mimi/model.safetensors")[:12]
    assert mimi.revision == expected
    assert load(folders / "mimi", revision=expected).revision == expected
    with pytest.raises(EqknobsError, match=r"has weights .* not 000000000000"):
        load(folders / "mimi", revision="000000000000")


def test_hub_model_at_a_pinned_revision(folders, mimi, tmp_path, monkeypatch):
    """A model in the hub's cache, offline: its revision is the commit, and another commit is not there."""
    commit, other = "0123456789abcdef0123456789abcdef01234567", "f" * 40
    repository = tmp_path / "models--someone--small-mimi"
    shutil.copytree(folders / "mimi", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (commit, None):
        model = load("someone/small-mimi", "mimi", revision=revision)
        assert model.revision == commit
    wav = noise(0.5)
    assert np.array_equal(model.encode(wav, "encoder_layer.0"), mimi.encode(wav, "encoder_layer.0"))
    with pytest.raises(EqknobsError, match="cannot load 'someone/small-mimi'"):
        load("someone/small-mimi", "mimi", revision=other)


def test_half_precision_weights_become_float32(folders, tmp_path):
    net = MimiModel.from_pretrained(folders / "mimi", dtype=torch.float16)
    net.save_pretrained(tmp_path)
    model = load(tmp_path, "mimi")
    assert {p.dtype for p in model.net.parameters()} == {torch.float32} and not model.net.training
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * (folders / "mimi/model.safetensors").stat().st_size


def test_loading_errors_are_one_clear_line(folders, tmp_path, monkeypatch):
    def refused(folder, match, **changes):
        with pytest.raises(EqknobsError, match=match) as caught:
            load(folder, **{"kind": "mimi"} | changes)
        assert "\n" not in str(caught.value)

    def copy(name):
        return Path(shutil.copytree(folders / "mimi", tmp_path / name))

    empty = copy("empty")
    (empty / "model.safetensors").unlink()
    refused(empty, "has no weights")
    for name in ("pytorch_model.bin", "weights.pt"):
        torch.save({}, empty / name)
        refused(empty, "pickled weights")
        (empty / name).unlink()
    cut = copy("cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(cut, "cannot load the safetensors weights")
    bare = copy("bare")
    (bare / "config.json").unlink()
    refused(bare, "no config")
    broken = copy("broken")
    (broken / "config.json").write_text('{"model_type": "mimi",')
    refused(broken, r"cannot read config\.json")

    from safetensors.torch import load_file, save_file

    partial = copy("partial")
    tensors = load_file(partial / "model.safetensors")
    first = next(key for key in sorted(tensors) if "downsample" in key)
    del tensors[first]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    refused(partial, "lack 1 tensors")
    misshapen = copy("misshapen")
    tensors[first] = torch.zeros(3)
    save_file(tensors, misshapen / "model.safetensors", metadata={"format": "pt"})
    refused(misshapen, "cannot load the safetensors weights|lack 1 tensors")

    refused(folders / "encodec", "of type 'encodec', not 'mimi'")
    refused(folders / "mimi", "unknown kind 'tape'", kind="tape")
    refused(tmp_path / "nowhere", "no folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/such-model", "cannot load 'nobody/such-model'.*hub id.*network")
    if not torch.cuda.is_available():
        refused(folders / "mimi", "no GPU", device="cuda")


# GPU lock


HOLD_LOCK = """
import sys, time
from eqknobs.device import gpu_lock
with gpu_lock("cuda"), gpu_lock("cuda"):  # nested: must not wait for itself
    print(sys.argv[1], "in", file=open("log", "a"))
    time.sleep(0.3)
    print(sys.argv[1], "out", file=open("log", "a"))
"""


def test_gpu_lock_excludes_other_processes(tmp_path):
    env = os.environ | {"TMPDIR": str(tmp_path)}
    jobs = [subprocess.Popen([sys.executable, "-c", HOLD_LOCK, name], cwd=tmp_path, env=env) for name in "abc"]
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    words = (tmp_path / "log").read_text().split()
    assert len(words) == 12
    assert all(words[i : i + 4] == [words[i], "in", words[i], "out"] for i in range(0, 12, 4))


def test_who_waits_for_the_gpu_says_for_whom(tmp_path):
    """Another run in another folder, say, which the `gpu` resource of Snakemake knows nothing of."""
    pipes = {"env": os.environ | {"TMPDIR": str(tmp_path)}, "stderr": subprocess.PIPE, "text": True}
    holds = HOLD_LOCK.replace("time.sleep(0.3)", "time.sleep(600)")
    (tmp_path / "one").mkdir()
    first = subprocess.Popen([sys.executable, "-c", holds, "a"], cwd=tmp_path / "one", **pipes)
    try:
        while not (tmp_path / "one/log").exists():
            assert first.poll() is None
            time.sleep(0.02)
        second = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, "b"], cwd=tmp_path, **pipes)
        said = second.stderr.readline()
    finally:
        first.kill()
    assert said == f"waiting for the GPU: process {first.pid} in {tmp_path / 'one'} holds it\n"
    assert second.wait(60) == 0  # the lock is gone with its process


def test_gpu_lock_leaves_the_cpu_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with gpu_lock("cpu"):
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["mimi", "encodec", "dac"])
def test_tokens_are_all_that_a_listener_needs(folders, kind):
    model, site = load(folders / kind), "encoder_transformer" if kind == "mimi" else "encoder"
    wav = noise(0.7)
    acts = model.encode(wav, site)
    for codebooks in (model.n_codebooks, model.min_codebooks):
        heard = model.decode_tokens(model.tokens(acts, site, codebooks), len(wav))
        assert close(heard, model.decode(acts, site, len(wav), codebooks), 1e-5)


def test_an_encoder_has_no_tokens_to_decode(folders):
    with pytest.raises(EqknobsError, match="cannot turn tokens into sound"):
        load(folders / "hubert").decode_tokens(np.zeros((1, 3), dtype=int), 100)
