"""Standard errors, tests and intervals of an accuracy, or of the difference of two.

A claim is about new examples and about the training of new models, not about the seeds that happened to be
run. With R runs and n test examples, D (R, n) holds for each run and example whether the first classifier was
right less whether the second was (1, 0 or -1). Its mean is the drop. It varies with the examples (rows of the
data set), with the runs, and with a rest. Where examples come in groups (fine-tunes of one set of images),
whole groups are the sample. Accuracies and probabilities are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats

from ablation.resampling import LEVEL, sign_flip_test, training_noise, two_level_bootstrap

FEW_UNITS = 10  # with fewer examples or groups that differ, how much each differs tells nothing
POWER = 0.8  # with which the smallest detectable drop is found


@dataclass(frozen=True)
class StandardError:
    """The standard error of a mean over runs and examples, with its degrees of freedom.

    `units` counts the examples or groups that it is from. `runs_variance` is the variance between runs, of
    the shift that one run gives to all of its examples; None where it is not known.
    """

    error: float
    dof: float
    units: int
    runs_variance: float | None = None

    @property
    def half_width(self) -> float:
        """Half of the 95 % t interval.

        Where nothing varies it is Clopper and Pearson's bound for what did not occur among the
        units: 1 - 0.025^(1 / units).
        """
        if self.error == math.inf:
            return math.inf
        half = float(scipy.stats.t.ppf(1 - LEVEL / 2, self.dof)) * self.error
        return max(half, 1 - (LEVEL / 2) ** (1 / self.units)) if self.error == 0 else half

    def with_correlated_runs(self, correlation: float) -> StandardError:
        """The standard error if runs of overlapping training sets had this correlation.

        Their shared part, which no difference between runs shows, is correlation / (1 - correlation) times
        the variance between runs.
        """
        shared = correlation / (1 - correlation) * (self.runs_variance or 0.0)
        return replace(self, error=math.hypot(self.error, math.sqrt(shared)))


@dataclass(frozen=True)
class SplitRows:
    """The rows behind several splits: the test rows of each,
    the ratio of test to training rows, groups (N,) or None.
    """

    test_rows: list[np.ndarray]
    ratio: float
    groups: np.ndarray | None = None

    def units_of(self, rows: np.ndarray) -> np.ndarray:
        """The unit of each of these rows: its group, or the row itself."""
        return rows if self.groups is None else self.groups[rows]

    def count(self, rows: np.ndarray) -> int:
        """How many examples, or groups, these rows are."""
        return len(np.unique(self.units_of(rows)))


def standard_error(D: np.ndarray, groups: np.ndarray | None = None) -> StandardError:
    """The standard error of the mean of D (R, n), where runs and examples are independent samples.

    Two-way random effects without replication: the variances of the mean over examples and over runs, less
    that of the rest, with Satterthwaite's degrees of freedom. Dorfman, Berbaum and Metz (1992) and Obuchowski
    and Rockette (1995) do the same for readers and cases. With groups (n,), groups take the place of
    examples: their deviations are those from the mean of the other groups (jackknife), and they count as n^2
    over the sum of their squared sizes. With one run the result has the examples' part alone.
    """
    R, n = D.shape
    by_example, by_run, mean = D.mean(0), D.mean(1), D.mean()
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G, sizes = len(names), np.bincount(index)
    if G < 2:
        return StandardError(math.inf, 1.0, G)
    deviations = np.bincount(index, by_example - mean, minlength=G) / (1 - sizes / n)
    examples = float((deviations**2).sum()) * (G - 1) / G / n**2
    examples_dof = max(n**2 / float((sizes**2).sum()) - 1, 1.0)
    if R == 1:
        return StandardError(math.sqrt(examples), examples_dof, G)
    runs, runs_dof = float(by_run.var(ddof=1)) / R, R - 1
    rest_dof = (n - 1) * (R - 1)
    rest = float(((D - by_example - by_run[:, None] + mean) ** 2).sum()) / rest_dof / (n * R)
    total = max(examples + runs - rest, examples, runs)
    if total == 0:
        return StandardError(0.0, examples_dof, G, 0.0)
    dof = total**2 / (examples**2 / examples_dof + runs**2 / runs_dof + rest**2 / rest_dof)
    of_run = R * max(runs - rest, 0.0)
    return StandardError(math.sqrt(total), min(dof, 1.0) if R == 2 else dof, G, of_run)


def standard_error_over_splits(D: Sequence[np.ndarray], splits: SplitRows) -> StandardError:
    """The standard error of the mean over K splits of the means of D[k] (R, n), on the test rows of split k.

    It is the variance over splits times 1/K + the ratio of test to training rows, with K - 1 degrees of
    freedom: splits of one data set share most of their rows, so their mean varies more than 1/K of that
    variance (Nadeau and Bengio 2003).
    Where rows of the data set come in groups, random splits do not show how groups differ, and the first
    split's error is taken if it is wider.
    """
    means = np.array([d.mean() for d in D])
    units = splits.count(np.concatenate(splits.test_rows))
    error = math.sqrt(float(means.var(ddof=1)) * (1 / len(means) + splits.ratio))
    over_splits = StandardError(error, len(means) - 1, units)
    if splits.groups is None:
        return over_splits
    of_first = standard_error(D[0], splits.groups[splits.test_rows[0]])
    return over_splits if of_first.half_width < over_splits.half_width else of_first


def difference(
    first: np.ndarray,
    second: np.ndarray,
    margin: float,
    groups: np.ndarray | None = None,
    weight: float = 1.0,
) -> dict[str, Any]:
    """Accuracy `first` less accuracy `second`;
    both (R, n) say whether each run was right on each test example.

    `p` is the larger of two: the sign-flip test's, which takes the runs as they are, and that of a t test
    with the standard error of runs and examples together. The 95 % interval is that error's. So a conclusion
    must hold for new examples and for new runs. `bootstrap_interval`, mostly wider, stands beside as a check.
    `p_equivalence` is that of `p_of_equivalence`. `smallest` is the difference that would be found
    significant with a probability of POWER. `weight` is the largest weight of an example in a balanced
    accuracy.
    """
    D = first.astype(np.float64) - second
    spread = standard_error(D, groups)
    flip, t_test = p_values_of_mean(D, spread, groups)
    bootstrap = two_level_bootstrap(D, groups)
    entry = conclusion(([first], [second]), spread, unit_means(D.mean(0), groups), margin, weight)
    return entry | {
        "p": max(flip, t_test),
        "p_sign_flip": flip,
        "p_examples_and_runs": t_test,
        "bootstrap_interval": bootstrap,
    }


def difference_over_splits(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    margin: float,
    splits: SplitRows,
    weight: float = 1.0,
) -> dict[str, Any]:
    """The difference from K splits: `first` and `second` have (R, n) for each.

    `p` and the interval are the corrected t test's; `drop` is the mean of `drops`, one for each split.
    """
    D = [a.astype(np.float64) - b for a, b in zip(first, second, strict=True)]
    spread = standard_error_over_splits(D, splits)
    units = splits.units_of(np.concatenate(splits.test_rows))
    d = unit_means(np.concatenate([of_split.mean(0) for of_split in D]), units)
    entry = conclusion((first, second), spread, d, margin, weight)
    return entry | {"p": p_of_mean(entry["drop"], spread), "drops": [float(d.mean()) for d in D]}


def conclusion(
    pair: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    spread: StandardError,
    d: np.ndarray,
    margin: float,
    weight: float,
) -> dict[str, Any]:
    """What follows from the standard error of a drop, however it was estimated.

    The `pair` has (R, n) for each split, twice. `d` (U,) are the units' shares of the drop, as
    `unit_means` gives them. In a balanced accuracy an example weighs up to `weight`, and so many units count
    as one.
    """
    D = [a.astype(np.float64) - b for a, b in zip(*pair, strict=True)]
    a, b, drop = (float(np.mean([rights.mean() for rights in by_split])) for by_split in (*pair, D))
    spread = replace(spread, units=max(1, int(spread.units / weight)))
    by_example = np.concatenate([d.mean(0) for d in D])
    scatter = float(by_example.std(ddof=1)) if len(by_example) > 1 else 0.0
    half, is_known = spread.half_width, spread.error < math.inf
    power = float(scipy.stats.t.ppf(POWER, spread.dof)) * spread.error if is_known else 1.0
    return {
        "drop": drop,
        "interval": (max(-1.0, drop - half), min(1.0, drop + half)),
        "standard_error": spread.error if is_known else None,
        "dof": spread.dof,
        "p_equivalence": p_of_equivalence(drop, spread, d, margin),
        "margin": margin,
        "training_noise_interval": training_noise(np.mean([d.mean(1) for d in D], axis=0)),
        "cohens_h": 2 * (math.asin(math.sqrt(a)) - math.asin(math.sqrt(b))),
        "d_z": drop / scatter if scatter > 0 else None,
        "smallest": smallest_drop(half + power, a if weight == 1 else None),
        "splits": len(D),
    }


def smallest_drop(by_error: float, accuracy: float | None) -> float:
    """The drop that would be found with a probability of POWER, at most 1; `by_error` is it if the standard
    error were that of the data whatever the drop.

    Near an `accuracy` a of 1 a drop leaves more to scatter: where the second accuracy is b = a - drop and not
    a, the variance grows by (a(1 - a) + b(1 - b)) / 2a(1 - a). None for scores that are not of right and
    wrong.
    """
    if accuracy is None or not 0.5 < accuracy < 1 or by_error >= accuracy:
        return min(1.0, by_error)
    drop = by_error
    for _ in range(100):  # it grows to the least drop that is its own
        left = max(accuracy - drop, 0.5)
        growth = left * (1 - left) / (accuracy * (1 - accuracy))
        drop = by_error * math.sqrt((1 + growth) / 2)
    return min(1.0, max(drop, by_error))


def unit_means(by_row: np.ndarray, units: np.ndarray | None) -> np.ndarray:
    """The units' shares (U,) of a mean over rows (n,): their sums over the mean size of a unit, so that the
    mean of the shares is that of the rows. `units` (n,) names each row's; None: every row is one.
    """
    if units is None:
        return by_row
    sums = np.bincount(np.unique(units, return_inverse=True)[1], by_row)
    return sums * len(sums) / len(by_row)


def p_of_equivalence(drop: float, spread: StandardError, d: np.ndarray, margin: float) -> float:
    """The p-value of the hypothesis that the drop is `margin` or more in either direction.

    The larger one of two one-sided t tests against +-`margin` and of Tango's score test of the units' shares
    `d` (U,), which is right where few differ. Where none does, it is the chance of that if a share `margin`
    of the units differed. It is 1 where a single unit shows nothing.
    """
    if spread.error == 0 and abs(drop) < margin and not np.any(d):
        return (1 - margin) ** spread.units
    if not 0 < spread.error < math.inf:
        return 1.0
    above = scipy.stats.t.sf((margin - drop) / spread.error, spread.dof)
    below = scipy.stats.t.sf((margin + drop) / spread.error, spread.dof)
    return float(max(above, below, score_test_of_equivalence(d, margin)))


def score_test_of_equivalence(d: np.ndarray, margin: float) -> float:
    """The larger one of two one-sided p-values of the mean of `d` (U,) against +-`margin` (Tango 1998).

    His test is of units that differ by 1, 0 or -1. Here they differ by a typical size, sum d^2 / sum |d|, so
    that their variance is that of `d`; by 1 if fewer than FEW_UNITS differ.
    """
    mass = float(np.abs(d).sum())
    if mass == 0:
        return 0.0
    size = float((d**2).sum()) / mass if np.count_nonzero(d) >= FEW_UNITS else 1.0
    if margin >= size:
        return 0.0
    more, less, n = float(d.clip(0).sum()) / size, float((-d).clip(0).sum()) / size, len(d)
    return max(tango(more, less, n, margin / size), tango(less, more, n, margin / size))


def tango(more: float, less: float, n: int, margin: float) -> float:
    """The one-sided p-value of Tango's (1998) score test that more - less is `margin` * n or higher, of n
    pairs in which the first alone is right in `more` and the second alone in `less`.
    """
    linear = -more - less + (2 * n - more + less) * margin
    constant = -less * margin * (1 - margin)
    restricted = (math.sqrt(linear**2 - 8 * n * constant) - linear) / (
        4 * n
    )  # of `less`, if the margin holds
    variance = n * (2 * restricted + margin * (1 - margin))
    return float(scipy.stats.norm.cdf((more - less - n * margin) / math.sqrt(variance)))


def p_values_of_mean(D: np.ndarray, spread: StandardError, groups: np.ndarray | None) -> tuple[float, float]:
    """p-values of the mean of D (R, n): the sign-flip test's, and the t test's.
    1 where nothing can be shown.
    """
    return sign_flip_test(D.mean(0), groups), p_of_mean(float(D.mean()), spread)


def p_of_mean(mean: float, spread: StandardError) -> float:
    """The two-sided p-value of the t test that a mean is 0."""
    if not 0 < spread.error < math.inf:
        return 1.0
    return float(2 * scipy.stats.t.sf(abs(mean) / spread.error, spread.dof))


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for testing all of them (Holm 1979).

    Rejecting those below LEVEL makes any error with a probability of at most LEVEL.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(running, 1.0)
    return adjusted.tolist()


def chance_level(labels: np.ndarray, train_labels: np.ndarray) -> float:
    """Accuracy on the test rows of a rule that sees the training labels alone, the best of three.

    It always answers their most frequent class, draws classes in their proportions, or draws all alike:
    scikit-learn's DummyClassifier, `most_frequent`, and the expectations of `stratified` and `uniform`. (With
    whole groups held out the class that is tested is the one that is rare in training.)
    """
    classes = 1 + int(max(labels.max(), train_labels.max()))
    trained = np.bincount(train_labels, minlength=classes) / len(train_labels)
    tested = np.bincount(labels, minlength=classes) / len(labels)
    return float(
        max(tested[trained.argmax()], trained @ tested, tested[trained > 0].sum() / (trained > 0).sum())
    )


def binomial_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy on n independent examples."""
    return math.sqrt(accuracy * (1 - accuracy) / n)
