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
echo "Checks style (ruff), then types (mypy) beside $which, three test files at a time."
echo "About 5 minutes on two idle cores; the first call also sets up .venv, in 2 minutes."
install tests/requirements.txt requirements.txt
# Three processes share two cores, because some tests wait; more threads would only wait for each other.
# tests/conftest.py has the order of the files, in which the longest begin first.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
files_in_turn=(-n 3 --dist loadfile --no-loadscope-reorder)
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy takes 20 seconds of one core: it works beside the tests, and what it says comes after theirs.
types=$(mktemp)
.venv/bin/mypy > "$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2> /dev/null || true; rm -f "$types"' EXIT   # also if the tests are broken off
failed=0
.venv/bin/python -m pytest "${files_in_turn[@]}" ${selection[@]+"${selection[@]}"} "$@" || failed=$?
wait "$checking" || failed=$?
cat "$types"
exit "$failed"
