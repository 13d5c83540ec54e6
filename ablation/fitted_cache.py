"""Fitted representations in the feature cache: one file for each layer set, split and set of audits."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablation.catalogue import AUDIT_VERSION, CACHED_FITS, SPECS
from ablation.fit import Fit
from ablation.fitted import FITTED
from ablation.streamed import Matrix
from checkpointing import CannotWrite, hash_of, locked, make_folder, map_arrays, write_arrays

log = logging.getLogger("visual_ablation")

DISK_SHARE = 0.5  # of the free disk that a file may take


def fitted_features(name: str, fit: Fit, folder: Path | None) -> Matrix:
    """A fitted representation, from the cache in `folder`, or computed and cached there.

    A file that cannot be used, and a disk that does not take one, are logged. Raises InputError if the data
    set's files changed while they were read.
    """
    if folder is None or name not in CACHED_FITS:
        return FITTED[name](fit)
    found = cached(name, fit, folder)
    if found is not None:
        return found
    try:
        make_folder(folder)
    except CannotWrite as error:
        log.warning(f"features of {name} are not cached: {error}")
        return FITTED[name](fit)
    with locked(path_of(name, fit, folder)):  # of several commands that share the cache one does the work
        found = cached(name, fit, folder)
        return compute(name, fit, folder) if found is None else found


def compute(name: str, fit: Fit, folder: Path) -> Matrix:
    """A fitted representation, computed and written to the cache.

    Raises InputError, and writes nothing, if the data set's files changed meanwhile.
    """
    if name == "kernel_pca" and fit.kernel is None:
        fit.kernel = fitted_features("kernel_ridge", fit, folder).to("cpu")
    x = FITTED[name](fit).to("cpu")
    fit.data.files.refuse_changes()
    size, free = x.nbytes, shutil.disk_usage(folder).free
    if size > DISK_SHARE * free:
        log.warning(
            f"features of {name} are not cached: they take {size / 1e6:,.1f} MB, {folder} has "
            f"{free / 1e6:,.1f} MB free"
        )
        return x
    try:
        write_arrays(path_of(name, fit, folder), {"features": x.numpy()}, description_of(name, fit))
    except CannotWrite as error:
        log.warning(f"features of {name} are not cached: {error}")
    return x


def cached(name: str, fit: Fit, folder: Path) -> Tensor | None:
    """Cached features, mapped into memory; None if there are none, or none that can be used."""
    path = path_of(name, fit, folder)
    if not os.path.lexists(path):
        return None
    try:
        arrays, made_with = map_arrays(path)
        if made_with != description_of(name, fit):
            raise ValueError("made by another version or with other options")
        features = arrays.get("features")
        if features is None or features.ndim != 2 or len(features) != fit.num_rows:
            raise ValueError("of another shape")
        if features.dtype != ("float64" if name == "kernel_ridge" else "float32"):
            raise ValueError(f"of type {features.dtype}")
    except (OSError, ValueError) as error:
        log.warning(f"cached features of {name} are not used: {error}; computing them again")
        return None
    log.info(f"Cached features: {name} of {fit.layer_set}")
    return torch.from_numpy(features)


def path_of(name: str, fit: Fit, folder: Path) -> Path:
    """The file of a fitted representation. Its name is that of every version."""
    return folder / f"{name}-{hash_of(seen_by(name, fit))[:16]}.safetensors"


def description_of(name: str, fit: Fit) -> dict[str, Any]:
    """What the numbers depend on."""
    return {**seen_by(name, fit), "representation": name, "version": SPECS[name].version}


def seen_by(name: str, fit: Fit) -> dict[str, Any]:
    """What a fitted representation sees: the data, layers, training rows, audits, its options, and for
    centroid_cosine the labels of the training rows.
    """
    layers = fit.data.layers
    seen: dict[str, Any] = {
        "data": fit.data.files.identity,
        "layers": hash_of([layers.names[position] for position in fit.positions]),
        "train": hash_of(fit.train.numpy()),
        "audits": [[audit.name, AUDIT_VERSION, hash_of(audit.rows)] for audit in fit.audits],
    }
    if "pca_components" in SPECS[name].options:
        seen["pca_components"] = fit.components
    if name == "centroid_cosine":
        seen["labels"] = [len(fit.data.classes), hash_of(fit.train_labels.numpy())]
    return seen
