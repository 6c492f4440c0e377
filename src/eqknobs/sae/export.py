"""SAELens's folders: `cfg.json` and `sae_weights.safetensors`, written from an SAE of ours and read back.

SAELens knows no z-scoring by dimension, so it is folded into the weights. With z = (x − μ) / σ, c = σ b_dec + μ and
W′ = W_enc / σ the unit-norm variants' h = W_enc (z − b_dec) + b_enc is W′ (x − c) + b_enc, and `rms_l1`'s
h = W_enc z + b_enc is W′ (x − c) + b_enc + W_enc b_dec; both decode to f (σ W_dec) + c. That is SAELens's
`apply_b_dec_to_input`. Its other setting would suit `rms_l1` as well, but subtracts W′ x − W′ μ, two large numbers.
h is the same number as before, so thresholds and the k largest stay what they are.

Source: SAELens 6.54, `saes/sae.py` (`process_sae_in`, `load_from_disk`), `saes/topk_sae.py`, `saes/jumprelu_sae.py`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path, read_json, require_output, write_json
from eqknobs.sae.base import SAE, make_config, new_sae
from eqknobs.sae.rms_l1 import EPS
from eqknobs.sae.topk import TopKConfig
from eqknobs.sae.unit_norm import UnitNormSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS = "6.54.0"  # whose format this is; below 6 it reads cfg.json as something else
ARCHITECTURES = {"topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "rms_l1": "rms_l1"}


def export_saelens(folder: str | Path, out: str | Path, metadata: dict[str, Any]) -> None:
    """Write the SAE of a folder (see `SAE.save`) to the folder `out`, as a whole or not at all.

    `SAELens.SAE.load_from_disk(out)` then gives the same codes and reconstructions from raw latents; for `rms_l1`
    after importing `eqknobs.sae.saelens_rms`. metadata: what SAELens keeps about the origin, `model_name` and
    `hook_name` above all; None counts as left out. `metadata.eqknobs` is our own configuration.
    Raises EqknobsError: not an SAE of ours, weights SAELens would take differently, `out` holds other files or cannot
    be written.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {CONFIG, WEIGHTS}):
        raise EqknobsError(f"{out} exists and is not a SAELens folder; name a new one")
    require_output(out, folder=True, name="OUT")
    sae = SAE.load(folder)
    if sae.config.variant not in ARCHITECTURES:
        raise EqknobsError(f"{folder}: no SAELens format for {sae.config.variant}, only {', '.join(ARCHITECTURES)}")
    if sae.config.input_scale == "unit_norm":
        raise EqknobsError(f"{folder}: division by each frame's norm cannot be folded into weights; use scalar")
    tensors = _folded(sae)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise EqknobsError(f"{folder}: weights are not finite once the normaliser is folded in; train it again")
    if "threshold" in tensors and (tensors["threshold"] < 0).any():  # SAELens applies a ReLU besides
        raise EqknobsError(f"{folder}: thresholds below 0; train it again")
    try:
        with atomic_path(out) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / WEIGHTS)
            write_json(temporary / CONFIG, _saelens_config(sae, metadata))
    except (OSError, SafetensorError) as error:
        raise EqknobsError(f"cannot write {out}: {error}; name another folder") from error


def _folded(sae: SAE) -> dict[str, Tensor]:
    """SAELens's tensors for raw latents: W_enc [d, m], W_dec [m, d], b_enc [m], b_dec [d], perhaps threshold [m]."""
    ours = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    offset = 0 if isinstance(sae, UnitNormSAE) else ours["W_enc"] @ ours["b_dec"]
    tensors = {
        "W_enc": (ours["W_enc"] / ours["std"]).T,
        "W_dec": ours["W_dec"] * ours["std"],
        "b_enc": ours["b_enc"] + offset,
        "b_dec": ours["b_dec"] * ours["std"] + ours["mean"],
    }
    if "threshold" in ours:  # BatchTopK has one for all features
        tensors["threshold"] = ours["threshold"].expand(sae.config.d_sae)
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _saelens_config(sae: SAE, metadata: dict[str, Any]) -> dict[str, Any]:
    values = {
        "architecture": ARCHITECTURES[sae.config.variant],
        "d_in": sae.config.d_in,
        "d_sae": sae.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {key: value for key, value in metadata.items() if value is not None}
        | {
            "sae_lens_version": SAELENS,
            "sae_lens_training_version": None,  # left out, SAELens would put its own here
            "training_architecture": sae.config.variant,
            "eqknobs": sae.config.as_dict(),
        },
    }
    if isinstance(sae.config, TopKConfig):
        # Folding σ stretches the decoder's rows, which must not change which features are the largest.
        values |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    elif values["architecture"] == "rms_l1":
        values["eps"] = EPS
    return values


def import_saelens(folder: str | Path) -> SAE:
    """Read a SAELens folder of architecture `topk`, `jumprelu` or `rms_l1`; gradients off.

    The SAE has std 1, since SAELens's weights act on raw latents; a b_dec applied to the input becomes its mean, which
    keeps SAELens's order of operations. Training settings are those in
    `metadata.eqknobs` where it is of the same variant (an exported BatchTopK comes back as JumpReLU).
    Raises EqknobsError: missing or unreadable files, other architectures, settings that have no counterpart here.
    """
    folder = Path(folder)
    try:
        cfg, tensors = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
        sae = _from_saelens(cfg, {name: tensor.double() for name, tensor in tensors.items()})
    except EqknobsError as error:
        raise EqknobsError(f"{folder}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise EqknobsError(f"{folder} is not a SAELens folder: {str(error)[:200]}; export it again") from error
    return sae.requires_grad_(False).eval()


def _from_saelens(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    variant = cfg["architecture"]
    if variant not in ARCHITECTURES.values():
        raise EqknobsError(f"cannot read SAELens's architecture {variant!r}, only topk, jumprelu and rms_l1")
    plain = {"normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False}
    for key, value in (plain | {"eps": EPS}).items():
        if cfg.get(key, value) != value:
            raise EqknobsError(f"cannot read a SAELens folder with {key} {cfg[key]!r}, only {value!r}")
    known = cfg.get("metadata", {}).get("eqknobs", {})
    values = known if known.get("variant") == variant else {"l0": cfg["d_sae"]} if variant == "jumprelu" else {}
    values = {key: value for key, value in values.items() if key != "input_scale"}  # which is folded in
    values = values | {key: cfg[key] for key in ("d_in", "d_sae", "k") if key in cfg} | {"variant": variant}
    config = make_config(values)
    sae = new_sae(config, torch.zeros(config.d_in), torch.ones(config.d_in))
    w_enc, b_dec = tensors["W_enc"].T, tensors["b_dec"]
    mean = torch.zeros_like(b_dec)
    if cfg.get("apply_b_dec_to_input", True):  # then b_dec is what our normaliser calls the mean
        mean, b_dec = b_dec, mean
    elif isinstance(sae, UnitNormSAE):  # subtracts b_dec from its input, which the file does not
        tensors["b_enc"] = tensors["b_enc"] + w_enc @ b_dec
    if "threshold" in tensors:  # SAELens applies a ReLU besides
        tensors["threshold"] = tensors["threshold"].clamp_min(0)
    sae.load_state_dict(tensors | {"W_enc": w_enc, "b_dec": b_dec, "mean": mean, "std": sae.std})
    return sae
