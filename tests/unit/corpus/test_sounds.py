"""The bundled music, sounds and speech: enough of each, all made alike, all free, splits without common pieces."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from eqknobs.corpus.manifest import build_manifest, unite

SOUNDS = Path(__file__).parents[3] / "resources/sounds"
DOMAINS = ("music", "sounds", "speech")
FREE = {"CC0-1.0", "CC-BY-3.0", "CC-BY-SA-3.0", "GPL-2", "GPL-2+", "GPL-3+", "public-domain"}
DATA = {"max_utterances": 500, "max_minutes": 60, "min_seconds": 2, "max_seconds": 10, "split_by": None}
DATA |= {"splits": {"train": 0.6, "val": 0.2, "test": 0.2}}


@pytest.fixture(scope="module")
def manifests():
    labels = {domain: {"labels": str(SOUNDS / f"{domain}.csv")} for domain in DOMAINS}
    return {domain: build_manifest(SOUNDS / domain, DATA | labels[domain], 0) for domain in DOMAINS}


def test_all_crops_went_through_the_same(manifests):
    for domain in DOMAINS:
        levels = []
        for path in sorted((SOUNDS / domain).glob("*/*")):
            info = sf.info(path)
            assert (info.format, info.subtype, info.samplerate, info.channels) == ("OGG", "OPUS", 16000, 1)
            audio, _ = sf.read(path)
            assert len(audio) == 48000
            levels.append(10 * np.log10(np.mean(audio**2)))
        assert abs(np.median(levels) + 23) < 0.5 and max(levels) < -22
    assert sum(path.stat().st_size for path in SOUNDS.rglob("*") if path.is_file()) < 12e6


def test_six_minutes_of_each_from_several_free_sources(manifests):
    for domain in DOMAINS:
        manifest, rejected = manifests[domain]
        assert rejected.empty and manifest["seconds"].sum() > 6 * 60
        assert manifest["source"].nunique() >= 2 and (manifest.groupby("source").size() >= 20).all()
        assert (manifest.groupby("speaker")["split"].nunique() == 1).all()
        labels = pd.read_csv(SOUNDS / f"{domain}.csv")
        assert len(labels) == len(manifest) and labels["author"].notna().all()
        assert domain == "speech" or set(labels["licence"]) <= FREE


def test_the_domains_make_one_corpus(manifests):
    mix, _ = unite({domain: manifests[domain][0] for domain in DOMAINS})
    assert set(mix["domain"]) == set(DOMAINS) and mix["sha256"].is_unique
