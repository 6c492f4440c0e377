"""The test of the importance maps: remove the dimensions that each ranks lowest, beside random sets of equal size, on
test clips, and measure."""

from pathlib import Path

import numpy as np

from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import read_csv, read_json
from eqknobs.pieces import Pieces
from eqknobs.sound.renders import Condition, OpenedCfg, open_codec, pick_clips, render_conditions, render_pieces
from eqknobs.stages.importance.maps import CRITICAL, EXPENDABLE, MAPS, ORACLE, ablation, removal_orders

# Whose ablations are listened to, beside the map that val chose and some random sets.
JUDGED = ("composition", "raw_probe", "inverted", "variance", ORACLE)


class ImportanceCfg(OpenedCfg):
    """What `render_importance` reads of the section `importance`, beside the model and site of the target."""

    codebooks: int | None
    clips: int  # of test
    removed: list[float]  # shares of the width
    word_removed: list[float]
    random_sets: int
    word_random_sets: int
    modes: list[str]  # mean | zero
    seed: int


def importance_conditions(
    maps: dict[str, np.ndarray], chosen: str, mean: np.ndarray, cfg: ImportanceCfg
) -> list[Condition]:
    """Every ablation; columns map, mode (mean | zero | none), removed (share of the width), removed_dims, seed.

    Removed are the shares `removed` and `word_removed`, and as many dimensions as the composition map calls
    expendable. Judged (`keep`), by mean ablation at that count and at `word_removed`: the maps in JUDGED, the map
    `chosen` and `word_random_sets` random sets; besides `keep_critical` (all but the critical dimensions of the
    composition map to their mean) and the round trip with nothing removed (map and mode `none`).
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
        heard = name in (*JUDGED, chosen) if seed is None else seed < cfg["word_random_sets"]
        for mode in cfg["modes"]:
            for count in counts:
                label = f"{name}{'' if seed is None else seed}.{mode}.{count}"
                keep = heard and mode == "mean" and count in listened
                conditions.append(condition(name, mode, order[:count], seed, keep, label))
    return conditions


def render_importance(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    maps_json: str | Path,
    out_dir: str | Path,
    signal_csv: str | Path,
    cfg: ImportanceCfg,
    pieces: Pieces | None = None,
) -> None:
    """Render the ablations by the maps of `maps_json` on test clips; see `render_conditions` for the sound files."""
    clips, found = pick_clips(read_csv(manifest_csv), "test", cfg["clips"]), read_json(maps_json)
    maps = {name: np.array(found["maps"][name]) for name in MAPS if name in found["maps"]}
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model:
        conditions = importance_conditions(maps, found["chosen"], cache.mean, cfg)
        kept = render_pieces(pieces, model, cfg)
        render_conditions(model, cfg, clips, cache, conditions, out_dir, signal_csv, pieces=kept)
