"""Importance maps of latent dimensions, and which of them val chooses.

The blog published one (composition of SAE encoder and probe) and never ablated it. Beside it stand forms of it that
know how large a dimension is, maps from gradients of the decoder, and the oracle: what each dimension does to the sound
when it alone is removed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eqknobs.corpus.cache import ActivationCache
from eqknobs.io import array_hash, read_csv, write_csv, write_json
from eqknobs.models import Model
from eqknobs.pieces import Pieces
from eqknobs.provenance import content
from eqknobs.sae import SAE
from eqknobs.sound import mel
from eqknobs.sound.metrics import mel_distance
from eqknobs.sound.renders import Clip, OpenedCfg, load_clip, open_codec, pick_clips, render_pieces
from eqknobs.stages.probes.compute import ProbeFiles, load_probe

EXPENDABLE, CRITICAL = 0.3, 0.7  # the blog's thresholds on the normalised map
BINNING = "equal_width"  # of the centroid probe behind the maps, as in the blog
WEIGHTS = ("composition", "raw_probe", "variance", "inverted")  # from weights and spreads alone, as are the next
SCALED = ("composition_raw", "composition_scaled", "raw_probe_scaled")
GRADIENTS = ("gradient", "fisher")
ORACLE = "ablation"
MAPS = (*WEIGHTS, *SCALED, *GRADIENTS, ORACLE)  # in the order of the tables
CONTROLS = ("inverted",)  # never chosen
DRAWS = 4  # of the log-mel spectrum, a clip, behind `fisher`
BATCH = 8  # sounds decoded at once


class MapsCfg(OpenedCfg):
    """What `compute_maps` reads of the section `importance`, beside the model and site of the target."""

    sae: str
    codebooks: int | None
    maps: list[str]  # of MAPS, composition among them
    gradient_clips: int  # of train
    oracle_clips: int  # of val
    segment_seconds: float  # of each of these clips
    val_clips: int  # whole ones, other than the oracle's, on which the maps are compared
    removed: list[float]  # shares of the width
    word_random_sets: int
    seed: int


@dataclass(frozen=True)
class MapFiles:
    """What `compute_maps` writes."""

    maps: str | Path  # JSON
    oracle: str | Path  # CSV
    val: str | Path  # CSV


# --- maps from weights -------------------------------------------------------------------------------------------


def composition(w_enc: np.ndarray, w_probe: np.ndarray) -> np.ndarray:
    """I_i = Σ_j |W_enc[j, i]| Σ_k |W_probe[k, j]| divided by its maximum, float64 [d]: how far dimension i reaches
    the probe's classes through the features. w_enc [m, d], w_probe [classes, m]."""
    values = np.abs(w_probe).sum(0, dtype=np.float64) @ np.abs(w_enc).astype(np.float64)
    return values / values.max()


def importance_maps(
    w_enc: np.ndarray, w_probe: np.ndarray, w_raw: np.ndarray, std: np.ndarray
) -> dict[str, np.ndarray]:
    """Name -> importance [d], maximum 1, of the maps in WEIGHTS and SCALED.

    w_enc [m, d] of the SAE and w_raw [classes, d] of the raw probe act on z-scored latents, w_probe [classes, m] on
    features; std [d] of the train frames.

    composition: see there. raw_probe: Σ_k |W_raw[k, i]|. variance: std_i². inverted: 1 − composition, the exact
    reverse order. On z-scored latents every dimension has spread 1, so these two maps of weights say how far the logits
    move when a dimension moves as far as it really does, and not how large that movement is for the decoder.

    composition_raw: composition_i / std_i, the same with weights in raw units (z = (x − mean) / std): how far the
    logits move by one raw unit. Times the spread std_i that is the composition map again.
    composition_scaled: composition_i · std_i, raw_probe_scaled likewise: the spread in raw units, which is what removal
    takes from the decoder, weighed by how far it moves the logits. Haufe et al. (2014, NeuroImage 87) call var_i · w_i,
    with w_i a weight in raw units, the activation pattern of a linear readout of uncorrelated inputs; this is its size.
    """
    raw = np.abs(w_raw).sum(0, dtype=np.float64)
    found = composition(w_enc, w_probe)
    per_unit, scaled, raw_scaled = found / std, found * std, raw * std
    return {
        "composition": found,
        "raw_probe": raw / raw.max(),
        "variance": np.square(std) / np.square(std).max(),
        "inverted": 1 - found,
        "composition_raw": per_unit / per_unit.max(),
        "composition_scaled": scaled / scaled.max(),
        "raw_probe_scaled": raw_scaled / raw_scaled.max(),
    }


