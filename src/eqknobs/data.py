"""Speech: fetch a corpus, check its files, draw the manifest."""

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
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import soundfile as sf
from tqdm import tqdm

from eqknobs.audio import read_audio
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, require_free_disk

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
AUDIO_SUFFIXES = {".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf"}
UNSUPPORTED_SUFFIXES = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr"}
SILENCE_PEAK = 1e-3  # −60 dB full scale
RATE_OF_CHECK = 16000
SPLITS = ("train", "val", "test")
MANIFEST_COLUMNS = ["id", "path", "speaker", "sex", "accent", "seconds", "split", "sha256", "text"]
RETRY_SECONDS = 2.0
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)
_CHUNK = 1 << 20


# --- fetching ---


def fetch(cfg_data: dict[str, Any], work: Path) -> Path:
    """Folder that holds the corpus's audio, downloaded or unpacked below `work` if need be.

    cfg_data: `source` "librispeech" (official archive `subset`, from the mirror `url` if set), "archive" (`path`
    to a local tar or zip) or "folder" (`path`); `timeout_seconds` (60) ends a stalled connection. Raises
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
    path = Path(path)
    if source == "archive":
        if not path.is_file():
            raise EqknobsError(f"data.path: no archive {path}; give a .tar.gz, .tar or .zip file")
        folder = work / f"{path.name.split('.')[0]}-{file_sha256(path)[:8]}"
        if not folder.is_dir():
            extract(path, folder)
        return folder
    if not path.is_dir():
        raise EqknobsError(f"data.path: no folder {path}; give a folder of audio files")
    return path


def download(url: str, path: Path, md5: str, timeout: float = 60, retries: int = 5) -> None:
    """Download `url` to `path`, which appears only when its MD5 is right.

    What has arrived is kept in `<path>.part` and continued with an HTTP range, in this call or a later one. A
    connection silent for `timeout` seconds is given up. Raises EqknobsError after `retries` attempts in a row
    that brought nothing, on a refusal by the server, a wrong checksum or a full disk.
    """
    if path.is_file() and _file_md5(path) == md5:
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, resumed = 0, part.exists()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, timeout)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise EqknobsError(f"{url}: the server answered {error.code} {error.reason}; check data.url") from error
            reason = f"the server answered {error.code}"
        except ValueError as error:
            raise EqknobsError(f"{url}: not a web address ({error}); mend data.url") from error
        except http.client.HTTPException as error:
            reason = f"the answer broke off: {error!r}"
        except OSError as error:  # URLError, TimeoutError and broken connections are OSErrors
            if error.errno == errno.ENOSPC:
                raise EqknobsError(f"{part}: disk full; free some space and run again to resume") from error
            reason = "the connection stalled" if "timed out" in str(error) else str(error)
        else:
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
        require_free_disk(part.parent, int(length or 0))
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

    Raises EqknobsError for a damaged or cut archive and for members that are links, devices or lie outside.
    """
    require_free_disk(folder.parent, archive.stat().st_size)
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
        for member in tar:
            target = _target(archive, folder, member.name)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                _write_member(archive, target, tar.extractfile(member), member.size)
            else:
                raise EqknobsError(f"{archive}: member {member.name!r} is a link or device; do not trust this archive")
            tar.members = []  # or the headers of 150,000 files stay in memory
            bar.update()
        # tarfile takes a broken header or a cut between members for the end, and skips the gzip's checksum.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EqknobsError(f"{archive}: damaged or cut short (no end mark); fetch the archive again")
        while tar.fileobj.read(_CHUNK):
            pass


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in tqdm(file.infolist(), desc=f"unpack {archive.name}", unit="file"):
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


# --- manifest ---


