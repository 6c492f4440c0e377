#!/usr/bin/env bash
# What only a GPU can tell, in one command of ten minutes and without a network: tools/gpu_check.py, docs/gpu.md.
#   bash tools/gpu_check.sh --pack     # here, with a network: the wheels that travel, into .gpu-wheels
#   bash tools/gpu_check.sh [--parts …] [--work FOLDER] [--out FILE]     # there
#   bash tools/gpu_check.sh --cpu --out x.csv     # rehearse it
# PYTHON names the interpreter that has torch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=.gpu-wheels
if [ "${1:-}" = --pack ]; then
    exec "$python" tools/gpu_wheels.py "$wheels" "${@:2}"
fi
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
timeout 590 "$python" tools/gpu_check.py "$@"
