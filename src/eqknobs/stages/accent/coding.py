"""Sparse codes of pooled vectors: the grid of SAEs, what is made of their codes, and what they are held against.

The SAE is `eqknobs.sae`'s TopK as OpenAI trains it (Gao et al. 2024), with what the paper leaves out taken out: no bias
of the encoder, no scaling of the input, no decay of the learning rate.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA

from eqknobs.sae.base import make_config
from eqknobs.sae.training import Trainer, epoch_order

LOOKS = 10  # times that half 1 is looked at in a training
FLAT = 0.01  # by how much at most its loss falls over the last look but one, where training is done
BLOCK = 4096


class SaeCfg(TypedDict):
    """How an SAE is trained (`settings.yaml`)."""

    lr: float
    tuned_lr: list[float]  # tried at the reference cell, chosen on half 1
    epochs: int
    long: NotRequired[dict[str, Any]]  # ratios, sparsities -> epochs
    batch_size: int
    aux_k: int
    dead_epochs: float


@dataclass(frozen=True)
class Cell:
    """A size and a sparsity: q = d_z / d, and k of d_z; kind: grid | equal_k | equal_share."""

    q: float
    k: int
    kind: str = "grid"
    s: float = math.nan  # k / d as configured, of the grid


@dataclass
class Coded:
    """What an SAE makes of the clips: codes [clips, d_z] of half 2 and of test, and how good it is."""

    train: csr_matrix
    test: csr_matrix
    about: dict[str, Any] = field(default_factory=dict)


def grid_cells(d: int, ratios: list[float], sparsities: list[float]) -> list[Cell]:
    """All of q × s: k = ⌈s · d⌉ of d_z = q · d."""
    return [Cell(q, math.ceil(s * d - 1e-9), "grid", s) for q in sorted(ratios) for s in sorted(sparsities)]


def equal_cells(d: int, q: float, ks: list[int], shares: list[float]) -> list[Cell]:
    """The same k for every codec, and the same k / d_z."""
    width = round(q * d)
    return [
        *(Cell(q, k, "equal_k") for k in sorted(ks) if k <= width),
        *(Cell(q, max(1, math.ceil(share * width - 1e-9)), "equal_share") for share in sorted(shares)),
    ]


def layer_norm(u: np.ndarray) -> np.ndarray:
    """Each vector less its own mean, by its own deviation: what OpenAI's code does to the input of TopK models."""
    return ((u - u.mean(1, keepdims=True)) / (u.std(1, keepdims=True) + 1e-5)).astype(np.float32)


def _epochs(cell: Cell, cfg: SaeCfg) -> int:
    longer = cfg.get("long")
    if longer and cell.q in longer["ratios"] and cell.s in longer["sparsities"]:
        return int(longer["epochs"])
    return cfg["epochs"]


