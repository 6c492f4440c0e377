"""Which width each tensor of a speech LM gets: plans of equal bytes, by probes, by measurement, at random.

Two parts. `temporal`: widths of the temporal transformer's linears are allotted, all other tensors that can be packed
have one width; layers and heads are there, so that this is what their probes can guide. `whole`: widths of all tensors
are allotted, which only measurement (and chance) can do.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.config import MoshiConfig
from eqknobs.packing.allocation import Allocator
from eqknobs.packing.plan import Plan, Shape

TEMPORAL, WHOLE = "temporal", "whole"
# A plan's name -> what decides its widths.
UNIFORM, LAYER, HEAD, SENSITIVITY, BLOCK = "uniform", "layer", "head", "sensitivity", "block"
INVERTED, HEAD_INVERTED, RANDOM = "inverted", "head_inverted", "random"
INTACT, NF4 = "intact", "nf4"
KINDS = ("attention", "mlp")  # the two blocks of a layer
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(self_attn|gating)\.")


@dataclass(frozen=True)
class Condition:
    """A plan that is tried, the model as it is, or its temporal transformer in NF4.

    budget: mean bits of what is allotted, whose bytes the plan may use.
    """

    part: str = TEMPORAL
    plan: str = INTACT
    budget: float = 0.0
    seed: int = 0
    widths: Plan | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return f"{self.part}:{self.plan}:{self.budget:g}:{self.seed}"

    def row(self) -> dict[str, Any]:
        """Its columns in tables."""
        return {name: getattr(self, name) for name in ("part", "plan", "budget", "seed")}


INTACT_MODEL = Condition()


def place_of(tensor: str) -> tuple[int, str] | None:
    """(layer, attention or mlp) of a tensor of the temporal transformer; None of any other."""
    found = _LAYER.match(tensor)
    return None if found is None else (int(found[1]), KINDS[found[2] == "gating"])


def blocks_of(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """The tensors of every block, attention and MLP of each layer, as `<layer>.<kind>`."""
    found: dict[str, list[str]] = {}
    for name in shapes:
        if place := place_of(name):
            found.setdefault(f"{place[0]}.{place[1]}", []).append(name)
    return found


def layer_accuracies(scores: pd.DataFrame, property: str, layers: int) -> list[float]:
    """How well a probe reads a property in each layer, from `scores/<model>.lm_layers.csv`: of the agent's stream, on
    val, at no lag. Raises EqknobsError where there is no such probe."""
    wanted = {"stream": "agent", "property": property, "split": "val", "labels": "true", "lag": 0}
    rows = scores[np.logical_and.reduce([scores[name] == value for name, value in wanted.items()])]
    columns = [f"residual.{layer}" for layer in range(layers)]
    if rows.empty or not set(columns) <= set(rows):
        known = ", ".join(sorted(scores["property"].unique()))
        raise EqknobsError(
            f"lm_quantisation.property: no probe of {property} reads all {layers} layers; known are {known} (lm_layers "
            "makes them)"
        )
    return (rows[columns].sum() / rows["frames"].sum()).tolist()


def head_accuracies(table: pd.DataFrame, property: str, layers: int, heads: int) -> Tensor:
    """How well a probe reads a property in each head [layers, heads], from `scores/<model>.lm_heads.csv`.

    Raises EqknobsError where the table lacks a head.
    """
    rows = table[table["property"] == property].set_index(["layer", "head"])["accuracy"]
    wanted = [(layer, head) for layer in range(layers) for head in range(heads)]
    if missing := [place for place in wanted if place not in rows.index]:
        raise EqknobsError(
            f"lm_quantisation.property: no probe of {property} reads head {missing[0][1]} of layer {missing[0][0]} "
            "(lm_layers makes them)"
        )
    return torch.tensor([float(rows.loc[place]) for place in wanted], dtype=torch.float64).view(layers, heads)


def head_scores(values: Tensor, state: Mapping[str, Tensor], config: MoshiConfig) -> dict[str, float]:
    """Tensor of attention -> its heads' values, Σ_h a_h ‖W_h‖² / Σ_h ‖W_h‖²: W_h are the rows of q, k and v that make a
    head, or the columns of the output projection that read it. values: [layers, heads].

    A tensor is packed at one width, so that the heads of a layer share theirs: what a ranking of heads can say of the
    packing is which layers' attention holds the heads that count.
    """
    found = {}
    for name, weight in state.items():
        place = place_of(name)
        if place is None or place[1] != "attention" or weight.dim() != 2:
            continue
        wide = weight.detach().double().square()
        if "in_proj" in name:
            mass = wide.sum(1).view(3, config.heads, config.head_dim).sum((0, 2))
        else:
            mass = wide.sum(0).view(config.heads, config.head_dim).sum(1)
        found[name] = float((values[place[0]] * mass.cpu()).sum() / mass.sum().cpu())
    return found


@dataclass(frozen=True)
class Guides:
    """What decides the widths. layers: accuracy of each; heads: see `head_scores`; of tensors and blocks what they do
    alone at each width, name -> width -> damage. Without probes the first two are None."""

    layers: Sequence[float] | None
    heads: Mapping[str, float] | None
    tensors: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Plans:
    """The plans of a model. state: all its tensors; shapes: those that can be packed; outside: the width of those that
    are not of the temporal transformer, in part `temporal`."""

    state: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    widths: Sequence[int]
    options: Mapping[str, Any]
    outside: int

    def allocator(self, part: str, **more: Any) -> Allocator:
        """Of a part, all tensors for themselves."""
        fixed = {} if part == WHOLE else {name: self.outside for name in self.shapes if place_of(name) is None}
        return Allocator(self.state, self.shapes, self.widths, self.options, **{"fixed": fixed, **more})

    def by_heads(self, scores: Mapping[str, float], budget: int) -> Plan:
        """Attention by its heads; every MLP has the budget's own width, as the published recipes keep them at one."""
        allocate = self.allocator(TEMPORAL)
        mlps = {name: budget for name in allocate.tensors if name not in scores}
        return self.allocator(TEMPORAL, fixed={**allocate.fixed, **mlps}).by_score(scores, budget)

    def by_blocks(self, damages: Mapping[str, Mapping[int, float]], budget: float) -> Plan:
        """Attention and MLP of each layer at a width each."""
        return self.allocator(TEMPORAL, blocks=blocks_of(self.shapes)).by_damage(damages, budget)

    def every(
        self, parts: Sequence[str], budgets: Sequence[int], guides: Guides, random: int, seed: int
    ) -> list[Condition]:
        """Uniform plans at each width, the others at each budget."""
        found = []
        for part in parts:
            allocate = self.allocator(part)
            for width in sorted(self.widths, reverse=True):
                found.append(Condition(part, UNIFORM, width, 0, allocate.uniform(width)))
            for budget in sorted(budgets, reverse=True):
                mixed: list[tuple[str, int, Plan]] = []
                if part == TEMPORAL:
                    mixed += self._guided(guides, budget)
                damages = {name: guides.tensors[name] for name in allocate.tensors}
                mixed.append((SENSITIVITY, 0, allocate.by_damage(damages, budget)))
                for i in range(random):
                    drawn = np.random.default_rng([seed, 29, part == WHOLE, i]).random(len(allocate.tensors))
                    scores = dict(zip(allocate.tensors, drawn.tolist(), strict=True))
                    mixed.append((RANDOM, i, allocate.by_score(scores, budget)))
                found += [Condition(part, plan, budget, i, widths) for plan, i, widths in mixed]
        return found

    def _guided(self, guides: Guides, budget: int) -> list[tuple[str, int, Plan]]:
        allocate = self.allocator(TEMPORAL)
        found = []
        if guides.layers is not None:
            places = {name: place_of(name) for name in allocate.tensors}
            scores = {name: guides.layers[place[0]] for name, place in places.items() if place}
            found.append((LAYER, 0, allocate.by_score(scores, budget)))
            turned = {name: -score for name, score in scores.items()}
            found.append((INVERTED, 0, allocate.by_score(turned, budget)))
        if guides.heads is not None:
            found.append((HEAD, 0, self.by_heads(guides.heads, budget)))
            turned = {name: -score for name, score in guides.heads.items()}
            found.append((HEAD_INVERTED, 0, self.by_heads(turned, budget)))
        found.append((BLOCK, 0, self.by_blocks(guides.blocks, budget)))
        return found


def best(conditions: Sequence[Condition], nats: Mapping[str, float], budget: float, count: int) -> list[Condition]:
    """The plans of the temporal part at a budget, drawn ones and the uniform one left out, with the fewest nats of
    held-out speech. nats: by name."""
    rivals = [c for c in conditions if (c.part, c.budget) == (TEMPORAL, budget) and c.plan not in (UNIFORM, RANDOM)]
    ranked = sorted(rivals, key=lambda c: (nats[c.name] if math.isfinite(nats[c.name]) else math.inf, c.name))
    return ranked[:count]
