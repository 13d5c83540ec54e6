"""What travels together through an experiment: its context, and the ledger of its cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ablation.actions import Actions
from ablation.cells import Cell
from ablation.collection import LoraCollection, View
from ablation.log import Clock
from ablation.settings import Settings
from ablation.splits import split_spec
from checkpointing import ResultStore


@dataclass(frozen=True)
class Context:
    """An experiment's settings, device, data, results and clock.
    `settings` are definite: no trainer is `auto`.
    """

    settings: Settings
    actions: Actions
    device: str
    data: LoraCollection
    store: ResultStore
    clock: Clock

    def view_of(self, cell: Cell) -> View:
        """The rows as the cell sees them: its split, its labels and its training rows.
        Raises InputError if that split is not possible.
        """
        spec = split_spec(self.settings, cell.split) if cell.split else None
        return self.data.view(spec, cell.labels, cell.train_percent)


@dataclass
class NullAnswers:
    """What `null_reading` has of random halves: arrays by representation; or why there are none."""

    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # representations that are to be read
    skipped: str = ""  # because random halves tell nothing here
    failed: str = ""  # because of an error


@dataclass
class Ledger:
    """The cells of a command, and what became of each.
    `inputs` maps cells, also those of other commands in the folder, to what their numbers depend on.
    """

    cells: list[Cell]  # of this command, in order
    skipped: dict[Cell, str]  # reason
    inputs: dict[Cell, dict[str, Any]]
    missing: list[Cell] = field(default_factory=list)  # to be computed by this command
    failures: dict[Cell, str] = field(default_factory=dict)  # reason
    null: NullAnswers = field(default_factory=NullAnswers)
