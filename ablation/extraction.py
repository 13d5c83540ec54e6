"""Weights -> features of every row: one pass that reads each weight once for all representations."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import representations
from ablation.audits import Audit
from ablation.catalogue import SPECS
from ablation.collection import LoraCollection
from ablation.reading import BLOCK_ROWS, ReadAhead
from ablation.work_pool import one_thread_a_core
from checkpointing import CannotWrite, Unfinished

log = logging.getLogger("visual_ablation")

OnLayers = Callable[[float], None]
FREED_BLOCK = 31 * 2**20  # bytes: glibc learns from freed blocks of at most 32 MiB


class Extracted(NamedTuple):
    """Features (N, P*k) float32 of each representation:
    a row's P layers or modules one after another, k columns each.

    `errors` has the representations that failed. Times are in seconds.
    """

    features: dict[str, Tensor]
    errors: dict[str, Exception]
    reading: float
    computing: float


@dataclass(frozen=True)
class Request:
    """What a pass over the weights computes:
    `widths` maps representations to their columns a layer or module.

    With an `audit` it computes the features of the audit's changed rows instead of the data set's.
    """

    data: LoraCollection
    widths: dict[str, int]
    sketch_size: int = representations.SKETCH_SIZE
    audit: Audit | None = None

    def names_of(self, source: str) -> list[str]:
        """The representations of each "layer", or of each "module"."""
        return [name for name in self.widths if SPECS[name].source == source]

    def count(self, name: str) -> int:
        """How many layers or modules a representation describes."""
        layers = self.data.layers
        return len(layers if SPECS[name].source == "layer" else layers.modules)

    @property
    def num_rows(self) -> int:
        """Rows of the features."""
        return self.data.num_rows if self.audit is None else len(self.audit.rows)

    def rows_in(self, start: int, stop: int) -> int:
        """Rows of the features that come from rows start:stop of the data set."""
        return stop - start if self.audit is None else len(self.audit.rows_in(start, stop))


def extract_features(
    request: Request, on_layers: OnLayers = lambda layers: None, kept: Unfinished | None = None
) -> Extracted:
    """Every requested representation of all rows, block of rows by block of rows.

    `on_layers(amount)` is told how many layers are done; a block of rows counts as its share of a layer. An
    exception of one representation is returned, and the others go on. `kept` has the blocks that an earlier
    command computed, and gets those of this one.
    """
    keep_freed_memory()
    data = request.data
    features = {
        name: torch.empty(request.num_rows, request.count(name), width)
        for name, width in request.widths.items()
    }
    errors: dict[str, Exception] = {}
    seconds = Seconds()
    starts = range(0, data.num_rows, BLOCK_ROWS)
    began, done = time.perf_counter(), 0
    for start in starts:
        stop = min(start + BLOCK_ROWS, data.num_rows)
        left = {name: width for name, width in request.widths.items() if name not in errors}
        block = Block(replace(request, widths=left), start, stop, seconds)
        known = (kept.load(f"rows{start}") if kept else None) or {}
        if known.keys() >= left.keys():
            block.features |= {name: torch.from_numpy(known[name]) for name in left}
            on_layers(len(data.layers) / len(starts))
        else:
            block.extract(lambda layers: on_layers(layers / len(starts)))
            keep_if_possible(kept, block, known)
        errors |= block.errors
        for name in left.keys() - block.errors.keys():
            features[name][done : done + block.num_rows] = block.features[name]
        done += block.num_rows
    shared = seconds.shared(time.perf_counter() - began)
    flat = {name: x.flatten(1) for name, x in features.items() if name not in errors}
    return Extracted(flat, errors, shared.read, shared.describe)


def keep_freed_memory() -> None:
    """Make the C library keep memory that is freed for the next arrays.

    Glibc gives free memory back to the system beyond twice the largest block that was freed so far. In the
    first pass of a process arrays of a few MB would come and go as new pages, which the system fills with
    zeros: a fifth of the pass. One large block, never written to, raises the bound for the whole process.
    Other C libraries are not affected.
    """
    np.empty(FREED_BLOCK, dtype=np.uint8)


def keep_if_possible(kept: Unfinished | None, block: Block, known: dict[str, np.ndarray]) -> None:
    """Keep a block's features beside those `known` before. A disk that does not take them is logged."""
    try:
        if kept is not None:
            keep_block(kept, block, known)
    except CannotWrite as error:
        log.warning(f"rows {block.start}..{block.stop} would be computed again after a kill: {error}")


