"""What a data set holds, read from the headers of its files alone, without `datasets`: for --dry-run."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from ablation.data_files import headers_of, local_files, refuse_other_split, splits_in
from ablation.layers import is_layer, sd15_shapes
from ablation.sources import SANITY_ROWS, SANITY_SHAPES, refuse_revision, resolve_name

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
        refuse_other_split(name, "", data_split)
        types = {layer: pa.list_(pa.list_(pa.float32())) for layer, _, _ in SANITY_SHAPES}
        types["category_label"] = pa.string()
        return Survey(len(SANITY_ROWS), SANITY_SHAPES, False, False, types)
    splits, chosen = local_files(name, kind, location, data_split)
    headers = headers_of(name, [file for split in splits_in(chosen) for file in splits[split]])
    rows = sum(headers.rows.values())
    return Survey(rows, shapes_of(headers.first), False, kind == "files", headers.types)


def shapes_of(first: pa.RecordBatch) -> list[tuple[str, int, int]]:
    """(layer, rows, cols) of a batch's first row."""
    shapes = []
    for layer in sorted(filter(is_layer, first.schema.names)):
        matrix = first.column(layer)[0].as_py()
        shapes.append((layer, len(matrix), len(matrix[0])))
    return shapes
