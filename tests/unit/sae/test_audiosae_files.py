"""AudioSAE's checkpoints: read safely, their input's scale settled by a cache, or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eqknobs.cli import main
from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.sae import SAE, make_config, new_sae
from eqknobs.sae.audiosae_files import import_audiosae, read_ae
from helpers.synthetic import write_cache

D, F, K = 16, 24, 3


def directions() -> np.ndarray:
    rows = np.random.default_rng(5).normal(size=(F, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def checkpoint(path: Path, scale: float = 1.0, **more: object) -> Path:
    """A dictionary in their format; `scale`: of the input that its bias expects, in multiples of raw units."""
    w = torch.from_numpy(directions())
    state = {"encoder.weight": w.clone(), "encoder.bias": torch.full((F,), -0.3 * scale), "decoder.weight": w.T.clone()}
    state |= {"b_dec": torch.zeros(D), "k": torch.tensor(K)}
    torch.save({key: value for key, value in (state | more).items() if value is not None}, path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Frames of one strong direction each, of very unequal norms (geometric mean far from 1)."""
    rng = np.random.default_rng(0)
    frames = 400
    acts = directions()[rng.integers(0, F, frames)] * np.exp(rng.normal(2, 1, (frames, 1)))
    acts += 0.01 * rng.normal(size=acts.shape)
    clips = [(f"c{i}", f"s{i}", "train" if i < 3 else "val", 100) for i in range(4)]
    return write_cache(tmp_path / "cache.h5", acts, clips)


def test_of_the_scales_the_one_that_rebuilds_is_chosen(tmp_path: Path, cache: Path, capsys) -> None:
    # A bias of −.3 is right for unit norm and next to nothing for raw frames; W_dec makes up for it only at unit norm.
    w = torch.from_numpy(directions())
    path = checkpoint(tmp_path / "ae.pt", **{"decoder.weight": w.T / 0.7, "encoder.bias": torch.full((F,), -0.3)})
    main(["import-sae", "--ae", str(path), "--cache", str(cache), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    sae = SAE.load(tmp_path / "out")
    assert sae.config.input_scale == "unit_norm" and "the quantile that leaves 3" in said
    assert "input raw: FVU" in said and "input_scale unit_norm" in said
    with ActivationCache(cache) as read:
        raw = np.array(read.acts[:300])
    assert (sae.encode(raw) > 0).sum() / len(raw) <= K + 1e-6


def test_a_threshold_in_the_file_is_kept_and_one_below_zero_is_not(tmp_path: Path, cache: Path) -> None:
    found = import_audiosae(checkpoint(tmp_path / "a.pt"), cache, tmp_path / "a")
    again = import_audiosae(checkpoint(tmp_path / "b.pt", threshold=torch.tensor(-1.0)), cache, tmp_path / "b")
    assert again == found and "quantile" in again.threshold_from
    path = checkpoint(tmp_path / "c.pt", threshold=torch.tensor(0.25))
    assert float(read_ae(path)["threshold"]) == 0.25


def test_config_flat_or_nested_gives_k_and_must_fit(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "ae.pt", k=None)
    for values in ({"k": 5, "activation_dim": D}, {"trainer": {"k": 5, "dict_size": F}}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert int(read_ae(path)["k"]) == 5
    (tmp_path / "config.json").write_text(json.dumps({"k": 5, "dict_size": 99}))
    with pytest.raises(EqknobsError, match="dict_size 99, the weights 24"):
        read_ae(path)


class Hostile:
    """Would write a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"encoder.weight": Hostile(tmp_path / "ran")}, tmp_path / "ae.pt")
    with pytest.raises(EqknobsError, match="not a file of plain weights") as caught:
        read_ae(tmp_path / "ae.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder.bias": None}, "lacks 'encoder.bias'"),
        ({"decoder.weight": torch.zeros(D, 7)}, "decoder.weight has shape"),
        ({"b_dec": torch.full((D,), float("nan"))}, "b_dec is not finite"),
        ({"k": torch.tensor(0)}, "k is 0 of 24"),
        ({"k": None}, "lacks 'k'"),
        ({"encoder.weight": torch.zeros(3)}, "not AudioSAE's ae.pt"),
        ({"encoder.weight": "no tensor"}, "not AudioSAE's ae.pt"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(EqknobsError, match=says) as caught:
        read_ae(checkpoint(tmp_path / "ae.pt", **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(EqknobsError, match="not a file of plain weights"):
        read_ae(tmp_path / "ae.pt")
    with pytest.raises(EqknobsError, match="not a file of plain weights"):
        read_ae(tmp_path / "none.pt")


def test_a_layer_that_is_not_its_own_is_refused(tmp_path: Path, cache: Path) -> None:
    wrong = torch.from_numpy(np.random.default_rng(9).normal(size=(D, F)).astype(np.float32))
    path = checkpoint(tmp_path / "ae.pt", **{"decoder.weight": wrong})
    with pytest.raises(EqknobsError, match="does not rebuild"):
        import_audiosae(path, cache, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").touch()
    with pytest.raises(EqknobsError, match="no SAE's folder"):
        import_audiosae(checkpoint(tmp_path / "ae.pt"), cache, tmp_path / "taken")


def test_codes_are_those_of_their_formula() -> None:
    folder = Path(__file__).parents[2] / "fixtures/audiosae"
    expected, weights = load_file(folder / "expected.safetensors"), read_ae(folder / "ae.pt")
    width = expected["x"].shape[1]
    shape = {"d_in": width, "d_sae": expected["codes"].shape[1], "k": int(weights.pop("k"))}
    sae = new_sae(make_config({"variant": "batchtopk", "input_scale": "raw", **shape}), np.zeros(width), np.ones(width))
    sae.load_state_dict(sae.state_dict() | weights)  # a threshold of 0: every positive value
    torch.testing.assert_close(sae.encode(expected["x"]), expected["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(expected["x"]), expected["reconstruction"], rtol=1e-4, atol=1e-4)
