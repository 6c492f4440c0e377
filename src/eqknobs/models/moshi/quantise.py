"""Linears in NF4 (Dettmers et al. 2023, arXiv 2305.14314) through bitsandbytes, on the CPU as on a GPU.

And what is done to a linear's weight, however it is kept: plain, in NF4, or as packed integers (`eqknobs.packing`).
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from eqknobs.errors import EqknobsError
from eqknobs.models.moshi.config import Nf4
from eqknobs.packing.modules import PackedLinear
from eqknobs.packing.modules import put_module as put_module  # beside with_weight, with which it is used
from eqknobs.packing.quantise import quantise

MARK = ".quant_state.bitsandbytes__nf4"  # with this suffix a file holds the sizes of a packed weight
_PIECE = 1 << 20  # values quantised at once: bitsandbytes needs 20 bytes of scratch for each


def bitsandbytes() -> Any:
    """The library. Raises EqknobsError if it is not installed."""
    # On some CPUs it asks for an optional kernel, which is not used here (see `packed_linear`), and complains.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
        import bitsandbytes.functional
    except ImportError as error:
        raise EqknobsError("nf4 needs bitsandbytes, which is not installed; run pip install bitsandbytes") from error
    return library


# PyTorch's, or bitsandbytes' subclass, which is imported only when needed.
Linear = Any


def is_packed(linear: Linear) -> bool:
    """Whether a module is a linear in NF4."""
    return not isinstance(linear, PackedLinear) and hasattr(linear.weight, "quant_state")


def pack(weight: Tensor, nf4: Nf4, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Packed bytes and their state, bit for bit bitsandbytes' own, in pieces to save memory.

    weight [out, in] on the device where it shall stay; dtype: what it unpacks to.
    Raises EqknobsError if `nf4.block` does not divide the number of values.
    """
    library = bitsandbytes()
    if weight.numel() % nf4.block:
        raise EqknobsError(
            f"nf4: blocks of {nf4.block} do not divide a weight {list(weight.shape)}; take smaller blocks"
        )
    packed, scales = [], []
    state: Any = None  # the last piece's becomes that of all
    for piece in weight.reshape(-1).split(max(1, _PIECE // nf4.block) * nf4.block):
        bytes_, state = library.functional.quantize_4bit(piece.to(dtype)[None], blocksize=nf4.block, quant_type="nf4")
        packed.append(bytes_)
        scales.append(state.absmax)
    state.shape, state.absmax = weight.shape, torch.cat(scales)
    if nf4.double:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = library.functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return torch.cat(packed), state


def packed_linear(data: Tensor, state: Any, dtype: torch.dtype) -> Linear:
    """A linear around packed bytes; `dtype` is what it computes in."""
    library = bitsandbytes()
    outputs, inputs = state.shape
    linear = library.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = library.nn.Params4bit(
        data,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type="nf4",
        module=linear,
        bnb_quantized=True,
    )
    linear.quant_state = state
    # Otherwise, on CPUs with bfloat16 instructions, the first call repacks the weights in place and computes in
    # bfloat16: results would depend on the machine, and what is saved on what ran before.
    linear.support_avx512bf16_for_cpu = False
    return linear.eval().requires_grad_(False)


def weight_of(linear: Linear) -> Tensor:
    """The weight [out, in] of a linear, unpacked if need be (then a copy; of packed integers float32)."""
    if isinstance(linear, PackedLinear):
        return linear.packed.dequantise()
    if not is_packed(linear):
        return linear.weight.data
    return bitsandbytes().functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def with_weight(linear: Linear, weight: Tensor) -> Linear:
    """A linear of the same kind with another weight, of whatever shape; packed ones keep block and double scales.

    Packed integers are rounded to nearest with the same bits and groups: weights that change move the others. `cut`
    moves none.
    """
    if isinstance(linear, PackedLinear):
        form = linear.packed
        return PackedLinear(quantise(weight, form.bits, form.group, form.symmetric), linear.bias)
    if not is_packed(linear):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return new.eval()
    state = linear.weight.quant_state
    nf4 = Nf4(block=state.blocksize, double=state.nested)
    return packed_linear(*pack(weight, nf4, state.dtype), linear.compute_dtype)


def cut(linear: Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> Linear:
    """A linear of the same kind with only those rows (outputs) and columns (inputs) of the weight, by their numbers.

    Bit for bit what was there; in NF4, which is packed again, only unless scales are doubled or blocks are cut.
    """
    if isinstance(linear, PackedLinear):
        packed = linear.packed if rows is None else linear.packed.take_rows(rows)
        return PackedLinear(packed if columns is None else packed.take_columns(columns), linear.bias)
    weight = weight_of(linear)
    weight = weight if rows is None else weight[rows]
    return with_weight(linear, weight if columns is None else weight[:, columns])