# --- maps from sound ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """The middle of a clip: wav [1, samples] and the activations [1, frames, width] of the same time, on the CPU."""

    wav: Tensor
    acts: Tensor


def segment(model: Model, site: str, clip: Clip, seconds: float) -> Segment:
    """Whole code frames of about that many seconds; the whole of a shorter clip."""
    frames = min(model.frames(round(seconds * model.sample_rate), site), len(clip.acts))
    first = len(clip.acts) // frames // 2 * frames
    hop = model.site(site).hop
    wav = clip.wav[first * hop : (first + frames) * hop]
    return Segment(torch.from_numpy(wav)[None], torch.from_numpy(clip.acts[first : first + frames])[None])


def ablation_effects(model: Model, site: str, part: Segment, mean: np.ndarray, codebooks: int | None) -> np.ndarray:
    """dB [width]: the mel distance between the segment's decode with dimension i at the train mean, for every frame,
    and its decode with nothing changed.

    Not the rise of the distance to the untouched clip: that also falls where an error of the codec is covered by
    chance, and two halves of the clips then hardly agree on the order.
    """
    width, samples = part.acts.shape[2], part.wav.shape[1]
    found = []
    with torch.inference_mode():
        intact = model.decode_batch(part.acts, site, codebooks)[:, :samples]
        for removed in torch.arange(width).split(BATCH):
            acts = part.acts.repeat(len(removed), 1, 1)
            acts[torch.arange(len(removed)), :, removed] = torch.from_numpy(mean).float()[removed, None]
            wavs = model.decode_batch(acts, site, codebooks)[:, :samples]
            found.append(mel.mel_distances(intact, wavs, model.sample_rate).cpu())
    return torch.cat(found).numpy().astype(np.float64)


def gradient_effects(
    model: Model, site: str, part: Segment, mean: np.ndarray, seed: list[int]
) -> dict[str, np.ndarray]:
    """`gradient` and `fisher` [width] of a segment, decoded around the quantiser, before division by a maximum.

    gradient: mean over frames of |∂L/∂x_i · (x_i − mean_i)|, to first order what the frame's ablation does to L, the
    mel distance (dB) to the untouched segment.
    fisher: mean over frames of (∂ log p/∂x_i)², of log p of a log-mel spectrum (dB) drawn from a Gaussian of unit
    variance around the decoded one (the diagonal of the Fisher information by DRAWS draws; an error of the codec is
    not in it). Multiplied by var_i it is the importance.
    """
    acts = part.acts.clone().to(model.device).requires_grad_()
    wav = model.decode_batch(acts, site)[:, : part.wav.shape[1]]
    power = mel.mel_power(wav, model.sample_rate)
    original = mel.mel_power(part.wav.to(wav.device), model.sample_rate)
    distance = (mel.mel_db(power, original) - mel.mel_db(original, original)).abs().mean()
    (slope,) = torch.autograd.grad(distance, acts, retain_graph=True)
    moved = acts.detach() - torch.from_numpy(mean).float().to(acts.device)
    spectrum, random = mel.mel_db(power, power.detach()), torch.Generator().manual_seed(seed_of(seed))
    squares = []
    for draw in range(DRAWS):
        noise = torch.randn(spectrum.shape, generator=random).to(spectrum.device)
        (score,) = torch.autograd.grad((spectrum * noise).sum(), acts, retain_graph=draw < DRAWS - 1)
        squares.append(score.square().mean(1)[0])
    found = {"gradient": (slope * moved).abs().mean(1)[0], "fisher": torch.stack(squares).mean(0)}
    return {name: values.cpu().numpy().astype(np.float64) for name, values in found.items()}


