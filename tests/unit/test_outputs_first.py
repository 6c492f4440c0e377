"""Where something cannot be written, that is said before the work, in one line."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from eqknobs.cli import main
from eqknobs.errors import EqknobsError
from eqknobs.io import require_output

ROOT = Path(__file__).parents[2]
RECORDED = re.compile(r'add_argument\("(?:--)?out".*')


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    return tmp_path


CASES = (  # the place, whether a folder is to be written there, what is said (None: nothing)
    ("new.csv", False, None),
    ("deep/below/new.csv", False, None),
    ("file", False, None),  # is replaced
    ("folder", False, "folder: is a folder; name another file"),
    ("file/new.csv", False, "its folder cannot be made"),
    ("new", True, None),
    ("folder", True, None),
    ("file", True, "file: is a file; name another folder"),
    ("file/below/new", True, "its folder cannot be made"),
    ("folder", None, None),
    ("file", None, None),
)


@pytest.mark.parametrize(("place", "folder", "said"), CASES)
def test_an_output_is_checked(places, place, folder, said):
    if said is None:
        assert require_output(places / place, folder) == places / place
    else:
        with pytest.raises(EqknobsError, match=re.escape(said)):
            require_output(places / place, folder)
    assert (places / "file").read_text() == "kept"
    assert sorted(os.listdir(places)) == ["file", "folder"] and not os.listdir(places / "folder")  # no trace


def test_a_folder_that_takes_no_file_is_told(places, monkeypatch):
    def refused(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("eqknobs.io.tempfile.TemporaryFile", refused)  # root may write whatever the permissions say
    with pytest.raises(EqknobsError, match=r"--out .*new.csv: cannot be written in .* \(Read-only file system\)"):
        require_output(places / "new.csv")


COMMANDS = (  # of `eqknobs`, with inputs that are not there: the output is looked at first
    ("export-sae", "absent", "{file}"),
    ("explore", "--run", "absent", "--target", "t.s", "--sae", "topk", "--audio", "absent.wav", "--out", "{file}"),
    ("talk", "--model", "absent", "--audio", "absent.wav", "--out", "{file}/below/answer.wav"),
    ("compress", "--model", "absent", "--plan", "uniform:4", "--out", "{file}/below/small"),
    ("unpack", str(ROOT / "resources/models/tiny-mimi"), "--out", "{file}"),
    ("import-sae", "--ae", "absent.pt", "--cache", "absent.h5", "--out", "{file}"),
    ("convert-whisper", "absent", "{file}"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_looks_at_its_output_first(places, command, monkeypatch):
    monkeypatch.chdir(places)
    with pytest.raises(SystemExit) as stop:
        main([word.format(file=places / "file") for word in command])
    assert str(places / "file") in str(stop.value) and "\n" not in str(stop.value)
    assert (places / "file").read_text() == "kept"


SCRIPTS = sorted(path for place in ("benchmarks", "tools") for path in (ROOT / place).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_tool_declares_its_output_as_one(script):
    for line in RECORDED.findall(script.read_text()):
        assert re.search(r"type=output_(file|folder)\b", line), f"{script}: {line}"
        assert not re.search(r"default=(HERE|ROOT|Path)\b", line), f"{script}: argparse converts no default but text"


RUN = {  # what is quickly imported, with its own arguments
    "benchmarks/sae_training.py": ["--out", "{folder}"],
    "benchmarks/moshi_speed.py": ["--out", "{folder}"],
    "tools/evaluate_codec.py": ["absent", "{folder}"],
    "tools/make_audiosae_fixture.py": ["--out", "{file}"],
}


@pytest.mark.parametrize("script", RUN)
def test_a_tool_ends_before_its_work(places, script, monkeypatch, capsys):
    given = [word.format(folder=places / "folder", file=places / "file") for word in RUN[script]]
    monkeypatch.setattr(sys, "argv", [script, *given])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    spec = importlib.util.spec_from_file_location(f"tool_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as stop:
        module.main(*([given] if script.endswith("sae_training.py") else []))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: argument {'--out' if '--out' in given else 'out'}: cannot write {given[-1]}: is a" in said
    assert os.listdir(places / "folder") == []
