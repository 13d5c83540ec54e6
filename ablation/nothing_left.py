"""A finished command, given again: answered by the files of its output folder, without opening the data set.

A run whose cells are all finished leaves a hidden record of what its outcome depends on: settings, the
program, versions of packages, the machine's devices, sizes and times of the data files, and hashes of the
checkpoints, predictions and results. If all of it is as it was, the same command has nothing to find out.
Whatever differs, or cannot be read, sends the command the usual way, which opens the data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation.actions import Actions
from ablation.analysis_plan import analysis_plan, stated_plan
from ablation.cells import Cell
from ablation.command_line import typed_command
from ablation.fingerprints import requested_inputs
from ablation.log import Clock
from ablation.provenance import announce, versions
from ablation.settings import Settings
from ablation.sources import resolve_name
from ablation.status import print_progress_summary, print_results
from checkpointing import (
    FOLDERS,
    SETTLED,
    CannotWrite,
    ResultStore,
    event_in,
    file_stamps,
    hash_of,
    read_bytes,
    read_own,
    with_checksum,
    write_json,
)

if TYPE_CHECKING:
    from ablation.context import Context, Ledger

log = logging.getLogger("visual_ablation")

PROGRAM_FOLDER = Path(__file__).resolve().parent.parent
RECORD = ".finished.json"
RESULTS = ("results.json", "results.txt", "manifest.json")
UNIMPORTANT_ACTIONS = ("argv", "rerun_stale")  # with every cell finished nothing is stale
DEVICE_FILES = ("/dev/nvidia*", "/dev/kfd", "/dev/dri/*", "/dev/dxg")  # of GPUs, by any driver
# Begins the line of a command that hashed the weights, which this one does not.
HASH_LINE = "Content hash of "
VARIABLES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HF_", "XDG_")  # which devices are seen; where copies lie


class FinishedBefore:
    """What a command is about to do, and the record of one that did it before."""

    def __init__(self, settings: Settings, actions: Actions):
        self.settings, self.actions = settings, actions
        self.folder = settings.output_folder
        self.clock = Clock()
        self.began = time.time_ns()
        self.is_possible = not (actions.is_unit or actions.has_workers or settings.streaming)
        self.sources, self.source_stamps = self.present_sources()
        self.surroundings = hash_of(surroundings()) if self.sources else ""
        self.lines: list[list] = []
        self.record: dict[str, Any] = {}

    def present_sources(self) -> tuple[list[str], list]:
        """The files of the data set and their sizes and times; none if the command must open it anyway."""
        try:
            sources = source_files(self.settings.dataset) if self.is_possible else []
            return sources, file_stamps(sources)
        except OSError:  # a file vanished: opening the data set tells of it
            return [], []

    def depends_on(self, cells: list[Cell]) -> str:
        """A hash of what the outcome depends on, but for files of the data set and of the output folder."""
        asked = dataclasses.asdict(self.actions)
        for name in UNIMPORTANT_ACTIONS:
            del asked[name]
        inputs = [requested_inputs(self.settings, cell) for cell in cells]
        return hash_of([self.surroundings, dataclasses.asdict(self.settings), asked, inputs])

    # --- a command that may find nothing to do

    def is_unchanged(self) -> bool:
        """True if a command like this one finished, and everything that it depends on is as it was."""
        if not self.sources:
            return False
        try:
            self.record = read_own(self.folder / RECORD)
            return bool(self.record) and self.agrees_with(self.record)
        except (OSError, ValueError, KeyError, TypeError):  # damaged or gone: the usual way tells of it
            return False

    def agrees_with(self, record: dict[str, Any]) -> bool:
        """True if a record tells of present files and of this command. Raises OSError, ValueError, KeyError
        or TypeError for one that is not as `remember` writes it, and for files that are gone.
        """
        events = read_bytes(self.folder / "events.jsonl")
        return (
            record["depends_on"] == self.depends_on([Cell(*fields) for fields in record["cells"]])
            and record["sources"] == self.source_stamps
            and record["read_stamps"] == file_stamps(record["read"])
            and record["files"] == hashes_of(self.folder)
            and record["stated"] == stated_plan(self.folder, record["plan"])
            and events.endswith(b"\n")
            and all(map(event_in, events.splitlines()))
            and not (self.folder / ".unfinished").exists()
        )

    def show(self) -> int:
        """Say what the usual way says where nothing is left to do, and note it in the events.
        Returns the exit status.
        """
        ResultStore(self.folder).check()
        text = read_bytes(self.folder / "results.txt").decode()
        for level, line in self.record["lines"]:
            log.log(level, line)
        print_progress_summary([Cell(*fields) for fields in self.record["cells"]], [])
        plan = self.record["stated"]["hash"]
        announce(self.folder, "started", command=typed_command(), cells=[], plan=plan)
        announce(self.folder, "ended", status=0, seconds=self.clock.seconds)
        print_results(self.folder, text, self.clock, self.actions.report)
        return 0

    # --- a command that goes the usual way

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Remember what is logged of the data set in a block of a `with` statement."""
        heard = Heard(self.lines)
        log.addHandler(heard)
        try:
            yield
        finally:
            log.removeHandler(heard)

    def remember(self, context: Context, ledger: Ledger) -> None:
        """Leave the record of this command, whose cells are all finished, if it is certain.

        Data files must be older than the command, so that no later change could carry the same times, and
        every checkpoint of the folder must be current. What `datasets` copied is a file of its own cache.
        """
        files, store = context.data.files, context.store
        newest = max((max(mtime, ctime) for _, _, mtime, ctime, _ in self.source_stamps), default=0)
        if not self.sources or newest >= self.began - SETTLED * 1e9:
            return
        try:
            hashes = hashes_of(self.folder)
            unchanged = file_stamps(source_files(self.settings.dataset)) == self.source_stamps
            unchanged = unchanged and file_stamps(files.paths) == files.stamps
        except OSError as error:
            log.info(f"The next command will open the data set again: {error}")
            return
        states = [store.state(cell.name, inputs).kind for cell, inputs in ledger.inputs.items()]
        if not unchanged or set(states) != {"done"}:
            return
        plan = analysis_plan(context.settings, context.data)
        record = {
            "depends_on": self.depends_on(ledger.cells),
            "cells": [list(cell) for cell in ledger.cells],
            "sources": self.source_stamps,
            "read": files.paths,
            "read_stamps": files.stamps,
            "files": hashes,
            "plan": plan,
            "stated": stated_plan(self.folder, plan),
            "lines": self.lines,
        }
        try:
            write_json(self.folder / RECORD, with_checksum(record))
        except CannotWrite as error:
            log.warning(f"the next command will open the data set again: {error}")


