"""Activation caches: one HDF5 file a target, exact, resumable by utterance after a kill -9.

The work file gets its whole layout first (every frame count is known before encoding). After that only raw
bytes at known offsets change: the frames of one utterance, then the counter of finished utterances. So HDF5's
metadata is never half-written, and on one machine the finished file has the same bytes however often work was
interrupted.

A finished cache keeps a second name, `.<name>.kept`, since Snakemake deletes an output before it is made again: clips
whose sound is unchanged are then copied from it. HDF5's own file locks are off: whoever looks into a file meanwhile
stops nobody, and writers are kept apart in `eqknobs.script`.
"""

import errno
import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, read_csv, require_free_disk
from eqknobs.models import Model, gpu_lock, load_model, pick_device


def cache_activations(
    manifest_csv: str | Path, out_h5: str | Path, cfg_model: dict, target_site: str, cfg: dict | None = None
) -> None:
    """Encode every utterance of a manifest and write its activations at one site.

    manifest_csv: columns id, path, speaker, split, sha256. cfg_model: see `load_model`. cfg: plain values whose
    change must restart half-done work (they are only hashed).

    HDF5: `activations` float32 [N, width] (contiguous), `frame_times` seconds [N] (centre of the hop),
    `utterances/{id,speaker,split,sha256,start,frames,samples}`, `done` (finished utterances); attributes model,
    revision, site, module_path, frame_rate (Hz), hop (samples), sample_rate, manifest_sha256, versions
    (JSON), identity (hash of all that decides how a clip is encoded), train_frames, mean and std (float64 [width],
    over the train frames); of a moshi also codec_revision.

    Raises EqknobsError: unknown site, audio that is unreadable or not what the manifest promises, NaN or infinite
    activations (naming the utterance), no train frames, full disk. Finished utterances stay in
    `<out>.part-<hash>.h5`; neither they nor those of an earlier cache of the same identity are encoded again.
    """
    out = Path(out_h5)
    with gpu_lock(pick_device(cfg_model.get("device") or "auto")):
        model = load_model(cfg_model)
        manifest = read_csv(manifest_csv)
        if not (manifest["split"] == "train").any():
            raise EqknobsError(f"{manifest_csv} has no utterance in split train; the normaliser needs some")
        attributes = _attributes(model, target_site) | {"manifest_sha256": file_sha256(manifest_csv)}
        identity = _hash([cfg_model, cfg, _attributes(model, target_site), model.device])
        attributes["identity"] = identity
        work = out.with_name(f"{out.name}.part-{_hash([identity, attributes['manifest_sha256']])[:12]}.h5")
        kept = out.with_name(f".{out.name}.kept")
        known = _known_clips([p for p in (work, out, kept, *_parts(out)) if p.exists()], identity)
        try:
            if not work.exists() or _header(work) is None:
                _lay_out(work, manifest, model, target_site, attributes, known)
            _fill(work, manifest, model, target_site, known)
            _write_normaliser(work)
            os.replace(work, out)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise EqknobsError(
                f"disk full while writing {work}: free some space and run again; finished utterances are kept"
            ) from error
        kept.unlink(missing_ok=True)
        with suppress(OSError):  # a file system without hard links: the next cache is made from the start
            os.link(out, kept)
        for stale in _parts(out):
            stale.unlink()


def _attributes(model: Model, site_name: str) -> dict[str, Any]:
    site = model.site(site_name)
    found = {
        "model": model.name,
        "revision": model.revision,
        "site": site.name,
        "module_path": site.path,
        "frame_rate": site.frame_rate,
        "hop": site.hop,
        "sample_rate": model.sample_rate,
        "versions": json.dumps({name: version(name) for name in ("h5py", "numpy", "torch", "transformers")}),
    }
    if codec := getattr(model, "codec", None):  # of a speech LM: other codes, other activations
        found["codec_revision"] = codec.revision
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.part-*.h5"))


