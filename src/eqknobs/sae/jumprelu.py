"""`jumprelu`: a threshold per feature, trained to a target L0 (Rajamanoharan et al. 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from eqknobs.sae.base import register
from eqknobs.sae.kernels import Pattern, above
from eqknobs.sae.unit_norm import UnitNormConfig, UnitNormSAE

SPARSE_BELOW = 0.06  # share of active features below which the sparse products are the faster ones


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
    """(h, θ, cols, ε) -> h·1[h > θ] and the number of active entries; θ [m] belongs to entry n by cols [n], or to the
    columns of a dense h [B, m] where cols is None.

    Pseudo-derivatives of the paper's eq. 11 and 12, with the rectangle K((h − θ) / ε) on pre-activations:
    ∂f/∂θ = −θ/ε K, ∂1/∂θ = −1/ε K.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, cols: Tensor | None, width: float) -> tuple[Tensor, Tensor]:
        limit = threshold if cols is None else threshold[cols]
        on = h > limit
        ctx.save_for_backward(h, limit, on)
        ctx.cols, ctx.width, ctx.features = cols, width, len(threshold)
        return h * on, on.sum().to(h.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_count: Tensor) -> tuple[Tensor | None, ...]:
        h, limit, on = ctx.saved_tensors
        inside = ((h - limit).abs() < ctx.width / 2).to(h.dtype)
        change = -inside * (limit * g + g_count) / ctx.width
        if ctx.cols is None:
            change = change.sum(0)
        else:
            change = torch.bincount(ctx.cols, change.double(), ctx.features).to(h.dtype)
        return g * on, change, None, None


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
        pattern, values = above(h, self.threshold - self.config.bandwidth / 2)
        return (pattern, values) if len(values) <= SPARSE_BELOW * h.numel() else None

    def _mask(self, h: Tensor) -> None:
        return None  # `_Jump` looks at all of h

    def _activate(self, values: Tensor, cols: Tensor | None) -> tuple[Tensor, Tensor]:
        code, count = _Jump.apply(values, self.threshold, cols, self.config.bandwidth)
        return code, self.config.l0_coefficient * (count / self._frames / self.config.l0 - 1).square()

    def _step(self, z: Tensor, dead: Tensor | None) -> Any:
        self._frames = len(z)
        return super()._step(z, dead)

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
