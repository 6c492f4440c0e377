"""Atomic, byte-stable files."""

import argparse
import csv
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from eqknobs.errors import EqknobsError, counted

LOCK_POLL_SECONDS = 0.2
# Every column of every table of ours that holds text; a new one belongs here, or `read_csv` refuses it.
TEXT_COLUMNS = frozenset(
    "a accent arm b beside binning calibrated cell clip codec codec_training condition config derived_from device "
    "direction domain edit file format gate granularity group half heard id input_scale kind label labels "
    "level machine map matched measure measured_or_computed method mode model name noise order part path penalty "
    "phase phone plan property reading reason recipe reference repair rounding sae said sex sha256 site source "
    "space speaker split stage state stream tag target task tensor text top_clips trained transcript unit variant "
    "verdict voice voices weights why".split()
)
EITHER = frozenset({"features"})  # text in accent.csv (which of a code's), elsewhere how many
NO_NUMBERS = (True, False, "unmeasurable")  # what other columns may hold beside numbers (eqknobs.evidence.words)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s name only if the block ends well.

    Works for files and folders. Raises EqknobsError when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except EqknobsError:
        raise
    except Exception as error:  # safetensors, torch and soundfile have errors of their own for a full disk
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full or shutil.disk_usage(path.parent).free < 1 << 16:
            raise EqknobsError(f"disk full while writing {path}: free some space and run again") from error
        raise
    finally:
        _remove(temporary)


def require_output(path: str | Path, folder: bool | None = False, name: str = "--out") -> Path:
    """Make sure that `path` can be written, before the work that it is for; returns it and makes nothing yet.

    path: a file or, with `folder`, a folder to be (None: either). name: how the message calls it. Raises EqknobsError:
    a folder where a file belongs or the reverse, a place that cannot be made or written to.
    """
    path = Path(path)
    place = path.absolute().parent
    try:  # permissions alone do not say so: root passes them, and a file system may be read-only
        if folder is not None and path.exists() and path.is_dir() != folder:
            found, wanted = ("file", "folder") if folder else ("folder", "file")
            raise EqknobsError(f"{name} {path}: is a {found}; name another {wanted}")
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise EqknobsError(f"{name} {path}: its folder cannot be made, {place} is a file; name another")
        place = path if path.is_dir() else place
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise EqknobsError(f"{name} {path}: cannot be written in {place} ({error.strerror}); name another") from error
    return path


def output_file(text: str) -> Path:
    """An argparse `type`: a file that can be written, found out before the work that it is for; makes its folder."""
    return _output(text, folder=False)


def output_folder(text: str) -> Path:
    """An argparse `type`: a folder that can be made or written into."""
    return _output(text, folder=True)


def _output(text: str, folder: bool) -> Path:
    try:
        path = require_output(text, folder, name="cannot write")
    except EqknobsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    return path


