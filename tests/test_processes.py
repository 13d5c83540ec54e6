"""Signals, pipes and terminals."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from builders import lora_dataset
from conftest import ROOT
from running import FAST, SCRIPT, as_cells_begin, at_the_third_call, folder, visible

import checkpointing
from ablation import stopping


@pytest.mark.parametrize("redirect", [">/dev/full", "| head -1", ">&-"])
def test_a_log_that_cannot_be_written_costs_no_cell(place, redirect):
    command = [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--representations", "stats"]
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join(command)} {redirect}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(visible(folder(place) / "checkpoints")) == 2 and (folder(place) / "results.txt").exists()


def test_a_terminal_without_the_signs_of_the_log_shows_others(place):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--representations", "stats"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and b"Results: Train=" in done.stdout


def default_signals():
    """A shell that runs the tests in the background has SIGINT ignored, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*flags, prefix=(), **kwargs):
    return subprocess.Popen(
        [
            *prefix,
            sys.executable,
            str(SCRIPT),
            "--dataset",
            "./loras",
            "--max-epochs",
            "1000000",  # the first run does not end by itself
            "--patience",
            "1000000",
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=default_signals,
        **kwargs,
    )


def wait_for(process, text):
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_a_run_with_their_status_and_release_the_folder(run, place, number, status):
    process = start("--representations", "stats")
    wait_for(process, "[1/2]")
    process.send_signal(number)
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == status and f"Stopped by {number.name}" in rest and "Traceback" not in rest
    assert json.loads((folder(place) / "manifest.json").read_text())["ended"] == number.name
    again, log = run("--representations", "stats")
    assert again == 0 and "another process" not in log
    assert not list((place / "visual-ablation-results").rglob("*.tmp"))


def test_a_stop_that_a_library_swallowed_ends_the_run_at_the_next_epoch(run, place, monkeypatch):
    def swallow(*arguments):
        with contextlib.suppress(SystemExit):
            stopping.stop(signal.SIGTERM, None)

    monkeypatch.setattr(stopping, "stopped_by", None)
    as_cells_begin(monkeypatch, at_the_third_call(swallow))
    with pytest.raises(SystemExit) as ended:
        run("--representations", "stats", "frequency")
    assert ended.value.code == 143 and len(visible(folder(place) / "checkpoints")) <= 2


def test_a_signal_that_a_library_makes_an_error_of_wins(run, place, monkeypatch, capsys):
    def swallow(*arguments):
        with contextlib.suppress(SystemExit):
            stopping.stop(signal.SIGTERM, None)
        raise ValueError("interrupted system call")

    monkeypatch.setattr(stopping, "stopped_by", None)
    as_cells_begin(monkeypatch, at_the_third_call(swallow))
    with pytest.raises(SystemExit) as ended:
        run("--representations", "stats", "frequency")
    log = capsys.readouterr().out
    assert ended.value.code == 143 and "FAILED" not in log and "Traceback" not in log
    finished = len(visible(folder(place) / "checkpoints"))
    assert "Stopped by SIGTERM" in log and finished <= 2
    manifest = json.loads((folder(place) / "manifest.json").read_text())
    assert manifest["ended"] == "SIGTERM" and manifest["exit_status"] is None
    assert len(manifest["cells_run"]) == finished
    last = json.loads((folder(place) / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["how"]) == ("ended", "SIGTERM")


def test_a_signal_while_the_data_is_opened_is_no_bad_input(run, monkeypatch):
    def swallow(*arguments):
        with contextlib.suppress(SystemExit):
            stopping.stop(signal.SIGTERM, None)
        raise ValueError("interrupted system call")

    monkeypatch.setattr(stopping, "stopped_by", None)
    monkeypatch.setattr("datasets.load_from_disk", swallow)
    with pytest.raises(SystemExit) as ended:
        run("--representations", "stats")
    assert ended.value.code == 143


def test_a_file_that_is_being_written_is_finished_before_a_signal_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "stopped_by", None)
    with pytest.raises(SystemExit), checkpointing.replacing(tmp_path / "a") as temporary:
        stopping.stop(signal.SIGTERM, None)
        temporary.write_bytes(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and visible(tmp_path) == ["a"]


LONG_CALL = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import hashlib
import checkpointing
from ablation import stopping
stopping.GRACE = float(sys.argv[1])
stopping.handle_signals()
with stopping.unstoppable():  # a signal that comes before the call does not end it either
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # one call of C, half an hour long
"""


@pytest.mark.parametrize("grace, sent, status", [(0.2, ["TERM"], 143), (1e6, ["INT", "INT"], 130)])
def test_a_long_call_of_a_library_does_not_hold_a_signal(tmp_path, grace, sent, status):
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_CALL, str(grace)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    wait_for(process, "ready")
    for name in sent:
        process.send_signal(getattr(signal, f"SIG{name}"))
        with contextlib.suppress(subprocess.TimeoutExpired):  # two at the same moment would be one
            process.wait(0.2)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == status and f"Stopped by SIG{sent[0]}" in said


@pytest.mark.slow
def test_under_nohup_a_hangup_is_ignored_and_the_log_has_whole_lines(place):
    lora_dataset(n=40).to_parquet("loras.parquet")  # datasets would draw a bar while it copies this
    process = start(
        "--num-runs",
        "1",
        "--hidden-dim",
        "8",
        "--max-epochs",
        "5",
        "--dataset",
        "loras.parquet",
        "--representations",
        "stats",
        "frequency",
        "--no-report",
        prefix=["nohup"],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_DATASETS_CACHE": str(place / "hf")},
    )
    log = wait_for(process, "[1/4]")
    process.send_signal(signal.SIGHUP)
    log += process.communicate(timeout=600)[0]
    assert (
        process.returncode == 0 and "\r" not in log and "Results: " in log and log.endswith("results.txt\n")
    )


def test_a_second_run_on_the_same_folder_ends_with_status_3(place):
    process = start("--representations", "stats")
    try:
        wait_for(process, "[1/2]")
        second = start()
        assert "another process holds" in second.communicate(timeout=600)[0] and second.returncode == 3
        third = start("--status")
        assert "PROGRESS SUMMARY" in third.communicate(timeout=600)[0] and third.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("flag", ["--help", "--status", "--dry-run"])
def test_questions_import_neither_torch_nor_datasets_and_write_nothing(place, flag):
    code = (
        f"import sys; sys.argv = ['x', '--dataset', './loras', {flag!r}]; sys.path.insert(0, {str(ROOT)!r})\n"
        "import visual_ablation_experiment as e\n"
        "try: status = e.main()\nexcept SystemExit as error: status = error.code\n"
        "assert status == 0 and not {'torch', 'datasets'} & set(sys.modules), sorted({'torch', 'datasets'} & "
        "set(sys.modules))"
    )
    before = visible(place)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert visible(place) == before
