"""A random network of the same shape: what a layer shows of its input without having learnt anything."""

import torch
from torch import Tensor, nn

from eqknobs.models.moshi.network import MoshiNet
from eqknobs.models.moshi.quantise import Linear, put_module, weight_of, with_weight


def randomise(net: MoshiNet, seed: int) -> None:
    """Put normal values of the same standard deviation in place of every matrix of the temporal transformer and of its
    embeddings; gains of norms stay. Packed linears are packed again."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(weight: Tensor) -> Tensor:
        values = torch.randn(weight.shape, generator=generator) * float(weight.float().std())
        return values.to(weight.device, weight.dtype)

    for embedding in (net.text_emb, *net.emb):
        weight = embedding.weight.data
        weight.copy_(drawn(weight))
    stack = net.transformer
    for name, module in list(stack.named_modules()):
        if isinstance(module, nn.Linear):
            linear: Linear = module
            put_module(stack, name, with_weight(linear, drawn(weight_of(linear))))
