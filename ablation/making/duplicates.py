"""Files with the same content under several names."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path

import xxhash

from ablation.fields import InputError
from ablation.making.progress import ProgressLine
from ablation.making.shards import hash_of_file

TAIL_BYTES = 65_536  # of two files of one size that are compared first: other weights differ there


def duplicate_files(paths: Mapping[str, Path]) -> list[list[str]]:
    """The names of files with the same content, each group sorted.

    Names of one file on the disk (links) are the same unread. Otherwise files of one size and with the same
    last bytes are hashed whole. Raises InputError for a file that cannot be read any more.
    """
    try:
        return groups_of_copies(paths)
    except OSError as error:
        raise InputError(f"cannot compare {error.filename or 'files'}: {error.strerror}") from None


def groups_of_copies(paths: Mapping[str, Path]) -> list[list[str]]:
    """`duplicate_files`, but raises OSError."""
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    sizes: dict[tuple[int, int], int] = {}
    for name, path in paths.items():
        stat = path.stat()
        names[stat.st_dev, stat.st_ino].append(name)
        sizes[stat.st_dev, stat.st_ino] = stat.st_size
    where = {file: paths[own[0]] for file, own in names.items()}
    files = [[*names]]
    for key in (sizes.__getitem__, lambda file: hash_of_tail(where[file])):
        files = [alike for some in files for alike in several(some, key)]
    progress = ProgressLine(sum(map(len, files)), "files compared")

    def whole(file: tuple[int, int]) -> str:
        progress.advance()
        return hash_of_file(where[file])

    same = [alike for some in files for alike in several(some, whole)]
    found = {file for alike in same for file in alike}
    same += [[file] for file, own in names.items() if len(own) > 1 and file not in found]
    return sorted(sorted(name for file in alike for name in names[file]) for alike in same)


def several(files: Iterable, key: Callable[..., Hashable]) -> list[list]:
    """The groups of files with the same key that have several."""
    groups: dict[Hashable, list] = defaultdict(list)
    for file in files:
        groups[key(file)].append(file)
    return [group for group in groups.values() if len(group) > 1]


def hash_of_tail(path: Path) -> str:
    """128-bit xxHash of the last TAIL_BYTES of a file."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return xxhash.xxh3_128(file.read(TAIL_BYTES)).hexdigest()
