"""The one feature that tells a label best: AudioSAE's label search, with what it lacks.

For every label (a value of a category: a sex, an accent, a phone) each feature with each threshold says which clips or
frames have it; the best by F1 on val is tested once, on test, whose speakers are others (arXiv 2602.05027, appendix F,
chooses and reports on the same clips). Beside it the best dimension of the raw activations, either way up, chosen the
same way; always saying yes, F1 = 2p / (1 + p); and the whole search with shuffled labels. p is of permuted labels on
test: of whole speakers where the label belongs to the speaker, of clips where it belongs to the clip; labels of frames
are shifted in time inside clips.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.corpus.properties import PROPERTIES
from eqknobs.errors import EqknobsError
from eqknobs.io import read_csv, write_csv, write_json
from eqknobs.sae import SAE

CLIP_COLUMNS = "sae property label space id speaker split true told both".split()


class LabelSearchCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`)."""

    properties: list[str]
    frames: int
    least: int
    shuffles: int
    permutations: int
    seed: int
    content: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Samples:
    """What is told apart in one split: clips, or frames of clips.

    values: features or dimensions, [n, m]; clip: place of each sample's clip in `clips`, [n]; clips: id, speaker,
    split.
    """

    values: np.ndarray
    clip: np.ndarray
    clips: pd.DataFrame


class Thresholds:
    """All thresholds of all columns of values [n, m], sorted once for any number of labels.

    They lie halfway between neighbouring values of a column, above `floor` (of codes 0: a feature that is off says
    nothing).
    """

    def __init__(self, values: np.ndarray, floor: float):
        self.order = np.argsort(-values, axis=0, kind="stable")
        self.falling = np.take_along_axis(values, self.order, axis=0)
        last = np.full((1, values.shape[1]), floor) if np.isfinite(floor) else self.falling[-1:] - 1
        self.below = np.maximum(np.vstack([self.falling[1:], last]), floor)
        self.never = self.falling <= self.below  # no threshold between equal values

    def best(self, has: np.ndarray) -> tuple[int, float, float]:
        """(column, threshold, F1): `values > threshold` tells `has`, bool [n], best; of equal F1s the first column."""
        right = np.cumsum(has[self.order], axis=0, dtype=np.float32)
        said = np.arange(1, len(has) + 1, dtype=np.float32)[:, None]
        f1 = np.where(self.never, -1, 2 * right / (said + has.sum()))
        column = int(f1.max(0).argmax())
        place = int(f1[:, column].argmax())
        threshold = (float(self.falling[place, column]) + float(self.below[place, column])) / 2
        return column, threshold, float(f1[place, column])


def f1_of(said: np.ndarray, has: np.ndarray) -> float:
    """F1 = 2·both / (said + has); 0 where there is neither."""
    return float(2 * (said & has).sum() / max(said.sum() + has.sum(), 1))


def permuted(has: np.ndarray, samples: Samples, of_frames: bool, rng: np.random.Generator) -> np.ndarray:
    """Labels moved to others: of frames by a shift inside each clip, else of whole speakers where no speaker has both
    values, else of clips."""
    if of_frames:
        moved = has.copy()
        for one in np.unique(samples.clip):
            rows = np.flatnonzero(samples.clip == one)
            moved[rows] = np.roll(has[rows], rng.integers(1, len(rows)) if len(rows) > 1 else 0)
        return moved
    speaker = samples.clips["speaker"].to_numpy()[samples.clip]
    index = np.unique(speaker, return_inverse=True)[1]
    share = np.bincount(index, weights=has) / np.bincount(index)
    if np.isin(share, (0, 1)).all():
        return rng.permutation(share.astype(bool))[index]
    return rng.permutation(has)


def _wanted(has: dict[str, np.ndarray], least: int) -> bool:
    return all(least <= label.sum() <= len(label) - least for label in has.values())


