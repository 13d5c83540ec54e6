"""Parts of an experiment, in any number of processes: the same cells, features and results as by one."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from running import FAST, SCRIPT, as_cells_begin, cell_files, folder, never, visible, without_times

import checkpointing
import visual_ablation_experiment as experiment
from ablation import cells_at_work, distributed, status
from ablation.cells import cells_of, groups_of
from ablation.distributed import CellSizes, balanced_shares, chosen_cells, chosen_rows, cost_of
from ablation.fields import InputError
from checkpointing import lock_path, read_events

CHOSEN = ("--representations", "stats", "frequency", "centroid_cosine", "--audit", "noise")
NAMES = [
    f"{layer_set}_{name}" for layer_set in ("all_layers", "visual_only") for name in CHOSEN[1:4]
]  # each has an audit


@pytest.fixture
def seven_rows(monkeypatch):
    """Blocks of seven rows, so that a pass over 40 rows has six."""
    from ablation import audits, extraction, feature_blocks, features, fit, reading

    for module in (audits, extraction, feature_blocks, features, fit, reading):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)


def results_of(place, output):
    """What results.json says, less times, hashes and the folder."""
    results = without_times(json.loads((folder(place, output=output) / "results.json").read_text()))
    results["analysis_plan"].pop("first_stated")
    return {key: value for key, value in results.items() if key not in ("settings", "machine")}


# --- one experiment in parts


def test_parts_in_any_order_write_what_one_process_writes(run, place, seven_rows, monkeypatch):
    assert run(*CHOSEN, "--output-dir", "one")[0] == 0
    parts = (*CHOSEN, "--output-dir", "parts", "--cache-dir", "other")
    for rows in ("28:", "1:28", "0:1"):
        status, log = run(*parts, "--features-only", "--rows", rows)
        assert status == 0 and "Run 1/" not in log
        has_whole = bool(list((place / "other").rglob("stats.safetensors")))
        assert has_whole == (rows == "0:1"), "the last one merges the blocks"
    monkeypatch.setattr("ablation.feature_blocks.Block.extract", never)  # but for blocks that are cached
    order = [NAMES[4], f"{NAMES[0]},{NAMES[5]}", " ".join(NAMES[1:3]), NAMES[3]]
    for number, names in enumerate(order, 1):
        audited = [f"{name}{suffix}" for name in names.replace(",", " ").split() for suffix in ("", ".noise")]
        status, log = run(*parts, "--cells", ",".join(audited))
        assert status == 0 and log.count("Results: Train=") == len(audited) // 2
        assert ("so the results are not written yet" in log) == (number < len(order))
        assert ("VERDICT" in log) == (number == len(order))
    assert cell_files(place, output="parts") == cell_files(place, output="one")
    assert results_of(place, "parts") == results_of(place, "one")
    caches = [sorted((place / name).rglob("*.safetensors")) for name in ("other", ".feature_cache")]
    assert len(caches[0]) == len(caches[1]) and all(
        ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()
        for ours, theirs in zip(*caches, strict=True)
    )


def test_shares_and_gathering(run, place, monkeypatch):
    """`--cells 1/2` and `2/2` are all cells; what is missing is named, and nothing is trained for it."""
    flags = ("--representations", "stats", "frequency", "--output-dir", "shared")
    status, log = run(*flags, "--cells", "2/2")
    assert status == 0 and "2 cells are left" in log
    assert not (folder(place, output="shared") / "results.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr("ablation.training.train_one", never)
        status, log = run(*flags, "--results-only")
    missing = set(NAMES[:2] + NAMES[3:5]) - {name[:-5] for name in cell_files(place, output="shared")}
    assert status == 1 and len(missing) == 2
    assert all(f"{name} is missing: it has not run yet" in log for name in missing)
    failed = json.loads((folder(place, output="shared") / "results.json").read_text())["failed_cells"]
    assert {entry["cell"] for entry in failed} == missing
    status, log = run(*flags, "--cells", "1/2")
    assert status == 0 and "VERDICT" in log
    status, log = run(*flags, "--results-only")
    assert status == 0 and "is missing" not in log
    assert run(*flags[:3], "--output-dir", "one")[0] == 0
    assert results_of(place, "shared") == results_of(place, "one")


def test_a_failed_cell_of_one_part_is_reported_by_the_last(run, place, monkeypatch):
    flags = ("--representations", "stats", "frequency", "--layer-sets", "visual_only")
    with monkeypatch.context() as patched:
        patched.setattr("ablation.training.train_one", lambda *arguments: 1 / 0)
        assert run(*flags, "--cells", "visual_only_stats")[0] == 1
    assert not (folder(place) / "results.json").exists()
    status, log = run(*flags, "--cells", "visual_only_frequency")
    results = json.loads((folder(place) / "results.json").read_text())
    (failed,) = results["failed_cells"]
    assert failed["cell"] == "visual_only_stats" and "ZeroDivisionError" in failed["error"]
    status, log = run(*flags, "--results-only")
    assert status == 1 and "visual_only_stats is missing: ZeroDivisionError" in log
    with lock_holder(folder(place) / "checkpoints" / "visual_only_stats.json"):  # it is tried again elsewhere
        status, log = run(*flags, "--cells", "visual_only_frequency")
    assert status == 0 and "1 cells are left, so the results are not written yet" in log
    assert run(*flags, "--cells", "visual_only_stats")[0] == 0  # tried again, and it writes the results
    results = json.loads((folder(place) / "results.json").read_text())
    assert results["failed_cells"] == [] and len(results["visual_only_results"]) == 2


def test_a_part_leaves_the_folder_the_cells_of_others_and_the_manifest_alone(run, place):
    flags = ("--representations", "stats", "--layer-sets", "visual_only", "all_layers")
    assert run(*flags)[0] == 0
    home = folder(place)
    manifest = (home / "manifest.json").read_bytes()
    damaged = home / "checkpoints" / "all_layers_stats.json"
    damaged.write_text("{")
    (home / "checkpoints" / "visual_only_stats.json").unlink()
    with (home / "events.jsonl").open("a") as events:
        events.write('{"event": "finished", "ce')  # another process is about to write the rest
    with lock_holder(home / "folder"):
        status, log = run(*flags, "--cells", "visual_only_stats")
    assert status == 0 and damaged.read_text() == "{" and "Set aside" not in log
    assert (home / "manifest.json").read_bytes() == manifest
    assert run(*flags, "--cells", "all_layers_stats")[0] == 0  # its own damaged cell is set aside
    assert visible(home / "set_aside") == [
        "all_layers_stats.1.json",
        "all_layers_stats.1.npz",
        "all_layers_stats.1.txt",
    ]
    assert [event["event"] for event in read_events(home / "events.jsonl")][-3:] == [
        "finished",
        "left",
        "ended",
    ]


# --- work that another process holds


class lock_holder:
    """A process that holds the lock of a file until it is killed."""

    def __init__(self, path):
        code = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        code += "print('held', flush=True); "
        self.command = [sys.executable, "-c", code + "time.sleep(1000)", str(lock_path(path))]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE)
        self.process.stdout.readline()
        return self.process

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("part", [(), ("--cells", "1/1")])
def test_a_cell_that_another_process_holds_comes_last_and_is_done_here_if_that_dies(
    run, place, monkeypatch, part
):
    flags = ("--representations", "stats", "frequency", "--layer-sets", "all_layers")
    longest = NAMES[1] if part else NAMES[0]  # the first in turn
    (folder(place) / "checkpoints").mkdir(parents=True)
    with lock_holder(folder(place) / "checkpoints" / f"{longest}.json") as holder:
        real = distributed.wait_for_one

        def wait_for_one(*arguments):
            assert len(cell_files(place)) == 1, "the cell that nobody holds is finished before this one waits"
            holder.kill()
            real(*arguments)

        monkeypatch.setattr(distributed, "wait_for_one", wait_for_one)
        status, log = run(*flags, *part)
    assert status == 0 and f"{longest} is at work in another process: it comes last" in log
    assert len(cell_files(place)) == 2


def test_a_cell_that_another_process_finished_meanwhile_is_not_trained_again(run, place, monkeypatch):
    flags = ("--representations", "stats", "--layer-sets", "all_layers")
    assert run(*flags, "--output-dir", "there")[0] == 0
    done = folder(place, output="there")
    real = cells_at_work.groups_in_turn

    def groups_in_turn(context, groups):
        for name in ("predictions/all_layers_stats.npz", "checkpoints/all_layers_stats.json"):
            (folder(place) / name).write_bytes((done / name).read_bytes())
        return real(context, groups)

    monkeypatch.setattr(cells_at_work, "groups_in_turn", groups_in_turn)
    monkeypatch.setattr("ablation.training.train_one", never)
    status, log = run(*flags, "--cells", "all_layers_stats")
    assert status == 0 and "VERDICT" in log and "Traceback" not in log


def test_watching_sees_parts_at_work(run, place, monkeypatch):
    flags = ("--representations", "stats", "frequency", "--layer-sets", "all_layers")
    seen = []
    as_cells_begin(monkeypatch, lambda: seen.append(checkpointing.parts_at_work(folder(place))))
    assert run(*flags, "--cells", "all_layers_stats")[0] == 0
    assert seen == [1] and checkpointing.parts_at_work(folder(place)) == 0
    assert not list(folder(place).glob(".part*"))
    with lock_holder(folder(place) / "part-there-1") as holder:
        monkeypatch.setattr(status.time, "sleep", lambda seconds: holder.kill() or holder.wait())
        log = run(*flags, "--status", "--watch")[1]
    assert "1/2 cells done, 0 failed, 1 running, 0 left | Rate: " in log
    assert "No run is working on this folder" in log
    assert run(*flags, "--results-only")[0] == 1
    assert not list(folder(place).glob(".part*")), "the lock of a killed process does not stay"


# --- which part is whose


LAYERS = SimpleNamespace(
    positions=lambda layer_set: range({"all_layers": 8, "visual_only": 4}[layer_set]),
    module_positions=lambda layer_set: range({"all_layers": 4, "visual_only": 2}[layer_set]),
    layouts={number: SimpleNamespace(size=100) for number in range(8)},
    names=range(8),
)
SIZES = CellSizes(SimpleNamespace(width_of=len, pca_components=20, metadata_columns=()), LAYERS, 1000, 10)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shares_are_all_cells_once_with_their_audits_and_balanced(count):
    representations = ("stats", "ensemble", "spectral", "flat_vec", "pca", "kernel_ridge", "product_norms")
    cells = cells_of(("all_layers", "visual_only"), representations, ("gauge",))
    shares = [chosen_cells((f"{number}/{count}",), cells, SIZES) for number in range(1, count + 1)]
    assert sorted(cell for share in shares for cell in share) == sorted(cells)
    for share in shares:
        assert {cell.trained for cell in share} <= set(share) and len(groups_of(share)) == len(share) / 2
    costs = [sum(cost_of(group[0], SIZES) for group in groups_of(share)) for share in shares]
    least = min(costs)
    for share, cost in zip(shares, costs, strict=True):
        # Without its last unit no share has more than the one with least: that is what greedy dealing means.
        assert not share or cost - min(cost_of(cell, SIZES) for cell in share) <= least
    assert [[group[0] for group in share] for share in balanced_shares(cells, SIZES, count)] == [
        [group[0] for group in groups_of(share)] for share in shares
    ]


def test_rows_of_any_cut_and_of_shares_are_all_rows_once():
    for cuts in ([0], [0, 1, 1, 1023, 1024, 5000], [0, 4096], [0, 9999, 10_000]):
        ends = [*cuts[1:], ""]
        parts = [chosen_rows(f"{start}:{end}", 5000) for start, end in zip(cuts, ends, strict=True)]
        assert [row for part in parts for row in part] == list(range(5000))
    assert chosen_rows("", 50) == chosen_rows(":", 50) == range(50) and chosen_rows(":7", 50) == range(7)
    assert not chosen_rows("60:90", 50) and not chosen_rows("50:", 50)
    for count in (1, 3, 7, 60):
        parts = [chosen_rows(f"{number}/{count}", 50) for number in range(1, count + 1)]
        assert [row for part in parts for row in part] == list(range(50))
    for wrong in ("5", "a:b", "7:3", "0/3", "4/3", "-1:5", "1:2:3", "1/0"):
        with pytest.raises(InputError, match="--rows"):
            chosen_rows(wrong, 50)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--cells", "all_layers_stat"), "did you mean 'all_layers_stats'?"),
        (("--cells", "3/2"), "shares are counted from 1/2 to 2/2"),
        (("--cells", "1/999999999"), "--cells 1/999999999"),
        (("--rows", "1:2"), "--rows goes with --features-only"),
        (("--features-only", "--rows", "x"), "use A:B"),
        (("--features-only", "--no-cache-features"), "feature cache"),
        (("--cells", "1/2", "--results-only"), "do not go together"),
        (("--features-only", "--devices", "cpu", "cpu"), "do not go together"),
        (("--results-only", "--status"), "--results-only does not go with --status"),
    ],
)
def test_what_does_not_go_together_is_refused(run, flags, said):
    status, log = run("--representations", "stats", *flags)
    assert status == 2 and said in log and "Traceback" not in log


# --- SLURM


STUBS = {
    "sbatch": """#!/usr/bin/env bash
