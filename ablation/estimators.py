"""Standard errors, tests and intervals of an accuracy, or of the difference of two.

A claim is about new examples and about the training of new models, not about the seeds that happened to be
run. With R runs and n test examples, D (R, n) holds for each run and example whether the first classifier was
right less whether the second was (1, 0 or -1). Its mean is the drop. It varies with the examples (rows of the
data set), with the runs, and with a rest. Where examples come in groups (fine-tunes of one set of images),
whole groups are the sample. Accuracies and probabilities are fractions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
FEW_UNITS = 10  # with fewer examples or groups that differ, a t test of equality is not trusted
POWER = 0.8  # with which the smallest detectable drop is found
FLIPS = 9999  # random signs of the sign-flip test
RESAMPLES = 4000  # of a bootstrap
MANY_UNITS = 500  # from as many examples or groups on, a bootstrap takes their mean as normal
RESAMPLING_SEED = 0


@dataclass(frozen=True)
class StandardError:
    """The standard error of a mean over runs and examples, with its degrees of freedom.

    `units` counts the examples or groups that it is from.
    """

    error: float
    dof: float
    units: int

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


@dataclass(frozen=True)
class SplitRows:
    """The rows behind several splits: the test rows of each,
    the ratio of test to training rows, groups (N,) or None.
    """

    test_rows: list[np.ndarray]
    ratio: float
    groups: np.ndarray | None = None

    def count(self, rows: np.ndarray) -> int:
        """How many examples, or groups, these rows are."""
        return len(np.unique(rows if self.groups is None else self.groups[rows]))


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
        return StandardError(0.0, examples_dof, G)
    dof = total**2 / (examples**2 / examples_dof + runs**2 / runs_dof + rest**2 / rest_dof)
    return StandardError(math.sqrt(total), min(dof, 1.0) if R == 2 else dof, G)


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


def sign_flip_test(
    d: np.ndarray, groups: np.ndarray | None = None, flips: int = FLIPS, seed: int = RESAMPLING_SEED
) -> float:
    """The two-sided p-value of the mean of `d` (n,),
    if each example's (or group's) difference could have either sign.

    It is taken over `flips` random choices of all signs, with the observed signs counted among them (Phipson
    and Smyth 2010), or over all choices where there are fewer. Examples without a difference have no sign; p
    is 1 if all are such. Equal differences are flipped together: the number of them that get a plus is
    binomial.
    """
    if groups is not None:
        d = np.bincount(np.unique(groups, return_inverse=True)[1], d)
    d = d[np.abs(d) > 1e-12]
    if not len(d):
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-9)
    if 2 ** len(d) <= flips:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((np.abs(signs @ d) >= observed).mean())
    sizes, counts = np.unique(np.abs(d).round(12), return_counts=True)
    plus = np.random.default_rng(seed).binomial(counts, 0.5, (flips, len(counts)))
    return (1 + int((np.abs((2 * plus - counts) @ sizes) >= observed).sum())) / (flips + 1)


@functools.lru_cache(maxsize=1)
def draw_counts(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of G units is drawn in each of B resamples, (B, G)."""
    return np.random.default_rng([seed, units]).multinomial(units, np.full(units, 1 / units), resamples)


def two_level_bootstrap(
    D: np.ndarray, groups: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = RESAMPLING_SEED
) -> tuple[float, float]:
    """The 95 % interval of the mean of D (R, n):
    runs and examples (or groups) are drawn again, independently.

    The pigeonhole bootstrap of crossed samples (Owen 2007), percentiles. Deviations are stretched by sqrt(R /
    (R - 1)), which drawing from R runs takes away. From MANY_UNITS examples or groups on, the mean over the
    drawn units is taken from a normal distribution, whose mean and variance are known.
    """
    R, n = D.shape
    rng = np.random.default_rng(seed)
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G = len(names)
    sums = np.stack([np.bincount(index, row, minlength=G) for row in D])  # (R, G)
    sizes = np.bincount(index, minlength=G)
    of_runs = rng.multinomial(R, np.full(R, 1 / R), resamples) / R  # (B, R)
    if G > MANY_UNITS:
        rest = sums - D.mean(1)[:, None] * sizes  # a group's share of a run's deviation
        variance = np.einsum("br,rs,bs->b", of_runs, rest @ rest.T / n**2, of_runs, optimize=True)
        means = of_runs @ D.mean(1) + np.sqrt(variance.clip(0)) * rng.normal(size=resamples)
    else:
        counts = draw_counts(G, resamples, seed)  # (B, G)
        means = ((of_runs @ sums) * counts).sum(1) / (counts @ sizes)
    widen = math.sqrt(R / (R - 1)) if R > 1 else 1.0
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    mean = D.mean()
    return float(mean + widen * (low - mean)), float(mean + widen * (high - mean))


