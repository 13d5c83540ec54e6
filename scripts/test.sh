#!/usr/bin/env bash
# The checks of a change: style, types, tests. Other arguments than --all go to pytest: scripts/test.sh -k training
set -euo pipefail
. "$(dirname "$0")/environment.sh"
cd "$root"
selection=(-m "not slow")
which="all tests but the slowest (--all runs them too)"
if [ "${1:-}" = --all ]; then
    selection=()
    which="all tests"
    shift
fi
echo "Checks style (ruff), then types (mypy), then runs $which, two test files at a time."
echo "Usually 4 minutes on two idle cores; the first call also sets up .venv, in 2 minutes."
install tests/requirements.txt requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes share two cores: more threads would only wait for each other.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -n 2 --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