@dataclass(frozen=True)
class _Header:
    """What is needed to read a cache's frames without HDF5: `done` utterances are in."""

    identity: str
    sha256: list[str]
    start: np.ndarray
    frames: np.ndarray
    samples: np.ndarray
    done: int
    offset: int  # bytes
    done_offset: int  # bytes
    width: int


def _header(path: Path) -> _Header | None:
    """The header of a cache, finished or not; None if the file is none, or of a version that kept less.

    Raises EqknobsError for a file that may not be read: what is in it is not thrown away for that.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            table, acts, done = file["utterances"], file["activations"], file["done"]
            if "std" not in file.attrs or acts.id.get_offset() is None:
                return None
            return _Header(
                file.attrs["identity"],
                table["sha256"].asstr()[:].tolist(),
                *(table[name][:] for name in ("start", "frames", "samples")),
                int(done[0]),
                acts.id.get_offset(),
                done.id.get_offset(),
                acts.shape[1],
            )
    except PermissionError as error:
        raise EqknobsError(f"{path}: may not be read; mend its permissions, or delete it to begin anew") from error
    except (OSError, KeyError):
        return None


@dataclass(frozen=True)
class _KnownClip:
    """Frames of a clip that was encoded before: `size` bytes of a file."""

    path: Path
    offset: int
    size: int
    frames: int
    samples: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _known_clips(paths: list[Path], identity: str) -> dict[str, _KnownClip]:
    """Clips by the hash of their sound, from caches of the same identity."""
    known: dict[str, _KnownClip] = {}
    for path in paths:
        header = _header(path)
        if header is None or header.identity != identity:
            continue
        for i in range(header.done):
            frames, row = int(header.frames[i]), 4 * header.width
            place = header.offset + int(header.start[i]) * row
            known.setdefault(header.sha256[i], _KnownClip(path, place, frames * row, frames, int(header.samples[i])))
    return known


def _contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An HDF5 dataset with its place in the file fixed at once and not filled."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape), dcpl=settings)


def _lay_out(
    work: Path,
    manifest: pd.DataFrame,
    model: Model,
    site: str,
    attributes: dict[str, Any],
    known: dict[str, _KnownClip],
) -> None:
    """Write the work file with everything but the activations and the normaliser's values."""
    samples = np.array(
        [
            known[clip.sha256].samples if clip.sha256 in known else len(read_clip(clip, model.sample_rate))
            for clip in tqdm(manifest.itertuples(), desc="lengths", total=len(manifest), unit="utt")
        ],
        dtype=np.int64,
    )
    frames = np.array([model.frames(int(n), site) for n in samples], dtype=np.int64)
    if len(short := manifest["id"][frames < 1]):
        raise EqknobsError(f"utterance {short.iloc[0]} is too short for {model.name}; raise data.min_seconds")
    total, place = int(frames.sum()), model.site(site)
    require_free_disk(work.parent, total * (place.width * 4 + 8) + (1 << 20))
    with atomic_path(work) as temporary, h5py.File(temporary, "w") as file:
        _contiguous(file, "activations", (total, place.width), np.dtype("<f4"))
        _contiguous(file, "done", (1,), np.dtype("<i8"))
        file["done"][:] = 0
        file["frame_times"] = np.concatenate([np.arange(n) + 0.5 for n in frames]) * place.hop / model.sample_rate
        text = h5py.string_dtype("utf-8")
        for column in ("id", "speaker", "split", "sha256"):
            file.create_dataset(f"utterances/{column}", data=manifest[column].astype(str).tolist(), dtype=text)
        file["utterances/start"] = np.cumsum(frames) - frames
        file["utterances/frames"] = frames
        file["utterances/samples"] = samples
        file.attrs.update(attributes)
        file.attrs["train_frames"] = int(frames[(manifest["split"] == "train").to_numpy()].sum())
        for name in ("mean", "std"):  # their values come last, in place
            file.attrs[name] = np.zeros(place.width)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset. Not a memory map: on a full disk that would end in SIGBUS."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _fill(work: Path, manifest: pd.DataFrame, model: Model, site: str, known: dict[str, _KnownClip]) -> None:
    """Encode the utterances that are not in the work file yet, or copy what is known of them."""
    header = _header(work)
    row, total = 4 * header.width, int(header.frames.sum())
    if header.done < len(manifest):  # the file is sparse: what is not written yet still needs its room
        require_free_disk(work.parent, (total - int(header.start[header.done])) * row)
    descriptor = os.open(work, os.O_WRONLY)
    try:
        clips = list(manifest.itertuples())
        name = f"activations {model.name}.{site}"
        progress = tqdm(clips[header.done :], desc=name, total=len(clips), initial=header.done, unit="utt")
        for i, clip in enumerate(progress, start=header.done):
            before = known.get(clip.sha256)
            data = before.read() if before else _encoded(clip, model, site).tobytes()
            if len(data) != header.frames[i] * row:
                raise EqknobsError(f"utterance {clip.id}: {clip.path} changed while it was being cached; run again")
            _write_at(descriptor, data, header.offset + int(header.start[i]) * row)
            _write_at(descriptor, np.array(i + 1, "<i8").tobytes(), header.done_offset)
    finally:
        os.close(descriptor)


