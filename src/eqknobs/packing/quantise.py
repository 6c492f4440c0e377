"""Tensors as packed integers: rounding with one scale a group, codes of 2 to 8 bits without gaps, exact cuts.

A tensor is taken as a matrix [rows, columns]: a row is an output channel (`axis`), its columns that channel's inputs
(and taps of a kernel). `group` columns share a scale, by default all of a row. Symmetric:
w ≈ s · (code - 2^(bits - 1)); else w ≈ s · (code - z) with a zero point z of 8 bits. Scales are float16 times a power
of two of the whole tensor, so that neither tiny nor huge weights leave float16's range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from eqknobs.errors import EqknobsError
from eqknobs.packing.calibration import compensated

BITS = range(2, 9)
ROUNDINGS = ("nearest", "mse", "gptq")
TOP_EXPONENT = 15  # the largest scale of a tensor is kept just below 2^15, float16's largest power of two
LOWEST_EXPONENT = -112  # 2^112 is still far from float32's limit
CLIPS = 20  # ratios that "mse" tries
LOWEST_CLIP = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}  # fewer levels gain by cutting more


@dataclass(frozen=True)
class Packed:
    """A tensor in packed form: `codes` uint8 [bits, m], m = 8 · ceil(values / 64); `scales` float16 and `zeros` uint8
    [rows, groups].

    Value k of the matrix lies in plane k // m at place k % m. Bits b·p to b·(p + 1) - 1 of the b bytes at a place,
    counted from the lowest bit of the first byte, are the code of plane p.
    """

    shape: tuple[int, ...]
    bits: int
    group: int | None
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None  # None: symmetric
    exponent: int = 0  # scales are float16 · 2^exponent
    axis: int = 0  # of the output channels

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def rows(self) -> int:
        return self.shape[self.axis]

    @property
    def columns(self) -> int:
        return math.prod(self.shape) // max(1, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are kept, by name."""
        found = {"codes": self.codes, "scales": self.scales}
        return found if self.zeros is None else found | {"zeros": self.zeros}

    def to(self, device: str | torch.device) -> "Packed":
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros)

    def values(self) -> Tensor:
        """The codes [rows, columns], uint8."""
        return unpack_bits(self.codes, self.bits, self.rows * self.columns).view(self.rows, self.columns)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that this stands for, in its own shape; computed in float32, then cast."""
        matrix = self._dequantise(self.values(), self.scales, self.zeros)
        others = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        return matrix.to(dtype).reshape(self.rows, *others).movedim(0, self.axis).contiguous()

    def lookup(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [..., columns] of a matrix by their numbers [...], without unpacking the others; bit for bit those of
        `dequantise`."""
        if self.axis or len(self.shape) != 2:
            raise EqknobsError(f"only matrices are looked up by rows, not a tensor {list(self.shape)}")
        rows = index.reshape(-1)
        k = rows[:, None] * self.columns + torch.arange(self.columns, device=index.device)
        count, flat = self.codes.shape[1], self.codes.reshape(-1)
        bit, place = k // count * self.bits, k % count
        byte, shift = bit // 8, bit % 8
        pair = flat[byte * count + place].int() | flat[(byte + 1).clamp(max=self.bits - 1) * count + place].int() << 8
        codes = (pair >> shift & ((1 << self.bits) - 1)).to(torch.uint8)
        zeros = None if self.zeros is None else self.zeros[rows]
        return self._dequantise(codes, self.scales[rows], zeros).to(dtype).reshape(*index.shape, self.columns)

    def take_rows(self, keep: Tensor) -> "Packed":
        """Some rows of a matrix, in that order [kept], bit for bit as they were."""
        zeros = None if self.zeros is None else self.zeros[keep]
        return self._cut(self.values()[keep], self.group, self.scales[keep], zeros)

    def take_columns(self, keep: Tensor) -> "Packed":
        """Some columns of a matrix, in that order [kept], bit for bit as they were.

        Where what is kept cuts through groups, groups become smaller and scales are repeated, so that no value moves.
        """
        codes = self.values()[:, keep]
        if self.group is None:
            return self._cut(codes, None, self.scales, self.zeros)
        owner = keep // self.group  # the group in which each column was
        group = next(
            size
            for size in range(min(self.group, max(1, len(keep))), 0, -1)
            if all(bool((part == part[0]).all()) for part in owner.split(size))
        )
        first = owner[::group]
        zeros = None if self.zeros is None else self.zeros[:, first]
        return self._cut(codes, group, self.scales[:, first], zeros)

    def _cut(self, codes: Tensor, group: int | None, scales: Tensor, zeros: Tensor | None) -> "Packed":
        if self.axis or len(self.shape) != 2:
            raise EqknobsError(f"only matrices can be cut, not a packed tensor {list(self.shape)}")
        kept = tuple(codes.shape)
        zeros = None if zeros is None else zeros.contiguous()
        return replace(
            self,
            shape=kept,
            group=group,
            codes=pack_bits(codes.contiguous(), self.bits),
            scales=scales.contiguous(),
            zeros=zeros,
        )

    def _dequantise(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Float32 [rows, columns] of codes [rows, columns] with scales and zero points [rows, groups]."""
        wide = _widened(scales, self.exponent)
        size = min(self.group or self.columns, self.columns)
        groups = len(codes), wide.shape[1], size
        if wide.shape[1] * size != self.columns:  # the last group is shorter
            codes = torch.nn.functional.pad(codes, (0, wide.shape[1] * size - self.columns))
        if zeros is None:  # in bytes, a quarter of the memory; the difference wraps round to a signed one
            signed = (codes - (1 << (self.bits - 1))).view(torch.int8).float().view(groups)
        else:
            signed = codes.float().view(groups).sub_(zeros.float()[..., None])
        return signed.mul_(wide[..., None]).flatten(1)[:, : self.columns]


def packed_bytes(shape: Sequence[int], bits: int, group: int | None, symmetric: bool, axis: int = 0) -> int:
    """Bytes of a tensor once packed."""
    values = math.prod(shape)
    rows = shape[axis] if shape else 1
    groups = rows * group_count(values // max(1, rows), group)
    return bits * places(values) + groups * (2 if symmetric else 3)


def group_count(columns: int, group: int | None) -> int:
    """Groups of a row; the last may be shorter."""
    return 1 if group is None else math.ceil(columns / group)


def places(values: int) -> int:
    """Values of a plane, a multiple of 8 (see `Packed`)."""
    return 8 * math.ceil(values / 64)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes [bits, m] of n codes below 2^bits (uint8, of any shape); see `Packed`."""
    count = places(codes.numel())
    planes = torch.nn.functional.pad(codes.reshape(-1), (0, 8 * count - codes.numel())).view(8, count)
    words = planes.view(torch.int64)  # eight bytes at once; masks undo what shifts move from one byte to the next
    packed = torch.zeros(bits, count // 8, dtype=torch.int64, device=codes.device)
    for plane in range(8):
        byte, shift = divmod(plane * bits, 8)
        packed[byte] |= (words[plane] << shift) & _every_byte(0xFF << shift)
        if shift + bits > 8:
            packed[byte + 1] |= (words[plane] >> (8 - shift)) & _every_byte(0xFF >> (8 - shift))
    return packed.view(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8 [count]."""
    if bits == 8:
        return packed.reshape(-1)[:count]
    at, words = _layout(bits, packed.device), packed.view(torch.int64)
    codes = words[at.first].bitwise_right_shift_(at.right).bitwise_and_(at.low)
    if 8 % bits:
        codes |= words[at.second].bitwise_left_shift_(at.left).bitwise_and_(at.high)
    return codes.view(torch.uint8).view(-1)[:count]


def _every_byte(mask: int) -> int:
    """A mask of one byte repeated in all eight of a word, as a signed number."""
    return int.from_bytes(bytes([mask & 0xFF]) * 8, "little", signed=True)


class _Layout(NamedTuple):
    """Where the codes of the 8 planes lie, each [8] or [8, 1]: the byte in which they begin, how far to shift it, which
    bits then are theirs; and the same of the byte after it, for those that go on there."""

    first: Tensor
    right: Tensor
    low: Tensor
    second: Tensor
    left: Tensor
    high: Tensor


@cache
def _layout(bits: int, device: torch.device) -> _Layout:
    begin = [divmod(plane * bits, 8) for plane in range(8)]
    whole = (1 << bits) - 1
    low = [_every_byte(whole & (0xFF >> shift)) for _, shift in begin]
    high = [_every_byte(whole & (0xFF << (8 - shift))) for _, shift in begin]

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    return _Layout(
        first=torch.tensor([byte for byte, _ in begin], device=device),
        right=column([shift for _, shift in begin]),
        low=column(low),
        second=torch.tensor([min(byte + 1, bits - 1) for byte, _ in begin], device=device),
        left=column([8 - shift for _, shift in begin]),
        high=column(high),
    )


@dataclass(frozen=True)
class _Rounded:
    """A matrix in groups [rows, groups, size], rounded."""

    signed: Tensor  # code minus zero point, float32 [rows, groups, size]
    scales: Tensor  # float16 [rows, groups]
    zeros: Tensor | None  # float32 [rows, groups]
    exponent: int


def quantise(
    weight: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    rounding: str = "nearest",
    axis: int = 0,
    moments: Tensor | None = None,
) -> Packed:
    """Pack a floating-point tensor of one axis or more.

    group: columns that share a scale, None: a whole output channel; rounding: "nearest" takes the scale that reaches
    the group's largest value, "mse" the one of `CLIPS` smaller ones (what they do not reach is clipped) with the least
    squared error of the group; "gptq" takes those scales and rounds so that errors make up for each other on inputs
    with second `moments` [columns, columns] (`eqknobs.packing.calibration`; without them it is "mse"); axis: of the
    output channels.

    Raises EqknobsError: bits not 2 to 8, group below 1, unknown rounding, NaN or infinity, integers.
    """
    rounded = _round(weight, bits, group, symmetric, rounding, axis, moments)
    offset = 1 << (bits - 1) if rounded.zeros is None else rounded.zeros[..., None]
    rows = weight.shape[axis]
    columns = weight.numel() // rows
    codes = (rounded.signed + offset).to(torch.uint8).flatten(1)[:, :columns]
    return Packed(
        shape=tuple(weight.shape),
        bits=bits,
        group=group,
        codes=pack_bits(codes, bits),
        scales=rounded.scales,
        zeros=None if rounded.zeros is None else rounded.zeros.to(torch.uint8),
        exponent=rounded.exponent,
        axis=axis,
    )


def fake(
    weight: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    rounding: str = "nearest",
    axis: int = 0,
    moments: Tensor | None = None,
) -> Tensor:
    """What `quantise(...).dequantise()` gives, bit for bit and in the weight's type, without packing.

    Raises as `quantise`.
    """
    rounded = _round(weight, bits, group, symmetric, rounding, axis, moments)
    rows = weight.shape[axis]
    wide = _widened(rounded.scales, rounded.exponent)[..., None]
    matrix = rounded.signed.mul_(wide).flatten(1)[:, : weight.numel() // rows]
    others = [size for number, size in enumerate(weight.shape) if number != axis]
    return matrix.to(weight.dtype).reshape(rows, *others).movedim(0, axis).contiguous()


def check(bits: int, group: int | None, rounding: str, where: str = "quantise") -> None:
    """Raises EqknobsError, naming `where`, for values that no packing has."""
    if isinstance(bits, bool) or bits not in BITS:
        raise EqknobsError(f"{where}: bits must be a whole number, {BITS[0]} to {BITS[-1]}, got {bits!r}")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise EqknobsError(
            f"{where}: group must be a whole number above 0, or null for one scale a channel, got {group!r}"
        )
    if rounding not in ROUNDINGS:
        raise EqknobsError(f"{where}: rounding must be {' or '.join(ROUNDINGS)}, got {rounding!r}")


def _round(
    weight: Tensor,
    bits: int,
    group: int | None,
    symmetric: bool,
    rounding: str,
    axis: int,
    moments: Tensor | None,
) -> _Rounded:
    check(bits, group, rounding)
    if not weight.is_floating_point() or weight.dim() < 1:
        raise EqknobsError(
            f"quantise: takes floating-point tensors with an axis, got {weight.dtype} {list(weight.shape)}"
        )
    if not weight.numel():
        raise EqknobsError(
            f"quantise: an empty tensor {list(weight.shape)} has nothing to pack; leave it out of the plan"
        )
    rows = weight.shape[axis]
    matrix = weight.detach().movedim(axis, 0).reshape(rows, -1).float()
    columns = matrix.shape[1]
    size, groups = min(group or columns, columns), group_count(columns, group)
    if groups * size != columns:  # zeros round to zeros, whatever the scale
        matrix = torch.nn.functional.pad(matrix, (0, groups * size - columns))
    values = matrix.view(rows, groups, size)
    low, high = values.aminmax(dim=-1)
    if not bool((high - low).isfinite().all()):
        raise EqknobsError("quantise: the tensor holds NaN or infinity (or values too large for float32)")
    grid = (_symmetric if symmetric else _affine)(values, low, high, bits, rounding)
    divisor = _divisor(grid.scales, grid.exponent)
    if rounding == "gptq" and moments is not None:
        if moments.shape != (columns, columns):
            raise EqknobsError(f"quantise: moments must be {[columns, columns]}, got {list(moments.shape)}")
        beyond = matrix.shape[1] - columns
        padded = torch.nn.functional.pad(moments, (0, beyond, 0, beyond))
        scale, bottom, top = (value.expand(values.shape).flatten(1) for value in (divisor, grid.bottom, grid.top))
        signed = compensated(matrix, scale, bottom, top, padded).view(values.shape)
    else:
        signed = (values / divisor).round_().clamp_(grid.bottom, grid.top)
    return _Rounded(signed, grid.scales, grid.zeros, grid.exponent)


class _Grid(NamedTuple):
    """The levels of every group: scales as stored, lowest and highest multiple [rows, groups, 1] or one of all."""

    scales: Tensor
    exponent: int
    zeros: Tensor | None
    bottom: Tensor
    top: Tensor


def _symmetric(values: Tensor, low: Tensor, high: Tensor, bits: int, rounding: str) -> _Grid:
    bottom, top = (torch.tensor(level, device=values.device) for level in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1))
    scale = torch.maximum(high, -low) / top
    if rounding != "nearest":
        # There is one level more below than above: a negative scale gives it to the side that reaches further.
        scale = torch.where(high > -low, -scale, scale)
    return _Grid(*_stored(values, scale, bits, rounding, bottom, top), None, bottom, top)


def _affine(values: Tensor, low: Tensor, high: Tensor, bits: int, rounding: str) -> _Grid:
    levels = (1 << bits) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero stays exact, and zero points fit their bits
    scale = (high - low) / levels
    zeros = (-low / torch.where(scale == 0, 1, scale)).round_().clamp_(0, levels)
    bottom = -zeros[..., None]
    return _Grid(*_stored(values, scale, bits, rounding, bottom, levels + bottom), zeros, bottom, levels + bottom)


def _stored(values: Tensor, scale: Tensor, bits: int, rounding: str, bottom: Tensor, top: Tensor) -> tuple[Tensor, int]:
    """Scales [rows, groups] as stored, float16 and an exponent: those given, or by "mse" the best smaller ones."""
    largest = float(scale.abs().max())
    exponent = max(math.frexp(largest)[1] - TOP_EXPONENT, LOWEST_EXPONENT) if largest else 0
    scale = torch.ldexp(scale, torch.tensor(-exponent, device=scale.device))
    if rounding == "nearest":
        return scale.half(), exponent
    best, least = scale.half(), torch.full_like(scale, math.inf)
    for ratio in torch.linspace(1, LOWEST_CLIP[bits], CLIPS).tolist():
        tried = (scale * ratio).half()
        wide = _widened(tried, exponent)[..., None]
        rounded = (values / _divisor(tried, exponent)).round_().clamp_(bottom, top)
        error = rounded.mul_(wide).sub_(values).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best, exponent


def _widened(scales: Tensor, exponent: int) -> Tensor:
    """Stored scales in float32."""
    return torch.ldexp(scales.float(), torch.tensor(exponent, device=scales.device))


def _divisor(scales: Tensor, exponent: int) -> Tensor:
    """Of each group what its values are divided by [rows, groups, 1]; 1 where all are 0."""
    wide = _widened(scales, exponent)
    return torch.where(wide == 0, 1, wide)[..., None]
