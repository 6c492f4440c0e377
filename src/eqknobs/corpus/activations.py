"""Activation caches: one HDF5 file a target, exact, resumable by utterance after a kill -9.

The work file gets its whole layout first (every frame count is known before encoding). After that only raw
bytes at known offsets change (`eqknobs.corpus.inplace`): the frames of one utterance, then its mark as done. So HDF5's
metadata is never half-written, and on one machine the finished file has the same bytes however often work was
interrupted, and however many jobs (`eqknobs.shards`) filled it.

One pass of a model serves all of a run's targets at it: whichever target's job comes first reads the others' sites too,
and leaves their finished caches in the store of pieces, from which their jobs take them without loading the model.

A finished cache keeps a second name, `.<name>.kept`, since Snakemake deletes an output before it is made again: clips
whose sound is unchanged are then copied from it. HDF5's own file locks are off: whoever looks into a file meanwhile
stops nobody, and writers are kept apart in `eqknobs.script`.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.corpus.inplace import contiguous, disk_full, lay_out_done, write_at
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, read_csv, require_free_disk, writer_lock
from eqknobs.models import Model, ModelCfg, load_model
from eqknobs.pieces import Pieces
from eqknobs.shards import Shard, of_shard

# A row of the manifest and sites -> activations [frames, width] at each.
Encode = Callable[[Any, list[str]], dict[str, np.ndarray]]
LEAST_FRAMES = 16  # that a clip keeps under a budget of frames, if it has as many


class ActivationsCfg(TypedDict, total=False):
    """Plain values whose change must restart half-done work: a target's model and site, the section `activations`."""

    model: ModelCfg
    site: str
    frames: int  # the most that all clips keep together, see `kept_frames`
    seed: int  # of what they keep
    content: Any  # digests of what the model's files hold, and of the code
    device: str


def cache_activations(
    manifest_csv: str | Path,
    out_h5: str | Path,
    cfg_model: ModelCfg,
    target_site: str,
    cfg: ActivationsCfg | None = None,
    siblings: Mapping[str, str | Path] | None = None,
    pieces: str | Path | None = None,
) -> None:
    """Encode every utterance of a manifest and write its activations at one site.

    manifest_csv: columns id, path, speaker, split, sha256. siblings: sites of the same model whose caches at those
    paths are wanted too; what is missing of them is made in the same pass and left in the store `pieces`. That needs
    `cfg["content"]`, as what is in the store must be found before the model is loaded.

    HDF5: `activations` float32 [N, width] (contiguous), `frame_times` seconds [N] (centre of the hop),
    `utterances/{id,speaker,split,sha256,start,frames,samples}`, under a budget also `utterances/{first,clip_frames}`
    (where in the clip its frames begin, how many the clip has), `done` (1 of each finished utterance); attributes
    model, revision, site, module_path, frame_rate (Hz), hop (samples), sample_rate, device, manifest_sha256, versions
    (JSON), identity (hash of all that decides how a clip is encoded), train_frames, mean and std (float64 [width],
    over the train frames); of a moshi also codec_revision.

    Raises EqknobsError: unknown site, audio that is unreadable or not what the manifest promises, NaN or infinite
    activations (naming the utterance), no train frames, a budget too small, full disk. Finished utterances stay in
    `<out>.part-<hash>.h5`; neither they nor those of an earlier cache of the same identity are encoded again.
    """
    cfg, device, manifest = cfg or {}, pick_device(cfg_model.get("device") or "auto"), _manifest(manifest_csv)
    store = _Store(pieces, cfg_model, cfg, device, file_sha256(manifest_csv))
    with store.one_pass():
        out = Path(out_h5)
        if store.take(target_site, out):
            print(f"{out.name}: taken from the pass that cached its siblings")
            return
        with gpu_lock(device):
            _one_pass(manifest, store.wanted(target_site, out, siblings), cfg_model, cfg, store)
        _keep(out)


def cache_shard(
    manifest_csv: str | Path,
    out_h5: str | Path,
    cfg: ActivationsCfg,
    shard: Shard,
    siblings: Mapping[str, str | Path] | None = None,
    pieces: str | Path | None = None,
) -> None:
    """Encode the utterances of one shard into the work files of `cfg["site"]` and its siblings, for `cache_activations`
    with the same arguments to finish. Raises EqknobsError as that does.
    """
    device, manifest = pick_device(cfg["model"].get("device") or "auto"), _manifest(manifest_csv)
    store = _Store(pieces, cfg["model"], cfg, device, file_sha256(manifest_csv))
    with gpu_lock(device):
        model = load_model(cfg["model"])
        works = _works(model, store.wanted(cfg["site"], Path(out_h5), siblings), cfg["model"], cfg, store)
        works = [work for work in works if not work.is_done() and not store.has(work.site)]
        if not works:
            return
        with disk_full(works[0].path):
            with writer_lock(works[0].path):  # one shard lays out, the others find that
                _lay_out(works, manifest, model, cfg)
            _fill(works, manifest, model, _heard_by(model), clips=of_shard(range(len(manifest)), shard))


