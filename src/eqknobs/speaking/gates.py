"""Simple signs that an answer went wrong, as the only public bench of this family of models uses them.

Thresholds: richiever/Personaplex-bench (README, 2026), in windows of two seconds where it says so. They were set by
hand, so that what the intact model and real speech make of them stands beside them, and bounds calibrated on the intact
model's answers. Not taken: UTMOS (its weights cannot be had), continuity, personas, speed.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from eqknobs.models.moshi.config import FRAME_RATE
from eqknobs.sound.metrics import active_seconds

WINDOW = 2.0  # seconds
TAIL = 0.025  # of the intact model's answers that lie beyond a calibrated bound


@dataclass(frozen=True)
class Gate:
    """Passed by values from `low` to `high`."""

    name: str
    low: float = -np.inf
    high: float = np.inf

    def passes(self, values: np.ndarray) -> np.ndarray:
        """Whether each value passes; one that could not be measured does not."""
        return (values >= self.low) & (values <= self.high)

    def calibrated(self, values: np.ndarray) -> "Gate":
        """The same gate with bounds, on the sides where it has any, beyond which `TAIL` of the values lie."""
        known = values[np.isfinite(values)]
        if not len(known):
            return self
        low = float(np.quantile(known, TAIL)) if np.isfinite(self.low) else -np.inf
        high = float(np.quantile(known, 1 - TAIL)) if np.isfinite(self.high) else np.inf
        return Gate(self.name, low, high)


GATES = (
    Gate("flatness", high=0.3),  # spectral flatness, largest of the windows
    Gate("repetition", high=20),  # longest run of one text token that is not PAD, frames
    Gate("entropy", low=2.0),  # of the codes in a window, bits, mean over codebooks, smallest of the windows
    Gate("energy_cv", low=0.1),  # coefficient of variation of the level
    Gate("zero_crossings", 0.01, 0.15),  # mean share of samples
    Gate("words_heard", low=5),
    Gate("overlap", low=0.2),  # share of the monologue's words that are heard
    Gate("latency", high=5.0),  # seconds until something is heard
    Gate("pads", high=0.95),  # share of PAD
)


def signal_values(wav: np.ndarray, rate: int) -> dict[str, float]:
    """flatness, energy_cv, zero_crossings, latency of a waveform [samples]; NaN where it is silent."""
    if not np.any(wav):
        return dict.fromkeys(("flatness", "energy_cv", "zero_crossings", "latency"), float("nan"))
    size, wide = round(WINDOW * rate), wav.astype(np.float64)
    windows = [wide[i : i + size] for i in range(0, max(1, len(wide) - size // 2), size)]
    flat = []
    for window in windows:
        power = np.square(np.abs(np.fft.rfft(window * np.hanning(len(window))))) + 1e-12
        flat.append(float(np.exp(np.log(power).mean()) / power.mean()))
    hop = round(0.02 * rate)
    frames = wide[: len(wide) // hop * hop].reshape(-1, hop)
    level = np.sqrt(np.square(frames).mean(1))
    start, _ = active_seconds(wav, rate)
    return {
        "flatness": max(flat),
        "energy_cv": float(level.std() / level.mean()) if level.any() else float("nan"),
        "zero_crossings": float(np.mean(np.signbit(wide[1:]) != np.signbit(wide[:-1]))),
        "latency": start,
    }


def token_values(text: np.ndarray, codes: np.ndarray, pad: int) -> dict[str, float]:
    """repetition, entropy, pads of text tokens [T] and codes [codebooks, T]; codes of -1 are none."""
    longest = run = 0
    for token, before in zip(text, [None, *text[:-1]], strict=True):
        run = 0 if token == pad else run + 1 if token == before else 1
        longest = max(longest, run)
    size = round(WINDOW * FRAME_RATE)
    spoken = codes[(codes >= 0).all(1)]
    starts = range(0, max(1, codes.shape[1] - size // 2), size)
    found = [[_entropy(book[i : i + size]) for book in spoken] for i in starts]
    entropy = min((float(np.mean(window)) for window in found if window), default=float("nan"))
    return {"repetition": float(longest), "entropy": entropy, "pads": float(np.mean(text == pad))}


def _entropy(codes: np.ndarray) -> float:
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def word_values(said: str, heard: str) -> dict[str, float]:
    """words_heard, overlap of normalised texts; no overlap without a monologue."""
    mine, theirs = Counter(said.split()), Counter(heard.split())
    overlap = (mine & theirs).total() / mine.total() if mine else float("nan")
    return {"words_heard": float(theirs.total()), "overlap": overlap}
