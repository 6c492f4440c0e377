"""The sparse products against dense ones, and their gradients against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from eqknobs.sae import kernels
from eqknobs.sae.jumprelu import BAND_BELOW, _Jump, _Threshold, band
from eqknobs.sae.rms_l1 import _Autoencode, rms_normalise

B, D, M = 6, 5, 16


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.fixture
def pattern() -> kernels.Pattern:
    """Rows with none, one, several and all entries; features that nobody uses."""
    h = torch.randn(B, M, generator=torch.Generator().manual_seed(1))
    h[0], h[1] = -1, 5
    h[:, 3] = -1
    return kernels.above(h, 0.4)[0]


def test_sparse_products_equal_dense_ones(pattern):
    z, weight, bias = parameters((B, D), (M, D), (M,))
    z = z.detach()
    values = kernels.encode_at(z, weight, bias, pattern)
    dense = z @ weight.T + bias
    mask = pattern.dense(torch.ones(len(pattern.cols), dtype=torch.float64))
    torch.testing.assert_close(pattern.dense(values), dense * mask)
    out = kernels.decode(torch.relu(values), weight, pattern)
    other = (torch.relu(dense) * mask) @ weight
    torch.testing.assert_close(out, other)
    target = torch.randn(B, D, dtype=torch.float64)
    found = torch.autograd.grad((out - target).square().sum(), (weight, bias), retain_graph=True)
    wanted = torch.autograd.grad((other - target).square().sum(), (weight, bias))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_pass_gradcheck(pattern):
    z, weight, bias = parameters((B, D), (M, D), (M,))
    z = z.detach()
    assert gradcheck(lambda w, b: kernels.encode_at(z, w, b, pattern), (weight, bias))
    (values,) = parameters((len(pattern.cols),), seed=2)
    assert gradcheck(lambda v, w: kernels.decode(v, w, pattern), (values, weight))


@pytest.mark.parametrize("on_f", [False, True], ids=["L1 on h", "L1 on f"])
def test_rms_autoencoder_equals_autograd_and_passes_gradcheck(on_f):
    z, w_enc, b_enc, w_dec, b_dec = parameters((B, D), (M, D), (M,), (M, D), (D,))
    z = z.detach()

    def mine(*weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _Autoencode.apply(z, *weights, on_f)[:2]

    def plain(w_enc: torch.Tensor, b_enc: torch.Tensor, w_dec: torch.Tensor, b_dec: torch.Tensor) -> tuple:
        h = torch.relu(z @ w_enc.T + b_enc)
        f = rms_normalise(h)
        return f @ w_dec + b_dec, (f if on_f else h).sum()

    weights = (w_enc, b_enc, w_dec, b_dec)
    for a, b in zip(mine(*weights), plain(*weights), strict=True):
        torch.testing.assert_close(a, b)
    found = torch.autograd.grad(sum(x.square().sum() for x in mine(*weights)), weights)
    wanted = torch.autograd.grad(sum(x.square().sum() for x in plain(*weights)), weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert gradcheck(mine, weights, atol=1e-6)


def test_the_jump_has_the_papers_pseudo_derivatives():
    """Rajamanoharan et al. 2024, eq. 11 and 12: −θ/ε K((h − θ)/ε) for the value, −1/ε K for the count."""
    theta = torch.tensor([0.5, 1.0], requires_grad=True)
    h = torch.tensor([[0.4, 3.0], [0.9, 1.1], [-2.0, 0.95]], requires_grad=True)
    code, count = _Jump.apply(h, theta, 0.3)
    assert torch.equal(code, torch.tensor([[0.0, 3.0], [0.9, 1.1], [0.0, 0.0]])) and count.item() == 3
    g = torch.tensor([[1.0, 10.0], [100.0, 3.0], [7.0, 5.0]])
    to_h, to_theta = torch.autograd.grad([code, count], [h, theta], [g, torch.tensor(2.0)])
    assert torch.equal(to_h, g * (code > 0))
    # Inside the rectangle of width 0.3: h[0, 0] for the first feature; h[1, 1] and h[2, 1] for the second.
    expected = [-(0.5 * 1 + 2) / 0.3, -(1.0 * (3 + 5) + 2 * 2) / 0.3]
    torch.testing.assert_close(to_theta, torch.tensor(expected))


@pytest.mark.parametrize("width", [0.001, 0.05, 0.4, 3.0], ids=["empty", "thin: sparse", "wide: dense", "nearly all"])
def test_the_thresholds_gradient_needs_no_code_in_the_band(width, monkeypatch):
    """The sparse path of jumprelu (code at active features, `_Threshold`) against dense autograd through `_Jump`."""
    frames, d, m = 300, D, 40
    z, w_enc, b_enc, w_dec, theta = parameters((frames, d), (m, d), (m,), (m, d), (m,))
    z, theta = z.detach(), theta.detach().abs().requires_grad_()
    weights = (w_enc, b_enc, w_dec, theta)

    def loss(rebuilt: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return (z - rebuilt).square().sum() + (count / frames / 3 - 1).square()

    code, count = _Jump.apply(z @ w_enc.T + b_enc, theta, width)
    wanted = torch.autograd.grad(loss(code @ w_dec, count), weights)
    h = (z @ w_enc.T + b_enc).detach()
    inside = band(h, theta.detach(), width)
    assert torch.equal(inside, (h - theta).abs() < width / 2)
    thin = inside.double().mean() < BAND_BELOW
    assert thin == (width < 0.1)
    if not thin:
        monkeypatch.setattr("eqknobs.sae.jumprelu.places", None)  # the dense way it must be
    pattern, _ = kernels.above(h, theta.detach())
    values = kernels.encode_at(z, w_enc, b_enc, pattern)
    rebuilt = kernels.decode(values, w_dec, pattern)
    given = (rebuilt, theta, w_dec.detach(), inside, len(values), width)
    rebuilt, found_count = _Threshold.apply(*given)
    assert found_count.item() == count.item() > 0
    found = torch.autograd.grad(loss(rebuilt, found_count), weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert bool(wanted[3].any()) == bool(inside.any())


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize(("features", "k"), [(64, 3), (64, 4), (60, 5), (24, 20), (7, 7)])
def test_row_top_k_is_topk(features, k):
    h = torch.randn(50, features, generator=torch.Generator().manual_seed(features))
    pattern, values = kernels.row_top_k(h, k)
    kept = h.topk(k, dim=1)
    wanted = torch.zeros_like(h).scatter(1, kept.indices, kept.values)
    assert torch.equal(pattern.dense(values), wanted)
    assert torch.equal(pattern.crow, torch.arange(0, 50 * k + 1, k))
    assert (pattern.cols.view(50, k).diff(dim=1) > 0).all()  # by column, whatever chose them


@pytest.mark.parametrize("hint", [0.0, 0.5, 1.0, 50.0], ids=["none", "low", "close", "too high"])
def test_batch_top_k_is_exact_whatever_the_hint(hint):
    h = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    pattern, values, smallest = kernels.batch_top_k(h, 100, hint)
    kept = h.flatten().topk(100)
    wanted = torch.zeros(h.numel()).scatter(0, kept.indices, kept.values).view_as(h)
    assert torch.equal(pattern.dense(values), wanted)
    assert smallest == kept.values.min().item()
    assert torch.equal(pattern.rows, pattern.rows.sort().values)


def test_batch_top_k_with_ties_and_with_too_few_positive_entries():
    h = torch.tensor([[1.0, 2.0, 1.0], [1.0, -1.0, 0.0]])
    pattern, values, smallest = kernels.batch_top_k(h, 2)
    assert values.tolist() == [1.0, 2.0] and pattern.cols.tolist() == [0, 1] and smallest == 1.0
    pattern, values, _ = kernels.batch_top_k(h, 6)
    assert len(values) == 4 and (values > 0).all() and pattern.crow.tolist() == [0, 3, 4]
    pattern, values, smallest = kernels.batch_top_k(-h.abs(), 2)
    assert len(values) == 0 and smallest == 0.0 and pattern.dense(values).shape == (2, 3)


def test_above_takes_a_threshold_per_feature():
    h = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    pattern, values = kernels.above(h, torch.tensor([2.0, 1.0]))
    assert values.tolist() == [2.0, 3.0] and pattern.cols.tolist() == [1, 0] and pattern.rows.tolist() == [0, 1]
