"""The features of all cells, from the cache or from the weights; and the columns that each cell takes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ablation.audits import AUDIT_CLASSES, Audit
from ablation.catalogue import SPECS, components_of
from ablation.cells import Cell
from ablation.collection import LoraCollection, View
from ablation.extraction import Request, extract_features
from ablation.fields import InputError
from ablation.log import Progress, describe_error
from ablation.provenance import computed_by
from ablation.reading import BLOCK_ROWS
from ablation.task import TrainingError
from checkpointing import CannotWrite, FeatureCache, Held, Unfinished, locked, make_folder, remove_tree

if TYPE_CHECKING:
    from ablation.context import Context
    from ablation.fitted import Fit

log = logging.getLogger("visual_ablation")


LARGE = 1e18  # weights whose squares come near the end of float32


@dataclass
class Features:
    """The features that the columns of every cell are taken from.

    `computed` maps representations to features (N, P*k) of the data set's rows, `changed[audit]` to features
    (E, P*k) of the audit's changed rows. `components` bounds the components of pca and kernel_pca.
    """

    data: LoraCollection
    components: int = 128
    computed: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    audits: dict[str, Audit] = field(default_factory=dict)
    last_fit: tuple[tuple, Fit] | None = None  # one with a kernel, because two representations share it

    def columns_of(self, cell: Cell, audits: list[Audit], view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """The cell's columns of all rows, (N, D), and of each audit's changed rows, (E, D)."""
        if SPECS[cell.representation].fitted:
            from ablation.fitted import FITTED

            sizes = [self.data.num_rows, *(len(audit.rows) for audit in audits)]
            x, *changed = FITTED[cell.representation](self.fit(cell, audits, view)).split(sizes)
        else:
            x = cell_columns(self.computed, cell, self.data)
            changed = [cell_columns(self.changed[audit.name], cell, self.data) for audit in audits]
        return x, {audit.name: rows for audit, rows in zip(audits, changed, strict=True)}

    def fit(self, cell: Cell, audits: list[Audit], view: View) -> Fit:
        """The fit of a cell's layer set, split and labels."""
        from ablation.fitted import Fit

        rows = view.split.train.tobytes()  # folds of a split train on other rows
        key = (cell.layer_set, cell.split, rows, cell.labels, *(audit.name for audit in audits))
        if self.last_fit is not None and self.last_fit[0] == key:
            fit = self.last_fit[1]
        else:
            fit = Fit(self.data, view, cell.layer_set, self.components, tuple(audits))
        self.last_fit = (key, fit) if cell.representation.startswith("kernel") else None
        return fit


def cell_columns(features: dict[str, Tensor], cell: Cell, data: LoraCollection) -> Tensor:
    """The columns (N, P'*k) of the cell's P' layers or modules:
    visual-only is a slice of the all-layers features.

    The members of the ensemble are joined within each layer. Norms are the first column of simple_stats.
    """
    is_layer = SPECS[cell.representation].source == "layer"
    count = len(data.layers if is_layer else data.layers.modules)
    components = [features[name].unflatten(1, (count, -1)) for name in components_of(cell.representation)]
    x = components[0] if len(components) == 1 else torch.cat(components, dim=2)  # (N, P, k)
    if cell.representation == "norms":
        x = x[:, :, :1]
    chosen = positions_of(cell, data)
    return (x if len(chosen) == count else x[:, chosen]).flatten(1)


def positions_of(cell: Cell, data: LoraCollection) -> list[int]:
    """Positions of the layers, or of the modules, that the cell's layer set keeps."""
    if SPECS[cell.representation].source == "layer":
        return data.layers.positions(cell.layer_set)
    return data.layers.module_positions(cell.layer_set)


