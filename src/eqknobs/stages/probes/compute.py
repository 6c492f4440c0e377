"""Linear probes: can an acoustic property be read from a feature space by a softmax-linear map or by ridge?

Every space sees the same labelled frames, in the same speaker-disjoint splits. Probes are fitted on train, the
regularisation, the epoch and the lag are chosen on val, and test is scored once. Shuffled labels run through the very
same choice; the majority class stands beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import h5py
import numpy as np
import pandas as pd
import scipy.linalg
import scipy.sparse
import torch
from torch import Tensor
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.properties import PROPERTIES, Property
from eqknobs.device import gpu_lock, pick_device
from eqknobs.errors import EqknobsError, counted
from eqknobs.io import array_hash, atomic_path, read_csv, write_csv
from eqknobs.pieces import Pieces
from eqknobs.stages.probes.spaces import MEND, PARTS, Matrix, Space, make_spaces

BATCH = 256
# Of a probe of width 1; divided by √width, so that a step moves the logits alike in every space. Within half a point of
# the accuracy of L-BFGS run to convergence after 30 epochs of 10,000 frames.
LEARNING_RATE = 1.0
BLOCK = 4096
SCORED = ("val", "test")
RIDGE_COLUMNS = ["id", "speaker", "split", "space", "frames", "sum_y", "sum_yy", "sse", "lag"]

ProbeFiles = str | Path | Sequence[str | Path]  # of one property: of the base spaces, and of each SAE that is read


class FitCfg(TypedDict):
    """How softmax-linear probes are fitted."""

    l2: list[float]
    epochs: int
    seed: int


class ProbesCfg(FitCfg):
    """What `fit_probes` reads: of the section `probes`, a property and a part of the spaces, the run's seed."""

    property: str  # of `eqknobs.corpus.properties`
    parts: NotRequired[list[str]]  # of `PARTS`, see `make_spaces`; all
    bins: NotRequired[int]  # neither has a category: its classes are its values, its lag is 0
    lags: NotRequired[list[int]]  # frames
    device: NotRequired[str]
    content: NotRequired[dict[str, str]]  # digests, of which `code` tells fitted spaces apart


@dataclass(frozen=True)
class Sources:
    """The files that probes of a target are fitted to."""

    cache: str | Path
    labels: str | Path
    saes: Mapping[str, Path] = field(default_factory=dict)  # SAE name -> folder of its first seed
    manifest: str | Path | None = None  # needed for a property of whole clips


@dataclass(frozen=True)
class Outputs:
    """The files that `fit_probes` writes."""

    probes: str | Path  # npz
    scores: str | Path
    ridge: str | Path


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
    """The frames every space is judged on: their rows in the cache, values of the property, split and utterance.

    Of a category the values are places in `categories`.
    """

    rows: np.ndarray  # int64 [n]
    values: np.ndarray  # float64 [n]
    split: np.ndarray  # str [n]
    utterance: np.ndarray  # int [n]
    categories: tuple[str, ...] = ()

    def of(self, split: str) -> np.ndarray:
        """Positions of the frames of one split."""
        return np.flatnonzero(self.split == split)

    def at(self, positions: np.ndarray) -> "LabelledFrames":
        """Those at some positions."""
        rows, values = self.rows[positions], self.values[positions]
        return LabelledFrames(rows, values, self.split[positions], self.utterance[positions], self.categories)


