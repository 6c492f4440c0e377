"""Loudness of speech by ITU-R BS.1770-4, mono: PersonaPlex hears recorded voices at one level."""

import numpy as np
import soxr
from scipy.signal import lfilter

VOICE_LUFS = -24.0  # NVIDIA/personaplex, models/lm.py, LMGen.load_voice_prompt
RATE = 48000  # of the standard's filters, tables 1 and 2: a high shelf for the head, then a high pass
K_WEIGHTING = (
    ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)),
    ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)),
)
BLOCK, HOP = 19200, 4800  # 400 ms, overlapping by 75 %


def loudness(wav: np.ndarray, rate: int) -> float:
    """Integrated loudness in LUFS of a waveform [samples]; -inf for silence or less than 400 ms."""
    wave = soxr.resample(np.asarray(wav, dtype=np.float64), rate, RATE)
    for zeros, poles in K_WEIGHTING:
        wave = lfilter(zeros, poles, wave)
    sums = np.concatenate([[0.0], np.cumsum(wave**2)])
    starts = np.arange(0, len(wave) - BLOCK + 1, HOP)
    power = (sums[starts + BLOCK] - sums[starts]) / BLOCK
    level = -np.inf
    for above in (0.0, 10.0):  # blocks above -70 LUFS; of these, those above 10 below their own level
        power = power[power > 10 ** ((max(level - above, -70.0) + 0.691) / 10)]
        if not len(power):
            return -np.inf
        level = float(10 * np.log10(power.mean()) - 0.691)
    return level


def normalised(wav: np.ndarray, rate: int) -> np.ndarray:
    """A recorded voice at PersonaPlex's level, as float32; as it is where there is nothing to measure."""
    level = loudness(wav, rate)
    gain = 10 ** ((VOICE_LUFS - level) / 20) if np.isfinite(level) else 1.0
    return (gain * np.asarray(wav)).astype(np.float32)
