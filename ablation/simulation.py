"""Simulated experiments whose true drop is known:
how often the tests and intervals of `inference.py` are right.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from ablation.estimators import LEVEL, SplitRows, difference, difference_over_splits
from ablation.fold_estimators import difference_of_folds

GRID = np.linspace(0, 1, 4001)
CLASSES, COLUMNS = 4, 12
MARGIN = 0.02  # of the test of equivalence
RATIO = 0.2 / 0.7  # of test to training rows


@functools.cache
def chances_of_being_right(mean: float) -> np.ndarray:
    """Quantiles on GRID of an example's chance of being right: Beta with this mean and weight 1.5.

    With so little weight many examples are easy or hopeless.
    """
    return scipy.stats.beta.ppf(GRID, 1.5 * mean, 1.5 * (1 - mean))


@dataclass(frozen=True)
class World:
    """A simulated experiment: `n` test examples (in `groups`, 0: without groups), `runs`, and the true drop.

    `base` is the accuracy with the first layer set. Every run shifts all examples by a normal amount of std
    `run_sd`.
    """

    n: int = 201
    runs: int = 10
    drop: float = 0.0
    base: float = 0.45
    run_sd: float = 0.0
    groups: int = 0


def experiment(rng: np.random.Generator, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Whether each run was right on each example, for two layer sets:
    (R, n) twice, and the group (n,) of each example.

    Every example has its own chance of being right with each layer set, of means base and base - drop,
    correlated through what makes an example, or its group, easy.
    """
    n, groups = world.n, world.groups
    group = rng.integers(0, groups, n) if groups else None
    shared = rng.normal(size=n)
    right = []
    for mean in (world.base, world.base - world.drop):
        z = shared + 0.8 * rng.normal(size=n)
        if group is not None:
            z = z + rng.normal(size=groups)[group]
        chance = np.interp(
            scipy.stats.norm.cdf(z / math.sqrt(1.64 + bool(groups))), GRID, chances_of_being_right(mean)
        )
        uniform = rng.random((world.runs, n))
        right.append(uniform < chance + world.run_sd * rng.normal(size=(world.runs, 1)))
    return right[0], right[1], group


