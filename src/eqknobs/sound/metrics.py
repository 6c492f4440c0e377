"""Signal metrics of a clip, and between a clip and its original. Levels are in dB, frequencies in Hz.

All use the probes' own definitions (`eqknobs.corpus.labels`) on windows of 40 ms every 20 ms; pitch every 40 ms.
"""

from functools import lru_cache

import numpy as np

from eqknobs.corpus.labels import _mel_power, centroid_and_rms, energetic_mask, pitch_track

FLOOR_DB = 40.0  # frames this far below the clip's loudest are left out of averages
MEL_FLOOR_DB = 80.0  # mel bands this far below the reference's loudest are taken as equal
VOICED_PERIODICITY = 0.5
MIN_VOICED_FRAMES = 5


def _frames(wav: np.ndarray, hop: int) -> int:
    return -(-len(wav) // hop)


def _fit(wav: np.ndarray, samples: int) -> np.ndarray:
    """`wav` cut or zero-padded to `samples`."""
    return np.pad(wav[:samples], (0, max(0, samples - len(wav))))


def centroid_track(wav: np.ndarray, rate: int, floor_db: float = FLOOR_DB) -> tuple[np.ndarray, np.ndarray]:
    """Spectral centroid (Hz) every 20 ms [frames], and the mask of frames within `floor_db` of the loudest."""
    hop = round(0.02 * rate)
    centroid, rms = centroid_and_rms(wav, rate, hop, _frames(wav, hop))
    return centroid, energetic_mask(rms, floor_db)


def clip_centroid(wav: np.ndarray, rate: int) -> float:
    """Mean spectral centroid (Hz) over the energetic frames; nan for a silent clip."""
    centroid, energetic = centroid_track(wav, rate)
    return float(centroid[energetic].mean(dtype=np.float64)) if energetic.any() else float("nan")


def frame_centroid_correlation(a: np.ndarray, b: np.ndarray, rate: int) -> float:
    """Pearson correlation of the two centroid tracks over the energetic frames of the original `a`.

    `b` is cut or padded to `a`, its silent frames are left out. nan for under 3 frames or constant tracks.
    """
    (first, energetic), (second, _) = centroid_track(a, rate), centroid_track(_fit(b, len(a)), rate)
    both = energetic & np.isfinite(second)
    x, y = first[both].astype(np.float64), second[both].astype(np.float64)
    if len(x) < 3 or not x.std() or not y.std():
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def mel_distance(a: np.ndarray, b: np.ndarray, rate: int) -> float:
    """Mean absolute difference (dB) of the 80-band log-mel spectra of the original `a` and of `b`.

    Both are floored 80 dB below the loudest band of `a`. Level is not normalised: a gain of g dB scores |g|
    on bands above the floor. `b` is cut or padded to `a`.
    """
    hop = round(0.02 * rate)

    def mel(wav: np.ndarray) -> np.ndarray:
        return np.concatenate([power for _, power in _mel_power(wav, rate, hop, _frames(a, hop), 80)])

    reference, other = mel(a), mel(_fit(b, len(a)))
    floor = max(float(reference.max()), 1e-10) * 10 ** (-MEL_FLOOR_DB / 10)
    difference = 10 * np.log10(np.maximum(reference, floor) / np.maximum(other, floor))
    return float(np.abs(difference).mean(dtype=np.float64))


def loudness_db(wav: np.ndarray, rate: int = 16000) -> float:
    """RMS level (dB full scale) over the energetic frames; −100 for digital silence."""
    hop = round(0.02 * rate)
    _, rms = centroid_and_rms(wav, rate, hop, _frames(wav, hop))
    energetic = energetic_mask(rms, FLOOR_DB)
    if not energetic.any():
        return -100.0
    return float(10 * np.log10(np.mean(10 ** (rms[energetic].astype(np.float64) / 10))))


def f0_error_cents(a: np.ndarray, b: np.ndarray, rate: int) -> float:
    """Median |1200·log2(f0 of b / f0 of a)| on frames voiced in both, by CREPE tiny; nan for under 5."""
    (first, voiced_a), (second, voiced_b) = _f0(a, rate), _f0(_fit(b, len(a)), rate)
    both = voiced_a & voiced_b
    if both.sum() < MIN_VOICED_FRAMES:
        return float("nan")
    return float(np.median(np.abs(1200 * np.log2(second[both].astype(np.float64) / first[both]))))


def _f0(wav: np.ndarray, rate: int, periodic: float = VOICED_PERIODICITY) -> tuple[np.ndarray, np.ndarray]:
    pitch, periodicity = _f0_of_bytes(np.ascontiguousarray(wav, np.float32).tobytes(), rate)
    return pitch, periodicity > periodic


@lru_cache(maxsize=32)  # one original is compared with many renders
def _f0_of_bytes(samples: bytes, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Pitch (Hz) and periodicity every 40 ms [frames]; both are 0 where there is next to no sound."""
    wav = np.frombuffer(samples, np.float32)
    hop = round(0.04 * rate)
    frames = _frames(wav, hop)
    _, rms = centroid_and_rms(wav, rate, hop, frames)
    return pitch_track(wav, rate, hop, frames, wanted=energetic_mask(rms, FLOOR_DB))


def clip_f0(wav: np.ndarray, rate: int, periodic: float = VOICED_PERIODICITY) -> float:
    """Median fundamental frequency (Hz) of the voiced frames, by CREPE tiny; nan for under 5.

    periodic: CREPE's confidence above which a frame is voiced.
    """
    pitch, voiced = _f0(wav, rate, periodic)
    return float(np.median(pitch[voiced])) if voiced.sum() >= MIN_VOICED_FRAMES else float("nan")


def active_seconds(wav: np.ndarray, rate: int) -> tuple[float, float]:
    """Begin and end (s) of what is within 40 dB of the loudest frame; nan, nan for digital silence."""
    hop = round(0.02 * rate)
    _, rms = centroid_and_rms(wav, rate, hop, _frames(wav, hop))
    found = np.flatnonzero(energetic_mask(rms, FLOOR_DB))
    return (found[0] * 0.02, (found[-1] + 1) * 0.02) if len(found) else (float("nan"), float("nan"))
