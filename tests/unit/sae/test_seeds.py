"""Every seed of one SAE in one job."""

from pathlib import Path

import numpy as np
import pytest

from eqknobs.pieces import Pieces
from eqknobs.sae import seeds, train_sae
from eqknobs.sae.seeds import FILES, train_seeds
from helpers.synthetic import write_cache

CFG = {"variant": "topk", "d_sae": 16, "k": 2, "aux_k": 0, "dead_epochs": 2, "lr": 1e-2, "batch_size": 64, "epochs": 2}
UTTERANCES = [("a-0", "a", "train", 300), ("b-0", "b", "val", 60), ("c-0", "c", "test", 60)]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache.h5", np.random.default_rng(0).standard_normal((420, 8)), UTTERANCES)
    return tmp_path / "cache.h5"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were really trained."""
    found = []

    def counted(cache, folder, cfg, seed, device):
        found.append(seed)
        train_sae(cache, folder, cfg, seed, device)

    monkeypatch.setattr(seeds, "train_sae", counted)
    return found


def test_a_seeds_bytes_are_those_of_it_alone(cache: Path, tmp_path: Path) -> None:
    train_seeds(cache, {seed: tmp_path / f"all/seed{seed}" for seed in (0, 1)}, CFG, "code", Pieces(tmp_path / "p"))
    train_seeds(cache, {1: tmp_path / "unkept"}, CFG, "code", Pieces(None))
    train_sae(cache, tmp_path / "alone", CFG, 1)
    assert contents(tmp_path / "all/seed1") == contents(tmp_path / "alone") == contents(tmp_path / "unkept")
    assert contents(tmp_path / "all/seed0") != contents(tmp_path / "alone")


def test_only_what_is_new_is_trained(cache: Path, tmp_path: Path, trained: list[int]) -> None:
    pieces = Pieces(tmp_path / "pieces")

    def run(*names: int, cfg: dict = CFG, code: str = "code", out: str = "run") -> dict[int, Path]:
        """As Snakemake, which deletes the outputs first; returns the folders."""
        folders = {seed: tmp_path / out / f"seed{seed}" for seed in names}
        for folder in folders.values():
            for file in folder.glob("*"):
                file.unlink()
        trained.clear()
        train_seeds(cache, folders, cfg, code, pieces)
        return folders

    first = contents(run(0)[0])
    assert trained == [0]
    both = run(1, 0)
    assert trained == [1] and contents(both[0]) == first
    assert all((both[0] / name).stat().st_nlink == 2 for name in FILES)  # no disk
    run(0, 1, cfg=CFG | {"lr": 1e-3})
    assert trained == [0, 1]
    run(0, code="other code")
    assert trained == [0]
    other = run(0, out="another run", code="other code")
    assert trained == [] and all((other[0] / name).stat().st_nlink == 1 for name in FILES)
    write_cache(cache, np.random.default_rng(1).standard_normal((420, 8)), UTTERANCES)
    run(0)
    assert trained == [0]


def test_a_broken_piece_is_made_anew(cache: Path, tmp_path: Path, trained: list[int]) -> None:
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:100]), Path.unlink):
        trained.clear()
        train_seeds(cache, {0: tmp_path / "a"}, CFG, "code", Pieces(tmp_path / "pieces"))
        (kept,) = (tmp_path / "pieces").rglob("sae.safetensors")
        damage(kept)
        train_seeds(cache, {0: tmp_path / "b"}, CFG, "code", Pieces(tmp_path / "pieces"))
        assert trained[-1] == 0 and (tmp_path / "b/sae.safetensors").stat().st_size > 1000