def search(
    val: tuple[Samples, Thresholds, np.ndarray], test: tuple[Samples, np.ndarray], of_frames: bool, cfg: LabelSearchCfg
) -> dict[str, Any]:
    """Best column and threshold on val, tested on test, with p, and searches of shuffled labels.

    val, test: samples and labels, of val the thresholds too. Returns column, threshold, f1_val, f1_test, said (bool [n
    of test]), p and shuffled (F1 on test of each search with shuffled labels).
    """
    (samples, thresholds, has), (test_samples, test_has) = val, test
    column, threshold, f1_val = thresholds.best(has)
    said = test_samples.values[:, column] > threshold
    f1_test = f1_of(said, test_has)
    rng = np.random.default_rng([cfg["seed"], 31])
    null = [f1_of(said, permuted(test_has, test_samples, of_frames, rng)) for _ in range(cfg["permutations"])]
    shuffled = []
    for _ in range(cfg["shuffles"]):
        other, limit, _ = thresholds.best(permuted(has, samples, of_frames, rng))
        moved = permuted(test_has, test_samples, of_frames, rng)
        shuffled.append(f1_of(test_samples.values[:, other] > limit, moved))
    p = (1 + sum(value >= f1_test for value in null)) / (1 + len(null))
    found = {"column": column, "threshold": threshold, "f1_val": f1_val, "f1_test": f1_test}
    return {**found, "said": said, "p": p, "shuffled": shuffled}


def _values(raw: np.ndarray, cache: ActivationCache, sae: SAE | None) -> np.ndarray:
    """Codes [n, m]; without an SAE, z-scored activations and their negatives [n, 2 d]."""
    if sae is not None:
        return sae.encode(raw)
    z = ((raw - cache.mean) / cache.std).astype(np.float32)
    return np.concatenate([z, -z], axis=1)


def clip_samples(cache: ActivationCache, sae: SAE | None, split: str) -> Samples:
    """The clips of a split, with the largest value of each column in each. Raises EqknobsError if there is none."""
    clips = _clips(cache, split)
    rows = [_values(np.array(cache.acts[c.start : c.start + c.frames]), cache, sae).max(0) for c in clips.itertuples()]
    return Samples(np.array(rows), np.arange(len(clips)), clips)


def frame_samples(cache: ActivationCache, sae: SAE | None, split: str, rows: np.ndarray) -> Samples:
    """Frames of a split; rows: which of the cache's, in order."""
    clips = _clips(cache, split)
    place = {utterance: i for i, utterance in enumerate(clips.index)}
    clip = np.array([place[utterance] for utterance in cache.utt_of_row[rows]])
    return Samples(_values(np.array(cache.acts[rows]), cache, sae), clip, clips)


def _clips(cache: ActivationCache, split: str) -> pd.DataFrame:
    clips = cache.utterances[cache.utterances["split"] == split].sort_values("id")
    if clips.empty:
        raise EqknobsError(f"label_search: no {split} clips in the activation cache; raise data.splits.{split}")
    return clips


def _frame_labels(labels_h5: str | Path | None, name: str) -> tuple[np.ndarray, list[str]]:
    """Code of each frame, −1 without a label, and the names. Raises EqknobsError if there are no such labels."""
    source = PROPERTIES[name].source
    assert labels_h5 is not None  # the rule's input where a property of frames is sought
    with h5py.File(labels_h5, "r", locking=False) as file:
        if source not in file:
            raise EqknobsError(f"{labels_h5}: no labels of {name}; remove {name} from label_search.properties")
        return file[source][:].astype(np.int64), list(map(str, file[source].attrs["names"]))


@dataclass(frozen=True)
class _Asked:
    """What a property asks of every space: of which rows of val and test, and the code of each."""

    name: str
    of_frames: bool
    rows: dict[str, np.ndarray]  # of the cache (frames), or of the clips of a split
    codes: dict[str, np.ndarray]
    names: list[str]


