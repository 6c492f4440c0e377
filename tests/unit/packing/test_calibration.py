"""Inputs' second moments against the layers' own outputs, and error-compensated rounding."""

import pytest
import torch
from torch import nn

from eqknobs.errors import EqknobsError
from eqknobs.packing.calibration import compensated, input_moments
from eqknobs.packing.files import read_packed, write_packed
from eqknobs.packing.modules import PackedLinear, faked, pack_modules
from eqknobs.packing.plan import Plan, packable
from eqknobs.packing.quantise import fake, quantise


def correlated(n: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 2
    return torch.randn(n, columns, generator=generator) @ mixing


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 5, bias=False), (2, 9, 6)),
        (nn.Conv1d(3, 5, 4, bias=False), (2, 3, 20)),
        (nn.Conv1d(3, 5, 3, stride=2, padding=2, dilation=2, bias=False), (2, 3, 20)),
        (nn.ConvTranspose1d(3, 5, 4, bias=False), (2, 3, 9)),
        (nn.ConvTranspose1d(3, 5, 4, stride=3, dilation=2, bias=False), (2, 3, 9)),
    ],
)
def test_moments_give_the_power_of_every_output_channel(module, shape):
    """The mean of y² over all outputs y = wᵀx is wᵀ E[x xᵀ] w."""
    net = nn.Sequential(module)
    outputs = []
    with torch.no_grad(), input_moments(net, ["0.weight"]) as moments:
        for seed in range(2):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            y = net(x)
            outputs.append((y if isinstance(module, nn.Linear) else y.transpose(1, 2)).reshape(-1, 5))
    axis = int(isinstance(module, nn.ConvTranspose1d))
    matrix = module.weight.detach().movedim(axis, 0).flatten(1).double()
    power = torch.cat(outputs).double().square().mean(0)
    torch.testing.assert_close((matrix @ moments["0.weight"] * matrix).sum(1), power, rtol=1e-4, atol=1e-6)


def test_what_has_no_moments():
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(4, 4),
            "grouped": nn.Conv1d(4, 4, 3, groups=2),
            "wide": nn.Linear(50, 2),
            "idle": nn.Linear(2, 2),
            "seen": nn.Linear(4, 2),
        }
    )
    with input_moments(net, packable(net), largest=40) as moments:
        net["embed"](torch.tensor([1]))
        net["grouped"](torch.zeros(1, 4, 5))
        net["wide"](torch.zeros(1, 50))
        net["seen"](torch.ones(3, 4))
    assert set(moments) == {"seen.weight"} and torch.equal(moments["seen.weight"], torch.ones(4, 4).double())
    assert all(not module._forward_pre_hooks for module in net.modules())
    with (
        pytest.raises(EqknobsError, match=r"no tensor nope.weight"),
        input_moments(net, ["seen.weight", "nope.weight"]),
    ):
        pass
    assert not net["seen"]._forward_pre_hooks


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16, 48])
@pytest.mark.parametrize("bits", [2, 4])
def test_outputs_are_closer_than_by_mse(bits, group, symmetric):
    x = correlated(500, 200)
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(1))
    moments = x.T @ x / len(x)

    def error(rounding: str) -> float:
        rounded = fake(weight, bits, group, symmetric, rounding, moments=moments)
        return float(((rounded - weight) @ x.T).square().mean())

    assert error("gptq") < 0.7 * error("mse")


def test_on_inputs_without_correlation_it_is_mse():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        wanted = fake(weight, 3, 16, symmetric, "mse")
        assert torch.equal(fake(weight, 3, 16, symmetric, "gptq", moments=torch.eye(40)), wanted)
        assert torch.equal(fake(weight, 3, 16, symmetric, "gptq"), wanted)  # nor without moments
        assert torch.equal(fake(weight, 3, 16, symmetric, "gptq", moments=torch.zeros(40, 40)), wanted)


def test_columns_one_after_another_by_hand():
    """Two columns: the second is moved by the first one's error times the regression of the first on the second."""
    weight, moments = torch.tensor([[0.4, 0.29]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    one = torch.tensor(1.0)
    assert compensated(weight, one, -2 * one, one, moments, damping=0).tolist() == [[0.0, 0.0]]  # .29 + .4 · .5 = .49
    weight = torch.tensor([[0.4, 0.31]])  # .51
    assert compensated(weight, one, -2 * one, one, moments, damping=0).tolist() == [[0.0, 1.0]]


def test_blocks_change_nothing():
    x, weight = correlated(300, 150), torch.randn(5, 150, generator=torch.Generator().manual_seed(2))
    moments, scale, ones = x.T @ x, torch.full((5, 1), 0.5), torch.ones(5, 1)
    whole = compensated(weight, scale, -4 * ones, 3 * ones, moments, block=1000)
    assert torch.equal(compensated(weight, scale, -4 * ones, 3 * ones, moments, block=7), whole)


def test_moments_of_another_tensor():
    with pytest.raises(EqknobsError, match=r"moments must be \[8, 8\], got \[4, 4\]"):
        quantise(torch.ones(2, 8), 4, rounding="gptq", moments=torch.eye(4))


def test_a_plan_with_moments_in_place_on_disk_and_in_memory(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 8)).requires_grad_(False)
    x = correlated(400, 40)
    plan = Plan.uniform(packable(net), 3, group=16, rounding="gptq", rest="float32")
    with input_moments(net, plan.bits) as moments:
        wanted = net(x)
    with faked(net, plan, moments):
        heard = net(x)
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with faked(net, plan):
        plain = net(x)
    assert (heard - wanted).square().mean() < 0.8 * (plain - wanted).square().mean()
    write_packed(tmp_path / "packed", net, plan, moments=moments)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_packed(tmp_path / "packed").items())
    pack_modules(net, plan, moments)
    assert isinstance(net[0], PackedLinear) and torch.equal(net(x), heard)
