"""Sparse autoencoders: variants behind one interface, a sparse training engine, export.

A variant is one file: its frozen configuration, its code, its training step. `kernels` has the sparse products,
`training` the loop, `export` other libraries' file formats. What is measured afterwards: `eqknobs.stages.saes`.
"""

from eqknobs.sae import batchtopk, jumprelu, rms_l1, topk  # each registers its variant
from eqknobs.sae.base import SAE, VARIANTS, SAEConfig, make_config, new_sae
from eqknobs.sae.training import GridCfg, SAECfg, train_grid, train_sae

__all__ = [
    "SAE",
    "VARIANTS",
    "GridCfg",
    "SAECfg",
    "SAEConfig",
    "batchtopk",
    "jumprelu",
    "make_config",
    "new_sae",
    "rms_l1",
    "topk",
    "train_grid",
    "train_sae",
]
