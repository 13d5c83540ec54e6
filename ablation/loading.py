"""Open the data set of an experiment: say what is in it, refuse what cannot be computed, hash its weights."""

from __future__ import annotations

import logging
import sys
import time

import numpy as np

from ablation.collection import LoraCollection, load_collection
from ablation.layers import refuse_empty_layer_sets
from ablation.log import Clock, Progress
from ablation.settings import Settings
from ablation.splits import split_names, split_spec

log = logging.getLogger("visual_ablation")


def load(settings: Settings, device: str, clock: Clock, default_sets: bool = False) -> LoraCollection:
    """The collection, with the hash of its weights in `files.identity`; what it holds is logged.

    `default_sets`: the layer sets are those of the default, so that a set without a layer is left out.
    Raises InputError for a data set, split or layer set that cannot be used.
    """
    with clock("load"), Progress(None, f"loading {settings.dataset}"):
        from datasets import disable_progress_bars

        if not sys.stdout.isatty():
            disable_progress_bars()
        data = load_collection(settings, device)
        for name in split_names(settings)[1:]:  # a split that is not possible ends the command here
            data.view(split_spec(settings, name))
    log_contents(data, settings)
    log_groups(data, settings)
    warn_of_untrained_classes(data, settings)
    if data.split.overlap:
        log.warning(
            "ten rows or fewer: train, validation and test are the same rows, so accuracies mean nothing"
        )
    refuse_empty_layer_sets(data.layers, settings, default_sets)
    with clock("read"):
        hash_weights(data, settings)
    return data


def log_contents(data: LoraCollection, settings: Settings) -> None:
    """Log rows, classes, layers and splits."""
    summary = data.summary()
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary["layers"].items() if count)
    ranks = ", ".join(map(str, summary["ranks"]))
    sizes = ", ".join(f"{part} {count}" for part, count in summary["split"].items())
    further = split_names(settings)[1:]
    beside = f"; and beside it {', '.join(further)}" if further else ""
    log.info(
        f"Data set: {settings.dataset} | {summary['rows']} rows, {summary['classes']} classes | "
        f"device: {data.weights.device}"
    )
    log.info(f"Architecture: {summary['architecture']}")
    log.info(
        f"Layers: {len(data.layers)} ({kinds}) of rank {ranks} | {summary['weights_per_row']:,} weights a row"
    )
    spec = split_spec(settings, "").resolved(data.groups is not None)
    folds = f" in {spec.folds} folds, of which the first has" if spec.folds else ","
    log.info(f"Split: {spec.kind}{folds} {sizes}{beside}")


def log_groups(data: LoraCollection, settings: Settings) -> None:
    """Log how many test rows share their group with a training row."""
    if data.groups is None or data.split.overlap:
        return
    shared = data.shared_groups(data.split)
    advice = "" if not shared or "grouped" in settings.split else ": --split grouped keeps groups together"
    log.info(
        f"Groups: {len(np.unique(data.groups))} by '{data.group_column}'; {shared} of "
        f"{len(data.split.test)} test rows share theirs with a training row{advice}"
    )


def warn_of_untrained_classes(data: LoraCollection, settings: Settings) -> None:
    """Warn of classes without a training row, in any split."""
    for name in split_names(settings):
        view = data.view(split_spec(settings, name) if name else None)
        trained = set(view.labels[view.split.train].tolist())
        absent = [str(label) for number, label in enumerate(data.classes) if number not in trained]
        if absent:
            where = f" in split {name}" if name else ""
            log.warning(f"no training row of class {', '.join(absent)}{where}: its rows cannot be told")


def hash_weights(data: LoraCollection, settings: Settings) -> None:
    """Hash the weights, or remember the hash of unchanged files."""
    start = time.perf_counter()
    scope = [settings.data_split, data.num_rows, data.layers.names]
    with Progress(len(data.layers), "layers hashed") as progress:
        remembered = data.files.identify(
            scope, lambda: data.weights.content_hash(progress.advance), settings.cache_folder
        )
    if not remembered:
        gigabytes = 4 * data.layers.weights_per_row * data.num_rows / 1e9
        seconds = time.perf_counter() - start
        log.info(f"Content hash of {gigabytes:.2f} GB of weights: {data.files.identity} ({seconds:.1f}s)")