def _encoded(clip: Any, model: Model, site: str) -> np.ndarray:
    """Activations [frames, width] of a manifest row, checked."""
    try:
        acts = model.encode(read_clip(clip, model.sample_rate), site)
    except EqknobsError as error:
        raise EqknobsError(f"utterance {clip.id} ({clip.path}): {error}") from error
    if not np.isfinite(acts).all():
        raise EqknobsError(
            f"utterance {clip.id} ({clip.path}): {model.name}.{site} gave NaN or infinite activations; "
            "check the model's weights, or remove the clip"
        )
    return acts.astype("<f4", copy=False)


def _write_normaliser(work: Path) -> None:
    """Mean and standard deviation of the train frames (two passes, float64), in place in the attributes."""
    with h5py.File(work, "r+", locking=False) as file:
        acts, train = file["activations"], file["utterances/split"].asstr()[:] == "train"
        spans = [
            (start, start + frames)
            for start, frames in zip(file["utterances/start"][train], file["utterances/frames"][train])
        ]
        count = sum(end - start for start, end in spans)
        mean = sum(acts[start:end].sum(0, dtype=np.float64) for start, end in spans) / count
        variance = sum(((acts[start:end] - mean) ** 2).sum(0) for start, end in spans) / count
        std = np.sqrt(variance)
        # A dimension that never moves stays zero after z-scoring instead of becoming rounding noise.
        std = np.maximum(std, max(1e-6 * std.max(), 1e-12))
        file.attrs.modify("mean", mean)
        file.attrs.modify("std", std)


class ActivationCache:
    """A finished activation cache, read without loading it.

    Attributes: `attrs` (dict), `utterances` (DataFrame id, speaker, split, sha256, start, frames, samples), `acts`
    (read-only memory map float32 [N, width]), `mean`, `std` (float64 [width]), `utt_of_row` (int32 [N]),
    `frame_times` (seconds [N]). Raises EqknobsError if the file is not a finished cache.
    """

    def __init__(self, path: str | Path):
        try:
            with h5py.File(path, "r", locking=False) as file:
                self.attrs = dict(file.attrs)
                columns = {name: file[f"utterances/{name}"] for name in ("id", "speaker", "split", "sha256")}
                numbers = {name: file[f"utterances/{name}"][:] for name in ("start", "frames", "samples")}
                self.utterances = pd.DataFrame({k: v.asstr()[:] for k, v in columns.items()} | numbers)
                self.frame_times = file["frame_times"][:]
                acts = file["activations"]
                shape, offset, done = acts.shape, acts.id.get_offset(), int(file["done"][0])
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

    def rows(self, split: str) -> np.ndarray:
        """Row indices int64 of the frames of one split."""
        return np.flatnonzero((self.utterances["split"] == split).to_numpy()[self.utt_of_row])
