"""Inner products of the modules' changes of the weights, and what is fitted to them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError
from sklearn.decomposition import KernelPCA
from torch import Tensor

from ablation.fit import FIT_SEED, NEGLIGIBLE_STD, Fit
from ablation.memory import free_memory
from ablation.reading import BLOCK_ROWS
from ablation.task import TrainingError

KERNEL_TILE = 2**24  # products of two columns held at a time
KERNEL_COPIES = 3  # of a kernel that are held at most while something is fitted to it


def kernel_of(fit: Fit) -> Tensor:
    """`products_of_rows`, once for all representations that share the fit."""
    if fit.kernel is None:
        fit.kernel = products_of_rows(fit)
    return fit.kernel


def products_of_rows(fit: Fit) -> Tensor:
    """Inner products <dW_i, dW_j> summed over modules,
    of N + E rows with T training rows, (N + E, T) float64 in the host's memory.

    For one module it is the sum over r x r of (up_i.T @ up_j) * (down_i @ down_j.T), because dW = up @
    down: exact, and no product dW is formed. Products of blocks are in float32, or in float64 where that
    cannot hold them, their sum in float64. Products of two training rows are computed once and stand in both
    places.
    """
    T = len(fit.train)
    refuse_no_room(fit)
    kernel = torch.zeros(fit.num_rows, T, dtype=torch.float64)
    is_trained = torch.zeros(fit.num_rows, dtype=torch.bool)
    is_trained[fit.train] = True
    for module in fit.modules:
        trained = [
            training_rows(fit, module.up).mT.contiguous(),
            training_rows(fit, module.down),
        ]  # (T, r, d)
        r = trained[0].shape[1]
        size = max(1, KERNEL_TILE // (r * r * T))
        for start in range(0, T, size):
            own = [factor[start : start + size] for factor in trained]
            part = products(own, [w[start:] for w in trained])
            add_to_rows(kernel[:, start:], fit.train[start : start + size], part)
        blocks = zip(fit.layer_blocks(module.up), fit.layer_blocks(module.down), strict=True)
        for (rows, up), (_, down) in blocks:
            other = (~is_trained[rows]).nonzero()[:, 0]
            for chosen in other.split(size) if len(other) else ():
                own = [w[chosen].to(fit.device) for w in (up.mT, down)]
                add_to_rows(kernel, rows.start + chosen, products(own, trained))
    for start in range(0, T, BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        kernel[fit.train[stop:], start:stop] = kernel[fit.train[start:stop], stop:].mT
        square = kernel[fit.train[start:stop], start:stop]
        kernel[fit.train[start:stop], start:stop] = square.triu() + square.triu(1).mT
    return kernel


def refuse_no_room(fit: Fit) -> None:
    """Raise TrainingError if the memory has no room for the kernel and the copies that fitting makes."""
    size, room = 8 * fit.num_rows * len(fit.train), free_memory()
    if KERNEL_COPIES * size > room:
        raise TrainingError(
            f"the products of {fit.num_rows:,} rows with {len(fit.train):,} training rows take "
            f"{KERNEL_COPIES * size / 1e9:.1f} GB with their copies, {room / 1e9:.1f} GB are free: leave out "
            "this representation, or give a smaller --audit-rows"
        )


def training_rows(fit: Fit, position: int) -> Tensor:
    """One layer of the training rows in the split's order, (T, rows, cols), where the fit multiplies."""
    layout = fit.data.layers.layouts[fit.data.layers.names[position]]
    found = torch.empty(len(fit.train), layout.size, device=fit.device)
    places = fit.train.argsort().to(fit.device)  # in the split, of the training rows in ascending order
    for rows, w in fit.training_blocks(position):
        found[places[rows]] = w
    return found.view(-1, layout.rows, layout.cols)


def products(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Inner products (n, m) of pairs of factors (n, r, d) with pairs (m, r, d), on the host."""
    n, r, _ = rows[0].shape
    factors = [(a.flatten(0, 1), b.flatten(0, 1)) for a, b in zip(rows, columns, strict=True)]
    inner = product_of_inner(*factors)
    if not all(bound.isfinite() for bound in inner.aminmax()):
        inner = product_of_inner(*((a.double(), b.double()) for a, b in factors))
    return (inner if r == 1 else inner.view(n, r, -1, r).sum((1, 3), dtype=torch.float64)).cpu()


def add_to_rows(x: Tensor, rows: Tensor, part: Tensor) -> None:
    """x[rows] += part, several times as fast: each row is added where it lies."""
    for row, values in zip(rows.tolist(), part, strict=True):
        x[row] += values


def product_of_inner(*factors: tuple[Tensor, Tensor]) -> Tensor:
    """The elementwise product of a @ b.T over the pairs (a (n, d), b (m, d)); (n, m)."""
    first, second = (a @ b.mT for a, b in factors)
    return first * second


def kernel_pca(fit: Fit) -> Tensor:
    """Scores on the principal components of the training rows' products, (N + E, k) float32.

    scikit-learn's KernelPCA on `products_of_rows`.
    """
    kernel, components = kernel_of(fit).numpy(), min(fit.components, len(fit.train) - 1)
    own = kernel[fit.train]
    refuse_equal_rows(own)
    # The dense solver would hold the interpreter for minutes and stop the thread that writes the log.
    model = KernelPCA(
        components, kernel="precomputed", eigen_solver="arpack", random_state=FIT_SEED, copy_X=False
    )
    try:
        model.fit(own)
    except ArpackError as error:
        raise TrainingError(f"kernel_pca: the eigenvalues were not found: {error}") from error
    del own
    kept = model.eigenvalues_ > NEGLIGIBLE_STD**2 * model.eigenvalues_.max()
    scores = [model.transform(kernel[rows])[:, kept] for rows in fit.blocks(BLOCK_ROWS)]
    return torch.from_numpy(np.concatenate(scores)).float()


def refuse_equal_rows(kernel: np.ndarray) -> None:
    """Raise TrainingError if rows with these products (T, T) do not differ, or if they are not finite."""
    largest = max(abs(float(kernel.min())), abs(float(kernel.max())))
    if not np.isfinite(largest):
        raise TrainingError("products of the weights are beyond float64")
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(kernel), BLOCK_ROWS)]
    scale, spread = largest or 1.0, 0.0
    means = np.concatenate([(kernel[rows] / scale).mean(1) for rows in blocks])
    for rows in blocks:
        centred = kernel[rows] / scale - means[rows, None] - means + means.mean()
        spread = max(spread, float(np.abs(centred).max()))
    if spread <= NEGLIGIBLE_STD**2:
        raise TrainingError("no column varies over the training rows: there is nothing to learn from")


def kernel_ridge(fit: Fit) -> Tensor:
    """The kernel itself, (N + E, T) float64: the classifier of the same name reads it."""
    return kernel_of(fit)
