"""Equal weights give the codes and reconstructions of SAELens and dictionary_learning.

`tools/make_sae_fixtures.py` asked the libraries once and left their answers in `tests/fixtures/sae_peers`; the slow
test asks them again.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from eqknobs.sae import make_config, new_sae
from eqknobs.sae.kernels import batch_top_k
from helpers import ROOT

FIXTURES = ROOT / "tests/fixtures/sae_peers"
PEERS = ROOT / ".venv-peers/bin/python"
CASES = [
    f"{library}-{architecture}"
    for library in ("sae-lens", "dictionary-learning")
    for architecture in ("standard", "topk", "batchtopk", "jumprelu")
]
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of one fixture and what it says about them."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


def assert_we_agree(path: Path) -> None:
    """Our class of the fixture's variant, given its weights, must give its codes and its reconstruction."""
    tensors, about = read(path)
    (features, d), k = tensors["W_enc"].shape, about["k"]
    variant = about["variant"]
    config = {"variant": variant, "d_in": d, "d_sae": features} | ({"l0": k} if variant == "jumprelu" else {"k": k})
    sae = new_sae(make_config(config), np.zeros(d), np.ones(d))
    given = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold") if name in tensors}
    missing, unknown = sae.load_state_dict(given, strict=False)
    assert set(missing) == {"mean", "std"} and not unknown
    sae.requires_grad_(False)
    codes = sae.encode(tensors["x"])
    assert torch.equal(codes > 0, tensors["codes"] > 0)
    torch.testing.assert_close(codes, tensors["codes"], **CLOSE)
    torch.testing.assert_close(sae.decode(codes), tensors["reconstruction"], **CLOSE)
    torch.testing.assert_close(sae(tensors["x"]), tensors["reconstruction"], **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_the_peers(name):
    assert_we_agree(FIXTURES / f"{name}.safetensors")


def test_what_batchtopk_chooses_in_training_is_what_the_threshold_chooses():
    """The fixture's threshold leaves k a frame: the k·B largest of the batch must be the same codes."""
    tensors, about = read(FIXTURES / "dictionary-learning-batchtopk.safetensors")
    x, k = tensors["x"], about["k"]
    h = (x - tensors["b_dec"]) @ tensors["W_enc"].T + tensors["b_enc"]
    pattern, values, _ = batch_top_k(h, k * len(x))
    torch.testing.assert_close(pattern.dense(values), tensors["codes"], **CLOSE)


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) <= 200_000
    assert {path.stem for path in FIXTURES.iterdir()} == set(CASES)


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="needs .venv-peers: bash benchmarks/make_peers_env.sh")
def test_the_peers_themselves_agree_today(tmp_path):
    command = [str(PEERS), str(ROOT / "tools/make_sae_fixtures.py"), "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment)
    for name in CASES:
        assert_we_agree(tmp_path / f"{name}.safetensors")
        again, committed = (read(folder / f"{name}.safetensors")[0] for folder in (tmp_path, FIXTURES))
        assert set(again) == set(committed)
        for key, value in again.items():
            torch.testing.assert_close(value, committed[key], **CLOSE)
