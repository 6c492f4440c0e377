"""EnCodec, DAC, HuBERT and Whisper in transformers, as compact adapters.

Long clips: EnCodec and DAC run their convolutions in chunks with enough context on both sides to be exact
(EnCodec's LSTM then sees the whole clip at frame rate). HuBERT normalises and attends over the whole clip: it
takes clips up to `max_seconds`. Whisper sees windows of 30 s, cut without overlap; its padded frames go.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DacModel,
    EncodecModel,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from eqknobs.errors import EqknobsError
from eqknobs.models import Site
from eqknobs.models.base import Pretrained, captured, convolution_reach, fit, inference, one_line


class ConvCodec(Pretrained, ABC):
    """A codec whose only site is `encoder`, the output [frames, width] of its convolutional encoder."""

    decodes = True
    chunk_seconds = 20.0

    def _set_site(self, hop: int, context: float) -> None:
        rate = self.sample_rate / hop
        path = self.resolve("encoder")
        self.sites = {"encoder": Site("encoder", path, self.config.hidden_size, hop, rate, context)}

    def _in_chunks(self, stack: Callable[[Tensor], Tensor], wave: Tensor) -> Tensor:
        """Apply convolutions with one output a hop to [1, 1, samples]; equal to applying them at once."""
        hop = self.sites["encoder"].hop
        frames = wave.shape[-1] // hop
        step = max(1, round(self.chunk_seconds * self.sites["encoder"].frame_rate))
        context = math.ceil(convolution_reach(self.net.encoder) / hop) + 1
        out = []
        for start in range(0, frames, step):
            left = max(0, start - context)
            piece = stack(wave[..., left * hop : (start + step + context) * hop])
            out.append(piece[..., start - left : start - left + min(step, frames - start)])
        return torch.cat(out, dim=-1)

    def _encode(self, wave: Tensor) -> Tensor:
        return self._in_chunks(self.net.encoder, wave)

    @abstractmethod
    def _quantise(self, latents: Tensor, codebooks: int) -> tuple[Tensor, Tensor]:
        """Dequantised latents [1, width, frames] and codes [codebooks, frames]."""

    def encode(self, wav: np.ndarray, site: str) -> np.ndarray:
        with inference():
            wave = self._wave(wav, self.site(site).hop)
            return self._encode(wave[None, None])[0].T.contiguous().cpu().numpy()

    def decode(self, acts: np.ndarray, site: str, samples: int, codebooks: int | None = None) -> np.ndarray:
        """Waveform [samples]. Decoded in one piece, so memory grows with the clip."""
        with inference():
            latents = self._acts(acts, site).transpose(1, 2)
            if codebooks is not None:
                latents = self._quantise(latents, self._codebooks(codebooks))[0]
            return fit(self.net.decoder(latents)[0, 0], samples)

    def tokens(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        with inference():
            return self._quantise(self._acts(acts, site).transpose(1, 2), self._codebooks(codebooks))[1].cpu().numpy()


class Encodec(ConvCodec):
    """EnCodec (Défossez et al. 2022, arXiv 2210.13438), the mono model without per-chunk normalisation."""

    net_class = EncodecModel

    def __init__(self, cfg: dict):
        super().__init__(cfg)
        config = self.config
        if config.audio_channels != 1 or config.normalize or config.norm_type != "weight_norm":
            raise EqknobsError(
                f"models.{self.name}: EnCodec is supported as mono model without normalisation of the level "
                "(facebook/encodec_24khz); this one differs"
            )
        self.sample_rate = config.sampling_rate
        self.n_codebooks = config.num_quantizers
        self._set_site(math.prod(config.upsampling_ratios), math.inf)  # the LSTM remembers all
        self._lstm = next(i for i, layer in enumerate(self.net.encoder.layers) if hasattr(layer, "lstm"))

    def _encode(self, wave: Tensor) -> Tensor:
        layers = self.net.encoder.layers
        hidden = self._in_chunks(torch.nn.Sequential(*layers[: self._lstm]), wave)
        return torch.nn.Sequential(*layers[self._lstm :])(hidden)

    def _quantise(self, latents: Tensor, codebooks: int) -> tuple[Tensor, Tensor]:
        quantizer = self.net.quantizer
        # Its interface counts bandwidth; half a codebook more keeps the rounding down on the right side.
        bandwidth = (codebooks + 0.5) * math.log2(quantizer.codebook_size) * quantizer.frame_rate / 1000
        codes = quantizer.encode(latents, bandwidth)
        return quantizer.decode(codes), codes[:, 0]


class Dac(ConvCodec):
    """Descript Audio Codec (Kumar et al. 2023, arXiv 2306.06546). Not causal: the zero padding to a whole
    hop, which is the model's own, reaches into the last frames."""

    net_class = DacModel

    def __init__(self, cfg: dict):
        super().__init__(cfg)
        self.sample_rate = self.config.sampling_rate
        self.n_codebooks = self.config.n_codebooks
        self._set_site(
            math.prod(self.config.downsampling_ratios), convolution_reach(self.net.encoder) / self.sample_rate
        )

    def _quantise(self, latents: Tensor, codebooks: int) -> tuple[Tensor, Tensor]:
        quantised, codes = self.net.quantizer(latents, codebooks)[:2]
        return quantised, codes[0]


