"""`topk`: the k largest activations of every frame (Gao et al. 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eqknobs.sae.base import register
from eqknobs.sae.kernels import Pattern, row_top_k
from eqknobs.sae.unit_norm import UnitNormConfig, UnitNormSAE


@dataclass(frozen=True)
class TopKConfig(UnitNormConfig):
    """`k`: features kept on a frame."""

    k: int = 0
    variant: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        self.require(type(self.k) is int and 0 < self.k <= self.d_sae, "k between 1 and d_sae")


@register
class TopKSAE(UnitNormSAE):
    """f = the k largest of relu(h) on each frame; loss ‖z − ẑ‖² / d plus AuxK."""

    Config = TopKConfig
    config: TopKConfig

    def _code(self, z: Tensor) -> Tensor:
        h = torch.relu(self._pre(z))
        return h * self._mask(h)

    def _select(self, h: Tensor) -> tuple[Pattern, Tensor]:
        return row_top_k(h, self.config.k)

    def _mask(self, h: Tensor) -> Tensor:
        kept = h.topk(self.config.k, dim=-1, sorted=False).indices
        return torch.zeros_like(h).scatter_(-1, kept, 1.0)
