"""HuBERT (Hsu et al. 2021, arXiv 2106.07447) in transformers: normalises and attends over the whole clip."""

import math
from collections.abc import Sequence

import numpy as np
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg
from eqknobs.models.base import LayeredEncoder, captured, inference, one_line, until_last


class Hubert(LayeredEncoder):
    """HuBERT (Hsu et al. 2021, arXiv 2106.07447). Frames are those of its convolutions, without
    padding: floor((samples - receptive field) / hop) + 1 of them."""

    net_class = HubertModel
    max_seconds = 120.0

    def __init__(self, cfg: ModelCfg):
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

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Activations [frames, width] by site; raises EqknobsError beyond `max_seconds`, or below one frame."""
        modules, samples = self._modules(sites), len(self._wave(wav))
        if not self.frames(samples, sites[0]) or samples > self.max_seconds * self.sample_rate:
            raise EqknobsError(
                f"model {self.name} takes clips up to {self.max_seconds:g} s and of at least one frame, got "
                f"{samples / self.sample_rate:.3f} s; set data.min_seconds and data.max_seconds accordingly"
            )
        values = self._extract(wav, sampling_rate=self.sample_rate, return_tensors="pt").input_values
        with inference(), captured(modules, last=[*modules.values()][-1]) as seen:
            until_last(self.net, values.to(self.device))
            return {name: acts[0][0].cpu().numpy() for name, acts in seen.items()}
