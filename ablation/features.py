"""The features of all cells, from the cache or from a pass over the weights."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ablation.audits import AUDIT_CLASSES, Audit
from ablation.catalogue import AUDIT_VERSION, SPECS, components_of
from ablation.cell_columns import Features
from ablation.cells import Cell
from ablation.extraction import Request, Seconds, extract_features
from ablation.feature_blocks import BlockPass, remove_merged
from ablation.fields import InputError
from ablation.log import Progress, describe_error
from ablation.provenance import computed_by
from ablation.quantised import decoded, encoded
from ablation.reading import BLOCK_ROWS
from ablation.streamed import Matrix
from checkpointing import CannotWrite, FeatureCache, Unfinished, hash_of, locked, make_folder, remove_tree

if TYPE_CHECKING:
    from ablation.context import Context

log = logging.getLogger("visual_ablation")


LARGE = 1e18  # weights whose squares come near the end of float32


def load_or_extract(context: Context, cells: list[Cell]) -> tuple[Features, dict[Cell, str]]:
    """The features that `cells` need, and the reason for each cell whose features failed."""
    settings = context.settings
    cache = settings.cache_folder / context.data.files.identity if settings.cache_folder else None
    features = Features(context.data, settings.pca_components, settings.memory_gb * 1e9, cache)
    failures: dict[Cell, str] = {}
    for audit, names in passes_of(context, cells):
        computed = features.computed
        if audit is not None:
            features.audits[audit.name] = audit
            computed = features.changed[audit.name] = {}
        errors = extract_absent(context, names, computed, audit) if names else {}
        failures = failures_of(cells, errors, audit) | failures
    return features, failures


def extract_rows(context: Context, cells: list[Cell], rows: range) -> dict[Cell, str]:
    """Make the blocks of features whose first row is in `rows`, for `cells`, and leave them in the cache.

    Whoever makes the last block merges them. Returns the reason for each cell whose features failed. Raises
    InputError if the cache's folder cannot be made or has no room, and CannotWrite.
    """
    failures: dict[Cell, str] = {}
    for audit, needed in passes_of(context, cells):
        cache = open_cache(context, audit)
        if cache is None:
            raise InputError("features without cells need a feature cache that can be written to")
        present: dict[str, Matrix] = {}
        load_cached(context, cache, needed, present, audit)
        names = [name for name in needed if name not in present]
        if not names or (context.data.num_rows <= BLOCK_ROWS and 0 not in rows):
            continue
        if context.data.num_rows <= BLOCK_ROWS:
            errors = extract_absent(context, names, {}, audit)
        else:
            refuse_full_disk(context, cache, names, audit, copies=2)
            blocks = BlockPass(request_of(context, names, audit), blocks_of(context, cache, audit), cache)
            make_blocks(context, blocks, rows)
            if all(map(blocks.has, blocks.starts)):
                merge_blocks(context, blocks)
            errors = blocks.errors
        failures = failures_of(cells, errors, audit) | failures
    return failures


def passes_of(context: Context, cells: list[Cell]) -> list[tuple[Audit | None, list[str]]]:
    """The passes over the weights that cells need, and the representations of each: that of all rows (None),
    then one for each audit.
    """
    data, settings = context.data, context.settings
    audits = [name for name in settings.audit if any(cell.audit == name for cell in cells)]
    # An audit's change is measured against the features of the unchanged rows, so those are needed too.
    needed = {name for audit in ("", *audits) for name in extracted_names(cells, audit)}
    passes: list[tuple[Audit | None, list[str]]] = [(None, [name for name in SPECS if name in needed])]
    for name in audits:
        tested = np.arange(data.num_rows) if settings.folds else data.split.test
        audit = AUDIT_CLASSES[name].of_test_rows(data.num_rows, tested, settings.audit_rows)
        passes.append((audit, extracted_names(cells, name)))
    return passes


def extract_absent(
    context: Context, names: list[str], computed: dict[str, Matrix], audit: Audit | None
) -> dict[str, Exception]:
    """Put `names` into `computed`, from the cache or from a pass over the weights.
    Returns the errors of those that failed.
    """
    cache = open_cache(context, audit)
    if cache is None:
        errors = extract_to(computed, context, request_of(context, names, audit))
        store_in_memory(context, computed)
        return errors
    load_cached(context, cache, names, computed, audit)
    blocks = BlockPass(request_of(context, names, audit), blocks_of(context, cache, audit), cache)
    if computed.keys() >= set(names):
        remove_merged(cache, blocks.kept)
        return {}
    absent = [name for name in names if name not in computed]
    blocks.request = request_of(context, absent, audit)
    try:
        if context.data.num_rows > BLOCK_ROWS and has_room(context, cache, absent, audit):
            return extract_by_blocks(context, blocks, computed)
        return extract_at_once(context, blocks, computed)
    except InputError:  # also if the data changed: it is not known since when
        remove_tree(blocks.kept.folder)
        raise


def extract_by_blocks(
    context: Context, blocks: BlockPass, computed: dict[str, Matrix]
) -> dict[str, Exception]:
    """Put the features of `blocks` into `computed`, by way of files that other processes write too."""
    try:
        make_blocks(context, blocks, range(context.data.num_rows))
        merge_blocks(context, blocks)
    except CannotWrite as error:
        log.warning(f"{error}: the features stay in memory")
    load_cached(context, blocks.cache, blocks.names, computed, blocks.request.audit)
    left = [name for name in blocks.names if name not in computed]
    if left:
        request = request_of(context, left, blocks.request.audit)
        blocks.errors |= extract_to(computed, context, request, blocks.kept)
        store_in_memory(context, computed)
    return blocks.errors


def extract_at_once(context: Context, blocks: BlockPass, computed: dict[str, Matrix]) -> dict[str, Exception]:
    """Put features into `computed` and cache them: of one block of rows, or where the disk has no room for
    more than the cache.
    """
    cache, audit = blocks.cache, blocks.request.audit
    with locked(cache.folder / "features"):  # of several commands that share the cache one does the work
        load_cached(context, cache, blocks.names, computed, audit)
        absent = [name for name in blocks.names if name not in computed]
        if not absent:
            return {}
        errors = extract_to(computed, context, request_of(context, absent, audit))
        save_cached(context, cache, {name: computed[name] for name in absent if name not in errors})
        store_in_memory(context, computed)
        return errors


def make_blocks(context: Context, blocks: BlockPass, rows: range) -> None:
    """Make the blocks of some rows, with a line and times in the log. Raises CannotWrite."""
    announce_pass(blocks.request)
    began = time.perf_counter()
    with Progress(len(context.data.layers), "layers") as progress:
        blocks.on_layers = progress.advance
        blocks.make(rows)
    note_pass(context, blocks.request, blocks.seconds.shared(time.perf_counter() - began))


def merge_blocks(context: Context, blocks: BlockPass) -> None:
    """Write the cache's files from all blocks, and remove these. Raises CannotWrite."""
    with context.clock("features"), Progress(None, "writing the features"):
        with locked(blocks.cache.folder / "features"):
            blocks.merge()
        remove_merged(blocks.cache, blocks.kept)


