"""What the columns of a data set must be, by their names and types alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from ablation.catalogue import GROUP_COLUMN, TRAINING_COLUMN
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
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # which datasets reads as its values
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


def group_column_of(types: Mapping[str, pa.DataType], columns: Columns) -> str:
    """The column of what rows have in common; "" if the data set has none.

    It is `columns.group`. In place of GROUP_COLUMN, the default, a data set that lacks it may have
    TRAINING_COLUMN, with texts or whole numbers that are not the label.
    """
    chosen = columns.group
    if chosen == GROUP_COLUMN and chosen not in types and columns.label != TRAINING_COLUMN:
        kind = types.get(TRAINING_COLUMN, pa.null())
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind):
            return TRAINING_COLUMN
    return chosen if chosen in types else ""


def refuse_metadata(types: Mapping[str, pa.DataType], name: str, columns: Columns) -> None:
    """Raise InputError for a metadata column that is not there, not numeric, or the label."""
    numeric = numeric_columns(types, columns.label)
    for column in columns.metadata:
        if column not in numeric:
            problem = "is not numeric" if column in types else "is not there"
            problem = "is the label" if column == columns.label else problem
            choice = f"use {', '.join(numeric)}" if numeric else "leave it out, no other column is numeric"
            raise InputError(f"--metadata-columns {column} {problem} in data set '{name}': {choice}")


def numeric_columns(types: Mapping[str, pa.DataType], label: str = "") -> list[str]:
    """The columns that are neither layers nor the label, and can be read as float64."""
    return [
        column
        for column, kind in types.items()
        if not is_layer(column) and column != label and is_number(kind)
    ]


def refuse_no_matrix(column: str, kind: pa.DataType, first: Any) -> None:
    """Raise InputError unless a column of this type, with this value in row 0, holds matrices of numbers."""
    if isinstance(kind, pa.BaseExtensionType):  # Array2D
        kind = kind.storage_type
    if not (is_list(kind) and is_list(kind.value_type) and is_number(kind.value_type.value_type)):
        raise InputError(
            f"column '{column}', row 0: a LoRA layer is a matrix of numbers, this column holds {kind}"
        )
    if first is None or len(first) == 0 or first[0] is None or len(first[0]) == 0:
        raise InputError(f"column '{column}', row 0: null or empty where a matrix is expected")
    lengths = sorted({0 if line is None else len(line) for line in first})
    if len(lengths) > 1:
        raise InputError(
            f"column '{column}', row 0: the lines of its matrix have {lengths[0]} and {lengths[-1]} values: "
            "all need the same"
        )


def is_list(kind: pa.DataType) -> bool:
    """True for the list types of Arrow, of variable, large or fixed size."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_number(kind: pa.DataType) -> bool:
    """True for columns that can be read as float64."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
