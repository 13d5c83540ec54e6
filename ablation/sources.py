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

from ablation.catalogue import ALIASES, DATASET_NAMES, EMBEDDED
from ablation.data_files import (
    FILE_FORMATS,
    FileSplits,
    choose_split,
    headers_of,
    local_files,
    reason_of,
    refuse_other_split,
    splits_in,
)
from ablation.fields import InputError, shortened_text
from checkpointing import file_stamps, hash_of

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("visual_ablation")

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"  # made by scripts/build_digits_dataset.py
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"cannot look for data set '{shortened_text(name)}': {problem}") from None
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
    raise InputError(f"unknown dataset '{shortened_text(name)}': use {DATASET_NAMES}")


def open_dataset(name: str, data_split: str = "", revision: str = "") -> Dataset:
    """The rows that a name means. Raises InputError if they cannot be opened."""
    kind, location = resolve_name(name)
    refuse_revision(name, kind, revision)
    try:
        opened = open_resolved(kind, name, location, data_split, revision)
    except InputError:
        raise
    except Exception as error:  # whatever the library raises, the data set cannot be read
        raise InputError(f"cannot load data set '{name}': {reason_of(error)}") from error
    if isinstance(opened, dict):
        return opened[choose_split(name, list(opened), data_split)]
    return opened


def open_resolved(kind: str, name: str, location: str, data_split: str, revision: str):
    """What `datasets` opens for a resolved name: a Dataset or a dict of splits.
    Raises InputError, and whatever `datasets` raises.
    """
    import datasets

    if kind == "generated":
        refuse_other_split(name, "", data_split)
        return sanity_check()
    if kind == "hub":
        return datasets.load_dataset(location, split=data_split or None, revision=revision or None)
    splits, chosen = local_files(name, kind, location, data_split)
    if kind == "disk":
        headers_of(name, splits[chosen])
        return datasets.load_from_disk(location)
    return load_files(name, splits, chosen)


def load_files(name: str, splits: FileSplits, chosen: str) -> Dataset:
    """Open local files through `datasets`, which keeps an Arrow copy in its cache.

    That cache knows a file by its modification time alone, which copying and unpacking preserve. So the copy
    lies in a folder named by the files' sizes, times and inodes too: a rebuilt file never gets the rows of
    the old one.
    """
    import datasets

    files = [str(file) for of_split in splits.values() for file in of_split]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"visual_ablation_{hash_of(file_stamps(files))}"
    if len(splits) > 1:
        counts = ", ".join(f"{split} ({len(of_split)} files)" for split, of_split in splits.items())
        log.info(f"Splits: {counts}; reading {chosen}")
    patterns = {}
    for split in splits_in(chosen):
        rows = headers_of(name, splits[split]).rows
        # datasets cannot open a Parquet file without rows.
        patterns[split] = [glob.escape(str(file.resolve())) for file in splits[split] if rows[file]]
    file_format = FILE_FORMATS[Path(files[0]).suffix]
    return datasets.load_dataset(file_format, data_files=patterns, split=chosen, cache_dir=str(cache))


def refuse_revision(name: str, kind: str, revision: str) -> None:
    """Raise InputError for a revision of what is not on the Hub."""
    if revision and kind != "hub":
        raise InputError(f"--revision {revision} needs a data set on the Hub, '{name}' is local")


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
