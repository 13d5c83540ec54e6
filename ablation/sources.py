"""A data set's name -> an open `datasets.Dataset`, memory-mapped.

`datasets` is imported where it is used, because --dry-run resolves names without it.
"""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ablation.catalogue import ALIASES, DATASET_NAMES, EMBEDDED
from ablation.fields import InputError
from ablation.layers import is_layer
from checkpointing import file_stamps, hash_of, parse_json, read_bytes

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("visual_ablation")

FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"  # made by scripts/build_digits_dataset.py
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# How the Hub and its users name the files of a split: train-00000-of-00002.parquet, or a folder or file with
# the split's word.
SHARD = re.compile(r"(\w+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def resolve_name(name: str) -> tuple[str, str]:
    """What kind of data set a name means: ("generated", name), ("disk" | "files", path) or ("hub", id).

    An alias is the Hub's, `digits` and `digits-named` are embedded; a folder of such a name is written as a
    path, ./1k. Raises InputError for any other name.
    """
    if name == "sanity-check":
        return "generated", name
    if name in EMBEDDED:
        return "files", str(DATA_FOLDER / EMBEDDED[name])
    if name in ALIASES:
        return "hub", ALIASES[name]
    try:
        path = Path(name).expanduser()
        exists = path.exists()
        if exists:
            path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, no permission
        raise InputError(f"cannot look for data set '{name}': {error}") from None
    if exists:
        if path.is_file() and path.suffix not in FILE_FORMATS:
            raise InputError(
                f"'{name}' is neither Parquet nor Arrow: give a file that ends in .parquet or .arrow, "
                "or a folder of them"
            )
        is_saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
        return ("disk" if is_saved else "files"), str(path)
    if name.startswith(("/", ".", "~")) or path.suffix in FILE_FORMATS:
        raise InputError(f"no such file or folder: '{name}'")
    if HUB_ID.fullmatch(name):
        return "hub", name
    raise InputError(f"unknown dataset '{name}': use {DATASET_NAMES}")


def open_dataset(name: str, data_split: str = "", revision: str = "") -> Dataset:
    """The rows that a name means. Raises InputError if they cannot be opened."""
    kind, location = resolve_name(name)
    refuse_revision(name, kind, revision)
    try:
        opened = open_resolved(kind, location, data_split, revision)
    except InputError:
        raise
    except Exception as error:  # whatever the library raises, the data set cannot be read
        raise InputError(f"cannot load data set '{name}': {reason_of(error)}") from error
    if isinstance(opened, dict):
        return opened[choose_split(name, list(opened), data_split)]
    if kind in ("disk", "generated"):
        refuse_other_split(name, opened.split and str(opened.split), data_split)
    return opened


def refuse_other_split(name: str, only: str | None, requested: str) -> None:
    """Raise InputError if another split is requested than the only one of a data set (None: without name)."""
    if requested and only != requested:
        raise InputError(
            f"data set '{name}' has no split '{requested}': it has {only or 'none'}; leave out --data-split"
        )


def open_resolved(kind: str, location: str, data_split: str, revision: str):
    """What `datasets` opens for a resolved name: a Dataset or a dict of splits.
    Raises whatever `datasets` raises.
    """
    import datasets

    if kind == "generated":
        return sanity_check()
    if kind == "disk":
        saved_files(Path(location))
        return datasets.load_from_disk(location)
    if kind == "hub":
        return datasets.load_dataset(location, split=data_split or None, revision=revision or None)
    return load_files(Path(location), data_split)


def reason_of(error: BaseException) -> str:
    """One line of at most 500 characters;
    `datasets` wraps the cause of an error in words that do not say it.
    """
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = str(error) if root is error else f"{error} ({root})"
    return (" ".join(text.split()) or type(error).__name__)[:500]


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


def load_files(path: Path, data_split: str) -> Dataset:
    """Open a local file or folder through `datasets`, which keeps an Arrow copy in its cache.

    That cache knows a file by its modification time alone, which copying and unpacking preserve. So the copy
    lies in a folder named by the files' sizes, times and inodes too: a rebuilt file never gets the rows of
    the old one.
    """
    import datasets

    splits = files_by_split(path)
    files = [str(file) for of_split in splits.values() for file in of_split]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"visual_ablation_{hash_of(file_stamps(files))}"
    escaped = {
        split: [glob.escape(str(file.resolve())) for file in of_split] for split, of_split in splits.items()
    }
    chosen = data_split or choose_split(str(path), list(splits), "")
    if len(splits) > 1:
        counts = ", ".join(f"{split} ({len(of_split)} files)" for split, of_split in splits.items())
        log.info(f"Splits: {counts}; reading {chosen}")
    # Of a slice of a split, such as train[:50%], datasets says itself that it is empty.
    if chosen in splits and not any(rows_and_schema(file)[0] for file in splits[chosen]):
        raise InputError(f"data set '{path}' has no rows")
    file_format = FILE_FORMATS[Path(files[0]).suffix]
    return datasets.load_dataset(file_format, data_files=escaped, split=chosen, cache_dir=str(cache))


def files_by_split(path: Path) -> dict[str, list[Path]]:
    """Every Parquet or Arrow file of a file or folder by its split, train first.

    A file whose name tells no split belongs to train. Raises InputError if there is no file, or if both kinds
    occur.
    """
    files = [path]
    if not path.is_file():
        files = sorted(f for f in path.rglob("*") if f.suffix in FILE_FORMATS and f.is_file())
    if not files:
        raise InputError(f"'{path}' holds no Parquet or Arrow file, and was not written by save_to_disk")
    if len({file.suffix for file in files}) > 1:
        raise InputError(f"'{path}' holds both Parquet and Arrow files: give a folder of one kind")
    if path.is_dir():
        refuse_missing_shards(path, files)
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault("train" if file == path else split_of_file(file, path), []).append(file)
    return dict(sorted(splits.items(), key=lambda entry: entry[0] != "train"))


def refuse_missing_shards(path: Path, files: list[Path]) -> None:
    """Raise InputError if the numbered files of a folder are not those of one whole set each."""
    sets: dict[tuple[Path, str], dict[str, set[str]]] = {}
    for file in files:
        match = SHARD.fullmatch(file.stem)
        if match:
            split, number, total = match.groups()
            sets.setdefault((file.parent, split), {}).setdefault(total, set()).add(number)
    for (folder, split), by_total in sets.items():
        if len(by_total) > 1:
            totals = " and ".join(str(int(total)) for total in sorted(by_total))
            raise InputError(f"'{path}' holds '{split}' in {totals} shards: leave one set in the folder")
        ((total, numbers),) = by_total.items()
        missing = sorted({f"{number:05}" for number in range(int(total))} - numbers)
        if missing:
            lacking = folder.relative_to(path) / f"{split}-{missing[0]}-of-{total}{files[0].suffix}"
            raise InputError(
                f"'{path}' lacks {len(missing)} of {int(total)} shards, such as {lacking}: copy them all, or "
                "build the data set again"
            )


def saved_files(root: Path) -> list[Path]:
    """The Arrow files that the state of a folder written by save_to_disk names, of all its splits.

    Raises InputError if one is not there, or if a state cannot be read.
    """
    is_dict = (root / "dataset_dict.json").is_file()
    folders = [root / split for split in saved_splits(root)] if is_dict else [root]
    try:
        files = [
            folder / entry["filename"] for folder in folders for entry in saved_state(folder)["_data_files"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"cannot load data set '{root}': its state is damaged: {reason_of(error)}") from None
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"'{root}' lacks {len(missing)} of {len(files)} files that its state names, such as "
            f"{missing[0].relative_to(root)}: copy them all, or save the data set again"
        )
    return files


def saved_splits(root: Path) -> list[str]:
    """The splits of a DatasetDict that save_to_disk wrote. Raises InputError if it cannot be read."""
    try:
        return [str(split) for split in parse_json(read_bytes(root / "dataset_dict.json"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot load data set '{root}': dataset_dict.json is damaged: {reason_of(error)}"
        ) from None


def saved_state(folder: Path) -> dict:
    """The state of a data set that save_to_disk wrote. Raises InputError if it cannot be read."""
    try:
        return parse_json(read_bytes(folder / "state.json"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load data set '{folder}': state.json is damaged: {reason_of(error)}"
        ) from None


def refuse_revision(name: str, kind: str, revision: str) -> None:
    """Raise InputError for a revision of what is not on the Hub."""
    if revision and kind != "hub":
        raise InputError(f"--revision {revision} needs a data set on the Hub, '{name}' is local")


def split_of_file(file: Path, folder: Path) -> str:
    """The split that the name of a file in a folder tells,
    by its shard number or by a word; train if neither.
    """
    shard = SHARD.fullmatch(file.stem)
    if shard:
        return shard.group(1)
    words = {word.lower() for word in re.split(r"[^a-zA-Z]+", str(file.relative_to(folder).with_suffix("")))}
    return next((split for split, known in SPLIT_WORDS.items() if words & set(known)), "train")


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
        return sum(map(len, batches)), first, schema


def read_arrow(source) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Columns and record batches of an Arrow file, a stream (as `datasets` writes it) or with a footer."""
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema, list(stream)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]


# --- the generated data set

SANITY_LABELS = {"cat": 0.5, "dog": 1.0, "fox": 2.0}  # class -> std of its weights
SANITY_ROWS = ["cat", "dog", "fox", "cat", "dog"]
SANITY_SHAPES = [
    (f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.{kind}.to_q.lora.{side}.weight", *shape)
    for block in range(5)
    for kind in ("attn1", "attn2")
    for side, shape in (("down", (2, 32)), ("up", (32, 2)))
]


def sanity_check() -> Dataset:
    """Five generated LoRAs of rank 2 and 20 layers in three classes:
    enough to see every step of the program work.
    """
    from datasets import Dataset, Features, List, Value

    rng = np.random.default_rng(0)
    rows = {
        layer: [(SANITY_LABELS[label] * rng.normal(size=shape)).tolist() for label in SANITY_ROWS]
        for layer, *shape in SANITY_SHAPES
    }
    features = {layer: List(List(Value("float32"))) for layer in rows} | {"category_label": Value("string")}
    return Dataset.from_dict(rows | {"category_label": SANITY_ROWS}, features=Features(features))
