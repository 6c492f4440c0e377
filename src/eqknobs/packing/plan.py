"""Which tensors are packed, and how: plans, what they cost, which tensors of a network can be packed."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from eqknobs.errors import EqknobsError, counted
from eqknobs.packing.quantise import Packed, check, fake, packed_bytes, quantise

REST = {"float32": torch.float32, "float16": torch.float16}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Shape(tuple[int, ...]):
    """A tensor's sizes; `axis`: of its output channels (0, but 1 in a transposed convolution)."""

    axis: int = 0

    @classmethod
    def of(cls, tensor: Tensor, axis: int = 0) -> "Shape":
        shape = cls(tensor.shape)
        shape.axis = axis
        return shape

    def numel(self) -> int:
        return math.prod(self)


@dataclass(frozen=True)
class Plan:
    """How a model is packed; tensors that are not in `bits` stay.

    bits: name of a tensor -> 2 to 8; group: columns that share a scale, None: a whole output channel; symmetric:
    without zero points; rounding: see `eqknobs.packing.quantise.quantise`; rest: type in which tensors that stay are
    stored; transposed: tensors whose output channels lie on axis 1.

    Raises EqknobsError for values that no packing has.
    """

    bits: dict[str, int]
    group: int | None = None
    symmetric: bool = True
    rounding: str = "nearest"
    rest: str = "float16"
    transposed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.bits, dict):
            raise EqknobsError("plan: bits must map names of tensors to 2 to 8")
        for name, width in self.bits.items():
            check(width, self.group, self.rounding, f"plan: {name}")
        check(2, self.group, self.rounding, "plan")
        if not isinstance(self.symmetric, bool):
            raise EqknobsError(f"plan: symmetric must be true or false, got {self.symmetric!r}")
        if self.rest not in tuple(REST):
            raise EqknobsError(f"plan: rest must be {' or '.join(REST)}, got {self.rest!r}")
        object.__setattr__(self, "transposed", tuple(sorted(self.transposed)))

    @classmethod
    def uniform(cls, tensors: Iterable[str], bits: int, **options: Any) -> "Plan":
        """All tensors at the same width; tensors: names, or what `packable` gives, which knows transposed ones."""
        return cls.of(tensors, dict.fromkeys(tensors, bits), **options)

    @classmethod
    def of(cls, tensors: Iterable[str], bits: Mapping[str, int], **options: Any) -> "Plan":
        """A plan of those widths for tensors as `packable` gives them. Raises as the class, and for other names."""
        if unknown := [name for name in bits if name not in set(tensors)]:
            raise EqknobsError(f"plan: {unknown[0]} (one of {len(unknown)}) is no tensor that can be packed")
        known: Mapping[str, Any] = tensors if isinstance(tensors, Mapping) else {}
        transposed = tuple(name for name in bits if getattr(known.get(name), "axis", 0) == 1)
        return cls(dict(bits), transposed=transposed, **options)

    def with_bits(self, bits: Mapping[str, int]) -> "Plan":
        """The same but for these widths."""
        return replace(self, bits=dict(bits))

    def axis(self, name: str) -> int:
        """The axis of a tensor's output channels."""
        return int(name in self.transposed)

    def quantise(self, name: str, weight: Tensor, moments: Tensor | None = None) -> Packed:
        """A tensor of the plan, packed; moments: of its inputs, for "gptq". Raises EqknobsError, naming the tensor, for
        NaN and the like."""
        with _named(name):
            form = self.group, self.symmetric, self.rounding
            return quantise(weight, self.bits[name], *form, self.axis(name), moments)

    def fake(self, name: str, weight: Tensor, moments: Tensor | None = None) -> Tensor:
        """What `quantise(name, weight, moments).dequantise()` gives, without packing."""
        with _named(name):
            form = self.group, self.symmetric, self.rounding
            return fake(weight, self.bits[name], *form, self.axis(name), moments)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; the inverse of `from_json`."""
        return asdict(self) | {"transposed": list(self.transposed)}

    @classmethod
    def from_json(cls, raw: Any, where: str = "plan") -> "Plan":
        """The plan in parsed JSON. Raises EqknobsError, naming `where`, for anything else."""
        if not isinstance(raw, dict) or "bits" not in raw:
            raise EqknobsError(f"{where}: not a plan; it must be an object with bits, names of tensors to widths")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise EqknobsError(f"{where}: a plan has no {unknown[0]}; it has {', '.join(sorted(known))}")
        if not isinstance(names := raw.get("transposed", []), list) or not all(isinstance(n, str) for n in names):
            raise EqknobsError(f"{where}: transposed must be a list of names of tensors")
        try:
            return cls(**raw)
        except EqknobsError as error:
            raise EqknobsError(f"{where}: {error}") from error


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the tensor in an error's line."""
    try:
        yield
    except EqknobsError as error:
        raise EqknobsError(f"{name}: {error}") from error


