"""What a codec is trained to lower: the distance of spectra, and what a discriminator hears."""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOWS = (1024, 512, 256, 128)  # samples
MEL_BANDS = (80, 64, 40, 20)
LOG_FLOOR = 3e-4  # of full scale: about 50 dB below speech at -23 dBFS


class SpectralLoss(nn.Module):
    """Mean over window lengths of the relative L1 distance of magnitudes plus the L1 distance of log-mel magnitudes."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        import librosa

        for window, bands in zip(WINDOWS, MEL_BANDS, strict=True):
            taper = torch.hann_window(window)
            self.register_buffer(f"taper{window}", taper / taper.square().sum().sqrt())
            mel = librosa.filters.mel(sr=rate, n_fft=window, n_mels=bands, norm=None)
            mel = mel / np.maximum(mel.sum(1, keepdims=True), 1e-9)  # a band's mean magnitude
            self.register_buffer(f"mel{window}", torch.from_numpy(mel.astype(np.float32)))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the scalar loss of `output` against `target`, both [batch, 1, samples]."""
        both = torch.cat([output, target]).squeeze(1)
        losses = []
        for window in WINDOWS:
            taper, mel = getattr(self, f"taper{window}"), getattr(self, f"mel{window}")
            spectrum = torch.stft(both, window, window // 4, window=taper, return_complex=True)
            magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-10).sqrt()
            a, b = magnitude.chunk(2)
            log_a, log_b = (mel @ magnitude + LOG_FLOOR).log().chunk(2)
            losses.append((a - b).abs().mean() / b.mean() + (log_a - log_b).abs().mean())
        return torch.stack(losses).mean()


class Discriminator(nn.Module):
    """Tells speech from its reconstruction: convolutions over complex STFTs of three window lengths.

    The multi-scale STFT discriminator of EnCodec (Défossez et al. 2022, section 3.4) with fewer channels and dilations.
    """

    windows = (1024, 512, 256)  # samples

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        norm = nn.utils.parametrizations.weight_norm
        self.stacks = nn.ModuleList()
        for window in self.windows:
            self.register_buffer(f"taper{window}", torch.hann_window(window) / (window * 0.375) ** 0.5)
            layers = [norm(nn.Conv2d(2, channels, (9, 3), (2, 1), (4, 1)))]
            for dilation in (1, 2):
                layers.append(norm(nn.Conv2d(channels, channels, (9, 3), (2, 1), (4, dilation), (1, dilation))))
            layers.append(norm(nn.Conv2d(channels, 1, 3, 1, 1)))
            self.stacks.append(nn.ModuleList(layers))

    def forward(self, audio: Tensor) -> list[list[Tensor]]:
        """Returns for each window the feature maps of audio [batch, 1, samples]; the last one holds the logits."""
        found = []
        for window, layers in zip(self.windows, self.stacks, strict=True):
            taper = getattr(self, f"taper{window}")
            spectrum = torch.stft(audio.squeeze(1), window, window // 4, window=taper, return_complex=True)
            x = torch.view_as_real(spectrum).movedim(-1, 1)
            # Compressed to the power 0.3, or the loudest partials would be all that it sees.
            x = x * (x.square().sum(1, keepdim=True) + 1e-6) ** -0.35
            maps = []
            for number, layer in enumerate(cast(nn.ModuleList, layers)):
                x = layer(x if not number else F.leaky_relu(x, 0.2))
                maps.append(x)
            found.append(maps)
        return found


def discriminator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """The hinge loss that the discriminator minimises (scalar)."""
    pairs = [(r[-1], f[-1]) for r, f in zip(real, fake, strict=True)]
    return torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in pairs]).mean()


def generator_losses(real: list[list[Tensor]], fake: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """What the codec minimises: the hinge term, and the relative L1 distance of the features (two scalars)."""
    hinge = torch.stack([F.relu(1 - f[-1]).mean() for f in fake]).mean()
    pairs = [(r.detach(), f) for a, b in zip(real, fake, strict=True) for r, f in zip(a[:-1], b[:-1], strict=True)]
    return hinge, torch.stack([(r - f).abs().mean() / r.abs().mean() for r, f in pairs]).mean()
