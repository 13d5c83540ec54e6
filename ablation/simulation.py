"""Simulated experiments whose true drop is known:
how often the tests and intervals of `inference.py` are right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
import torch

from ablation.estimators import LEVEL, SplitRows, difference, difference_over_splits, p_of_mean
from ablation.family import Margin
from ablation.fold_estimators import difference_of_folds, fold_standard_error
from ablation.inference import compare_layer_sets
from ablation.samples import Sample
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.task import Task
from ablation.training import train_runs

GRID = np.linspace(0, 1, 4001)
CLASSES, COLUMNS = 4, 12
MARGIN = 0.02  # of the test of equivalence
RATIO = 0.2 / 0.7  # of test to training rows
FAMILY_SIZE = 9


# --- one split


@functools.cache
def chances_of_being_right(mean: float, weight: float) -> np.ndarray:
    """Quantiles on GRID of an example's chance of being right: Beta with this mean and weight.

    With little weight most examples are easy or hopeless.
    """
    return scipy.stats.beta.ppf(GRID, weight * mean, weight * (1 - mean))


@dataclass(frozen=True)
class World:
    """A simulated experiment: `n` test examples (in `groups`, 0: without groups), `runs`, and the true drop.

    `base` is the accuracy with the first layer set. Every run shifts all examples by a normal amount of std
    `run_sd`. Groups differ by `group_sd` stds of an example's own ease. `weight` as in
    `chances_of_being_right`.
    """

    n: int = 201
    runs: int = 10
    drop: float = 0.0
    base: float = 0.45
    run_sd: float = 0.0
    groups: int = 0
    group_sd: float = 1.0
    weight: float = 1.5


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
        variance = 1.64
        if group is not None:
            z, variance = z + world.group_sd * rng.normal(size=groups)[group], variance + world.group_sd**2
        quantile = scipy.stats.norm.cdf(z / math.sqrt(variance))
        chance = np.interp(quantile, GRID, chances_of_being_right(mean, world.weight))
        uniform = rng.random((world.runs, n))
        right.append(uniform < chance + world.run_sd * rng.normal(size=(world.runs, 1)))
    return right[0], right[1], group


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
            }
        )
    return {"drop": world.drop, **{name: float(np.mean([hit[name] for hit in hits])) for name in hits[0]}}


# --- learners on splits and folds


def nearest_mean(x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class whose training rows have the nearest mean, for each test row (n,)."""
    means = np.stack([x[train[labels[train] == c]].mean(0) for c in range(labels.max() + 1)])
    return ((x[test][:, None] - means) ** 2).sum(2).argmin(1)


