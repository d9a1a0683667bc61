#!/usr/bin/env bash
# Sets hhbench up in .venv and runs the main job: bash scripts/demo.sh [attention ...]
# Trains a teacher on real sentences, converts it to Hedgehog, and prints the leaderboard.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
for attention in "${@:-hedgehog}"; do
  python -m hhbench run --task glue --attn "$attention"
done
python -m hhbench leaderboard