def keep_block(kept: Unfinished, block: Block, known: dict[str, np.ndarray]) -> None:
    """Keep a block's features beside those `known` before.

    Raises CannotWrite, and InputError if the data set's files changed meanwhile.
    """
    computed = {name: x.numpy() for name, x in block.features.items() if name not in block.errors}
    if computed:
        block.request.data.files.refuse_changes()  # a block of other weights must not be kept as one of these
        kept.save(f"rows{block.start}", known | computed)


@dataclass
class Seconds:
    """Seconds of all threads together."""

    read: float = 0.0
    describe: float = 0.0

    def shared(self, wall: float) -> Seconds:
        """The seconds that a clock on the wall showed, shared out in the same proportion."""
        reading = wall * self.read / (self.read + self.describe or 1)
        return Seconds(reading, wall - reading)


@dataclass
class Block:
    """Rows start:stop of the data set, whose features (n, P, k) are filled in layer by layer, on the CPU."""

    request: Request
    start: int
    stop: int
    seconds: Seconds
    errors: dict[str, Exception] = field(default_factory=dict)
    num_rows: int = field(init=False)  # of the features
    features: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.num_rows = self.request.rows_in(self.start, self.stop)
        self.features = {
            name: torch.empty(self.num_rows, self.request.count(name), width)
            for name, width in self.request.widths.items()
        }

    def units(self) -> list[tuple[int, ...]]:
        """Positions of the layers that are read together:
        both of a module whose product is described, else one.
        """
        layers = self.request.data.layers
        singles = range(len(layers)) if self.request.names_of("layer") else range(0)
        if not self.request.names_of("module"):
            return [(position,) for position in singles]
        pairs = [(module.down, module.up) for module in layers.modules]
        paired = {position for pair in pairs for position in pair}
        return [*pairs, *((position,) for position in singles if position not in paired)]

    def extract(self, on_layers: OnLayers) -> None:
        """Fill in all features. On a CPU each core reads and describes a unit;
        for a GPU the cores read ahead.
        """
        data = self.request.data
        units = self.units() if self.num_rows else []
        if units:
            data.weights.open_block(self.start, self.stop)
        if data.weights.device == "cpu":
            with one_thread_a_core(max(len(units), 1)) as pool:
                for unit, _ in zip(units, pool.map(self.read_and_describe, units), strict=True):
                    on_layers(len(unit))
            return
        names = [data.layers.names[position] for unit in units for position in unit]
        ahead = ReadAhead(data.weights, names, self.start, self.stop, torch.get_num_threads())
        with contextlib.closing(iter(ahead)) as weights:
            for unit in units:
                self.describe(unit, [next(weights) for _ in unit])
                on_layers(len(unit))
        self.seconds.read += ahead.waited

    def read_and_describe(self, unit: tuple[int, ...]) -> None:
        """Read the layers of a unit and fill in their features."""
        weights = self.request.data.weights
        names = [self.request.data.layers.names[position] for position in unit]
        with contextlib.ExitStack() as stack:
            buffers = [stack.enter_context(weights.buffer()) for _ in unit]
            began = time.perf_counter()
            tensors = [
                weights.read_layer(layer, self.start, self.stop, buffer)
                for layer, buffer in zip(names, buffers, strict=True)
            ]
            self.seconds.read += time.perf_counter() - began
            self.describe(unit, tensors)

    def describe(self, unit: tuple[int, ...], weights: list[Tensor]) -> None:
        """Fill in the features of a unit's layers and, if it is a pair, of its module."""
        began = time.perf_counter()
        changed = self.changed(unit, weights)
        if changed is None:
            return
        for position, w in zip(unit, changed, strict=True):
            self.fill(self.layer_label(position), position, (w,), self.request.names_of("layer"))
        if len(unit) == 2:
            module = self.module_position[unit]
            self.fill(self.layer_label(unit[0]), module, tuple(changed), self.request.names_of("module"))
        self.seconds.describe += time.perf_counter() - began

    @cached_property
    def module_position(self) -> dict[tuple[int, ...], int]:
        """Position of a module by those of its layers."""
        modules = self.request.data.layers.modules
        return {(module.down, module.up): i for i, module in enumerate(modules)}

    def layer_label(self, position: int) -> str:
        """The rows and the layer, as the log names them."""
        return f"rows {self.start}..{self.stop} of {self.request.data.layers.names[position]}"

    def fill(self, label: str, position: int, weights: tuple[Tensor, ...], names: list[str]) -> None:
        """Fill in some representations of the layer or module at `position`; `label` names it in the log."""
        if not names:
            return
        for first, features, failed in describe_rows(self.request, label, weights, names):
            for name, error in failed.items():
                self.note_error(name, error, f"{name} failed on {label}")
            for name, rows in features.items():
                self.features[name][first : first + len(rows), position] = rows

    def note_error(self, name: str, error: Exception, message: str) -> None:
        """Keep and log the first error of a representation."""
        if self.errors.setdefault(name, error) is error:
            log.error(f"{message}:\n{''.join(traceback.format_exception(error))}")

    # --- audits

    def changed(self, unit: tuple[int, ...], weights: list[Tensor]) -> list[Tensor] | None:
        """The weights as the audit changes them, if there is one; None if the audit fails, which is noted."""
        if self.request.audit is None:
            return weights
        try:
            return [self.change(position, w) for position, w in zip(unit, weights, strict=True)]
        except Exception as error:  # the audit's features are lost; the caller reports it
            first = [self.errors.setdefault(name, error) is error for name in self.request.widths]
            if all(first):
                log.error(
                    f"the {self.request.audit.name} audit failed on {self.layer_label(unit[0])}:\n"
                    f"{traceback.format_exc()}"
                )
            return None

    def change(self, position: int, w: Tensor) -> Tensor:
        """A layer as the audit changes it, on the device; on the host if the device has no room for it."""
        audit, reader, rows = self.request.audit, self.request.data.weights, (self.start, self.stop)
        assert audit is not None
        try:
            return audit.change(reader, position, rows, w)
        except torch.OutOfMemoryError:
            log.warning(
                f"out of memory on {reader.device}: {self.layer_label(position)} are changed on the host"
            )
        # Outside `except`, whose traceback keeps tensors alive.
        return audit.change(reader, position, rows, w.cpu())


