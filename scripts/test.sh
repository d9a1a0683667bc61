#!/usr/bin/env bash
# Sets hhbench up in .venv and passes its tests: bash scripts/test.sh [pytest arguments]
# The default leaves out what takes minutes; run that with: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ruff check .
ruff format --check .
mypy
# One thread for each worker: more only wait for each other.
export OMP_NUM_THREADS=1
if [ "$#" -eq 0 ]; then set -- -m "not slow" -n auto; fi
python -m pytest "$@"
