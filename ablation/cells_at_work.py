"""The missing cells of an experiment: begun the longest first, trained run by run on all cores, saved when
their last run is in.

Runs of several cells are at work at a time. The log has the lines of one cell after those of another all the
same: a cell's lines are held back until those that began before it are finished.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator

import torch

from ablation.cell_columns import Features
from ablation.cells import Cell, groups_of
from ablation.context import Context, Ledger
from ablation.distributed import columns_expected, groups_in_turn, longest_first, sizes_of
from ablation.failures import noting_failures
from ablation.log import HeldLines, Progress
from ablation.memory import free_memory
from ablation.planned_runs import PlannedRuns, Train
from ablation.provenance import announce_finished, computed_by
from ablation.runs import PreparedCells, plan_runs, prepare_cells, save_cell, takes_all_cores
from ablation.streamed import Matrix
from ablation.task import TrainedRuns, TrainingError
from ablation.training import COPIES
from ablation.work_pool import Job, Pool
from checkpointing import Unfinished, crash_point

log = logging.getLogger("visual_ablation")


def train_cells(
    context: Context, ledger: Ledger, cells: list[Cell], features: Features
) -> Generator[list[Cell]]:
    """Train, score and save cells, and note those that fail.

    Yields each cell with its audits, which share its runs, when they are saved or failed. What the caller
    logs then stands with their lines.
    """
    clock, began, in_features = context.clock, time.perf_counter(), context.clock.by_stage["features"]
    runs_of_cell = context.settings.training.num_runs
    # As many threads for the last runs as for all, so that rounding does not depend on how many are missing.
    most = len(groups_of(ledger.cells)) * runs_of_cell
    pool: Pool[Group] = Pool(max(1, min(torch.get_num_threads(), most)))
    try:
        with Progress(len(groups_of(cells)) * runs_of_cell, "runs") as progress, pool:
            work = CellsAtWork(context, ledger, features, pool, progress)
            with work.locks, contextlib.closing(work):
                for group in pool.finished(work.begin(cells)):
                    with group.lines.taken():
                        work.save(group)
                        yield group.cells
                    work.show_lines()
    finally:
        in_features -= clock.by_stage["features"]
        clock.add("training", time.perf_counter() - began + in_features)


class Group(PlannedRuns):
    """A cell and its audits, which share its runs. `missing` are those of them that this process computes."""

    def __init__(self, cells: list[Cell], size: float):
        super().__init__()
        self.cells, self.size = cells, size  # bytes that it takes in memory
        self.missing: list[Cell] = []
        self.lines, self.locks = HeldLines(), contextlib.ExitStack()
        self.prepared: PreparedCells | None = None
        self.is_over = False

    def jobs(self) -> Iterator[Job]:
        """The jobs of missing runs. What is logged of runs that an earlier command kept is the cell's."""
        jobs = super().jobs()
        while True:
            with self.lines.taken():
                job = next(jobs, None)
            if job is None:
                return
            yield job

    def train(self, place: int, train: Train) -> tuple[int, TrainedRuns]:
        """Train a run, whose lines in the log are the cell's."""
        with self.lines.taken():
            return super().train(place, train)

    def note(self, result: tuple[int, TrainedRuns]) -> None:
        """Take a run, whose line in the log is the cell's."""
        with self.lines.taken():
            super().note(result)


