"""A data set's name -> rows, labels, split and layers; and one layer of a block of rows as a tensor.

`datasets` and `torch` are imported where they are used: `survey` serves --dry-run without them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from checkpointing import file_stamps, hash_of
from settings import ALIASES, ATTENTION_KINDS, CONTROL_SETS, DATASET_NAMES, GROUP_COLUMN, LAYER_SETS, METADATA_COLUMNS, SHUFFLED, InputError, group_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

log = logging.getLogger("visual_ablation")

BLOCK_ROWS = 1024     # rows of a block; blocks start at its multiples, whatever the memory, the machine or the resumption
READ_AHEAD = 4        # layers at most that are read ahead for a GPU, by as many threads
PIECE = 2**17         # values copied or checked at a time: what that writes stays in a core's cache
DRAWS = 1000          # of a grouped split, among which one may have every class in training
RANDOM_HALF_SEED = 0  # of the layer sets random_half.0, .1, ...
SHUFFLE_SEED = 0      # of the labels that are given to other rows
SMALLEST_SPLIT = 11   # with fewer rows, train = val = test

# The end of a column's name: diffusers' lora.down.weight, PEFT's lora_A.weight and lora_A.<adapter>.weight, kohya's lora_down.weight.
LAYER_NAME = re.compile(r"(?:^|[._])lora(?:_linear_layer)?[._](down|up|A|B)(?:[._]\w+)?[._]weight$")
# What the torch formatter turns into float32 too; everything else is left to it.
FLOATS = (pa.float16(), pa.float32(), pa.float64())


def is_layer(column: str) -> bool:
    return LAYER_NAME.search(column) is not None


def module_and_side(layer: str) -> tuple[str, str]:
    """The name that the two layers of a module share, and which of them this is: down (lora_A) or up (lora_B)."""
    found = LAYER_NAME.search(layer)
    side = "down" if found.group(1) in ("down", "A") else "up"
    return layer[:found.start(1)] + "*" + layer[found.end(1):], side


def attention_kind(layer: str) -> str:
    """attn1 (visual), attn2 (text) or other, in dotted and underscored names."""
    found = re.search(r"(?:^|[._])(attn[12])(?:[._]|$)", layer)
    return found.group(1) if found else "other"


def block_of(layer: str) -> str:
    """The U-Net block of an attention layer, without what stands before it: down_blocks.0.attentions.1."""
    name = re.split(r"[._]attn[12](?=[._])", layer)[0]
    name = re.sub(r"^.*?(?=(?:down_blocks|up_blocks|mid_block)[._])", "", name)
    return re.sub(r"[._]transformer_blocks[._]\d+$", "", name)


def expand_layer_sets(layer_sets: tuple[str, ...], layers: list[str], random_halves: int) -> list[str]:
    """The names with those of groups in place of the group's: random_half.0 ..., by_block.down_blocks.0.attentions.0.attn1 ..."""
    blocks = dict.fromkeys(f"by_block.{block_of(layer)}.{attention_kind(layer)}" for layer in layers if attention_kind(layer) != "other")
    groups = {"random_half": [f"random_half.{draw}" for draw in range(random_halves)], "by_block": list(blocks)}
    return [name for layer_set in layer_sets for name in groups.get(layer_set, [layer_set])]


# --- one column of matrices in Arrow memory


class Matrices(NamedTuple):
    """How a column holds one (rows, cols) matrix a row, read off its Arrow type and its first row."""

    column: str
    rows: int
    cols: int
    dtype: str      # of a stored weight
    in_arrow: bool  # False: only the formatter can read it


