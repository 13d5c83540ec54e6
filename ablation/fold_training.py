"""A cell trained in every fold of a cross-validation.

Each finished run is kept until the cell is finished, so that a kill loses the runs at work and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

import torch

from ablation.kept_runs import keep_run, kept_runs
from ablation.settings import TrainingSettings
from ablation.task import Listener, Run, Task, TrainedRuns
from ablation.training import one_thread_a_core
from checkpointing import Unfinished


class FoldRun(NamedTuple):
    """A run of a cross-validation: its number, its fold among those of the view, and its seed."""

    number: int
    fold: int
    seed: int


class FoldPlan(NamedTuple):
    """The runs of a cell. `task_of` makes the task of a fold, `train` trains one run on it, on `device`."""

    runs: list[FoldRun]
    task_of: Callable[[int], Task]
    train: Callable[[Task, FoldRun, Listener], TrainedRuns]
    device: str


def runs_by_round(folds: int, partitions: int, settings: TrainingSettings) -> list[FoldRun]:
    """The runs of the MLP. A round tests every row once, and takes the next partition of the rows."""
    return [
        FoldRun(number, number // folds % partitions * folds + number % folds, seed)
        for number, seed in enumerate(settings.seeds)
    ]


def train_folds(plan: FoldPlan, kept: Unfinished, listener: Listener) -> TrainedRuns:
    """Train the runs of the plan that `kept` does not have: on a CPU one a core, on a GPU one by one."""
    finished: dict[int, tuple[Run, int]] = {}

    def note(number: int, run: Run, width: int) -> None:
        finished[number] = run, width
        listener.on_run(run, len(finished))

    stored = kept_runs(kept, [one.number for one in plan.runs])
    for number, (run, width) in stored.items():
        note(number, run, width)
    missing = [one for one in plan.runs if one.number not in stored]
    # As many for the last runs as for all, so that a run's rounding does not depend on how many are missing.
    most = len(plan.runs) if torch.device(plan.device).type == "cpu" else 1
    workers = min(torch.get_num_threads(), most)
    pending: dict[Future, FoldRun] = {}

    def collect(futures: Iterable[Future]) -> None:
        for future in futures:
            one, trained = pending.pop(future), future.result()
            (run,) = trained.runs
            run.fold, run.seed = one.fold, one.seed
            keep_run(kept, one.number, run, trained.trained_dim)
            note(one.number, run, trained.trained_dim)

    with one_thread_a_core(workers) as pool:
        for one in missing:
            task = plan.task_of(one.fold)
            if len(pending) == workers:
                collect(wait(pending, return_when=FIRST_COMPLETED).done)
            pending[pool.submit(plan.train, task, one, Listener(on_epoch=listener.on_epoch))] = one
        while pending:
            collect(wait(pending, return_when=FIRST_COMPLETED).done)
    runs = [finished[one.number] for one in plan.runs]
    return TrainedRuns([run for run, _ in runs], max(width for _, width in runs))
