"""Samples as columns that can be kept, taken out, or taken over from another clip."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from eqknobs.corpus.cache import ActivationCache
from eqknobs.sae import SAE
from eqknobs.stages.erasing.samples import Samples, all_clips, second_moment

CODED = ("features", "reconstruction")  # spaces whose columns are features


@dataclass(frozen=True)
class Space:
    """Columns of samples.

    values [n, width]; ranked [n, width]: what orders of the columns are made of; directions [width, d] and base [d], of
    a space whose columns are decoded: what each adds to the activations, and what they are without any.
    """

    name: str
    values: np.ndarray
    ranked: np.ndarray
    directions: np.ndarray | None = None
    base: np.ndarray | None = None

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def matrix(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """What a probe reads of samples where just these columns are left, [rows, ·]."""
        values = self.values[np.ix_(rows, columns)]
        return values if self.directions is None else self.base + values @ self.directions[columns]


def spaces_of(samples: Samples, sae: SAE, living: np.ndarray, axes: np.ndarray) -> dict[str, Space]:
    """By name: `features` (largest value over time), `reconstruction` (what mean codes decode to), `raw`, `pca`.

    living: the features that are looked at; axes: principal axes [d, d], in columns. Raises EqknobsError for an SAE of
    input_scale unit_norm, whose codes do not decode.
    """
    most, mean = samples.most[:, living], samples.mean[:, living]
    base = sae.decode(np.zeros((1, sae.config.d_sae), np.float32))[0]
    directions = (sae.W_dec * sae.std).numpy()[living]
    found = [Space("features", most, most), Space("reconstruction", mean, most, directions, base)]
    found += [Space(name, values, values) for name, values in (("raw", samples.raw), ("pca", samples.raw @ axes))]
    return {space.name: space for space in found}


def living_features(samples: Samples) -> np.ndarray:
    """Features that fire in train or val."""
    return np.flatnonzero((samples.most[(samples.about["split"] != "test").to_numpy()] > 0).any(0))


def principal_axes(cache: ActivationCache) -> np.ndarray:
    """Principal axes of the train clips of a cache, float64 [d, d], in columns, the widest first."""
    clips = all_clips(cache)
    clips = clips[clips["split"] == "train"]
    mean = np.mean([np.array(cache.acts[s : s + n]).mean(0) for s, n in zip(clips["start"], clips["frames"])], axis=0)
    values, vectors = np.linalg.eigh(second_moment(cache, clips) - np.outer(mean, mean))
    return vectors[:, np.argsort(-values)]


def random_order(width: int, seed: int, cfg: Any) -> np.ndarray:
    """Columns in random order; cfg: holds the run's `seed`."""
    return np.random.default_rng([cfg["seed"], seed, 61]).permutation(width)
