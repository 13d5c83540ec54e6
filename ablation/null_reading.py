"""What random halves of the modules keep of the class, beside the visual and the text half.

A closed-form reader (`ridge.py`) reads each of them by the run's own folds or splits, for each representation
of the table and for one of the products. Its answers lie in `null/<representation>.safetensors` of the output
folder, so that a command that was killed goes on; `null.py` says what they mean. No cell depends on them.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ablation.analysis_plan import reads_product, why_no_null
from ablation.catalogue import MAIN_COMPARISON, NULL_HALVES, NULL_PRODUCT, NULL_VERSION, SPECS, components_of
from ablation.cell_columns import Features, cell_columns
from ablation.cells import Cell
from ablation.collection import View
from ablation.context import Context, Ledger, NullAnswers
from ablation.features import load_or_extract
from ablation.half_reader import ModuleColumns, read_view
from ablation.halves import ModuleSets, module_sets
from ablation.log import Progress, describe_error
from ablation.splits import Split, split_names
from ablation.stopping import end_if_stopped
from ablation.streamed import Matrix, some
from ablation.task import TrainingError
from checkpointing import KeptArrays, hash_of
from representations import PRODUCT_REPRESENTATIONS, ModuleBatch

log = logging.getLogger("visual_ablation")

# Where a data set has more rows, so many are read in each split, and so many tested in all.
TRAIN_ROWS, VAL_ROWS, TEST_ROWS = 1000, 500, 5000
SAMPLE_SEED = 0


def null_cells(context: Context, ledger: Ledger) -> list[Cell]:
    """Find out what the null has and lacks, for the ledger. Returns the cells whose features it needs."""
    reason = why_no_null(context.settings, context.data)
    if reason:
        ledger.null = NullAnswers(skipped=reason)
        return []
    found = {name: arrays for name, kept in null_files(context).items() if (arrays := kept.load(name))}
    missing = [name for name in null_representations(context) if name not in found]
    ledger.null = NullAnswers(found, missing)
    chosen = context.settings.representations
    return [Cell(name, MAIN_COMPARISON.first) for name in ledger.null.missing if name in chosen]


def null_representations(context: Context) -> list[str]:
    """The representations of the table that have columns for each layer or module, and the null's own."""
    chosen = [name for name in context.settings.representations if not SPECS[name].fitted]
    return list(dict.fromkeys([*chosen, *([NULL_PRODUCT] if reads_product(context.data) else [])]))


def null_files(context: Context) -> dict[str, KeptArrays]:
    """Where the answers of each representation are kept, also of those that another command chose."""
    data, sets = context.data, module_sets(context.data.layers)
    views = [
        [
            view.labels.tolist(),
            view.is_weighted,
            [[part.tolist() for part in split[:3]] for split in splits_of(view)],
        ]
        for view in views_of_tables(context)
    ]
    rows = [TRAIN_ROWS, VAL_ROWS, TEST_ROWS, SAMPLE_SEED]
    masks = [sets.named.tolist(), sets.halves.tolist(), sets.tuning.tolist()]
    shared = hash_of([NULL_VERSION, rows, masks, views, data.files.identity, data.layers.names])
    return {
        name: KeptArrays(
            context.store.folder / "null",
            {
                "shared": shared,
                "versions": [[part, SPECS[part].version] for part in (name, *components_of(name))],
                "cache_dtype": context.settings.cache_dtype,
                **context.settings.options_of(name),
            },
        )
        for name, spec in SPECS.items()
        if not (spec.fitted or spec.control)
    }


def views_of_tables(context: Context) -> list[View]:
    """The splits of the tables: the first one, and further ones of its kind."""
    first = context.settings.split[0]
    names = [name for name in split_names(context.settings) if not name or name.startswith(first)]
    return [context.view_of(Cell("", "", split=name)) for name in names]


def splits_of(view: View) -> tuple[Split, ...]:
    """The folds of a view, or its only split."""
    return view.folds or (view.split,)


def read_null(context: Context, ledger: Ledger, features: Features | None = None) -> None:
    """Read the halves by the representations that are missing, and add the answers to the ledger.

    `features` are those that are there already. An error is logged and noted in the ledger: the cells do not
    depend on it, but the command has not done its work.
    """
    if not ledger.null.missing:
        return
    try:
        with context.clock("null"):
            read_halves(context, ledger, {} if features is None else features.computed)
    except Exception as error:
        end_if_stopped()
        ledger.null.failed = describe_error(error)
        if not isinstance(error, TrainingError | OSError):  # their message says it all
            log.error(traceback.format_exc().rstrip())
        log.error(f"Random halves FAILED: {ledger.null.failed}")


