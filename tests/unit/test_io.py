"""Atomic files: a full disk is one clear line, whichever library writes."""

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from eqknobs.errors import EqknobsError
from eqknobs.io import (
    atomic_path,
    read_csv,
    read_text_csv,
    remove_leftovers,
    require_free_disk,
    require_renders,
    unused_name,
    write_csv,
    writer_lock,
)
from helpers import ROOT


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


HOLD = "import sys, time, eqknobs.io\nfrom eqknobs.io import writer_lock\nwith writer_lock(sys.argv[1]):\n"


def process(code: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD + code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_second_writer_is_told_the_first_and_waits_also_for_one_that_is_killed(tmp_path, capsys):
    path = tmp_path / "new folder" / "x.h5"
    owner = process("    print('held', flush=True); time.sleep(60)", path)
    assert owner.stdout.readline() == "held\n"
    named = rf"x\.h5: being written by process {owner.pid} on {socket.gethostname()}, since 20.*; wait for it or end it"
    with pytest.raises(EqknobsError, match=named), writer_lock(path, wait_seconds=0):
        raise AssertionError("two writers")
    waiting = process("    print('mine', flush=True)", path, stderr=subprocess.PIPE)
    assert f"by process {owner.pid} on" in waiting.stderr.readline()
    owner.send_signal(signal.SIGKILL)
    assert waiting.communicate(timeout=20) == ("mine\n", "") and waiting.returncode == 0
    owner.communicate()
    assert not list(path.parent.iterdir()) and capsys.readouterr().err == ""


def test_the_lock_file_a_killed_process_left_stops_nobody(tmp_path):
    owner = process("    print('held', flush=True); time.sleep(60)", tmp_path / "x")
    owner.stdout.readline()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]
    with writer_lock(tmp_path / "x", wait_seconds=0):
        assert f"process {os.getpid()} on" in (tmp_path / ".x.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_no_two_of_many_writers_at_once(tmp_path):
    count = tmp_path / "count"
    count.write_text("0")
    often = """    eqknobs.io.LOCK_POLL_SECONDS = .001
for _ in range(20):
    with writer_lock(sys.argv[1]):
        number = int(open(sys.argv[1]).read())
        time.sleep(.02)
        open(sys.argv[1], 'w').write(str(number + 1))
"""
    writers = [process(often, count, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert count.read_text() == "60" and [p.name for p in tmp_path.iterdir()] == ["count"]


def test_where_there_are_no_locks_the_work_goes_on_with_a_word(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with writer_lock(tmp_path / "x"):
        (tmp_path / "x").write_text("whole")
    assert "knows no locks" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_lock_goes_with_the_block_and_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="mine"), writer_lock(tmp_path / "x"):
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with (
        pytest.raises(EqknobsError, match=r"\.x\.lock: cannot be written \(.+\)"),
        writer_lock(tmp_path / "file" / "x"),
    ):
        pass


def test_other_names_are_other_files():
    ids = ["C minor", "C# minor", "C? minor", "C-minor", "c-minor", "Ç", "a" * 250, "a" * 249 + "b", ".", "", "x/../y"]
    taken: set[str] = set()
    names = [unused_name(f"{name}.flac", taken) for name in ids]
    assert len({name.casefold() for name in names}) == len(ids)
    assert names[3] == "C-minor.flac" and names[5] == "Ç.flac" and names[1] != "C-minor.flac"
    assert all(re.fullmatch(r"[\w.+-]+", name) and len(name.encode()) < 230 for name in names)
    assert [unused_name(f"{name}.flac", again) for again in [set()] for name in ids] == names
    plain = "tiny-mimi.encoder_transformer__steering__centroid.sae_probe-topk.alpha2__101-1101-0000.flac"
    assert unused_name(plain, set()) == plain


def test_leftovers_of_one_path_go_and_no_others(tmp_path):
    (tmp_path / ".out.12345678.tmp").mkdir()
    (tmp_path / ".out.12345678.tmp" / "half").write_text("x")
    (tmp_path / ".a[b].csv.12345678.tmp.csv").write_text("x")
    (tmp_path / ".outer.12345678.tmp").mkdir()
    (tmp_path / "out").mkdir()
    remove_leftovers(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a[b].csv.12345678.tmp.csv", ".outer.12345678.tmp", "out"]
    with writer_lock(tmp_path / "a[b].csv"):  # whoever may write it may also tidy up
        assert not (tmp_path / ".a[b].csv.12345678.tmp.csv").exists()


def test_missing_renders_are_called_renders(tmp_path):
    (tmp_path / "a.flac").write_text("x")
    require_renders(tmp_path / "index.csv", ["a.flac"])
    with pytest.raises(
        EqknobsError, match=r"b.flac: no such render \(2 files gone of those .*; run again, and its stage"
    ):
        require_renders(tmp_path / "index.csv", ["c.flac", "a.flac", "b.flac", "b.flac"])


# --- tables ---


ODD = [
    "NA",
    "null",
    "nan",
    "None",
    "n/a",
    "N/A",
    "NULL",
    "#N/A",
    "-inf",
    "0019",
    "1e5",
    "True",
    ' "x", y ',
    "a\rb",
    "c\nd",
]


def test_text_of_any_kind_comes_back_as_it_was(tmp_path):
    names = ["id", "path", "speaker", "sae", "arm", "map", "condition", "text", "accent", "space"]
    table = pd.DataFrame({name: ODD for name in names} | {"alpha": np.arange(len(ODD)) / 3})
    write_csv(tmp_path / "a.csv", table)
    found = read_csv(tmp_path / "a.csv")
    assert all(found[name].tolist() == ODD for name in names)
    assert found["alpha"].tolist() == pytest.approx(table["alpha"].tolist(), rel=1e-8)


def test_an_empty_cell_is_missing_except_in_what_is_said(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,sae,text,transcript,alpha,alpha_raw,judged,seed,wer\na,,,,,1,True,3,\nb,,,,nan,,False,4,0.5\n")
    found = read_csv(path)
    assert (
        found["sae"].isna().all()
        and found["alpha"].isna().all()
        and found["alpha_raw"].isna().tolist() == [False, True]
    )
    assert found["text"].tolist() == found["transcript"].tolist() == ["", ""]
    assert found["judged"].tolist() == [True, False] and found["judged"].dtype == bool
    assert found["seed"].dtype == np.int64 and found["wer"].dtype == np.float64
    copy = tmp_path / "copy.csv"
    write_csv(copy, found)
    assert copy.read_text() == path.read_text().replace("nan", "").replace(",1,", ",1,")


def test_a_table_where_nothing_is_odd_keeps_its_bytes(tmp_path):
    table = pd.DataFrame({"id": ["a", "b, c"], "text": ['say "x"', ""], "seconds": [1 / 3, 2.0], "seed": [1, 2]})
    write_csv(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_bytes() == b'id,text,seconds,seed\na,"say ""x""",0.333333333,1\n"b, c",,2,2\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such table"),
        ("", "not a readable table"),
        ("id,alpha\na,1\nb,two\n", "column alpha holds text where numbers belong"),
        ("id,alpha\na,1,2,3\nb,1\nc,1,2,3,4,5\n", r"not a readable table|holds text"),
        ("id,text\na,caf\udce9\n", "not a readable table"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(EqknobsError, match=message) as error:
        read_csv(tmp_path / "a.csv")
    assert "a.csv" in str(error.value) and "\n" not in str(error.value)


def test_the_word_unmeasurable_stands_among_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("id,wer\na,0.5\nb,unmeasurable\nc,\n")
    assert read_csv(tmp_path / "a.csv")["wer"].isna().tolist() == [False, False, True]


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    write_csv(tmp_path / "a.csv", pd.DataFrame({"path": ["caf\udce9.wav"]}))
    assert (tmp_path / "a.csv").read_bytes() == b"path\ncaf\\udce9.wav\n"


def test_a_table_of_others_is_text_throughout(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid, Sex ,text\r\n001, NA, "one, two"\r\nnull,1.0\r\n')
    found = read_text_csv(path)
    assert found.columns.tolist() == ["id", "Sex ", "text"]
    assert found.to_numpy().tolist() == [["001", "NA", "one, two"], ["null", "1.0", ""]]


def test_every_csv_of_the_package_goes_through_the_one_reader():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "workflow").rglob("*.py")]
    assert [path.name for path in files if "pd.read_csv" in path.read_text()] == ["io.py"]


@pytest.mark.parametrize(
    ("needed", "free", "words"),
    [
        (400, 100, "400 bytes needed, 100 bytes free; free some space or lower data.max_minutes"),
        (2_500_000, 1_234_567, "2.5 MB needed, 1.23 MB free"),
        (3_000_000_000, 4_000, "3 GB needed, 4 kB free"),
        (10**15, 10**12, "1 PB needed, 1 TB free"),
    ],
)
def test_disk_sizes_are_told_in_units_that_show_them(tmp_path, monkeypatch, needed, free, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())
    with pytest.raises(EqknobsError, match=words):
        require_free_disk(tmp_path / "not" / "there", needed)
    with pytest.raises(EqknobsError, match=r"free; buy a disk$"):
        require_free_disk(tmp_path, needed, "buy a disk")
