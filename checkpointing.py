"""Atomic files, fingerprints, the feature cache, locks and the result store.

A reader sees a file's old content or its new one, never a part. Every file carries the description of what
made it and a hash of what it holds; both are checked before it is used. NumPy and safetensors are imported
where arrays are written or read, so that --status answers at once. (Over 400 lines, because the guarantees
hold together: whoever changes how a file is written must see who reads it.)

Tests end the process at a named moment of a write through the environment: see `crash_point`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import filelock
import xxhash

from ablation.stopping import cleaners, unstoppable

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("visual_ablation")

# Seconds: a file touched less than this before it was hashed could change again at the same time stamp.
SETTLED = 2.0


class Refused(Exception):
    """The output folder cannot be used as requested. The message names the remedy; exit status 2."""


class Held(Exception):
    """Another process holds the output folder; exit status 3."""


class CannotWrite(OSError):
    """The disk does not take a file: it is full, read-only, or the folder is gone. `errno` says which."""

    @classmethod
    def to(cls, path: Path, error: OSError) -> CannotWrite:
        """The error of writing to a path, in one line."""
        if isinstance(error, CannotWrite):
            return error
        raised = cls(error.errno, error.strerror or str(error))
        raised.filename = str(path)
        return raised

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


# --- files


def canonical(value: Any) -> bytes:
    """JSON with one spelling for equal values. Raises ValueError for what is nested too deeply."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def hash_of(value: Any) -> str:
    """128-bit xxHash of a JSON value, or of bytes and arrays as they lie in memory."""
    plain = isinstance(value, (dict, list, tuple, str, int, float, bool, type(None)))
    return xxhash.xxh3_128(canonical(value) if plain else value).hexdigest()


being_written: set[Path] = set()  # hidden files of this process, to be removed if it is ended


def remove_unfinished() -> None:
    """Remove the hidden files that this process is writing."""
    for path in list(being_written):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


cleaners.append(remove_unfinished)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Raise CannotWrite, which names the path, for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise CannotWrite.to(path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to, for the block of a `with` statement.

    If the block ends without an error, the hidden file is synced to disk and takes the place of `path`;
    otherwise the old file is whole. A signal waits for that. The folder must be there: one that was removed
    is not made again, half empty. Raises CannotWrite.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with unstoppable():
        being_written.add(temporary)
        try:
            with writing_to(path):
                for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                    if is_abandoned(leftover):
                        leftover.unlink(missing_ok=True)
            crash_point("before")
            yield temporary
            crash_point("half", temporary)
            with writing_to(path):
                sync(temporary)
                crash_point("written")
                os.replace(temporary, path)
                crash_point("renamed")
                sync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # the folder is gone, and the file with it
                temporary.unlink(missing_ok=True)
            being_written.discard(temporary)


CRASH = "VISUAL_ABLATION_CRASH"  # for tests: "<moment> <n>" kills the process at the n-th such moment
crash_moments: dict[str, int] = {}  # how often each has been passed


def crash_point(moment: str, temporary: Path | None = None) -> None:
    """Kill this process, as kill -9 does, if the environment asks for it at this moment.

    Moments of a write: before, half (the hidden file, `temporary`, is cut in two), written, renamed; and of
    an experiment: cached (between the cache and the first cell), between (a cell's predictions and its
    checkpoint), committed (between a checkpoint and its event).
    """
    wanted = os.environ.get(CRASH, "").split()
    if not wanted or wanted[0] != moment:
        return
    crash_moments[moment] = crash_moments.get(moment, 0) + 1
    if crash_moments[moment] == int(wanted[1]):
        if temporary is not None:
            os.truncate(temporary, temporary.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def is_abandoned(temporary: Path) -> bool:
    """True if the process of this machine that was writing a temporary file is gone."""
    pid = temporary.name.split(".")[-2]
    if not temporary.name.endswith(f".{socket.gethostname()}.{pid}.tmp"):
        return False  # another machine's, which may be at work
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):  # another user's process; not a name of ours
        return False
    return False


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk. Some file systems flush no folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises CannotWrite."""
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole. Raises CannotWrite."""
    with replacing(path) as temporary, writing_to(path):
        temporary.write_bytes(content)


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises OSError, at once, for a folder, a pipe or a device in its place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "Is a directory" if stat.S_ISDIR(mode) else "Is no file", str(path))
    with open(descriptor, "rb") as file:
        return file.read()


