"""The moshi package as oracle, and PersonaPlex's step loop, which that package lacks, written down on top of it."""

import json
import os
from pathlib import Path

os.environ["NO_TORCH_COMPILE"] = os.environ["NO_CUDA_GRAPH"] = "1"  # read when moshi is imported

import torch
from moshi.models import LMGen, LMModel, loaders
from moshi.utils.sampling import sample_token
from torch import Tensor

from eqknobs.models.moshi.config import raw_config
from helpers import moshi_cases as cases
from helpers.moshi_world import PERSONA

NOT_SIZES = ("moshi_name", "tokenizer_name", "model_type")


def oracle(folder: Path) -> LMModel:
    """The package's own model from a checkpoint folder, float32; PersonaPlex's sizes are filled in."""
    raw = json.loads((folder / "config.json").read_text())
    sizes = raw if "dim" in raw else raw_config(PERSONA) | {"dep_q": 16}
    sizes = {key: value for key, value in sizes.items() if key not in NOT_SIZES}
    return loaders.get_moshi_lm(folder / "model.safetensors", lm_kwargs=sizes, dtype=torch.float32)


@torch.no_grad()
def reply(lm: LMModel, user: Tensor, **sampling) -> tuple[Tensor, Tensor]:
    """The package's text [B, T] and codes [B, 8, T] for the user's [B, 8, T]. It never sees the first frame it is
    given, so that one is a dummy."""
    generator = LMGen(lm, **({"use_sampling": False} | sampling), check=True)
    with generator.streaming(len(user)):
        assert generator.step(user[:, :, :1]) is None
        out = torch.cat([generator.step(frame[..., None]) for frame in user.unbind(-1)], dim=-1)
    return out[:, 0], out[:, 1:]


class PersonaLoop:
    """NVIDIA/personaplex, models/lm.py, LMGen: a ring of four columns, tokens given or drawn, all 16 depformer steps.

    At offset o a step writes what it is given to place o (+ the stream's delay), reads column o - 1, predicts what
    column o lacks, and returns the frame that is complete. At offset 0 it only resets column 0.
    """

    def __init__(self, lm: LMModel, batch: int = 1):
        self.lm, self.offset = lm, 0
        self.ring = torch.full((batch, 17, 4), -2)
        self.given = torch.zeros(batch, 17, 4, dtype=torch.bool)
        self.initial = torch.tensor([lm.text_card] + [lm.card] * 16)
        self.embeddings: list[Tensor] = []

    @torch.no_grad()
    def step(
        self, user: Tensor, agent: Tensor | None = None, text: int | None = None, embedding: Tensor | None = None
    ) -> Tensor | None:
        """user, agent [B, 8]; text: one token; embedding [1, 1, dim] stands in for column o - 1. Returns [B, 9]."""
        lm, ring, given, now = self.lm, self.ring, self.given, self.offset % 4
        for first, codes in ((9, user), (1, agent)):
            for k in range(first, first + 8) if codes is not None else ():
                place = (self.offset + lm.delays[k]) % 4
                ring[:, k, place], given[:, k, place] = codes[:, k - first], True
        if text is not None:
            ring[:, 0, now], given[:, 0, now] = text, True
        for k in range(17):
            if self.offset <= lm.delays[k]:
                ring[:, k, now], given[:, k, now] = self.initial[k], True
        if self.offset == 0:
            self.offset = 1
            return None
        before = (self.offset - 1) % 4
        if embedding is None:
            column = ring[:, :, before : before + 1]
            assert (column >= 0).all()
            hidden = sum(lm.emb[i](column[:, i + 1]) for i in range(16)) + lm.text_emb(column[:, 0])
            self.embeddings.append(hidden)
        else:
            hidden = embedding
        hidden = lm.out_norm(lm.transformer(hidden))
        drawn = sample_token(lm.text_linear(hidden), False)[:, 0]
        token = torch.where(given[:, 0, now], ring[:, 0, now], drawn)
        ring[:, 0, now] = token
        with lm.depformer.streaming(len(ring)):
            for k in range(16):
                drawn = sample_token(lm.forward_depformer(k, token[:, None, None], hidden), False)[:, 0, 0]
                token = torch.where(given[:, k + 1, now], ring[:, k + 1, now], drawn)
                ring[:, k + 1, now] = token
        given[:, :, before] = False
        self.offset += 1
        if self.offset <= 2:
            return None
        frame = [ring[:, k, (self.offset - 2 + lm.delays[k]) % 4] for k in range(9)]
        return torch.stack(frame, dim=1)

    def embedded(self, embedding: Tensor) -> None:
        """One column of a stored voice; what the ring holds meanwhile is overwritten afterwards."""
        dummy = torch.full((len(self.ring), 8), self.lm.card)
        if self.offset == 0:
            self.step(dummy, dummy, 3)
        self.step(dummy, dummy, 3, embedding)


def persona_reply(lm: LMModel, voice: Tensor | None, stored: bool = False, path: Path | None = None) -> Tensor:
    """[2, 9, T]: text and codes after a prompt; a voice recorded, or stored and played back (and saved to `path`)."""
    record = None
    if stored:
        record = PersonaLoop(lm)
        with lm.streaming(1):
            for frame in voice.T:
                record.step(cases.SINE, frame[None], cases.PAD)
    if record is not None and path is not None:
        torch.save({"embeddings": torch.stack(record.embeddings), "cache": record.ring}, path)
    batch = len(cases.PERSONA_USER)
    loop = PersonaLoop(lm, batch)
    silence, sine = cases.SILENCE.expand(batch, -1), cases.SINE.expand(batch, -1)
    with lm.streaming(batch):
        if stored:
            for embedding in record.embeddings:
                loop.embedded(embedding.expand(batch, -1, -1))
            loop.ring[:] = record.ring
        elif voice is not None:
            for frame in voice.T:
                loop.step(sine, frame.expand(batch, -1), cases.PAD)
        for text in [cases.PAD] * cases.PAUSE + cases.PROMPT_TOKENS + [cases.PAD] * cases.PAUSE:
            loop.step(sine, silence, text)
        # A step answers with the frame before: the one that the first user's frame completes is the prompt's last.
        frames = [loop.step(frame) for frame in cases.PERSONA_USER.unbind(-1)]
        frames.append(loop.step(sine))
    return torch.stack(frames[1:], dim=-1)
