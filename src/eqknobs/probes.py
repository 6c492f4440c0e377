"""Linear probes: can an acoustic property be read from a feature space by a softmax-linear map or by ridge?

Every space sees the same labelled frames, in the same speaker-disjoint splits. Probes are fitted on train, the
regularisation, the epoch and the lag are chosen on val, and test is scored once. Shuffled labels run through the very
same choice; the majority class stands beside them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.linalg
import scipy.sparse
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.activations import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, write_csv
from eqknobs.models import gpu_lock, pick_device
from eqknobs.spaces import Matrix, make_spaces

BATCH = 256
# Of a probe of width 1; divided by √width, so that a step moves the logits alike in every space. Within half a point of
# the accuracy of L-BFGS run to convergence after 30 epochs of 10,000 frames.
LEARNING_RATE = 1.0
BLOCK = 4096
SCORED = ("val", "test")


def bin_edges(values: np.ndarray, binning: str, bins: int) -> np.ndarray:
    """Edges [classes + 1] of the classes of train values, in the property's unit.

    binning: `equal_width` | `quantile` | `semitone` (equal temperament around A4 = 440 Hz, one class a note). Quantiles
    that coincide are merged. Raises EqknobsError if the values are constant.
    """
    low, high = float(values.min()), float(values.max())
    if binning == "equal_width":
        edges = np.linspace(low, high, bins + 1)
    elif binning == "quantile":
        edges = np.quantile(values.astype(np.float64), np.linspace(0, 1, bins + 1))
    else:
        first, last = (int(np.round(12 * np.log2(value / 440))) for value in (low, high))
        edges = 440 * 2 ** ((np.arange(first, last + 2) - 0.5) / 12)
    edges = np.unique(edges)
    if len(edges) < 3:
        raise EqknobsError(f"the property is constant on the train frames ({low:g}): nothing to probe; check the audio")
    return edges


def to_classes(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Class index of each value; values beyond the train range fall into the first or last class."""
    return np.searchsorted(edges[1:-1], values, side="right")


@dataclass(frozen=True)
class LabelledFrames:
    """The frames every space is judged on: their rows in the cache, values of the property, split and utterance."""

    rows: np.ndarray  # int64 [n]
    values: np.ndarray  # float64 [n]
    split: np.ndarray  # str [n]
    utterance: np.ndarray  # int [n]

    def of(self, split: str) -> np.ndarray:
        """Positions of the frames of one split."""
        return np.flatnonzero(self.split == split)


def labelled_frames(cache: ActivationCache, labels_h5: str | Path, name: str, lags: list[int]) -> LabelledFrames:
    """Frames that carry the property: energetic ones, voiced ones for pitch; one set for all spaces and lags.

    A frame counts if, whatever the lag, the activation paired with it lies in the same utterance. Raises EqknobsError
    if a split has no such frame.
    """
    with h5py.File(labels_h5, "r", locking=False) as file:
        values = file[name][:].astype(np.float64)
        mask = file["voiced" if name == "pitch" else "energetic"][:].astype(bool)
    if len(values) != len(cache.acts):
        raise EqknobsError(
            f"{labels_h5}: {len(values)} frames, but the cache has {len(cache.acts)}; make the labels again"
        )
    table, utterance = cache.utterances, cache.utt_of_row
    place = np.arange(len(values)) - table["start"].to_numpy()[utterance]
    left = table["frames"].to_numpy()[utterance] - 1 - place
    mask &= np.isfinite(values) & (place >= max(lags)) & (left >= -min(lags))
    rows = np.flatnonzero(mask)
    split = table["split"].to_numpy(str)[utterance[rows]]
    for needed in ("train", *SCORED):
        if not (split == needed).any():
            raise EqknobsError(
                f"{labels_h5}: no frame with {name} in split {needed}; remove {name} from probes.properties"
            )
    return LabelledFrames(rows, values[rows], split, utterance[rows])


