"""The files of a local data set: which there are, by split, and what their headers say."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ablation.columns import refuse_no_matrix
from ablation.fields import InputError
from ablation.layers import is_layer
from checkpointing import parse_json, read_bytes

FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
FileSplits = dict[str, list[Path]]
# A split, or a slice of one, in the words of datasets: train, train[:50%].
SPLIT_PART = re.compile(r"[\w.-]+(\[-?\d*%?:-?\d*%?\])?(\(\w+\))?")
# How the Hub and its users name the files of a split: train-00000-of-00002.parquet, or a folder or file with
# the split's word.
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def reason_of(error: BaseException) -> str:
    """One line of at most 500 characters;
    `datasets` wraps the cause of an error in words that do not say it.
    """
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = str(error) if root is error else f"{error} ({root})"
    return (" ".join(text.split()) or type(error).__name__)[:500]


def local_files(name: str, kind: str, location: str, requested: str) -> tuple[FileSplits, str]:
    """The files of a local data set by split, and the split to read. `kind` is "disk" or "files".

    Of a data set that save_to_disk wrote without a name of its split, that name is ''. Raises InputError if
    the split is not there, or if the files are not all there.
    """
    root = Path(location)
    if requested and not all(map(SPLIT_PART.fullmatch, requested.split("+"))):
        raise InputError(
            f"--data-split {requested} is neither a split nor a slice of one, such as train or train[:50%]"
        )
    if kind == "files":
        splits = files_by_split(root, name)
        for split in splits_in(requested):
            chosen = choose_split(name, list(splits), split)
        return splits, requested or chosen
    splits = saved_files(root, name)
    if (root / "dataset_dict.json").is_file():
        return splits, choose_split(name, list(splits), requested)
    (only,) = splits
    refuse_other_split(name, only, requested)
    return splits, only


def splits_in(requested: str) -> list[str]:
    """The splits that a request such as train[10:20]+test names."""
    return [part.split("[")[0] for part in requested.split("+")]


def refuse_other_split(name: str, only: str, requested: str) -> None:
    """Raise InputError if another split is requested than the only one of a data set ('': without a name)."""
    if requested and only != requested:
        raise InputError(
            f"data set '{name}' has no split '{requested}': it has {only or 'none'}; leave out --data-split"
        )


def choose_split(name: str, splits: list[str], requested: str) -> str:
    """The split to read: the requested one, else train, else the only one.
    Raises InputError if there is none.
    """
    if not splits:
        raise InputError(f"data set '{name}' has no split: it is an empty DatasetDict")
    if requested and requested not in splits:
        raise InputError(f"data set '{name}' has no split '{requested}': use one of {', '.join(splits)}")
    if not requested and "train" not in splits and len(splits) > 1:
        raise InputError(
            f"data set '{name}' has several splits and none is 'train': give --data-split, one of "
            f"{', '.join(splits)}"
        )
    return requested or ("train" if "train" in splits else splits[0])


def files_by_split(path: Path, name: str = "") -> FileSplits:
    """Every Parquet or Arrow file of a file or folder by its split, train first. Errors call it `name`.

    A file whose name tells no split belongs to train. Raises InputError if there is no file, if both kinds
    occur, or if a shard is missing.
    """
    name = name or str(path)
    files = [path]
    if not path.is_file():
        files = sorted(f for f in path.rglob("*") if f.suffix in FILE_FORMATS and f.is_file())
    variable = next((file for file in files if os.path.expandvars(file) != str(file)), None)
    if variable is not None:
        raise InputError(f"'{name}': in {variable} datasets would replace $... by a variable: rename it")
    if not files:
        raise InputError(f"'{name}' holds no Parquet or Arrow file, and was not written by save_to_disk")
    if len({file.suffix for file in files}) > 1:
        raise InputError(f"'{name}' holds both Parquet and Arrow files: give a folder of one kind")
    if path.is_dir():
        refuse_missing_shards(path, name, files)
    splits: FileSplits = {}
    for file in files:
        splits.setdefault("train" if file == path else split_of_file(file, path), []).append(file)
    return dict(sorted(splits.items(), key=lambda entry: entry[0] != "train"))


def refuse_missing_shards(path: Path, name: str, files: list[Path]) -> None:
    """Raise InputError if the numbered files of a folder are not those of one whole set each."""
    sets: dict[tuple[Path, str], dict[str, list[str]]] = {}
    for file in files:
        match = SHARD.fullmatch(file.stem)
        if match:
            split, number, total = match.groups()
            sets.setdefault((file.parent, split), {}).setdefault(total, []).append(number)
    for (folder, split), by_total in sets.items():
        if len(by_total) > 1:
            totals = " and ".join(str(int(total)) for total in sorted(by_total))
            raise InputError(f"'{name}' holds '{split}' in {totals} shards: leave one set in the folder")
        ((total, numbers),) = by_total.items()
        if len(set(numbers)) < len(numbers):
            raise InputError(f"'{name}' holds shards of '{split}' twice: leave one set in the folder")
        missing = sorted({f"{number:05}" for number in range(int(total))} - set(numbers))
        if missing:
            lacking = folder.relative_to(path) / f"{split}-{missing[0]}-of-{total}{files[0].suffix}"
            raise InputError(
                f"'{name}' lacks {len(missing)} of {int(total)} shards, such as {lacking}: copy them all, or "
                "build the data set again"
            )


def split_of_file(file: Path, folder: Path) -> str:
    """The split that the name of a file in a folder tells,
    by its shard number or by a word; train if neither.
    """
    shard = SHARD.fullmatch(file.stem)
    if shard:
        return re.split(r"[-.]", shard.group(1))[-1]  # datasets' own cache has parquet-train-00000-of-00001
    words = {word.lower() for word in re.split(r"[^a-zA-Z]+", str(file.relative_to(folder).with_suffix("")))}
    return next((split for split, known in SPLIT_WORDS.items() if words & set(known)), "train")


# --- folders written by save_to_disk


def saved_files(root: Path, name: str) -> FileSplits:
    """The Arrow files by split that the state of a folder written by save_to_disk names.

    Raises InputError if one is not there, or if a file that describes them cannot be read.
    """
    folders = [root]
    if (root / "dataset_dict.json").is_file():
        listed = described_by(root / "dataset_dict.json", "splits", name)["splits"]
        folders = [root / str(split) for split in listed]
    splits: FileSplits = {}
    for folder in folders:
        described_by(folder / "dataset_info.json", "", name)
        state = described_by(folder / "state.json", "_data_files", name)
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
        splits[str(state.get("_split") or "") if folder == root else folder.name] = files
    files = [file for of_split in splits.values() for file in of_split]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"'{name}' lacks {len(missing)} of {len(files)} files that its state names, such as "
            f"{missing[0].relative_to(root)}: copy them all, or save the data set again"
        )
    return splits


def described_by(file: Path, key: str, name: str) -> dict[str, Any]:
    """The content of a file that save_to_disk wrote beside the rows.
    Raises InputError if it is damaged, or has no list under `key` ('': none is needed).
    """
    try:
        content = parse_json(read_bytes(file))
        if key and not isinstance(content[key], list):
            raise ValueError(f"its '{key}' is no list")
        if key == "_data_files" and not all(
            isinstance(entry, dict) and "filename" in entry for entry in content[key]
        ):
            raise ValueError(f"its '{key}' name no file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot load data set '{name}': {file} is damaged ({reason_of(error)}): save the data set again"
        ) from None
    return content


# --- headers


class FileHeaders(NamedTuple):
    """What the headers of some files say: rows of each, the first row's layers, the types of the columns."""

    rows: dict[Path, int]
    first: pa.RecordBatch
    types: dict[str, pa.DataType]