def new_trainer(
    u: np.ndarray,
    cell: Cell,
    cfg: SaeCfg,
    seed: int,
    lr: float | None = None,
    latent_bias: bool = False,
    device: str = "cpu",
) -> Trainer:
    """An SAE of a cell before its first step, started on the train vectors u [n, d]."""
    config = make_config(
        {
            "variant": "topk",
            "d_in": u.shape[1],
            "d_sae": round(cell.q * u.shape[1]),
            "k": cell.k,
            "aux_k": cfg["aux_k"],
            "dead_epochs": cfg["dead_epochs"],
            "lr": cfg["lr"] if lr is None else lr,
            "batch_size": cfg["batch_size"],
            "epochs": _epochs(cell, cfg),
            "seed": seed,
            "input_scale": "raw",
        }
    )
    steps = config.epochs * -(-len(u) // config.batch_size)
    zeros = np.zeros(u.shape[1])
    # Twice the steps: the engine lets the learning rate fall over the last fifth, the paper's stays.
    trainer = Trainer(config, zeros, zeros + 1, len(u), 2 * steps, device)
    trainer.sae._encoder_start = 1.0  # type: ignore[assignment] # Gao et al.: the encoder is the decoder transposed
    trainer.sae.b_enc.requires_grad_(latent_bias)
    trainer.start(u)
    return trainer


@torch.no_grad()
def squared_error(sae: Any, u: np.ndarray) -> float:
    """Σ ‖u − û‖² over vectors [n, d]."""
    found = 0.0
    for start in range(0, len(u), BLOCK):
        x = torch.from_numpy(u[start : start + BLOCK]).to(sae.mean.device)
        found += (x - sae._reconstruct(sae._code(x))).double().square().sum().item()
    return found


def train(trainer: Trainer, u: np.ndarray, half: np.ndarray) -> dict[str, Any]:
    """Train on u [n, d]; half: vectors of half 1, which watch the loss.

    Returns lr, loss (of half 1, mean squared error a vector) and flat: whether it fell by less than 1 % over the last
    tenth of the epochs.
    """
    config = trainer.config
    data = torch.from_numpy(u).to(trainer.device)
    rows = np.arange(len(u))
    every = max(1, config.epochs // LOOKS)
    losses = []
    for epoch in range(config.epochs):
        for batch in epoch_order(rows, config.seed, epoch, config.batch_size):
            trainer.step(data[batch])
        if (config.epochs - 1 - epoch) % every == 0:
            losses.append(squared_error(trainer.sae, half) / len(half))
    flat = len(losses) > 1 and losses[-2] - losses[-1] <= FLAT * losses[-2]
    return {"lr": config.lr, "loss": losses[-1], "flat": flat}


def fvu(sae: Any, u: np.ndarray) -> float:
    """Fraction of variance unexplained of vectors [n, d]."""
    total = float(((u - u.mean(0, dtype=np.float64)) ** 2).sum())
    return squared_error(sae, u) / total if total else math.nan


def density(codes: csr_matrix) -> dict[str, Any]:
    """How evenly features fire on clips [n, m]: Gini coefficient of their rates, effective number (the exponential of
    their entropy) and dead share; `rates`: 64 quantiles of the rates, falling."""
    rates = np.sort(np.asarray((codes > 0).mean(0)).ravel())
    total, m = rates.sum(), len(rates)
    gini = float((2 * np.arange(1, m + 1) - m - 1) @ rates / (m * total)) if total else math.nan
    p = rates[rates > 0] / total if total else rates[:0]
    curve = np.quantile(rates, np.linspace(1, 0, 64)).round(5)
    effective = float(np.exp(-(p * np.log(p)).sum())) if total else 0.0
    return {"gini": gini, "effective": effective, "dead": float((rates == 0).mean()), "rates": curve.tolist()}


def codes_of(sae: Any, u: np.ndarray) -> csr_matrix:
    """Codes float32 [n, d_z]."""
    return csr_matrix(sae.encode(u))


def positions(codes: csr_matrix) -> csr_matrix:
    """1 where a feature fires, [n, d_z]."""
    return (codes > 0).astype(np.float32)


def magnitudes(codes: csr_matrix, k: int) -> tuple[np.ndarray, float]:
    """The k kept values of each clip in falling order, [n, k], and the share of them that is padding: fewer than k
    positive ones."""
    dense = codes.toarray()
    kept = -np.sort(-dense, axis=1)[:, :k]
    return kept, float((kept <= 0).mean())


def top_of(u: np.ndarray, k: int) -> csr_matrix:
    """Of each vector (z-scored) [n, d] the k largest entries by size, the others 0."""
    kept = np.argsort(-np.abs(u), axis=1, kind="stable")[:, :k]
    found = np.zeros_like(u)
    np.put_along_axis(found, kept, np.take_along_axis(u, kept, 1), 1)
    return csr_matrix(found)


def principal(train_u: np.ndarray, k: int) -> PCA | None:
    """The first k principal components of the train vectors; None if there are not as many."""
    return PCA(k, svd_solver="full").fit(train_u) if k < min(train_u.shape) else None


def pooled_codes(sae: Any, frames: Any) -> csr_matrix:
    """Mean over time of the codes of each clip's frames, [clips, d_z]; frames: [frames, d], clip by clip."""
    return csr_matrix(np.array([sae.encode(one).mean(0) for one in frames]))