def load_probe(probes_npz: str | Path, space: str, binning: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights W [classes, width] and bias b [classes] of a probe, acting on `Space.features` values."""
    with np.load(probes_npz) as file:
        try:
            return file[f"{space}:{binning}:W"], file[f"{space}:{binning}:b"]
        except KeyError as error:
            raise EqknobsError(f"{probes_npz}: {error}; fit the probes again") from error


def fit_probes(
    cache_h5: str | Path,
    labels_h5: str | Path,
    sae_dirs: dict[str, Path],
    name: str,
    out_npz: str | Path,
    out_scores_csv: str | Path,
    out_ridge_csv: str | Path,
    cfg: dict[str, Any],
    seed: int,
) -> None:
    """Fit and score the probes of one property (`centroid` Hz, `rms` dB or `pitch` Hz) on every feature space.

    cfg: `bins`, `lags` (frames), `l2`, `epochs`, `device`. Binnings: equal_width and quantile, for pitch semitone too;
    edges from train. Loss: cross-entropy + l2/2 ‖W‖² on features standardised with train frames (see `_moments`); l2
    and epoch by val accuracy. Ridge: mean squared error + l2 ‖w‖² on a standardised target; its l2 and the lag by val
    R². Lag ℓ pairs the activation of frame t with the label of frame t + ℓ. Shuffled labels are permuted within
    train and within val.

    out_npz: `edges:<binning>`; `<space>:<binning>:W` [classes, width] and `:b` (acting on `Space.features`);
    `<space>:<binning>:chosen` (l2, epoch); `ridge:<space>:w`, `ridge:<space>:b`; `lag:<space>`.
    out_scores_csv: id, speaker, split, space, binning, labels (true | shuffled | majority), class, frames, correct,
    within_one; one row an utterance and true class. The majority class of train is the space `majority`.
    out_ridge_csv: id, speaker, split, space, frames, sum_y, sum_yy, sse, lag.
    Raises EqknobsError: no frame with the property, constant property, labels of another cache.
    """
    device = pick_device(cfg.get("device") or "cpu")
    arrays: dict[str, np.ndarray] = {}
    with ActivationCache(cache_h5) as cache, gpu_lock(device):
        frames = labelled_frames(cache, labels_h5, name, cfg["lags"])
        train = frames.of("train")
        binnings = ["equal_width", "quantile"] + (["semitone"] if name == "pitch" else [])
        edges = {binning: bin_edges(frames.values[train], binning, cfg["bins"]) for binning in binnings}
        arrays |= {f"edges:{binning}": values for binning, values in edges.items()}
        classes = np.stack([to_classes(frames.values, edges[binning]) for binning in binnings], 1)  # [n, binnings]
        scorer = _Scorer(cache, frames, binnings, classes)
        scorer.majority(train)

        shuffled, rng = classes.copy(), np.random.default_rng([seed, 5])
        for split in ("train", "val"):
            shuffled[frames.of(split)] = shuffled[rng.permutation(frames.of(split))]
        tasks = np.concatenate([classes, shuffled], 1)  # [n, 2 × binnings]
        sizes = [len(edges[binning]) - 1 for binning in binnings] * 2

        spaces = make_spaces(cache, sae_dirs, {"seed": seed}, labels_h5)
        progress = tqdm(spaces.values(), desc=f"probes {name}", unit="space")
        for space in progress:
            progress.set_postfix_str(space.name)
            matrix = space.matrix()
            ridge = _fit_ridge(matrix, frames, cfg["lags"], cfg["l2"])
            scorer.ridge(space.name, matrix, ridge)
            arrays[f"lag:{space.name}"] = np.array(ridge.lag)
            arrays[f"ridge:{space.name}:w"], arrays[f"ridge:{space.name}:b"] = ridge.w, np.array(ridge.b)
            rows = frames.rows - ridge.lag
            fits = _fit_softmax(matrix, rows, frames, tasks, sizes, cfg["l2"], cfg["epochs"], seed, device)
            for i, (binning, fit) in enumerate(zip(binnings * 2, fits)):
                kind = "true" if i < len(binnings) else "shuffled"
                scorer.classes(space.name, binning, kind, matrix, rows, fit)
                if kind == "true":
                    arrays[f"{space.name}:{binning}:W"], arrays[f"{space.name}:{binning}:b"] = fit.W, fit.b
                    arrays[f"{space.name}:{binning}:chosen"] = np.array([fit.l2, fit.epoch])
            del matrix
    with atomic_path(out_npz) as path, open(path, "wb") as file:
        np.savez(file, **arrays)
    write_csv(out_scores_csv, pd.concat(scorer.class_rows, ignore_index=True))
    write_csv(out_ridge_csv, pd.concat(scorer.ridge_rows, ignore_index=True))


class _Scorer:
    """Collects raw scores on val and test, one row an utterance (and true class)."""

    def __init__(self, cache: ActivationCache, frames: LabelledFrames, binnings: list[str], classes: np.ndarray):
        self.table, self.frames, self.binnings, self.truth = cache.utterances, frames, binnings, classes
        self.places = np.flatnonzero(np.isin(frames.split, SCORED))
        self.class_rows: list[pd.DataFrame] = []
        self.ridge_rows: list[pd.DataFrame] = []

    def _identified(self, utterance: Any) -> dict[str, np.ndarray]:
        found = self.table.iloc[np.asarray(utterance)]
        return {column: found[column].to_numpy() for column in ("id", "speaker", "split")}

    def _classes(self, space: str, binning: str, labels: str, predicted: np.ndarray) -> None:
        truth = self.truth[self.places, self.binnings.index(binning)]
        scores = pd.DataFrame(
            {
                "utterance": self.frames.utterance[self.places],
                "class": truth,
                "frames": 1,
                "correct": (predicted == truth).astype(int),
                "within_one": (np.abs(predicted - truth) <= 1).astype(int),
            }
        )
        scores = scores.groupby(["utterance", "class"], as_index=False).sum()
        names = {"space": space, "binning": binning, "labels": labels}
        found = pd.DataFrame(self._identified(scores.pop("utterance")) | names)
        self.class_rows.append(pd.concat([found, scores], axis=1))

    def majority(self, train: np.ndarray) -> None:
        for i, binning in enumerate(self.binnings):
            most = np.bincount(self.truth[train, i]).argmax()
            self._classes("majority", binning, "majority", np.full(len(self.places), most))

    def classes(
        self, space: str, binning: str, labels: str, matrix: Matrix, rows: np.ndarray, fit: "_SoftmaxFit"
    ) -> None:
        logits = _times(matrix, rows[self.places], fit.W.T) + fit.b
        self._classes(space, binning, labels, logits.argmax(1))

    def ridge(self, space: str, matrix: Matrix, fit: "_RidgeFit") -> None:
        y = self.frames.values[self.places]
        predicted = _times(matrix, self.frames.rows[self.places] - fit.lag, fit.w[:, None])[:, 0] + fit.b
        scores = pd.DataFrame(
            {
                "utterance": self.frames.utterance[self.places],
                "frames": 1,
                "sum_y": y,
                "sum_yy": y * y,
                "sse": (y - predicted) ** 2,
            }
        )
        scores = scores.groupby("utterance", as_index=False).sum()
        found = pd.DataFrame(self._identified(scores.pop("utterance")) | {"space": space})
        self.ridge_rows.append(pd.concat([found, scores.assign(lag=fit.lag)], axis=1))


def _times(matrix: Matrix, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """matrix[rows] @ weights [width, c], in blocks."""
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return np.concatenate([_dense32(matrix[block]) @ weights for block in blocks])


def _dense32(block: Matrix) -> Matrix:
    """Half precision -> single; CSR stays CSR."""
    return block if scipy.sparse.issparse(block) else block.astype(np.float32, copy=False)


def _moments(matrix: Matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [width] and scale [width] that standardise a space: (x − mean) · scale.

    The scale is one number for the whole space (1 / root mean variance), 0 for a feature that does not vary. A scale
    for each feature would blow up the rare ones: in a trial on 9,000 train frames of speech that cost sparse codes
    three points of centroid accuracy and gave the other spaces nothing.
    """
    total = np.zeros(matrix.shape[1])
    squares = np.zeros(matrix.shape[1])
    for start in range(0, len(rows), BLOCK):
        block = _dense32(matrix[rows[start : start + BLOCK]])
        total += np.asarray(block.sum(0, dtype=np.float64))
        squares += np.asarray((block * block).sum(0, dtype=np.float64))
    mean = total / len(rows)
    variance = squares / len(rows) - mean**2
    varies = variance > 1e-9 * (squares / len(rows) + 1e-30)
    return mean, varies / np.sqrt(max(variance[varies].mean(), 1e-30) if varies.any() else 1.0)


# --- ridge -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RidgeFit:
    w: np.ndarray  # float64 [width], acting on feature values
    b: float
    lag: int


def _fit_ridge(matrix: Matrix, frames: LabelledFrames, lags: list[int], l2s: list[float]) -> _RidgeFit:
    """Closed-form ridge at every lag and l2; the best on val. Of equals, the lag nearest 0 and the largest l2."""
    train, val = frames.of("train"), frames.of("val")
    y, y_val = frames.values[train], frames.values[val]
    best, best_error = None, np.inf
    for lag in sorted(lags, key=lambda lag: (abs(lag), lag)):
        rows = frames.rows[train] - lag
        mean, scale = _moments(matrix, rows)
        gram = np.zeros((matrix.shape[1], matrix.shape[1]))
        cross = np.zeros(matrix.shape[1])
        for start in range(0, len(rows), BLOCK):
            block = _dense32(matrix[rows[start : start + BLOCK]])
            product = block.T @ block
            gram += product.toarray() if scipy.sparse.issparse(product) else product
            cross += block.T @ (y[start : start + BLOCK] - y.mean())
        gram = (gram / len(rows) - np.outer(mean, mean)) * np.outer(scale, scale)
        cross = cross / len(rows) * scale / y.std()
        for l2 in sorted(l2s, reverse=True):
            # The floor keeps the system solvable at l2 = 0 when features are collinear or never vary.
            regularised = gram + max(l2, 1e-7) * np.eye(len(gram))
            w = scipy.linalg.solve(regularised, cross, assume_a="pos", overwrite_a=True) * scale * y.std()
            b = float(y.mean() - mean @ w)
            error = np.square(_times(matrix, frames.rows[val] - lag, w[:, None])[:, 0] + b - y_val).sum()
            if error < best_error:
                best, best_error = _RidgeFit(w, b, lag), error
    return best


# --- softmax-linear ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SoftmaxFit:
    W: np.ndarray  # float32 [classes, width], acting on feature values
    b: np.ndarray  # float32 [classes]
    l2: float
    epoch: int


@torch.no_grad()
def _fit_softmax(
    matrix: Matrix,
    rows: np.ndarray,
    frames: LabelledFrames,
    tasks: np.ndarray,
    sizes: list[int],
    l2s: list[float],
    epochs: int,
    seed: int,
    device: str,
) -> list[_SoftmaxFit]:
    """Fit all tasks [n, T] × l2 at once, as one stacked linear map; returns the best on val for each task.

    Standardisation is folded into the weights of each step, so sparse features stay sparse. Gradients by hand:
    autograd would keep the [batch, heads × classes] logits several times over.
    """
    train, val = frames.of("train"), frames.of("val")
    mean, scale = (torch.from_numpy(m).float().to(device) for m in _moments(matrix, rows[train]))
    width, (T, L, C) = matrix.shape[1], (tasks.shape[1], len(l2s), max(sizes))
    # Tasks with fewer classes than C: the surplus logits are −inf, their probability and gradient zero.
    surplus = torch.arange(C, device=device) >= torch.tensor(sizes, device=device)[:, None]  # [T, C]
    closed = torch.zeros(T, 1, C, device=device).masked_fill_(surplus[:, None], -torch.inf)
    decay = torch.tensor(l2s, dtype=torch.float32, device=device)[None, :, None].expand(T, L, C).reshape(-1)
    W = torch.zeros(width, T * L * C, device=device, requires_grad=True)
    b = torch.zeros(T * L * C, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([W, b], fused=True)
    labels = torch.from_numpy(tasks).to(device)
    best = torch.full((T, L), -1.0)
    best_epoch = torch.zeros(T, L, dtype=torch.int64)
    best_W, best_b = torch.zeros(T, L, width, C), torch.zeros(T, L, C)
    batches, step = range(0, len(train), BATCH), 0

    def folded() -> tuple[Tensor, Tensor]:
        weights = W * scale[:, None]
        return weights, b - mean @ weights

    for epoch in range(epochs):
        order = np.random.default_rng([seed, 6, epoch]).permutation(train)
        for start in batches:
            chosen = np.sort(order[start : start + BATCH])
            x = _batch(matrix, rows[chosen], device)
            weights, bias = folded()
            logits = (_product(x, weights) + bias).view(-1, T, L, C) + closed
            slope = torch.softmax(logits, -1)
            target = labels[torch.from_numpy(chosen).to(device)][:, :, None, None].expand(-1, -1, L, 1)
            slope.scatter_add_(3, target, -torch.ones(target.shape, device=device))
            slope = slope.reshape(len(chosen), -1) / len(chosen)
            b.grad = slope.sum(0)
            W.grad = (_product(x.T, slope) - mean[:, None] * b.grad) * scale[:, None] + decay * W
            rate = LEARNING_RATE / width**0.5 * (1 - step / (epochs * len(batches)))
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            step += 1
        weights, bias = folded()
        hits = torch.zeros(T, L)
        for start in range(0, len(val), BLOCK):
            chosen = val[start : start + BLOCK]
            logits = (_product(_batch(matrix, rows[chosen], device), weights) + bias).view(-1, T, L, C) + closed
            hits += (logits.argmax(-1) == labels[torch.from_numpy(chosen).to(device)][:, :, None]).sum(0).cpu()
        better = hits > best
        best[better], best_epoch[better] = hits[better], epoch + 1
        best_W[better] = weights.view(width, T, L, C).permute(1, 2, 0, 3).cpu()[better]
        best_b[better] = bias.view(T, L, C).cpu()[better]
    fits = []
    for task, size in enumerate(sizes):
        i = int(best[task].argmax())
        W_task, b_task = best_W[task, i, :, :size].T.contiguous().numpy(), best_b[task, i, :size].numpy()
        fits.append(_SoftmaxFit(W_task, b_task, l2s[i], int(best_epoch[task, i])))
    return fits


def _batch(matrix: Matrix, rows: np.ndarray, device: str) -> Any:
    """Rows of a feature matrix: a float32 tensor, or CSR on the CPU, where its products are the cheaper ones."""
    block = matrix[rows]
    if scipy.sparse.issparse(block):
        if device == "cpu":
            return block
        block = block.toarray()
    return torch.from_numpy(_dense32(block)).to(device)


def _product(x: Any, weights: Tensor) -> Tensor:
    if scipy.sparse.issparse(x):
        return torch.from_numpy(x @ weights.numpy())
    return x @ weights
