"""Weights that stay packed in memory: the same numbers as unpacked ones, fewer bytes; codecs and a Moshi with them."""

import pytest
import torch
from torch import nn

from eqknobs.errors import EqknobsError
from eqknobs.models import load_model
from eqknobs.models.moshi.adapter import Moshi
from eqknobs.models.moshi.checkpoint import find_files, load_net, save_net
from eqknobs.models.moshi.config import ALL_LINEARS, Nf4
from eqknobs.models.moshi.generate import GREEDY, generate
from eqknobs.models.moshi.interventions import fake_quantise, linears, prune, remove_heads, zeroed_heads
from eqknobs.models.moshi.memory import plan as memory_plan
from eqknobs.models.moshi.memory import read_shapes, weights
from eqknobs.packing.files import NAME, PackedFile, data_bytes, read_packed, write_packed
from eqknobs.packing.modules import (
    PackedEmbedding,
    PackedLinear,
    bytes_resident,
    faked,
    pack_modules,
    replaced,
    unpack_modules,
)
from eqknobs.packing.plan import Plan, packable, plan_bytes
from eqknobs.packing.quantise import BITS, quantise
from helpers.moshi_world import random_codes, write_codec, write_kyutai
from helpers.tiny_world import save_codec

LOST = {0: [1], 2: [0, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kyutai(tmp_path_factory.mktemp("moshi"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_linear_is_the_linear_with_unpacked_weights(bits, symmetric, dtype):
    linear = nn.Linear(70, 33).to(dtype).requires_grad_(False)
    packed = quantise(linear.weight, bits, 16, symmetric)
    module = PackedLinear(packed, linear.bias).to(dtype)  # casting the network must not touch the scales
    linear.weight.copy_(packed.dequantise(dtype))
    x = torch.randn(3, 5, 70).to(dtype)
    assert torch.equal(module(x), linear(x))
    assert (module.in_features, module.out_features) == (70, 33)


def test_a_packed_embedding_is_the_embedding_with_unpacked_rows():
    embedding = nn.Embedding(50, 24).requires_grad_(False)
    packed = quantise(embedding.weight, 3, 8)
    embedding.weight.copy_(packed.dequantise())
    index = torch.randint(0, 50, (2, 9))
    assert torch.equal(PackedEmbedding(packed)(index), embedding(index))
    assert PackedEmbedding(packed, torch.bfloat16)(index).dtype == torch.bfloat16


def test_packing_and_unpacking_a_network():
    net = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
    net.requires_grad_(False)
    plan = Plan.uniform(packable(net), 4, group=32, rest="float32")
    index = torch.arange(10)
    with faked(net, plan):
        wanted = net(index)
    plain = bytes_resident(net)
    pack_modules(net, plan)
    assert isinstance(net[0], PackedEmbedding) and isinstance(net[3], PackedLinear)
    assert torch.equal(net(index), wanted)
    values = 40 * 64 + 64 * 32 + 32 * 8
    assert plain == 4 * (values + 32 + 64) and bytes_resident(net) == values / 2 + values / 32 * 2 + 4 * (32 + 64)
    again = nn.Sequential(*net)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(index), wanted)
    unpack_modules(net)
    assert torch.equal(net(index), wanted) and bytes_resident(net) == plain
    assert type(net[1]) is nn.Linear and net[1].bias is not None and net[3].bias is None


def test_tied_weights_are_held_once():
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    net[1].weight = net[0].weight
    assert bytes_resident(net) == 4 * 80


def test_tied_weights_are_rounded_once_and_come_back(tmp_path):
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)).requires_grad_(False)
    net[1].weight = net[0].weight
    before = net[0].weight.clone()
    plan = Plan.uniform(packable(net), 4)
    write_packed(tmp_path / "packed", net, plan)
    with faked(net, plan):
        assert torch.equal(net[1].weight, read_packed(tmp_path / "packed")["0.weight"])
    assert torch.equal(net[0].weight, before)
    with replaced(net, [("0.weight", before * 2), ("1.weight", before * 3)]):
        assert torch.equal(net[0].weight, before * 3)
    assert torch.equal(net[0].weight, before)


def test_only_linears_and_embeddings_stay_packed():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    with pytest.raises(EqknobsError, match=r"1.weight is not the weight of a linear or embedding"):
        pack_modules(net, Plan.uniform(packable(net), 4))
    assert type(net[0]) is nn.Linear  # refused before anything is done
    with pytest.raises(EqknobsError, match="no tensor 7"):
        pack_modules(net, Plan({"7": 4}))


@pytest.mark.parametrize("rest", ["float16", "float32"])
def test_a_codec_in_place_is_the_codec_from_the_file(tmp_path, rest):
    cfg = {"name": "m", "kind": "mimi", "revision": None, "device": "cpu"}
    model = load_model(cfg | {"path": str(save_codec(tmp_path / "plain"))})
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy()
    plan = Plan.uniform(packable(model.net), 4, group=16, rounding="mse", rest=rest)
    write_packed(tmp_path / "packed", model.net, plan)
    own = model.reconstruct(wave, 4)  # codebooks have made their tables
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    with faked(model.net, plan):
        heard = model.reconstruct(wave, 4)
        state = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    stored = read_packed(tmp_path / "packed")
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    packed = load_model(cfg | {"path": str(tmp_path / "packed")})
    assert (packed.reconstruct(wave, 4) == heard).all() and not (heard == own).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.net.state_dict().items())
    assert (model.reconstruct(wave, 4) == own).all()


