"""What surrounds the program: its environment, clock, paths, disks and neighbours; and what it may touch.

Where a child is needed it is a fork of the tests, which starts at once; few tests start a process of their
own, because that costs seconds.
"""

import ast
import contextlib
import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import filelock
import pytest
import safetensors
import yaml
from builders import lora_dataset
from conftest import ROOT
from datasets import Dataset
from running import FAST, SCRIPT, cell_files, folder, interfere, snapshot, visible

import checkpointing
import visual_ablation_experiment as experiment
from ablation.command_line import UniqueKeyLoader
from ablation.reading import WeightReader
from ablation.report import figures
from checkpointing import ResultStore, holding, read_own

TWO = ("--representations", "stats", "frequency", "--layer-sets", "all_layers")
ONE = ("--representations", "stats", "--layer-sets", "all_layers")
YEAR = 365 * 24 * 3600


class Child:
    """A fork of this process that does some work. Its output is read through a pipe."""

    def __init__(self, work):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(reading)
            self.run(work, writing)
        os.close(writing)
        self.output = open(reading, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in `end`)

    @staticmethod
    def run(work, writing):
        status = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 (the process ends)
            sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
            status = work()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(99 if status is None else status)

    def end(self):
        """Exit status, or minus the number of a signal; and all that it wrote."""
        text = self.output.read()
        self.output.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), text


def main(*flags, dataset="./loras"):
    return experiment.main(["--dataset", dataset, *FAST, *flags])


def start(*flags, dataset="./loras", shell="{}", **kwargs):
    """Run the script in a process of its own, by a line of bash."""
    command = subprocess.list2cmdline([sys.executable, str(SCRIPT), "--dataset", dataset, *FAST, *flags])
    return subprocess.run(["bash", "-c", shell.format(command)], capture_output=True, timeout=300, **kwargs)


def errors(log):
    """Lines that say why the program ended; a warning may quote an "I/O error: "."""
    return [line for line in log.splitlines() if line.startswith("error: ")]


def is_refused(status, log):
    """Bad input, said in one line."""
    return status == 2 and len(errors(log)) == 1 and "Traceback" not in log


def everything_below(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def assert_whole(output):
    """Every file of an output folder that has a checksum is whole, and nothing half written is left."""
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]
    store = ResultStore(output)
    for name in store.names():
        store.load(name)
    for name in ("results.json", "manifest.json"):
        read_own(output / name)


@pytest.fixture
def reference(run, place):
    """The files of two cells that were computed undisturbed."""
    assert run(*TWO, "--output-dir", "reference", "--cache-dir", "reference-cache")[0] == 0
    return cell_files(place, output="reference")


# --- environment


