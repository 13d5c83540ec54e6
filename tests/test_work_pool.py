"""The pool of cores: every job once, batches as they end, errors where they belong; by threads and forks."""

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from running import FAST, cell_files
from test_training import SMALL, problem, same_to_the_bit

from ablation import forked, log, mlp, stopping, training, work_pool
from ablation.cells import Cell
from ablation.cells_at_work import CellsAtWork, Group
from ablation.forked import Forks, ProcessLost, each_done
from ablation.kept_runs import run_arrays
from ablation.log import log_to_stdout
from ablation.planned_runs import PlannedRun
from ablation.task import Listener, Run, Task, TrainingError
from ablation.work_pool import Batch, Pool, Threads
from checkpointing import CRASH


class Numbers(Batch):
    """Jobs that give their numbers, or what a function of a number gives."""

    def __init__(self, count, job=lambda number: number, in_turn=False):
        super().__init__()
        self.count, self.job, self.in_turn = count, job, in_turn
        self.made, self.noted = [], []

    def jobs(self):
        for number in range(self.count):
            self.made.append(number)
            yield lambda number=number: (number, self.job(number))

    def note(self, result):
        self.noted.append(result[0])

    def to_bytes(self, result):
        return str(result[0]).encode()

    def from_bytes(self, content):
        return int(content), None


@pytest.fixture(params=[Threads, Forks])
def pool_of(request, monkeypatch):
    def make(workers):
        monkeypatch.setattr(work_pool, "FORK_FROM", 1 if request.param is Forks else 100)
        return Pool(workers)

    threads = torch.get_num_threads()
    yield make
    assert torch.get_num_threads() == threads


def pause(number):
    time.sleep(0.02 * (number % 3))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once_and_every_batch_is_yielded_once(pool_of, workers):
    batches = [Numbers(count, pause) for count in (7, 0, 1, 3)]
    with pool_of(workers) as pool:
        ended = list(pool.finished(iter(batches)))
    assert sorted(map(id, ended)) == sorted(map(id, batches))
    assert [sorted(batch.noted) for batch in batches] == [list(range(batch.count)) for batch in batches]
    assert all(batch.error is None for batch in batches)


@pytest.mark.parametrize("most, reached", [(1, 1), (3, 3), (sys.maxsize, 5)])
def test_at_most_so_many_jobs_are_at_work(pool_of, most, reached):
    batch, at_work = Numbers(9, pause), []
    batch.most = most
    with pool_of(4) as pool:
        submit = pool.crew.submit
        pool.crew.submit = lambda *job: at_work.append(len(pool.at_work) + 1) or submit(*job)
        assert list(pool.finished([batch])) == [batch]
    assert sorted(batch.noted) == list(range(9)) and max(at_work) == reached  # one more than cores waits


def test_the_next_batch_begins_while_the_last_jobs_of_another_are_at_work(pool_of, tmp_path):
    """The last job of the first batch waits for the last one of the second, which another core must do."""

    def wait_for_the_other(number):
        for _ in range(10_000):  # then the test fails and does not hang
            if number != 2 or (tmp_path / "3").exists():
                return
            time.sleep(0.01)
        raise TimeoutError("no core did the other's jobs")

    first, second = (
        Numbers(3, wait_for_the_other),
        Numbers(4, lambda number: (tmp_path / str(number)).touch()),
    )
    with pool_of(2) as pool:
        ended = list(pool.finished([first, second]))
    assert set(ended) == {first, second} and first.error is None and second.error is None
    assert sorted(first.noted) == [0, 1, 2] and sorted(second.noted) == [0, 1, 2, 3]


def test_none_and_batches_in_turn_wait_for_what_is_at_work(pool_of):
    long, alone, last = Numbers(2, lambda number: time.sleep(0.1)), Numbers(2, in_turn=True), Numbers(1)
    noted = []

    def batches():
        yield long
        yield None
        noted.append(list(long.noted))
        yield alone
        noted.append(list(alone.noted))
        yield last

    threads, used = torch.get_num_threads(), []
    alone.job = lambda number: used.append(torch.get_num_threads())
    with pool_of(2) as pool:
        assert list(pool.finished(batches())) == [long, alone, last]
    assert [sorted(numbers) for numbers in noted] == [[0, 1], [0, 1]] and used == [threads] * 2


