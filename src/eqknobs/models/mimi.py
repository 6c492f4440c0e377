"""Mimi (Défossez et al. 2024, arXiv 2410.00037) in transformers' implementation and file format."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MimiModel

from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg, Site
from eqknobs.models.base import Pretrained, captured, convolution_reach, fit, gpu_memory, inference, substituted


class Mimi(Pretrained):
    """Sites `encoder_transformer` (its output, before the downsampling to code rate) and `encoder_layer.<i>`.

    Every waveform is zero-padded to whole code frames (`stride` encoder frames each): the encoder is causal,
    so that padding changes no frame, and valid frames = stride * ceil(samples / (stride * hop)).
    """

    net_class = MimiModel
    decodes = gradients = True
    chunk_seconds = 20.0

    def __init__(self, cfg: ModelCfg):
        super().__init__(cfg)
        config = self.config
        if config.audio_channels != 1 or not config.use_causal_conv or config.latent_stride < 2:
            raise EqknobsError(f"models.{self.name}: only mono, causal Mimi models with a downsampling are supported")
        self.sample_rate = config.sampling_rate
        self.n_codebooks = config.num_quantizers
        self.min_codebooks = config.num_semantic_quantizers
        self.stride = config.latent_stride
        self._hop = hop = math.prod(config.upsampling_ratios)
        rate = self.sample_rate / hop
        seanet = self.net.get_submodule(self.resolve("encoder.encoder_seanet", "encoder"))
        reach = convolution_reach(seanet) / self.sample_rate
        window = (config.sliding_window - 1) / rate
        transformer = self.resolve("encoder.encoder_transformer", "encoder_transformer")
        paths = {"encoder_transformer": (transformer, config.num_hidden_layers)}
        for i in range(config.num_hidden_layers):
            paths[f"encoder_layer.{i}"] = (self.resolve(f"{transformer}.layers.{i}"), i + 1)
        self.sites = {
            name: Site(name, path, config.hidden_size, hop, rate, reach + depth * window)
            for name, (path, depth) in paths.items()
        }
        self._transformer = self.net.get_submodule(transformer)
        self._downsample = self.net.get_submodule(self.resolve("encoder.downsample", "downsample"))
        self._upsample = self.net.get_submodule(self.resolve("decoder.upsample", "upsample"))
        after = self.resolve("decoder.decoder_transformer", "decoder_transformer")
        self._decoder_transformer = self.net.get_submodule(after)
        self._decoder_seanet = self.net.get_submodule(self.resolve("decoder.decoder_seanet", "decoder"))

    def frames(self, samples: int, site: str) -> int:
        return self.stride * math.ceil(samples / (self.stride * self.site(site).hop))

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Activations [frames, width] by site. Exact for any length in bounded memory: chunks of `chunk_seconds`
        go through the model's own streaming caches (convolution inputs, keys and values of the window)."""
        modules = self._modules(sites)
        block = self.stride * self._hop
        wave = self._wave(wav, block)
        chunk = block * max(1, round(self.chunk_seconds * self.sample_rate / block))
        out: dict[str, list[Tensor]] = {name: [] for name in modules}
        state: dict[str, Any] = {}
        with inference(), captured(modules) as seen:
            for start in range(0, len(wave), chunk):
                step = self.net.encoder(wave[None, None, start : start + chunk], use_streaming=True, **state)
                state = {"past_key_values": step.past_key_values, "padding_cache": step.padding_cache}
                for name, pieces in out.items():
                    pieces.append(seen[name].pop()[0].cpu())
        return {name: torch.cat(pieces).numpy() for name, pieces in out.items()}

    def _latents(self, given: Tensor, site: str) -> Tensor:
        """Latents [batch, width, code frames] at code rate, the encoder continued from [batch, frames, width]."""
        hidden = given
        if given.shape[1] % self.stride or not given.shape[1]:
            raise EqknobsError(f"{self.name}: {given.shape[1]} frames are not whole code frames of {self.stride}")
        if site != "encoder_transformer":
            # The layers up to the site run on zeros and are overruled; masks and positions stay the model's.
            with substituted(self.net.get_submodule(self.site(site).path), lambda _zeros: given):
                hidden = self._transformer(torch.zeros_like(given), use_cache=False)[0]
        return self._downsample(hidden.transpose(1, 2))

    def _codes(self, latents: Tensor, codebooks: int | None) -> Tensor:
        return self.net.quantizer.encode(latents, self._codebooks(codebooks)).transpose(0, 1)

    def decode(self, acts: np.ndarray, site: str, samples: int, codebooks: int | None = None) -> np.ndarray:
        """Waveform [samples]; see `sound`."""
        with inference():
            latents = self._latents(self._acts(acts, site), site)
            if codebooks is not None:
                latents = self.net.quantizer.decode(self._codes(latents, codebooks))
            return self.sound(latents, samples)

    def decode_batch(self, acts: Tensor, site: str, codebooks: int | None = None) -> Tensor:
        with gpu_memory():
            latents = self._latents(self._batch(acts, site), site)
            if codebooks is not None:
                latents = self.net.quantizer.decode(self._codes(latents.detach(), codebooks))
            hidden = self._decoder_transformer(self._upsample(latents).transpose(1, 2), use_cache=False)[0]
            return self._decoder_seanet(hidden.transpose(1, 2))[:, 0]

    def reconstruct(self, wav: np.ndarray, codebooks: int | None = None) -> np.ndarray:
        acts = self.encode(wav, "encoder_transformer")  # after all other sites
        return self.decode(acts, "encoder_transformer", len(wav), codebooks)

    def sound(self, latents: Tensor, samples: int) -> np.ndarray:
        """Waveform [samples] of latents [1, width, code frames] at code rate.

        Exact for any length in bounded memory: in chunks of `chunk_seconds` the transformer goes on from its own cache,
        and the causal convolutions get the frames that they look back to once more.
        """
        reach = math.ceil(convolution_reach(self._decoder_seanet, self._hop) / self._hop)
        chunk = max(1, round(self.chunk_seconds * self.sample_rate / self._hop))
        out, state = [], None
        with inference():
            hidden = self._upsample(latents).transpose(1, 2)
            before = hidden[:, :0]
            for piece in hidden.split(chunk, dim=1):
                step = self._decoder_transformer(piece, past_key_values=state, use_cache=True)
                state, joined = step.past_key_values, torch.cat([before, step[0]], dim=1)
                out.append(self._decoder_seanet(joined.transpose(1, 2))[0, 0, before.shape[1] * self._hop :].cpu())
                before = joined[:, -reach:]
        return fit(torch.cat(out), samples)

    def tokens(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        with inference():
            return self._codes(self._latents(self._acts(acts, site), site), codebooks)[0].cpu().numpy()

    def decoder_input(self, acts: np.ndarray, site: str, codebooks: int | None = None) -> np.ndarray:
        with inference():
            latents = self._latents(self._acts(acts, site), site)
            if codebooks is not None:
                latents = self.net.quantizer.decode(self._codes(latents, codebooks))
            return latents[0].T.contiguous().cpu().numpy()

    def shuffle_weights(self, seed: int) -> None:
        for module in self.net.modules():
            if hasattr(module, "cluster_usage"):  # codebooks are kept as sums over their uses
                module.embed_sum.copy_(module.embed)
                module.cluster_usage.fill_(1)
                module._embed = None
        super().shuffle_weights(seed)

    def decode_tokens(self, tokens: np.ndarray, samples: int) -> np.ndarray:
        with inference():
            codes = torch.as_tensor(tokens, device=self.device)[None]
            return self.sound(self.net.quantizer.decode(codes), samples)
