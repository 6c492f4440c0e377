"""The one way to make sound: clip -> (filter) -> activations -> edit -> rest of the codec -> signal metrics, FLAC.

Judging words and voices is a job of its own (`eqknobs.sound.judges`), so that a change of judge renders nothing again.
"""

import hashlib
import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_clip, write_flac
from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, unused_name, write_csv
from eqknobs.models import Model, ModelCfg, load_model
from eqknobs.pieces import Pieces
from eqknobs.provenance import code_inputs, content
from eqknobs.shards import Shard, of_shard
from eqknobs.sound import metrics

Edit = Callable[[np.ndarray], np.ndarray]
Filter = Callable[[np.ndarray, int], np.ndarray]


class OpenedCfg(TypedDict):
    """What is opened: the model and site of a target. Stages that render take more beside it."""

    model: ModelCfg
    site: str
    shard: NotRequired[Shard]  # only these clips are rendered, for the whole job to find (`Sounds`)


@dataclass(frozen=True)
class Condition:
    """One way to render every clip."""

    key: str  # unique; names a folder
    columns: dict[str, Any]  # what the score tables say about it
    edit: Edit | None = None  # activations [frames, width] -> the same shape
    codebooks: int | None = None  # None: around the quantiser
    wav_filter: Filter | None = None  # (samples, rate) -> samples, before the codec
    codec: bool = True  # False: the clip itself, never encoded
    keep: bool = False  # FLAC of every clip, to be judged
    listen: int = 0  # else FLAC of so many clips, the first ones, for the report
    pitch: bool = False  # measure the error of f0, which costs more than decoding does
    tokens: bool = False  # count the codes that change against the unedited activations'


@dataclass(frozen=True)
class Clip:
    """A clip with what the cache holds of it."""

    id: str
    speaker: str
    split: str
    sha256: str  # of its file
    wav: np.ndarray  # [samples] at the model's rate
    acts: np.ndarray  # [frames, width]


@contextmanager
def open_codec(cfg: OpenedCfg, cache: ActivationCache) -> Iterator[Model]:
    """Load `cfg["model"]` with the GPU (if any) to itself.

    Raises EqknobsError if it cannot decode, is not the model whose activations the cache holds, or the cache holds
    only parts of clips.
    """
    cache.require_whole_clips()
    with gpu_lock(pick_device(cfg["model"].get("device") or "auto")):
        model = load_model(cfg["model"])
        if not model.decodes:
            raise EqknobsError(f"model {model.name} cannot turn activations into sound; use a codec to steer")
        if model.revision != cache.attrs["revision"] or cfg["site"] != cache.attrs["site"]:
            raise EqknobsError(
                f"the activation cache is of {cache.attrs['model']}.{cache.attrs['site']} at revision "
                f"{cache.attrs['revision']}, not of {model.name}.{cfg['site']} at {model.revision}; make it again"
            )
        yield model


def render_pieces(pieces: Pieces | None, model: Model, cfg: OpenedCfg) -> Pieces:
    """The store for what `cfg["model"]` makes of given activations at `cfg["site"]`, and for metrics of it.

    Pieces are told apart by the code of renders, metrics and the model's kind, the model, its device and the versions
    of what computes. None keeps nothing.
    """
    if pieces is None:
        return Pieces(None)
    import torch

    code = {*code_inputs(__file__), *code_inputs(inspect.getfile(type(model)))}
    folder = Path(cfg["model"]["path"])  # the revision of a folder is its weights', of the hub that of all
    settings = [folder / name for name in ("config.json", "preprocessor_config.json")]
    packages = ("torch", "transformers", "numpy", "scipy", "soxr", "torchcrepe")
    return pieces.within(
        {
            "code": [content(file) for file in sorted(code)],
            "model": [model.revision, *(content(file) for file in settings if file.is_file()), cfg["site"]],
            "on": [model.device, torch.get_num_threads(), *(version(name) for name in packages)],
        }
    )


def pick_clips(manifest: pd.DataFrame, split: str, count: int) -> pd.DataFrame:
    """The first `count` clips of a split, speakers taken in turn so that every voice is heard early.

    Raises EqknobsError if the split is empty; fewer clips than asked for are simply all of them.
    """
    clips = manifest[manifest["split"] == split].sort_values("id")
    if clips.empty:
        raise EqknobsError(f"the manifest has no utterance in split {split}; change data.splits")
    turn = clips.groupby("speaker").cumcount()
    return clips.assign(turn=turn).sort_values(["turn", "speaker", "id"]).drop(columns="turn").head(count)


