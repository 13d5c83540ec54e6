"""What a data set holds, read from the headers of its files alone, without `datasets`: for --dry-run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ablation.layers import is_layer, sd15_shapes
from ablation.settings import InputError
from ablation.sources import SANITY_ROWS, SANITY_SHAPES, choose_split, files_by_split, resolve_name

PUBLISHED_ROWS = {"1k": 1_000, "10k": 10_000, "50k": 50_000, "100k": 100_000}


class Survey(NamedTuple):
    """What is known of a data set before it is opened."""

    rows: int
    shapes: list[tuple[str, int, int]]  # (layer, rows, cols), sorted by layer
    is_downloaded: bool  # from the Hub, as Parquet
    is_copied: bool  # to Arrow, by `datasets`
    numeric_columns: tuple[str, ...] | None  # columns that are no layers; None where they are not known

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as float32."""
        return 4 * self.rows * sum(rows * cols for _, rows, cols in self.shapes)


def survey(name: str, data_split: str = "") -> Survey | None:
    """Rows and layers of a data set; None for one on the Hub whose size is not among the published ones.

    Of several splits it takes the one that the experiment would take, as far as file names tell. Raises
    InputError for a name that is no data set's and for files that cannot be read.
    """
    kind, location = resolve_name(name)
    if kind == "hub":
        if name not in PUBLISHED_ROWS:
            return None
        return Survey(PUBLISHED_ROWS[name], sd15_shapes(rank=1), True, True, None)
    if kind == "generated":
        return Survey(len(SANITY_ROWS), SANITY_SHAPES, False, False, ())
    rows, first, schema = 0, None, pa.schema([])
    try:
        for file in files_of_split(name, kind, Path(location), data_split):
            count, head, schema = rows_and_schema(file)
            rows, first = rows + count, first if first is not None else head
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot read data set '{name}': {' '.join(str(error).split())[:500]}") from error
    if rows == 0 or first is None:
        raise InputError(f"data set '{name}' has no rows")
    if not any(map(is_layer, first.schema.names)):
        raise InputError(f"data set '{name}' has no LoRA layer")
    numeric = tuple(field.name for field in schema if not is_layer(field.name) and is_number(field.type))
    return Survey(rows, shapes_of(first), False, kind == "files", numeric)


def shapes_of(first: pa.RecordBatch) -> list[tuple[str, int, int]]:
    """(layer, rows, cols) of a batch's first row. Raises InputError for a value that is no matrix."""
    shapes = []
    for layer in sorted(filter(is_layer, first.schema.names)):
        matrix = first.column(layer)[0].as_py()
        if not (isinstance(matrix, list) and matrix and isinstance(matrix[0], list) and matrix[0]):
            raise InputError(f"column '{layer}', row 0: no matrix")
        shapes.append((layer, len(matrix), len(matrix[0])))
    return shapes


def is_number(kind: pa.DataType) -> bool:
    """True for columns that can be read as float64."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def files_of_split(name: str, kind: str, root: Path, data_split: str) -> list[Path]:
    """The files that hold the split which the experiment would read."""
    if kind == "disk":
        if (root / "dataset_dict.json").is_file():
            splits = sorted(path.parent.name for path in root.glob("*/state.json"))
            root = root / choose_split(name, splits, data_split)
        return [file for files in files_by_split(root).values() for file in files]
    by_split = files_by_split(root)
    return by_split[choose_split(name, list(by_split), data_split.split("[")[0])]


def rows_and_schema(file: Path) -> tuple[int, pa.RecordBatch | None, pa.Schema]:
    """Rows of a file, its first row's layers (None if it has no row), and its columns."""
    if file.suffix == ".parquet":
        parquet = pq.ParquetFile(file)
        names = [column for column in parquet.schema_arrow.names if is_layer(column)]
        first = next(parquet.iter_batches(batch_size=1, columns=names), None)
        return parquet.metadata.num_rows, first, parquet.schema_arrow
    with pa.memory_map(str(file)) as source:
        batches = read_arrow(source)
        first = next((batch.slice(0, 1) for batch in batches if len(batch)), None)
        return sum(map(len, batches)), first, first.schema if first is not None else pa.schema([])


def read_arrow(source) -> list[pa.RecordBatch]:
    """Record batches of an Arrow file, written as a stream (as `datasets` does) or with a footer."""
    try:
        return list(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