def seed_of(parts: list[int]) -> int:
    """One seed made of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


# --- removal -----------------------------------------------------------------------------------------------------


def removal_orders(
    maps: dict[str, np.ndarray], random_sets: int, seed: int
) -> dict[tuple[str, int | None], np.ndarray]:
    """(map, seed of a random set or None) -> dimensions in the order of removal, least important first."""
    orders: dict[tuple[str, int | None], np.ndarray] = {
        (name, None): np.argsort(values, kind="stable") for name, values in maps.items()
    }
    if "inverted" in maps:
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


def choose(scores: dict[str, float]) -> str:
    """The map whose lowest dimensions cost the least mel distance on val; of equals the first of MAPS. scores: of all
    maps but CONTROLS, which are never chosen."""
    return min((name for name in MAPS if name in scores and name not in CONTROLS), key=lambda name: scores[name])


# --- the stage ---------------------------------------------------------------------------------------------------


class _Maps:
    """Measures on clips, each kept as a piece."""

    def __init__(self, model: Model, cache: ActivationCache, cfg: MapsCfg, pieces: Pieces):
        self.model, self.cache, self.cfg = model, cache, cfg
        self.site, self.mean, self.codebooks = cfg["site"], np.asarray(cache.mean), cfg["codebooks"]
        code = [content(file) for file in (__file__, mel.__file__)]
        self.pieces = pieces.within([*code, array_hash(self.mean), self.codebooks])

    def segments(self, clips: pd.DataFrame) -> list[tuple[Clip, Segment]]:
        found = [load_clip(self.model, self.cache, row) for row in clips.itertuples(index=False)]
        return [(clip, segment(self.model, self.site, clip, self.cfg["segment_seconds"])) for clip in found]

    def gradients(self, clips: pd.DataFrame) -> dict[str, np.ndarray]:
        """`gradient` and `fisher` [width], maximum 1, over clips of train."""

        def make(number: int, part: Segment) -> dict[str, np.ndarray]:
            return gradient_effects(self.model, self.site, part, self.mean, [self.cfg["seed"], 14, number])

        every = []
        for number, (clip, part) in enumerate(self.segments(clips)):
            made_of = [clip.sha256, array_hash(part.acts.numpy()), self.cfg["seed"], number]
            every.append(self.pieces.arrays("importance-gradients", made_of, partial(make, number, part)))
        found = {name: np.mean([one[name] for one in every], axis=0) for name in GRADIENTS}
        found["fisher"] = found["fisher"] * np.square(self.cache.std)
        return {name: values / values.max() for name, values in found.items()}

    def oracle(self, clips: pd.DataFrame) -> pd.DataFrame:
        """Columns id, speaker, split, dimension, mel_change (dB): `ablation_effects` of clips of val."""

        def make(part: Segment) -> dict[str, np.ndarray]:
            return {"dB": ablation_effects(self.model, self.site, part, self.mean, self.codebooks)}

        rows = []
        for clip, part in self.segments(clips):
            made_of = [clip.sha256, array_hash(part.acts.numpy())]
            found = self.pieces.arrays("importance-oracle", made_of, partial(make, part))["dB"]
            about = {"id": clip.id, "speaker": clip.speaker, "split": clip.split}
            rows.append(pd.DataFrame({**about, "dimension": np.arange(len(found)), "mel_change": found}))
        columns = ["id", "speaker", "split", "dimension", "mel_change"]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)

    def removal(self, clips: pd.DataFrame, maps: dict[str, np.ndarray]) -> pd.DataFrame:
        """Columns id, speaker, split, map, seed, removed, removed_dims, mel_distance (dB to the untouched clip): the
        lowest dimensions of each map, and of random sets, at their mean."""
        width = len(self.mean)
        sets: list[tuple[str, int | None, np.ndarray]] = [("none", None, np.array([], dtype=np.int64))]
        for (name, seed), order in removal_orders(maps, self.cfg["word_random_sets"], self.cfg["seed"]).items():
            counts = sorted({round(share * width) for share in self.cfg["removed"]} - {0})
            sets += [(name, seed, order[:count]) for count in counts]
        rows = []
        for row in clips.itertuples(index=False):
            clip = load_clip(self.model, self.cache, row)
            with self.pieces.pack("importance-val", [clip.sha256, array_hash(clip.acts)]) as known:
                for name, seed, removed in sets:
                    about: dict[str, Any] = {"id": clip.id, "speaker": clip.speaker, "split": clip.split}
                    about |= {"map": name, "seed": seed, "removed": len(removed) / width, "removed_dims": len(removed)}
                    key = array_hash(np.sort(removed))
                    if key not in known:
                        known[key] = self._distance(clip, removed)
                    rows.append({**about, "mel_distance": known[key]})
        return pd.DataFrame(rows)

    def _distance(self, clip: Clip, removed: np.ndarray) -> float:
        acts = ablation(removed, "mean", self.mean)(clip.acts)
        wav = self.model.decode(acts, self.site, len(clip.wav), self.codebooks)
        return mel_distance(clip.wav, wav, self.model.sample_rate)


def val_parts(manifest: pd.DataFrame, oracle: int, val: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Clips of val for the oracle, and others to compare the maps on; of fewer than asked for both get their share, and
    a single one serves both."""
    clips = pick_clips(manifest, "val", oracle + val)
    if len(clips) < oracle + val:
        oracle = max(min(oracle, 1), len(clips) * oracle // (oracle + val))
    return clips.head(oracle), clips.iloc[oracle:] if len(clips) > oracle else clips


def compute_maps(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    sae_dirs: dict[str, Path],
    probes_npz: ProbeFiles,
    out: MapFiles,
    cfg: MapsCfg,
    pieces: Pieces | None = None,
) -> None:
    """Compute the maps that `cfg["maps"]` names, and choose one on val.

    probes_npz: of the centroid. out.maps: `width`, `sae`, `counts` (expendable, moderate, critical of the composition
    map), `thresholds`, `maps` (name -> values [width], six digits), `val_mel_distance` (name -> dB, mean over clips and
    the shares `removed`), `chosen`, `absent` (map that was asked for -> why the model has none). out.oracle and
    out.val: as `_Maps.oracle` and `_Maps.removal`, by clip.
    """
    manifest = read_csv(manifest_csv)
    sae = SAE.load(sae_dirs[cfg["sae"]])
    w_probe, w_raw = (load_probe(probes_npz, space, BINNING)[0] for space in (f"sae:{cfg['sae']}", "raw"))
    oracle_clips, val_clips = val_parts(manifest, cfg["oracle_clips"] if ORACLE in cfg["maps"] else 0, cfg["val_clips"])
    with ActivationCache(cache_h5) as cache, open_codec(cfg, cache) as model:
        measure = _Maps(model, cache, cfg, render_pieces(pieces, model, cfg))
        found = importance_maps(sae.W_enc.numpy(), w_probe, w_raw, cache.std)
        absent = {}
        if not model.gradients:
            absent = {name: f"model {model.name} gives no gradients" for name in GRADIENTS if name in cfg["maps"]}
        elif set(GRADIENTS) & set(cfg["maps"]):
            found |= measure.gradients(pick_clips(manifest, "train", cfg["gradient_clips"]))
        oracle = measure.oracle(oracle_clips)
        if len(oracle):
            effects = oracle.groupby("dimension")["mel_change"].mean().to_numpy()
            found[ORACLE] = effects / effects.max()
        # As the file has them: whoever reads it removes in the same order.
        maps = {
            name: np.array([float(f"{v:.6g}") for v in found[name]])
            for name in MAPS
            if name in found and name in cfg["maps"]
        }
        val = measure.removal(val_clips, maps)
    removed = val[val["map"].isin(maps)]
    scores = {str(name): float(f"{v:.9g}") for name, v in removed.groupby("map")["mel_distance"].mean().items()}
    values = maps["composition"]
    counts = {
        "expendable": int((values < EXPENDABLE).sum()),
        "moderate": int(((values >= EXPENDABLE) & (values < CRITICAL)).sum()),
        "critical": int((values >= CRITICAL).sum()),
    }
    write_csv(out.oracle, oracle)
    write_csv(out.val, val)
    write_json(
        out.maps,
        {
            "width": len(values),
            "sae": cfg["sae"],
            "counts": counts,
            "thresholds": {"expendable": EXPENDABLE, "critical": CRITICAL},
            "maps": {name: found.tolist() for name, found in maps.items()},
            "val_mel_distance": {name: scores[name] for name in maps},
            "chosen": choose(scores),
            "absent": absent,
        },
    )
