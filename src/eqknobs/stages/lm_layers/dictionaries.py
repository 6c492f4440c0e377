"""SAEs of a speech LM's layers: which pitch of sound and which stream their features stand for.

Low- and high-frequency features as the blog has them are read here as: the class of spectral centroid in which a
feature's weight in the probe of the code is largest. What that would show by itself tell random features (`random_topk`
of the probes) and a probe of shuffled labels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import h5py
import numpy as np
import pandas as pd
import scipy.sparse

from eqknobs.corpus.cache import ActivationCache
from eqknobs.device import gpu_lock, pick_device
from eqknobs.io import read_csv, write_csv
from eqknobs.sae import train_sae
from eqknobs.sae.training import SAECfg
from eqknobs.stages.lm_layers.compute import BINNING
from eqknobs.stages.lm_layers.ranking import ACOUSTIC
from eqknobs.stages.lm_layers.turns import STREAMS, read_index
from eqknobs.stages.probes.compute import (
    SCORED,
    FitCfg,
    ProbesCfg,
    Question,
    Sources,
    Tasks,
    ask,
    fit_softmax,
    times,
)
from eqknobs.stages.probes.spaces import Matrix, make_spaces

SAE, RANDOM = "sae", "random"
TOP = 20  # activations of a feature that say what stream it is of
TAGGED = 0.8  # the share of them from which on it is
TAGS = ("user", "agent", "text")  # heard; said, where no text token is written; said, where one is


class LayerSaesCfg(TypedDict):
    """A TopK SAE (see `eqknobs.sae`), and the layers that have one."""

    layers: list[int]
    d_sae: int
    k: int
    aux_k: int
    lr: float
    batch_size: int
    epochs: int


class DictionariesCfg(TypedDict):
    """bins: of the centroid; l2, epochs: of the probes of codes."""

    sae: LayerSaesCfg
    bins: int
    l2: list[float]
    epochs: int
    seed: int
    device: NotRequired[str]
    content: NotRequired[dict[str, str]]


def train_dictionaries(
    turns_csv: str | Path,
    index_json: str | Path,
    labels_h5: str | Path,
    folder: str | Path,
    out_csv: str | Path,
    out_features_csv: str | Path,
    cfg: DictionariesCfg,
) -> None:
    """Train one SAE a layer on both streams, below `folder`, and say what its features stand for.

    out_csv: one row a layer, stream, space (sae, random) and clip of val and test: id, speaker, split, frames, correct
    (of the centroid's probe); out_features_csv: one row a layer, space and feature that fires on train: `fired` (share
    of train frames), `user_share`, `agent_share`, `text_share` (of its largest activations), `tag`, and of each stream
    `<stream>_class`, `<stream>_shuffled` (of the centroid, that it weighs most for, true and shuffled labels; empty
    where it does not fire there), `classes`.
    """
    device, sae = pick_device(cfg.get("device") or "cpu"), cfg["sae"]
    caches, turns = read_index(index_json)["caches"]["trained"], read_csv(turns_csv).set_index("id")
    variant = SAECfg(
        variant="topk",
        d_sae=sae["d_sae"],
        k=sae["k"],
        aux_k=sae["aux_k"],
        dead_epochs=2,
        lr=sae["lr"],
        batch_size=sae["batch_size"],
        epochs=sae["epochs"],
    )
    scores: list[pd.DataFrame] = []
    features: list[pd.DataFrame] = []
    for layer in sae["layers"]:
        cache_h5, home = caches[f"residual.{layer}"], Path(folder) / f"residual.{layer}"
        train_sae(cache_h5, home, variant, cfg["seed"], device)
        with ActivationCache(cache_h5) as cache, gpu_lock(device):
            table = cache.utterances.join(turns[["clip", "stream"]], on="id")
            asked = dict(_questions(cache, Sources(cache_h5, labels_h5, manifest=turns_csv), table, cfg))
            kinds = _kinds(labels_h5, table)
            spaces = make_spaces(cache, {SAE: home}, cfg["seed"])
            for space, name in ((SAE, f"sae:{SAE}"), (RANDOM, "random_topk")):
                matrix = spaces[name].matrix()
                about = {"layer": layer, "space": space}
                found = _features(matrix, table, kinds)
                for stream, question in asked.items():
                    classes, shuffled, rows = _probed(matrix, question, table, cfg, device)
                    alive = _fires(matrix, question.frames.rows[question.frames.of("train")])[found["feature"]]
                    found[f"{stream}_class"] = np.where(alive, classes[found["feature"]], np.nan)
                    found[f"{stream}_shuffled"] = np.where(alive, shuffled[found["feature"]], np.nan)
                    found["classes"] = question.sizes[_column(question)]
                    scores.append(rows.assign(stream=stream, **about))
                features.append(found.assign(**about))
    write_csv(out_csv, pd.concat(scores, ignore_index=True))
    write_csv(out_features_csv, pd.concat(features, ignore_index=True))


def _column(question: Question) -> int:
    return question.binnings.index(BINNING)


def _questions(
    cache: ActivationCache, sources: Sources, table: pd.DataFrame, cfg: DictionariesCfg
) -> Iterator[tuple[str, Question]]:
    settings: ProbesCfg = {"property": ACOUSTIC, **_fit(cfg), "bins": cfg["bins"]}
    for stream in STREAMS:
        turns = np.flatnonzero(table["stream"] == stream)
        yield stream, ask(cache, sources, settings, [0], turns)


def _fit(cfg: DictionariesCfg) -> FitCfg:
    return {"l2": cfg["l2"], "epochs": cfg["epochs"], "seed": cfg["seed"]}


def _kinds(labels_h5: str | Path, table: pd.DataFrame) -> np.ndarray:
    """The place in `TAGS` of each frame."""
    with h5py.File(labels_h5, "r", locking=False) as file:
        written = file["written"][:]
    said = np.repeat((table["stream"] == "agent").to_numpy(), table["frames"])
    return np.where(said, np.where(written, TAGS.index("text"), TAGS.index("agent")), TAGS.index("user"))


def _fires(matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    """Share of some rows on which each feature is active [width]."""
    return np.asarray((matrix[rows] > 0).mean(0)).ravel()


def _features(matrix: Matrix, table: pd.DataFrame, kinds: np.ndarray) -> pd.DataFrame:
    """The features that fire on train, with the kinds of frames in which each is largest."""
    train = np.flatnonzero(np.repeat((table["split"] == "train").to_numpy(), table["frames"]))
    fired = _fires(matrix, train)
    columns = scipy.sparse.csc_array(matrix)
    found = []
    for feature in np.flatnonzero(fired):
        part = slice(columns.indptr[feature], columns.indptr[feature + 1])
        values, rows = columns.data[part], columns.indices[part]
        top = rows[np.argsort(-values, kind="stable")[:TOP]]
        shares = np.bincount(kinds[top], minlength=len(TAGS)) / len(top)
        tag = TAGS[int(shares.argmax())] if shares.max() >= TAGGED else "mixed"
        found.append({"feature": feature, "fired": fired[feature], "tag": tag})
        found[-1] |= {f"{kind}_share": share for kind, share in zip(TAGS, shares, strict=True)}
    return pd.DataFrame(found)


def _probed(
    matrix: Matrix, question: Question, table: pd.DataFrame, cfg: DictionariesCfg, device: str
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """The class that each feature weighs most for, by true and by shuffled labels [width], and counts by clip."""
    at, frames = _column(question), question.frames
    labels = np.stack([question.classes[:, at], question.shuffled[:, at]], 1)
    true, other = fit_softmax(matrix, frames.rows, Tasks(frames, labels, [question.sizes[at]] * 2), _fit(cfg), device)
    places = np.flatnonzero(np.isin(frames.split, SCORED))
    told = (times(matrix, frames.rows[places], true.W.T) + true.b).argmax(1)
    turns = table.iloc[frames.utterance[places]]
    rows = pd.DataFrame({key: turns[key].to_numpy() for key in ("clip", "speaker", "split")})
    rows = rows.assign(frames=1, correct=(told == labels[places, 0]).astype(int))
    sums = rows.groupby(["clip", "speaker", "split"], as_index=False).sum().rename(columns={"clip": "id"})
    return true.W.argmax(0), other.W.argmax(0), sums
