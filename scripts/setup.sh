# Sourced by demo.sh and test.sh: makes .venv once, with hhbench and its development tools, and activates it.
# HHBENCH_PYTHON names another interpreter, 3.11 or later.
python_command="${HHBENCH_PYTHON:-python3}"
if ! "$python_command" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))'; then
  echo "hhbench needs Python 3.11 or later; set HHBENCH_PYTHON to one ($python_command is $("$python_command" -V))" >&2
  exit 1
fi
[ -x .venv/bin/python ] || "$python_command" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
if [ ! -f .venv/installed ] || [ pyproject.toml -nt .venv/installed ]; then
  echo "installing hhbench into .venv (a few minutes the first time)" >&2
  # A machine without a GPU may set PIP_EXTRA_INDEX_URL to torch's CPU wheels.
  python -m pip install --quiet --disable-pip-version-check torch torchvision
  python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
  touch .venv/installed
fi
