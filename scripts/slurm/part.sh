# shellcheck shell=bash
# Sourced by the jobs: runs a part of the experiment, and puts the job back into the queue if it is ended early.

python=${EXPERIMENT_PYTHON:-$root/.venv/bin/python}

# The program ends by SIGTERM within seconds, and what it has finished stays. SLURM sends the signal to this shell
# a minute before the end of the time limit (and before a preemption, where the site says so), or to the program
# itself when it takes the machine away; then SLURM puts the job back by itself (--requeue).
run_part() {  # run_part ARGUMENT...: runs the experiment with these, and ends the job with its status
    local step status=0 stopped=
    # SLURM_CPUS_PER_TASK of the job is not the step's by itself.
    srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        "$python" "$root/visual_ablation_experiment.py" "$@" &
    step=$!
    trap 'stopped=yes; kill -TERM "$step" 2> /dev/null || true' TERM
    wait "$step" || status=$?
    if [ -n "$stopped" ]; then
        status=0
        wait "$step" || status=$?  # the signal ended the first wait
        [ "$status" -lt 128 ] || requeue
    fi
    exit "$status"
}

requeue() {  # put this job into the queue again, unless it was cancelled
    local job=$SLURM_JOB_ID
    # The number of an array's last job is that of the array, and would put all of them into the queue.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    case "$(scontrol show job --oneliner "$job")" in
        *JobState=RUNNING*) scontrol requeue "$job" ;;
        *) echo "job $job is not put into the queue again: it does not run any more" ;;
    esac
}
