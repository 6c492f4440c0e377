"""Which width each tensor gets under a budget of bytes: by a score, or by measured damage."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from eqknobs.packing.plan import Plan, Shape, plan_bytes


@dataclass(frozen=True)
class Allocator:
    """Widths of a part's tensors under a budget.

    state: all tensors of the part, also those that stay. shapes: those that may be packed. widths: that may be used,
    ascending. options: of `Plan` beside the widths. fixed: widths of those that are the same in every plan. blocks:
    tensors that share a width, by the name of their block; by default each of the others is its own. Scores, damages
    and `bits` below are of blocks.
    """

    state: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    widths: Sequence[int]
    options: Mapping[str, Any]
    fixed: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, Sequence[str]]:
        """The tensors of every block."""
        return self.blocks or {name: (name,) for name in self.shapes if name not in self.fixed}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Values that each block holds."""
        return {block: sum(self.shapes[name].numel() for name in names) for block, names in self.tensors.items()}

    def plan(self, bits: Mapping[str, int], **options: Any) -> Plan:
        spread = {name: width for block, width in bits.items() for name in self.tensors[block]}
        return Plan.of(self.shapes, {**self.fixed, **spread}, **{**self.options, **options})

    def uniform(self, bits: int, **options: Any) -> Plan:
        return self.plan(dict.fromkeys(self.tensors, bits), **options)

    def bytes(self, bits: Mapping[str, int]) -> int:
        return plan_bytes(self.state, self.plan(bits))

    def budget(self, mean: float) -> int:
        """Bytes of a uniform plan of that many bits, between two whole numbers by a straight line."""
        low, high = (self.bytes(dict.fromkeys(self.tensors, bits)) for bits in (math.floor(mean), math.ceil(mean)))
        return round(low + (mean - math.floor(mean)) * (high - low))

    def cost(self, name: str, bits: int) -> int:
        """Bytes of one block at a width, less those at the narrowest one."""
        places = sum(math.ceil(self.shapes[tensor].numel() / 64) for tensor in self.tensors[name])
        return 8 * places * (bits - self.widths[0])

    def by_score(self, scores: Mapping[str, float], mean: float) -> Plan:
        """Wider where the score is higher.

        A block's place in the order, by the values that blocks hold, is r in [−1, 1] (of equal scores the earlier
        block is the narrower). It is meant to have mean + r · s bits, with s the distance from the mean to the nearer
        end of the widths, and gets the nearest width (of two the narrower). Then all move together until the bytes just
        fit, and what is left goes to the highest scores whose next width still fits.
        """
        order = sorted(self.tensors, key=lambda name: scores[name])
        sizes = np.array([self.sizes[name] for name in order], dtype=float)
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
        """The least sum of damages under the budget. damages: block -> width -> damage, of each width.

        All blocks begin at the narrowest width; then the step that saves most damage a byte is taken as long as it
        fits, steps being those of the lower convex hull of a block's damages over bytes: what a Lagrangian gives, but
        for the last few bytes, which go to the steps that still fit.
        """
        bits = dict.fromkeys(self.tensors, self.widths[0])
        left = self.budget(mean) - self.bytes(bits)
        steps = [step for name in self.tensors for step in self._hull(name, damages[name])]
        for _, name, start, width in sorted(steps, key=lambda step: -step[0]):
            cost = self.cost(name, width) - self.cost(name, start)
            if bits[name] == start and cost <= left:
                bits[name], left = width, left - cost
        gain = {name: max(damages[name][bits[name]], 0.0) / self.sizes[name] for name in self.tensors}
        return self.filled(bits, sorted(self.tensors, key=lambda name: -gain[name]), self.budget(mean))

    def _hull(self, name: str, damages: Mapping[int, float]) -> list[tuple[float, str, int, int]]:
        """(damage saved a byte, block, from width, to width) of the convex hull, downhill."""
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
        """The plan, and what is left of the budget spent: blocks in order, one width up, until none fits any more."""
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
