"""What the columns of a data set must be, by their names and types alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa

from ablation.catalogue import GROUP_COLUMN
from ablation.fields import InputError
from ablation.layers import is_layer


class Columns(NamedTuple):
    """Names of the columns that are no weights. `metadata` are those asked for besides METADATA_COLUMNS."""

    label: str = "category_label"
    group: str = ""
    metadata: tuple[str, ...] = ()


def refuse_columns(types: Mapping[str, pa.DataType], name: str, columns: Columns) -> None:
    """Raise InputError for a data set that lacks layers or a column of `columns`, or has it of another type.

    `types` maps its columns to their types, `name` is what errors call it.
    """
    others = [column for column in types if not is_layer(column)]
    if len(others) == len(types):
        raise InputError(
            f"data set '{name}' has no LoRA layer: expected columns such as '...lora.down.weight', "
            f"found {', '.join(others[:5])}"
        )
    if columns.label not in types:
        raise InputError(
            f"data set '{name}' has no column '{columns.label}': give --label-column, one of "
            f"{', '.join(others) or '(none)'}"
        )
    kind = types[columns.label]
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(
            f"column '{columns.label}' holds {kind}: labels are strings, integers or ClassLabel; give "
            "--label-column"
        )
    if columns.group not in ("", GROUP_COLUMN, *types):
        raise InputError(
            f"data set '{name}' has no column '{columns.group}': give --group-column, one of "
            f"{', '.join(others)}"
        )
    refuse_metadata(types, name, columns)


def refuse_metadata(types: Mapping[str, pa.DataType], name: str, columns: Columns) -> None:
    """Raise InputError for a metadata column that is not there, not numeric, or the label."""
    numeric = numeric_columns(types, columns.label)
    for column in columns.metadata:
        if column not in numeric:
            problem = "is not numeric" if column in types else "is not there"
            problem = "is the label" if column == columns.label else problem
            raise InputError(
                f"--metadata-columns {column} {problem} in data set '{name}': use "
                f"{', '.join(numeric) or 'none'}"
            )


def numeric_columns(types: Mapping[str, pa.DataType], label: str = "") -> list[str]:
    """The columns that are neither layers nor the label, and can be read as float64."""
    return [
        column
        for column, kind in types.items()
        if not is_layer(column) and column != label and is_number(kind)
    ]


def is_number(kind: pa.DataType) -> bool:
    """True for columns that can be read as float64."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
