"""Which rows train, which choose the epoch, which are tested."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from ablation.settings import InputError, Settings

PARTS = ("train", "val", "test")
SMALLEST_SPLIT = 11  # with fewer rows, train = val = test
GROUPED_DRAWS = 1000  # tries to find a grouped split in which every class has a training row


class SplitSpec(NamedTuple):
    """A way to divide the rows: random, stratified or grouped, and a seed."""

    kind: str
    seed: int


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
    if not name:
        return SplitSpec(settings.split[0], settings.split_seed)
    kind = name.rstrip("0123456789")
    return SplitSpec(kind, settings.split_seed + int(name[len(kind) :]))


def split_rows(
    num_rows: int, spec: SplitSpec, labels: np.ndarray | None = None, groups: np.ndarray | None = None
) -> Split:
    """70/10/20 of the rows. `labels` and `groups` are (N,) numbers.

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
    if spec.kind == "grouped" and groups is None:
        raise InputError("--split grouped needs a column of groups: give --group-column")
    if labels is None:
        raise ValueError(f"a {spec.kind} split needs the labels")
    try:
        if groups is None or spec.kind == "stratified":
            return stratified_split(labels, spec.seed)
        return grouped_split(labels, groups, spec.seed)
    except ValueError as error:
        raise InputError(f"--split {spec.kind} is not possible here: {error}") from None


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
