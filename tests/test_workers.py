"""Cells that other processes run: on several devices, and on Ray."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from running import FAST, SCRIPT, cell_files, folder, visible

from ablation import device_processes, distributed, ray_tasks, workers
from ablation.actions import Actions
from ablation.cells import Cell
from ablation.command_line import parse_command_line
from ablation.context import Context
from ablation.fields import InputError
from ablation.log import Clock, log_to_stdout
from ablation.provenance import announce
from checkpointing import ResultStore

FOUR = ("--representations", "stats", "simple_stats")
BEGINS = f"print({distributed.PART_BEGINS!r}, flush=True); print('hello', flush=True)"


def context_of(*argv):
    """A context that knows its command line and its output folder alone."""
    settings, actions = parse_command_line(["--dataset", "sanity-check", *argv], experiment_description())
    store = ResultStore(settings.output_folder)
    return Context(settings, actions, "cpu", None, store, Clock())


def experiment_description():
    import visual_ablation_experiment

    return visual_ablation_experiment.__doc__


def test_two_processes_write_the_checkpoints_of_one(run, place):
    assert run(*FOUR, "--output-dir", "one")[0] == 0
    status, log = run(*FOUR, "--output-dir", "two", "--devices", "cpu", "cpu", "--no-cache-features")
    assert status == 0 and "4 cells on 1 cpu, 2 cpu" in log
    assert cell_files(place, output="two") == cell_files(place, output="one")
    lines = log.splitlines()
    assert sum(line.startswith(("[1 cpu] Results: ", "[2 cpu] Results: ")) for line in lines) == 4
    assert log.count("PROGRESS SUMMARY") == log.count("VERDICT") == 1
    results = json.loads((folder(place, output="two") / "results.json").read_text())
    assert results["analysis_plan"]["other_plans"] == 0


def test_what_the_processes_left_is_run_here_and_what_failed_is_not(run, place, monkeypatch):
    def none(context, cells):
        announce(context.store.folder, "failed", cell="visual_only_stats", error="TrainingError: as told")

    monkeypatch.setattr(workers, "run_on_devices", none)
    status, log = run(*FOUR, "--devices", "cpu")
    assert status == 1 and "1 cells FAILED: visual_only_stats" in log
    names = visible(folder(place) / "checkpoints")
    assert "visual_only_stats.json" not in names and len(names) == 3
    monkeypatch.setattr(workers, "run_on_devices", lambda context, cells: None)
    assert run(*FOUR, "--devices", "cpu")[0] == 0  # an earlier command's failure is tried again
    assert run(*FOUR, "--output-dir", "one")[0] == 0
    assert cell_files(place) == cell_files(place, output="one")


def test_a_process_that_is_killed_is_started_again_and_then_given_up(capsys):
    log_to_stdout()
    worker = device_processes.Worker("1 cpu", ["-c", f"import os; {BEGINS}; os.kill(os.getpid(), 9)"], 1)
    while worker.is_at_work():
        time.sleep(0.01)
    text = capsys.readouterr().out
    assert text.count("[1 cpu] hello") == 1 + device_processes.RESTARTS
    assert text.count("ended by SIGKILL: it is started again") == device_processes.RESTARTS
    assert text.count("ended by SIGKILL again") == 1


def test_lines_that_the_experiment_writes_itself_are_not_shown():
    shown = device_processes.start_process(["-c", f"print('before'); {BEGINS}"], {})
    assert list(device_processes.news_of(shown)) == ["hello"]
    refused = device_processes.start_process(["-c", "print('before'); print('error: no such file')"], {})
    assert list(device_processes.news_of(refused)) == ["before", "error: no such file"]


def test_processes_that_do_not_end_are_killed(monkeypatch):
    monkeypatch.setattr(device_processes, "STOP_SECONDS", 0.2)
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); {BEGINS}; time.sleep(100)"
    worker = device_processes.Worker("1 cpu", ["-c", code], 1)
    while worker.process.stdout and not worker.reader.is_alive():
        time.sleep(0.01)
    device_processes.stop_all([worker])
    assert worker.process.returncode in (-signal.SIGKILL, -signal.SIGTERM)


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """The middle process starts one as a worker and is killed; the worker must not go on."""
    worker = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import time, os; "
    worker += "from ablation.distributed import end_with_parent; end_with_parent(); "
    worker += "open('pid', 'w').write(str(os.getpid())); time.sleep(100)"
    middle = (
        "import subprocess, sys, os, time; own = {**os.environ, 'VISUAL_ABLATION_WORKER': str(os.getpid())}; "
    )
    middle += "subprocess.Popen([sys.executable, '-c', os.environ['CODE']], env=own); time.sleep(100)"
    environment = {**os.environ, "CODE": worker}
    process = subprocess.Popen([sys.executable, "-c", middle], cwd=tmp_path, env=environment)
    pid = wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    time.sleep(0.5)
    assert Path(f"/proc/{pid}").exists()
    process.kill()
    process.wait()
    wait_until(
        lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    )


def wait_until(condition):
    """What a condition gives as soon as it is true; pytest's own limit ends a test that waits in vain."""
    while not (found := condition()):
        time.sleep(0.01)
    return found


def test_the_command_of_a_part_is_that_of_the_experiment(place):
    context = context_of("--devices", "cpu", "cpu", "--num-runs", "3", "--device=cpu")
    command = device_processes.command_of(context, "cuda:1", "--cells", "a", "b")
    assert command == [
        str(SCRIPT), "--dataset", "sanity-check", "--num-runs", "3", "--device=cpu",
        "--device", "cuda:1", "--cells", "a", "b",
    ]  # fmt: skip
    context = context_of("--ray=auto", "--num-runs", "3")
    assert device_processes.command_of(context, "cpu")[1:] == [
        "--dataset", "sanity-check", "--num-runs", "3", "--device", "cpu",
    ]  # fmt: skip