def storage_of(kind: pa.DataType) -> pa.DataType:
    """What Array2D is made of; other types stand for themselves."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def weight_type(kind: pa.DataType) -> pa.DataType | None:
    """The float type of a column of matrices (two levels of lists), or None for a layout that this module cannot read."""
    kind = storage_of(kind)
    if is_list(kind) and is_list(kind.value_type) and kind.value_type.value_type in FLOATS:
        return kind.value_type.value_type
    return None


def unlist(array: pa.Array, size: int, matrices_each: int, column: str, first_row: int) -> pa.Array:
    """The items of a list array whose every list must hold `size` of them; `matrices_each` lists belong to one row.

    Consecutive offsets are compared one by one: ragged rows whose totals happen to fit are found too.
    """
    refuse_nulls(array, matrices_each, column, first_row)
    fixed = pa.types.is_fixed_size_list(array.type)
    offsets = np.array([0, array.type.list_size]) if fixed else array.offsets.to_numpy()
    for start in range(0, len(offsets) - 1, PIECE):
        lengths = np.diff(offsets[start:start + PIECE + 1])
        if lengths.min() != size or lengths.max() != size:               # faster than a comparison of each
            wrong = int(np.argmax(lengths != size))
            raise InputError(
                f"column '{column}', row {first_row + (start + wrong) // matrices_each}: a list of {lengths[wrong]} where the column's "
                f"first row has {size}: every row's matrix must have the same shape"
            )
    return array.flatten()                                               # unlike .values, it respects a slice's offset


def refuse_nulls(array: pa.Array, items_each: int, column: str, first_row: int) -> None:
    if array.null_count:
        where = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"column '{column}', row {first_row + where // items_each}: null: every row needs every weight")


def copy_finite(values: np.ndarray, target: np.ndarray) -> bool:
    """Copy to `target`, float32; False if something in it is then not finite.

    As integers the bits of +inf and NaN are the largest of all signed ones, those of -inf and -NaN the largest unsigned: two
    maxima find both faster than np.isfinite.
    """
    finite = True
    for start in range(0, len(values), PIECE):
        piece = target[start:start + PIECE]
        piece[:] = values[start:start + PIECE]
        finite &= bool(piece.view(np.int32).max() < 0x7F800000 and piece.view(np.uint32).max() < 0xFF800000)
    return finite


def refuse_non_finite(weights: np.ndarray, column: str, first_row: int) -> None:
    """`weights` (n, rows, cols)."""
    bad = np.argwhere(~np.isfinite(weights))
    if len(bad):
        row, *place = bad[0]
        raise InputError(
            f"column '{column}', row {first_row + row}: the weight at ({place[0]}, {place[1]}) is {weights[tuple(bad[0])]} "
            "as float32: repair or leave out that row"
        )


class Module(NamedTuple):
    """Two layers whose product up @ down is the change of a matrix of the model; by their positions in `LoraData.layers`."""

    name: str
    down: int
    up: int


# --- the data set


class Split(NamedTuple):
    """Row numbers of the three parts. `overlap`: too few rows to divide, so that all three are the same."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    overlap: bool


def split_rows(num_rows: int, seed: int, kind: str = "random", labels: np.ndarray | None = None, groups: np.ndarray | None = None) -> Split:
    """70/10/20 of the rows.

    `random`: the rows and the order of the origin's two calls of `train_test_split`, which depend on n and seed only.
    `stratified`: every class in these proportions. `grouped`: no group in two parts, these proportions of the groups; of DRAWS
    such splits the first in which no class is without a training row, if there is one. Raises InputError if there are too few
    rows of a class, or too few groups, for that.
    """
    from datasets import Dataset

    rows = np.arange(num_rows)
    if num_rows < SMALLEST_SPLIT:
        return Split(rows, rows, rows, True)
    if kind != "random":
        from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit

        if kind == "grouped" and groups is None:
            raise InputError("--split grouped needs a column of groups: give --group-column")
        try:
            if kind == "stratified":
                train, rest = next(StratifiedShuffleSplit(1, test_size=0.3, random_state=seed).split(rows, labels))
                val, test = next(StratifiedShuffleSplit(1, test_size=0.67, random_state=seed).split(rest, labels[rest]))
            else:
                draws = iter(GroupShuffleSplit(DRAWS, test_size=0.3, random_state=seed).split(rows, labels, groups))
                first, classes = next(draws), len(np.unique(labels))
                whole = (pair for pair in itertools.chain([first], draws) if len(np.unique(labels[pair[0]])) == classes)
                train, rest = next(whole, first)
                val, test = next(GroupShuffleSplit(1, test_size=0.67, random_state=seed).split(rest, labels[rest], groups[rest]))
        except ValueError as error:
            raise InputError(f"--split {kind} is not possible here: {error}") from None
        return Split(train, rest[val], rest[test], False)
    first = Dataset.from_dict({"row": rows}).train_test_split(test_size=0.3, seed=seed)
    second = first["test"].train_test_split(test_size=0.67, seed=seed)
    parts = [np.array(part.with_format("numpy")["row"][:]) for part in (first["train"], second["train"], second["test"])]
    return Split(*parts, False)


