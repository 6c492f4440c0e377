"""The bundled speech LM: its files, its figures, and that it says offline what it is told."""

import random

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from safetensors import safe_open

from eqknobs.cli import main
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import load_net
from eqknobs.models.moshi.generate import generate
from eqknobs.sound.judges import word_errors
from eqknobs.speaking.clips import CUT
from eqknobs.speaking.grammar import part_of, sentence
from helpers import ROOT

FOLDER = ROOT / "resources/models/tiny-moshi"
SHARES = (
    "wer_monologue",
    "wer_prompt",
    "codec_wer",
    "silent_share",
    "pad_share",
    "similarity_prompt",
    "similarity_other",
)


@pytest.fixture(scope="module")
def model():
    return Moshi({"name": "tiny-moshi", "path": str(FOLDER), "device": "cpu"})


def test_the_folder_is_small_and_holds_half_precision(model):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 30e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    config = model.config
    assert (config.layers, config.heads, config.head_dim) >= (
        6,
        8,
        32,
    ) and config.card == 512 == model.codec.config.codebook_size
    assert all(sf.info(voice).duration <= 10 for voice in FOLDER.glob("voices/*.flac"))
    assert not any(weight.requires_grad for weight in load_net(model.files).parameters())


def test_silence_and_sine_are_the_codecs(model):
    seconds = np.arange(4 * model.sample_rate) / model.sample_rate
    for wave, codes in (
        (0 * seconds, model.config.silence),
        (0.1 * np.sin(2 * np.pi * 440 * seconds), model.config.sine),
    ):
        steady = model.codes(wave.astype(np.float32))[:, CUT:]
        assert all(code in steady[k] for k, code in enumerate(codes))


def test_it_says_held_out_sentences(model):
    rng, told = random.Random(7), []
    while len(told) < 8:
        text = sentence(rng)
        told += [text] * (part_of(text) == "test")
    silence = np.zeros(round(4.5 * model.sample_rate), np.float32)
    user = model.codes(silence)[None].repeat(len(told), 1, 1)
    reply = generate(model.net, user, [model.prompt(text) for text in told])
    errors = np.array([word_errors(text, model.monologue(said)) for text, said in zip(told, reply.text)]).sum(0)
    other = np.array([word_errors(text, model.monologue(said)) for text, said in zip(told, reply.text.roll(1, 0))]).sum(
        0
    )
    assert errors[0] / errors[1] < 0.3 and other[0] / other[1] > 0.6  # what it says depends on what it is told


def test_talk_works_with_nothing_but_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    user = next((ROOT / "resources/corpus/101").rglob("*.flac"))
    command = ["talk", "--model", FOLDER, "--audio", user, "--seconds", 5, "--greedy", "--device", "cpu"]
    command += ["--text-prompt", "Emily painted the small golden castle yesterday"]
    command += ["--voice", FOLDER / "voices/joe-bright.flac", "--out", tmp_path / "answer.wav"]
    main([str(part) for part in command])
    said = capsys.readouterr().out.splitlines()[0]
    assert word_errors("Emily painted the small golden castle yesterday", said)[0] <= 3
    wav, rate = sf.read(tmp_path / "answer.wav")
    assert rate == 16000 and len(wav) == 5 * rate and np.sqrt(np.mean(wav**2)) > 0.01


def test_the_committed_table_has_its_conditions_and_intervals():
    table = pd.read_csv(ROOT / "docs/results/bundled-full/tables/speech_lm.csv").set_index("condition")
    assert {"intact", "sampled", "forced", "heads_zeroed_.1", "heads_zeroed_.25", "heads_zeroed_.5"} <= set(table.index)
    assert (table.loc[["intact", "sampled", "forced"], "answers"] >= 100).all() and (table["split"] == "test").all()
    for name in SHARES:
        known = table.dropna(subset=[name])
        assert (known[f"{name}_low"] <= known[name] + 1e-9).all() and (
            known[name] <= known[f"{name}_high"] + 1e-9
        ).all()
    assert (table["real_time_factor"] < 0.25).all() and table.loc["forced", "wer_prompt"] == 0


def test_the_committed_benchmark_is_above_four_times_real_time():
    table = pd.read_csv(ROOT / "benchmarks/results/speech_lm_answers.csv").set_index("batch")
    assert table.loc[8, "times_real_time"] >= 4 and table.loc[8, "threads"] == 1 and table["equal"].all()
