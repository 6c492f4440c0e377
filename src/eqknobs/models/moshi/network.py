"""Moshi's two transformers (Défossez et al. 2024, arXiv 2410.00037) with every linear called as a module.

So a linear can be replaced by another module (4 bits), hooked, or lose rows and columns. Module names are the names of
the tensors in kyutai's checkpoints, but for the attention's projections: `in_proj.weight`, and one module a step in
the depformer. Sites: the output of `transformer.layers.<l>` [B, T, dim] and the input of its `self_attn.out_proj`
[B, T, heads * head_dim], head after head.

A *column* is what the temporal transformer reads at one step: 17 tokens, each stream delayed by its own delay. Column 0
holds the initial tokens; column t + 1 of an undelayed stream holds frame t. Token -1 reads as zeros.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.config import MoshiConfig


class Logits(NamedTuple):
    """Teacher-forced logits aligned with the codes: entry t predicts frame t. Entries of delayed streams that would
    lie beyond the end are NaN."""

    text: Tensor  # [B, T, text_card]
    audio: Tensor | None  # [B, 8, T, card]; None without the depformer


class RMSNorm(nn.Module):
    """x / rms(x) * alpha in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(1e-8 + wide.square().mean(-1, keepdim=True))
        return (wide * (self.alpha.float() * scale)).to(x.dtype)


class Gating(nn.Module):
    """SiLU-gated feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(silu(gate) * value)


class KVCache:
    """Roped keys and values of the last columns, a ring for every layer.

    `columns`: how many will be fed; memory is that of min(columns, context). `length`: columns fed so far. `first` [B]:
    the column in which each row begins, None where that is column 0; a row sees nothing of the columns before.
    """

    def __init__(self, net: "MoshiNet", batch: int, columns: int, first: Tensor | None = None):
        config, self.first = net.config, first
        self.columns, self.capacity, self.length = columns, min(columns, config.context), 0
        self.rings = [
            torch.zeros(
                (2, batch, len(layer.self_attn.heads), self.capacity, config.head_dim),
                dtype=net.dtype,
                device=net.device,
            )
            for layer in net.layers
        ]

    def room(self) -> int:
        """Columns that can be fed at once: what is left before the ring closes, afterwards one.

        Raises EqknobsError if all `columns` were fed.
        """
        if self.length >= self.columns:
            raise EqknobsError(f"the KV cache was made for {self.columns} columns and is full; ask for more")
        return max(1, self.capacity - self.length)

    def visible(self, steps: int) -> Tensor | None:
        """What the next `steps` columns see of what will be stored [B, 1, steps, stored]; None: all of it."""
        newest = self.length + steps - 1
        if self.first is None:
            if not self.length or steps == 1:
                return None  # plain causal attention
            return torch.ones(steps, newest + 1, dtype=torch.bool, device=self.rings[0].device).tril_(self.length)
        slots = torch.arange(min(newest + 1, self.capacity), device=self.first.device)
        stored = newest - (newest - slots) % self.capacity  # the column in each slot
        now = torch.arange(self.length, newest + 1, device=self.first.device)[:, None]
        begun = (stored >= self.first[:, None, None]) & (stored <= now)
        return (begun | (stored == now))[:, None]  # a column that no one sees sees itself: softmax of nothing is NaN

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, heads, T, head_dim] at the end; returns all that is stored, T included."""
        slot = self.length % self.capacity
        ring, count = self.rings[layer], keys.shape[2]
        ring[0, :, :, slot : slot + count] = keys
        ring[1, :, :, slot : slot + count] = values
        used = min(self.length + count, self.capacity)
        return ring[0, :, :, :used], ring[1, :, :, :used]