def labelled_frames(
    cache: ActivationCache, labels_h5: str | Path, name: str, lags: list[int], manifest_csv: str | Path | None = None
) -> LabelledFrames:
    """Frames that carry the property: those of its mask; one set for all spaces and lags.

    A frame counts if, whatever the lag, the activation paired with it lies in the same utterance. manifest_csv: needed
    for a property of whole clips. Categories that cannot be judged (see `_judged_categories`) are left out. Raises
    EqknobsError if a split has no such frame.
    """
    wanted = PROPERTIES[name]
    table, utterance = cache.utterances, cache.utt_of_row
    categories: tuple[str, ...] = ()
    with h5py.File(labels_h5, "r", locking=False) as file:
        mask = np.ones(len(file["energetic"]), bool) if wanted.mask == "all" else file[wanted.mask][:].astype(bool)
        if len(mask) != len(cache.acts):
            raise EqknobsError(
                f"{labels_h5}: {len(mask)} frames, but the cache has {len(cache.acts)}; make the labels again"
            )
        if wanted.level == "clip":
            values, categories = _of_clips(wanted, table, manifest_csv)
            values = values[utterance]
        elif wanted.source not in file:
            raise EqknobsError(f"{labels_h5}: no labels of {name}; remove {name} from probes.properties")
        else:
            values = file[wanted.source][:].astype(np.float64)
            if wanted.kind == "category":
                values[values < 0] = np.nan
                categories = tuple(map(str, file[wanted.source].attrs["names"]))
    place = np.arange(len(values)) - table["start"].to_numpy()[utterance]
    left = table["frames"].to_numpy()[utterance] - 1 - place
    mask &= np.isfinite(values) & (place >= max(lags)) & (left >= -min(lags))
    rows = np.flatnonzero(mask)
    found = LabelledFrames(
        rows, values[rows], table["split"].to_numpy(str)[utterance[rows]], utterance[rows], categories
    )
    for needed in ("train", *SCORED):
        if not (found.split == needed).any():
            raise EqknobsError(
                f"{labels_h5}: no frame with {name} in split {needed}; remove {name} from probes.properties"
            )
    return _judged_categories(found, table["speaker"].to_numpy(str), wanted) if categories else found


