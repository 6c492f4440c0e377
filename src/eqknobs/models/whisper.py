"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356) in transformers: windows of 30 s, cut without overlap."""

import numpy as np
import torch
from transformers import WhisperFeatureExtractor, WhisperModel

from eqknobs.models.base import LayeredEncoder, captured, inference, one_line


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
