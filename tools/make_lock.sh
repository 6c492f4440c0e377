#!/usr/bin/env bash
# Refresh requirements.txt from the packages named here: `bash tools/make_lock.sh`. Needs a Python 3.11 with venv.
# torch is exact; its GPU packages, which depend on the platform, are left to pip at installation.
set -euo pipefail
cd "$(dirname "$0")/.."
env=$(mktemp -d)
trap 'rm -rf "$env"' EXIT
python3 -m venv "$env"
"$env/bin/python" -m pip install -q torch==2.13.0 'transformers==5.23.*' 'snakemake==9.27.*' h5py pandas scikit-learn \
    librosa soundfile jsonschema tqdm matplotlib jinja2 jiwer faster-whisper onnxruntime resampy safetensors bitsandbytes==0.50.2 sentencepiece pyyaml setuptools \
    pytest pytest-xdist ruff snakefmt mypy types-PyYAML selenium
{
    echo "# The lock: every package at one version. Made by tools/make_lock.sh."
    "$env/bin/python" -m pip freeze --all --exclude pip | sed 's/+cpu$//' | grep -viE '^(nvidia|triton|cuda)'
} >requirements.txt
python3 tools/make_env.py
