"""Moshi checkpoints: finding them, reading them tensor by tensor, saving what interventions left.

A folder (or hub repository) holds `config.json`, `model.safetensors` and `tokenizer_*.model`, as kyutai and NVIDIA
publish them. `save_net` writes such a folder too; what is special about it stands in config.json under `eqknobs`.
Of a network with packed integers the weights are `packed.safetensors` (docs/packing.md).
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.models.access import gated
from eqknobs.models.base import folder_weights, weights_hash
from eqknobs.models.moshi.config import Nf4, heads_left, raw_config, read_config, read_raw, steps_left
from eqknobs.models.moshi.interventions import linears
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.models.moshi.quantise import MARK, bitsandbytes, pack, packed_linear
from eqknobs.packing.files import PackedFile, is_packed_folder, stored, write_file
from eqknobs.packing.modules import PackedModule, packed_module, put_module
from eqknobs.packing.notes import NAME as PACKED
from eqknobs.packing.plan import Plan
from eqknobs.packing.quantise import Packed

_STEPPED = re.compile(r"(.+\.self_attn\.)(in|out)_projs\.(\d+)\.weight")


@dataclass(frozen=True)
class MoshiFiles:
    """Where the parts of a checkpoint are; `tokenizer` is None if there is none.

    Early revisions on the hub have no config.json (`config` None): the tensors' shapes then say it all.
    """

    config: Path | None
    weights: Path
    tokenizer: Path | None
    revision: str  # hub commit, or first 12 hex digits of the SHA-256 of a folder's weights


def find_files(name: str, path: str, revision: str | None = None) -> MoshiFiles:
    """Locate a checkpoint in a folder or on the hub (fetching it). `name`: the model's key in the config.

    Raises EqknobsError: no such folder or hub model, files missing, gated weights (saying how to get access), a
    folder whose weights are not those of `revision`.
    """
    if Path(path).is_dir():
        return _files_of_folder(name, Path(path), revision)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise EqknobsError(f"models.{name}.path: no folder {path}; give a model folder or a hub id such as owner/name")

    def get(file: str) -> Path:
        try:
            return Path(hf_hub_download(path, file, revision=revision))
        except GatedRepoError as error:
            raise gated(name, path) from error
        except Exception as error:  # whatever the network and the hub's client come up with
            reason = next(iter(str(error).strip().splitlines()), "")
            raise EqknobsError(
                f"models.{name}: cannot get {file} of {path!r} (no such folder, so taken as a hub id); check path, "
                f"revision and network ({type(error).__name__}: {reason[:300]})"
            ) from error

    config: Path | None = None
    try:
        config = get("config.json")
    except EqknobsError as error:
        if not isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise
    raw = {} if config is None else read_raw(config, f"models.{name}")
    if config is not None:
        revision = config.parent.name  # the snapshot's folder is named after the commit; what follows reads that one
    file = get(raw.get("moshi_name", "model.safetensors"))
    revision = file.parent.name
    return MoshiFiles(config, file, get(raw.get("tokenizer_name", "tokenizer_spm_32k_3.model")), revision)


def _files_of_folder(name: str, folder: Path, revision: str | None) -> MoshiFiles:
    weights = folder_weights(folder, name)
    raw = read_raw(folder / "config.json", f"models.{name}")
    chosen = folder / (PACKED if is_packed_folder(folder) else raw.get("moshi_name", "model.safetensors"))
    if chosen not in weights:
        raise EqknobsError(f"models.{name}.path: {folder} has no {chosen.name}; Moshi's weights are one file")
    found = weights_hash([chosen])
    if revision is not None and revision != found:
        raise EqknobsError(
            f"models.{name}.revision: {folder} has weights {found}, not {revision}; mend the folder or the config"
        )
    named = [folder / raw["tokenizer_name"]] if "tokenizer_name" in raw else []
    models = [p for p in named + sorted(folder.glob("tokenizer*.model")) if p.is_file()]
    return MoshiFiles(folder / "config.json", chosen, models[0] if models else None, found)


def _open(weights: Path) -> Any:
    if weights.name == PACKED:
        return PackedFile(weights)
    try:
        return safe_open(weights, framework="pt", device="cpu")
    except Exception as error:  # OSError, SafetensorError
        raise EqknobsError(f"{weights}: not a readable safetensors file ({error}); fetch it again") from error


def load_net(
    files: MoshiFiles, dtype: torch.dtype = torch.float32, nf4: Nf4 | None = None, device: str = "cpu"
) -> MoshiNet:
    """Read a checkpoint tensor by tensor, packing on the way the linears that `nf4` names.

    dtype: of all else and of the computations. Weights that are packed in the file stay as they are. Of a depformer
    with steps for both speakers the first half is taken: the others make the user's codes; no step sees a later one.
    On a CPU, tensors that need no conversion stay mapped to the file.

    Raises EqknobsError: a pattern of `nf4` that no linear matches, unreadable file, keys or shapes that are not
    Moshi's, an architecture that is not supported.
    """
    where = str(files.weights)
    raw = {} if files.config is None else read_raw(files.config, where)
    with _open(files.weights) as file:
        names = set(file.keys())
        shapes = {name: _shape(file, name) for name in names}
        config = read_config(raw, shapes, where)
        heads = heads_left(raw, config, where)
        with torch.device("meta"):
            net = MoshiNet(config, heads, steps_left(raw, config))
        for number, layer in enumerate(net.layers):  # what removed heads gave on average
            if f"transformer.layers.{number}.self_attn.bias" in names:
                layer.self_attn.bias = nn.Parameter(torch.empty(config.dim, device="meta"), requires_grad=False)
        packable = {} if nf4 is None else dict.fromkeys(linears(net, nf4.linears), nf4)
        used: set[str] = set()
        for name, wanted in [(name, tuple(p.shape)) for name, p in net.named_parameters()]:
            source, step = _source(name, names)
            rows = wanted[0] if step is None else net.steps * wanted[0]
            if source not in names:
                raise EqknobsError(f"{where}: no tensor {source}; this is not a whole Moshi checkpoint")
            used.add(source)
            owner, _, leaf = name.rpartition(".")
            if source + MARK in names:
                parts = {key for key in names if key.startswith(source + ".")}
                used |= parts
                put_module(net, owner, _read_packed(file, source, parts, wanted, dtype, device, where))
                continue
            found = shapes[source]
            if found[1:] != wanted[1:] or found[0] < rows or (step is None and found[0] > rows):
                raise EqknobsError(
                    f"{where}: {source} is {list(found)}, but config.json makes it {[rows, *wanted[1:]]}; "
                    "the two do not belong together"
                )
            value = _read(file, source, None if step is None else slice(step * wanted[0], (step + 1) * wanted[0]))
            module = net.get_submodule(owner)
            if isinstance(value, Packed) and isinstance(module, nn.Linear | nn.Embedding):
                put_module(net, owner, packed_module(module, value.to(device), dtype))
                continue
            value = value.dequantise() if isinstance(value, Packed) else value
            if owner in packable:
                put_module(net, owner, packed_linear(*pack(value.to(device), packable[owner], dtype), dtype))
            else:
                setattr(module, leaf, nn.Parameter(value.to(device, dtype), requires_grad=False))
        if extra := sorted(name for name in names - used if not _dropped(name, net.steps)):
            raise EqknobsError(f"{where}: unknown tensor {extra[0]} (one of {len(extra)}); this is no Moshi checkpoint")
    return net.eval().requires_grad_(False)


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return file.shape(name) if isinstance(file, PackedFile) else tuple(file.get_slice(name).get_shape())


def _read(file: Any, name: str, rows: slice | None) -> Tensor | Packed:
    """A tensor, or some of its rows, as the file has it."""
    if not isinstance(file, PackedFile):
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
    value = file.get(name)
    if rows is None:
        return value
    return value.take_rows(torch.arange(rows.start, rows.stop)) if isinstance(value, Packed) else value[rows]


def _source(name: str, names: set[str]) -> tuple[str, int | None]:
    """The tensor that holds a parameter; where it holds those of all depformer steps, also which step it is."""
    if found := _STEPPED.fullmatch(name):
        stem = f"{found[1]}{found[2]}_proj"
        for source in (f"{stem}_weight", f"{stem}.weight"):
            if source in names:
                return source, int(found[3])
    elif found := re.fullmatch(r"(transformer\..+\.self_attn\.)(in|out)_proj\.weight", name):
        # kyutai's name on the hub, and the one that the moshi package itself saves
        for source in (f"{found[1]}{found[2]}_proj_weight", f"{found[1]}{found[2]}_projs.0.weight"):
            if source in names:
                return source, None
    return name, None


def _dropped(name: str, kept: int) -> bool:
    """Whether a tensor belongs to the depformer's steps beyond the first `kept`."""
    per_step = r"(depformer_in|linears|depformer_emb|depformer\.layers\.\d+\.(?:gating|self_attn\.\w+))\.(\d+)\."
    found = re.match(per_step, name)
    return found is not None and int(found[2]) >= kept - (found[1] == "depformer_emb")


