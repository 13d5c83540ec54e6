"""Tests of several representations at once: one primary hypothesis first, then each by itself.

The primary hypothesis is the mean drop over the representations. Only if it is rejected are single drops
claimed, with p-values of the step-down max-T method (Westfall and Young 1993), which keeps the family-wise
error and uses that representations are correlated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from ablation.estimators import LEVEL, POWER, holm, p_of_mean, smallest_drop
from ablation.resampling import MANY_UNITS, RESAMPLING_SEED
from ablation.samples import Sample

JOINT_FLIPS = 9999  # random signs of the joint test
SIGNS = np.array((-1, 1), np.int8)
SIGNS_AT_ONCE = 2**27  # a GB while they are multiplied
CLEARLY_ABOVE = 4.0  # standard errors above chance, from which on a share of it is stated
CORRELATIONS = (0.1, 0.3)  # of runs whose training sets overlap: how far the primary interval rests on none
FEWEST_UNITS = 6  # with fewer, no choice of signs is rarer than 1 in 32: nothing can be shown


def drops_by_row(first: Sample, second: Sample) -> np.ndarray:
    """The drop of each test row, the mean over its runs, of all splits that both have, one after another."""
    splits = first.shared_splits(second)
    return np.concatenate(
        [first.right[split].mean(0) - second.right[split].astype(float).mean(0) for split in splits]
    )


def unit_sums(by_row: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Sums (K, G) of values (K, n) over the rows of each unit; `units` (n,)."""
    index = np.unique(units, return_inverse=True)[1]
    return np.stack([np.bincount(index, row) for row in by_row])


def joint_flips(sums: np.ndarray, seed: int = RESAMPLING_SEED) -> np.ndarray:
    """Standardised means (1 + B, K) of K representations under random signs of the units, from sums (K, G).

    The same signs for all representations keep their correlation. The first line has the observed signs.
    """
    blocks = sign_blocks(JOINT_FLIPS, sums.shape[1], seed)
    flipped = np.vstack([sums.sum(1), *(signs.astype(np.float64) @ sums.T for signs in blocks)])
    size = np.sqrt((sums**2).sum(1))
    return np.divide(flipped, size, out=np.zeros_like(flipped), where=size > 0)


