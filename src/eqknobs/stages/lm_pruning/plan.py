"""Which heads, weights or layers go: orders of removal, and the conditions that are made of them."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypedDict

import pandas as pd
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.interventions import pruned, skipped_layers, zeroed_heads
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.models.moshi.quantise import weight_of

Head = tuple[int, int]  # layer and number
PROBED = ("acoustic_first", "acoustic_last", "random_layers")  # orders of heads that need the probes' accuracies
GUIDED = ("guided", "inverted")  # and of layers
DRAWN = ("random", "random_layers")
STEEPEST = 2.0  # how many times the mean share the most pruned layer loses


class HeadsCfg(TypedDict):
    """`lm_pruning.heads`."""

    orders: list[str]
    shares: list[float]
    seeds: int
    repairs: list[str]


class PartsCfg(TypedDict):
    """`lm_pruning.weights` and `lm_pruning.layers`."""

    orders: list[str]
    shares: list[float]
    seeds: int


@dataclass(frozen=True)
class Condition:
    """What is taken away: heads, or a share of each layer's weights, or layers; nothing from the intact model."""

    granularity: str = "intact"
    order: str = "none"
    share: float = 0.0
    repair: str = "none"
    seed: int = 0
    heads: tuple[Head, ...] = field(default=(), compare=False)
    weights: tuple[tuple[int, float], ...] = field(default=(), compare=False)
    layers: tuple[int, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return f"{self.granularity}:{self.order}:{self.share:g}:{self.repair}:{self.seed}"

    def row(self) -> dict[str, object]:
        """Its columns in tables."""
        gone = len(self.heads) or len(self.layers)
        columns = ("granularity", "order", "share", "repair", "seed")
        return {name: getattr(self, name) for name in columns} | {"removed": gone}

    def applied(self, net: MoshiNet, means: Sequence[Tensor]) -> AbstractContextManager[None]:
        """While the block runs, the network is pruned so. means: what heads give on average (`head_means`)."""
        if self.heads:
            return zeroed_heads(net, by_layer(self.heads), means if self.repair == "mean" else None)
        if self.weights:
            return pruned(net, dict(self.weights))
        return skipped_layers(net, self.layers) if self.layers else nullcontext()


INTACT = Condition()


def by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Heads as interventions take them."""
    found: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        found[layer].append(head)
    return dict(found)


def ranked(values: Tensor) -> list[Head]:
    """Heads by a value [layers, heads], smallest first; ties by layer and number."""
    heads = values.shape[1]
    return [divmod(i, heads) for i in values.flatten().sort(stable=True).indices.tolist()]


def accuracies(table: pd.DataFrame, property: str, layers: int, heads: int) -> Tensor:
    """Probe accuracies [layers, heads] of one property, from `scores/<model>.lm_heads.csv`.

    Raises EqknobsError where the table lacks a head.
    """
    rows = table[table["property"] == property]
    found = rows.groupby(["layer", "head"])["accuracy"].mean()
    wanted = [(layer, head) for layer in range(layers) for head in range(heads)]
    if missing := [place for place in wanted if place not in found.index]:
        raise EqknobsError(
            f"lm_pruning.property: no probe of {property} reads head {missing[0][1]} of layer {missing[0][0]}; known "
            f"are {', '.join(sorted(table['property'].unique()))} (lm_layers makes them)"
        )
    return torch.tensor([found.loc[place] for place in wanted], dtype=torch.float64).view(layers, heads)


@torch.no_grad()
def norms(net: MoshiNet) -> Tensor:
    """‖W_o,h‖ · ‖W_v,h‖ (Frobenius) of every head of a whole network [layers, heads]."""
    config, found = net.config, []
    for layer in net.layers:
        into = weight_of(layer.self_attn.in_proj).float().view(3, config.heads, config.head_dim, -1)[2]
        out = weight_of(layer.self_attn.out_proj).float().view(config.dim, config.heads, config.head_dim)
        found.append(into.flatten(1).norm(dim=1) * out.transpose(0, 1).flatten(1).norm(dim=1))
    return torch.stack(found).cpu()


def shuffled(places: Sequence[Head], seed: int) -> list[Head]:
    """Heads at random."""
    return random.Random(f"heads-{seed}").sample(sorted(places), len(places))


def within_layers(order: Sequence[Head], seed: int) -> list[Head]:
    """The order's layers in turn, but at random which head of a layer goes: at every share as many of each layer."""
    rng, left = random.Random(f"layers-{seed}"), by_layer(sorted(order))
    for heads in left.values():
        rng.shuffle(heads)
    return [(layer, left[layer].pop()) for layer, _ in order]


def head_orders(values: Mapping[str, Tensor], cfg: HeadsCfg) -> dict[tuple[str, int], list[Head]]:
    """(order, seed) -> all heads, the first to go first.

    values: `norm`, `gradient`, `damage` and, for the orders that need it, `accuracy`; [layers, heads] each.
    """
    found: dict[tuple[str, int], list[Head]] = {}
    every = ranked(next(iter(values.values())))
    for order in cfg["orders"]:
        if order in ("acoustic_first", "acoustic_last"):
            sign = -1 if order == "acoustic_first" else 1
            found[order, 0] = ranked(sign * values["accuracy"])
        elif order == "random":
            found |= {(order, seed): shuffled(every, seed) for seed in range(cfg["seeds"])}
        elif order == "random_layers":
            first = ranked(-values["accuracy"])
            found |= {(order, seed): within_layers(first, seed) for seed in range(cfg["seeds"])}
        else:
            found[order, 0] = ranked(values[order])
    return found


def layer_orders(damage: Tensor, cfg: PartsCfg) -> dict[tuple[str, int], list[int]]:
    """(order, seed) -> all layers, the first to go first. damage: of each layer alone [layers]."""
    layers = list(range(len(damage)))
    found: dict[tuple[str, int], list[int]] = {}
    for order in cfg["orders"]:
        if order == "random":
            drawn = {(order, i): random.Random(f"whole-{i}").sample(layers, len(layers)) for i in range(cfg["seeds"])}
            found |= drawn
        else:
            by = {"damage": damage.sort(stable=True).indices.tolist(), "first": layers, "last": layers[::-1]}
            found[order, 0] = by[order]
    return found


def layer_shares(order: str, seed: int, share: float, acoustic: Tensor | None, layers: int) -> list[float]:
    """What share of its weights each layer loses, `share` on average.

    `guided`: on a line over the layers' ranks by probe accuracy, from none of the least acoustic layer's to twice the
    mean of the most acoustic one's.
    """
    if order == "uniform":
        return [share] * layers
    if order == "random":
        ranks = random.Random(f"shares-{seed}").sample(range(layers), layers)
    else:
        assert acoustic is not None
        by = (acoustic if order == "guided" else -acoustic).sort(stable=True).indices.tolist()
        ranks = [by.index(layer) for layer in range(layers)]
    return [share * STEEPEST * rank / max(1, layers - 1) for rank in ranks]


def head_conditions(orders: Mapping[tuple[str, int], Sequence[Head]], cfg: HeadsCfg) -> Iterator[Condition]:
    """Every order at every share, with each repair."""
    for (order, seed), heads in orders.items():
        for share in cfg["shares"]:
            gone = tuple(heads[: round(share * len(heads))])
            yield from (Condition("heads", order, share, repair, seed, heads=gone) for repair in cfg["repairs"] if gone)


def weight_conditions(cfg: PartsCfg, acoustic: Tensor | None, layers: int) -> Iterator[Condition]:
    """Every order of `lm_pruning.weights` at every share."""
    for order in cfg["orders"]:
        for seed in range(cfg["seeds"] if order == "random" else 1):
            for share in cfg["shares"]:
                shares = layer_shares(order, seed, share, acoustic, layers)
                yield Condition("weights", order, share, "zero", seed, weights=tuple(enumerate(shares)))


def layer_conditions(orders: Mapping[tuple[str, int], Sequence[int]], cfg: PartsCfg) -> Iterator[Condition]:
    """Every order of layers at every share that takes one at least."""
    for (order, seed), layers in orders.items():
        for share in cfg["shares"]:
            if count := round(share * len(layers)):
                yield Condition("layers", order, share, "zero", seed, layers=tuple(layers[:count]))


def layer_counts(heads: Sequence[Head]) -> Counter[int]:
    """How many heads of each layer."""
    return Counter(layer for layer, _ in heads)
