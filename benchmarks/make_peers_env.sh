#!/usr/bin/env bash
# Build .venv-peers, the environment of benchmarks/sae_training.py and tools/make_sae_fixtures.py: this package beside
# the libraries it is measured against. `bash benchmarks/make_peers_env.sh`; PYTHON names the interpreter.
# An environment of its own because the peers pull in a hundred packages (language models, dashboards) of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -m venv .venv-peers
bin=.venv-peers/bin
# torch as in requirements.txt: two versions of its kernels cannot be compared.
"$bin/python" -m pip install --progress-bar off -q torch==2.13.0 \
    sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3 \
    'transformers==5.23.*' 'transformer-lens==3.9.*' \
    numpy pandas scipy scikit-learn h5py safetensors tqdm soundfile soxr
# Only nnsight (for dictionary-learning) asks for torchvision, nobody here uses it, and where transformers finds one that
# was built for another torch (the registry's is for GPUs), no peer can be imported.
"$bin/python" -m pip uninstall -q -y torchvision
"$bin/python" -m pip install --progress-bar off -q --no-deps --no-build-isolation -e .
"$bin/python" - <<'EOF'
from importlib import import_module
from importlib.metadata import version

failed = []
modules = {"eqknobs": "eqknobs.sae", "sae-lens": "sae_lens", "dictionary-learning": "dictionary_learning"}
for name, module in (modules | {"eai-sparsify": "sparsify"}).items():
    try:
        import_module(module)
        print(f"{name} {version(name)}: imported")
    except Exception as error:
        failed.append(name)
        print(f"{name} {version(name)}: cannot be imported: {error!r}")
raise SystemExit(f"not usable here: {', '.join(failed)}" if failed else 0)
EOF
