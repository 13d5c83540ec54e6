"""Representations that are fitted to the training rows of one split and layer set,
and all weights as they are.

Each is computed when its cell runs and kept for that cell alone: it depends on which rows train and, for
`centroid_cosine`, on their labels. Nothing is fitted to a validation or test row, to its label, or to a row
that an audit changed. The N rows of the data set are followed by E changed rows, in the same order
everywhere. The two never meet in one matrix product, so that an audit does not even change the rounding of
the rows that it audits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ablation.controls import metadata_features
from ablation.fit import FIT_SEED, NEGLIGIBLE_STD, Fit
from ablation.kernels import kernel_pca, kernel_ridge
from ablation.memory import free_memory
from ablation.reading import BLOCK_ROWS
from ablation.streamed import Matrix, StreamedRows, stream
from ablation.task import TrainingError
from representations import ModuleBatch

FOLDS = 5  # of the training rows, for scores that must not see a row's own label
OVERSAMPLING = 2  # directions that randomised PCA looks at, for each component kept
TINY = 1e-30


def flat_vec(fit: Fit) -> StreamedRows:
    """All weights of a row, layer after layer: (N + E, D) float32, read from the data set when they are used.

    The origin's tenth representation. Changed rows are kept in memory; TrainingError if they do not fit.
    """
    N, reader = fit.data.num_rows, fit.data.weights
    names = [fit.data.layers.names[position] for position in fit.positions]
    changed = changed_weights(fit)

    ends = np.cumsum([reader.layers.layouts[layer].size for layer in names])

    def make(rows: Tensor, start: int, stop: int) -> Tensor:
        x = torch.empty(len(rows), stop - start)
        is_changed = rows >= N
        x[is_changed] = changed[rows[is_changed] - N, start:stop]
        own = rows[~is_changed]
        touched = range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop)) + 1)
        for layer, end in ((names[i], int(ends[i])) for i in touched if len(own)):
            first = end - reader.layers.layouts[layer].size
            w = reader.read_rows(layer, own)[:, max(start - first, 0) : stop - first]
            column = max(first - start, 0)
            x[~is_changed, column : column + w.shape[1]] = w
        return x

    return stream(make, fit.num_rows, fit.weights_per_row)


def changed_weights(fit: Fit) -> Tensor:
    """All weights of the changed rows, (E, D) float32. Raises TrainingError if they do not fit the memory."""
    E = fit.num_rows - fit.data.num_rows
    size, room = 4 * E * fit.weights_per_row, free_memory()
    if size > room / 2:
        raise TrainingError(
            f"flat_vec of {E:,} changed rows takes {size / 1e9:.1f} GB, {room / 1e9:.1f} GB are free: give a "
            "smaller --audit-rows"
        )
    layers = [fit.read(position)[fit.data.num_rows :].flatten(1) for position in fit.positions if E]
    return torch.cat(layers, dim=1) if E else torch.empty(0, fit.weights_per_row)


def pca(fit: Fit) -> Tensor:
    """Scores of all weights on the first principal components of the training rows,
    (N + E, k) float32, weight units.

    Randomised (Halko, Martinsson and Tropp 2011, without power iterations). X is all weights less the
    training rows' mean. Q (T, l) is an orthonormal basis of the training rows' projections on random
    directions, with l = 2 k or as many as there are. Then, layer by layer, B = Q.T @ X and X @ B.T. The
    scores are those of the best k directions in the span of B's rows, ordered by variance; the sign is such
    that the largest score of a training row is positive. Exact if the training rows span at most l
    directions. Each layer is read three times. Memory: a block of one layer, and 20 bytes a row and random
    direction.
    """
    train, T = fit.train, len(fit.train)
    k = min(fit.components, T - 1, fit.weights_per_row)
    if k < 1:
        raise TrainingError("pca needs two training rows")
    projections, means = project(fit, min(OVERSAMPLING * k, T, fit.weights_per_row))
    if not projections.isfinite().all():
        raise TrainingError("pca: products of the weights are beyond float32")
    if not projections.any():
        raise TrainingError("no column varies over the training rows: there is nothing to learn from")
    Q = orthonormal(projections)
    gram = fit.zeros(Q.shape[1], Q.shape[1])  # B @ B.T
    scores = fit.zeros(fit.num_rows, Q.shape[1])  # X @ B.T
    for position, mean in means.items():
        B = fit.zeros(Q.shape[1], len(mean))
        for rows, x in fit.training_blocks(position):
            B += Q[rows].float().mT @ x.sub_(mean)
        gram += B @ B.mT
        for rows, w in fit.layer_blocks(position):
            scores[rows] += (w.flatten(1).to(mean) - mean) @ B.float().mT
    if not (gram.isfinite().all() and scores.isfinite().all()):
        raise TrainingError("pca: products of the weights are beyond float32")
    squares, U = torch.linalg.eigh(gram)
    s = squares.flip(0)[:k].clamp_min(0).sqrt()
    kept = s > NEGLIGIBLE_STD * s[:1]
    scores = scores @ (U.flip(1)[:, :k][:, kept] / s[kept])
    largest = scores[train].gather(0, scores[train].abs().argmax(0, keepdim=True))
    return (scores * torch.where(largest < 0, -1.0, 1.0)).float().cpu()


def project(fit: Fit, directions: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Projections (T, l) float64 of the training rows, in ascending order and less their mean, on random
    directions; and the mean (d,) float32 of each layer, by position.
    """
    projections, means = fit.zeros(len(fit.train), directions), {}
    for position in fit.positions:
        size = fit.data.layers.layouts[fit.data.layers.names[position]].size
        rng = np.random.default_rng([FIT_SEED, position])
        random = torch.from_numpy(rng.standard_normal((size, directions), dtype=np.float32)).to(fit.device)
        total, shift = fit.zeros(size), fit.zeros(size).float()
        for rows, x in fit.training_blocks(position):
            if rows.start == 0:
                shift = x.mean(0)  # near the mean, so that float32 holds the differences
            total += x.sub_(shift).sum(0, dtype=torch.float64)
            projections[rows] += x @ random
        means[position] = (shift + total / len(fit.train)).float()
    projections -= projections.mean(0)
    return projections, means


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis (n, l') of the columns of x (n, l), float64, which it is written over.

    Twice, because one round leaves errors of the size of the rounding times the square of the spread of x's
    singular values. Directions below NEGLIGIBLE_STD are left out. Not all of x may be 0.
    """
    for _ in range(2):
        squares, V = torch.linalg.eigh(x.mT @ x)
        kept = squares > NEGLIGIBLE_STD**2 * squares.max()
        to_basis = V[:, kept] / squares[kept].sqrt()
        for rows in x.split(BLOCK_ROWS):
            rows[:, : to_basis.shape[1]] = rows @ to_basis
        x = x[:, : to_basis.shape[1]]
    return x


def centroid_cosine(fit: Fit) -> Tensor:
    """Cosines of a module's first left,
    then right singular vector to each class's centroid, (N + E, 2 M C) float32.

    M modules, C classes. A centroid is the mean of its class's vectors over the training rows, with signs
    fixed (`ModuleBatch.directions`). A training row meets the centroids of the other FOLDS - 1
    folds only, so that no row sees its own label; folds are drawn without looking at labels. Other rows meet
    the centroids of all training rows. A class without a training row gives 0.
    """
    folds = torch.from_numpy(np.random.default_rng(FIT_SEED).permutation(len(fit.train)) % FOLDS)
    fold_of = torch.full((fit.data.num_rows,), -1)
    fold_of[fit.train] = folds
    # (N + E,): a changed training row has the label of the row that it comes from.
    fold_of = fold_of[fit.sources]
    cosines = []
    for module in fit.modules:
        down, up = fit.read(module.down), fit.read(module.up)
        pairs = [(down[rows].to(fit.device), up[rows].to(fit.device)) for rows in fit.blocks(BLOCK_ROWS)]
        directions = [ModuleBatch(*pair).directions(1, whole=True) for pair in pairs]
        for side in (0, 1):
            v = torch.cat([block[side][:, 0].float().cpu() for block in directions])  # (N + E, out or in)
            v /= v.norm(dim=1, keepdim=True).clamp_min(TINY)
            cosines.append(cross_fitted_cosines(fit, v, folds, fold_of))
    return torch.cat(cosines, dim=1)


def cross_fitted_cosines(fit: Fit, v: Tensor, folds: Tensor, fold_of: Tensor) -> Tensor:
    """(N + E, C) cosines of unit vectors v (N + E, d) to
    the class centroids of the folds that a row is not in.
    """
    sums = torch.zeros(FOLDS, len(fit.data.classes), v.shape[1], dtype=torch.float64)
    sums.index_put_((folds, fit.train_labels), v[fit.train].double(), accumulate=True)
    total = sums.sum(0)
    cosines = torch.cat([cosines_to(v[section], total) for section in fit.sections])
    for fold in range(FOLDS):
        for section in fit.sections:
            rows = torch.arange(section.start, section.stop)[fold_of[section] == fold]
            cosines[rows] = cosines_to(v[rows], total - sums[fold])
    return cosines


def cosines_to(v: Tensor, centroids: Tensor) -> Tensor:
    """(n, C) cosines of unit vectors (n, d) to centroids (C, d) of any length;
    0 for a centroid of length 0.
    """
    return v @ (centroids / centroids.norm(dim=1, keepdim=True).clamp_min(TINY)).float().mT


def metadata(fit: Fit) -> Tensor:
    """The numeric columns that are no weights, (N + E, 2 K) float32; see `controls.metadata_features`."""
    features = metadata_features(fit.data.metadata, fit.view.split.train)
    return torch.from_numpy(features)[fit.sources].float()


FITTED: dict[str, Callable[[Fit], Matrix]] = {
    "pca": pca,
    "centroid_cosine": centroid_cosine,
    "kernel_pca": kernel_pca,
    "kernel_ridge": kernel_ridge,
    "flat_vec": flat_vec,
    "metadata": metadata,
}
