"""Processes that run a part of an experiment: how they are started, what they say, and one for each device.

Each takes cells that nobody else holds, until none is left (see `distributed`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ablation.cells import Cell
from ablation.distributed import PART_BEGINS, WORKER, longest_first, sizes_of
from ablation.log import Progress
from ablation.memory import free_memory
from ablation.stopping import cleaners, end_if_stopped
from checkpointing import is_locked, lock_path, locked

if TYPE_CHECKING:
    from ablation.context import Context

log = logging.getLogger("visual_ablation")

PROGRAM = Path(__file__).resolve().parent.parent / "visual_ablation_experiment.py"
LAST_LINES = 5  # of a process that ended before it
RESTARTS = 2  # of a process that was killed
POLL_SECONDS = 0.2
STOP_SECONDS = 3.0  # from a signal to the processes until they are killed


def command_of(context: Context, device: str, *part: str) -> list[str]:
    """The command of this process as a part on a device."""
    typed, kept, dropping = context.actions.argv, [], False
    for word in typed:
        if word.startswith("-"):
            dropping = word.split("=")[0] in ("--devices", "--ray")
        if not dropping:
            kept.append(word)
    return [str(PROGRAM), *kept, "--device", device, *part]


def environment_of(threads: int) -> dict[str, str]:
    """The variables of a worker's process, which shares the cores with others."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**dict.fromkeys(names, str(max(threads, 1))), "PYTHONUNBUFFERED": "1"}


def start_process(
    command: list[str], environment: dict[str, str], folder: str | None = None
) -> subprocess.Popen:
    """Start a command of Python, whose lines can be read."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment, WORKER: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def news_of(process: subprocess.Popen) -> Iterator[str]:
    """The lines of a worker, without those that the experiment has written itself; of a process that ended
    before it began its part, the last ones.
    """
    before: list[str] = []
    has_begun = False
    assert process.stdout is not None
    for line in process.stdout:
        text = line.rstrip("\n")
        if has_begun and text:
            yield text
        has_begun = has_begun or text.startswith(PART_BEGINS)
        before.append(text)
    if not has_begun:
        yield from before[-LAST_LINES:]


# --- one process a device


class Worker:
    """A process that runs cells on one device."""

    def __init__(self, label: str, command: list[str], threads: int):
        self.label, self.command, self.threads = label, command, threads
        self.restarts = 0
        self.start()

    def start(self) -> None:
        """Start the process, and a thread that logs its lines."""
        self.process = start_process(self.command, environment_of(self.threads))
        self.reader = threading.Thread(target=self.show, args=(self.process,), daemon=True)
        self.reader.start()

    def show(self, process: subprocess.Popen) -> None:
        """Log the news of a process."""
        for line in news_of(process):
            log.info(f"[{self.label}] {line}")

    def is_at_work(self) -> bool:
        """True until the process has ended; one that was killed is started again, RESTARTS times."""
        status = self.process.poll()
        if status is None:
            return True
        self.reader.join()
        if status >= 0:
            return False
        name = signal.Signals(-status).name
        if self.restarts == RESTARTS:
            log.error(
                f"the process on {self.label} was ended by {name} again: its cells are left to the others"
            )
            return False
        self.restarts += 1
        log.warning(f"the process on {self.label} was ended by {name}: it is started again")
        self.start()
        return True

    def stop(self, number: int) -> None:
        """Send a signal to the process, if it is there."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


def run_on_devices(context: Context, cells: list[Cell]) -> None:
    """Run cells by one process for each of --devices."""
    import torch

    devices, store = context.actions.devices, context.store
    threads = torch.get_num_threads() // len(devices)
    shares = part_names(context, cells, len(devices))
    labels = [f"{number} {device}" for number, device in enumerate(devices, 1)]
    log.info(f"{len(cells)} cells on {', '.join(labels)}")
    room = (context.settings.memory_gb or free_memory() / 1e9) / len(devices)
    share = ("--memory-gb", f"{room:.3f}") if room < math.inf else ()
    workers = [
        Worker(label, command_of(context, device, *share, "--cells", *names), threads)
        for label, device, names in zip(labels, devices, shares, strict=True)
        if names
    ]

    def kill() -> None:
        for worker in workers:
            worker.stop(signal.SIGKILL)

    cleaners.append(kill)
    try:
        with Progress(len(cells), "cells") as progress:
            while [worker for worker in workers if worker.is_at_work()]:
                end_if_stopped()
                progress.done = sum(store.path(cell.name).exists() for cell in cells)
                time.sleep(POLL_SECONDS)
    finally:
        stop_all(workers)
        cleaners.remove(kill)


def stop_all(workers: list[Worker]) -> None:
    """End processes that are still at work, and wait for them."""
    for worker in workers:
        worker.stop(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(deadline - time.monotonic(), 0))
        worker.stop(signal.SIGKILL)
        worker.process.wait()


def part_names(context: Context, cells: list[Cell], count: int) -> list[list[str]]:
    """The names of the cells that each of `count` processes may run: all, because each takes those that no
    other holds; or, where the file system has no locks, shares of them.
    """
    groups = longest_first(cells, sizes_of(context))
    if locks_work(context.store.folder):
        return [[cell.name for group in groups for cell in group]] * count
    log.warning("the file system of the output folder has no locks: each process gets a share of the cells")
    return [[cell.name for group in groups[number::count] for cell in group] for number in range(count)]


def locks_work(folder: Path) -> bool:
    """True if a lock in this folder is seen by others."""
    try:
        with locked(folder / "probe"):
            return is_locked(folder / "probe")
    finally:
        lock_path(folder / "probe").unlink(missing_ok=True)
