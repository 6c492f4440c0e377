"""Answers of a speech LM, in batches with one prompt a row."""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from eqknobs.models.base import inference
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.generate import GREEDY, UNKNOWN, Sampling, generate
from eqknobs.models.moshi.likelihood import Said, nats
from eqknobs.speaking.prompts import Asked

TIMED = 25  # frames of an answer that is timed
REPEATS = 3


class Answer(NamedTuple):
    """What a model said: text tokens [T] and codes [codebooks, T]."""

    text: Tensor
    codes: Tensor


def speak(
    model: Moshi,
    asked: Sequence[Asked],
    sampling: Sampling = GREEDY,
    batch: int = 8,
    texts: Sequence[Tensor] | None = None,
    fixed: Sequence[int] | None = None,
) -> list[Answer]:
    """The model's answers, on the CPU. Answer i draws with seed `sampling.seed` + i: `batch`, how many are made at
    once, changes no answer but for rounding.

    texts: monologues [T] that it is made to have, PAD behind them; fixed: for each codebook a code that it is made to
    say in every frame (-1: nothing), -2 where it is free.
    """
    config, answers = model.config, []
    for first in range(0, len(asked), batch):
        rows = asked[first : first + batch]
        frames = max(row.user.shape[1] for row in rows)
        user = torch.tensor(config.silence)[None, :, None].repeat(len(rows), 1, frames)
        for i, row in enumerate(rows):
            user[i, :, : row.user.shape[1]] = row.user
        text = codes = None
        if texts is not None:
            own = texts[first : first + batch]
            text = torch.stack([pad(one, (0, frames - len(one)), value=config.pad) for one in own]).to(model.device)
        if fixed is not None:
            codes = torch.tensor(fixed, device=model.device)[None, :, None].repeat(len(rows), 1, frames)
        seeded = replace(sampling, seed=sampling.seed + first)
        with inference():
            reply = generate(model.net, user.to(model.device), [row.prompt for row in rows], seeded, text, codes)
        for i, row in enumerate(rows):
            length = row.user.shape[1]
            answers.append(Answer(reply.text[i, :length].cpu(), reply.codes[i, :, :length].cpu()))
    return answers


def as_said(asked: Sequence[Asked], answers: Sequence[Answer]) -> list[Said]:
    """Answers as something that was said after their prompts."""
    return [Said(row.prompt, row.user, one.text, one.codes) for row, one in zip(asked, answers, strict=True)]


def costs(model: Moshi, said: Sequence[Said], batch: int = 8) -> list[tuple[float, float]]:
    """What the model finds of each row (text, audio): nats a frame, of audio the mean over its codebooks."""
    found: list[tuple[float, float]] = []
    for first in range(0, len(said), batch):
        with inference():
            rows = nats(model.net, said[first : first + batch])
        text, audio = rows.text.nanmean(1), rows.audio.nanmean(2).nanmean(1)
        found += list(zip(text.tolist(), audio.tolist(), strict=True))
    return found


def text_costs(model: Moshi, said: Sequence[Said], batch: int = 8) -> list[float]:
    """Of those the text's alone, without the depformer's work."""
    found: list[float] = []
    for first in range(0, len(said), batch):
        with inference():
            found += nats(model.net, said[first : first + batch], depformer=False).text.nanmean(1).tolist()
    return found


def divergence(one: Answer, other: Answer) -> int:
    """The first frame in which two answers differ, in text or codes; their length where they do not."""
    length = min(len(one.text), len(other.text))
    same = (one.text[:length] == other.text[:length]) & (one.codes[:, :length] == other.codes[:, :length]).all(0)
    return length if bool(same.all()) else int((~same).nonzero()[0])


def free_codebooks(count: int, codebooks: int, filler: Sequence[int] | None = None) -> list[int]:
    """`speak`'s `fixed` where only the first `count` codes are free; the others are nothing, or a filler's."""
    return [UNKNOWN if k < count else (-1 if filler is None else filler[k]) for k in range(codebooks)]


def frame_seconds(model: Moshi, asked: Asked, fixed: Sequence[int] | None = None) -> float:
    """CPU seconds (on a GPU, wall seconds) of a frame of one answer: the median of some, after a first."""
    row, clock = (
        replace(asked, user=asked.user[:, :TIMED]),
        time.perf_counter if model.device == "cuda" else time.process_time,
    )
    found = []
    for _ in range(1 + REPEATS):
        if model.device == "cuda":
            torch.cuda.synchronize()
        begun = clock()
        speak(model, [row], batch=1, fixed=fixed)
        if model.device == "cuda":
            torch.cuda.synchronize()
        found.append((clock() - begun) / row.user.shape[1])
    return median(found[1:])