def _manifest(path: str | Path) -> pd.DataFrame:
    manifest = read_csv(path)
    if not (manifest["split"] == "train").any():
        raise EqknobsError(f"{path} has no utterance in split train; the normaliser needs some")
    return manifest


def cache_sites(
    manifest_csv: str | Path,
    outs: Mapping[str, str | Path],
    model: Model,
    cfg_model: ModelCfg,
    cfg: ActivationsCfg,
    encode: Encode | None = None,
) -> None:
    """Cache many sites of a loaded model in one pass, each in a file of its own as `cache_activations` writes it.

    outs: site -> file. encode: makes the activations of a manifest row at sites; by default the model hears the clip.
    What decides them beside sound and model must be in cfg. Caches that are there already stay, half-done ones go on.
    Raises EqknobsError as `cache_activations`.
    """
    manifest, sha256 = read_csv(manifest_csv), file_sha256(manifest_csv)
    works = [_Work(site, Path(out), _attributes(model, site), cfg_model, cfg, sha256) for site, out in outs.items()]
    works = [work for work in works if not work.is_done()]
    if not works:
        return
    for work in works:
        work.known = {}  # a clip may be there twice, heard and said: its sound does not tell what was made of it
    with disk_full(works[0].path):
        _lay_out(works, manifest, model, cfg)
        _fill(works, manifest, model, encode or _heard_by(model), strict=True)
        for work in works:
            _write_normaliser(work.path)
            os.replace(work.path, work.out)
            _keep(work.out)


def _one_pass(
    manifest: pd.DataFrame, wanted: Mapping[str, str | Path], cfg_model: ModelCfg, cfg: ActivationsCfg, store: "_Store"
) -> None:
    """Cache the first of the wanted sites, and in the same pass those others that are nowhere yet."""
    model = load_model(cfg_model)
    own, *others = _works(model, wanted, cfg_model, cfg, store)
    works = [own, *(work for work in others if not work.is_done() and not store.has(work.site))]
    with disk_full(own.path):
        _lay_out(works, manifest, model, cfg)
        _fill(works, manifest, model, _heard_by(model))
        for work in works[1:]:
            _write_normaliser(work.path)
            store.put(work.site, work.path)
        _write_normaliser(own.path)
        os.replace(own.path, own.out)


def _works(
    model: Model, wanted: Mapping[str, str | Path], cfg_model: ModelCfg, cfg: ActivationsCfg, store: "_Store"
) -> list["_Work"]:
    asked, *more = wanted
    return [
        _Work(site, Path(wanted[site]), _attributes(model, site), cfg_model, _of_site(cfg, site), store.manifest_sha256)
        for site in (asked, *(site for site in more if site in model.sites))  # of a bad one, its own job will say so
    ]


def _keep(out: Path) -> None:
    """Give a finished cache its second name; half-done ones before it are of no use any more."""
    kept = _kept(out)
    kept.unlink(missing_ok=True)
    with suppress(OSError):  # a file system without hard links: the next cache is made from the start
        os.link(out, kept)
    for stale in _parts(out):
        stale.unlink()


def _kept(out: Path) -> Path:
    return out.with_name(f".{out.name}.kept")


def _of_site(cfg: ActivationsCfg, site: str) -> ActivationsCfg:
    """The settings with which the job of another site of the model caches it."""
    return {**cfg, "site": site} if "site" in cfg else cfg


