"""Simulated predictions in worlds that are hard on a test, and how often claims and intervals are right:
unequal or few groups, heavy tails, failing runs, accuracies near chance or 1, uneven classes, runs that are
correlated.

right = threshold + row + group + row x layer set + group x layer set + run + noise > 0, each part normal or,
for heavy tails, Student's t. The threshold gives each class its accuracy with each layer set, so the true
drop is known.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.stats

from ablation.estimators import (
    LEVEL,
    POWER,
    StandardError,
    p_of_equivalence,
    p_values_of_mean,
    smallest_drop,
    standard_error,
    unit_means,
)
from ablation.family import Margin, p_above_chance, primary
from ablation.fold_estimators import fold_standard_error
from ablation.samples import Sample

ROW_SD, ROW_SET_SD, GROUP_SD, GROUP_SET_SD = 0.7, 0.5, 0.5, 0.4  # in units of the noise of one answer
DRAWS = 2_000_000  # that the thresholds are from: their error is 0.04 points of accuracy
CHANCE = 0.1


@dataclass(frozen=True)
class ProbitWorld:
    """A simulated experiment of two layer sets.

    `groups` (count, smallest, largest size) are of sizes evenly between; None: `rows` rows without groups.
    `folds` of whole groups unless `divided`, `rounds` of them, each row tested once in each; 0 folds: one
    split, tested by `rounds` runs. Classes have `shares` of the groups, accuracies `recalls` with the first
    layer set, and lose `drops` with the second. `run_sd` is a run's shift (0.08: 2 points of accuracy at
    33 %); `overlap` the correlation of all runs of a layer set; `failing` the share of runs that answer by
    chance; `tails` the degrees of freedom of Student's t of rows and groups.
    """

    groups: tuple[int, int, int] | None = (260, 2, 2)
    rows: int = 520
    folds: int = 5
    rounds: int = 2
    divided: bool = False
    shares: tuple[float, ...] = (1.0,)
    recalls: tuple[float, ...] = (0.33,)
    drops: tuple[float, ...] = (0.0,)
    run_sd: float = 0.08
    overlap: float = 0.0
    failing: float = 0.0
    tails: float = np.inf

    def falling(self, drop: float) -> ProbitWorld:
        """The same world with a drop of `drop` in all classes, before runs fail."""
        return replace(self, drops=(drop,) * len(self.recalls))

    @property
    def truth(self) -> float:
        """The true drop of the balanced accuracy; with one class, of the accuracy."""
        return float(np.mean(self.drops)) * (1 - self.failing)


def scattered(rng: np.random.Generator, tails: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draws of a row's or group's part: normal, or Student's t."""
    return rng.normal(size=shape) if tails == np.inf else rng.standard_t(tails, size=shape)


@functools.cache
def thresholds(accuracies: tuple[float, ...], tails: float, run_sd: float, has_groups: bool) -> np.ndarray:
    """The thresholds that give these accuracies."""
    rng = np.random.default_rng(0)
    total = rng.normal(size=DRAWS) * np.sqrt(1 + run_sd**2)
    parts = (ROW_SD, ROW_SET_SD, *((GROUP_SD, GROUP_SET_SD) if has_groups else ()))
    for sd in parts:
        total += sd * scattered(rng, tails, (DRAWS,))
    return -np.quantile(total, 1 - np.array(accuracies))