def split_experiment(
    rng: np.random.Generator, rows: int = 200, splits: int = 5, runs: int = 3, lost: float = 0.0
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Whether each run was right on the test rows of K random splits, for two layer sets; and the test rows.

    (R, n) a split, twice. Rows are drawn from four normal classes, seen through columns with each layer set's
    own noise; the second set's classes are nearer to each other by the share `lost`. A run takes the nearest
    class mean of a random nine tenths of the training rows. The test set, the training set and the run all
    vary, and splits share most of their rows.
    """
    labels = rng.integers(0, CLASSES, rows)
    columns = [
        scale * np.eye(CLASSES, COLUMNS)[labels] + rng.normal(size=(rows, COLUMNS))
        for scale in (1.2, 1.2 * (1 - lost))
    ]
    right: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    tests = []
    for _ in range(splits):
        order = rng.permutation(rows)
        train, test = order[: round(0.7 * rows)], order[round(0.8 * rows) :]
        tests.append(test)
        for x, of_set in zip(columns, right, strict=True):
            of_set.append(np.stack([nearest_mean(rng, x, labels, train, test) for _ in range(runs)]))
    return right[0], right[1], tests


def nearest_mean(
    rng: np.random.Generator, x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Whether the nearest class mean of nine tenths of the training rows is right on each test row, (n,)."""
    chosen = rng.choice(train, round(0.9 * len(train)), replace=False)
    means = np.stack([x[chosen[labels[chosen] == c]].mean(0) for c in range(CLASSES)])
    return ((x[test][:, None] - means) ** 2).sum(2).argmin(1) == labels[test]


@dataclass(frozen=True)
class FoldWorld:
    """A simulated cross-validation: `rows` in `groups` (0: without) and four classes, `folds`, `rounds`.

    `lost` is the share of the classes' distance that the second layer set does not see. `grouped`: folds of
    whole groups.
    """

    rows: int = 520
    groups: int = 0
    folds: int = 5
    rounds: int = 2
    lost: float = 0.0
    grouped: bool = False


def fold_experiment(
    rng: np.random.Generator, world: FoldWorld
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Whether each row was told right in each round, for two layer sets: (m, n) twice; the runs (m, n) behind
    the answers; and the group (n,) of each row.

    As `split_experiment`: a run takes the nearest class mean of a random nine tenths of its training rows.
    Rows of a group share a shift of half the size of a row's own noise.
    """
    n, labels = world.rows, np.arange(world.rows) % CLASSES
    group = None
    if world.groups:  # each of one class
        group = labels + CLASSES * rng.integers(0, world.groups // CLASSES, n)
    columns = []
    for scale in (1.2, 1.2 * (1 - world.lost)):
        x = scale * np.eye(CLASSES, COLUMNS)[labels] + rng.normal(size=(n, COLUMNS))
        if group is not None:
            x = x + 0.5 * rng.normal(size=(world.groups, COLUMNS))[group]
        columns.append(x)
    right = np.zeros((2, world.rounds, n), bool)
    runs = np.zeros((world.rounds, n), int)
    for j in range(world.rounds):
        units = np.arange(n) if group is None or not world.grouped else group
        places = rng.permutation(units.max() + 1)[units] % world.folds
        for fold in range(world.folds):
            test, rest = np.flatnonzero(places == fold), np.flatnonzero(places != fold)
            train = rng.choice(rest, round(7 / 8 * len(rest)), replace=False)
            runs[j, test] = j * world.folds + fold
            for of_set, x in zip(right, columns, strict=True):
                of_set[j, test] = nearest_mean(rng, x, labels, train, test)
    return right[0], right[1], runs, group


def simulate_folds(world: FoldWorld, experiments: int, seed: int) -> dict[str, float]:
    """Mean drop, which is the truth about new data sets, and rates over the experiments."""
    rng = np.random.default_rng([seed, world.rows, world.groups, world.rounds, round(1e6 * world.lost)])
    entries = []
    for _ in range(experiments):
        first, second, runs, groups = fold_experiment(rng, world)
        entries.append(difference_of_folds((first, second), MARGIN, runs, groups))
    truth = float(np.mean([entry["drop"] for entry in entries])) if world.lost else 0.0
    rates = {
        "drop": truth,
        "claimed": float(np.mean([entry["p"] < LEVEL for entry in entries])),
        "covered": float(np.mean([covers(entry["interval"], truth) for entry in entries])),
    }
    if world.groups:
        held = [covers(entry["same_groups"]["interval"], truth) for entry in entries]
        rates["covered by rows"] = float(np.mean(held))
    return rates


def simulate_splits(rows: int, lost: float, splits: int, experiments: int, seed: int) -> dict[str, float]:
    """Mean drop, which is the truth about new data sets, and rates over the experiments.

    `claimed`: a drop is claimed. `covered`: the 95 % interval covers the truth. `plain`: a t test over splits
    claims one.
    """
    rng = np.random.default_rng([seed, rows, splits, round(1e6 * lost)])
    entries, plain = [], []
    for _ in range(experiments):
        first, second, tests = split_experiment(rng, rows, splits, lost=lost)
        entry = difference_over_splits(first, second, MARGIN, SplitRows(tests, RATIO))
        entries.append(entry)
        drops = entry["drops"]
        plain.append(np.ptp(drops) > 0 and scipy.stats.ttest_1samp(drops, 0).pvalue < LEVEL)
    truth = float(np.mean([entry["drop"] for entry in entries])) if lost else 0.0
    return {
        "drop": truth,
        "claimed": float(np.mean([entry["p"] < LEVEL for entry in entries])),
        "covered": float(np.mean([covers(entry["interval"], truth) for entry in entries])),
        "plain": float(np.mean(plain)),
    }


def simulate(world: World, experiments: int, seed: int) -> dict[str, float]:
    """Rates over the experiments of a world, and the same of two ways that the program does not take.

    `sign flips` takes the runs that happened to be made for all runs; `seeds`, a t test over seeds, takes the
    test rows that happened to be drawn for all rows.
    """
    rng = np.random.default_rng([seed, world.n, round(1e6 * world.drop)])
    hits = []
    for _ in range(experiments):
        first, second, group = experiment(rng, world)
        entry = difference(first, second, margin=MARGIN, groups=group)
        by_run = first.mean(1) - second.mean(1)
        hits.append(
            {
                "claimed": entry["p"] < LEVEL,
                "covered": covers(entry["interval"], world.drop),
                "sign flips": entry["p_sign_flip"] < LEVEL,
                "seeds": scipy.stats.ttest_1samp(by_run, 0).pvalue < LEVEL,
                "seeds cover": covers(entry["training_noise_interval"], world.drop),
            }
        )
    return {name: float(np.mean([hit[name] for hit in hits])) for name in hits[0]}


def covers(interval: tuple[float, float], truth: float) -> bool:
    """True if an interval covers the truth."""
    return interval[0] <= truth <= interval[1]