class Attention(nn.Module):
    """Causal attention over `context` columns; `heads`: the original numbers of the heads that are left.

    Without any head there are no projections (None), and the layer skips attention. `bias` [dim], None unless heads
    were removed with their mean output: what the layer adds in their place.
    """

    bias: nn.Parameter | None

    def __init__(self, config: MoshiConfig, heads: tuple[int, ...]):
        super().__init__()
        self.heads, self.head_dim = heads, config.head_dim
        width = len(heads) * config.head_dim
        self.in_proj = nn.Linear(config.dim, 3 * width, bias=False) if heads else None
        self.out_proj = nn.Linear(width, config.dim, bias=False) if heads else None
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        in_proj, out_proj = self.in_proj, self.out_proj
        assert in_proj is not None and out_proj is not None
        batch, steps, _ = x.shape
        projected = in_proj(x).view(batch, steps, 3, len(self.heads), self.head_dim)
        pairs = torch.view_as_complex(projected[:, :, :2].float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
        queries, keys = turned.permute(2, 0, 3, 1, 4)
        values = projected[:, :, 2].transpose(1, 2)
        if cache is not None:
            keys, values = cache.add(layer, keys, values)
        causal = mask is None and steps > 1
        mixed = scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        return out_proj(mixed.transpose(1, 2).reshape(batch, steps, -1))


class Layer(nn.Module):
    """Temporal layer: attention, which a layer without heads skips, then the feed-forward layer."""

    def __init__(self, config: MoshiConfig, heads: tuple[int, ...]):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.dim), RMSNorm(config.dim)
        self.self_attn = Attention(config, heads)
        self.gating = Gating(config.dim, config.hidden)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        if self.self_attn.heads:
            x = x + self.self_attn(self.norm1(x), rotation, mask, cache, layer)
        if self.self_attn.bias is not None:
            x = x + self.self_attn.bias
        return x + self.gating(self.norm2(x))


class DepAttention(nn.Module):
    """Attention over the steps of one frame, with weights of its own for every step and no positions."""

    def __init__(self, config: MoshiConfig, steps: int):
        super().__init__()
        self.heads, dim = config.dep_heads, config.dep_dim
        self.in_projs = nn.ModuleList(nn.Linear(dim, 3 * dim, bias=False) for _ in range(steps))
        self.out_projs = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(steps))

    def forward(self, x: Tensor, first: int, past: Tensor | None) -> Tensor:
        batch, steps, dim = x.shape
        projected = _by_step(self.in_projs, x, first).view(batch, steps, 3, self.heads, dim // self.heads)
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)
        if past is not None:
            past[0, :, :, first : first + steps], past[1, :, :, first : first + steps] = keys, values
            keys, values = past[:, :, :, : first + steps]
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=steps > 1)
        return _by_step(self.out_projs, mixed.transpose(1, 2).reshape(batch, steps, dim), first)


class DepLayer(nn.Module):
    """Layer of the depformer."""

    def __init__(self, config: MoshiConfig, steps: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.dep_dim), RMSNorm(config.dep_dim)
        self.self_attn = DepAttention(config, steps)
        self.gating = nn.ModuleList(Gating(config.dep_dim, config.dep_hidden) for _ in range(steps))

    def forward(self, x: Tensor, first: int, past: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.norm1(x), first, past)
        return x + _by_step(self.gating, self.norm2(x), first)


def _by_step(modules: nn.ModuleList, x: Tensor, first: int) -> Tensor:
    """Step i of [B, steps, width] through module first + i."""
    if x.shape[1] == 1:
        return modules[first](x)
    # as matrices: PyTorch takes slices [batch, 1, width] for a batch of products, which is slower
    return torch.stack([modules[first + i](x[:, i]) for i in range(x.shape[1])], dim=1)


