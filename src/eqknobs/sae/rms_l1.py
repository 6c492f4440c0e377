"""`rms_l1`: ReLU, RMS norm of the code, L1 (audio-latent SAE paper, eq. 1–3; the blog)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from eqknobs.sae.base import SAE, SAEConfig, Step, register

EPS = 1e-8  # inside the RMS norm's root, as in the blog
COUNTED = 512  # rows of a batch on which its L0 is counted: a pass over all of them costs as much as a product


@dataclass(frozen=True)
class RmsL1Config(SAEConfig):
    """`l1`: λ in the paper's scale (squared error summed over d). `l1_on`: h, before the RMS norm (the paper), or f,
    after it (the blog)."""

    l1: float = float("nan")
    l1_on: str = ""
    variant: ClassVar[str] = "rms_l1"

    def __post_init__(self) -> None:
        self.require(self.l1 >= 0, "l1, not negative")
        self.require(self.l1_on in ("h", "f"), "l1_on: h or f")


def rms_normalise(h: Tensor) -> Tensor:
    """h / rms(h) over the last axis: every code gets a mean square of 1 (audio-latent SAE paper, eq. 2)."""
    return h / torch.sqrt((h * h).mean(-1, keepdim=True) + EPS)


class _Autoencode(Function):
    """(z, W_enc, b_enc, W_dec, b_dec, on_f) -> ẑ, the code's L1 norm summed over the batch, and h.

    h = relu(z W + b), r = 1 / rms(h), ẑ = (h r) W_dec + b_dec.

    Five dense products instead of six and no code f in memory: r scales rows, so it commutes with W_dec, and
    Σ_j ∂L/∂f_j h_j = ∂L/∂ẑ · (h W_dec) needs no pass over the features.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, on_f: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.addmm(b_enc, z, w_enc.T).relu_()
        r = (torch.linalg.vector_norm(h, dim=1).square() / h.shape[1] + EPS).rsqrt()
        product = h @ w_dec
        sums = h.sum(1)
        ctx.save_for_backward(z, h, r, product, sums, w_dec)
        ctx.on_f = on_f
        ctx.mark_non_differentiable(h)
        return torch.addcmul(b_dec, product, r[:, None]), (r * sums if on_f else sums).sum(), h

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_norm: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        z, h, r, product, sums, w_dec = ctx.saved_tensors
        slope = r**3 / h.shape[1]  # −∂r/∂h_j = slope h_j
        pull = (g * product).sum(1) * slope
        push = g_norm.expand_as(r)
        if ctx.on_f:
            pull, push = pull + g_norm * sums * slope, push * r
        scaled = g * r[:, None]
        gradient = torch.addmm(push[:, None], scaled, w_dec.T)  # of h: ∂ẑ/∂f, ∂f/∂h and the penalty …
        gradient.addcmul_(h, pull[:, None], value=-1)  # … with the norm's own part …
        gradient = torch.ops.aten.threshold_backward(gradient, h, 0)  # … where the ReLU is open
        return None, gradient.T @ z, gradient.sum(0), h.T @ scaled, g.sum(0), None


@register
class RmsL1SAE(SAE):
    """f = RMSNorm(relu(W z + b)), ẑ = f W_dec + b_dec; loss (‖z − ẑ‖² + λ ‖h‖₁ or ‖f‖₁) / d, a mean over frames.

    f ignores the scale of h, so an L1 on h can be dodged by shrinking h: read the L0 in the log.
    """

    Config = RmsL1Config
    config: RmsL1Config

    def __init__(self, config: RmsL1Config, mean: Any, std: Any):
        super().__init__(config, mean, std)
        # Codes have norm √m whatever the frame, so the directions start short enough for ẑ to be z-sized.
        self.W_dec.data *= config.d_in / config.d_sae

    def _code(self, z: Tensor) -> Tensor:
        return rms_normalise(torch.relu(torch.addmm(self.b_enc, z, self.W_enc.T)))

    def _step(self, z: Tensor, dead: Tensor | None) -> Step:
        rebuilt, norm, h = _Autoencode.apply(
            z, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.config.l1_on == "f"
        )
        squared = (z - rebuilt).square().sum()
        loss = (squared + self.config.l1 * norm) / z.numel()
        counted = h[:: max(1, len(h) // COUNTED)]
        active = float(torch.count_nonzero(counted)) * len(h) / len(counted)
        return Step(loss, squared.detach(), active, h.amax(0) > 0)
