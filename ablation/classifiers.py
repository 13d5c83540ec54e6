"""Classifiers in place of the MLP. Each trains one run, on the rows and columns that the MLP would get."""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import KernelCenterer
from torch import Tensor

from ablation.catalogue import NEIGHBOURS, PARTS
from ablation.task import Listener, Run, Task, TrainedRuns, TrainingError
from ablation.training import standardise

log = logging.getLogger("visual_ablation")

CLASSIFIER_SEED = 0
# scikit-learn's C, the inverse of the penalty on the squared weights: the strongest penalty first.
PROBE_CS = tuple(10.0**power for power in range(-4, 2))
PROBE_ITERATIONS = 2000
BOOSTING_ITERATIONS, BOOSTING_PATIENCE = 100, 10
# Few leaves and bins: a data set has some hundred rows and up to ten thousand columns, and time grows with
# both.
BOOSTING_LEAVES, BOOSTING_BINS = 8, 32
BOOSTING_VALUES = 4e9  # training rows times columns times classes: about ten minutes on two cores
RIDGE_PENALTIES = tuple(10.0**power for power in range(-6, 3))  # times the kernel's mean over its diagonal
NEGLIGIBLE_SPREAD = 1e-6  # kernels whose spread is smaller, relative to their size, hold rounding only


def train_linear(task: Task, listener: Listener) -> TrainedRuns:
    """Multinomial logistic regression (scikit-learn, L-BFGS) on the standardised columns.

    C is the one of PROBE_CS with the best validation accuracy; of several, the smallest.
    """
    began = time.perf_counter()
    columns, rows = standardised(task)
    labels = task.labels
    if len(np.unique(labels[rows["train"]])) == 1:  # scikit-learn refuses a single class
        only = labels[rows["train"][0]]
        return one_run(
            {part: np.full(len(rows[part]), only) for part in PARTS}, began, columns.shape[1], listener
        )
    model = LogisticRegression(max_iter=PROBE_ITERATIONS, warm_start=True)
    best, predictions = -1.0, {}
    for inverse in PROBE_CS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # logged below with the penalty
            model.set_params(C=inverse).fit(
                columns[rows["train"]], labels[rows["train"]], task.row_weights(rows["train"])
            )
        if max(model.n_iter_) >= PROBE_ITERATIONS:
            log.warning(
                f"the linear probe did not converge in {PROBE_ITERATIONS} iterations at C = {inverse:g}"
            )
        accuracy = float(np.mean(model.predict(columns[rows["val"]]) == labels[rows["val"]]))
        if accuracy > best:
            best = accuracy
            predictions = {part: model.predict(columns[rows[part]]) for part in PARTS}
    return one_run(predictions, began, columns.shape[1], listener)


def train_boosting(task: Task, listener: Listener) -> TrainedRuns:
    """Gradient-boosted trees (scikit-learn's histogram kind) on the columns that vary.

    Trees are added until the validation loss has not fallen for BOOSTING_PATIENCE iterations. Predictions are
    those of the iteration with the best validation accuracy; of several, the earliest. Where there are more
    values than BOOSTING_VALUES, trees see fewer training rows; the log says how many.
    """
    began = time.perf_counter()
    columns, rows = standardised(task)
    labels = task.labels
    trained = fewer_rows(rows["train"], labels, columns.shape[1])
    val = rows["val"][np.isin(labels[rows["val"]], labels[rows["train"]])]  # untrained classes have no loss
    model = HistGradientBoostingClassifier(
        max_iter=BOOSTING_ITERATIONS,
        early_stopping=len(val) > 0,
        n_iter_no_change=BOOSTING_PATIENCE,
        random_state=CLASSIFIER_SEED,
        max_leaf_nodes=BOOSTING_LEAVES,
        max_bins=BOOSTING_BINS,
    )
    watched = {"X_val": columns[val], "y_val": labels[val]} if len(val) else {}
    if len(val) and task.is_weighted:
        watched["sample_weight_val"] = task.row_weights(val)
    model.fit(columns[trained], labels[trained], task.row_weights(trained), **watched)
    stages = model.staged_predict(columns[rows["val"]])
    best = int(np.argmax([np.mean(predicted == labels[rows["val"]]) for predicted in stages]))
    predictions = {
        part: next(itertools.islice(model.staged_predict(columns[rows[part]]), best, None)) for part in PARTS
    }
    return one_run(predictions, began, columns.shape[1], listener)


def fewer_rows(rows: np.ndarray, labels: np.ndarray, columns: int) -> np.ndarray:
    """The training rows that boosting sees: all, or the same share of each class, at least one row of it.

    Drawn by CLASSIFIER_SEED; the log says so.
    """
    classes = np.unique(labels[rows])
    share = BOOSTING_VALUES / (len(rows) * max(columns, 1) * len(classes))
    if share >= 1:
        return rows
    drawn = np.random.default_rng(CLASSIFIER_SEED).permutation(rows)
    of_class = [drawn[labels[drawn] == one] for one in classes]
    kept = np.concatenate([one[: max(1, int(share * len(one)))] for one in of_class])
    log.info(
        f"Boosting trains on {len(kept):,} of {len(rows):,} training rows, the same share of each class: "
        f"with {columns:,} columns and {len(classes):,} classes all rows would take hours"
    )
    return rows[np.isin(rows, kept)]


