"""Feature spaces that the probes compare: raw latents, PCA, random projection + TopK, SAE codes, log-mel."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np
import scipy.sparse
from numpy.typing import DTypeLike

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import array_hash, file_sha256
from eqknobs.sae import SAE

BLOCK = 4096  # rows worked on at a time
SPARSE_BELOW = 0.1  # share of non-zero features below which a matrix is kept in CSR
FLOAT32_BYTES = 1 << 29  # a dense matrix larger than this is kept in half precision
PARTS = ("base", "sae")
MEND = "train the SAE with a lower lr, or leave it out of probes.saes"
SAE_FILES = ("config.json", "sae.safetensors")
SAMPLE = 16384  # train frames on which the L0 of an SAE is measured

Matrix: TypeAlias = np.ndarray | scipy.sparse.csr_array


@dataclass(frozen=True)
class Space:
    """A map from the frames of a cache to `width` features.

    `features` takes rows of `source` (raw latents [n, d]; the `logmel` space: log-mel frames) and gives float32
    [n, width].
    """

    name: str
    width: int
    features: Callable[[np.ndarray], np.ndarray]
    source: np.ndarray
    made_of: tuple = ()  # plain values that, beside the cache, decide the features

    def matrix(self) -> Matrix:
        """Features of all N frames, computed once: CSR float32 if sparse, else dense float32, or float16 if large.

        Raises EqknobsError if one is not finite.
        """
        count = len(self.source)
        sample = self.features(np.array(self.source[:: max(1, count // 1024)]))
        if (sample != 0).mean() < SPARSE_BELOW:
            return scipy.sparse.vstack([scipy.sparse.csr_array(b) for b in self._blocks(np.float32)], format="csr")
        dense = np.empty((count, self.width), np.float32 if count * self.width * 4 <= FLOAT32_BYTES else np.float16)
        for i, block in enumerate(self._blocks(dense.dtype)):
            dense[i * BLOCK : (i + 1) * BLOCK] = block
        return dense

    def _blocks(self, dtype: DTypeLike) -> Iterator[np.ndarray]:
        for start in range(0, len(self.source), BLOCK):
            with np.errstate(over="ignore"):  # told in words
                block = self.features(np.array(self.source[start : start + BLOCK])).astype(dtype, copy=False)
            if not np.isfinite(block).all():
                raise EqknobsError(f"probes: the space {self.name} has values that are not finite; {MEND}")
            yield block


def make_spaces(
    cache: ActivationCache,
    sae_dirs: Mapping[str, Path],
    seed: int,
    labels_h5: str | Path | None = None,
    parts: Collection[str] = PARTS,
) -> dict[str, Space]:
    """Spaces of one target, fitted on its train frames; the cache must stay open while they are used.

    sae_dirs: SAE name -> folder of its first seed; seed: of the random projection. parts: `base` are all but
    the SAEs' codes, `sae` these. The reference SAE is the one of `sae_dirs` with the lowest L0 on train frames, so the
    order of the names does not matter.

    - raw: z-scored latents
    - pca_l0, pca_d: principal components of the z-scored train frames, min(L0 of the reference, d) and all d
    - random_topk: ReLU of a random projection, the k largest kept; width and k of the reference
      (without an SAE there is no reference, and neither of `pca_l0` and `random_topk`)
    - sae:<name>: the code of each SAE
    - logmel: the ceiling, from the labels file (only if `labels_h5` is given)

    Raises EqknobsError if the labels do not belong to this cache.
    """
    saes = {name: SAE.load(sae_dirs[name]) for name in sorted(sae_dirs)}
    spaces = _base_spaces(cache, saes, seed) if "base" in parts else []
    for name, sae in saes.items() if "sae" in parts else ():
        made_of = ("sae", *(file_sha256(sae_dirs[name] / file) for file in SAE_FILES))
        spaces.append(Space(f"sae:{name}", sae.config.d_sae, sae.encode, cache.acts, made_of))
    if labels_h5 is not None and "base" in parts:
        with h5py.File(labels_h5, "r", locking=False) as labels:
            logmel = labels["logmel"][:]
        if len(logmel) != len(cache.acts):
            raise EqknobsError(
                f"{labels_h5}: {len(logmel)} frames, but the cache has {len(cache.acts)}; make the labels again"
            )
        made_of = ("logmel", array_hash(logmel))
        spaces.append(Space("logmel", logmel.shape[1], lambda frames: np.asarray(frames, np.float32), logmel, made_of))
    return {space.name: space for space in spaces}


def _base_spaces(cache: ActivationCache, saes: dict[str, SAE], seed: int) -> list[Space]:
    """The spaces made of the latents alone; of the SAEs only the reference's size and L0 count."""
    mean, scale = cache.mean.astype(np.float32), cache.std.astype(np.float32)

    def z(acts: np.ndarray) -> np.ndarray:
        return (np.asarray(acts, np.float32) - mean) / scale

    def rotated(basis: np.ndarray, acts: np.ndarray) -> np.ndarray:
        return z(acts) @ basis

    width, acts = len(mean), cache.acts
    spaces = [Space("raw", width, z, acts, ("raw",))]
    rows = cache.rows("train")
    components = _principal_components(acts, rows, z)
    ranks = {"pca_d": width}
    if saes:
        sample = np.array(acts[rows[:: max(1, -(-len(rows) // SAMPLE))]])
        l0s = {name: mean_l0(sae, sample) for name, sae in saes.items()}
        reference = min(l0s, key=l0s.__getitem__)
        d_sae, k = saes[reference].config.d_sae, max(1, round(l0s[reference]))
        ranks = {"pca_l0": min(k, width), **ranks}
    for name, rank in ranks.items():
        basis = np.ascontiguousarray(components[:, :rank])
        spaces.append(Space(name, rank, partial(rotated, basis), acts, ("pca", rank)))
    if saes:
        projection = np.random.default_rng([seed, 7]).standard_normal((width, d_sae)).astype(np.float32)
        projection /= np.linalg.norm(projection, axis=0)
        made_of = ("random_topk", d_sae, k, seed)
        spaces.append(
            Space("random_topk", d_sae, lambda acts: top_k(np.maximum(z(acts) @ projection, 0), k), acts, made_of)
        )
    return spaces


def mean_l0(sae: SAE, raw: np.ndarray) -> float:
    """Mean number of active features on raw latents [N, d]."""
    active = sum((sae.encode(raw[i : i + BLOCK]) > 0).sum() for i in range(0, len(raw), BLOCK))
    return float(active / len(raw))


def top_k(h: np.ndarray, k: int) -> np.ndarray:
    """The k largest entries of each row of h [N, m], the others zero."""
    if k >= h.shape[1]:
        return h
    kept = np.argpartition(h, -k, axis=1)[:, -k:]
    code = np.zeros_like(h)
    np.put_along_axis(code, kept, np.take_along_axis(h, kept, axis=1), axis=1)
    return code


def _principal_components(acts: np.ndarray, rows: np.ndarray, z: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Eigenvectors [d, d] of the covariance of z-scored train rows, by falling variance, signs fixed."""
    covariance = np.zeros((acts.shape[1], acts.shape[1]))
    for start in range(0, len(rows), BLOCK):
        block = z(acts[rows[start : start + BLOCK]])
        covariance += block.T @ block
    vectors = np.linalg.eigh(covariance)[1][:, ::-1]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return (vectors * signs).astype(np.float32)