def build_manifest(folder: Path, cfg_data: dict[str, Any], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw utterances from a folder of audio: (manifest, rejected).

    Manifest: `id, path, speaker, sex, accent, seconds, split, sha256, text`; rejected: `path, reason`. Speakers
    come from LibriSpeech's layout (`<speaker>/<chapter>/<speaker>-<chapter>-*`, `SPEAKERS.TXT`, `*.trans.txt`),
    else the folder's name; the CSV `labels` (keyed by `id`, `path` or `speaker`) has the last word. The draw goes
    round the speakers, up to `max_utterances` and `max_minutes`; its order and the splits follow from a hash of
    `seed` and the name, so that a file more or less does not reshuffle the others. All files' headers are
    checked, drawn files are decoded. Splits share no speaker, nor any value of the labels column `split_by` if
    that is set (such as the voice that others are derived from); the sexes are spread evenly.

    Raises EqknobsError when no file is usable, for fewer than three speakers, and for unusable labels.
    """
    folder = Path(folder)
    records, rejected = _scan(folder, cfg_data)
    chosen = _draw(records, rejected, cfg_data, seed)
    if not chosen:
        reasons = Counter(row["reason"].split(" (")[0] for row in rejected).most_common(3)
        detail = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "no audio files found"
        raise EqknobsError(f"{folder}: no usable utterance left ({detail}); check data.path and the data limits")
    manifest = pd.DataFrame(chosen)
    manifest["split"] = manifest["group"].map(_split(manifest, cfg_data["splits"], seed))
    manifest = manifest.sort_values("id", ignore_index=True)[MANIFEST_COLUMNS]
    return manifest, pd.DataFrame(rejected, columns=["path", "reason"]).sort_values("path", ignore_index=True)


def _shown(path: Path) -> str:
    """Path relative to the working directory where possible, so that a manifest can move with its folder."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else absolute.as_posix()


def _nfc(text: str) -> str:
    """File systems and spreadsheets disagree on how "é" is composed."""
    return unicodedata.normalize("NFC", text)


def _rank(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).hexdigest()


def _scan(folder: Path, cfg_data: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Files whose header promises usable audio, with what is known of them; and those that are refused."""
    found = sorted(
        Path(base, name)
        for base, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in AUDIO_SUFFIXES | UNSUPPORTED_SUFFIXES
    )
    stems = Counter(_nfc(path.stem) for path in found)
    sexes, texts = _librispeech_sexes(folder), {}
    labels = _read_labels(cfg_data.get("labels"), cfg_data.get("split_by"))
    matched = False
    records, rejected = [], []
    for path in tqdm(found, desc="headers", unit="file"):
        try:
            seconds = _header_seconds(path, cfg_data)
        except EqknobsError as error:
            rejected.append({"path": _shown(path), "reason": str(error)})
            continue
        relative, stem = _nfc(path.relative_to(folder).as_posix()), _nfc(path.stem)
        speaker, text = _nfc(path.absolute().parent.name), ""
        reader = _nfc(path.absolute().parent.parent.name)
        if stem.startswith(f"{reader}-{speaker}-"):  # <speaker>/<chapter>/<speaker>-<chapter>-<number>
            speaker = reader
            if path.parent not in texts:
                texts[path.parent] = _transcripts(path.parent)
            text = texts[path.parent].get(stem, "")
        record = {
            "file": path,
            "name": relative,
            "seconds": seconds,
            "speaker": speaker,
            "accent": "",
            "text": text,
        }
        record["id"] = stem if stems[stem] == 1 else f"{stem}-{hashlib.sha256(relative.encode()).hexdigest()[:8]}"
        record["sex"] = sexes.get(speaker, "")
        for column, keys in (
            ("speaker", (speaker,)),
            ("id", (stem, record["id"])),
            ("path", (relative, _shown(path))),
        ):
            for key in keys:
                if (row := labels.get((column, key))) is not None:
                    record |= row
                    matched = True
        record["sex"] = record["sex"][:1].upper() if record["sex"][:1].upper() in ("F", "M") else ""
        record["group"] = record.get(cfg_data.get("split_by") or "speaker") or record["speaker"]
        records.append(record)
    if labels and records and not matched:
        raise EqknobsError(
            f"{cfg_data['labels']}: no row matches a file of {folder}; "
            "key the rows by id (file name without suffix), path below the folder, or speaker"
        )
    return records, rejected


def _header_seconds(path: Path, cfg_data: dict[str, Any]) -> float:
    if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
        raise EqknobsError("format not supported (convert to FLAC or WAV)")
    if not path.is_file():
        raise EqknobsError("not a regular file")
    try:
        info = sf.info(path)
    except sf.LibsndfileError as error:
        raise EqknobsError(f"not audio ({error.error_string})") from error
    seconds = info.frames / info.samplerate
    if seconds == 0:
        raise EqknobsError("empty")
    if seconds < cfg_data["min_seconds"]:
        raise EqknobsError(f"too short ({seconds:.2f} s)")
    if seconds > cfg_data["max_seconds"]:
        raise EqknobsError(f"too long ({seconds:.2f} s)")
    return seconds


def _librispeech_sexes(folder: Path) -> dict[str, str]:
    """Sex by speaker from SPEAKERS.TXT in, below or right above `folder`."""
    files = [*sorted(folder.rglob("SPEAKERS.TXT")), folder.absolute().parent / "SPEAKERS.TXT"]
    for file in files:
        if file.is_file():
            rows = [line.split("|") for line in file.read_text("utf-8", "replace").splitlines() if line[:1] != ";"]
            return {_nfc(row[0].strip()): row[1].strip() for row in rows if len(row) > 1}
    return {}


def _transcripts(folder: Path) -> dict[str, str]:
    lines = [
        line for file in sorted(folder.glob("*.trans.txt")) for line in file.read_text("utf-8", "replace").splitlines()
    ]
    return {_nfc(key): text.strip() for key, _, text in (line.partition(" ") for line in lines)}


def _read_labels(path: str | None, split_by: str | None) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of the labels CSV by (key column, key); empty cells say nothing."""
    if not path:
        return {}
    if not Path(path).is_file():
        raise EqknobsError(f"data.labels: no file {path}; give a CSV with the column id, path or speaker, or null")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:
        raise EqknobsError(f"{path}: not a readable UTF-8 CSV ({error}); mend the file") from error
    key = next((column for column in ("id", "path", "speaker") if column in table), None)
    if key is None:
        raise EqknobsError(f"{path}: no column id, path or speaker, only {', '.join(table.columns)}; add one")
    if split_by and split_by not in table:
        raise EqknobsError(f"{path}: no column {split_by}, which data.split_by names; add it or set null")
    if len(twice := table[key][table[key].duplicated()]):
        raise EqknobsError(f"{path}: {key} {twice.iloc[0]!r} occurs twice; keep one row")
    columns = [c for c in ("speaker", "sex", "accent", "text", split_by) if c in table and c != key]
    return {
        (key, _nfc(row[key].strip())): {c: _nfc(row[c].strip()) for c in columns if row[c].strip()}
        for row in table.to_dict("records")
    }


def _draw(
    records: list[dict[str, Any]], rejected: list[dict[str, str]], cfg_data: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """One utterance of each speaker in turn until a limit is reached; unusable ones go to `rejected`."""
    queues: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: _rank(seed, r["name"])):
        queues.setdefault(record["speaker"], []).append(record)
    speakers = sorted(queues, key=lambda name: _rank(seed, name))
    room = 60 * (cfg_data.get("max_minutes") or np.inf)
    number = cfg_data.get("max_utterances") or len(records)
    chosen: list[dict[str, Any]] = []
    seen: set[str] = set()
    with tqdm(desc="draw", total=min(number, len(records)), unit="clip") as bar:
        while len(chosen) < number and any(queues.values()):
            for speaker in speakers:
                while queues[speaker] and len(chosen) < number:
                    record = queues[speaker].pop(0)
                    if record["seconds"] > room:
                        continue
                    digest = file_sha256(record["file"])
                    reason = _unusable(record["file"]) or ("same content as another file" if digest in seen else "")
                    if reason:
                        rejected.append({"path": _shown(record["file"]), "reason": reason})
                        continue
                    seen.add(digest)
                    room -= record["seconds"]
                    chosen.append(record | {"path": _shown(record["file"]), "sha256": digest})
                    bar.update()
                    break
    return chosen


def _unusable(path: Path) -> str:
    """Why a file's samples cannot be used; empty if they can."""
    try:
        peak = np.abs(read_audio(path, RATE_OF_CHECK)).max()
    except EqknobsError as error:
        return str(error).removeprefix(f"{path}: ").split(";")[0]
    return f"silent (peak {peak:.1e})" if peak < SILENCE_PEAK else ""


def _split(manifest: pd.DataFrame, fractions: dict[str, float], seed: int) -> dict[str, str]:
    """Split by group. Groups are put in an order whose every stretch holds the sexes in proportion, and cut."""
    if abs(sum(fractions[name] for name in SPLITS) - 1) > 1e-6:
        raise EqknobsError(f"data.splits: train, val and test add up to {sum(fractions.values()):g}, not to 1")
    torn = manifest.groupby("speaker")["group"].nunique()
    if (torn > 1).any():
        raise EqknobsError(f"data.split_by: speaker {torn.idxmax()} has several values; give a speaker just one")
    sexes = manifest.groupby("group")["sex"].agg(lambda values: values.mode().iloc[0])
    total = len(sexes)
    if total < len(SPLITS):
        raise EqknobsError(
            f"{total} speaker(s) left, but train, val and test must not share speakers and need at least 3; "
            "add speakers, or name them in data.labels"
        )
    ranked = sexes.index.to_series().map(lambda name: _rank(seed, name)).sort_values().index
    sexes = sexes[ranked]
    place = sexes.groupby(sexes).cumcount().add(0.5) / sexes.groupby(sexes).transform("size")
    order = place.sort_values(kind="stable").index
    test, val = (max(1, round(fractions[name] * total)) for name in ("test", "val"))
    while test + val >= total:  # train keeps a speaker
        test, val = (test - 1, val) if test > val else (test, val - 1)
    return {name: "test" if i < test else "val" if i < test + val else "train" for i, name in enumerate(order)}
