"""Writing a data set as a folder that `datasets.load_from_disk` and `load_lora_data` read:
Arrow streams and two JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features

from checkpointing import make_folder, replacing, write_bytes


def arrow_matrices(weights: np.ndarray, layout: str = "nested") -> pa.Array:
    """(n, rows, cols) float32 as a column over the same memory;
    `layout` nested (lists of lists) or fixed (fixed-size lists).
    """
    n, rows, cols = weights.shape
    flat = pa.array(weights.reshape(-1))
    if layout == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, cols), rows)
    inner = pa.ListArray.from_arrays(np.arange(0, n * rows + 1, dtype=np.int32) * cols, flat)
    return pa.ListArray.from_arrays(np.arange(0, n + 1, dtype=np.int32) * rows, inner)


def write_shard(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """One Arrow stream, whole or not at all;
    record batches of at most 1,000 rows, as `datasets` writes them. Returns the rows.
    """
    rows = 0
    make_folder(path.parent)
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for table in tables:
            writer.write_table(table, max_chunksize=1000)
            rows += len(table)
    return rows


def finish_folder(folder: Path, features: Features, shards: list[str], fingerprint: str) -> None:
    """The two files that make a folder of shards a data set:
    its columns, and which files hold its rows in which order.
    """
    make_folder(folder)
    write_bytes(folder / "dataset_info.json", json.dumps({"features": features.to_dict()}).encode())
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_bytes(folder / "state.json", json.dumps(state).encode())