def load_clip(model: Model, cache: ActivationCache, row: Any) -> Clip:
    """Audio and cached activations of a manifest row (a named tuple). Raises EqknobsError if they disagree."""
    found = cache.utterances[cache.utterances["id"] == row.id]
    wav = read_clip(row, model.sample_rate)
    if len(found) != 1 or found["sha256"].item() != row.sha256:
        raise EqknobsError(f"utterance {row.id} ({row.path}) is not what the cache holds; make the cache again")
    start, frames = int(found["start"].item()), int(found["frames"].item())
    return Clip(row.id, row.speaker, row.split, row.sha256, wav, np.array(cache.acts[start : start + frames]))


def edited(model: Model, site: str, clip: Clip, condition: Condition) -> np.ndarray:
    """The activations [frames, width] that a condition decodes. Raises EqknobsError if they are not finite."""
    acts = clip.acts
    if condition.wav_filter is not None:
        acts = model.encode(condition.wav_filter(clip.wav, model.sample_rate).astype(np.float32), site)
    if condition.edit is not None:
        acts = condition.edit(acts).astype(np.float32, copy=False)
    if not np.isfinite(acts).all():
        raise EqknobsError(f"condition {condition.key}: the edit of clip {clip.id} is not finite; lower alpha")
    return acts


def signal_metrics(original: np.ndarray, wav: np.ndarray, rate: int, pitch: bool) -> dict[str, float]:
    """Signal metrics of a render [samples] against the untouched clip; see `eqknobs.sound.metrics` for each."""
    loudness = metrics.loudness_db(wav, rate)
    return {
        "centroid_hz": metrics.clip_centroid(wav, rate),
        "centroid_original_hz": metrics.clip_centroid(original, rate),
        "centroid_correlation_frame": metrics.frame_centroid_correlation(original, wav, rate),
        "loudness_db": loudness,
        "loudness_change_db": loudness - metrics.loudness_db(original, rate),
        "f0_error_cents": metrics.f0_error_cents(original, wav, rate) if pitch else math.nan,
        "mel_distance": metrics.mel_distance(original, wav, rate),
    }


def _digest(acts: np.ndarray) -> str:
    return hashlib.blake2b(acts.tobytes(), digest_size=32).hexdigest()


class Sounds:
    """The folder of a stage's sounds in the making, and where they may be already: `out_dir` as it was the last time,
    and a folder beside it in which shards leave theirs.

    The folder appears only when it is whole; that of a shard takes one sound after another.
    """

    def __init__(self, out_dir: str | Path, shard: Shard | None = None):
        self.out_dir, self.shard = Path(out_dir), shard
        self.beforehand = self.out_dir.with_name(f".{self.out_dir.name}.shards")
        self.folder = self.beforehand

    @contextmanager
    def made(self) -> Iterator[Path]:
        """The folder, for as long as it is made."""
        with nullcontext(self.beforehand) if self.shard else atomic_path(self.out_dir) as self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield self.folder
        if not self.shard:
            shutil.rmtree(self.beforehand, ignore_errors=True)

    def take(self, name: str, sha256: str) -> bool:
        """Let a sound in the folder be one that is there already, if it has this hash."""
        for last in (self.beforehand / name, self.out_dir / name):
            if last.is_file() and file_sha256(last) == sha256:
                file = self.folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):  # a file system without hard links
                    os.link(last, file)
                    return True
                shutil.copyfile(last, file)
                return True
        return False