def headers_of(name: str, files: Iterable[Path]) -> FileHeaders:
    """The headers of a data set's files.

    Raises InputError for a file that cannot be read, for no row, for a column that stands twice, and for a
    layer that is no matrix in the first row, or is missing in a later file.
    """
    rows: dict[Path, int] = {}
    first: pa.RecordBatch | None = None
    types: dict[str, pa.DataType] = {}
    for file in files:
        try:
            count, head, schema = rows_and_schema(file)
            names = Counter(schema.names)
        except (OSError, ValueError, pa.ArrowException) as error:  # also names that are no UTF-8
            problem = f"{file} cannot be read ({reason_of(error)})"
            raise InputError(f"cannot load data set '{name}': {problem}") from None
        twice = [column for column, times in names.items() if times > 1]
        if twice:
            raise InputError(f"cannot load data set '{name}': column '{twice[0]}' stands twice in {file}")
        absent = [column for column in types if is_layer(column) and column not in names]
        if head is not None and absent:
            raise InputError(
                f"column '{absent[0]}', row {sum(rows.values())}: null: every row needs every weight"
            )
        if head is not None and first is None:
            first, types = head, dict(zip(names, schema.types, strict=True))
        rows[file] = count
    if first is None:
        raise InputError(f"data set '{name}' has no rows")
    for column in filter(is_layer, sorted(types)):
        refuse_no_matrix(column, types[column], first.column(column)[0].as_py())
    return FileHeaders(rows, first, types)


def rows_and_schema(file: Path) -> tuple[int, pa.RecordBatch | None, pa.Schema]:
    """Rows of a file, its first row's layers (None if it has no row), and its columns."""
    if file.suffix == ".parquet":
        parquet = pq.ParquetFile(file)
        names = [column for column in parquet.schema_arrow.names if is_layer(column)]
        first = None
        if parquet.metadata.num_rows:
            first = next(parquet.iter_batches(batch_size=1, columns=names), None)
        return parquet.metadata.num_rows, first, parquet.schema_arrow
    with pa.memory_map(str(file)) as source:
        schema, batches = read_arrow(source)
        first = next((batch.slice(0, 1) for batch in batches if len(batch)), None)
        if first is not None:
            first.validate(full=True)  # offsets that point nowhere would end the process
        return sum(map(len, batches)), first, schema


def read_arrow(source) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Columns and record batches of an Arrow file, a stream (as `datasets` writes it) or with a footer."""
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema, list(stream)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
