#!/usr/bin/env bash
# On a machine with a GPU, within 10 minutes: the fused kernels' checks and timings, into docs/results/gpu/<card>.json.
# Use an environment that has hhbench and torch with CUDA: bash scripts/gpu.sh [arguments of gpu_checks.py]
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python scripts/gpu_checks.py "$@"
