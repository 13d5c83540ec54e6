"""Tests and intervals by random signs and by rows that are drawn again."""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.stats

LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
FLIPS = 9999  # random signs of the sign-flip test
RESAMPLES = 4000  # of a bootstrap
MANY_UNITS = 500  # from as many examples or groups on, a bootstrap takes their mean as normal
RESAMPLING_SEED = 0


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