def refuse_non_finite_features(x: Tensor, cell: Cell, data: LoraCollection) -> None:
    """Raise TrainingError for the first value of x (N, D) that is not finite, naming layer and row."""
    finite = x.isfinite()
    if finite.all():
        return
    row, column = (~finite).nonzero()[0].tolist()
    spec = SPECS[cell.representation]
    if spec.fitted:
        raise TrainingError(f"feature {column} of row {row} is {x[row, column]} as float32")
    positions = positions_of(cell, data)
    place, column_of_layer = divmod(column, x.shape[1] // len(positions))
    layers = data.layers
    names = layers.names if spec.source == "layer" else [module.name for module in layers.modules]
    where = f"feature {column_of_layer} of layer '{names[positions[place]]}', row {row}"
    raise TrainingError(f"{where}, is {x[row, column]} as float32")


# --- from the cache or from the weights


def load_or_extract(context: Context, cells: list[Cell]) -> tuple[Features, dict[Cell, str]]:
    """The features that `cells` need, and the reason for each cell whose features failed."""
    features = Features(context.data, context.settings.pca_components)
    failures: dict[Cell, str] = {}
    audits = [name for name in context.settings.audit if any(cell.audit == name for cell in cells)]
    # An audit's change is measured against the features of the unchanged rows, so those are needed too.
    needed = {name for audit in ("", *audits) for name in extracted_names(cells, audit)}
    names = [name for name in SPECS if name in needed]
    errors = extract_absent(context, names, features)
    failures |= failures_of(cells, errors)
    for name in audits:
        data, settings = context.data, context.settings
        tested = np.arange(data.num_rows) if settings.folds else data.split.test
        audit = AUDIT_CLASSES[name].of_test_rows(data.num_rows, tested, settings.audit_rows)
        features.audits[name] = audit
        names = extracted_names(cells, name)
        if names:
            log.info(f"Computing {', '.join(names)} of the rows that the {name} audit changes")
            features.changed[name], errors = extract_logged(context, names, audit)
            failures = failures_of([cell for cell in cells if cell.audit == name], errors) | failures
    return features, failures


def extract_absent(context: Context, names: list[str], features: Features) -> dict[str, Exception]:
    """Put `names` into `features.computed`, from the cache or from a pass over the weights.
    Returns the errors of those that failed.
    """
    cache = open_cache(context)
    if cache is None:
        return extract_to(features, context, names, None)
    stored = [name for name in names if os.path.lexists(cache.path(name))]
    load_cached(context, cache, stored, features)
    if features.computed.keys() >= set(names):
        remove_blocks(cache)
        return {}
    with locked(cache.folder / "features"):  # of several commands that share the cache one does the work
        late = [name for name in names if name not in stored and os.path.lexists(cache.path(name))]
        load_cached(context, cache, late, features)
        absent = [name for name in names if name not in features.computed]
        kept = kept_blocks(context, cache, absent)
        try:
            errors = extract_to(features, context, absent, kept)
        except InputError:  # also if the data changed: it is not known since when
            remove_tree(cache.folder / ".unfinished")
            raise
        computed = {name: features.computed[name] for name in absent if name not in errors}
        save_cached(context, cache, computed)
        if kept:
            kept.remove()
    return errors


def remove_blocks(cache: FeatureCache) -> None:
    """Remove the blocks of a pass that was killed at its end, unless another process has a pass."""
    if (cache.folder / ".unfinished").exists():
        with contextlib.suppress(Held, OSError), locked(cache.folder / "features", wait=False):
            remove_tree(cache.folder / ".unfinished")  # another user's stay


def kept_blocks(context: Context, cache: FeatureCache, names: list[str]) -> Unfinished | None:
    """Where blocks of rows are kept until the pass over the weights is finished; None for a single block.

    Raises InputError if the disk has no room for the features.
    """
    size = sum(4 * math.prod(shape_of(context, name)) for name in names)
    present = sum(file.stat().st_size for file in (cache.folder / ".unfinished").rglob("*") if file.is_file())
    free = shutil.disk_usage(cache.folder).free
    if size > free + present:
        raise InputError(
            f"the feature cache needs {size / 1e6:,.1f} MB, {cache.folder} has {free / 1e6:,.1f} MB free: "
            "make room, give another --cache-dir, or --no-cache-features"
        )
    if not names or context.data.num_rows <= BLOCK_ROWS:
        return None
    if 2 * size > free + present:
        log.warning(
            f"blocks of features are not kept while others are computed: that needs {2 * size / 1e6:,.1f} MB"
        )
        remove_tree(cache.folder / ".unfinished")
        return None
    # Of every representation, so that the blocks are found whichever of them are still missing.
    made_with = {name: cache.description(name) for name, spec in SPECS.items() if not spec.fitted}
    return Unfinished(cache.folder, "features", made_with | computed_by(context.device))


def extract_to(
    features: Features, context: Context, names: list[str], kept: Unfinished | None
) -> dict[str, Exception]:
    """Put features from a pass over the weights into `features.computed`. Returns the errors."""
    if not names:
        return {}
    log.info(f"Computing {', '.join(names)}")
    computed, errors = extract_logged(context, names, kept=kept)
    features.computed |= computed
    return errors


def shape_of(context: Context, name: str) -> tuple[int, int]:
    """Rows and columns of a representation's features of all layers or modules."""
    layers = context.data.layers
    count = len(layers if SPECS[name].source == "layer" else layers.modules)
    return context.data.num_rows, count * context.settings.width_of(name)


def extracted_names(cells: list[Cell], audit: str) -> list[str]:
    """The representations that cells with this audit
    ('': without one) need from the pass over the weights.
    """
    needed = {name for cell in cells if cell.audit == audit for name in components_of(cell.representation)}
    return [name for name, spec in SPECS.items() if name in needed and not spec.fitted]


def failures_of(cells: list[Cell], errors: dict[str, Exception]) -> dict[Cell, str]:
    """The reason for each cell that needs a representation which failed."""
    failures: dict[Cell, str] = {}
    for cell in cells:
        for name in components_of(cell.representation):
            if name in errors:
                failures.setdefault(cell, f"features of {name}: {describe_error(errors[name])}")
    return failures


def extract_logged(
    context: Context, names: list[str], audit: Audit | None = None, kept: Unfinished | None = None
) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Features of every row, or of an audit's changed rows,
    and the errors; with a line and times in the log.
    """
    data, settings = context.data, context.settings
    widths = {name: settings.width_of(name) for name in names}
    request = Request(data, widths, settings.sketch_size, audit)
    with Progress(len(data.layers), "layers") as progress:
        extracted = extract_features(request, progress.advance, kept)
    context.clock.add("read", extracted.reading)
    context.clock.add("features", extracted.computing)
    data.files.refuse_changes()
    if data.weights.largest > LARGE:
        log.warning(
            f"weights up to {data.weights.largest:.3g}: features that are beyond float32 fail their cells"
        )
    megabytes = data.weights.block_weights * 4 / 1e6
    log.info(
        f"Features of {request.num_rows} rows x {len(data.layers)} layers, in blocks of "
        f"{min(BLOCK_ROWS, data.num_rows)} rows ({megabytes:.1f} MB a layer at most): "
        f"{extracted.reading + extracted.computing:.1f}s (reading {extracted.reading:.1f}s, "
        f"computing {extracted.computing:.1f}s)"
    )
    return extracted.features, extracted.errors


def open_cache(context: Context) -> FeatureCache | None:
    """The feature cache of this data set; None if the settings want none, or its folder cannot be made."""
    settings, data = context.settings, context.data
    if settings.cache_folder is None:
        return None

    def description_of(name: str) -> dict:
        return {"version": SPECS[name].version, **settings.options_of(name)}

    cache = FeatureCache(settings.cache_folder, data.files.identity, data.layers.names, description_of)
    try:
        make_folder(cache.folder)
    except CannotWrite as error:
        log.warning(f"features are not cached: {error}")
        return None
    return cache


def load_cached(context: Context, cache: FeatureCache, names: list[str], features: Features) -> None:
    """Put the cached ones of `names` into `features.computed`;
    a damaged or outdated file is logged and left out.
    """
    with context.clock("features"), Progress(None, "loading cached features"):
        for name in names:
            x, problem = cache.load(name, shape_of(context, name))
            if problem:
                log.warning(f"cached features of {name} are not used: {problem}; computing them again")
            elif x is not None:
                features.computed[name] = torch.from_numpy(x)
    found = [name for name in names if name in features.computed]
    if found:
        log.info(f"Cached features: {', '.join(found)}")


def save_cached(context: Context, cache: FeatureCache, computed: dict[str, Tensor]) -> None:
    """Cache features; a disk that does not take them is logged, and the experiment goes on."""
    with context.clock("features"), Progress(len(computed), "representations cached") as progress:
        for name, x in computed.items():
            try:
                cache.save(name, x.numpy())
            except OSError as error:
                log.warning(f"features of {name} are not cached: {error}")
            progress.advance()
