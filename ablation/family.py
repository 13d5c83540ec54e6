"""Tests of several representations at once: one primary hypothesis first, then each by itself.

The primary hypothesis is the mean drop over the representations. Only if it is rejected are single drops
claimed, with p-values of the step-down max-T method (Westfall and Young 1993), which keeps the family-wise
error and uses that representations are correlated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from ablation.estimators import LEVEL, MANY_UNITS, POWER, RESAMPLING_SEED, holm
from ablation.samples import Sample

JOINT_FLIPS = 9999  # random signs of the joint test
SIGNS = np.array((-1, 1), np.int8)
SIGNS_AT_ONCE = 2**27  # a GB while they are multiplied
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
    for entry, p, p_equal in zip(entries, adjusted, equal, strict=True):
        entry["p_max_t"], entry["p_equivalence_max_t"] = p, p_equal
        widen(entry, deviate)


def widen(entry: dict[str, Any], deviate: float) -> None:
    """Add the simultaneous interval and the smallest drop that would be found after the correction."""
    error, dof = entry["standard_error"], entry["dof"]
    if error is None:
        entry["simultaneous_interval"], entry["smallest"] = (-1.0, 1.0), None
        return
    half = float(scipy.stats.t.isf(scipy.stats.norm.sf(deviate), dof)) * error
    single = (entry["interval"][1] - entry["interval"][0]) / 2
    half = max(half, single)
    drop = entry["drop"]
    entry["simultaneous_interval"] = (max(-1.0, drop - half), min(1.0, drop + half))
    entry["smallest"] = min(1.0, half + float(scipy.stats.t.ppf(POWER, dof)) * error)


def mean_sample(samples: list[Sample]) -> Sample:
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
    most = max((first for first, _ in pairs.values()), key=lambda sample: sample.num_runs)

    def fits(sample: Sample) -> bool:
        return sample.right.keys() == most.right.keys() and all(
            np.array_equal(sample.rows[split], most.rows[split]) and len(most.right[split]) % len(hits) == 0
            for split, hits in sample.right.items()
        )

    return [name for name, pair in pairs.items() if all(map(fits, pair))]


def primary(
    pairs: dict[str, tuple[Sample, Sample]], above_chance: list[str], margin: Margin
) -> dict[str, Any] | None:
    """The primary hypothesis: the mean drop over the representations that are above chance with all layers.

    None if none is. Its `smallest` needs no correction.
    """
    able = {name: pairs[name] for name in above_chance if name in pairs}
    if not able:
        return None
    names = averaged(able)
    first, second = (mean_sample([able[name][i] for name in names]) for i in (0, 1))
    entry = compared(first, second, margin)
    assert entry is not None  # both have the splits, rows and runs of the same representation
    units = len(np.unique(first.units_of(first.right)))
    if not entry["standard_error"]:
        entry["smallest"] = None
    return {
        **entry,
        "accuracy": first.mean,
        "accuracy_of_second": second.mean,
        "representations": names,
        "units": units,
    }


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
    """The share of the accuracy above chance that the second keeps, with Fieller's 95 % interval.

    None where it has no bounded interval: the first is not clearly above chance.
    """
    splits = first.shared_splits(second)
    a = {split: first.right[split] - first.chance for split in splits}
    b = {split: second.right[split] - first.chance for split in splits}
    error_a, error_b = first.standard_error_of(a), first.standard_error_of(b)
    error_sum = first.standard_error_of({split: a[split] + b[split] for split in a})
    x, y = (float(np.mean([values.mean() for values in of_set.values()])) for of_set in (a, b))
    v_x, v_y = error_a.error**2, error_b.error**2
    v_xy = (error_sum.error**2 - v_x - v_y) / 2
    t = float(scipy.stats.t.isf(LEVEL / 2, error_a.dof))
    denominator = x**2 - t**2 * v_x
    if not denominator > 0 or x <= 0:
        return None
    middle = (x * y - t**2 * v_xy) / denominator
    inside = middle**2 - (y**2 - t**2 * v_y) / denominator
    half = math.sqrt(max(inside, 0.0))
    return {"share": y / x, "interval": (middle - half, middle + half)}
