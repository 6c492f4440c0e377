"""Which features of one SAE are found again in another: AudioSAE's overlap of firing patterns, with its nulls.

χ(a, b) = frames on which both fire / frames on which either fires, over the frames of a split (arXiv 2602.05027,
section 3.3.1). A feature a of A is found again in B at θ if max_b χ(a, b) > θ; coverage is the share of such features.
All intersections of two dictionaries are one product AᵀB of sparse matrices, frames × features.

What the figure is to be held against, all by the same arithmetic: B's patterns shifted in time inside each clip, which
keeps rates, runs and co-firing; features as frequent that fire independently, p_a p_b / (p_a + p_b − p_a p_b); and two
dictionaries that were never trained, which look at the same frames. Features that hardly ever fire overlap by luck, so
they are left out (`min_firings`).
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.evidence.stats import bootstrap_weights
from eqknobs.io import file_sha256, write_csv, write_json
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE, new_sae
from eqknobs.sae.firing import Firing, firing

DENSE = 0.06  # share of ones from which a dense product is faster than a sparse one
FEATURES = "feature fires best found shift rate cosine duplicate"


class StabilityCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`), and the pairs that it compares."""

    pairs: list[list[Any]]  # kind, sae, target_a, seed_a, target_b, seed_b
    homes: dict[str, str]  # "<target> <sae>" -> the target under which that SAE lies
    split: str
    selection: str
    thetas: list[float]
    min_firings: int
    shifts: int
    resamples: int  # draws of a bootstrap over speakers and clips
    seed: int
    content: NotRequired[dict[str, str]]  # digests, of the code among them


class Source(NamedTuple):
    """Where a pair's SAE and its frames are."""

    cache: Path
    folder: Path


def aligned(a: Firing, b: Firing) -> tuple[Firing, Firing]:
    """Both on the frames of the clips that both have: of each clip as many as the shorter one has.

    Raises EqknobsError if there is no clip in common, or one has twice as many frames as the other: another rate.
    """
    if a.clips.equals(b.clips):
        return a, b
    both = a.clips.merge(b.clips, on=["id", "speaker"], suffixes=("_a", "_b"))
    sums = both[["frames_a", "frames_b"]].sum()
    if both.empty or sums.max() > 1.2 * sums.min():
        raise EqknobsError(
            "stability: two targets have no clips in common or another number of frames a second; "
            "leave models out of stability.pairs"
        )
    both["frames"] = both[["frames_a", "frames_b"]].min(axis=1)
    clips = both[["id", "speaker", "frames"]]

    def cut(one: Firing) -> Firing:
        starts = dict(zip(one.clips["id"], one.bounds()[:-1], strict=True))
        rows = np.concatenate([np.arange(starts[c.id], starts[c.id] + c.frames) for c in clips.itertuples()])
        return Firing(one.on[rows], clips)

    return cut(a), cut(b)