@dataclass
class LoraData:
    """A collection of LoRAs, one a row. `labels` (N,) int64 index `classes`; `layers` are its layer columns, sorted."""

    dataset: Dataset                 # with the torch format on the device
    device: str
    layers: list[str]
    matrices: dict[str, Matrices]
    labels: np.ndarray
    classes: list[str | int]
    split: Split
    files: list[str] = field(default_factory=list)   # what the rows are mapped from; empty for generated rows
    named_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)   # layer sets by patterns on layer names
    groups: np.ndarray | None = None   # (N,) what rows have in common, numbered; None without such a column
    metadata: dict[str, np.ndarray] = field(default_factory=dict)   # numeric columns that are no weights, (N,) float64, NaN where a row has none
    others: dict[tuple, LoraData] = field(default_factory=dict)     # `seen_as`
    identity: str = ""               # content hash of the layers, once known
    stamps: list = field(default_factory=list)       # of the files, from before they were hashed
    spare: list[np.ndarray] = field(default_factory=list)   # buffers that nobody uses

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    @cached_property
    def kinds(self) -> list[str]:
        return [attention_kind(layer) for layer in self.layers]

    def layers_of(self, layer_set: str) -> list[int]:
        """Positions in `layers` of those that a layer set keeps; none of a name that means nothing here."""
        if layer_set in LAYER_SETS:
            return [i for i, kind in enumerate(self.kinds) if kind in LAYER_SETS[layer_set].kinds]
        if group_of(layer_set) == "by_block":
            return [i for i, layer in enumerate(self.layers) if layer_set == f"by_block.{block_of(layer)}.{self.kinds[i]}"]
        if group_of(layer_set) == "random_half":
            kept = self.random_half(layer_set)
            return [i for i, layer in enumerate(self.layers) if module_and_side(layer)[0] in kept]
        if layer_set in CONTROL_SETS:
            return [i for i, layer in enumerate(self.layers) if layer_set == f"{module_and_side(layer)[1]}_only"]
        patterns = self.named_sets.get(layer_set, ())
        return [i for i, layer in enumerate(self.layers) if any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)]

    @property
    def metadata_vary(self) -> bool:
        """Whether a metadata column, or whether a row has it, differs among the training rows."""
        return any(len(np.unique(values[self.split.train])) > 1 for values in self.metadata.values())        # NaN is one value

    def seen_as(self, split: tuple[str, int] | None, labels: str = "") -> LoraData:
        """The same rows divided by the split of that kind and seed, or as they are; with `labels` shuffled, each row has another's.

        Raises InputError if that split is not possible.
        """
        if split is None and not labels:
            return self
        if (split, labels) not in self.others:
            shuffled = np.random.default_rng(SHUFFLE_SEED).permutation(self.labels) if labels == SHUFFLED else self.labels
            rows = self.split if split is None else split_rows(self.num_rows, split[1], split[0], self.labels, self.groups)
            self.others[split, labels] = replace(self, split=rows, labels=shuffled, others={})
        return self.others[split, labels]

    def random_half(self, layer_set: str) -> set[str]:
        """Names of modules: of every block as many as it has attn1 modules, drawn from its attn1 and attn2 modules alike."""
        rng = np.random.default_rng([RANDOM_HALF_SEED, *layer_set.encode()])
        blocks: dict[str, dict[str, set[str]]] = {}
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            if kind != "other":
                blocks.setdefault(block_of(layer), {"attn1": set(), "attn2": set()})[kind].add(module_and_side(layer)[0])
        return {str(name) for block in blocks.values()
                for name in rng.choice(sorted(block["attn1"] | block["attn2"]), len(block["attn1"]), replace=False)}

    @cached_property
    def modules(self) -> list[Module]:
        """Every pair of layers, by name. Raises InputError for a pair whose ranks differ: they cannot be multiplied."""
        sides: dict[str, dict[str, int]] = {}
        for position, layer in enumerate(self.layers):
            name, side = module_and_side(layer)
            sides.setdefault(name, {})[side] = position
        found = [Module(name, **both) for name, both in sorted(sides.items()) if len(both) == 2]
        for _, down, up in found:
            down, up = (self.matrices[self.layers[position]] for position in (down, up))
            if down.rows != up.cols:
                raise InputError(f"column '{down.column}' is {down.rows} x {down.cols} and '{up.column}' {up.rows} x {up.cols}: the rows of the "
                                 "first must be the columns of the second; leave out representations of the product and the gauge audit")
        return found

    @cached_property
    def module_at(self) -> dict[int, Module]:
        """The module of a layer, by the layer's position, where it has one."""
        return {position: module for module in self.modules for position in (module.down, module.up)}

    def modules_of(self, layer_set: str) -> list[int]:
        """Positions in `modules` of those that a layer set keeps with both layers."""
        kept = set(self.layers_of(layer_set))
        return [i for i, module in enumerate(self.modules) if {module.down, module.up} <= kept]

    def layers_without_partner(self, layer_set: str) -> list[str]:
        """Layers of the set whose module it cuts apart, or that have none."""
        paired = {position for i in self.modules_of(layer_set) for position in self.modules[i][1:]}
        return [self.layers[position] for position in self.layers_of(layer_set) if position not in paired]

    def read_layer(self, layer: str, start: int, stop: int, buffer: np.ndarray | None = None) -> Tensor:
        """One layer of rows start:stop, (n, rows, cols) float32 on the device, from the Arrow buffers.

        With a `buffer()` the tensor may lie in it.
        Raises InputError, naming the column and the row, for a NaN, an infinity, a null or a matrix of another shape.
        """
        return self.read_on_host(layer, start, stop, buffer).to(self.device)

    def read_on_host(self, layer: str, start: int, stop: int, buffer: np.ndarray | None = None) -> Tensor:
        """The same in the host's memory."""
        import torch

        shape = self.matrices[layer]
        if not shape.in_arrow:
            return self.read_layer_formatted(layer, start, stop).cpu()
        size = (stop - start) * shape.rows * shape.cols
        flat, position, finite = np.empty(size, dtype=np.float32) if buffer is None else buffer[:size], 0, True
        with np.errstate(over="ignore"):                                 # a float64 beyond float32 becomes inf and is refused
            for values in self.stored_values(layer, start, stop):
                finite &= copy_finite(values, flat[position:position + len(values)])
                position += len(values)
        weights = flat.reshape(stop - start, shape.rows, shape.cols)
        if not finite:
            refuse_non_finite(weights, layer, start)
        return torch.from_numpy(weights)

    @property
    def block_weights(self) -> int:
        """Weights of the largest layer in a block of rows."""
        return min(self.num_rows, BLOCK_ROWS) * max(shape.rows * shape.cols for shape in self.matrices.values())

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @cached_property
    def copy_stream(self):
        """The stream that layers are copied to a GPU on, one for good; None on a CPU."""
        import torch

        return torch.cuda.Stream(self.device) if self.on_gpu else None

    @contextlib.contextmanager
    def buffer(self) -> Iterator[np.ndarray]:
        """Memory (block_weights,) float32 for any layer of any block, used again afterwards; pinned where there is a GPU to copy it to."""
        import torch

        try:
            memory = self.spare.pop()
        except IndexError:
            memory = torch.empty(self.block_weights, pin_memory=self.on_gpu).numpy()
        try:
            yield memory
        finally:
            self.spare.append(memory)

    def stored_values(self, layer: str, start: int, stop: int):
        """The stored weights of rows start:stop, chunk by chunk, as flat read-only arrays over Arrow's own memory."""
        shape = self.matrices[layer]
        row = start
        for chunk in self.dataset.data.column(layer).slice(start, stop - start).chunks:
            array = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
            lists = unlist(array, shape.rows, 1, layer, row)
            values = unlist(lists, shape.cols, shape.rows, layer, row)
            refuse_nulls(values, shape.rows * shape.cols, layer, row)
            yield values.to_numpy(zero_copy_only=True)
            row += len(chunk)

    def read_layer_formatted(self, layer: str, start: int, stop: int) -> Tensor:
        """The same through the data set's torch format: slow, and the reference for `read_layer`."""
        shape = self.matrices[layer]
        weights = self.dataset.select_columns([layer])[start:stop][layer]
        if isinstance(weights, list) or weights.shape[1:] != (shape.rows, shape.cols):
            for row, matrix in enumerate(weights, start):
                if getattr(matrix, "shape", None) != (shape.rows, shape.cols):
                    raise InputError(f"column '{layer}', row {row}: not a matrix of {shape.rows} x {shape.cols} as in the first row")
        weights = weights.float()
        refuse_non_finite(weights.cpu().numpy(), layer, start)
        return weights

    def content_hash(self, on_layer: Callable[[], None] = lambda: None) -> str:
        """128-bit xxHash of every layer's name, shape, stored type and weights, row by row; `on_layer()` is called after each.

        It does not depend on where the rows lie, how they are chunked, or on any other column.
        """
        digest = xxhash.xxh3_128()
        for layer in self.layers:
            digest.update(repr((self.num_rows, *self.matrices[layer])).encode())
            for start in range(0, self.num_rows, BLOCK_ROWS):
                stop = min(start + BLOCK_ROWS, self.num_rows)
                if self.matrices[layer].in_arrow:
                    for values in self.stored_values(layer, start, stop):
                        digest.update(values)
                else:
                    digest.update(self.read_layer_formatted(layer, start, stop).cpu().numpy())
            on_layer()
        return digest.hexdigest()

    def card(self) -> dict:
        """What is in it, in numbers."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        shapes = [self.matrices[layer] for layer in self.layers]
        return {
            "rows": self.num_rows,
            "classes": len(self.classes),
            "rows_per_class": {str(name): int(count) for name, count in zip(self.classes, counts, strict=True)},
            "layers": {kind: self.kinds.count(kind) for kind in ATTENTION_KINDS},
            "ranks": sorted({min(shape.rows, shape.cols) for shape in shapes}),
            "weights_per_row": sum(shape.rows * shape.cols for shape in shapes),
            "split": {part: len(getattr(self.split, part)) for part in self.split._fields[:3]},
        }


class ReadAhead:
    """Iterates over `layers` of rows start:stop as tensors on the device, in their order; threads read the next ones meanwhile.

    For a GPU: the copies run on a stream of their own, from pinned buffers; a layer that it has no room for stays in the
    host's memory. `waited` is how many seconds the consumer had to wait.
    """

    def __init__(self, data: LoraData, layers: list[str], start: int, stop: int, threads: int):
        self.data, self.layers, self.start, self.stop, self.threads, self.waited = data, layers, start, stop, min(threads, READ_AHEAD), 0.0

    def __iter__(self) -> Iterator[Tensor]:
        import torch

        stream = self.data.copy_stream
        pool = ThreadPoolExecutor(self.threads)
        jobs = (pool.submit(self.fetch, layer, stream) for layer in self.layers)
        waiting = deque(islice(jobs, self.threads))
        try:
            while waiting:
                began = time.perf_counter()
                w = waiting.popleft().result()
                self.waited += time.perf_counter() - began
                waiting.extend(islice(jobs, 1))
                if w.is_cuda:
                    w.record_stream(torch.cuda.current_stream(w.device))   # its memory is not reused before that is through
                yield w
        finally:
            pool.shutdown(cancel_futures=True)

    def fetch(self, layer: str, stream) -> Tensor:
        import torch

        with self.data.buffer() as buffer:
            weights = self.data.read_on_host(layer, self.start, self.stop, buffer)
            try:
                with torch.cuda.stream(stream):                          # does nothing for None
                    w = torch.empty(weights.shape, device=self.data.device).copy_(weights, non_blocking=True)
            except torch.OutOfMemoryError:
                return weights.clone()
            if stream:
                stream.synchronize()                                     # this thread waits, no other
        return w


def load_lora_data(name: str, device: str = "cpu", *, data_split: str = "", revision: str = "",
                   label_column: str = "category_label", group_column: str = "", metadata_columns: tuple[str, ...] = (),
                   split: str = "random", split_seed: int = 42) -> LoraData:
    """Open a data set by any of its kinds of name (see settings.DATASET_NAMES) and check its columns and labels.

    No weight is read but the first row's shapes. Raises InputError for a name that is none of these, and for a data set
    without rows, layers or at least two classes.
    """
    dataset = open_dataset(name, data_split, revision)
    return from_dataset(dataset, name, device, label_column=label_column, group_column=group_column, metadata_columns=metadata_columns,
                        split=split, split_seed=split_seed)


def from_dataset(dataset: Dataset, name: str, device: str = "cpu", *, label_column: str = "category_label", group_column: str = "",
                 metadata_columns: tuple[str, ...] = (), split: str = "random", split_seed: int = 42) -> LoraData:
    """The same for a `datasets.Dataset` that is already open."""
    if len(dataset) == 0:
        raise InputError(f"data set '{name}' has no rows")
    if dataset._indices is not None:   # after select or shuffle: the Arrow buffers hold other rows, or another order
        dataset = dataset.flatten_indices()
    layers = sorted(column for column in dataset.column_names if is_layer(column))
    if not layers:
        some = ", ".join(dataset.column_names[:5])
        raise InputError(f"data set '{name}' has no LoRA layer: expected columns such as '...lora.down.weight', found {some}")
    if label_column not in dataset.column_names:
        others = [column for column in dataset.column_names if not is_layer(column)]
        raise InputError(f"data set '{name}' has no column '{label_column}': give --label-column, one of {', '.join(others) or '(none)'}")
    dataset = dataset.with_format("torch", device=device)
    labels, classes = encode_labels(dataset, label_column, name)
    matrices = {layer: matrices_of(dataset, layer) for layer in layers}
    unusual = [layer for layer in layers if not matrices[layer].in_arrow]
    if unusual:
        log.warning(f"{len(unusual)} layer columns are read through the torch formatter, which is slow: "
                    f"'{unusual[0]}' is stored as {dataset.data.column(unusual[0]).type}")
    files = [entry["filename"] for entry in dataset.cache_files]
    groups = encode_groups(dataset, group_column) if group_column in dataset.column_names else None
    if groups is None and group_column not in ("", GROUP_COLUMN):
        others = ", ".join(column for column in dataset.column_names if not is_layer(column))
        raise InputError(f"data set '{name}' has no column '{group_column}': give --group-column, one of {others}")
    rows = split_rows(len(dataset), split_seed, split, labels, groups)
    return LoraData(dataset, device, layers, matrices, labels, classes, rows, files, groups=groups,
                    metadata=read_metadata(dataset, name, label_column, metadata_columns))


def encode_groups(dataset: Dataset, column: str) -> np.ndarray:
    """Group numbers (N,); a row without a group is one of its own."""
    values = dataset.data.column(column).to_pylist()
    found: dict = {}
    return np.array([found.setdefault(json.dumps(value, default=str) if value is not None else ("row", row), len(found))
                     for row, value in enumerate(values)])


def read_metadata(dataset: Dataset, name: str, label_column: str, named: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The columns METADATA_COLUMNS, where they are there and numeric, and those `named`; (N,) float64 each, NaN for a null.

    Raises InputError for one of the latter that is not there, not numeric, or the label.
    """
    columns = [column for column in dataset.column_names if not is_layer(column) and column != label_column]
    numeric = [column for column in columns if is_number(dataset.data.column(column).type)]
    for column in named:
        if column not in numeric:
            what = "is not numeric" if column in columns else "is the label" if column == label_column else "is not there"
            raise InputError(f"--metadata-columns {column} {what} in data set '{name}': use {', '.join(numeric) or 'none'}")
    found = {column: dataset.data.column(column).cast(pa.float64(), safe=False).to_numpy()
             for column in dict.fromkeys([*METADATA_COLUMNS, *named]) if column in numeric}
    return {column: np.where(np.isfinite(values), values, np.nan) for column, values in found.items()}


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def matrices_of(dataset: Dataset, layer: str) -> Matrices:
    """The layout of a column, from its type and first row. Raises InputError if that row is no matrix."""
    column = dataset.data.column(layer)
    stored = weight_type(column.type)
    if stored is not None:
        first = column[0].as_py()
        if not first or not first[0]:
            raise InputError(f"column '{layer}', row 0: null or empty where a matrix is expected")
        return Matrices(layer, len(first), len(first[0]), str(stored), True)
    first = dataset.select_columns([layer])[0][layer]
    if getattr(first, "ndim", 0) != 2 or 0 in first.shape:
        raise InputError(f"column '{layer}', row 0: a LoRA layer is a matrix of numbers, this column holds {column.type}")
    return Matrices(layer, *first.shape, str(first.dtype), False)


