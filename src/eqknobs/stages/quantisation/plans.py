"""Which width each tensor gets: plans of the same bytes, from maps of the latents, from measurement, and at random.

All plans of a budget may use the same bytes. Plans by a score differ in nothing but the order of the tensors, so that
what one gains over its inverse and over random orders is what its order is worth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eqknobs.packing.allocation import Allocator
from eqknobs.packing.plan import Plan, Shape

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


# --- plans --------------------------------------------------------------------------------------------------------


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
