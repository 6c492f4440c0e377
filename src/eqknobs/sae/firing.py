"""Which features fire on which frames, as sparse matrices: what stages that look at features begin with."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix, vstack

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.sae.base import SAE

BLOCK = 4096


class Firing(NamedTuple):
    """What fires when.

    on: frames × features, 1 where a feature fires, float32. clips: id, speaker, split and number of frames of each
    clip, whose frames follow one another in `on`.
    """

    on: csr_matrix
    clips: pd.DataFrame

    def bounds(self) -> np.ndarray:
        """First row of each clip, and the end of the last, [clips + 1]."""
        return np.concatenate([[0], np.cumsum(self.clips["frames"])])


@torch.no_grad()
def clip_codes(sae: SAE, raw: np.ndarray, k: float) -> csr_matrix:
    """The code [n, m] of a clip's raw activations: its k·n largest positive ones; by the SAE's own rule if k is 0."""
    if not k:
        return vstack([csr_matrix(sae.encode(raw[i : i + BLOCK])) for i in range(0, len(raw), BLOCK)], format="csr")
    z = sae._normalised(torch.from_numpy(raw))
    # Before they select, topk and batchtopk have these activations, and so has any SAE before its training.
    h = torch.relu((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc).numpy()
    kept = min(round(k * len(h)), int((h > 0).sum()))
    places = np.argpartition(h, h.size - kept, axis=None)[h.size - kept :] if kept else np.empty(0, np.int64)
    rows, columns = np.unravel_index(np.sort(places), h.shape)
    return csr_matrix((h[rows, columns], (rows, columns)), shape=h.shape)


def codes(cache: ActivationCache, sae: SAE, splits: Sequence[str], k: float) -> tuple[csr_matrix, pd.DataFrame]:
    """Codes [frames, m] of all frames of some splits, and their clips as in `Firing`, by id; k: features a frame,
    chosen clip by clip, or 0 for the SAE's own rule. Raises EqknobsError if there is no frame."""
    clips = cache.utterances[cache.utterances["split"].isin(splits)].sort_values("id")
    if not clips["frames"].sum():
        name = splits[0]
        raise EqknobsError(f"no {name} frames in the cache of {cache.attrs['site']}; raise data.splits.{name}")
    parts = [
        clip_codes(sae, np.array(cache.acts[clip.start : clip.start + clip.frames]), k) for clip in clips.itertuples()
    ]
    return vstack(parts, format="csr"), clips[["id", "speaker", "split", "frames"]].reset_index(drop=True)


def firing(cache: ActivationCache, sae: SAE, split: str, k: float) -> Firing:
    """Which features fire, as `codes` of one split has it."""
    found, clips = codes(cache, sae, [split], k)
    found.eliminate_zeros()
    return Firing(csr_matrix((np.ones(found.nnz, np.float32), found.indices, found.indptr), found.shape), clips)
