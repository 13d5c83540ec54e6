"""Columns of all modules -> what the visual, the text and each random half of them tell of the class.

A closed-form reader (`ridge.py`) reads every half by the folds or the split of a view.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ablation.catalogue import NULL_SETS
from ablation.collection import View
from ablation.halves import ModuleSets
from ablation.ridge import RidgeReader, RidgeTask
from ablation.splits import Split
from ablation.task import Task, TrainingError
from ablation.training import standardise
from ablation.work_pool import one_thread_a_core


class ModuleColumns(NamedTuple):
    """Columns of all layers: `take` gives those of some rows, (n, D) float32; `modules` (D,), ascending, has
    the number of the module that each is of.
    """

    take: Callable[[np.ndarray], Tensor]
    modules: np.ndarray


def read_view(
    columns: ModuleColumns,
    view: View,
    fits: Sequence[Split],
    sets: ModuleSets,
    on_fit: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """What each set makes of n tested rows in m rounds, in each of which every row is tested once.

    H halves, S fits, C classes. `rows` and `labels` (n,); `predictions` (3, m, n) of NULL_SETS; `runs` (m, n)
    the fit behind an answer; `hits` (S, H, C) the right answers of each half by class, of `counts` (S, C)
    rows; `ratio` of test to training rows.
    """
    tested, first = np.unique(np.concatenate([fit.test for fit in fits])), len(NULL_SETS)
    m, n = sum(len(fit.test) for fit in fits) // len(tested), len(tested)
    S, H, C = len(fits), len(sets.halves), int(view.labels.max()) + 1
    predictions = np.zeros((first, m, n), np.int32)
    runs = np.zeros((m, n), np.int32)
    hits, counts = np.zeros((S, H, C), np.int32), np.zeros((S, C), np.int32)
    with one_thread_a_core(sys.maxsize) as executor:
        for number, fit in enumerate(fits):
            reader = RidgeReader(ridge_task(columns, view, fit, sets.named.shape[1]), executor.map)
            answers, labels = read_sets(reader, sets), view.labels[fit.test]
            right, is_class = answers == labels, np.eye(C, dtype=np.int32)[labels]
            hits[number], counts[number] = right[first:].astype(np.int32) @ is_class, is_class.sum(0)
            of_round, places = number * m // S, np.searchsorted(tested, fit.test)
            predictions[:, of_round, places] = answers[:first]
            runs[of_round, places] = number
            on_fit()
    return {
        "rows": tested,
        "labels": view.labels[tested],
        "predictions": predictions,
        "runs": runs,
        "hits": hits,
        "counts": counts,
        "ratio": np.array(len(fits[0].test) / len(fits[0].train)),
    }


def read_sets(reader: RidgeReader, sets: ModuleSets) -> np.ndarray:
    """The classes that NULL_SETS and the random halves give the test rows, (3 + H, n).

    All halves have one penalty, which further random halves choose; all layers have their own.
    """
    of_all = reader.classes(sets.named[:1], reader.best_share(sets.named[:1]))
    own = reader.classes(np.concatenate([sets.named[1:], sets.halves]), reader.best_share(sets.tuning))
    return np.concatenate([of_all, own])


def ridge_task(columns: ModuleColumns, view: View, split: Split, num_modules: int) -> RidgeTask:
    """The rows of a split, standardised as the MLP gets them. Raises TrainingError if no column varies, or
    one is not finite.
    """
    rows = np.concatenate(split[:3])
    x = columns.take(rows).cpu()
    if not x.isfinite().all():
        raise TrainingError("a feature is not finite")
    train, classes = torch.arange(len(split.train)), int(view.labels.max()) + 1
    low, high = x[train].aminmax(dim=0)
    weights = Task(x, view.labels, split, classes, is_weighted=view.is_weighted).row_weights(split.train)
    return RidgeTask(
        standardise(x, train).to("cpu").numpy(),
        columns.modules[(high > low).numpy()],
        view.labels[rows],
        (len(split.train), len(split.val), len(split.test)),
        num_modules,
        classes,
        weights,
    )
