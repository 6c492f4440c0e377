"""Full-duplex generation: the user's codes in, the agent's text and codes out, frame by frame.

The state is a grid of columns (see `network`): column 0 initial, then the prompt, then the dialogue. A token of -2 is
yet to be predicted. User frame i of the dialogue enters column p + i (its delayed codes one later), p being the first
column after the prompt; the agent's frame i is read from the same columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.config import FRAME_RATE, MoshiConfig
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
        """Codes [B] of one codebook from logits [B, card]."""
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


def load_voice(path: str | Path, config: MoshiConfig) -> Voice:
    """Read a `.pt` voice of PersonaPlex: `{"embeddings": [n, 1, 1, dim], "cache": [1, streams, 4]}`.

    Only tensors are unpickled. Raises EqknobsError for anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        embeddings, ring, dim, streams = state["embeddings"], state["cache"], config.dim, config.streams
        if embeddings.shape[1:] != (1, 1, dim) or len(embeddings) < 2 or ring.shape != (1, streams, 4):
            raise ValueError(f"embeddings {list(embeddings.shape)}, cache {list(ring.shape)}")
    except Exception as error:  # OSError, UnpicklingError, KeyError, RuntimeError, …
        reason = next(iter(str(error).strip().splitlines()), "")
        raise EqknobsError(
            f"{path}: not a voice of this model, which is a .pt file with embeddings [n, 1, 1, {config.dim}] and cache "
            f"[1, {config.streams}, 4] ({type(error).__name__}: {reason[:200]})"
        ) from error
    return Voice(embeddings[:, 0, 0], ring[0].long())


@dataclass(frozen=True)
class Prompt:
    """What the model is given before the dialogue: a voice or None, then frames [17, P] of undelayed codes or None."""

    frames: Tensor | None = None
    voice: Voice | None = None

    @property
    def columns(self) -> int:
        """Columns in front of the dialogue, the initial one included."""
        return (
            1
            + (0 if self.voice is None else len(self.voice.embeddings))
            + (0 if self.frames is None else self.frames.shape[1])
        )


