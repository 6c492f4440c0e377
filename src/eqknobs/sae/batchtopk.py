"""`batchtopk`: the k·B largest activations of a batch of B frames (Bussmann et al. 2024)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from eqknobs.sae.base import register
from eqknobs.sae.kernels import Pattern, batch_top_k
from eqknobs.sae.unit_norm import UnitNormConfig, UnitNormSAE


@dataclass(frozen=True)
class BatchTopKConfig(UnitNormConfig):
    """`k`: features kept on a frame, on average."""

    k: int = 0
    variant: ClassVar[str] = "batchtopk"

    def __post_init__(self) -> None:
        self.require(type(self.k) is int and 0 < self.k <= self.d_sae, "k between 1 and d_sae")


@register
class BatchTopKSAE(UnitNormSAE):
    """f = relu(h) where it is among the k·B largest of the batch; at inference where it exceeds `threshold`.

    The threshold is the exact quantile of the train frames' activations that leaves k of them a frame, measured anew
    after every epoch: an average over training steps, as others keep it, is wrong after short runs.
    """

    Config = BatchTopKConfig
    config: BatchTopKConfig
    threshold: Tensor

    def __init__(self, config: BatchTopKConfig, mean: Any, std: Any):
        super().__init__(config, mean, std)
        self.register_buffer("threshold", torch.zeros(()))
        self._hint = 0.0  # where to begin looking for the batch's own threshold; no effect on the result

    def _code(self, z: Tensor) -> Tensor:
        h = self._pre(z)
        return h * (h > self.threshold)

    def _select(self, h: Tensor) -> tuple[Pattern, Tensor]:
        pattern, values, smallest = batch_top_k(h, self.config.k * len(h), self._hint)
        self._hint = 0.9 * smallest
        return pattern, values

    def _mask(self, h: Tensor) -> Tensor:
        kept = h.flatten().topk(self.config.k * len(h), sorted=False).indices
        return torch.zeros_like(h).view(-1).scatter_(0, kept, 1.0).view_as(h)

    @torch.no_grad()
    def _calibrate(self, blocks: Iterable[Tensor], frames: int) -> None:
        count = self.config.k * frames
        largest, floor = np.empty(0, dtype=np.float32), 0.0
        for z in blocks:
            h = self._pre(z).cpu().numpy()
            largest = np.concatenate([largest, h[h > floor]])
            if len(largest) > count + 1:
                largest = np.partition(largest, len(largest) - count - 1)[len(largest) - count - 1 :]
                floor = largest[0]
        if len(largest) > count:
            # Halfway between the last kept and the first dropped: rounding in another batch size cannot swap them.
            dropped, kept = np.sort(largest)[:2].astype(np.float64)
            self.threshold.fill_((dropped + kept) / 2)
        else:
            self.threshold.fill_(0.0)