def ridge(x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class of the largest output of ridge regression on class indicators, for each test row (n,)."""
    centre, targets = x[train].mean(0), np.eye(labels.max() + 1)[labels[train]]
    rows = x[train] - centre
    gram = rows.T @ rows + 0.1 * len(train) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, rows.T @ (targets - targets.mean(0)))
    return ((x[test] - centre) @ weights + targets.mean(0)).argmax(1)


def mlp(
    x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, hidden_dim: int = 128
) -> np.ndarray:
    """The class by the program's own MLP, for each test row (n,); an eighth of the training rows chooses the
    epoch.

    The seed follows from the rows: the layer sets of a fold share it, and folds do not.
    """
    settings = TrainingSettings(
        num_runs=1, seed=int(train.sum()) % 2**31, hidden_dim=hidden_dim, trainer="sequential"
    )
    split = Split(train[len(train) // 8 :], train[: len(train) // 8], test, overlap=False)
    task = Task(torch.from_numpy(x).float(), labels, split, int(labels.max()) + 1)
    return train_runs(task, settings).runs[0].predictions["test"]


Learner = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
LEARNERS: dict[str, Learner] = {"nearest mean": nearest_mean, "ridge": ridge, "mlp": mlp}


def some_of(rng: np.random.Generator, rows: np.ndarray, share: float) -> np.ndarray:
    """A random share of some rows."""
    return rng.choice(rows, round(share * len(rows)), replace=False)


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
            told = [nearest_mean(x, labels, some_of(rng, train, 0.9), test) for _ in range(runs)]
            of_set.append(np.stack(told) == labels[test])
    return right[0], right[1], tests


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
    return rates_of(entries, lost) | {"plain": float(np.mean(plain))}


@dataclass(frozen=True)
class FoldWorld:
    """A simulated cross-validation: `rows` in `groups` (0: without) and classes, `folds`, `rounds`.

    `lost` is the share of the classes' distance that the second layer set does not see. `grouped`: folds of
    whole groups. `shared`: all rounds divide the rows alike. `columns`, `classes`, `learner` and `scale`, the
    classes' distance in stds of a row, say how hard it is.
    """

    rows: int = 520
    groups: int = 0
    folds: int = 5
    rounds: int = 2
    lost: float = 0.0
    grouped: bool = False
    shared: bool = False
    columns: int = COLUMNS
    classes: int = CLASSES
    learner: str = "nearest mean"
    scale: float = 1.2


def fold_experiment(
    rng: np.random.Generator, world: FoldWorld, sets: int = 2, lost: tuple[float, ...] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Whether each row was told right in each round, for `sets` layer sets: (sets, m, n); the runs (m, n)
    behind the answers; and the group (n,) of each row.

    The sets see the same rows through noise of their own, which is half of all noise. A run learns from seven
    eighths of the rows that it does not test. Rows of a group share a shift of half the size of a row's own
    noise. The sets lose the shares `lost`, by default none and `world.lost`.
    """
    n, labels = world.rows, np.arange(world.rows) % world.classes
    group = None
    if world.groups:  # each of one class
        group = labels + world.classes * rng.integers(0, world.groups // world.classes, n)
    common, columns = rng.normal(size=(n, world.columns)), []
    for share in lost or (0.0, world.lost):
        means = world.scale * (1 - share) * np.eye(world.classes, world.columns)
        x = means[labels] + (common + rng.normal(size=common.shape)) * math.sqrt(0.5)
        if group is not None:
            x = x + 0.5 * rng.normal(size=(world.groups, world.columns))[group]
        columns.append(x)
    right, runs = np.zeros((sets, world.rounds, n), bool), np.zeros((world.rounds, n), int)
    units = np.arange(n) if group is None or not world.grouped else group
    for j in range(world.rounds):
        if j == 0 or not world.shared:
            places = rng.permutation(units.max() + 1)[units] % world.folds
        for fold in range(world.folds):
            test, rest = np.flatnonzero(places == fold), np.flatnonzero(places != fold)
            train = some_of(rng, rest, 7 / 8)
            runs[j, test] = j * world.folds + fold
            for of_set, x in zip(right, columns, strict=True):
                of_set[j, test] = LEARNERS[world.learner](x, labels, train, test) == labels[test]
    return right, runs, group


def simulate_folds(world: FoldWorld, experiments: int, seed: int) -> dict[str, float]:
    """Mean drop, which is the truth about new data sets, and rates over the experiments."""
    rng = np.random.default_rng([seed, world.rows, world.groups, world.rounds, round(1e6 * world.lost)])
    entries = []
    for _ in range(experiments):
        (first, second), runs, groups = fold_experiment(rng, world)
        entries.append(difference_of_folds((first, second), MARGIN, runs, groups))
    rates = rates_of(entries, world.lost)
    if world.groups:
        held = [covers(entry["same_groups"]["interval"], rates["drop"]) for entry in entries]
        rates["covered by rows"] = float(np.mean(held))
    return rates


def simulate_data_sets(world: FoldWorld, data_sets: int, seed: int) -> list[dict[str, float]]:
    """Whether the standard error is right, from disjoint data sets without a drop: for one round, two, ...
    the standard deviation of the drops over the data sets, the mean standard error that each of them claims,
    their ratio with its Monte-Carlo error, and how many claimed a drop.
    """
    rng = np.random.default_rng([seed, world.rows, data_sets])
    drops: list[list[float]] = [[] for _ in range(world.rounds)]
    errors: list[list[float]] = [[] for _ in range(world.rounds)]
    claims: list[list[bool]] = [[] for _ in range(world.rounds)]
    for _ in range(data_sets):
        (first, second), runs, groups = fold_experiment(rng, world)
        D = first.astype(float) - second
        for j in range(world.rounds):
            spread = fold_standard_error(D[: j + 1], runs[: j + 1], groups)
            drops[j].append(D[: j + 1].mean())
            errors[j].append(spread.error)
            claims[j].append(p_of_mean(float(D[: j + 1].mean()), spread) < LEVEL)
    found = []
    for j in range(world.rounds):
        scatter, claimed = float(np.std(drops[j], ddof=1)), float(np.mean(errors[j]))
        ratio = scatter / claimed
        found.append(
            {
                "scatter": scatter,
                "standard error": claimed,
                "ratio": ratio,
                "error of ratio": ratio / math.sqrt(2 * (data_sets - 1)),
                "claims": sum(claims[j]),
            }
        )
    return found


def rates_of(entries: list[dict[str, Any]], lost: float) -> dict[str, float]:
    """Mean drop, and how often a drop is claimed and the interval covers the truth. Without a loss the truth
    is 0, else it is the mean drop.
    """
    truth = float(np.mean([entry["drop"] for entry in entries])) if lost else 0.0
    return {
        "drop": truth,
        "claimed": float(np.mean([entry["p"] < LEVEL for entry in entries])),
        "covered": float(np.mean([covers(entry["interval"], truth) for entry in entries])),
    }


def covers(interval: tuple[float, float], truth: float) -> bool:
    """True if an interval covers the truth."""
    return interval[0] <= truth <= interval[1]


# --- several representations at once


def simulate_family(world: FoldWorld, falling: int, experiments: int, seed: int) -> dict[str, float]:
    """Nine representations of the same rows, of which `falling` lose `world.lost` with the second layer set.

    `wrong`: a drop of one that does not fall is claimed, by max-T and by Holm's method; `found`: the share of
    the falling ones whose drop is claimed; `together`: the simultaneous intervals cover all nine truths.
    """
    rng = np.random.default_rng([seed, world.rows, world.groups, falling])
    lost = (0.0,) * FAMILY_SIZE + (world.lost,) * falling + (0.0,) * (FAMILY_SIZE - falling)
    found = []
    for _ in range(experiments):
        right, runs, groups = fold_experiment(rng, world, 2 * FAMILY_SIZE, lost)
        samples = [
            Sample({"": hits}, {"": np.arange(world.rows)}, RATIO, 0.0, groups, runs) for hits in right
        ]
        pairs = {str(k): (samples[k], samples[FAMILY_SIZE + k]) for k in range(FAMILY_SIZE)}
        found.append(compare_layer_sets(pairs, Margin(MARGIN)))
    truth = [
        float(np.mean([entries[k]["drop"] for entries in found])) if k < falling else 0.0 for k in range(9)
    ]
    rates = {}
    for name, key in (("max-T", "p_max_t"), ("Holm", "p_holm")):
        claims = np.array([[entry[key] < LEVEL for entry in entries] for entries in found])
        rates[f"wrong by {name}"] = float(claims[:, falling:].any(1).mean())
        rates[f"found by {name}"] = float(claims[:, :falling].mean()) if falling else math.nan
    together = [
        all(covers(entry["simultaneous_interval"], t) for entry, t in zip(entries, truth, strict=True))
        for entries in found
    ]
    return {"drop": max(truth), **rates, "together": float(np.mean(together))}


# --- the table of the documentation

ONE_SPLIT = {
    **{f"{n} rows, {runs} runs": World(n=n, runs=runs, run_sd=0.02) for n in (105, 520) for runs in (3, 10)},
    "10,000 rows, 10 runs": World(n=10_000, run_sd=0.02),
    "105 rows in 20 groups alike": World(n=105, groups=20, group_sd=0.0, run_sd=0.02),
    "105 rows in 20 groups that differ": World(n=105, groups=20, group_sd=0.5, run_sd=0.02),
    "520 rows in 20 groups that differ": World(n=520, groups=20, group_sd=0.5, run_sd=0.02),
    "520 rows in 100 groups that differ": World(n=520, groups=100, group_sd=0.5, run_sd=0.02),
    "1,500 rows in 500 groups that differ": World(n=1500, groups=500, group_sd=0.5, run_sd=0.02),
    "520 rows, nearly deterministic": World(n=520, weight=0.1, run_sd=0.02),
}
HARD = FoldWorld(columns=60, classes=10, scale=1.6, learner="ridge")
FIVE_FOLDS = {
    "105 rows": FoldWorld(rows=105),
    "520 rows": FoldWorld(rows=520),
    "10,000 rows": FoldWorld(rows=10_000),
    "105 rows, ridge": replace(HARD, rows=105),
    "520 rows, ridge": replace(HARD, rows=520),
    "520 rows, ridge, one round": replace(HARD, rows=520, rounds=1),
    "520 rows, ridge, rounds that share their folds": replace(HARD, rows=520, shared=True),
    "520 rows in 20 groups": FoldWorld(rows=520, groups=20),
    "520 rows in 100 groups": FoldWorld(rows=520, groups=100),
    "520 rows in 100 groups, whole in a fold": FoldWorld(rows=520, groups=100, grouped=True),
    "520 rows in 260 groups, whole, ridge": replace(HARD, rows=520, groups=260, grouped=True),
    "520 rows in 100 groups, whole, one round": FoldWorld(rows=520, groups=100, grouped=True, rounds=1),
    "520 rows in 260 groups, whole, ridge, one round": replace(
        HARD, rows=520, groups=260, grouped=True, rounds=1
    ),
    "1,500 rows in 500 groups, whole in a fold": FoldWorld(rows=1500, groups=500, grouped=True),
    "520 rows, nearly deterministic": FoldWorld(rows=520, scale=4.0),
}
