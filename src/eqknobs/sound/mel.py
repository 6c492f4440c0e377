"""The mel distance of `eqknobs.sound.metrics` for batches of tensors, with gradients."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eqknobs.corpus.labels import _mel_bank
from eqknobs.sound.metrics import MEL_FLOOR_DB

BANDS = 80


def mel_power(wavs: Tensor, rate: int) -> Tensor:
    """Mel power [batch, frames, 80] of waveforms [batch, samples], on windows of 40 ms every 20 ms."""
    hop = round(0.02 * rate)
    length, frames = 2 * hop, -(-wavs.shape[1] // hop)
    starts = np.array([round((t + 0.5) * hop - length / 2) for t in range(frames)]) + length
    at = torch.from_numpy(starts[:, None] + np.arange(length)).to(wavs.device)
    hann = torch.from_numpy(np.hanning(length + 1)[:-1].astype(np.float32)).to(wavs.device)
    bank = torch.from_numpy(_mel_bank(rate, length, BANDS)).to(wavs.device)
    spectrum = torch.fft.rfft(F.pad(wavs, (length, 2 * length))[:, at] * hann)
    return (spectrum.real.square() + spectrum.imag.square()) @ bank


def mel_db(power: Tensor, reference: Tensor) -> Tensor:
    """Mel power in dB, floored 80 dB below the loudest band of each `reference` [batch or 1, frames, 80]."""
    floor = reference.amax((1, 2), keepdim=True).clamp_min(1e-10) * 10 ** (-MEL_FLOOR_DB / 10)
    return 10 * torch.log10(torch.maximum(power, floor))


def mel_distances(originals: Tensor, wavs: Tensor, rate: int) -> Tensor:
    """dB [batch]: `eqknobs.sound.metrics.mel_distance` of each waveform [batch, samples] to its original [batch or 1,
    samples]."""
    reference = mel_power(originals, rate)
    return (mel_db(reference, reference) - mel_db(mel_power(wavs, rate), reference)).abs().mean((1, 2))
