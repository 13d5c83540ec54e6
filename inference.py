"""What differences in accuracy mean: tests, intervals, effect sizes and what a test set of this size cannot show.

A claim is about new examples, and about the training of new models, not about the seeds that happened to be run. With R runs
and n test examples, D (R, n) holds run by run and example by example whether the first was right less whether the second was
(1, 0 or -1). Its mean is the drop. It varies with the examples (rows of the data set), with the runs, and with the rest; where
examples come in groups (fine-tunes of one set of images), whole groups are the sample. Probabilities and accuracies are fractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

LEVEL = 0.05               # of a test; intervals hold 1 - LEVEL
POWER = 0.8                # of the smallest drop that could be shown
FLIPS = 9999               # random signs of the sign-flip test
RESAMPLES = 4000           # of a bootstrap
CHUNK = 2**24              # numbers drawn at a time
SEED = 0


@dataclass(frozen=True)
class Spread:
    """The standard error of a grand mean over runs and examples, and its degrees of freedom."""

    error: float
    freedom: float


def spread_of_mean(D: np.ndarray, groups: np.ndarray | None = None) -> Spread:
    """Of the mean of D (R, n) when both the runs and the examples are samples, independent of each other.

    Two-way random effects without replication: the mean squares of examples and runs less that of the rest, over n R, with
    Satterthwaite's degrees of freedom; what Dorfman, Berbaum and Metz (1992) and Obuchowski and Rockette (1995) do for readers
    and cases. Groups (n,) take the examples' place by the sum of their deviations. Of one run, the examples' part alone.
    """
    R, n = D.shape
    of_example, of_run, mean = D.mean(0), D.mean(1), D.mean()
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G = len(names)
    if G < 2:
        return Spread(math.inf, 1.0)
    sums = np.bincount(index, of_example - mean, minlength=G)
    examples, examples_df = float((sums**2).sum()) * G / (G - 1) / n**2, G - 1          # variances of the mean
    if R == 1:
        return Spread(math.sqrt(examples), examples_df)
    runs, runs_df = float(of_run.var(ddof=1)) / R, R - 1
    rest = float(((D - of_example - of_run[:, None] + mean) ** 2).sum()) / ((n - 1) * (R - 1)) / (n * R) if n > 1 else 0.0
    total = max(examples + runs - rest, examples, runs)
    denominator = examples**2 / examples_df + runs**2 / runs_df + rest**2 / ((n - 1) * (R - 1))
    return Spread(math.sqrt(total), total**2 / denominator if denominator > 0 else examples_df)


def sign_flip_test(d: np.ndarray, groups: np.ndarray | None = None, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p-value of a mean of `d` (n,) that far from 0 if each example's difference, or each group's, were as likely of the other sign.

    By `flips` random choices of all signs, the observed one counted among them (Phipson and Smyth 2010); by all of them where
    there are fewer. Examples without a difference have no sign. 1 if none has one.
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
    rng, extreme, left = np.random.default_rng(seed), 1, flips
    while left:
        count = min(left, max(1, CHUNK // len(d)))
        signs = rng.integers(0, 2, (count, len(d)), dtype=np.int8).astype(np.float32) * 2 - 1
        extreme += int((np.abs(signs @ d.astype(np.float32)) >= observed).sum())
        left -= count
    return extreme / (flips + 1)


def two_level_bootstrap(D: np.ndarray, groups: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[float, float]:
    """The 95 % interval of the mean of D (R, n): runs and examples, or whole groups of them, are drawn again independently of each other.

    The pigeonhole bootstrap of crossed samples (Owen 2007), percentiles; its variance is never too small by more than the
    number of runs makes it, so what R runs take away is given back: deviations grow by sqrt(R / (R - 1)).
    """
    R, n = D.shape
    rng = np.random.default_rng(seed)
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G = len(names)
    sums = np.stack([np.bincount(index, row, minlength=G) for row in D])                 # (R, G)
    sizes = np.bincount(index, minlength=G)
    means = []
    for start in range(0, resamples, max(1, CHUNK // G)):
        count = min(resamples - start, max(1, CHUNK // G))
        of_runs = rng.multinomial(R, np.full(R, 1 / R), count) / R                       # (B, R)
        of_groups = rng.multinomial(G, np.full(G, 1 / G), count)                         # (B, G)
        means.append(((of_runs @ sums) * of_groups).sum(1) / (of_groups @ sizes))
    widen = math.sqrt(R / (R - 1)) if R > 1 else 1.0
    low, high = np.quantile(np.concatenate(means), [LEVEL / 2, 1 - LEVEL / 2])
    mean = D.mean()
    return float(mean + widen * (low - mean)), float(mean + widen * (high - mean))


def training_noise(drops: np.ndarray, seed: int = SEED) -> tuple[float, float] | None:
    """The 95 % BCa interval of the mean of one drop a run, by scipy: over seeds on the same rows, so about nothing but training. None for one run."""
    if len(drops) < 2:
        return None
    if np.ptp(drops) == 0:
        return float(drops[0]), float(drops[0])
    found = scipy.stats.bootstrap((drops,), np.mean, confidence_level=1 - LEVEL, method="BCa", random_state=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def difference(first: np.ndarray, second: np.ndarray, margin: float, groups: np.ndarray | None = None) -> dict:
    """What is to be said about accuracy `first` less accuracy `second`; both (R, n), whether each run was right on each test example.

    `p` is the larger of the sign-flip test's, which takes the runs as they are, and that of a t test with the standard error of
    runs and examples together; the 95 % interval is the wider of that error's and the two-level bootstrap's at each end. So a
    conclusion must hold for new examples and for new runs. `p_equivalence` is the larger of two one-sided t tests against
    +-`margin`. `smallest` is the difference that would be found significant with a probability of POWER.
    """
    D = first.astype(np.float64) - second
    drop, spread, d = float(D.mean()), spread_of_mean(D, groups), D.mean(0)
    flip = sign_flip_test(d, groups)
    quantile = float(scipy.stats.t.ppf(1 - LEVEL / 2, spread.freedom))
    if spread.error > 0 and math.isfinite(spread.error):
        t_test = float(2 * scipy.stats.t.sf(abs(drop) / spread.error, spread.freedom))
        equivalence = float(max(scipy.stats.t.sf((margin - drop) / spread.error, spread.freedom),
                                scipy.stats.t.sf((margin + drop) / spread.error, spread.freedom)))
    else:                                                                # no example differs, or there is one only: nothing is shown
        t_test, equivalence = 1.0, 1.0
    bootstrap = two_level_bootstrap(D, groups)
    half = quantile * spread.error if math.isfinite(spread.error) else math.inf
    interval = max(-1.0, min(bootstrap[0], drop - half)), min(1.0, max(bootstrap[1], drop + half))
    a, b, scatter = float(first.mean()), float(second.mean()), float(d.std(ddof=1)) if len(d) > 1 else 0.0
    power = float(scipy.stats.t.ppf(POWER, spread.freedom))
    return {
        "drop": drop, "interval": interval, "p": max(flip, t_test), "p_sign_flip": flip, "p_examples_and_runs": t_test,
        "standard_error": spread.error if math.isfinite(spread.error) else None, "bootstrap_interval": bootstrap, "p_equivalence": equivalence,
        "margin": margin, "training_noise_interval": training_noise(D.mean(1)),
        "cohens_h": 2 * (math.asin(math.sqrt(a)) - math.asin(math.sqrt(b))), "d_z": drop / scatter if scatter > 0 else None,
        "smallest": min(1.0, (quantile + power) * spread.error),
    }


def over_splits(drops: np.ndarray, train_rows: int, test_rows: int) -> dict:
    """Mean, 95 % interval and two-sided p of one drop a random split, (K,), corrected for splits that share rows (Nadeau and Bengio 2003).

    The variance of the mean is taken as s^2 (1 / K + test_rows / train_rows), t with K - 1 degrees of freedom.
    """
    K, mean = len(drops), float(drops.mean())
    error = math.sqrt(float(drops.var(ddof=1)) * (1 / K + test_rows / train_rows))
    half = float(scipy.stats.t.ppf(1 - LEVEL / 2, K - 1)) * error
    p = float(2 * scipy.stats.t.sf(abs(mean) / error, K - 1)) if error > 0 else 1.0
    return {"splits": K, "drop": mean, "standard_error": error, "interval": (mean - half, mean + half), "p": p}


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for testing all of them (Holm 1979): rejecting those below LEVEL errs anywhere with probability LEVEL at most."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(running, 1.0)
    return adjusted.tolist()


def chance_level(labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class of the test rows."""
    return float(np.bincount(labels).max() / len(labels))


def binomial_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy on n independent examples."""
    return math.sqrt(accuracy * (1 - accuracy) / n)
