#!/usr/bin/env python3
"""How often the tests and intervals of inference.py are right: simulated experiments whose true drop is known, as a Markdown table.

For each number of test rows and each true drop: how often a drop is claimed (p < 0.05), how often the 95 % interval holds the
truth, and the same of two ways that this program does not take: the sign-flip test alone, which takes the runs that happened
to be made for all runs, and the t test over seeds, which takes the test rows that happened to be drawn for all rows.

With --groups the examples come in groups which are the sample. With --splits K small learners are trained on K random splits of
simulated rows instead, and the corrected test over splits stands beside a plain t test over them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inference import LEVEL, difference, difference_over_splits  # noqa: E402

GRID = np.linspace(0, 1, 4001)


@functools.cache
def quantiles(mean: float) -> np.ndarray:
    """Of an example's chance of being right, on GRID: Beta with this mean and 1.5 observations' weight, so that many are easy or hopeless."""
    return scipy.stats.beta.ppf(GRID, 1.5 * mean, 1.5 * (1 - mean))


def experiment(rng: np.random.Generator, n: int = 201, runs: int = 10, drop: float = 0.0, base: float = 0.45, run_sd: float = 0.0,
               groups: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Whether each run was right on each example, for two layer sets: (R, n) twice, and the group of each example.

    Every example has its own chance of being right with each layer set, of means base and base - drop, correlated through
    what makes an example, or its group, easy; every run shifts all examples by a normal amount of std `run_sd`.
    """
    group = rng.integers(0, groups, n) if groups else None
    shared = rng.normal(size=n)
    right = []
    for mean in (base, base - drop):
        z = shared + 0.8 * rng.normal(size=n) + (rng.normal(size=groups)[group] if groups else 0)
        chance = np.interp(scipy.stats.norm.cdf(z / math.sqrt(1.64 + bool(groups))), GRID, quantiles(mean))
        right.append(rng.random((runs, n)) < chance + run_sd * rng.normal(size=(runs, 1)))
    return *right, group


CLASSES, COLUMNS = 4, 12
RATIO = 0.2 / 0.7          # test to training rows


def split_experiment(rng: np.random.Generator, rows: int = 200, splits: int = 5, runs: int = 3,
                     lost: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Whether each run was right on the test rows of K random splits, for two layer sets: (R, n) a split, twice; and the test rows.

    Rows are drawn from four normal classes, seen through columns of each layer set's own noise; the second set's classes are
    nearer to each other by the part `lost`. A run takes the nearest class mean of a random nine tenths of the training rows.
    The test set, the training set and the run all vary, and splits share most of their rows.
    """
    labels = rng.integers(0, CLASSES, rows)
    seen = [scale * np.eye(CLASSES, COLUMNS)[labels] + rng.normal(size=(rows, COLUMNS)) for scale in (1.2, 1.2 * (1 - lost))]
    right, tests = ([], []), []
    for _ in range(splits):
        order = rng.permutation(rows)
        train, test = order[:round(0.7 * rows)], order[round(0.8 * rows):]
        tests.append(test)
        for x, found in zip(seen, right, strict=True):
            of_split = []
            for _ in range(runs):
                chosen = rng.choice(train, round(0.9 * len(train)), replace=False)
                means = np.stack([x[chosen[labels[chosen] == c]].mean(0) for c in range(CLASSES)])
                of_split.append(((x[test][:, None] - means) ** 2).sum(2).argmin(1) == labels[test])
            found.append(np.stack(of_split))
    return *right, tests


def simulate_splits(rows: int, lost: float, splits: int, experiments: int, seed: int) -> dict[str, float]:
    """Mean drop, which is the truth about new data sets, and rates over the experiments."""
    rng, entries, plain = np.random.default_rng([seed, rows, splits, round(1e6 * lost)]), [], []
    for _ in range(experiments):
        first, second, tests = split_experiment(rng, rows, splits, lost=lost)
        entries.append(difference_over_splits(first, second, 0.02, tests, RATIO))
        drops = entries[-1]["drops"]
        plain.append(np.ptp(drops) > 0 and scipy.stats.ttest_1samp(drops, 0).pvalue < LEVEL)
    truth = float(np.mean([entry["drop"] for entry in entries])) if lost else 0.0
    hits = [(entry["p"] < LEVEL, entry["interval"][0] <= truth <= entry["interval"][1]) for entry in entries]
    return {"drop": truth, **dict(zip(("claimed", "covered"), np.mean(hits, axis=0), strict=True)), "plain": np.mean(plain)}


def simulate(n: int, drop: float, experiments: int, run_sd: float, seed: int, groups: int = 0) -> dict[str, float]:
    """Rates over the experiments."""
    rng, hits = np.random.default_rng([seed, n, round(1e6 * drop)]), []
    for _ in range(experiments):
        first, second, group = experiment(rng, n=n, drop=drop, run_sd=run_sd, groups=groups)
        found = difference(first, second, margin=0.02, groups=group)
        low, high = found["training_noise_interval"]
        hits.append((found["p"] < LEVEL, found["interval"][0] <= drop <= found["interval"][1], found["p_sign_flip"] < LEVEL,
                     scipy.stats.ttest_1samp(first.mean(1) - second.mean(1), 0).pvalue < LEVEL, low <= drop <= high))
    return dict(zip(("claimed", "covered", "sign flips", "seeds", "seeds cover"), np.mean(hits, axis=0), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experiments", type=int, default=1000, help="for each row of the table (default: 1000)")
    parser.add_argument("--rows", type=int, nargs="+", default=[201, 2000, 10000], help="test rows (default: 201 2000 10000)")
    parser.add_argument("--drops", type=float, nargs="+", default=[0, 0.01, 0.02, 0.05, 0.1], help="true drops (default: 0 0.01 0.02 0.05 0.1)")
    parser.add_argument("--run-sd", type=float, default=0.02, help="std of what a run shifts all examples by (default: 0.02)")
    parser.add_argument("--groups", type=int, default=0, help="of the test rows (default: 0, none)")
    parser.add_argument("--splits", type=int, nargs="+", default=[], help="numbers of splits; --rows are then those of the data set")
    parser.add_argument("--lost", type=float, nargs="+", default=[0, 0.2, 0.5], help="with --splits: of the classes' distance (default: 0 0.2 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.splits:
        print("| rows | splits | true drop, points | drop claimed | 95 % interval holds it | claimed by a plain t test over splits |")
        print("|---|---|---|---|---|---|")
        for rows, splits, lost in itertools.product(arguments.rows, arguments.splits, arguments.lost):
            found = simulate_splits(rows, lost, splits, arguments.experiments, arguments.seed)
            print(f"| {rows} | {splits} | {100 * found['drop']:.1f} | {100 * found['claimed']:.1f} % | {100 * found['covered']:.1f} % "
                  f"| {100 * found['plain']:.1f} % |", flush=True)
        return
    print("| test rows | true drop, points | drop claimed | 95 % interval holds it | claimed by sign flips alone | by a t test over seeds "
          "| BCa interval over seeds holds it |")
    print("|---|---|---|---|---|---|---|")
    for n in arguments.rows:
        for drop in arguments.drops:
            rates = simulate(n, drop, arguments.experiments, arguments.run_sd, arguments.seed, arguments.groups)
            print(f"| {n} | {100 * drop:g} | " + " | ".join(f"{100 * rate:.1f} %" for rate in rates.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
