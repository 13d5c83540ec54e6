"""Which files of some folders are to become rows."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ablation.adapter_storage import PICKLES
from ablation.fields import InputError, shortened_text

# Files that trainers leave beside the weights. They hold no adapter, and nobody takes them for one.
TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)\w*\.(bin|pt|pth|pkl)"
)
HUB_MODEL = "models--"  # how the folder of a model begins in the Hub's cache: models--owner--name
MOST_LINKS = 4  # linked folders on the path to a file
HUB_FILES = ("blobs", "refs")  # folders in it that are no snapshots; the files of `snapshots` link to blobs


class Inputs(NamedTuple):
    """Names of files, sorted: the path below its FOLDER,
    preceded by the FOLDER's name if there are several.
    """

    roots: dict[str, Path]  # name of a FOLDER ("" for a single one) -> where it is
    files: list[str]
    pickles: list[str]
    passed_over: int  # hidden files and folders, trainer state, the Hub's own files
    above: tuple[str, ...] = ()  # the last parts of a single FOLDER's path, if it is of the Hub

    @property
    def file_count(self) -> int:
        """Files, pickles included."""
        return len(self.files) + len(self.pickles)

    def path(self, name: str) -> Path:
        """Where the file with this name is."""
        if "" in self.roots:
            return self.roots[""] / name
        root, _, rest = name.partition("/")
        return self.roots[root] / rest

    def parts(self, name: str) -> list[str]:
        """The parts of a file's name, without the Hub's `snapshots/<revision>`.

        If nothing but the file is left, and FOLDER is a model's folder of the Hub, that folder comes first.
        """
        parts = [(part, False) for part in self.above] + [(part, True) for part in name.split("/")]
        model = None
        for i, (part, _) in enumerate(parts[:-3]):
            if part.startswith(HUB_MODEL) and parts[i + 1][0] == "snapshots":
                model = part
                del parts[i + 1 : i + 3]
                break
        below = [part for part, is_below in parts if is_below]
        return [model, *below] if model and len(below) == 1 else below


def find_inputs(folders: list[Path], pattern: str, read_pickles: bool = False) -> Inputs:
    """The adapter files in some folders and their subfolders. Raises InputError if there is none.

    A pickle is a file like others if pickles are read, but for one beside a .safetensors of the same name,
    which is the same adapter.
    """
    roots = roots_of(folders)
    files: list[str] = []
    pickles: list[str] = []
    passed_over = 0
    for root_name, root in roots.items():
        own_name = root.resolve().name
        for path in walk(root):
            name = "/".join(filter(None, (root_name, path.relative_to(root).as_posix())))
            if not is_candidate(path, pattern):
                continue
            if is_passed_over([own_name, *path.relative_to(root).parts]):
                passed_over += 1
            elif not read_pickles or path.suffix not in PICKLES:
                (pickles if path.suffix in PICKLES else files).append(name)
            elif path.with_suffix(".safetensors").exists():
                passed_over += 1
            else:
                files.append(name)
    if not files:
        where = ", ".join(map(str, folders))
        more = f"; {len(pickles)} pickled files are there, which are not read without --pickles read"
        raise InputError(f"no {pattern or '.safetensors'} file in {where}{more if pickles else ''}")
    above = folders[0].resolve().parts[-2:] if len(folders) == 1 else ()
    above = above if any(part.startswith(HUB_MODEL) for part in above) else ()
    return Inputs(roots, sorted(files), sorted(pickles), passed_over, above)


def is_passed_over(parts: list[str]) -> bool:
    """True for a hidden file, one in a hidden folder, trainer state, and the Hub's own files.

    `parts` are those of the path from FOLDER's name on.
    """
    _, *below = parts
    if any(part.startswith(".") for part in below) or TRAINER_STATE.fullmatch(below[-1]):
        return True
    return any(a.startswith(HUB_MODEL) and b in HUB_FILES for a, b in zip(parts, below, strict=False))


def is_candidate(path: Path, pattern: str) -> bool:
    """True for a file that --pattern names; without a pattern for safetensors and pickles."""
    if pattern:
        return fnmatch.fnmatch(path.name, pattern)
    return path.suffix in (*PICKLES, ".safetensors")


def roots_of(folders: list[Path]) -> dict[str, Path]:
    """The folders by name.
    Raises InputError for one that is missing, and for two that overlap or have one name.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"no such folder: '{folder}'")
    real = [folder.resolve() for folder in folders]
    for i, folder in enumerate(real):
        for other in real[:i]:
            if folder == other or folder in other.parents or other in folder.parents:
                raise InputError(f"'{folder}' and '{other}' overlap: their files would become two rows each")
    if len(folders) == 1:
        return {"": folders[0]}
    roots = {folder.name: path for folder, path in zip(real, folders, strict=True)}
    if len(roots) < len(folders):
        raise InputError(
            "two FOLDERs have the same name, which tells their files apart: rename one, or give the folder "
            "above them"
        )
    return roots


def walk(folder: Path, above: frozenset = frozenset(), links: int = 0) -> Iterator[Path]:
    """Every file below a folder. Links are followed, but not to a folder that this one lies in.

    `links` of the folders on the path to this one are links. Raises InputError above MOST_LINKS: folders that
    link to each other have more paths than anybody can read.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    if links > MOST_LINKS:
        raise InputError(
            f"'{shortened_text(str(folder))}' goes through {links} linked folders, and {MOST_LINKS} are "
            "followed: remove links between folders, or give the folders that hold the files"
        )
    try:
        with os.scandir(folder) as entries:
            in_order = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot look into '{folder}': {error.strerror}") from None
    for entry in in_order:
        if os.path.isdir(entry.path):  # False for a link to itself too
            yield from walk(Path(entry.path), above | {here}, links + entry.is_symlink())
        else:
            yield Path(entry.path)