def fail_at(number, error):
    def job(given):
        if given == number:
            raise error
        time.sleep(0.01)

    return job


@pytest.mark.parametrize(
    "error, kind",
    [(TrainingError("no column varies"), TrainingError), (ZeroDivisionError("by 0"), Exception)],
)
def test_an_error_ends_its_batch_and_no_other(pool_of, error, kind):
    bad, good = Numbers(1000, fail_at(1, error)), Numbers(5)
    with pool_of(2) as pool:
        assert set(pool.finished([bad, good])) == {bad, good}
    assert isinstance(bad.error, kind) and bad.stop.is_set() and len(bad.made) < 1000
    assert log.describe_error(bad.error) == f"{type(error).__name__}: {error}"
    assert sorted(good.noted) == list(range(5)) and good.error is None


def test_jobs_that_cannot_be_made_fail_their_batch(pool_of):
    class Unmade(Numbers):
        def jobs(self):
            yield from super().jobs()
            raise TrainingError("no more")

    batches = [Unmade(2), Numbers(2)]
    with pool_of(2) as pool:
        assert set(pool.finished(batches)) == set(batches)
    assert str(batches[0].error) == "no more" and sorted(batches[1].noted) == [0, 1]


def test_an_interrupt_ends_the_pool_and_all_jobs(pool_of):
    class Endless(Numbers):
        def jobs(self):
            yield lambda: (0, self.stop.wait(600))
            yield lambda: (1, self.stop.wait(600))
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), pool_of(2) as pool:
        list(pool.finished([Endless(2)]))
    assert time.monotonic() - began < 300, "jobs at work are asked to end, not waited for"


# --- forks


def test_runs_in_forks_are_those_of_threads_to_the_bit(monkeypatch):
    x, labels, split = problem(dtype=torch.float32)
    task = Task(x, labels, split, 3, {"changed": x[:5]})
    settings = dataclasses.replace(SMALL, num_runs=5, dropout=0.5)
    whole = training.train_runs(task, settings)
    begun = []
    real = forked.Fork.begin
    monkeypatch.setattr(forked.Fork, "begin", lambda self: (begun.append(1), real(self)))
    monkeypatch.setattr(work_pool, "FORK_FROM", 1)
    heard = []
    again = training.train_runs(task, settings, "cpu", Listener(lambda run, number: heard.append(number)))
    same_to_the_bit(again, whole)
    assert len(begun) == 5 and heard == [1, 2, 3, 4, 5]
    assert all(run.seconds > 0 for run in again.runs)


@pytest.fixture
def forking(monkeypatch):
    monkeypatch.setattr(work_pool, "FORK_FROM", 1)
    return Pool


