"""Plans: what they may say, as JSON, what they cost; which tensors of a network can be packed."""

import json

import pytest
import torch
from torch import nn
from transformers import EncodecModel, MimiModel

from eqknobs.errors import EqknobsError
from eqknobs.packing.plan import Plan, mean_bits, packable, plan_bytes
from eqknobs.packing.quantise import fake
from helpers import ROOT

TINY = ROOT / "resources/models/tiny-mimi"


class Net(nn.Module):
    """One module of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.down = nn.Conv1d(6, 4, 3)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 1))
        self.norm = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 3)
        self.out = nn.Linear(6, 5)
        self.out.weight = self.embed.weight  # tied
        self.codebook = nn.Module()
        self.codebook.embed_sum = nn.Buffer(torch.randn(7, 2))
        self.codebook.usage = nn.Buffer(torch.ones(7))
        self.codebook.scratch = nn.Buffer(torch.ones(7, 2), persistent=False)


def test_what_can_be_packed():
    net = Net()
    found = packable(net)
    assert dict(found) == {
        "embed.weight": (5, 6),
        "down.weight": (4, 6, 3),
        "up.weight": (4, 6, 3),
        "normed.parametrizations.weight.original1": (6, 6, 1),
        "lstm.weight_ih_l0": (12, 6),
        "lstm.weight_hh_l0": (12, 3),
        "codebook.embed_sum": (7, 2),
    }
    assert list(found) == [name for name in net.state_dict() if name in found]
    assert [name for name, shape in found.items() if shape.axis] == ["up.weight"]
    assert found["up.weight"].numel() == 72
    assert set(found) - set(packable(net, embeddings=False)) == {"embed.weight"}
    assert "out.weight" not in packable(net, embeddings=False)  # tied to one that stays
    assert "codebook.embed_sum" not in packable(net, codebooks=False)
    assert set(found) <= set(net.state_dict())


def test_all_large_tensors_of_the_bundled_codec_can_be_packed():
    net = MimiModel.from_pretrained(TINY)
    found = packable(net)
    assert {name for name, tensor in net.state_dict().items() if tensor.dim() > 1} == set(found)
    assert [n for n, shape in found.items() if shape.axis] == [
        name.removesuffix(".weight") + ".weight"
        for name, module in ((f"{n}.weight", m) for n, m in net.named_modules())
        if isinstance(module, nn.ConvTranspose1d)
    ]


def test_a_weight_normalised_codec(tmp_path):
    from transformers import EncodecConfig

    net = EncodecModel(EncodecConfig(hidden_size=16, num_filters=2, codebook_size=8, codebook_dim=16))
    found = packable(net)
    assert any(name.endswith("original1") for name in found) and any("lstm" in name for name in found)
    assert any(name.endswith("codebook.embed") for name in found)


def test_a_plan_is_its_json():
    plan = Plan({"a": 3, "b": 8}, group=32, symmetric=False, rounding="mse", rest="float32", transposed=("b",))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert Plan.from_json({"bits": {"a": 4}}) == Plan({"a": 4})
    assert plan.with_bits({"a": 2}).bits == {"a": 2} and plan.with_bits({"a": 2}).group == 32


def test_plans_round_by_output_channel():
    net = Net()
    plan = Plan.uniform(packable(net), 3, group=None)
    weight = net.up.weight.detach()
    assert plan.transposed == ("up.weight",)
    assert torch.equal(plan.fake("up.weight", weight), fake(weight, 3, axis=1))
    assert torch.equal(plan.quantise("up.weight", weight).dequantise(), fake(weight, 3, axis=1))
    assert plan.quantise("up.weight", weight).scales.shape == (6, 1)
    assert Plan.uniform(["a", "b"], 5) == Plan({"a": 5, "b": 5})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "not a plan"),
        ({"group": 3}, "not a plan"),
        ({"bits": 4}, "bits must map"),
        ({"bits": {"a": 1}}, "a: bits must be a whole number, 2 to 8, got 1"),
        ({"bits": {"a": 4.5}}, "2 to 8, got 4.5"),
        ({"bits": {"a": "4"}}, "2 to 8, got '4'"),
        ({"bits": {"a": [4]}}, "2 to 8"),
        ({"bits": {}, "group": -1}, "group must be"),
        ({"bits": {}, "group": True}, "group must be"),
        ({"bits": {}, "symmetric": 1}, "symmetric must be true or false"),
        ({"bits": {}, "rounding": "up"}, "rounding must be"),
        ({"bits": {}, "rounding": ["mse"]}, "rounding must be"),
        ({"bits": {}, "rest": "int8"}, "rest must be float32 or float16"),
        ({"bits": {}, "rest": {}}, "rest must be float32 or float16"),
        ({"bits": {}, "transposed": "a"}, "transposed must be a list"),
        ({"bits": {}, "width": 3}, "a plan has no width"),
    ],
)
def test_bad_plans_are_one_line(raw, message):
    with pytest.raises(EqknobsError, match=message) as seen:
        Plan.from_json(raw, "here")
    assert str(seen.value).startswith("here") and "\n" not in str(seen.value)


def test_costs():
    shapes = {"a": (10, 64), "b": (3, 5), "c": (7,)}
    plan = Plan({"a": 3}, group=32)
    assert plan_bytes(shapes, plan) == 3 * 8 * 10 + 10 * 2 * 2 + (15 + 7) * 2
    assert plan_bytes(shapes, Plan({"a": 3}, symmetric=False, rest="float32")) == 3 * 8 * 10 + 10 * 3 + 22 * 4
    assert mean_bits(shapes, Plan({"a": 3, "b": 8})) == (640 * 3 + 15 * 8) / 655
    for cost in (plan_bytes, mean_bits):
        with pytest.raises(EqknobsError, match=r"no tensor x .*like a: is this another model's plan"):
            cost(shapes, Plan({"x": 3}))


def test_names_that_cannot_be_packed():
    with pytest.raises(EqknobsError, match=r"x .* is no tensor that can be packed"):
        Plan.of(packable(Net()), {"x": 3})
    with pytest.raises(EqknobsError, match=r"a: quantise: .*NaN"):
        Plan({"a": 3}).fake("a", torch.tensor([[torch.nan]]))