class _Store:
    """Finished caches of one pass (a model on a manifest, with settings) in the store of pieces, by their site."""

    def __init__(
        self, folder: str | Path | None, cfg_model: ModelCfg, cfg: ActivationsCfg, device: str, manifest_sha256: str
    ):
        self.folder = folder if "content" in cfg else None
        self.manifest_sha256, self._cfg, self._model, self._device = manifest_sha256, cfg, cfg_model, device

    def piece(self, site: str) -> Path:
        """Where a site's cache is, or would be."""
        made_of = [
            _deviceless(self._model),
            _deviceless(_of_site(self._cfg, site)),
            self._device,
            _versions(),
            _sources(self._model),
            self.manifest_sha256,
        ]
        return Pieces(self.folder).path("activations", [site, *made_of], ".h5")

    def has(self, site: str) -> bool:
        return self.folder is not None and self.piece(site).is_file()

    def wanted(self, site: str, out: Path, siblings: Mapping[str, str | Path] | None) -> Mapping[str, str | Path]:
        """What one pass caches, by site: what was asked for, and if there is a store its siblings."""
        return {site: out, **({} if self.folder is None else siblings or {})}

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """One process at a time makes this pass; the next one then finds what it made."""
        if self.folder is None:
            yield
            return
        # the configuration is the same for all targets but for the site
        with writer_lock(self.piece("")):
            yield

    def put(self, site: str, work: Path) -> None:
        """Move a finished work file into the store."""
        piece = self.piece(site)
        piece.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(work, piece)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with atomic_path(piece) as temporary:
                shutil.copyfile(work, temporary)
            work.unlink()

    def take(self, site: str, out: Path) -> bool:
        """Let `out` be what the store has for a site; False if that is nothing.

        By a hard link, unless another run's output is one already: Snakemake touches its outputs, and one run must not
        touch another's.
        """
        if not self.has(site):
            return False
        piece, kept = self.piece(site), _kept(out)
        if kept.exists() and kept.samefile(piece):
            kept.unlink()
        with atomic_path(out) as temporary:
            try:
                if piece.stat().st_nlink > 1:
                    raise OSError(errno.EMLINK, "linked already")
                os.link(piece, temporary)
            except OSError:
                shutil.copyfile(piece, temporary)
        _keep(out)
        return True


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("h5py", "numpy", "torch", "transformers")}


def _sources(cfg_model: ModelCfg) -> list[str]:
    """What `content` does not tell of a model: the commits of hub models that are here, and a codec that the model's
    own config.json names (`eqknobs.models.moshi`)."""
    found = []
    own = cfg_model.get("path"), cfg_model.get("revision")
    for path, pinned in (own, (cfg_model.get("codec"), cfg_model.get("codec_revision"))):
        if path is None or Path(path).is_dir():
            continue
        from huggingface_hub import try_to_load_from_cache

        with suppress(ValueError):  # neither a folder nor a hub id: loading it will say so
            file = try_to_load_from_cache(str(path), "config.json", revision=pinned)
            found.append(Path(file).parent.name if isinstance(file, str) else "")
    if "codec" not in cfg_model:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            config = Path(str(cfg_model["path"])) / "config.json"
            codec = config.parent / json.loads(config.read_text())["eqknobs"]["codec"]
            found += [file_sha256(file) for file in sorted(codec.glob("*.safetensors"))]
    return found


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
        "device": model.device,
        "versions": json.dumps(_versions()),
    }
    if codec := getattr(model, "codec", None):  # of a speech LM: other codes, other activations
        found["codec_revision"] = codec.revision
    return found


