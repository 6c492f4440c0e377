"""What can be done to a network: activations edited, heads zeroed or removed, layers skipped, weights pruned or
rounded, streams muted, the depformer shortened.

Heads go by their original numbers, also after removals: `{layer: [head, …]}`. Linears may be packed everywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from eqknobs.errors import EqknobsError
from eqknobs.models.base import checked
from eqknobs.models.moshi.config import TEMPORAL_LINEARS
from eqknobs.models.moshi.network import MoshiNet
from eqknobs.models.moshi.quantise import Linear, cut, is_packed, put_module, weight_of, with_weight
from eqknobs.packing.modules import PackedLinear

Heads = Mapping[int, Sequence[int]]


def _places(net: MoshiNet, heads: Heads) -> dict[int, list[int]]:
    """Where those heads are now, layer by layer. Raises EqknobsError for heads that are not there."""
    places = {}
    for layer, numbers in heads.items():
        if not 0 <= layer < len(net.layers):
            raise EqknobsError(f"heads: no layer {layer}; the model has {len(net.layers)}")
        left = net.heads[layer]
        if missing := sorted(set(numbers) - set(left)):
            raise EqknobsError(f"heads: layer {layer} has no head {missing[0]} (any more); it has {list(left)}")
        places[layer] = sorted(left.index(number) for number in set(numbers))
    return places


@contextmanager
def editing(net: MoshiNet, site: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the network goes on from `edit(activations)` at `embeddings`, `residual.<layer>` or
    `heads.<layer>`.

    The edit gets [batch, columns, width]: all columns of a clip that is heard or of a prompt, then one a frame. A
    `heads` site is head after head, of those that are left. Raises EqknobsError for another site, and on running if the
    shape changes.
    """
    kind, _, number = ("embeddings", "", "0") if site == "embeddings" else site.partition(".")
    layer = net.layers[int(number)] if number.isdecimal() and int(number) < len(net.layers) else None
    out = None if layer is None else layer.self_attn.out_proj  # none where no head is left
    if layer is None or kind not in ("embeddings", "residual", "heads") or (kind == "heads" and out is None):
        raise EqknobsError(
            f"a Moshi of {len(net.layers)} layers has no site {site!r} (embeddings, residual.<layer>, heads.<layer>)"
        )
    if kind == "embeddings":
        hook = layer.register_forward_pre_hook(lambda _module, inputs: (checked(edit, inputs[0], site), *inputs[1:]))
    elif out is None or kind == "residual":
        hook = layer.register_forward_hook(lambda _module, _inputs, acts: checked(edit, acts, site))
    else:
        hook = out.register_forward_pre_hook(lambda _module, inputs: (checked(edit, inputs[0], site),))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def zeroed_heads(net: MoshiNet, heads: Heads, means: Sequence[Tensor] | None = None) -> Iterator[None]:
    """While the block runs, those heads give zeros: site `heads.<layer>` is cleared there.

    means: layer by layer what each head gives on average [heads, head_dim], by original numbers: then they give that.
    """
    with ExitStack() as stack:
        for layer, places in _places(net, heads).items():
            left = list(net.heads[layer])
            keep = torch.ones(len(left), 1, dtype=torch.bool, device=net.device)
            keep[places] = False
            given = (torch.zeros(()) if means is None else means[layer][left]).to(net.device, net.dtype)

            def clear(acts: Tensor, keep: Tensor = keep, given: Tensor = given) -> Tensor:
                # not a product with 0: that would keep NaN and infinity
                return torch.where(keep, acts.unflatten(-1, (len(keep), -1)), given).flatten(-2)

            if places:
                stack.enter_context(editing(net, f"heads.{layer}", clear))
        yield


