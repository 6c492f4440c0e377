"""Digests: by content, remembered by size, times and inode."""

import json
import os
import time
from pathlib import Path

import pytest

from eqknobs import provenance
from eqknobs.models import KINDS
from eqknobs.provenance import Digests, content, corpus_files, module_inputs


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may be remembered at once."""
    monkeypatch.setattr(provenance, "SETTLED_SECONDS", -10.0)


def keep_time(path: Path, text: str) -> None:
    """Write a file as `cp -p` or `rsync -a` do: with a time stamp of its own choice."""
    stat = path.stat()
    path.write_text(text)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_code_counts_by_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    before = content(file)
    file.write_text("# why\nx  =  1\n\n\n")
    assert content(file) == before
    file.write_text("x = 2\n")
    assert content(file) != before
    file.write_text("x = = 1  # no Python\n")
    assert content(file) != before


def test_tables_count_by_their_cells(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("id,text\n001,a b\n")
    before = content(file)
    for same in ("id,text\r\n001,a b\r\n", "\ufeffid, text\n\n001,'a b'\n".replace("'", '"')):
        file.write_text(same)
        assert content(file) == before, same
    for other in ("id,text\n1,a b\n", "id,text\n001,a\n", "id,text\n001,a b\n002,\n"):
        file.write_text(other)
        assert content(file) != before, other


def test_content_decides_and_not_the_time(tmp_path: Path, settled: None) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("abcd")
    before = Digests(tmp_path / "store").of([file])
    file.touch()
    assert Digests(tmp_path / "store").of([file]) == before
    keep_time(file, "abce")  # same size, same time stamp
    assert Digests(tmp_path / "store").of([file]) != before
    keep_time(file, "abcd")
    assert Digests(tmp_path / "store").of([file]) == before


def test_names_and_missing_files_count_and_order_does_not(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "store")
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    one = digests.of([a, b])
    b.write_text("1")
    both = digests.of([a, b])
    assert len({digests.of([a]), digests.of([b]), one, both}) == 4
    assert digests.of([b, a, a]) == both


def test_unchanged_files_are_not_read_again(tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file, store = tmp_path / "a", tmp_path / "store"
    file.write_text("1")
    first = Digests(store).of([file])
    read = []
    monkeypatch.setattr(provenance, "content", lambda path: read.append(path) or "x")
    assert Digests(store).of([file]) == first and not read
    monkeypatch.setenv("EQKNOBS_REHASH", "1")
    Digests(store).of([file])
    assert len(read) == 1
    monkeypatch.delenv("EQKNOBS_REHASH")
    for broken in ("", "{", json.dumps({"version": 0}), "[]"):
        store.write_text(broken)
        Digests(store).of([file])
    assert len(read) == 5


def test_a_file_just_written_is_read_each_time(tmp_path: Path) -> None:
    """Its time stamp may be too coarse to tell a second write from the first."""
    file, store = tmp_path / "a", tmp_path / "store"
    file.write_text("1")
    Digests(store).of([file])
    assert not store.exists()
    os.utime(file, (time.time() - 60,) * 2)  # its inode still says when that was done
    Digests(store).of([file])
    assert not store.exists()


def test_two_stores_add_up(tmp_path: Path, settled: None) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(file.name)
    one, other = Digests(tmp_path / "store"), Digests(tmp_path / "store")
    one.of([])
    other.of([files[0]])
    one.of([files[1]])
    assert set(json.loads((tmp_path / "store").read_text())["files"]) == set(map(str, files))


def test_lost_sounds_change_the_mark_once(tmp_path: Path) -> None:
    store, index = tmp_path / "store", tmp_path / "renders/index.csv"
    assert Digests(store).of_sounds(index) == ""
    index.parent.mkdir()
    index.write_text("id,file\na,x/a.flac\nb,\n")
    sound = index.parent / "x/a.flac"
    sound.parent.mkdir()
    sound.touch()
    assert Digests(store).of_sounds(index) == ""
    sound.rename(tmp_path / "away")
    assert Digests(store).of_sounds(index, keep=False)
    (tmp_path / "away").rename(sound)
    assert Digests(store).of_sounds(index) == ""  # a dry run is forgotten
    sound.unlink()
    lost = Digests(store).of_sounds(index)
    assert lost and Digests(store).of_sounds(index) == lost
    index.unlink()  # Snakemake, before the sounds are made again
    assert Digests(store).of_sounds(index) == lost
    index.write_text("id,file\na,x/a.flac\n")
    os.utime(index, (1, 1))
    sound.touch()
    assert Digests(store).of_sounds(index) == lost  # whole again: nothing to do any more
    sound.unlink()
    assert Digests(store).of_sounds(index) not in ("", lost)


def test_lost_speech_of_a_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "run/corpus/manifest.csv"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("id,path\na,run/corpus/a.flac\n")
    sound = manifest.parent / "a.flac"
    sound.touch()
    assert Digests(tmp_path / "store").of_sounds(manifest) == ""
    sound.unlink()
    assert Digests(tmp_path / "store").of_sounds(manifest)


def test_lost_sounds_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text('<a href="#a">x</a><a href="audio/a%20b&amp;c.flac">a</a><a href="https://x.org/audio/y">b</a>')
    assert Digests(tmp_path / "store").of_sounds(page)
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio/a b&c.flac").touch()
    assert Digests(tmp_path / "other").of_sounds(page) == ""
    (tmp_path / "codec.html").write_text('<a href="index.html">x</a><a href="audio/of%20codec.flac">a</a>')
    assert Digests(tmp_path / "third").of_sounds(page)
    (tmp_path / "audio/of codec.flac").touch()
    assert Digests(tmp_path / "fourth").of_sounds(page) == ""
    page.write_text('<a href="codec.html">x</a><a href="probes.html#a">x</a><a href="saes.html">x</a>')
    assert Digests(tmp_path / "fifth").of_sounds(page)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert Digests(tmp_path / "store").of([tmp_path / "pipe.wav"])


def test_docstrings_are_no_content(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('"""One."""\ndef f():\n    """Two."""\n    return "three"\n')
    before = content(file)
    file.write_text('"""1."""\ndef f():\n    """2.\n    """\n    return "three"\n')
    assert content(file) == before
    file.write_text('"""One."""\ndef f():\n    """Two."""\n    return "four"\n')
    assert content(file) != before


def test_what_a_corpus_is_drawn_from(tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    for name in ("1/a.flac", "1/b.WAV", "1/c.trans.txt", "1/notes.txt", "1/d.m4a", "1/e.csv", "1/.f.swp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    names = {Path(file).name for file in corpus_files(folder)}
    assert names == {"a.flac", "b.WAV", "c.trans.txt", "d.m4a", "SPEAKERS.TXT"}


def test_speech_behind_a_link_belongs_to_the_corpus(tmp_path):
    for name in ("corpus/a/1.wav", "elsewhere/2.flac"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("sound")
    (tmp_path / "corpus" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "round").symlink_to(tmp_path / "corpus")
    names = [str(Path(file).relative_to(tmp_path)) for file in corpus_files(tmp_path / "corpus")]
    assert names == ["corpus/a/1.wav", "corpus/b/2.flac", "SPEAKERS.TXT"]


def test_the_code_of_a_stage_is_what_its_imports_run() -> None:
    """Packages on the way count, models of a kind do not: they are inputs where a model is loaded."""

    def names(files: list[str]) -> set[str]:
        return {str(Path(file).resolve().relative_to(provenance.PACKAGE)) for file in files}

    base = names(module_inputs("eqknobs.sae.base"))
    assert {"sae/base.py", "sae/__init__.py", "sae/topk.py", "__init__.py"} <= base
    kinds = {module.split(":")[0] for module in KINDS.values()}
    assert all(module_inputs(kind) for kind in kinds)
    for name in ("corpus.activations", "corpus.labels", "sound.judges", "sae", "stages.probes.compute"):
        found = names(module_inputs(f"eqknobs.{name}"))
        shared = {"models/__init__.py", "models/packaged.py"}  # where packages hold weights
        assert not {file for file in found if file.startswith("models/")} - shared, name
    assert "models/moshi/network.py" not in names(module_inputs("eqknobs.models.mimi"))
    assert {"models/mimi.py", "models/moshi/network.py"} <= names(module_inputs("eqknobs.models.moshi.adapter"))
