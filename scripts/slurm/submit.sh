#!/usr/bin/env bash
# Submit an experiment to SLURM as three jobs, each after the one before: an array that makes shares of the
# features, an array that trains shares of the cells, and a job that writes the results.
#
#     scripts/slurm/submit.sh --dataset 50k --num-runs 10 --output-dir results_50k
#
# All arguments are those of visual_ablation_experiment.py. The output folder and the cache must lie on a disk
# that all machines see. The same command again submits the same jobs; finished cells are kept. From the environment:
#
#     FEATURE_JOBS   jobs of the first array (default: 8)
#     CELL_JOBS      jobs of the second array (default: 8)
#     CPUS           cores of a job (default: 4)
#     GPUS           GPUs of a job (default: 0)
#     MEMORY         memory of a job, such as 32G (default: the partition's)
#     EXPERIMENT_PYTHON   a Python with the requirements (default: that of .venv, made by scripts/run.sh)
#
# and what sbatch reads itself: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT, SBATCH_CONSTRAINT.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${EXPERIMENT_PYTHON:-$root/.venv/bin/python}
if ! [ -x "$python" ]; then
    echo "error: $python is not there: make it by scripts/run.sh --help, or set EXPERIMENT_PYTHON" >&2
    exit 2
fi
for name in FEATURE_JOBS CELL_JOBS CPUS GPUS; do
    value=${!name:-1}
    if ! [[ $value =~ ^[0-9]{1,5}$ ]] || { [ "$name" != GPUS ] && [ "$value" -eq 0 ]; }; then
        echo "error: $name=$value is no number of ${name,,}" >&2
        exit 2
    fi
done
# Wrong flags end here, before a job waits in a queue; cells of other settings end the jobs that need them. This
# says what is finished, too.
"$python" "$root/visual_ablation_experiment.py" "$@" --status

# All jobs ask for the same machine: on a GPU the trainer is another than on a CPU, and so are the cells.
machine=(--cpus-per-task="${CPUS:-4}")
[ "${GPUS:-0}" -eq 0 ] || machine+=(--gres="gpu:$GPUS")
[ -z "${MEMORY:-}" ] || machine+=(--mem="$MEMORY")

submit() {  # submit OPTION... FILE ARGUMENT...: prints the number of the job
    local number
    number=$(sbatch --parsable "${machine[@]}" "$@")
    echo "${number%%;*}"  # a name of the cluster may follow
}

slurm=$root/scripts/slurm
feature_jobs=${FEATURE_JOBS:-8}
cell_jobs=${CELL_JOBS:-8}
features=$(submit --array="1-$feature_jobs" "$slurm/features.sbatch" "$root" "$feature_jobs" "$@")
# afterany: what a lost job leaves, the next ones make or name.
cells=$(submit --array="1-$cell_jobs" --dependency="afterany:$features" "$slurm/cells.sbatch" "$root" "$cell_jobs" "$@")
results=$(submit --dependency="afterany:$cells" "$slurm/gather.sbatch" "$root" "$@")
echo "Submitted: features $features ($feature_jobs jobs), cells $cells ($cell_jobs jobs), results $results"
