"""SpeechTokenizer against what its authors' package made of the same small weights (the fixture), and its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqknobs.errors import EqknobsError
from eqknobs.models import load_model
from eqknobs.models.checks import check_codebooks
from make_speechtokenizer_fixture import CONFIG, FIXTURE, write_tiny

EXPECTED = {name: np.array(values) for name, values in json.loads(FIXTURE.read_text()).items()}


def load(folder: Path, **changes: Any) -> Any:
    cfg: Any = {"name": "st", "kind": "speechtokenizer", "path": str(folder), "revision": None, "device": "cpu"}
    return load_model(cfg | changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("speechtokenizer")
    return folder, write_tiny(folder)


def near(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal but for what another processor's sums differ by, of the largest value."""
    return np.shape(ours) == np.shape(theirs) and np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_it_does_what_the_authors_package_does(tiny: tuple[Path, np.ndarray]) -> None:
    folder, wav = tiny
    model = load(folder)
    site = model.site("encoder")
    assert (site.hop, site.width, model.sample_rate, model.n_codebooks, model.decodes) == (8, 8, 16000, 3, True)
    acts = model.encode(wav, "encoder")
    assert near(acts, EXPECTED["encoded"])
    assert len(np.unique(EXPECTED["codes"], axis=1).T) > 4  # or the codes would show nothing
    assert np.array_equal(model.tokens(acts, "encoder"), EXPECTED["codes"])
    assert near(model.decoder_input(acts, "encoder", 2), EXPECTED["dequantised"])
    for n in (2, 3):
        sound = model.decode(acts, "encoder", len(wav), n)
        assert near(sound, EXPECTED[f"sound_{n}"]) and sound.std() > 1e-3
    assert near(model.decode_tokens(EXPECTED["codes"], len(wav)), EXPECTED["sound_3"])


def test_chunks_are_exact(tiny: tuple[Path, np.ndarray]) -> None:
    model = load(tiny[0])
    wav = np.random.default_rng(1).normal(scale=0.3, size=3001).astype(np.float32)
    whole = model.encode(wav, "encoder")
    assert len(whole) == model.frames(len(wav), "encoder") == 376
    model.chunk_seconds = 0.02
    assert np.allclose(model.encode(wav, "encoder"), whole, atol=1e-5)


def test_codebooks_are_counted_before_it_is_loaded(tiny: tuple[Path, np.ndarray]) -> None:
    config = {"models": {"c": {"kind": "speechtokenizer", "path": str(tiny[0]), "revision": None}}}
    check_codebooks(config, "codec.codebooks", 3, ["c.encoder"])
    with pytest.raises(EqknobsError, match="4 is more than the 3 codebooks of c"):
        check_codebooks(config, "codec.codebooks", 4, ["c.encoder"])


def test_what_does_not_load_ends_in_one_line(tiny: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    for path in ("no/such/folder", "/nowhere"):
        with pytest.raises(EqknobsError, match="no folder"):
            load(Path(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EqknobsError, match=r"has no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(EqknobsError, match=r"has weights [0-9a-f]{12}, not abc"):
        load(tiny[0], revision="abc")
    for name, change in (("snake", {"activation": "Snake"}), ("wide", {"dimension": 16}), ("short", {"n_q": None})):
        folder = shutil.copytree(tiny[0], tmp_path / name)
        (folder / "config.json").write_text(json.dumps(CONFIG | change))
        with pytest.raises(EqknobsError, match=r"models\.st: cannot (read|load) .*/(config\.json|SpeechTokenizer\.pt)"):
            load(folder)


def test_weights_run_no_code(tiny: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny[0], tmp_path / "bad")
    torch.save(Path("anything"), folder / "SpeechTokenizer.pt")
    with pytest.raises(EqknobsError, match="only tensors are read"):
        load(folder)
