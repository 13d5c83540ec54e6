"""Standard errors and differences from a cross-validation.

Every row is tested once in each round. D (m, n) has for each of m rounds and n rows whether the first
classifier was right less whether the second was; `runs` (m, n) numbers the trained run that tested the row. A
row's mean over the rounds varies with the row; a run shifts all rows that it tested.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from ablation.estimators import LEVEL, StandardError, conclusion, p_of_mean, p_values_of_mean, unit_means

# Training sets of folds overlap, so that rows and runs show too little spread. With one or two rounds, each
# with a division of its own, runs differ by most of what a training set does. With more rounds, where rounds
# share a division, or where the folds of two rounds are whole groups, more of it is not seen. See
# docs/statistics.md.
OVERLAP, OVERLAP_UNSEEN = 1.05, 1.15
ROUNDS_THAT_SEE = 2
QUANTILES = 64  # of chi-squared, in place of its distribution


def fold_standard_error(D: np.ndarray, runs: np.ndarray, groups: np.ndarray | None = None) -> StandardError:
    """The standard error of the mean of D (m, n), with degrees of freedom.

    Without groups it is for further rows of the same kind: the variance of the rows' means, and that of the
    runs. With groups (n,) it is for further groups: a jackknife over groups in place of the rows. Both are
    stretched, because training sets overlap.
    """
    n = D.shape[1]
    plus, minus, runs_dof, rest_dof = variance_of_runs(D, runs)
    if runs_dof < 1:  # so few rows that nothing tells them from runs
        return StandardError(math.inf, 1.0, n)
    mean, by_row = D.mean(), D.mean(0)
    if groups is None:
        units = n
        of_units, units_dof = float(by_row.var(ddof=1)) / n, float(n - 1)
    else:
        index = np.unique(groups, return_inverse=True)[1]
        sizes = np.bincount(index)
        units = len(sizes)
        if units < 2:
            return StandardError(math.inf, 1.0, units)
        left_out = np.bincount(index, by_row - mean) / (1 - sizes / n)
        of_units = float((left_out**2).sum()) * (units - 1) / (units * n**2)
        units_dof = max(n**2 / float((sizes**2).sum()) - 1, 1.0)
    of_runs = max(plus - minus, 0.0)
    total = of_units + of_runs
    if total == 0:
        return StandardError(0.0, units_dof, units, 0.0)
    dof = degrees_of_freedom((of_units, units_dof), (plus, runs_dof), (minus, rest_dof))
    return StandardError(
        overlap_of(runs, groups) * math.sqrt(total), dof, units, of_runs / design_of(runs).share
    )


def degrees_of_freedom(
    of_units: tuple[float, float], plus: tuple[float, float], minus: tuple[float, float]
) -> float:
    """Those of units + max(plus - minus, 0), each a mean square with its degrees of freedom: twice the square
    of its mean over its variance.

    Where plus came out below minus, it varies as if the two were equal. So the degrees of freedom do not jump
    with the sign of plus - minus, and absent runs are never taken for known to be absent.
    """
    (units, units_dof), (more, runs_dof), (less, rest_dof) = of_units, plus, minus
    of_runs = (max(more, less) * chi_squared_shares(runs_dof) - less).clip(0)
    variance = 2 * units**2 / units_dof + float(of_runs.var())
    variance += 2 * less**2 / rest_dof * float((of_runs > 0).mean())
    return 2 * (units + float(of_runs.mean())) ** 2 / variance


@functools.lru_cache(maxsize=64)
def chi_squared_shares(dof: float) -> np.ndarray:
    """Quantiles (QUANTILES,) of chi-squared over its degrees of freedom, all equally likely."""
    return scipy.stats.chi2.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES, dof) / dof


def overlap_of(runs: np.ndarray, groups: np.ndarray | None) -> float:
    """How much wider the standard error is than rows and runs (m, n) show."""
    is_whole = False
    if groups is not None:
        _, first, index = np.unique(groups, return_index=True, return_inverse=True)
        is_whole = bool((runs[0] == runs[0][first][index]).all())
    rounds = len(runs)
    sees = rounds <= ROUNDS_THAT_SEE and design_of(runs).divisions == rounds and not (is_whole and rounds > 1)
    return OVERLAP if sees else OVERLAP_UNSEEN


UNKNOWN = (0.0, 0.0, 0.0, 0.0)


class Design(NamedTuple):
    """Which run tested which row, and what follows for the variance between runs.

    `numbers` (m, n) are the runs from 0, `sizes` (R,) the rows that each tested. `inverse` (R, R) is that
    of the runs' cross products adjusted for rows, with `rank` and `trace` of the product itself. With one
    round rows are nested in runs: None. `divisions` counts the different divisions of the rows.
    """

    numbers: np.ndarray
    sizes: np.ndarray
    inverse: np.ndarray | None
    rank: int
    trace: float
    divisions: int

    @property
    def share(self) -> float:
        """The variance of the mean over that of one run's shift."""
        return float(((self.sizes / self.numbers.size) ** 2).sum())


