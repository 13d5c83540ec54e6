"""Which cells an experiment has, in which order, and which of them a data set has something for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ablation.catalogue import MAIN_COMPARISON, MAX_NEAREST_PRODUCTS, METADATA_COLUMNS, SPECS, group_of
from ablation.cells import Cell, cells_of
from ablation.controls import control_cells
from ablation.fields import InputError
from ablation.layers import Layers
from ablation.settings import Settings
from ablation.splits import split_names

if TYPE_CHECKING:
    from ablation.collection import LoraCollection

log = logging.getLogger("visual_ablation")

USUAL_CLASSES, USUAL_COMPONENTS = 10, 128  # where the data set is not open yet

NO_LAYER = "the data set has no layer of"


def list_cells(settings: Settings, layer_sets: list[str]) -> list[Cell]:
    """Every cell that the settings ask for, once, the table first.

    `layer_sets` are those of the settings with groups expanded (`Layers.expand`).
    """
    by_another = settings.halves_by if settings.halves_by != "mlp" else ""
    halves = [name for name in layer_sets if by_another and group_of(name) == "random_half"]
    layer_sets = [name for name in layer_sets if name not in halves]
    table = cells_of(layer_sets, settings.representations)
    further = [cell._replace(split=split) for split in split_names(settings) if split for cell in table]
    classified = [
        cell._replace(classifier=classifier)
        for classifier in settings.classifiers
        for cell in table + further
        if not cell.own_classifier
    ]
    compared = [*halves, MAIN_COMPARISON.second] if halves else []  # what the halves are set beside
    halved = [
        cell._replace(classifier="" if cell.own_classifier else by_another)
        for cell in cells_of(compared, settings.representations)
    ]
    fewer = [
        cell._replace(fraction=fraction)
        for fraction in settings.fractions
        for cell in table
        if not group_of(cell.layer_set)
    ]
    audited = cells_of(layer_sets, settings.representations, settings.audit)
    controls = control_cells(settings, layer_sets)
    return list(dict.fromkeys(audited + further + classified + halved + fewer + controls))


class Contents(NamedTuple):
    """What decides which cells are possible: of a LoraCollection, or of the headers of its files alone."""

    layers: Layers
    num_rows: int
    metadata: Mapping[str, Any]
    overlaps: bool  # train, validation and test are the same rows
    metadata_varies: bool = True  # or not known
    keeps_weights: bool = True  # so that they can be read again


def contents_of(data: LoraCollection) -> Contents:
    """What decides which cells are possible with a collection."""
    overlaps, varies = data.split.overlap, data.metadata_varies
    return Contents(data.layers, data.num_rows, data.metadata, overlaps, varies, data.weights.keeps_weights)


def possible_cells(settings: Settings, data: Contents) -> tuple[list[Cell], dict[Cell, str]]:
    """The cells that can be computed from this data set, and for each other cell the reason why not.

    Raises InputError if no cell is left, or if a module that is needed cannot be multiplied.
    """
    if "gauge" in settings.audit:
        data.layers.check_modules()
    requested = list_cells(settings, data.layers.expand(settings.layer_sets, settings.random_halves))
    skipped = {cell: reason for cell in requested if (reason := why_impossible(cell, data))}
    for reason in dict.fromkeys(skipped.values()):
        names = ", ".join(cell.name for cell, cause in skipped.items() if cause == reason)
        log.info(f"Skipped, {reason}: {names}")
    cells = [cell for cell in requested if cell not in skipped]
    if not cells:
        reason = next(iter(skipped.values()))
        raise InputError(f"nothing can be computed: {reason}; choose other --representations or --layer-sets")
    return cells, skipped


def why_impossible(cell: Cell, data: Contents) -> str:
    """Why a cell cannot be computed from this data set, or '' if it can."""
    spec = SPECS[cell.representation]
    if spec.source == "module":
        unpaired = data.layers.without_partner(cell.layer_set)
        if unpaired:
            return (
                f"{len(unpaired)} layers of {cell.layer_set} are there without the other half of their "
                f"module, such as '{unpaired[0]}'"
            )
    if spec.fitted and spec.source != "row" and not data.keeps_weights:
        return "it reads the weights again, which --streaming does not keep"
    if data.num_rows > spec.max_rows:
        return f"for at most {spec.max_rows:,} rows, the data set has {data.num_rows:,}"
    if cell.classifier == "nearest":
        most = int((MAX_NEAREST_PRODUCTS / max(1, columns_of_cell(cell, data.layers))) ** 0.5)
        if data.num_rows > most:
            return (
                f"nearest is for at most {most:,} rows of {cell.representation}, here are {data.num_rows:,}"
            )
    if spec.source == "row" and not data.metadata:
        names = ", ".join(METADATA_COLUMNS)
        return f"the data set has no numeric column {names}; --metadata-columns names others"
    if spec.source == "row" and not data.metadata_varies:
        return f"{', '.join(data.metadata)} are the same for all training rows"
    if cell.fraction and data.overlaps:
        return "train, validation and test are the same rows"
    if spec.source != "row" and not data.layers.positions(cell.layer_set):
        name = group_of(cell.layer_set) or cell.layer_set
        return f"{NO_LAYER} {name}{data.layers.why_empty(name)}"
    return ""


def columns_of_cell(cell: Cell, layers: Layers) -> int:
    """About how many columns a cell's features have."""
    if cell.representation == "flat_vec":
        return sum(layers.layouts[layers.names[i]].size for i in layers.positions(cell.layer_set))
    is_layer = SPECS[cell.representation].source == "layer"
    positions = layers.positions if is_layer else layers.module_positions
    count = len(positions(cell.layer_set))
    if cell.representation == "centroid_cosine":
        return 2 * USUAL_CLASSES * count
    return SPECS[cell.representation].width * count or USUAL_COMPONENTS
