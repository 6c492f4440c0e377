"""Directions in a residual layer of a speech LM along which a property of what its agent says changes.

All are found in the train frames in which the agent speaks, z-scored, and point from the lowest to the highest class of
a property, or from one voice to the other:

- `probe`: w_high − w_low of a softmax probe
- `difference_in_means`: mean of the highest class minus mean of the lowest
- `sae_probe`: w_high − w_low of a softmax probe of the SAE's code, through its decoder
- `sae_feature`: what the decoder gives for the feature whose means differ most in standard deviations, with its sign
- `random`: drawn

A step of α = 1 along any is as long as train frames are from their mean, root mean squared: √width in z-scored space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv
from eqknobs.sae import SAE
from eqknobs.stages.probes.compute import FitCfg, ProbesCfg, Question, Sources, Tasks, ask, fit_softmax
from eqknobs.stages.probes.spaces import Matrix, Space

BINNING = "quantile"
VOICE = "voice"
OF_SAES = ("sae_probe", "sae_feature")


class DirectionsCfg(FitCfg):
    """bins: classes of pitch and level; lag: frames from the activation to what is labelled."""

    directions: list[str]
    bins: int
    lag: int


@dataclass(frozen=True)
class Files:
    """What directions are found in: turns, labels, the cache of a layer, the folder of its SAE (None: it has none)."""

    turns: str
    labels: str
    cache: str
    sae: Path | None


def two_voices(turns: pd.DataFrame) -> tuple[str, str] | None:
    """The two speakers who say most of train (and something of test), by name; None where there are not two."""
    said = turns[turns["stream"] == "agent"]
    seconds = said[said["split"] == "train"].groupby("speaker")["seconds"].sum()
    seconds = seconds[seconds.index.isin(said.loc[said["split"] == "test", "speaker"])]
    first = seconds.sort_index().sort_values(ascending=False, kind="stable").index[:2]
    return (min(first), max(first)) if len(first) == 2 else None


def find(files: Files, name: str, cfg: DirectionsCfg, random: int, device: str = "cpu") -> dict[str, np.ndarray]:
    """Steps of α = 1, float32 [width], in the layer's own units, by direction; `random:<seed>` are as many as asked.

    Raises EqknobsError as `ask`, for two voices that are not there, or a direction that is nothing.
    """
    with ActivationCache(files.cache) as cache:
        turns = read_csv(files.turns)
        stream = cache.utterances.join(turns.set_index("id")[["stream"]], on="id")["stream"]
        settings = {"property": name, "bins": cfg["bins"], "seed": cfg["seed"]}
        sources = Sources(files.cache, files.labels, manifest=files.turns)
        question = ask(cache, sources, cast(ProbesCfg, settings), [cfg["lag"]], np.flatnonzero(stream == "agent"))
        low, high, classes = _ends(question, turns, name)
        rows = question.frames.rows - cfg["lag"]
        task = _Task(question, rows, classes, (low, high), cfg, device)
        z = Space("z", len(cache.mean), lambda acts: (acts - cache.mean) / cache.std, cache.acts).matrix()
        found = _of_layer(z, task)
        if files.sae is not None and set(OF_SAES) & set(cfg["directions"]):
            sae = SAE.load(files.sae)
            code = Space("sae", sae.config.d_sae, sae.encode, cache.acts).matrix()
            found |= _of_sae(code, sae, cache.std, task)
        found = {direction: found[direction] for direction in cfg["directions"]}
        for seed in range(random):
            drawn = np.random.default_rng([cfg["seed"], 12, seed]).standard_normal(len(cache.mean))
            found[f"random:{seed}"] = drawn
        return {direction: _step(v, cache.std, f"{name}, {direction}") for direction, v in found.items()}


@dataclass(frozen=True)
class _Task:
    question: Question
    rows: np.ndarray
    classes: np.ndarray  # int [n]
    ends: tuple[int, int]
    cfg: DirectionsCfg
    device: str

    def of(self, end: int) -> np.ndarray:
        """Rows of the train frames of the lowest (0) or highest (1) class."""
        train = self.question.frames.of("train")
        return self.rows[train[self.classes[train] == self.ends[end]]]

    def weights(self, matrix: Matrix) -> np.ndarray:
        """w_high − w_low of a softmax probe of a matrix [N, width]."""
        tasks = Tasks(self.question.frames, self.classes[:, None], [int(self.classes.max()) + 1])
        fit = fit_softmax(matrix, self.rows, tasks, self.cfg, self.device)[0]
        return fit.W[self.ends[1]] - fit.W[self.ends[0]]


def _ends(question: Question, turns: pd.DataFrame, name: str) -> tuple[int, int, np.ndarray]:
    """The classes that a direction leads from and to, and those of all frames."""
    if name != VOICE:
        at = question.binnings.index(BINNING)
        return 0, question.sizes[at] - 1, question.classes[:, at]
    if (voices := two_voices(turns)) is None:
        raise EqknobsError("lm_steering.properties: voice needs two speakers in train and test of lm_layers.corpus")
    low, high = (question.frames.categories.index(voice) for voice in voices)
    return low, high, question.classes[:, 0]


def _of_layer(z: Matrix, task: _Task) -> dict[str, np.ndarray]:
    low, high = (np.asarray(z[task.of(end)], np.float64).mean(0) for end in (0, 1))
    return {"difference_in_means": high - low, "probe": task.weights(z)}


def _of_sae(code: Matrix, sae: SAE, std: np.ndarray, task: _Task) -> dict[str, np.ndarray]:
    """Both directions of an SAE, in the z-scored space of the layer."""
    means, spreads = zip(*(_moments(code[task.of(end)]) for end in (0, 1)), strict=True)
    apart = (means[1] - means[0]) / np.sqrt(np.mean(spreads, axis=0) + 1e-12)
    # A feature that fires once has next to no spread; those that fire in a hundredth of either class count.
    firing = [np.asarray((code[task.of(end)] > 0).mean(0)).ravel() for end in (0, 1)]
    apart[np.maximum(*firing) < 0.01] = 0
    one = np.zeros(len(apart), np.float32)
    one[np.abs(apart).argmax()] = np.sign(apart[np.abs(apart).argmax()])
    codes = {"sae_probe": task.weights(code), "sae_feature": one}
    nothing = sae.decode(np.zeros((1, len(apart)), np.float32))[0]
    return {name: (sae.decode(np.asarray(v, np.float32)[None])[0] - nothing) / std for name, v in codes.items()}


def _moments(rows: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each column [width]."""
    squares = rows.multiply(rows) if not isinstance(rows, np.ndarray) else np.square(rows)
    mean, mean_square = (np.asarray(part.mean(0), np.float64).ravel() for part in (rows, squares))
    return mean, np.maximum(mean_square - mean**2, 0)


def _step(v: np.ndarray, std: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    norm = float(np.linalg.norm(v.astype(np.float64)))
    if not np.isfinite(norm) or norm == 0:
        raise EqknobsError(
            f"lm_steering: {what}: the direction has norm {norm}; leave it out of lm_steering.directions"
        )
    return (np.sqrt(len(v)) * np.asarray(std) * v / norm).astype(np.float32)
