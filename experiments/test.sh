#!/usr/bin/env bash
# The tests of experiment 6, two at a time. Arguments go to pytest: experiments/test.sh -k noise
set -euo pipefail
. "$(dirname "$0")/../scripts/environment.sh"
cd "$root"
venv=$root/experiments/.venv
echo "Runs the tests of experiment 6; the first call also sets up experiments/.venv."
install experiments/requirements-test.txt experiments/requirements.txt experiments/requirements-ray.txt
export OMP_NUM_THREADS=1   # two processes that share two cores
exec "$venv/bin/python" -m pytest -c experiments/pytest.ini -n 2 "$@"