def packable(net: nn.Module, embeddings: bool = True, codebooks: bool = True) -> dict[str, Shape]:
    """The tensors of a network that may be packed, in its own order, by their names in `net.state_dict()`.

    Weights of linears, convolutions (of weight-normalised ones the direction, `original1`), LSTMs and GRUs; on demand
    embeddings, and codebooks (matrices of modules whose name ends in `codebook`). No biases, no norms.
    """
    found: dict[str, Shape] = {}
    seen: set[int] = set()
    for name, tensor, axis, wanted in _candidates(net, embeddings, codebooks):
        if id(tensor) not in seen and tensor.numel() and tensor.is_floating_point() and wanted:
            found[name] = Shape.of(tensor, axis)
        seen.add(id(tensor))  # tied weights count once, and go with the first
    return found


def _candidates(net: nn.Module, embeddings: bool, codebooks: bool) -> Iterator[tuple[str, Tensor, int, bool]]:
    """Name, tensor, axis of the output channels, whether it is wanted."""
    for name, module in net.named_modules():
        stem = f"{name}." if name else ""
        if name.endswith("codebook"):
            tensors = [*module.named_parameters(stem[:-1]), *module.named_buffers(stem[:-1])]
            kept = module.state_dict()
            yield from ((key, t, 0, codebooks) for key, t in tensors if t.dim() == 2 and key[len(stem) :] in kept)
        elif isinstance(module, nn.Embedding):
            yield f"{stem}weight", module.weight, 0, embeddings
        elif isinstance(module, nn.RNNBase):
            yield from ((f"{stem}{k}", p, 0, True) for k, p in module.named_parameters() if k.startswith("weight"))
        elif isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            parameters = dict(module.named_parameters())
            for leaf in ("parametrizations.weight.original1", "weight"):
                # bitsandbytes' weights are packed already
                if leaf in parameters and not hasattr(parameters[leaf], "quant_state"):
                    yield f"{stem}{leaf}", parameters[leaf], int(isinstance(module, TRANSPOSED)), True


def plan_bytes(shapes: Mapping[str, Any], plan: Plan) -> int:
    """Bytes of tensor data that a packed file will hold. shapes: of all tensors of the state dict, or the tensors.

    What is not floating point (tensors tell) stays as it is. Raises EqknobsError for a plan of other tensors.
    """
    require_known(plan, shapes)
    total = 0
    for name, given in shapes.items():
        shape = tuple(given.shape) if isinstance(given, Tensor) else tuple(given)
        if name in plan.bits:
            total += packed_bytes(shape, plan.bits[name], plan.group, plan.symmetric, plan.axis(name))
        elif isinstance(given, Tensor) and not given.is_floating_point():
            total += given.numel() * given.element_size()
        else:
            total += math.prod(shape) * REST[plan.rest].itemsize
    return total


def mean_bits(shapes: Mapping[str, Any], plan: Plan) -> float:
    """Mean width of the codes over all values that are packed; scales, zero points and what stays are not counted."""
    require_known(plan, shapes)
    sizes = {name: _numel(shapes[name]) for name in plan.bits}
    return sum(plan.bits[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))


def _numel(given: Any) -> int:
    return given.numel() if isinstance(given, Tensor) else math.prod(given)


def require_known(plan: Plan, tensors: Iterable[str]) -> None:
    """Raises EqknobsError if the plan names tensors that are not among these."""
    known = set(tensors)
    if unknown := [name for name in plan.bits if name not in known]:
        raise EqknobsError(
            f"plan: the model has no tensor {unknown[0]} ({counted(len(unknown), 'such name')}); its tensors are like "
            f"{min(known, default='(none)')}: is this another model's plan?"
        )
