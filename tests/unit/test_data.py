import errno
import hashlib
import http.server
import io
import os
import tarfile
import threading
import time
import zipfile
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
        "text.wav": "not audio",
        "zero.flac": "not audio",
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
    with pytest.raises(EqknobsError, match=r"no usable utterance left \(3 × too short; 1 × not audio\)"):
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


# --- archives ---


def tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            file.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def archive_cfg(path: Path) -> dict:
    return CFG | {"source": "archive", "path": str(path)}


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "tar.xz", "zip"])
def test_archive_is_unpacked_once_and_drawn_from(tmp_path, kind):
    librispeech(tmp_path / "corpus", 4, 2)
    path = tmp_path / f"my corpus.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for item in sorted((tmp_path / "corpus").rglob("*")):
                file.write(item, item.relative_to(tmp_path / "corpus"))
    else:
        with tarfile.open(path, "w:" + kind.removeprefix("tar").removeprefix(".")) as file:
            file.add(tmp_path / "corpus" / "LibriSpeech", "LibriSpeech")
    folder = data.fetch(archive_cfg(path), tmp_path / "work")
    manifest, rejected = data.build_manifest(folder, CFG, 0)
    assert len(manifest) == 8 and rejected.empty and manifest.text.str.startswith("HELLO").all()
    stamp = folder.stat().st_ino
    assert data.fetch(archive_cfg(path), tmp_path / "work") == folder and folder.stat().st_ino == stamp