def _of_clips(
    wanted: Property, table: pd.DataFrame, manifest_csv: str | Path | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Place of each utterance's value among the sorted values (nan: none), and these."""
    if manifest_csv is None:
        raise TypeError(f"{wanted.name} is a property of whole clips: manifest_csv is needed")
    manifest = read_csv(manifest_csv).set_index("id")
    if wanted.source not in manifest:
        raise EqknobsError(
            f"{manifest_csv}: no column {wanted.source}, which the property {wanted.name} is; "
            f"add it to the CSV data.labels, or remove {wanted.name} from probes.properties"
        )
    said = manifest[wanted.source].reindex(table["id"]).fillna("").astype(str)
    names = sorted(set(said) - {""})
    return said.map({name: float(i) for i, name in enumerate(names)}).to_numpy(np.float64), tuple(names)


def _judged_categories(frames: LabelledFrames, speakers: np.ndarray, wanted: Property) -> LabelledFrames:
    """The frames of the categories that can be judged, which are in train and test and have two speakers in train.

    Else the probe would learn a voice and call it a category; only where the voice is asked for, one is enough. Prints
    what is left out and why. Raises EqknobsError if fewer than two categories are left.
    """
    spoken = pd.Series(speakers[frames.utterance]).groupby([frames.split, frames.values]).nunique()
    least, kept, lacking = 2 if wanted.of_speakers else 1, [], []
    for value in np.unique(frames.values):
        in_train, in_test = (int(spoken.get((split, value), 0)) for split in ("train", "test"))
        if in_train >= least and in_test:
            kept.append(value)
            continue
        why = f"{counted(in_train, 'speaker')} in train" if in_train < least else "none in test"
        lacking.append(f"{frames.categories[int(value)]} ({why})")
    said = f"{wanted.name}: left out {', '.join(lacking)}" if lacking else f"{wanted.name}: no other value"
    if len(kept) < 2:
        only = f"only {frames.categories[int(kept[0])]!r}" if kept else "nothing"
        needed = f"two values that test has and {counted(least, 'speaker')} of train {'has' if least == 1 else 'have'}"
        raise EqknobsError(
            f"{said}; {only} remains, a probe needs {needed}; remove {wanted.name} from probes.properties"
        )
    if lacking:
        print(said, flush=True)
    chosen = np.isin(frames.values, kept)
    return LabelledFrames(
        frames.rows[chosen],
        np.searchsorted(kept, frames.values[chosen]).astype(np.float64),
        frames.split[chosen],
        frames.utterance[chosen],
        tuple(frames.categories[int(value)] for value in kept),
    )


def read_probe(probes_npz: ProbeFiles, *keys: str) -> list[np.ndarray]:
    """Arrays of a fitted probe by their keys (see `fit_probes`), from the file among several that holds all of them."""
    files = [probes_npz] if isinstance(probes_npz, str | Path) else list(probes_npz)
    for path in files:
        with np.load(path) as file:
            if set(keys) <= set(file):
                return [file[key] for key in keys]
    raise EqknobsError(f"{', '.join(map(str, files))}: no {' and '.join(keys)}; fit the probes again")


def load_probe(probes_npz: ProbeFiles, space: str, binning: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights W [classes, width] and bias b [classes] of a probe, acting on `Space.features` values."""
    weights, bias = read_probe(probes_npz, f"{space}:{binning}:W", f"{space}:{binning}:b")
    return weights, bias


@dataclass(frozen=True)
class Question:
    """What every space is asked: the frames, and their classes by each binning, true and shuffled."""

    frames: LabelledFrames
    binnings: tuple[str, ...]
    edges: dict[str, np.ndarray]  # of a property that is no category
    classes: np.ndarray  # int [n, binnings]
    shuffled: np.ndarray  # int [n, binnings]
    sizes: list[int]  # classes of each binning
    unordered: bool  # categories, of which none is the neighbour of another

    def digest(self) -> str:
        """Hash of all that is asked, utterances by their places."""
        frames = self.frames
        return array_hash(frames.rows, frames.values, frames.split, frames.utterance, self.classes, self.shuffled)


def ask(
    cache: ActivationCache,
    sources: Sources,
    cfg: ProbesCfg,
    lags: list[int] | None = None,
    utterances: np.ndarray | None = None,
) -> Question:
    """The question of one property. Raises EqknobsError as `labelled_frames` and `bin_edges`.

    lags: others than cfg's; utterances: places of those that are asked about, by default all.
    """
    wanted = PROPERTIES[cfg["property"]]
    unordered = wanted.kind == "category"
    lags = ([0] if unordered else cfg["lags"]) if lags is None else lags
    frames = labelled_frames(cache, sources.labels, wanted.name, lags, sources.manifest)
    if utterances is not None:
        frames = frames.at(np.flatnonzero(np.isin(frames.utterance, utterances)))
    train = frames.of("train")
    if unordered:
        edges: dict[str, np.ndarray] = {}
        classes, sizes = frames.values.astype(np.int64)[:, None], [len(frames.categories)]
    else:
        edges = {binning: bin_edges(frames.values[train], binning, cfg["bins"]) for binning in wanted.binnings}
        classes = np.stack([to_classes(frames.values, found) for found in edges.values()], 1)
        sizes = [len(found) - 1 for found in edges.values()]
    shuffled, rng = classes.copy(), np.random.default_rng([cfg["seed"], 5])
    for split in ("train", "val"):
        shuffled[frames.of(split)] = shuffled[rng.permutation(frames.of(split))]
    return Question(frames, wanted.binnings, edges, classes, shuffled, sizes, unordered)


def fit_probes(sources: Sources, out: Outputs, cfg: ProbesCfg, pieces: Pieces | None = None) -> None:
    """Fit and score the probes of one property on feature spaces.

    pieces: where fitted spaces are kept; by default nowhere.
    Binnings: equal_width and quantile, for pitch semitone too; edges from train. The classes of a category (binning
    `category`) are its values in train. Loss: cross-entropy + l2/2 ‖W‖² on features standardised with train frames (see
    `_moments`); l2 and epoch by val accuracy. Ridge: mean squared error + l2 ‖w‖² on a standardised target; its l2 and
    the lag by val R². Lag ℓ pairs the activation of frame t with the label of frame t + ℓ. A category has no ridge, and
    lag 0. Shuffled labels are permuted within train and within val.

    out.probes: `edges:<binning>` or `categories`; `<space>:<binning>:W` [classes, width] and `:b` (acting on
    `Space.features`); `<space>:<binning>:chosen` (l2, epoch); `ridge:<space>:w`, `ridge:<space>:b`; `lag:<space>`.
    out.scores: id, speaker, split, space, binning, labels (true | shuffled | majority), class, frames, correct,
    within_one (empty for a category); one row an utterance and true class. With the base spaces comes the majority
    class of train, the space `majority`.
    out.ridge: id, speaker, split, space, frames, sum_y, sum_yy, sse, lag.
    Raises EqknobsError: no frame with the property, constant property, labels of another cache, features that are not
    finite.
    """
    device, parts = pick_device(cfg.get("device") or "cpu"), cfg.get("parts", PARTS)
    pieces = pieces or Pieces(None)
    with ActivationCache(sources.cache) as cache, gpu_lock(device):
        question = ask(cache, sources, cfg)
        arrays: dict[str, Any] = {f"edges:{binning}": values for binning, values in question.edges.items()}
        if question.unordered:
            arrays["categories"] = np.array(question.frames.categories)
        rows = _Rows(cache.utterances)
        if "base" in parts:
            for binning, counts in majority(question).items():
                rows.classes("majority", binning, "majority", counts)
        keys = ("l2", "epochs", "seed") if question.unordered else ("l2", "epochs", "seed", "lags")
        made_of = {
            "code": cfg.get("content", {}).get("code"),
            "cache": cache.digest() if pieces.folder else None,
            "question": question.digest(),
            "cfg": {key: value for key, value in cfg.items() if key in keys},
        }
        spaces = make_spaces(cache, sources.saes, cfg["seed"], sources.labels, parts)
        progress = tqdm(spaces.values(), desc=f"probes {cfg['property']}", unit="space")
        for space in progress:
            progress.set_postfix_str(space.name)
            key = [made_of, space.made_of]
            fitted = pieces.arrays("probes", key, partial(fit_space, space, question, cfg, device))
            arrays |= _named(space.name, fitted)
            rows.add(space.name, question, fitted)
    with atomic_path(out.probes) as path, open(path, "wb") as file:
        np.savez(file, **arrays)
    write_csv(out.scores, pd.concat(rows.class_rows, ignore_index=True))
    ridge = pd.concat(rows.ridge_rows, ignore_index=True) if rows.ridge_rows else pd.DataFrame(columns=RIDGE_COLUMNS)
    write_csv(out.ridge, ridge)


def fit_space(space: Space, question: Question, cfg: ProbesCfg, device: str) -> dict[str, np.ndarray]:
    """Fit and score the probes of one space: all that is kept of it, under names that do not hold the space's.

    `lag`, `ridge:w`, `ridge:b`, `ridge:scores` (columns of `_sums`); `<binning>:W`, `:b`, `:chosen`;
    `<labels>:<binning>:scores` [k, 5]: utterance, class, frames, correct, within_one. Raises EqknobsError if no ridge
    can be fitted.
    """
    matrix, frames, fitted = space.matrix(), question.frames, {"lag": np.array(0)}
    places = np.flatnonzero(np.isin(frames.split, SCORED))
    if not question.unordered:
        ridge = _fit_ridge(matrix, frames, cfg["lags"], cfg["l2"])
        if ridge is None:
            raise EqknobsError(f"probes: values in the space {space.name} are too large for a ridge; {MEND}")
        fitted = {"lag": np.array(ridge.lag), "ridge:w": ridge.w, "ridge:b": np.array(ridge.b)}
        fitted["ridge:scores"] = _ridge_scores(matrix, frames, places, ridge)
    rows = frames.rows - int(fitted["lag"])
    tasks = Tasks(frames, np.concatenate([question.classes, question.shuffled], 1), question.sizes * 2)
    fits = iter(fit_softmax(matrix, rows, tasks, cfg, device))
    for labels in ("true", "shuffled"):
        for i, binning in enumerate(question.binnings):
            fit = next(fits)
            predicted = (times(matrix, rows[places], fit.W.T) + fit.b).argmax(1)
            fitted[f"{labels}:{binning}:scores"] = _counts(question, places, i, predicted)
            if labels == "true":
                fitted |= {f"{binning}:W": fit.W, f"{binning}:b": fit.b}
                fitted[f"{binning}:chosen"] = np.array([fit.l2, fit.epoch])
    return fitted


def _named(space: str, fitted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of one space as they are called in the file of all."""
    found = {}
    for key, values in fitted.items():
        if not key.endswith("scores"):
            first, _, rest = key.partition(":")
            alone = first in ("lag", "ridge")
            found[":".join(filter(None, (first, space, rest) if alone else (space, first, rest)))] = values
    return found


# --- scores ------------------------------------------------------------------------------------------------------


def _counts(question: Question, places: np.ndarray, binning: int, predicted: np.ndarray) -> np.ndarray:
    """int64 [k, 5]: utterance, true class, frames, correct, within one class; of the frames `places`."""
    truth = question.classes[places, binning]
    scores = pd.DataFrame(
        {
            "utterance": question.frames.utterance[places],
            "class": truth,
            "frames": 1,
            "correct": (predicted == truth).astype(int),
            "within_one": (np.abs(predicted - truth) <= 1).astype(int),
        }
    )
    return scores.groupby(["utterance", "class"], as_index=False).sum().to_numpy(np.int64)


def majority(question: Question) -> dict[str, np.ndarray]:
    """Binning -> `_counts` of always saying the most frequent class of train."""
    places, train = np.flatnonzero(np.isin(question.frames.split, SCORED)), question.frames.of("train")
    found = {}
    for i, binning in enumerate(question.binnings):
        most = np.bincount(question.classes[train, i]).argmax()
        found[binning] = _counts(question, places, i, np.full(len(places), most))
    return found


def _ridge_scores(matrix: Matrix, frames: LabelledFrames, places: np.ndarray, fit: "_RidgeFit") -> np.ndarray:
    """float64 [utterances, 5]: utterance, frames, Σ y, Σ y², Σ (y − ŷ)²."""
    y = frames.values[places]
    predicted = times(matrix, frames.rows[places] - fit.lag, fit.w[:, None])[:, 0] + fit.b
    scores = pd.DataFrame(
        {
            "utterance": frames.utterance[places],
            "frames": 1,
            "sum_y": y,
            "sum_yy": y * y,
            "sse": (y - predicted) ** 2,
        }
    )
    return scores.groupby("utterance", as_index=False).sum().to_numpy(np.float64)


class _Rows:
    """Collects raw scores on val and test, one row an utterance (and true class)."""

    def __init__(self, table: pd.DataFrame):
        self.table = table
        self.class_rows: list[pd.DataFrame] = []
        self.ridge_rows: list[pd.DataFrame] = []

    def _identified(self, utterance: np.ndarray) -> dict[str, np.ndarray]:
        found = self.table.iloc[utterance.astype(np.int64)]
        return {column: found[column].to_numpy() for column in ("id", "speaker", "split")}

    def classes(self, space: str, binning: str, labels: str, counts: np.ndarray) -> None:
        """Add `_counts`; None of a category lies within one class of another."""
        names = {"space": space, "binning": binning, "labels": labels}
        scores = dict(zip(("class", "frames", "correct", "within_one"), counts[:, 1:].T))
        if binning == "category":
            scores["within_one"] = np.full(len(counts), np.nan)
        self.class_rows.append(pd.DataFrame(self._identified(counts[:, 0]) | names | scores))

    def add(self, space: str, question: Question, fitted: dict[str, np.ndarray]) -> None:
        """Add what `fit_space` found."""
        for labels in ("true", "shuffled"):
            for binning in question.binnings:
                self.classes(space, binning, labels, fitted[f"{labels}:{binning}:scores"])
        if not question.unordered:
            sums = fitted["ridge:scores"]
            scores = {"frames": sums[:, 1].astype(np.int64)} | dict(zip(("sum_y", "sum_yy", "sse"), sums[:, 2:].T))
            found = pd.DataFrame(self._identified(sums[:, 0]) | {"space": space} | scores)
            self.ridge_rows.append(found.assign(lag=int(fitted["lag"])))


def times(matrix: Matrix, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
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


def _fit_ridge(matrix: Matrix, frames: LabelledFrames, lags: list[int], l2s: list[float]) -> _RidgeFit | None:
    """Closed-form ridge at every lag and l2; the best on val. Of equals, the lag nearest 0 and the largest l2.

    None where sums or errors of all overflow.
    """
    train, val = frames.of("train"), frames.of("val")
    y, y_val = frames.values[train], frames.values[val]
    best: _RidgeFit | None = None
    best_error = np.inf
    for lag in sorted(lags, key=lambda lag: (abs(lag), lag)):
        rows = frames.rows[train] - lag
        mean, scale = _moments(matrix, rows)
        gram = np.zeros((matrix.shape[1], matrix.shape[1]))
        cross = np.zeros(matrix.shape[1])
        for start in range(0, len(rows), BLOCK):
            block = _dense32(matrix[rows[start : start + BLOCK]])
            product: Any = block.T @ block
            gram += product.toarray() if scipy.sparse.issparse(product) else product
            cross += block.T @ (y[start : start + BLOCK] - y.mean())
        gram = (gram / len(rows) - np.outer(mean, mean)) * np.outer(scale, scale)
        cross = cross / len(rows) * scale / y.std()
        if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
            continue
        for l2 in sorted(l2s, reverse=True):
            # The floor keeps the system solvable at l2 = 0 when features are collinear or never vary.
            regularised = gram + max(l2, 1e-7) * np.eye(len(gram))
            w = scipy.linalg.solve(regularised, cross, assume_a="pos", overwrite_a=True) * scale * y.std()
            b = float(y.mean() - mean @ w)
            error = np.square(times(matrix, frames.rows[val] - lag, w[:, None])[:, 0] + b - y_val).sum()
            if error < best_error:
                best, best_error = _RidgeFit(w, b, lag), error
    return best


# --- softmax-linear ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxFit:
    W: np.ndarray  # float32 [classes, width], acting on feature values
    b: np.ndarray  # float32 [classes]
    l2: float
    epoch: int


@dataclass(frozen=True)
class Tasks:
    """Classifications of the same frames, which are fitted side by side: labels int [n, T], of `sizes` classes each."""

    frames: LabelledFrames
    labels: np.ndarray
    sizes: list[int]


class _Stack:
    """All tasks × l2 as one stacked linear map [width, T · L · C] on the rows of a feature matrix, and its optimiser.

    Standardisation is folded into the weights of each step, so sparse features stay sparse. Gradients by hand:
    autograd would keep the [batch, heads × classes] logits several times over.
    """

    def __init__(self, matrix: Matrix, rows: np.ndarray, tasks: Tasks, l2s: list[float], device: str):
        self.matrix, self.rows, self.device = matrix, rows, device
        train = tasks.frames.of("train")
        self.mean, self.scale = (torch.from_numpy(m).float().to(device) for m in _moments(matrix, rows[train]))
        self.width, T, L, C = matrix.shape[1], len(tasks.sizes), len(l2s), max(tasks.sizes)
        self.shape = T, L, C
        # Tasks with fewer classes than C: the surplus logits are −inf, their probability and gradient zero.
        surplus = torch.arange(C, device=device) >= torch.tensor(tasks.sizes, device=device)[:, None]  # [T, C]
        self.closed = torch.zeros(T, 1, C, device=device).masked_fill_(surplus[:, None], -torch.inf)
        self.decay = torch.tensor(l2s, dtype=torch.float32, device=device)[None, :, None].expand(T, L, C).reshape(-1)
        self.W = torch.zeros(self.width, T * L * C, device=device, requires_grad=True)
        self.b = torch.zeros(T * L * C, device=device, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.W, self.b], fused=True)
        self.labels = torch.from_numpy(tasks.labels).to(device)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weights and bias that act on feature values."""
        weights = self.W * self.scale[:, None]
        return weights, self.b - self.mean @ weights

    def _logits(self, x: Any, weights: Tensor, bias: Tensor) -> Tensor:
        return (_product(x, weights) + bias).view(-1, *self.shape) + self.closed

    def _labels(self, chosen: np.ndarray) -> Tensor:
        return self.labels[torch.from_numpy(chosen).to(self.device)]

    def step(self, chosen: np.ndarray, left: float) -> None:
        """One step on the frames at the positions `chosen`; left: the share of the steps that is still to come."""
        x = _batch(self.matrix, self.rows[chosen], self.device)
        slope = torch.softmax(self._logits(x, *self.folded()), -1)
        target = self._labels(chosen)[:, :, None, None].expand(-1, -1, self.shape[1], 1)
        slope.scatter_add_(3, target, -torch.ones(target.shape, device=self.device))
        slope = slope.reshape(len(chosen), -1) / len(chosen)
        self.b.grad = slope.sum(0)
        self.W.grad = (_product(x.T, slope) - self.mean[:, None] * self.b.grad) * self.scale[:, None] + (
            self.decay * self.W
        )
        self.optimiser.param_groups[0]["lr"] = LEARNING_RATE / self.width**0.5 * left
        self.optimiser.step()

    def hits(self, chosen: np.ndarray, weights: Tensor, bias: Tensor) -> Tensor:
        """Frames at the positions `chosen` whose class is told right [T, L]."""
        found = torch.zeros(self.shape[:2])
        for start in range(0, len(chosen), BLOCK):
            block = chosen[start : start + BLOCK]
            logits = self._logits(_batch(self.matrix, self.rows[block], self.device), weights, bias)
            found += (logits.argmax(-1) == self._labels(block)[:, :, None]).sum(0).cpu()
        return found


class _Best:
    """For each task and l2, the weights after the epoch that told most val frames right; of equals, the first."""

    def __init__(self, width: int, shape: tuple[int, int, int]):
        T, L, C = shape
        self.hits, self.epoch = torch.full((T, L), -1.0), torch.zeros(T, L, dtype=torch.int64)
        self.W, self.b = torch.zeros(T, L, width, C), torch.zeros(T, L, C)

    def update(self, hits: Tensor, epoch: int, weights: Tensor, bias: Tensor) -> None:
        """Keep what is better than before. hits [T, L], weights [width, T · L · C], bias [T · L · C]."""
        T, L, width, C = self.W.shape
        better = hits > self.hits
        self.hits[better], self.epoch[better] = hits[better], epoch
        self.W[better] = weights.view(width, T, L, C).permute(1, 2, 0, 3).cpu()[better]
        self.b[better] = bias.view(T, L, C).cpu()[better]

    def fit(self, task: int, size: int, l2s: list[float]) -> SoftmaxFit:
        """The best l2 of a task with `size` classes."""
        i = int(self.hits[task].argmax())
        weights, bias = self.W[task, i, :, :size].T.contiguous().numpy(), self.b[task, i, :size].numpy()
        return SoftmaxFit(weights, bias, l2s[i], int(self.epoch[task, i]))


@torch.no_grad()
def fit_softmax(matrix: Matrix, rows: np.ndarray, tasks: Tasks, cfg: FitCfg, device: str) -> list[SoftmaxFit]:
    """Fit all tasks × l2 at once; returns the best on val for each task."""
    train, val = tasks.frames.of("train"), tasks.frames.of("val")
    stack = _Stack(matrix, rows, tasks, cfg["l2"], device)
    best = _Best(stack.width, stack.shape)
    batches, step = range(0, len(train), BATCH), 0
    for epoch in range(cfg["epochs"]):
        order = np.random.default_rng([cfg["seed"], 6, epoch]).permutation(train)
        for start in batches:
            stack.step(np.sort(order[start : start + BATCH]), 1 - step / (cfg["epochs"] * len(batches)))
            step += 1
        weights, bias = stack.folded()
        best.update(stack.hits(val, weights, bias), epoch + 1, weights, bias)
    return [best.fit(task, size, cfg["l2"]) for task, size in enumerate(tasks.sizes)]


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