def _ask(
    cache: ActivationCache, labels_h5: str | Path | None, manifest: pd.DataFrame, name: str, cfg: LabelSearchCfg
) -> _Asked:
    """Raises EqknobsError if the manifest or the labels lack the property."""
    wanted = PROPERTIES[name]
    rows, found = {}, {}
    if wanted.level == "frame":
        code, names = _frame_labels(labels_h5, name)
        for split in ("val", "test"):
            own = cache.rows(split)
            own = own[code[own] >= 0]
            drawn = np.random.default_rng([cfg["seed"], 37]).permutation(own)[: cfg["frames"]]
            rows[split] = np.sort(drawn)
            found[split] = code[rows[split]]
        return _Asked(name, True, rows, found, names)
    if wanted.source not in manifest:
        raise EqknobsError(f"label_search: the manifest has no column {wanted.source}; leave {name} out")
    said = manifest[wanted.source].fillna("").astype(str)
    names = sorted(set(said) - {""})
    place = {value: i for i, value in enumerate(names)} | {"": -1}
    for split in ("val", "test"):
        ids = _clips(cache, split)["id"]
        rows[split] = np.arange(len(ids))
        found[split] = said.loc[ids].map(place).to_numpy()
    return _Asked(name, False, rows, found, names)


def _searched(
    cache: ActivationCache, sae: SAE | None, asked: _Asked, cfg: LabelSearchCfg
) -> Iterator[tuple[str, Samples, np.ndarray, dict[str, Any]]]:
    """Label by label (only those that enough samples of val and test have, and have not): name, samples and labels of
    test, what `search` found."""
    parts = {}
    for split in ("val", "test"):
        if asked.of_frames:
            parts[split] = frame_samples(cache, sae, split, asked.rows[split])
        else:
            parts[split] = clip_samples(cache, sae, split)
    thresholds = Thresholds(parts["val"].values, 0.0 if sae is not None else -np.inf)
    for code, label in enumerate(asked.names):
        has = {split: found == code for split, found in asked.codes.items()}
        if all(cfg["least"] <= own.sum() <= len(own) - cfg["least"] for own in has.values()):
            val = parts["val"], thresholds, has["val"]
            yield label, parts["test"], has["test"], search(val, (parts["test"], has["test"]), asked.of_frames, cfg)


def _by_clip(samples: Samples, has: np.ndarray, said: np.ndarray) -> pd.DataFrame:
    """id, speaker, split, true, told, both: counts of each clip of test."""
    count = len(samples.clips)
    columns = {"true": has, "told": said, "both": said & has}
    counts = {
        name: np.bincount(samples.clip, weights=own, minlength=count).astype(int) for name, own in columns.items()
    }
    found = samples.clips[["id", "speaker", "split"]].reset_index(drop=True).assign(**counts)
    return found[np.bincount(samples.clip, minlength=count) > 0]


def search_labels(
    cache_h5: str | Path,
    labels_h5: str | Path | None,
    manifest_csv: str | Path,
    sae_dirs: dict[str, Path],
    out_csv: str | Path,
    out_json: str | Path,
    cfg: LabelSearchCfg,
) -> None:
    """Seek the feature that tells each label best, in every SAE and among raw dimensions (SAE "", `raw`).

    out_csv: sae, property, label, space (feature | raw), id, speaker, split, true, told, both; one row a clip of test.
    labels_h5: needed for properties of frames. out_json: `searches`: sae, property, label, column, threshold, f1_val,
    f1_test, p, shuffled, samples; a raw column from d on is a dimension upside down. Raises EqknobsError if a property
    or a split is not there.
    """
    manifest = read_csv(manifest_csv).set_index("id")
    rows, searches = [], []
    with ActivationCache(cache_h5) as cache:
        saes: dict[str, SAE | None] = {
            "": None,
            **{name: SAE.load(folder) for name, folder in sorted(sae_dirs.items())},
        }
        for name in tqdm(sorted(cfg["properties"]), desc="label search", unit="property"):
            asked = _ask(cache, labels_h5, manifest, name, cfg)
            for sae, loaded in saes.items():
                for label, samples, has, found in _searched(cache, loaded, asked, cfg):
                    about = {"sae": sae, "property": name, "label": label}
                    space = "feature" if sae else "raw"
                    rows.append(_by_clip(samples, has, found.pop("said")).assign(space=space, **about))
                    searches.append({**about, **found, "samples": len(has), "d_in": int(cache.acts.shape[1])})
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=CLIP_COLUMNS)
    write_csv(out_csv, table[CLIP_COLUMNS])
    write_json(out_json, {"searches": searches})
