"""HuBERT (Hsu et al. 2021, arXiv 2106.07447) in transformers: normalises and attends over the whole clip."""

import math

import numpy as np
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from eqknobs.errors import EqknobsError
from eqknobs.models.base import LayeredEncoder, captured, inference, one_line


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
