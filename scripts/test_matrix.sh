#!/usr/bin/env bash
# Runs the tests with the lowest and the newest supported versions of datasets, NumPy and PyArrow, each in an
# environment of its own (.venv-lowest, .venv-newest). Arguments go to pytest: scripts/test_matrix.sh -k reading
# LOWEST and NEWEST in the environment name other versions, of torch too. Style and types are left to scripts/test.sh.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
cd "$root"
LOWEST=${LOWEST:-datasets==4.0.0 numpy==2.1.3 pyarrow==21.0.0}
NEWEST=${NEWEST:-datasets numpy<3 pyarrow}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
failed=
for which in lowest newest; do
    venv=$root/.venv-$which
    versions=$LOWEST
    [ $which = lowest ] || versions=$NEWEST
    mkdir -p "$venv"
    # The versions of the project's own files give way to those of the matrix.
    named=$(sed -E 's/[<>=!]+[^ ]*//g; s/ /|/g' <<< "$versions")
    grep -hvE "^($named|ruff|mypy|types-)" requirements.txt tests/requirements.txt > "$venv/requirements.txt"
    tr ' ' '\n' <<< "$versions" >> "$venv/requirements.txt"
    install "$venv/requirements.txt"
    echo "== $which: $("$venv/bin/python" -m pip list --format freeze | grep -E '^(datasets|numpy|pyarrow|torch)=' | tr '\n' ' ')"
    if ! "$venv/bin/python" -m pytest -n 2 --dist loadfile -m "not slow" --deselect tests/test_docs.py "$@"; then
        failed="$failed $which"
    fi
done
[ -z "$failed" ] || { echo "failed with versions:$failed" >&2; exit 1; }
