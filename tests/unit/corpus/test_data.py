import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import yaml

from eqknobs.audio import read_samples
from eqknobs.config import DEFAULT, validate
from eqknobs.corpus import manifest as data
from eqknobs.corpus.mixtures import mix, noisy
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, write_csv
from helpers import ROOT
from helpers.corpora import CFG, clip, librispeech

LIBRISPEECH = ROOT.parent / "shared" / "librispeech"


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


def test_splits_by_sentence_share_no_sentence_and_may_share_speakers(tmp_path, capsys):
    librispeech(tmp_path, speakers=6, clips=8)
    for speaker in range(10, 16):
        folder = tmp_path / "LibriSpeech" / "dev-clean" / str(speaker) / "77"
        texts = [f"{speaker}-77-{i:04d} {'Say, it' if speaker % 2 else 'SAY IT'} {i}.\n" for i in range(7)]
        (folder / f"{speaker}-77.trans.txt").write_text("".join(texts))  # the last clip has no text
    cfg = CFG | {"split_unit": "sentence"}
    manifest, _ = data.build_manifest(tmp_path, cfg, 0)
    spoken = manifest[manifest["text"] != ""]
    sentences = spoken["text"].str.casefold().str.replace(r"\W", "", regex=True)
    assert sentences.nunique() == 7 and spoken.groupby(sentences)["split"].nunique().max() == 1
    assert set(manifest["split"]) == {"train", "val", "test"}
    assert spoken.groupby("speaker")["split"].nunique().max() > 1
    assert "6 clips without a text" in capsys.readouterr().out
    pd.testing.assert_frame_equal(manifest, data.build_manifest(tmp_path, cfg, 0)[0])
    splits = [data.build_manifest(tmp_path, cfg, seed)[0].set_index("id")["split"].to_dict() for seed in range(3)]
    assert splits[0] != splits[1] or splits[0] != splits[2]
    for path in tmp_path.rglob("*.trans.txt"):
        path.unlink()
    with pytest.raises(EqknobsError, match="no clip has a text"):
        data.build_manifest(tmp_path, cfg, 0)


