"""Read and write audio files."""

from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Samples of a file as float32 [samples], channels averaged, resampled to `rate` samples/s (soxr HQ).

    Reads every format libsndfile knows. Raises EqknobsError when the file is missing, not audio, cut short,
    empty or holds values that are not numbers.
    """
    wav, file_rate = _decode(Path(path))
    if file_rate != rate:
        wav = soxr.resample(wav, file_rate, rate)
    if not len(wav):
        raise EqknobsError(f"{path}: no audio samples; remove the file or replace it")
    return wav


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """Mono float32 samples at the file's own rate, and that rate."""
    if not path.is_file():
        raise EqknobsError(f"{path}: no such audio file; rebuild the manifest or restore the file")
    try:
        with sf.SoundFile(path) as file:
            promised, rate = file.frames, file.samplerate
            wav = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (sf.LibsndfileError, RuntimeError) as error:
        reason = str(error).removeprefix(f"Error opening {str(path)!r}: ")
        raise EqknobsError(f"{path}: not readable as audio ({reason}); remove or replace it") from error
    # libsndfile silently returns fewer samples than the header announces when the file was cut short.
    if len(wav) < promised:
        raise EqknobsError(
            f"{path}: cut short ({len(wav)} of {promised} samples); fetch the file again or remove it"
        )
    if not len(wav):
        raise EqknobsError(f"{path}: no audio samples; remove the file or replace it")
    if not np.isfinite(wav).all():
        raise EqknobsError(
            f"{path}: holds samples that are not numbers (NaN or infinite); remove or replace it"
        )
    return wav, rate


def write_flac(path: str | Path, wav: np.ndarray, rate: int) -> None:
    """Write [samples] in −1…1 as 16-bit mono FLAC, atomically; louder samples are clipped.

    Raises EqknobsError on values that are not numbers.
    """
    wav = np.asarray(wav, dtype=np.float64)
    if not np.isfinite(wav).all():
        raise EqknobsError(
            f"{path}: refusing to write samples that are not numbers; check the edit that made them"
        )
    pcm = np.clip(np.rint(wav * 32768), -32768, 32767).astype(np.int16)
    with atomic_path(path) as temporary:
        sf.write(temporary, pcm, rate, format="FLAC", subtype="PCM_16")
