"""The five controls: cells that should not read the class as the weights do, or that show what else reads it.

Each control is a function that lists its cells. They are cells of the same loop: what a control changes about
a cell stands in the cell's fields (labels, layer set, representation), and is done here for the labels and
the metadata columns, in `layers.py` for the layer sets and in `features.py` for the norms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ablation.catalogue import SHUFFLED, group_of
from ablation.cells import Cell, cells_of
from ablation.settings import Settings

SHUFFLE_SEED = 0


def control_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """The cells of the controls that the settings ask for, in the order of CONTROLS."""
    single = [layer_set for layer_set in layer_sets if not group_of(layer_set)]
    chosen = [list_them for name, list_them in CONTROL_CELLS.items() if name in settings.controls]
    return [cell for list_them in chosen for cell in list_them(settings, single)]


def shuffled_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """Every cell of the table with the labels of other rows: nothing may be read."""
    return [cell._replace(labels=SHUFFLED) for cell in cells_of(layer_sets, settings.representations)]


def metadata_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """The numeric columns that are no weights:
    how well do nuisances such as training steps tell the class?
    """
    return [Cell("metadata", "no_layers")]


def norm_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """One number a layer, its Frobenius norm."""
    return cells_of(layer_sets, ["norms"])


def down_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """The down matrix of every module alone."""
    return cells_of(["down_only"], settings.representations_of("layer"))


def up_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """The up matrix of every module alone."""
    return cells_of(["up_only"], settings.representations_of("layer"))


CONTROL_CELLS: dict[str, Callable[[Settings, list[str]], list[Cell]]] = {
    SHUFFLED: shuffled_cells,
    "metadata": metadata_cells,
    "norms": norm_cells,
    "down": down_cells,
    "up": up_cells,
}


def labels_for(kind: str, labels: np.ndarray) -> np.ndarray:
    """The labels (N,) of a cell whose field `labels` is `kind`:
    as they are, or each row with another row's.
    """
    return np.random.default_rng(SHUFFLE_SEED).permutation(labels) if kind == SHUFFLED else labels


def metadata_features(metadata: dict[str, np.ndarray], train_rows: np.ndarray) -> np.ndarray:
    """Metadata columns as features (N, 2K):
    K values less the training rows' mean, then K flags for "has a value".

    `metadata` maps K names to (N,) float64, NaN where a row has no value. A missing value counts as the mean,
    so that it says nothing by itself.
    """
    x = np.stack(list(metadata.values()), axis=1)  # (N, K)
    known = np.isfinite(x)
    mean = np.where(known, x, 0)[train_rows].sum(0) / known[train_rows].sum(0).clip(1)
    return np.concatenate([np.where(known, x - mean, 0), known], axis=1)
