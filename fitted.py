"""Representations that are fitted to the training rows of one split and layer set, and all weights as they are.

Each is computed when its cell runs and kept for that cell alone: it depends on which rows train and, for
`centroid_cosine` and `kernel_ridge`, on their labels. Nothing is fitted to a validation or test row, to its label, or to
a row that an audit changed. N rows of the data set are followed by E changed ones, all in the same order everywhere; the
two never meet in one product of matrices, so that an audit does not change even the rounding of what it audits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.decomposition import KernelPCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.preprocessing import KernelCenterer
from torch import Tensor

from controls import Audit
from lora_data import BLOCK_ROWS, LoraData
from representations import Module
from training import PARTS, OnRun, Run, TrainedRuns, TrainingError

FIT_SEED = 0
FOLDS = 5                                  # of the training rows, for scores that must not see a row's own label
OVERSAMPLING = 2                           # directions that randomised PCA looks at, for each component kept
KERNEL_TILE = 2**24                        # products of two columns held at a time
NEGLIGIBLE = 1e-6                          # of the largest standard deviation along a component: below it lies rounding
TINY = 1e-30
RIDGE_PENALTIES = tuple(10.0**power for power in range(-6, 3))   # times the kernel's mean over its diagonal


@dataclass
class Fit:
    """One layer set of one split, as the fitted representations see it."""

    data: LoraData
    layer_set: str
    components: int = 128                  # of pca and kernel_pca, at most
    audits: tuple[Audit, ...] = ()

    @cached_property
    def sources(self) -> Tensor:
        """(N + E,) the row of the data set that each row is or comes from."""
        return torch.from_numpy(np.concatenate([np.arange(self.data.num_rows), *(audit.rows for audit in self.audits)]))

    @property
    def num_rows(self) -> int:
        return len(self.sources)

    @property
    def sections(self) -> list[slice]:
        """The N rows, and the E."""
        return [slice(0, self.data.num_rows), slice(self.data.num_rows, self.num_rows)]

    def blocks(self, size: int) -> Iterator[slice]:
        """Of at most `size` rows, none of which holds both kinds."""
        for section in self.sections:
            for start in range(section.start, section.stop, size):
                yield slice(start, min(start + size, section.stop))

    @property
    def layers(self) -> list[int]:
        return self.data.layers_of(self.layer_set)

    @property
    def width(self) -> int:
        """Weights of a row."""
        shapes = [self.data.matrices[self.data.layers[position]] for position in self.layers]
        return sum(shape.rows * shape.cols for shape in shapes)

    @property
    def modules(self) -> list:
        return [self.data.modules[i] for i in self.data.modules_of(self.layer_set)]

    @cached_property
    def train(self) -> Tensor:
        return torch.from_numpy(self.data.split.train)

    @cached_property
    def train_labels(self) -> Tensor:
        return torch.from_numpy(self.data.labels[self.data.split.train])

    def read(self, position: int) -> Tensor:
        """One layer of the N + E rows, (N + E, rows, cols) float32 in the host's memory."""
        data = self.data
        shape = data.matrices[data.layers[position]]
        whole = torch.empty(self.num_rows, shape.rows, shape.cols)
        filled = [data.num_rows + sum(len(audit.rows) for audit in self.audits[:i]) for i in range(len(self.audits))]
        for start in range(0, data.num_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, data.num_rows)
            whole[start:stop] = w = data.read_on_host(data.layers[position], start, stop)
            for i, audit in enumerate(self.audits):
                changed = audit.change(data, position, start, stop, w)
                whole[filled[i]:filled[i] + len(changed)] = changed
                filled[i] += len(changed)
        return whole

    @cached_property
    def kernel(self) -> Tensor:
        """<dW_i, dW_j> summed over modules, of the N + E rows with the training rows: (N + E, T) float64, in the host's memory.

        For one module it is the sum over r x r of (up_i.T @ up_j) * (down_i @ down_j.T), because dW = up @ down: the exact
        inner product of all products, none of which is formed. Products of blocks in float32, their sum in float64.
        """
        device, train = self.data.device, self.train
        kernel = torch.zeros(self.num_rows, len(train), dtype=torch.float64)
        for module in self.modules:
            down, upT = self.read(module.down).to(device), self.read(module.up).mT.contiguous().to(device)   # (N + E, r, in), (N + E, r, out)
            r = down.shape[1]
            down_T, upT_T = (w[train.to(device)].flatten(0, 1) for w in (down, upT))                         # (T*r, in), (T*r, out)
            for rows in self.blocks(max(1, KERNEL_TILE // (r * r * len(train)))):
                inner = (upT[rows].flatten(0, 1) @ upT_T.mT) * (down[rows].flatten(0, 1) @ down_T.mT)
                kernel[rows] += inner.view(-1, r, len(train), r).sum((1, 3), dtype=torch.float64).cpu()
        return kernel


def flat_vec(fit: Fit) -> Tensor:
    """All weights of a row, layer after layer: (N + E, D) float32. The origin's tenth representation."""
    whole, column = torch.empty(fit.num_rows, fit.width), 0
    for position in fit.layers:
        x = fit.read(position).flatten(1)
        whole[:, column:column + x.shape[1]] = x
        column += x.shape[1]
    return whole


def pca(fit: Fit) -> Tensor:
    """Scores of all weights on the first principal components of the training rows, (N + E, k) float32, in weight units.

    Randomised (Halko, Martinsson and Tropp 2011, without power iterations): X = all weights less the training rows' mean. The
    first reading projects X on random directions, whose orthonormal basis Q (T, l) over the training rows has l = 2 k or as
    many as there are; the second takes B = Q.T @ X and X @ B.T, layer by layer. The scores are those of the best k directions
    in the span of B's rows, ordered by variance, the sign such that the largest score of a training row is positive. In memory
    are one layer of all rows, twice while it is projected, and 20 numbers a row and direction. Exact if the training rows span
    l directions or fewer.
    """
    train, T, own = fit.train, len(fit.train), fit.sections[0]
    k = min(fit.components, T - 1, fit.width)
    directions = min(OVERSAMPLING * k, T, fit.width)
    if k < 1:
        raise TrainingError("pca needs two training rows")

    def centred(position: int) -> Tensor:
        x = fit.read(position).flatten(1)                                # (N + E, d)
        total = sum(x[rows].sum(0, dtype=torch.float64) for rows in train.split(BLOCK_ROWS))
        return x.sub_((total / T).float()).to(fit.data.device)

    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=fit.data.device)  # noqa: E731
    seen = zeros(fit.data.num_rows, directions)
    for position in fit.layers:
        x = centred(position)[own]
        rng = np.random.default_rng([FIT_SEED, position])
        seen += x @ torch.from_numpy(rng.standard_normal((x.shape[1], directions), dtype=np.float32)).to(x)
        del x                                                            # before the next is read
    Q = zeros(fit.data.num_rows, directions).float()                     # with rows of zeros where no row trains
    Q[train] = torch.linalg.qr(seen[train]).Q.float()
    gram, scores = zeros(directions, directions), zeros(fit.num_rows, directions)   # B @ B.T and X @ B.T
    for position in fit.layers:
        x = centred(position)
        B = Q.mT @ x[own]                                                # (l, d)
        gram += B @ B.mT
        for section in fit.sections:
            scores[section] += x[section] @ B.mT
        del x
    squares, U = torch.linalg.eigh(gram)
    s = squares.flip(0)[:k].clamp_min(0).sqrt()
    kept = s > NEGLIGIBLE * s[0]
    scores = scores @ U.flip(1)[:, :k][:, kept] / s[kept]
    largest = scores[train].gather(0, scores[train].abs().argmax(0, keepdim=True))
    return (scores * torch.where(largest < 0, -1.0, 1.0)).float().cpu()


def centroid_cosine(fit: Fit) -> Tensor:
    """Cosine of a module's first left, then right singular vector to each class's centroid, (N + E, 2 M C) float32, M modules, C classes.

    A centroid is the mean of its class's vectors over the training rows, signs fixed (`representations.Module.directions`). A
    training row meets the centroids of the other FOLDS - 1 folds only, so that no row sees its own label; folds are drawn
    without looking at labels. Other rows meet the centroids of all training rows. A class without a row there gives 0.
    """
    C = len(fit.data.classes)
    folds = torch.from_numpy(np.random.default_rng(FIT_SEED).permutation(len(fit.train)) % FOLDS)
    fold_of = torch.full((fit.data.num_rows,), -1)
    fold_of[fit.train] = folds
    fold_of = fold_of[fit.sources]                                       # (N + E,): a changed training row has its label, too
    found = []
    for module in fit.modules:
        down, up = fit.read(module.down), fit.read(module.up)
        pairs = [(down[rows].to(fit.data.device), up[rows].to(fit.data.device)) for rows in fit.blocks(BLOCK_ROWS)]
        blocks = [Module(*pair).directions(1, whole=True) for pair in pairs]
        for side in (0, 1):
            v = torch.cat([block[side][:, 0].float().cpu() for block in blocks])              # (N + E, out or in)
            v /= v.norm(dim=1, keepdim=True).clamp_min(TINY)
            sums = torch.zeros(FOLDS, C, v.shape[1], dtype=torch.float64)
            sums.index_put_((folds, fit.train_labels), v[fit.train].double(), accumulate=True)
            total = sums.sum(0)
            cosines = torch.cat([cosines_to(v[section], total) for section in fit.sections])
            for fold in range(FOLDS):
                for section in fit.sections:
                    rows = torch.arange(section.start, section.stop)[fold_of[section] == fold]
                    cosines[rows] = cosines_to(v[rows], total - sums[fold])
            found.append(cosines)
    return torch.cat(found, dim=1)


def cosines_to(v: Tensor, centroids: Tensor) -> Tensor:
    """(n, C) of unit vectors (n, d) and centroids (C, d) of any length; 0 for one of length 0."""
    return v @ (centroids / centroids.norm(dim=1, keepdim=True).clamp_min(TINY)).float().mT


def kernel_pca(fit: Fit) -> Tensor:
    """Scores on the principal components of the training rows' products, (N + E, k) float32, by scikit-learn's KernelPCA on `Fit.kernel`."""
    kernel, components = fit.kernel.numpy(), min(fit.components, len(fit.train) - 1)
    # the dense solver would stop every other thread, the one that writes the log too, for minutes
    found = KernelPCA(components, kernel="precomputed", eigen_solver="arpack", random_state=FIT_SEED).fit(kernel[fit.train])
    kept = found.eigenvalues_ > NEGLIGIBLE**2 * found.eigenvalues_.max()
    return torch.from_numpy(np.concatenate([found.transform(kernel[section])[:, kept] for section in fit.sections if kernel[section].size])).float()


def metadata(fit: Fit) -> Tensor:
    """The numeric columns that are no weights, less the training rows' mean, then for each whether the row has it: (N + E, 2 K) float32.

    A value that is not there counts as the mean, so that it says nothing itself.
    """
    x = np.stack(list(fit.data.metadata.values()), axis=1)[fit.sources]  # (N + E, K)
    known, train = np.isfinite(x), fit.data.split.train
    mean = np.where(known, x, 0)[train].sum(0) / known[train].sum(0).clip(1)
    return torch.from_numpy(np.concatenate([np.where(known, x - mean, 0), known], axis=1)).float()


FEATURES: dict[str, Callable[[Fit], Tensor]] = {
    "pca": pca,
    "centroid_cosine": centroid_cosine,
    "kernel_pca": kernel_pca,
    "kernel_ridge": lambda fit: fit.kernel,
    "flat_vec": flat_vec,
    "metadata": metadata,
}


def train_kernel_ridge(kernel: Tensor, labels: np.ndarray, split, num_classes: int, on_run: OnRun, also: dict[str, Tensor]) -> TrainedRuns:
    """Instead of the MLP: scikit-learn's KernelRidge on `kernel` (N, T), of all rows with the training rows. One "run", without a seed.

    The kernel and the targets, one a class, are centred by the training rows; the largest output wins. The penalty is the one
    of RIDGE_PENALTIES, times the mean of the centred kernel's diagonal, with the best validation accuracy; the largest of
    several. `also` has kernels (n, T) of rows that are only predicted, by name.
    """
    began = time.perf_counter()
    parts = {name: kernel[getattr(split, name)] for name in PARTS} | also
    centre = KernelCenterer().fit(parts["train"].numpy())
    parts = {name: centre.transform(part.numpy()) for name, part in parts.items()}
    targets = np.eye(num_classes)[labels[split.train]]
    mean, scale = targets.mean(0), parts["train"].trace() / len(targets)
    if scale <= NEGLIGIBLE**2 * abs(kernel[split.train].diagonal().mean().item()) or len(targets) < 2:
        raise TrainingError("the products of the training rows do not differ: there is nothing to learn from")
    best, found = -1.0, {}
    for penalty in sorted(RIDGE_PENALTIES, reverse=True):
        ridge = KernelRidge(alpha=penalty * scale, kernel="precomputed").fit(parts["train"], targets - mean)
        accuracy = np.mean((ridge.predict(parts["val"]) + mean).argmax(1) == labels[split.val])
        if accuracy > best:
            best, found = accuracy, {name: (ridge.predict(part) + mean).argmax(1) for name, part in parts.items()}
    run = Run(FIT_SEED, predictions=found, seconds=time.perf_counter() - began)
    on_run(run, 1)
    return TrainedRuns([run], len(targets))
