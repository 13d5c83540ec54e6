"""The inputs of a cell's numbers. A checkpoint is current if it was made with the cell's present inputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from ablation.catalogue import (
    AUDIT_VERSION,
    AUTO,
    CLASSIFIER_VERSIONS,
    METADATA_COLUMNS,
    SPECS,
    TRAINING_VERSION,
    components_of,
)
from ablation.cells import Cell
from ablation.fields import InputError
from ablation.settings import Settings
from ablation.splits import split_spec
from checkpointing import hash_of

if TYPE_CHECKING:
    from ablation.context import Context


def requested_inputs(settings: Settings, cell: Cell) -> dict[str, Any]:
    """What a cell's numbers depend on, as far as the settings alone tell:
    for --status, which opens no data set.
    """
    return training_inputs(settings, cell) | data_settings(settings, cell)


def actual_inputs(context: Context, cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
    """What each cell's numbers depend on: settings, and hashes of weights, layers, labels and split."""
    data = context.data

    @functools.cache
    def layers(layer_set: str) -> dict[str, Any]:
        return {"layers": hash_of([data.layers.names[i] for i in data.layers.positions(layer_set)])}

    @functools.cache
    def rows(split: str, labels: str, fraction: str) -> dict[str, Any]:
        try:
            view = context.view_of(Cell("", "", split=split, labels=labels, fraction=fraction))
        except InputError as error:  # of a cell that another command left in the folder
            return {"split": f"not possible any more: {error}"}
        splits = view.folds or (view.split,)
        parts = [part.tolist() for split in splits for part in (split.train, split.val, split.test)]
        inputs = {"labels": hash_of([view.labels.tolist(), data.classes]), "split": hash_of(parts)}
        return inputs | ({"is_weighted": True} if view.is_weighted else {})

    def inputs(cell: Cell) -> dict[str, Any]:
        own = training_inputs(context.settings, cell)
        seen = rows(cell.split, cell.labels, cell.fraction)
        if cell.representation == "metadata":
            own["metadata"] = hash_of([[name, hash_of(values)] for name, values in data.metadata.items()])
        return own | {"data": data.files.identity} | layers(cell.layer_set) | seen

    return {cell: inputs(cell) for cell in cells}


def training_inputs(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Everything but the data: representation and its version and options,
    training settings, audit, classifier.
    """
    training = dataclasses.asdict(settings.training)
    if training["trainer"] == "auto":  # becomes definite with the device, and is not known without it
        del training["trainer"]
    used = dict.fromkeys([cell.representation, *components_of(cell.representation)])
    inputs = {
        "representation": cell.representation,
        "representation_version": [SPECS[name].version for name in used],
        **settings.options_of(cell.representation),
        "training_version": TRAINING_VERSION,
        **training,
    }
    if settings.cache_dtype != "float32" and not SPECS[cell.representation].fitted:
        inputs["cache_dtype"] = settings.cache_dtype
    if cell.audit:
        on_rows = f"{AUDIT_VERSION}, on {settings.audit_rows} rows"
        inputs |= {"audit": cell.audit, "audit_version": on_rows if settings.audit_rows else AUDIT_VERSION}
    if cell.classifier:
        version = CLASSIFIER_VERSIONS[cell.classifier]
        inputs |= {"classifier": cell.classifier, "classifier_version": version}
    return inputs


def data_settings(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Settings that select the data (label column, split, ...).

    They are stored with each cell, and compared only where the data set is not open: once it is, hashes cover
    them.
    """
    spec = split_spec(settings, cell.split)
    selected: dict[str, Any] = {
        "data_split": settings.data_split,
        "revision": settings.revision,
        "label_column": settings.label_column,
        "split_seed": spec.seed,
        "split_kind": spec.kind,
        "folds": spec.folds,
        "partitions": spec.partitions,
    }
    if cell.representation == "metadata":
        selected["metadata_columns"] = list(dict.fromkeys([*METADATA_COLUMNS, *settings.metadata_columns]))
    if spec.kind in ("grouped", AUTO):
        selected["group_column"] = settings.group_column
    return selected