def test_columns_that_only_probes_ask_for_are_in_the_manifest(tmp_path):
    librispeech(tmp_path, speakers=3, clips=1)
    write_csv(tmp_path / "labels.csv", pd.DataFrame({"speaker": ["10", "11", "12"], "domain": ["a", "b", ""], "x": 1}))
    manifest, _ = data.build_manifest(tmp_path, CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
    assert manifest.columns.tolist() == [*data.MANIFEST_COLUMNS, "domain"]
    assert manifest.set_index("speaker")["domain"].to_dict() == {"10": "a", "11": "b", "12": ""}


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
        "gone.wav": "link to nowhere",
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
    with pytest.raises(EqknobsError, match=rf"^{'1 speaker' if speakers == 1 else '2 speakers'} left.*at least 3"):
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


# --- who speaks ---


def tree(root: Path, *names: str, suffix: str = "wav") -> Path:
    for name in names:
        clip(root / f"{name}.{suffix}")
    return root


READERS = ("19", "26", "32", "40")
LAYOUTS = {
    "LibriSpeech's archive": [f"LibriSpeech/dev-clean/{r}/{c}/{r}-{c}-0000" for r in READERS for c in ("5", "6")],
    "its subset below another folder": [f"{r}/{c}/{r}-{c}-0000" for r in READERS for c in ("5", "6")],
    "LibriTTS": [f"LibriTTS/dev-clean/{r}/{c}/{r}_{c}_000001_000000" for r in READERS for c in ("5", "6")],
    "VCTK": [f"wav48_silence_trimmed/p{r}0/p{r}0_{n}_mic1" for r in READERS for n in ("001", "002")],
    "one folder a speaker": [f"{r}/{n}" for r in READERS for n in ("a", "b")],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_a_reader_is_one_speaker_in_every_known_layout_and_a_line_says_which(tmp_path, capsys, names):
    manifest, _ = data.build_manifest(tree(tmp_path, *names), CFG, 0)
    assert set(manifest.speaker.str.removeprefix("p").str[:2]) == set(READERS) and manifest.speaker.nunique() == 4
    assert len(manifest) == 8 and manifest.groupby("speaker").split.nunique().max() == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "who speaks" in line)
    assert ": 4 speakers, 8 clips" in line
    assert re.search("LibriSpeech|LibriTTS|VCTK|one folder a speaker", line)


def test_texts_of_libritts_are_the_normalised_ones(tmp_path):
    tree(tmp_path, *LAYOUTS["LibriTTS"])
    for path in tmp_path.rglob("*.wav"):
        if "/5/" in path.as_posix():
            path.with_suffix(".normalized.txt").write_text("One hundred.\n")
        path.with_suffix(".original.txt").write_text("100.\n")
    manifest, _ = data.build_manifest(tmp_path, CFG, 0)
    assert {row.path.split("/")[-2]: row.text for row in manifest.itertuples()} == {"5": "One hundred.", "6": "100."}


AMBIGUOUS = {
    "reader, chapter": [f"{r}/chapter{c}/0001" for r in READERS for c in "12"],
    "reader, chapter named as VCTK's speakers": [f"{r}/p00{c}/p00{c}_1" for r in READERS for c in "12"],
    "reader, chapter in the file's name": [f"{r}/chapter{c}/chapter{c}_1" for r in READERS for c in "12"],
    "dialect, speaker": [f"train/dr{d}/speaker{s}/sa1" for d in "12" for s in "34"],
    "set, speaker": [f"{name}/{r}/a" for name in ("train", "test") for r in READERS],
}


@pytest.mark.parametrize("names", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_folders_in_folders_of_no_known_layout_are_refused_until_told(tmp_path, names):
    tree(tmp_path / "corpus", *names)
    with pytest.raises(
        EqknobsError, match=r"8 files in folders within folders.*set data\.speaker_from|4 files in folder"
    ):
        data.build_manifest(tmp_path / "corpus", CFG, 0)
    rows = "".join(f"{name}.wav,{name[:2]}\n" for name in names)
    (tmp_path / "labels.csv").write_text(f"path,speaker\n{rows}")
    cfg = CFG | {"labels": str(tmp_path / "labels.csv"), "splits": {"train": 0.4, "val": 0.3, "test": 0.3}}
    if len({name[:2] for name in names}) > 2:
        assert set(data.build_manifest(tmp_path / "corpus", cfg, 0)[0].speaker) == {name[:2] for name in names}


@pytest.mark.parametrize(
    ("speaker_from", "speakers"),
    [("parent", {"s1", "s2", "s3"}), ("grandparent", {"g1", "g2", "g3"}), ("top", {"t1", "t2", "t3"})],
)
def test_speaker_from_names_the_folder(tmp_path, capsys, speaker_from, speakers):
    tree(tmp_path, *(f"t{i}/x/g{i}/s{i}/clip{n}" for i in (1, 2, 3) for n in (1, 2)), "above")
    manifest, rejected = data.build_manifest(tmp_path, CFG | {"speaker_from": speaker_from}, 0)
    assert set(manifest.speaker) - {tmp_path.name} == speakers
    if speaker_from != "parent":  # that file has no such folder
        assert rejected.reason.tolist() == [f"no speaker by data.speaker_from: {speaker_from}"]
    assert f"data.speaker_from: {speaker_from}: " in capsys.readouterr().out


def test_speaker_from_goes_before_a_known_layout_and_labels_before_it(tmp_path):
    tree(tmp_path / "corpus", *LAYOUTS["LibriTTS"])
    cfg = CFG | {"speaker_from": "parent", "splits": {"train": 0.4, "val": 0.3, "test": 0.3}}
    with pytest.raises(EqknobsError, match=r"^2 speakers left"):
        data.build_manifest(tmp_path / "corpus", cfg, 0)
    (tmp_path / "labels.csv").write_text("id,speaker\n" + "".join(f"{r}_5_000001_000000,Reader {r}\n" for r in READERS))
    cfg |= {"labels": str(tmp_path / "labels.csv")}
    assert set(data.build_manifest(tmp_path / "corpus", cfg, 0)[0].speaker) == {"6", *(f"Reader {r}" for r in READERS)}
    manifest, rejected = data.build_manifest(tmp_path / "corpus", cfg | {"speaker_from": "labels"}, 0)
    assert set(manifest.speaker) == {f"Reader {r}" for r in READERS} and len(manifest) == len(rejected) == 4
    assert set(rejected.reason) == {"no speaker by data.speaker_from: labels"}


def test_speaker_from_is_checked_with_the_configuration():
    config = yaml.safe_load(DEFAULT.read_text())
    for value in ("parent", "grandparent", "top", "labels", None):
        config["data"]["speaker_from"] = value
        validate(config)
    config["data"] |= {"speaker_from": "labels", "labels": None}
    with pytest.raises(EqknobsError, match=r"data\.labels: is null, but data\.speaker_from names it"):
        validate(config)
    config["data"]["speaker_from"] = "folder"
    with pytest.raises(EqknobsError, match=r"data\.speaker_from: 'folder' is not one of"):
        validate(config)


def test_common_voice_needs_its_table(tmp_path):
    tree(tmp_path / "cv", *(f"{part}/common_voice_en_{n}" for n in range(4) for part in ("clips", "other")))
    with pytest.raises(EqknobsError, match=r"8 files of Common Voice, whose tables name the speakers.*data\.labels"):
        data.build_manifest(tmp_path / "cv", CFG, 0)
    rows = "".join(f"{part}/common_voice_en_{n}.wav,{n}\n" for n in range(4) for part in ("clips", "other"))
    (tmp_path / "labels.csv").write_text(f"path,speaker\n{rows}")
    manifest, _ = data.build_manifest(tmp_path / "cv", CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
    assert manifest.speaker.tolist() == [path[-5] for path in manifest.path]


# --- labels CSV ---


def labelled(tmp_path: Path, table: str, **cfg) -> pd.DataFrame:
    """The manifest of tmp_path/corpus with these labels, by path below the corpus."""
    (tmp_path / "labels.csv").write_text(table)
    manifest, _ = data.build_manifest(tmp_path / "corpus", CFG | {"labels": str(tmp_path / "labels.csv")} | cfg, 0)
    return manifest.assign(path=manifest.path.str.split("/corpus/").str[-1]).set_index("path")


def test_an_id_of_several_files_is_refused_and_a_path_tells_them_apart(tmp_path):
    tree(tmp_path / "corpus", *(f"{speaker}/00{n}" for speaker in "abc" for n in "12"))
    with pytest.raises(EqknobsError, match=r"labels\.csv: id '001' fits 3 files \('a/001\.wav', 'b/001\.wav'.*by path"):
        labelled(tmp_path, "id,speaker,text\n001,x,HELLO\n")
    found = labelled(tmp_path, "path,speaker,text\na/001.wav,x,HELLO\n")
    assert found[found.text == "HELLO"].index.tolist() == ["a/001.wav"]
    assert found.loc["b/001.wav", ["speaker", "text"]].tolist() == ["b", ""]
    assert set(found.id) == {row for row in found.id if re.fullmatch("00[12]-[0-9a-f]{8}", row)}
    found = labelled(tmp_path, f"id,text\n{found.loc['c/002.wav'].id},BYE\n")
    assert found[found.text == "BYE"].index.tolist() == ["c/002.wav"]


def test_one_name_in_two_formats_is_told_apart_by_its_suffix(tmp_path):
    for speaker in "abc":
        clip(tmp_path / "corpus" / speaker / f"{speaker}1.wav")
    clip(tmp_path / "corpus" / "a" / "a1.flac")
    with pytest.raises(EqknobsError, match=r"id 'a1' fits 2 files"):
        labelled(tmp_path, "id,text\na1,HELLO\n")
    found = labelled(tmp_path, "id,text\na1.flac,HELLO\n")
    assert found.text.to_dict() == {"a/a1.flac": "HELLO", "a/a1.wav": "", "b/b1.wav": "", "c/c1.wav": ""}


@pytest.mark.parametrize(
    "table",
    [
        'id, speaker, sex, text\n001, x, F, "Hello, you"\n002, y, M, Bye\n003, z, , \n',
        'ID,Speaker,SEX,Text\n001,x,F,"Hello, you"\n002,y,M,Bye\n003,z,,\n',
        ' id ,speaker ,sex, text \n 001 ,x , F,"Hello, you "\n002,y,M,Bye\n003,z\n,,,\n',
        'id,speaker,sex,text\n1,x,F,"Hello, you"\n2,y,M,Bye\n3,z,,\n',
        'id,speaker,sex,text\n001.wav,x,F,"Hello, you"\n./002.WAV,y,M,Bye\n003.flac,z,,\n',
        'path,speaker,sex,text\n./a/001.wav,x,F,"Hello, you"\na\\002.wav,y,M,Bye\n.\\b//003.wav,z,,\n',
        'path,speaker,sex,text\r\na/001.wav,x,F,"Hello,\r\nyou"\r\na/002.wav,y,M,Bye\r\nb/003.wav,z,,\r\n',
    ],
    ids=["blanks", "capitals", "blanks around", "lost zeros", "suffix", "paths of Windows", "line ends"],
)
def test_labels_written_a_little_otherwise_count(tmp_path, capsys, table):
    tree(tmp_path / "corpus", "a/001", "a/002", "b/003")
    found = labelled(tmp_path, table)
    assert found[["speaker", "sex", "text"]].to_numpy().tolist() == [
        ["x", "F", "Hello, you"],
        ["y", "M", "Bye"],
        ["z", "", ""],
    ]
    assert re.search(r"labels\.csv: 3 of 3 rows name 3 of 3 files by (id|path)", capsys.readouterr().out)


def test_lost_zeros_are_found_again_only_where_one_name_fits(tmp_path, capsys):
    tree(tmp_path / "corpus", "007/1", "008/01", "08/001", "009/2", "a/3", "b/4")
    found = labelled(tmp_path, "speaker,accent\n7,Welsh\n8,Irish\n009,Scottish\na,US\nb,US\n")
    assert found.accent.to_dict() == {
        "007/1.wav": "Welsh",
        "008/01.wav": "",
        "08/001.wav": "",
        "009/2.wav": "Scottish",
        "a/3.wav": "US",
        "b/4.wav": "US",
    }
    said = capsys.readouterr().out
    assert "4 of 5 rows name 4 of 6 files by speaker, 1 of them without their leading zeros; no file for 1: '8'" in said


def test_rows_that_match_no_file_are_counted_and_named_and_too_many_refused(tmp_path, capsys):
    tree(tmp_path / "corpus", *(f"{speaker}/{speaker}{n}" for speaker in "abcd" for n in range(4)))
    rows = [f"{speaker}{n},{speaker}" for speaker in "abcd" for n in range(4)]
    labelled(tmp_path, "\n".join(["id,speaker", *rows[:-1], "x1,d", "x2,d", "x3,d"]))
    assert "15 of 18 rows name 15 of 16 files by id; no file for 3: 'x1', 'x2', 'x3'\n" in capsys.readouterr().out
    with pytest.raises(
        EqknobsError, match=r"no file for 4: 'x1', 'x2', 'x3', …; 1 file without a row: 'd/d3\.wav'; mend"
    ):
        labelled(tmp_path, "\n".join(["id,speaker", *rows[:-1], "x1,d", "x2,d", "x3,d", "x4,d"]))
    labelled(tmp_path, "\n".join(["id,speaker", *rows, *(f"x{i},d" for i in range(90))]))  # a table of a larger corpus
    assert "16 of 106 rows name 16 of 16 files by id; no file for 90: 'x0'" in capsys.readouterr().out


def test_rows_of_files_that_are_rejected_or_not_drawn_match_a_file(tmp_path, capsys):
    tree(tmp_path / "corpus", *(f"{speaker}/{speaker}{n}" for speaker in "abc" for n in range(3)))
    clip(tmp_path / "corpus" / "a" / "short.wav", 0.1)
    (tmp_path / "corpus" / "a" / "apple.m4a").write_bytes(b"....ftypM4A")
    names = [*(f"{speaker}{n}" for speaker in "abc" for n in range(3)), "short", "apple"]
    found = labelled(tmp_path, "\n".join(["id,accent", *(f"{n},US" for n in names)]), max_utterances=3)
    assert len(found) == 3 and "11 of 11 rows name 11 of 11 files by id\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n01.wav,b\n", r"id '1' and '01\.wav' both mean a/001\.wav; keep one row"),
        ("id,Text,text\n001,a,b\n", r"column 'text' occurs twice"),
        ("id,note\n001,a\n", r"no column speaker, sex, accent or text beside id"),
        ("id,text\n", "holds no rows"),
        ("id;speaker\n001;a\n", "only id;speaker; add one, set off by commas"),
        ("id,text\n001,a,b\n", "not a readable UTF-8 CSV"),
        ("id,text\n001,caf\udce9\n", "not a readable UTF-8 CSV"),
        ("id,text\nx,a\ny,b\n", r"no row matches a file of the corpus \(id 'x', 'y'\)"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(tmp_path, content, message):
    tree(tmp_path / "corpus", "a/001", "b/002", "c/003")
    (tmp_path / "labels.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(EqknobsError, match=message) as error:
        data.build_manifest(tmp_path / "corpus", CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("id,path,accent\n,a/001.wav,US\n,b/002.wav,UK\n", "path"),
        ("id,path,accent\nx,a/001.wav,US\nx,b/002.wav,UK\n", "path"),
        ("id,path,speaker,accent\n,,a,US\n , ,b,UK\n", "speaker"),
        ("id,speaker,accent\nx,a,US\ny,b,UK\n", "speaker"),
        ("id,path,accent\n001,nowhere,US\n002,nowhere,UK\n", "id"),
    ],
    ids=["id is empty", "id is another number", "id and path are empty", "no id fits", "the path is another's"],
)
def test_the_key_is_the_first_column_that_fits(tmp_path, capsys, table, key):
    tree(tmp_path / "corpus", "a/001", "b/002", "c/003")
    found = labelled(tmp_path, table)
    assert found.accent.tolist() == ["US", "UK", ""] and found.speaker.tolist() == ["a", "b", "c"]
    assert f"2 of 2 rows name 2 of 3 files by {key}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,path,text\n,,HELLO\n", r"column id and path is empty"),
        ("id,text\n001,HELLO\n,BYE\n,WHO\n", r"2 rows without id; fill"),
        ("id,speaker,text\nx,a,HELLO\n", r"no row matches a file of the corpus \(id 'x'\)"),
        ("id,speaker,sex\nx,a,F\ny,a,F\nz,b,M\n", r"no row matches a file of the corpus \(id 'x', 'y', 'z'\)"),
    ],
    ids=["no key at all", "some without", "rows of files with a text", "rows of files"],
)
def test_rows_without_a_key_are_refused_and_rows_of_files_are_no_rows_of_speakers(tmp_path, table, message):
    tree(tmp_path / "corpus", "a/001", "b/002", "c/003")
    with pytest.raises(EqknobsError, match=message):
        labelled(tmp_path, table)


