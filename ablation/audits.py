"""Audits: trained runs are scored on test rows whose weights are changed.

An audit is a set of changed rows: the row of the data set that each comes from, its variant, and how its
weights are changed as they are read. The random numbers depend on the layer and on the block's first row, not
on threads or devices.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ablation.reading import BLOCK_ROWS, WeightReader
from ablation.streamed import Matrix, column_blocks

GAUGE_STRETCH = 2.0  # a direction is scaled by a factor between 1/2 and 2
NOISE_LEVELS = (0.01, 0.05, 0.10, 0.20)  # std of the noise over the std of the row's layer
AUDIT_SEED = 0


class Audit:
    """Changed rows, block by block; within a block variant by variant."""

    name: str
    variants: tuple[str, ...]  # as the results name them

    def __init__(self, num_rows: int, rows: np.ndarray):
        """`rows` are the numbers of the data set's rows that are changed, in every variant."""
        self.num_rows = num_rows
        self.is_changed = np.zeros(num_rows, dtype=bool)
        self.is_changed[rows] = True

    @classmethod
    def of_test_rows(cls, num_rows: int, test_rows: np.ndarray, most: int = 0) -> Audit:
        """The audit of a data set of `num_rows` rows with these test rows; of `most` of them, if `most` > 0
        and there are more.
        """
        if 0 < most < len(test_rows):
            return cls(num_rows, np.random.default_rng(AUDIT_SEED).permutation(test_rows)[:most])
        return cls(num_rows, test_rows)

    def among(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that are changed, in their order."""
        return rows[self.is_changed[rows]]

    def rows_in(self, start: int, stop: int) -> np.ndarray:
        """For each changed row that comes from rows start:stop, in order, the number of that row."""
        return np.tile(np.flatnonzero(self.is_changed[start:stop]) + start, len(self.variants))

    @cached_property
    def rows(self) -> np.ndarray:
        """(E,) the row of the data set that each changed row comes from."""
        starts = range(0, self.num_rows, BLOCK_ROWS)
        return np.concatenate(
            [self.rows_in(start, min(start + BLOCK_ROWS, self.num_rows)) for start in starts]
        )

    def positions(self, variant: str, rows: np.ndarray) -> np.ndarray:
        """Positions in `self.rows` of the changed rows of a variant that come from `rows`."""
        # A row's variants in order.
        by_row = np.argsort(self.rows, kind="stable").reshape(-1, len(self.variants))
        position = np.full(self.num_rows, -1)
        position[self.is_changed] = by_row[:, self.variants.index(variant)]
        return position[rows]

    def change(self, reader: WeightReader, position: int, rows: tuple[int, int], w: Tensor) -> Tensor:
        """The changed rows (e, rows, cols) of `w` (n, rows, cols),
        the layer at `position` of rows start:stop.

        e = len(rows_in(start, stop)).
        """
        raise NotImplementedError

    def changes(self, x: Matrix, changed: Matrix, train_rows: np.ndarray) -> dict[str, dict[str, float]]:
        """How far the features `changed` (E, D) of each variant
        lie from those of the unchanged rows in `x` (N, D).

        Units are each column's spread (std over all rows), for the columns that vary over the training rows:
        `largest` is the largest difference over rows and columns, `rms` the root of the mean square.
        """
        rows = np.flatnonzero(self.is_changed)
        positions = {variant: self.positions(variant, rows) for variant in self.variants}
        largest, squares = dict.fromkeys(self.variants, 0.0), dict.fromkeys(self.variants, 0.0)
        columns = 0
        blocks = zip(column_blocks(x), column_blocks(changed), strict=True)
        for before, after in blocks:
            low, high = before[train_rows].aminmax(dim=0)
            before, after = before[:, high > low].double(), after[:, high > low]
            columns += before.shape[1]
            for variant in self.variants if before.shape[1] else ():
                difference = (after[positions[variant]] - before[rows]) / before.std(0, correction=0)
                largest[variant] = max(largest[variant], float(difference.abs().max()))
                squares[variant] += float(difference.square().mean(0).sum())
        return {
            variant: {"largest": largest[variant], "rms": (squares[variant] / max(columns, 1)) ** 0.5}
            for variant in self.variants
        }


class GaugeAudit(Audit):
    """Every row as another pair with the same product: (up G, inv(G) down).

    G = Q D Q' is drawn for each row and module, with random orthogonal Q and Q', and D of either sign between
    1 / GAUGE_STRETCH and GAUGE_STRETCH. A layer without a partner stays as it is.
    """

    name, variants = "gauge", ("re-gauged",)

    @classmethod
    def of_test_rows(cls, num_rows: int, test_rows: np.ndarray, most: int = 0) -> Audit:
        """All rows are changed, because the change of training rows is reported too, unless `most` are asked
        for.
        """
        return super().of_test_rows(num_rows, test_rows if most else np.arange(num_rows), most)

    def change(self, reader: WeightReader, position: int, rows: tuple[int, int], w: Tensor) -> Tensor:
        """The layer of another pair with the same product."""
        module = reader.layers.module_at.get(position)
        start, stop = rows
        if module is None:
            return w[torch.from_numpy(self.is_changed[start:stop]).to(w.device)]
        is_down = module.down == position
        rank = w.shape[1] if is_down else w.shape[2]
        factors = gauge_factors(module.name, start, stop - start, rank)
        chosen = self.is_changed[start:stop]
        left, stretch, right = (torch.from_numpy(factor[chosen]).to(w.device) for factor in factors)
        w = w[torch.from_numpy(chosen).to(w.device)]
        if is_down:
            return ((right.mT / stretch[:, None]) @ (left.mT @ w.double())).float()
        return ((w.double() @ left * stretch[:, None]) @ right).float()


def gauge_factors(module: str, start: int, n: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q (n, r, r), the diagonal of D (n, r) and Q' (n, r, r), float64."""
    rng = np.random.default_rng([AUDIT_SEED, *module.encode(), start])
    left, right = (np.linalg.qr(rng.normal(size=(n, rank, rank)))[0] for _ in range(2))
    signs = rng.choice([-1.0, 1.0], (n, rank))
    return left, signs * GAUGE_STRETCH ** rng.uniform(-1, 1, (n, rank)), right


class NoiseAudit(Audit):
    """Test rows with Gaussian noise: its std is a share of the std of the row's layer;
    all levels share one draw.
    """

    name, variants = "noise", tuple(f"{level:.0%}" for level in NOISE_LEVELS)

    def change(self, reader: WeightReader, position: int, rows: tuple[int, int], w: Tensor) -> Tensor:
        """The test rows with noise of every level, level by level."""
        start, stop = rows
        w = w[torch.from_numpy(self.is_changed[start:stop]).to(w.device)]
        if not len(w):  # no test row in this block
            return w
        seed = [AUDIT_SEED, *reader.layers.names[position].encode(), start]
        with reader.buffer() as memory:
            noise = memory[: w.numel()]
            np.random.Generator(np.random.SFC64(seed)).standard_normal(out=noise, dtype=np.float32)
            std = w.flatten(1).std(1, correction=0)[:, None, None]
            scaled = torch.from_numpy(noise).view(w.shape).to(w.device) * std
            return torch.cat([w + level * scaled for level in NOISE_LEVELS])


AUDIT_CLASSES: dict[str, type[Audit]] = {"gauge": GaugeAudit, "noise": NoiseAudit}