def test_a_bare_environment(place):
    """No home, a temporary folder that is not there, an ASCII locale, a script behind a link."""
    rows = lora_dataset(n=40, signal=True).to_dict()
    rows["category_label"] = [["Käfer", "狐", "naïve"][i % 3] for i in range(40)]
    Dataset.from_dict(rows, features=lora_dataset(n=40).features).save_to_disk("spoken")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "link.py").symlink_to(SCRIPT)
    env = {"PATH": os.environ["PATH"], "LANG": "C", "PYTHONUTF8": "0", "TMPDIR": "/nowhere"}
    env |= {name: value for name, value in os.environ.items() if name.endswith(("_THREADS", "_POLICY"))}
    flags = [*FAST[:-1], *ONE, "--output-dir", "out", "--cache-dir", "cache"]
    done = subprocess.run(
        [sys.executable, "elsewhere/link.py", "--dataset", "./spoken", *flags],
        env=env,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stdout + done.stderr, done.stdout
    results = json.loads((folder(place, "spoken", "out") / "results.json").read_text(encoding="utf-8"))
    assert sorted(results["label_mapping"]) == ["Käfer", "naïve", "狐"]
    assert "Käfer" in (folder(place, "spoken", "out") / "report.html").read_text(encoding="utf-8")
    assert visible(place / "elsewhere") == ["link.py"]


def test_a_path_that_the_locale_cannot_name_works_or_is_refused_before_any_work(place):
    shutil.copytree("loras", "löras")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    before = visible(place)
    for flags in ([], ["--dry-run"]):
        done = start(*ONE, *flags, dataset="./löras", env=env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"error: ")
        assert b"PYTHONUTF8=1" in done.stderr and visible(place) == before


def test_without_stdin_stdout_stderr_and_terminal(place):
    done = start(*ONE, shell="exec setsid {} <&- >&- 2>&-")
    assert done.returncode == 0 and (folder(place) / "results.txt").exists()


def test_a_working_folder_that_is_gone_matters_only_to_relative_paths(place):
    flags = ["--output-dir", str(place / "out"), "--cache-dir", str(place / "cache")]
    done = start(*ONE, *flags, dataset=str(place / "loras"), shell="mkdir x; cd x; rmdir ../x; exec {}")
    if done.returncode == 2:
        assert done.stderr.startswith(b"error: ") and not (place / "out").exists()
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert visible(folder(place, output="out") / "checkpoints") == ["all_layers_stats.json"]


@pytest.fixture
def nowhere(place):
    """The working folder is one that was removed."""
    (place / "gone").mkdir()
    os.chdir(place / "gone")
    (place / "gone").rmdir()
    yield place
    os.chdir(place)


QUESTIONS = ([], ["--dry-run"], ["--status"])


@pytest.mark.parametrize("flags", QUESTIONS, ids=str)
def test_relative_paths_in_a_folder_that_is_gone_are_refused(run, nowhere, flags):
    status, log = run(*ONE, *flags)
    assert is_refused(status, log) or (flags == ["--status"] and status == 0)
    status, log = run(*ONE, *flags, dataset=str(nowhere / "loras"))
    assert is_refused(status, log) or (flags == ["--status"] and status == 0)


@pytest.mark.parametrize("flags", QUESTIONS, ids=str)
def test_a_dataset_called_by_the_folder_that_is_gone_is_refused(run, nowhere, flags):
    assert is_refused(*run(*ONE, *flags, dataset="."))


def test_a_relative_cache_in_a_folder_that_is_gone_costs_a_warning(run, nowhere):
    status, log = run(*ONE, "--output-dir", str(nowhere / "out"), dataset=str(nowhere / "loras"))
    assert (status == 0 and "WARNING: features are not cached" in log) or is_refused(status, log)


@pytest.mark.parametrize("flags", QUESTIONS, ids=str)
def test_an_unknown_home_is_refused(run, place, flags):
    before = visible(place)
    for name in ("--output-dir", "--cache-dir"):
        status, log = run(*ONE, *flags, name, "~nobody-of-this-name/x")
        assert is_refused(status, log) or (name == "--cache-dir" and flags == ["--status"] and status == 0)
    assert visible(place) == before


# --- time


class WrongClock:
    """The clock of this process, set wrong by some seconds."""

    def __init__(self, monkeypatch):
        self.offset = 0
        real_time, real_ns, real_gmtime = time.time, time.time_ns, time.gmtime
        monkeypatch.setattr(time, "time", lambda: real_time() + self.offset)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + self.offset * 10**9)
        monkeypatch.setattr(
            time, "gmtime", lambda seconds=None: real_gmtime(time.time() if seconds is None else seconds)
        )


def test_no_decision_depends_on_the_clock(run, place, monkeypatch, reference):
    clock = WrongClock(monkeypatch)

    def jump():
        clock.offset = -YEAR

    flags = ("--representations", "stats", "frequency", "rank_based", "--layer-sets", "all_layers")
    with monkeypatch.context() as patch:
        interfere(patch, jump)
        assert run(*flags)[0] == 0
    assert reference.items() <= cell_files(place).items()
    kept = snapshot(folder(place) / "checkpoints")
    for clock.offset in (YEAR, -YEAR, 0, -50 * YEAR):
        status, log = run(*flags)
        assert status == 0 and "All experiments already completed!" in log
        for question in (["--status"], ["--status", "--watch"], ["--dry-run"]):
            status, log = run(*flags, *question)
            assert status == 0 and "Traceback" not in log
    assert snapshot(folder(place) / "checkpoints") == kept
    assert_whole(folder(place))


