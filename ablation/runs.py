"""One cell and its audits: columns, trained runs, record, files."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ablation.catalogue import PARTS, SPECS
from ablation.cell_columns import Features, refuse_non_finite_features
from ablation.cells import Cell
from ablation.collection import View
from ablation.context import Context
from ablation.fingerprints import data_settings
from ablation.log import Progress
from ablation.planned_runs import FoldRun, PlannedRun, PlannedRuns, Train, runs_by_round
from ablation.provenance import made_on
from ablation.scores import audit_record, cell_record, prediction_arrays, run_scores, variant_arrays
from ablation.splits import Split
from ablation.stopping import end_if_stopped
from ablation.streamed import Matrix
from ablation.task import Listener, Run, Task, TrainedRuns
from ablation.training import Watch, may_fork, prepare, runs_of_seeds, train_alone, train_runs
from checkpointing import Unfinished

log = logging.getLogger("visual_ablation")


class PreparedCells(NamedTuple):
    """A trained cell and its audits, ready for training:
    what is learned, and how far each audit moved the features.
    """

    cell: Cell
    view: View
    task: Task  # in cross-validation that of the first fold
    task_of: Callable[[int], Task]  # of a fold
    changes: dict[str, dict[str, dict[str, float]]]  # audit -> variant -> largest and rms
    audited: dict[str, np.ndarray]  # audit -> whether each row is changed, (N,)


def prepare_cells(context: Context, cells: list[Cell], features: Features) -> PreparedCells:
    """The columns of cells that share their trained runs. Raises TrainingError if a feature is not finite."""
    cell = cells[0].trained
    audits = [features.audits[audited.audit] for audited in cells if audited.audit]
    view = context.view_of(cell)

    def columns_of(view: View) -> tuple[Matrix, dict[str, Matrix]]:
        with context.clock("features"), Progress(None, f"computing {cell.representation}"):
            x, changed = features.columns_of(cell, audits, view)
            refuse_non_finite_features(x, cell, context.data)
        return x, changed

    x, changed = columns_of(view)
    changes = {audit.name: audit.changes(x, changed[audit.name], view.split.train) for audit in audits}
    if SPECS[cell.representation].fitted:  # such a representation reads the weights only now
        context.data.files.refuse_changes()

    def extra_of(split: Split, changed: dict[str, Matrix]) -> dict[str, Matrix]:
        """The changed rows that come from a split's test rows, by audit and variant."""
        return {
            f"{audit.name} {variant}": changed[audit.name][audit.positions(variant, audit.among(split.test))]
            for audit in audits
            if audit.is_changed[split.test].any()
            for variant in audit.variants
        }

    task = Task(
        x, view.labels, view.split, len(context.data.classes), extra_of(view.split, changed), view.is_weighted
    )

    def task_of(fold: int) -> Task:
        of_fold = view.fold(fold)
        is_fitted = fold > 0 and SPECS[cell.representation].fitted
        own, own_changed = columns_of(of_fold) if is_fitted else (x, changed)
        return task._replace(features=own, split=of_fold.split, extra=extra_of(of_fold.split, own_changed))

    audited = {audit.name: audit.is_changed for audit in audits}
    return PreparedCells(cell, view, task, task_of, changes, audited)


def takes_all_cores(context: Context, cell: Cell) -> bool:
    """True if a cell is prepared or trained by all cores at once, or on a GPU, and not by a core a run."""
    return SPECS[cell.representation].fitted or is_trained_in_turn(context, cell)


def is_trained_in_turn(context: Context, cell: Cell) -> bool:
    """True if the runs of a cell are trained by all cores at once, or on a GPU."""
    at_once = cell.own_classifier or context.settings.training.trainer == "packed"
    return context.device != "cpu" or bool(at_once and not context.settings.folds)