class LayeredEncoder(Pretrained):
    """An encoder-only model with sites `layer.<i>`, the outputs of its transformer layers."""

    def _set_sites(self, layers: str, count: int, width: int, hop: int, context: float) -> None:
        rate = self.sample_rate / hop
        self.sites = {
            f"layer.{i}": Site(f"layer.{i}", self.resolve(f"{layers}.{i}"), width, hop, rate, context)
            for i in range(count)
        }


class Hubert(LayeredEncoder):
    """HuBERT (Hsu et al. 2021, arXiv 2106.07447). Frames are those of its convolutions, without
    padding: floor((samples - receptive field) / hop) + 1 of them."""

    net_class = HubertModel
    max_seconds = 120.0

    def __init__(self, cfg: dict):
        super().__init__(cfg)
        with one_line(f"models.{self.name}: cannot load the feature extractor of {cfg['path']}"):
            self._extract = Wav2Vec2FeatureExtractor.from_pretrained(cfg["path"], revision=self.revision)
        self.sample_rate = self._extract.sampling_rate
        config = self.config
        self._set_sites(
            "encoder.layers",
            config.num_hidden_layers,
            config.hidden_size,
            math.prod(config.conv_stride),
            math.inf,
        )

    def frames(self, samples: int, site: str) -> int:
        self.site(site)
        return max(0, int(self.net._get_feat_extract_output_lengths(samples)))

    def encode(self, wav: np.ndarray, site: str) -> np.ndarray:
        """Activations [frames, width]; raises EqknobsError beyond `max_seconds`, or below one frame."""
        place, samples = self.site(site), len(self._wave(wav))
        if not self.frames(samples, site) or samples > self.max_seconds * self.sample_rate:
            raise EqknobsError(
                f"model {self.name} takes clips up to {self.max_seconds:g} s and of at least one frame, got "
                f"{samples / self.sample_rate:.3f} s; set data.min_seconds and data.max_seconds accordingly"
            )
        values = self._extract(wav, sampling_rate=self.sample_rate, return_tensors="pt").input_values
        with inference(), captured(self.net.get_submodule(place.path)) as seen:
            self.net(values.to(self.device))
            return seen[0][0].cpu().numpy()


class Whisper(LayeredEncoder):
    """Encoder of Whisper (Radford et al. 2022, arXiv 2212.04356), without its final layer norm."""

    net_class = WhisperModel

    def __init__(self, cfg: dict):
        super().__init__(cfg)
        with one_line(f"models.{self.name}: cannot load the feature extractor of {cfg['path']}"):
            self._extract = WhisperFeatureExtractor.from_pretrained(cfg["path"], revision=self.revision)
        encoder, config = self.net.encoder, self.config
        self.sample_rate = self._extract.sampling_rate
        hop = self._extract.hop_length * encoder.conv1.stride[0] * encoder.conv2.stride[0]
        self._window = config.max_source_positions * hop
        seconds = self._window / self.sample_rate
        self._set_sites("encoder.layers", config.encoder_layers, config.d_model, hop, seconds)

    def encode(self, wav: np.ndarray, site: str) -> np.ndarray:
        """Activations [frames, width], window after window; what stands for padding is dropped."""
        place, wave, out = self.site(site), self._wave(wav).cpu().numpy(), []
        with inference(), captured(self.net.get_submodule(place.path)) as seen:
            for start in range(0, len(wave), self._window):
                piece = wave[start : start + self._window]
                features = self._extract(piece, sampling_rate=self.sample_rate, return_tensors="pt").input_features
                self.net.encoder(features.to(self.device))
                out.append(seen.pop()[0, : self.frames(len(piece), site)].cpu())
        return torch.cat(out).numpy()


ADAPTERS: dict[str, type[Pretrained]] = {"encodec": Encodec, "dac": Dac, "hubert": Hubert, "whisper": Whisper}