def test_a_fork_does_not_wait_for_threads_that_it_does_not_have():
    """In a process of its own, whose torch has threads at work before it forks."""
    script = f"""
        import sys, torch
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from ablation import work_pool
        from test_work_pool import Numbers
        work_pool.FORK_FROM = 1
        torch.set_num_threads(4)
        x = torch.randn(1500, 1500)
        batch = Numbers(3, lambda number: (x @ x).exp().sum())
        alone = Numbers(1, lambda number: print("threads", torch.get_num_threads()))
        alone.may_fork = False
        pool = work_pool.Pool(2)
        with pool:
            with pool.all_cores():
                (x @ x).exp().sum()
            assert list(pool.finished([batch, alone])) == [batch, alone]
        assert batch.error is None and alone.error is None
        print("done", len(batch.noted))
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.splitlines() == ["threads 4", "done 3"], done.stderr


def test_an_error_in_a_fork_says_where_it_was(forking):
    batch = Numbers(1, lambda number: 1 / 0)
    pool = forking(1)
    with pool:
        list(pool.finished([batch]))
    (note,) = batch.error.__notes__
    assert "Traceback" in note and "1 / 0" in note


def test_a_fork_that_is_killed_fails_its_batch(forking):
    def die(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    bad, good = Numbers(3, die), Numbers(3)
    pool = forking(2)
    with pool:
        assert set(pool.finished([bad, good])) == {bad, good}
    assert isinstance(bad.error, ProcessLost) and "memory" in str(bad.error)
    assert sorted(good.noted) == [0, 1, 2]


def test_a_fork_that_has_ended_is_not_taken_for_one_that_has_its_pipe():
    """Of two that ended at once one failed, so that the other is dropped; a third has begun meanwhile."""
    forks = Forks(2)
    first, second, third = (forks.submit(lambda number=number: number, AsJson()) for number in range(3))
    for fork in (first, second):
        os.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOWAIT)
    assert {fork for fork, _ in forks.done()} == {first, second}
    assert third.pipe in (first.pipe, second.pipe), "the system gives the lowest number that is free"
    assert not forks.drop(first) and not forks.drop(second)
    ((fork, result_of),) = forks.done()
    assert fork is third and result_of() == 2


def test_a_fork_that_cannot_begin_fails_its_batch(forking, monkeypatch):
    real, calls = os.fork, []

    def fork():
        calls.append(1)
        if len(calls) in (2, 3):
            raise BlockingIOError(errno.EAGAIN, "no process is left")
        return real()

    monkeypatch.setattr(os, "fork", fork)
    before, bad, good = len(os.listdir("/proc/self/fd")), Numbers(3), Numbers(3)
    with forking(2) as pool:
        assert set(pool.finished([bad, good])) == {bad, good}
    assert isinstance(bad.error, BlockingIOError) and sorted(good.noted) == [0, 1, 2]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_signal_during_a_fork_counts_after_it(monkeypatch):
    monkeypatch.setattr(stopping, "stopped_by", None)
    real = os.fork
    monkeypatch.setattr(os, "fork", lambda: stopping.stop(signal.SIGINT, None) or real())
    forks = Forks(2)
    with pytest.raises(SystemExit, match="130"):
        forks.submit(lambda: time.sleep(600), AsJson())
    (fork,) = forks.at_work
    forks.close()
    assert not alive(fork.pid)


def test_forks_end_where_their_end_is_not_told(forking):
    """The process was begun by one that ignores SIGCHLD, and inherits that."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        batch = Numbers(5)
        with forking(2) as pool:
            assert list(pool.finished([batch])) == [batch]
        assert batch.error is None and sorted(batch.noted) == [0, 1, 2, 3, 4]
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    "precision, in_sight, forks",
    [("bfloat16", True, False), ("float32", True, True), ("bfloat16", False, True)],
)
def test_autograd_is_not_used_in_a_fork_where_a_gpu_is_in_sight(
    forking, monkeypatch, precision, in_sight, forks
):
    processes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: in_sight)
    real = training.train_one
    monkeypatch.setattr(training, "train_one", lambda *job: processes.append(os.getpid()) or real(*job))
    training.train_runs(
        Task(*problem(dtype=torch.float32), 3), dataclasses.replace(SMALL, precision=precision)
    )
    assert (processes == []) == forks  # those of forks are noted in the forks


def test_lines_of_kept_runs_stand_with_their_cell(capsys):
    """Another cell began before, and its lines are shown first."""
    log_to_stdout()
    logger = logging.getLogger("visual_ablation")
    before, cell = Group([], 0), Group([], 0)
    before.lines.show()
    cell.on_run = lambda run, number: logger.info(f"Run {number}")
    cell.planned = [PlannedRun(42, lambda: None)]
    run = {**run_arrays(Run(42, predictions={"val": np.zeros(2)})), "trained_dim": np.array(3)}
    cell.kept = types.SimpleNamespace(load=lambda name: run)
    with Pool(1) as pool:
        assert list(pool.finished([cell])) == [cell]
    with before.lines.taken():
        logger.info("of the cell before")
    cell.lines.show()
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "of the cell before",
        "1 of its 1 runs were finished by an earlier command",
        "Run 1",
    ]


def test_lines_that_wait_are_shown_when_work_ends_early(capsys):
    log_to_stdout()
    work = CellsAtWork(types.SimpleNamespace(), None, None, None, None)
    work.begun.extend([Group([], 0), Group([], 0)])
    for number, group in enumerate(work.begun):
        with group.lines.taken():
            logging.getLogger("visual_ablation").info(f"of cell {number}")
    work.show_lines()
    assert capsys.readouterr().out == "of cell 0\n"
    work.close()
    assert capsys.readouterr().out == "of cell 1\n"


