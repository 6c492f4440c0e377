"""AudioSAE's checkpoints (`ae.pt`, dictionary-learning's BatchTopK), read safely and made ours.

`encoder.weight` [F, d], `encoder.bias` [F], `decoder.weight` [d, F], `b_dec` [d], `k`, perhaps `threshold`; beside it
perhaps `config.json`, its keys flat or under `trainer`. What is fed to it is not in the file, and paper and code leave
open whether that is raw, each frame divided by its norm, or all by one number: a cache of the layer settles it.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.io import read_json, require_output
from eqknobs.sae.base import SAE, make_config, new_sae, normaliser
from eqknobs.sae.firing import clip_codes
from eqknobs.sae.training import BLOCK, SAMPLE_FRAMES

CLIPS = 50
MOST_FVU = 0.5  # above it, none of the scales is what the SAE was trained on
NEAR_K = 2.0  # an L0 within k / 2 … 2 k is near k
SCALES = ("raw", "unit_norm", "scalar")


class Imported(NamedTuple):
    """What `import_audiosae` found.

    scale: the input_scale chosen; measured: input_scale -> (FVU, L0); threshold: where it is from, and its value.
    """

    scale: str
    measured: dict[str, tuple[float, float]]
    threshold_from: str
    threshold: float

    def lines(self) -> list[str]:
        """For people."""
        scales = [f"input {name}: FVU {fvu:.3f}, L0 {l0:.1f}" for name, (fvu, l0) in self.measured.items()]
        return [*scales, f"input_scale {self.scale}; threshold {self.threshold:.4g}, {self.threshold_from}"]


def read_ae(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an `ae.pt` in our form: W_enc, W_dec [F, d], b_enc [F], b_dec [d], k [], perhaps threshold [].

    No code in the file is run. Raises EqknobsError: no such file, other objects than tensors in it, tensors missing or
    of shapes that do not fit each other or the config.json beside it, values that are not finite, k out of range.
    """
    path = Path(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise EqknobsError(f"{path}: not a file of plain weights ({reason}); download ae.pt again") from error
    config = _config(path.with_name("config.json"))
    try:
        return _ours(found, config)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)[:160]
        raise EqknobsError(f"{path} is not AudioSAE's ae.pt: {reason}") from error


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = read_json(path)
    except ValueError as error:
        raise EqknobsError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(values, dict) or not isinstance(values.get("trainer", {}), dict):
        raise EqknobsError(f"{path}: not the config.json of an SAE; download it again")
    return {**values, **values.get("trainer", {})}


