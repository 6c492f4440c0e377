"""Atomic files: a full disk is one clear line, whichever library writes."""

import errno
import shutil

import pytest
import torch
from safetensors.torch import save_file

from eqknobs.errors import EqknobsError
from eqknobs.io import atomic_path


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "another library's"],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, error):
    (tmp_path / "x.bin").write_text("old")
    with (
        pytest.raises(EqknobsError, match=r"disk full while writing .*x\.bin"),
        atomic_path(tmp_path / "x.bin") as path,
    ):
        path.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    assert (tmp_path / "x.bin").read_text() == "old"


@pytest.mark.parametrize("writer", [torch.save, save_file], ids=["torch", "safetensors"])
def test_libraries_that_hide_the_reason_are_seen_through(tmp_path, monkeypatch, writer):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(EqknobsError, match="disk full"):
        patch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
        with atomic_path(tmp_path / "a" / "x.bin") as path:
            writer({"a": torch.zeros(3)}, path / "no such folder" / "x")
    assert not list((tmp_path / "a").iterdir())


def test_other_errors_keep_their_own_message(tmp_path):
    with pytest.raises(ValueError, match="mine"), atomic_path(tmp_path / "x") as path:
        path.write_text("half")
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())