def test_a_path_from_the_working_directory_counts(tmp_path, monkeypatch):
    tree(tmp_path / "corpus", "a/001", "b/002", "c/003")
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    rows = "../../corpus/a/001.wav,US\n..\\..\\corpus\\b\\002.wav,UK\n"
    found = labelled(tmp_path, f"path,accent\n{rows}{tmp_path}/corpus/c/003.wav,IE\n")
    assert found.accent.tolist() == ["US", "UK", "IE"]


def test_an_id_with_a_line_end_is_the_file_of_that_name(tmp_path):
    tree(tmp_path / "corpus", "a/0\t0\n1", "b/002", "c/003")
    assert labelled(tmp_path, 'id,accent\n"0\t0\n1",US\n').accent.tolist() == ["US", "", ""]


def test_two_columns_of_one_name_matter_only_where_they_are_used(tmp_path):
    tree(tmp_path / "corpus", "a/001", "b/002", "c/003")
    found = labelled(tmp_path, "id,note,Note,text,,\n001,x,y,HELLO,,\n")
    assert found.text.tolist() == ["HELLO", "", ""]
    with pytest.raises(EqknobsError, match=r"column 'note' occurs twice"):
        labelled(tmp_path, "id,note,Note\n001,x,y\n", split_by="note")


def test_a_sex_that_is_not_understood_is_told(tmp_path, capsys):
    tree(tmp_path / "corpus", "a/1", "b/2", "c/3", "d/4")
    found = labelled(tmp_path, "speaker,sex\na,woman\nb,Female\nc,m\nd,\n")
    assert found.sex.tolist() == ["", "F", "M", ""]
    assert "by speaker; sex is neither F nor M: 'woman'\n" in capsys.readouterr().out


