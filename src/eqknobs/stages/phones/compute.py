"""Features named after phones, and how well their names tell the phone of a frame.

AudioSAE's procedure (arXiv 2602.05027, section 4.3 of the notes): a feature is named after a phone if more than half of
its firing is on frames of that phone; a frame is *matched* if any feature that fires on it has the right name. With
fifty features on a frame some name is right by luck, so the same is done with labels shifted in time, and beside stands
what a reader would do: take the name of the strongest feature. Names are given on train and judged on test, whose
speakers are others. Linear probes of codes, of raw activations and of log-mel are those of the stage `probes`.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import write_csv, write_json
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE
from eqknobs.sae.firing import codes
from eqknobs.stages.probes.compute import ProbesCfg, Sources, ask, fit_space, majority
from eqknobs.stages.probes.spaces import make_spaces

BASE = ("raw", "logmel")  # spaces that are probed beside the SAEs' codes
COLUMNS = "space id speaker split method labels frames correct".split()


class PhonesCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`)."""

    selection: str
    purity: float
    min_firings: int
    shifts: int
    l2: list[float]
    epochs: int
    seed: int
    content: NotRequired[dict[str, str]]


def read_phones(labels_h5: str | Path, frames: int) -> tuple[np.ndarray, list[str]]:
    """Phone of each frame of a cache, int64 [frames], −1 where there is none, and the phones' names.

    Raises EqknobsError if the labels hold no phones or belong to another cache.
    """
    with h5py.File(labels_h5, "r", locking=False) as file:
        if "phone" not in file:
            raise EqknobsError(f"{labels_h5}: no phones; give the corpus phone labels, or set phones: null")
        found, names = file["phone"][:].astype(np.int64), list(map(str, file["phone"].attrs["names"]))
    if len(found) != frames:
        raise EqknobsError(f"{labels_h5}: {len(found)} frames, the cache has {frames}; make the labels again")
    return found, names


def named(fires: csr_matrix, phone: np.ndarray, phones: int, purity: float, least: int) -> np.ndarray:
    """Phone after which each feature is named, int64 [m], −1 without one.

    fires: frames × features; phone: of each frame, [frames], −1 where there is none: such frames do not count.
    """
    known = np.flatnonzero(phone >= 0)
    member = csr_matrix((np.ones(len(known)), (phone[known], known)), (phones, len(phone)))
    on = np.asarray((member @ (fires > 0).astype(np.float64)).todense())  # phones × features
    total = on.sum(0)
    best = on.argmax(0)
    good = (total >= least) & (on.max(0) > purity * total)
    return np.where(good, best, -1)


