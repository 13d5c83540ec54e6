"""Labels and further columns of a row: from folders, from files beside it, from a CSV table, from headers."""

from __future__ import annotations

import collections
import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation.adapter_kinds import BadFile
from ablation.catalogue import TRAINING_COLUMN
from ablation.fields import InputError, is_utf8, shortened_text
from ablation.making.headers import HeaderSurvey, header_values, stated_in_header
from ablation.making.inputs import Inputs
from ablation.making.sidecars import (
    civitai_files,
    civitai_values,
    read_fields,
    refuse_no_label,
    refuse_no_text,
)
from ablation.making.trainings import group_by_training, training_by_name


@dataclass
class Labels:
    """A row's columns besides the weights. `types` of the columns are known once every file was surveyed."""

    kind: str  # folder, metadata, civitai or csv
    inputs: Inputs
    label: str = "category_label"  # the column that every row must have
    civitai_field: str = ""  # the field that becomes the label
    header_columns: tuple[str, ...] = ()
    table: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a CSV, by file
    types: dict[str, str] = field(default_factory=dict)
    present: collections.Counter = field(default_factory=collections.Counter)
    surveyed: int = 0
    headers: HeaderSurvey = field(default_factory=HeaderSurvey)
    trainings: dict[str, str] = field(default_factory=dict)  # by file; empty if the column is not written

    def of(self, name: str) -> dict[str, Any]:
        """The values of a file's columns. Raises BadFile if there is no label, and InputError if a column has
        two sources.
        """
        if not is_utf8(name):
            raise BadFile("its name is no UTF-8 text: rename it")
        values = self.from_source(name)
        if self.header_columns:
            stated = header_values(stated_in_header(self.inputs.path(name)), self.header_columns)
            twice = sorted(values.keys() & stated.keys())
            if twice:
                raise InputError(
                    f"'{twice[0]}' stands in the header of {name} and among its fields: leave it out of "
                    "--header-columns, or rename the field"
                )
            values = values | stated
        return values | {TRAINING_COLUMN: self.trainings[name]} if self.trainings else values

    def from_source(self, name: str) -> dict[str, Any]:
        """The values that --label-from gives a file. Raises BadFile if there is no label."""
        path = self.inputs.path(name)
        if self.kind == "folder":
            first, *rest = self.inputs.parts(name)
            if not rest:
                raise BadFile("lies in no folder below FOLDER, so it has no class")
            return {self.label: first}
        if self.kind == "csv":
            if name not in self.table:
                raise BadFile("has no line in --labels")
            return self.table[name]
        if self.kind == "civitai":
            return civitai_values(path, self.civitai_field)
        return self.from_metadata(path.parent / "metadata.json")

    def from_metadata(self, path: Path) -> dict[str, Any]:
        """The fields of a metadata.json. Raises BadFile if it cannot be read or has no label."""
        fields = read_fields(path)
        if fields is None:
            raise BadFile("has no metadata.json beside it")
        refuse_no_label(fields.get(self.label), self.label, path.name)
        for key, value in fields.items():
            refuse_no_text(key, key, path.name)
            refuse_no_text(value, key, path.name)
        plain = (str, int, float, type(None))
        try:
            return {
                key: value if isinstance(value, plain) else json.dumps(value, sort_keys=True)
                for key, value in fields.items()
            }
        except RecursionError:
            raise BadFile(f"its {path.name} cannot be read: it is nested too deeply") from None

    def files_beside(self, path: Path) -> list[Path]:
        """The files beside an adapter whose content changes its row."""
        return civitai_files(path) if self.kind == "civitai" else []

    def survey_headers(self, kept: Sequence[str]) -> None:
        """Look at the headers of the files that become rows, after the survey of their values, and add the
        column `training` if a training has several of them. A field of that name among the labels wins.

        Raises InputError for a header column that no file has.
        """
        for name in kept:
            self.headers.add(name, stated_in_header(self.inputs.path(name)))
        self.headers.refuse_absent(self.header_columns)
        if TRAINING_COLUMN in self.types:
            return
        by_name = {name: training_by_name(self.inputs.parts(name)) for name in kept}
        self.trainings = group_by_training(by_name, self.headers.sessions)
        if self.trainings:
            self.types[TRAINING_COLUMN] = "string"
            self.present[TRAINING_COLUMN] = self.surveyed

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


def label_source(
    kind: str | None,
    table: Path | None,
    label_field: str,
    inputs: Inputs,
    header_columns: tuple[str, ...] = (),
) -> Labels:
    """The labels of --label-from `kind`, --labels `table` and --label-field, and the --header-columns.

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
    if label_field and kind not in ("metadata", "civitai"):
        raise InputError(
            f"--label-field {shortened_text(label_field)} needs --label-from metadata or civitai, not {kind}"
        )
    labels = Labels(kind, inputs, header_columns=header_columns)
    if table is not None:
        labels.table = read_csv(table, inputs)
    elif kind == "civitai":
        labels.civitai_field = label_field or "baseModel"
    else:
        labels.label = label_field or labels.label
    return labels


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
