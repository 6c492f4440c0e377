"""Archives and downloads, also those that misbehave."""

import errno
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eqknobs.corpus import fetching
from eqknobs.corpus.manifest import build_manifest
from eqknobs.errors import EqknobsError
from helpers.corpora import CFG, librispeech

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
    folder = fetching.fetch(archive_cfg(path), tmp_path / "work")
    manifest, rejected = build_manifest(folder, CFG, 0)
    assert len(manifest) == 8 and rejected.empty and manifest.text.str.startswith("HELLO").all()
    stamp = folder.stat().st_ino
    assert fetching.fetch(archive_cfg(path), tmp_path / "work") == folder and folder.stat().st_ino == stamp


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
        fetching.fetch(archive_cfg(path), tmp_path / "work")
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
        fetching.fetch(archive_cfg(path), tmp_path / "work")
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
        fetching.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_plain_tar_cut_between_two_members_is_refused(tmp_path):
    path = tar(tmp_path / "cut.tar", ("a", bytes(512) + b"x"), ("b", b"y"), mode="w")
    path.write_bytes(path.read_bytes()[: 3 * 512])
    with pytest.raises(EqknobsError, match="no end mark"):
        fetching.fetch(archive_cfg(path), tmp_path / "work")


def test_flipped_bit_in_a_gzip_is_noticed(tmp_path):
    path = tar(tmp_path / "a.tar.gz", ("a.bin", np.random.default_rng(0).bytes(50000)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EqknobsError, match="damaged"):
        fetching.fetch(archive_cfg(path), tmp_path / "work")


def test_member_that_is_file_and_folder_at_once(tmp_path):
    path = tar(tmp_path / "a.tar.gz", ("a", b"x"), ("a/b", b"y"))
    with pytest.raises(EqknobsError, match="cannot be unpacked"):
        fetching.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_full_disk_while_unpacking(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar.gz", ("a.bin", b"x"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.shutil, "copyfileobj", full)
    with pytest.raises(EqknobsError, match="disk full"):
        fetching.fetch(archive_cfg(path), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_missing_sources(tmp_path):
    for source in ("folder", "archive"):
        with pytest.raises(EqknobsError, match=f"no {source}"):
            fetching.fetch(CFG | {"source": source, "path": str(tmp_path / "nowhere")}, tmp_path / "work")
        with pytest.raises(EqknobsError, match="needs the path"):
            fetching.fetch(CFG | {"source": source, "path": None}, tmp_path / "work")
    with pytest.raises(EqknobsError, match="'dev-celan' is not one of dev-clean"):
        fetching.fetch(CFG | {"source": "librispeech", "subset": "dev-celan"}, tmp_path / "work")
    assert fetching.fetch(CFG | {"path": str(tmp_path)}, tmp_path / "work") == tmp_path


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
        if act == "slow":
            time.sleep(4)
            self.wfile.write(body[len(body) // 2 :])
            return None
        if act == "stall":
            server.release.wait(30)
        self.close_connection = True
        return None


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.01)
    path = tmp_path / "source.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(librispeech(tmp_path / "source", 3, 1) / "LibriSpeech", "LibriSpeech")
    server = Server(path.read_bytes())
    monkeypatch.setitem(fetching.LIBRISPEECH_MD5, "dev-clean", hashlib.md5(server.content).hexdigest())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def get(server, work: Path) -> Path:
    cfg = {"source": "librispeech", "subset": "dev-clean", "url": server.url, "timeout_seconds": 0.5}
    return fetching.fetch(CFG | cfg, work)


def assert_whole(folder: Path) -> None:
    manifest, rejected = build_manifest(folder, CFG, 0)
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
    monkeypatch.setitem(fetching.LIBRISPEECH_MD5, "dev-clean", "0" * 32)
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
        fetching.download("http://127.0.0.1:9/a", tmp_path / "a", "0" * 32, timeout=0.5)
    with pytest.raises(EqknobsError, match="not a web address"):
        fetching.download("nonsense", tmp_path / "a", "0" * 32)


def test_full_disk_is_seen_before_the_download(tmp_path, server, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100, "total": usage.f_blocks})())
    with pytest.raises(EqknobsError, match=r"not enough disk .*, 100 bytes free; .*data\.subset"):
        get(server, tmp_path / "work")


def test_full_disk_during_the_download_is_one_line(tmp_path, server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching, "_transfer", full)
    with pytest.raises(EqknobsError, match="disk full; free some space and run again to resume"):
        get(server, tmp_path / "work")


def test_published_checksums_cover_all_subsets():
    assert len(fetching.LIBRISPEECH_MD5) == len(set(fetching.LIBRISPEECH_MD5.values())) == 7
    assert all(len(digest) == 32 and int(digest, 16) for digest in fetching.LIBRISPEECH_MD5.values())


# --- two runs at once ---


FETCH = """
import json, sys
from pathlib import Path
from eqknobs.corpus import fetching
fetching.LIBRISPEECH_MD5["dev-clean"] = sys.argv[2]
fetching._CHUNK = 1 << 12
cfg = {"source": "librispeech", "subset": "dev-clean", "url": sys.argv[1], "timeout_seconds": 20}
print(fetching.fetch(json.loads(sys.argv[3]) or cfg, Path(sys.argv[4])))
"""


def runs(*arguments: str, count: int = 3) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of several processes that fetch at the same time."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH, *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    outputs = [run.communicate(timeout=60) for run in started]
    return [(run.returncode, *output) for run, output in zip(started, outputs, strict=True)]


def test_runs_that_download_one_archive_at_once_share_it(tmp_path, server):
    server.plan = ["slow"]
    found = runs(server.url, hashlib.md5(server.content).hexdigest(), "null", str(tmp_path / "work"))
    assert [status for status, *_ in found] == [0, 0, 0], found
    assert len({out for _, out, _ in found}) == 1 and server.ranges == [None]
    assert sum("dev-clean.tar.gz: being written by process" in err for _, _, err in found) == 2
    assert len(list((tmp_path / "work").iterdir())) == 2
    assert len(list((tmp_path / "work").rglob("*.flac"))) == 3


def test_runs_that_unpack_one_archive_at_once_share_it(tmp_path):
    path = tar(tmp_path / "a.tar.gz", *((f"{i}/{j}.bin", bytes([i, j]) * 3000) for i in range(30) for j in range(30)))
    cfg = f'{{"source": "archive", "path": "{path}"}}'
    found = runs("-", "-", cfg, str(tmp_path / "work"), count=4)
    assert [status for status, *_ in found] == [0] * 4, found
    assert len({out for _, out, _ in found}) == 1 and sum("unpack a.tar.gz" in err for _, _, err in found) == 1
    (folder,) = (tmp_path / "work").iterdir()
    assert len(list(folder.rglob("*.bin"))) == 900


def test_what_a_killed_run_left_of_its_unpacking_is_removed(tmp_path):
    path = tar(tmp_path / "a.tar.gz", ("a/1.bin", b"x"))
    folder = fetching.fetch(archive_cfg(path), tmp_path / "work")
    left = folder.with_name(f".{folder.name}.0123abcd.tmp")
    folder.rename(left)
    (left / "half").touch()
    assert fetching.fetch(archive_cfg(path), tmp_path / "work") == folder
    assert list((tmp_path / "work").iterdir()) == [folder] and not (folder / "half").exists()


def test_a_disk_too_small_for_an_archive_is_told_in_words_that_help(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", ("a/1.bin", b"x"), mode="w")
    with path.open("r+b") as file:
        file.truncate(3 * 10**9)  # takes no room itself
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 53_000})())
    with pytest.raises(EqknobsError, match=r"3 GB needed, 53 kB free; free some space to unpack .*a\.tar$") as error:
        fetching.extract(path, tmp_path / "work" / "a")
    assert "max_minutes" not in str(error.value)
