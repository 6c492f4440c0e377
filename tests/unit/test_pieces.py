"""The store of pieces: made once, never wrong, prunable."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from eqknobs.cli import main
from eqknobs.io import array_hash
from eqknobs.pieces import Pieces, prune


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_piece_is_made_once_and_stays_what_it_was(tmp_path: Path) -> None:
    made = []

    def make() -> list:
        made.append(1)
        return [0.1, 1 / 3, "ü", None]

    for _ in range(3):
        assert Pieces(tmp_path).json("kind", ["hash", 1], make) == [0.1, 1 / 3, "ü", None]
    assert len(made) == 1
    Pieces(tmp_path).json("kind", ["hash", 2], make)
    Pieces(tmp_path).json("other", ["hash", 1], make)
    assert len(made) == 3 and len(files(tmp_path)) == 3
    Pieces(None).json("kind", ["hash", 1], make)
    assert len(made) == 4


def test_a_piece_of_arrays_keeps_types_and_bytes(tmp_path: Path) -> None:
    made = {"a:b": np.array([0.1, np.nan], np.float32), "names": np.array(["x", "ü"]), "lag": np.array(-1)}
    assert Pieces(tmp_path).arrays("kind", 1, lambda: made) is made
    kept = Pieces(tmp_path).arrays("kind", 1, dict)
    assert list(kept) == list(made)
    assert all(kept[key].tobytes() == made[key].tobytes() and kept[key].dtype == made[key].dtype for key in made)
    (file,) = files(tmp_path)
    for broken in (b"", file.read_bytes()[:100], b"PK"):
        file.write_bytes(broken)
        assert Pieces(tmp_path).arrays("kind", 1, lambda: made) is made
    assert array_hash(made["a:b"]) != array_hash(made["a:b"].astype(float)) != array_hash(made["a:b"][:1])


@pytest.mark.parametrize("broken", ["", '{"a', "\x00"])
def test_a_broken_piece_is_made_anew(tmp_path: Path, broken: str) -> None:
    assert Pieces(tmp_path).json("kind", 1, lambda: "a") == "a"
    (file,) = files(tmp_path)
    file.write_text(broken)
    assert Pieces(tmp_path).json("kind", 1, lambda: "b") == "b"
    assert Pieces(tmp_path).json("kind", 1, lambda: "c") == "b"


def test_a_piece_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pieces(tmp_path).json("kind", 1, fail)
    assert not files(tmp_path)


def test_what_cannot_be_kept_is_still_made(tmp_path: Path) -> None:
    (tmp_path / "kind").write_text("a file where a folder should be")
    assert Pieces(tmp_path).json("kind", 1, lambda: "a") == "a"


def test_pruning_leaves_what_was_used_lately(tmp_path: Path) -> None:
    store = Pieces(tmp_path)
    for made_of in (1, 2):
        store.json("kind", made_of, lambda: "a")
    for file in files(tmp_path):
        os.utime(file, (time.time() - 40 * 86400,) * 2)
    store.json("kind", 2, lambda: "never")
    count, size = prune(tmp_path, 30)
    assert (count, len(files(tmp_path))) == (1, 1) and size > 0
    assert store.json("kind", 2, lambda: "lost") == "a"
    assert prune(tmp_path, 0)[0] == 1 and not tmp_path.exists()
    assert prune(tmp_path, 0) == (0, 0)


def test_a_pack_holds_many_pieces_in_one_file(tmp_path: Path) -> None:
    store = Pieces(tmp_path).within(["model"])
    with store.pack("kind", "clip") as pack:
        pack["a"] = 1
        with store.pack("kind", "clip") as other:  # another process
            other["b"] = 2
    with pytest.raises(KeyError), store.pack("kind", "clip") as pack:
        assert pack == {"a": 1, "b": 2}
        pack["c"] = 3
        raise KeyError
    (file,) = files(tmp_path)
    with store.pack("kind", "clip") as pack:
        assert pack == {"a": 1, "b": 2, "c": 3}
    with Pieces(tmp_path).within(["other"]).pack("kind", "clip") as pack, Pieces(None).pack("kind", "clip") as nowhere:
        assert pack == {} == nowhere
    for broken in ("[1]", "{"):
        file.write_text(broken)
        with store.pack("kind", "clip") as pack:
            assert pack == {}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    Pieces().json("kind", 1, lambda: "a")
    main(["clean"])
    assert "removed 0 pieces" in capsys.readouterr().out and len(files(tmp_path)) == 1
    main(["clean", "--days", "0"])
    assert "removed 1 piece " in capsys.readouterr().out and not files(tmp_path)
    with pytest.raises(SystemExit, match="--days: must be 0 or more"):
        main(["clean", "--days", "-1"])
