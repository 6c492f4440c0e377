"""Linear probes of many feature matrices at once, in closed form: every layer, every attention head.

A probe is a linear discriminant (Fisher 1936; Hastie et al. 2009, section 4.3): the softmax-linear map that is best
where the classes are Gaussian with one covariance. It needs no steps, so a thousand heads are a few batched products.
Accuracies are within a point of logistic regression (`benchmarks/lm_heads.py`).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from eqknobs.stages.probes.compute import SCORED, LabelledFrames

# Of the mean variance, added to the covariance's diagonal; the one that tells most val frames right is taken.
SHRINKAGES = (0.03, 0.3, 3.0, 30.0)
BLOCK_BYTES = 1 << 30  # of one block of matrices and what is made of them


def blocks(names: Sequence[str], rows: int, width: int) -> Iterator[list[str]]:
    """Names in blocks, so that matrices float32 [rows, width] and three of [width, width] of each fit `BLOCK_BYTES`."""
    count = max(1, BLOCK_BYTES // (4 * width * (2 * rows + 3 * width)))
    for start in range(0, len(names), count):
        yield list(names[start : start + count])


@torch.no_grad()
def told_right(x: Tensor, labels: np.ndarray, truth: np.ndarray, classes: int, frames: LabelledFrames) -> np.ndarray:
    """Whether the probe of each matrix tells the class of each frame of val and test, bool [G, frames of `scored`].

    x: float32 [G, n, width], on the device that is to fit; labels, truth: int [n], what is learnt (maybe shuffled) and
    what is right. Fitted on train; the shrinkage is chosen on val, for each matrix by itself (of equals the smallest).
    """
    y, right = (torch.from_numpy(np.asarray(values, np.int64)).to(x.device) for values in (labels, truth))
    positions = (frames.of("train"), frames.of("val"), scored(frames))
    train, val, places = (torch.from_numpy(at).to(x.device) for at in positions)
    best: Tensor | None = None
    chosen_on = x.index_select(1, val)
    for weights, bias in _discriminants(x.index_select(1, train), y[train], classes):
        hits = (torch.baddbmm(bias, chosen_on, weights).argmax(-1) == y[val]).sum(1)
        if best is None:
            best, kept, offset = hits, weights, bias
            continue
        better = hits > best
        best = torch.where(better, hits, best)
        kept, offset = (torch.where(better[:, None, None], a, b) for a, b in ((weights, kept), (bias, offset)))
    return (torch.baddbmm(offset, x.index_select(1, places), kept).argmax(-1) == right[places]).cpu().numpy()


def scored(frames: LabelledFrames) -> np.ndarray:
    """Positions of the frames of val and test."""
    return np.flatnonzero(np.isin(frames.split, SCORED))


def _discriminants(x: Tensor, y: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights [G, width, classes] and bias [G, 1, classes] for every shrinkage; x is centred in place."""
    mean, member = x.mean(1, keepdim=True), torch.nn.functional.one_hot(y, classes).to(x.dtype)
    x -= mean  # it is a copy of our own
    counts = member.sum(0)
    means = x.transpose(1, 2) @ member / counts.clamp(min=1)
    shares = counts / len(y)
    total = torch.bmm(x.transpose(1, 2), x) / len(y)
    within = total - torch.bmm(means * shares, means.transpose(1, 2))
    # Where the classes are all that varies, rounding is what is left within them.
    usual, least = (matrix.diagonal(dim1=1, dim2=2).mean(1) for matrix in (within, 1e-3 * total))
    usual = torch.maximum(usual, least).clamp(min=1e-30)
    identity = torch.eye(x.shape[2], device=x.device)
    for shrinkage in SHRINKAGES:
        factor = torch.linalg.cholesky(within + (shrinkage * usual)[:, None, None] * identity)
        weights = torch.cholesky_solve(means, factor)
        bias = shares.log() - (means * weights).sum(1) / 2  # a class that train lacks: −inf
        yield weights, bias[:, None] - mean @ weights