def test_labels_by_speaker_ask_for_speaker_from_where_the_folders_do_not_tell(tmp_path):
    tree(tmp_path / "corpus", *AMBIGUOUS["reader, chapter"])
    table = "speaker,sex\n" + "".join(f"{reader},F\n" for reader in READERS)
    with pytest.raises(EqknobsError, match=r"no row matches .*, and see data\.speaker_from"):
        labelled(tmp_path, table)
    assert set(labelled(tmp_path, table, speaker_from="grandparent").sex) == {"F"}


def test_split_by_is_found_whatever_its_case(tmp_path):
    tree(tmp_path / "corpus", *(f"{speaker}/1" for speaker in "abcdef"))
    table = "speaker,Voice\n" + "".join(f"{speaker},v{i // 2}\n" for i, speaker in enumerate("abcdef"))
    found = labelled(tmp_path, table, split_by="voice ")
    assert found.groupby(found.speaker.map(lambda s: "abcdef".index(s) // 2)).split.nunique().max() == 1


@pytest.mark.parametrize("column", "named file name layout seconds path group split sha256 speaker_id".split())
def test_a_column_of_split_by_may_have_any_name(tmp_path, column):
    """What the labels say of the groups overwrites nothing that is known of a file."""
    corpus = tree(tmp_path / "corpus", *(f"{speaker}/{speaker}{n}" for speaker in "abcdef" for n in "12"))
    names = [(speaker, n) for speaker in "abcdef" for n in "12"]

    def found(column: str, key: str) -> pd.DataFrame:
        where = {"id": "{0}{1}", "path": "{0}/{0}{1}.wav", "speaker": "{0}"}[key]
        rows = {f"{where.format(s, n)},v{'abcdef'.index(s) // 2},Text {s}\n": None for s, n in names}
        (tmp_path / "labels.csv").write_text(f"{key},{column},accent\n" + "".join(rows))
        cfg = CFG | {"labels": str(tmp_path / "labels.csv"), "split_by": column, "max_utterances": 9}
        return data.build_manifest(corpus, cfg, 0)[0]

    plain = found("voice", "speaker")
    for key in ["id"] if column == "path" else ["id", "path", "speaker"]:
        pd.testing.assert_frame_equal(found(column, key), plain)
    groups = plain.speaker.map(lambda s: "abcdef".index(s) // 2)
    assert plain.groupby(groups).split.nunique().max() == 1 and plain.split.nunique() == 3


def test_clips_without_a_value_of_split_by_are_counted_and_go_with_their_speaker(tmp_path, capsys):
    tree(tmp_path / "corpus", *(f"{speaker}/{speaker}{n}" for speaker in "abcd" for n in "12"))
    found = labelled(tmp_path, "speaker,derived_from\na,\nb,a\nc,\n", split_by="derived_from")
    said = capsys.readouterr().out
    assert "data.split_by: 6 clips without a value of 'derived_from' ('a/a1.wav', 'a/a2.wav', 'c/c1.wav', …)" in said
    assert found[found.speaker.isin(["a", "b"])].split.nunique() == 1
    labelled(tmp_path, "speaker,voice\na,1\nb,2\nc,3\nd,4\n", split_by="voice")
    assert "without a value" not in capsys.readouterr().out
    with pytest.raises(EqknobsError, match=r"speaker a has several values \('1', '2'\); give a speaker just one"):
        labelled(tmp_path, "id,voice\na1,1\na2,2\n", split_by="voice")
    with pytest.raises(EqknobsError, match=r"^2 speaker groups left"):
        labelled(tmp_path, "speaker,voice\na,1\nb,2\nc,1\nd,2\n", split_by="voice")


def test_split_by_needs_labels():
    config = yaml.safe_load(DEFAULT.read_text())
    config["data"] |= {"split_by": "voice", "labels": None}
    with pytest.raises(EqknobsError, match=r"config: data\.split_by: needs data\.labels"):
        validate(config)
    config["data"]["labels"] = "labels.csv"
    validate(config)


# --- odd names, texts and files ---


def test_names_and_texts_that_look_like_missing_stay_what_they_are(tmp_path):
    names = ["NA", "null", "nan", "None"]
    tree(tmp_path / "corpus", *(f"{name}/{name}{n}" for name in names for n in ("", "1")))
    table = "id,accent,text\n" + "".join(f"{name},{name},{name}\n" for name in names)
    (tmp_path / "labels.csv").write_text(table)
    manifest, _ = data.build_manifest(tmp_path / "corpus", CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
    write_csv(tmp_path / "manifest.csv", manifest)
    found = read_csv(tmp_path / "manifest.csv").set_index("id")
    assert set(found.index) == {f"{name}{n}" for name in names for n in ("", "1")}
    assert set(found.speaker) == set(names)
    assert found.loc[names, ["speaker", "accent", "text"]].to_numpy().tolist() == [[name] * 3 for name in names]
    assert found.loc["NA1"].text == "" and pd.isna(found.loc["NA1"].accent)


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", "\t", "\0", "\x0b", "\u2028"], ids=repr)
def test_a_line_end_in_a_text_is_a_blank(tmp_path, end):
    tree(tmp_path / "corpus", "a/1", "b/2", "c/3")
    (tmp_path / "labels.csv").write_bytes(f'id,text,accent\n1,"HELLO{end} YOU{end}",US\n2,BYE  BYE,\n'.encode())
    manifest, _ = data.build_manifest(tmp_path / "corpus", CFG | {"labels": str(tmp_path / "labels.csv")}, 0)
    write_csv(tmp_path / "manifest.csv", manifest)
    assert len((tmp_path / "manifest.csv").read_bytes().splitlines()) == 4
    assert read_csv(tmp_path / "manifest.csv").text.tolist() == ["HELLO YOU", "BYE  BYE", ""]


def test_file_names_of_any_characters_go_through_the_manifest(tmp_path):
    names = ["carriage\rreturn", "new\nline", 'a "quoted" name', "comma, name", " blank ", "=1+1"]
    tree(tmp_path / "corpus", *(f"{i % 3}/{name}" for i, name in enumerate(names)))
    manifest, rejected = data.build_manifest(tmp_path / "corpus", CFG, 0)
    write_csv(tmp_path / "manifest.csv", manifest)
    found = read_csv(tmp_path / "manifest.csv")
    assert set(found.id) == set(names) and rejected.empty and all(Path(path).is_file() for path in found.path)
    assert found.seconds.tolist() == [1.0] * 6


def test_whatever_is_wrong_with_one_file_is_its_row(tmp_path, monkeypatch):
    librispeech(tmp_path / "corpus", speakers=4, clips=2)
    bad = tmp_path / "corpus" / "bad"
    clip(bad / "fails at its header.wav")
    clip(bad / "fails when read.wav")
    os.rename(clip(bad / "latin.wav"), os.fsencode(bad) + b"/caf\xe9.wav")
    seconds, samples = data.audio_seconds, data.read_audio

    def fail(real, name, error):
        def read(path, *rest):
            if path.name == name:
                raise error
            return real(path, *rest)

        return read

    monkeypatch.setattr(data, "audio_seconds", fail(seconds, "fails at its header.wav", ValueError("odd\nheader")))
    monkeypatch.setattr(data, "read_audio", fail(samples, "fails when read.wav", MemoryError("no room")))
    manifest, rejected = data.build_manifest(tmp_path / "corpus", CFG, 0)
    write_csv(tmp_path / "rejected.csv", rejected)
    found = read_csv(tmp_path / "rejected.csv")
    assert len(manifest) == 8
    assert {path.split("/bad/")[1]: reason for path, reason in zip(found.path, found.reason)} == {
        "fails at its header.wav": "cannot be read (ValueError: odd header)",
        "fails when read.wav": "cannot be read (MemoryError: no room)",
        "caf\\udce9.wav": "name is not UTF-8 (rename the file)",
    }


def test_gsm_and_streams_of_unknown_length_are_used(tmp_path):
    tree(tmp_path, "a/1", "b/2", "c/3")
    (tmp_path / "a" / "gsm.wav").parent.mkdir(exist_ok=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    sf.write(tmp_path / "a" / "gsm.wav", noise, 16000, subtype="GSM610")
    for i, size in enumerate((0, 0x7FFFF000, 0x7FFFFF00, 0xFFFFFFFF)):
        content = bytearray(clip(tmp_path / "b" / f"pipe{i}.wav").read_bytes())
        content[40:44] = size.to_bytes(4, "little")
        (tmp_path / "b" / f"pipe{i}.wav").write_bytes(content)
    manifest, rejected = data.build_manifest(tmp_path, CFG, 0)
    assert rejected.empty and len(manifest) == 8 and set(manifest.seconds) == {1.0}


def test_files_without_speech_are_rejected_by_level_not_by_peak(tmp_path):
    tree(tmp_path, "a/1", "b/2", "c/3")
    noise = np.random.default_rng(0).standard_normal(16000)
    click = np.where(np.arange(16000) == 8000, 0.9, 1e-5 * noise)
    quiet = 3e-4 * noise  # peaks above −60 dB, level −70
    sounds = {
        "constant": np.full(16000, 0.5),
        "click": click,
        "quiet": quiet,
        "constant and quiet": 0.3 + quiet,
        "scaled": 9000 * noise,
        "infinite": np.where(np.arange(16000) == 5, np.inf, noise),
        "loud": 0.3 * noise,
        "a word in silence": np.where(np.arange(16000) < 4800, 0.01 * noise, 0),
    }
    for name, wav in sounds.items():
        sf.write(tmp_path / "a" / f"{name}.wav", wav, 16000, subtype="FLOAT")
    manifest, rejected = data.build_manifest(tmp_path, CFG, 0)
    assert set(manifest.id) == {"1", "2", "3", "loud", "a word in silence"}
    reasons = {Path(path).stem: reason for path, reason in zip(rejected.path, rejected.reason)}
    assert {name: reason.split(" (")[0].split(" up to")[0] for name, reason in reasons.items()} == {
        "constant": "all but silent",
        "click": "all but silent",
        "quiet": "all but silent",
        "constant and quiet": "all but silent",
        "scaled": "samples",
        "infinite": "holds NaN or infinite samples",
    }


def test_links_to_folders_are_followed_once_and_never_round(tmp_path):
    tree(tmp_path / "corpus", "a/1", "b/2")
    tree(tmp_path / "elsewhere", "c/3", "d/4")
    (tmp_path / "corpus" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "corpus" / "0").symlink_to(tmp_path / "corpus" / "a")  # the real folder's name stays
    (tmp_path / "corpus" / "b" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "self").symlink_to(tmp_path / "corpus" / "self")
    (tmp_path / "corpus" / "gone").symlink_to(tmp_path / "nowhere")
    manifest, rejected = data.build_manifest(tmp_path / "corpus", CFG, 0)
    assert dict(zip(manifest.id, manifest.speaker)) == {"1": "a", "2": "b", "3": "c"}
    found = dict(zip(rejected.path.str.split("/corpus/").str[1], rejected.reason.str.replace(str(tmp_path), "")))
    assert found == {
        "0": "same folder as /corpus/a",
        "b/up": "same folder as /corpus",
        "gone": "link to nowhere",
        "self": "link to nowhere",
    }


def test_links_into_a_disk_that_is_gone_are_rows(tmp_path):
    tree(tmp_path / "corpus", "a/1", "b/2", "c/3")
    for name in ("d", "a/4.wav", "a/notes.txt", "e"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "disk" / name)
    tree(tmp_path / "elsewhere", "f/5")
    for name in ("f", "g", "h"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "elsewhere" / "f")
    manifest, rejected = data.build_manifest(tmp_path / "corpus", CFG, 0)
    assert manifest.id.tolist() == ["1", "2", "3", "5"]
    found = dict(zip(rejected.path.str.split("/corpus/").str[1], rejected.reason.str.replace(str(tmp_path), "")))
    nowhere = dict.fromkeys(("a/4.wav", "a/notes.txt", "d", "e"), "link to nowhere")
    assert found == nowhere | {"g": "same folder as /corpus/f", "h": "same folder as /corpus/f"}


def test_a_folder_that_cannot_be_read_is_a_row(tmp_path, monkeypatch):
    tree(tmp_path, "a/1", "b/2", "c/3", "locked/4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, rejected = data.build_manifest(tmp_path, CFG, 0)
    assert rejected.path.str.endswith("/locked").tolist() == [True]
    assert rejected.reason.tolist() == ["folder cannot be read"]


def test_a_union_refuses_the_same_sound_twice(tmp_path):
    manifest, _ = data.build_manifest(librispeech(tmp_path), CFG, 0)
    with pytest.raises(EqknobsError, match="same sound in two corpora"):
        data.unite({"a": manifest, "b": manifest})
    other = manifest.assign(sha256=[f"{i:064}" for i in range(len(manifest))])
    united, rejected = data.unite({"a": manifest, "b": other})
    assert united["id"].is_unique and rejected.empty and set(united["domain"]) == {"a", "b"}
    assert united["speaker"].nunique() == 2 * manifest["speaker"].nunique()


def test_a_mixture_has_every_clip_with_and_without_noise(tmp_path):
    """The noise comes from the clip's own split, at the ratio that was asked for, and loudness stays."""
    speech, _ = data.build_manifest(librispeech(tmp_path / "a"), CFG, 0)
    tree(tmp_path / "b", *(f"n{i}/{i}" for i in range(6)))
    noise, _ = data.build_manifest(tmp_path / "b", CFG, 0)
    cfg = {"source": "mixture", "of": ["talk"], "noise": ["street"], "snr_db": [10, 10]}
    manifest, rejected = mix({"talk": speech, "street": noise}, cfg, tmp_path / "out", 0)
    assert len(manifest) == 2 * len(speech) and rejected.empty and manifest["id"].is_unique
    assert (
        manifest.groupby("noise")["split"].value_counts()["clean"].to_dict() == speech["split"].value_counts().to_dict()
    )
    by_id = manifest.set_index("id")
    for row in manifest[manifest["noise"] == "noisy"].itertuples():
        clean = by_id.loc[row.id.removesuffix(".noisy")]
        assert (clean["speaker"], clean["split"], clean["text"]) == (row.speaker, row.split, row.text)
        a, b = (read_samples(path)[0] for path in (clean["path"], row.path))
        assert len(a) == len(b) and np.isclose(a.std(), b.std(), rtol=0.05)
    again, _ = mix({"talk": speech, "street": noise}, cfg, tmp_path / "again", 0)
    assert again["sha256"].tolist() == manifest["sha256"].tolist()
    with pytest.raises(EqknobsError, match="no test clip to mix into speech"):
        mix({"talk": speech, "street": noise[noise["split"] != "test"]}, cfg, tmp_path / "none", 0)


def test_noise_is_added_at_its_ratio():
    rng = np.random.default_rng(0)
    wav, under = rng.normal(size=8000).astype(np.float32) * 0.05, np.sin(np.arange(500) / 3).astype(np.float32)
    mixed = noisy(wav, under, 6)
    level = np.sqrt(np.mean(np.square(wav, dtype=float)))
    assert np.isclose(np.sqrt(np.mean(np.square(mixed, dtype=float))), level, rtol=1e-4)
    design = np.stack([wav, np.resize(under, 8000)], 1).astype(float)
    a, b = np.linalg.lstsq(design, mixed, rcond=None)[0]
    ratio = a * level / (b * np.sqrt(np.mean(np.resize(under, 8000) ** 2)))
    assert np.isclose(20 * np.log10(ratio), 6, atol=0.01)
    with pytest.raises(EqknobsError, match="silent"):
        noisy(wav, np.zeros(10, np.float32), 6)