def parse_json(content: bytes) -> dict:
    """The JSON object in a file that this program wrote.

    Raises ValueError for anything else: other values, NaN, values nested too deeply.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(content, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replace a file by a JSON value; NaN and infinity are refused with ValueError."""
    write_bytes(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def with_checksum(value: dict) -> dict:
    """A JSON object with its own hash under `checksum`."""
    return {**value, "checksum": hash_of(value)}


def has_checksum(value: dict) -> bool:
    """True if the hash under `checksum` is that of the rest. Raises ValueError if nested too deeply."""
    return value.get("checksum") == hash_of({k: v for k, v in value.items() if k != "checksum"})


def read_own(path: Path) -> dict:
    """A JSON object that this program wrote with `with_checksum`, or before there were checksums.

    {} if there is no such file. Raises OSError or ValueError if it is damaged.
    """
    try:
        value = parse_json(read_bytes(path))
    except FileNotFoundError:
        return {}
    if "checksum" in value and not has_checksum(value):
        raise ValueError("its content does not match its hash")
    value.pop("checksum", None)
    return value


def append_event(path: Path, **event) -> None:
    """Append a line of JSON with the time in UTC.

    After a line that was cut off, a new line is begun first. Raises CannotWrite.
    """
    with unstoppable(), writing_to(path), path.open("ab+") as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
        line = json.dumps(with_check({"time": utc_now(), **event}))
        file.write(f"{'' if whole else chr(10)}{line}\n".encode())


def with_check(event: dict) -> dict:
    """An event with a short hash of it."""
    bare = {name: value for name, value in event.items() if name != "check"}
    return {**bare, "check": hash_of(bare)[:8]}


def read_events(path: Path) -> list[dict]:
    """The whole lines of a file that `append_event` wrote; what a kill or a disk damaged is left out."""
    try:
        lines = read_bytes(path).splitlines()
    except OSError:
        return []
    return [event for event in map(event_in, lines) if event]


def event_in(line: bytes) -> dict:
    """The event in a line; {} if it is damaged."""
    with contextlib.suppress(ValueError):
        event = parse_json(line)
        time.strptime(str(event.get("time")), TIME)
        if isinstance(event.get("event"), str) and ("check" not in event or with_check(event) == event):
            return event
    return {}


TIME = "%Y-%m-%dT%H:%M:%SZ"


def utc_now() -> str:
    """The time as 2026-01-31T12:00:00Z."""
    return time.strftime(TIME, time.gmtime())


# --- the identity of a data set's content


def file_stamps(files: list[str]) -> list:
    """For each file its real path, size, times and inode:
    they change when it is edited, replaced, moved or touched.
    """
    stamps = []
    for file in files:
        found = os.stat(file)
        times = (found.st_mtime_ns, found.st_ctime_ns)
        stamps.append([os.path.realpath(file), found.st_size, *times, found.st_ino])
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
        OSError, ValueError, KeyError
    ):  # absent or damaged: computed anew, the same value
        remembered = parse_json(read_bytes(memory))
        if remembered["check"] == hash_of([remembered["identity"], stamps, scope]):
            return remembered["identity"], True
    identity = compute()
    newest = max(max(mtime, ctime) for _, _, mtime, ctime, _ in stamps)
    if newest < now - SETTLED * 1e9 and file_stamps(files) == stamps:
        try:
            make_folder(memory.parent)
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

    `description_of(representation)` gives the version and the settings that change its numbers. `variant`
    stands in the names of the files of an audit's changed rows, or of features of another type than float32.
    """

    dtype = "float32"  # of the stored features

    def __init__(
        self,
        cache_dir: Path,
        identity: str,
        layers: list[str],
        description_of: Callable[[str], dict],
        variant: str = "",
    ):
        self.folder = cache_dir / identity
        self.source = {"data": identity, "layers": hash_of(layers)}
        self.description_of = description_of
        self.variant = variant

    def path(self, representation: str) -> Path:
        """The file of a representation."""
        return self.folder / f"{representation}{self.variant}.safetensors"

    def is_there(self, representations: Iterable[str]) -> bool:
        """True if each of these representations has a file, whatever is in it."""
        return all(os.path.lexists(self.path(name)) for name in representations)

    def description(self, representation: str) -> dict:
        """What the features depend on."""
        return self.source | {"representation": representation} | self.description_of(representation)

    def load(self, representation: str, shape: tuple[int, int]) -> tuple[dict[str, np.ndarray] | None, str]:
        """The stored arrays, mapped into memory from the file: `features` (N, L*k) of that shape, and what
        belongs to their type; or None and the reason: '' if there is no file, else what is wrong with it.
        """
        path = self.path(representation)
        if not os.path.lexists(path):
            return None, ""
        try:
            arrays, made_with = map_arrays(path)
        except (OSError, ValueError) as error:
            return None, f"unreadable ({error})"
        if made_with != self.description(representation):
            return None, "made by another version or with other options"
        features = arrays.get("features")
        if features is None or features.shape != shape or features.dtype != self.dtype:
            return None, "of another shape"
        return arrays, ""

    def save(self, representation: str, arrays: dict[str, np.ndarray]) -> None:
        """Write the arrays of a representation. Raises CannotWrite if the disk does not take them."""
        path = self.path(representation)
        make_folder(path.parent)
        with locked(path):
            write_arrays(path, arrays, self.description(representation))

    @contextlib.contextmanager
    def growing(
        self, representation: str, shape: tuple[int, int], first: dict[str, np.ndarray]
    ) -> Iterator[ArrayFile]:
        """The file of a representation, whose features are to be written row by row in a `with` statement,
        after the arrays `first`.
        """
        layout: ArrayLayout = {name: (str(x.dtype), x.shape) for name, x in first.items()}
        layout["features"] = (self.dtype, shape)
        with growing_arrays(self.path(representation), layout, self.description(representation)) as file:
            for name, x in first.items():
                file.append(name, x)
            yield file


def write_arrays(path: Path, arrays: dict[str, np.ndarray], made_with: dict) -> None:
    """Write arrays as safetensors, with what they depend on and a hash of each. Raises CannotWrite."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    description = json.dumps({**made_with, "payload": hash_of_arrays(arrays)})
    with replacing(path) as temporary, writing_to(path):
        try:
            save_file(arrays, temporary, metadata={"description": description})
            os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes it readable for its owner alone
        except SafetensorError as error:  # safetensors reports a full disk so
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code.group(1)) if code else 0, str(error)) from error


