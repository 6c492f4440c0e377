"""Tensors as packed integers: rounding with one scale a group, codes of 2 to 8 bits without gaps, exact cuts.

A tensor is taken as a matrix [rows, columns]: a row is an output channel (`axis`), its columns that channel's inputs
(and taps of a kernel). `group` columns share a scale, by default all of a row. Symmetric:
w ≈ s · (code - 2^(bits - 1)); else w ≈ s · (code - z) with a zero point z of 8 bits. Scales are float16 times a power
of two of the whole tensor, so that neither tiny nor huge weights leave float16's range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eqknobs.errors import EqknobsError

BITS = range(2, 9)
ROUNDINGS = ("nearest", "mse")
TOP_EXPONENT = 15  # the largest scale of a tensor is kept just below 2^15, float16's largest power of two
CLIPS = 20  # ratios that "mse" tries
LOWEST_CLIP = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}  # fewer levels gain by cutting more


@dataclass(frozen=True)
class Packed:
    """A tensor in packed form: `codes` uint8 [bits, ceil(values / 8)]; `scales` float16, `zeros` uint8 [rows, groups].

    Value k of the matrix lies in plane k // m at place k % m, m = ceil(values / 8). Bits b·p to b·(p + 1) - 1 of the b
    bytes at a place, counted from the lowest bit of the first byte, are the code of plane p.
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
        return matrix.to(dtype).view(self.rows, *others).movedim(0, self.axis).contiguous()

    def lookup(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [..., columns] of a matrix by their numbers [...], without unpacking the others; bit for bit those of
        `dequantise`."""
        if self.axis or len(self.shape) != 2:
            raise EqknobsError(f"only matrices are looked up by rows, not a tensor {list(self.shape)}")
        rows, places = index.reshape(-1), self.codes.shape[1]
        k = rows[:, None] * self.columns + torch.arange(self.columns, device=index.device)
        place, bit = k % places, k // places * self.bits
        byte, shift = bit >> 3, (bit & 7).to(torch.uint8)
        flat = self.codes.reshape(-1)
        low = flat[byte * places + place] >> shift
        # Bits of the next byte; where the code ends within this one, they fall beyond the mask.
        high = flat[(byte + 1).clamp(max=self.bits - 1) * places + place] << (8 - shift).clamp(max=7)
        high = torch.where(shift > 0, high, 0)
        codes = (low | high) & ((1 << self.bits) - 1)
        zeros = None if self.zeros is None else self.zeros[rows]
        return self._dequantise(codes, self.scales[rows], zeros).to(dtype).view(*index.shape, self.columns)

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
        wide = torch.ldexp(scales.float(), torch.tensor(self.exponent, device=scales.device))
        if zeros is None:
            signed = codes.float().sub_(1 << (self.bits - 1))
        else:
            signed = codes.float().sub_(self._spread(zeros.float()))
        return signed.mul_(self._spread(wide))

    def _spread(self, by_group: Tensor) -> Tensor:
        """A value a group [rows, groups] as one a column, or one a row for broadcasting."""
        if by_group.shape[1] == 1:
            return by_group
        return by_group.repeat_interleave(self.group or self.columns, dim=1)[:, : self.columns]


def packed_bytes(shape: Sequence[int], bits: int, group: int | None, symmetric: bool, axis: int = 0) -> int:
    """Bytes of a tensor once packed."""
    values = math.prod(shape)
    rows = shape[axis] if shape else 1
    groups = rows * group_count(values // max(1, rows), group)
    return bits * math.ceil(values / 8) + groups * (2 if symmetric else 3)


def group_count(columns: int, group: int | None) -> int:
    """Groups of a row; the last may be shorter."""
    return 1 if group is None else math.ceil(columns / group)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes [bits, ceil(n / 8)] of n codes below 2^bits (uint8, of any shape); see `Packed`."""
    places = math.ceil(codes.numel() / 8)
    planes = torch.nn.functional.pad(codes.reshape(-1), (0, 8 * places - codes.numel())).view(8, places)
    packed = torch.zeros(bits, places, dtype=torch.uint8, device=codes.device)
    for plane in range(8):
        byte, shift = divmod(plane * bits, 8)
        packed[byte] |= planes[plane] << shift
        if shift + bits > 8:
            packed[byte + 1] |= planes[plane] >> (8 - shift)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8 [count]."""
    planes = torch.empty(8, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for plane in range(8):
        byte, shift = divmod(plane * bits, 8)
        code = packed[byte] >> shift
        if shift + bits > 8:
            code |= packed[byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=planes[plane])
    return planes.view(-1)[:count]


@dataclass(frozen=True)
class _Rounded:
    """A matrix in groups [rows, groups, size], rounded."""

    signed: Tensor  # code minus zero point, float32 [rows, groups, size]
    scales: Tensor  # float16 [rows, groups]
    zeros: Tensor | None  # float32 [rows, groups]
    exponent: int

    @property
    def wide(self) -> Tensor:
        return torch.ldexp(self.scales.float(), torch.tensor(self.exponent, device=self.scales.device))


def quantise(
    weight: Tensor,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    rounding: str = "nearest",
    axis: int = 0,
) -> Packed:
    """Pack a floating-point tensor of one axis or more.

    group: columns that share a scale, None: a whole output channel; rounding: "nearest" takes the scale that reaches
    the group's largest value, "mse" the one of `CLIPS` smaller ones (what they do not reach is clipped) with the least
    squared error of the group; axis: of the output channels.

    Raises EqknobsError: bits not 2 to 8, group below 1, unknown rounding, NaN or infinity, integers.
    """
    rounded = _round(weight, bits, group, symmetric, rounding, axis)
    offset = 1 << (bits - 1) if rounded.zeros is None else rounded.zeros[..., None]
    rows = weight.shape[axis]
    columns = weight.numel() // max(1, rows)
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
) -> Tensor:
    """What `quantise(...).dequantise()` gives, bit for bit and in the weight's type, without packing.

    Raises as `quantise`.
    """
    rounded = _round(weight, bits, group, symmetric, rounding, axis)
    rows = weight.shape[axis]
    matrix = rounded.signed.mul_(rounded.wide[..., None]).flatten(1)[:, : weight.numel() // max(1, rows)]
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


def _round(weight: Tensor, bits: int, group: int | None, symmetric: bool, rounding: str, axis: int) -> _Rounded:
    check(bits, group, rounding)
    if not weight.is_floating_point() or weight.dim() < 1:
        raise EqknobsError(
            f"quantise: takes floating-point tensors with an axis, got {weight.dtype} {list(weight.shape)}"
        )
    rows = weight.shape[axis]
    matrix = weight.detach().movedim(axis, 0).reshape(rows, -1).float()
    columns = matrix.shape[1]
    size = columns if group is None else min(group, max(1, columns))
    groups = group_count(columns, group)
    if not weight.numel():
        raise EqknobsError(
            f"quantise: an empty tensor {list(weight.shape)} has nothing to pack; leave it out of the plan"
        )
    if groups * size != columns:
        matrix = torch.nn.functional.pad(
            matrix, (0, groups * size - columns)
        )  # zeros round to zeros, whatever the scale
    values = matrix.view(rows, groups, size)
    low, high = values.aminmax(dim=-1)
    if not bool((high - low).isfinite().all()):
        raise EqknobsError("quantise: the tensor holds NaN or infinity (or values too large for float32)")
    return _symmetric(values, low, high, bits, rounding) if symmetric else _affine(values, low, high, bits, rounding)


def _symmetric(values: Tensor, low: Tensor, high: Tensor, bits: int, rounding: str) -> _Rounded:
    bottom, top = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = torch.maximum(high, -low) / top
    if rounding == "mse":
        # There is one level more below than above: a negative scale gives it to the side that reaches further.
        scale = torch.where(high > -low, -scale, scale)
        scale = scale * _best_clip(values, scale, bits, bottom, top)
    scales, exponent = _stored(scale)
    rounded = _Rounded(values, scales, None, exponent)
    signed = values / _divisor(rounded.wide)[..., None]
    return _Rounded(signed.round_().clamp_(bottom, top), scales, None, exponent)


def _affine(values: Tensor, low: Tensor, high: Tensor, bits: int, rounding: str) -> _Rounded:
    levels = (1 << bits) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero stays exact, and zero points fit their bits
    scale = (high - low) / levels
    zeros = (-low / _divisor(scale)).round_().clamp_(0, levels)
    if rounding == "mse":
        scale = scale * _best_clip(values, scale, bits, -zeros[..., None], levels - zeros[..., None])
    scales, exponent = _stored(scale)
    rounded = _Rounded(values, scales, None, exponent)
    signed = (values / _divisor(rounded.wide)[..., None]).round_()
    signed = torch.minimum(torch.maximum(signed, -zeros[..., None]), levels - zeros[..., None])
    return _Rounded(signed, scales, zeros, exponent)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


def _best_clip(values: Tensor, scale: Tensor, bits: int, bottom: Any, top: Any) -> Tensor:
    """Of each group, the factor of its scale with the least squared error [rows, groups]."""
    best = torch.ones_like(scale)
    least = torch.full_like(scale, math.inf)
    for ratio in torch.linspace(1, LOWEST_CLIP[bits], CLIPS).tolist():
        tried = (scale * ratio)[..., None]
        error = (values / _divisor(tried)).round_().clamp_(bottom, top).mul_(tried).sub_(values).square_().sum(-1)
        better = error < least
        best = torch.where(better, ratio, best)
        least = torch.where(better, error, least)
    return best


def _stored(scale: Tensor) -> tuple[Tensor, int]:
    """Scales [rows, groups] in float16, and the exponent of the power of two by which they are to be multiplied."""
    largest = float(scale.abs().max())
    exponent = math.frexp(largest)[1] - TOP_EXPONENT if largest else 0
    return torch.ldexp(scale, torch.tensor(-exponent, device=scale.device)).half(), exponent
