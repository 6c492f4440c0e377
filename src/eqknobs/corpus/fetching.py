"""Fetch a corpus: resumable downloads, archives unpacked with distrust."""

import errno
import hashlib
import http.client
import lzma
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

from tqdm import tqdm

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, require_free_disk, writer_lock

LIBRISPEECH_URL = "https://www.openslr.org/resources/12"
LIBRISPEECH_MD5 = {  # published in md5sum.txt beside the archives
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}
RETRY_SECONDS = 2.0
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)
LARGEST, TIMES = 1 << 30, 200  # bytes an archive may unpack to, or 200 times its own: silent PCM shrinks to a hundredth
MOST = 5_000_000  # members; LibriSpeech has 300,000
_CHUNK = 1 << 20


M = TypeVar("M")


class SourceCfg(TypedDict):
    """What `fetch` reads of a corpus: where its sound is from."""

    source: Literal["librispeech", "archive", "folder"]
    path: NotRequired[str | None]  # the archive or folder
    subset: NotRequired[str | None]  # of LibriSpeech
    url: NotRequired[str | None]  # a mirror of it
    timeout_seconds: NotRequired[float | None]  # of silence that end a connection; 60


def fetch(cfg_data: SourceCfg, work: Path) -> Path:
    """Folder that holds the corpus's audio, downloaded or unpacked below `work` if need be. Raises
    EqknobsError for a missing path, a failed download, a wrong checksum, a damaged archive and one that would
    write outside its folder.
    """
    source, path = cfg_data["source"], cfg_data.get("path")
    if source == "librispeech":
        subset = cfg_data.get("subset")
        if subset not in LIBRISPEECH_MD5:
            raise EqknobsError(f"data.subset: {subset!r} is not one of {', '.join(LIBRISPEECH_MD5)}")
        folder = work / f"{subset}-{LIBRISPEECH_MD5[subset][:8]}"
        if not folder.is_dir():  # it only gets this name when it is whole
            archive = work / f"{subset}.tar.gz"
            url = f"{cfg_data.get('url') or LIBRISPEECH_URL}/{archive.name}"
            download(url, archive, LIBRISPEECH_MD5[subset], cfg_data.get("timeout_seconds") or 60)
            extract(archive, folder)
        return folder
    if not path:
        raise EqknobsError(f"data.path: source {source!r} needs the path of the {source}")
    found = Path(path)
    if source == "archive":
        if not found.is_file():
            raise EqknobsError(f"data.path: no archive {found}; give a .tar.gz, .tar or .zip file")
        folder = work / f"{found.name.split('.')[0]}-{file_sha256(found)[:8]}"
        if not folder.is_dir():
            extract(found, folder)
        return folder
    if not found.is_dir():
        raise EqknobsError(f"data.path: no folder {found}; give a folder of audio files")
    return found


def download(url: str, path: Path, md5: str, timeout: float = 60, retries: int = 5) -> None:
    """Download `url` to `path`, which appears only when its MD5 is right.

    What has arrived is kept in `<path>.part` and continued with an HTTP range, in this call or a later one. A
    connection silent for `timeout` seconds is given up. Another process that downloads to `path` is waited for. Raises
    EqknobsError after `retries` attempts in a row that brought nothing, on a refusal by the server, a wrong checksum
    or a full disk.
    """
    with writer_lock(path):
        if not path.is_file() or _file_md5(path) != md5:
            _download(url, path, md5, timeout, retries)


def _download(url: str, path: Path, md5: str, timeout: float, retries: int) -> None:
    part = path.with_name(path.name + ".part")
    failures, resumed = 0, part.exists()
    while True:
        before = part.stat().st_size if part.exists() else 0
        reason = _attempt(url, part, timeout)
        if reason is None:
            found = _file_md5(part)
            if found == md5:
                os.replace(part, path)
                return
            part.unlink()
            if not resumed:
                raise EqknobsError(
                    f"{url}: wrong checksum (MD5 {found}, published {md5}); the copy was removed, try again or "
                    "get the archive elsewhere and set data.source to archive"
                )
            # The part left by an earlier call may have been of another file: once more from the start.
            resumed, before, reason = False, 0, "wrong checksum of the resumed file"
        arrived = part.stat().st_size if part.exists() else 0
        failures = 0 if arrived > before else failures + 1
        if failures >= retries:
            raise EqknobsError(f"{url}: download failed ({reason}); run again to resume, or set data.source to archive")
        time.sleep(RETRY_SECONDS * failures)


