"""Rounding and packing: every width, odd sizes, groups that do not divide, what is refused; lookups and cuts."""

import itertools
import math

import pytest
import torch

from eqknobs.errors import EqknobsError
from eqknobs.packing.quantise import BITS, fake, pack_bits, packed_bytes, quantise, unpack_bits

ROUNDINGS = ("nearest", "mse")  # "gptq": test_calibration.py
SHAPES = [((5, 7), 0), ((1, 1), 0), ((13,), 0), ((6, 70), 0), ((4, 3, 5), 0), ((4, 6, 5), 1)]
FORMS = list(itertools.product((None, 1, 8, 33, 500), (True, False), ROUNDINGS))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed weights that are not centred."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return normal * normal.abs() + 0.3


def by_hand(weight: torch.Tensor, bits: int, group: int | None, axis: int) -> torch.Tensor:
    """Symmetric rounding to nearest, one group after another; scales in float16 as stored."""
    rows = weight.movedim(axis, 0)
    out = torch.empty_like(rows)
    top = 2 ** (bits - 1) - 1
    exponent = math.frexp(float(weight.abs().max()) / top)[1] - 15
    for row, result in zip(rows, out):
        flat, pieces = row.reshape(-1), []
        for piece in flat.split(group or flat.numel()):
            scale = float((piece.abs().max() / top * 2.0**-exponent).half()) * 2.0**exponent
            pieces.append((piece / scale).round().clamp(-top - 1, top) * scale)
        result.copy_(torch.cat(pieces).view(row.shape))
    return out.movedim(0, axis)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 64, 65, 1000])
def test_codes_come_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    assert packed.dtype == torch.uint8 and packed.numel() == bits * 8 * math.ceil(count / 64)
    extreme = torch.full((count,), 2**bits - 1, dtype=torch.uint8)  # every bit set: none may reach a neighbour
    assert torch.equal(unpack_bits(pack_bits(extreme, bits), bits, count), extreme)