def test_what_fails_within_leaves_the_network_as_it_was():
    net = nn.Linear(4, 4)
    before = net.weight.clone()
    with pytest.raises(RuntimeError, match="mine"), faked(net, Plan({"weight": 2})):
        assert not torch.equal(net.weight, before)
        raise RuntimeError("mine")
    assert torch.equal(net.weight, before)


def logits(net):
    with torch.inference_mode():
        found = net(random_codes(1, 12, net.config.text_card))
    return torch.cat([found.text.flatten(), found.audio.nan_to_num().flatten()])


@pytest.fixture
def pair(folder):
    """The same Moshi with packed weights and with those that they stand for."""
    net, plain = (load_net(find_files("m", str(folder))) for _ in range(2))
    plan = Plan.uniform(packable(net), 4, group=32)
    for name in plan.bits:
        plain.get_parameter(name).copy_(plan.fake(name, plain.get_parameter(name)))
    pack_modules(net, plan)
    return net, plain, plan


def test_a_moshi_speaks_the_same_from_packed_weights(pair):
    net, plain, _ = pair
    assert torch.equal(logits(net), logits(plain))
    user = random_codes(1, 6, net.config.text_card)[:, 9:]
    with torch.inference_mode():
        assert torch.equal(generate(net, user, None, GREEDY).codes, generate(plain, user, None, GREEDY).codes)
    assert bytes_resident(net) < bytes_resident(plain) / 5
    assert set(linears(net, ALL_LINEARS)) == set(linears(plain, ALL_LINEARS))


@pytest.mark.parametrize("group", [16, 64, 128, 256, None])
def test_heads_are_cut_from_packed_weights_without_moving_any(folder, group):
    """Heads are 64 wide: groups that lie within one, and such as span two or all."""
    net, plain = (load_net(find_files("m", str(folder))) for _ in range(2))
    plan = Plan.uniform(packable(net), 3, group=group)
    for name in plan.bits:
        plain.get_parameter(name).copy_(plan.fake(name, plain.get_parameter(name)))
    pack_modules(net, plan)
    with zeroed_heads(net, LOST):
        zeroed = logits(net)
    before = bytes_resident(net)
    remove_heads(net, LOST)
    remove_heads(plain, LOST)
    assert torch.equal(logits(net), logits(plain)) and bytes_resident(net) < before
    torch.testing.assert_close(logits(net), zeroed, atol=2e-3, rtol=1e-4)
    remove_heads(net, {0: [0, 2, 3]})
    assert net.layers[0].self_attn.in_proj is None and logits(net).isfinite().all()


