import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from eqknobs import data
from eqknobs.errors import EqknobsError

LIBRISPEECH = Path(__file__).resolve().parents[3] / "shared" / "librispeech"
CFG = {
    "source": "folder",
    "labels": None,
    "max_utterances": 1000,
    "max_minutes": 1000,
    "min_seconds": 0.5,
    "max_seconds": 20.0,
    "splits": {"train": 0.5, "val": 0.25, "test": 0.25},
}


def clip(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1, level: float = 0.1) -> Path:
    """Noise of its own for each path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(hashlib.sha256(path.name.encode() + bytes(path.parent)).hexdigest()[:8], 16))
    sf.write(path, level * rng.uniform(-1, 1, (round(seconds * rate), channels)), rate)
    return path


def librispeech(root: Path, speakers: int = 8, clips: int = 3, extra: str = "") -> Path:
    """A corpus in LibriSpeech's layout, speakers 10…, women on even numbers."""
    lines = ["; comment", ";ID  |SEX| SUBSET |MINUTES| NAME"]
    for speaker in range(10, 10 + speakers):
        lines.append(f"{speaker}   | {'FM'[speaker % 2]} | dev-clean | 8.0 | Reader, {speaker}")
        folder = root / "LibriSpeech" / "dev-clean" / str(speaker) / "77"
        names = [f"{speaker}-77-{i:04d}{extra}" for i in range(clips)]
        for name in names:
            clip(folder / f"{name}.flac")
        (folder / f"{speaker}-77.trans.txt").write_text("".join(f"{n} HELLO FROM {n}\n" for n in names))
    (root / "LibriSpeech" / "SPEAKERS.TXT").write_text("\n".join(lines) + "\n")
    return root


# --- manifest ---


def test_librispeech_layout_is_recognised(tmp_path):
    manifest, rejected = data.build_manifest(librispeech(tmp_path), CFG, 0)
    assert manifest.columns.tolist() == data.MANIFEST_COLUMNS
    assert len(manifest) == 24 and rejected.empty and rejected.columns.tolist() == ["path", "reason"]
    row = manifest.set_index("id").loc["13-77-0002"]
    assert (row.speaker, row.sex, row.text, row.seconds) == ("13", "M", "HELLO FROM 13-77-0002", 1.0)
    assert row.sha256 == hashlib.sha256(Path(row.path).read_bytes()).hexdigest()
    assert manifest.id.is_unique


def test_speakers_txt_above_the_folder_is_found(tmp_path):
    librispeech(tmp_path)
    manifest, _ = data.build_manifest(tmp_path / "LibriSpeech" / "dev-clean", CFG, 0)
    assert set(manifest.sex) == {"F", "M"}


def test_splits_share_no_speaker_and_spread_the_sexes(tmp_path):
    librispeech(tmp_path, speakers=12, clips=1)
    for seed in range(5):
        manifest, _ = data.build_manifest(tmp_path, CFG, seed)
        people = manifest.groupby("split")["speaker"].agg(set)
        assert {name: len(group) for name, group in people.items()} == {"train": 6, "val": 3, "test": 3}
        assert len(set.union(*people)) == 12
        counts = pd.crosstab(manifest.split, manifest.sex)
        assert counts.min().min() >= 1 and counts.loc["train"].tolist() == [3, 3]


