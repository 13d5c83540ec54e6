"""Labels and further columns of a row: from folders, from metadata.json files, or from a CSV table."""

from __future__ import annotations

import collections
import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation.adapters import BadFile
from ablation.fields import InputError
from ablation.making.inputs import Inputs


@dataclass
class Labels:
    """A row's columns besides the weights. `types` of the columns are known once every file was surveyed."""

    kind: str  # folder, metadata or csv
    inputs: Inputs
    label: str = "category_label"  # the column that every row must have
    table: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a CSV, by file
    types: dict[str, str] = field(default_factory=dict)
    present: collections.Counter = field(default_factory=collections.Counter)
    surveyed: int = 0

    def of(self, name: str) -> dict[str, Any]:
        """The values of a file's columns. Raises BadFile if there is no label."""
        if self.kind == "folder":
            if "" in self.inputs.roots and "/" not in name:
                raise BadFile("lies in no folder below FOLDER, so it has no class")
            return {self.label: name.partition("/")[0]}
        if self.kind == "csv":
            if name not in self.table:
                raise BadFile("has no line in --labels")
            return self.table[name]
        return self.from_metadata(self.inputs.path(name).parent / "metadata.json")

    def from_metadata(self, path: Path) -> dict[str, Any]:
        """The fields of a metadata.json. Raises BadFile if it cannot be read or has no label."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadFile("has no metadata.json beside it") from None
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise BadFile(f"its metadata.json cannot be read: {reason}") from error
        if not isinstance(fields, dict):
            raise BadFile(f"its metadata.json holds {type(fields).__name__}, not fields")
        label = fields.get(self.label)
        if label in (None, ""):
            raise BadFile(f"its metadata.json has no '{self.label}'")
        if isinstance(label, (float, bool, list, dict)):
            raise BadFile(f"its '{self.label}' is {json.dumps(label)}: labels are text or whole numbers")
        plain = (str, int, float, type(None))
        return {
            key: value if isinstance(value, plain) else json.dumps(value, sort_keys=True)
            for key, value in fields.items()
        }

    def survey(self, values: dict[str, Any]) -> None:
        """Widen the columns' types by one row's values."""
        self.surveyed += 1
        for key, value in values.items():
            if value is not None:
                self.types[key] = wider(self.types.get(key), type_of(value))
                self.present[key] += 1
            else:
                self.types.setdefault(key, "null")

    def nulls(self) -> dict[str, int]:
        """How many surveyed rows have no value, for the columns with such rows."""
        missing = {key: self.surveyed - self.present[key] for key in self.types}
        return {key: count for key, count in missing.items() if count}

    def columns(self) -> dict[str, str]:
        """Column -> type; a field that is null everywhere becomes text."""
        return {key: "string" if kind == "null" else kind for key, kind in sorted(self.types.items())}


# --- types of columns


def type_of(value: Any) -> str:
    """The column type of a value; whole numbers beyond 64 bits become text."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "float64" if isinstance(value, float) else "string"


def wider(kind: str | None, other: str) -> str:
    """The type that holds both: two kinds of number become float64, everything else text."""
    if kind in (None, "null", other):
        return other
    return "float64" if {kind, other} == {"int64", "float64"} else "string"


def as_type(value: Any, kind: str) -> Any:
    """A value as its column's type."""
    if value is None:
        return None
    if kind == "string":
        return value if isinstance(value, str) else json.dumps(value)
    return float(value) if kind == "float64" else value


# --- where labels come from


def label_source(kind: str | None, table: Path | None, label_field: str, inputs: Inputs) -> Labels:
    """The labels of --label-from `kind`, --labels `table` and --label-field.

    Without `kind` it is csv if there is a table, metadata if any file has a metadata.json beside it, else
    folder.
    """
    if not kind:
        has_metadata = any((inputs.path(name).parent / "metadata.json").is_file() for name in inputs.files)
        kind = "csv" if table else "metadata" if has_metadata else "folder"
    if (kind == "csv") != bool(table):
        raise InputError(
            f"--label-from {kind} and {'--labels' if table else 'no --labels'}: --labels FILE.csv belongs to "
            "--label-from csv"
        )
    if label_field and kind != "metadata":
        raise InputError(f"--label-field {label_field} needs --label-from metadata, not {kind}")
    if table is not None:
        return Labels(kind, inputs, table=read_csv(table, inputs))
    return Labels(kind, inputs, label=label_field or "category_label")


def read_csv(path: Path, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """File -> columns of a table; its column `label` is called category_label.

    A column that holds nothing but whole numbers, or numbers, is read as such. Raises InputError for a table
    that cannot be read or that names a file twice, or a file that is not there.
    """
    try:
        rows = csv_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read --labels {path}: {error}") from None
    known = {*inputs.files, *inputs.pickles}
    strangers = [name for name in rows if name not in known]
    if strangers:
        where = "paths are those below FOLDER" + ("" if "" in inputs.roots else ", preceded by its name")
        raise InputError(
            f"{path} names {len(strangers)} files that are not there, the first '{strangers[0]}': {where}"
        )
    fields = next(iter(rows.values()), {})
    readers = {column: reader_of(row[column] for row in rows.values()) for column in fields}
    return {
        name: {
            "category_label" if column == "label" else column: readers[column](text) if text else None
            for column, text in row.items()
        }
        for name, row in rows.items()
    }


def csv_rows(path: Path) -> dict[str, dict[str, str]]:
    """File -> texts by column. Raises InputError, csv.Error, OSError or UnicodeDecodeError."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        fields = list(reader.fieldnames or [])
        is_bad = len(set(fields)) < len(fields) or "category_label" in fields
        if not {"file", "label"} <= set(fields) or is_bad:
            raise InputError(
                f"{path} starts with {','.join(fields) or 'nothing'}: expected a line file,label[,further "
                "columns], each name once"
            )
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: {len(fields)} values are expected")
            name = row.pop("file").removeprefix("./")
            if name in rows:
                raise InputError(f"{where}: '{name}' for the second time")
            if not row["label"]:
                raise InputError(f"{where}: no label")
            rows[name] = row
    return rows


def reader_of(texts: Iterable[str]) -> Callable[[str], Any]:
    """The type of a column's texts: int if all are whole numbers, float if all are numbers, else str.

    Numbers are those that Python would write; 007 is a name. Empty texts do not count.
    """
    is_int = True
    for text in filter(None, texts):
        if not re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
            is_int = False
        if not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?", text):
            return str
    return int if is_int else float
