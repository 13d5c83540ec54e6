"""What a data set holds, read from the headers of its files alone, without `datasets`: for --dry-run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from ablation.fields import InputError
from ablation.layers import is_layer, sd15_shapes
from ablation.sources import (
    SANITY_ROWS,
    SANITY_SHAPES,
    choose_split,
    files_by_split,
    refuse_other_split,
    refuse_revision,
    resolve_name,
    rows_and_schema,
    saved_files,
    saved_splits,
    saved_state,
)

PUBLISHED_ROWS = {"1k": 1_000, "10k": 10_000, "50k": 50_000, "100k": 100_000}


class Survey(NamedTuple):
    """What is known of a data set before it is opened."""

    rows: int
    shapes: list[tuple[str, int, int]]  # (layer, rows, cols), sorted by layer
    is_downloaded: bool  # from the Hub, as Parquet
    is_copied: bool  # to Arrow, by `datasets`
    columns: dict[str, pa.DataType] | None  # by name, with their types; None where they are not known

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as float32."""
        return 4 * self.rows * sum(rows * cols for _, rows, cols in self.shapes)


def survey(name: str, data_split: str = "", revision: str = "") -> Survey | None:
    """Rows and layers of a data set; None for one on the Hub whose size is not among the published ones.

    Of several splits it takes the one that the experiment would take, as far as file names tell. Raises
    InputError for a name that is no data set's, for files that cannot be read, and for a split or revision
    that is not there.
    """
    kind, location = resolve_name(name)
    refuse_revision(name, kind, revision)
    if kind == "hub":
        if name not in PUBLISHED_ROWS:
            return None
        return Survey(PUBLISHED_ROWS[name], sd15_shapes(rank=1), True, True, None)
    if kind == "generated":
        refuse_other_split(name, None, data_split)
        types = {layer: pa.list_(pa.list_(pa.float32())) for layer, _, _ in SANITY_SHAPES}
        types["category_label"] = pa.string()
        return Survey(len(SANITY_ROWS), SANITY_SHAPES, False, False, types)
    rows, first, schema = 0, None, pa.schema([])
    try:
        for file in files_of_split(name, kind, Path(location), data_split):
            count, head, schema = rows_and_schema(file)
            rows, first = rows + count, first if first is not None else head
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot read data set '{name}': {' '.join(str(error).split())[:500]}") from error
    if rows == 0 or first is None:
        raise InputError(f"data set '{name}' has no rows")
    types = dict(zip(schema.names, schema.types, strict=True))
    return Survey(rows, shapes_of(first), False, kind == "files", types)


def shapes_of(first: pa.RecordBatch) -> list[tuple[str, int, int]]:
    """(layer, rows, cols) of a batch's first row. Raises InputError for a value that is no matrix."""
    shapes = []
    for layer in sorted(filter(is_layer, first.schema.names)):
        matrix = first.column(layer)[0].as_py()
        if not (isinstance(matrix, list) and matrix and isinstance(matrix[0], list) and matrix[0]):
            raise InputError(f"column '{layer}', row 0: no matrix")
        shapes.append((layer, len(matrix), len(matrix[0])))
    return shapes


def files_of_split(name: str, kind: str, root: Path, data_split: str) -> list[Path]:
    """The files that hold the split which the experiment would read."""
    if kind == "disk":
        if (root / "dataset_dict.json").is_file():
            root = root / choose_split(name, saved_splits(root), data_split)
        else:
            refuse_other_split(name, saved_state(root).get("_split"), data_split)
        return saved_files(root)
    by_split = files_by_split(root)
    return by_split[choose_split(name, list(by_split), data_split.split("[")[0])]
