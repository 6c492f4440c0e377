"""Which width each tensor gets: plans of the same bytes, from maps of the latents, from measurement, and at random.

All plans of a budget may use the same bytes. Plans by a score differ in nothing but the order of the tensors, so that
what one gains over its inverse and over random orders is what its order is worth.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eqknobs.packing.plan import Plan, Shape, plan_bytes

# A plan's name -> what orders its tensors.
UNIFORM, GUIDED, MAP, SENSITIVITY, INVERTED, RANDOM = "uniform guided map sensitivity inverted random".split()
NONE = "none"  # nothing is quantised
PARTS = ("decoder", "codec")


@dataclass(frozen=True)
class Named:
    """A plan with what it is called. budget: mean bits whose bytes it may use."""

    part: str
    name: str
    seed: int | None
    budget: float
    plan: Plan

    @property
    def key(self) -> str:
        seed = "" if self.seed is None else str(self.seed)
        return f"{self.part}.{self.name}{seed}.{self.budget:g}.{self.plan.rounding}"


def in_decoder(tensor: str) -> bool:
    """Whether a listener, who gets tokens, needs a tensor: those of the decoder, of its way up from code rate, the
    codebooks, and what leads out of them."""
    parts = tensor.split(".")
    if parts[0] == "quantizer":
        return any(part.endswith("codebook") or part in ("output_proj", "out_proj") for part in parts)
    return parts[0].startswith("decoder") or parts[0] == "upsample"


# --- the blog's recipe -------------------------------------------------------------------------------------------


def latent_scores(values: np.ndarray, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, float]:
    """Tensor -> how important the latent dimensions are that it makes and reads, by a map [width] of them.

    The blog says "tracing this back to model weights" and no more; this is that, made exact. A tensor with as many
    output channels as there are latent dimensions makes them, one with as many input channels reads them (a
    transformer's residual stream has one basis throughout). Its score is the map's mean over these dimensions, each
    weighed by the squared weights that make or read it: Σ_i I_i ‖W_i‖² / Σ_i ‖W_i‖², over output channels, input
    channels, or both. A tensor that touches none gets the score of the nearest one that does, by places in the
    network's own order (of two equally near ones the earlier). As in the blog, one map serves encoder and decoder,
    though the decoder's dimensions are not the encoder's: whether that is of use is what is measured.
    """
    width = len(values)
    importance = torch.from_numpy(np.asarray(values, dtype=np.float64))
    direct: dict[int, float] = {}
    names = list(shapes)
    for place, name in enumerate(names):
        weight = tensors[name].detach().double().cpu().movedim(shapes[name].axis, 0)
        masses = [weight.square().flatten(1).sum(1)] if weight.dim() > 1 else []
        if weight.dim() > 1:
            masses.append(weight.square().movedim(1, 0).flatten(1).sum(1))
        touched = [mass for mass in masses if len(mass) == width and float(mass.sum()) > 0]
        if touched:
            top, bottom = (
                sum(float((m * by).sum()) for m in touched) for by in (importance, torch.ones(width).double())
            )
            direct[place] = top / bottom
    if not direct:  # a model whose tensors nowhere have the latents' width: no order at all
        return dict.fromkeys(names, float(importance.mean()))
    places = sorted(direct)
    return {name: direct[min(places, key=lambda p: (abs(p - i), p))] for i, name in enumerate(names)}


# --- allocation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allocator:
    """Widths of a part's tensors under a budget.

    state: all tensors of the part, also those that stay. shapes: those that may be packed. widths: that may be used,
    ascending. options: of `Plan` beside the widths.
    """

    state: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    widths: Sequence[int]
    options: Mapping[str, Any]

    def plan(self, bits: Mapping[str, int], **options: Any) -> Plan:
        return Plan.of(self.shapes, bits, **{**self.options, **options})

    def uniform(self, bits: int, **options: Any) -> Plan:
        return self.plan(dict.fromkeys(self.shapes, bits), **options)

    def bytes(self, bits: Mapping[str, int]) -> int:
        return plan_bytes(self.state, self.plan(bits))

    def budget(self, mean: float) -> int:
        """Bytes of a uniform plan of that many bits, between two whole numbers by a straight line."""
        low, high = (self.bytes(dict.fromkeys(self.shapes, bits)) for bits in (math.floor(mean), math.ceil(mean)))
        return round(low + (mean - math.floor(mean)) * (high - low))

    def cost(self, name: str, bits: int) -> int:
        """Bytes of one tensor at a width, less those at the narrowest one."""
        columns = self.shapes[name].numel()
        return 8 * math.ceil(columns / 64) * (bits - self.widths[0])

    def by_score(self, scores: Mapping[str, float], mean: float) -> Plan:
        """Wider where the score is higher.

        A tensor's place in the order, by the values that tensors hold, is r in [−1, 1] (of equal scores the earlier
        tensor is the narrower). It is meant to have mean + r · s bits, with s the distance from the mean to the nearer
        end of the widths, and gets the nearest width (of two the narrower). Then all move together until the bytes just
        fit, and what is left goes to the highest scores whose next width still fits.
        """
        order = sorted(self.shapes, key=lambda name: scores[name])
        sizes = np.array([self.shapes[name].numel() for name in order], dtype=float)
        place = (np.cumsum(sizes) - sizes / 2) / sizes.sum() * 2 - 1
        spread = min(mean - self.widths[0], self.widths[-1] - mean)
        known = np.array(self.widths)

        def at(shift: float) -> dict[str, int]:
            wanted = mean + place * spread + shift
            nearest = np.abs(known[None] - wanted[:, None]).argmin(1)
            return {name: int(known[i]) for name, i in zip(order, nearest, strict=True)}

        low, high, limit = -float(known[-1]), float(known[-1]), self.budget(mean)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bytes(at(middle)) <= limit else (low, middle)
        return self.filled(at(low), reversed(order), limit)

    def by_damage(self, damages: Mapping[str, Mapping[int, float]], mean: float) -> Plan:
        """The least sum of damages under the budget. damages: tensor -> width -> damage, of each width.

        All tensors begin at the narrowest width; then the step that saves most damage a byte is taken as long as it
        fits, steps being those of the lower convex hull of a tensor's damages over bytes: what a Lagrangian gives, but
        for the last few bytes, which go to the steps that still fit.
        """
        bits = dict.fromkeys(self.shapes, self.widths[0])
        left = self.budget(mean) - self.bytes(bits)
        steps = [step for name in self.shapes for step in self._hull(name, damages[name])]
        for _, name, start, width in sorted(steps, key=lambda step: -step[0]):
            cost = self.cost(name, width) - self.cost(name, start)
            if bits[name] == start and cost <= left:
                bits[name], left = width, left - cost
        gain = {name: max(damages[name][bits[name]], 0.0) / self.shapes[name].numel() for name in self.shapes}
        return self.filled(bits, sorted(self.shapes, key=lambda name: -gain[name]), self.budget(mean))

    def _hull(self, name: str, damages: Mapping[int, float]) -> list[tuple[float, str, int, int]]:
        """(damage saved a byte, tensor, from width, to width) of the convex hull, downhill."""
        steps = []
        at = self.widths[0]
        while at != self.widths[-1]:
            slopes = {
                width: (damages[at] - damages[width]) / (self.cost(name, width) - self.cost(name, at))
                for width in self.widths
                if width > at
            }
            best = max(slopes, key=lambda width: (slopes[width], width))
            if slopes[best] <= 0:
                break
            steps.append((slopes[best], name, at, best))
            at = best
        return steps

    def filled(self, bits: dict[str, int], order: Iterable[str], limit: int) -> Plan:
        """The plan, and what is left of the budget spent: tensors in order, one width up, until none fits any more."""
        bits, order = dict(bits), list(order)
        left = limit - self.bytes(bits)
        moved = True
        while moved:
            moved = False
            for name in order:
                wider = next((width for width in self.widths if width > bits[name]), None)
                if wider is None:
                    continue
                cost = self.cost(name, wider) - self.cost(name, bits[name])
                if cost <= left:
                    bits[name], left, moved = wider, left - cost, True
        return self.plan(bits)


@dataclass(frozen=True)
class Orders:
    """What orders a part's tensors. composition, chosen: maps of the latents [width] (chosen None where val chooses
    the composition map itself, both None without maps); damages: see `Allocator.by_damage`."""

    composition: np.ndarray | None
    chosen: np.ndarray | None
    damages: Mapping[str, Mapping[int, float]]


def part_plans(
    part: str,
    allocate: Allocator,
    orders: Orders,
    budgets: Sequence[float],
    random: int,
    roundings: Sequence[str],
    seed: int,
) -> list[Named]:
    """Every plan of a part: uniform at each width, by each rounding; the others at each budget, by the first rounding.

    Where tensors can be told apart by nothing (the widest and the narrowest width) there is only the uniform plan.
    """
    found = [
        Named(part, UNIFORM, None, width, allocate.uniform(width, rounding=rounding))
        for rounding in roundings
        for width in reversed(allocate.widths)
    ]
    tensors = allocate.state
    scored: list[tuple[str, int | None, dict[str, float]]] = []
    if orders.composition is not None:
        guided = latent_scores(orders.composition, tensors, allocate.shapes)
        scored += [(GUIDED, None, guided), (INVERTED, None, {name: -score for name, score in guided.items()})]
    if orders.chosen is not None:
        scored.append((MAP, None, latent_scores(orders.chosen, tensors, allocate.shapes)))
    for i in range(random):
        values = np.random.default_rng([seed, 17, PARTS.index(part), i]).random(len(allocate.shapes))
        scored.append((RANDOM, i, dict(zip(allocate.shapes, values.tolist(), strict=True))))
    for mean in budgets:
        found.append(Named(part, SENSITIVITY, None, mean, allocate.by_damage(orders.damages, mean)))
        found += [Named(part, name, i, mean, allocate.by_score(scores, mean)) for name, i, scores in scored]
    return found