def judged(code: csr_matrix, phone: np.ndarray, names: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each frame is told right, bool [frames]: `any_match`, `top_feature` (of the features with a name).

    code: frames × features, activations; names: of `named`. A frame without a named feature is wrong.
    """
    with_name = csr_matrix(code[:, names >= 0])
    own = names[names >= 0]
    any_match, top = np.zeros(len(phone), bool), np.full(len(phone), -1)
    rows = np.repeat(np.arange(len(phone)), np.diff(with_name.indptr))
    said = own[with_name.indices]
    any_match[rows[said == phone[rows]]] = True
    order = np.lexsort((with_name.data, rows))  # the strongest of a row comes last
    top[rows[order]] = said[order]
    return {"any_match": any_match & (phone >= 0), "top_feature": (top == phone) & (phone >= 0)}


def shifted_labels(phone: np.ndarray, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels moved in a circle inside each clip, by another number of frames in each; frames: of each clip."""
    parts, start = [], 0
    for count in frames:
        by = rng.integers(1, count) if count > 1 else 0
        parts.append(np.roll(phone[start : start + count], by))
        start += count
    return np.concatenate(parts)


def _of_clips(cache: ActivationCache, phone: np.ndarray, clips: pd.DataFrame) -> np.ndarray:
    """The labels of the frames of these clips, one clip after another."""
    start = dict(zip(cache.utterances["id"], cache.utterances["start"], strict=True))
    return np.concatenate([phone[start[clip.id] : start[clip.id] + clip.frames] for clip in clips.itertuples()])


def _by_clip(clips: pd.DataFrame, phone: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """id, speaker, split, frames (with a phone), correct, of each clip that has any."""
    clip = np.repeat(np.arange(len(clips)), clips["frames"])
    known = phone >= 0
    found = clips[["id", "speaker", "split"]].assign(
        frames=np.bincount(clip[known], minlength=len(clips)),
        correct=np.bincount(clip[known], weights=right[known], minlength=len(clips)).astype(int),
    )
    return found[found["frames"] > 0]


def name_features(
    cache: ActivationCache, sae: SAE, phone: np.ndarray, phones: list[str], cfg: PhonesCfg
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows (clip by clip of test: method, labels `true` or `shifted`, frames, correct) and what the features are named.

    phone: of all frames of the cache. Shifted labels are shifted on train, before features are named; the counts of all
    shifts are added up.
    """
    k = getattr(sae.config, "k", 0) if cfg["selection"] == "clip" else 0
    fit_code, fit_clips = codes(cache, sae, ["train"], k)
    code, clips = codes(cache, sae, ["test"], k)
    fit_phone, test_phone = _of_clips(cache, phone, fit_clips), _of_clips(cache, phone, clips)
    rng = np.random.default_rng([cfg["seed"], 29])
    rows, names = [], np.full(code.shape[1], -1)
    for shift in tqdm(range(cfg["shifts"] + 1), desc="phones", unit="shift"):
        labels = fit_phone if not shift else shifted_labels(fit_phone, fit_clips["frames"].to_numpy(), rng)
        given = named(fit_code, labels, len(phones), cfg["purity"], cfg["min_firings"])
        names = given if not shift else names
        for method, right in judged(code, test_phone, given).items():
            found = _by_clip(clips, test_phone, right)
            rows.append(found.assign(method=method, labels="shifted" if shift else "true"))
    table = pd.concat(rows, ignore_index=True)
    keys = ["id", "speaker", "split", "method", "labels"]
    table = table.groupby(keys, as_index=False)[["frames", "correct"]].sum()
    known = test_phone >= 0
    active = np.asarray((code[known][:, names >= 0] > 0).sum(1)).ravel()
    about = {
        "names": {phones[p]: int((names == p).sum()) for p in np.unique(names[names >= 0])},
        "features": [int(j) for j in np.flatnonzero(names >= 0)],
        "phones": [phones[names[j]] for j in np.flatnonzero(names >= 0)],
        "named": int((names >= 0).sum()),
        "d_sae": int(code.shape[1]),
        "named_on": float(active.mean()) if len(active) else None,
        "on": float((code[known] > 0).sum() / max(known.sum(), 1)),
    }
    return table, about


def probe_phones(cache: ActivationCache, sources: Sources, cfg: PhonesCfg, pieces: Pieces) -> pd.DataFrame:
    """Softmax-linear probes of the phone, and always saying the most frequent one: COLUMNS, clip by clip of test.

    method: probe (space: those of BASE, and the code of each SAE; labels: true | shuffled) or majority. Raises
    EqknobsError as `eqknobs.stages.probes.compute.ask`.
    """
    fit: ProbesCfg = {"property": "phone", "l2": cfg["l2"], "epochs": cfg["epochs"], "seed": cfg["seed"]}
    question = ask(cache, sources, fit)
    code = cfg.get("content", {}).get("code")
    made_of = [code, cache.digest() if pieces.folder else None, question.digest(), dict(fit)]
    counted = [("majority", "majority", "true", majority(question)["category"])]
    for name, space in make_spaces(cache, sources.saes, cfg["seed"], sources.labels).items():
        if name in BASE or name.startswith("sae:"):
            make = partial(fit_space, space, question, fit, "cpu")
            fitted = pieces.arrays("phone_probes", [made_of, space.made_of], make)
            counted += [(name, "probe", labels, fitted[f"{labels}:category:scores"]) for labels in ("true", "shuffled")]
    tables = []
    for space_name, method, labels, counts in counted:
        found = pd.DataFrame(counts[:, [0, 2, 3]].astype(np.int64), columns=["utterance", "frames", "correct"])
        found = found.groupby("utterance", as_index=False).sum()
        about = cache.utterances.iloc[found["utterance"]][["id", "speaker", "split"]].reset_index(drop=True)
        tables.append(found.join(about).assign(space=space_name, method=method, labels=labels))
    table = pd.concat(tables, ignore_index=True)
    return table.loc[table["split"] == "test", COLUMNS]


def score_phones(
    cache_h5: str | Path,
    labels_h5: str | Path,
    sae_dirs: Mapping[str, Path],
    out_csv: str | Path,
    out_json: str | Path,
    cfg: PhonesCfg,
    pieces: Pieces | None = None,
) -> None:
    """Name the features of a target's SAEs, judge the names, and fit the probes that they are held against.

    pieces: where fitted probes are kept; by default nowhere. out_csv: COLUMNS: space (`sae:<sae>`, `raw`, `logmel`,
    `majority`), method (any_match | top_feature | probe | majority), labels (true | shifted, of a probe shuffled).
    out_json: by SAE the named features, how many names each phone has, features on in a frame and those with a name.
    Raises EqknobsError as `read_phones` and `probe_phones`, and if train or test have no frame.
    """
    tables, found = [], {}
    with ActivationCache(cache_h5) as cache:
        phone, phones = read_phones(labels_h5, len(cache.acts))
        for name, folder in sorted(sae_dirs.items()):
            rows, found[name] = name_features(cache, SAE.load(folder), phone, phones, cfg)
            tables.append(rows.assign(space=f"sae:{name}"))
        tables.append(probe_phones(cache, Sources(cache_h5, labels_h5, sae_dirs), cfg, pieces or Pieces(None)))
    write_csv(out_csv, pd.concat(tables, ignore_index=True)[COLUMNS])
    write_json(out_json, {"purity": cfg["purity"], "min_firings": cfg["min_firings"], "phones": phones, "saes": found})
