"""The agent's monologue: which text token stands in which frame, given when words are spoken."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eqknobs.models.moshi.config import MoshiConfig


def monologue(words: Sequence[Sequence[int]], starts: Sequence[int], frames: int, config: MoshiConfig) -> Tensor:
    """Text tokens [frames]: those of word i from frame starts[i] on, or as soon as there is room; PAD elsewhere.

    Before a word stands EPAD where there is room (Défossez et al. 2024, section 3.4.4). What does not fit is left out.
    """
    out, at = torch.full((frames,), config.pad), -1
    for tokens, start in zip(words, starts, strict=True):
        at = max(at + 1, start)
        if at >= frames:
            break
        said = torch.tensor(tokens[: frames - at], dtype=out.dtype)
        out[at : at + len(said)] = said
        if at and out[at - 1] == config.pad:
            out[at - 1] = config.epad
        at += len(said) - 1
    return out
