"""How alike the rows of a collection are in their `down` or `up` matrices,
and whether these know the class.
"""

from __future__ import annotations

import math

import numpy as np

PERMUTATIONS = 999  # of the labels, for the p-values
LIKE_INITIAL = 0.05  # how far std(down) may be from that of an initialisation, relatively
CORRELATED = 0.01  # mean cosine between rows above which they are not independent draws
SIGNIFICANT = 0.0025  # with four tests a report, one report in a hundred alarms falsely


class Likeness:
    """How alike S sampled rows are in the matrices of one side:
    mean cosine over the layers of every two rows.
    """

    def __init__(self, labels: np.ndarray):
        self.labels = labels  # (S,)
        self.cosines = np.zeros((len(labels), len(labels)))  # (S, S) summed over layers
        self.sizes: list[np.ndarray] = []  # a layer's log norms, (S,)
        self.variance = 0.0  # of a summed cosine of independent rows
        self.layers: list[tuple[float, int, int]] = []  # (std over all rows, rows, cols)

    def add(self, x: np.ndarray, std: float, rows: int, cols: int) -> None:
        """Add a layer: its sampled rows x (S, rows * cols), the std of all its weights, and its shape."""
        norms = np.linalg.norm(x.astype(np.float64), axis=1)
        unit = x / np.where(norms > 0, norms, 1.0)[:, None]
        self.cosines += unit @ unit.T
        self.sizes.append(np.log(np.where(norms > 0, norms, 1.0)))
        self.variance += 1 / x.shape[1]
        self.layers.append((std, rows, cols))

    def between_rows(self) -> dict:
        """The mean and the largest cosine of two different rows,
        and the std of that of two independent rows.
        """
        pairs = self.cosines[np.triu_indices(len(self.labels), 1)] / len(self.layers)
        chance = math.sqrt(self.variance) / len(self.layers)
        if not len(pairs):
            return {"pairs": 0, "mean": 0.0, "largest": 0.0, "by_chance": chance, "z": 0.0}
        return {
            "pairs": len(pairs),
            "mean": float(pairs.mean()),
            "largest": float(pairs.max()),
            "by_chance": chance,
            "z": float(pairs.mean() / chance * math.sqrt(len(pairs))),
        }

    def class_signal(self, rng: np.random.Generator) -> dict:
        """Whether rows of a class are more alike than others, in direction (cosine) and in size (norm).

        `direction` is the mean cosine within classes minus between them. `size` is the share of the variance
        of a layer's log norm that lies between classes (eta squared), mean over the layers; chance gives (C -
        1) / (S - 1). p-values come from permuting the labels.
        """
        one_hot = np.eye(self.labels.max() + 1)[self.labels]
        one_hot = one_hot[:, one_hot.any(0)]  # (S, C)
        measure = ClassMeasure(self, one_hot.sum(0))
        observed = measure(one_hot)
        # (P, 2)
        null = np.array([measure(one_hot[rng.permutation(len(self.labels))]) for _ in range(PERMUTATIONS)])
        # Differences of a rounding error count as none, or equal values would win or lose by their last bit.
        p = (1 + (null >= np.array(observed) - 1e-12).sum(0)) / (1 + PERMUTATIONS)
        chance = (one_hot.shape[1] - 1) / max(len(self.labels) - 1, 1)
        return {
            "rows": len(self.labels),
            "direction": {"within_minus_between": float(observed[0]), "p": float(p[0])},
            "size": {"variance_between_classes": float(observed[1]), "by_chance": chance, "p": float(p[1])},
            "significant": bool((p <= SIGNIFICANT).any()),
        }


class ClassMeasure:
    """Direction and size of `Likeness.class_signal`,
    as a function of the rows' classes; `in_class` (C,) counts rows.
    """

    def __init__(self, likeness: Likeness, in_class: np.ndarray):
        rows = len(likeness.labels)
        self.in_class = in_class
        self.cosines = likeness.cosines / len(likeness.layers)
        np.fill_diagonal(self.cosines, 0.0)
        self.within = float((in_class * (in_class - 1)).sum())  # pairs
        self.between = rows * (rows - 1) - self.within
        sizes = np.stack(likeness.sizes, axis=1)  # (S, L)
        spread = sizes - sizes.mean(0)
        varies = np.ptp(sizes, axis=0) > 1e-9  # a layer of equal norms has no variance to explain
        self.spread = spread[:, varies] / np.sqrt((spread[:, varies] ** 2).sum(0))

    def __call__(self, members: np.ndarray) -> tuple[float, float]:
        """Direction and size for classes (S, C), one-hot."""
        inside = float(np.einsum("sc,sc->", members, self.cosines @ members))
        direction = 0.0
        if self.within and self.between:
            direction = inside / self.within - (self.cosines.sum() - inside) / self.between
        explained = ((members.T @ self.spread) ** 2) / self.in_class[:, None]
        return direction, float(explained.sum() / max(self.spread.shape[1], 1))


def initialisation(down: Likeness) -> dict:
    """std(down) over the std of two initialisations, layer by layer;
    and whether rows were drawn independently.

    gaussian: N(0, 1/rank), as the published sets and PEFT's init_lora_weights="gaussian". kaiming: uniform
    with variance 1 / (3 in), PEFT's default.
    """
    by_layer = {
        "gaussian": [std * rank for std, rank, _ in down.layers],
        "kaiming": [std * math.sqrt(3 * cols) for std, _, cols in down.layers],
    }
    ratios = {
        name: {"lowest": min(values), "mean": float(np.mean(values)), "highest": max(values)}
        for name, values in by_layer.items()
    }
    alike = [
        name
        for name, ratio in ratios.items()
        if ratio["lowest"] > 1 - LIKE_INITIAL and ratio["highest"] < 1 + LIKE_INITIAL
    ]
    rows = down.between_rows()
    return {
        "std": float(np.mean([std for std, _, _ in down.layers])),
        "std_over_initial": ratios,
        "std_is_that_of": alike[0] if alike else None,
        "between_rows": rows,
        "rows_are_correlated": bool(rows["mean"] > CORRELATED and rows["z"] > 3),
    }