def remove_leftovers(path: str | Path) -> None:
    """Remove what an `atomic_path` of a killed process left beside `path`; only for its one writer (`writer_lock`)."""
    path = Path(path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp*"):
        _remove(stale)


@contextmanager
def writer_lock(path: str | Path, wait_seconds: float | None = None) -> Iterator[None]:
    """Hold the one right to write `path` (file or folder) against other processes and threads while the block runs.

    The lock is the kernel's (`flock`) on `.<name>.lock` beside `path`, which names its owner: it is gone with its
    process, also after `kill -9`. (Forked children inherit it; it lasts until the last of them ends.) A second
    writer says whom it waits for, on stderr, and waits `wait_seconds`; `None`: as long as it takes, 0: not at all.
    Look *inside* the block whether `path` is there by now. What a killed owner's `atomic_path` left is removed, so that
    all who write `path` must take the lock. Not reentrant. Raises EqknobsError, naming the owner, when the time is
    over, and where the lock file cannot be made.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(lock, path, wait_seconds)
    except OSError as error:
        raise EqknobsError(f"{lock}: cannot be written ({error.strerror}); write into another folder") from error
    try:
        if file is not None:
            remove_leftovers(path)
        yield
    finally:
        if file is not None:
            lock.unlink(missing_ok=True)  # while it is held: a waiting process then sees that its file is another
            file.close()


def _acquire(lock: Path, path: Path, wait_seconds: float | None) -> TextIO | None:
    end = time.monotonic() + (float("inf") if wait_seconds is None else wait_seconds)
    told = False
    while True:
        file = open(lock, "a+")  # noqa: SIM115 (open is what holds the lock)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}")
                file.flush()
                return file
            file.close()  # its owner removed it on leaving: once more
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            file.close()
            if time.monotonic() >= end:
                raise EqknobsError(f"{path}: being written by {owner}; wait for it or end it, then run again") from None
            if not told:
                print(f"{path}: being written by {owner}; waiting for it", file=sys.stderr, flush=True)
            told = True
            time.sleep(LOCK_POLL_SECONDS)
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise
            print(f"{path}: this file system knows no locks; let only one run write it", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)
            return None


def unused_name(name: str, taken: set[str]) -> str:
    """A file name like `name` that every file system takes, different from all in `taken`, to which it is added.

    Letters, digits, ".", "_", "+" and "-" stay. Where others were replaced, the name was cut to 200 bytes or differs
    from an earlier one by case only, a hash of `name` keeps it apart: equal names get one file, others never.
    """
    stem, dot, suffix = name.rpartition(".") if "." in name else (name, "", "")
    plain = re.sub(r"[^\w.+-]+", "-", stem)
    short = plain.encode()[:200].decode(errors="ignore")
    if short != stem or f"{short}{dot}{suffix}".casefold() in taken:
        short = f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    taken.add(f"{short}{dot}{suffix}".casefold())
    return f"{short}{dot}{suffix}"


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table with nine significant digits and Unix line ends, so that equal data give equal bytes.

    Text may hold anything: what UTF-8 cannot (bytes of a file's name) is written as `\\udc..`.
    """
    # csv quotes a cell for a line end of its own kind only, and a bare carriage return would split the row.
    texts = [column for _, column in table.items() if not is_numeric_dtype(column)]
    bare = any(isinstance(cell, str) and "\r" in cell for column in texts for cell in column)
    with atomic_path(path) as temporary:
        table.to_csv(
            temporary,
            index=False,
            float_format="%.9g",
            lineterminator="\n",
            errors="backslashreplace",
            quoting=csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL,
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_csv(path: str | Path) -> pd.DataFrame:
    """Read a table of ours by explicit types: `TEXT_COLUMNS` as text, all others (but `EITHER`) as numbers or True
    and False.

    No text stands for "missing" ("NA", "null" and "0019" are names like others); only an empty cell does, and reads
    as NaN, in `text` and `transcript` as "". Raises EqknobsError for a file that is not there or not such a table.
    """
    path = Path(path)
    if not path.is_file():
        raise EqknobsError(f"{path}: no such table; run the stage that writes it")
    try:
        names = pd.read_csv(path, nrows=0, dtype=str).columns
        table = pd.read_csv(
            path,
            dtype={name: str for name in names if name in TEXT_COLUMNS},
            keep_default_na=False,
            na_values={name: [""] if name in TEXT_COLUMNS else ["", "nan", "NaN"] for name in names},
            index_col=False,
        )
    except (OSError, ValueError) as error:  # UnicodeDecodeError and pandas' own errors are ValueErrors
        raise EqknobsError(f"{path}: not a readable table ({_line(error)}); remove it and run again") from error
    for name in set(names) - TEXT_COLUMNS - EITHER:
        cells = table[name].dropna()
        if not (is_numeric_dtype(cells) or (pd.to_numeric(cells, "coerce").notna() | cells.isin(NO_NUMBERS)).all()):
            raise EqknobsError(f"{path}: column {name} holds text where numbers belong; remove the file and run again")
    return table.fillna({"text": "", "transcript": ""})


def require_renders(index_csv: str | Path, files: Iterable[str]) -> None:
    """Raise EqknobsError if sounds that an index of renders names are gone from beside it."""
    folder = Path(index_csv).parent
    gone = sorted({file for file in files if not (folder / file).is_file()})
    if gone:
        raise EqknobsError(
            f"{folder / gone[0]}: no such render ({counted(len(gone), 'file')} gone of those that {index_csv} names); "
            "run again, and its stage renders them anew"
        )


def read_text_csv(path: str | Path) -> pd.DataFrame:
    """Read a table made by hand or by another program: every cell as the text that it holds, "" where there is none.

    A blank after a comma and a byte order mark do not count. Raises EqknobsError for a file that is not there, not
    UTF-8 or not a table.
    """
    path = Path(path)
    if not path.is_file():
        raise EqknobsError(f"{path}: no such table")
    options = {"header": None, "dtype": str, "keep_default_na": False, "skipinitialspace": True}
    try:  # without a header: a row that is too long is an error then, not taken for one with an index
        rows = pd.read_csv(path, encoding="utf-8-sig", **options).fillna("")
    except (OSError, ValueError) as error:
        raise EqknobsError(f"{path}: not a readable UTF-8 CSV ({_line(error)}); mend the file") from error
    table = rows.iloc[1:].reset_index(drop=True)
    return table.set_axis(rows.iloc[0].tolist(), axis=1)


def _size(number: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def require_free_disk(folder: str | Path, needed: int, hint: str = "free some space or lower data.max_minutes") -> None:
    """Raise EqknobsError, which ends in `hint`, unless the disk that holds `folder` has `needed` bytes free."""
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EqknobsError(f"not enough disk below {folder}: {_size(needed)} needed, {_size(free)} free; {hint}")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_hash(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays with their shapes and types, hexadecimal; memory maps are read, not loaded."""
    found = hashlib.sha256()
    for values in arrays:
        values = np.ascontiguousarray(values)
        found.update(f"{values.dtype.str}{values.shape}".encode())
        found.update(values.view(np.uint8).data if values.size else b"")
    return found.hexdigest()