@contextmanager
def skipped_layers(net: MoshiNet, layers: Iterable[int]) -> Iterator[None]:
    """While the block runs, those temporal layers hand on what they get.

    Raises EqknobsError for layers that are not there.
    """
    layers = set(layers)
    if unknown := [layer for layer in layers if not 0 <= layer < len(net.layers)]:
        raise EqknobsError(f"layers: no layer {unknown[0]}; the model has {len(net.layers)}")
    hooks = [net.layers[layer].register_forward_hook(lambda _module, inputs, _output: inputs[0]) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def first_codebooks(net: MoshiNet, count: int) -> Iterator[None]:
    """While the block runs, the depformer has its first `count` steps only; the other codes of the agent are -1.

    Raises EqknobsError for fewer than 1 or more than there are.
    """
    lists = _steps_of(net, count)
    whole = [getattr(owner, name) for owner, name, _ in lists]
    try:
        remove_codebooks(net, count)
        yield
    finally:
        for (owner, name, _), modules in zip(lists, whole):
            setattr(owner, name, modules)


def _steps_of(net: MoshiNet, count: int) -> list[tuple[nn.Module, str, int]]:
    """Where modules of depformer steps are, and how many of each remain."""
    if not 1 <= count <= net.steps:
        raise EqknobsError(f"codebooks: 1 to {net.steps}, got {count}")
    lists: list[tuple[nn.Module, str, int]] = [(net, "depformer_in", count), (net, "linears", count)]
    lists.append((net, "depformer_emb", count - 1))
    for layer in net.dep_layers:
        lists += [(layer, "gating", count), (layer.self_attn, "in_projs", count), (layer.self_attn, "out_projs", count)]
    return lists


def remove_codebooks(net: MoshiNet, count: int) -> None:
    """Take out the depformer's steps beyond the first `count` for good: less memory and time, as `first_codebooks`
    otherwise. Raises EqknobsError for fewer than 1 or more than there are."""
    for owner, name, length in _steps_of(net, count):
        setattr(owner, name, getattr(owner, name)[:length])


@torch.no_grad()
def remove_heads(net: MoshiNet, heads: Heads, means: Sequence[Tensor] | None = None) -> None:
    """Take heads out for good: their rows of q, k and v, their columns of the output projection.

    What remains computes what it did with those heads zeroed (or, with `means`, giving those: then their part of the
    projection's output becomes a bias), but for rounding: shorter sums are added up in another order. In NF4 the rest
    is unpacked, cut and packed again, which gives the same values unless scales are doubled or head_dim is no multiple
    of the block; packed integers keep all that is left as it was. A KV cache made before does not fit any more. Raises
    EqknobsError for heads that are not there.
    """
    for layer, places in _places(net, heads).items():
        if not places:
            continue
        attention, dim = net.layers[layer].self_attn, net.config.head_dim
        count = len(attention.heads)
        keep = torch.tensor([i for i in range(count) if i not in places], dtype=torch.long, device=net.device)
        columns = torch.arange(count * dim, device=net.device).view(count, dim)[keep].flatten()
        rows = torch.cat([columns + part * count * dim for part in range(3)])  # of q, k and v
        if means is not None:
            given = means[layer][list(attention.heads)][places].to(net.device, torch.float32)
            projection = weight_of(attention.out_proj).view(-1, count, dim)[:, places]
            added = torch.einsum("ohd,hd->o", projection.float(), given)
            before = 0 if attention.bias is None else attention.bias
            attention.bias = nn.Parameter((before + added).to(net.dtype), requires_grad=False)
        attention.heads = tuple(attention.heads[i] for i in keep.tolist())
        attention.in_proj = cut(attention.in_proj, rows=rows) if len(keep) else None
        attention.out_proj = cut(attention.out_proj, columns=columns) if len(keep) else None


def linears(net: MoshiNet, patterns: Iterable[str] = TEMPORAL_LINEARS) -> list[str]:
    """Names of the linears that match any pattern. Raises EqknobsError if a pattern matches none."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | PackedLinear)]
    found = []
    for pattern in patterns:
        if not (matching := [name for name in names if fnmatchcase(name, pattern)]):
            raise EqknobsError(f"no linear matches {pattern!r}; names are like {names[0]}")
        found += matching
    return list(dict.fromkeys(found))


def prune(net: MoshiNet, share: float, patterns: Iterable[str] = TEMPORAL_LINEARS) -> dict[str, float]:
    """Set the smallest weights of every linear to 0 (Han et al. 2015, arXiv 1506.02626); returns the share of zeros.

    share: 0 to 1 of each matrix's weights; zeros that were there count. NF4 can represent 0, so that zeros survive
    packing, before or after. Raises EqknobsError for a share beyond 0 to 1.
    """
    if not 0 <= share <= 1:
        raise EqknobsError(f"prune: share must be 0 to 1, got {share}")
    zeros = {}
    for name in linears(net, patterns):
        linear = net.get_submodule(name)
        weight = weight_of(linear).clone()
        count = round(share * weight.numel())
        if count:
            # Stable, because in NF4 many weights are equal: which of them go must not be left to chance.
            order = weight.abs().flatten().sort(stable=True).indices
            weight.view(-1)[order[:count]] = 0
            put_module(net, name, with_weight(linear, weight))
        zeros[name] = float((weight == 0).float().mean()) if weight.numel() else 0.0
    return zeros


@contextmanager
def pruned(net: MoshiNet, shares: Mapping[int, float]) -> Iterator[None]:
    """While the block runs, each of those temporal layers lacks the share of its smallest weights (`prune`)."""
    patterns = {f"transformer.layers.{layer}.*": share for layer, share in shares.items()}
    kept = {name: net.get_submodule(name) for name in linears(net, patterns)}
    try:
        for pattern, share in patterns.items():
            prune(net, share, [pattern])
        yield
    finally:
        for name, module in kept.items():
            put_module(net, name, module)


def fake_quantise(net: MoshiNet, bits: int, block: int = 64, patterns: Iterable[str] = TEMPORAL_LINEARS) -> None:
    """Round weights to `bits` bits with one scale for every `block` values of a row, and keep them as they are stored.

    w ≈ s · round(w / s), s = max|w| / (2^(bits - 1) - 1) over the block (symmetric, round to nearest). Choose single
    transformer blocks by pattern: `transformer.layers.7.*`. Raises EqknobsError: fewer than 2 or more than 16 bits, a
    block that does not divide a row, a linear that is packed already.
    """
    if not 2 <= bits <= 16:
        raise EqknobsError(f"fake_quantise: bits must be 2 to 16, got {bits}")
    names = linears(net, patterns)
    for name in names:
        linear: Linear = net.get_submodule(name)
        if isinstance(linear, PackedLinear):
            raise EqknobsError(f"fake_quantise: {name} is packed; unpack the model (eqknobs unpack) to round it")
        if is_packed(linear):
            raise EqknobsError(f"fake_quantise: {name} is packed in NF4; load the model without nf4 to round it")
        if linear.in_features % block:
            raise EqknobsError(
                f"fake_quantise: blocks of {block} do not divide the {linear.in_features} inputs of {name}"
            )
    for name in names:
        linear = net.get_submodule(name)
        weight = linear.weight.data
        values = weight.float().unflatten(1, (-1, block))
        scale = values.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = torch.round(values / scale.clamp(min=torch.finfo(torch.float32).tiny)) * scale
        put_module(net, name, with_weight(linear, rounded.flatten(1).to(weight.dtype)))


@contextmanager
def masked_streams(net: MoshiNet, streams: Iterable[int]) -> Iterator[None]:
    """While the block runs, the temporal transformer does not see those input streams: 0 text, 1-8 agent, 9-16 user.

    A `.pt` voice prompt is fed as summed embeddings and keeps all its streams. Raises EqknobsError for other numbers.
    """
    streams = sorted(set(streams))
    if any(not 0 <= stream < net.config.streams for stream in streams):
        raise EqknobsError(f"streams: 0 (text) to {net.config.streams - 1}, got {streams}")
    with ExitStack() as stack:
        for stream in streams:
            embedding: nn.Module = net.emb[stream - 1] if stream else net.text_emb
            hook = embedding.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
            stack.callback(hook.remove)
        yield
