"""`jumprelu`: a threshold per feature, trained to a target L0 (Rajamanoharan et al. 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from eqknobs.sae.base import register
from eqknobs.sae.kernels import Pattern, above, places
from eqknobs.sae.unit_norm import UnitNormConfig, UnitNormSAE

SPARSE_BELOW = 0.06  # share of active features below which the sparse products are the faster ones
BAND_BELOW = 0.04  # the same of features within half a bandwidth of their threshold
BLOCK = 256  # frames looked at at once, so that what is compared stays in the cache


@dataclass(frozen=True)
class JumpReLUConfig(UnitNormConfig):
    """`l0`: target of the mean number of active features. `l0_coefficient`: λ of ((L0 / l0) − 1)². `bandwidth`: ε of
    the rectangle that stands in for the derivative of the step, in units of the pre-activations. `threshold_lr`: the
    thresholds' learning rate as a multiple of `lr`: they are of the size of activations, not of weights, and at the
    weights' rate lag behind while the encoder grows sparser (L0 15 for a target of 32 on tiny-mimi)."""

    l0: float = 0.0
    l0_coefficient: float = 1.0
    bandwidth: float = 1.0
    threshold_lr: float = 10.0
    variant: ClassVar[str] = "jumprelu"

    def __post_init__(self) -> None:
        self.require(0 < self.l0 <= self.d_sae, "l0 between 0 and d_sae")
        self.require(self.bandwidth > 0 and self.threshold_lr > 0, "bandwidth and threshold_lr above 0")


class _Jump(Function):
    """(h [B, m], θ [m], ε) -> h·1[h > θ] and the number of active entries.

    Pseudo-derivatives of the paper's eq. 11 and 12, with the rectangle K((h − θ) / ε) on pre-activations:
    ∂f/∂θ = −θ/ε K, ∂1/∂θ = −1/ε K.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
        on = h > threshold
        ctx.save_for_backward(h, threshold, on)
        ctx.width = width
        return h * on, on.sum().to(h.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_count: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold, on = ctx.saved_tensors
        inside = ((h - threshold).abs() < ctx.width / 2).to(h.dtype)
        change = -inside * (threshold * g + g_count) / ctx.width
        return g * on, change.sum(0), None


def band(h: Tensor, threshold: Tensor, width: float) -> Tensor:
    """Where |h − θ| < ε / 2, the rectangle's inside, as booleans [B, m]."""
    inside = torch.empty(h.shape, dtype=torch.bool)
    for start in range(0, len(h), BLOCK):
        rows = slice(start, start + BLOCK)
        torch.lt((h[rows] - threshold).abs_(), width / 2, out=inside[rows])
    return inside


class _Threshold(Function):
    """(ẑ [B, d], θ [m], W_dec [m, d], the rectangle's inside [B, m], active entries, ε) -> ẑ and the number of active
    entries, with `_Jump`'s derivatives with respect to θ.

    Code, decoder and encoder have gradients at active features only. Those of θ need ∂L/∂f = G·W_jᵀ (G = ∂L/∂ẑ) over
    the whole rectangle, but summed over frames, and Σ_b K_bj G_b · W_j = (KᵀG)_j · W_j: one product, dense (K is a
    matrix of zeros and ones) or, where the rectangle is nearly empty, sparse.
    """

    @staticmethod
    def forward(
        ctx: Any, rebuilt: Tensor, threshold: Tensor, w_dec: Tensor, inside: Tensor, active: int, width: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(threshold, w_dec, inside)
        ctx.width = width
        return rebuilt.view_as(rebuilt), rebuilt.new_tensor(float(active))

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_count: Tensor) -> tuple[Tensor | None, ...]:
        threshold, w_dec, inside = ctx.saved_tensors
        if np.count_nonzero(inside.numpy()) < BAND_BELOW * inside.numel():
            pattern = places(inside)
            counts = torch.bincount(pattern.cols, minlength=len(threshold)).to(g.dtype)
            empty = pattern.matrix(g.new_zeros(len(pattern.cols)))
            sums = pattern.per_feature(torch.sparse.sampled_addmm(empty, g.contiguous(), w_dec.T, beta=0.0).values())
        else:
            counts = torch.from_numpy(np.count_nonzero(inside.numpy(), axis=0)).to(g.dtype)
            sums = (inside.to(g.dtype).T @ g).mul_(w_dec).sum(1)
        return g, -(threshold * sums + g_count * counts) / ctx.width, None, None, None, None


@register
class JumpReLUSAE(UnitNormSAE):
    """f = h where h > θ_j; loss ‖z − ẑ‖² / d + λ ((L0 / target) − 1)². θ ≥ 0 is trained as it is, in float32.

    θ starts at the quantile of the train frames' pre-activations that gives the target L0.
    """

    Config = JumpReLUConfig
    config: JumpReLUConfig
    _encoder_start = 0.5

    def __init__(self, config: JumpReLUConfig, mean: Any, std: Any):
        super().__init__(config, mean, std)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))

    def _code(self, z: Tensor) -> Tensor:
        h = self._pre(z)
        return h * (h > self.threshold)

    def _select(self, h: Tensor) -> tuple[Pattern, Tensor] | None:
        pattern, values = above(h, self.threshold)
        return (pattern, values) if len(values) <= SPARSE_BELOW * h.numel() else None

    def _mask(self, h: Tensor) -> None:
        return None  # `_Jump` looks at all of h

    def _activate(self, values: Tensor, cols: Tensor | None) -> tuple[Tensor, Tensor | float]:
        if cols is not None:  # all of them are above their thresholds; `_finish` has the rest
            return values, 0.0
        code, count = _Jump.apply(values, self.threshold, self.config.bandwidth)
        return code, self._penalty(count, len(values))

    def _finish(self, h: Tensor, pattern: Pattern, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
        width, active = self.config.bandwidth, len(pattern.cols)
        inside = band(h, self.threshold.detach(), width)
        rebuilt, count = _Threshold.apply(rebuilt, self.threshold, self.W_dec.detach(), inside, active, width)
        return rebuilt, self._penalty(count, len(h))

    def _penalty(self, count: Tensor, frames: int) -> Tensor:
        return self.config.l0_coefficient * (count / frames / self.config.l0 - 1).square()

    @torch.no_grad()
    def _start(self, z: Tensor) -> None:
        super()._start(z)
        h = self._pre(z[: 1 << 12]).flatten()
        rank = h.numel() - round(self.config.l0 * min(len(z), 1 << 12))
        self.threshold.fill_(max(0.0, float(h.kthvalue(max(1, rank)).values)))

    def _learning_rates(self) -> dict[str, float]:
        return {"threshold": self.config.threshold_lr}

    def _after_update(self) -> None:
        super()._after_update()
        with torch.no_grad():
            self.threshold.clamp_min_(0)
