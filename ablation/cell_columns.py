"""The columns that each cell takes from the features, in memory or read from disk as they are used."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ablation.audits import Audit
from ablation.catalogue import SPECS, components_of
from ablation.cells import Cell
from ablation.collection import LoraCollection, View
from ablation.memory import free_memory
from ablation.streamed import PIECE_VALUES, Matrix, some, stream, streamed
from ablation.task import TrainingError
from ablation.training import COPIES

if TYPE_CHECKING:
    from ablation.fit import Fit

log = logging.getLogger("visual_ablation")


@dataclass
class Features:
    """The features that the columns of every cell are taken from.

    `computed` maps representations to features (N, P*k) of the data set's rows, `changed[audit]` to features
    (E, P*k) of the audit's changed rows. `components` bounds the components of pca and kernel_pca.
    """

    data: LoraCollection
    components: int = 128
    memory: float = 0.0  # bytes that a cell's columns and their copies may take; 0: what is free
    cache: Path | None = None  # folder of fitted representations
    computed: dict[str, Matrix] = field(default_factory=dict)
    changed: dict[str, dict[str, Matrix]] = field(default_factory=dict)
    audits: dict[str, Audit] = field(default_factory=dict)
    last_fit: tuple[tuple, Fit] | None = None  # one with a kernel, because two representations share it

    def columns_of(self, cell: Cell, audits: list[Audit], view: View) -> tuple[Matrix, dict[str, Matrix]]:
        """The cell's columns of all rows, (N, D), and of each audit's changed rows, (E, D).

        They are streamed where the memory has no room for them and the copies that training makes.
        """
        if SPECS[cell.representation].fitted:
            from ablation.fitted_cache import fitted_features

            fit = self.fit(cell, audits, view)
            whole = fitted_features(cell.representation, fit, self.cache)
            ends = np.cumsum([0, self.data.num_rows, *(len(audit.rows) for audit in audits)])
            x, *changed = [whole[start:stop] for start, stop in itertools.pairwise(ends)]
            if cell.representation == "flat_vec":
                x, *changed = self.held(cell, [x, *changed])
        else:
            features = [self.computed, *(self.changed[audit.name] for audit in audits)]
            x, *changed = self.held(cell, [cell_columns(of_rows, cell, self.data) for of_rows in features])
        return x, {audit.name: rows for audit, rows in zip(audits, changed, strict=True)}

    def held(self, cell: Cell, columns: list[Matrix]) -> list[Matrix]:
        """Columns as tensors, if the memory has room for their copies; otherwise streamed."""
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in columns)
        room = self.memory or free_memory()
        if COPIES * size <= room:
            return [x if isinstance(x, Tensor) else x.to("cpu") for x in columns]
        log.info(
            f"The columns of {cell.trained.name} ({size / 1e9:.2f} GB) stay on disk and are read batch by "
            f"batch: {COPIES} copies are more than {room / 1e9:.2f} GB of memory"
        )
        return [streamed(x) for x in columns]

    def fit(self, cell: Cell, audits: list[Audit], view: View) -> Fit:
        """The fit of a cell's layer set, split and labels."""
        from ablation.fit import Fit

        rows = view.split.train.tobytes()  # folds of a split train on other rows
        key = (cell.layer_set, cell.split, rows, cell.labels, *(audit.name for audit in audits))
        if self.last_fit is not None and self.last_fit[0] == key:
            fit = self.last_fit[1]
        else:
            fit = Fit(self.data, view, cell.layer_set, self.components, tuple(audits))
        self.last_fit = (key, fit) if cell.representation.startswith("kernel") else None
        return fit


def cell_columns(features: dict[str, Matrix], cell: Cell, data: LoraCollection) -> Matrix:
    """The columns (N, P'*k) of the cell's P' layers or modules:
    visual-only is a slice of the all-layers features.

    The members of the ensemble are joined within each layer. Norms are the first column of simple_stats.
    """
    is_layer = SPECS[cell.representation].source == "layer"
    count = len(data.layers if is_layer else data.layers.modules)
    members = [features[name] for name in components_of(cell.representation)]
    chosen = positions_of(cell, data)
    is_norms = cell.representation == "norms"
    if len(members) == 1 and len(chosen) == count and not is_norms:
        return members[0]

    widths = [x.shape[1] // count for x in members]
    width = 1 if is_norms else sum(widths)  # columns of a layer or module
    places = torch.tensor(chosen)

    def make(rows: Tensor, start: int, stop: int) -> Tensor:
        own = places[start // width : -(-stop // width)]  # the layers or modules that these columns are of
        first, end = int(own[0]), int(own[-1]) + 1
        parts = [
            some(x, rows, first * k, end * k).unflatten(1, (end - first, k))
            for x, k in zip(members, widths, strict=True)
        ]
        x = torch.cat(parts, dim=2)[:, own - first, : 1 if is_norms else None]  # (n, P, k)
        skipped = start // width * width
        return x.flatten(1)[:, start - skipped : stop - skipped]

    return stream(make, len(members[0]), width * len(chosen))


def positions_of(cell: Cell, data: LoraCollection) -> list[int]:
    """Positions of the layers, or of the modules, that the cell's layer set keeps."""
    if SPECS[cell.representation].source == "layer":
        return data.layers.positions(cell.layer_set)
    return data.layers.module_positions(cell.layer_set)


def refuse_non_finite_features(x: Matrix, cell: Cell, data: LoraCollection) -> None:
    """Raise TrainingError for the first value of x (N, D) that is not finite, naming layer and row."""
    first = 0
    for part in x.split(max(1, PIECE_VALUES // max(x.shape[1], 1))):
        values = part.to("cpu")
        finite = values.isfinite()
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            where = place_of(first + row, column, x.shape[1], cell, data)
            raise TrainingError(f"{where} is {values[row, column]} as float32")
        first += len(values)


def place_of(row: int, column: int, width: int, cell: Cell, data: LoraCollection) -> str:
    """Where a number among a cell's `width` columns is from, as an error names it."""
    spec = SPECS[cell.representation]
    if spec.fitted:
        return f"feature {column} of row {row}"
    positions = positions_of(cell, data)
    place, column_of_layer = divmod(column, width // len(positions))
    layers = data.layers
    names = layers.names if spec.source == "layer" else [module.name for module in layers.modules]
    return f"feature {column_of_layer} of layer '{names[positions[place]]}', row {row},"