def plan_runs(
    context: Context, prepared: PreparedCells, runs: PlannedRuns, kept: Unfinished, progress: Progress
) -> None:
    """Plan the runs of a cell, with a line in the log for each run.

    `kept` has what an earlier command trained of it, and gets what this one trains.
    """
    cell, settings, folds = prepared.cell, context.settings.training, prepared.view.folds
    is_pack = settings.trainer == "packed" and not (folds or cell.own_classifier)

    def on_run(run: Run, number: int) -> None:
        scores, _ = run_scores(prepared.view.labels_by_part(run.fold), run, prepared.task.num_classes)
        log.info(
            f"Run {number}/{count}: Train={scores['train_acc']:.4f}, Val={scores['val_acc']:.4f}, "
            f"Test={scores['test_acc']:.4f}, Time={run.seconds:.1f}s"
        )
        progress.advance(settings.num_runs / count)

    def on_epoch(run: Run) -> None:
        end_if_stopped()
        progress.note = f"epoch {len(run.train_loss)} of the run with seed {run.seed}"

    listener = Listener(on_epoch=on_epoch)
    if folds:
        runs.planned = planned_folds(context, prepared, listener)
    elif cell.own_classifier:
        runs.planned = [PlannedRun(0, lambda: lambda stop: train_classifier(cell, prepared.task))]
    elif is_pack:
        pack = functools.partial(train_runs, prepared.task, settings, context.device, listener, kept)
        runs.planned = [PlannedRun(0, lambda: lambda stop: pack())]
    else:
        ready = functools.cache(lambda: prepare(prepared.task, context.device))
        runs.planned = runs_of_seeds(ready, settings, listener)
    runs.on_run, count = on_run, settings.num_runs if is_pack else len(runs.planned)
    runs.kept = None if is_pack else kept  # a pack keeps itself
    runs.in_turn = is_trained_in_turn(context, cell)
    # scikit-learn has threads of its own
    runs.may_fork = may_fork(settings) and not cell.own_classifier


def planned_folds(context: Context, prepared: PreparedCells, listener: Listener) -> list[PlannedRun]:
    """The runs of a cross-validation, of a classifier one a fold."""
    settings, cell = context.settings, prepared.cell
    folds = runs_by_round(settings.folds, settings.partitions, settings.training)
    if cell.own_classifier:
        folds = [FoldRun(number, number, number) for number in range(len(prepared.view.folds))]

    def begin(one: FoldRun) -> Train:
        task = prepared.task_of(one.fold)
        alone = dataclasses.replace(settings.training, num_runs=1, seed=one.seed)

        def train(stop: threading.Event) -> TrainedRuns:
            if cell.own_classifier:
                trained = train_classifier(cell, task)
            else:
                trained = train_alone(task, alone, context.device, Watch(stop, listener))
            (run,) = trained.runs
            run.fold, run.seed = one.fold, one.seed
            return trained

        return train

    return [PlannedRun(one.number, functools.partial(begin, one)) for one in folds]


def train_classifier(cell: Cell, task: Task) -> TrainedRuns:
    """The run of a classifier in place of the MLP."""
    from ablation.classifiers import TRAINERS

    return TRAINERS[cell.own_classifier](task, Listener())


def save_cell(
    context: Context, cell: Cell, prepared: PreparedCells, trained: TrainedRuns, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Log and save the result of a cell or of an audit;
    `inputs` are what its numbers depend on. Returns its record.
    """
    task, view, data = prepared.task, prepared.view, context.data
    sizes = {"num_layers": len(data.layers.positions(cell.layer_set)), "feature_dim": task.features.shape[1]}
    record = cell_record(cell, trained, view, task.num_classes, sizes)
    arrays = prediction_arrays(trained, view)
    if cell.audit:
        changes, audited = prepared.changes[cell.audit], prepared.audited[cell.audit]
        record |= audit_record(cell, trained, view, audited, changes)
        arrays |= variant_arrays(cell, trained, view, audited, list(changes))
        log.info(f"Audit {cell.audit}: {audit_line(record)}")
    else:
        log.info(f"Results: {result_line(record)}")
    record |= {"asked": data_settings(context.settings, cell), "made_on": made_on(context.device)}
    context.store.save(cell.name, record, arrays, inputs)
    return record


def result_line(record: dict[str, Any]) -> str:
    """Accuracies of a cell, for the log."""
    accuracies = [f"{part.title()}={mean_and_std_text(record, f'{part}_acc')}" for part in PARTS]
    epoch, columns = record["best_epoch_mean"], record["trained_dim"]
    return f"{', '.join(accuracies)}, best epoch {epoch:.0f}, {columns} columns trained"


def audit_line(record: dict[str, Any]) -> str:
    """Test accuracies of an audit, for the log."""
    variants = [
        f"{variant}={mean_and_std_text(scores, 'test_acc')}" for variant, scores in record["variants"].items()
    ]
    return ", ".join([f"Test={mean_and_std_text(record, 'test_acc')}", *variants])


def mean_and_std_text(scores: dict[str, Any], key: str) -> str:
    """Mean and std over the runs, as 0.1234±0.0123."""
    return f"{scores[f'{key}_mean']:.4f}±{scores[f'{key}_std']:.4f}"
