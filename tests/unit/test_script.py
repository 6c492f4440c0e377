"""How a job and the command end when they are stopped or refused: one line, nothing half-written."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eqknobs import cli
from eqknobs.errors import EqknobsError, counted, one_line_errors
from eqknobs.script import run

SRC = Path(__file__).resolve().parents[2] / "src"
SLEEPER = """
import sys, time
import eqknobs.script
print("importing", flush=True)
{before}
from eqknobs.io import atomic_path
from types import SimpleNamespace as N

def main(inputs, outputs, cfg):
    with atomic_path(outputs[0]) as path:
        path.mkdir()
        print("writing", flush=True)
        time.sleep(60)

job = N(threads=1, resources={{}}, log=["job.log"], input=[], output=["out"], params=N(cfg={{}}),
        config={{"hardware": {{"device": "cpu"}}}})
eqknobs.script.run(main, job)
"""


def job(folder: Path) -> SimpleNamespace:
    """Snakemake's job object, as far as a script sees it."""
    out = [str(folder / "out.txt")]
    return SimpleNamespace(
        threads=1,
        resources={},
        log=[folder / "logs/x.log"],
        input=[],
        output=out,
        params=SimpleNamespace(cfg={}),
        config={"hardware": {"device": "cpu"}},
    )


def stopped(folder: Path, sent: int, word: str, before: str = "") -> tuple[int, str]:
    """Exit status and stderr of a script to which a signal is sent when it says `word`."""
    (folder / "script.py").write_text(SLEEPER.format(before=before))
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell has what it runs in the background ignore Ctrl-C, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([sys.executable, "script.py"], cwd=folder, env=env, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        while (line := process.stdout.readline().strip()) != word:
            assert line, process.stderr.read()
        process.send_signal(sent)
        errors = process.communicate(timeout=30)[1]
    return process.returncode, errors


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_says_so_in_one_line_and_leaves_nothing(tmp_path, sent):
    assert stopped(tmp_path, sent, "writing") == (130, "interrupted\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.log", "script.py"]
    said = (tmp_path / "job.log").read_text()  # the signal may come before the newline reaches the log
    assert said.replace("\n", "") == "writinginterrupted"


def test_a_job_stopped_while_it_imports_is_one_line_too(tmp_path):
    code, errors = stopped(tmp_path, signal.SIGINT, "importing", "time.sleep(60)")
    assert code != 0 and errors == "interrupted\n"


def test_what_a_killed_job_left_is_gone_after_the_next(tmp_path):
    code, _ = stopped(tmp_path, signal.SIGKILL, "writing")
    assert code == -signal.SIGKILL and list(tmp_path.glob(".out.*.tmp"))
    (tmp_path / ".out.txt.tmp").mkdir()  # another's
    previous = Path.cwd()
    os.chdir(tmp_path)
    try:
        made = SimpleNamespace(**{**vars(job(tmp_path)), "log": ["job.log"], "output": ["out"]})
        run(lambda inputs, outputs, cfg: Path(outputs[0]).mkdir(), made)
    finally:
        os.chdir(previous)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.txt.tmp", "job.log", "out", "script.py"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/data/x"), "error: /data/x: Permission denied; check that it"),
        (OSError(30, "Read-only file system", "a\nb"), "error: a b: Read-only file system; check that it"),
        (FileExistsError(17, "File exists", "a", None, "b"), "error: a -> b: File exists; check that it"),
        (ConnectionResetError(104, "Connection reset by peer"), "error: Connection reset by peer"),
        (EqknobsError("two\nlines"), "error: two lines"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path, capfd, error, said):
    def main(inputs, outputs, cfg):
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main, job(tmp_path))
    shown, log = capfd.readouterr().err, (tmp_path / "logs/x.log").read_text()
    assert ended.value.code == 1 and shown.startswith(said) and shown.count("\n") == 1
    assert log.endswith(shown) and ("Traceback" in log) == isinstance(error, OSError)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match=r"error: .*logs"):
        run(lambda *_: None, job(tmp_path))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (PermissionError(13, "Permission denied", "x"), "error: x: Permission denied; check", ""),
    ],
)
def test_the_command_ends_in_one_line(monkeypatch, capsys, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_export_sae", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export-sae", "a", "b"])
    assert str(ended.value.code).startswith(str(code)) and capsys.readouterr().err == said


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_counts_in_words():
    assert [counted(n, "test speaker") for n in (0, 1, 2)] == ["0 test speakers", "1 test speaker", "2 test speakers"]


def test_a_job_that_caches_a_target_knows_its_siblings(tmp_path):
    """From the configuration, not from the slice: a target that is added reruns no other's job."""
    made = job(tmp_path)
    made.config["worked_on"] = ["m.layer.1", "m.layer.10", "mm.layer.0", "m.layer.0", "m.layer.5@music", "m"]
    made.wildcards, made.output = SimpleNamespace(target="m.layer.1"), ["results/r/activations/m.layer.1.h5"]
    seen = []
    for made.rule in ("activations", "labels"):
        run(lambda inputs, outputs, cfg: seen.append(cfg), made)
    folder = "results/r/activations"
    assert seen[0]["siblings"] == {"layer.10": f"{folder}/m.layer.10.h5", "layer.0": f"{folder}/m.layer.0.h5"}
    assert "siblings" not in seen[1] and made.params.cfg == {}


def test_a_shard_knows_which_it_is_and_leaves_a_mark(tmp_path):
    made, seen = job(tmp_path), []
    made.rule, made.config["worked_on"] = "activations_shard", ["m.layer.1", "m.layer.0"]
    made.wildcards = SimpleNamespace(target="m.layer.1", shard="0", shards="3")
    made.output = [str(tmp_path / "m.layer.1.h5.shard-0-of-3")]
    run(lambda inputs, outputs, cfg: seen.append({**cfg, "shard": cfg.pop("shard")}), made)
    assert seen[0]["shard"] == (0, 3) and seen[0]["siblings"] == {"layer.0": str(tmp_path / "m.layer.0.h5")}
    assert Path(made.output[0]).read_bytes() == b""
