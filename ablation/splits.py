"""Which rows train, which choose the epoch, which are tested."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ablation.catalogue import AUTO
from ablation.fields import InputError
from ablation.settings import Settings

SMALLEST_SPLIT = 11  # with fewer rows, train = val = test
VAL_SHARE = 1 / 8  # of the rows that a fold does not test
GROUPED_DRAWS = 1000  # tries to find a grouped split in which every class has a training row


class SplitSpec(NamedTuple):
    """A way to divide the rows: random, stratified or grouped, and a seed.

    With `folds` > 0 it is cross-validation: `partitions` of all rows into so many test parts. `auto` is then
    grouped where there are groups, else stratified.
    """

    kind: str
    seed: int
    folds: int = 0
    partitions: int = 1

    def resolved(self, has_groups: bool) -> SplitSpec:
        """The same with the kind that `auto` stands for."""
        return self._replace(kind="grouped" if has_groups else "stratified") if self.kind == AUTO else self


class Split(NamedTuple):
    """Row numbers of the three parts. `overlap`: too few rows to divide, so all three parts are the same."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    overlap: bool

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of a part, by its name."""
        return getattr(self, part)


def split_names(settings: Settings) -> list[str]:
    """Names of the splits as cells bear them.
    The first split has the name '', the others are random1, grouped0, ...
    """
    names = [f"{kind}{number}" for kind in settings.split for number in range(settings.num_splits)]
    return ["" if name == f"{settings.split[0]}0" else name for name in names]


def split_spec(settings: Settings, name: str) -> SplitSpec:
    """Kind and seed of the split with that name, whether these settings ask for it or not."""
    folds, partitions = settings.folds, settings.partitions
    if not name:
        return SplitSpec(settings.split[0], settings.split_seed, folds, partitions)
    kind = name.rstrip("0123456789")
    return SplitSpec(kind, settings.split_seed + int(name[len(kind) :]), folds, partitions)


def split_rows(
    num_rows: int,
    spec: SplitSpec,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    classes: Sequence[str | int] | None = None,
) -> Split:
    """70/10/20 of the rows. `labels` and `groups` are (N,) numbers, `classes` the names behind the labels.

    `random`: the rows and the order that two calls of `train_test_split` of `datasets` give, as in the
    origin. They depend on the number of rows and the seed alone. `stratified`: every class in these
    proportions. `grouped`: no group in two parts, and these proportions of the groups.

    Raises InputError if a class has too few rows, or if there are too few groups.
    """
    if num_rows < SMALLEST_SPLIT:
        rows = np.arange(num_rows)
        return Split(rows, rows, rows, True)
    if spec.kind == "random":
        return random_split(num_rows, spec.seed)
    refuse_impossible(num_rows, spec, groups is not None)
    if labels is None:
        raise ValueError(f"a {spec.kind} split needs the labels")
    try:
        if groups is None or spec.kind == "stratified":
            return stratified_split(labels, spec.seed)
        return grouped_split(labels, groups, spec.seed)
    except ValueError:  # scikit-learn's words do not name the class
        if groups is not None and spec.kind == "grouped":
            problem = f"the data set has {len(np.unique(groups))} groups, 11 or more are needed"
        else:
            numbers, counts = np.unique(labels, return_counts=True)
            smallest = numbers[counts.argmin()]
            named = smallest if classes is None else classes[smallest]
            problem = f"class '{named}' has {counts.min()} rows, too few for three parts"
        raise InputError(f"--split {spec.kind} is not possible here: {problem}") from None


def refuse_impossible(num_rows: int, spec: SplitSpec, has_groups: bool) -> None:
    """Raise InputError for a split that so many rows, with or without groups, do not allow."""
    if spec.folds and num_rows < SMALLEST_SPLIT:
        raise InputError(f"--folds needs {SMALLEST_SPLIT} rows or more: the data set has {num_rows}")
    if num_rows < spec.folds:
        raise InputError(f"--folds {spec.folds} are more than the {num_rows} rows of the data set")
    if spec.resolved(has_groups).kind == "grouped" and not has_groups and num_rows >= SMALLEST_SPLIT:
        raise InputError("--split grouped needs a column of groups: give --group-column")


def random_split(num_rows: int, seed: int) -> Split:
    """The rows of the origin's split: 30 % of all rows, then 67 % of these."""
    from datasets import Dataset

    first = Dataset.from_dict({"row": np.arange(num_rows)}).train_test_split(test_size=0.3, seed=seed)
    second = first["test"].train_test_split(test_size=0.67, seed=seed)
    train, val, test = (
        np.array(part.with_format("numpy")["row"][:])
        for part in (first["train"], second["train"], second["test"])
    )
    return Split(train, val, test, False)


def stratified_split(labels: np.ndarray, seed: int) -> Split:
    """Every class in the proportions of the whole. Raises ValueError if a class has too few rows."""
    from sklearn.model_selection import StratifiedShuffleSplit

    train, rest = next(StratifiedShuffleSplit(1, test_size=0.3, random_state=seed).split(labels, labels))
    halves = StratifiedShuffleSplit(1, test_size=0.67, random_state=seed)
    val, test = next(halves.split(rest, labels[rest]))
    return Split(train, rest[val], rest[test], False)


