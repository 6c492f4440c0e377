"""Full-duplex generation: the user's codes in, the agent's text and codes out, frame by frame.

The state is a grid of columns (see `network`): column 0 initial, then the prompt, then the dialogue. A token of -2 is
yet to be predicted. User frame i of the dialogue enters column p + i (its delayed codes one later), p being the first
column after the prompt; the agent's frame i is read from the same columns.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.config import AGENT, DEP_Q, FRAME_RATE, SILENCE_TOKENS, SINE_TOKENS, STREAMS, USER
from eqknobs.models.moshi.network import KVCache, MoshiNet

UNKNOWN = -2
PAUSE = int(0.5 * FRAME_RATE)  # frames of silence after the voice and after the text prompt


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are moshi's. Temperature 0 takes the likeliest.

    Row b of a batch draws from its own generator, seeded seed + b: what it says does not depend on the other rows.
    """

    temperature: float = 0.8
    top_k: int = 250
    text_temperature: float = 0.7
    text_top_k: int = 25
    seed: int = 0


GREEDY = Sampling(temperature=0.0, text_temperature=0.0)


class Sampler:
    """Draws tokens from logits [B, n] as moshi's utils/sampling.py does: softmax, the k likeliest, exponential race."""

    def __init__(self, sampling: Sampling, batch: int, device: torch.device):
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(batch)]

    def text(self, logits: Tensor) -> Tensor:
        """Text tokens [B] from logits [B, text_card]."""
        return self._draw(logits, self.sampling.text_temperature, self.sampling.text_top_k)

    def audio(self, logits: Tensor) -> Tensor:
        """Codes [B] of one codebook from logits [B, 2048]."""
        return self._draw(logits, self.sampling.temperature, self.sampling.top_k)

    def _draw(self, logits: Tensor, temperature: float, top_k: int) -> Tensor:
        if temperature <= 0:
            return logits.float().argmax(-1)
        chances = torch.softmax(logits.float() / temperature, dim=-1)
        chances, tokens = torch.topk(chances, min(top_k, chances.shape[-1]) if top_k > 0 else chances.shape[-1])
        race = torch.empty_like(chances)
        for row, generator in zip(race, self.generators):
            row.exponential_(1, generator=generator)
        return tokens.gather(-1, (chances / race).argmax(-1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class Voice:
    """PersonaPlex's voice prompt: columns 0 … n - 1 as embeddings, and the ring of tokens that followed.

    embeddings [n, dim]; ring [17, 4]: column c of the grid is in place c mod 4.
    """

    embeddings: Tensor
    ring: Tensor


def load_voice(path: str | Path, dim: int) -> Voice:
    """Read a `.pt` voice of PersonaPlex: `{"embeddings": [n, 1, 1, dim], "cache": [1, 17, 4]}`.

    Only tensors are unpickled. Raises EqknobsError for anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        embeddings, ring = state["embeddings"], state["cache"]
        if embeddings.shape[1:] != (1, 1, dim) or len(embeddings) < 2 or ring.shape != (1, STREAMS, 4):
            raise ValueError(f"embeddings {list(embeddings.shape)}, cache {list(ring.shape)}")
    except Exception as error:  # OSError, UnpicklingError, KeyError, RuntimeError, …
        reason = next(iter(str(error).strip().splitlines()), "")
        raise EqknobsError(
            f"{path}: not a voice of this model, which is a .pt file with embeddings [n, 1, 1, {dim}] and cache "
            f"[1, {STREAMS}, 4] ({type(error).__name__}: {reason[:200]})"
        ) from error
    return Voice(embeddings[:, 0, 0], ring[0].long())


@dataclass(frozen=True)
class Prompt:
    """What the model is given before the dialogue: a voice or nothing, then frames [17, P] of undelayed codes."""

    frames: Tensor = field(default_factory=lambda: torch.empty(STREAMS, 0, dtype=torch.long))
    voice: Voice | None = None


def persona_prompt(
    text_tokens: list[int] | None, pad: int, voice: Voice | None = None, voice_codes: Tensor | None = None
) -> Prompt:
    """PersonaPlex's prompt: voice, half a second of silence, text with one token a frame, half a second of silence.

    text_tokens: of `<system> … <system>`; pad: the text token of no text; voice: a `.pt` voice, or voice_codes [8, n]:
    Mimi's codes of a recording of it. Meanwhile the agent is silent (but for the voice) and the user's stream holds a
    sine (NVIDIA/personaplex, models/lm.py, LMGen.step_system_prompts).

    Without a `.pt` voice the very first frame is left out, as NVIDIA's first step after a reset does.
    Raises EqknobsError if both voices are given.
    """
    if voice is not None and voice_codes is not None:
        raise EqknobsError("prompt: give a .pt voice or a recording, not both")
    codes = torch.empty(DEP_Q, 0, dtype=torch.long) if voice_codes is None else voice_codes.long().cpu()
    texts = [pad] * (codes.shape[1] + PAUSE) + list(text_tokens or []) + [pad] * PAUSE
    frames = torch.empty(STREAMS, len(texts), dtype=torch.long)
    frames[0] = torch.tensor(texts)
    frames[AGENT] = torch.tensor(SILENCE_TOKENS)[:, None]
    frames[AGENT, : codes.shape[1]] = codes
    frames[USER] = torch.tensor(SINE_TOKENS)[:, None]
    return Prompt(frames if voice is not None else frames[:, 1:], voice)


def system_text(text: str) -> str:
    """A role description with the marks that PersonaPlex expects around it."""
    text = text.strip()
    return text if text.startswith("<system>") and text.endswith("<system>") else f"<system> {text} <system>"


class Reply(NamedTuple):
    """What the agent did in T frames."""

    text: Tensor  # [B, T]
    codes: Tensor  # [B, 8, T]


class Dialogue:
    """A conversation of up to `frames` frames with `batch` users, all after the same prompt.

    Feeding the prompt is part of making the object; then `step` takes one frame after another. The KV cache holds the
    conversation or the model's context, whichever is shorter.
    """

    @torch.inference_mode()
    def __init__(
        self,
        net: MoshiNet,
        frames: int,
        batch: int = 1,
        prompt: Prompt | None = None,
        sampling: Sampling = GREEDY,
    ):
        prompt = prompt or Prompt()
        self.net, self.sampler = net, Sampler(sampling, batch, net.device)
        self.grid, start = _grid(net, frames, batch, prompt)
        self.place = start + prompt.frames.shape[1]  # the column that is predicted next
        self.last = self.place + frames
        self.cache = KVCache(net, batch, self.last)
        if prompt.voice is not None:
            given = prompt.voice.embeddings.to(net.device, net.dtype)
            hidden = net.temporal(given.expand(batch, -1, -1), self.cache)
        if self.cache.length < self.place:
            hidden = net.temporal(net.embed(self.grid[:, :, self.cache.length : self.place]), self.cache)
        self._predict(hidden[:, -1], net.text_linear(hidden[:, -1]))

    def _predict(self, hidden: Tensor, logits: Tensor) -> None:
        """Fill in what is unknown of the next column."""
        target = self.grid[:, :, self.place]
        text = torch.where(target[:, 0] == UNKNOWN, self.sampler.text(logits), target[:, 0])
        codes = self.net.audio_step(hidden, text, target[:, AGENT], self.sampler.audio)
        target[:, 0], target[:, AGENT] = text, codes
        self.place += 1

    @torch.inference_mode()
    def step(self, user: Tensor) -> Reply:
        """Hear one frame [B, 8] and answer it: the agent's text [B, 1] and codes [B, 8, 1] of the same frame.

        Raises EqknobsError beyond `frames`.
        """
        if self.place > self.last:
            raise EqknobsError("the dialogue has no frame left; make it with more frames")
        column, delays = self.place - 1, self.net.config.delays
        for stream, delay in enumerate(delays[USER], start=USER.start):
            self.grid[:, stream, column + delay] = user[:, stream - USER.start]
        self._predict(*self.net.step(self.grid[:, :, column], self.cache))
        codes = [self.grid[:, stream, column + delays[stream]] for stream in range(AGENT.start, AGENT.stop)]
        return Reply(self.grid[:, :1, column], torch.stack(codes, dim=1)[..., None])


def _grid(net: MoshiNet, frames: int, batch: int, prompt: Prompt) -> tuple[Tensor, int]:
    """What is known of a dialogue's columns [B, 17, …], and the column where the prompt's frames begin."""
    voice, codes = prompt.voice, prompt.frames.to(net.device)
    start = 1 if voice is None else len(voice.embeddings) + 1
    grid = torch.full((batch, STREAMS, start + codes.shape[1] + frames + 2), UNKNOWN, device=net.device)
    grid[:, :, 0] = net.initial()
    for stream, delay in enumerate(net.config.delays):
        if voice is None:
            grid[:, stream, : 1 + delay] = net.initial()[stream]
        else:  # the last two columns that the voice's own frames reach
            for column in range(start - 1, start + delay):
                grid[:, stream, column] = voice.ring[stream, column % 4].to(net.device)
        grid[:, stream, start + delay : start + delay + codes.shape[1]] = codes[stream]
    return grid, start


def generate(net: MoshiNet, user: Tensor, prompt: Prompt | None = None, sampling: Sampling = GREEDY) -> Reply:
    """Let the agent converse with users whose codes [B, 8, T] are given. Raises EqknobsError for another shape."""
    if user.ndim != 3 or user.shape[1] != DEP_Q or not user.shape[2]:
        raise EqknobsError(f"the user's codes must be [batch, {DEP_Q}, frames], got {list(user.shape)}")
    batch, _, frames = user.shape
    dialogue = Dialogue(net, frames, batch, prompt, sampling)
    replies = [dialogue.step(frame) for frame in user.to(net.device).unbind(-1)]
    return Reply(torch.cat([r.text for r in replies], -1), torch.cat([r.codes for r in replies], -1))