def _attempt(url: str, part: Path, timeout: float) -> str | None:
    """Go on with `part`; returns None when all has arrived, else why not, if another attempt may help."""
    try:
        _transfer(url, part, timeout)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise EqknobsError(f"{url}: the server answered {error.code} {error.reason}; check data.url") from error
        return f"the server answered {error.code}"
    except ValueError as error:
        raise EqknobsError(f"{url}: not a web address ({error}); mend data.url") from error
    except http.client.HTTPException as error:
        return f"the answer broke off: {error!r}"
    except OSError as error:  # URLError, TimeoutError and broken connections are OSErrors
        if error.errno == errno.ENOSPC:
            raise EqknobsError(f"{part}: disk full; free some space and run again to resume") from error
        return "the connection stalled" if "timed out" in str(error) else str(error)
    return None


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Append to `part` what the server still has of `url`; OSError when the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing after `have`: all of it is here, the checksum will tell
            return
        raise
    with response:
        if have and response.status != 206:  # the server knows no ranges: from the start
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        require_free_disk(part.parent, int(length or 0), "free some space or take a smaller data.subset")
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            arrived = file.tell()
    if total is not None and arrived < total:
        raise OSError(f"connection broken after {arrived} of {total} bytes")


def _file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def extract(archive: Path, folder: Path) -> None:
    """Unpack a tar (plain, gz, bz2, xz) or zip into `folder`, which appears only when all is out and checked.

    Does nothing where `folder` is there; another process that makes it is waited for. Raises EqknobsError for a
    damaged or cut archive, for members that are links, devices or lie outside, and for a bomb: more than `MOST`
    members, or bytes out of all proportion to the archive's.
    """
    with writer_lock(folder):
        if not folder.is_dir():
            _extract(archive, folder)


def _extract(archive: Path, folder: Path) -> None:
    require_free_disk(folder.parent, archive.stat().st_size, f"free some space to unpack {archive}")
    unpack = _extract_zip if zipfile.is_zipfile(archive) else _extract_tar
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            unpack(archive, temporary)
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise EqknobsError(f"{archive}: damaged or cut short ({reason}); fetch the archive again") from error
    except OSError as error:  # gzip's checksum, or members that are file and folder at once
        raise EqknobsError(f"{archive}: damaged, cannot be unpacked ({error}); fetch the archive again") from error


def _counting(archive: Path, members: Iterable[M], size: Callable[[M], int]) -> Iterator[M]:
    """The members, until there are too many of them or of their bytes; asked before each is written."""
    total, limit = 0, max(LARGEST, TIMES * archive.stat().st_size)
    for count, member in enumerate(members, 1):
        total += size(member)
        if count > MOST or total > limit:
            what = f"more than {MOST} members" if count > MOST else f"more than {limit} bytes"
            raise EqknobsError(f"{archive}: unpacks to {what}; do not trust this archive, or unpack it by hand")
        yield member


def _target(archive: Path, folder: Path, name: str) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise EqknobsError(f"{archive}: member {name!r} lies outside the archive's folder; do not trust this archive")
    return folder / parts


def _write_member(archive: Path, target: Path, source: Any, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
    if target.stat().st_size != size:
        raise EqknobsError(f"{archive}: cut short at {target.name}; fetch the archive again")


def _extract_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar, tqdm(desc=f"unpack {archive.name}", unit="file") as bar:
        for member in _counting(archive, tar, lambda member: member.size):
            target = _target(archive, folder, member.name)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                _write_member(archive, target, tar.extractfile(member), member.size)
            else:
                raise EqknobsError(f"{archive}: member {member.name!r} is a link or device; do not trust this archive")
            vars(tar)["members"] = []  # or the headers of 150,000 files stay in memory
            bar.update()
        # tarfile takes a broken header or a cut between members for the end, and skips the gzip's checksum.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EqknobsError(f"{archive}: damaged or cut short (no end mark); fetch the archive again")
        while tar.fileobj.read(_CHUNK):
            pass


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = _counting(archive, file.infolist(), lambda member: member.file_size)
        for member in tqdm(members, desc=f"unpack {archive.name}", unit="file", total=len(file.infolist())):
            target = _target(archive, folder, member.filename)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise EqknobsError(
                    f"{archive}: member {member.filename!r} is a link or device; do not trust this archive"
                )
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                with file.open(member) as source:  # checks the member's CRC at its end
                    _write_member(archive, target, source, member.file_size)
