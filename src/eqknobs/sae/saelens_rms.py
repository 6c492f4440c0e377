"""The `rms_l1` variant as a class of SAELens: import this before `SAE.load_from_disk` of such a folder.

Needs sae-lens (written against 6.54) and nothing else of this package, so the file can also be copied.
"""

from dataclasses import dataclass

import torch
from sae_lens import SAE, SAEConfig, register_sae_class
from torch import nn


@dataclass
class RmsL1SAEConfig(SAEConfig):
    """`eps`: what is added to the mean square under the root."""

    eps: float = 1e-8

    @classmethod
    def architecture(cls) -> str:
        return "rms_l1"


class RmsL1SAE(SAE[RmsL1SAEConfig]):
    """f = h / rms(h) with h = relu((x − b_dec) W_enc + b_enc), x̂ = f W_dec + b_dec; x [..., d_in], f [..., d_sae]."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        h = self.activation_fn(self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc))
        return self.hook_sae_acts_post(h / torch.sqrt((h * h).mean(-1, keepdim=True) + self.cfg.eps))

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def fold_W_dec_norm(self) -> None:
        """Raises NotImplementedError: the norm over all features undoes a scale of one in all the others."""
        raise NotImplementedError("rms_l1: folding the decoder's norms into the encoder changes the code")


register_sae_class("rms_l1", RmsL1SAE, RmsL1SAEConfig)
