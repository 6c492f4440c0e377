"""What is measured on trained SAEs: L0, FVU, cosine, firing density, and features found again across seeds."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import file_sha256, write_csv, write_json
from eqknobs.pieces import Pieces
from eqknobs.sae.base import SAE, new_sae

MATCH_FRAMES, MATCH_FEATURES, PERMUTATIONS = 2048, 512, 99  # cross-seed matching, bounded work
DENSITY_EDGES = np.arange(-5.0, 0.01, 0.25)  # log10 of the share of frames on which a feature fires


class SaeScoresCfg(TypedDict):
    """What `score_saes` reads."""

    seed: int  # of the permutations
    content: NotRequired[dict[str, str]]  # digests, of which `code` tells kept scores apart


def score_saes(
    cache_h5: str | Path,
    sae_dirs: dict[str, dict[int, Path]],
    out_csv: str | Path,
    out_json: str | Path,
    cfg: SaeScoresCfg,
    pieces: Pieces | None = None,
) -> None:
    """Score SAEs on val and test. sae_dirs: SAE name -> seed -> folder. pieces: where the scores of each SAE are
    kept; by default nowhere.

    out_csv: one row an (utterance, SAE, seed): id, speaker, split, sae, seed, variant, input_scale, d_in, d_sae,
    frames, l0_sum, cosine_sum (of z with ẑ), sq_error, sq_total, in z-scored units whatever the SAE's input_scale
    (each dimension weighs the same), sq_total around the train mean: FVU = Σ sq_error / Σ sq_total, 1 for the
    mean predictor.
    out_json: `{"saes": {name: {seed: {frames, dead_share, density}}}, "cross_seed": {name: ...}}`, all on val frames;
    a feature is dead there if it never fires; density is a histogram of log10(share of frames on which a feature
    fires) with dead features left out; `cross_seed` as in `match_features`, null with a single seed.
    """
    rows: list[dict[str, Any]] = []
    details: dict[str, dict[str, Any]] = {}
    matches: dict[str, dict[str, Any] | None] = {}
    pieces = pieces or Pieces(None)
    with ActivationCache(cache_h5) as cache:
        utterances = cache.utterances[cache.utterances["split"].isin(["val", "test"])]
        kept_by: list[Any] = [cfg.get("content", {}).get("code"), cache.digest() if pieces.folder else None]
        for name in sorted(sae_dirs):
            loaded = {seed: SAE.load(folder) for seed, folder in sorted(sae_dirs[name].items())}
            weights = {seed: _weights(folder) for seed, folder in sorted(sae_dirs[name].items())}
            details[name] = {}
            for seed, sae in loaded.items():
                label = f"score {name} seed {seed}"
                made_of = [*kept_by, weights[seed]]
                found = pieces.json("sae_scores", made_of, partial(_scored, cache, utterances, sae, label))
                kept = ("variant", "input_scale", "d_in", "d_sae")
                same = {"sae": name, "seed": seed} | {key: getattr(sae.config, key) for key in kept}
                rows += [score | same for score in found["scores"]]
                details[name][str(seed)] = found["firing"]
            made_of = [*kept_by, cfg["seed"], [*weights.items()]]
            matches[name] = pieces.json("sae_matches", made_of, partial(match_features, cache, loaded, cfg["seed"]))
    columns = (
        "id speaker split sae seed variant input_scale d_in d_sae frames l0_sum cosine_sum sq_error sq_total".split()
    )
    write_csv(out_csv, pd.DataFrame(rows, columns=columns))
    write_json(out_json, {"saes": details, "cross_seed": matches})


def _weights(folder: Path) -> list[str]:
    """Hashes of what an SAE is."""
    return [file_sha256(folder / file) for file in ("config.json", "sae.safetensors")]


def _scored(cache: ActivationCache, utterances: pd.DataFrame, sae: SAE, label: str) -> dict[str, Any]:
    """Rows and firing of one SAE, as plain values."""
    scores, fired, frames = _score(cache, utterances, sae, label)
    return {"scores": scores, "firing": _firing(fired, frames)}


def _blocks(cache: ActivationCache, start: int, frames: int, size: int = 4096) -> Iterator[np.ndarray]:
    for first in range(start, start + frames, size):
        yield np.array(cache.acts[first : min(first + size, start + frames)])


@torch.no_grad()
def _score(
    cache: ActivationCache, utterances: pd.DataFrame, sae: SAE, label: str
) -> tuple[list[dict[str, Any]], np.ndarray, int]:
    """Rows of one SAE, how often each feature fired on val [m], and the number of val frames."""
    mean, std = (torch.as_tensor(values, dtype=torch.float32) for values in (cache.mean, cache.std))
    rows, fired, val_frames = [], np.zeros(sae.config.d_sae, dtype=np.int64), 0
    for utterance in tqdm(utterances.itertuples(), desc=label, total=len(utterances), unit="utt"):
        squared = total = active = cosine = 0.0
        for block in _blocks(cache, utterance.start, utterance.frames):
            raw = torch.from_numpy(block)
            z = sae._normalised(raw)
            f = sae._code(z)
            rebuilt = sae._reconstruct(f)
            if sae.config.input_scale != "zscore":  # one unit for all, or their errors could not be compared
                z, rebuilt = ((x - mean) / std for x in (raw, sae._unscaled(rebuilt, raw)))
            squared += (z - rebuilt).double().square().sum().item()
            cosine += torch.cosine_similarity(z, rebuilt, dim=1).double().sum().item()
            total += z.double().square().sum().item()
            on = (f > 0).sum(0).numpy()
            active += int(on.sum())
            if utterance.split == "val":
                fired += on
                val_frames += len(z)
        keys = {key: getattr(utterance, key) for key in ("id", "speaker", "split")} | {"frames": int(utterance.frames)}
        rows.append(keys | {"l0_sum": active, "cosine_sum": cosine, "sq_error": squared, "sq_total": total})
    return rows, fired, val_frames


def _firing(fired: np.ndarray, frames: int) -> dict[str, Any]:
    if frames == 0:
        raise EqknobsError("no val frames in the activation cache; raise data.splits.val")
    share = np.log10(fired[fired > 0] / frames)
    counts, _ = np.histogram(np.maximum(share, DENSITY_EDGES[0]), bins=DENSITY_EDGES)
    return {
        "frames": frames,
        "dead_share": float((fired == 0).mean()),
        "density": {"log10_edges": DENSITY_EDGES.tolist(), "counts": counts.tolist()},
    }


def match_features(cache: ActivationCache, saes: dict[int, SAE], seed: int) -> dict[str, Any] | None:
    """How well the features of one training seed are found again in another (first two seeds), with a null.

    For each live feature of the first SAE (at most 512, drawn evenly) the best match among the live features of the
    second: cosine of the decoder columns, and IoU of the firing patterns on val frames (AudioSAE). Averages stand
    beside the mean over 99 permutations (`_null`) and p = (1 + permutations at least as good) / 100. The null of the
    cosine shuffles each column's entries; the null of the IoU shifts the second SAE's frames in a circle, which keeps
    densities and co-firing and only breaks the frame-by-frame agreement. Even dictionaries that were never trained
    pass the second, because they look at the same frames: `_untrained` is the same number for them, the baseline.
    Returns None with fewer than two seeds or no live feature.
    """
    if len(saes) < 2:
        return None
    first, second = sorted(saes)[:2]
    rng = np.random.default_rng([seed, 4])
    rows = cache.rows("val")
    raw = np.array(cache.acts[rows[:: max(1, -(-len(rows) // MATCH_FRAMES))]])
    a, on_a = _live(saes[first], raw, MATCH_FEATURES)
    b, on_b = _live(saes[second], raw)
    if not a.size or not b.size or len(raw) < 2:
        return None
    untrained = [new_sae(saes[s].config, saes[s].mean, saes[s].std) for s in (first, second)]
    (a0, on_a0), (b0, on_b0) = _live(untrained[0], raw, MATCH_FEATURES), _live(untrained[1], raw)
    shifts = rng.integers(1, len(raw), PERMUTATIONS)
    nulls = {
        "cosine": [_best_cosine(a, rng.permuted(b, axis=0)) for _ in shifts],
        "iou": [_best_iou(on_a, np.roll(on_b, shift, axis=0)) for shift in shifts],
    }
    found = {"cosine": _best_cosine(a, b), "iou": _best_iou(on_a, on_b)}
    baseline = {"cosine": _best_cosine(a0, b0), "iou": _best_iou(on_a0, on_b0)}
    result = {"seeds": [first, second], "features": [a.shape[1], b.shape[1]], "frames": len(raw)}
    for name, null in nulls.items():
        result[name] = found[name]
        result[f"{name}_untrained"] = baseline[name]
        result[f"{name}_null"] = float(np.mean(null))
        result[f"{name}_p"] = float((1 + np.sum(np.array(null) >= found[name])) / (1 + PERMUTATIONS))
    return result


def _live(sae: SAE, raw: np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unit decoder directions [d, n] and firing [N, n] (0 or 1) of the features that fire on `raw`, at most `limit`."""
    fired = sae.encode(raw) > 0
    live = np.flatnonzero(fired.any(0))
    if limit:
        live = live[:: max(1, -(-len(live) // limit))]
    columns = sae.W_dec.detach().numpy()[live].T
    return columns / np.linalg.norm(columns, axis=0), fired[:, live].astype(np.float32)


def _best_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.T @ b).max(1).mean())


def _best_iou(a: np.ndarray, b: np.ndarray) -> float:
    both = a.T @ b
    return float((both / (a.sum(0)[:, None] + b.sum(0) - both)).max(1).mean())
