"""The saved predictions of cells -> whether each run was right on each test row, split by split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats

from ablation.catalogue import PARTS, group_of
from ablation.cells import Cell
from ablation.estimators import (
    LEVEL,
    SplitRows,
    StandardError,
    binomial_error,
    chance_level,
    difference,
    difference_over_splits,
    standard_error,
    standard_error_over_splits,
)
from ablation.fold_estimators import difference_of_folds, fold_standard_error

UNEVEN = 1.5  # with a class more frequent than this, accuracies are compared as balanced ones
TRAIN, TEST = PARTS.index("train"), PARTS.index("test")
Predictions = dict[Cell, dict[str, np.ndarray]]  # of each cell the arrays of its predictions/<cell>.npz


@dataclass(frozen=True)
class Sample:
    """What a cell's runs made of the test rows, by the name of the split.

    `right` (R, n) says whether each run was right on each of the test rows `rows` (n,), or has the rows'
    values of a balanced accuracy, in which a row weighs up to `weight`. `ratio` is that of test to training
    rows, `groups` (N,) are those of the data set's rows.
    """

    right: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    ratio: float
    chance: float
    groups: np.ndarray | None
    runs: np.ndarray | None = None  # (R, n) of a cross-validation: the number of the run behind each answer
    weight: float = 1.0

    @property
    def mean(self) -> float:
        """The accuracy: the mean over splits of the means over runs and rows."""
        return float(np.mean([hits.mean() for hits in self.right.values()]))

    @property
    def num_runs(self) -> int:
        """Trained runs, in all folds together or in one split."""
        if self.runs is not None:
            return len(np.unique(self.runs))
        return max(len(right) for right in self.right.values())

    def units_of(self, splits: Iterable[str]) -> np.ndarray:
        """The unit of each test row of the splits, one after another: its group, or the row itself."""
        rows = np.concatenate([self.rows[split] for split in splits])
        return rows if self.groups is None else self.groups[rows]

    def shared_splits(self, other: Sample) -> list[str]:
        """Splits in which both have the same number of runs and the same test rows."""
        return [
            split
            for split, right in self.right.items()
            if split in other.right
            and right.shape == other.right[split].shape
            and np.array_equal(self.rows[split], other.rows[split])
        ]

    def repeated(self, split: str, rounds: int) -> np.ndarray:
        """Right or wrong (rounds, n) on a split. A sample of fewer rounds, such as a classifier without seeds
        has, is repeated; rounds take the divisions of the rows in turn, so that each stands beside one of its
        own division.
        """
        right = self.right[split]
        return np.tile(right, (rounds // len(right), 1))

    def of_splits(self, splits: Iterable[str]) -> Sample:
        """The sample of some of its splits alone."""
        right, rows = ({split: arrays[split] for split in splits} for arrays in (self.right, self.rows))
        return replace(self, right=right, rows=rows)

    def of_rows(self, chosen: np.ndarray) -> Sample:
        """The sample of some rows alone; `chosen` (N,) says which rows of the data set. Splits without any of
        them are left out.
        """
        places = {split: np.flatnonzero(chosen[rows]) for split, rows in self.rows.items()}
        kept = {split: of_split for split, of_split in places.items() if len(of_split)}
        return replace(
            self,
            right={split: self.right[split][:, of_split] for split, of_split in kept.items()},
            rows={split: self.rows[split][of_split] for split, of_split in kept.items()},
            runs=None if self.runs is None else self.runs[:, places[""]],
        )

    def groups_on(self, split: str) -> np.ndarray | None:
        """The groups of a split's test rows."""
        return None if self.groups is None else self.groups[self.rows[split]]

    def split_rows(self, splits: Iterable[str]) -> SplitRows:
        """The rows behind some of the splits."""
        return SplitRows([self.rows[split] for split in splits], self.ratio, self.groups)

    def minus(self, other: Sample, margin: float) -> dict[str, Any] | None:
        """The difference of the two accuracies; None if the samples share no split."""
        splits = self.shared_splits(other)
        if not splits:
            return None
        first = [self.right[split] for split in splits]
        second = [other.right[split] for split in splits]
        if self.runs is not None:
            return difference_of_folds(
                (first[0], second[0]), margin, self.runs, self.groups_on(splits[0]), self.weight
            )
        if len(splits) == 1:
            return difference(first[0], second[0], margin, self.groups_on(splits[0]), self.weight)
        return difference_over_splits(first, second, margin, self.split_rows(splits), self.weight)

    def standard_error_of(self, D: dict[str, np.ndarray]) -> StandardError:
        """The standard error of the mean of D[split] (R, n) over splits, runs and examples."""
        if self.runs is not None:
            ((split, only),) = D.items()
            spread = fold_standard_error(only, self.runs, self.groups_on(split))
        elif len(D) == 1:
            ((split, only),) = D.items()
            spread = standard_error(only, self.groups_on(split))
        else:
            spread = standard_error_over_splits(list(D.values()), self.split_rows(D))
        return replace(spread, units=max(1, int(spread.units / self.weight)))

    @property
    def accuracy(self) -> dict[str, Any]:
        """Mean accuracy, its 95 % interval for new examples and runs, and two errors that are often confused.

        The interval is not shorter than Wilson's. `p_above_chance` is that of a one-sided t test.
        `binomial_error` is that of the mean accuracy on n independent examples, `seeds_std` the std over the
        runs: where the std is smaller, an interval over seeds is narrower than the test set allows.
        """
        right = {split: hits.astype(np.float64) for split, hits in self.right.items()}
        spread = self.standard_error_of(right)
        mean = self.mean
        R, n = next(iter(right.values())).shape
        low, high = mean - spread.half_width, mean + spread.half_width
        if self.groups is None:  # near 0 and 1 a t interval from few errors is too short
            test = scipy.stats.binomtest(round(mean * spread.units), spread.units)
            wilson = test.proportion_ci(1 - LEVEL, method="wilson")
            low, high = min(low, wilson.low), max(high, wilson.high)
        error, seeds_std = (
            binomial_error(mean, n),
            float(np.mean([hits.mean(1).std() for hits in right.values()])),
        )
        is_known = spread.error < math.inf
        if 0 < spread.error < math.inf:
            above = float(scipy.stats.t.sf((mean - self.chance) / spread.error, spread.dof))
        else:  # every answer alike: all units right by chance, or nothing is shown
            above = self.chance**spread.units if mean == 1 else 1.0
        return {
            "accuracy": mean,
            "interval": (max(0.0, low), min(1.0, high)),
            "binomial_error": error,
            "p_above_chance": above,
            "standard_error": spread.error if is_known else None,
            "splits": len(right),
            "seeds_std": seeds_std if R > 1 else None,
            "seeds_narrower_than_test_set": R > 1 and seeds_std < error,
        }

    def balanced(self, labels: np.ndarray) -> Sample:
        """The sample whose mean is the balanced accuracy: the mean of the classes' recalls. Its chance is one
        over the number of classes. `labels` (N,) are the classes of the data set's rows.

        A row's value is that mean plus n / (C n_c) times what the row is above the recall r_c of its class c,
        which has n_c of n rows: as far as the row moves it.
        """
        right, chances, weights = {}, [], []
        for split, hits in self.right.items():
            _, index, sizes = np.unique(labels[self.rows[split]], return_inverse=True, return_counts=True)
            recalls = np.bincount(index, hits.mean(0)) / sizes
            weight = len(index) / (len(sizes) * sizes)
            right[split] = recalls.mean() + weight[index] * (hits - recalls[index])
            chances.append(1 / len(sizes))
            weights.append(float(weight.max()))
        return replace(self, right=right, chance=float(np.mean(chances)), weight=max(weights))