def blocks_of(context: Context, cache: FeatureCache, audit: Audit | None) -> Unfinished:
    """Where blocks of rows are kept until the pass over the weights is finished."""
    # Of every representation, so that the blocks are found whichever of them are still missing.
    made_with = {name: cache.description(name) for name, spec in SPECS.items() if not spec.fitted}
    name = f"features{cache.variant}" if audit is not None else "features"
    return Unfinished(cache.folder, name, made_with | computed_by(context.device))


def has_room(context: Context, cache: FeatureCache, names: list[str], audit: Audit | None) -> bool:
    """True if the disk has room for the blocks of these features and for the cache's files.

    If not, blocks that are there make room for the files. Raises InputError if the files have none either.
    """
    refuse_full_disk(context, cache, names, audit)
    try:
        refuse_full_disk(context, cache, names, audit, copies=2)
    except InputError as error:
        log.warning(
            f"blocks of features are not kept, and the features stay in memory until the end: {error}"
        )
        remove_tree(cache.folder / ".unfinished")
        return False
    return True


def refuse_full_disk(
    context: Context, cache: FeatureCache, names: list[str], audit: Audit | None, copies: int = 1
) -> None:
    """Raise InputError if the disk has no room for so many copies of the features."""
    stored = np.dtype(cache.dtype).itemsize + 4 * (copies - 1)  # bytes of a number; blocks are float32
    size = stored * sum(math.prod(shape_of(context, name, audit)) for name in names)
    present = sum(file.stat().st_size for file in (cache.folder / ".unfinished").rglob("*") if file.is_file())
    free = shutil.disk_usage(cache.folder).free
    if size > free + present:
        raise InputError(
            f"the feature cache needs {size / 1e6:,.1f} MB, {cache.folder} has {free / 1e6:,.1f} MB free: "
            "make room, give another --cache-dir, or --no-cache-features"
        )


def extract_to(
    computed: dict[str, Matrix], context: Context, request: Request, kept: Unfinished | None = None
) -> dict[str, Exception]:
    """Put features from a pass over the weights into `computed`, in memory. Returns the errors."""
    announce_pass(request)
    with Progress(len(context.data.layers), "layers") as progress:
        extracted = extract_features(request, progress.advance, kept)
    note_pass(context, request, Seconds(extracted.reading, extracted.computing))
    computed |= extracted.features
    return extracted.errors


def announce_pass(request: Request) -> None:
    """Log what a pass over the weights computes."""
    of_rows = f" of the rows that the {request.audit.name} audit changes" if request.audit else ""
    log.info(f"Computing {', '.join(request.widths)}{of_rows}")