def test_no_decision_depends_on_the_time_zone(run, place, monkeypatch, reference):
    try:
        for zone in ("Pacific/Kiritimati", "America/Los_Angeles", ":nonsense", "XYZ+25:90"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            status, log = run(*TWO)
            assert status == 0 and ("Run 1/2" in log) == (zone == "Pacific/Kiritimati")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert cell_files(place) == reference


def test_times_of_files_from_the_future_and_the_past_change_nothing(run, place, reference):
    assert run(*TWO)[0] == 0
    for moment in (time.time() + YEAR, 0, 2**31 + 5):
        for path in [*place.rglob("*")]:
            os.utime(path, (moment, moment))
        status, log = run(*TWO)
        assert status == 0 and "Run 1/2" not in log
    assert cell_files(place) == reference


# --- paths and sizes


@pytest.mark.parametrize("length", [3900, 4020, 4040, 4050, 4080, 5000])
def test_long_output_paths_work_or_are_refused(run, place, length):
    parts = ["d" * 200] * 30
    path = str(place / "/".join(parts))[:length].rstrip("/")
    with contextlib.suppress(OSError):
        os.makedirs(path)
    planned, _ = run(*ONE, "--dry-run", "--output-dir", path)
    status, log = run(*ONE, "--output-dir", path)
    assert status == 0 or is_refused(status, log), log
    assert planned == 0 or status == 2


@pytest.mark.parametrize("rows", [2, 12])
def test_tiny_data_sets_run_to_the_end(run, place, rows):
    lora_dataset(n=rows).save_to_disk("tiny")
    flags = ("--controls", "shuffled", "--audit") if rows == 12 else ()
    status, log = run(*flags, dataset="./tiny")
    assert status == 0 and "Traceback" not in log, log
    assert len(visible(folder(place, "tiny") / "checkpoints")) >= 18
    assert_whole(folder(place, "tiny"))


# --- neighbours


def test_two_folders_that_share_a_cache_at_the_same_time_are_right_and_equal(place, reference):
    lora_dataset(n=40, signal=True).save_to_disk("loras")  # its hash is not remembered yet
    children = [Child(lambda name=name: main(*TWO, "--output-dir", name)) for name in ("one", "two")]
    for child in children:
        status, log = child.end()
        assert status == 0 and "Traceback" not in log, log
    assert cell_files(place, output="one") == cell_files(place, output="two") == reference
    for output in ("one", "two"):
        assert_whole(folder(place, output=output))


def test_where_locks_do_nothing_results_are_whole(run, place, monkeypatch, reference):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda lock, *a, **k: filelock.AcquireReturnProxy(lock))
    assert run(*ONE)[0] == 0
    kept = snapshot(folder(place) / "checkpoints")
    assert run(*TWO)[0] == 0
    assert snapshot(folder(place) / "checkpoints").items() >= kept.items()
    assert cell_files(place) == reference
    assert_whole(folder(place))


def test_a_held_folder_is_refused_by_name_and_that_of_a_killed_process_taken_over(run, place):
    held = folder(place)

    def hold():
        with holding(held):
            print("held", flush=True)
            time.sleep(300)

    child = Child(hold)
    assert child.output.readline() == "held\n"
    status, log = run(*ONE)
    assert status == 3 and log.count("\n") == 1
    assert (
        f"another process holds {held.relative_to(place)} (pid {child.pid} on {socket.gethostname()})" in log
    )
    assert run(*ONE, "--status")[0] == 0
    os.kill(child.pid, 9)
    assert child.end()[0] == -9
    status, log = run(*ONE)
    assert status == 0 and "another process" not in log and visible(held / "checkpoints")


# --- what vanishes while it is used


def test_an_output_folder_removed_during_the_run_is_one_line_and_not_made_again(run, place, monkeypatch):
    interfere(monkeypatch, lambda: shutil.rmtree(folder(place)))
    status, log = run("--representations", "stats", "frequency")
    assert status == 1 and "Traceback" not in log and len(errors(log)) == 1, log
    assert not folder(place).exists() or everything_below(folder(place)) == []


def test_a_cache_removed_during_the_run_costs_no_result(run, place, monkeypatch, reference):
    cache, real = place / ".feature_cache", WeightReader.read_layer
    interfere(monkeypatch, lambda: shutil.rmtree(cache))
    three = ("--representations", "stats", "frequency", "rank_based", "--layer-sets", "all_layers")
    status, log = run(*three, "--output-dir", "late")
    assert status == 0 and reference.items() <= cell_files(place, output="late").items()

    def read_layer(*what):
        shutil.rmtree(cache, ignore_errors=True)
        return real(*what)

    monkeypatch.setattr(WeightReader, "read_layer", read_layer)
    status, log = run(*TWO, "--output-dir", "early")
    assert status == 0 and "Traceback" not in log, log
    assert cell_files(place, output="early") == reference
    assert_whole(folder(place, output="early"))


