"""How many columns of a representation vary, differ from each other, and are free, layer by layer."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from ablation.catalogue import ENSEMBLE_MEMBERS, NINE, SPECS

SAME = 1e-6  # share of a column's variance that other columns leave unexplained if they determine it
ROUNDING = 1e-6  # a spread below this share of a column's size is float32's rounding
COLUMN_NAMES = {  # of each representation
    "simple_stats": ["frobenius", "mean", "std", "max", "min"],
    "rank_based": ["p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "iqr", "range"],
    "stats": ["mean", "std", "median", "min", "max", "skewness", "kurtosis"],
    "spectral": [
        *(f"s_{i}" for i in range(1, 11)),
        *(f"share_{i}" for i in range(1, 11)),
        *(f"gap_{i}" for i in range(1, 10)),
        "entropy",
        "condition",
        "nuclear",
    ],
    "matrix_norms": [
        "frobenius",
        "nuclear",
        "spectral",
        "one",
        "inf",
        "nuclear/frobenius",
        "spectral/frobenius",
    ],
    "distribution": [
        "p5",
        "p10",
        "p25",
        "p50",
        "p75",
        "p90",
        "p95",
        "iqr",
        "deviation",
        "variation",
        "skewness",
        "kurtosis",
    ],
    "frequency": [*(f"f_{i}" for i in range(1, 11)), "mean", "std", "max", "share_of_ten"],
    "info_theoretic": ["entropy", "entropy/log50"],
}
COLUMN_NAMES["ensemble"] = [
    f"{member}.{name}" for member in ENSEMBLE_MEMBERS for name in COLUMN_NAMES[member]
]
INSPECTED = [name for name in NINE if name != "ensemble"]
STARTS = dict(
    zip(INSPECTED, np.cumsum([0] + [SPECS[name].width for name in INSPECTED[:-1]]).tolist(), strict=True)
)
POSITIONS = {name: np.arange(start, start + SPECS[name].width) for name, start in STARTS.items()}
POSITIONS["ensemble"] = np.concatenate([POSITIONS[member] for member in ENSEMBLE_MEMBERS])

REDUNDANCIES = ("constant", "rounding", "duplicate", "collinear")


class Moments:
    """Range, mean and products of one layer's columns,
    of all representations side by side, block by block.
    """

    def __init__(self):
        self.count = 0
        self.origin = self.low = self.high = self.sums = self.products = np.zeros(0)

    def add(self, x: np.ndarray) -> None:
        """Add a block of rows (n, k) float64."""
        if not self.count:
            self.origin = x.mean(0)  # near the mean, so that the products stay small
            self.low, self.high = x.min(0), x.max(0)
            self.sums, self.products = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        centred = x - self.origin
        self.count += len(x)
        self.sums = self.sums + centred.sum(0)  # (k,)
        self.products = self.products + centred.T @ centred  # (k, k)
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))

    def constant(self) -> np.ndarray:
        """(k,) True for columns of one value."""
        return self.high == self.low

    def rounding(self) -> np.ndarray:
        """(k,) True for columns whose spread is float32's rounding of a constant."""
        size = np.maximum(np.abs(self.low), np.abs(self.high))
        return ~self.constant() & (self.high - self.low <= ROUNDING * size)

    def correlations(self, which: np.ndarray) -> np.ndarray:
        """Correlation matrix of the columns `which`."""
        mean = self.sums[which] / self.count
        covariance = self.products[np.ix_(which, which)] / self.count - np.outer(mean, mean)
        std = np.sqrt(covariance.diagonal())
        return covariance / np.outer(std, std)


class ColumnCensus:
    """How many columns of a representation vary, differ and are free, layer by layer."""

    def __init__(self, representation: str):
        self.names, self.positions = COLUMN_NAMES[representation], POSITIONS[representation]
        self.layers = 0
        # kind -> column -> number of layers
        self.kinds: dict[str, Counter[str]] = {kind: Counter() for kind in REDUNDANCIES}
        self.same_as: dict[str, Counter] = defaultdict(Counter)
        self.free: list[int] = []
        self.effective: list[float] = []
        self.few_rows = False

    def add(self, moments: Moments) -> None:
        """Add a layer."""
        self.layers += 1
        constant, rounding = moments.constant()[self.positions], moments.rounding()[self.positions]
        for kind, flags in (("constant", constant), ("rounding", rounding)):
            self.kinds[kind].update(self.names[i] for i in np.flatnonzero(flags))
        alive = np.flatnonzero(~constant & ~rounding)
        self.few_rows |= len(alive) >= moments.count
        if not len(alive):
            self.free.append(0)
            self.effective.append(0.0)
            return
        correlations = moments.correlations(self.positions[alive])
        twins, determined = redundant(correlations)
        for i, twin in twins.items():
            self.kinds["duplicate"][self.names[alive[i]]] += 1
            self.same_as[self.names[alive[i]]][self.names[alive[twin]]] += 1
        self.kinds["collinear"].update(self.names[alive[i]] for i in determined)
        self.free.append(len(alive) - len(twins) - len(determined))
        # Participation ratio of the eigenvalues, (sum)^2 / sum of squares: the number of directions of equal
        # weight.
        self.effective.append(len(alive) ** 2 / float((correlations**2).sum()))

    def summary(self) -> dict:
        """Counts and names of columns, mean over the layers."""

        def listed(kind: str) -> dict:
            return {
                "a_layer": sum(self.kinds[kind].values()) / self.layers,
                "in_every_layer": [name for name in self.names if self.kinds[kind][name] == self.layers],
                "in_some_layers": [name for name in self.names if 0 < self.kinds[kind][name] < self.layers],
            }

        return {
            "width": len(self.names),
            **{kind: listed(kind) for kind in self.kinds},
            "same_as": {name: twins.most_common(1)[0][0] for name, twins in self.same_as.items()},
            "degrees_of_freedom": float(np.mean(self.free)),
            "effective": float(np.mean(self.effective)),
            "too_few_rows": self.few_rows,
        }


def redundant(correlations: np.ndarray) -> tuple[dict[int, int], list[int]]:
    """Columns that equal an earlier column up to scale and offset (column -> earlier column); and columns
    that several earlier columns determine.
    """
    twins, determined = {}, []
    left = correlations.copy()  # of the columns, once the earlier columns are taken out
    for i in range(len(left)):
        if left[i, i] > SAME:
            left -= np.outer(left[:, i], left[i]) / left[i, i]
            continue
        same = np.flatnonzero(correlations[i, :i] ** 2 > 1 - SAME)
        if len(same):
            twins[i] = int(same[0])
        else:
            determined.append(i)
    return twins, determined