def note_pass(context: Context, request: Request, seconds: Seconds) -> None:
    """Log what a pass over the weights took. Raises InputError if the data set's files changed meanwhile."""
    data = context.data
    context.clock.add("read", seconds.read)
    context.clock.add("features", seconds.describe)
    data.weights.free_buffers.clear()
    data.files.refuse_changes()
    if data.weights.largest > LARGE:
        log.warning(
            f"weights up to {data.weights.largest:.3g}: features that are beyond float32 fail their cells"
        )
    megabytes = data.weights.block_weights * 4 / 1e6
    log.info(
        f"Features of {request.num_rows} rows x {len(data.layers)} layers, in blocks of "
        f"{min(BLOCK_ROWS, data.num_rows)} rows ({megabytes:.1f} MB a layer at most): "
        f"{seconds.read + seconds.describe:.1f}s (reading {seconds.read:.1f}s, "
        f"computing {seconds.describe:.1f}s)"
    )


def request_of(context: Context, names: list[str], audit: Audit | None) -> Request:
    """What a pass over the weights computes."""
    settings = context.settings
    return Request(
        context.data, {name: settings.width_of(name) for name in names}, settings.sketch_size, audit
    )


def shape_of(context: Context, name: str, audit: Audit | None = None) -> tuple[int, int]:
    """Rows and columns of a representation's features of all layers or modules."""
    request = request_of(context, [name], audit)
    return request.num_rows, request.count(name) * request.widths[name]


def extracted_names(cells: list[Cell], audit: str) -> list[str]:
    """The representations that cells with this audit
    ('': without one) need from the pass over the weights.
    """
    needed = {name for cell in cells if cell.audit == audit for name in components_of(cell.representation)}
    return [name for name, spec in SPECS.items() if name in needed and not spec.fitted]


def failures_of(cells: list[Cell], errors: dict[str, Exception], audit: Audit | None) -> dict[Cell, str]:
    """The reason for each cell that needs a representation which failed; of an audit's pass, its cells."""
    failures: dict[Cell, str] = {}
    for cell in cells:
        for name in components_of(cell.representation):
            if name in errors and (audit is None or cell.audit == audit.name):
                failures.setdefault(cell, f"features of {name}: {describe_error(errors[name])}")
    return failures


def open_cache(context: Context, audit: Audit | None = None) -> FeatureCache | None:
    """The feature cache of this data set, or of its rows as an audit changes them; None if the settings want
    none, or its folder cannot be made.
    """
    settings, data = context.settings, context.data
    if settings.cache_folder is None:
        return None
    changes, variant = {}, ""
    if audit is not None:
        changes = {"audit": audit.name, "audit_version": AUDIT_VERSION, "rows": hash_of(audit.rows)}
        variant = f".{audit.name}-{hash_of(changes)[:8]}"

    def description_of(name: str) -> dict:
        return {"version": SPECS[name].version, **settings.options_of(name), **changes}

    dtype = settings.cache_dtype
    if dtype != "float32":
        changes["cache_dtype"], variant = dtype, f"{variant}.{dtype}"
    names = data.layers.names
    cache = FeatureCache(settings.cache_folder, data.files.identity, names, description_of, variant)
    cache.dtype = dtype
    try:
        make_folder(cache.folder)
    except CannotWrite as error:
        log.warning(f"features are not cached: {error}")
        return None
    return cache


def store_in_memory(context: Context, computed: dict[str, Matrix]) -> None:
    """Give features in memory the numbers that they would have from the cache."""
    dtype = context.settings.cache_dtype
    for name, x in computed.items():
        if dtype != "float32" and isinstance(x, Tensor):
            computed[name] = decoded(encoded(x.numpy(), dtype))


def load_cached(
    context: Context, cache: FeatureCache, names: list[str], computed: dict[str, Matrix], audit: Audit | None
) -> None:
    """Put the cached ones of `names` into `computed`, mapped into memory;
    a damaged or outdated file is logged and left out.
    """
    found = []
    with context.clock("features"), Progress(None, "loading cached features"):
        for name in names:
            arrays, problem = cache.load(name, shape_of(context, name, audit))
            if problem:
                log.warning(f"cached features of {name} are not used: {problem}; computing them again")
                with contextlib.suppress(OSError):  # another user's stays, and features stay in memory
                    remove_tree(cache.path(name))
            elif arrays is not None:
                computed[name] = decoded(arrays)
                found.append(name)
    if found:
        log.info(f"Cached features{f' of the {audit.name} audit' if audit else ''}: {', '.join(found)}")


def save_cached(context: Context, cache: FeatureCache, computed: dict[str, Matrix]) -> None:
    """Cache features; a disk that does not take them is logged, and the experiment goes on."""
    with context.clock("features"), Progress(len(computed), "representations cached") as progress:
        for name, x in computed.items():
            try:
                cache.save(name, encoded(x.to("cpu").numpy(), cache.dtype))
            except OSError as error:
                log.warning(f"features of {name} are not cached: {error}")
            progress.advance()
