"""EnCodec (Défossez et al. 2022, arXiv 2210.13438) in transformers. Its LSTM sees the whole clip at frame rate."""

import math

import torch
from torch import Tensor
from transformers import EncodecModel

from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg
from eqknobs.models.base import ConvCodec


class Encodec(ConvCodec):
    """EnCodec (Défossez et al. 2022, arXiv 2210.13438), the mono model without per-chunk normalisation."""

    net_class = EncodecModel

    def __init__(self, cfg: ModelCfg):
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

    def _dequantise(self, codes: Tensor) -> Tensor:
        return self.net.quantizer.decode(codes[:, None])
