"""Weights -> features of every row: one pass that reads each weight once for all representations of layers and modules."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import representations
from lora_data import BLOCK_ROWS, LoraData, ReadAhead
from settings import REPRESENTATIONS, Cell, parts_of
from training import one_thread_a_core

if TYPE_CHECKING:
    from controls import Audit
    from fitted import Fit

log = logging.getLogger("visual_ablation")

OnLayers = Callable[[float], None]


class Extracted(NamedTuple):
    features: dict[str, Tensor]        # (N, P*k) float32: a row's P layers or modules one after another, k columns each
    errors: dict[str, Exception]       # of the representations that failed
    reading: float                     # seconds
    computing: float


class Pass(NamedTuple):
    """What one pass over the weights computes."""

    data: LoraData
    widths: dict[str, int]             # columns a layer or module of every representation that is wanted
    sketch_size: int
    audit: Audit | None                # of its changed rows instead of the data set's

    def names(self, of: str) -> list[str]:
        return [name for name in self.widths if REPRESENTATIONS[name].of == of]

    def rows_in(self, start: int, stop: int) -> int:
        """How many rows a block gives."""
        return stop - start if self.audit is None else len(self.audit.rows_in(start, stop))

    def parts(self, name: str) -> int:
        return len(self.data.layers if REPRESENTATIONS[name].of == "layer" else self.data.modules)

    def units(self) -> list[tuple[int, ...]]:
        """Positions of the layers that are read together: one, or the two of a module where its product is wanted."""
        singles = range(len(self.data.layers)) if self.names("layer") else ()
        if not self.names("module"):
            return [(position,) for position in singles]
        pairs = [(module.down, module.up) for module in self.data.modules]
        paired = {position for pair in pairs for position in pair}
        return pairs + [(position,) for position in singles if position not in paired]


def extract_features(data: LoraData, widths: dict[str, int], on_layers: OnLayers = lambda layers: None,
                     sketch_size: int = representations.SKETCH_SIZE, audit: Audit | None = None) -> Extracted:
    """Every representation in `widths` (and its columns a layer or module) of all rows; or of an audit's rows, in their order.

    `on_layers(amount)` is told how many layers are done, counting a block of rows as its part of a layer.
    """
    work = Pass(data, widths, sketch_size, audit)
    total = data.num_rows if audit is None else len(audit.rows)
    features = {name: torch.empty(total, work.parts(name), width) for name, width in widths.items()}
    errors: dict[str, Exception] = {}
    seconds = {"read": 0.0, "features": 0.0}
    starts = range(0, data.num_rows, BLOCK_ROWS)
    began, done = time.perf_counter(), 0
    for start in starts:
        wanted = work._replace(widths={name: width for name, width in widths.items() if name not in errors})
        found, failed = extract(wanted, start, min(start + BLOCK_ROWS, data.num_rows), seconds, lambda layers: on_layers(layers / len(starts)))
        errors |= failed
        for name, block in found.items():
            features[name][done:done + len(block)] = block
        done += wanted.rows_in(start, min(start + BLOCK_ROWS, data.num_rows))
    data.spare.clear()                                                   # the buffers
    wall = time.perf_counter() - began
    reading = wall * seconds["read"] / (sum(seconds.values()) or 1)      # the threads' seconds overlap
    return Extracted({name: x.flatten(1) for name, x in features.items() if name not in errors}, errors, reading, wall - reading)


def extract(work: Pass, start: int, stop: int, seconds: dict[str, float], on_layers: OnLayers) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Rows start:stop of every representation, (n, P, k) each on the CPU; and the errors of those that failed.

    On a CPU each core reads and describes a unit at a time; for a GPU the cores read ahead. Adds to `seconds`.
    """
    data, n = work.data, work.rows_in(start, stop)
    found = {name: torch.empty(n, work.parts(name), width) for name, width in work.widths.items()}
    errors: dict[str, Exception] = {}
    units = work.units() if n else []
    position_of = {(module.down, module.up): i for i, module in enumerate(data.modules)} if work.names("module") else {}

    def change(position: int, w: Tensor) -> Tensor:
        """On the device, or on the host where that has no room; what describes it then takes it in halves."""
        try:
            return work.audit.change(data, position, start, stop, w)
        except torch.OutOfMemoryError:
            log.warning(f"out of memory on {data.device}: rows {start}..{stop} of {data.layers[position]} are changed on the host")
        return work.audit.change(data, position, start, stop, w.cpu())

    def fill(unit: tuple[int, ...], weights: list[Tensor]) -> None:
        began = time.perf_counter()
        if work.audit is not None:
            try:
                weights = [change(position, w) for position, w in zip(unit, weights, strict=True)]
            except Exception as error:  # the audit's features are lost; the caller reports it
                first = [errors.setdefault(name, error) is error for name in work.widths]
                if all(first):
                    log.error(f"the {work.audit.name} audit failed on rows {start}..{stop} of {data.layers[unit[0]]}:\n{traceback.format_exc()}")
                return
        jobs = [(position, (w,), work.names("layer")) for position, w in zip(unit, weights, strict=True)]
        if len(unit) == 2:
            jobs.append((position_of[unit], tuple(weights), work.names("module")))
        for place, tensors, names in jobs:
            what = f"rows {start}..{stop} of {data.layers[unit[0]] if len(tensors) > 1 else data.layers[place]}"
            for first, columns, failed in describe_rows(work, what, tensors, names) if names else ():
                for name, error in failed.items():
                    if errors.setdefault(name, error) is error:          # the first of all threads
                        log.error(f"{name} failed on {what}:\n{''.join(traceback.format_exception(error))}")
                for name, part in columns.items():
                    found[name][first:first + len(part), place] = part
        seconds["features"] += time.perf_counter() - began

    def read_and_fill(unit: tuple[int, ...]) -> None:
        with contextlib.ExitStack() as stack:
            buffers = [stack.enter_context(data.buffer()) for _ in unit]
            began = time.perf_counter()
            weights = [data.read_layer(data.layers[position], start, stop, buffer) for position, buffer in zip(unit, buffers, strict=True)]
            seconds["read"] += time.perf_counter() - began
            fill(unit, weights)

    if data.device == "cpu":
        with one_thread_a_core(max(len(units), 1)) as pool:
            for unit, _ in zip(units, pool.map(read_and_fill, units), strict=True):
                on_layers(len(unit))
    else:
        ahead = ReadAhead(data, [data.layers[position] for unit in units for position in unit], start, stop, torch.get_num_threads())
        with contextlib.closing(iter(ahead)) as weights:
            for unit in units:
                fill(unit, [next(weights) for _ in unit])
                on_layers(len(unit))
        seconds["read"] += ahead.waited
    return {name: block for name, block in found.items() if name not in errors}, errors


