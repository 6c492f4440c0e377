"""Moshi and PersonaPlex behind the `Model` protocol: what the model holds in mind while it listens."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eqknobs.device import pick_device
from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg, Site
from eqknobs.models.base import Pretrained, gpu_memory, inference, one_line
from eqknobs.models.mimi import Mimi
from eqknobs.models.moshi import interventions
from eqknobs.models.moshi.checkpoint import find_files, load_net
from eqknobs.models.moshi.config import FRAME_RATE, MoshiConfig, Nf4, codec_of
from eqknobs.models.moshi.generate import (
    GREEDY,
    Prompt,
    Reply,
    Sampling,
    generate,
    load_voice,
    persona_prompt,
    system_text,
)
from eqknobs.models.moshi.loudness import normalised
from eqknobs.models.moshi.network import MoshiNet

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from eqknobs.models import SiteEdit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Moshi(Pretrained):
    """Sites `embeddings`, the sum of the 17 streams' embeddings that the first temporal layer reads,
    `residual.<layer>`, the output of a temporal layer, and `heads.<layer>`, the input of its output projection [frames,
    heads * head_dim].

    A clip is heard: it is the user's stream, while the agent is silent and says no text (`stream: agent` turns it
    round: the agent speaks the clip, the user's stream is PersonaPlex's sine). Frame t is the column that carries the
    clip's frame t: its first code and, as acoustic codes come one column later, the other seven of frame t - 1.

    cfg, beside the usual: codec (folder or hub id of a Mimi model; see `codec_of`), codec_revision, dtype (float32,
    bfloat16 or float16), nf4 (true, or {linears, block, double}), stream (user or agent).
    """

    net: MoshiNet
    config: MoshiConfig
    n_codebooks = 0
    decodes = False

    def __init__(self, cfg: ModelCfg):
        self.name = cfg["name"]
        self.device = pick_device(cfg.get("device") or "auto")
        self.stream = cfg.get("stream") or "user"
        dtype = cfg.get("dtype") or ("bfloat16" if self.device == "cuda" else "float32")
        if self.stream not in ("user", "agent") or dtype not in DTYPES:
            raise EqknobsError(f"models.{self.name}: stream is user or agent, dtype {' or '.join(DTYPES)}")
        nf4 = Nf4.of(cfg.get("nf4"), f"models.{self.name}.nf4")
        self.files = find_files(self.name, str(cfg["path"]), cfg.get("revision"))
        self.revision = self.files.revision
        with gpu_memory():
            self.net = load_net(self.files, DTYPES[dtype], nf4, self.device)
        self.config = self.net.config
        path = codec_of(cfg, self.files.config, f"models.{self.name}")
        codec: ModelCfg = {"name": f"{self.name}.codec", "kind": "mimi", "path": path, "device": self.device}
        self.codec = Mimi({**codec, "revision": cfg.get("codec_revision")})
        self.sample_rate = self.codec.sample_rate
        place = self.codec.site("encoder_transformer")
        self.hop = place.hop * self.codec.stride
        if self.sample_rate != FRAME_RATE * self.hop or self.codec.config.codebook_size != self.config.card:
            raise EqknobsError(
                f"models.{self.name}.codec: the model reads codes of {self.config.card} values at {FRAME_RATE} Hz, "
                f"this codec gives {self.codec.config.codebook_size} at {self.sample_rate / self.hop:g} Hz; take the "
                "model's own (of Moshi and PersonaPlex: kyutai/mimi)"
            )
        self.context = place.context + self.config.layers * self.config.context / FRAME_RATE

    @property
    def sites(self) -> dict[str, Site]:
        """Made anew each time, as layers lose heads; a layer without any has no site `heads.<layer>`."""
        first = "transformer.layers.0"
        found = [Site("embeddings", first, self.config.dim, self.hop, FRAME_RATE, self.context)]
        for i, layer in enumerate(self.net.layers):
            path, width = f"transformer.layers.{i}", len(layer.self_attn.heads) * self.config.head_dim
            found.append(Site(f"residual.{i}", path, self.config.dim, self.hop, FRAME_RATE, self.context))
            if width:
                found.append(
                    Site(f"heads.{i}", f"{path}.self_attn.out_proj", width, self.hop, FRAME_RATE, self.context)
                )
        return {site.name: site for site in found}

    def frames(self, samples: int, site: str) -> int:
        self.site(site)
        return math.ceil(samples / self.hop)

    def codes(self, wav: np.ndarray) -> Tensor:
        """The codec's first 8 codes [8, frames] of a waveform [samples], zero-padded to whole frames."""
        latents = self.codec.encode(wav, "encoder_transformer")
        return torch.from_numpy(self.codec.tokens(latents, "encoder_transformer", self.config.codebooks)).long()

    def grid(self, wav: np.ndarray) -> Tensor:
        """Codes [1, 17, frames] of a clip that is heard (or spoken, see the class), on the model's device."""
        heard, config = self.codes(wav), self.config
        grid = torch.full((1, config.streams, heard.shape[1]), config.pad)
        grid[0, config.agent] = heard if self.stream == "agent" else torch.tensor(config.silence)[:, None]
        grid[0, config.user] = heard if self.stream == "user" else torch.tensor(config.sine)[:, None]
        return grid.to(self.device)

    def turn(self, codes: Tensor, stream: str, text: Tensor | None = None) -> Tensor:
        """Codes [1, 17, frames] of a dialogue in which `stream` (user or agent) says `codes` [8, frames] to a silent
        other; text [frames]: the agent's monologue, by default none. On the model's device."""
        config = self.config
        grid = torch.full((1, config.streams, codes.shape[1]), config.pad)
        grid[0, config.agent.start :] = torch.tensor(2 * config.silence)[:, None]
        grid[0, config.agent if stream == "agent" else config.user] = codes.cpu()
        if text is not None:
            grid[0, 0] = text.cpu()
        return grid.to(self.device)

    def encode_sites(self, wav: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Activations [frames, width] at several sites in one pass; layers above the last one do not run."""
        return self.activations(self.grid(wav), sites)

    def activations(self, grid: Tensor, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """As `encode_sites`, of codes [1, 17, frames] of a dialogue."""
        places = {name: self.site(name) for name in sites}
        seen: dict[str, Tensor] = {}
        hooks = []
        try:
            for name, place in places.items():
                module = self.net.get_submodule(place.path)
                if not name.startswith("residual"):
                    hooks.append(
                        module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.update({name: inputs[0]}))
                    )
                else:
                    hooks.append(
                        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
                    )
            with inference():
                columns = self.net.columns(grid)
                last = max(int(name.partition(".")[2] or 0) for name in places)
                self.net.temporal(self.net.embed(columns), layers=last + 1)
        finally:
            for hook in hooks:
                hook.remove()
        # column 0 has heard nothing
        return {name: seen[name][0, 1:].float().cpu().numpy() for name in places}

    @contextmanager
    def editing(self, site: str, edit: "SiteEdit") -> Iterator[None]:
        """As the protocol says; what the edit gets, see `interventions.editing`."""
        self.site(site)
        with interventions.editing(self.net, site, edit):
            yield

    def tokeniser(self) -> "SentencePieceProcessor":
        """The checkpoint's sentencepiece model. Raises EqknobsError if there is none, or a broken one."""
        if self.files.tokenizer is None:
            raise EqknobsError(
                f"models.{self.name}.path: {self.files.weights.parent} has no tokenizer_*.model; put it there"
            )
        import sentencepiece

        with one_line(f"models.{self.name}.path: cannot read {self.files.tokenizer}; fetch it again"):
            return sentencepiece.SentencePieceProcessor(model_file=str(self.files.tokenizer))

    def prompt(self, text: str | None = None, voice: str | Path | np.ndarray | Tensor | None = None) -> Prompt:
        """PersonaPlex's prompt; voice: a `.pt` file, a waveform [samples], which is brought to -24 LUFS, or its codes.

        Neither: no prompt at all.
        """
        if text is None and voice is None:
            return Prompt()
        tokens = self.tokeniser().encode(system_text(text)) if text else None
        if isinstance(voice, np.ndarray):
            voice = self.codes(normalised(voice, self.sample_rate))
        if isinstance(voice, Tensor):
            return persona_prompt(tokens, self.config, voice_codes=voice)
        stored = None if voice is None else load_voice(voice, self.config)
        return persona_prompt(tokens, self.config, voice=stored)

    def converse(self, wav: np.ndarray, prompt: Prompt | None = None, sampling: Sampling = GREEDY) -> Reply:
        """The agent's reply to a user's waveform [samples], frame by frame as long as that."""
        with inference():
            return generate(self.net, self.codes(wav)[None], prompt, sampling)

    def speech(self, codes: Tensor, samples: int) -> np.ndarray:
        """Waveform [samples] of codes [8, frames]."""
        with inference():
            return self.codec.sound(self.codec.net.quantizer.decode(codes[None].to(self.device)), samples)

    def piece(self, tokeniser: "SentencePieceProcessor", token: int) -> str:
        """What a text token spells; nothing for padding and tokens that stand for no text."""
        if token in (self.config.pad, self.config.epad) or not 0 <= token < len(tokeniser):
            return ""
        return tokeniser.id_to_piece(token).replace("▁", " ")

    def monologue(self, text: Tensor) -> str:
        """What text tokens [frames] spell."""
        tokeniser = self.tokeniser()
        return "".join(self.piece(tokeniser, token) for token in text.tolist()).strip()