def train_nearest(task: Task, listener: Listener) -> TrainedRuns:
    """The class of the nearest training row, by Euclidean distance of the standardised columns.

    The rows' numbers stand in `predictions["neighbours"]`, (n,) for the test rows. A training row is its own
    nearest.
    """
    began = time.perf_counter()
    columns, rows = standardised(task)
    search = NearestNeighbors(n_neighbors=1).fit(columns[rows["train"]])
    found = {part: rows["train"][search.kneighbors(columns[rows[part]])[1][:, 0]] for part in PARTS}
    predictions = {part: task.labels[neighbours] for part, neighbours in found.items()}
    return one_run(predictions | {NEIGHBOURS: found["test"]}, began, columns.shape[1], listener)


def train_kernel_ridge(task: Task, listener: Listener) -> TrainedRuns:
    """Kernel ridge regression. `task.features` are a kernel (N, T) float64:
    inner products of all rows with T training rows.

    The kernel and the targets, one a class, are centred by the training rows; the largest output wins. The
    penalty is the one of RIDGE_PENALTIES, times the mean of the centred kernel's diagonal, with the best
    validation accuracy; of several, the largest. A penalty so small that the rounding of the kernel exceeds
    it is left out, with a warning. Raises TrainingError if the training rows' products do not differ. Raise
    the version of the representation kernel_ridge when a number changes.
    """
    began = time.perf_counter()
    kernel, labels, split = task.in_memory, task.labels, task.split
    own = kernel[split.train].numpy()
    size = abs(own.diagonal().mean())
    centre = KernelCenterer().fit(own)
    train = torch.from_numpy(centre.transform(own, copy=False))
    others = {part: kernel[split.rows(part)] for part in PARTS if part != "train"} | task.extra
    centred = {
        name: torch.from_numpy(centre.transform(of_rows.to("cpu").numpy(), copy=name in task.extra))
        for name, of_rows in others.items()
    }
    scale = float(train.trace()) / len(train)
    if scale <= NEGLIGIBLE_SPREAD**2 * size or len(train) < 2:
        raise TrainingError("the products of the training rows do not differ: there is nothing to learn from")
    targets = torch.eye(task.num_classes, dtype=torch.float64)[labels[split.train]]
    weights = task.row_weights(split.train)
    roots = (
        torch.ones(len(train), 1).double() if weights is None else torch.from_numpy(weights)[:, None].sqrt()
    )
    mean = (roots.square() * targets).sum(0) / roots.square().sum()
    train *= roots
    train *= roots.mT  # rows that weigh w stand for w rows
    best, predictions = -1.0, {}
    for penalty in sorted(RIDGE_PENALTIES, reverse=True):
        solution = solve_ridge(train, penalty * scale, roots * (targets - mean))
        if solution is None:
            log.warning(
                f"kernel_ridge: the penalty {penalty:g} is below the rounding of the kernel: left out"
            )
            continue
        dual = roots * solution
        found = {name: (of_rows @ dual + mean).argmax(1).numpy() for name, of_rows in centred.items()}
        accuracy = float(np.mean(found["val"] == labels[split.val]))
        if accuracy > best:
            best = accuracy
            predictions = {"train": (train @ solution / roots + mean).argmax(1).numpy()} | found
    return one_run(predictions, began, len(targets), listener)


def solve_ridge(kernel: Tensor, penalty: float, targets: Tensor) -> Tensor | None:
    """The solution of (kernel + penalty) @ x = targets; None if that matrix is not positive definite.

    Column by column in memory, as LAPACK has it, and by way of its factor: so that one copy is made.
    """
    shifted = kernel.clone().mT
    shifted.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(shifted, out=(shifted, torch.empty((), dtype=torch.int32)))
    if failed:
        return None
    half = torch.linalg.solve_triangular(factor, targets, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def standardised(task: Task) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The columns as the MLP gets them, (N, D'), and the rows of each part."""
    columns = standardise(task.in_memory, torch.from_numpy(task.split.train)).to("cpu").numpy()
    return columns, {part: task.split.rows(part) for part in PARTS}


def one_run(
    predictions: dict[str, np.ndarray], began: float, trained_dim: int, listener: Listener
) -> TrainedRuns:
    """The only run of a classifier that began at the time `began` and used `trained_dim` columns."""
    run = Run(CLASSIFIER_SEED, predictions=predictions, seconds=time.perf_counter() - began)
    listener.on_run(run, 1)
    return TrainedRuns([run], trained_dim)


TRAINERS: dict[str, Callable[[Task, Listener], TrainedRuns]] = {
    "linear": train_linear,
    "boosting": train_boosting,
    "nearest": train_nearest,
    "kernel_ridge": train_kernel_ridge,
}
