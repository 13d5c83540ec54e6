"""Representations that are fitted to the training rows of one split and layer set,
and all weights as they are.

Each is computed when its cell runs and kept for that cell alone: it depends on which rows train and, for
`centroid_cosine`, on their labels. Nothing is fitted to a validation or test row, to its label, or to a row
that an audit changed. The N rows of the data set are followed by E changed rows, in the same order
everywhere. The two never meet in one matrix product, so that an audit does not even change the rounding of
the rows that it audits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError
from sklearn.decomposition import KernelPCA
from sklearn.preprocessing import KernelCenterer
from torch import Tensor

from ablation.audits import Audit
from ablation.collection import LoraCollection, View
from ablation.controls import metadata_features
from ablation.layers import Module
from ablation.memory import free_memory
from ablation.reading import BLOCK_ROWS
from ablation.streamed import Matrix, StreamedRows, stream
from ablation.task import TrainingError
from representations import ModuleBatch

FIT_SEED = 0
FOLDS = 5  # of the training rows, for scores that must not see a row's own label
OVERSAMPLING = 2  # directions that randomised PCA looks at, for each component kept
KERNEL_TILE = 2**24  # products of two columns held at a time
NEGLIGIBLE_STD = 1e-6  # components whose std is smaller, relative to the largest, hold rounding only
TINY = 1e-30


@dataclass
class Fit:
    """What a fitted representation sees: a collection,
    the split and labels of a cell, its layer set, and audits.

    `components` bounds the components of pca and kernel_pca.
    """

    data: LoraCollection
    view: View
    layer_set: str
    components: int = 128
    audits: tuple[Audit, ...] = ()

    @cached_property
    def sources(self) -> Tensor:
        """(N + E,) the row of the data set that each row is or comes from."""
        rows = [np.arange(self.data.num_rows), *(audit.rows for audit in self.audits)]
        return torch.from_numpy(np.concatenate(rows))

    @property
    def num_rows(self) -> int:
        """N + E."""
        return len(self.sources)

    @property
    def sections(self) -> list[slice]:
        """The slices of the N rows and of the E changed rows."""
        return [slice(0, self.data.num_rows), slice(self.data.num_rows, self.num_rows)]

    def blocks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` rows, none of which holds both kinds of rows."""
        for section in self.sections:
            for start in range(section.start, section.stop, size):
                yield slice(start, min(start + size, section.stop))

    @property
    def device(self) -> str:
        """Where matrices are multiplied."""
        return self.data.weights.device

    @property
    def positions(self) -> list[int]:
        """Positions of the layer set's layers."""
        return self.data.layers.positions(self.layer_set)

    @property
    def weights_per_row(self) -> int:
        """Weights of a row in the layer set."""
        layers = self.data.layers
        return sum(layers.layouts[layers.names[position]].size for position in self.positions)

    @property
    def modules(self) -> list[Module]:
        """The layer set's modules."""
        layers = self.data.layers
        return [layers.modules[i] for i in layers.module_positions(self.layer_set)]

    @cached_property
    def train(self) -> Tensor:
        """(T,) numbers of the training rows."""
        return torch.from_numpy(self.view.split.train)

    @cached_property
    def train_labels(self) -> Tensor:
        """(T,) class numbers of the training rows."""
        return torch.from_numpy(self.view.labels[self.view.split.train])

    def read(self, position: int) -> Tensor:
        """One layer of the N + E rows, (N + E, rows, cols) float32 in the host's memory."""
        data, layer = self.data, self.data.layers.names[position]
        layout = data.layers.layouts[layer]
        whole = torch.empty(self.num_rows, layout.rows, layout.cols)
        sizes = [data.num_rows, *(len(audit.rows) for audit in self.audits)]
        filled = np.cumsum(sizes)[:-1].tolist()  # where the next changed rows of each audit go
        for start in range(0, data.num_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, data.num_rows)
            whole[start:stop] = w = data.weights.read_on_host(layer, start, stop)
            for i, audit in enumerate(self.audits):
                changed = audit.change(data.weights, position, (start, stop), w)
                whole[filled[i] : filled[i] + len(changed)] = changed
                filled[i] += len(changed)
        return whole

    @cached_property
    def kernel(self) -> Tensor:
        """Inner products <dW_i, dW_j> summed over modules,
        of N + E rows with T training rows, (N + E, T) float64.

        For one module it is the sum over r x r of (up_i.T @ up_j) * (down_i @ down_j.T), because dW = up @
        down: exact, and no product dW is formed. Products of blocks are in float32, or in float64 where that
        cannot hold them, their sum in float64, in the host's memory.
        """
        train = self.train
        kernel = torch.zeros(self.num_rows, len(train), dtype=torch.float64)
        for module in self.modules:
            down = self.read(module.down).to(self.device)  # (N + E, r, in)
            upT = self.read(module.up).mT.contiguous().to(self.device)  # (N + E, r, out)
            r = down.shape[1]
            # (T*r, in), (T*r, out)
            down_T, upT_T = (w[train.to(self.device)].flatten(0, 1) for w in (down, upT))
            for rows in self.blocks(max(1, KERNEL_TILE // (r * r * len(train)))):
                factors = (upT[rows].flatten(0, 1), upT_T), (down[rows].flatten(0, 1), down_T)
                inner = product_of_inner(*factors)
                if not inner.isfinite().all():
                    inner = product_of_inner(*((a.double(), b.double()) for a, b in factors))
                kernel[rows] += inner.view(-1, r, len(train), r).sum((1, 3), dtype=torch.float64).cpu()
        return kernel


def product_of_inner(*factors: tuple[Tensor, Tensor]) -> Tensor:
    """The elementwise product of a @ b.T over the pairs (a (n, d), b (m, d)); (n, m)."""
    first, second = (a @ b.mT for a, b in factors)
    return first * second


def flat_vec(fit: Fit) -> StreamedRows:
    """All weights of a row, layer after layer: (N + E, D) float32, read from the data set when they are used.

    The origin's tenth representation. Changed rows are kept in memory; TrainingError if they do not fit.
    """
    N, reader = fit.data.num_rows, fit.data.weights
    names = [fit.data.layers.names[position] for position in fit.positions]
    changed = changed_weights(fit)

    def make(rows: Tensor) -> Tensor:
        x, column = torch.empty(len(rows), fit.weights_per_row), 0
        is_changed = rows >= N
        own = rows[~is_changed]
        for layer in names if len(own) else ():
            w = reader.read_rows(layer, own)
            x[~is_changed, column : column + w.shape[1]] = w
            column += w.shape[1]
        x[is_changed] = changed[rows[is_changed] - N]
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
    training rows' mean. The first reading projects X on random directions; Q (T, l) is an orthonormal basis
    of the result over the training rows, with l = 2 k or as many as there are. The second reading takes B =
    Q.T @ X and X @ B.T, layer by layer. The scores are those of the best k directions in the span of B's
    rows, ordered by variance; the sign is such that the largest score of a training row is positive. Memory:
    one layer of all rows, twice while it is projected, and 20 numbers a row and direction. Exact if the
    training rows span at most l directions.
    """
    train, T = fit.train, len(fit.train)
    k = min(fit.components, T - 1, fit.weights_per_row)
    if k < 1:
        raise TrainingError("pca needs two training rows")
    directions = min(OVERSAMPLING * k, T, fit.weights_per_row)
    Q = range_of_projections(fit, directions)
    gram = zeros(fit, directions, directions)  # B @ B.T
    scores = zeros(fit, fit.num_rows, directions)  # X @ B.T
    for position in fit.positions:
        x = centred(fit, position)
        B = Q.mT @ x[fit.sections[0]]  # (l, d)
        gram += B @ B.mT
        for section in fit.sections:
            scores[section] += x[section] @ B.mT
        del x  # before the next layer is read
    if not (gram.isfinite().all() and scores.isfinite().all()):
        raise TrainingError("pca: products of the weights are beyond float32")
    squares, U = torch.linalg.eigh(gram)
    s = squares.flip(0)[:k].clamp_min(0).sqrt()
    kept = s > NEGLIGIBLE_STD * s[0]
    scores = scores @ U.flip(1)[:, :k][:, kept] / s[kept]
    largest = scores[train].gather(0, scores[train].abs().argmax(0, keepdim=True))
    return (scores * torch.where(largest < 0, -1.0, 1.0)).float().cpu()


def zeros(fit: Fit, *shape: int) -> Tensor:
    """Zeros of that shape, float64, where the fit multiplies."""
    return torch.zeros(*shape, dtype=torch.float64, device=fit.device)


def centred(fit: Fit, position: int) -> Tensor:
    """A layer's weights (N + E, d) less the training rows' mean."""
    x = fit.read(position).flatten(1)
    sums = [x[rows].sum(0, dtype=torch.float64) for rows in fit.train.split(BLOCK_ROWS)]
    total = functools.reduce(torch.add, sums)
    return x.sub_((total / len(fit.train)).float()).to(fit.device)


def range_of_projections(fit: Fit, directions: int) -> Tensor:
    """Q (N, l) float32: an orthonormal basis of the training rows' random projections; other rows are 0."""
    N = fit.data.num_rows
    projections = zeros(fit, N, directions)
    for position in fit.positions:
        x = centred(fit, position)[fit.sections[0]]
        rng = np.random.default_rng([FIT_SEED, position])
        random = torch.from_numpy(rng.standard_normal((x.shape[1], directions), dtype=np.float32))
        projections += x @ random.to(x)
        del x  # before the next layer is read
    Q = zeros(fit, N, directions).float()
    Q[fit.train] = torch.linalg.qr(projections[fit.train]).Q.float()
    return Q


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


def kernel_pca(fit: Fit) -> Tensor:
    """Scores on the principal components of the training rows' products, (N + E, k) float32.

    scikit-learn's KernelPCA on `Fit.kernel`.
    """
    kernel, components = fit.kernel.numpy(), min(fit.components, len(fit.train) - 1)
    refuse_equal_rows(kernel[fit.train])
    # The dense solver would hold the interpreter for minutes and stop the thread that writes the log.
    model = KernelPCA(components, kernel="precomputed", eigen_solver="arpack", random_state=FIT_SEED)
    try:
        model.fit(kernel[fit.train])
    except ArpackError as error:
        raise TrainingError(f"kernel_pca: the eigenvalues were not found: {error}") from error
    kept = model.eigenvalues_ > NEGLIGIBLE_STD**2 * model.eigenvalues_.max()
    sections = [model.transform(kernel[section])[:, kept] for section in fit.sections if kernel[section].size]
    return torch.from_numpy(np.concatenate(sections)).float()


def refuse_equal_rows(kernel: np.ndarray) -> None:
    """Raise TrainingError if rows with these products (T, T) do not differ, or if they are not finite."""
    if not np.isfinite(kernel).all():
        raise TrainingError("products of the weights are beyond float64")
    centred_kernel = KernelCenterer().fit_transform(kernel / (np.abs(kernel).max() or 1.0))
    if np.abs(centred_kernel).max() <= NEGLIGIBLE_STD**2:
        raise TrainingError("no column varies over the training rows: there is nothing to learn from")


def kernel_ridge(fit: Fit) -> Tensor:
    """The kernel itself, (N + E, T) float64: the classifier of the same name reads it."""
    return fit.kernel


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
