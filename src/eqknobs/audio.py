"""Read and write audio files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, file_sha256


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Samples of a file as float32 [samples], channels averaged, resampled to `rate` samples/s (soxr HQ).

    Reads every format libsndfile knows. Raises EqknobsError when the file is missing, not audio, cut short,
    empty or holds values that are not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise EqknobsError(f"{path}: no such audio file; restore it or name another")
    try:
        with sf.SoundFile(path) as file:
            promised, file_rate, log = file.frames, file.samplerate, file.extra_info
            wav = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except sf.LibsndfileError as error:
        raise EqknobsError(f"{path}: not readable as audio ({error.error_string}); replace or remove it") from error
    # libsndfile returns what there is of a file cut short. A WAV's log then shows both sizes; the largest
    # 32-bit size is no defect but what programs write that stream and do not know the length beforehand.
    sizes = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if len(wav) < promised or (sizes and int(sizes[2]) < int(sizes[1]) < 2**31 - 1):
        raise EqknobsError(f"{path}: cut short after {len(wav)} samples; fetch it again or remove it")
    if not np.isfinite(wav).all():
        raise EqknobsError(f"{path}: holds NaN or infinite samples; replace or remove it")
    if file_rate != rate:
        wav = soxr.resample(wav, file_rate, rate)
    if not len(wav):
        raise EqknobsError(f"{path}: holds no samples; replace or remove it")
    return wav


def read_clip(clip: Any, rate: int) -> np.ndarray:
    """Samples [samples] of a manifest row (its `path` and `sha256`) at `rate` samples/s, as `read_audio` gives them.

    Raises EqknobsError also when the file is not the one that the manifest was drawn from.
    """
    path = Path(clip.path)
    if not path.is_file():
        raise EqknobsError(f"{path}: no such audio file; restore it, or run again, and the manifest is drawn anew")
    if file_sha256(path) != clip.sha256:
        raise EqknobsError(f"{path}: changed since the manifest was drawn; run again, and the manifest is drawn anew")
    return read_audio(path, rate)


def write_flac(path: str | Path, wav: np.ndarray, rate: int, kind: str = "FLAC") -> None:
    """Write [samples] in −1…1 as 16-bit mono FLAC (`kind` WAV: as WAV), atomically; louder samples are clipped.

    Raises EqknobsError on NaN or infinite samples, and where the file cannot be written.
    """
    wav = np.asarray(wav, dtype=np.float64)
    if not np.isfinite(wav).all():
        raise EqknobsError(f"{path}: the sound to write holds NaN or infinite samples; weaken the edit")
    pcm = np.clip(np.rint(wav * 32768), -32768, 32767).astype(np.int16)
    with atomic_path(path) as temporary:
        try:
            sf.write(temporary, pcm, rate, format=kind, subtype="PCM_16")
        except (sf.SoundFileError, AssertionError) as error:  # libsndfile hides the system's reason
            raise EqknobsError(f"{path}: cannot be written; is the disk full? ({error})") from error