# Runs the jobs of an array one after another, from a copy of the file as SLURM does.
first=1 last=1 array=
while [[ $1 == --* ]]; do
    if [[ $1 == --array=* ]]; then array=yes first=${1#*=}; last=${first#*-} first=${first%-*}; fi
    echo "$1" >> options
    shift
done
number=$(($(wc -l < numbers) + 7)); echo "$number" >> numbers
cp "$1" spooled; shift
for task in $(seq "$first" "$last"); do
    export SLURM_JOB_ID=$((100 * number + task))
    if [ "$array" ]; then export SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$task
    else unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID; fi
    bash spooled "$@" >> jobs.log 2>&1
done
echo "$number;cluster"
""",
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
printf '%q ' "$@" >> calls; echo >> calls
""",
    "scontrol": """#!/usr/bin/env bash
echo "$*" >> asked
if [ "$1" = show ]; then echo "JobId=1 JobState=$STATE Reason=None"; fi
""",
}


@pytest.fixture
def cluster(place, monkeypatch):
    """Stubs of SLURM's commands on the path. `srun` notes its command line, which costs no process."""
    (place / "bin").mkdir()
    for name, text in STUBS.items():
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    (place / "numbers").touch()
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("EXPERIMENT_PYTHON", sys.executable)
    monkeypatch.setenv("STATE", "RUNNING")
    return place


