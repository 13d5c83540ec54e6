#!/usr/bin/env bash
# The tests of experiment 6, two at a time. Arguments go to pytest: experiments/test.sh -k noise. The test of
# --ray is skipped unless requirements-ray.txt is installed too. --set-up makes the environment and no more.
set -euo pipefail
. "$(dirname "$0")/../scripts/environment.sh"
cd "$root/experiments"
venv=$root/experiments/.venv
echo "Runs the tests of experiment 6; the first call also sets up experiments/.venv."
install requirements-test.txt requirements.txt
[ "${1:-}" = --set-up ] && exit
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1   # two processes that share two cores
# Two tests at a time to each: the long ones, which tests/conftest.py begins with, are shared out.
exec "$venv/bin/python" -m pytest -n 2 --maxschedchunk 2 "$@"