def test_a_cell_whose_results_no_disk_takes_is_trained_no_further():
    lost, going_on = (Cell("all_layers", name) for name in ("stats", "frequency"))
    ledger = types.SimpleNamespace(failures={lost: "not run: the disk is full"})
    work = CellsAtWork(types.SimpleNamespace(store=None), ledger, None, None, None)
    saved, first, second = Group([], 0), Group([lost], 0), Group([going_on], 0)
    first.missing, second.missing = [lost], [going_on]
    work.begun.extend([saved, first, second])
    work.save(saved)
    assert first.stop.is_set() and first.error is not None, "threads and forks"
    assert not second.stop.is_set() and second.error is None


def test_runs_of_a_cell_share_one_copy_of_its_rows(forking, monkeypatch):
    taken = []
    real = mlp.Prepared.rows_of
    monkeypatch.setattr(mlp.Prepared, "rows_of", lambda data, part: taken.append(part) or real(data, part))
    training.train_runs(Task(*problem(dtype=torch.float32), 3), dataclasses.replace(SMALL, num_runs=5))
    assert taken == ["train", "val"]  # before the forks


@pytest.mark.parametrize("room, most", [(4.0, 1), (7.0, 2), (30.0, 10)])
def test_runs_of_a_cross_validation_are_as_many_as_have_room(run, monkeypatch, room, most):
    """In units of the columns; four copies of them must fit, or they stay on disk."""
    groups = []
    real = CellsAtWork.begun_with
    monkeypatch.setattr(CellsAtWork, "begun_with", lambda *begun: groups.append(real(*begun)) or groups[-1])
    columns = 40 * 16 * 7 * 4  # bytes
    flags = ("--representations", "stats", "--layer-sets", "all_layers", "--folds", "2")
    assert run(*flags, "--memory-gb", str(room * columns / 1e9))[0] == 0
    (group,) = groups
    assert group.most == most


def test_lines_of_a_fork_come_into_the_log_of_the_process(forking):
    logger, shown = logging.getLogger("visual_ablation"), forked.Lines()
    batch = Numbers(1, lambda number: logger.warning("out of the fork"))
    pool = forking(1)
    logger.addHandler(shown)
    try:
        with pool:
            list(pool.finished([batch]))
    finally:
        logger.removeHandler(shown)
    assert shown.lines == [(logging.WARNING, "out of the fork")]


def test_results_longer_than_a_pipe_come_whole(forking):
    class Long(Numbers):
        def to_bytes(self, result):
            return np.full(3_000_000, result[0], np.uint8).tobytes()

        def from_bytes(self, content):
            found = np.frombuffer(content, np.uint8)
            assert len(found) == 3_000_000 and (found == found[0]).all()
            return int(found[0]), None

    batch = Long(6)
    pool = forking(3)
    with pool:
        list(pool.finished([batch]))
    assert sorted(batch.noted) == list(range(6))


def test_what_a_fork_notes_stands_in_the_line_of_progress(forking):
    with log.Progress(2, "runs") as progress:
        batch = Numbers(1, lambda number: setattr(progress, "note", "epoch 7 of ähnliche"))
        pool = forking(1)
        with pool:
            list(pool.finished([batch]))
        assert progress.line().endswith(" | epoch 7 of ähnliche")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what):
    for _ in range(3000):
        if what():
            return
        time.sleep(0.02)
    raise AssertionError("waited a minute")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_forks_end_with_their_process_and_not_by_a_signal_of_a_terminal(tmp_path, number):
    script = tmp_path / "forks.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time, os
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from ablation.forked import Forks
        from ablation.stopping import handle_signals
        from test_work_pool import Numbers
        handle_signals()
        forks = Forks(2)
        batch = Numbers(2)
        try:
            for _ in range(2):
                forks.submit(lambda: time.sleep(600), batch)
            print(*(fork.pid for fork in forks.at_work), flush=True)
            forks.done()
        finally:
            forks.close()
        """)
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, process.stdout.readline().split()))
    assert len(pids) == 2 and all(map(alive, pids))
    if number == signal.SIGINT:
        wait_until(lambda: all(ignores(pid, number) for pid in pids))
        for pid in pids:
            os.kill(pid, number)
        assert all(map(alive, pids))
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not any(map(alive, pids)))


def ignores(pid, number):
    with open(f"/proc/{pid}/status") as file:
        (mask,) = [line.split()[1] for line in file if line.startswith("SigIgn")]
    return bool(int(mask, 16) >> (number - 1) & 1)


PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
import visual_ablation_experiment as experiment
from ablation import forked

torch.set_num_threads(int(sys.argv[1]))  # which may be more than the cores that there are
begin = forked.Fork.begin
forked.Fork.begin = lambda fork: print("fork", file=sys.stderr, flush=True) or begin(fork)
sys.exit(experiment.main(sys.argv[2:]))
"""