def has_uneven_classes(labels: np.ndarray) -> bool:
    """True if the most frequent class has more than UNEVEN times the rows that it had if all had as many."""
    sizes = np.unique(labels, return_counts=True)[1]
    return bool(sizes.max() > UNEVEN * len(labels) / len(sizes))


# --- from predictions to samples


def samples_of(predictions: Predictions, groups: np.ndarray | None) -> dict[str, dict[Cell, Sample]]:
    """Samples by kind of split ('' for the first split) and by cell; the cells are named without their split.

    The draws of random_half are joined into one sample, run by run and example by example.
    """
    arrays: dict[str, dict[Cell, dict[str, dict[str, np.ndarray]]]] = {}
    for cell, of_cell in predictions.items():
        by_cell = arrays.setdefault(cell.split.rstrip("0123456789"), {})
        by_cell.setdefault(cell._replace(split=""), {})[cell.split] = of_cell
    samples = {
        kind: {cell: sample_of(splits, groups) for cell, splits in cells.items()}
        for kind, cells in arrays.items()
    }
    for of_kind in samples.values():
        join_random_halves(of_kind)
    return samples


def sample_of(splits: dict[str, dict[str, np.ndarray]], groups: np.ndarray | None) -> Sample:
    """The sample of a cell from its predictions in several splits, or in the folds of a cross-validation."""
    folds = next((arrays for arrays in splits.values() if "parts" in arrays), None)
    if folds is not None:
        return fold_sample(folds, groups)
    ratios = [len(arrays["test_rows"]) / len(arrays["train_rows"]) for arrays in splits.values()]
    chances = [chance_level(arrays["test_labels"], arrays["train_labels"]) for arrays in splits.values()]
    return Sample(
        right={
            split: arrays["test_predictions"] == arrays["test_labels"] for split, arrays in splits.items()
        },
        rows={split: arrays["test_rows"] for split, arrays in splits.items()},
        ratio=float(np.mean(ratios)),
        chance=float(np.mean(chances)),
        groups=groups,
    )