def _deviceless(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was asked for as device: `auto` and `cpu` may be the same one, which the attributes tell."""
    return {k: _deviceless(v) if isinstance(v, dict) else v for k, v in cfg.items() if k != "device"}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _parts(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.part-*.h5"))


@dataclass(frozen=True)
class _Header:
    """What is needed to read a cache's frames without HDF5."""

    identity: str
    sha256: list[str]
    start: np.ndarray
    frames: np.ndarray
    samples: np.ndarray
    first: np.ndarray  # of the clip's frames, the first one that is kept
    clip_frames: np.ndarray
    done: np.ndarray  # bool: which utterances are in
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
            frames = table["frames"][:]
            if "std" not in file.attrs or acts.id.get_offset() is None or done.shape != frames.shape:
                return None
            part = (table["first"][:], table["clip_frames"][:]) if "first" in table else (np.zeros_like(frames), frames)
            return _Header(
                file.attrs["identity"],
                table["sha256"].asstr()[:].tolist(),
                table["start"][:],
                frames,
                table["samples"][:],
                *part,
                done[:].astype(bool),
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
    first: int
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
        for i in np.flatnonzero(header.done):
            frames, row = int(header.frames[i]), 4 * header.width
            place = header.offset + int(header.start[i]) * row
            clip = _KnownClip(path, place, frames * row, int(header.first[i]), frames, int(header.samples[i]))
            known.setdefault(header.sha256[i], clip)
    return known


class _Work:
    """A cache in the making: of one site, in a work file beside where the cache is to be."""

    def __init__(
        self,
        site: str,
        out: Path,
        attributes: dict[str, Any],
        cfg_model: ModelCfg,
        cfg: ActivationsCfg,
        manifest_sha256: str,
    ):
        self.site, self.out, self.manifest_sha256 = site, out, manifest_sha256
        self._plain, self._made_by = attributes, [_deviceless(cfg_model), _deviceless(cfg)]
        self.identity = _hash([*self._made_by, attributes])
        self.attributes = attributes | {"identity": self.identity, "manifest_sha256": manifest_sha256}
        self.path = out.with_name(f"{out.name}.part-{_hash([self.identity, manifest_sha256])[:12]}.h5")

    @cached_property
    def known(self) -> dict[str, _KnownClip]:
        """Clips that need not be encoded again."""
        paths = (self.path, self.out, _kept(self.out), *_parts(self.out))
        return _known_clips([path for path in paths if path.exists()], self.identity)

    @cached_property
    def begun(self) -> _Header | None:
        """What the work file said when this pass began, if it was there."""
        return _header(self.path) if self.path.exists() else None

    @cached_property
    def header(self) -> _Header:
        """The same, once `_lay_out` has seen to it that there is one."""
        if (header := self.begun or _header(self.path)) is None:
            raise EqknobsError(f"{self.path} is gone or damaged; run again")
        return header

    def is_done(self) -> bool:
        """Whether the cache is there as its own job would make it, on whatever machine that was."""
        try:
            with h5py.File(self.out, "r", locking=False) as file:
                where = {name: file.attrs[name] for name in ("device", "versions")}
                made = file.attrs["identity"], file.attrs["manifest_sha256"]
        except (OSError, KeyError):
            return False
        return made == (_hash([*self._made_by, self._plain | where]), self.manifest_sha256)

    def reusable(self, i: int, sha256: str) -> _KnownClip | None:
        """What is known of the i-th clip, if it is the same run of frames."""
        clip, header = self.known.get(sha256), self.header
        if clip is None or (clip.first, clip.frames) != (header.first[i], header.frames[i]):
            return None
        return clip


def kept_frames(
    clip_frames: np.ndarray, sha256: list[str], budget: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which frames of each clip a budget leaves: the first one and how many, int64 [clips] each.

    A clip keeps one run of consecutive frames, since probes pair a frame with its neighbours (lags); as long as its
    share of all frames, but at least `LEAST_FRAMES`, and begun where the seed and the hash of its sound say. In all
    they are `budget` at most; None keeps everything. Raises EqknobsError for a budget that does not reach for that.
    """
    if budget is None or clip_frames.sum() <= budget:
        return np.zeros_like(clip_frames), clip_frames
    least = np.minimum(clip_frames, LEAST_FRAMES)
    if least.sum() > budget:
        raise EqknobsError(
            f"activations.frames: {budget} frames are too few for {len(clip_frames)} clips, which keep {LEAST_FRAMES} "
            f"each; give at least {least.sum()} or lower data.max_utterances"
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # the largest share that fits; what short clips get above theirs, long ones do without
        share = (low + high) / 2
        fits = np.maximum(least, (share * clip_frames).astype(np.int64)).sum() <= budget
        low, high = (share, high) if fits else (low, share)
    frames = np.maximum(least, (low * clip_frames).astype(np.int64))
    places = [np.random.default_rng([seed, int(key[:15], 16)]).random() for key in sha256]
    return (np.array(places) * (clip_frames - frames + 1)).astype(np.int64), frames


def _lay_out(works: list[_Work], manifest: pd.DataFrame, model: Model, cfg: ActivationsCfg) -> None:
    """Write those work files that are not there, with everything but activations and the normalisers' values.

    Room on the disk is asked for all of them at once.
    """
    new, needed = [work for work in works if work.begun is None], 0
    for work in works:
        if work.begun is not None:  # sparse: its room is not taken yet
            needed += 4 * int(work.begun.frames[~work.begun.done].sum()) * work.begun.width
    if new:
        samples = _lengths(new, manifest, model.sample_rate)
        clip_frames = np.array([model.frames(int(n), new[0].site) for n in samples], dtype=np.int64)
        if len(short := manifest["id"][clip_frames < 1]):
            raise EqknobsError(f"utterance {short.iloc[0]} is too short for {model.name}; raise data.min_seconds")
        first, frames = kept_frames(clip_frames, manifest["sha256"].tolist(), cfg.get("frames"), cfg.get("seed", 0))
        needed += sum(int(frames.sum()) * (model.site(work.site).width * 4 + 8) + (1 << 20) for work in new)
    require_free_disk(works[0].out.parent, needed)
    for work in new:
        columns = {"start": np.cumsum(frames) - frames, "frames": frames, "samples": samples}
        if cfg.get("frames") is not None:
            columns |= {"first": first, "clip_frames": clip_frames}
        _lay_out_one(work, manifest, model, columns)


def _lengths(works: list[_Work], manifest: pd.DataFrame, rate: int) -> np.ndarray:
    """Samples of each clip at the model's rate, int64; read only of clips that no cache knows."""
    known = {sha256: clip.samples for work in works for sha256, clip in work.known.items()}
    return np.array(
        [
            known[clip.sha256] if clip.sha256 in known else len(read_clip(clip, rate))
            for clip in tqdm(manifest.itertuples(), desc="lengths", total=len(manifest), unit="utt")
        ],
        dtype=np.int64,
    )


def _lay_out_one(work: _Work, manifest: pd.DataFrame, model: Model, columns: dict[str, np.ndarray]) -> None:
    frames, place = columns["frames"], model.site(work.site)
    first = columns.get("first", np.zeros_like(frames))
    with atomic_path(work.path) as temporary, h5py.File(temporary, "w") as file:
        contiguous(file, "activations", (int(frames.sum()), place.width), np.dtype("<f4"))
        lay_out_done(file, len(frames))
        times = np.concatenate([np.arange(begin, begin + n) + 0.5 for begin, n in zip(first, frames)])
        file["frame_times"] = times * place.hop / model.sample_rate
        text = h5py.string_dtype("utf-8")
        for column in ("id", "speaker", "split", "sha256"):
            file.create_dataset(f"utterances/{column}", data=manifest[column].astype(str).tolist(), dtype=text)
        for column, values in columns.items():
            file[f"utterances/{column}"] = values
        file.attrs.update(work.attributes)
        file.attrs["train_frames"] = int(frames[(manifest["split"] == "train").to_numpy()].sum())
        for name in ("mean", "std"):  # their values come last, in place
            file.attrs[name] = np.zeros(place.width)


def _fill(
    works: list[_Work],
    manifest: pd.DataFrame,
    model: Model,
    encode: Encode,
    strict: bool = False,
    clips: Sequence[int] | None = None,
) -> None:
    """Encode the utterances that are not in the work files yet, each once for all of them, or copy what is known.

    clips: which rows of the manifest, by default all. The first work is what was asked for, with
    `strict` every one is. Another one whose activations are not finite is given up, and taken off the list: it is for
    its own job to say so.
    """
    rows, clips = list(manifest.itertuples()), range(len(manifest)) if clips is None else clips
    todo = [i for i in clips if not all(work.header.done[i] for work in works)]
    name = f"activations {model.name}.{works[0].site}" + (f" and {len(works) - 1} more" if works[1:] else "")
    with ExitStack() as stack:
        files = {work: os.open(work.path, os.O_WRONLY) for work in works}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        for i in tqdm(todo, desc=name, total=len(clips), initial=len(clips) - len(todo), unit="utt"):
            clip = rows[i]
            waiting = {work: work.reusable(i, clip.sha256) for work in works if not work.header.done[i]}
            fresh = _encoded(clip, encode, [work.site for work, known in waiting.items() if known is None])
            for work, known in waiting.items():
                header = work.header
                if known is None:
                    acts = fresh[work.site]
                    if not np.isfinite(acts).all():
                        if strict or work is works[0]:
                            raise _not_finite(clip, model, work.site)
                        print(
                            f"{work.out.name}: not cached along with the others: {_not_finite(clip, model, work.site)}"
                        )
                        works.remove(work)
                        continue
                    cut = slice(header.first[i], header.first[i] + header.frames[i])
                    data = acts[cut].tobytes() if len(acts) == header.clip_frames[i] else b""
                else:
                    data = known.read()
                if len(data) != header.frames[i] * 4 * header.width:
                    raise EqknobsError(f"utterance {clip.id}: {clip.path} changed while it was being cached; run again")
                write_at(files[work], data, header.offset + int(header.start[i]) * 4 * header.width)
                write_at(files[work], b"\1", header.done_offset + i)


def _heard_by(model: Model) -> Encode:
    return lambda clip, sites: model.encode_sites(read_clip(clip, model.sample_rate), sites)


def _encoded(clip: Any, encode: Encode, sites: list[str]) -> dict[str, np.ndarray]:
    """Activations [frames, width] of a manifest row at sites, in one pass."""
    if not sites:
        return {}
    try:
        found = encode(clip, sites)
    except EqknobsError as error:
        raise EqknobsError(f"utterance {clip.id} ({clip.path}): {error}") from error
    return {site: acts.astype("<f4", copy=False) for site, acts in found.items()}


def _not_finite(clip: Any, model: Model, site: str) -> EqknobsError:
    return EqknobsError(
        f"utterance {clip.id} ({clip.path}): {model.name}.{site} gave NaN or infinite activations; "
        "check the model's weights, or remove the clip"
    )


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
