"""The one way to make sound: clip -> (filter) -> activations -> edit -> rest of the codec -> signal metrics, FLAC.

Judging words and voices is another stage (`eqknobs.sound.judges`), so that a change of judge renders nothing again.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.audio import read_clip, write_flac
from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, unused_name, write_csv
from eqknobs.models import Model, load_model
from eqknobs.sound import metrics

Edit = Callable[[np.ndarray], np.ndarray]
Filter = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Condition:
    """One way to render every clip."""

    key: str  # unique; names a folder
    columns: dict[str, Any]  # what the score tables say about it
    edit: Edit | None = None  # activations [frames, width] -> the same shape
    codebooks: int | None = None  # None: around the quantiser
    wav_filter: Filter | None = None  # (samples, rate) -> samples, before the codec
    codec: bool = True  # False: the clip itself, never encoded
    keep: bool = False  # FLAC of every clip, to be judged; else of the first clips only, for the report
    pitch: bool = False  # measure the error of f0, which costs more than decoding does
    tokens: bool = False  # count the codes that change against the unedited activations'


@dataclass(frozen=True)
class Clip:
    """A clip with what the cache holds of it."""

    id: str
    speaker: str
    split: str
    wav: np.ndarray  # [samples] at the model's rate
    acts: np.ndarray  # [frames, width]


@contextmanager
def open_codec(cfg: dict[str, Any], cache: ActivationCache) -> Iterator[Model]:
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
    return Clip(row.id, row.speaker, row.split, wav, np.array(cache.acts[start : start + frames]))


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


def render_conditions(
    model: Model,
    site: str,
    clips: pd.DataFrame,
    cache: ActivationCache,
    conditions: Sequence[Condition],
    out_dir: str | Path,
    signal_csv: str | Path,
    report_clips: int = 0,
) -> None:
    """Render every clip under every condition.

    clips: manifest rows. Writes `out_dir/<condition key>/<id>.flac` (all clips of a condition with `keep`, else the
    first `report_clips`), `out_dir/index.csv` (id, condition, file, judged, the conditions' columns) and
    `signal_csv`: id, speaker, split, condition, the conditions' columns, seconds, `signal_metrics`, and the error
    in latent space as its two sums over frames and dimensions, latent_sq_error = Σ(edited − cached)²,
    latent_sq_total = Σ(cached − train mean)²; tokens_flipped of tokens for conditions that ask for it. The folder
    appears only when it is whole.
    """
    keys = [condition.key for condition in conditions]
    if len(set(keys)) != len(keys):
        raise EqknobsError(f"two conditions are called {max(keys, key=keys.count)}; a key must be unique")
    signal, index, names = [], [], set()
    progress = tqdm(desc="renders", total=len(clips) * len(conditions), unit="render")
    with progress, atomic_path(out_dir) as folder:
        folder.mkdir()
        for number, row in enumerate(clips.itertuples(index=False)):
            sound = unused_name(f"{row.id}.flac", names)
            clip = load_clip(model, cache, row)
            total = float(np.square(clip.acts - cache.mean).sum())
            known: dict[tuple, dict[str, float]] = {}  # many conditions meet at alpha = 0: measure it once
            for condition in conditions:
                progress.update()
                listen = condition.keep or number < report_clips
                acts = edited(model, site, clip, condition)
                digest = hashlib.blake2b(acts.tobytes()).digest()
                same = (condition.codec, condition.codebooks, condition.pitch, digest)
                if same not in known or listen:
                    wav = clip.wav
                    if condition.codec:
                        wav = model.decode(acts, site, len(clip.wav), condition.codebooks)
                    if same not in known:
                        known[same] = signal_metrics(clip.wav, wav, model.sample_rate, condition.pitch)
                    if listen:
                        write_flac(folder / condition.key / sound, wav, model.sample_rate)
                about = {"id": clip.id, "condition": condition.key, **condition.columns}
                if listen:
                    file = f"{condition.key}/{sound}"
                    index.append({**about, "file": file, "judged": condition.keep})
                flips = {}
                if condition.tokens:
                    before, after = (model.tokens(a, site, condition.codebooks) for a in (clip.acts, acts))
                    flips = {"tokens_flipped": int((before != after).sum()), "tokens": before.size}
                signal.append(
                    {
                        **about,
                        "speaker": clip.speaker,
                        "split": clip.split,
                        "seconds": len(clip.wav) / model.sample_rate,
                        **known[same],
                        "latent_sq_error": float(np.square(acts - clip.acts, dtype=np.float64).sum()),
                        "latent_sq_total": total,
                        **flips,
                    }
                )
        columns = list(dict.fromkeys(name for condition in conditions for name in condition.columns))
        head = ["id", "condition", "file", "judged", *columns]
        write_csv(folder / "index.csv", pd.DataFrame(index, columns=head))
        scores = pd.DataFrame(signal)
        head = ["id", "speaker", "split", "condition", *columns]
        write_csv(signal_csv, scores[head + [name for name in scores if name not in head]])
