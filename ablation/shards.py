"""A collection in Parquet shards that is read shard by shard and never copied as a whole: --streaming.

Labels and other small columns are read once. Weights come as tables of a block of rows, in order, and are
dropped when the block's features are made.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from torch import Tensor

from ablation.columns import refuse_no_matrix
from ablation.data_files import choose_split, local_files, reason_of
from ablation.fields import InputError
from ablation.layers import ColumnLayout, Layers, is_layer
from ablation.reading import BLOCK_ROWS, WeightReader, weight_type
from ablation.sources import refuse_revision, resolve_name
from checkpointing import hash_of

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("visual_ablation")

HASHED_BYTES = 2**24  # of a file hashed at a time


@dataclass(frozen=True)
class Shards:
    """Parquet files with their rows. `urls` are paths, or addresses on the Hub that name the commit."""

    name: str
    urls: list[str]
    counts: list[int]
    is_local: bool

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(self.counts)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the first shard."""
        with open_file(self.urls[0]) as file:
            return pq.read_schema(file)

    def small_columns(self) -> Dataset:
        """The columns that are no layers, of all rows, in memory."""
        from datasets import Dataset, Features

        names = [name for name in self.schema.names if not is_layer(name)]
        tables = []
        for url in self.urls:
            with open_file(url) as file:
                tables.append(pq.read_table(file, columns=names, partitioning=None))
        table = pa.concat_tables(tables)
        features = Features.from_arrow_schema(self.schema)
        bare = table.replace_schema_metadata(None)
        return Dataset(bare).cast(Features({name: features[name] for name in names}))

    def first_row(self) -> pa.RecordBatch:
        """The layers of the first row."""
        names = list(filter(is_layer, self.schema.names))
        with open_file(self.urls[0]) as file:
            return next(pq.ParquetFile(file).iter_batches(batch_size=1, columns=names))

    def tables_from(self, start: int, columns: list[str]) -> Iterator[pa.Table]:
        """Tables of BLOCK_ROWS rows from the row `start` on. Shards before it are not opened."""
        from datasets import load_dataset

        ends = [sum(self.counts[: i + 1]) for i in range(len(self.counts))]
        shard = bisect.bisect_right(ends, start)
        first = ends[shard] - self.counts[shard]
        log.info(f"Reading from shard {shard + 1} of {len(self.urls)} on: {self.urls[shard]}")
        rows = load_dataset("parquet", data_files={"train": self.urls[shard:]}, split="train", streaming=True)
        rows = rows.select_columns(columns).with_format("arrow")
        yield from (rows.skip(start - first) if start > first else rows).iter(batch_size=BLOCK_ROWS)

    def identity(self) -> str:
        """A hash of the files: of their bytes, or of addresses on the Hub, whose content never changes."""
        if not self.is_local:
            return hash_of(["shards on the Hub", self.urls, self.counts])
        digests = []
        for url in self.urls:
            digest = xxhash.xxh3_128()
            with open(url, "rb") as file:
                while piece := file.read(HASHED_BYTES):
                    digest.update(piece)
            digests.append(digest.hexdigest())
        return hash_of(["shards", digests])


def open_file(url: str) -> Any:
    """A file, here or on the Hub, whose parts can be read."""
    import fsspec

    return fsspec.open(url, "rb").open()


def find_shards(name: str, data_split: str, revision: str) -> Shards:
    """The Parquet files that a data set's name means.

    Raises InputError for a data set that is not in Parquet, or that cannot be read.
    """
    kind, location = resolve_name(name)
    refuse_revision(name, kind, revision)
    if "[" in data_split or "+" in data_split:
        raise InputError(f"--data-split {data_split}: --streaming takes one whole split")
    if kind not in ("hub", "files"):
        raise InputError(f"--streaming reads Parquet files; data set '{name}' has none, and is mapped anyway")
    try:
        if kind == "hub":
            splits = files_on_hub(location, revision)
            urls = splits[choose_split(name, list(splits), data_split)]
        else:
            of_split, chosen = local_files(name, kind, location, data_split)
            urls = [str(file.resolve()) for file in of_split[chosen]]
        other = next((url for url in urls if not url.endswith(".parquet")), None)
        if other is not None:
            raise InputError(f"--streaming reads Parquet files; data set '{name}' has {other}")
        counts = []
        for url in urls:
            with open_file(url) as file:
                counts.append(pq.read_metadata(file).num_rows)
    except InputError:
        raise
    except Exception as error:  # whatever the libraries raise, the data set cannot be read
        raise InputError(f"cannot load data set '{name}': {reason_of(error)}") from error
    filled = [(url, count) for url, count in zip(urls, counts, strict=True) if count]
    if not filled:
        raise InputError(f"data set '{name}' has no rows")
    return Shards(name, [url for url, _ in filled], [count for _, count in filled], kind == "files")


def files_on_hub(location: str, revision: str) -> dict[str, list[str]]:
    """The files of a data set on the Hub, by split, at the commit that the revision means now."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(location, revision=revision or None)
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def layouts_of(shards: Shards) -> dict[str, ColumnLayout]:
    """The layout of each layer, by the first row. Raises InputError for a column that is no list of lists."""
    first, layouts = shards.first_row(), {}
    for layer in sorted(first.schema.names):
        kind, matrix = shards.schema.field(layer).type, first.column(layer)[0].as_py()
        refuse_no_matrix(layer, kind, matrix)
        stored = weight_type(kind)
        if stored is None:
            raise InputError(f"column '{layer}' is stored as {kind}, which --streaming does not read")
        layouts[layer] = ColumnLayout(layer, len(matrix), len(matrix[0]), str(stored), True)
    return layouts


class ShardReader(WeightReader):
    """Reads the layers of shards. Blocks come in order; one of them is held."""

    keeps_weights = False  # once their block is past

    def __init__(self, shards: Shards, layers: Layers, device: str):
        super().__init__(None, layers, device)
        self.shards = shards
        self.tables: Iterator[pa.Table] = iter(())
        self.block = (0, 0)  # the rows that `table` holds
        self.table: pa.Table | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return self.shards.num_rows

    def open_block(self, start: int, stop: int) -> None:
        """Hold the rows start:stop. Raises InputError for a shard that cannot be read."""
        if self.block == (start, stop):
            return
        follows = start == self.block[1] and start > 0
        try:
            if not follows:
                self.tables = self.shards.tables_from(start, self.layers.names)
            self.table = None  # before the next is read
            self.table = next(self.tables)
        except Exception as error:
            raise InputError(
                f"cannot read rows {start} to {stop - 1} of data set '{self.shards.name}': {reason_of(error)}"
            ) from error
        if len(self.table) != stop - start:
            raise InputError(
                f"data set '{self.shards.name}': {len(self.table)} rows in place of rows {start} to "
                f"{stop - 1}: the shards changed while they were read"
            )
        self.block = (start, stop)

    def chunks(self, layer: str, start: int, stop: int) -> list[pa.Array]:
        """The stored column of rows start:stop, which must lie in the block that is held."""
        first, last = self.block
        assert self.table is not None and first <= start <= stop <= last
        return self.table.column(layer).slice(start - first, stop - start).chunks

    def content_hash(self, on_layer: Callable[[], None] = lambda: None) -> str:
        """A hash of the shards, which are not read for it as tables."""
        return self.shards.identity()

    def read_rows(self, layer: str, rows: Tensor) -> Tensor:
        """Not possible: the weights are not kept."""
        raise NotImplementedError