@pytest.mark.parametrize("rest", ["float16", "float32"])
def test_a_packed_moshi_is_saved_and_loaded_bit_for_bit(pair, tmp_path, rest):
    net, _, plan = pair
    save_net(net, tmp_path / "packed", plan=Plan(plan.bits, 32, rest=rest))
    again = load_net(find_files("m", str(tmp_path / "packed")))
    if rest == "float32":
        assert torch.equal(logits(again), logits(net))
    shapes = {
        name: tuple(t.shape) for name, t in load_net(find_files("m", str(tmp_path / "packed"))).named_parameters()
    }
    shapes |= {name: tuple(note["shape"]) for name, note in PackedFile(tmp_path / "packed" / NAME).packed.items()}
    assert data_bytes(tmp_path / "packed" / NAME) == plan_bytes(shapes, Plan(plan.bits, 32, rest=rest))
    remove_heads(again, LOST)
    wanted = logits(again)
    save_net(again, tmp_path / "cut")
    cut = load_net(find_files("m", str(tmp_path / "cut")))
    assert torch.equal(logits(cut), wanted) and cut.heads == again.heads
    assert data_bytes(tmp_path / "cut" / NAME) < data_bytes(tmp_path / "packed" / NAME) * 1.1
    unpack_modules(cut)
    save_net(cut, tmp_path / "plain")
    assert torch.equal(logits(load_net(find_files("m", str(tmp_path / "plain")))), wanted)


def test_the_hubs_stacked_depformer_is_packed_too(folder, tmp_path):
    """Packed by the file's own names: of one tensor for all steps, each step takes its rows."""
    names = [
        "depformer.layers.0.self_attn.in_proj_weight",
        "depformer.layers.1.self_attn.out_proj.weight",
        "emb.3.weight",
    ]
    plan = Plan.uniform([*names, "transformer.layers.1.self_attn.in_proj_weight"], 8, group=16, rest="float32")
    write_packed(tmp_path / "packed", folder, plan)
    files = find_files("m", str(tmp_path / "packed"))
    net = load_net(files)
    attention = net.dep_layers[0].self_attn
    assert files.tokenizer is not None and all(isinstance(linear, PackedLinear) for linear in attention.in_projs)
    whole = read_packed(tmp_path / "packed")
    steps = torch.cat([linear.packed.dequantise() for linear in attention.in_projs])
    assert torch.equal(steps, whole[names[0]][: len(steps)])
    plain = load_net(find_files("m", str(folder)))
    torch.testing.assert_close(logits(net), logits(plain), atol=0.5, rtol=0.1)


def test_memory_is_planned_with_packed_weights(pair, tmp_path):
    net, _, plan = pair
    save_net(net, tmp_path / "packed", plan=plan)
    model = {
        "name": "m",
        "kind": "moshi",
        "path": str(tmp_path / "packed"),
        "codec": str(write_codec(tmp_path / "codec")),
    }
    shapes = read_shapes(model)
    assert sum(weights(shapes, 4, None).values()) == bytes_resident(net)
    cfg = {"name": "c", "kind": "mimi", "path": model["codec"], "revision": None, "device": "cpu"}
    write_packed(tmp_path / "codec4", codec := load_model(cfg).net, Plan.uniform(packable(codec), 4))
    assert (
        memory_plan(model, 4).parts["codec"]
        == memory_plan(model | {"codec": str(tmp_path / "codec4")}, 4).parts["codec"]
    )
    speaks = Moshi(model | {"codec": str(tmp_path / "codec4"), "device": "cpu"})
    assert speaks.net.dtype == torch.float32 and torch.equal(logits(speaks.net), logits(load_net(speaks.files)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(pair):
    """The same weights bit for bit wherever they are unpacked."""
    net, plain, plan = pair
    for name in plan.bits:
        packed = net.get_submodule(name.removesuffix(".weight")).packed
        assert torch.equal(packed.to("cuda").dequantise().cpu(), packed.dequantise())
        assert torch.equal(plan.fake(name, plain.get_parameter(name).cuda()).cpu(), packed.dequantise())
    net.to("cuda"), plain.to("cuda")
    codes = random_codes(1, 12, net.config.text_card).cuda()
    with torch.inference_mode():
        assert torch.equal(net(codes).text, plain(codes).text)


def test_other_interventions_on_packed_weights(pair, tmp_path):
    net, _, plan = pair
    with pytest.raises(EqknobsError, match="is packed; unpack the model"):
        fake_quantise(net, 4)
    name = linears(net)[0]
    prune(net, 0.5, [name])
    assert isinstance(net.get_submodule(name), PackedLinear)
    assert (net.get_submodule(name).packed.dequantise() == 0).float().mean() >= 0.5
    save_net(net, tmp_path / "packed", plan=plan)  # NF4 asked for: weights that are packed stay as they are
    again = load_net(find_files("m", str(tmp_path / "packed")), nf4=Nf4())
    assert isinstance(again.get_submodule(name), PackedLinear)