Described = tuple[int, dict[str, Tensor], dict[str, Exception]]


def describe_rows(
    request: Request, label: str, weights: tuple[Tensor, ...], names: list[str], first: int = 0
) -> Iterator[Described]:
    """Yields (first row, {name: (n, k) on the CPU}, {name: error}) of a layer's or a module's tensors.

    It goes on in halves of the rows if the device's memory is short.
    """
    n = len(weights[0])
    device = request.data.weights.device
    try:
        features, failed = describe_at_once(request, weights, names)
        yield first, features, failed
        return
    except torch.OutOfMemoryError as error:
        if n == 1:
            yield first, {}, dict.fromkeys(names, error)
            return
        log.warning(f"out of memory on {device}: {n} of {label} are done in halves")
    # Outside the except clause, whose traceback keeps the tensors alive.
    yield from describe_rows(request, label, tuple(w[: n // 2] for w in weights), names, first)
    yield from describe_rows(request, label, tuple(w[n // 2 :] for w in weights), names, first + n // 2)


def describe_at_once(
    request: Request, weights: tuple[Tensor, ...], names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Features (n, k) on the CPU of one layer's or one module's tensors,
    and the errors of those that failed.
    """
    # A GPU may have had no room to read a layer to it.
    on_device = [w.to(request.data.weights.device) for w in weights]
    if len(on_device) == 2:
        down, up = on_device
        features, failed = representations.describe_module(down, up, names, request.sketch_size)
    else:
        features, failed = representations.describe(on_device[0], names)
    if features:
        widths = [columns.shape[1] for columns in features.values()]
        joined = torch.cat(list(features.values()), dim=1).cpu()  # one transfer
        features = dict(zip(features, joined.split(widths, dim=1), strict=True))
    return features, failed