def describe_rows(work: Pass, what: str, weights: tuple[Tensor, ...], names: list[str],
                  first: int = 0) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Exception]]]:
    """Yields (first row, {name: (n, k) on the CPU}, {name: error}) of a layer's or a module's tensors; in halves if memory is short."""
    n = len(weights[0])
    try:
        there = [w.to(work.data.device) for w in weights]                # a GPU may have had no room to read it to
        if len(there) == 2:
            found, failed = representations.describe_module(*there, names, work.sketch_size)
        else:
            found, failed = representations.describe(*there, names)
        if found:
            columns = torch.cat(list(found.values()), dim=1).cpu()       # one transfer
            widths = [part.shape[1] for part in found.values()]
            found = dict(zip(found, columns.split(widths, dim=1), strict=True))
        yield first, found, failed
        return
    except torch.OutOfMemoryError as error:
        if n == 1:
            yield first, {}, dict.fromkeys(names, error)
            return
        log.warning(f"out of memory on {work.data.device}: {n} of {what} are done in halves")
    there = found = None   # outside the except clause, whose traceback keeps the tensors alive
    yield from describe_rows(work, what, tuple(w[:n // 2] for w in weights), names, first)
    yield from describe_rows(work, what, tuple(w[n // 2:] for w in weights), names, first + n // 2)


# --- a cell's columns


@dataclass
class Features:
    """What the columns of every cell are taken from. `changed[audit][representation]` (E, P*k) belongs to the audit's E rows."""

    data: LoraData
    components: int = 128                                                # of pca and kernel_pca, at most
    computed: dict[str, Tensor] = field(default_factory=dict)            # representation -> (N, P*k)
    changed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    audits: dict[str, Audit] = field(default_factory=dict)
    fits: dict[tuple, Fit] = field(default_factory=dict)                 # the last one with a kernel, which serves two cells

    def of(self, cell: Cell, audits: list[Audit], data: LoraData | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The cell's columns of all rows, (N, D), and of each audit's, (E, D); `data` with the cell's split and labels, if not the first ones."""
        if REPRESENTATIONS[cell.representation].fitted:
            from fitted import FEATURES

            sizes = [self.data.num_rows] + [len(audit.rows) for audit in audits]
            x, *changed = FEATURES[cell.representation](self.fit(cell, audits, data or self.data)).split(sizes)
        else:
            x, *changed = (slice_layers(feature_matrix(found, cell, self.data), cell, self.data)
                           for found in [self.computed] + [self.changed[audit.name] for audit in audits])
        return x, {audit.name: part for audit, part in zip(audits, changed, strict=True)}

    def fit(self, cell: Cell, audits: list[Audit], data: LoraData) -> Fit:
        from fitted import Fit

        key = (cell.layer_set, cell.split, cell.labels, *(audit.name for audit in audits))
        found = self.fits.get(key) or Fit(data, cell.layer_set, self.components, tuple(audits))
        self.fits = {key: found} if cell.representation.startswith("kernel") else {}
        return found


def feature_matrix(features: dict[str, Tensor], cell: Cell, data: LoraData) -> Tensor:
    """(N, P, k) of the cell's representation; an ensemble's parts are joined within each layer, norms are the first of simple_stats."""
    count = len(data.layers if REPRESENTATIONS[cell.representation].of == "layer" else data.modules)
    parts = [features[name].unflatten(1, (count, -1)) for name in parts_of(cell.representation)]
    if cell.representation == "norms":
        return parts[0][:, :, :1]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def places_of(cell: Cell, data: LoraData) -> list[int]:
    """Positions of the layers or modules that the cell's layer set keeps."""
    return data.layers_of(cell.layer_set) if REPRESENTATIONS[cell.representation].of == "layer" else data.modules_of(cell.layer_set)


def slice_layers(x: Tensor, cell: Cell, data: LoraData) -> Tensor:
    """The columns (N, P'*k) of the cell's layers or modules: visual-only is a slice of the all-layers features."""
    chosen = places_of(cell, data)
    return (x if len(chosen) == x.shape[1] else x[:, chosen]).flatten(1)
