"""Phones from a CSV and from TextGrids, on the frames of a cache; those of the bundled speech."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from eqknobs.audio import write_flac
from eqknobs.corpus.labels import write_labels
from eqknobs.corpus.phones import phone_codes, read_phones
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256, write_csv

CORPUS = Path(__file__).parents[3] / "resources/corpus"
CFG = {"crepe": "tiny", "periodicity": 0.5, "floor_db": 40, "fmin": 50, "fmax": 550, "n_mels": 8}
CSV = "id,start,end,phone\na,0,0.1,SIL\na,0.1,0.25,k\na,0.3,0.5,ae\nb,0,1,\n"
LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 1.5
        points: size = 1
        points [1]:
            number = 0.3
            mark = "x"
    item [2]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = "say ""2 x"" 3"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 1.5
            text = "AH1"
"""
SHORT = (
    '"ooTextFile"\n"TextGrid"\n0\n1.5\n<exists>\n1\n"IntervalTier"\n"any"\n0\n1.5\n2\n0\n0.5\n"sp"\n0.5\n1.5\n"AH1"\n'
)


def test_a_frame_has_the_phone_said_in_its_middle(tmp_path):
    (tmp_path / "phones.csv").write_text(CSV)
    middles = [np.array([0.05, 0.1, 0.26, 0.45, 0.5]), np.array([0.5]), np.array([0.5])]
    codes, names = phone_codes(read_phones(tmp_path / "phones.csv"), ["a", "b", "c"], middles)
    assert names == ["SIL", "ae", "k", "sil"]
    assert [code.tolist() for code in codes] == [[0, 2, -1, 1, -1], [3], [-1]]


@pytest.mark.parametrize("text, encoding", [(LONG, "utf-8"), (LONG, "utf-16"), (SHORT, "utf-8")])
def test_textgrids(tmp_path, text, encoding):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/x.TextGrid").write_text(text, encoding=encoding)
    assert read_phones(tmp_path)["x"].to_numpy().tolist() == [[0, 0.5, "sil"], [0.5, 1.5, "AH1"]]


def test_bad_files_are_refused(tmp_path):
    file = tmp_path / "x.csv"
    for text, match in (
        ("id,start,end\na,0,1\n", "no column phone"),
        ("id,start,end,phone\na,0,x,k\n", "no number"),
        ("id,start,end,phone\na,0,1,k\na,0.5,2,k\n", "overlap"),
    ):
        file.write_text(text)
        with pytest.raises(EqknobsError, match=match):
            read_phones(file)
    with pytest.raises(EqknobsError, match="no file"):
        read_phones(tmp_path / "nowhere")
    with pytest.raises(EqknobsError, match=r"no \.TextGrid"):
        read_phones(tmp_path)
    for text, match in ((LONG[:300], "no whole TextGrid"), (LONG.replace('"phones"', '"x"'), "only words, x")):
        (tmp_path / "x.TextGrid").write_text(text)
        with pytest.raises(EqknobsError, match=match):
            read_phones(tmp_path)


def test_labels_hold_phones(tmp_path):
    """Of a cache that keeps a run of a clip's frames too: row t is of the phone in that frame's middle."""
    write_flac(tmp_path / "a.flac", np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1, 16000)
    sha = file_sha256(tmp_path / "a.flac")
    write_csv(tmp_path / "m.csv", pd.DataFrame([{"id": "x-a", "path": str(tmp_path / "a.flac"), "sha256": sha}]))
    with h5py.File(tmp_path / "cache.h5", "w") as file:
        file.attrs.update({"sample_rate": 16000, "hop": 1600})
        file["activations"] = np.zeros((4, 2), np.float32)
        table = file.create_group("utterances")
        for name, value in dict(id="x-a", sha256=sha, start=0, frames=4, first=1, clip_frames=10).items():
            table[name] = [value]
    (tmp_path / "phones.csv").write_text("id,start,end,phone\na,0,0.2,k\na,0.2,0.4,ae\n")
    paths = (tmp_path / "m.csv", tmp_path / "cache.h5", tmp_path / "labels.h5")
    write_labels(*paths, CFG | {"phones": {"x-": str(tmp_path / "phones.csv")}})
    with h5py.File(tmp_path / "labels.h5") as file:
        assert file["phone"].attrs["names"].tolist() == ["ae", "k"] and file["phone"][:].tolist() == [1, 0, 0, -1]
    with pytest.raises(EqknobsError, match="names no clip of this corpus"):
        write_labels(*paths, CFG | {"phones": {"": str(tmp_path / "phones.csv")}})
    write_labels(*paths, CFG)
    with h5py.File(tmp_path / "labels.h5") as file:
        assert "phone" not in file


def test_bundled_phones_fit_the_sound():
    """Every clip has its phones, without gaps; fricatives are brighter than vowels, most so where they are said."""
    phones, labels = read_phones(CORPUS / "phones.csv"), pd.read_csv(CORPUS / "labels.csv")
    assert set(phones) == set(labels["id"])
    names = {name for rows in phones.values() for name in rows["phone"]}
    assert len(names) == 40 and "sil" in names
    for source, clips in labels.groupby("source"):
        found = {shift: {"vowel": [], "fricative": []} for shift in (-0.06, 0, 0.06)}
        for id in clips["id"][:14]:
            wav, rate = sf.read(next(CORPUS.glob(f"*/*/{id}.flac")))
            rows = phones[id]
            assert rows["start"][0] == 0 and abs(rows["end"].iloc[-1] - len(wav) / rate) < 0.001
            assert np.allclose(rows["start"][1:], rows["end"][:-1], atol=0.002)
            frames = wav[: len(wav) // 160 * 160].reshape(-1, 160)
            power = np.abs(np.fft.rfft(frames * np.hanning(160), axis=1))
            bright = power @ np.fft.rfftfreq(160, 1 / rate) / np.maximum(power.sum(1), 1e-9)
            for shift, groups in found.items():
                middles = (np.arange(len(frames)) + 0.5) / 100 + shift
                (codes,), own = phone_codes(phones, [id], [middles])
                said = np.array([*own, ""])[codes]
                groups["vowel"].append(bright[np.isin(said, ["aa", "ae", "ah", "iy", "ow", "er", "ey", "ay"])])
                groups["fricative"].append(bright[np.isin(said, ["s", "z", "sh", "ch"])])
        gap = {s: np.concatenate(g["fricative"]).mean() - np.concatenate(g["vowel"]).mean() for s, g in found.items()}
        assert gap[0] > 1.3 * max(gap[-0.06], gap[0.06]) and gap[0] > 1000, (source, gap)