EVIL = {
    "traversal": [("../evil.txt", b"x")],
    "deep traversal": [("a/b/../../../evil.txt", b"x")],
    "backslashes": [("..\\evil.txt", b"x")],
    "absolute": [("/tmp/eqknobs-evil.txt", b"x")],
    "symlink": [special("a", tarfile.SYMTYPE, ".."), ("a/evil.txt", b"x")],
    "inner symlink": [("b.txt", b"x"), special("a.txt", tarfile.SYMTYPE, "b.txt")],
    "hard link": [special("a", tarfile.LNKTYPE, "/etc/passwd")],
    "device": [special("null", tarfile.CHRTYPE)],
    "fifo": [special("pipe", tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("members", EVIL.values(), ids=EVIL.keys())
def test_hostile_tar_is_refused_and_leaves_nothing(tmp_path, members):
    path = tar(tmp_path / "evil.tar.gz", ("good.txt", b"good"), *members)
    with pytest.raises(EqknobsError, match=r"lies outside|is a link or device") as error:
        data.fetch(archive_cfg(path), tmp_path / "work")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["evil.tar.gz", "work"] or not list((tmp_path / "work").iterdir())
    assert not list(tmp_path.rglob("evil.txt")) and not Path("/tmp/eqknobs-evil.txt").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/eqknobs-evil.txt", "C:\\evil.txt", "link"])
def test_hostile_zip_is_refused(tmp_path, name):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo(name)
        if name == "link":
            info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    with pytest.raises(EqknobsError, match=r"lies outside|is a link or device"):
        data.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("mode", ["w:gz", "w", "w:xz", "zip"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_archive_cut_short_is_refused_and_leaves_nothing(tmp_path, mode, keep):
    noise = [np.random.default_rng(i).bytes(20000) for i in range(4)]
    path = tmp_path / "cut.bin"
    if mode == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for i, content in enumerate(noise):
                file.writestr(f"{i}.bin", content)
    else:
        tar(path, *((f"{i}.bin", content) for i, content in enumerate(noise)), mode=mode)
        if mode == "w":  # without the padding behind the end mark, which may well be missing
            path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(1024))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(EqknobsError, match=r"damaged|cut short"):
        data.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_plain_tar_cut_between_two_members_is_refused(tmp_path):
    path = tar(tmp_path / "cut.tar", ("a", bytes(512) + b"x"), ("b", b"y"), mode="w")
    path.write_bytes(path.read_bytes()[: 3 * 512])
    with pytest.raises(EqknobsError, match="no end mark"):
        data.fetch(archive_cfg(path), tmp_path / "work")


def test_flipped_bit_in_a_gzip_is_noticed(tmp_path):
    path = tar(tmp_path / "a.tar.gz", ("a.bin", np.random.default_rng(0).bytes(50000)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EqknobsError, match="damaged"):
        data.fetch(archive_cfg(path), tmp_path / "work")


def test_member_that_is_file_and_folder_at_once(tmp_path):
    path = tar(tmp_path / "a.tar.gz", ("a", b"x"), ("a/b", b"y"))
    with pytest.raises(EqknobsError, match="cannot be unpacked"):
        data.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_full_disk_while_unpacking(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar.gz", ("a.bin", b"x"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.shutil, "copyfileobj", full)
    with pytest.raises(EqknobsError, match="disk full"):
        data.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_missing_sources(tmp_path):
    for source in ("folder", "archive"):
        with pytest.raises(EqknobsError, match=f"no {source}"):
            data.fetch(CFG | {"source": source, "path": str(tmp_path / "nowhere")}, tmp_path / "work")
        with pytest.raises(EqknobsError, match="needs the path"):
            data.fetch(CFG | {"source": source, "path": None}, tmp_path / "work")
    with pytest.raises(EqknobsError, match="'dev-celan' is not one of dev-clean"):
        data.fetch(CFG | {"source": "librispeech", "subset": "dev-celan"}, tmp_path / "work")
    assert data.fetch(CFG | {"path": str(tmp_path)}, tmp_path / "work") == tmp_path


# --- download, from a server on this machine that misbehaves as told ---


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.plan = content, [], []
        self.knows_ranges, self.release = True, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.knows_ranges else 0
        act = server.plan.pop(0) if server.plan else "whole"
        if isinstance(act, int) and act >= 400:
            return self.send_error(act)
        if start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        if act == "whole":
            self.wfile.write(body)
            return None
        self.wfile.write(body[: len(body) // 2])  # "break" and "stall" both stop half way
        self.wfile.flush()
        if act == "stall":
            server.release.wait(30)
        self.close_connection = True
        return None


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RETRY_SECONDS", 0.01)
    path = tmp_path / "source.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(librispeech(tmp_path / "source", 3, 1) / "LibriSpeech", "LibriSpeech")
    server = Server(path.read_bytes())
    monkeypatch.setitem(data.LIBRISPEECH_MD5, "dev-clean", hashlib.md5(server.content).hexdigest())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def get(server, work: Path) -> Path:
    cfg = {"source": "librispeech", "subset": "dev-clean", "url": server.url, "timeout_seconds": 0.5}
    return data.fetch(CFG | cfg, work)


def assert_whole(folder: Path) -> None:
    manifest, rejected = data.build_manifest(folder, CFG, 0)
    assert len(manifest) == 3 and rejected.empty


def test_download_unpacks_and_needs_no_second_request(tmp_path, server):
    folder = get(server, tmp_path / "work")
    assert_whole(folder)
    assert get(server, tmp_path / "work") == folder and server.ranges == [None]
    assert not list((tmp_path / "work").glob("*.part"))


def test_broken_connection_is_resumed_where_it_broke(tmp_path, server):
    server.plan = ["break", "break", "break"]
    assert_whole(get(server, tmp_path / "work"))
    size = len(server.content)
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in server.ranges[1:]]
    assert server.ranges[0] is None and starts[0] == size // 2
    assert starts == sorted(set(starts)) and len(starts) == 3


def test_a_server_without_ranges_starts_again(tmp_path, server):
    server.knows_ranges, server.plan = False, ["break"]
    assert_whole(get(server, tmp_path / "work"))


def test_stall_times_out_and_is_resumed(tmp_path, server):
    server.plan = ["stall"]
    began = time.monotonic()
    assert_whole(get(server, tmp_path / "work"))
    assert 0.4 < time.monotonic() - began < 10
    assert len(server.ranges) == 2 and server.ranges[1].startswith("bytes=")


def test_endless_stall_gives_up_keeps_the_part_and_a_later_run_resumes(tmp_path, server):
    server.plan = ["break"] + [503] * 5
    with pytest.raises(EqknobsError, match=r"download failed \(the server answered 503\); run again to resume"):
        get(server, tmp_path / "work")
    work = tmp_path / "work"
    assert [path.name for path in work.iterdir()] == ["dev-clean.tar.gz.part"]
    assert (work / "dev-clean.tar.gz.part").read_bytes() == server.content[: len(server.content) // 2]
    server.ranges.clear()
    assert_whole(get(server, work))
    assert server.ranges == [f"bytes={len(server.content) // 2}-"]


def test_wrong_checksum_is_refused_and_nothing_stays(tmp_path, server, monkeypatch):
    monkeypatch.setitem(data.LIBRISPEECH_MD5, "dev-clean", "0" * 32)
    with pytest.raises(EqknobsError, match="wrong checksum"):
        get(server, tmp_path / "work")
    assert not list((tmp_path / "work").iterdir()) and server.ranges == [None]


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_part_of_another_file_is_thrown_away(tmp_path, server, share):
    work = tmp_path / "work"
    work.mkdir()
    (work / "dev-clean.tar.gz.part").write_bytes(b"z" * int(share * len(server.content)))
    assert_whole(get(server, work))
    assert server.ranges[-1] is None


def test_damaged_archive_on_disk_is_fetched_again(tmp_path, server):
    work = tmp_path / "work"
    work.mkdir()
    (work / "dev-clean.tar.gz").write_bytes(server.content[:1000])
    assert_whole(get(server, work))


def test_refusal_and_dead_server(tmp_path, server):
    server.plan = [404]
    with pytest.raises(EqknobsError, match="404"):
        get(server, tmp_path / "work")
    assert len(server.ranges) == 1
    with pytest.raises(EqknobsError, match="download failed"):
        data.download("http://127.0.0.1:9/a", tmp_path / "a", "0" * 32, timeout=0.5)
    with pytest.raises(EqknobsError, match="not a web address"):
        data.download("nonsense", tmp_path / "a", "0" * 32)


def test_full_disk_is_seen_before_the_download(tmp_path, server, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100, "total": usage.f_blocks})())
    with pytest.raises(EqknobsError, match="not enough disk"):
        get(server, tmp_path / "work")


def test_full_disk_during_the_download_is_one_line(tmp_path, server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "_transfer", full)
    with pytest.raises(EqknobsError, match="disk full; free some space and run again to resume"):
        get(server, tmp_path / "work")


def test_published_checksums_cover_all_subsets():
    assert len(data.LIBRISPEECH_MD5) == len(set(data.LIBRISPEECH_MD5.values())) == 7
    assert all(len(digest) == 32 and int(digest, 16) for digest in data.LIBRISPEECH_MD5.values())
