"""Networks with packed weights: linears and embeddings that unpack when called, and what a network holds in memory."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eqknobs.errors import EqknobsError
from eqknobs.packing.files import source_state
from eqknobs.packing.plan import REST, Plan, require_known
from eqknobs.packing.quantise import Packed


class PackedModule(nn.Module):
    """A packed matrix as buffers, so that it follows the network to its device and into its state dict."""

    def __init__(self, packed: Packed):
        super().__init__()
        if packed.axis or len(packed.shape) != 2:
            raise EqknobsError(f"only matrices stay packed in memory, not a tensor {list(packed.shape)}")
        self._form = {name: getattr(packed, name) for name in ("shape", "bits", "group", "exponent")}
        self.codes = nn.Buffer(packed.codes)
        # As integers: `net.to(torch.bfloat16)` would otherwise round them.
        self.scales = nn.Buffer(packed.scales.view(torch.int16))
        self.zeros = None if packed.zeros is None else nn.Buffer(packed.zeros)

    @property
    def packed(self) -> Packed:
        return Packed(codes=self.codes, scales=self.scales.view(torch.float16), zeros=self.zeros, **self._form)

    def extra_repr(self) -> str:
        return f"{list(self._form['shape'])}, bits={self._form['bits']}, group={self._form['group']}"


class PackedLinear(PackedModule):
    """A linear whose weight [out, in] stays packed and is unpacked at every call, in the input's type.

    Gives bit for bit what `nn.Linear` with the dequantised weight gives.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None):
        super().__init__(packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def out_features(self) -> int:
        return self._form["shape"][0]

    @property
    def in_features(self) -> int:
        return self._form["shape"][1]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.dequantise(x.dtype), self.bias)


class PackedEmbedding(PackedModule):
    """An embedding whose table stays packed; only the rows that are asked for are unpacked, to `dtype`."""

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float32):
        super().__init__(packed)
        self.dtype = dtype

    def forward(self, index: Tensor) -> Tensor:
        return self.packed.lookup(index, self.dtype)


def put_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a network under a dotted name, in place of the one there."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)


def packed_module(module: nn.Module, packed: Packed, dtype: torch.dtype | None = None) -> PackedModule:
    """The packed form of a linear or embedding. Raises EqknobsError for other modules."""
    if isinstance(module, nn.Linear):
        return PackedLinear(packed, module.bias)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(packed, dtype or module.weight.dtype)
    raise EqknobsError(f"{type(module).__name__}: only linears and embeddings stay packed in memory")


def pack_modules(net: nn.Module, plan: Plan, moments: Mapping[str, Tensor] | None = None) -> None:
    """Replace the linears and embeddings whose weights the plan names by packed ones, in place; moments: see
    `input_moments`.

    Raises EqknobsError, before anything is replaced, for a plan of other tensors or of convolutions and codebooks:
    those unpack at load.
    """
    require_known(plan, net.state_dict())
    for name in plan.bits:
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or not isinstance(net.get_submodule(owner), nn.Linear | nn.Embedding):
            raise EqknobsError(
                f"plan: {name} is not the weight of a linear or embedding; only those stay packed in memory"
            )
    for name in plan.bits:
        owner = name.removesuffix(".weight")
        module = net.get_submodule(owner)
        put_module(
            net, owner, packed_module(module, plan.quantise(name, net.get_parameter(name), (moments or {}).get(name)))
        )


def unpack_modules(net: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace packed linears and embeddings by plain ones with the weights that they stand for, in place."""
    modules = {name: module for name, module in net.named_modules() if isinstance(module, PackedModule)}
    for name, module in modules.items():
        weight = nn.Parameter(module.packed.dequantise(dtype), requires_grad=False)
        rows, columns = weight.shape
        plain: nn.Module
        if isinstance(module, PackedLinear):
            plain = nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
            plain.register_parameter("bias", module.bias)
        else:
            plain = nn.Embedding(rows, columns, device="meta")
        plain.register_parameter("weight", weight)
        put_module(net, name, plain.train(module.training))


@contextmanager
def replaced(net: nn.Module, values: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """While the block runs, tensors of the network, by their names in its state dict, have these values; then their own
    again. What codebooks keep beside their tensors (Mimi's `_embed`) is made anew."""
    kept: list[tuple[Tensor, Tensor]] = []
    state = net.state_dict()
    try:
        for name, value in values:
            kept.append((state[name], state[name].clone()))
            state[name].copy_(value)
        _forget(net)
        yield
    finally:
        for tensor, value in reversed(kept):  # tied ones were changed twice
            tensor.copy_(value)
        _forget(net)


@contextmanager
def faked(net: nn.Module, plan: Plan, moments: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """While the block runs, the network has the weights that the plan's packed file would give; then its own again.

    That includes what `rest` does to tensors that stay. moments: see `input_moments`. Raises EqknobsError for a plan of
    other tensors, and for NaN or infinity.
    """
    state, rest = source_state(net), REST[plan.rest]
    require_known(plan, state)

    def rounded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            if name in plan.bits:
                yield name, plan.fake(name, tensor, (moments or {}).get(name))
            elif tensor.is_floating_point() and tensor.dtype != rest:
                yield name, tensor.to(rest)

    with replaced(net, rounded()):
        yield


def _forget(net: nn.Module) -> None:
    for module in net.modules():
        if getattr(module, "_embed", None) is not None:
            module.__dict__["_embed"] = None


def bytes_resident(net: nn.Module) -> int:
    """Bytes of the parameters and buffers that a network holds, tied ones once; of NF4 weights also their scales."""
    held: dict[int, int] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        parts = [tensor]
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts += [value for value in state.as_dict(packed=True).values() if isinstance(value, Tensor)]
        for part in parts:
            held[part.data_ptr()] = max(held.get(part.data_ptr(), 0), part.numel() * part.element_size())
    return sum(held.values())
