#!/usr/bin/env bash
# Set up if need be, then lint and run every test; arguments go to pytest: scripts/test.sh -k training
set -euo pipefail
. "$(dirname "$0")/environment.sh"
cd "$root"
install tests/requirements.txt requirements.txt
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
