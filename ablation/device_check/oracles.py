"""The representations once more, from their definitions: NumPy in float64, one matrix or module at a time.

They share nothing with `representations.py` but the fixed projections, which are part of the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
ADDEND = 1e-8  # of denominators, by definition


def moment_of(x: Array, power: int) -> float:
    """Standardised moment; 0 for a constant."""
    if x.max() == x.min():
        return 0.0
    return float((((x - x.mean()) / (x.std(ddof=1) + ADDEND)) ** power).mean())


def deviation_of(x: Array) -> float:
    """Standard deviation with N - 1; 0 for one element or a constant."""
    return 0.0 if x.size == 1 or x.max() == x.min() else float(x.std(ddof=1))


def filled(values: Sequence[float] | Array, length: int) -> list[float]:
    """The first `length` values, followed by zeros where there are fewer."""
    kept = [float(value) for value in values[:length]]
    return kept + [0.0] * (length - len(kept))


def true_simple_stats(w: Array) -> list[float]:
    """The columns of `simple_stats`."""
    return [math.sqrt((w * w).sum()), w.mean(), deviation_of(w), w.max(), w.min()]


def true_rank_based(w: Array) -> list[float]:
    """The columns of `rank_based`."""
    p = np.percentile(w, (1, 5, 10, 25, 50, 75, 90, 95, 99))
    return [*p, p[5] - p[3], p[8] - p[0]]


def true_stats(w: Array) -> list[float]:
    """The columns of `stats`."""
    x = np.sort(w, axis=None)
    middle = x[(x.size - 1) // 2]
    return [x.mean(), deviation_of(x), middle, x[0], x[-1], moment_of(x, 3), moment_of(x, 4)]


def profile_of(s: Array) -> list[float]:
    """The columns of `spectral` from all singular values, descending."""
    total = s.sum()
    shares = s / total if total > 0 else 0 * s
    top = filled(s, 10)
    gaps = [(top[i] - top[i + 1]) / (top[i] + ADDEND) if i + 1 < len(s) else 0.0 for i in range(9)]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    condition = s[0] / max(s[-1], 1e-6 * s[0]) if s[0] > 0 else 0.0
    return [*top, *filled(shares, 10), *gaps, entropy, condition, total]


def true_spectral(w: Array) -> list[float]:
    """The columns of `spectral`."""
    return profile_of(np.linalg.svd(w, compute_uv=False))


def true_matrix_norms(w: Array) -> list[float]:
    """The columns of `matrix_norms`."""
    s, size = np.linalg.svd(w, compute_uv=False), np.abs(w)
    frobenius, nuclear = math.sqrt((w * w).sum()), s.sum()
    ratios = [nuclear / (frobenius + ADDEND), s[0] / (frobenius + ADDEND)]
    return [frobenius, nuclear, s[0], size.sum(0).max(), size.sum(1).max(), *ratios]


def true_distribution(w: Array) -> list[float]:
    """The columns of `distribution`."""
    p = np.percentile(w, (5, 10, 25, 50, 75, 90, 95))
    absolute = np.abs(w - w.mean()).mean() if w.max() > w.min() else 0.0
    variation = deviation_of(w) / (abs(w.mean()) + ADDEND)
    return [*p, p[4] - p[2], absolute, variation, moment_of(w, 3), moment_of(w, 4)]


def true_frequency(w: Array) -> list[float]:
    """The columns of `frequency`."""
    sizes = np.sort(np.abs(np.fft.fft2(w)), axis=None)[::-1]
    top = np.array(filled(sizes, 10))
    share = (top**2).sum() / ((sizes**2).sum() + ADDEND)
    return [*top, sizes.mean(), sizes.std(), sizes[0], share]


def true_info_theoretic(w: Array) -> list[float]:
    """The columns of `info_theoretic`."""
    if w.max() == w.min():
        return [0.0, 0.0]
    counts, _ = np.histogram(w, bins=50, range=(w.min(), w.max()))
    p = counts[counts > 0] / w.size
    entropy = -(p * np.log(p)).sum()
    return [entropy, entropy / math.log(50)]


def true_ensemble(w: Array) -> list[float]:
    """The columns of `ensemble`."""
    shared = (true_spectral, true_matrix_norms, true_distribution, true_frequency, true_info_theoretic)
    return [value for part in shared for value in part(w)]


LAYER_ORACLES: dict[str, Callable[[Array], list[float]]] = {
    "simple_stats": true_simple_stats,
    "rank_based": true_rank_based,
    "stats": true_stats,
    "spectral": true_spectral,
    "matrix_norms": true_matrix_norms,
    "distribution": true_distribution,
    "frequency": true_frequency,
    "info_theoretic": true_info_theoretic,
    "ensemble": true_ensemble,
}


# --- of the product, formed as a dense matrix but for its singular vectors: down (r, in), up (out, r)


def svd_of_product(down: Array, up: Array) -> tuple[Array, Array, Array]:
    """U (out, m), s (m,) and V (m, in) of up @ down, m the singular values that need not be 0.

    By the QR factors of the two sides, because the dense matrix of a large layer takes minutes.
    """
    q_up, r_up = np.linalg.qr(up)
    q_down, r_down = np.linalg.qr(down.T)
    x, s, y = np.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ x, s, y @ q_down.T


def true_product_spectral(down: Array, up: Array) -> list[float]:
    """The columns of `product_spectral`."""
    return profile_of(svd_of_product(down, up)[1])


def true_product_norms(down: Array, up: Array) -> list[float]:
    """The columns of `product_norms`."""
    w, s = up @ down, svd_of_product(down, up)[1]
    frobenius, squares = math.sqrt((w * w).sum()), w * w
    ratios = [s.sum() / frobenius, s[0] / frobenius] if frobenius > 0 else [0.0, 0.0]
    ends = [math.sqrt(squares.sum(1).max()), math.sqrt(squares.sum(0).max())]
    return [frobenius, s.sum(), s[0], *ends, *ratios]


def true_product_moments(down: Array, up: Array) -> list[float]:
    """The columns of `product_moments`."""
    w = up @ down
    squares = w * w
    return [w.mean(), squares.mean(), (squares * w).mean(), (squares * squares).mean()]


def true_product_quantiles(down: Array, up: Array) -> list[float]:
    """The columns of `product_quantiles`."""
    squares = (up @ down) ** 2
    percents = (0, 5, 10, 25, 50, 75, 90, 95, 100)
    return [q for axis in (1, 0) for q in np.percentile(np.sqrt(squares.sum(axis)), percents)]


def fixed_gaussian(side: str, count: int, size: int) -> Array:
    """The fixed projections (count, size) of a side: part of the definition."""
    return np.random.default_rng([0, *side.encode(), size]).normal(size=(count, size))


def true_product_sketch(down: Array, up: Array) -> list[float]:
    """The columns of `product_sketch`."""
    w = up @ down
    left, right = fixed_gaussian("out", 16, len(up)), fixed_gaussian("in", 16, down.shape[1])
    return list((left @ w @ right.T).ravel())


def signed_vectors(down: Array, up: Array) -> tuple[Array, Array]:
    """Rows sqrt(s_i) u_i and sqrt(s_i) v_i; the largest of 16 projections of u_i, in absolute value, is
    positive.
    """
    u, s, v = svd_of_product(down, up)
    left, right = (u * np.sqrt(s)).T, v * np.sqrt(s)[:, None]
    probes = left @ fixed_gaussian("out", 16, len(up)).T  # (m, 16)
    largest = probes[np.arange(len(probes)), np.abs(probes).argmax(1)]
    sign = np.where(largest < 0, -1.0, 1.0)[:, None]
    return left * sign, right * sign


def true_product_directions(down: Array, up: Array) -> list[float]:
    """The columns of `product_directions`."""
    found = np.zeros((2, 4, 16))
    sides = zip(signed_vectors(down, up), ("out", "in"), (len(up), down.shape[1]), strict=True)
    for place, (vectors, side, size) in enumerate(sides):
        projected = vectors[:4] @ fixed_gaussian(side, 16, size).T
        found[place, : len(projected)] = projected
    return list(found.ravel())


MODULE_ORACLES: dict[str, Callable[[Array, Array], list[float]]] = {
    "product_spectral": true_product_spectral,
    "product_norms": true_product_norms,
    "product_moments": true_product_moments,
    "product_quantiles": true_product_quantiles,
    "product_sketch": true_product_sketch,
    "product_directions": true_product_directions,
}


# --- fitted to training rows


def true_products(modules: list[tuple[Array, Array]]) -> Array:
    """All entries of the products of modules (down (n, r, in), up (n, out, r)), (n, D)."""
    dense = [(up.astype(float) @ down.astype(float)).reshape(len(up), -1) for down, up in modules]
    return np.concatenate(dense, axis=1)


def true_score_products(x: Array, train: Array, components: int) -> Array:
    """Products (n, n) of the scores of rows x (n, D) on the first principal components of the training rows.

    Signs, and turns among components of equal variance, change none of them.
    """
    centred = x - x[train].mean(0)
    axes = np.linalg.svd(centred[train], full_matrices=False)[2][:components]
    scores = centred @ axes.T
    return scores @ scores.T


def true_centroid_cosines(
    modules: list[tuple[Array, Array]], labels: Array, train: Array, num_classes: int
) -> Array:
    """Row by row, of each module the first left, then right singular vector against each class's mean over
    training rows of other folds: (n, 2 M C). The folds of the training rows are part of the definition.
    """
    folds = np.random.default_rng(0).permutation(len(train)) % 5
    found = []
    for down, up in modules:
        pairs = [signed_vectors(d.astype(float), u.astype(float)) for d, u in zip(down, up, strict=True)]
        for side in (0, 1):
            v = np.array([pair[side][0] for pair in pairs])
            v /= np.linalg.norm(v, axis=1)[:, None]
            cosines = np.zeros((len(labels), num_classes))
            for row in range(len(labels)):
                own = folds[np.flatnonzero(train == row)]
                seen = train[~np.isin(folds, own)]
                for c in np.unique(labels[seen]):
                    centroid = v[seen[labels[seen] == c]].mean(0)
                    cosines[row, c] = v[row] @ centroid / np.linalg.norm(centroid)
            found.append(cosines)
    return np.concatenate(found, axis=1)
