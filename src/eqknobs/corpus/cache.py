"""Reading finished activation caches, without the models that made them (`eqknobs.corpus.activations`)."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from eqknobs.errors import EqknobsError
from eqknobs.io import array_hash


class ActivationCache:
    """A finished activation cache, read without loading it.

    Attributes: `attrs` (dict), `utterances` (DataFrame id, speaker, split, sha256, start, frames, samples; of a cache
    that keeps a run of consecutive frames of each clip also first, its place in the clip, and clip_frames), `acts`
    (read-only memory map float32 [N, width]), `mean`, `std` (float64 [width]), `utt_of_row` (int32 [N]),
    `frame_times` (seconds [N]). Raises EqknobsError if the file is not a finished cache.
    """

    def __init__(self, path: str | Path):
        try:
            with h5py.File(path, "r", locking=False) as file:
                self.attrs = dict(file.attrs)
                columns = {name: file[f"utterances/{name}"] for name in ("id", "speaker", "split", "sha256")}
                numbers = {name: file[f"utterances/{name}"][:] for name in ("start", "frames", "samples")}
                if "first" in file["utterances"]:
                    numbers |= {name: file[f"utterances/{name}"][:] for name in ("first", "clip_frames")}
                self.utterances = pd.DataFrame({k: v.asstr()[:] for k, v in columns.items()} | numbers)
                self.frame_times = file["frame_times"][:]
                acts = file["activations"]
                shape, offset, done = acts.shape, acts.id.get_offset(), int(file["done"][:].sum())
        except (OSError, KeyError) as error:
            raise EqknobsError(f"{path} is not an activation cache: {error}; make it again") from error
        if done != len(self.utterances):
            raise EqknobsError(f"{path}: only {done} of {len(self.utterances)} utterances are in; run the cache again")
        self.mean, self.std = self.attrs["mean"], self.attrs["std"]
        self.acts = np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=shape)
        self.utt_of_row = np.repeat(np.arange(done, dtype=np.int32), self.utterances["frames"])

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(self, *_exc: object) -> None:
        del self.acts  # the map closes with its last view

    def require_whole_clips(self) -> None:
        """Raise EqknobsError if the cache keeps only a part of a clip, of which no sound can be made."""
        if "first" in self.utterances and (self.utterances["frames"] < self.utterances["clip_frames"]).any():
            raise EqknobsError(
                f"the cache of {self.attrs['model']}.{self.attrs['site']} keeps a part of each clip's frames, but this "
                "stage needs whole clips; remove activations.frames from the configuration"
            )

    def rows(self, split: str) -> np.ndarray:
        """Row indices int64 of the frames of one split."""
        return np.flatnonzero((self.utterances["split"] == split).to_numpy()[self.utt_of_row])

    def digest(self) -> str:
        """Hash of the activations, their moments and the utterances."""
        table = self.utterances.to_csv(index=False)
        return array_hash(self.acts, self.mean, self.std, np.frombuffer(table.encode(), np.uint8))
