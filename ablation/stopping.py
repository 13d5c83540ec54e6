"""Signals: how SIGHUP, SIGINT, SIGQUIT and SIGTERM end the program, and what they do not interrupt.

A signal raises SystemExit in the main thread. Three things can be in its way, and none of them loses it: a
library that drops every exception, or makes one of its own of it (`end_if_stopped` raises it again); a file
that is being written (`unstoppable` lets it be finished); a long call into C, during which Python runs no
handler (a thread ends the process after GRACE seconds; files are whole, as after any kill).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

GRACE = 5.0  # seconds from a signal until the process is ended, wherever it is
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
STOPPED = "finished cells are kept, rerun the same command to resume"

stopped_by: int | None = None
unfinished_blocks = 0  # blocks of `unstoppable` that the main thread is in
cleaners: list[Callable[[], None]] = []  # called before a process is ended from its watching thread


def handle_signals() -> None:
    """End with 128 + signal, locks released and temporary files removed.

    A signal that was ignored at the start (SIGHUP under nohup) stays ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    # C code writes the number of a signal to this socket at once, whatever Python is doing.
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch_signals, args=(reading, writing), daemon=True).start()


def stop(number: int, frame) -> None:
    """The handler of a signal."""
    global stopped_by
    if stopped_by is None:
        stopped_by = number
    end_if_stopped()


def end_if_stopped() -> None:
    """Raise SystemExit if a signal asked for it, unless a file is being written.

    Called as work goes on, and before an exception is taken for a failure of the work.
    """
    if stopped_by is not None and not (unfinished_blocks and is_main_thread()):
        raise SystemExit(128 + stopped_by)


def name_of_stop() -> str:
    """The name of the signal that asked to stop, or ''."""
    return "" if stopped_by is None else signal.Signals(stopped_by).name


@contextlib.contextmanager
def unstoppable() -> Iterator[None]:
    """Let the main thread finish a block, such as the writing of a file, before a signal ends it."""
    global unfinished_blocks
    if not is_main_thread():  # no handler runs in other threads
        yield
        return
    unfinished_blocks += 1
    try:
        yield
    finally:
        unfinished_blocks -= 1
    end_if_stopped()


@contextlib.contextmanager
def signals_winning() -> Iterator[None]:
    """End by a signal that came during the block, whatever a library made of it."""
    try:
        yield
    except Exception:
        end_if_stopped()
        raise
    end_if_stopped()


def is_main_thread() -> bool:
    """True in the thread that handles signals."""
    return threading.current_thread() is threading.main_thread()


def watch_signals(reading: socket.socket, writing: socket.socket) -> None:
    """End the process GRACE seconds after a signal that it handles, or at once on a second SIGINT.

    Runs in a thread of its own. `writing` is an argument so that it stays open.
    """
    first = None
    deadline = 0.0
    while first is None or time.monotonic() < deadline:
        reading.settimeout(None if first is None else max(deadline - time.monotonic(), 0.01))
        try:
            number = reading.recv(1)[0]
        except TimeoutError:
            break
        if number not in SIGNALS or signal.getsignal(number) is not stop:
            continue
        if first is None:
            first, deadline = number, time.monotonic() + GRACE
        elif number == signal.SIGINT:
            break
    end_process(first or signal.SIGTERM)


def end_process(number: int) -> None:
    """End the process now, with the status of a signal."""
    for clean in cleaners:
        clean()
    with contextlib.suppress(OSError, ValueError):
        line = f"Stopped by {signal.Signals(number).name}: {STOPPED}\n".encode()
        if select.select([], [1], [], 0)[1]:  # a reader that hangs must not hold the process
            os.write(1, line)
    os._exit(128 + number)
