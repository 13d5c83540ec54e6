"""An open data set -> a collection of LoRAs:
labels, classes, groups, metadata columns, layers, weights, splits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from ablation.catalogue import METADATA_COLUMNS, PARTS
from ablation.columns import Columns, group_column_of, numeric_columns, refuse_columns
from ablation.controls import labels_for
from ablation.fields import InputError
from ablation.layers import Layers, is_layer, layers_of
from ablation.reading import WeightReader, layout_of
from ablation.settings import Settings
from ablation.shards import ShardReader, Shards, find_shards, layouts_of
from ablation.sources import open_dataset
from ablation.splits import Split, SplitSpec, fold_splits, split_rows, split_spec
from checkpointing import file_stamps, identify

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("visual_ablation")

FEWER_SEED = 0  # of the choice of fewer training rows


class View(NamedTuple):
    """The rows as one cell sees them: class numbers (N,), possibly shuffled, and the parts of a split.

    In cross-validation `folds` has a split for each fold of each partition, and `split` is the first.
    `is_weighted`: whole groups are held out, so that classes are uneven, and the loss weighs them alike.
    """

    labels: np.ndarray
    split: Split
    folds: tuple[Split, ...] = ()
    is_weighted: bool = False

    def split_of(self, fold: int) -> Split:
        """The split of a run with that number among `folds`."""
        return self.folds[fold] if self.folds else self.split

    def fold(self, number: int) -> View:
        """The rows with one fold's split alone."""
        return self._replace(split=self.split_of(number), folds=())

    def with_train_share(self, percent: int) -> View:
        """The same with `percent` of each class's training rows, at least one. Larger shares hold the rows of
        smaller ones.
        """

        def fewer(split: Split) -> Split:
            shuffled = np.random.default_rng(FEWER_SEED).permutation(split.train)
            by_class = [shuffled[self.labels[shuffled] == c] for c in np.unique(self.labels[split.train])]
            kept = np.concatenate([rows[: max(1, round(percent / 100 * len(rows)))] for rows in by_class])
            return split._replace(train=split.train[np.isin(split.train, kept)])

        return self._replace(split=fewer(self.split), folds=tuple(map(fewer, self.folds)))

    def labels_by_part(self, fold: int = 0) -> dict[str, np.ndarray]:
        """Class numbers of the rows of train, val and test."""
        return {part: self.labels[self.split_of(fold).rows(part)] for part in PARTS}


@dataclass
class SourceFiles:
    """The files behind a data set (none for generated rows) and the hash of the weights in them."""

    paths: list[str]
    stamps: list = field(default_factory=list)  # sizes and times from before the weights were hashed
    identity: str = ""  # content hash of the layers, once known

    def identify(self, scope: list, compute: Callable[[], str], cache_dir: Path | None) -> bool:
        """Set `identity` to `compute()`, or to what was remembered of unchanged files.
        True if it was remembered.

        `scope` says which rows and columns of the files the hash covers.
        """
        self.stamps = file_stamps(self.paths)
        self.identity, remembered = identify(self.paths, scope, compute, cache_dir)
        return remembered

    def refuse_changes(self) -> None:
        """Raise InputError if a file was written to since `identify`."""
        try:
            unchanged = file_stamps(self.paths) == self.stamps
        except OSError:  # a file is gone
            unchanged = False
        if not unchanged:
            raise InputError(
                "the files of the data set changed while they were read: run again when nothing writes to "
                "them"
            )