def _ours(found: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
    weights = {ours: found[theirs].float() for ours, theirs in names.items()}
    weights["W_dec"] = weights["W_dec"].T.contiguous()
    features, width = weights["W_enc"].shape
    for name, tensor in weights.items():
        wanted = {"b_enc": (features,), "b_dec": (width,)}.get(name, (features, width))
        if tuple(tensor.shape) != wanted:
            shape = list(found[names[name]].shape)
            raise ValueError(f"{names[name]} has shape {shape} beside an encoder {[features, width]}")
        if not tensor.isfinite().all():
            raise ValueError(f"{names[name]} is not finite")
    for key, value in (("activation_dim", width), ("dict_size", features)):
        if config.get(key, value) != value:
            raise ValueError(f"config.json beside it says {key} {config[key]}, the weights {value}")
    k = int(found["k"] if "k" in found else config["k"])
    if not 0 < k <= features:
        raise ValueError(f"k is {k} of {features} features")
    weights["k"] = torch.tensor(k)
    threshold = float(found.get("threshold", -1.0))  # below 0: never measured
    return weights | ({"threshold": torch.tensor(threshold)} if 0 <= threshold < np.inf else {})


def import_audiosae(ae: str | Path, cache_h5: str | Path, out: str | Path) -> Imported:
    """Write the SAE of an `ae.pt` to the folder `out` as `SAE.save` does.

    Its input_scale is that of `raw`, `unit_norm` and `scalar` with the lowest FVU (raw units, around the mean) on up to
    50 clips of the cache among those whose L0 is within k / 2 and 2 k; its threshold is the file's where that is 0 or
    more, else the quantile that leaves k features a train frame. Where the file has none, scales are compared with the
    k·n largest activations of each clip. Raises EqknobsError: see `read_ae`; another width than the cache's, no train
    frames, no scale that fits (FVU above .5), other files in `out`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {"config.json", "sae.safetensors"}):
        raise EqknobsError(f"{out} exists and is no SAE's folder; name a new one")
    require_output(out, folder=True)
    weights = read_ae(ae)
    with ActivationCache(cache_h5) as cache:
        if weights["W_enc"].shape[1] != cache.acts.shape[1]:
            widths = f"{weights['W_enc'].shape[1]} wide, the cache {cache_h5} {cache.acts.shape[1]}"
            raise EqknobsError(f"{ae} is {widths}; give the cache of its own layer and model")
        train = cache.rows("train")
        if not len(train):
            raise EqknobsError(
                f"{cache_h5}: no train frames, which settle scale and threshold; raise data.splits.train"
            )
        saes = {scale: _made(weights, scale, cache) for scale in SCALES}
        measured = {scale: _measured(sae, cache, "threshold" not in weights) for scale, sae in saes.items()}
        k = int(weights["k"])
        fits = {s: fvu for s, (fvu, l0) in measured.items() if k / NEAR_K <= l0 <= NEAR_K * k and fvu <= MOST_FVU}
        if not fits:
            found = "; ".join(f"{scale} FVU {fvu:.2f} at L0 {l0:.0f}" for scale, (fvu, l0) in measured.items())
            raise EqknobsError(
                f"{ae} does not rebuild {cache_h5} at any scale of its input ({found}; needed: FVU up to {MOST_FVU} at "
                f"an L0 near {k}); give the cache of its own layer and model"
            )
        scale = min(fits, key=fits.__getitem__)
        sae = saes[scale]
        if "threshold" not in weights:
            sample = train[:: max(1, -(-len(train) // SAMPLE_FRAMES))]
            blocks = (sample[i : i + BLOCK] for i in range(0, len(sample), BLOCK))
            sae._calibrate((sae._normalised(torch.from_numpy(np.array(cache.acts[b]))) for b in blocks), len(sample))
    sae.save(out)
    origin = "as in the file" if "threshold" in weights else f"the quantile that leaves {k} a train frame"
    return Imported(scale, measured, origin, float(sae.state_dict()["threshold"]))


def _made(weights: dict[str, Tensor], scale: str, cache: ActivationCache) -> SAE:
    features, width = weights["W_enc"].shape
    shape = {"d_in": width, "d_sae": features, "k": int(weights["k"])}
    config = make_config({"variant": "batchtopk", "input_scale": scale, **shape})
    sae = new_sae(config, *normaliser(config, cache.mean, cache.std))
    kept = {name: tensor for name, tensor in weights.items() if name != "k"}
    sae.load_state_dict(sae.state_dict() | kept)
    return sae.requires_grad_(False).eval()


def _measured(sae: SAE, cache: ActivationCache, largest: bool) -> tuple[float, float]:
    """(FVU, L0) on up to 50 clips, evenly taken; largest: the code is the clip's k·n largest activations."""
    clips = cache.utterances[cache.utterances["frames"] > 0]
    clips = clips.iloc[:: max(1, -(-len(clips) // CLIPS))]
    raws = [np.array(cache.acts[c.start : c.start + c.frames]) for c in clips.itertuples()]
    centre = np.concatenate(raws).mean(0, dtype=np.float64)
    error = total = active = 0.0
    for raw in raws:
        code = clip_codes(sae, raw, sae.config.k if largest else 0)  # type: ignore[attr-defined]
        error += np.square(raw - sae.decode(code.toarray(), raw), dtype=np.float64).sum()
        total += np.square(raw - centre).sum()
        active += (code.data > 0).sum()
    return error / total if total else np.inf, active / sum(map(len, raws))
