#!/usr/bin/env python3
"""How often the tests and intervals of inference.py are right: simulated experiments whose true drop is known, as a Markdown table.

For each number of test rows and each true drop: how often a drop is claimed (p < 0.05), how often the 95 % interval holds the
truth, and the same of two ways that this program does not take: the sign-flip test alone, which takes the runs that happened
to be made for all runs, and the t test over seeds, which takes the test rows that happened to be drawn for all rows.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inference import LEVEL, difference  # noqa: E402

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


def simulate(n: int, drop: float, experiments: int, run_sd: float, seed: int) -> dict[str, float]:
    """Rates over the experiments."""
    rng, hits = np.random.default_rng([seed, n, round(1e6 * drop)]), []
    for _ in range(experiments):
        first, second, _ = experiment(rng, n=n, drop=drop, run_sd=run_sd)
        found = difference(first, second, margin=0.02)
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
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print("| test rows | true drop, points | drop claimed | 95 % interval holds it | claimed by sign flips alone | by a t test over seeds "
          "| BCa interval over seeds holds it |")
    print("|---|---|---|---|---|---|---|")
    for n in arguments.rows:
        for drop in arguments.drops:
            rates = simulate(n, drop, arguments.experiments, arguments.run_sd, arguments.seed)
            print(f"| {n} | {100 * drop:g} | " + " | ".join(f"{100 * rate:.1f} %" for rate in rates.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