class Heard(logging.Handler):
    """Adds level and text of this thread's lines to a list, but for what this command alone did."""

    def __init__(self, lines: list[list]):
        super().__init__()
        self.lines, self.own_thread = lines, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        line = record.getMessage()
        if record.thread == self.own_thread and not line.startswith(HASH_LINE):
            self.lines.append([record.levelno, line])


def source_files(dataset: str) -> list[str]:
    """Every file of a local data set, whether it is read or not; none of one that is generated or on the Hub.
    Raises InputError for a name that is no data set's.
    """
    kind, location = resolve_name(dataset)
    if kind not in ("disk", "files"):
        return []
    path = Path(location)
    return [str(file) for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]


def surroundings() -> list:
    """The program, the packages, and the devices that a command finds: without torch, by their files."""
    modules = [
        *PROGRAM_FOLDER.glob("*.py"),
        *PROGRAM_FOLDER.glob("ablation/**/*.py"),
        *PROGRAM_FOLDER.glob("ablation/**/*.j2"),
    ]
    program = [
        [str(file.relative_to(PROGRAM_FOLDER)), hash_of(file.read_bytes())] for file in sorted(modules)
    ]
    devices = sorted(file for pattern in DEVICE_FILES for file in glob.glob(pattern))
    variables = sorted(item for item in os.environ.items() if item[0].startswith(VARIABLES))
    return [program, versions(), socket.gethostname(), devices, variables]


def hashes_of(folder: Path) -> dict[str, str]:
    """Hashes of the checkpoints, predictions and results in an output folder, by name. Raises OSError."""
    names = [
        f"{part}/{name}" for part in FOLDERS for name in sorted(os.listdir(folder / part)) if name[0] != "."
    ]
    return {name: hash_of(read_bytes(folder / name)) for name in [*names, *RESULTS]}