def encode_labels(dataset: Dataset, column: str, name: str) -> tuple[np.ndarray, list[str | int]]:
    """Class numbers (N,) int64 and the classes in their order: strings sorted, integers and ClassLabels by number.

    Classes are those that occur in any row. Raises InputError for a null, for other types, and for fewer than two classes.
    """
    from datasets import ClassLabel

    nulls = dataset.data.column(column)
    if nulls.null_count:
        raise InputError(f"column '{column}', row {int(np.argmax(nulls.is_null().to_numpy()))}: null: every row needs a label")
    storage = nulls.type
    if not (pa.types.is_integer(storage) or pa.types.is_string(storage) or pa.types.is_large_string(storage)):
        raise InputError(f"column '{column}' holds {storage}: labels are strings, integers or ClassLabel; give --label-column")
    values = dataset.data.column(column).to_pylist()   # not through the formatter: its NumPy drops trailing NULs and wraps uint64
    found = sorted(set(values))
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel) and found[0] < 0:
        raise InputError(f"column '{column}', row {values.index(found[0])}: no label: leave out unlabelled rows")
    classes = [feature.int2str(number) for number in found] if isinstance(feature, ClassLabel) else found
    if len(classes) < 2:
        raise InputError(f"column '{column}' of data set '{name}' has one class ({classes[0]}): two or more are needed")
    index = {value: position for position, value in enumerate(found)}
    return np.array([index[value] for value in values], dtype=np.int64), classes