def design_of(runs: np.ndarray) -> Design:
    """The design of the runs (m, n), remembered for the next estimate."""
    return make_design(np.ascontiguousarray(runs, np.int64).tobytes(), runs.shape)


@functools.lru_cache(maxsize=8)
def make_design(content: bytes, shape: tuple[int, int]) -> Design:
    """The design of int64 runs of this shape."""
    runs = np.frombuffer(content, np.int64).reshape(shape)
    m, n = shape
    index = np.unique(runs, return_inverse=True)[1].reshape(m, n)
    sizes = np.bincount(index.ravel())
    count = len(sizes)
    divisions = set()
    for of_round in index:
        _, first, fold = np.unique(of_round, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))  # folds in the order of their first rows
        divisions.add(order[fold].tobytes())
    if m == 1:
        return Design(index, sizes, None, count - 1, n - float((sizes**2).sum()) / n, 1)
    together = np.zeros((count, count))  # rows that two runs both tested, each in its round
    for first in index:
        for second in index:
            together += np.bincount(first * count + second, minlength=count**2).reshape(count, count)
    adjusted = np.diag(sizes.astype(float)) - together / m
    return Design(
        index,
        sizes,
        np.linalg.pinv(adjusted, hermitian=True),
        int(np.linalg.matrix_rank(adjusted, hermitian=True)),
        float(np.trace(adjusted)),
        len(divisions),
    )


def variance_of_runs(D: np.ndarray, runs: np.ndarray) -> tuple[float, float, float, float]:
    """The runs' part of the variance of the mean: what runs differ by, less what their rows alone explain.

    With several rounds, rows are blocks: the sum of squares between runs, adjusted for rows, against the rest
    (Henderson's third method). With one round, rows are nested in runs. Gives both terms, each with its
    degrees of freedom; UNKNOWN where the rows are too few to tell.
    """
    m, n = D.shape
    design = design_of(runs)
    index, runs_dof = design.numbers, design.rank
    rest_dof = n - len(design.sizes) if m == 1 else n * (m - 1) - runs_dof
    if runs_dof < 1 or rest_dof < 1:
        return UNKNOWN
    if design.inverse is None:
        means = np.bincount(index[0], D[0]) / design.sizes
        within = float(((D[0] - means[index[0]]) ** 2).sum())
        between = float((design.sizes * (means - D.mean()) ** 2).sum())
    else:
        deviations = D - D.mean(0)
        sums = np.bincount(index.ravel(), deviations.ravel(), minlength=len(design.sizes))
        between = float(sums @ design.inverse @ sums)
        within = max(float((deviations**2).sum()) - between, 0.0)
    scale = design.share / design.trace
    return between * scale, within / rest_dof * runs_dof * scale, runs_dof, rest_dof


def difference_of_folds(
    right: tuple[np.ndarray, np.ndarray],
    margin: float,
    runs: np.ndarray,
    groups: np.ndarray | None,
    weight: float = 1.0,
) -> dict[str, Any]:
    """Accuracy of the first less that of the second from a cross-validation, both (m, n) right or wrong.

    As `estimators.difference`, for further groups where rows come in groups, else for further rows. Where
    there are groups `same_groups` has p-value and interval for further rows of these groups. `replicated` is
    True if each of several rounds shows the drop by itself, None for one round.
    """
    first, second = right
    D = first.astype(np.float64) - second
    spread = fold_standard_error(D, runs, groups)
    entry = conclusion(([first], [second]), spread, unit_means(D.mean(0), groups), margin, weight)
    flip, t_test = p_values_of_mean(D, spread, groups)
    entry |= {"p": max(flip, t_test), "p_sign_flip": flip, "p_examples_and_runs": t_test}
    entry["replicated"] = is_replicated(D, runs, groups)
    if groups is not None:
        rows = fold_standard_error(D, runs)
        half = rows.half_width
        entry["same_groups"] = {
            "p": max(*p_values_of_mean(D, rows, None)),
            "interval": (max(-1.0, entry["drop"] - half), min(1.0, entry["drop"] + half)),
        }
    return entry


def is_replicated(D: np.ndarray, runs: np.ndarray, groups: np.ndarray | None) -> bool | None:
    """True if every round of D (m, n) by itself shows a drop of the same sign; None for one round."""
    if len(D) < 2:
        return None
    sign = np.sign(D.mean())
    p_values = [
        p_of_mean(max(sign * float(d.mean()), 0.0), fold_standard_error(d[None], of_round[None], groups))
        for d, of_round in zip(D, runs, strict=True)
    ]
    return max(p_values) < LEVEL