def overlap(a: csr_matrix, b: csr_matrix, skip_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """max_b χ(a, b) of each feature of A, float64 [m_a], 0 where it never fires with any, and that b, int64 [m_a].

    a, b: frames × features, 1 where one fires. skip_self: A against itself, without χ(a, a).
    """
    both, fires_a, fires_b = _together(a, b), _rates(a), _rates(b)
    rows = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
    chi = both.data / (fires_a[rows] + fires_b[both.indices] - both.data)
    if skip_self:
        chi[rows == both.indices] = 0
    best, found = np.zeros(both.shape[0]), np.zeros(both.shape[0], np.int64)
    filled = np.flatnonzero(np.diff(both.indptr))
    if len(filled):
        best[filled] = np.maximum.reduceat(chi, both.indptr[filled])
        top = np.flatnonzero(chi == best[rows])[::-1]  # the first of several that are as good is written last
        found[rows[top]] = both.indices[top]
    return best, found


def _together(a: csr_matrix, b: csr_matrix) -> csr_matrix:
    """AᵀB, sparse, its columns in order; of dense codes the dense product is the faster one."""
    dense = a.nnz * b.nnz > DENSE**2 * np.prod(a.shape, dtype=float) * np.prod(b.shape, dtype=float)
    both = csr_matrix(a.toarray().T @ b.toarray()) if dense else csr_matrix(a.T @ b)
    both.sort_indices()
    return both


def _rates(on: csr_matrix) -> np.ndarray:
    """Frames on which each feature fires."""
    return np.asarray(on.sum(axis=0)).ravel().astype(np.float64)


def redrawn(a: csr_matrix, b: csr_matrix, clips: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """χ of features with their matches in bootstrap draws of clips, [draws, m].

    a, b: frames × features, column j of `b` the match of column j of `a`; weights: how often each draw has each clip,
    [draws, clips]. The match is not looked for again in a draw: the best of many is larger in every draw than it is.
    """
    frames = clips["frames"].to_numpy()
    clip_of = np.repeat(np.arange(len(frames)), frames)
    member = csr_matrix((np.ones(len(clip_of), np.float32), (clip_of, np.arange(len(clip_of)))))
    both, one, other = (weights @ (member @ on).toarray() for on in (a.multiply(b).tocsr(), a, b))
    either = one + other - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def by_rate(fires_a: np.ndarray, fires_b: np.ndarray, frames: int) -> np.ndarray:
    """max_b of what χ(a, b) is expected to be if the two fire independently, at their rates, [m_a]."""
    p_a, p_b = fires_a / frames, (fires_b / frames).max(initial=0)
    return np.divide(p_a * p_b, p_a + p_b - p_a * p_b, out=np.zeros_like(p_a), where=p_a + p_b > 0)


def shifted(one: Firing, rng: np.random.Generator) -> csr_matrix:
    """The firing with each clip's frames moved in a circle, by another number of frames in each clip."""
    bounds = one.bounds()
    rows = []
    for first, last in itertools.pairwise(bounds):
        by = rng.integers(1, last - first) if last - first > 1 else 0
        rows.append(np.roll(np.arange(first, last), by))
    return one.on[np.concatenate(rows)]


def _cosines(a: SAE, b: SAE, live_a: np.ndarray, live_b: np.ndarray) -> np.ndarray:
    """Largest cosine of each decoder direction of A with one of B, in z-scored units; NaN of other widths."""
    if a.config.d_in != b.config.d_in or not len(live_b):
        return np.full(len(live_a), np.nan)
    one, other = (
        torch.nn.functional.normalize(sae.W_dec.detach()[torch.from_numpy(live)], dim=1)
        for sae, live in ((a, live_a), (b, live_b))
    )
    return torch.cat([(part @ other.T).max(1).values for part in one.split(1024)]).numpy().astype(np.float64)


def compare_features(a: Firing, b: Firing, saes: tuple[SAE, SAE], same_site: bool, cfg: StabilityCfg) -> dict[str, Any]:
    """Features of A among those of B.

    Returns `features`: a table of FEATURES as columns of plain values, one entry a feature of A that fires often
    enough: frames on which it fires, best χ, the feature of B that has it, its χ after a shift (mean over shifts), by
    rate, the largest cosine of decoder directions (of one site only, else None) and the best χ with another feature
    of A itself; `coverage`: θ -> draws of a bootstrap over speakers and clips of the share of features found again,
    and `shifted`: θ -> that share for each shift; `all_covered`: θ -> number of features of A with χ > θ, however
    rare (what AudioSAE divides by d_sae); frames, clips, speakers, d_sae.
    """
    a, b = aligned(a, b)
    fires_a, fires_b = _rates(a.on), _rates(b.on)
    live_a, live_b = (np.flatnonzero(fires >= cfg["min_firings"]) for fires in (fires_a, fires_b))
    on_a, on_b = a.on[:, live_a], b.on[:, live_b]
    best, found = overlap(on_a, on_b)
    rng = np.random.default_rng([cfg["seed"], 17])
    moved = [overlap(on_a, shifted(Firing(on_b, b.clips), rng))[0] for _ in range(cfg["shifts"])]
    weights = bootstrap_weights(a.clips["speaker"].tolist(), cfg["resamples"], cfg["seed"])
    draws = redrawn(on_a, on_b[:, found], a.clips, weights) if len(live_b) else np.zeros((1, len(live_a)))
    every, _ = overlap(a.on, b.on)
    cosine = _cosines(*saes, live_a, live_b) if same_site else np.full(len(live_a), np.nan)

    def shares(values: Iterable[np.ndarray], theta: float) -> list[float]:
        return [float((value > theta).mean()) if len(value) else float("nan") for value in values]

    columns = {
        "feature": live_a,
        "fires": fires_a[live_a].astype(int),
        "best": best.round(6),
        "found": live_b[found] if len(live_b) else found,
        "shift": np.mean(moved, axis=0).round(6),
        "rate": by_rate(fires_a[live_a], fires_b[live_b], a.on.shape[0]).round(6),
        "cosine": cosine.round(6),
        "duplicate": overlap(on_a, on_a, skip_self=True)[0].round(6),
    }
    values = {name: [None if v != v else v for v in column.tolist()] for name, column in columns.items()}
    return {
        "features": values,
        "coverage": {f"{theta:g}": shares(draws, theta) for theta in cfg["thetas"]},
        "shifted": {f"{theta:g}": shares(moved, theta) for theta in cfg["thetas"]},
        "all_covered": {f"{theta:g}": int((every > theta).sum()) for theta in cfg["thetas"]},
        "frames": a.on.shape[0],
        "clips": len(a.clips),
        "speakers": int(a.clips["speaker"].nunique()),
        "d_sae": a.on.shape[1],
    }


class _Reader:
    """Opens each cache once and makes the firing of each SAE once."""

    def __init__(self, cfg: StabilityCfg):
        self.cfg = cfg
        self.kept: dict[tuple[Path, Path, bool], tuple[SAE, Firing]] = {}

    def __call__(self, source: Source, untrained: bool = False) -> tuple[SAE, Firing]:
        key = (source.cache, source.folder, untrained)
        if key not in self.kept:
            with ActivationCache(source.cache) as cache:
                sae, split = SAE.load(source.folder), self.cfg["split"]
                k: float = getattr(sae.config, "k", 0) if self.cfg["selection"] == "clip" else 0
                if untrained:
                    trained = self(source)[1].on
                    k = trained.nnz / trained.shape[0]  # fires as often, so that its firing overlaps no more by luck
                    sae = new_sae(sae.config, sae.mean, sae.std).requires_grad_(False).eval()
                self.kept[key] = sae, firing(cache, sae, split, k)
        return self.kept[key]


def _compared(reader: _Reader, a: Source, b: Source, untrained: bool, cfg: StabilityCfg) -> dict[str, Any]:
    (sae_a, fires_a), (sae_b, fires_b) = reader(a, untrained), reader(b, untrained)
    return compare_features(fires_a, fires_b, (sae_a, sae_b), a.cache == b.cache, cfg)


def _listed(pairs: list[list[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """(kind, pair), each pair of seeds also as `untrained`, once an SAE."""
    begun = set()
    for pair in pairs:
        yield pair[0], pair
        if pair[0] == "seeds" and pair[1] not in begun:
            begun.add(pair[1])
            yield "untrained", pair


def score_stability(
    sources: dict[tuple[str, str, int], Source],
    out_csv: str | Path,
    out_json: str | Path,
    cfg: StabilityCfg,
    pieces: Pieces | None = None,
) -> None:
    """Compare all pairs of a target.

    sources: (target, SAE, seed) -> where it is. out_csv: kind, sae, a, b and FEATURES, one row a feature; `a`, `b`
    name target and seed. out_json: the same pairs with what `compare_features` finds besides. Kind `untrained`: the
    first pair of seeds of each SAE as they were before training, with as many features on as the trained ones have.
    Raises EqknobsError for a split without frames, or targets that do not fit.
    """
    pieces, reader = pieces or Pieces(None), _Reader(cfg)
    tables, found = [], []
    hashes: dict[Path, Any] = {}

    def identity(source: Source) -> list[Any]:
        if source.cache not in hashes:
            with ActivationCache(source.cache) as cache:
                hashes[source.cache] = cache.digest() if pieces.folder else None
        if source.folder not in hashes:
            hashes[source.folder] = [file_sha256(source.folder / f) for f in ("config.json", "sae.safetensors")]
        return [hashes[source.cache], hashes[source.folder]]

    own = {key: value for key, value in cfg.items() if key not in ("pairs", "content", "device")}
    for kind, (_, sae, target_a, seed_a, target_b, seed_b) in tqdm(
        list(_listed(cfg["pairs"])), desc="pairs", unit="pair"
    ):
        a, b = sources[target_a, sae, seed_a], sources[target_b, sae, seed_b]
        made_of = [cfg.get("content", {}).get("code"), own, kind == "untrained", identity(a), identity(b)]
        make = partial(_compared, reader, a, b, kind == "untrained", cfg)
        scores = dict(pieces.json("stability", made_of, make))
        about = {"kind": kind, "sae": sae, "a": f"{target_a} #{seed_a}", "b": f"{target_b} #{seed_b}"}
        tables.append(pd.DataFrame(scores.pop("features")).assign(**about))
        found.append({**about, "split": cfg["split"], **scores})
    columns = ["kind", "sae", "a", "b", *FEATURES.split()]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    write_csv(out_csv, table[columns])
    write_json(out_json, {"selection": cfg["selection"], "min_firings": cfg["min_firings"], "pairs": found})