@dataclass
class LoraCollection:
    """A collection of LoRAs, one a row. `labels` (N,) int64 are positions in `classes`."""

    weights: WeightReader
    layers: Layers
    labels: np.ndarray
    classes: list[str | int]
    first: View  # the rows with their labels and the first split
    files: SourceFiles
    groups: np.ndarray | None = None  # (N,) numbers of what rows have in common; None without such a column
    group_column: str = ""  # where the groups stand
    # (N,) float64 each, NaN where a row has no value.
    metadata: dict[str, np.ndarray] = field(default_factory=dict)
    views: dict[tuple[SplitSpec | None, str, int], View] = field(default_factory=dict)  # kept by `view`

    @property
    def split(self) -> Split:
        """The first split; in cross-validation the first fold."""
        return self.first.split

    @property
    def num_rows(self) -> int:
        """LoRAs in the collection."""
        return len(self.labels)

    @property
    def metadata_varies(self) -> bool:
        """True if a metadata column varies over the training rows, or is missing in some of them."""
        return any(len(np.unique(values[self.split.train])) > 1 for values in self.metadata.values())

    def view(self, spec: SplitSpec | None = None, labels: str = "", train_percent: int = 100) -> View:
        """The rows with the split `spec` (None: the first split), with `train_percent` of its training rows,
        and, if `labels` is "shuffled", with other rows' labels.

        Raises InputError if that split is not possible.
        """
        key = (spec, labels, train_percent)
        if key not in self.views:
            view = self.first if spec is None else make_view(self.labels, spec, self.groups, self.classes)
            view = view._replace(labels=labels_for(labels, self.labels))
            self.views[key] = view if train_percent == 100 else view.with_train_share(train_percent)
        return self.views[key]

    def shared_groups(self, split: Split) -> int:
        """How many test rows share their group with a training row."""
        if self.groups is None:
            return 0
        return int(np.isin(self.groups[split.test], self.groups[split.train]).sum())

    def summary(self) -> dict:
        """Numbers that describe the collection, for the log, results.json and the report."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        layouts = [self.layers.layouts[layer] for layer in self.layers.names]
        return {
            "rows": self.num_rows,
            "classes": len(self.classes),
            "rows_per_class": {
                str(name): int(count) for name, count in zip(self.classes, counts, strict=True)
            },
            "layers": self.layers.count_words(),
            "architecture": self.layers.found.title,
            "ranks": sorted({min(layout.rows, layout.cols) for layout in layouts}),
            "weights_per_row": self.layers.weights_per_row,
            "split": {part: len(self.split.rows(part)) for part in PARTS},
        }


def make_view(
    labels: np.ndarray, spec: SplitSpec, groups: np.ndarray | None, classes: list[str | int]
) -> View:
    """The rows with the split, or the folds, that `spec` describes. Raises InputError if they cannot be."""
    if not spec.folds:
        return View(labels, split_rows(len(labels), spec, labels, groups, classes))
    folds = tuple(fold_splits(len(labels), spec, labels, groups))
    return View(labels, folds[0], folds, spec.resolved(groups is not None).kind == "grouped")


def load_collection(settings: Settings, device: str) -> LoraCollection:
    """Open the data set of the settings and check its columns, labels and layer sets; no weight is read."""
    where = (settings.dataset, settings.data_split, settings.revision)
    columns = Columns(settings.label_column, settings.group_column, settings.metadata_columns)
    spec = split_spec(settings, "")
    if settings.streaming:
        collection = collect_shards(find_shards(*where), device, columns, spec)
    else:
        collection = collect_rows(open_dataset(*where), settings.dataset, device, columns, spec)
    names, layouts = collection.layers.names, collection.layers.layouts
    return dataclasses.replace(collection, layers=layers_of(settings, names, layouts))


def collect_rows(
    dataset: Dataset,
    name: str,
    device: str = "cpu",
    columns: Columns = Columns(),  # noqa: B008 (immutable)
    spec: SplitSpec = SplitSpec("random", 42),  # noqa: B008 (immutable)
) -> LoraCollection:
    """The collection in an open data set, whose `name` errors mention.

    Raises InputError for a data set without rows, layers, or at least two classes, and for a column of
    `columns` that is not there or of the wrong type.
    """
    if len(dataset) == 0:
        raise InputError(f"data set '{name}' has no rows")
    if (
        dataset._indices is not None
    ):  # after select or shuffle the Arrow buffers hold other rows, or another order
        dataset = dataset.flatten_indices()
    types = dict(zip(dataset.column_names, dataset.data.schema.types, strict=True))
    refuse_columns(types, name, columns)
    dataset = dataset.with_format("torch", device=device)
    names = sorted(filter(is_layer, dataset.column_names))
    layers = Layers(names, {layer: layout_of(dataset, layer) for layer in names})
    formatted = [layer for layer in names if not layers.layouts[layer].in_arrow]
    if formatted:
        log.warning(
            f"{len(formatted)} layer columns are read through the torch formatter, which is slow: "
            f"'{formatted[0]}' is stored as {dataset.data.column(formatted[0]).type}"
        )
    files = SourceFiles([entry["filename"] for entry in dataset.cache_files])
    return collected(dataset, WeightReader(dataset, layers, device), (name, files), columns, spec)


def collect_shards(shards: Shards, device: str, columns: Columns, spec: SplitSpec) -> LoraCollection:
    """The collection in Parquet shards, whose weights are read once. Raises InputError as `collect_rows`."""
    types = dict(zip(shards.schema.names, shards.schema.types, strict=True))
    refuse_columns(types, shards.name, columns)
    layouts = layouts_of(shards)
    reader = ShardReader(shards, Layers(sorted(layouts), layouts), device)
    files = SourceFiles(shards.urls if shards.is_local else [])
    return collected(shards.small_columns(), reader, (shards.name, files), columns, spec)


def collected(
    rows: Dataset, weights: WeightReader, source: tuple[str, SourceFiles], columns: Columns, spec: SplitSpec
) -> LoraCollection:
    """The collection with the labels, groups and metadata of `rows`. `source`: its name and files."""
    name, files = source
    types = dict(zip(rows.column_names, rows.data.schema.types, strict=True))
    labels, classes = encode_labels(rows, columns.label, name)
    group_column = group_column_of(types, columns)
    groups = encode_groups(rows, group_column) if group_column else None
    return LoraCollection(
        weights=weights,
        layers=weights.layers,
        labels=labels,
        classes=classes,
        first=make_view(labels, spec, groups, classes),
        files=files,
        groups=groups,
        group_column=group_column,
        metadata=read_metadata(rows, columns),
    )


def encode_labels(dataset: Dataset, column: str, name: str) -> tuple[np.ndarray, list[str | int]]:
    """Class numbers (N,) int64 and the classes in their order:
    strings sorted, integers and ClassLabels by number.

    Classes are those that occur in any row. Raises InputError for a null, for other types, and for fewer than
    two classes.
    """
    from datasets import ClassLabel

    stored = dataset.data.column(column)
    if stored.null_count:
        row = int(np.argmax(stored.is_null().to_numpy()))
        raise InputError(f"column '{column}', row {row}: null: every row needs a label")
    values = values_of(stored, column)
    occurring = sorted(set(values))
    feature = dataset.features[column]
    is_class_label = isinstance(feature, ClassLabel)
    if is_class_label and occurring[0] < 0:
        row = values.index(occurring[0])
        raise InputError(f"column '{column}', row {row}: no label: leave out unlabelled rows")
    if is_class_label and occurring[-1] >= feature.num_classes:
        raise InputError(
            f"column '{column}', row {values.index(occurring[-1])}: {occurring[-1]} is no class: the column "
            f"names {feature.num_classes} classes, from 0"
        )
    classes = [feature.int2str(number) for number in occurring] if is_class_label else occurring
    if len(classes) < 2:
        raise InputError(
            f"column '{column}' of data set '{name}' has one class ({classes[0]}): two or more are needed"
        )
    position = {value: i for i, value in enumerate(occurring)}
    return np.array([position[value] for value in values], dtype=np.int64), classes


def values_of(stored: pa.ChunkedArray, column: str) -> list:
    """The values of a column. Raises InputError for text that is no UTF-8, naming the row.

    The formatter's NumPy would drop trailing NULs and wrap uint64.
    """
    try:
        stored.validate(full=True)  # offsets that point nowhere would end the process
        return stored.to_pylist()
    except (UnicodeDecodeError, pa.ArrowInvalid) as damage:
        if "UTF8" not in str(damage):
            raise InputError(f"column '{column}' is damaged: {damage}") from None
        for row, value in enumerate(stored):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"column '{column}', row {row}: its text is no UTF-8 ({error.reason} at byte "
                    f"{error.start}): repair that row"
                ) from None
        raise


def encode_groups(dataset: Dataset, column: str) -> np.ndarray:
    """Group numbers (N,). A row without a group is a group by itself."""
    numbers: dict = {}
    keys = [
        json.dumps(value, default=str) if value is not None else ("row", row)
        for row, value in enumerate(values_of(dataset.data.column(column), column))
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def read_metadata(dataset: Dataset, columns: Columns) -> dict[str, np.ndarray]:
    """The numeric columns of METADATA_COLUMNS that are there,
    and those asked for; (N,) float64 each, NaN for a null.
    """
    types = dict(zip(dataset.column_names, dataset.data.schema.types, strict=True))
    numeric = numeric_columns(types, columns.label)
    metadata = {}
    for column in dict.fromkeys([*METADATA_COLUMNS, *columns.metadata]):
        if column in numeric:
            values = dataset.data.column(column).cast(pa.float64(), safe=False).to_numpy()
            metadata[column] = np.where(np.isfinite(values), values, np.nan)
    return metadata