def test_the_jobs_of_slurm_write_what_one_process_writes(run, cluster, seven_rows, monkeypatch):
    flags = ["--representations", "stats", "frequency", "--config", "my settings.yaml"]
    (cluster / "my settings.yaml").write_text("seed: 3\n")
    for name, value in {"FEATURE_JOBS": 3, "CELL_JOBS": 2, "GPUS": 1, "MEMORY": "9G"}.items():
        monkeypatch.setenv(name, str(value))
    command = [
        ROOT / "scripts/slurm/submit.sh",
        "--dataset",
        "./loras",
        *FAST,
        *flags,
        "--output-dir",
        "slurm",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Submitted: features 7 (3 jobs), cells 8 (2 jobs), results 9" in done.stdout
    options = (cluster / "options").read_text().splitlines()
    assert (
        options.count("--gres=gpu:1") == options.count("--mem=9G") == options.count("--cpus-per-task=4") == 3
    )
    assert [line for line in options if "array" in line or "dependency" in line] == [
        "--array=1-3", "--array=1-2", "--dependency=afterany:7", "--dependency=afterany:8",
    ]  # fmt: skip
    calls = [shlex.split(line) for line in (cluster / "calls").read_text().splitlines()]
    assert [call[:2] for call in calls] == [[sys.executable, str(SCRIPT)]] * 6
    assert [call[-3:] for call in calls[:3]] == [["--features-only", "--rows", f"{n}/3"] for n in (1, 2, 3)]
    assert [experiment.main(call[2:]) for call in calls] == [0] * 6
    assert run(*flags, "--output-dir", "one")[0] == 0
    assert cell_files(cluster, output="slurm") == cell_files(cluster, output="one")
    assert results_of(cluster, "slurm") == results_of(cluster, "one")


@pytest.mark.parametrize("variable", ["CELL_JOBS=0", "GPUS=two", "EXPERIMENT_PYTHON=/no/python"])
def test_nothing_is_submitted_with_wrong_settings(cluster, monkeypatch, variable):
    monkeypatch.setenv(*variable.split("="))
    command = [ROOT / "scripts/slurm/submit.sh", "--dataset", "./loras"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not (cluster / "options").exists()


@pytest.mark.parametrize(
    "ending, state, asked",
    [
        ("exit 143", "RUNNING", ["show job --oneliner 5_2", "requeue 5_2"]),
        ("exit 143", "CANCELLED", ["show job --oneliner 5_2"]),  # by its owner
        ("exit 0", "RUNNING", []),  # it finished in time
    ],
)
def test_a_job_that_is_ended_early_is_queued_again(cluster, monkeypatch, ending, state, asked):
    srun = (
        f"#!/usr/bin/env bash\ntrap 'touch told; {ending}' TERM\ntouch began\nwhile :; do sleep 0.02; done\n"
    )
    (cluster / "bin" / "srun").write_text(srun)
    monkeypatch.setenv("STATE", state)
    for name, value in {"JOB_ID": "5", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    job = subprocess.Popen(["bash", ROOT / "scripts/slurm/cells.sbatch", ROOT, "2", "--dataset", "x"])
    while not (cluster / "began").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == int(ending.split()[1]) and (cluster / "told").exists()
    log = cluster / "asked"
    assert (log.read_text().splitlines() if log.exists() else []) == asked
