#!/usr/bin/env bash
# On a machine with a GPU, about half an hour, into docs/results/gpu: checks of what sums linear attentions there and
# their times (<card>.json), then `hhbench profile` of every attention, from 512 to 65,536 tokens in bfloat16, and its
# plots, for which there must be matplotlib.
# Use an environment that has hhbench and torch with CUDA: bash scripts/gpu.sh [arguments of gpu_checks.py]
set -euo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
failed=0
python scripts/gpu_checks.py "$@" || failed=$?
[ "$failed" -ne 2 ] || exit 2 # no GPU, or arguments that it doesn't know
plots=()
if python -c "import matplotlib" 2> /dev/null; then plots=(--plots docs/results/gpu/plots); fi
python -m hhbench profile --attn all --lengths 512:65536 --dtype bfloat16 --device cuda --budget 1200 \
  --out docs/results/gpu ${plots[@]+"${plots[@]}"} || failed=$?
exit "$failed"
