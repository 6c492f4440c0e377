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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eqknobs.io import atomic_path

STORE = Path("work/pieces")


class Pieces:
    """The store below `folder`; None keeps nothing, so that every piece is made.

    A piece's file appears only when it is whole, so a process that is killed leaves none that is half made, and two
    that make the same piece at once are both right.
    """

    def __init__(self, folder: str | Path | None = STORE):
        self.folder = None if folder is None else Path(folder)

    def json(self, kind: str, made_of: Any, make: Callable[[], Any]) -> Any:
        """A piece of plain JSON values: what is kept, else what `make` returns.

        made_of: plain JSON values that decide the piece: hashes of code, of inputs, of settings. Floats come back as
        they were; a broken file is made anew.
        """

        def write(path: Path, value: Any) -> None:
            path.write_text(json.dumps(value))

        return self._kept(f"{kind}.json", made_of, make, lambda path: json.loads(path.read_text()), write)

    def arrays(self, kind: str, made_of: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """As `json`, of a piece of named arrays."""

        def read(path: Path) -> dict[str, np.ndarray]:
            with np.load(path) as file:
                return dict(file)

        def write(path: Path, value: dict[str, np.ndarray]) -> None:
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
        key = hashlib.sha256(json.dumps([kind, made_of], sort_keys=True).encode()).hexdigest()
        path = self.folder / kind / key[:2] / f"{key[2:]}.{suffix}"
        try:
            value = read(path)
            os.utime(path)  # used now: `prune` leaves it
            return value
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            value = make()
        try:
            with atomic_path(path) as temporary:
                write(temporary, value)
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror}); it will be made again next time")
        return value


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
