"""Packed models on disk: one safetensors file with codes and scales, beside the model's own config.json.

A packed tensor `x` is there as `x.codes`, `x.scales` and, with zero points, `x.zeros`; all others under their names.
The file's metadata say how each was packed and by which plan. It is not called model.safetensors, so that nothing takes
it for one.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path
from eqknobs.packing import notes
from eqknobs.packing.notes import NAME
from eqknobs.packing.plan import REST, Plan, require_known
from eqknobs.packing.quantise import Packed, check, group_count, places

# What a model's folder holds beside weights and belongs to it.
COMPANIONS = (
    "config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
)


def is_packed_folder(folder: str | Path) -> bool:
    return (Path(folder) / NAME).is_file()


def pack_state(
    state: Mapping[str, Tensor], plan: Plan, moments: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor | Packed]:
    """A state dict with the plan's tensors packed and the rest stored as it says; moments: see `input_moments`.

    Raises EqknobsError: a plan of other tensors, NaN or infinity in what is packed, values that `rest` cannot hold.
    """
    require_known(plan, state)
    packed: dict[str, Tensor | Packed] = {}
    for name, value in state.items():
        value = value.detach()
        if name in plan.bits:
            packed[name] = plan.quantise(name, value, (moments or {}).get(name))
        else:
            packed[name] = stored(name, value, plan.rest)
    return packed


def stored(name: str, value: Tensor, rest: str) -> Tensor:
    """A tensor that is not packed in the type of the plan's `rest`; what is not floating point stays as it is.

    Raises EqknobsError, naming the tensor, for values beyond that type.
    """
    if not value.is_floating_point():
        return value
    kept = value.to(REST[rest])
    if bool((kept.isinf() & ~value.isinf()).any()):
        raise EqknobsError(f"{name}: has values beyond {rest}; set the plan's rest to float32")
    return kept


def write_file(path: str | Path, tensors: Mapping[str, Tensor | Packed], plan: Plan | None = None) -> None:
    """Write a packed file, whole or not at all; plan: by which the tensors were packed, where that is known."""
    data: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    chosen = {} if plan is None else {"rounding": plan.rounding, "rest": plan.rest}
    first = next((value for value in tensors.values() if isinstance(value, Packed)), None)
    form = plan or first
    options = chosen | {"group": form and form.group, "symmetric": form is None or form.symmetric}
    common = notes.usual(options)
    for name, value in tensors.items():
        if isinstance(value, Packed):
            said = {field: getattr(value, field) for field in notes.FIELDS}
            found[name] = {field: value for field, value in said.items() if value != common.get(field)}
            data |= {f"{name}.{part}": tensor for part, tensor in value.parts().items()}
        else:
            data[name] = value
    packing = json.dumps({"version": notes.VERSION, "plan": options, "tensors": found}, sort_keys=True)
    # Clones, as safetensors refuses tensors that share memory.
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in data.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, {notes.KEY: packing})


class PackedFile:
    """An open packed file: `plan`, `packed` (notes by name of a packed tensor) and `names` of all tensors.

    Tensors are read one at a time. Raises EqknobsError, one line, for a file that is not there, cut, or no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            stored, said = set(self._file.keys()), self._file.metadata()
        except Exception as error:  # OSError, SafetensorError
            raise EqknobsError(f"{self.path}: not a readable packed file ({error}); pack or fetch it again") from error
        options, self.packed = notes.read_notes(said, str(self.path))
        bits = {name: note["bits"] for name, note in self.packed.items()}
        transposed = [name for name, note in self.packed.items() if note["axis"] == 1]
        self.plan = Plan.from_json(options | {"bits": bits, "transposed": transposed}, str(self.path))
        parts = {f"{name}.{part}" for name, note in self.packed.items() for part in notes.parts(note)}
        if lacking := sorted(parts - stored):
            raise EqknobsError(f"{self.path}: lacks {lacking[0]}; pack it again")
        self.names = sorted(stored - parts | set(self.packed))

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *_: object) -> None:
        del self._file

    def keys(self) -> list[str]:
        return self.names

    def get(self, name: str) -> Tensor | Packed:
        """One tensor as it was written. Raises EqknobsError if its parts do not fit each other."""
        if name not in self.packed:
            return self._file.get_tensor(name)
        with self._whole(name):
            note = self.packed[name]
            # Clones: where a tensor lies in the file, its bytes may not be aligned to the words that unpacking reads.
            parts = {part: self._file.get_tensor(f"{name}.{part}").clone() for part in notes.parts(note)}
            found = Packed(
                shape=tuple(map(int, note["shape"])),
                bits=note["bits"],
                group=note["group"],
                axis=int(note["axis"]),
                exponent=int(note["exponent"]),
                **parts,
            )
            check(found.bits, found.group, "nearest", name)
            groups = (found.rows, group_count(found.columns, found.group))
            wanted = {"codes": (found.bits, places(found.rows * found.columns)), "scales": groups, "zeros": groups}
            kinds = {"codes": torch.uint8, "scales": torch.float16, "zeros": torch.uint8}
            for part, tensor in parts.items():
                if tuple(tensor.shape) != wanted[part] or tensor.dtype != kinds[part]:
                    raise ValueError(f"{part} are {tensor.dtype} {list(tensor.shape)}, not {list(wanted[part])}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor once unpacked."""
        if name in self.packed:
            return tuple(self.packed[name]["shape"])
        return tuple(self._file.get_slice(name).get_shape())

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        try:
            yield
        except EqknobsError:
            raise
        except Exception as error:  # KeyError, TypeError, ValueError, SafetensorError
            raise EqknobsError(
                f"{self.path}: {what} cannot be read ({type(error).__name__}: {error}); pack it again"
            ) from error


def source_state(source: str | Path | nn.Module) -> dict[str, Tensor]:
    """The tensors of a network, tied ones once, or of the safetensors files of a model folder.

    Raises EqknobsError for a folder without weights, or with unreadable ones.
    """
    if isinstance(source, nn.Module):
        seen: set[tuple[int, torch.Size]] = set()
        state = {}
        for name, value in source.state_dict().items():
            mark = (value.data_ptr(), value.shape)
            if mark not in seen or not value.numel():
                state[name] = value
            seen.add(mark)
        return state
    folder = Path(source)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise EqknobsError(f"{folder}: has no model.safetensors; give a model folder (a packed one: unpack it first)")
    state = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # OSError, SafetensorError
            raise EqknobsError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
    return state


def write_packed(
    folder: str | Path,
    source: str | Path | nn.Module,
    plan: Plan,
    companions: Iterable[Path] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a packed folder, whole or not at all; returns its packed file.

    source: a network (the plan then names tensors as its state dict does) or a model folder (as its file does).
    companions: files to put beside the weights, by default config, preprocessor and tokeniser of a source folder, or a
    transformers network's own config; moments: of the weights' inputs, for rounding "gptq". An earlier folder there is
    replaced.

    Raises EqknobsError: see `pack_state` and `source_state`.
    """
    tensors = pack_state(source_state(source), plan, moments)
    folder = Path(folder)
    if companions is None:
        companions = [] if isinstance(source, nn.Module) else companions_of(source)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        write_file(temporary / NAME, tensors, plan)
        config: Any = getattr(source, "config", None)
        if hasattr(config, "save_pretrained"):  # transformers'
            config.save_pretrained(temporary)
        for file in companions:
            shutil.copyfile(file, temporary / file.name)
    return folder / NAME


def companions_of(folder: str | Path) -> list[Path]:
    """Files of a model folder that belong to it beside its weights."""
    return [path for pattern in COMPANIONS for path in sorted(Path(folder).glob(pattern)) if path.is_file()]


def read_packed(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """The state dict of a packed folder, dequantised; floating-point tensors become `dtype` (None: those that were not
    packed stay as stored). Raises EqknobsError, one line, for a bad, cut or foreign file."""
    file = PackedFile(Path(folder) / NAME)
    state: dict[str, Tensor] = {}
    for name in file.names:
        value = file.get(name)
        if isinstance(value, Packed):
            state[name] = value.dequantise(dtype or torch.float32)
        else:
            state[name] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return state


def data_bytes(path: str | Path) -> int:
    """Bytes of a safetensors file's tensor data, its header not counted."""
    path = Path(path)
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