def data_file(place):
    (file,) = (place / "loras").glob("*.arrow")
    return file


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_data_removed_or_replaced_while_weights_are_read_is_refused(run, place, monkeypatch, how):
    file, real = data_file(place), WeightReader.read_layer
    lora_dataset(n=40, seed=5).save_to_disk("others")
    (other,) = (place / "others").glob("*.arrow")

    def read_layer(*what):
        if how == "removed":
            file.unlink(missing_ok=True)
        elif other.exists():
            os.replace(other, file)
        return real(*what)

    monkeypatch.setattr(WeightReader, "read_layer", read_layer)
    status, log = run(*TWO)
    assert is_refused(status, log) and "changed while they were read" in log
    assert not list((place / ".feature_cache").rglob("*.safetensors"))
    assert not visible(folder(place) / "checkpoints") if (folder(place) / "checkpoints").exists() else True


def test_data_removed_after_the_weights_were_read_changes_no_result(run, place, monkeypatch, reference):
    interfere(monkeypatch, data_file(place).unlink)
    flags = ("--representations", "stats", "frequency", "rank_based", "--layer-sets", "all_layers")
    status, log = run(*flags)
    assert status == 0 and "Traceback" not in log
    assert reference.items() <= cell_files(place).items()
    assert is_refused(*run(*flags))


# --- disks


@pytest.fixture
def finished(run, place):
    """A folder with two finished cells, old enough for the hash of the data to be remembered later."""
    assert run(*TWO)[0] == 0
    return folder(place)


def old_files(output):
    return {path.name: path.read_bytes() for path in output.glob("[!.]*") if path.is_file()}


def assert_refused_files_are_old(output, old, log):
    """A file that the log says could not be written is as it was before."""
    for path in map(Path, re.findall(r"cannot write (\S+): ", log)):
        if path.parent == output and path.name in old and path.suffix != ".jsonl":
            assert path.read_bytes() == old[path.name], path
    events = output / "events.jsonl"
    assert events.read_bytes().startswith(old["events.jsonl"])


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, 8000, 20_000])
def test_a_limit_on_the_size_of_files_leaves_old_files_whole(place, finished, limit):
    old = old_files(finished)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return main(*TWO, "--seed", "7", "--rerun-stale", "--cache-dir", "other")

    status, log = Child(work).end()
    assert status in (1, 2) or (status == 0 and "features of frequency are not cached" in log), log
    assert "Traceback" not in log and "File too large" in log, log
    assert not list(place.rglob("*.tmp"))
    assert_whole(finished)
    assert (finished / "events.jsonl").read_bytes().startswith(old["events.jsonl"])


@pytest.fixture
def public(place):
    """A folder that an ordinary user may work in, with the data set; the rest is not theirs."""
    path = Path(tempfile.mkdtemp(prefix="visual-ablation-"))
    shutil.copytree(place / "loras", path / "loras")
    os.chmod(path, 0o777)
    os.chdir(path)
    yield path
    os.chdir(place)
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["checkpoints", "predictions", "set_aside", "."])
def test_a_read_only_part_of_the_output_folder_is_refused(run, public, name):
    assert run(*ONE)[0] == 0
    output = folder(public)
    (output / "set_aside").mkdir(exist_ok=True)
    for path in public.rglob("*"):
        os.chown(path, 65534, 65534)
    os.chmod(output / name, 0o555)
    before = everything_below(public)

    def work():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return main(*ONE)

    status, log = Child(work).end()
    assert is_refused(status, log) and "cannot write" in log and "--output-dir" in log, log
    assert everything_below(public) == before