# --- names


FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
EMBEDDED = {"digits": Path(__file__).resolve().parent / "data" / "digits.parquet"}   # made by scripts/build_digits_dataset.py
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_name(name: str) -> tuple[str, str]:
    """What kind of data set a name means: ("generated", name), ("disk" | "files", path) or ("hub", id).

    An alias is the Hub's, `digits` the file beside this module; a folder of such a name is written as a path, ./1k. Raises
    InputError for anything else.
    """
    if name == "sanity-check":
        return "generated", name
    if name in EMBEDDED:
        return "files", str(EMBEDDED[name])
    if name in ALIASES:
        return "hub", ALIASES[name]
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:   # too long, no such user, no permission
        raise InputError(f"cannot look for data set '{name}': {error}") from None
    if there:
        if path.is_file() and path.suffix not in FILE_FORMATS:
            raise InputError(f"'{name}' is neither Parquet nor Arrow: give a file that ends in .parquet or .arrow, or a folder of them")
        saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
        return ("disk" if saved else "files"), str(path)
    if name.startswith(("/", ".", "~")) or path.suffix in FILE_FORMATS:
        raise InputError(f"no such file or folder: '{name}'")
    if HUB_ID.fullmatch(name):
        return "hub", name
    raise InputError(f"unknown dataset '{name}': use {DATASET_NAMES}")


