"""AudioSAE's primitives on our caches, for notebooks: `from eqknobs.audiosae import top_clips_for_feature`.

    with ActivationCache("results/run/activations/whisper.layer.3.h5") as cache:
        sae = SAE.load("results/run/saes/whisper.layer.3/batchtopk/seed0")
        most = aggregate_max_activations(cache, sae)
        print(top_clips_for_feature(most, 17))

Names as in the authors' repository. Where a function takes k, a clip's code is its k·n largest activations (n frames),
as the paper has it; 0 is the SAE's own rule. With nulls and intervals: stages `domains`, `stability`, `phones`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.labels import logmel
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.sae import SAE
from eqknobs.sae.firing import clip_codes, codes
from eqknobs.stages.domains.compute import firing_counts, labelled
from eqknobs.stages.features.compute import strongest_first

SPLITS = ("train", "val", "test")
FRAME_TAUS, CLIP_TAUS = (0.2, 0.1, 0.04), (0.5, 0.3)  # AudioSAE, appendix C
PERPLEXITY = 30


class MaxActivations(NamedTuple):
    """Largest activation of each feature in each clip, float32 [clips, m]; clips: id, speaker, split, frames."""

    values: np.ndarray
    clips: pd.DataFrame


class DatasetStats(NamedTuple):
    """How often features fire in a data set: shares of frames and of clips (with a frame at least), each [m]."""

    frame_share: np.ndarray
    clip_share: np.ndarray
    frames: int
    clips: int


def reconstruction_metrics(
    cache: ActivationCache, sae: SAE, splits: Sequence[str] = ("val",), k: float = 0
) -> dict[str, float]:
    """l0 (features a frame), l2 (mean error norm, raw units), normalized_l2 (mean of each frame's error norm by its
    own norm), frac_var_explained (1 − Σ squared error / Σ squared distance to the frames' mean).

    Raises EqknobsError without frames.
    """
    found, clips = codes(cache, sae, splits, k)
    at = cache.utterances.set_index("id")["start"]
    raws = [np.array(cache.acts[at[c.id] : at[c.id] + c.frames], dtype=np.float64) for c in clips.itertuples()]
    raw, ends = np.concatenate(raws), np.cumsum(clips["frames"])
    parts = [sae.decode(found[end - len(x) : end].toarray(), x) for x, end in zip(raws, ends, strict=True)]
    total = np.square(raw - raw.mean(0)).sum()
    error = np.linalg.norm(raw - np.concatenate(parts), axis=1)
    return {
        "l0": found.count_nonzero() / len(raw),
        "l2": float(error.mean()),
        "normalized_l2": float((error / np.maximum(np.linalg.norm(raw, axis=1), 1e-12)).mean()),
        "frac_var_explained": float(1 - np.square(error).sum() / total) if total else -np.inf,
    }


def aggregate_max_activations(
    cache: ActivationCache, sae: SAE, splits: Sequence[str] = SPLITS, k: float = 0
) -> MaxActivations:
    """The largest activation of each feature in each clip. Raises EqknobsError without frames."""
    found, clips = codes(cache, sae, splits, k)
    ends = np.cumsum(clips["frames"])
    parts = [found[end - frames : end] for end, frames in zip(ends, clips["frames"], strict=True)]
    values = [p.max(0).toarray()[0] if p.shape[0] else np.zeros(found.shape[1]) for p in parts]
    return MaxActivations(np.array(values, dtype=np.float32), clips)


def top_clips_for_feature(most: MaxActivations, feature: int, n: int = 10) -> pd.DataFrame:
    """The n clips where a feature is strongest, strongest first: id, speaker, split, frames, activation.

    Clips where it never fires are left out. Raises EqknobsError for a feature that is not there.
    """
    _require(feature, most.values.shape[1])
    peak = most.values[:, feature]
    return most.clips.assign(activation=peak).iloc[strongest_first(peak, n)]


def dead_features(most: MaxActivations) -> np.ndarray:
    """Indices of the features that fire in none of the clips, int64."""
    return np.flatnonzero(~(most.values > 0).any(0))


def feature_activation_windows(
    cache: ActivationCache,
    sae: SAE,
    feature: int,
    waves: Mapping[str, np.ndarray],
    rate: int,
    seconds: float = 1.0,
    n: int = 10,
    k: float = 0,
) -> np.ndarray:
    """Log-mel windows [≤ n, frames, 80] around the strongest frame of a feature in each of some clips.

    waves: clip's id -> sound [samples] at `rate`. Strongest clip first; clips where it does not fire give none, and
    windows over an end of a clip are filled with silence. Their mean over the first axis is the feature's mel map.
    Raises EqknobsError for a feature, or a clip, that is not there.
    """
    _require(feature, sae.config.d_sae)
    rows = cache.utterances.set_index("id")
    if missing := set(waves) - set(rows.index):
        raise EqknobsError(f"no clip {min(missing)} in the cache of {cache.attrs['site']}; name clips of the cache")
    found = []
    for clip, wav in waves.items():
        at = rows.loc[clip]
        values = clip_codes(sae, np.array(cache.acts[at.start : at.start + at.frames]), k)[:, [feature]].toarray()[:, 0]
        if values.max(initial=0) > 0:
            middle = cache.frame_times[at.start + int(values.argmax())]
            found.append((float(values.max()), _window(wav, rate, middle, seconds)))
    found.sort(key=lambda pair: -pair[0])
    frames = round(seconds / 0.02)
    return np.array([window for _, window in found[:n]]).reshape(-1, frames, 80)


def _window(wav: np.ndarray, rate: int, middle: float, seconds: float) -> np.ndarray:
    hop = round(0.02 * rate)
    frames = round(seconds / 0.02)
    first = round(middle * rate) - frames * hop // 2
    inside = np.zeros(frames * hop, dtype=np.float32)
    low, high = max(first, 0), min(first + len(inside), len(wav))
    inside[low - first : max(high - first, low - first)] = wav[low : max(high, low)]
    return logmel(inside, rate, hop, frames, 80)


def collect_dataset_stats(
    cache: ActivationCache, sae: SAE, datasets: Mapping[str, Sequence[str]], k: float = 0
) -> dict[str, DatasetStats]:
    """How often features fire in each data set; datasets: name -> ids of its clips in the cache.

    Raises EqknobsError for a data set without frames in the cache.
    """
    found, clips = codes(cache, sae, SPLITS, k)
    counts, frames = firing_counts(csr_matrix(found), clips["frames"].to_numpy()), clips["frames"].to_numpy()
    stats = {}
    for name, ids in datasets.items():
        own = clips["id"].isin(list(ids)).to_numpy()
        if not frames[own].sum():
            raise EqknobsError(f"data set {name}: no frames of its clips in the cache; name clips of the cache")
        shares = counts[own].sum(0) / frames[own].sum(), (counts[own] > 0).mean(0)
        stats[name] = DatasetStats(*shares, int(frames[own].sum()), int(own.sum()))
    return stats


def classify_features(
    stats: Mapping[str, DatasetStats], domains: Mapping[str, Sequence[str]], level: str = "frame"
) -> pd.DataFrame:
    """Which domains each feature belongs to: one row a feature, one column a domain, the highest τ passed or 0.

    domains: name (speech, music, sounds) -> its data sets, whose shares are averaged. level: frame | clip. A feature
    has a domain's label if in any set of domains its share there beats every other's by τ (`stages.domains`), of
    .2, .1, .04 by frames or .5, .3 by clips. Raises EqknobsError for less than two domains, or an unknown level.
    """
    if len(domains) < 2 or level not in ("frame", "clip"):
        raise EqknobsError(
            f"features are classified among two domains or more, by frame or clip; got {level}, {domains}"
        )
    f = np.array([np.mean([getattr(stats[s], f"{level}_share") for s in sets], axis=0) for sets in domains.values()])
    taus = FRAME_TAUS if level == "frame" else CLIP_TAUS
    confidence = np.zeros(f.shape)
    for tau in sorted(taus):
        confidence[labelled(f, tau)] = tau
    return pd.DataFrame(confidence.T, columns=list(domains)).rename_axis("feature")


def plot_feature_tsne(sae: SAE, labels: pd.DataFrame, out: str | Path, seed: int = 0) -> np.ndarray:
    """Draw a t-SNE (cosine, PCA start) of the encoder's rows of labelled features, coloured by domain, to a PNG or SVG.

    labels: as `classify_features` gives them; a feature has the colour of its surest domain. Returns the places
    [labelled, 2]. Raises EqknobsError if fewer features than three times the perplexity (30) have a label.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    values = labels.to_numpy()
    found = np.flatnonzero((values > 0).any(1))
    if len(found) <= 3 * PERPLEXITY:
        raise EqknobsError(f"{len(found)} features have a label, a map needs more than {3 * PERPLEXITY}; lower τ")
    rows = sae.W_enc.detach().cpu().numpy()[found]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    places = TSNE(perplexity=PERPLEXITY, init="pca", metric="cosine", random_state=seed).fit_transform(rows)
    surest = values[found].argmax(1)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes: Any = figure.subplots()
    for index, name in enumerate(labels.columns):
        axes.scatter(*places[surest == index].T, s=6, label=name)
    axes.set_axis_off()
    axes.legend()
    with atomic_path(out) as path:
        figure.savefig(path)
    return places


def _require(feature: int, features: int) -> None:
    if not 0 <= feature < features:
        raise EqknobsError(f"no feature {feature}; there are {features}, from 0")