def persona_prompt(
    text_tokens: list[int] | None, config: MoshiConfig, voice: Voice | None = None, voice_codes: Tensor | None = None
) -> Prompt:
    """PersonaPlex's prompt: voice, half a second of silence, text with one token a frame, half a second of silence.

    text_tokens: of `<system> … <system>`; voice: a `.pt` voice, or voice_codes [8, n]:
    Mimi's codes of a recording of it. Meanwhile the agent is silent (but for the voice) and the user's stream holds a
    sine (NVIDIA/personaplex, models/lm.py, LMGen.step_system_prompts).

    Without a `.pt` voice the very first frame is left out, as NVIDIA's first step after a reset does.
    Raises EqknobsError if both voices are given.
    """
    if voice is not None and voice_codes is not None:
        raise EqknobsError("prompt: give a .pt voice or a recording, not both")
    pad, spoken = config.pad, 0 if voice_codes is None else voice_codes.shape[1]
    texts = [pad] * (spoken + PAUSE) + list(text_tokens or []) + [pad] * PAUSE
    frames = torch.empty(config.streams, len(texts), dtype=torch.long)
    frames[0] = torch.tensor(texts)
    frames[config.agent] = torch.tensor(config.silence)[:, None]
    if voice_codes is not None:
        frames[config.agent, :spoken] = voice_codes.long().cpu()
    frames[config.user] = torch.tensor(config.sine)[:, None]
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
    """A conversation of up to `frames` frames with `batch` users, all after the same prompt or each after its own.

    Feeding the prompts is part of making the object; then `step` takes one frame after another. Prompts end together:
    a row with a shorter one begins later and sees nothing of the columns before, so that it says what it would say
    alone. The KV cache holds the conversation or the model's context, whichever is shorter. `text` [B, frames]: a
    monologue that the agent is made to have; `codes` [B, 8, frames]: codes that it is made to say, -1 reading as
    nothing, -2 where it is free.
    """

    @torch.inference_mode()
    def __init__(
        self,
        net: MoshiNet,
        frames: int,
        batch: int = 1,
        prompt: Prompt | Sequence[Prompt] | None = None,
        sampling: Sampling = GREEDY,
        text: Tensor | None = None,
        codes: Tensor | None = None,
    ):
        prompts = [prompt or Prompt()] * batch if prompt is None or isinstance(prompt, Prompt) else list(prompt)
        if len(prompts) != batch:
            raise EqknobsError(f"prompts: one, or one for each of {batch} rows; got {len(prompts)}")
        self.net, self.sampler = net, Sampler(sampling, batch, net.device)
        lengths = [prompt.columns for prompt in prompts]
        self.place = max(lengths)  # the column that is predicted next
        self.last = self.place + frames
        first = torch.tensor([self.place - length for length in lengths], device=net.device)
        self.cache = KVCache(net, batch, self.last, first if first.any() else None)
        shape = (batch, net.config.streams, self.last + 2)
        self.grid = torch.full(shape, UNKNOWN, device=net.device)
        for row, prompt in enumerate(prompts):
            write_prompt(self.grid[row, :, first[row] :], net, prompt)
        if text is not None:
            self.grid[:, 0, self.place : self.last] = text
        if codes is not None:
            for stream, delay in enumerate(net.config.delays[net.config.agent]):
                place = self.place + delay
                self.grid[:, net.config.agent.start + stream, place : place + frames] = codes[:, stream]
        x = net.embed(self.grid[:, :, : self.place])
        for row, prompt in enumerate(prompts):
            if prompt.voice is not None:
                given = prompt.voice.embeddings
                x[row, first[row] : first[row] + len(given)] = given.to(net.device, net.dtype)
        hidden = net.temporal(x, self.cache)
        self._predict(hidden[:, -1], net.text_linear(hidden[:, -1]))

    def _predict(self, hidden: Tensor, logits: Tensor) -> None:
        """Fill in what is unknown of the next column."""
        target, agent = self.grid[:, :, self.place], self.net.config.agent
        text = torch.where(target[:, 0] == UNKNOWN, self.sampler.text(logits), target[:, 0])
        codes = self.net.audio_step(hidden, text, target[:, agent], self.sampler.audio)
        target[:, 0], target[:, agent] = text, codes
        self.place += 1

    @torch.inference_mode()
    def step(self, user: Tensor) -> Reply:
        """Hear one frame [B, 8] and answer it: the agent's text [B, 1] and codes [B, 8, 1] of the same frame.

        Raises EqknobsError beyond `frames`.
        """
        if self.place > self.last:
            raise EqknobsError("the dialogue has no frame left; make it with more frames")
        column, delays = self.place - 1, self.net.config.delays
        heard, spoken = self.net.config.user, self.net.config.agent
        for stream, delay in enumerate(delays[heard], start=heard.start):
            self.grid[:, stream, column + delay] = user[:, stream - heard.start]
        self._predict(*self.net.step(self.grid[:, :, column], self.cache))
        codes = [self.grid[:, stream, column + delays[stream]] for stream in range(spoken.start, spoken.stop)]
        return Reply(self.grid[:, :1, column], torch.stack(codes, dim=1)[..., None])


def write_prompt(grid: Tensor, net: MoshiNet, prompt: Prompt) -> None:
    """Write what is known of a row's columns [streams, …] from its own first one on."""
    start = 1 if prompt.voice is None else len(prompt.voice.embeddings) + 1
    grid[:, 0] = net.initial()
    for stream, delay in enumerate(net.config.delays):
        if prompt.voice is None:
            grid[stream, : 1 + delay] = net.initial()[stream]
        else:  # the last two columns that the voice's own frames reach
            for column in range(start - 1, start + delay):
                grid[stream, column] = prompt.voice.ring[stream, column % 4].to(net.device)
        if prompt.frames is not None:
            frames = prompt.frames[stream].to(net.device)
            grid[stream, start + delay : start + delay + len(frames)] = frames


def generate(
    net: MoshiNet,
    user: Tensor,
    prompt: Prompt | Sequence[Prompt] | None = None,
    sampling: Sampling = GREEDY,
    text: Tensor | None = None,
    codes: Tensor | None = None,
) -> Reply:
    """Let the agent converse with users whose codes [B, 8, T] are given, after one prompt or one each.

    text [B, T]: its monologue, if it is not to choose it; codes [B, 8, T]: see `Dialogue`. Raises EqknobsError for
    another shape, or another number of prompts.
    """
    if user.ndim != 3 or user.shape[1] != net.config.codebooks or not user.shape[2]:
        raise EqknobsError(f"the user's codes must be [batch, {net.config.codebooks}, frames], got {list(user.shape)}")
    batch, _, frames = user.shape
    dialogue = Dialogue(net, frames, batch, prompt, sampling, text, codes)
    replies = [dialogue.step(frame) for frame in user.to(net.device).unbind(-1)]
    return Reply(torch.cat([r.text for r in replies], -1), torch.cat([r.codes for r in replies], -1))
