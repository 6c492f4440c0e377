"""Sparse autoencoders: variants behind one interface, a sparse training engine, scores, export.

A variant is one file: its frozen configuration, its code, its training step. `kernels` has the sparse products,
`training` the loop, `scores` what is measured afterwards, `export` other libraries' file formats.
"""

from eqknobs.sae import batchtopk, jumprelu, rms_l1, topk  # each registers its variant
from eqknobs.sae.base import SAE, VARIANTS, SAEConfig, make_config, new_sae
from eqknobs.sae.scores import match_features, score_saes
from eqknobs.sae.training import train_grid, train_sae

__all__ = [
    "SAE",
    "VARIANTS",
    "SAEConfig",
    "batchtopk",
    "jumprelu",
    "make_config",
    "match_features",
    "new_sae",
    "rms_l1",
    "score_saes",
    "topk",
    "train_grid",
    "train_sae",
]
