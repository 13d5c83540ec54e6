"""Ridge regression on the columns of many sets of modules, in closed form: what does each read of the class?

One split at a time. S sets, U modules, n rows of a part, T training rows, D columns, C classes. A set is a
line of `masks` (S, U) bool. Outputs of a set follow from its columns alone: targets are the classes as 0 and
1, one output a class, and the largest output wins (Hastie, Tibshirani and Friedman, The Elements of
Statistical Learning, 2nd edition, sections 3.4.1 and 4.2).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.linalg import cython_lapack

# Times the mean of the kernel's diagonal over the training rows. On standardised columns that is about the
# number of a set's columns.
RIDGE_SHARES = tuple(10.0**power for power in (-2, -1, 0, 0.5, 1, 1.5, 2))
SETS_AT_ONCE = 8  # of one thread
BLOCK_VALUES = 2**25  # numbers that a thread makes at a time, at most


Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class RidgeTask:
    """Rows of one split with their columns (n, D) float32: the training rows first, standardised by these.

    `modules` (D,) ascending: the number of the module that each column is of. `sizes` counts the rows of
    train, val and test. `weights` (T,) are those of the training rows, None where they weigh alike.
    """

    columns: np.ndarray
    modules: np.ndarray
    labels: np.ndarray
    sizes: tuple[int, int, int]
    num_modules: int
    num_classes: int
    weights: np.ndarray | None = None

    @property
    def train(self) -> slice:
        """The training rows."""
        return slice(0, self.sizes[0])

    @property
    def val(self) -> slice:
        """The validation rows."""
        return slice(self.sizes[0], self.sizes[0] + self.sizes[1])

    @property
    def test(self) -> slice:
        """The test rows."""
        return slice(self.sizes[0] + self.sizes[1], sum(self.sizes))


class RidgeReader:
    """Fits sets of modules to the training rows of a task, some sets at a time, on all cores.

    A set with fewer columns than training rows is solved for its weights, from one Gram matrix of all
    columns; a wider one for its dual coefficients, from the sum of its modules' kernels. Both are the same
    solution. Sums run in float32, whose rounding changes about one answer in ten thousand.
    """

    def __init__(self, task: RidgeTask, each: Each = map):
        """`each` does jobs: Python's `map`, or that of a pool of threads."""
        self.each = each
        self.kept: tuple[slice, np.ndarray] = slice(0), np.empty(0)  # the kernels that were made last
        self.task = task
        weights = np.ones(task.sizes[0]) if task.weights is None else task.weights
        share = (weights / weights.sum()).astype(np.float32)
        self.roots = np.sqrt(weights).astype(np.float32)[:, None]  # rows that weigh w stand for w rows
        self.x = task.columns - share @ task.columns[task.train]  # (n, D)
        targets = np.eye(task.num_classes, dtype=np.float32)[task.labels]
        self.mean = share @ targets[task.train]  # (C,)
        self.targets = targets - self.mean  # (n, C)
        self.x_train = self.roots * self.x[task.train]  # (T, D)
        self.y_train = self.roots * self.targets[task.train]  # (T, C)

    def best_share(self, masks: np.ndarray) -> float:
        """The penalty, as a share of RIDGE_SHARES, with the least squared error on the validation rows in the
        sum over the sets; of several, the largest.
        """
        shares, val = sorted(RIDGE_SHARES, reverse=True), self.task.val
        if self.prepare(masks)[1]:
            self.kernels_with(next(self.pieces(val)))  # which all shares need

        def loss(share: float) -> float:
            pieces = self.outputs(masks, share, val, map)
            return sum(float(((found - self.targets[rows]) ** 2).sum()) for _, rows, found in pieces)

        return shares[int(np.argmin(list(self.each(loss, shares))))]

    def classes(self, masks: np.ndarray, share: float) -> np.ndarray:
        """The class that each set gives each test row, (S, n)."""
        test = self.task.test
        found = np.empty((len(masks), test.stop - test.start), np.int64)
        for places, rows, outputs in self.outputs(masks, share, test):
            columns = slice(rows.start - test.start, rows.stop - test.start)
            found[places, columns] = (outputs + self.mean).argmax(2)
        return found

    def outputs(
        self, masks: np.ndarray, share: float, rows: slice, each: Each | None = None
    ) -> Iterator[tuple[np.ndarray, slice, np.ndarray]]:
        """Outputs for some rows, less the mean target, piece by piece: places of sets (S',), a slice of rows,
        and their outputs (S', n', C).
        """
        each = each or self.each
        narrow, wide = self.prepare(masks)
        told = each(lambda own: self.of_narrow(masks[own], share, rows), narrow)
        for places, found in zip(narrow, told, strict=True):
            yield places, rows, found
        if not wide:
            return
        duals = list(each(lambda own: self.duals(masks[own], share), wide))
        for piece in self.pieces(rows):
            kernels = self.kernels_with(piece)
            jobs = [
                functools.partial(of_wide, masks[own], dual, kernels)
                for own, dual in zip(wide, duals, strict=True)
            ]
            for places, found in zip(wide, each(lambda job: job(), jobs), strict=True):
                yield places, piece, found

    def pieces(self, rows: slice) -> Iterator[slice]:
        """Rows of which kernels are made at a time."""
        size = max(1, BLOCK_VALUES // (self.task.sizes[0] * self.task.num_modules))
        for start in range(rows.start, rows.stop, size):
            yield slice(start, min(start + size, rows.stop))

    def prepare(self, masks: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Places of the sets with fewer and with more columns than training rows, SETS_AT_ONCE together. What
        all of them need is made before threads ask for it.
        """
        widths = masks @ np.bincount(self.task.modules, minlength=self.task.num_modules)
        is_wide = widths > self.task.sizes[0]
        narrow, wide = (
            [places[i : i + SETS_AT_ONCE] for i in range(0, len(places), SETS_AT_ONCE)]
            for places in (np.flatnonzero(~is_wide), np.flatnonzero(is_wide))
        )
        _ = narrow and (self.gram, self.correlations), wide and self.kernels
        return narrow, wide

    def of_narrow(self, masks: np.ndarray, share: float, rows: slice) -> np.ndarray:
        """Outputs (S', n, C) of sets with fewer columns than training rows."""
        found = []
        for mask in masks:
            own = np.flatnonzero(mask[self.task.modules])
            gram = self.gram[own][:, own]  # (D', D')
            weights = solved(gram, share * np.trace(gram) / self.task.sizes[0], self.correlations[own])
            found.append(self.x[rows][:, own] @ weights)
        return np.stack(found)

    def duals(self, masks: np.ndarray, share: float) -> np.ndarray:
        """Dual coefficients (S', T, C) of sets with more columns than training rows."""
        T = self.task.sizes[0]
        kernels = summed(masks, self.kernels)
        penalties = share * np.trace(kernels, axis1=1, axis2=2) / T
        of_sets = zip(kernels, penalties, strict=True)
        return self.roots * np.stack([solved(kernel, penalty, self.y_train) for kernel, penalty in of_sets])

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products of the columns over the training rows, (D, D)."""
        return self.x_train.T @ self.x_train

    @cached_property
    def correlations(self) -> np.ndarray:
        """Inner products of the columns with the targets over the training rows, (D, C)."""
        return self.x_train.T @ self.y_train

    @cached_property
    def kernels(self) -> np.ndarray:
        """Inner products of the training rows, weighted, by the columns of each module, (U, T, T)."""
        return self.products(self.x_train, self.x_train)

    def kernels_with(self, rows: slice) -> np.ndarray:
        """Inner products of rows with the training rows by the columns of each module, (U, n, T)."""
        if self.kept[0] != rows:
            self.kept = rows, self.products(self.x[rows], self.x[self.task.train])
        return self.kept[1]

    def products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Inner products of two lists of rows by the columns of each module, (U, n, m)."""
        ends = np.searchsorted(self.task.modules, np.arange(self.task.num_modules + 1))
        return np.stack([a[:, first:last] @ b[:, first:last].T for first, last in itertools.pairwise(ends)])


def summed(masks: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Sums (S, n, m) of the kernels (U, n, m) of each set's modules."""
    flat = masks.astype(np.float32) @ kernels.reshape(len(kernels), -1)
    return flat.reshape(-1, *kernels.shape[1:])


def of_wide(masks: np.ndarray, duals: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Outputs (S', n, C) of sets from dual coefficients (S', T, C) and the kernels (U, n, T) of rows."""
    return summed(masks, kernels) @ duals


# --- one system of equations


def lapack(name: str, arguments: int) -> Callable[..., None]:
    """A routine of LAPACK as SciPy has it for Cython. Unlike `scipy.linalg.lapack` it is called without
    Python's lock, so that threads solve systems side by side.
    """
    capsule = cython_lapack.__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    return kind(get_pointer(capsule, get_name(capsule)))


SPOSV = lapack("sposv", 8)  # solves a positive definite system in float32, by Cholesky's factor


def solved(gram: np.ndarray, penalty: float, targets: np.ndarray) -> np.ndarray:
    """The solution (n, C) of (gram + penalty) @ x = targets for a symmetric float32 matrix (n, n), which is
    written over; 0 where the matrix is 0. Raises LinAlgError if it is not positive definite.
    """
    if penalty <= 0:
        return np.zeros_like(targets)
    matrix = np.ascontiguousarray(gram)  # its rows and columns are the same
    np.einsum("ii->i", matrix)[:] += penalty
    solution = np.array(targets.T, np.float32, order="C")  # (C, n): column after column, as LAPACK has it
    order, columns, failed = (ctypes.c_int(value) for value in (len(matrix), len(solution), 0))
    by = ctypes.byref
    at_matrix, at_solution = (ctypes.c_void_p(x.ctypes.data) for x in (matrix, solution))
    SPOSV(b"L", by(order), by(columns), at_matrix, by(order), at_solution, by(order), by(failed))
    if failed.value:
        raise np.linalg.LinAlgError(f"ridge: minor {failed.value} of the Gram matrix is not positive")
    return solution.T
