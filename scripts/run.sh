#!/usr/bin/env bash
# Set up if need be, then run the experiment with the flags given: scripts/run.sh --dataset 10k --num-runs 10
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install "$root/requirements.txt"
exec "$root/.venv/bin/python" "$root/visual_ablation_experiment.py" "$@"