def test_an_experiment_of_four_processes_has_the_cells_of_one_thread(place):
    """Killed in the middle, too."""

    def experiment(threads, output, **environment):
        options = ["--representations", "stats", "frequency", "--audit", "noise", "--output-dir", output]
        command = [sys.executable, "-c", PROGRAM, threads, "--dataset", "./loras", *FAST, *options]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)

    one = experiment("1", "one")
    killed = experiment("4", "four", **{CRASH: "committed 2"})  # a cell and its audit of four
    four = experiment("4", "four")
    assert (one.returncode, killed.returncode, four.returncode) == (0, -signal.SIGKILL, 0), four.stderr
    forks = [done.stderr.splitlines().count("fork") for done in (one, killed, four)]
    assert forks[0] == 0 and forks[1] >= 2 and sum(forks) >= 8, "of four cells of two runs"
    assert cell_files(place, output="one") == cell_files(place, output="four")
    lines = [line for line in four.stdout.splitlines() if line.startswith(("[", "Run ", "Results:", "Audit"))]
    kinds = [line.split()[0].rstrip(":") for line in lines if not line.startswith("Results: four")]
    assert [kind[0] for kind in kinds] == ["[", "R", "R", "R", "A"] * 3, "lines of a cell stand together"


# --- jobs whose results are all wanted


class AsJson:
    def to_bytes(self, result):
        return json.dumps(result).encode()

    def from_bytes(self, content):
        return json.loads(content)


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_results_stand_in_the_order_of_their_jobs(workers):
    def job(number):
        pause(-number)
        return [number, os.getpid()]

    done = each_done([lambda number=number: job(number) for number in range(5)], AsJson(), workers)
    assert [number for number, _ in done] == list(range(5))
    assert len({process for _, process in done} - {os.getpid()}) == (0 if workers == 1 else 5)
    assert each_done([], AsJson(), workers) == []


def test_a_job_that_fails_is_an_error_with_its_traceback_and_ends_the_others(tmp_path):
    other = tmp_path / "process"

    def sleep():
        other.write_text(f"{os.getpid()} ")
        time.sleep(600)

    def fail():
        while not (other.exists() and other.read_text().endswith(" ")):
            time.sleep(0.01)
        raise ZeroDivisionError("as wanted")

    with pytest.raises(Exception, match="as wanted") as caught:
        each_done([sleep, fail, sleep], AsJson(), 2)
    assert type(caught.value).__name__ == "ZeroDivisionError" and "in fail" in caught.value.__notes__[0]
    with pytest.raises(ProcessLookupError):
        os.kill(int(other.read_text()), 0)


class OwnError(ValueError):
    pass


ERRORS = [
    (KeyError("a key"), KeyError, "'a key'"),
    (OwnError("of a library"), ValueError, "of a library"),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "as wanted"), UnicodeError, "as wanted"),
    (OSError(28, "No space left on device"), OSError, "No space left"),
    (TrainingError("no loss"), TrainingError, "no loss"),
    (SystemExit(130), Exception, "130"),
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
]


@pytest.mark.parametrize("error, usual, text", ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_keeps_its_name_its_text_and_what_it_is(error, usual, text):
    def fail():
        raise error

    with pytest.raises(usual) as caught:
        each_done([fail], AsJson(), 2)
    assert type(caught.value).__name__ == type(error).__name__ and text in str(caught.value)


def test_a_job_whose_process_is_killed_is_an_error():
    with pytest.raises(ProcessLost):
        each_done([lambda: os.kill(os.getpid(), signal.SIGKILL)] * 2, AsJson(), 2)


@pytest.mark.parametrize("wanted, number", [("3", 3), ("", None), ("0", None), ("4,2", None)])
def test_as_many_cores_as_openmp_takes(monkeypatch, wanted, number):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert forked.cores() == (number or len(os.sched_getaffinity(0)))