def grouped_split(labels: np.ndarray, groups: np.ndarray, seed: int) -> Split:
    """No group in two parts. Of GROUPED_DRAWS draws the first in which every class has a training row.

    If no draw has that, the first one. Raises ValueError if there are too few groups.
    """
    from sklearn.model_selection import GroupShuffleSplit

    draws = iter(
        GroupShuffleSplit(GROUPED_DRAWS, test_size=0.3, random_state=seed).split(labels, labels, groups)
    )
    first, num_classes = next(draws), len(np.unique(labels))
    whole = (
        draw for draw in itertools.chain([first], draws) if len(np.unique(labels[draw[0]])) == num_classes
    )
    train, rest = next(whole, first)
    halves = GroupShuffleSplit(1, test_size=0.67, random_state=seed)
    val, test = next(halves.split(rest, labels[rest], groups[rest]))
    return Split(train, rest[val], rest[test], False)


# --- folds


def fold_splits(
    num_rows: int, spec: SplitSpec, labels: np.ndarray, groups: np.ndarray | None = None
) -> list[Split]:
    """A split for each fold of each partition, partition by partition; every row is tested once in each.

    The rows that are not tested are divided 7 to 1 into training and validation rows, so that five folds have
    the sizes of a 70/10/20 split. Partition p has the seed `spec.seed` + p. `random` divides without a look
    at labels; `stratified` by group where every group has one class and a row for each fold, else by class;
    `grouped` keeps groups whole, in validation too, and classes as even as that allows (scikit-learn's
    StratifiedGroupKFold). Raises InputError if a class or the groups are too few.
    """
    refuse_impossible(num_rows, spec, groups is not None)
    spec = spec.resolved(groups is not None)
    kinds = {"random": random_folds, "stratified": stratified_folds, "grouped": grouped_folds}
    return [
        Split(train, val, test, False)
        for partition in range(spec.partitions)
        for train, val, test in kinds[spec.kind](spec.folds, spec.seed + partition, labels, groups)
    ]


FoldRows = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, val, test


def random_folds(folds: int, seed: int, labels: np.ndarray, groups: np.ndarray | None) -> list[FoldRows]:
    """Folds of rows in random order."""
    from sklearn.model_selection import KFold, ShuffleSplit

    parts = []
    for rest, test in KFold(folds, shuffle=True, random_state=seed).split(labels):
        train, val = next(ShuffleSplit(1, test_size=VAL_SHARE, random_state=seed).split(rest))
        parts.append((rest[train], rest[val], test))
    return parts


def stratified_folds(folds: int, seed: int, labels: np.ndarray, groups: np.ndarray | None) -> list[FoldRows]:
    """Folds in which every class, or every group where that is possible, has its share."""
    from sklearn.model_selection import StratifiedKFold

    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if fewest < folds:
        raise InputError(f"--folds {folds} needs {folds} rows of each class: one has {fewest}")
    strata = labels
    if groups is not None and is_nested(groups, labels):
        sizes = np.unique(groups, return_counts=True)[1]
        strata = groups if sizes.min() >= folds else labels
    parts = []
    for rest, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(strata, strata):
        train, val = validation_rows(rest, [strata, labels], seed)
        parts.append((train, val, test))
    return parts


def validation_rows(rest: np.ndarray, strata: list[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to validate on, by the first of the `strata` (N,) that are large enough to be divided
    again, else at random.
    """
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit

    for of_rows in strata:
        fewest = int(np.unique(of_rows[rest], return_counts=True)[1].min())
        count = len(np.unique(of_rows[rest]))
        if fewest >= 2 and math.ceil(VAL_SHARE * len(rest)) >= count:
            halves = StratifiedShuffleSplit(1, test_size=VAL_SHARE, random_state=seed)
            train, val = next(halves.split(rest, of_rows[rest]))
            return rest[train], rest[val]
    train, val = next(ShuffleSplit(1, test_size=VAL_SHARE, random_state=seed).split(rest))
    return rest[train], rest[val]


def grouped_folds(folds: int, seed: int, labels: np.ndarray, groups: np.ndarray | None) -> list[FoldRows]:
    """Folds of whole groups."""
    from sklearn.model_selection import StratifiedGroupKFold

    assert groups is not None
    count = len(np.unique(groups))
    if count < folds + 1:
        raise InputError(f"--folds {folds} of whole groups need {folds + 1} groups: the data set has {count}")
    largest = int(np.unique(labels, return_counts=True)[1].max())
    if largest < folds:
        raise InputError(f"--folds {folds} need {folds} rows of some class: the largest has {largest}")
    parts = []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for rest, test in splitter.split(labels, labels, groups):
        largest = int(np.unique(labels[rest], return_counts=True)[1].max())
        eighths = min(round(1 / VAL_SHARE), len(np.unique(groups[rest])), largest)
        if eighths < 2:
            raise InputError(f"--folds {folds} of whole groups leave none to validate on")
        again = StratifiedGroupKFold(eighths, shuffle=True, random_state=seed)
        train, val = next(again.split(rest, labels[rest], groups[rest]))
        parts.append((rest[train], rest[val], test))
    return parts


def is_nested(groups: np.ndarray, labels: np.ndarray) -> bool:
    """True if every group has rows of one class only."""
    pairs = np.unique(np.stack([groups, labels]), axis=1)
    return pairs.shape[1] == len(np.unique(groups))
