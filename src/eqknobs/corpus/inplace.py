"""HDF5 files that are filled in place: their whole layout first, then raw bytes at known offsets.

HDF5's metadata is never half-written, so a file goes on after a kill -9, and several processes fill one file at once,
each its own clips. `done` has a byte a clip, 1 once all of it is in; where every byte is written the file is the same
whoever wrote it, and however often work was interrupted.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from eqknobs.errors import EqknobsError


def contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> None:
    """An HDF5 dataset with its place in the file fixed at once and not filled."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), dcpl=settings)


def lay_out_done(file: h5py.File, clips: int) -> None:
    """The dataset `done`: no clip is in yet."""
    contiguous(file, "done", (clips,), np.uint8)
    file["done"][:] = 0


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset. Not a memory map: on a full disk that would end in SIGBUS."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """A full disk becomes one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise EqknobsError(
            f"disk full while writing {path}: free some space and run again; finished utterances are kept"
        ) from error


class Filling:
    """A file that is being filled: rows of contiguous datasets, clip by clip.

    datasets: those that hold rows, by name. `done` is what was in when it was opened, bool [clips].
    """

    def __init__(self, path: Path, descriptor: int, datasets: Mapping[str, h5py.Dataset], done: h5py.Dataset):
        self.path, self._descriptor = path, descriptor
        self._places = {
            name: (data.id.get_offset(), data.dtype, int(np.prod(data.shape[1:], dtype=int)))
            for name, data in datasets.items()
        }
        self._done_place, self.done = done.id.get_offset(), done[:].astype(bool)

    def write(self, clip: int, start: int, values: Mapping[str, np.ndarray]) -> None:
        """Write a clip's rows, which begin at `start`, and then that it is in."""
        for name, rows in values.items():
            offset, dtype, width = self._places[name]
            data = np.ascontiguousarray(rows, dtype).tobytes()
            write_at(self._descriptor, data, offset + start * width * dtype.itemsize)
        write_at(self._descriptor, b"\1", self._done_place + clip)


@contextmanager
def filling(path: Path, names: tuple[str, ...]) -> Iterator[Filling]:
    """Open a laid out file for the rows of these datasets. Raises OSError, KeyError for another file."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = Filling(path, descriptor, {name: file[name] for name in names}, file["done"])
        yield found
    finally:
        os.close(descriptor)
