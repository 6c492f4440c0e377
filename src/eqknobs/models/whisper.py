"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356) in transformers: windows of 30 s, cut without overlap."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperModel

from eqknobs.models import ModelCfg
from eqknobs.models.base import LayeredEncoder, captured, inference, one_line, until_last


class Whisper(LayeredEncoder):
    """Encoder of Whisper (Radford et al. 2022, arXiv 2212.04356), without its final layer norm."""

    net_class = WhisperModel

    def __init__(self, cfg: ModelCfg):
        super().__init__(cfg)
        with one_line(f"models.{self.name}: cannot load the feature extractor of {cfg['path']}"):
            self._extract = WhisperFeatureExtractor.from_pretrained(cfg["path"], revision=self.revision)
        encoder, config = self.net.encoder, self.config
        self.sample_rate = self._extract.sampling_rate
        hop = self._extract.hop_length * encoder.conv1.stride[0] * encoder.conv2.stride[0]
        self._window = config.max_source_positions * hop
        seconds = self._window / self.sample_rate
        self._set_sites("encoder.layers", config.encoder_layers, config.d_model, hop, seconds)

    def _windows(self, wav: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Samples and log-mel spectrogram [1, mels, 2 * positions] of each window, the last one padded."""
        wave = self._wave(wav).cpu().numpy()
        for start in range(0, len(wave), self._window):
            piece = wave[start : start + self._window]
            features = self._extract(piece, sampling_rate=self.sample_rate, return_tensors="pt").input_features
            yield len(piece), features.to(self.device)

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Activations [frames, width] by site, window after window; what stands for padding is dropped."""
        modules = self._modules(sites)
        out: dict[str, list[Tensor]] = {name: [] for name in modules}
        with inference(), captured(modules, last=[*modules.values()][-1]) as seen:
            for samples, features in self._windows(wav):
                until_last(self.net.encoder, features)
                for name, pieces in out.items():
                    pieces.append(seen[name].pop()[0, : self.frames(samples, name)].cpu())
        return {name: torch.cat(pieces).numpy() for name, pieces in out.items()}

    def memory(self, wav: np.ndarray) -> Tensor:
        """What the decoder reads [windows, positions, width], edits included: a transcription begins from it."""
        with inference():
            return torch.cat([self.net.encoder(features).last_hidden_state for _, features in self._windows(wav)])
