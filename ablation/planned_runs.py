"""The runs of a cell, each of which any core may train.

Each finished run is kept until the cell is finished, so that a kill loses the runs at work and no others.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ablation.kept_runs import keep_run, kept_runs, run_arrays, run_of
from ablation.settings import TrainingSettings
from ablation.task import Listener, Run, TrainedRuns
from ablation.work_pool import Batch, Job
from checkpointing import Unfinished

OnRun = Callable[[Run, int], None]
Train = Callable[[threading.Event], TrainedRuns]


SILENT = Listener()


class PlannedRun(NamedTuple):
    """A run, kept under the number `key`; or a pack of runs.

    `begin()` is called when a core will soon be free. What it returns trains the run in any thread, and ends
    with a TrainingError once the event is set.
    """

    key: int
    begin: Callable[[], Train]


class PlannedRuns(Batch):
    """The runs of a cell. Those that `kept` has are not trained again; `kept` gets the others.

    `on_run(run, number)` is told of finished runs in their order, number from 1.
    """

    def __init__(
        self,
        planned: list[PlannedRun] | None = None,
        on_run: OnRun = SILENT.on_run,
        kept: Unfinished | None = None,
        in_turn: bool = False,
    ):
        super().__init__()
        self.planned, self.on_run, self.kept, self.in_turn = planned or [], on_run, kept, in_turn
        self.finished: dict[int, TrainedRuns] = {}  # by the place among those planned
        self.told = 0

    def jobs(self) -> Iterator[Job]:
        """Train the runs that are missing."""
        stored = kept_runs(self.kept, [one.key for one in self.planned])
        for place, one in enumerate(self.planned):
            if one.key in stored:
                run, trained_dim = stored[one.key]
                self.tell(place, TrainedRuns([run], trained_dim))
            else:
                yield functools.partial(self.train, place, one.begin())

    def train(self, place: int, train: Train) -> tuple[int, TrainedRuns]:
        """Train a run."""
        return place, train(self.stop)

    def to_bytes(self, result: tuple[int, TrainedRuns]) -> bytes:
        """A run as an archive of arrays."""
        place, trained = result
        (run,) = trained.runs
        numbers: dict[str, Any] = {"place": np.array(place), "trained_dim": np.array(trained.trained_dim)}
        file = io.BytesIO()
        np.savez(file, **(numbers | run_arrays(run)))
        return file.getvalue()

    def from_bytes(self, content: bytes) -> tuple[int, TrainedRuns]:
        """The run that `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found = dict(arrays)
        return int(found["place"]), TrainedRuns([run_of(found)], int(found["trained_dim"]))

    def note(self, result: tuple[int, TrainedRuns]) -> None:
        """Take and keep a run, and tell of it when all before it are finished."""
        place, trained = result
        if self.kept is not None:
            (run,) = trained.runs
            keep_run(self.kept, self.planned[place].key, run, trained.trained_dim)
        self.tell(place, trained)

    def tell(self, place: int, trained: TrainedRuns) -> None:
        """Tell of a finished run when all before it are finished."""
        self.finished[place] = trained
        while self.told in self.finished:
            number = sum(len(self.finished[before].runs) for before in range(self.told))
            for run in self.finished[self.told].runs:
                number += 1
                self.on_run(run, number)
            self.told += 1

    def trained(self) -> TrainedRuns:
        """All runs, in order. Raises the error of the first one that failed."""
        if self.error is not None:
            raise self.error
        in_order = [self.finished[place] for place in range(len(self.planned))]
        runs = [run for one in in_order for run in one.runs]
        return TrainedRuns(runs, max(one.trained_dim for one in in_order))


class FoldRun(NamedTuple):
    """A run of a cross-validation: its number, its fold among those of the view, and its seed."""

    number: int
    fold: int
    seed: int


def runs_by_round(folds: int, partitions: int, settings: TrainingSettings) -> list[FoldRun]:
    """The runs of the MLP. A round tests every row once, and takes the next partition of the rows."""
    return [
        FoldRun(number, number // folds % partitions * folds + number % folds, seed)
        for number, seed in enumerate(settings.seeds)
    ]
