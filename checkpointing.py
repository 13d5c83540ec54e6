"""Atomic files, fingerprints, the feature cache, locks and the result store.

A reader sees a file's old content or its new one, never a part. Every file carries the description of what
made it and a hash of what it holds; both are checked before it is used. NumPy and safetensors are imported
where arrays are written or read, so that --status answers at once. (Over 400 lines, because the guarantees
hold together: whoever changes how a file is written must see who reads it.)
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import xxhash

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("visual_ablation")

FORGOTTEN = 3600  # seconds after which another machine's hidden .tmp file counts as left by a killed process
# Seconds: a file touched less than this before it was hashed could change again at the same time stamp.
SETTLED = 2.0


class Refused(Exception):
    """The output folder cannot be used as requested. The message names the remedy; exit status 2."""


class Held(Exception):
    """Another process holds the output folder; exit status 3."""


# --- files


def canonical(value: Any) -> bytes:
    """JSON with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def hash_of(value: Any) -> str:
    """128-bit xxHash of a JSON value, or of bytes and arrays as they lie in memory."""
    plain = isinstance(value, (dict, list, tuple, str, int, float, bool, type(None)))
    return xxhash.xxh3_128(canonical(value) if plain else value).hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to, for the block of a `with` statement.

    If the block ends without an error, the hidden file is synced to disk and takes the place of `path`.
    """
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
    """True if the process that was writing a temporary file is gone,
    or was on another machine and is long silent.
    """
    pid = temporary.name.split(".")[-2]
    try:
        if temporary.name.endswith(f".{socket.gethostname()}.{pid}.tmp"):
            os.kill(int(pid), 0)
            return False
        return time.time() - temporary.stat().st_mtime > FORGOTTEN
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # another user's process; gone meanwhile; not a name of ours
        return False


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replace a file by a JSON value; NaN and infinity are refused with ValueError."""
    write_bytes(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON object that this program wrote to be added to; {} if there is none.

    A damaged file is logged and counts as none, because all that is needed is written anew.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(f"{path} is not readable and is written anew: {error}")
        return {}


def append_event(path: Path, **event) -> None:
    """Append a line of JSON with the time in UTC.
    After a line that was cut off, a new line is begun first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
        line = json.dumps({"time": utc_now(), **event})
        file.write(f"{'' if whole else chr(10)}{line}\n".encode())


def read_events(path: Path) -> list[dict]:
    """The whole lines of a file that `append_event` wrote; a line that a kill cut off is left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def utc_now() -> str:
    """The time as 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- the identity of a data set's content


def file_stamps(files: list[str]) -> list:
    """For each file its real path, size, times and inode:
    they change when it is edited, replaced, moved or touched.
    """
    stamps = []
    for file in files:
        stat = os.stat(file)
        stamps.append([os.path.realpath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return stamps


def identify(
    files: list[str], scope: list, compute: Callable[[], str], cache_dir: Path | None
) -> tuple[str, bool]:
    """The content hash that `compute()` gives and False; or the remembered hash of unchanged files and True.

    `scope` says which rows and columns of the files are meant. Nothing is remembered without files or a
    `cache_dir`, nor for files so fresh that another edit could carry the same time stamp.
    """
    if not files or cache_dir is None:
        return compute(), False
    stamps, now = file_stamps(files), time.time_ns()
    memory = cache_dir / "identities" / f"{hash_of([stamps, scope])}.json"
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # absent or damaged: computed anew, the same value
        remembered = json.loads(memory.read_text())
        if remembered["check"] == hash_of([remembered["identity"], stamps, scope]):
            return remembered["identity"], True
    identity = compute()
    newest = max(max(mtime, ctime) for _, _, mtime, ctime, _ in stamps)
    if newest < now - SETTLED * 1e9 and file_stamps(files) == stamps:
        try:
            write_json(
                memory, {"identity": identity, "check": hash_of([identity, stamps, scope]), "files": stamps}
            )
        except OSError as error:
            log.warning(f"the content hash is not remembered: {error}")
    return identity, False


# --- features


class FeatureCache:
    """One safetensors file for each representation,
    of all layers, in a folder named by the hash of the weights.

    `description_of(representation)` gives the version and the settings that change its numbers.
    """

    def __init__(
        self, cache_dir: Path, identity: str, layers: list[str], description_of: Callable[[str], dict]
    ):
        self.folder = cache_dir / identity
        self.source = {"data": identity, "layers": hash_of(layers)}
        self.description_of = description_of

    def path(self, representation: str) -> Path:
        """The file of a representation."""
        return self.folder / f"{representation}.safetensors"

    def description(self, representation: str) -> dict:
        """What the features depend on."""
        return self.source | {"representation": representation} | self.description_of(representation)

    def load(self, representation: str) -> tuple[np.ndarray | None, str]:
        """Features (N, L*k) float32; or None and the reason:
        '' if there is no file, else what is wrong with it.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(representation)
        if not path.exists():
            return None, ""
        try:
            with safe_open(path, framework="numpy") as file:
                made_with = json.loads(file.metadata()["description"])
                features = file.get_tensor("features")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return None, f"unreadable ({error})"
        payload = made_with.pop("payload", None)
        if made_with != self.description(representation):
            return None, "made by another version or with other options"
        return (
            (features, "") if payload == hash_of(features) else (None, "its content does not match its hash")
        )

    def save(self, representation: str, features: np.ndarray) -> None:
        """Write the features of a representation. Raises OSError if the disk does not take them."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = self.path(representation)
        description = self.description(representation) | {"payload": hash_of(features)}
        with locked(path), replacing(path) as temporary:
            try:
                save_file(
                    {"features": features}, temporary, metadata={"description": json.dumps(description)}
                )
            except SafetensorError as error:  # safetensors reports a full disk so
                raise OSError(str(error)) from error


# --- locks


def lock_path(path: Path) -> Path:
    """The hidden lock file of a path."""
    return path.with_name(f".{path.stem}.lock")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file that is going to be written.

    Without `wait` it raises Held at once if another process has the lock. Where the file system has no locks
    it goes on without and logs a warning: files stay whole, work may be done twice.
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
    """Hold a folder for one process.
    Raises Held if another process does, Refused if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            f"cannot write to {folder}: {error.strerror or error}; choose another --output-dir"
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "folder", wait=False))
        except Held:
            raise Held(
                f"another process holds {folder}: wait for it, or choose another --output-dir"
            ) from None
        yield