class FailingDisk:
    """A disk that fails in one way for the files whose name begins with some text, and counts its calls.

    `operation` is write, fsync or replace. `asked` lists the paths of the calls that failed.
    """

    def __init__(self, monkeypatch, operation, begins, code):
        self.begins, self.code, self.asked = begins, code, []
        real = {name: getattr(os, name) for name in ("fsync", "replace")}
        real_write, real_open = Path.write_bytes, Path.open

        def fsync(descriptor):
            self.check(os.readlink(f"/proc/self/fd/{descriptor}"))
            real["fsync"](descriptor)

        def replace(source, target):
            self.check(source)
            real["replace"](source, target)

        def write(path, content):
            real_write(path, content[: len(content) // 2])
            self.check(path)
            return real_write(path, content)

        def append(path, mode="r", *arguments, **kwargs):
            if mode == "ab+":
                self.check(path)
            return real_open(path, mode, *arguments, **kwargs)

        if operation == "write":
            monkeypatch.setattr(Path, "write_bytes", write)
            monkeypatch.setattr(Path, "open", append)
            monkeypatch.setattr("safetensors.numpy.save_file", self.save)
        else:
            monkeypatch.setattr(checkpointing.os, operation, fsync if operation == "fsync" else replace)
        self.real_save = safetensors.numpy.serialize_file

    def check(self, path):
        """Fail for the files that are meant."""
        if Path(path).name.lstrip(".").startswith(self.begins):
            self.asked.append(str(path))
            raise OSError(self.code, os.strerror(self.code), str(path))

    def save(self, arrays, path, metadata):
        """What safetensors does, which reports errors in words of its own."""
        Path(path).touch()
        try:
            self.check(path)
        except OSError as error:
            text = f"I/O error: {error.strerror} (os error {error.errno})"
            raise safetensors.SafetensorError(text) from None
        Path(path).write_bytes(safetensors.numpy.save(arrays, metadata))


KINDS = {  # of files: how their names begin
    "checkpoint": "all_layers_stats.json",
    "predictions": "all_layers_stats.npz",
    "reason": "all_layers_stats.1.txt",
    "results": "results.json",
    "text": "results.txt",
    "manifest": "manifest.json",
    "features": "stats.safetensors",
    "run": "run7.safetensors",
    "holder": "folder.holder",
    "probe": "writable",
    "events": "events.jsonl",
}
FAILURES = {"write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EROFS}
COSTS = {"features": 0, "events": 0, "run": 0, "probe": 2}  # exit statuses; 1 for the others


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a data set and one finished cell."""
    place = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(place):
        lora_dataset(n=40, signal=True).save_to_disk("loras")
        assert main(*ONE) == 0
    return place


@pytest.mark.parametrize("operation", FAILURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails_leaves_every_file_old_or_new(
    whole, tmp_path, monkeypatch, capsys, kind, operation
):
    if kind == "events" and operation != "write":
        pytest.skip("events are appended, not replaced")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    output = folder(Path())
    old, old_cell = old_files(output), (output / "checkpoints" / "all_layers_stats.json").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, operation, KINDS[kind], FAILURES[operation])
        status = main(*ONE, "--seed", "7", "--rerun-stale", "--cache-dir", "other")
    captured = capsys.readouterr()
    log = captured.out + captured.err
    assert disk.asked and status == COSTS.get(kind, 1), log
    assert "Traceback" not in log and captured.err.count("\n") <= 1, log
    assert os.strerror(FAILURES[operation]) in log
    assert not list(tmp_path.rglob("*.tmp"))
    assert_whole(output)
    assert_refused_files_are_old(output, old, log)
    cells = [*output.glob("checkpoints/*.json"), *output.glob("set_aside/*.json")]
    assert old_cell in [path.read_bytes() for path in cells]
    again = main(*ONE, "--seed", "7", "--rerun-stale", "--cache-dir", "other")
    assert again == 0 and len(visible(output / "checkpoints")) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("operation", FAILURES)
def test_what_a_disk_refused_is_not_tried_again(tmp_path, monkeypatch, operation, code):
    import numpy as np

    for path, write in (
        (tmp_path / "a.json", lambda path: checkpointing.write_json(path, {"new": 1})),
        (tmp_path / "a.safetensors", lambda path: checkpointing.write_arrays(path, {"x": np.zeros(3)}, {})),
    ):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, operation, "a.", code)
            with pytest.raises(checkpointing.CannotWrite) as refused:
                write(path)
        assert refused.value.errno == code and str(path) in str(refused.value)
        assert len(disk.asked) == 1 and path.read_bytes() == b"old"
    assert visible(tmp_path) == ["a.json", "a.safetensors"] and len(os.listdir(tmp_path)) == 2


def test_a_folder_that_cannot_be_synced_is_an_error_and_its_files_are_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.json"
    path.parent.mkdir()
    path.write_bytes(b"old")
    disk = FailingDisk(monkeypatch, "fsync", "folder", errno.EIO)
    with pytest.raises(checkpointing.CannotWrite):
        checkpointing.write_json(path, {"new": 1})
    assert disk.asked == [str(path.parent)] and os.listdir(path.parent) == ["a.json"]
    assert path.read_bytes() in (b"old", b'{"new": 1}\n')


# --- what it may touch


SOURCES = sorted(
    path for pattern in ("*.py", "ablation/**/*.py", "scripts/*.py") for path in ROOT.glob(pattern)
)
FORBIDDEN_MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "_pickle",
    "torch.package",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "np.loads"}


def dotted(node):
    """`a.b.c` of an expression of names; '' for another."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def dangers(tree):
    """Lines of a module that could run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if FORBIDDEN_MODULES & {part for name in names for part in (name, name.split(".")[0])}:
                yield node.lineno, names
        if isinstance(node, ast.Call):
            name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            pickling = (
                name in ("np.load", "numpy.load")
                and ast.unparse(keywords.get("allow_pickle", ast.Constant(True))) != "False"
            )
            # With weights_only torch makes tensors and plain containers, and runs nothing.
            pickling |= name == "torch.load" and (
                ast.unparse(keywords.get("weights_only", ast.Constant(False))) != "True"
            )
            loader = keywords.get("Loader") or (node.args[1:] or [None])[0]
            unsafe = name in ("yaml.load", "yaml.load_all") and dotted(loader) not in SAFE_LOADERS
            unsafe |= name.startswith("yaml.") and name.split(".")[1] in ("unsafe_load", "full_load")
            trusting = "trust_remote_code" in keywords or (
                "shell" in keywords and ast.unparse(keywords["shell"]) != "False"
            )
            if name in FORBIDDEN_CALLS or pickling or unsafe or trusting:
                yield node.lineno, name


SAFE_LOADERS = ("UniqueKeyLoader", "yaml.SafeLoader")


def test_nothing_that_is_read_is_run():
    assert issubclass(UniqueKeyLoader, yaml.SafeLoader)
    assert len(SOURCES) > 60
    found = {str(path): list(dangers(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "import torch; torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=trusted)",
        "eval('1')",
        "import numpy as np; np.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "load_dataset('x', trust_remote_code=True)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_what_would_be_run_is_found(line):
    assert list(dangers(ast.parse(line)))


HOSTILE = ["../../outside", "/tmp/outside", "..", "a/b", "~root", "$HOME", "-rf", "a\\b", "con.json"]


def test_names_never_lead_out_of_the_output_folder(run, place, monkeypatch):
    shown = ("accuracy", "learning_curves", "confusion")  # the other figures take long
    monkeypatch.setattr(figures, "FIGURES", {name: figures.FIGURES[name] for name in shown})
    rows = lora_dataset(n=40, signal=True).to_dict()
    rows["category_label"] = [HOSTILE[i % len(HOSTILE)] for i in range(40)]
    rows["group"] = [HOSTILE[i % 7] for i in range(40)]
    (place / "inner").mkdir()
    os.chdir(place / "inner")
    Dataset.from_dict(rows, features=lora_dataset(n=40).features).save_to_disk("..data")
    (place / "inner" / "named.yaml").write_text("named_layer_sets: {mine: ['*attn1*']}\nlayer_sets: [mine]\n")
    before = [everything_below(place), os.listdir("/tmp")]
    flags = (
        "--output-dir",
        "out",
        "--cache-dir",
        "cache",
        "--representations",
        "stats",
        "--config",
        "named.yaml",
    )
    status, log = run(*flags, "--report", "--group-column", "group", dataset="./..data/../..data")
    assert status == 0 and "Traceback" not in log, log
    new = set(everything_below(place)) - set(before[0])
    assert {name.split("/")[1] for name in new} == {"out", "cache"} and len(new) > 10
    assert {name.split("/")[2] for name in new if name.count("/") > 1 and "/out/" in name} == {
        "visual_ablation_..data"
    }
    assert [name for name in os.listdir("/tmp") if "outside" in name] == []


@pytest.mark.parametrize("name", ["../up", "/tmp/up", "..", "a/b", ".", "x" * 300, "", "a\0b", "~"])
def test_a_layer_set_that_is_no_part_of_a_file_name_is_refused(run, place, name):
    (place / "named.yaml").write_text(
        yaml.safe_dump({"named_layer_sets": {name: ["*"]}, "layer_sets": [name]})
    )
    before = everything_below(place)
    for question in ([], ["--dry-run"], ["--status"]):
        assert is_refused(*run("--config", "named.yaml", *question))
    assert everything_below(place) == before
