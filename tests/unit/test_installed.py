"""The package from its wheel, away from the checkout: every subcommand works with what the wheel holds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import yaml

from eqknobs.config import DEFAULT
from helpers import ROOT
from helpers.features_world import TARGET, make_paged
from helpers.moshi_world import write_codec, write_kyutai
from helpers.saes import write_sae

OURS = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src", "config", "workflow"]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", *map(str, arguments), "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which `pip install` put the package, and nothing else of the repository."""
    base = tmp_path_factory.mktemp("installed")
    (base / "checkout").mkdir()
    for source in (ROOT / name for name in OURS):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, base / "checkout" / source.name, ignore=ignored)
        else:
            shutil.copy(source, base / "checkout")
    pip("wheel", base / "checkout", "--no-build-isolation", "-w", base / "wheels")
    pip("install", *(base / "wheels").glob("*.whl"), "--target", base / "site")
    shutil.rmtree(base / "checkout")
    return base / "site"


def eqknobs(site: Path, folder: Path, *arguments: str) -> str:
    """What the installed command prints, run in `folder`."""
    command = [sys.executable, str(site / "bin/eqknobs"), *arguments]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_defaults_are_a_copy_of_the_one_source_and_nothing_is_left_out(site):
    assert (site / "eqknobs" / DEFAULT.name).read_bytes() == DEFAULT.read_bytes()
    assert DEFAULT.is_relative_to(ROOT) and not (ROOT / "src/eqknobs" / DEFAULT.name).exists()
    ours, theirs = (
        {path.relative_to(folder) for path in (folder / "eqknobs").rglob("*") if path.is_file()}
        for folder in (ROOT / "src", site)
    )
    added = {Path("eqknobs") / DEFAULT.name}
    assert {path for path in theirs ^ (ours | added) if path.suffix != ".pyc"} == set()


def test_no_subcommand_is_left_out_below(site, tmp_path):
    commands = re.findall(r"^    ([a-z]\S*)", eqknobs(site, tmp_path, "--help"), re.M)
    known = "clean compress convert-whisper explore export-sae import-sae plan talk transcribe unpack vram"
    assert sorted(commands) == known.split()
    for command in ("plan", "transcribe"):  # which work on a checkout, or on a run of one
        assert f"usage: eqknobs {command}" in eqknobs(site, tmp_path, command, "--help")


def test_explore(site, tmp_path):
    paged = make_paged(tmp_path)
    sf.write(tmp_path / "mine.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    given = ["--run", str(paged.run), "--target", TARGET, "--sae", "topk", "--audio", "mine.wav", "--device", "cpu"]
    assert eqknobs(site, tmp_path, "explore", *given) == "wrote explored/index.html\n"
    assert 'class="moment"' in (tmp_path / "explored" / "index.html").read_text()


def test_clean(site, tmp_path):
    assert eqknobs(site, tmp_path, "clean").startswith("removed 0 pieces")


def test_vram(site, tmp_path):
    model = {"kind": "moshi", "path": "kyutai/moshiko-pytorch-bf16", "revision": None, "nf4": True}
    config = {"run": {"targets": ["m.residual.3"]}, "models": {"m": model}, "saes": None}
    config |= dict.fromkeys(
        [
            "steering",
            "importance",
            "speech_lm",
            "lm_layers",
            "lm_pruning",
            "lm_quantisation",
            "lm_recipe",
            "lm_steering",
        ]
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    said = eqknobs(site, tmp_path, "vram", "--config", "mine.yaml")
    assert "m (kyutai/moshiko-pytorch-bf16), " in said and said.endswith("fits hardware.vram_gb = 12\n")


def test_export_sae(site, tmp_path):
    write_sae(tmp_path / "sae", "topk")
    assert eqknobs(site, tmp_path, "export-sae", "sae", "out") == "wrote out\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_compress_and_unpack(site, tmp_path):
    write_codec(tmp_path / "codec")
    said = eqknobs(site, tmp_path, "compress", "--model", "codec", "--plan", "uniform:3", "--out", "packed")
    assert said.endswith("wrote packed\n") and (tmp_path / "packed/packed.safetensors").is_file()
    assert eqknobs(site, tmp_path, "unpack", "packed", "--out", "plain").endswith("wrote plain\n")


def test_talk(site, tmp_path):
    write_kyutai(tmp_path / "model")
    write_codec(tmp_path / "codec")
    sf.write(tmp_path / "question.wav", 0.1 * np.random.default_rng(0).standard_normal(12000), 24000)
    words = "talk --model model --codec codec --device cpu --audio question.wav --out answer.wav"
    said = eqknobs(site, tmp_path, *words.split())
    assert said.endswith("wrote answer.wav\n") and (tmp_path / "answer.wav").stat().st_size > 1000