class MoshiNet(nn.Module):
    """Temporal transformer and depformer.

    `heads[l]`: the original numbers of the heads that layer l has left, by default all. Tensors are float or bfloat16
    on one device; linears may be packed in 4 bits (`eqknobs.models.moshi.quantise`), linears and embeddings in 2 to 8
    (`eqknobs.packing.modules`). steps: of the depformer, by default one for each of the agent's codebooks.
    """

    def __init__(self, config: MoshiConfig, heads: tuple[tuple[int, ...], ...] | None = None, steps: int | None = None):
        super().__init__()
        self.config = config
        heads = heads or (tuple(range(config.heads)),) * config.layers
        self.emb = nn.ModuleList(nn.Embedding(config.card + 1, config.dim) for _ in range(config.streams - 1))
        self.text_emb = nn.Embedding(config.text_card + 1, config.dim)
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(Layer(config, kept) for kept in heads)})
        self.out_norm = RMSNorm(config.dim)
        self.text_linear = nn.Linear(config.dim, config.text_card, bias=False)
        count, codes = steps or config.codebooks, config.card
        self.depformer_in = nn.ModuleList(nn.Linear(config.dim, config.dep_dim, bias=False) for _ in range(count))
        self.depformer_emb = nn.ModuleList(nn.Embedding(codes + 1, config.dep_dim) for _ in range(1, count))
        self.depformer_text_emb = nn.Embedding(config.text_card + 1, config.dep_dim)
        layers = nn.ModuleList(DepLayer(config, count) for _ in range(config.dep_layers))
        self.depformer = nn.ModuleDict({"layers": layers})
        self.linears = nn.ModuleList(nn.Linear(config.dep_dim, codes, bias=False) for _ in range(count))

    @property
    def layers(self) -> Sequence[Layer]:
        return cast(Sequence[Layer], self.transformer["layers"])

    @property
    def dep_layers(self) -> Sequence[DepLayer]:
        return cast(Sequence[DepLayer], self.depformer["layers"])

    @property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """Layer by layer, the original numbers of the heads that are left."""
        return tuple(layer.self_attn.heads for layer in self.layers)

    @property
    def steps(self) -> int:
        """Steps that the depformer has: a code of the agent each."""
        return len(self.linears)

    @property
    def dtype(self) -> torch.dtype:
        return self.out_norm.alpha.dtype  # is never packed

    @property
    def device(self) -> torch.device:
        return self.out_norm.alpha.device

    def initial(self) -> Tensor:
        """Column 0: the initial tokens [17]."""
        config = self.config
        return torch.tensor([config.text_card] + [config.card] * (config.streams - 1), device=self.device)

    def columns(self, codes: Tensor) -> Tensor:
        """Columns [B, 17, T + 1] of codes [B, 17, T]: every stream delayed, initial tokens in front."""
        batch, streams, frames = codes.shape
        if streams != self.config.streams:
            raise EqknobsError(f"Moshi takes codes [batch, {self.config.streams}, frames], got {list(codes.shape)}")
        columns = self.initial()[None, :, None].repeat(batch, 1, frames + 1)
        for stream, delay in enumerate(self.config.delays):
            columns[:, stream, 1 + delay :] = codes[:, stream, : frames - delay]
        return columns

    def embed(self, columns: Tensor) -> Tensor:
        """Sum of the 17 embeddings [B, S, dim] of columns [B, 17, S]."""
        rows, given = columns.clamp(min=0), (columns >= 0)[..., None]
        total = self.emb[0](rows[:, 1]) * given[:, 1]
        for i in range(1, self.config.streams - 1):
            total = total + self.emb[i](rows[:, i + 1]) * given[:, i + 1]
        return total + self.text_emb(rows[:, 0]) * given[:, 0]

    def temporal(self, x: Tensor, cache: KVCache | None = None, layers: int | None = None) -> Tensor:
        """Hidden states [B, S, dim] of embedded columns, normalised for the heads that read them.

        With a cache the columns go on from those fed before. `layers`: run only so many, for their hooks.
        """
        if cache is None:
            steps, context = x.shape[1], self.config.context
            mask = None
            if steps > context:  # beyond the context, attention is a band
                near = torch.ones(steps, steps, dtype=torch.bool, device=x.device)
                mask = near.tril_().triu_(1 - context)
            return self._run(x, mask, None, 0, layers)
        out, start = [], 0
        while start < x.shape[1]:
            piece = x[:, start : start + cache.room()]
            steps = piece.shape[1]
            out.append(self._run(piece, cache.visible(steps), cache, cache.length, layers))
            cache.length += steps
            start += steps
        return torch.cat(out, dim=1)

    def _run(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, start: int, layers: int | None) -> Tensor:
        pairs = self.config.head_dim // 2
        frequencies = torch.exp(
            torch.arange(pairs, device=x.device, dtype=torch.float32) * (-math.log(self.config.max_period) / pairs)
        )
        times = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)[:, None, None, None]
        angles = frequencies * times
        rotation = torch.complex(angles.cos(), angles.sin())  # Su et al. 2021, arXiv 2104.09864
        for i, layer in enumerate(self.layers[:layers]):
            x = layer(x, rotation, mask, cache, i)
        return self.out_norm(x)

    def forward(self, codes: Tensor, depformer: bool = True) -> Logits:
        """Teacher-forced logits of codes [B, 17, T] (int64, -1: nothing). Raises EqknobsError for another shape."""
        columns = self.columns(codes)
        hidden = self.temporal(self.embed(columns[:, :, :-1]))
        audio = None
        if depformer:
            audio = self.audio_logits(hidden, columns[:, :, 1:])
            for stream, delay in enumerate(self.config.delays[self.config.agent][: self.steps]):
                if delay:
                    audio[:, stream] = audio[:, stream].roll(-delay, dims=1)
                    audio[:, stream, -delay:] = math.nan
        return Logits(self.text_linear(hidden), audio)

    def audio_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Depformer's logits [B, 8, S, card]: hidden states [B, S, dim], columns that they predict [B, 17, S].

        Of a shortened depformer (`interventions.first_codebooks`) those of its steps.
        """
        batch, steps, _ = hidden.shape
        inputs = [self._dep_input(k, hidden, targets[:, k]) for k in range(self.steps)]
        x = torch.stack(inputs, dim=2).flatten(0, 1)
        for layer in self.dep_layers:
            x = layer(x, 0)
        return torch.stack([linear(x[:, k]).view(batch, steps, -1) for k, linear in enumerate(self.linears)], dim=1)

    def _dep_input(self, k: int, hidden: Tensor, token: Tensor) -> Tensor:
        """Input [B, S, dep_dim] of depformer step k: hidden states and the token [B, S] of the stream before."""
        embedding = self.depformer_emb[k - 1] if k else self.depformer_text_emb
        return self.depformer_in[k](hidden) + embedding(token.clamp(min=0)) * (token >= 0)[..., None]

    def step(self, column: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """One column [B, 17] on top of the cache: hidden state [B, dim] and text logits [B, text_card]."""
        hidden = self.temporal(self.embed(column[:, :, None]), cache)
        return hidden[:, 0], self.text_linear(hidden)[:, 0]

    def audio_step(self, hidden: Tensor, text: Tensor, forced: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """The agent's 8 codes [B, 8] of the column after `hidden` [B, dim], one after another; -1 beyond `steps`.

        text [B]: that column's text token; forced [B, 8]: tokens to take instead of choosing, -2 where there are none;
        choose: from logits [B, card] to tokens [B], called for every codebook.
        """
        config, batch = self.config, len(hidden)
        shape = (2, batch, config.dep_heads, config.codebooks, config.dep_dim // config.dep_heads)
        pasts = [hidden.new_empty(shape) for _ in range(config.dep_layers)]
        token, chosen = text, []
        for k in range(config.codebooks):
            if k < self.steps:
                x = self._dep_input(k, hidden[:, None], token[:, None])
                for layer, past in zip(self.dep_layers, pasts):
                    x = layer(x, k, past)
                token = choose(self.linears[k](x)[:, 0])
            else:
                token = torch.full_like(token, -1)
            token = torch.where(forced[:, k] == -2, token, forced[:, k])
            chosen.append(token)
        return torch.stack(chosen, dim=1)