class CellsAtWork:
    """Begins and saves the groups of cells whose runs a pool trains."""

    def __init__(
        self, context: Context, ledger: Ledger, features: Features, pool: Pool[Group], progress: Progress
    ):
        self.context, self.ledger, self.features = context, ledger, features
        self.pool, self.progress = pool, progress
        self.locks = contextlib.ExitStack()
        self.begun: deque[Group] = deque()  # whose lines are not all shown

    def begin(self, cells: list[Cell]) -> Iterator[Group | None]:
        """Yields groups with their runs; None where the pool should finish first what is at work."""
        context = self.context
        sizes = sizes_of(context)
        is_part, on_cpu = context.actions.is_unit, context.device == "cpu"
        groups = longest_first(cells, sizes) if on_cpu or is_part else groups_of(cells)
        if not is_part:  # what needs all cores comes last: until then runs fill them
            groups.sort(key=lambda group: takes_all_cores(context, group[0]))
        room = self.room()
        for own in groups_in_turn(context, groups):
            if not own:  # others may wait for what is at work here
                yield None
                continue
            size = COPIES * 4 * sizes.num_rows * columns_expected(own[0], sizes)
            others = sum(batch.size for batch in set(self.pool.at_work.values()))
            if takes_all_cores(context, own[0]) or (others and others + size > room):
                yield None
            yield self.begun_with(own, size)

    def room(self) -> float:
        """Bytes of memory for cells."""
        return self.context.settings.memory_gb * 1e9 or free_memory()

    def runs_that_fit(self, features: Matrix) -> int:
        """How many runs of a cell may be at work at a time. In a cross-validation each has copies of its own;
        otherwise all share them.
        """
        if not self.context.settings.folds or not isinstance(features, torch.Tensor):
            return sys.maxsize
        copies = (COPIES - 1) * features.numel() * features.element_size()
        return max(1, int(min(self.room() // copies, sys.maxsize)))

    def begun_with(self, cells: list[Cell], size: float) -> Group:
        """Lock and prepare what is missing of some cells, and plan their runs."""
        context, ledger, store = self.context, self.ledger, self.context.store
        group = Group(cells, size)
        self.begun.append(group)
        self.locks.enter_context(group.locks)
        self.show_lines()
        computable = [cell for cell in cells if cell not in ledger.failures]
        with group.lines.taken(), noting_failures(context, ledger, computable):
            group.locks.enter_context(store.locking(cell.name for cell in computable))
            # Another process may have finished a cell while this one waited for the lock.
            own = [cell for cell in computable if store.state(cell.name, ledger.inputs[cell]).kind != "done"]
            if own:
                all_cores = takes_all_cores(context, own[0])
                with self.pool.all_cores() if all_cores else contextlib.nullcontext():
                    group.prepared = prepare_cells(context, own, self.features)
                number = ledger.cells.index(own[0]) + 1
                names, columns = " + ".join(cell.name for cell in own), group.prepared.task.features.shape[1]
                log.info(f"\n[{number}/{len(ledger.cells)}] {names}: {columns} columns")
                made_with = {cell.name: ledger.inputs[cell] for cell in own} | computed_by(context.device)
                kept = Unfinished(store.folder, own[0].trained.name, made_with)
                plan_runs(context, group.prepared, group, kept, self.progress)
                group.most = self.runs_that_fit(group.prepared.task.features)
                group.missing = own
        return group

    def save(self, group: Group) -> None:
        """Save the cells of a group whose runs are trained, and let it go."""
        context, ledger, store = self.context, self.ledger, self.context.store
        missing = [cell for cell in group.missing if cell not in ledger.failures]
        with noting_failures(context, ledger, missing):
            if missing and group.prepared is not None:
                trained = group.trained()
                for cell in missing:
                    record = save_cell(context, cell, group.prepared, trained, ledger.inputs[cell])
                    crash_point("committed")
                    announce_finished(store.folder, cell, record)
                store.remove_unfinished_of([missing[0].trained.name])
        for other in self.begun:  # a disk that takes no results makes all others fail
            if other.missing and ledger.failures.keys() >= set(other.missing):
                other.fail(TrainingError("its results could not be saved"))
        group.locks.close()
        group.is_over = True
        group.planned, group.prepared = [], None  # they hold its columns

    def show_lines(self) -> None:
        """Show the lines of the cell that began first, and of those after it whose turn that makes it."""
        while self.begun:
            self.begun[0].lines.show()
            if not self.begun[0].is_over:
                return
            self.begun.popleft()

    def close(self) -> None:
        """Show all lines: those of cells whose turn does not come any more, too."""
        for group in self.begun:
            group.lines.show()