def open_dataset(name: str, data_split: str = "", revision: str = "") -> Dataset:
    """The rows that a name means, memory-mapped. Raises InputError if there are none to be had."""
    import datasets

    kind, where = resolve_name(name)
    if revision and kind != "hub":
        raise InputError(f"--revision {revision} needs a data set on the Hub, '{name}' is local")
    try:
        if kind == "generated":
            opened = sanity_check()
        elif kind == "disk":
            opened = datasets.load_from_disk(where)
        elif kind == "hub":
            opened = datasets.load_dataset(where, split=data_split or None, revision=revision or None)
        else:
            opened = load_files(Path(where), data_split)
    except InputError:
        raise
    except Exception as error:  # whatever the library raises, the name cannot be read: one line, status 2
        root = error
        while root.__cause__ is not None:   # `datasets` wraps what went wrong in words that do not say it
            root = root.__cause__
        reason = " ".join(f"{error} ({root})".split() if root is not error else str(error).split()) or type(error).__name__
        raise InputError(f"cannot load data set '{name}': {reason[:500]}") from error
    if isinstance(opened, dict):
        return opened[choose_split(name, list(opened), data_split)]
    if data_split and kind in ("disk", "generated") and str(opened.split) != data_split:
        raise InputError(f"data set '{name}' has no split '{data_split}': it has {opened.split or 'none'}; leave out --data-split")
    return opened


