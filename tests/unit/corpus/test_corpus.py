"""The bundled corpus holds what its README says."""

import csv
import random
import re
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from eqknobs.io import read_text_csv
from helpers import ROOT

CORPUS = ROOT / "resources" / "corpus"


@pytest.fixture(scope="module")
def labels() -> pd.DataFrame:
    return read_text_csv(CORPUS / "labels.csv")


@pytest.fixture(scope="module")
def voices() -> pd.DataFrame:
    return pd.read_csv(CORPUS / "voices.csv", dtype={"speaker": str}, keep_default_na=False)


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(CORPUS.rglob("*.flac")):
        info = sf.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16"), path
        found[path.stem] = sf.read(path)[0]
    return found


@pytest.fixture(scope="module")
def transcripts() -> dict[str, str]:
    lines = [line for p in sorted(CORPUS.rglob("*.trans.txt")) for line in p.read_text().splitlines()]
    return dict(line.split(" ", 1) for line in lines)


def test_labels_transcripts_and_files_name_the_same_clips(labels, clips, transcripts):
    assert labels.id.is_unique
    assert set(labels.id) == set(clips) == set(transcripts)
    assert all((CORPUS / s / c / f"{s}-{c}-{n}.flac").exists() for s, c, n in labels.id.str.split("-"))
    assert (labels.id.str.split("-").str[0] == labels.speaker).all()


def test_voices_sexes_and_accents(labels, voices):
    assert len(voices) >= 12
    assert set(voices.speaker) == set(labels.speaker)
    assert min(Counter(voices.sex)["F"], Counter(voices.sex)["M"]) >= 6
    assert voices.accent.nunique() >= 2
    unheard = voices[voices.codec_training == "unheard"]
    assert len(unheard) == 4
    assert set(unheard.sex) == {"F", "M"}
    assert set(voices.codec_training) == {"heard", "unheard"}
    shared = ["sex", "accent", "source", "derived_from", "codec_training"]
    merged = labels.merge(voices, on="speaker", suffixes=("", "_voice"))
    assert all((merged[c] == merged[f"{c}_voice"]).all() for c in shared)


def test_derived_voices_name_a_source_that_is_in_the_corpus(voices):
    derived = voices[voices.derived_from != ""]
    originals = set(voices[voices.derived_from == ""].source)
    assert len(derived) > 0
    assert set(derived.derived_from) <= originals


def test_every_voice_is_intelligible(voices):
    assert voices.wer.between(0, 0.15).all()
    assert voices.wer.max() > 0


def test_size_durations_and_levels(clips):
    files = [p for p in CORPUS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 16e6
    seconds = np.array([len(a) / 16000 for a in clips.values()])
    assert seconds.min() >= 2
    assert seconds.max() <= 7
    assert 13 <= seconds.sum() / 60 <= 16
    levels = np.array([10 * np.log10(np.mean(a**2)) for a in clips.values()])
    assert levels.min() > -28
    assert levels.max() < -19
    assert levels.std() > 1
    assert max(np.abs(a).max() for a in clips.values()) < 1


def test_a_test_split_of_four_speakers_has_fifty_clips(labels):
    assert labels.groupby("speaker").size().nsmallest(4).sum() >= 50


def test_speakers_file_is_in_librispeechs_form(voices):
    rows = [
        [field.strip() for field in line.split("|")]
        for line in (CORPUS / "SPEAKERS.TXT").read_text().splitlines()
        if not line.startswith(";")
    ]
    assert [(r[0], r[1], r[4]) for r in rows] == list(zip(voices.speaker, voices.sex, voices.voice, strict=True))
    assert all(0.5 < float(r[3]) < 2 for r in rows)


def test_texts_are_distinct_plain_and_from_the_pool(transcripts):
    assert len(set(transcripts.values())) == len(transcripts)
    assert all(re.fullmatch(r"[A-Z' ]+", t) for t in transcripts.values())
    with (CORPUS / "sentences.csv").open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert all(row["book"] for row in rows)
    pool = {re.sub(r"[^A-Z' ]+", " ", r["text"].upper().replace("-", " ")).split().__str__() for r in rows}
    assert {t.split().__str__() for t in transcripts.values()} <= pool


def test_training_sentences_vary_and_are_never_the_corpus(transcripts, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import synthesise

    rng = random.Random(1)
    made = [synthesise.training_sentence(rng) for _ in range(4000)]
    assert len(set(made)) > 3900
    assert len({w for t in made for w in synthesise.plain(t).split()}) > 350
    assert not {synthesise.plain(t) for t in made} & set(transcripts.values())
    assert [v.heard for v in synthesise.VOICES].count(False) == 4
    sys.modules.pop("synthesise")
