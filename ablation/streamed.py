"""Rows that are made when they are asked for, from files that the system maps into memory.

`StreamedRows` stands in for a tensor (N, D) that does not fit the memory: it is indexed, split and moved to a
device as a tensor is, and only what is moved is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ablation.reading import fetched

PIECE_VALUES = 2**22  # made at a time
COLUMN_BLOCK = 256  # columns whose statistics are taken at a time in float64
GROUP_BYTES = 2**30  # of the columns that one reading of the rows collects


MakeRows = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class StreamedRows:
    """Rows of a matrix with `width` columns, made on the host.

    `make` maps row numbers (n,) and columns start:stop to numbers (n, stop - start), from any thread, and
    reads no others. `rows` has the numbers of the rows that this object stands for, in any shape.
    """

    make: MakeRows
    rows: Tensor
    width: int
    dtype: torch.dtype = torch.float32
    device = torch.device("cpu")
    is_cuda = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As a tensor's."""
        return (*self.rows.shape, self.width)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | np.ndarray | slice) -> StreamedRows:
        """Some of the rows."""
        return StreamedRows(self.make, self.rows[rows], self.width, self.dtype)

    def split(self, size: int) -> Iterator[StreamedRows]:
        """Pieces of at most `size` rows."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Tensor:
        """The rows as a tensor. To a GPU they go through pinned memory."""
        made = torch.empty(self.shape, dtype=self.dtype, pin_memory=torch.device(device).type == "cuda")
        flat, start = made.view(-1, self.width), 0
        for rows in self.rows.flatten().split(max(1, PIECE_VALUES // max(self.width, 1))):
            flat[start : start + len(rows)] = self.make(rows, 0, self.width)
            start += len(rows)
        return made.to(device, non_blocking=True)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start:stop of all rows, (n, stop - start). Rows are made in their order in the files."""
        stop = min(stop, self.width)
        found = torch.empty(len(self), stop - start, dtype=self.dtype)
        for places in self.rows.argsort().split(max(1, PIECE_VALUES // (stop - start))):
            found[places] = self.make(self.rows[places], start, stop)
        return found


Matrix = Tensor | StreamedRows


def stream(make: MakeRows, num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> StreamedRows:
    """All rows of a matrix (num_rows, width)."""
    return StreamedRows(make, torch.arange(num_rows), width, dtype)


def streamed(x: Matrix) -> StreamedRows:
    """The rows of a tensor (N, D), to be made when they are used; streamed rows as they are."""
    if not isinstance(x, Tensor):
        return x
    return stream(lambda rows, start, stop: x[:, start:stop][rows], len(x), x.shape[1], x.dtype)


def some(x: Matrix, rows: Tensor, start: int, stop: int) -> Tensor:
    """Columns start:stop of some rows of x, on the host: (n, stop - start)."""
    if isinstance(x, Tensor):
        return x[:, start:stop][rows]
    return x.make(x.rows[rows], start, stop)


def joined(parts: list[Matrix]) -> Matrix:
    """The rows of matrices of the same width, one matrix after another."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    width, dtype = parts[0].shape[1], parts[0].dtype

    def make(rows: Tensor, start: int, stop: int) -> Tensor:
        found = torch.empty(len(rows), stop - start, dtype=dtype)
        owner = torch.bucketize(rows, ends, right=True)
        for number in owner.unique().tolist():
            own = owner == number
            first = int(ends[number]) - len(parts[number])
            found[own] = some(parts[number], rows[own] - first, start, stop)
        return found

    return stream(make, int(ends[-1]), width, dtype)


def column_blocks(x: Matrix, rows: Tensor | slice = slice(None)) -> Iterator[Tensor]:
    """The columns of some rows of x, COLUMN_BLOCK at a time."""
    if isinstance(x, Tensor):
        for block in x.split(COLUMN_BLOCK, dim=1):
            yield block[rows]
        return
    chosen = x[rows]
    size = len(chosen) * COLUMN_BLOCK * chosen.dtype.itemsize
    group = max(1, GROUP_BYTES // max(size, 1)) * COLUMN_BLOCK
    for start in range(0, chosen.width, group):
        yield from chosen.columns(start, start + group).split(COLUMN_BLOCK, dim=1)


def rows_on(x: Matrix, rows: Tensor, device: torch.device) -> Tensor:
    """x[rows] on the device, wherever x lies."""
    return x[rows.to(x.device)].to(device)


def minibatches(x: Matrix, batches: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """x[rows] on the device for each batch of row numbers, in order.

    Unless x lies on the device, a thread makes the next batches while one is used.
    """
    if isinstance(x, Tensor) and x.device.type == device.type:
        for batch in batches:
            yield x[batch]
        return
    take = functools.partial(rows_on, streamed(x), device=device)
    for _, made in fetched(take, batches, threads=1):
        yield made
