"""What makes a sparse code cheap: products that touch only the features that fire.

With B frames, m features and L0 ≪ m, one dense product (the pre-activations) and four sparse ones do the work of the
six dense products that autograd needs. Codes are in CSR form: `Pattern` says where they are, a tensor of values [n]
what they are. Gradients are written out by hand and checked by `torch.autograd.gradcheck` in the tests.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
GROUP = 8  # columns in a group of `row_top_k`


@dataclass(frozen=True)
class Pattern:
    """Places of n entries in a [frames, features] matrix, row by row: `crow` int64 [frames + 1] says where each row
    starts, `cols` int64 [n] names the features."""

    crow: Tensor
    cols: Tensor
    features: int

    @property
    def frames(self) -> int:
        return len(self.crow) - 1

    @cached_property
    def rows(self) -> Tensor:
        """The frame of each entry, int64 [n]."""
        return torch.repeat_interleave(torch.arange(self.frames, device=self.crow.device), self.crow.diff())

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the transposed matrix: the order of its entries, where its rows start, its columns."""
        order = torch.argsort(self.cols, stable=True)
        crow = torch.zeros(self.features + 1, dtype=torch.int64, device=self.cols.device)
        torch.cumsum(torch.bincount(self.cols, minlength=self.features), 0, out=crow[1:])
        return order, crow, self.rows[order]

    def matrix(self, values: Tensor) -> Tensor:
        """The CSR matrix [frames, features] with these values [n]."""
        size = (self.frames, self.features)
        return torch.sparse_csr_tensor(self.crow, self.cols, values, size, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """The CSR matrix [features, frames] with these values [n]."""
        order, crow, frames = self._by_feature  # both weights' gradients want it: sorted once
        size = (self.features, self.frames)
        return torch.sparse_csr_tensor(crow, frames, values[order], size, check_invariants=False)

    def per_feature(self, values: Tensor) -> Tensor:
        """Sum of the values [n] of each feature, [features]."""
        return torch.bincount(self.cols, values.double(), self.features).to(values.dtype)

    def dense(self, values: Tensor) -> Tensor:
        """The dense matrix [frames, features]."""
        return values.new_zeros(self.frames, self.features).index_put((self.rows, self.cols), values)


class _EncodeAt(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern, values: Tensor | None) -> Tensor:
        if values is None:
            values = (z[pattern.rows] * weight[pattern.cols]).sum(1) + bias[pattern.cols]
        ctx.save_for_backward(z)
        ctx.pattern = pattern
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return None, ctx.pattern.transposed(gradient) @ z, ctx.pattern.per_feature(gradient), None, None


def encode_at(z: Tensor, weight: Tensor, bias: Tensor, pattern: Pattern, values: Tensor | None = None) -> Tensor:
    """Pre-activations z·W + b at the places of a pattern, [n], differentiable in weight [m, d] and bias [m].

    z is [frames, d]. `values`: the same numbers where they are known already (picked from the dense product).
    """
    return _EncodeAt.apply(z, weight, bias, pattern, values)


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return pattern.matrix(values) @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_values = to_weight = None
        if ctx.needs_input_grad[0]:
            empty = ctx.pattern.matrix(torch.zeros_like(values))
            to_values = torch.sparse.sampled_addmm(empty, gradient, weight.T, beta=0.0).values()
        if ctx.needs_input_grad[1]:
            to_weight = ctx.pattern.transposed(values) @ gradient
        return to_values, to_weight, None


def decode(values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """Code [frames, m] (values [n] at the places of a pattern) times weight [m, d]: [frames, d], differentiable."""
    return _Decode.apply(values, weight, pattern)


# ---------------------------------------------------------------- selection


def row_top_k(h: Tensor, k: int) -> tuple[Pattern, Tensor]:
    """The k largest entries of each row of h [B, m]: their places, by column, and values [B k].

    They lie in the k groups of columns with the largest maxima, so only those groups are looked through. NumPy's
    partition takes half the time of PyTorch's topk.
    """
    frames, features = h.shape
    groups = features // GROUP
    if features % GROUP == 0 and groups >= 2 * k:
        grouped = h.view(frames, GROUP, groups)  # column c is in group c % groups
        chosen = _largest(grouped.amax(1), k)
        candidates = grouped.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1)
        found = _largest(candidates, k)
        cols = found // k * groups + chosen.gather(1, found % k)
    else:
        cols = _largest(h, k)
    cols = cols.sort(dim=1).values if cols.is_cuda else torch.from_numpy(np.sort(cols.numpy(), axis=1))
    values = h.gather(1, cols)
    crow = torch.arange(0, frames * k + 1, k, device=h.device)
    return Pattern(crow, cols.reshape(-1), features), values.reshape(-1)


def _largest(h: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row, in no order, int64 [B, k]."""
    if h.is_cuda:
        return h.topk(k, dim=1, sorted=False).indices
    return torch.from_numpy(np.argpartition(h.numpy(), h.shape[1] - k, axis=1)[:, h.shape[1] - k :])


def above(h: Tensor, threshold: float | Tensor) -> tuple[Pattern, Tensor]:
    """The entries of h [B, m] above a threshold (a number, or [m]): their places and values."""
    frames, features = h.shape
    limit = threshold.numpy() if isinstance(threshold, Tensor) else threshold
    flat = np.flatnonzero(h.numpy() > limit)
    return _pattern(flat, frames, features), torch.from_numpy(h.numpy().reshape(-1)[flat])


def places(mask: Tensor) -> Pattern:
    """Where a mask [B, m] is set."""
    return _pattern(np.flatnonzero(mask.numpy()), *mask.shape)


def _pattern(flat: np.ndarray, frames: int, features: int) -> Pattern:
    rows, cols = np.divmod(flat, features)
    crow = np.zeros(frames + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=frames), out=crow[1:])
    return Pattern(torch.from_numpy(crow), torch.from_numpy(cols), features)


def batch_top_k(h: Tensor, count: int, hint: float = 0.0) -> tuple[Pattern, Tensor, float]:
    """The `count` largest positive entries of all of h [B, m]: places, values, and the smallest value kept.

    `hint` is a guess somewhat below that smallest value (the last step's, say): only entries above it are sorted. The
    answer does not depend on it. Of equal values the first in row order are kept.
    """
    frames, features = h.shape
    all_values = h.numpy().reshape(-1)
    for limit in dict.fromkeys((max(0.0, hint), 0.0)):
        flat = np.flatnonzero(all_values > limit)
        if len(flat) >= count:
            break
    values = all_values[flat]
    if len(flat) > count:
        smallest = np.partition(values, len(values) - count)[len(values) - count]
        kept = values > smallest
        ties = np.flatnonzero(values == smallest)[: count - kept.sum()]
        kept[ties] = True
        flat, values = flat[kept], values[kept]
    smallest = float(values.min()) if len(values) else 0.0
    return _pattern(flat, frames, features), torch.from_numpy(values), smallest