def _read_packed(
    file: Any, source: str, parts: set[str], wanted: tuple[int, ...], dtype: torch.dtype, device: str, where: str
) -> nn.Module:
    library = bitsandbytes()
    stats = {key: file.get_tensor(key) for key in parts}
    try:
        state = library.functional.QuantState.from_dict(stats, device=torch.device(device))
    except Exception as error:  # KeyError, ValueError, UnicodeDecodeError, …
        raise EqknobsError(f"{where}: the scales of packed {source} are not whole ({error}); fetch it again") from error
    if tuple(state.shape) != wanted:
        raise EqknobsError(f"{where}: {source} is {list(state.shape)}, config.json wants {list(wanted)}")
    return packed_linear(file.get_tensor(source).to(device), state, dtype)


def save_net(
    net: MoshiNet,
    folder: str | Path,
    tokenizer: Path | None = None,
    codec: str | None = None,
    plan: Plan | None = None,
) -> None:
    """Write a folder that `load_net` reads back bit for bit: heads and depformer steps that are left, packed weights,
    pruned ones.

    tokenizer: the sentencepiece model to put beside the weights; codec: the codec's folder, relative to this
    one; plan: by which linears and embeddings were packed (`pack_modules`): what stays is stored as its `rest` says. An
    earlier folder there is replaced.
    """
    state: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        state[name] = value.detach().cpu().contiguous()
    modules = {name: module for name, module in net.named_modules() if isinstance(module, PackedModule)}
    packed = {f"{name}.weight": module.packed for name, module in modules.items()}
    for name, module in modules.items():
        for part in module.state_dict():
            del state[f"{name}.{part}"]
    if plan is not None:
        state = {name: stored(name, value, plan.rest) for name, value in state.items()}
    sounds = {"silence": list(net.config.silence), "sine": list(net.config.sine)}
    ours = {"heads": [list(kept) for kept in net.heads], "codec": codec, **sounds}
    raw = raw_config(net.config) | {"dep_q": net.steps, "eqknobs": ours}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        if modules:
            write_file(temporary / PACKED, {**state, **packed}, plan)
        else:
            save_file(state, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / tokenizer.name)
