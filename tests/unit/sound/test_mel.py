"""The mel distance of tensors against that of waveforms."""

import numpy as np
import pytest
import torch

from eqknobs.sound.mel import mel_db, mel_distances, mel_power
from eqknobs.sound.metrics import mel_distance


@pytest.mark.parametrize("rate", [16000, 22050, 24000])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 0.777])
def test_it_is_the_metric(rate, seconds):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, round(seconds * rate))).astype(np.float32)
    b = (a * [[1], [0.5], [0]] + 0.1 * rng.standard_normal(a.shape) * [[1], [1], [0]]).astype(np.float32)
    found = mel_distances(torch.from_numpy(a), torch.from_numpy(b), rate)
    wanted = [mel_distance(x, y, rate) for x, y in zip(a, b)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    one = mel_distances(torch.from_numpy(a[:1]), torch.from_numpy(b), rate)  # one original of all
    assert one.tolist() == pytest.approx([mel_distance(a[0], y, rate) for y in b], rel=1e-4)


def test_gradients_are_finite_where_there_is_silence():
    wav = torch.cat([torch.zeros(1, 4000), torch.randn(1, 4000)], 1).requires_grad_()
    power = mel_power(wav, 16000)
    mel_db(power, power.detach()).sum().backward()
    assert wav.grad is not None and wav.grad.isfinite().all() and wav.grad.abs().sum() > 0
