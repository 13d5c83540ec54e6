"""What a representation that is fitted to training rows sees of a collection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ablation.audits import Audit
from ablation.collection import LoraCollection, View
from ablation.layers import Module
from ablation.reading import BLOCK_ROWS

FIT_SEED = 0
NEGLIGIBLE_STD = 1e-6  # components whose std is smaller, relative to the largest, hold rounding only


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
    kernel: Tensor | None = None  # of `kernels.kernel_of`, once two representations may share it

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

    def layer_blocks(self, position: int) -> Iterator[tuple[slice, Tensor]]:
        """One layer in blocks of rows: which of the N + E rows, and their (n, rows, cols) float32 in the
        host's memory. A block of the data set's rows is followed by its changed rows.
        """
        data, layer = self.data, self.data.layers.names[position]
        sizes = [data.num_rows, *(len(audit.rows) for audit in self.audits)]
        filled = np.cumsum(sizes)[:-1].tolist()  # where the next changed rows of each audit go
        for start in range(0, data.num_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, data.num_rows)
            w = data.weights.read_on_host(layer, start, stop)
            yield slice(start, stop), w
            for i, audit in enumerate(self.audits):
                changed = audit.change(data.weights, position, (start, stop), w)
                if len(changed):
                    yield slice(filled[i], filled[i] + len(changed)), changed
                filled[i] += len(changed)

    def training_blocks(self, position: int) -> Iterator[tuple[slice, Tensor]]:
        """One layer of the training rows in ascending order, block by block: which of them, and their weights
        (n, d) float32 where the fit multiplies.
        """
        data, layer = self.data, self.data.layers.names[position]
        ordered = self.train.sort().values
        for start in range(0, data.num_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, data.num_rows)
            first, last = torch.searchsorted(ordered, torch.tensor([start, stop])).tolist()
            if first < last:
                w = data.weights.read_on_host(layer, start, stop)
                yield slice(first, last), w[ordered[first:last] - start].flatten(1).to(self.device)

    def read(self, position: int) -> Tensor:
        """One layer of the N + E rows, (N + E, rows, cols) float32 in the host's memory."""
        layout = self.data.layers.layouts[self.data.layers.names[position]]
        whole = torch.empty(self.num_rows, layout.rows, layout.cols)
        for rows, w in self.layer_blocks(position):
            whole[rows] = w
        return whole

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of that shape, float64, where the fit multiplies."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)
