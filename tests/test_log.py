"""Lines of the log and progress."""

import contextlib
import fcntl
import logging
import os
import pty
import queue
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from running import BOTH, FAST, SCRIPT

import visual_ablation_experiment as experiment
from ablation import log as program_log
from ablation.cells import Cell
from ablation.log import Progress, duration


@pytest.mark.slow
def test_silence_is_broken_by_a_whole_line(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SILENCE", 0.0)
    experiment.log_to_stdout()
    said = queue.SimpleQueue()
    heard = logging.Handler()
    heard.emit = lambda record: said.put(record.getMessage())
    monkeypatch.setattr(program_log.log, "handlers", [*program_log.log.handlers, heard])

    def next_line(start):
        while not (line := said.get(timeout=600)).startswith(start):
            pass
        return line

    with Progress(128, "layers") as progress:
        progress.advance(80)
        assert " layers/s | ETA: " in next_line("Progress: 80/128 layers | Rate: ")
    with Progress(10, "runs") as progress:
        progress.note = "epoch 7"
        while not next_line("Progress: 0/10 runs | ").endswith("| epoch 7"):
            pass
    with Progress(None, "loading"):
        next_line("Progress: loading | ")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all(line.startswith("Progress: ") for line in lines)


def test_slow_work_has_a_rate_too():
    progress = Progress(10, "runs")
    progress.started -= 1000
    progress.advance(2)
    assert progress.line() == "Progress: 2/10 runs | Rate: 7.2 runs/h | ETA: 1h06m"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (6.4, "6s"), (130, "2m10s"), (3900, "1h05m"), (-1, "0s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_under_a_terminal_there_are_bars_and_the_lines_stand_above_them(place):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--representations", "stats"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal closes with the process
        while part := os.read(controller, 4096):
            shown += part
    os.close(controller)
    assert process.wait() == 0
    text = shown.decode()
    assert (
        "\r" in text.replace("\r\n", "\n")
        and "0/4 runs [" in text
        and "Run 2/2: Train=" in text
        and " | Rate: " not in text
    )


def test_cell_names_are_the_files_names():
    assert Cell("stats", "visual_only").name == "visual_only_stats"
    assert Path("checkpoints", f"{BOTH[0].name}.json") == Path("checkpoints/all_layers_simple_stats.json")
