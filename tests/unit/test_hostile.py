"""Inputs that somebody made to harm: each is refused in one line or made harmless, and nothing of it is done.

What a page does with text from files: `tests/unit/report/test_report.py::test_text_from_files_is_escaped`, and below.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eqknobs.config import merge, validate
from eqknobs.corpus import fetching
from eqknobs.errors import EqknobsError, one_line_errors
from eqknobs.io import read_csv, unused_name
from eqknobs.models import load_model
from eqknobs.models.moshi.generate import load_voice
from eqknobs.sae.audiosae_files import read_ae
from eqknobs.script import run
from eqknobs.strict_yaml import read_yaml
from helpers import ROOT

SMALL_LIMITS = {"LARGEST": 1 << 16, "TIMES": 2, "MOST": 50}


def archive(folder: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], kind: str = "tar.gz") -> Path:
    """An archive of files (name, content), or of members made by hand."""
    path = folder / f"in.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in members:
                packed.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as packed:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            packed.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def link(name: str, kind: bytes, target: str) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def unpacked(members: list[tuple[str, bytes | tarfile.TarInfo]], kind: str = "tar.gz") -> Callable[[Path], object]:
    return lambda folder: fetching.extract(archive(folder, members, kind), folder / "out" / "corpus")


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def pickled(read: Callable[[Path], object]) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        torch.save({"encoder.weight": Runs(folder / "ran"), "embeddings": Runs(folder / "ran")}, folder / "in.pt")
        return read(folder / "in.pt")

    return act


def scripted(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reading a TorchScript program where weights are due."""

    def act(folder: Path) -> object:
        torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "in.pt")
        return read(folder / "in.pt")

    return act


def voice(path: Path) -> object:
    return load_voice(path, SimpleNamespace(dim=4, streams=17))


def model_folder(kind: str, **config: object) -> Callable[[Path], object]:
    """A model's folder with pickled weights, with a program of its own that the config asks to be run."""

    def act(folder: Path) -> object:
        (folder / "in").mkdir()
        torch.save({"x": Runs(folder / "ran")}, folder / "in" / "pytorch_model.bin")
        (folder / "in" / "own.py").write_text(
            f"open({str(folder / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ..."
        )
        (folder / "in" / "config.json").write_text(json.dumps(config))
        return load_model({"name": "x", "kind": kind, "path": str(folder / "in"), "device": "cpu", "revision": None})

    return act


def yaml_of(text: str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        (folder / "in.yaml").write_text(text.format(ran=folder / "ran"))
        return read_yaml(folder / "in.yaml")

    return act


def config_of(**over: object) -> Callable[[Path], object]:
    return lambda folder: validate(merge(read_yaml(ROOT / "config/config.yaml"), over))


AUTO = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a member above the folder": (unpacked([("../../ran", b"x")]), "lies outside"),
    "a member above the folder, in between": (unpacked([("a/../../../ran", b"x")]), "lies outside"),
    "a member above the folder, Windows's way": (unpacked([("..\\..\\ran", b"x")]), "lies outside"),
    "an absolute member": (unpacked([("/tmp/eqknobs-ran", b"x")]), "lies outside"),
    "a zip's member above the folder": (unpacked([("../../ran", b"x")], "zip"), "lies outside"),
    "a member through a link": (unpacked([link("a", tarfile.SYMTYPE, "../.."), ("a/ran", b"x")]), "is a link"),
    "a hard link": (unpacked([link("a", tarfile.LNKTYPE, "/etc/passwd")]), "is a link"),
    "a device": (unpacked([link("a", tarfile.CHRTYPE, "")]), "is a link or device"),
    "a bomb in one file": (unpacked([("a.wav", bytes(1 << 20))]), "unpacks to more than 65536 bytes"),
    "a bomb in one file of a zip": (unpacked([("a.wav", bytes(1 << 20))], "zip"), "more than 65536 bytes"),
    "a bomb of many files": (unpacked([(f"{i}.wav", b"") for i in range(60)]), "more than 50 members"),
    "a bomb of many files in a zip": (unpacked([(f"{i}.wav", b"") for i in range(60)], "zip"), "50 members"),
    "a pickle as SAE": (pickled(read_ae), "not a file of plain weights"),
    "a pickle as voice": (pickled(voice), "not a voice of this model"),
    "a program as SAE": (scripted(read_ae), "not a file of plain weights"),
    "a program as voice": (scripted(voice), "not a voice of this model"),
    "a model of pickled weights": (model_folder("mimi", model_type="mimi"), "pickled weights"),
    "a model that brings its code": (model_folder("hubert", model_type="hubert", auto_map=AUTO), "pickled weights"),
    "a tag that makes an object": (yaml_of("a: !!python/object/apply:pathlib.Path.touch [{ran}]\n"), "cannot be read"),
    "a tag that names a function": (yaml_of("a: !!python/name:os.system ''\n"), "cannot be read"),
    "a run's name that climbs": (config_of(run={"name": "../x"}), "run.name"),
    "a run's name that is a path": (config_of(run={"name": "/tmp/eqknobs-ran"}), "run.name"),
    "a corpus's name that climbs": (config_of(corpora={"../x": {"source": "folder", "path": "."}}), "corpora"),
    "an SAE's name that climbs": (config_of(saes={"../x": {"variant": "topk"}}), "saes"),
    "a model's name that climbs": (config_of(models={"../x": {"kind": "mimi", "path": "x"}}), "models"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_harms_is_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in SMALL_LIMITS.items():
        monkeypatch.setattr(fetching, limit, value)
    act, said = CASES[name]
    (tmp_path / "out").mkdir()
    with pytest.raises(EqknobsError, match=said) as caught:
        act(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ran")) and not list(tmp_path.parent.glob("ran"))
    assert not Path("/tmp/eqknobs-ran").exists() and not list((tmp_path / "out").glob("[!.]*"))


def test_a_true_archive_passes_the_limits(tmp_path: Path) -> None:
    fetching.extract(archive(tmp_path, [(f"{i}.wav", bytes(1000)) for i in range(60)]), tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 60


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31mclip\x00\x08"


def test_a_terminal_is_not_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(inputs: object, outputs: object, cfg: object) -> None:
        print(f"bad {ESCAPES} name\n\ttab")
        raise EqknobsError(f"{ESCAPES}: no sound")

    job = SimpleNamespace(threads=1, resources={}, log=[tmp_path / "x.log"], input=[], output=[str(tmp_path / "o")])
    job.params, job.config = SimpleNamespace(cfg={}), {"hardware": {"device": "cpu"}}
    with pytest.raises(SystemExit):
        run(main, job)
    printed = capsys.readouterr()
    for said in (printed.out + printed.err, (tmp_path / "x.log").read_text()):
        assert "clip" in said and "name\n\ttab" in said and "error: " in said
        assert not set(said) & set("\x1b\x07\x00\x08\x9b")
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise EqknobsError(ESCAPES)
    assert ended.value.code == "error: 31mclip"


@pytest.mark.parametrize("name", ["../../ran.flac", "/tmp/eqknobs-ran.flac", "a/b.flac", "..", "\x1b[2J.flac", ".flac"])
def test_a_clips_id_names_a_file_of_its_folder(name: str, tmp_path: Path) -> None:
    file = tmp_path / unused_name(f"{name}.flac", set())
    assert file.parent == tmp_path and file.resolve().parent == tmp_path and file.name.isprintable()


def test_a_cell_of_a_table_is_text_and_no_formula(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,text\n=1+1,\"=cmd|' /C calc'!A0\"\n")
    assert read_csv(tmp_path / "x.csv")["text"][0] == "=cmd|' /C calc'!A0"