def is_held(folder: Path) -> bool:
    """True if a process holds the folder now; False where the file system has no locks."""
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
    """State of a cell's files: `kind` is done, missing, damaged or stale; `why` explains it in one line.

    `record` is what a readable checkpoint holds, so that nobody reads the file a second time.
    """

    kind: str
    why: str = ""
    record: dict | None = None


PHRASES = {
    "data": "the weights of the data set",
    "labels": "the labels",
    "split": "the rows of the split",
    "layers": "the layers",
    "metadata": "the metadata columns",
}


def differences(made_with: dict, requested: dict) -> list[str]:
    """Phrases for each input in `requested` that differs from `made_with`, a file's.

    `requested` may leave out what is not known yet.
    """
    phrases = []
    for name, value in requested.items():
        old = made_with.get(name)
        if old != value:
            changed = f"{PHRASES[name]} changed" if name in PHRASES else f"{name} was {old}, is now {value}"
            phrases.append(changed)
    return phrases


class UnfinishedRuns:
    """The finished runs of a cell that is not finished, a file each, in a hidden folder of the output folder.

    `made_with` describes what the cell's numbers depend on; runs of another cell by that name are not used.
    """

    def __init__(self, folder: Path, cell: str, made_with: dict):
        self.folder = folder / ".unfinished" / cell
        self.fingerprint = hash_of(made_with)

    def path(self, number: int) -> Path:
        """The file of a run."""
        return self.folder / f"run{number}.npz"

    def load(self, number: int) -> dict[str, np.ndarray] | None:
        """The arrays of a run; None if there is none, if its file is damaged, or if it was made otherwise."""
        import numpy as np

        try:
            with np.load(self.path(number), allow_pickle=False) as arrays:
                return dict(arrays) if str(arrays["fingerprint"]) == self.fingerprint else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            log.info(f"{self.path(number)} is damaged and its run is trained again: {error}")
            return None

    def save(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of a run."""
        import numpy as np

        buffer = io.BytesIO()
        content: dict[str, Any] = {**arrays, "fingerprint": np.array(self.fingerprint)}
        np.savez_compressed(buffer, **content)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path(number), buffer.getvalue())

    def remove(self) -> None:
        """Remove the files, once the cell is finished."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):  # other cells are unfinished
                self.folder.parent.rmdir()


class ResultStore:
    """The finished cells of an output folder, by name:
    a checkpoint each, with the predictions behind its counts.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.predictions = folder / "predictions"

    def names(self) -> list[str]:
        """Names of the checkpoints in the folder, whole or not."""
        return [
            path.stem for path in sorted(self.checkpoints.glob("*.json")) if not path.name.startswith(".")
        ]

    def path(self, name: str) -> Path:
        """The checkpoint of a cell."""
        return self.checkpoints / f"{name}.json"

    def predictions_path(self, name: str) -> Path:
        """The predictions of a cell."""
        return self.predictions / f"{name}.npz"

    def load(self, name: str) -> dict:
        """A finished cell's record, checked against its hash and its predictions' hash.

        Raises OSError or ValueError.
        """
        record = json.loads(self.path(name).read_bytes())
        if not isinstance(record, dict) or "checksum" not in record:
            raise ValueError("no checksum")
        if record["checksum"] != hash_of({k: v for k, v in record.items() if k != "checksum"}):
            raise ValueError("its content does not match its hash")
        if record["cell"] != name:
            raise ValueError(f"it is the checkpoint of {record['cell']}")
        if record["predictions_hash"] != hash_of(self.predictions_path(name).read_bytes()):
            raise ValueError("its predictions do not match their hash")
        return record

    def load_predictions(self, name: str) -> dict[str, np.ndarray]:
        """Of a finished cell by part: row numbers and labels (n,), predictions (R, n)."""
        import numpy as np

        with np.load(self.predictions_path(name), allow_pickle=False) as arrays:
            return dict(arrays)

    def state(self, name: str, requested: dict) -> State:
        """Whether the cell is finished, and was made with what `requested` describes."""
        if not self.path(name).exists():
            return State("missing")
        try:
            record = self.load(name)
        except FileNotFoundError:
            return State("damaged", "its predictions are missing")
        except (OSError, ValueError, KeyError, RecursionError) as error:
            return State("damaged", str(error) or type(error).__name__)
        # Cells that were made before there were other kinds of split, or folds, do not speak of them.
        older = {"split_kind": "random", "folds": 0, "partitions": 1}
        made_with = older | record.get("asked", {}) | record["made_with"]
        changed = differences(made_with, requested)
        return State("stale", "; ".join(changed), record) if changed else State("done", record=record)

    def save(self, name: str, record: dict, predictions: dict[str, np.ndarray], made_with: dict) -> None:
        """Write the predictions, then the checkpoint that holds their hash. Call it under the cell's lock."""
        import numpy as np

        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**predictions, "fingerprint": np.array(hash_of(made_with))}
        np.savez_compressed(buffer, **arrays)
        write_bytes(self.predictions_path(name), buffer.getvalue())
        record = {
            **record,
            "cell": name,
            "made_with": made_with,
            "fingerprint": hash_of(made_with),
            "predictions_hash": hash_of(buffer.getvalue()),
        }
        write_json(self.path(name), {**record, "checksum": hash_of(record)})

    def set_aside(self, name: str, reason: str) -> Path:
        """Move a cell's files to set_aside/, with the reason beside them. Returns the checkpoint's new path.

        Call it under the cell's lock.
        """
        folder = self.folder / "set_aside"
        folder.mkdir(exist_ok=True)
        number = 1
        while (target := folder / f"{name}.{number}.json").exists():
            number += 1
        write_bytes(target.with_suffix(".txt"), f"{reason}\n".encode())
        os.replace(self.path(name), target)
        if self.predictions_path(name).exists():
            os.replace(self.predictions_path(name), target.with_suffix(".npz"))
        sync(self.checkpoints)
        return target

    @contextlib.contextmanager
    def locking(self, names: Iterable[str]) -> Iterator[None]:
        """Hold the locks of these cells, so that no other process computes them too."""
        with contextlib.ExitStack() as locks:
            for name in names:
                locks.enter_context(locked(self.path(name)))
            yield

    def clear(self, requested: dict[str, dict], needed: Iterable[str], rerun_stale: bool) -> list[str]:
        """Make `checkpoints/` hold finished cells only; returns one line for each file that was moved.

        `requested` describes every cell that could be in the folder, `needed` names those of this process.
        Damaged cells are set aside, stale ones too with `rerun_stale`. Raises Refused, before anything
        is moved, if a needed cell is stale and may not be run again.
        """
        states = {name: self.state(name, description) for name, description in requested.items()}
        stale = {name: states[name].why for name in needed if states[name].kind == "stale"}
        if stale and not rerun_stale:
            reasons = " | ".join(dict.fromkeys(stale.values()))
            raise Refused(
                f"{len(stale)} finished cells in {self.folder} were made with other settings ({reasons}): "
                "choose another --output-dir, or give --rerun-stale to set them aside and run them again"
            )
        lines = []
        for name, state in states.items():
            if state.kind == "damaged" or (state.kind == "stale" and rerun_stale):
                with locked(self.path(name)):
                    target = self.set_aside(name, f"{state.kind}: {state.why}")
                new_path = target.relative_to(self.folder)
                lines.append(f"Set aside {state.kind} checkpoint {name} ({state.why}) as {new_path}")
        return lines
