"""Descript Audio Codec (Kumar et al. 2023, arXiv 2306.06546) in transformers."""

import math

from torch import Tensor
from transformers import DacModel

from eqknobs.models import ModelCfg
from eqknobs.models.base import ConvCodec, convolution_reach


class Dac(ConvCodec):
    """Descript Audio Codec (Kumar et al. 2023, arXiv 2306.06546). Not causal: the zero padding to a whole
    hop, which is the model's own, reaches into the last frames."""

    net_class = DacModel

    def __init__(self, cfg: ModelCfg):
        super().__init__(cfg)
        self.sample_rate = self.config.sampling_rate
        self.n_codebooks = self.config.n_codebooks
        self._set_site(
            math.prod(self.config.downsampling_ratios), convolution_reach(self.net.encoder) / self.sample_rate
        )

    def _quantise(self, latents: Tensor, codebooks: int) -> tuple[Tensor, Tensor]:
        quantised, codes = self.net.quantizer(latents, codebooks)[:2]
        return quantised, codes[0]

    def _dequantise(self, codes: Tensor) -> Tensor:
        return self.net.quantizer.from_codes(codes[None])[0]
