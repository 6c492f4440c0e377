"""The speech LM that is pruned: what decides in which order its parts go, and what is done to it."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.models import ModelCfg
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.interventions import skipped_layers, zeroed_heads
from eqknobs.models.moshi.likelihood import head_gradients, head_means
from eqknobs.pieces import Pieces
from eqknobs.speaking.bench import Bench, PromptsCfg, Speech, digest
from eqknobs.speaking.scores import Judge, JudgeCfg
from eqknobs.stages.lm_pruning import plan
from eqknobs.stages.lm_pruning.plan import INTACT, Condition, HeadsCfg, PartsCfg


class RemovalCfg(TypedDict):
    """`lm_pruning.removal`."""

    order: str
    shares: list[float]
    nf4: bool


class CodebooksCfg(TypedDict):
    """`lm_pruning.codebooks`."""

    readings: list[str]
    counts: list[int]
    count: int


class PruningCfg(TypedDict):
    """What `prune_and_score` reads: the section `lm_pruning`, the model, the judges and the device."""

    model: ModelCfg
    prompts: PromptsCfg
    property: str
    heads: HeadsCfg
    weights: PartsCfg | None
    layers: PartsCfg | None
    answered: list[str]
    confirmed: list[str]
    draws: int
    removal: RemovalCfg | None
    codebooks: CodebooksCfg | None
    batch: int
    temperature: float
    dnsmos: bool
    listen: int
    judges: JudgeCfg
    device: NotRequired[str]
    content: NotRequired[Any]  # digests, which decide when to score again, not how


class PruningBench(Bench[Condition]):
    """A model that is pruned while it speaks."""

    cfg: PruningCfg

    def __init__(self, model: Moshi, judge: Judge, speech: Speech, cfg: PruningCfg, pieces: Pieces) -> None:
        super().__init__(model, judge, speech, cfg, pieces, INTACT)
        self.means: list[Tensor] = []

    def applied(self, condition: Condition) -> AbstractContextManager[None]:
        return condition.applied(self.model.net, self.means)

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A piece that the calibration clips decide."""
        made_of = [name, digest(self.speech["calibration"])]
        return self.pieces.arrays("lm-calibration", made_of, lambda: {"found": make()})["found"]

    def calibrate(self) -> dict[str, Tensor]:
        """Values of heads by which they can be ordered: `norm`, `gradient`, `damage` [layers, heads]; of layers,
        `layers` [layers]. Sets `means`."""
        net, batches = self.model.net, self.batches(self.speech["calibration"])
        single = [[row] for row in self.speech["calibration"]]  # a gradient keeps what every layer holds
        self.means = [
            torch.from_numpy(m) for m in self.array("means", lambda: torch.stack(head_means(net, batches)).numpy())
        ]
        if any(len(kept) < net.config.heads for kept in net.heads):
            raise EqknobsError(f"models.{self.model.name}: heads were removed from it already; prune the whole model")
        found = {"norm": plan.norms(net)}
        found["gradient"] = torch.from_numpy(self.array("gradient", lambda: head_gradients(net, single).numpy()))
        found["damage"] = torch.from_numpy(self.array("damage", self._damage_of_heads))
        found["layers"] = torch.from_numpy(self.array("layers", self._damage_of_layers))
        return found

    def _damage_of_heads(self) -> np.ndarray:
        net, intact = self.model.net, self.loss()
        found = np.empty((net.config.layers, net.config.heads))
        for layer in range(net.config.layers):
            for head in range(net.config.heads):
                with zeroed_heads(net, {layer: [head]}):
                    found[layer, head] = self.loss() - intact
        return found

    def _damage_of_layers(self) -> np.ndarray:
        intact, found = self.loss(), []
        for layer in range(self.model.config.layers):
            with skipped_layers(self.model.net, [layer]):
                found.append(self.loss() - intact)
        return np.array(found)

    def decided_by(self, condition: Condition) -> Any:
        means = [float(m.double().sum()) for m in self.means] if condition.repair == "mean" else None
        return json.loads(json.dumps([condition.repair, condition.heads, condition.weights, condition.layers, means]))
