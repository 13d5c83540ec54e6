"""Standard errors and differences from a cross-validation.

Every row is tested once in each round. D (m, n) has for each of m rounds and n rows whether the first
classifier was right less whether the second was; `runs` (m, n) numbers the trained run that tested the row. A
row's mean over the rounds varies with the row; a run shifts all rows that it tested.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ablation.estimators import StandardError, conclusion, p_values_of_mean

# Training sets of folds overlap, so that rows and runs show too little spread. With one or two rounds, each
# with a division of its own, runs differ by most of what a training set does. With more rounds, where rounds
# share a division, or where folds are whole groups, more of it is not seen. See docs/statistics.md.
OVERLAP, OVERLAP_UNSEEN = 1.05, 1.15
ROUNDS_THAT_SEE = 2


def fold_standard_error(D: np.ndarray, runs: np.ndarray, groups: np.ndarray | None = None) -> StandardError:
    """The standard error of the mean of D (m, n), with Satterthwaite's degrees of freedom.

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
        return StandardError(0.0, units_dof, units)
    spread = of_units**2 / units_dof
    if of_runs > 0:
        spread += plus**2 / runs_dof + minus**2 / rest_dof
    return StandardError(overlap_of(runs, groups) * math.sqrt(total), total**2 / spread, units)


def overlap_of(runs: np.ndarray, groups: np.ndarray | None) -> float:
    """How much wider the standard error is than rows and runs (m, n) show."""
    divisions = set()
    for of_round in runs:
        _, first, fold = np.unique(of_round, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))  # folds in the order of their first rows
        divisions.add(order[fold].tobytes())
    is_whole = False
    if groups is not None:
        pairs = np.unique(np.stack([groups, runs[0]]), axis=1)
        is_whole = pairs.shape[1] == len(np.unique(groups))
    sees = len(runs) <= ROUNDS_THAT_SEE and len(divisions) == len(runs) and not is_whole
    return OVERLAP if sees else OVERLAP_UNSEEN


UNKNOWN = (0.0, 0.0, 0.0, 0.0)


def variance_of_runs(D: np.ndarray, runs: np.ndarray) -> tuple[float, float, float, float]:
    """The runs' part of the variance of the mean: what runs differ by, less what their rows alone explain.

    With several rounds, rows are blocks: the sum of squares between runs, adjusted for rows, against the rest
    (Henderson's third method). With one round, rows are nested in runs. Gives both terms, each with its
    degrees of freedom; UNKNOWN where the rows are too few to tell.
    """
    m, n = D.shape
    numbers, index = np.unique(runs, return_inverse=True)
    index = index.reshape(m, n)
    count = len(numbers)
    sizes = np.bincount(index.ravel(), minlength=count)  # rows that each run tested
    share = float(((sizes / (m * n)) ** 2).sum())
    if m == 1:
        runs_dof, rest_dof = count - 1, n - count
        if runs_dof < 1 or rest_dof < 1:
            return UNKNOWN
        means = np.bincount(index[0], D[0]) / sizes
        within = float(((D[0] - means[index[0]]) ** 2).sum())
        between = float((sizes * (means - D.mean()) ** 2).sum())
        trace = n - float((sizes**2).sum()) / n
    else:
        deviations = D - D.mean(0)
        sums = np.bincount(index.ravel(), deviations.ravel(), minlength=count)
        together = np.zeros((count, count))  # rows that two runs both tested, each in its round
        for first in index:
            for second in index:
                pairs = np.bincount(first * count + second, minlength=count**2)
                together += pairs.reshape(count, count)
        adjusted = np.diag(sizes.astype(float)) - together / m
        runs_dof = int(np.linalg.matrix_rank(adjusted, hermitian=True))
        rest_dof = n * (m - 1) - runs_dof
        if runs_dof < 1 or rest_dof < 1:
            return UNKNOWN
        between = float(sums @ np.linalg.pinv(adjusted, hermitian=True) @ sums)
        within = max(float((deviations**2).sum()) - between, 0.0)
        trace = float(np.trace(adjusted))
    scale = share / trace
    return between * scale, within / rest_dof * runs_dof * scale, runs_dof, rest_dof


def difference_of_folds(
    right: tuple[np.ndarray, np.ndarray], margin: float, runs: np.ndarray, groups: np.ndarray | None
) -> dict[str, Any]:
    """Accuracy of the first less that of the second from a cross-validation, both (m, n) right or wrong.

    As `estimators.difference`, for further groups where rows come in groups, else for further rows. Where
    there are groups `same_groups` has p-value and interval for further rows of these groups.
    """
    first, second = right
    D = first.astype(np.float64) - second
    spread = fold_standard_error(D, runs, groups)
    differs = np.abs(D).max(0) > 0
    differ = int(differs.sum()) if groups is None else len(np.unique(groups[differs]))
    entry = conclusion([first], [second], spread, differ, margin)
    flip, t_test = p_values_of_mean(D, spread, groups)
    entry |= {"p": max(flip, t_test), "p_sign_flip": flip, "p_examples_and_runs": t_test}
    if groups is not None:
        rows = fold_standard_error(D, runs)
        half = rows.half_width
        entry["same_groups"] = {
            "p": max(*p_values_of_mean(D, rows, None)),
            "interval": (max(-1.0, entry["drop"] - half), min(1.0, entry["drop"] + half)),
        }
    return entry