def test_draw_is_seeded_balanced_and_within_both_limits(tmp_path):
    librispeech(tmp_path, speakers=5, clips=6)
    cfg = CFG | {"max_utterances": 13}
    first, again, other = (data.build_manifest(tmp_path, cfg, seed)[0] for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert set(first.id) != set(other.id)
    assert sorted(first.groupby("speaker").size()) == [2, 2, 3, 3, 3]
    short, _ = data.build_manifest(tmp_path, CFG | {"max_minutes": 7.5 / 60}, 0)
    assert len(short) == 7 and short.seconds.sum() <= 7.5


def test_one_more_file_does_not_reshuffle_the_draw(tmp_path):
    librispeech(tmp_path, speakers=5, clips=6)
    cfg = CFG | {"max_utterances": 10}
    before, _ = data.build_manifest(tmp_path, cfg, 0)
    clip(tmp_path / "LibriSpeech" / "dev-clean" / "10" / "77" / "10-77-9999.flac")
    after, _ = data.build_manifest(tmp_path, cfg, 0)
    assert len(set(before.id) - set(after.id)) <= 1
    assert before.set_index("speaker").split.to_dict() == after.set_index("speaker").split.to_dict()


def test_folder_of_any_audio_unicode_and_spaces(tmp_path, monkeypatch):
    corpus = tmp_path / "Größe ünd 音声"
    for speaker in ("Zoë", "名前", "a b"):
        clip(corpus / speaker / "clip one.wav", rate=8000)
        clip(corpus / speaker / "clip, two.ogg", rate=48000, channels=2)
        clip(corpus / speaker / "HIGH.WAV", rate=96000)
        (corpus / speaker / "notes.txt").write_text("not audio, and not meant as audio")
    monkeypatch.chdir(tmp_path)
    manifest, rejected = data.build_manifest(corpus, CFG, 0)
    assert len(manifest) == 9 and rejected.empty
    assert set(manifest.speaker) == {"Zoë", "名前", "a b"}
    assert manifest.id.is_unique and not manifest.id.str.contains("/").any()
    assert all(path.startswith("Größe ünd 音声/") and Path(path).is_file() for path in manifest.path)
    assert manifest.seconds.tolist() == pytest.approx([1.0] * 9, abs=0.01)


def test_bad_files_are_listed_with_the_reason_and_the_rest_is_used(tmp_path):
    librispeech(tmp_path, speakers=4, clips=2)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.wav").write_text("hello")
    (bad / "zero.flac").touch()
    sf.write(bad / "empty.wav", np.zeros(0), 16000)
    cut = clip(bad / "cut.flac", 2)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    sf.write(bad / "silent.flac", np.zeros(16000), 16000)
    sf.write(bad / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    clip(bad / "short.wav", 0.2)
    clip(bad / "long.wav", 21, rate=4000)
    (bad / "apple.m4a").write_bytes(b"....ftypM4A")
    (bad / "gone.wav").symlink_to(tmp_path / "nowhere")
    original = tmp_path / "LibriSpeech/dev-clean/10/77/10-77-0000.flac"
    (bad / "copy.flac").write_bytes(original.read_bytes())
    manifest, rejected = data.build_manifest(tmp_path, CFG, 0)
    reasons = {Path(row.path).name: row.reason for row in rejected.itertuples()}
    twin = reasons.pop("copy.flac", None) or reasons.pop("10-77-0000.flac")
    assert twin == "same content as another file"
    expected = {
        "text.wav": "not readable as audio",
        "zero.flac": "not readable as audio",
        "empty.wav": "empty",
        "cut.flac": "not readable as audio",
        "silent.flac": "silent",
        "nan.wav": "holds NaN",
        "short.wav": "too short (0.20 s)",
        "long.wav": "too long (21.00 s)",
        "apple.m4a": "format not supported",
        "gone.wav": "not a regular file",
    }
    assert reasons.keys() == expected.keys()
    assert all(reasons[name].startswith(text) for name, text in expected.items())
    assert len(manifest) == 8


def test_none_left_is_an_error_that_counts_the_reasons(tmp_path):
    for i in range(3):
        clip(tmp_path / "a" / f"{i}.wav", 0.1)
    (tmp_path / "a" / "text.wav").write_text("x")
    with pytest.raises(EqknobsError, match=r"no usable utterance left \(3 × too short; 1 × not readable as audio\)"):
        data.build_manifest(tmp_path, CFG, 0)
    (tmp_path / "void").mkdir()
    with pytest.raises(EqknobsError, match="no audio files found"):
        data.build_manifest(tmp_path / "void", CFG, 0)


@pytest.mark.parametrize("speakers", [1, 2])
def test_too_few_speakers(tmp_path, speakers):
    with pytest.raises(EqknobsError, match=rf"{speakers} speaker\(s\) left.*at least 3"):
        data.build_manifest(librispeech(tmp_path, speakers), CFG, 0)


def test_three_speakers_make_three_splits(tmp_path):
    manifest, _ = data.build_manifest(
        librispeech(tmp_path, 3), CFG | {"splits": dict(train=0.98, val=0.01, test=0.01)}, 0
    )
    assert manifest.groupby("split")["speaker"].nunique().to_dict() == {"train": 1, "val": 1, "test": 1}


def test_fractions_must_add_up(tmp_path):
    with pytest.raises(EqknobsError, match=r"add up to 0.9"):
        data.build_manifest(librispeech(tmp_path), CFG | {"splits": {"train": 0.5, "val": 0.2, "test": 0.2}}, 0)


def test_labels_by_id_path_and_speaker(tmp_path):
    for name in ("a", "b", "c"):
        clip(tmp_path / "flat" / f"{name} é.wav")
    decomposed = "e\u0301"  # as macOS writes file names
    tables = {
        "id": f"id,speaker,sex,accent,text\na é,01,female,Scottish,Hi\nb {decomposed},2,m,,\nc é,3,,US,\n",
        "path": "path,speaker,sex,accent,text\na é.wav,01,F,Scottish,Hi\nb é.wav,2,M,,\nc é.wav,3,,US,\n",
    }
    for key, table in tables.items():
        (tmp_path / "labels.csv").write_text(table, encoding="utf-8-sig")
        manifest, _ = data.build_manifest(tmp_path / "flat", CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
        assert manifest[["speaker", "sex", "accent", "text"]].to_numpy().tolist() == [
            ["01", "F", "Scottish", "Hi"],
            ["2", "M", "", ""],
            ["3", "", "US", ""],
        ], key
    librispeech(tmp_path / "corpus")
    (tmp_path / "labels.csv").write_text("speaker,sex,accent\n11,F,Irish\n")
    manifest, _ = data.build_manifest(tmp_path / "corpus", CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
    assert set(manifest[manifest.speaker == "11"].accent) == {"Irish"}
    assert set(manifest[manifest.speaker == "11"].sex) == {"F"} and set(manifest[manifest.speaker == "13"].sex) == {"M"}


def test_split_by_keeps_derived_voices_together(tmp_path):
    librispeech(tmp_path, speakers=9, clips=1)
    rows = [f"{speaker},base{speaker % 3}" for speaker in range(10, 19)]
    (tmp_path / "labels.csv").write_text("speaker,voice\n" + "\n".join(rows) + "\n")
    cfg = CFG | {"labels": str(tmp_path / "labels.csv"), "split_by": "voice"}
    manifest, _ = data.build_manifest(tmp_path, cfg, 0)
    manifest["voice"] = manifest.speaker.astype(int) % 3
    assert (manifest.groupby("voice")["split"].nunique() == 1).all() and manifest.split.nunique() == 3
    with pytest.raises(EqknobsError, match="no column accent"):
        data.build_manifest(tmp_path, cfg | {"split_by": "accent"}, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,sex\na,F\n", "no column id, path or speaker"),
        ("id,sex\nnobody,F\n", "no row matches a file"),
        ("id,sex\n10-77-0000,F\n10-77-0000,M\n", "occurs twice"),
        ("", "not a readable UTF-8 CSV"),
        (None, "no file"),
    ],
)
def test_bad_labels(tmp_path, content, message):
    librispeech(tmp_path, 3, 1)
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EqknobsError, match=message):
        data.build_manifest(tmp_path, CFG | {"labels": str(path)}, 0)


def test_equal_names_in_two_folders_get_ids_of_their_own(tmp_path):
    for speaker in "abc":
        clip(tmp_path / speaker / "take.wav")
        clip(tmp_path / speaker / "take.flac")
    manifest, _ = data.build_manifest(tmp_path, CFG, 0)
    assert len(manifest) == 6 and manifest.id.is_unique


@pytest.mark.skipif(not LIBRISPEECH.is_dir(), reason="no real speech here")
def test_real_librispeech():
    manifest, rejected = data.build_manifest(LIBRISPEECH, CFG | {"max_utterances": 60}, 0)
    assert len(manifest) == manifest.speaker.nunique() == 60 and rejected.empty
    share = (manifest.sex == "F").groupby(manifest.split).mean()
    assert share.between(share.mean() - 0.1, share.mean() + 0.1).all()