def test_bits_lie_where_the_documentation_says():
    """Code of value k: plane k // m, place k % m; bits b·p … of the bytes at that place, from the lowest on."""
    bits, count = 3, 130
    codes = torch.randint(0, 8, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = pack_bits(codes, bits)
    width = packed.shape[1]
    for k in range(count):
        whole = sum(int(byte) << (8 * i) for i, byte in enumerate(packed[:, k % width]))
        assert whole >> (bits * (k // width)) & 7 == codes[k]


@pytest.mark.parametrize("bits", BITS)
def test_fake_is_what_unpacking_gives_and_bytes_are_as_planned(bits):
    for (shape, axis), (group, symmetric, rounding) in itertools.product(SHAPES, FORMS):
        weight = drawn(*shape)
        packed = quantise(weight, bits, group, symmetric, rounding, axis)
        again = packed.dequantise()
        assert again.shape == weight.shape and again.is_contiguous()
        assert torch.equal(again, fake(weight, bits, group, symmetric, rounding, axis))
        assert packed.nbytes == packed_bytes(shape, bits, group, symmetric, axis)
        assert int(packed.values().max()) < 2**bits


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_nearest_by_hand(bits):
    for (shape, axis), group in itertools.product(SHAPES, (None, 8, 33)):
        weight = drawn(*shape)
        assert torch.equal(fake(weight, bits, group, axis=axis), by_hand(weight, bits, group, axis))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_value_is_at_most_half_a_step_off(bits, symmetric):
    weight = drawn(6, 70)
    packed = quantise(weight, bits, 8, symmetric)
    steps = (packed.scales.float() * 2.0**packed.exponent).repeat_interleave(8, dim=1)[:, :70]
    # of a zero point that is rounded, another half
    assert ((packed.dequantise() - weight).abs() <= steps * (0.501 if symmetric else 1.001)).all()


def test_more_bits_and_smaller_groups_are_closer():
    weight = drawn(16, 128)

    def error(*form) -> float:
        return float((fake(weight, *form) - weight).square().sum())

    by_width = [error(bits) for bits in BITS]
    assert by_width == sorted(by_width, reverse=True)
    by_group = [error(3, group) for group in (None, 64, 16, 4)]
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mse_is_never_worse_and_at_few_bits_better(bits, symmetric):
    weight = drawn(32, 64)
    errors = {
        rounding: (fake(weight, bits, 32, symmetric, rounding) - weight).square().view(32, 2, 32).sum(-1)
        for rounding in ROUNDINGS
    }
    assert (errors["mse"] <= errors["nearest"] * 1.000001).all()
    if bits < 6:
        assert errors["mse"].sum() < errors["nearest"].sum() * (0.8 if bits < 4 and symmetric else 0.999)


def test_two_bits_have_four_levels_on_the_side_that_reaches_further():
    for sign in (1, -1):
        weight = sign * torch.tensor([[1.0, -0.5, 0.5, 0.0]])
        assert len(fake(weight, 2, rounding="mse").unique()) == 4
        torch.testing.assert_close(fake(weight, 2, rounding="mse"), weight, atol=0.04, rtol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_groups_of_zeros_stay_zeros(symmetric, rounding):
    weight = drawn(4, 32)
    weight[1:3, 8:16] = 0
    again = fake(weight, 2, 8, symmetric, rounding)
    assert (again[1:3, 8:16] == 0).all() and again.isfinite().all()
    assert (fake(torch.zeros(3, 5), 4, None, symmetric, rounding) == 0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_size_does_not_matter(factor):
    """Scales keep their digits where float16 would have none."""
    weight = drawn(8, 40)
    scaled = fake(weight * factor, 5, 8) / factor
    torch.testing.assert_close(scaled, fake(weight, 5, 8), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [1e-44, 1e-39, 1e36])
def test_at_the_ends_of_float32_nothing_becomes_infinite(factor):
    weight = drawn(8, 40) * factor
    for rounding in ROUNDINGS:
        assert (
            fake(weight, 5, 8, rounding=rounding) - weight
        ).abs().max() <= weight.abs().max() / 20 + 2e-43  # a few of the smallest numbers there are


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype):
    weight = drawn(8, 40).to(dtype)
    packed = quantise(weight, 4, 8)
    assert torch.equal(packed.dequantise(), fake(weight.float(), 4, 8))
    assert fake(weight, 4, 8).dtype == dtype and packed.dequantise(dtype).dtype == dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_looked_up_without_the_rest(bits, symmetric):
    packed = quantise(drawn(19, 21), bits, 8, symmetric)
    index = torch.randint(0, 19, (3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed.lookup(index), packed.dequantise()[index])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 4, 8, 16, 64, 23])
def test_what_is_cut_stays_as_it_was(group, symmetric):
    packed = quantise(drawn(12, 64), 3, group, symmetric)
    whole = packed.dequantise()
    rows, columns = torch.tensor([0, 3, 4, 11]), torch.arange(64).view(4, 16)[[0, 2, 3]].flatten()
    assert torch.equal(packed.take_rows(rows).dequantise(), whole[rows])
    fewer = packed.take_columns(columns)
    assert torch.equal(fewer.dequantise(), whole[:, columns])
    if group in (4, 8, 16):
        assert fewer.group == group  # whole groups went: no scale is stored twice
    odd = torch.tensor([1, 2, 3, 40])
    assert torch.equal(packed.take_columns(odd).dequantise(), whole[:, odd])


@pytest.mark.parametrize(
    ("weight", "form", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), (4,), "NaN or infinity"),
        (torch.tensor([[1.0, math.inf]]), (4,), "NaN or infinity"),
        (torch.tensor([[1, 2]]), (4,), "floating-point"),
        (torch.tensor(1.0), (4,), "with an axis"),
        (torch.zeros(0, 3), (4,), "empty"),
        (torch.zeros(3, 0), (4,), "empty"),
        (torch.zeros(2, 2), (1,), "2 to 8, got 1"),
        (torch.zeros(2, 2), (9,), "2 to 8, got 9"),
        (torch.zeros(2, 2), (True,), "2 to 8, got True"),
        (torch.zeros(2, 2), (4, 0), "group must be"),
        (torch.zeros(2, 2), (4, 2.5), "group must be"),
        (torch.zeros(2, 2), (4, 2, True, "down"), "rounding must be nearest or mse or gptq"),
    ],
)
def test_what_is_refused(weight, form, message):
    for function in (quantise, fake):
        with pytest.raises(EqknobsError, match=message):
            function(weight, *form)


def test_only_matrices_are_cut_or_looked_up():
    packed = quantise(drawn(4, 3, 5), 4)
    for way in (packed.take_rows, packed.lookup):
        with pytest.raises(EqknobsError, match="only matrices"):
            way(torch.tensor([0]))