def fold_sample(arrays: dict[str, np.ndarray], groups: np.ndarray | None) -> Sample:
    """The sample of a cross-validation: whether each row was told right in each round, in which it is tested
    once.
    """
    answers, runs = tested_answers(arrays)
    labels, parts = arrays["labels"], arrays["parts"]
    chances = [chance_level(labels[parts[r] == TEST], labels[parts[r] == TRAIN]) for r in range(len(parts))]
    ratio = float((parts == TEST).sum() / (parts == TRAIN).sum())
    rows = np.arange(len(labels))
    return Sample({"": answers == labels}, {"": rows}, ratio, float(np.mean(chances)), groups, runs)


def tested_answers(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (m, N) of the rows when tested, round by round, and the numbers (m, N) of the runs."""
    is_test = arrays["parts"] == TEST  # (R, N)
    rounds = int(is_test[:, 0].sum())
    order = np.argsort(~is_test, axis=0, kind="stable")[:rounds]  # of each row the runs that tested it
    return np.take_along_axis(arrays["predictions"], order, axis=0), order


def tested_predictions(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and predictions (R, n) of the tested rows, of one split or of the folds of each round."""
    if "parts" in arrays:
        return arrays["labels"], tested_answers(arrays)[0]
    return arrays["test_labels"], arrays["test_predictions"]


def join_random_halves(samples: dict[Cell, Sample]) -> None:
    """Add for each representation the mean over the draws of random_half."""
    draws: dict[Cell, list[Sample]] = {}
    for cell, sample in samples.items():
        if group_of(cell.layer_set) == "random_half":
            draws.setdefault(cell._replace(layer_set="random_half"), []).append(sample)
    for cell, halves in draws.items():
        first = halves[0]
        splits = [
            split for split in first.right if all(split in first.shared_splits(half) for half in halves)
        ]
        if splits:
            right = {split: np.mean([half.right[split] for half in halves], axis=0) for split in splits}
            samples[cell] = replace(first, right=right)


def join_first_split(samples: dict[str, dict[Cell, Sample]], kind: str) -> dict[str, dict[Cell, Sample]]:
    """Put the first split, whose name is '', together with the further splits of its kind."""
    first, further = samples.get("", {}), samples.get(kind, {})

    def joined(cell: Cell, sample: Sample) -> Sample:
        if cell not in further:
            return sample
        more = further[cell]
        return replace(sample, right=sample.right | more.right, rows=sample.rows | more.rows)

    others = {other: cells for other, cells in samples.items() if other not in ("", kind)}
    return others | {kind: {cell: joined(cell, sample) for cell, sample in first.items()}}


def labels_of_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The class number of each row of the data set that a cell trained on or tested, -1 elsewhere."""
    if "labels" in arrays:
        return arrays["labels"]
    parts = [(arrays[f"{part}_rows"], arrays[f"{part}_labels"]) for part in ("train", "test")]
    labels = np.full(1 + max(int(rows.max()) for rows, _ in parts), -1)
    for rows, of_rows in parts:
        labels[rows] = of_rows
    return labels


def labels_by_row(predictions: Predictions) -> np.ndarray:
    """The class number of each row of the data set that some cell tested, -1 elsewhere."""
    tested = [
        (np.arange(len(arrays["labels"])), arrays["labels"])
        if "labels" in arrays
        else (arrays["test_rows"], arrays["test_labels"])
        for arrays in predictions.values()
    ]
    labels = np.full(1 + max(int(rows.max()) for rows, _ in tested), -1)
    for rows, of_rows in tested:
        labels[rows] = of_rows
    return labels