def sign_blocks(flips: int, units: int, seed: int) -> Iterator[np.ndarray]:
    """Random signs (B, G) of the units, in blocks of flips of at most SIGNS_AT_ONCE signs."""
    if units <= MANY_UNITS:
        yield drawn_signs(flips, units, seed)
        return
    rng = np.random.default_rng(seed)
    most = max(1, SIGNS_AT_ONCE // units)
    for start in range(0, flips, most):
        yield rng.choice(SIGNS, (min(most, flips - start), units))


@functools.lru_cache(maxsize=1)
def drawn_signs(flips: int, units: int, seed: int) -> np.ndarray:
    """Random signs (B, G) of few units: the same for every comparison on the same rows."""
    return np.random.default_rng(seed).choice(SIGNS, (flips, units))


# Of an entry whose rows or groups are too few for any claim.
NOTHING_TOLD = {
    "p": 1.0,
    "p_equivalence": 1.0,
    "interval": (-1.0, 1.0),
    "standard_error": None,
    "smallest": None,
    "retained": None,
}


class Margin(NamedTuple):
    """What counts as equal: a difference of less than `points` (a fraction), or, if `share` > 0, of less
    than that share of the accuracy above chance with the first layer set.
    """

    points: float = 0.02
    share: float = 0.0


def step_down(p_values: list[float], flips: np.ndarray, sides: np.ndarray | None = None) -> list[float]:
    """p-values adjusted by the step-down max-T method over joint flips (B, K).

    A representation's own p-value is turned into a normal deviate, and set against the largest deviate under
    the flips of it and of all less significant ones. So the runs' spread, which is in the p-values and not in
    the flips, counts too. With `sides` (K,), 1 or -1, the p-values are one-sided, and so are the deviates.
    """
    observed = scipy.stats.norm.isf(np.clip(p_values, 1e-300, 1) / (2 if sides is None else 1))
    order = np.argsort(-observed, kind="stable")
    deviates = np.abs(flips) if sides is None else flips * sides
    remaining = np.maximum.accumulate(deviates[:, order[::-1]], axis=1)[:, ::-1]
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, k in enumerate(order):
        above = float((remaining[:, rank] >= observed[k] - 1e-9).mean())
        running = max(running, above, p_values[k])
        adjusted[k] = running
    return adjusted.tolist()


def critical_deviate(flips: np.ndarray) -> float:
    """The deviate that the largest of all representations passes with probability LEVEL."""
    return float(np.quantile(np.abs(flips).max(1), 1 - LEVEL))


def adjust_family(entries: list[dict[str, Any]], pairs: list[tuple[Sample, Sample]]) -> None:
    """Add to each entry of a comparison what holds for all of them at once; `pairs` are its samples.

    `p_holm` and `p_max_t`, and the same for the equivalence; `simultaneous_interval`, which hold all drops
    together with 95 %; and `smallest`, the drop that would be found after the correction with a probability
    of POWER. Where the representations do not share their test rows, Holm's method stands in for max-T.
    """
    if not entries:
        return
    for key in ("p", "p_equivalence"):
        for entry, p in zip(entries, holm([entry[key] for entry in entries]), strict=True):
            entry[f"{key}_holm"] = p
    drops = [drops_by_row(*pair) for pair in pairs]
    units = [first.units_of(first.shared_splits(second)) for first, second in pairs]
    if all(np.array_equal(units[0], own) for own in units):
        flips = joint_flips(unit_sums(np.stack(drops), units[0]))
        adjusted = step_down([entry["p"] for entry in entries], flips)
        # The margin that a difference is nearer to decides: below the upper one, or above the lower one.
        sides = np.array([-1 if entry["drop"] >= 0 else 1 for entry in entries])
        equal = step_down([entry["p_equivalence"] for entry in entries], flips, sides)
        deviate = critical_deviate(flips)
    else:
        adjusted = [entry["p_holm"] for entry in entries]
        equal = [entry["p_equivalence_holm"] for entry in entries]
        deviate = float(scipy.stats.norm.isf(LEVEL / 2 / len(entries)))
    for entry, (first, _), p, p_equal in zip(entries, pairs, adjusted, equal, strict=True):
        entry["p_max_t"], entry["p_equivalence_max_t"] = p, p_equal
        widen(entry, deviate, first.mean if first.weight == 1 else None)


def widen(entry: dict[str, Any], deviate: float, accuracy: float | None) -> None:
    """Add the simultaneous interval and the smallest drop that would be found after the correction.
    `accuracy` as `smallest_drop` takes it.
    """
    error, dof = entry["standard_error"], entry["dof"]
    if error is None:
        entry["simultaneous_interval"], entry["smallest"] = (-1.0, 1.0), None
        return
    half = float(scipy.stats.t.isf(scipy.stats.norm.sf(deviate), dof)) * error
    single = (entry["interval"][1] - entry["interval"][0]) / 2
    half = max(half, single)
    drop = entry["drop"]
    entry["simultaneous_interval"] = (max(-1.0, drop - half), min(1.0, drop + half))
    entry["smallest"] = smallest_drop(half + float(scipy.stats.t.ppf(POWER, dof)) * error, accuracy)


def mean_sample(samples: Sequence[Sample]) -> Sample:
    """The mean of several samples of the same splits, run by run and row by row.

    A sample of fewer runs is repeated.
    """
    most = max(samples, key=lambda sample: sample.num_runs)
    right = {
        split: np.mean([s.repeated(split, len(hits)) for s in samples], axis=0)
        for split, hits in most.right.items()
    }
    return replace(most, right=right)


def averaged(pairs: dict[str, tuple[Sample, Sample]]) -> list[str]:
    """The representations whose samples can be averaged: the splits and rows of the one with most runs, and
    as many runs or a whole part of them.
    """
    firsts = [first for first, _ in pairs.values()]
    most = max(firsts, key=lambda sample: (sample.num_runs, len(sample.right)))

    def fits(sample: Sample) -> bool:
        return sample.right.keys() == most.right.keys() and all(
            np.array_equal(sample.rows[split], most.rows[split]) and len(most.right[split]) % len(hits) == 0
            for split, hits in sample.right.items()
        )

    return [name for name, pair in pairs.items() if all(map(fits, pair))]


def primary(pairs: dict[str, tuple[Sample, Sample]], margin: Margin) -> dict[str, Any] | None:
    """The primary hypothesis: the mean drop over the representations that read something, in one test; None
    if nothing is read.
    """
    names = representations_that_read(pairs)
    return mean_drop({name: pairs[name] for name in names}, margin) if names else None


def representations_that_read(pairs: dict[str, tuple[Sample, Sample]]) -> list[str]:
    """The representations whose mean accuracy with both layer sets is above chance, each tested alone; [] if
    neither any of them nor the mean of all is above chance after Holm's correction; all if only that mean is.

    The mean of both layer sets says next to nothing of their difference, so a loose choice by it costs no
    error. A choice by one of the two would choose drops that came out high, or low.
    """
    if not pairs:
        return []
    p_values = [p_above_chance(pair) for pair in pairs.values()]
    tests = list(p_values)
    if len(pairs) > 1:
        tests.append(p_above_chance([sample for name in averaged(pairs) for sample in pairs[name]]))
    if min(holm(tests)) >= LEVEL:
        return []
    return [name for name, p in zip(pairs, p_values, strict=True) if p < LEVEL] or list(pairs)


def p_above_chance(samples: Sequence[Sample]) -> float:
    """The one-sided p-value of the mean accuracy of several samples against chance."""
    return float(mean_sample(samples).accuracy["p_above_chance"])


def mean_drop(pairs: dict[str, tuple[Sample, Sample]], margin: Margin) -> dict[str, Any]:
    """The mean drop over the representations. Its `smallest` needs no correction. `heterogeneity` and
    `sensitivity` as the functions of these names tell.
    """
    names = averaged(pairs)
    first, second = (mean_sample([pairs[name][i] for name in names]) for i in (0, 1))
    entry = compared(first, second, margin)
    assert entry is not None  # both have the splits, rows and runs of the same representation
    units = len(np.unique(first.units_of(first.right)))
    if not entry["standard_error"]:
        entry["smallest"] = None
    is_told = units >= FEWEST_UNITS
    return {
        **entry,
        "accuracy": first.mean,
        "accuracy_of_second": second.mean,
        "representations": names,
        "units": units,
        "heterogeneity": heterogeneity([pairs[name] for name in names]) if is_told else None,
        "sensitivity": sensitivity(first, second) if is_told else [],
    }


def heterogeneity(pairs: list[tuple[Sample, Sample]]) -> float | None:
    """The p-value of the hypothesis that all representations have the same drop; None for one.

    The max-T test of each drop less the mean drop, with the same flips and the runs' spread as the family.
    """
    if len(pairs) < 2:
        return None
    means = [mean_sample([pair[i] for pair in pairs]) for i in (0, 1)]
    p_values, by_row = [], []
    for pair in pairs:
        D = {}
        for split, hits in means[0].right.items():
            own, mean = (
                a.repeated(split, len(hits)) - b.repeated(split, len(hits)).astype(float)
                for a, b in (pair, means)
            )
            D[split] = own - mean
        mean = float(np.mean([d.mean() for d in D.values()]))
        p_values.append(p_of_mean(mean, means[0].standard_error_of(D)))
        by_row.append(np.concatenate([d.mean(0) for d in D.values()]))
    flips = joint_flips(unit_sums(np.stack(by_row), means[0].units_of(means[0].right)))
    return min(step_down(p_values, flips))


def sensitivity(first: Sample, second: Sample) -> list[dict[str, Any]]:
    """The 95 % interval of the drop if runs were correlated through the overlap of their training sets."""
    D = {
        split: first.right[split] - second.right[split].astype(float) for split in first.shared_splits(second)
    }
    drop = float(np.mean([d.mean() for d in D.values()]))
    spread = first.standard_error_of(D)
    if spread.runs_variance is None:
        return []
    found = []
    for correlation in CORRELATIONS:
        half = spread.with_correlated_runs(correlation).half_width
        interval = (max(-1.0, drop - half), min(1.0, drop + half))
        found.append({"correlation": correlation, "interval": interval})
    return found


def compared(first: Sample, second: Sample, margin: Margin) -> dict[str, Any] | None:
    """The difference of two samples, with what the second retains; None if they share no split."""
    entry = first.minus(second, margin.points)
    if entry is None:
        return None
    if len(np.unique(first.units_of(first.shared_splits(second)))) < FEWEST_UNITS:
        return entry | NOTHING_TOLD
    if margin.share > 0:
        entry |= equivalence_by_share(first, second, margin.share)
    return entry | {"retained": retained(first, second)}


def equivalence_by_share(first: Sample, second: Sample, share: float) -> dict[str, Any]:
    """The margin, and the p-value of two one-sided t tests, of a difference of less than `share` of the first
    sample's accuracy above chance. The margin's own error is in the tests, because they are of the contrasts
    difference ± share * (accuracy - chance).
    """
    margin = share * (first.mean - first.chance)
    p_values = []
    for sign in (1, -1):
        contrast = {
            split: sign * (first.right[split] - second.right[split].astype(float))
            + share * (first.right[split] - first.chance)
            for split in first.shared_splits(second)
        }
        mean = float(np.mean([values.mean() for values in contrast.values()]))
        spread = first.standard_error_of(contrast)
        is_known = 0 < spread.error < math.inf
        p_values.append(float(scipy.stats.t.sf(mean / spread.error, spread.dof)) if is_known else 1.0)
    return {"margin": max(margin, 0.0), "p_equivalence": max(p_values) if margin > 0 else 1.0}


def retained(first: Sample, second: Sample) -> dict[str, Any] | None:
    """The share of the accuracy above chance that the second keeps, with its 95 % interval.

    The interval has the shares theta for which a t test does not tell b - theta a from 0, where a and b are
    the two above chance. So it holds 100 % just if the t interval of the drop holds 0. None unless a is
    CLEARLY_ABOVE standard errors, or where the interval has no end.
    """
    splits = first.shared_splits(second)
    a, b = ({split: of.right[split] - of.chance for split in splits} for of in (first, second))
    x, y = (float(np.mean([values.mean() for values in of_set.values()])) for of_set in (a, b))
    error = first.standard_error_of(a).error
    if not x > CLEARLY_ABOVE * error or x <= 0:
        return None

    def room(theta: float) -> float:
        """How far the t interval of b - theta a reaches beyond 0; negative where it leaves 0 out."""
        spread = first.standard_error_of({split: b[split] - theta * a[split] for split in splits})
        return spread.half_width - abs(y - theta * x)

    ends = [end_of(room, y / x, side, room(y / x) / x) for side in (-1, 1)]
    if None in ends:
        return None
    return {"share": y / x, "interval": (ends[0], ends[1])}


def end_of(room: Callable[[float], float], start: float, side: int, step: float) -> float | None:
    """Where `room` becomes negative from `start` on to one side; None if it does not within 20 growing steps
    of which the first is half of `step`.
    """
    inside, step = start, max(step, 1e-6) / 2
    for _ in range(20):
        outside = inside + side * step
        if inside < 1 < outside or outside < 1 < inside:
            outside = 1.0  # so that 100 % is inside or outside by its own test
        if room(outside) < 0:
            return float(scipy.optimize.brentq(room, inside, outside, xtol=1e-7))
        inside, step = outside, step * 1.5
    return None
