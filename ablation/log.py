"""What the user sees while cells are computed: lines, progress, seconds by stage."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import mmap
import os
import socket
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

from ablation.stopping import end_if_stopped
from checkpointing import utc_now

log = logging.getLogger("visual_ablation")


class LineHandler(logging.StreamHandler):
    """Writes messages to stdout, flushed, above a bar where there is one; remembers when it last wrote.

    A log that cannot be written (its disk full, its reader gone) costs lines, which are counted, and never a
    cell.
    """

    last_written = time.monotonic()
    lost_lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, or count it as lost."""
        from tqdm import tqdm

        prefix = "WARNING: " if record.levelno == logging.WARNING else ""
        if LineHandler.lost_lines:
            prefix = f"({LineHandler.lost_lines} lines of the log could not be written)\n{prefix}"
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print(prefix + visible(record.getMessage()), file=sys.stdout, flush=True)
            LineHandler.lost_lines = 0
        except OSError:
            LineHandler.lost_lines += 1
        LineHandler.last_written = time.monotonic()


def log_to_stdout() -> None:
    """Send the program's messages to stdout."""
    if sys.stdout is None:  # closed by the process that started this one
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows a question mark
    log.handlers[:] = [LineHandler()]
    log.filters[:] = [is_written_now]
    log.setLevel(logging.INFO)
    log.propagate = False


def close_log() -> None:
    """Write or drop what is left in stdout's buffer, so that a broken log does not change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def visible(text: str, length: int | None = None) -> str:
    """Text from data, with characters escaped that a reader cannot see or that move what stands beside them:
    control characters, marks of direction, halves of surrogate pairs.

    With a `length`, line breaks and tabs are escaped too, and a longer text loses its middle. Without it
    they stay, and each line has LINE_LENGTH characters at most.
    """
    if length is None:
        return "\n".join(without_middle(escaped(line, "\t"), LINE_LENGTH) for line in text.split("\n"))
    return without_middle(escaped(text), length)


LINE_LENGTH = 10_000  # characters of a line of the log


def without_middle(text: str, length: int) -> str:
    """The text, or the beginning and the end of a longer one with an ellipsis between."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def escaped(text: str, kept: str = "") -> str:
    """Text whose characters that cannot be seen are escaped, but for those of `kept`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in kept or unicodedata.category(c) not in UNSEEN else escape(c) for c in text)


UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories of Unicode


def escape(character: str) -> str:
    """A character as its code, such as x1b after a backslash."""
    return character.encode("unicode_escape", "backslashreplace").decode()


class HeldLines:
    """Lines of the log that wait until others are written, such as those of a cell that began earlier."""

    def __init__(self):
        self.lock = threading.RLock()
        self.records: list[logging.LogRecord] = []
        self.is_shown = False

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Lines of this thread in a block of a `with` statement belong to these: also those of a generator's
        caller, while the generator waits in such a block.
        """
        token = HELD.set(self)
        try:
            yield
        finally:
            HELD.reset(token)

    def holds_back(self, record: logging.LogRecord) -> bool:
        """True if a line of these has to wait; it is shown later."""
        with self.lock:
            if not self.is_shown:
                self.records.append(record)
            return not self.is_shown

    def show(self) -> None:
        """Write the lines that waited; later ones wait no more."""
        with self.lock:
            self.is_shown = True
            for record in self.records:
                log.handle(record)
            self.records.clear()


HELD: contextvars.ContextVar[HeldLines | None] = contextvars.ContextVar("HELD", default=None)


def is_written_now(record: logging.LogRecord) -> bool:
    """A filter of the log: False for a line that waits for its turn."""
    held = HELD.get()
    return held is None or not held.holds_back(record)


# --- progress

NOTE_BYTES = 200  # of what a line says beside its numbers


class Progress:
    """A tqdm bar under a terminal;
    otherwise a whole line when SILENCE seconds passed without one, and one at the end.

    `total` may be None for work that cannot be counted; `unit` then says what the work is.
    """

    SILENCE = 20.0  # seconds; the log promises a line every 30

    def __init__(self, total: int | None, unit: str):
        self.total, self.unit, self.done = total, unit, 0.0
        self.shared_note = mmap.mmap(-1, NOTE_BYTES)  # which forks of this process write to as well
        self.started = time.monotonic()
        self.over = threading.Event()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from tqdm import tqdm

            counted = "{l_bar}{bar}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}]"
            self.bar = tqdm(
                total=self.total,
                unit=self.unit,
                desc=self.unit,
                leave=False,
                file=sys.stdout,
                bar_format="{desc}" if self.total is None else counted,
            )
        else:
            threading.Thread(target=self.break_silence, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.over.set()
        if self.bar is not None:
            self.bar.close()
        elif self.unit == "layers" and exception[0] is None:
            log.info(self.line())

    @property
    def note(self) -> str:
        """What is going on within a unit."""
        return self.shared_note[:NOTE_BYTES].rstrip(b"\0").decode(errors="replace")

    @note.setter
    def note(self, text: str) -> None:
        self.shared_note[:NOTE_BYTES] = text.encode()[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")

    def advance(self, amount: float = 1.0) -> None:
        """Count finished work. Ends the program if a signal asked for it."""
        end_if_stopped()
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)

    def break_silence(self) -> None:
        """Write a line whenever SILENCE seconds passed without one;
        runs in a thread until the work is over.
        """
        while not self.over.wait(1.0):
            if time.monotonic() - LineHandler.last_written > self.SILENCE:
                log.info(self.line())

    def line(self) -> str:
        """Work done, rate and time to go."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        if self.total is None:
            return f"Progress: {self.unit} | {duration(elapsed)} so far"
        rate = self.done / elapsed
        speed = f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{3600 * rate:.1f} {self.unit}/h"
        eta = duration((self.total - self.done) / rate) if rate else "unknown"
        note = f" | {self.note}" if self.note else ""
        return (
            f"Progress: {int(self.done + 1e-6)}/{self.total} {self.unit} | Rate: {speed} | ETA: {eta}{note}"
        )


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h03m."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Clock:
    """Seconds by stage, for the manifest. `with clock("training"):` adds the block's seconds to a stage."""

    def __init__(self):
        self.began = time.perf_counter()
        self.started = utc_now()
        self.command = f"{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"  # no other has this
        self.by_stage = dict.fromkeys(("load", "read", "features", "training"), 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the seconds of a `with` block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.by_stage[stage] = self.by_stage.get(stage, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far, and in total."""
        return {**self.by_stage, "total": time.perf_counter() - self.began}