def choose_split(name: str, splits: list[str], wanted: str) -> str:
    """The split to read: the one that was asked for, else train, else the only one. Raises InputError if there is none such."""
    if wanted and wanted not in splits:
        raise InputError(f"data set '{name}' has no split '{wanted}': use one of {', '.join(splits)}")
    if not wanted and "train" not in splits and len(splits) > 1:
        raise InputError(f"data set '{name}' has several splits and none is 'train': give --data-split, one of {', '.join(splits)}")
    return wanted or ("train" if "train" in splits else splits[0])


def load_files(path: Path, data_split: str) -> Dataset:
    """A local file or folder through `datasets`, which keeps an Arrow copy of it in its cache.

    That cache knows a file by its modification time alone, which copying and unpacking preserve: the copy lies in a folder
    named by the files' sizes, times and inodes too, so that a rebuilt file is never answered with the old rows.
    """
    import datasets

    splits = files_by_split(path)
    files = [str(file) for of_split in splits.values() for file in of_split]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"visual_ablation_{hash_of(file_stamps(files))}"
    escaped = {split: [glob.escape(str(file.resolve())) for file in of_split] for split, of_split in splits.items()}
    chosen = data_split or choose_split(str(path), list(splits), "")
    if len(splits) > 1:
        log.info("Splits: " + ", ".join(f"{split} ({len(of_split)} files)" for split, of_split in splits.items()) + f"; reading {chosen}")
    return datasets.load_dataset(FILE_FORMATS[Path(files[0]).suffix], data_files=escaped, split=chosen, cache_dir=str(cache))