def training_noise(drops: np.ndarray, seed: int = RESAMPLING_SEED) -> tuple[float, float] | None:
    """The 95 % BCa interval (scipy) of the mean of the runs' drops (R,), or None for one run.

    It is over seeds on the same rows, so it is about training alone.
    """
    if len(drops) < 2:
        return None
    if np.ptp(drops) == 0:
        return float(drops[0]), float(drops[0])
    rng = np.random.default_rng(seed)
    bootstrap = scipy.stats.bootstrap(
        (drops,), np.mean, confidence_level=1 - LEVEL, method="BCa", random_state=rng
    )
    return float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)


def difference(
    first: np.ndarray, second: np.ndarray, margin: float, groups: np.ndarray | None = None
) -> dict[str, Any]:
    """Accuracy `first` less accuracy `second`;
    both (R, n) say whether each run was right on each test example.

    `p` is the larger of two: the sign-flip test's, which takes the runs as they are, and that of a t test
    with the standard error of runs and examples together. The 95 % interval is that error's. So a conclusion
    must hold for new examples and for new runs. `bootstrap_interval`, mostly wider, stands beside as a check.
    `p_equivalence` is the larger of two one-sided t tests against +-`margin`; where fewer than FEW_UNITS
    examples or groups differ, it is at least the chance of so few if a share `margin` of them did. `smallest`
    is the difference that would be found significant with a probability of POWER.
    """
    D = first.astype(np.float64) - second
    spread = standard_error(D, groups)
    flip, t_test = p_values_of_mean(D, spread, groups)
    is_different = np.abs(D).max(0) > 0
    differ = int(is_different.sum()) if groups is None else len(np.unique(groups[is_different]))
    bootstrap = two_level_bootstrap(D, groups)
    entry = conclusion([first], [second], spread, differ, margin)
    return entry | {
        "p": max(flip, t_test),
        "p_sign_flip": flip,
        "p_examples_and_runs": t_test,
        "bootstrap_interval": bootstrap,
    }


def difference_over_splits(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], margin: float, splits: SplitRows
) -> dict[str, Any]:
    """The difference from K splits: `first` and `second` have (R, n) for each.

    `p` and the interval are the corrected t test's; `drop` is the mean of `drops`, one for each split.
    """
    D = [a.astype(np.float64) - b for a, b in zip(first, second, strict=True)]
    spread = standard_error_over_splits(D, splits)
    moved = [rows[np.abs(d).max(0) > 0] for d, rows in zip(D, splits.test_rows, strict=True)]
    entry = conclusion(first, second, spread, splits.count(np.concatenate(moved)), margin)
    return entry | {"p": p_of_mean(entry["drop"], spread), "drops": [float(d.mean()) for d in D]}


def conclusion(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    spread: StandardError,
    differ: int,
    margin: float,
) -> dict[str, Any]:
    """What follows from the standard error of a drop, however it was estimated.

    `first` and `second` have (R, n) for each split; `differ` examples or groups differ at all.
    """
    D = [a.astype(np.float64) - b for a, b in zip(first, second, strict=True)]
    a, b, drop = (float(np.mean([rights.mean() for rights in by_split])) for by_split in (first, second, D))
    by_example = np.concatenate([d.mean(0) for d in D])
    scatter = float(by_example.std(ddof=1)) if len(by_example) > 1 else 0.0
    half, is_known = spread.half_width, spread.error < math.inf
    power = float(scipy.stats.t.ppf(POWER, spread.dof)) * spread.error if is_known else 1.0
    return {
        "drop": drop,
        "interval": (max(-1.0, drop - half), min(1.0, drop + half)),
        "standard_error": spread.error if is_known else None,
        "dof": spread.dof,
        "p_equivalence": p_of_equivalence(drop, spread, differ, margin),
        "margin": margin,
        "training_noise_interval": training_noise(np.mean([d.mean(1) for d in D], axis=0)),
        "cohens_h": 2 * (math.asin(math.sqrt(a)) - math.asin(math.sqrt(b))),
        "d_z": drop / scatter if scatter > 0 else None,
        "smallest": min(1.0, half + power),
        "splits": len(D),
    }


def p_of_equivalence(drop: float, spread: StandardError, differ: int, margin: float) -> float:
    """The larger p-value of two one-sided t tests against +-`margin`; 1 where a single unit shows nothing.

    With fewer than FEW_UNITS differing units it is at least the chance of so few, if a share `margin` of them
    differed.
    """
    if spread.error == 0 and abs(drop) < margin:
        return float(scipy.stats.binom.cdf(differ, spread.units, margin))
    if not 0 < spread.error < math.inf:
        return 1.0
    above = scipy.stats.t.sf((margin - drop) / spread.error, spread.dof)
    below = scipy.stats.t.sf((margin + drop) / spread.error, spread.dof)
    p = float(max(above, below))
    if differ < FEW_UNITS:
        p = max(p, float(scipy.stats.binom.cdf(differ, spread.units, margin)))
    return p


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
