"""What is done to a Whisper so that it writes nothing where nobody speaks: directions in a layer, its SAE's features.

An SAE's features are ranked by the weights β of a logistic regression on pooled codes (a feature's mean where it is not
zero); of the k largest |β|, s = −sign(β). AudioSAE's form is decode(f + α s) (arXiv 2602.05027, appendix H, no clamp
named); its follow-up's scales each s by what the feature typically is (arXiv 2606.07473).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.sae import SAE

Edit = Callable[[Tensor], Tensor]  # [frames, d] -> [frames, d]
FEATURES = ("sae", "sae_scaled", "sae_error", "random_features")
DIRECTIONS = ("mean_difference", "random_direction")
EDITED = ("sae_inserted", *FEATURES, *DIRECTIONS)


class Point(NamedTuple):
    """One way to transcribe. layer: that is edited; k: features, or muted heads; alpha: strength, or a gate's bound."""

    arm: str
    layer: int | None = None
    k: int | None = None
    alpha: float | None = None
    seed: int = 0

    def columns(self) -> dict[str, Any]:
        """What tables say of it."""
        return {"arm": self.arm, "layer": self.layer, "k": self.k, "alpha": self.alpha, "seed": self.seed}


@dataclass(frozen=True)
class Fitted:
    """What train clips say of a layer.

    beta: the classifier's weights, [m]; typical: a feature's mean over the frames on which it fires, [m], 0 where it
    never does; difference: mean frame of clips that count as speech minus that of the others, [d].
    """

    beta: np.ndarray
    typical: np.ndarray
    difference: np.ndarray


def pooled(code: np.ndarray) -> np.ndarray:
    """A clip's code [frames, m] as one vector [m]: each feature's mean over the frames where it is not zero, else 0."""
    on = code != 0
    return code.sum(0) / np.maximum(on.sum(0), 1)


def fit(clips: list[np.ndarray], labels: np.ndarray, sae: SAE) -> Fitted:
    """Fit a layer; clips: activations [frames, d] of each, labels: 1 where it counts as speech, int [clips].

    Raises EqknobsError where one of the labels has no clip.
    """
    ones = int(labels.sum())
    if not 0 < ones < len(labels):
        raise EqknobsError(
            f"hallucination.label: {ones} of {len(labels)} train clips count as speech; two kinds are needed: choose "
            "another label, or more clips.train"
        )
    codes, total, firing = [], np.zeros(sae.config.d_sae), np.zeros(sae.config.d_sae)
    for acts in clips:
        code = sae.encode(np.asarray(acts, np.float32))
        codes.append(pooled(code))
        total, firing = total + code.sum(0, dtype=np.float64), firing + (code != 0).sum(0)
    model = LogisticRegression(max_iter=1000).fit(np.array(codes), labels)
    sums = {one: [acts.sum(0, dtype=np.float64) for acts, of in zip(clips, labels) if of == one] for one in (0, 1)}
    frames = {one: sum(len(acts) for acts, of in zip(clips, labels) if of == one) for one in (0, 1)}
    means = [np.sum(sums[one], axis=0) / frames[one] for one in (0, 1)]
    return Fitted(model.coef_[0], total / np.maximum(firing, 1), means[1] - means[0])


def shift(point: Point, fitted: Fitted) -> np.ndarray:
    """What features gain at α 1, [m]: s of the ranked ones, or of as many random ones that fire."""
    order = np.argsort(-np.abs(fitted.beta), kind="stable")[: point.k]
    signs = -np.sign(fitted.beta[order])
    if point.arm == "random_features":
        alive = np.flatnonzero(fitted.typical > 0)
        order = np.random.default_rng([point.seed, 7]).permutation(alive)[: len(order)]
        signs = signs[: len(order)]
    found = np.zeros(len(fitted.beta), np.float32)
    found[order] = signs * (fitted.typical[order] if point.arm == "sae_scaled" else 1)
    return found


def direction(point: Point, fitted: Fitted) -> np.ndarray:
    """What is taken from every frame at α 1, [d]: the difference in means, or a random direction of its length."""
    if point.arm == "mean_difference":
        return fitted.difference.astype(np.float32)
    drawn = np.random.default_rng([point.seed, 11]).standard_normal(len(fitted.difference))
    return (drawn * np.linalg.norm(fitted.difference) / np.linalg.norm(drawn)).astype(np.float32)


def edit_of(point: Point, fitted: Fitted, sae: SAE) -> Edit:
    """The edit of frames at the point's layer. Raises EqknobsError for an arm that edits none."""
    if point.arm in DIRECTIONS:
        step = (point.alpha or 0.0) * torch.from_numpy(direction(point, fitted))
        return lambda acts: acts - step.to(acts)
    if point.arm == "sae_inserted":
        return lambda acts: sae.decode(sae.encode(acts), acts).to(acts)
    if point.arm not in FEATURES:
        raise EqknobsError(f"arm {point.arm} edits no layer; choose of {', '.join(EDITED)}")
    gain = (point.alpha or 0.0) * torch.from_numpy(shift(point, fitted))
    if point.arm != "sae_error":
        return lambda acts: sae.decode(sae.encode(acts) + gain.to(acts), acts).to(acts)

    def with_error(acts: Tensor) -> Tensor:
        code = sae.encode(acts)
        return acts + (sae.decode(code + gain.to(acts), acts) - sae.decode(code, acts)).to(acts)

    return with_error


def edited(acts: Tensor, frames: np.ndarray, edit: Edit, window: bool) -> Tensor:
    """Windows [windows, positions, d] with an edit of their first `frames` [windows] positions, or of all."""
    if window:
        return edit(acts.flatten(0, 1)).unflatten(0, acts.shape[:2])
    out = acts.clone()
    for row, count in enumerate(frames):
        out[row, :count] = edit(acts[row, :count])
    return out


def save_fitted(path: str | Path, fitted: Mapping[int, Fitted]) -> None:
    """Write what was fitted, layer by layer, as an .npz."""
    arrays = {f"{layer}.{name}": value for layer, one in fitted.items() for name, value in vars(one).items()}
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def load_fitted(path: str | Path) -> dict[int, Fitted]:
    """Read what `save_fitted` wrote. Raises EqknobsError for another file."""
    try:
        with np.load(path) as file:
            layers = sorted({int(name.partition(".")[0]) for name in file})
            return {layer: Fitted(**{n: file[f"{layer}.{n}"] for n in Fitted.__annotations__}) for layer in layers}
    except (OSError, ValueError, KeyError) as error:
        raise EqknobsError(f"{path}: holds no directions ({error}); run the stage hallucination again") from error