# How the Hub and its users name the files of a split: train-00000-of-00002.parquet, or a folder or file with the split's word.
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval", "evaluation")}


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """Every Parquet or Arrow file of a file or folder by its split, train first; a file that names no split is train's.

    Raises InputError if there is none, or if there are both kinds.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FILE_FORMATS and file.is_file())
    if not files:
        raise InputError(f"'{path}' holds no Parquet or Arrow file, and was not written by save_to_disk")
    if len({file.suffix for file in files}) > 1:
        raise InputError(f"'{path}' holds both Parquet and Arrow files: give a folder of one kind")
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-zA-Z]+", str(file.relative_to(path).with_suffix(""))) if file != path else []
        shard = SHARD.fullmatch(file.stem)
        named = [split for split, known in SPLIT_WORDS.items() if any(word.lower() in known for word in words)]
        splits.setdefault(shard.group(1) if shard and file != path else named[0] if named else "train", []).append(file)
    return dict(sorted(splits.items(), key=lambda entry: entry[0] != "train"))


SANITY_LABELS = {"cat": 0.5, "dog": 1.0, "fox": 2.0}   # and the std of their weights
SANITY_ROWS = ["cat", "dog", "fox", "cat", "dog"]
SANITY_SHAPES = [
    (f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.{kind}.to_q.lora.{side}.weight", *shape)
    for block in range(5) for kind in ("attn1", "attn2") for side, shape in (("down", (2, 32)), ("up", (32, 2)))
]


def sanity_check() -> Dataset:
    """Five generated LoRAs of rank 2 and 20 layers in three classes: enough to see every part of the program work."""
    from datasets import Dataset, Features, List, Value

    rng = np.random.default_rng(0)
    rows = {layer: [(SANITY_LABELS[label] * rng.normal(size=shape)).tolist() for label in SANITY_ROWS] for layer, *shape in SANITY_SHAPES}
    features = {layer: List(List(Value("float32"))) for layer in rows} | {"category_label": Value("string")}
    return Dataset.from_dict(rows | {"category_label": SANITY_ROWS}, features=Features(features))


# --- what a data set holds, for --dry-run, from its files alone


class Survey(NamedTuple):
    rows: int
    shapes: list[tuple[str, int, int]]   # layer, rows, cols; sorted by layer
    downloaded: bool                     # from the Hub, as Parquet
    copied: bool                         # to Arrow, by `datasets`
    numeric: tuple[str, ...] | None      # columns that are no layers; None where they are not known


PUBLISHED_ROWS = {"1k": 1_000, "10k": 10_000, "50k": 50_000, "100k": 100_000}


def survey(name: str, data_split: str = "") -> Survey | None:
    """Rows and layers of a data set, without `datasets`; None for one on the Hub that is not among the four published sizes.

    Of several splits it takes the one that a run would take, as far as file names tell. Raises InputError for a name that
    is no data set's and for files that cannot be read.
    """
    kind, where = resolve_name(name)
    if kind == "hub":
        return Survey(PUBLISHED_ROWS[name], sd15_shapes(rank=1), True, True, None) if name in PUBLISHED_ROWS else None
    if kind == "generated":
        return Survey(len(SANITY_ROWS), SANITY_SHAPES, False, False, ())
    rows, first, fields = 0, None, pa.schema([])
    try:
        for file in files_of_split(name, kind, Path(where), data_split):
            count, head, fields = survey_file(file)
            rows, first = rows + count, first if first is not None else head
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot read data set '{name}': {' '.join(str(error).split())[:500]}") from error
    if rows == 0 or not any(map(is_layer, first.schema.names)):
        raise InputError(f"data set '{name}' has {'no rows' if rows == 0 else 'no LoRA layer'}")
    shapes = []
    for layer in sorted(filter(is_layer, first.schema.names)):
        matrix = first.column(layer)[0].as_py()
        if not (isinstance(matrix, list) and matrix and isinstance(matrix[0], list) and matrix[0]):
            raise InputError(f"column '{layer}', row 0: no matrix")
        shapes.append((layer, len(matrix), len(matrix[0])))
    numeric = tuple(field.name for field in fields if not is_layer(field.name) and is_number(field.type))
    return Survey(rows, shapes, False, kind == "files", numeric)


def files_of_split(name: str, kind: str, root: Path, data_split: str) -> list[Path]:
    """The files that hold the split which a run would read."""
    if kind == "disk":
        if (root / "dataset_dict.json").is_file():
            root = root / choose_split(name, sorted(path.parent.name for path in root.glob("*/state.json")), data_split)
        return [file for files in files_by_split(root).values() for file in files]
    splits = files_by_split(root)
    return splits[choose_split(name, list(splits), data_split.split("[")[0])]


def survey_file(file: Path) -> tuple[int, pa.RecordBatch | None, pa.Schema]:
    """Rows of a file, its first row's layers, and its columns."""
    if file.suffix == ".parquet":
        parquet = pq.ParquetFile(file)
        names = [column for column in parquet.schema_arrow.names if is_layer(column)]
        return parquet.metadata.num_rows, next(parquet.iter_batches(batch_size=1, columns=names), None), parquet.schema_arrow
    with pa.memory_map(str(file)) as source:
        batches = read_arrow(source)
        first = next((batch.slice(0, 1) for batch in batches if len(batch)), None)
        return sum(map(len, batches)), first, first.schema if first is not None else pa.schema([])


def read_arrow(source):
    """Record batches of an Arrow file, written as a stream (as `datasets` does) or with a footer."""
    try:
        return list(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def sd15_shapes(rank: int) -> list[tuple[str, int, int]]:
    """The layers of the published sets, sorted: `down` and `up` of to_q and to_v in the 32 attention blocks of SD v1.5.

    99,648 weights a row at rank 1: blocks of 320, 640 and 1,280 channels, a text embedding of 768.
    """
    blocks = [("down_blocks.0", 2, 320), ("down_blocks.1", 2, 640), ("down_blocks.2", 2, 1280), ("mid_block", 1, 1280),
              ("up_blocks.1", 3, 1280), ("up_blocks.2", 3, 640), ("up_blocks.3", 3, 320)]
    shapes = []
    for block, attentions, channels in blocks:
        for attention in range(attentions):
            for kind in ("attn1", "attn2"):
                for projection in ("to_q", "to_v"):
                    module = f"unet.{block}.attentions.{attention}.transformer_blocks.0.{kind}.{projection}.lora"
                    inputs = 768 if (kind, projection) == ("attn2", "to_v") else channels
                    shapes += [(f"{module}.down.weight", rank, inputs), (f"{module}.up.weight", channels, rank)]
    return sorted(shapes)
