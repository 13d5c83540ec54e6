"""Jobs in processes of their own, each a fork of this one: it has everything that a job needs, at no cost.

The thread that forks is the only one that computes here, so no lock of a library is held by a thread that the
fork does not have. A job must not use threads that a library keeps, such as torch's: a fork waits for them
forever, so `Pool` gives it one. Nor may it use autograd if a GPU is in sight (`training.may_fork`). A fork
does its job, tells the result through a pipe, and ends; it ends with this process.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import json
import logging
import os
import selectors
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from ablation.stopping import SIGNALS, unstoppable

log = logging.getLogger("visual_ablation")

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
PIPE_BYTES = 2**16  # bytes of a pipe


def can_fork() -> bool:
    """True on Linux: elsewhere libraries of the system do not bear a fork."""
    return sys.platform == "linux"


class Travelling(Protocol):
    """What knows how a job's result travels."""

    def to_bytes(self, result: Any) -> bytes:
        """A result as bytes."""

    def from_bytes(self, content: bytes) -> Any:
        """The result again."""


class Fork:
    """A job that waits for a core, or is at work in a process."""

    def __init__(self, job: Callable[[], Any], batch: Travelling):
        self.job, self.batch = job, batch
        self.pid, self.pipe = 0, -1
        self.told = bytearray()
        self.failure: OSError | None = None  # of its beginning

    def begin(self) -> None:
        """Do the job in a fork of this process. Raises OSError if the system lacks processes or memory."""
        reading, writing = os.pipe()
        parent = os.getpid()
        # A signal that a terminal sends to both must not run this process's handler in the fork.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with warnings.catch_warnings():
                # Of threads: see the module's first lines.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
            if self.pid == 0:
                os.close(reading)
                do_and_tell(self.job, self.batch, writing, parent)
            self.pipe = reading
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def fileno(self) -> int:
        """The pipe, for a selector."""
        return self.pipe

    def read(self) -> bool:
        """Read what the process tells; True once it has ended."""
        content = os.read(self.pipe, PIPE_BYTES)
        self.told += content
        return not content

    def end(self) -> None:
        """Wait for the process, which has nothing more to tell."""
        os.close(self.pipe)
        with contextlib.suppress(ChildProcessError):  # the system has done so: SIGCHLD is ignored
            os.waitpid(self.pid, 0)

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.end()

    def result(self) -> Any:
        """What the job gave. Raises what it raised, OSError if it could not begin, and ProcessLost if its
        process ended before it told.
        """
        if self.failure is not None:
            raise self.failure
        head, _, content = bytes(self.told).partition(b"\n")
        try:
            told = json.loads(head)
        except ValueError:
            raise ProcessLost("its process was killed: is the memory enough?") from None
        for level, line in told["lines"]:
            log.log(level, line)
        if told["error"] is not None:
            raise error_of(*told["error"])
        return self.batch.from_bytes(content)


class ProcessLost(Exception):
    """The process of a job ended before it told its result."""


class Forks:
    """At most `workers` jobs at work in forks; the others wait."""

    def __init__(self, workers: int):
        self.workers = workers
        self.waiting: deque[Fork] = deque()
        self.at_work: set[Fork] = set()
        self.failed: list[Fork] = []  # to begin

    def submit(self, job: Callable[[], Any], batch: Travelling) -> object:
        """Begin a job when a core is free; returns what `done` calls it."""
        fork = Fork(job, batch)
        self.waiting.append(fork)
        self.begin_next()
        return fork

    def begin_next(self) -> None:
        """Begin jobs as long as there are cores."""
        while self.waiting and len(self.at_work) < self.workers:
            fork = self.waiting.popleft()
            with unstoppable():  # a signal's exception would be lost in what Python does around a fork
                try:
                    fork.begin()
                except OSError as error:
                    fork.failure = error
                    self.failed.append(fork)
                else:
                    self.at_work.add(fork)

    def done(self) -> list[tuple[object, Callable[[], Any]]]:
        """Wait for a job to end. Returns those that did, each with a function that gives its result."""
        ended, self.failed = self.failed, []
        with selectors.DefaultSelector() as selector:
            for fork in self.at_work:
                selector.register(fork, selectors.EVENT_READ, fork)
            while not ended:
                for key, _ in selector.select():
                    if key.data.read():
                        selector.unregister(key.data)
                        self.at_work.remove(key.data)
                        key.data.end()
                        ended.append(key.data)
        self.begin_next()
        return [(fork, fork.result) for fork in ended]

    def drop(self, job: Any) -> bool:
        """End a job, at work or not."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.at_work:
            self.at_work.remove(job)
            job.kill()
        else:
            return False  # it has just ended
        self.begin_next()
        return True

    def close(self) -> None:
        """End all jobs."""
        self.waiting.clear()
        for fork in self.at_work:
            fork.kill()
        self.at_work.clear()


# --- jobs whose results are all wanted, in order

Given = TypeVar("Given")  # by a job


def cores() -> int:
    """Cores that this process may use, as OpenMP counts them."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if can_fork() else 1


def each_done(jobs: Sequence[Callable[[], Given]], travelling: Travelling, workers: int) -> list[Given]:
    """The results of jobs, in their order: each is done in a fork, or here if one core is to be used."""
    if workers < 2 or not can_fork():
        return [job() for job in jobs]
    forks, results = Forks(workers), dict[int, Given]()
    try:
        places = {forks.submit(job, travelling): place for place, job in enumerate(jobs)}
        while len(results) < len(jobs):
            results |= {places[fork]: result_of() for fork, result_of in forks.done()}
    finally:
        forks.close()
    return [results[place] for place in range(len(jobs))]


# --- in the fork


class Lines(logging.Handler):
    """Keeps the lines of a fork's log, for the process that it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append((record.levelno, record.getMessage()))


def do_and_tell(job: Callable[[], Any], batch: Travelling, pipe: int, parent: int) -> NoReturn:
    """Do a job, write its result into the pipe of the process `parent`, and end this process."""
    status = 1
    try:
        end_with(parent)
        gc.freeze()  # what the process had before is not this one's to tidy up
        kept = Lines()
        log.handlers[:], log.filters[:] = [kept], []
        error, content = None, b""
        try:
            content = batch.to_bytes(job())
        except BaseException as raised:
            error = told_of(raised)
        message = json.dumps({"lines": kept.lines, "error": error}).encode() + b"\n" + content
        with os.fdopen(pipe, "wb") as file:
            file.write(message)
        status = 0
    finally:
        os._exit(status)


def end_with(parent: int) -> None:
    """End this process with its parent, and by no signal that a terminal sends to both."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def told_of(raised: BaseException) -> list[str]:
    """An error for `error_of`: its class, the class of Python that it is one of, its text and traceback."""
    usual = next(one for one in type(raised).__mro__ if one.__module__ == "builtins")
    base = usual.__name__ if issubclass(usual, Exception | KeyboardInterrupt) else "Exception"
    return [type(raised).__name__, base, str(raised), traceback.format_exc()]


def error_of(name: str, base: str, text: str, where: str) -> BaseException:
    """An error like one that was raised in another process, with its traceback as a note."""
    from ablation.task import TrainingError  # which imports torch

    if name == TrainingError.__name__:
        error: BaseException = TrainingError(text)
    else:
        own = {"__init__": lambda error: None, "__str__": lambda error: text}
        error = type(name, (getattr(builtins, base),), own)()
    error.add_note(where)
    return error
