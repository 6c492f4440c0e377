"""How likely a network finds what was said: nats of text and codes, teacher-forced, after prompts of unlike lengths."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eqknobs.models.moshi.generate import UNKNOWN, Prompt, write_prompt
from eqknobs.models.moshi.network import KVCache, MoshiNet


class Said(NamedTuple):
    """What an agent said after a prompt: T frames, undelayed, of its text, its codes and the user's."""

    prompt: Prompt
    user: Tensor  # [8, T]
    text: Tensor  # [T]
    codes: Tensor  # [8, T]


class Nats(NamedTuple):
    """−log p of every token; NaN beyond a row's end and where a code was not said (-1)."""

    text: Tensor  # [B, T]
    audio: Tensor  # [B, 8, T]; [B, 0, T] without the depformer
    columns: Tensor  # [B, S]: which columns that the network read belong to a row's dialogue


def nats(net: MoshiNet, said: Sequence[Said], depformer: bool = True) -> Nats:
    """What each row costs the network; rows are padded in front of their prompts and behind their ends.

    The last frame of a delayed stream is never predicted. Gradients flow, where they are on.
    """
    config, device = net.config, net.device
    frames = [len(row.text) for row in said]
    lengths = [row.prompt.columns for row in said]
    place, longest = max(lengths), max(frames)
    first = torch.tensor([place - length for length in lengths], device=device)
    grid = torch.full((len(said), config.streams, place + longest + 1), UNKNOWN, device=device)
    for row, one in enumerate(said):
        write_prompt(grid[row, :, place - lengths[row] :], net, one.prompt)
        spoken = torch.cat([one.text[None], one.codes, one.user]).to(device)
        for stream, delay in enumerate(config.delays):
            grid[row, stream, place + delay : place + delay + frames[row]] = spoken[stream]
    read, targets = grid[:, :, : place + longest - 1], grid[:, :, place : place + longest]
    x = net.embed(read)
    for row, one in enumerate(said):
        if one.prompt.voice is not None:
            begin, given = place - lengths[row], one.prompt.voice.embeddings
            x[row, begin : begin + len(given)] = given.to(device, net.dtype)
    cache = KVCache(net, len(said), x.shape[1], first) if first.any() else None
    hidden = net.temporal(x, cache)[:, place - 1 :]
    ends = torch.tensor(frames, device=device)[:, None]
    audio: list[Tensor] = []
    costs = hidden.new_empty(len(said), 0, longest)
    if depformer:
        costs = _costs(net.audio_logits(hidden, targets), targets[:, config.agent][:, : net.steps])
    for cost, delay in zip(costs.unbind(1), config.delays[config.agent]):  # back to the frames that they are of
        shifted = torch.cat([cost[:, delay:], cost.new_full((len(said), delay), torch.nan)], 1)
        audio.append(shifted.masked_fill(torch.arange(longest, device=device) >= ends - delay, torch.nan))
    within = torch.arange(longest, device=device) < ends
    text = _costs(net.text_linear(hidden)[:, None], targets[:, :1])[:, 0].masked_fill(~within, torch.nan)
    ahead = within.new_zeros(len(said), place - 1)
    return Nats(text, torch.stack(audio, 1) if audio else costs, torch.cat([ahead, within], 1))


def _costs(logits: Tensor, wanted: Tensor) -> Tensor:
    """−log p [B, K, S] of tokens [B, K, S] under logits [B, K, S, n]; NaN for tokens that are none."""
    known = (wanted >= 0) & (wanted < logits.shape[-1])
    costs = cross_entropy(
        logits.float().flatten(0, 2), wanted.clamp(0, logits.shape[-1] - 1).flatten(), reduction="none"
    )
    return costs.view(wanted.shape).masked_fill(~known, torch.nan)


def losses(found: Nats) -> Tensor:
    """Nats a frame [B]: of the text, and the mean of those of the codebooks."""
    return found.text.nanmean(1) + found.audio.nanmean(2).nanmean(1)


@contextmanager
def _at_heads(net: MoshiNet, hook: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, `hook(layer, acts)` stands in for what goes into the output projections [B, S, width]."""
    handles = []
    for number, layer in enumerate(net.layers):
        projection = layer.self_attn.out_proj
        if projection is not None:
            handles.append(
                projection.register_forward_pre_hook(lambda _m, inputs, number=number: (hook(number, inputs[0]),))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def head_means(net: MoshiNet, batches: Sequence[Sequence[Said]]) -> list[Tensor]:
    """What each head of a whole network gives on average over the dialogues' columns: [heads, head_dim] a layer."""
    config = net.config
    shape = (config.heads, config.head_dim)
    total, count = [torch.zeros(shape, dtype=torch.float64) for _ in net.layers], 0
    for said in batches:
        seen: dict[int, Tensor] = {}

        def keep(layer: int, acts: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[layer] = acts
            return acts

        with _at_heads(net, keep):
            columns = nats(net, said).columns
        for layer, acts in seen.items():
            total[layer] += acts[columns].double().sum(0).view(shape).cpu()
        count += int(columns.sum())
    return [(sums / count).float() for sums in total]


def head_gradients(net: MoshiNet, batches: Sequence[Sequence[Said]]) -> Tensor:
    """E|∂L/∂ξ_h| [layers, heads] of a whole network: ξ multiplies a head's output (Michel et al. 2019, arXiv
    1905.10650), L is the loss of a dialogue, and the mean is over dialogues. No weight needs a gradient."""
    config, total, count = net.config, torch.zeros(net.config.layers, net.config.heads, dtype=torch.float64), 0
    for said in batches:
        masks = torch.ones(config.layers, len(said), 1, config.heads, 1, device=net.device, dtype=net.dtype)
        masks.requires_grad_()

        def masked(layer: int, acts: Tensor, masks: Tensor = masks) -> Tensor:
            return (acts.unflatten(-1, (config.heads, -1)) * masks[layer]).flatten(-2)

        with torch.enable_grad(), _at_heads(net, masked):
            (found,) = torch.autograd.grad(losses(nats(net, said)).sum(), masks)
        total += found[:, :, 0, :, 0].abs().double().sum(1).cpu()
        count += len(said)
    return total / count
