#!/usr/bin/env bash
# Experiment 6: set up if need be, then run it with the flags given; without flags on the toy model, offline.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
venv=$root/experiments/.venv
install "$root/experiments/requirements.txt"
[ $# -gt 0 ] || set -- --model tiny
exec "$venv/bin/python" "$root/experiments/06_comprehensive_analysis_parallel.py" "$@"
