"""Write a model smaller, as packed integers, and write it back as its own library reads it."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from eqknobs.errors import EqknobsError, counted
from eqknobs.io import atomic_path, require_output
from eqknobs.models import KINDS, load_model
from eqknobs.models.base import Pretrained, one_line
from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.config import read_raw
from eqknobs.packing.files import NAME, companions_of, is_packed_folder, write_packed
from eqknobs.packing.modules import bytes_resident, pack_modules, unpack_modules
from eqknobs.packing.plan import Plan, mean_bits, packable
from eqknobs.packing.quantise import BITS

BUNDLED = Path("resources/models")


def compress(
    model: str,
    plan: str,
    out: str | Path,
    kind: str | None = None,
    keep: Sequence[str] = (),
    revision: str | None = None,
    **options: Any,
) -> str:
    """Write a packed folder of a model; returns what became smaller, in words.

    model: folder, hub id or the name of a bundled model; plan: a JSON file, or `uniform:<bits>` for all that can be
    packed but what `keep` names (embeddings, codebooks), with `options` of `Plan`; kind: as for `load_model`, by
    default what the model's config.json says.

    All but the weights is checked before the model is loaded. Raises EqknobsError: bad or foreign plan, an `out` that
    holds something, a model that cannot be loaded.
    """
    folder = _new_folder(out)
    widths = _uniform(plan)
    if widths is None and (options or keep):
        raise EqknobsError(f"--plan {plan}: the file says it all; leave out the options of uniform plans")
    chosen = _read_plan(Path(plan)) if widths is None else Plan({}, **options)
    if chosen.rounding == "gptq":
        raise EqknobsError(f"--plan {plan}: gptq needs calibration data, which only Python gives it; take mse")
    path = str(BUNDLED / model) if not Path(model).exists() and (BUNDLED / model).is_dir() else model
    if is_packed_folder(path):
        raise EqknobsError(
            f"--model {path}: is packed already; unpack it first, or take the model that it was made from"
        )
    kind = kind or _kind(path, revision)
    if kind not in KINDS:
        raise EqknobsError(f"--model {path}: is of kind {kind!r}, which is not known; name one of {', '.join(KINDS)}")
    if kind == "speechtokenizer":
        raise EqknobsError(f"--model {path}: a SpeechTokenizer is not in transformers' format and cannot be packed")
    if kind == "moshi":
        files = find_files("model", path, revision)
        lm = load_net(files, _stored_type(files.weights))
        before, shapes = files.weights.stat().st_size, packable(lm)
        chosen = chosen if widths is None else Plan.uniform(packable(lm, "embeddings" not in keep), widths, **options)
        pack_modules(lm, chosen)
        save_net(lm, folder, files.tokenizer, _codec(path, files.config, folder), chosen)
    else:
        net = _network(kind, path, revision)
        before, shapes = _bytes(path) or bytes_resident(net), packable(net)
        kept = packable(net, "embeddings" not in keep, "codebooks" not in keep)
        chosen = chosen if widths is None else Plan.uniform(kept, widths, **options)
        write_packed(folder, net, chosen, companions_of(path))
    after = (folder / NAME).stat().st_size
    return (
        f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.1%}): {len(chosen.bits)} of "
        f"{counted(len(shapes), 'tensor')} at {mean_bits(shapes, chosen):.2f} bits"
    )


def unpack(folder: str | Path, out: str | Path) -> str:
    """Write a packed folder as one with float32 weights, which transformers (a Moshi: `kind: moshi`) loads as any
    other; returns what became larger, in words. The values are those that the packed folder gives when it is loaded.

    Raises EqknobsError: no packed folder, a bad or cut one, an `out` that holds something.
    """
    folder, target = Path(folder), _new_folder(out)
    if not is_packed_folder(folder):
        raise EqknobsError(f"{folder}: has no {NAME}; give a folder that eqknobs compress wrote")
    kind = _kind(str(folder), None)
    if kind == "moshi":
        files = find_files("model", str(folder))
        moshi = load_net(files)
        unpack_modules(moshi)
        save_net(moshi, target, files.tokenizer, _codec(folder, files.config, target))
    elif kind in KINDS:
        net = _network(kind, str(folder), None)
        with atomic_path(target) as temporary:
            net.save_pretrained(temporary)
            for file in companions_of(folder):
                if file.name != "config.json":  # which names the type of the weights
                    shutil.copyfile(file, temporary / file.name)
    else:
        raise EqknobsError(f"{folder}: config.json is of type {kind!r}; known are {', '.join(KINDS)}")
    before = (folder / NAME).stat().st_size
    return f"{before / 1e6:.2f} MB -> {_bytes(target) / 1e6:.2f} MB"


def _kind(path: str, revision: str | None) -> str:
    """The kind of model that a config.json is of; kyutai's and NVIDIA's have other ways to say it."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        with one_line(f"--model {path}: no such folder, and as a hub id it cannot be had; check id and network"):
            file = Path(hf_hub_download(path, "config.json", revision=revision))
    raw = read_raw(file, f"--model {path}")
    found = str(raw.get("model_type", "moshi" if "depformer_dim" in raw else "unnamed"))
    return "moshi" if found == "personaplex" else found


def _stored_type(weights: Path) -> torch.dtype:
    """The type in which a Moshi's tensors are stored, so that loading copies nothing."""
    with one_line(f"{weights}: not a readable safetensors file"), safe_open(weights, framework="pt") as file:
        kind = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


def _network(kind: str, path: str, revision: str | None) -> Any:
    """A transformers network."""
    model = load_model({"name": "model", "kind": kind, "path": path, "revision": revision, "device": "cpu"})
    assert isinstance(model, Pretrained)
    return model.net


def _bytes(folder: str | Path) -> int:
    """Bytes of the weights in a folder; 0 if it is none."""
    return sum(file.stat().st_size for file in Path(folder).glob("model*.safetensors"))


def _new_folder(out: str | Path) -> Path:
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EqknobsError(f"--out {folder}: is there already and not empty; name a new folder")
    return require_output(folder, folder=True)


def _uniform(plan: str) -> int | None:
    """The width of a uniform plan; None: a file."""
    name, colon, width = plan.partition(":")
    if name != "uniform" or not colon:
        return None
    if not width.isdecimal() or int(width) not in BITS:
        raise EqknobsError(f"--plan {plan}: a uniform plan has {BITS[0]} to {BITS[-1]} bits, as in uniform:4")
    return int(width)


def _read_plan(file: Path) -> Plan:
    try:
        return Plan.from_json(json.loads(file.read_text()), f"--plan {file}")
    except (OSError, ValueError) as error:  # no file, no UTF-8, no JSON
        raise EqknobsError(
            f"--plan {file}: cannot be read as JSON ({error}); give a plan's file or uniform:<bits>"
        ) from error


def _codec(model: str | Path, config: Path | None, out: Path) -> str | None:
    """The codec that a Moshi's config.json names, relative to the new folder; None where it names none."""
    named = None if config is None else read_raw(config, str(model)).get("eqknobs", {}).get("codec")
    if named is None or config is None:
        return None
    return os.path.relpath((config.parent / named).resolve(), out.resolve())
