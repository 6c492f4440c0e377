"""SAEs of random weights in which every weight matters."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eqknobs.sae import SAE, make_config, new_sae

D, M, N, K = 24, 96, 400, 6
VARIANTS = {
    "topk": {"k": K},
    "batchtopk": {"k": K},
    "jumprelu": {"l0": K, "lr": 3e-4},
    "rms_l1": {"l1": 0.1, "l1_on": "f"},
}


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def latents() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raw latents [N, D], their mean and deviation [D], both far from 0 and 1 and different in every dimension."""
    mean, std = 30 * rng().standard_normal(D), np.exp(rng().uniform(-3, 3, D))
    return (mean + std * rng().standard_normal((N, D))).astype(np.float32), mean, std


def write_sae(folder: Path, variant: str, **changes: Any) -> SAE:
    """An SAE in which every weight matters: none is 0, encoder and decoder differ. changes: tensors to replace."""
    _, mean, std = latents()
    sae = new_sae(make_config({"variant": variant, "d_in": D, "d_sae": M} | VARIANTS[variant]), mean, std)
    state = {name: rng().standard_normal(tuple(t.shape)) for name, t in sae.state_dict().items()}
    state["W_enc"] += 0.5 * rng().permuted(state["W_enc"], axis=0)
    if variant != "rms_l1":
        state["W_dec"] /= np.linalg.norm(state["W_dec"], axis=1, keepdims=True)
    if "threshold" in state:
        state["threshold"] = rng().uniform(4, 8, np.shape(state["threshold"]))
    state |= {"mean": mean, "std": std} | changes
    sae.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    sae.save(folder)
    return sae.requires_grad_(False)
