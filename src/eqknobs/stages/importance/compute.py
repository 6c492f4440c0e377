"""The importance map of latent dimensions, and its test: remove the least important ones and measure.

The blog published the map (composition of SAE encoder and probe) and never ablated it; here it competes at equal
size with the probe on raw latents, with the variance, with itself upside down and with random sets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import read_csv, write_json
from eqknobs.pieces import Pieces
from eqknobs.sae import SAE
from eqknobs.sound.renders import Condition, open_codec, pick_clips, render_conditions, render_pieces
from eqknobs.stages.probes.compute import ProbeFiles, load_probe

EXPENDABLE, CRITICAL = 0.3, 0.7  # the blog's thresholds on the normalised map
BINNING = "equal_width"  # of the centroid probe behind the maps, as in the blog
JUDGED = ("composition", "raw_probe", "inverted")  # whose ablations are listened to, beside some random sets


def composition(w_enc: np.ndarray, w_probe: np.ndarray) -> np.ndarray:
    """I_i = Σ_j |W_enc[j, i]| Σ_k |W_probe[k, j]| divided by its maximum, float64 [d]: how far dimension i reaches
    the probe's classes through the features. w_enc [m, d], w_probe [classes, m]."""
    values = np.abs(w_probe).sum(0, dtype=np.float64) @ np.abs(w_enc).astype(np.float64)
    return values / values.max()


def importance_maps(
    w_enc: np.ndarray, w_probe: np.ndarray, w_raw: np.ndarray, std: np.ndarray
) -> dict[str, np.ndarray]:
    """Name -> importance [d], maximum 1: composition; raw_probe Σ_k |W_raw[k, i]|; variance of the dimension;
    inverted (1 − composition: the exact reverse order). w_raw [classes, d], std [d] of the train frames.
    """
    raw = np.abs(w_raw).sum(0, dtype=np.float64)
    found = composition(w_enc, w_probe)
    return {
        "composition": found,
        "raw_probe": raw / raw.max(),
        "variance": np.square(std) / np.square(std).max(),
        "inverted": 1 - found,
    }


def removal_orders(
    maps: dict[str, np.ndarray], random_sets: int, seed: int
) -> dict[tuple[str, int | None], np.ndarray]:
    """(map, seed of a random set or None) -> dimensions in the order of removal, least important first."""
    orders: dict[tuple[str, int | None], np.ndarray] = {
        (name, None): np.argsort(values, kind="stable") for name, values in maps.items()
    }
    orders["inverted", None] = orders["composition", None][::-1]  # also where importances tie
    width = len(maps["composition"])
    for i in range(random_sets):
        orders["random", i] = np.random.default_rng([seed, 13, i]).permutation(width)
    return orders


def ablation(removed: np.ndarray, mode: str, mean: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """An edit [frames, d] -> [frames, d] that sets the dimensions `removed` to the train mean, or to zero."""
    values = mean[removed].astype(np.float32) if mode == "mean" else np.float32(0)

    def edit(acts: np.ndarray) -> np.ndarray:
        acts = acts.copy()
        acts[:, removed] = values
        return acts

    return edit


def importance_conditions(maps: dict[str, np.ndarray], mean: np.ndarray, cfg: dict[str, Any]) -> list[Condition]:
    """Every ablation; columns map, mode (mean | zero | none), removed (share of the width), removed_dims, seed.

    Removed are the shares `removed` and `word_removed`, and as many dimensions as the composition map calls
    expendable. Judged (`keep`), by mean ablation at that count and at `word_removed`: the maps in JUDGED and
    `word_random_sets` random sets; besides `keep_critical` (all but the critical dimensions of the composition map
    to their mean) and the round trip with nothing removed (map and mode `none`).
    """
    width, importance = len(mean), maps["composition"]
    expendable = int((importance < EXPENDABLE).sum())
    listened = {expendable, *(round(share * width) for share in cfg["word_removed"])}
    counts = sorted({*listened, *(round(share * width) for share in cfg["removed"])} - {0})

    def condition(name: str, mode: str, removed: np.ndarray, seed: int | None, keep: bool, label: str) -> Condition:
        columns = {"map": name, "mode": mode, "removed": len(removed) / width}
        columns |= {"removed_dims": len(removed), "seed": seed}
        edit = ablation(removed, mode, mean) if len(removed) else None
        return Condition(label, columns, edit=edit, codebooks=cfg["codebooks"], keep=keep)

    nothing = np.array([], dtype=np.int64)
    spared = np.flatnonzero(importance < CRITICAL)
    conditions = [
        condition("none", "none", nothing, None, True, "none"),
        condition("keep_critical", "mean", spared, None, True, "keep_critical"),
    ]
    for (name, seed), order in removal_orders(maps, cfg["random_sets"], cfg["seed"]).items():
        heard = name in JUDGED or (name == "random" and seed < cfg["word_random_sets"])
        for mode in cfg["modes"]:
            for count in counts:
                label = f"{name}{'' if seed is None else seed}.{mode}.{count}"
                keep = heard and mode == "mean" and count in listened
                conditions.append(condition(name, mode, order[:count], seed, keep, label))
    return conditions


def render_importance(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    sae_dirs: dict[str, Path],
    probes_npz: ProbeFiles,
    out_json: str | Path,
    out_dir: str | Path,
    signal_csv: str | Path,
    cfg: dict[str, Any],
    pieces: Pieces | None = None,
) -> None:
    """Compute the maps and render the ablations on test clips; see `render_conditions` for the sound files.

    probes_npz: of the centroid. cfg: `model`, `site`, `sae`, `codebooks`, `clips`, `removed`, `word_removed`
    (shares), `random_sets`, `word_random_sets`, `modes`, `seed`. out_json: `width`, `sae`, `counts` (expendable,
    moderate, critical of the composition map), `thresholds`, `maps` (name -> values [width]).
    """
    clips = pick_clips(read_csv(manifest_csv), "test", cfg["clips"])
    sae = SAE.load(sae_dirs[cfg["sae"]])
    probes = (load_probe(probes_npz, space, BINNING)[0] for space in (f"sae:{cfg['sae']}", "raw"))
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model:
        maps = importance_maps(sae.W_enc.numpy(), *probes, cache.std)
        conditions = importance_conditions(maps, cache.mean, cfg)
        kept = render_pieces(pieces, model, cfg)
        render_conditions(model, cfg["site"], clips, cache, conditions, out_dir, signal_csv, pieces=kept)
    values = maps["composition"]
    counts = {
        "expendable": int((values < EXPENDABLE).sum()),
        "moderate": int(((values >= EXPENDABLE) & (values < CRITICAL)).sum()),
        "critical": int((values >= CRITICAL).sum()),
    }
    write_json(
        out_json,
        {
            "width": len(values),
            "sae": cfg["sae"],
            "counts": counts,
            "thresholds": {"expendable": EXPENDABLE, "critical": CRITICAL},
            "maps": {name: [float(f"{v:.6g}") for v in found] for name, found in maps.items()},
        },
    )
