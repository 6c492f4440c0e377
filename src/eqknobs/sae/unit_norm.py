"""The part that `topk`, `batchtopk` and `jumprelu` share: decoder directions of unit norm, sparse training, AuxK."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eqknobs.sae.base import SAE, SAEConfig, Step
from eqknobs.sae.kernels import Pattern, decode, encode_at

AUX_COEFFICIENT = 1 / 32  # Gao et al. 2024, appendix A.2
SPARSE_ON = ("cpu",)  # devices on which the sparse products are the faster ones; `tools/gpu_check.py` tries cuda
AUX_STRIDE = 4  # AuxK looks at every fourth frame: the same gradient on average, a quarter of its cost


@dataclass(frozen=True)
class UnitNormConfig(SAEConfig):
    """`aux_k`: dead features that rebuild the residual (0: none). `dead_epochs`: a feature that has not fired for so
    many epochs is dead; in epochs because audio sets are small (the usual 10 M frames are a hundred of them)."""

    aux_k: int = 0
    dead_epochs: float = 2


def geometric_median(points: Tensor, steps: int = 50) -> Tensor:
    """Weiszfeld's iteration for argmin_y Σ ‖x − y‖, [N, d] -> [d] (Gao et al.: the start of b_dec)."""
    median = points.mean(0)
    for _ in range(steps):
        weight = 1 / (points - median).norm(dim=1).clamp_min(1e-6)
        median = (weight[:, None] * points).sum(0) / weight.sum()
    return median


class UnitNormSAE(SAE):
    """h = W (z − b_dec) + b, a sparse code of h, ẑ = f W_dec + b_dec with rows of W_dec of norm 1.

    Start as in Gao et al. 2024, appendix A.1: encoder and decoder of equal directions, b_dec the geometric median; but
    the encoder `_encoder_start` times as long, which learns faster and ends better (docs/sae.md). On a CPU the
    training step is one dense product and four sparse ones (`kernels`); on a GPU, or where a variant's code is not
    sparse (`_select` answers None), all are dense. Both give the same gradients.
    """

    config: UnitNormConfig
    _encoder_start = 0.125

    # --- what a variant defines

    @abstractmethod
    def _select(self, h: Tensor) -> tuple[Pattern, Tensor] | None:
        """Places of h [B, m] that take part in the step, and their values; None: treat all as dense."""

    @abstractmethod
    def _mask(self, h: Tensor) -> Tensor | None:
        """The same places as a mask [B, m] for the dense path; None: all."""

    def _activate(self, values: Tensor, cols: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Values at those places (flat [n] with their features `cols`, or dense [B, m]) -> code, further loss."""
        return torch.relu(values), 0.0

    def _finish(self, h: Tensor, pattern: Pattern, rebuilt: Tensor) -> tuple[Tensor, Tensor | float]:
        """What the sparse path adds that looks at more places than the code has: ẑ as it is, and further loss."""
        return rebuilt, 0.0

    # --- shared

    def _bias(self) -> Tensor:
        # W (z − b_dec) + b with b_dec moved into the bias: its gradient is then a matrix–vector product.
        return self.b_enc - self.W_enc @ self.b_dec

    def _pre(self, z: Tensor) -> Tensor:
        return torch.addmm(self._bias(), z, self.W_enc.T)

    def _step(self, z: Tensor, dead: Tensor | None) -> Step:
        bias = self._bias()
        selected = None
        if z.device.type in SPARSE_ON:
            with torch.no_grad():
                h = torch.addmm(bias, z, self.W_enc.T)
                selected = self._select(h)
        if selected is None:
            h = torch.addmm(bias, z, self.W_enc.T)
            mask = self._mask(h.detach())
            code, further = self._activate(h if mask is None else h * mask, None)
            rebuilt = self._reconstruct(code)
            counts = (code.detach() > 0).sum(0)
        else:
            pattern, values = selected
            code, further = self._activate(encode_at(z, self.W_enc, bias, pattern, values), pattern.cols)
            rebuilt = decode(code, self.W_dec, pattern) + self.b_dec
            rebuilt, more = self._finish(h, pattern, rebuilt)
            further = further + more
            counts = torch.bincount(pattern.cols[code.detach() > 0], minlength=self.config.d_sae)
        error = z - rebuilt
        squared = error.square().sum()
        loss = squared / z.numel() + further
        if self.config.aux_k and dead is not None and len(dead):
            part = slice(None, None, AUX_STRIDE if len(z) >= 64 * AUX_STRIDE else 1)
            loss = loss + AUX_COEFFICIENT * self._auxiliary(z[part], error[part].detach(), bias[dead], dead)
        return Step(loss, squared.detach(), float(counts.sum()), counts > 0)

    def _auxiliary(self, z: Tensor, error: Tensor, bias: Tensor, dead: Tensor) -> Tensor:
        """AuxK: mean squared error of the residual rebuilt from the strongest `aux_k` dead features."""
        h = torch.relu(F.linear(z, self.W_enc[dead], bias))
        kept = h.topk(min(self.config.aux_k, len(dead)), dim=-1, sorted=False)
        code = torch.zeros_like(h).scatter(-1, kept.indices, kept.values)
        return (error - code @ self.W_dec[dead]).square().mean()

    def _start(self, z: Tensor) -> None:
        self.b_dec.data = geometric_median(z)
        self.W_enc.data *= self._encoder_start

    def _before_update(self) -> None:
        """Drop the gradient along the decoder's directions: the norm is not free (Gao et al., appendix A.3)."""
        with torch.no_grad():
            gradient = self.W_dec.grad
            assert gradient is not None  # `Trainer.step` has just gone backward
            along = (self.W_dec * gradient).sum(1, keepdim=True)
            gradient.addcmul_(self.W_dec, along, value=-1)

    def _after_update(self) -> None:
        with torch.no_grad():
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