def probit_experiment(
    rng: np.random.Generator, world: ProbitWorld, representations: tuple[ProbitWorld, ...] = ()
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Whether each run was right: (K, 2, m, n) of K representations, which differ from `world` in `recalls`
    and `drops` alone and share the rows' and groups' own parts; the runs (m, n) of a cross-validation; the
    groups (n,) and classes (n,) of the rows.
    """
    of = representations or (world,)
    K, m = len(of), world.rounds
    groups = None
    if world.groups is not None:
        count, low, high = world.groups
        groups = np.repeat(np.arange(count), np.linspace(low, high, count).round().astype(int))
    n = world.rows if groups is None else len(groups)
    units = np.arange(n) if groups is None else groups
    count = units.max() + 1
    classes = np.searchsorted(np.cumsum(world.shares)[:-1], (rng.permutation(count) + 0.5) / count)[units]
    latent = ROW_SD * scattered(rng, world.tails, (n,)) + ROW_SET_SD * scattered(rng, world.tails, (K, 2, n))
    if groups is not None:
        latent += (
            GROUP_SD * scattered(rng, world.tails, (count,))
            + GROUP_SET_SD * scattered(rng, world.tails, (K, 2, count))
        )[..., groups]
    for k, one in enumerate(of):
        for i, accuracies in enumerate((one.recalls, np.subtract(one.recalls, one.drops))):
            latent[k, i] += thresholds(
                tuple(map(float, accuracies)), world.tails, world.run_sd, groups is not None
            )[classes]
    runs = divided(rng, world, units)
    index = np.repeat(np.arange(m)[:, None], n, 1) if runs is None else runs
    trained = index.max() + 1
    shift = np.sqrt(1 - world.overlap) * rng.normal(size=(K, 2, trained))
    shift += np.sqrt(world.overlap) * rng.normal(size=(K, 2, 1))
    right = latent[:, :, None] + world.run_sd * shift[..., index] + rng.normal(size=(K, 2, m, n)) > 0
    if world.failing:
        fails = rng.random((K, 2, trained)) < world.failing
        right = np.where(fails[..., index], rng.random(right.shape) < CHANCE, right)
    return right, runs, groups, classes


def divided(rng: np.random.Generator, world: ProbitWorld, units: np.ndarray) -> np.ndarray | None:
    """The run (m, n) that tests each row in each round; None in one split."""
    if not world.folds:
        return None
    if world.divided:
        units = np.arange(len(units))
    rounds = [
        j * world.folds + (rng.permutation(units.max() + 1) % world.folds)[units] for j in range(world.rounds)
    ]
    return np.stack(rounds)


class Told(NamedTuple):
    """What one experiment tells of a drop."""

    drop: float
    spread: StandardError
    p: float
    right: np.ndarray  # (2, m, n)
    groups: np.ndarray | None

    @property
    def claims(self) -> bool:
        """True if a drop or a rise is claimed."""
        return self.p < LEVEL

    def holds(self, truth: float) -> bool:
        """True if the 95 % interval covers the true drop."""
        return abs(self.drop - truth) <= self.spread.half_width


def answered(right: np.ndarray, runs: np.ndarray | None, groups: np.ndarray | None) -> Told:
    """The test and the interval of two layer sets (2, m, n), by folds or by one split."""
    D = right[0].astype(float) - right[1]
    spread = standard_error(D, groups) if runs is None else fold_standard_error(D, runs, groups)
    return Told(float(D.mean()), spread, max(p_values_of_mean(D, spread, groups)), right, groups)


def experiments_of(world: ProbitWorld, experiments: int, seed: int) -> Iterator[Told]:
    """What each of several experiments in a world tells."""
    rng = np.random.default_rng([seed, 1])
    for _ in range(experiments):
        right, runs, groups, _ = probit_experiment(rng, world)
        yield answered(right[0], runs, groups)


def simulate_world(world: ProbitWorld, experiments: int, seed: int) -> dict[str, float]:
    """How often a drop is claimed and the interval holds the true drop, and the true standard deviation of
    the drops over the mean standard error.
    """
    found = list(experiments_of(world, experiments, seed))
    scatter = float(np.std([one.drop for one in found]))
    return {
        "drop": world.truth,
        "claimed": float(np.mean([one.claims for one in found])),
        "covered": float(np.mean([one.holds(world.truth) for one in found])),
        "ratio": scatter / float(np.mean([one.spread.error for one in found])),
    }


def simulate_equal(world: ProbitWorld, margin: float, experiments: int, seed: int) -> float:
    """How often two layer sets are called equal to within the margin."""
    claims = []
    for one in experiments_of(world, experiments, seed):
        d = unit_means((one.right[0].astype(float) - one.right[1]).mean(0), one.groups)
        claims.append(p_of_equivalence(one.drop, one.spread, d, margin) < LEVEL)
    return float(np.mean(claims))


def simulate_smallest(world: ProbitWorld, experiments: int, seed: int) -> dict[str, float]:
    """The median of the smallest drops that experiments without a drop state, and how often a drop of that
    size is found; the same without the wider standard error that a drop near an accuracy of 1 has.
    """
    found, rates = list(experiments_of(world, experiments, seed)), {}
    for name, accuracies in (
        ("", [one.right[0].mean() for one in found]),
        (" as it was", [None] * len(found)),
    ):
        stated = float(
            np.median(
                [
                    smallest_drop(
                        one.spread.half_width + scipy.stats.t.ppf(POWER, one.spread.dof) * one.spread.error, a
                    )
                    for one, a in zip(found, accuracies, strict=True)
                ]
            )
        )
        falling = experiments_of(world.falling(stated), experiments, seed + 1)
        rates["stated" + name] = stated
        rates["found" + name] = float(np.mean([one.claims for one in falling]))
    return rates


def samples_of_world(
    rng: np.random.Generator, world: ProbitWorld, representations: tuple[ProbitWorld, ...] = ()
) -> tuple[dict[str, tuple[Sample, Sample]], np.ndarray]:
    """Samples of both layer sets by representation, and the rows' classes."""
    right, runs, groups, classes = probit_experiment(rng, world, representations)
    rows = {"": np.arange(right.shape[-1])}
    samples = [[Sample({"": hits}, rows, 0.25, CHANCE, groups, runs) for hits in both] for both in right]
    return {str(k): (first, second) for k, (first, second) in enumerate(samples)}, classes


def simulate_uneven(world: ProbitWorld, experiments: int, seed: int) -> dict[str, float]:
    """Of uneven classes: how often accuracy and balanced accuracy are above chance, and the rates of the drop
    of the balanced accuracy where it is.
    """
    rng, found = np.random.default_rng([seed, 3]), []
    for _ in range(experiments):
        pairs, classes = samples_of_world(rng, world)
        chance = float(np.bincount(classes).max() / len(classes))
        plain = [replace(sample, chance=chance) for sample in pairs["0"]]
        first, second = (sample.balanced(classes) for sample in plain)
        entry = primary({"0": (first, second)}, Margin())
        is_above = p_above_chance(plain) < LEVEL
        if entry is None:
            found.append((is_above, False, False, np.nan))
        else:
            low, high = entry["interval"]
            found.append((is_above, True, entry["p"] < LEVEL, low <= world.truth <= high))
    plain_above, above, claimed, held = np.array(found, float).T
    return {
        "drop": world.truth,
        "claimed": float(claimed.mean()),
        "covered": float(np.nanmean(held)),
        "above": float(above.mean()),
        "accuracy above": float(plain_above.mean()),
    }


UNEQUAL, FEW_UNEQUAL = (60, 1, 50), (20, 1, 50)
FREE = ProbitWorld(None)
ONE = ProbitWorld(groups=None, rows=105, folds=0, rounds=10)
WORLDS = {  # the drop that is looked for beside the world
    "260 groups of 2, whole in a fold": (ProbitWorld(), 0.08),
    "60 groups of 1 to 50": (ProbitWorld(UNEQUAL), 0.08),
    "20 groups of 1 to 50": (ProbitWorld(FEW_UNEQUAL), 0.08),
    "20 groups of 1 to 50, divided": (ProbitWorld(FEW_UNEQUAL, divided=True), 0.08),
    "6 groups of 40": (ProbitWorld((6, 40, 40)), 0.10),
    "8 groups of 40": (ProbitWorld((8, 40, 40)), 0.10),
    "12 groups of 40": (ProbitWorld((12, 40, 40)), 0.10),
    "20 groups of 26, heavy tails": (ProbitWorld((20, 26, 26), tails=2.5), 0.08),
    "60 groups of 1 to 50, heavy tails": (ProbitWorld(UNEQUAL, tails=2.5), 0.08),
    "a run fails with 5 %": (ProbitWorld(failing=0.05), 0.08),
    "a run fails with 5 %, one round": (ProbitWorld(failing=0.05, rounds=1), 0.08),
    "a run fails with 5 %, one split of 520": (replace(ONE, rows=520, failing=0.05), 0.08),
    "near chance: 12 %": (ProbitWorld(recalls=(0.12,)), 0.02),
    "near the ceiling: 99 %": (ProbitWorld(recalls=(0.99,)), 0.01),
    "near the ceiling, one split of 105": (replace(ONE, recalls=(0.99,)), 0.02),
    "one split of 105": (ONE, 0.08),
    "one split of 105, 5 runs": (replace(ONE, rounds=5), 0.08),
    "5 runs (one round)": (ProbitWorld(rounds=1), 0.08),
    "5 runs, 20 groups of 26": (ProbitWorld((20, 26, 26), rounds=1), 0.08),
    "20 runs (four rounds)": (ProbitWorld(rounds=4), 0.08),
    "runs scatter by 6 points": (ProbitWorld(run_sd=0.24), 0.08),
    "runs scatter by 6 points, one round": (ProbitWorld(run_sd=0.24, rounds=1), 0.08),
    "520 rows without groups": (ProbitWorld(None), 0.08),
    "overlap .3": (ProbitWorld(overlap=0.3), 0.08),
    "overlap .3, 520 rows without groups": (ProbitWorld(None, overlap=0.3), 0.08),
    "overlap .3, 2,000 rows in 1,000 groups": (ProbitWorld((1000, 2, 2), overlap=0.3), 0.04),
    "overlap .3, 5,000 rows without groups": (ProbitWorld(None, rows=5000, overlap=0.3), 0.03),
}


TEN_TO_ONE = (10 / 11, 1 / 11)
UNEVEN_WORLDS = {
    "2 classes 10:1, recalls 80, 80": ProbitWorld(shares=TEN_TO_ONE, recalls=(0.8, 0.8), drops=(0.0, 0.0)),
    "2 classes 10:1, 80, 80 to 65, 65": ProbitWorld(
        shares=TEN_TO_ONE, recalls=(0.8, 0.8), drops=(0.15, 0.15)
    ),
    "2 classes 10:1, recalls 97, 40": ProbitWorld(shares=TEN_TO_ONE, recalls=(0.97, 0.4), drops=(0.0, 0.0)),
    "2 classes 10:1, 97, 40 to 99, 20": ProbitWorld(
        shares=TEN_TO_ONE, recalls=(0.97, 0.4), drops=(-0.02, 0.2)
    ),
    "10 classes 10:1:..:1, recalls 40": ProbitWorld(
        shares=(10 / 19, *[1 / 19] * 9), recalls=(0.4,) * 10, drops=(0.0,) * 10
    ),
    "10 classes 10:1:..:1, 40 to 28": ProbitWorld(
        shares=(10 / 19, *[1 / 19] * 9), recalls=(0.4,) * 10, drops=(0.12,) * 10
    ),
}
EQUAL_MARGIN = 0.02
EQUAL_WORLDS = {
    "one split of 105 at 99 %": replace(ONE, recalls=(0.99,)),
    "one split of 105 at 99 %, 5 runs": replace(ONE, recalls=(0.99,), rounds=5),
    "one split of 105 at 97 %": replace(ONE, recalls=(0.97,)),
    "one split of 520 at 99 %": replace(ONE, rows=520, recalls=(0.99,)),
    "260 groups of 2 at 99 %": ProbitWorld(recalls=(0.99,)),
    "520 rows without groups at 99 %": replace(FREE, recalls=(0.99,)),
    "60 groups of 1 to 50 at 95 %": ProbitWorld(UNEQUAL, recalls=(0.95,)),
    "5,000 rows without groups at 33 %": replace(FREE, rows=5000),
}
SMALLEST_WORLDS = {
    "260 groups of 2 at 33 %": ProbitWorld(),
    "260 groups of 2 at 97 %": ProbitWorld(recalls=(0.97,)),
    "60 groups of 2 at 97 %": ProbitWorld((60, 2, 2), recalls=(0.97,)),
    "60 groups of 2 at 90 %": ProbitWorld((60, 2, 2), recalls=(0.9,)),
    "one split of 105 at 97 %": replace(ONE, recalls=(0.97,)),
    "one split of 105 at 33 %": ONE,
    "20 groups of 26 at 33 %": ProbitWorld((20, 26, 26)),
}