class _Render:
    """A clip under a condition: decoded when something is to be known that `known`, pieces of this clip, has not."""

    def __init__(self, model: Model, site: str, clip: Clip, condition: Condition, known: dict[str, Any]):
        self.model, self.site, self.clip, self.condition, self.known = model, site, clip, condition, known
        self.acts = edited(model, site, clip, condition)
        self.name = f"{'codec' if condition.codec else 'clip'} {condition.codebooks} {_digest(self.acts)}"

    @cached_property
    def wav(self) -> np.ndarray:
        if not self.condition.codec:
            return self.clip.wav
        return self.model.decode(self.acts, self.site, len(self.clip.wav), self.condition.codebooks)

    def _known(self, what: str, make: Callable[[], Any]) -> Any:
        name = f"{what} {self.name}"
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def signal(self) -> dict[str, float]:
        pitch, rate = self.condition.pitch, self.model.sample_rate
        return self._known(f"signal {pitch}", lambda: signal_metrics(self.clip.wav, self.wav, rate, pitch))

    def flips(self) -> dict[str, int]:
        def count() -> dict[str, int]:
            tokens = (self.model.tokens(a, self.site, self.condition.codebooks) for a in (self.clip.acts, self.acts))
            before, after = tokens
            return {"tokens_flipped": int((before != after).sum()), "tokens": before.size}

        return self._known("flips", count) if self.condition.tokens else {}

    def write(self, sounds: Sounds, name: str) -> None:
        """The sound as FLAC, one of the last time or of a shard where that is the same."""
        file = sounds.folder / name

        def make() -> str:
            write_flac(file, self.wav, self.model.sample_rate)
            return file_sha256(file)

        sha256 = self._known("flac", make)
        if not file.exists() and not sounds.take(name, sha256):
            make()


def render_conditions(
    model: Model,
    cfg: OpenedCfg,
    clips: pd.DataFrame,
    cache: ActivationCache,
    conditions: Sequence[Condition],
    out_dir: str | Path,
    signal_csv: str | Path,
    pieces: Pieces | None = None,
) -> None:
    """Render every clip under every condition.

    clips: manifest rows. pieces: those of `render_pieces`, where what was measured is kept, so that a sound is decoded
    only for what is not known of it, or for a FLAC that is not there from the last time.

    Writes `out_dir/<condition key>/<id>.flac` (all clips of a condition with `keep`, else its first `listen`),
    `out_dir/index.csv` (id, condition, file, judged, the conditions' columns) and `signal_csv`: id, speaker, split,
    condition, the conditions' columns, seconds, `signal_metrics`, and the error in latent space as its two sums over
    frames and dimensions, latent_sq_error = Σ(edited − cached)²,
    latent_sq_total = Σ(cached − train mean)²; tokens_flipped of tokens for conditions that ask for it. The folder
    appears only when it is whole. With `cfg["shard"]` nothing of that: it leaves sounds and pieces of its clips.
    """
    keys = [condition.key for condition in conditions]
    if len(set(keys)) != len(keys):
        raise EqknobsError(f"two conditions are called {max(keys, key=keys.count)}; a key must be unique")
    store = pieces or Pieces(None)
    signal: list[dict[str, Any]] = []
    index: list[dict[str, Any]] = []
    names: set[str] = set()
    rows = [(i, row, unused_name(f"{row.id}.flac", names)) for i, row in enumerate(clips.itertuples(index=False))]
    rows, sounds = list(of_shard(rows, cfg.get("shard"))), Sounds(out_dir, cfg.get("shard"))
    progress = tqdm(desc="renders", total=len(rows) * len(conditions), unit="render")
    with progress, sounds.made() as folder:
        for number, row, sound in rows:
            clip = load_clip(model, cache, row)
            total = float(np.square(clip.acts - cache.mean).sum())
            # Many conditions meet at alpha = 0: there, too, measure once.
            with store.pack("renders", [clip.sha256, _digest(clip.acts)]) as known:
                for condition in conditions:
                    progress.update()
                    render = _Render(model, cfg["site"], clip, condition, known)
                    about = {"id": clip.id, "condition": condition.key, **condition.columns}
                    if condition.keep or number < condition.listen:
                        file = f"{condition.key}/{sound}"
                        render.write(sounds, file)
                        index.append({**about, "file": file, "judged": condition.keep})
                    signal.append(
                        {
                            **about,
                            "speaker": clip.speaker,
                            "split": clip.split,
                            "seconds": len(clip.wav) / model.sample_rate,
                            **render.signal(),
                            "latent_sq_error": float(np.square(render.acts - clip.acts, dtype=np.float64).sum()),
                            "latent_sq_total": total,
                            **render.flips(),
                        }
                    )
        if sounds.shard:
            return
        columns = list(dict.fromkeys(name for condition in conditions for name in condition.columns))
        head = ["id", "condition", "file", "judged", *columns]
        write_csv(folder / "index.csv", pd.DataFrame(index, columns=head))
        scores = pd.DataFrame(signal)
        head = ["id", "speaker", "split", "condition", *columns]
        write_csv(signal_csv, scores[head + [name for name in scores if name not in head]])
