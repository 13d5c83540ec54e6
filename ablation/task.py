"""What a classifier is given (a task, a listener) and what it gives (trained runs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ablation.splits import Split
from ablation.streamed import Matrix


class TrainingError(Exception):
    """Training cannot go on; the message says why. The cell fails."""


@dataclass
class Run:
    """The result of one seed. Epochs count from 1; the lists have one entry for each epoch.

    In cross-validation `fold` numbers its split among those of the view.
    """

    seed: int
    best_epoch: int = 0
    train_loss: list[float] = field(default_factory=list)  # mean over the epoch's rows, with dropout
    val_accuracy: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)  # used in the epoch
    # Part of the split -> (n,) class numbers.
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    fold: int = 0


@dataclass
class TrainedRuns:
    """The runs of a cell. `trained_dim` counts the columns that vary over the training rows."""

    runs: list[Run]
    trained_dim: int


class Task(NamedTuple):
    """What a classifier learns: `labels` (N,) from `features` (N, D), on the training rows of `split`.

    `extra` has the features (n, D) of further rows, by name; they are predicted and nothing else.
    `is_weighted`: rows weigh so that the classes of the training rows weigh alike.
    """

    features: Matrix
    labels: np.ndarray
    split: Split
    num_classes: int
    extra: dict[str, Matrix] = {}  # noqa: RUF012 (never changed)
    is_weighted: bool = False

    @property
    def in_memory(self) -> Tensor:
        """The columns as a tensor. Raises TrainingError if they are streamed because they do not fit."""
        if not isinstance(self.features, Tensor):
            raise TrainingError(
                f"its {self.features.shape[1]:,} columns of {len(self.features):,} rows do not fit the "
                "memory, and this classifier needs all at once: allow more with --memory-gb"
            )
        return self.features

    @property
    def class_weights(self) -> np.ndarray | None:
        """(C,) weights of a training row by its class: n / (classes that occur * rows of the class), 0 for a
        class without a row; None where rows weigh alike.
        """
        if not self.is_weighted:
            return None
        counts = np.bincount(self.labels[self.split.train], minlength=self.num_classes)
        weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return np.where(counts > 0, weights, 0.0)

    def row_weights(self, rows: np.ndarray) -> np.ndarray | None:
        """Weights (n,) of rows by their class; None where rows weigh alike."""
        weights = self.class_weights
        return None if weights is None else weights[self.labels[rows]]


class Listener(NamedTuple):
    """Functions that are told of progress, from any thread: `on_run(run, number)` as runs finish, number from
    1, and `on_epoch(run)` after each epoch of each run.
    """

    on_run: Callable[[Run, int], None] = lambda run, number: None
    on_epoch: Callable[[Run], None] = lambda run: None