def read_halves(context: Context, ledger: Ledger, computed: dict[str, Matrix]) -> None:
    """Read the halves by each representation, and keep its answers as soon as they are there."""
    null, chosen = ledger.null, context.settings.representations
    absent = [
        Cell(name, MAIN_COMPARISON.first)
        for name in null.missing
        if name in chosen and not set(components_of(name)) <= computed.keys()
    ]
    if absent:
        further, failures = load_or_extract(context, absent)
        if failures:
            raise TrainingError(next(iter(failures.values())))
        computed = computed | further.computed
    reading, files = NullReading(context, computed), null_files(context)
    left = len(null.missing)
    by = f"{left} representation{'s' * (left > 1)} (ridge regression)"
    log.info(f"Reading {NULL_HALVES} random halves of the modules by {by}")
    count = left * len(reading.fits)
    with threadpool_limits(1, "blas"), Progress(count, "fits of random halves") as progress:
        for name in list(null.missing):
            try:
                null.arrays[name] = reading.answers(name, progress.advance)
            except (TrainingError, np.linalg.LinAlgError) as error:  # the others are read
                null.failed = f"{name}: {error}"
                log.error(f"Random halves FAILED: {null.failed}")
                continue
            files[name].save(name, null.arrays[name])
            null.missing.remove(name)


@dataclass
class NullReading:
    """Reads random halves of one data set."""

    context: Context
    computed: dict[str, Matrix]  # features by representation

    @cached_property
    def sets(self) -> ModuleSets:
        """The halves, and what stands beside them."""
        return module_sets(self.context.data.layers)

    @cached_property
    def views(self) -> list[tuple[View, list[Split]]]:
        """The splits of the tables, each with the rows of its fits.

        Of many rows some are read: the first of each part in one random order of all rows.
        """
        order = np.random.default_rng(SAMPLE_SEED).permutation(self.context.data.num_rows)

        def fewer(rows: np.ndarray, most: int) -> np.ndarray:
            return rows if len(rows) <= most else rows[np.argsort(order[rows])[:most]]

        found = []
        for view in views_of_tables(self.context):
            splits = splits_of(view)
            tested = fewer(np.unique(np.concatenate([split.test for split in splits])), TEST_ROWS)
            fits = [
                split._replace(
                    train=fewer(split.train, TRAIN_ROWS),
                    val=fewer(split.val, VAL_ROWS),
                    test=split.test[np.isin(split.test, tested)],
                )
                for split in splits
            ]
            found.append((view, fits))
        return found

    @property
    def fits(self) -> list[Split]:
        """The rows of every fit of the reader for one representation."""
        return [fit for _, fits in self.views for fit in fits]

    def answers(self, name: str, on_fit: Callable[[], None]) -> dict[str, np.ndarray]:
        """What each set makes of the test rows of each view v, under `<key>.<v>`; see `read_view`."""
        columns = self.columns_of(name)
        arrays = {
            "is_text_equal": np.array(self.sets.is_text_equal),
            "train_rows": np.array(max(len(fit.train) for fit in self.fits)),
        }
        for v, (view, fits) in enumerate(self.views):
            of_view = read_view(columns, view, fits, self.sets, on_fit)
            arrays |= {f"{key}.{v}": values for key, values in of_view.items()}
        return arrays

    def columns_of(self, name: str) -> ModuleColumns:
        """The columns of a representation of all layers."""
        if name not in self.context.settings.representations:
            return self.product_columns()
        layers, cell = self.context.data.layers, Cell(name, MAIN_COMPARISON.first)
        x = cell_columns(self.computed, cell, self.context.data)
        owners = self.sets.module_of
        if SPECS[name].source == "module":
            owners = owners[[module.down for module in layers.modules]]
        modules = np.repeat(owners, x.shape[1] // len(owners))
        order = np.argsort(modules, kind="stable")
        return ModuleColumns(
            lambda rows: some(x, torch.from_numpy(rows), 0, x.shape[1])[:, order], modules[order]
        )

    def product_columns(self) -> ModuleColumns:
        """The columns of NULL_PRODUCT, of the rows that are read and no others."""
        data, size = self.context.data, self.context.settings.sketch_size
        layers, describe = data.layers, PRODUCT_REPRESENTATIONS[NULL_PRODUCT]
        read = np.unique(np.concatenate([part for fit in self.fits for part in fit[:3]]))
        numbers = torch.from_numpy(read)

        def factor(position: int) -> Tensor:
            name = layers.names[position]
            layout = layers.layouts[name]
            return data.weights.read_rows(name, numbers).unflatten(1, (layout.rows, layout.cols))

        owners = self.sets.module_of[[module.down for module in layers.modules]]
        order = np.argsort(owners, kind="stable")
        x = torch.cat(
            [
                describe(ModuleBatch(factor(module.down), factor(module.up), size))
                for module in (layers.modules[i] for i in order)
            ],
            dim=1,
        )
        return ModuleColumns(lambda rows: x[np.searchsorted(read, rows)], np.repeat(owners[order], size**2))
