"""What Snakemake says and refuses before any work: the configuration as written, and models that cannot be had."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from helpers import ROOT
from helpers.workflow import copy_workflow, snakemake, write_config


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine that refuses everything as gated, and what it was asked for."""
    asked: list[str] = []

    class Gate(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def online(folder: Path, hub: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Snakemake with that hub as the hub, and an empty cache."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    env |= {
        "PYTHONPATH": str(folder / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "hf"),
    }
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_gated_model_is_met_before_the_speech_is_downloaded(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    hub, asked = server
    folder = copy_workflow(tmp_path / "work")
    data = f"data={{url: '{hub}/speech'}}"
    done = online(folder, hub, "--configfile", "config/personaplex.yaml", "--config", data, "hardware={device: cpu}")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "are gated" in line]
    assert done.returncode != 0 and len(lines) == 1
    assert lines[0].startswith(
        "models.personaplex: the weights of nvidia/personaplex-7b-v1 are gated: accept the licence"
    )
    assert "Traceback" not in done.stderr and not (folder / "work").exists()
    assert "/nvidia/personaplex-7b-v1/resolve/main/config.json" in asked
    assert not [path for path in asked if "speech" in path]


def test_local_models_ask_no_hub(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    hub, asked = server
    folder = copy_workflow(tmp_path / "work")
    data = f"data={{source: librispeech, subset: dev-clean, labels: null, url: '{hub}/speech', timeout_seconds: 5}}"
    done = online(folder, hub, "manifests", "--config", data)
    assert done.returncode != 0 and "the server answered 403" in done.stdout + done.stderr
    assert asked and all(path.startswith("/speech/") for path in asked)
    asked.clear()
    online(folder, hub, "manifests")
    assert (folder / "results/demo/manifest/manifest.csv").exists() and not asked


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  path: my/speech\nrun: {name: never}\ndata:\n  max_minutes: 5\n")
    done = snakemake(ROOT, "-n", "--nolock", "--configfile", str(path), check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"{path}: the key 'data' stands on line 1 and again on line 4" in done.stdout + done.stderr


def test_nested_config_reaches_the_jobs(tmp_path: Path) -> None:
    """Each job parses the configuration again, from what the main process hands on."""
    folder = copy_workflow(tmp_path / "work")
    write_config(folder)
    changes = ("run={seed: 3, name: mine}", "data={max_utterances: 12, labels: null}", "saes={rms_l1: null}")
    fixed = "steering={saes: [topk]}"
    done = snakemake(folder, "--cores", "1", "manifests", "--config", *changes, fixed, "sae_seeds=[0, 4]")
    assert len(pd.read_csv(folder / "results/mine/manifest/manifest.csv")) == 12
    assert "Run mine: folder resources/corpus (" in done.stdout + done.stderr
    planned = snakemake(folder, "--summary", "--config", *changes, fixed, "sae_seeds=[0, 4]").stdout
    assert "saes/tiny-mimi.encoder_transformer/topk/seed4/" in planned and "rms_l1" not in planned


@pytest.mark.parametrize("mode", ["--dag", "--rulegraph", "--summary"])
def test_the_line_on_the_run_stays_out_of_what_is_piped_on(mode: str) -> None:
    done = snakemake(ROOT, "--nolock", mode)
    line = "Run demo: folder resources/corpus (224 sound files), up to 240 clips and 20 min; "
    assert line not in done.stdout and done.stderr.count(line) == 1


def test_the_way_back_after_a_kill_is_what_readme_says(tmp_path: Path) -> None:
    folder = copy_workflow(tmp_path / "work")
    write_config(folder)
    env = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "manifests"]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        end = time.monotonic() + 60
        while not list((folder / ".snakemake/locks").glob("*")) and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    again = snakemake(folder, *command[3:], check=False)
    assert again.returncode != 0 and "--unlock" in again.stdout + again.stderr
    assert "    snakemake --unlock\n" in (ROOT / "README.md").read_text()
    snakemake(folder, "--unlock")
    snakemake(folder, *command[3:])
    assert (folder / "results/small/manifest/manifest.csv").exists()