def test_devices_of_two_kinds_and_devices_that_are_not_there_are_refused(run, monkeypatch):
    status, log = run("--devices", "cpu", "cuda:9")
    assert status == 2 and "--device cuda:9 is not there" in log
    monkeypatch.setattr(workers, "find_device", lambda name: name)
    with pytest.raises(InputError, match="of both kinds"):
        workers.kind_of_workers(context_of().settings, Actions(devices=("cpu", "cuda:0")))
    assert workers.kind_of_workers(context_of().settings, Actions(devices=("cuda:1", "cuda:0"))) == "cuda"
    for flags in (
        ("--devices", "cpu", "--ray", "local"),
        ("--ray", "local", "--cells", "1/2"),
        ("--workers", "2"),
    ):
        assert run(*flags)[0] == 2


def test_without_locks_each_process_has_its_share(place, monkeypatch):
    monkeypatch.setattr(device_processes, "longest_first", lambda cells, sizes: [[cell] for cell in cells])
    monkeypatch.setattr(device_processes, "sizes_of", lambda context: None)
    context = context_of()
    context.store.folder.mkdir(parents=True)
    cells = [Cell(name, "all_layers") for name in ("stats", "spectral", "frequency")]
    names = [cell.name for cell in cells]
    assert device_processes.part_names(context, cells, 2) == [names, names]
    monkeypatch.setattr(device_processes, "locks_work", lambda folder: False)
    assert device_processes.part_names(context, cells, 2) == [names[::2], names[1::2]]


def test_a_plan_shares_the_cells_by_their_columns(run, place):
    status, log = run("--dry-run", "--representations", "stats", "ensemble", "--workers", "2")
    assert status == 0 and "Plan for 2 processes: 4 units, each a cell with its audits" in log
    # 16 layers: 1,072 and 536 columns of ensemble, 112 and 56 of stats; 1,024 stand for the hidden layers.
    costs = [1072 + 1024, 536 + 1024, 112 + 1024, 56 + 1024]
    shares = [costs[0] + costs[3], costs[1] + costs[2]]
    assert (
        f"  1: {100 * shares[0] / sum(costs):5.1f} % of the work: all_layers_ensemble, visual_only_stats"
        in log
    )
    assert (
        f"  2: {100 * shares[1] / sum(costs):5.1f} % of the work: visual_only_ensemble, all_layers_stats"
        in log
    )
    assert f"speed-up: {sum(costs) / max(shares):.1f} of 2; the longest unit is 36 % of the work" in log


def test_what_a_process_failed_is_not_tried_by_the_next(run, place, monkeypatch):
    monkeypatch.setenv(distributed.WORKER, "1")
    real = distributed.groups_in_turn

    def turns(context, groups):
        for number, group in enumerate(real(context, groups)):
            if number == 0:
                announce(
                    context.store.folder, "failed", cell="all_layers_simple_stats", error="told elsewhere"
                )
            yield group

    monkeypatch.setattr("ablation.cells_at_work.groups_in_turn", turns)
    assert run(*FOUR, "--cells", "all_layers_stats", "all_layers_simple_stats")[0] == 0
    assert visible(folder(place) / "checkpoints") == ["all_layers_stats.json"]


# --- Ray


def test_without_ray_the_remedy_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, log = run("--ray", "local")
    assert status == 2 and "pip install -r requirements-ray.txt" in log


def test_tasks_that_no_node_can_hold_are_refused(monkeypatch):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 99.0}},
    ]
    fake = types.SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setitem(sys.modules, "ray", fake)
    settings = context_of("--ray", "local", "--ray-cpus", "2", "--ray-gpus", "0.5").settings
    assert ray_tasks.slots_of(settings) == 2
    for flags in (("--ray-cpus", "64"), ("--ray-gpus", "2")):
        with pytest.raises(InputError, match="more than any node of the cluster has"):
            ray_tasks.slots_of(context_of("--ray", "local", *flags).settings)


def children_named(pid, name):
    """Processes below a process whose command begins with a name."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    below, found = {str(pid)}, []
    for _ in range(5):
        below |= {child for child, parent, _ in rows if parent in below}
    for child, _, command in rows:
        if child in below and command.startswith(name):
            found.append(int(child))
    return found


@pytest.mark.slow
def test_a_ray_of_two_workers_one_of_them_killed_writes_the_checkpoints_of_one_process(run, place):
    pytest.importorskip("ray")
    longer = [*FAST, "--max-epochs", "200", "--patience", "200"]
    assert run(*FOUR, "--output-dir", "one", fast=longer)[0] == 0
    command = [
        sys.executable,
        SCRIPT,
        "--dataset",
        "./loras",
        *longer,
        *FOUR,
        "--output-dir",
        "ray",
        "--ray",
        "local",
    ]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        log = []
        for line in process.stdout:
            log.append(line)
            if "Run 1/2" in line and not any("killed here" in line for line in log):
                os.kill(children_named(process.pid, "ray::run_part")[0], signal.SIGKILL)
                log.append("killed here")
    assert process.returncode == 0, "".join(log)
    assert cell_files(place, output="ray") == cell_files(place, output="one")
    assert sum("begins on" in line for line in log) == 5
