"""Blocks of weights, read from Arrow's own memory into tensors.

The torch formatter of `datasets` makes one tensor per innermost list, about 1,800 times slower on the nested
lists of the published sets. It serves the layouts that this module does not know, and is the reference in the
tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from ablation.columns import is_list, refuse_no_matrix
from ablation.fields import InputError
from ablation.layers import ColumnLayout, Layers

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_ROWS = 1024  # blocks start at its multiples, whatever the memory, the machine or the resumption
HASH_ROWS = 16 * BLOCK_ROWS  # checked at a time ahead of the hash: no copy is made, so larger costs no memory
READ_AHEAD = 4  # layers at most that are read ahead for a GPU, by as many threads
PIECE = 2**17  # values copied or checked at a time: that many stay in a core's cache
INFINITY = 0x7F800000  # the bits of float32's
# Stored types that the torch formatter turns into float32 too; all others are left to the formatter.
FLOATS = (pa.float16(), pa.float32(), pa.float64())


# --- how a column is stored


def layout_of(dataset: Dataset, column: str) -> ColumnLayout:
    """The layout of a column, from its type and first row. Raises InputError if that row is no matrix."""
    values = dataset.data.column(column)
    matrix = values[0].as_py()
    refuse_no_matrix(column, values.type, matrix)
    stored = weight_type(values.type)
    if stored is not None:
        return ColumnLayout(column, len(matrix), len(matrix[0]), str(stored), True)
    first = dataset.select_columns([column])[0][column]
    rows, cols = first.shape
    return ColumnLayout(column, rows, cols, str(first.dtype), False)


def weight_type(kind: pa.DataType) -> pa.DataType | None:
    """The float type of a column of matrices (two levels of lists),
    or None for a layout unknown to this module.
    """
    if isinstance(kind, pa.BaseExtensionType):  # Array2D
        kind = kind.storage_type
    if is_list(kind) and is_list(kind.value_type) and kind.value_type.value_type in FLOATS:
        return kind.value_type.value_type
    return None


# --- values of Arrow arrays, checked


def unlist(array: pa.Array, size: int, lists_per_row: int, column: str, first_row: int) -> pa.Array:
    """The items of a list array, after a check that every list holds `size` of them.

    `lists_per_row` lists belong to one row. Consecutive offsets are compared one by one, because ragged rows
    can have the right total. Raises InputError naming the column and the row.
    """
    try:
        array.validate()  # whether the offsets lie in the values
    except pa.ArrowInvalid as error:
        raise InputError(f"column '{column}', row {first_row}: the file is damaged: {error}") from None
    refuse_nulls(array, lists_per_row, column, first_row)
    is_fixed = pa.types.is_fixed_size_list(array.type)
    offsets = np.array([0, array.type.list_size]) if is_fixed else array.offsets.to_numpy()
    for start in range(0, len(offsets) - 1, PIECE):
        lengths = np.diff(offsets[start : start + PIECE + 1])
        if (
            lengths.min() != size or lengths.max() != size
        ):  # two reductions are faster than an array of booleans
            wrong = int(np.argmax(lengths != size))
            raise InputError(
                f"column '{column}', row {first_row + (start + wrong) // lists_per_row}: a list of "
                f"{lengths[wrong]} "
                f"where the column's first row has {size}: every row's matrix must have the same shape"
            )
    return array.flatten()  # .values would ignore the offset of a slice


def refuse_nulls(array: pa.Array, items_per_row: int, column: str, first_row: int) -> None:
    """Raise InputError for a null, naming the column and the row."""
    if array.null_count:
        position = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(
            f"column '{column}', row {first_row + position // items_per_row}: null: every row needs every "
            "weight"
        )


def copy_largest(values: np.ndarray, target: np.ndarray) -> float:
    """Copy to `target`, float32. Returns the largest magnitude; inf if a copied value is not finite.

    The bits of +inf and NaN are the largest signed integers, those of -inf and -NaN the largest unsigned
    ones: two maxima find both faster than np.isfinite, and with them the largest magnitude.
    """
    largest = 0
    for start in range(0, len(values), PIECE):
        piece = target[start : start + PIECE]
        piece[:] = values[start : start + PIECE]
        positive, either = int(piece.view(np.int32).max()), int(piece.view(np.uint32).max())
        largest = max(largest, positive, either & 0x7FFFFFFF)
    return float(np.uint32(min(largest, INFINITY)).view(np.float32))


def refuse_non_finite(weights: np.ndarray, column: str, first_row: int) -> None:
    """Raise InputError for the first NaN or infinity in `weights` (n, rows, cols), naming its place."""
    bad = np.argwhere(~np.isfinite(weights))
    if len(bad):
        row, i, j = bad[0]
        raise InputError(
            f"column '{column}', row {first_row + row}: the weight at ({i}, {j}) is {weights[row, i, j]} "
            "as float32: repair or leave out that row"
        )


class WeightReader:
    """Reads the layers of a data set, whose torch format must be on the device."""

    def __init__(self, dataset: Dataset, layers: Layers, device: str):
        self.dataset, self.layers, self.device = dataset, layers, device
        self.free_buffers: list[np.ndarray] = []
        self.row_views: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}  # of Arrow's memory, by layer
        self.largest = 0.0  # magnitude of a weight read so far

    keeps_weights = True  # all of them can be read again

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.dataset)

    @property
    def on_gpu(self) -> bool:
        """True if the device is a CUDA GPU."""
        return self.device.startswith("cuda")

    @property
    def block_weights(self) -> int:
        """Weights of the largest layer in a block of rows."""
        largest = max(layout.size for layout in self.layers.layouts.values())
        return min(self.num_rows, BLOCK_ROWS) * largest

    def read_layer(self, layer: str, start: int, stop: int, buffer: np.ndarray | None = None) -> Tensor:
        """One layer of rows start:stop, (n, rows, cols) float32 on the device.

        With a `buffer` (see `buffer()`) the tensor may lie in that memory. Raises InputError, naming the
        column and the row, for a NaN, an infinity, a null or a matrix of another shape.
        """
        return self.read_on_host(layer, start, stop, buffer).to(self.device)

    def read_on_host(self, layer: str, start: int, stop: int, buffer: np.ndarray | None = None) -> Tensor:
        """The tensor of `read_layer` in the host's memory."""
        layout = self.layers.layouts[layer]
        if not layout.in_arrow:
            return self.read_layer_formatted(layer, start, stop).cpu()
        size = (stop - start) * layout.size
        flat = np.empty(size, dtype=np.float32) if buffer is None else buffer[:size]
        position, largest = 0, 0.0
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused below
            for values in self.stored_values(layer, start, stop):
                largest = max(largest, copy_largest(values, flat[position : position + len(values)]))
                position += len(values)
        weights = flat.reshape(stop - start, layout.rows, layout.cols)
        if largest == math.inf:
            refuse_non_finite(weights, layer, start)
        self.largest = max(self.largest, largest)
        return torch.from_numpy(weights)

    def read_layer_formatted(self, layer: str, start: int, stop: int) -> Tensor:
        """The tensor of `read_layer` through the data set's torch format:
        slow, and the reference for the tests.
        """
        layout = self.layers.layouts[layer]
        weights = self.dataset.select_columns([layer])[start:stop][layer]
        if isinstance(weights, list) or weights.shape[1:] != (layout.rows, layout.cols):
            for row, matrix in enumerate(weights, start):
                if getattr(matrix, "shape", None) != (layout.rows, layout.cols):
                    raise InputError(
                        f"column '{layer}', row {row}: not a matrix of {layout.rows} x {layout.cols} "
                        "as in the first row"
                    )
        weights = weights.float()
        refuse_non_finite(weights.cpu().numpy(), layer, start)
        return weights

    def stored_values(self, layer: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """The stored weights of rows start:stop, chunk by chunk: flat read-only views of Arrow's memory."""
        layout = self.layers.layouts[layer]
        row = start
        for chunk in self.chunks(layer, start, stop):
            array = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            matrix_rows = unlist(array, layout.rows, 1, layer, row)
            values = unlist(matrix_rows, layout.cols, layout.rows, layer, row)
            refuse_nulls(values, layout.size, layer, row)
            yield values.to_numpy(zero_copy_only=True)
            row += len(chunk)

    def chunks(self, layer: str, start: int, stop: int) -> list[pa.Array]:
        """The stored column of rows start:stop, as Arrow has it."""
        return self.dataset.data.column(layer).slice(start, stop - start).chunks

    def open_block(self, start: int, stop: int) -> None:
        """Make ready to read rows start:stop, of a data set that is not at hand as a whole."""

    def read_rows(self, layer: str, rows: Tensor) -> Tensor:
        """One layer of the rows with these numbers, in any order: (n, rows * cols) float32, on the host.

        Stored lists are checked when the layer is first read so; values are not.
        """
        layout = self.layers.layouts[layer]
        if not layout.in_arrow:
            whole = self.dataset.select_columns([layer])[rows.tolist()][layer]
            return whole.float().cpu().reshape(len(rows), layout.size)
        if layer not in self.row_views:
            views = [
                values.reshape(-1, layout.size) for values in self.stored_values(layer, 0, self.num_rows)
            ]
            self.row_views[layer] = np.cumsum([len(view) for view in views]), views
        ends, views = self.row_views[layer]
        numbers, found = rows.numpy(), np.empty((len(rows), layout.size), dtype=np.float32)
        owners = np.searchsorted(ends, numbers, side="right")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which fails the cell
            for owner in np.unique(owners):
                own = owners == owner
                view = views[owner]
                found[own] = view[numbers[own] - (ends[owner] - len(view))]
        return torch.from_numpy(found)

    def content_hash(self, on_layer: Callable[[], None] = lambda: None) -> str:
        """128-bit xxHash of every layer's name, shape, stored type and weights, row by row.

        It does not depend on where the rows lie, how they are chunked, or on any other column. `on_layer()`
        is called after each layer. Each byte of the hash depends on all bytes before it, so one core takes
        the hash; the others read the next blocks from disk and check them.
        """
        digest = xxhash.xxh3_128()
        starts = range(0, self.num_rows, HASH_ROWS)
        pieces = ((layer, start) for layer in self.layers.names for start in starts)
        for (layer, start), weights in fetched(self.checked_values, pieces, torch.get_num_threads()):
            if start == 0:
                digest.update(repr((self.num_rows, *self.layers.layouts[layer])).encode())
            for values in weights:
                digest.update(values.data)
            if start == starts[-1]:
                on_layer()
        return digest.hexdigest()

    def checked_values(self, piece: tuple[str, int]) -> Iterable[np.ndarray]:
        """The stored weights of HASH_ROWS rows, (layer, first row), checked and read into the page cache.

        What the formatter reads is read when it is asked for.
        """
        layer, start = piece
        stop = min(start + HASH_ROWS, self.num_rows)
        if not self.layers.layouts[layer].in_arrow:
            blocks = range(start, stop, BLOCK_ROWS)
            ends = [min(first + BLOCK_ROWS, stop) for first in blocks]
            formatted = map(functools.partial(self.read_layer_formatted, layer), blocks, ends)
            return (w.cpu().numpy() for w in formatted)
        found = list(self.stored_values(layer, start, stop))
        for values in found:
            values.view(np.uint8)[:: mmap.PAGESIZE].sum()
        return found

    # --- memory

    @contextlib.contextmanager
    def buffer(self) -> Iterator[np.ndarray]:
        """Memory (block_weights,) float32 for any layer of any block,
        lent for the block of a `with` statement.

        It is used again afterwards, and pinned where there is a GPU to copy it to.
        """
        try:
            memory = self.free_buffers.pop()
        except IndexError:
            memory = torch.empty(self.block_weights, pin_memory=self.on_gpu).numpy()
        try:
            yield memory
        finally:
            self.free_buffers.append(memory)

    @cached_property
    def copy_stream(self) -> torch.cuda.Stream | None:
        """The stream that layers are copied to a GPU on; None on a CPU."""
        return torch.cuda.Stream(self.device) if self.on_gpu else None


Item = TypeVar("Item")
Found = TypeVar("Found")


def fetched(
    fetch: Callable[[Item], Found], items: Iterable[Item], threads: int
) -> Generator[tuple[Item, Found]]:
    """Each item with fetch(item), in order, while threads fetch the next ones: two for each thread.

    An error of fetch(item) is raised at that item.
    """
    pool = ThreadPoolExecutor(threads)
    jobs = ((item, pool.submit(fetch, item)) for item in items)
    waiting = deque(islice(jobs, 2 * threads))
    try:
        while waiting:
            item, job = waiting.popleft()
            found = job.result()
            waiting.extend(islice(jobs, 1))
            yield item, found
    finally:
        pool.shutdown(cancel_futures=True)


class ReadAhead:
    """Iterates over `layers` of rows start:stop as tensors on a GPU,
    in order, while threads read the next ones.

    Copies run from pinned buffers on a stream of their own. A layer for which the GPU has no room stays in
    the host's memory. `waited` counts the seconds that the consumer had to wait.
    """

    def __init__(self, reader: WeightReader, layers: list[str], start: int, stop: int, threads: int):
        self.reader, self.layers, self.start, self.stop = reader, layers, start, stop
        self.threads, self.waited = min(threads, READ_AHEAD), 0.0

    def __iter__(self) -> Generator[Tensor]:
        stream = self.reader.copy_stream
        pool = ThreadPoolExecutor(self.threads)
        jobs = (pool.submit(self.fetch, layer, stream) for layer in self.layers)
        waiting = deque(islice(jobs, self.threads))
        try:
            while waiting:
                began = time.perf_counter()
                w = waiting.popleft().result()
                self.waited += time.perf_counter() - began
                waiting.extend(islice(jobs, 1))
                if w.is_cuda:
                    # Keeps its memory until the work is done.
                    w.record_stream(torch.cuda.current_stream(w.device))
                yield w
        finally:
            pool.shutdown(cancel_futures=True)

    def fetch(self, layer: str, stream: torch.cuda.Stream | None) -> Tensor:
        """Read one layer and copy it to the device on `stream`."""
        with self.reader.buffer() as buffer:
            weights = self.reader.read_on_host(layer, self.start, self.stop, buffer)
            try:
                with torch.cuda.stream(stream):  # does nothing for None
                    target = torch.empty(weights.shape, device=self.reader.device)
                    w = target.copy_(weights, non_blocking=True)
            except torch.OutOfMemoryError:
                return weights.clone()
            if stream:
                stream.synchronize()  # blocks this thread and no other
        return w
