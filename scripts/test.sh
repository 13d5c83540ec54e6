#!/usr/bin/env bash
# Set up if need be, then lint and run every test, two at a time; arguments go to pytest: scripts/test.sh -k training
set -euo pipefail
. "$(dirname "$0")/environment.sh"
cd "$root"
install tests/requirements.txt requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_WAIT_POLICY=PASSIVE   # idle threads of one process do not take the cores from the other
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
