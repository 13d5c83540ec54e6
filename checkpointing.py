"""What may be half written, stale or foreign: fingerprints, atomic files, the feature cache, the result store, locks.

A reader sees a file's old content or its new one, never a part. Every file carries the description of what made it and a
hash of what it holds; both are checked before it is used. NumPy and safetensors are imported where arrays are written or
read, so that --status answers at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import filelock
import xxhash

from settings import REPRESENTATIONS, Cell, InputError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("visual_ablation")

FORGOTTEN = 3600      # seconds after which another machine's hidden .tmp is what a killed process left behind
SETTLED = 2.0         # seconds: a file touched less than this before it was hashed could change again at the same time stamp


# --- files


def canonical(value) -> bytes:
    """JSON with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def hash_of(value) -> str:
    """128-bit xxHash of a JSON value, or of bytes and arrays as they lie in memory."""
    plain = isinstance(value, (dict, list, tuple, str, int, float, bool, type(None)))
    return xxhash.xxh3_128(canonical(value) if plain else value).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; it takes the place of `path`, synced to disk, if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_abandoned(temporary: Path) -> bool:
    """Whether the process that was writing a temporary file is gone; of one on another machine, whether it is long silent."""
    pid = temporary.name.split(".")[-2]
    try:
        if temporary.name.endswith(f".{socket.gethostname()}.{pid}.tmp"):
            os.kill(int(pid), 0)
            return False
        return time.time() - temporary.stat().st_mtime > FORGOTTEN
    except ProcessLookupError:
        return True
    except (OSError, ValueError):   # another user's process; gone meanwhile; not a name of ours
        return False


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value, indent: int | None = None) -> None:
    write_bytes(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def append_event(path: Path, **event) -> None:
    """One line of JSON with the time, in UTC, at the end of the file; on a line of its own after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
        line = json.dumps({"time": utc_now(), **event})
        file.write(f"{'' if whole else chr(10)}{line}\n".encode())


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- the identity of a data set's content


def file_stamps(files: list[str]) -> list:
    """What changes when a file is edited, replaced, moved or touched."""
    stamps = []
    for file in files:
        stat = os.stat(file)
        stamps.append([os.path.realpath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return stamps


def identify(files: list[str], which: list, compute, cache_dir: Path | None) -> tuple[str, bool]:
    """The content hash that `compute()` gives, or the remembered one if none of `files` has changed since; and which it was.

    `which` says which rows and columns of the files are meant. Nothing is remembered without files or a `cache_dir`, nor
    for files so fresh that another edit could carry the same time stamp.
    """
    if not files or cache_dir is None:
        return compute(), False
    stamps, now = file_stamps(files), time.time_ns()
    memory = cache_dir / "identities" / f"{hash_of([stamps, which])}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # absent or damaged: computed anew, the same value
        remembered = json.loads(memory.read_text())
        if remembered["check"] == hash_of([remembered["identity"], stamps, which]):
            return remembered["identity"], True
    identity = compute()
    newest = max(max(mtime, ctime) for _, _, mtime, ctime, _ in stamps)
    if newest < now - SETTLED * 1e9 and file_stamps(files) == stamps:
        try:
            write_json(memory, {"identity": identity, "check": hash_of([identity, stamps, which]), "files": stamps})
        except OSError as error:
            log.warning(f"the content hash is not remembered: {error}")
    return identity, False


# --- features


class FeatureCache:
    """One safetensors file a representation, of all layers, in a folder named by the content that they describe.

    `options_of(representation)` are the settings that change its numbers.
    """

    def __init__(self, cache_dir: Path, identity: str, layers: list[str], options_of: Callable[[str], dict] = lambda representation: {}):
        self.folder = cache_dir / identity
        self.source = {"data": identity, "layers": hash_of(layers)}
        self.options_of = options_of

    def path(self, representation: str) -> Path:
        return self.folder / f"{representation}.safetensors"

    def description(self, representation: str) -> dict:
        return self.source | {"representation": representation, "version": REPRESENTATIONS[representation].version} | self.options_of(representation)

    def load(self, representation: str) -> tuple[np.ndarray | None, str]:
        """Features (N, L*k) float32, or None and why: '' if there is no file, else what is wrong with it."""
        from safetensors import SafetensorError, safe_open

        path = self.path(representation)
        if not path.exists():
            return None, ""
        try:
            with safe_open(path, framework="numpy") as file:
                made_by = json.loads(file.metadata()["description"])
                features = file.get_tensor("features")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return None, f"unreadable ({error})"
        payload = made_by.pop("payload", None)
        if made_by != self.description(representation):
            return None, "made by another version or with other options"
        return (features, "") if payload == hash_of(features) else (None, "its content does not match its hash")

    def save(self, representation: str, features: np.ndarray) -> None:
        """Raises OSError if the disk does not take them."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        made_by = self.description(representation) | {"payload": hash_of(features)}
        with locked(self.path(representation)), replacing(self.path(representation)) as temporary:
            try:
                save_file({"features": features}, temporary, metadata={"description": json.dumps(made_by)})
            except SafetensorError as error:   # how it reports a full disk
                raise OSError(str(error)) from error


# --- locks


class Held(Exception):
    """Another process holds the output folder."""


def lock_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file that is going to be written; raises Held at once if another process has it and not `wait`.

    Where the file system has no locks it goes on without, and says so: files stay whole, work may be done twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(lock_path(path))
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if not wait:
                raise Held(f"another process holds {path}") from None
            log.info(f"Waiting for another process that works on {path.stem}")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        log.warning(f"no lock on {path}: {error}; make sure that no other process writes there")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the output folder for a plain run. Raises Held if another process does, InputError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --output-dir") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "folder", wait=False))
        except Held:
            raise Held(f"another process holds {folder}: wait for it, or choose another --output-dir") from None
        yield


def is_held(folder: Path) -> bool:
    """Whether a plain run works on an output folder now; False where the file system has no locks."""
    lock = filelock.FileLock(lock_path(folder / "folder"))
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


# --- results


class State(NamedTuple):
    """Of a cell: `kind` is done, missing, damaged or stale; `why` says it in a line."""

    kind: str
    why: str = ""


WORDS = {"data": "the weights of the data set", "labels": "the labels", "split": "the rows of the split", "layers": "the layers",
         "metadata": "the metadata columns"}


def differences(made_with: dict, wanted: dict) -> list[str]:
    """The settings in `wanted` that a file was made without, one phrase each. `wanted` may leave out what is not known."""
    phrases = []
    for name, value in wanted.items():
        old = made_with.get(name)
        if old != value:
            phrases.append(f"{WORDS[name]} changed" if name in WORDS else f"{name} was {old}, is now {value}")
    return phrases


class ResultStore:
    """The finished cells of an output folder: a checkpoint each, with the predictions it was counted from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.predictions = folder / "predictions"

    def cells(self) -> list[Cell]:
        """Those that have a checkpoint in the folder, whole or not."""
        found = [Cell.named(path.stem) for path in sorted(self.checkpoints.glob("*.json")) if not path.name.startswith(".")]
        return [cell for cell in found if cell is not None]

    def path(self, cell: Cell) -> Path:
        return self.checkpoints / f"{cell.name}.json"

    def predictions_path(self, cell: Cell) -> Path:
        return self.predictions / f"{cell.name}.npz"

    def load(self, cell: Cell) -> dict:
        """A finished cell's record, checked against its hash and that of its predictions. Raises OSError or ValueError."""
        record = json.loads(self.path(cell).read_bytes())
        if not isinstance(record, dict) or "checksum" not in record:
            raise ValueError("no checksum")
        if record["checksum"] != hash_of({k: v for k, v in record.items() if k != "checksum"}):
            raise ValueError("its content does not match its hash")
        if record["cell"] != cell.name:
            raise ValueError(f"it is the checkpoint of {record['cell']}")
        if record["predictions_hash"] != hash_of(self.predictions_path(cell).read_bytes()):
            raise ValueError("its predictions do not match their hash")
        return record

    def load_predictions(self, cell: Cell) -> dict[str, np.ndarray]:
        """Of a finished cell: row numbers and labels (n,) and predictions (R, n) by part."""
        import numpy as np

        with np.load(self.predictions_path(cell), allow_pickle=False) as arrays:
            return dict(arrays)

    def state(self, cell: Cell, wanted: dict) -> State:
        """Whether the cell is finished and was made as `wanted` describes."""
        if not self.path(cell).exists():
            return State("missing")
        try:
            record = self.load(cell)
        except FileNotFoundError:
            return State("damaged", "its predictions are missing")
        except (OSError, ValueError, KeyError, RecursionError) as error:
            return State("damaged", str(error) or type(error).__name__)
        # a cell from before there were other splits has a random one
        changed = differences({"split_kind": "random", **record.get("asked", {}), **record["made_with"]}, wanted)
        return State("stale", "; ".join(changed)) if changed else State("done")

    def save(self, cell: Cell, record: dict, predictions: dict[str, np.ndarray], made_with: dict) -> None:
        """Write the predictions, then the checkpoint that holds their hash. Call it under the cell's lock."""
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, **predictions, fingerprint=np.array(hash_of(made_with)))
        write_bytes(self.predictions_path(cell), buffer.getvalue())
        record = {**record, "cell": cell.name, "made_with": made_with, "fingerprint": hash_of(made_with),
                  "predictions_hash": hash_of(buffer.getvalue())}
        write_json(self.path(cell), {**record, "checksum": hash_of(record)})

    def set_aside(self, cell: Cell, reason: str) -> Path:
        """Move a cell's files to set_aside/, with the reason beside them. Returns the checkpoint's new path. Call it under the cell's lock."""
        folder = self.folder / "set_aside"
        folder.mkdir(exist_ok=True)
        number = 1
        while (target := folder / f"{cell.name}.{number}.json").exists():
            number += 1
        write_bytes(target.with_suffix(".txt"), f"{reason}\n".encode())
        os.replace(self.path(cell), target)
        if self.predictions_path(cell).exists():
            os.replace(self.predictions_path(cell), target.with_suffix(".npz"))
        sync(self.checkpoints)
        return target

    def clear(self, wanted: dict[Cell, dict], requested: list[Cell], rerun_stale: bool) -> list[str]:
        """Make `checkpoints/` hold finished cells only, before the first cell runs; a line for each file that was moved.

        `wanted` describes every cell that could be there, `requested` are those that this run is about. Damaged ones are
        set aside, stale ones too with `rerun_stale`. Raises InputError, before anything is moved, if a requested cell is
        stale otherwise.
        """
        states = {cell: self.state(cell, wanted[cell]) for cell in wanted}
        stale = {cell: states[cell].why for cell in requested if states[cell].kind == "stale"}
        if stale and not rerun_stale:
            reasons = " | ".join(dict.fromkeys(stale.values()))
            raise InputError(
                f"{len(stale)} finished cells in {self.folder} were made with other settings ({reasons}): "
                "choose another --output-dir, or give --rerun-stale to set them aside and run them again"
            )
        lines = []
        for cell, state in states.items():
            if state.kind == "damaged" or (state.kind == "stale" and rerun_stale):
                with locked(self.path(cell)):
                    target = self.set_aside(cell, f"{state.kind}: {state.why}")
                lines.append(f"Set aside {state.kind} checkpoint {cell.name} ({state.why}) as {target.relative_to(self.folder)}")
        return lines
