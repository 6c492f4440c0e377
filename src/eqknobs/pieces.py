"""One store for pieces of work: what is dear to make and small enough to keep, under a hash of what made it.

Pieces are no outputs: nothing depends on them, a run without them gives the same results, only slower. They lie in
`work/pieces/`, shared by all runs in this folder; `eqknobs clean` removes the ones that were not used lately.
"""

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eqknobs.io import atomic_path

STORE = Path("work/pieces")


class Pieces:
    """The store below `folder`; None keeps nothing, so that every piece is made.

    made_of: what decides every piece asked for through this object, beside what each call names.

    A piece's file appears only when it is whole, so a process that is killed leaves none that is half made, and two
    that make the same piece at once are both right.
    """

    def __init__(self, folder: str | Path | None = STORE, made_of: Any = None):
        self.folder = None if folder is None else Path(folder)
        self.made_of = made_of

    def within(self, made_of: Any) -> "Pieces":
        """The same store for pieces that `made_of` (plain JSON values) decides too."""
        return Pieces(self.folder, [self.made_of, made_of])

    def path(self, kind: str, made_of: Any, suffix: str = ".json") -> Path:
        """Where a piece is, or would be, in a store that has a folder; also of pieces that are files of their own.

        Whoever writes there does so atomically. made_of: as of `json`.
        """
        if self.folder is None:
            raise ValueError("this store keeps nothing")
        made_of = made_of if self.made_of is None else [self.made_of, made_of]
        key = hashlib.sha256(json.dumps([kind, made_of], sort_keys=True).encode()).hexdigest()
        return self.folder / kind / key[:2] / f"{key[2:]}{suffix}"

    def json(self, kind: str, made_of: Any, make: Callable[[], Any]) -> Any:
        """A piece of plain JSON values: what is kept, else what `make` returns.

        made_of: plain JSON values that decide the piece: hashes of code, of inputs, of settings. Floats come back as
        they were; a broken file is made anew.
        """
        return self._kept(f"{kind}.json", made_of, make, lambda path: json.loads(path.read_text()), _write_json)

    def arrays(self, kind: str, made_of: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """As `json`, of a piece of named arrays."""

        def read(path: Path) -> dict[str, np.ndarray]:
            with np.load(path) as file:
                return dict(file)

        def write(path: Path, value: Any) -> None:
            with path.open("wb") as file:
                np.savez(file, **value)

        return self._kept(f"{kind}.npz", made_of, make, read, write)

    def _kept(
        self,
        name: str,
        made_of: Any,
        make: Callable[[], Any],
        read: Callable[[Path], Any],
        write: Callable[[Path, Any], None],
    ) -> Any:
        if self.folder is None:
            return make()
        kind, suffix = name.split(".")
        path = self.path(kind, made_of, f".{suffix}")
        try:
            value = read(path)
            os.utime(path)  # used now: `prune` leaves it
            return value
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            value = make()
        _write(path, value, write)
        return value

    @contextmanager
    def pack(self, kind: str, made_of: Any) -> Iterator[dict[str, Any]]:
        """Many small pieces in one file, by names of the caller's. What is missing is to be added, nothing changed.

        It is kept when the block ends, also by an error; what another process has added meanwhile stays. As in `json`,
        a broken file is made anew.
        """
        path = None if self.folder is None else self.path(kind, made_of)
        pack = _read_pack(path)
        before = len(pack)
        try:
            yield pack
        finally:
            if path is not None and len(pack) > before:
                _write(path, _read_pack(path) | pack)


def _read(path: Path) -> Any:
    value = json.loads(path.read_text())
    os.utime(path)  # used now: `prune` leaves it
    return value


def _read_pack(path: Path | None) -> dict[str, Any]:
    try:
        pack = {} if path is None else _read(path)
    except (OSError, ValueError):
        return {}
    return pack if isinstance(pack, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _write(path: Path, value: Any, write: Callable[[Path, Any], None] = _write_json) -> None:
    try:
        with atomic_path(path) as temporary:
            write(temporary, value)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); it will be made again next time")


def prune(folder: str | Path, days: float) -> tuple[int, int]:
    """Remove the pieces that nothing used for `days` days (0: all); returns their number and bytes."""
    count = size = 0
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and (days == 0 or path.stat().st_mtime < time.time() - 86400 * days):
            count, size = count + 1, size + path.stat().st_size
            path.unlink()
    if days == 0 and Path(folder).is_dir():
        shutil.rmtree(folder)
    return count, size