ARRAY_TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8"}  # NumPy's, safetensors'
ArrayLayout = dict[str, tuple[str, tuple[int, ...]]]  # type and shape by name
PIECE_BYTES = 2**26  # hashed at a time, so that a signal is answered in between


class ArrayFile:
    """A safetensors file of arrays that do not fit the memory: each is written in pieces, one after another.

    `layout` has the type and shape of each array. What is written is what `write_arrays` would write.
    """

    def __init__(self, file: BinaryIO, layout: ArrayLayout, made_with: dict):
        self.file, self.layout, self.made_with = file, layout, made_with
        self.digests = {name: xxhash.xxh3_128() for name in layout}
        self.written = dict.fromkeys(layout, 0)
        file.write(self.header("0" * 32))  # in place of the hash, which is as long

    def header(self, payload: str) -> bytes:
        """What stands before the arrays."""
        tensors: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in self.layout.items():
            start, end = end, end + array_bytes(dtype, shape)
            tensors[name] = {"dtype": ARRAY_TYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        description = json.dumps({**self.made_with, "payload": payload})
        content = json.dumps({"__metadata__": {"description": description}, **tensors}).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content

    def append(self, name: str, piece: np.ndarray) -> None:
        """Write the next rows of an array, of its type."""
        content = piece.tobytes()
        self.digests[name].update(content)
        self.written[name] += len(content)
        self.file.write(content)

    def finish(self) -> None:
        """Write the hash of all that was written. Raises ValueError if that is not all of the arrays."""
        for name, (dtype, shape) in self.layout.items():
            if self.written[name] != array_bytes(dtype, shape):
                raise ValueError(f"{self.written[name]} bytes of {name} were written, of {dtype} {shape}")
        hashes = {name: digest.hexdigest() for name, digest in self.digests.items()}
        self.file.seek(0)
        self.file.write(self.header(hash_of([[n, *self.layout[n], hashes[n]] for n in sorted(hashes)])))


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    import numpy as np

    return math.prod(shape) * np.dtype(dtype).itemsize


@contextlib.contextmanager
def growing_arrays(path: Path, layout: ArrayLayout, made_with: dict) -> Iterator[ArrayFile]:
    """A file of arrays that takes its place when the block of a `with` statement has written them all.

    Raises CannotWrite.
    """
    with replacing(path) as temporary, writing_to(path), temporary.open("wb") as file:
        arrays = ArrayFile(file, layout, made_with)
        yield arrays
        arrays.finish()


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays that `write_arrays` wrote, and what they depend on.

    Raises OSError or ValueError if the file is not whole.
    """
    with opened_arrays(path) as (file, made_with):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return checked_arrays(arrays, made_with)


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """As `read_arrays`, but the arrays stay in the file, which the system maps into memory.

    Raises OSError or ValueError if the file is not whole.
    """
    import numpy as np

    with opened_arrays(path) as (_, made_with), path.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))  # safetensors checked it
        header.pop("__metadata__", None)
        numpy_types = {theirs: ours for ours, theirs in ARRAY_TYPES.items()}
        arrays = {}
        for name, tensor in header.items():
            # Changes of an array would stay in this process; nothing changes one.
            where = {"offset": 8 + size + tensor["data_offsets"][0], "shape": tuple(tensor["shape"])}
            dtype = numpy_types[tensor["dtype"]]
            empty = 0 in tensor["shape"]  # nothing to map
            arrays[name] = np.empty(tensor["shape"], dtype) if empty else np.memmap(path, dtype, "c", **where)
    return checked_arrays(arrays, made_with)


@contextlib.contextmanager
def opened_arrays(path: Path) -> Iterator[tuple[Any, dict]]:
    """A safetensors file of this program and its description. Raises OSError or ValueError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # a pipe would block the reader
        raise OSError("it is no file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file, parse_json((file.metadata() or {}).get("description", "").encode())
    except (SafetensorError, TypeError, KeyError, AttributeError) as error:  # also a type that NumPy lacks
        raise ValueError(str(error)) from error


def checked_arrays(arrays: dict[str, np.ndarray], made_with: dict) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and what they depend on, without the hash. Raises ValueError if they do not match it."""
    payload, right = made_with.pop("payload", None), [hash_of_arrays(arrays)]
    if list(arrays) == ["features"]:  # as an earlier version wrote it; FeatureCache compares shape and type
        right.append(hash_of_array(arrays["features"]))
    if payload not in right:
        raise ValueError("its content does not match its hash")
    return arrays, made_with


def hash_of_arrays(arrays: dict[str, np.ndarray]) -> str:
    """A hash of the arrays with their names, types and shapes."""
    return hash_of(
        [[name, str(x.dtype), list(x.shape), hash_of_array(x)] for name, x in sorted(arrays.items())]
    )


def hash_of_array(x: np.ndarray) -> str:
    """`hash_of` an array, piece by piece."""
    digest, content = xxhash.xxh3_128(), x.reshape(-1).view("uint8")
    for start in range(0, len(content), PIECE_BYTES):
        digest.update(content[start : start + PIECE_BYTES].data)
    return digest.hexdigest()


UMASK = os.umask(0o077)  # the process's mask of file permissions, which can only be read by setting it
os.umask(UMASK)


# --- locks


def lock_path(path: Path) -> Path:
    """The hidden lock file of a path."""
    return path.with_name(f".{path.stem}.lock")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file that is going to be written. Its folder must be there.

    Without `wait` it raises Held at once if another process has the lock. Where the file system has no locks
    it goes on without and logs a warning: files stay whole, work may be done twice. The lock of a process
    that is gone is free.
    """
    if not path.parent.is_dir():  # filelock would make it
        raise CannotWrite.to(path, FileNotFoundError(errno.ENOENT, "its folder is gone"))
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
    open_folder(folder)
    holder = folder / ".folder.holder"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "folder", wait=False))
        except Held:
            raise Held(
                f"another process holds {folder}{named_holder(holder)}: wait for it, or choose another "
                "--output-dir"
            ) from None
        write_bytes(holder, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        yield


@contextlib.contextmanager
def taking_part(folder: Path) -> Iterator[None]:
    """Work in a folder beside other processes, and be counted by `parts_at_work` meanwhile.
    Raises Refused if it cannot be written to.
    """
    open_folder(folder)
    for path in part_locks(folder):
        if not is_locked(path.with_name(path.stem[1:])):  # its process was killed
            path.unlink(missing_ok=True)
    own = folder / f"part-{re.sub(r'[^A-Za-z0-9]', '-', socket.gethostname())}-{os.getpid()}"
    with locked(own):
        try:
            yield
        finally:
            lock_path(own).unlink(missing_ok=True)


def parts_at_work(folder: Path) -> int:
    """How many processes take part in a folder now; 0 where the file system has no locks."""
    return sum(is_locked(path.with_name(path.stem[1:])) for path in part_locks(folder))


def part_locks(folder: Path) -> list[Path]:
    """The lock files of processes that take part in a folder, or were killed while they did."""
    return sorted(folder.glob(".part-*.lock"))


def open_folder(folder: Path) -> None:
    """Make an output folder, if it is not there. Raises Refused if it cannot be written to."""
    refuse_place(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_unwritable(folder)
    except OSError as error:
        raise Refused(
            f"cannot write to {folder}: {error.strerror or error}; choose another --output-dir"
        ) from None


LONGEST_FILE = "x" * 212  # no path of a file within an output folder is longer


def refuse_place(folder: Path) -> None:
    """Raise Refused if a folder cannot be made or written to, as far as can be told without writing."""
    try:
        with contextlib.suppress(FileNotFoundError):
            (folder / LONGEST_FILE).lstat()
        present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not present.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
        if not os.access(present, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        also = " or a data set with a shorter name" if error.errno == errno.ENAMETOOLONG else ""
        raise Refused(
            f"cannot write to {folder}: {error.strerror or error}; choose another --output-dir{also}"
        ) from None


def named_holder(holder: Path) -> str:
    """The process that holds a folder, in brackets; '' if it left no word."""
    try:
        return f" ({read_bytes(holder).decode(errors='replace')[:300]})"
    except OSError:
        return ""


def refuse_unwritable(folder: Path) -> None:
    """Write a hidden file to a folder and remove it. Raises OSError if that is not possible."""
    probe = folder / ".writable"
    with unstoppable():
        write_bytes(probe, b"x")
        probe.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """True if a process holds the folder now; False where the file system has no locks."""
    return is_locked(folder / "folder")


def is_locked(path: Path) -> bool:
    """True if a process has the lock of a file now; False where the file system has no locks."""
    lock = filelock.FileLock(lock_path(path))
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


FULL_CACHE = {"cache_dtype": "float32"}  # of cells that do not speak of it

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


class KeptArrays:
    """Arrays in files of a folder that is made when it is needed.

    `made_with` describes what their numbers depend on: files that were made otherwise are not used.
    """

    def __init__(self, folder: Path, made_with: dict):
        self.folder = folder
        self.made_with = {"fingerprint": hash_of(made_with)}

    def path(self, name: str) -> Path:
        """The file of a name."""
        return self.folder / f"{name}.safetensors"

    def prepare(self) -> None:
        """Make the folder. Raises CannotWrite."""
        make_folder(self.folder)

    def names_in(self, name: str) -> set[str]:
        """Names of the arrays in a file, by its header alone; none if it was made otherwise."""
        try:
            with opened_arrays(self.path(name)) as (file, made_with):
                is_own = made_with.get("fingerprint") == self.made_with["fingerprint"]
                return set(file.keys()) if is_own else set()
        except (OSError, ValueError):
            return set()

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a file; None if there is none, if it is damaged, or if it was made otherwise."""
        path = self.path(name)
        if not os.path.lexists(path):
            return None
        try:
            arrays, made_with = read_arrays(path)
        except (OSError, ValueError) as error:
            log.info(f"{path} is damaged and not used: {error}")
            with contextlib.suppress(OSError):
                remove_tree(path)  # a folder in its place cannot be replaced
            return None
        return arrays if made_with == self.made_with else None

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write arrays. Raises CannotWrite."""
        self.prepare()
        write_arrays(self.path(name), arrays, self.made_with)


class Unfinished(KeptArrays):
    """Parts of what is not finished (the runs of a cell, blocks of features), in a hidden folder."""

    def __init__(self, folder: Path, name: str, made_with: dict):
        super().__init__(folder / ".unfinished" / name, made_with)

    def prepare(self) -> None:
        """Make the folder, in one that is there: it is not made again if that is gone. Raises CannotWrite."""
        if self.folder.parent.parent.is_dir():
            super().prepare()

    def remove(self) -> None:
        """Remove the files, once the whole is finished."""
        remove_tree(self.folder)
        with contextlib.suppress(OSError):  # others are unfinished
            self.folder.parent.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


NO_FILE = (errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENOTDIR)  # what is no regular file
FILES = ("results.json", "results.txt", "manifest.json", "events.jsonl", "report.html")
FOLDERS = ("checkpoints", "predictions")
LATER_FOLDERS = (
    "set_aside",
    ".unfinished",
    "null",
    "figures",
    "tables",
    "tensorboard",
)  # made when they are needed


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
        record = parse_json(read_bytes(self.path(name)))
        if "checksum" not in record:
            raise ValueError("no checksum")
        if not has_checksum(record):
            raise ValueError("its content does not match its hash")
        if not all(isinstance(record.get(key, {}), dict) for key in ("asked", "made_with")):
            raise ValueError("it does not say what it was made with")
        if record["cell"] != name:
            raise ValueError(f"it is the checkpoint of {record['cell']}")
        if record["predictions_hash"] != hash_of(read_bytes(self.predictions_path(name))):
            raise ValueError("its predictions do not match their hash")
        return record

    def load_predictions(self, name: str) -> dict[str, np.ndarray]:
        """Of a finished cell by part: row numbers and labels (n,), predictions (R, n)."""
        import numpy as np

        content = io.BytesIO(read_bytes(self.predictions_path(name)))
        with np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)

    def state(self, name: str, requested: dict) -> State:
        """Whether the cell is finished, and was made with what `requested` describes."""
        if not os.path.lexists(self.path(name)):
            return State("missing")
        try:
            record = self.load(name)
        except FileNotFoundError:
            return State("damaged", "one of its files is missing")
        except OSError as error:
            if error.errno not in NO_FILE:  # the disk fails for the moment: the cell may be whole
                raise Refused(f"cannot read {self.path(name)}: {error.strerror or error}") from None
            return State("damaged", str(error))
        except (ValueError, KeyError) as error:
            return State("damaged", " ".join(str(error).split()) or type(error).__name__)
        # Cells that were made before there were other kinds of split, or folds, do not speak of them.
        older = FULL_CACHE | {"split_kind": "random", "folds": 0, "partitions": 1}
        made_with = older | record.get("asked", {}) | record.get("made_with", {})
        changed = differences(made_with, FULL_CACHE | requested)
        return State("stale", "; ".join(changed), record) if changed else State("done", record=record)

    def save(self, name: str, record: dict, predictions: dict[str, np.ndarray], made_with: dict) -> None:
        """Write the predictions, then the checkpoint that holds their hash. Call it under the cell's lock."""
        import numpy as np

        buffer = io.BytesIO()
        arrays: dict[str, Any] = {**predictions, "fingerprint": np.array(hash_of(made_with))}
        np.savez_compressed(buffer, **arrays)
        write_bytes(self.predictions_path(name), buffer.getvalue())
        crash_point("between")
        record = {
            **record,
            "cell": name,
            "made_with": made_with,
            "fingerprint": hash_of(made_with),
            "predictions_hash": hash_of(buffer.getvalue()),
        }
        write_json(self.path(name), with_checksum(record))

    def check(self) -> None:
        """Raise Refused for a file where a folder belongs, a folder or pipe where a file belongs, and for a
        folder that cannot be written to.
        """
        for name in FILES:
            path = self.folder / name
            replaced = is_dangling(path) and name != "events.jsonl"  # which is appended to
            if os.path.lexists(path) and not path.is_file() and not replaced:
                raise Refused(f"{path} is no file: move it away, or choose another --output-dir")
        for name in (*FOLDERS, *LATER_FOLDERS):
            path = self.folder / name
            if os.path.lexists(path) and not path.is_dir():
                raise Refused(f"{path} is no folder: move it away, or choose another --output-dir")
            try:
                if path.is_dir():
                    refuse_unwritable(path)
            except OSError as error:
                raise Refused(f"{error}; choose another --output-dir") from None

    def prepare(self) -> None:
        """Make the folders of checkpoints and predictions, in an output folder that is there.

        They are made once: one that is removed later is missed, and not made again. Raises CannotWrite.
        """
        for name in FOLDERS:
            with writing_to(self.folder / name):
                (self.folder / name).mkdir(exist_ok=True)

    def set_aside(self, name: str, reason: str) -> Path:
        """Move a cell's files to set_aside/, with the reason beside them. Returns the checkpoint's new path.

        Call it under the cell's lock. Raises CannotWrite.
        """
        target = self.set_aside_path(self.path(name), reason)
        if os.path.lexists(self.predictions_path(name)):
            with writing_to(target):
                os.replace(self.predictions_path(name), target.with_suffix(".npz"))
        return target

    def set_aside_path(self, path: Path, reason: str) -> Path:
        """Move a file, or whatever is in its place, to set_aside/ with the reason. Returns its new path."""
        folder = self.folder / "set_aside"
        with writing_to(folder):
            folder.mkdir(exist_ok=True)
            number = 1
            while any(folder.glob(f"{glob.escape(path.stem)}.{number}.*")):
                number += 1
            target = folder / f"{path.stem}.{number}{path.suffix}"
            write_bytes(target.with_name(f"{path.stem}.{number}.txt"), f"{reason}\n".encode())
            os.replace(path, target)
            sync(path.parent)
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
        Raises Refused, before anything is moved, if a needed cell is stale and may not be run again.
        """
        return (
            self.clear_cells(requested, needed, rerun_stale)
            + self.clear_foreign(requested)
            + self.repair_events()
        )

    def clear_cells(self, requested: dict[str, dict], needed: Iterable[str], rerun_stale: bool) -> list[str]:
        """Set damaged ones of these cells aside, and with `rerun_stale` stale ones; see `clear`."""
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
                    # Another process may have made it anew while this one waited for the lock.
                    if self.state(name, requested[name]).kind in ("done", "missing"):
                        continue
                    target = self.set_aside(name, f"{state.kind}: {state.why}")
                new_path = target.relative_to(self.folder)
                lines.append(f"Set aside {state.kind} checkpoint {name} ({state.why}) as {new_path}")
        return lines

    def clear_foreign(self, known: Collection[str]) -> list[str]:
        """Set aside what is no checkpoint of a cell; returns one line for each file that was moved."""
        foreign = []
        for path in sorted(self.checkpoints.glob("*")):
            if not path.name.startswith(".") and not (path.suffix == ".json" and path.stem in known):
                try:
                    if path.suffix != ".json":
                        raise ValueError("it is no checkpoint")
                    self.load(path.stem)  # a cell of other settings, such as another file's layer sets
                except (OSError, ValueError, KeyError) as error:
                    foreign.append((path, f"damaged: {' '.join(str(error).split())}"))
        for path in sorted(self.predictions.glob("*")):
            if path.suffix == ".npz" and not path.is_file():
                foreign.append((path, "damaged: it is no file"))
        moved = [(path, reason, self.set_aside_path(path, reason)) for path, reason in foreign]
        return [
            f"Set aside {path.relative_to(self.folder)} ({reason}) as {target.relative_to(self.folder)}"
            for path, reason, target in moved
        ]

    def repair_events(self) -> list[str]:
        """Set events.jsonl aside if it has damaged lines, and write the whole ones anew.
        Returns one line for the log if so.
        """
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        lines = read_bytes(path).splitlines(keepends=True)
        whole = [line for line in lines if event_in(line)]
        if len(whole) == len(lines) and b"".join(lines[-1:]).endswith(b"\n"):
            return []
        target = self.set_aside_path(path, f"damaged: {len(lines) - len(whole)} of its lines are not whole")
        write_bytes(path, b"".join(whole))
        return [f"Set aside damaged events.jsonl as {target.relative_to(self.folder)}; whole lines are kept"]

    def remove_unfinished_of(self, names: Iterable[str]) -> None:
        """Remove what a kill right after the commit of these cells left of their runs."""
        for name in names:
            Unfinished(self.folder, name, {}).remove()

    def read_own(self, name: str) -> dict:
        """A file of this folder as `read_own` gives it; one that is damaged is set aside, and {} returned."""
        path = self.folder / name
        try:
            return read_own(path)
        except (OSError, ValueError) as error:
            target = self.set_aside_path(path, f"damaged: {error}").relative_to(self.folder)
            log.warning(f"{name} is damaged ({error}): set aside as {target}, and made anew")
            return {}


def is_dangling(path: Path) -> bool:
    """True for a link to nothing."""
    return path.is_symlink() and not path.exists()
