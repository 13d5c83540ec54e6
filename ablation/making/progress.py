"""Lines of progress for the commands that make or read data sets:
whole lines, so that a log file reads well.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from ablation.log import visible

SECONDS_A_LINE = 10.0


class ProgressLine:
    """Writes a line with rate and time left, at most every SECONDS_A_LINE."""

    def __init__(self, total: int, unit: str, stream: TextIO | None = None):
        self.total, self.unit, self.stream = total, unit, stream or sys.stdout
        self.done = self.skipped = 0
        self.began = self.last = time.monotonic()

    def skip(self, amount: int) -> None:
        """Count work of an earlier process, without crediting this one with its speed."""
        self.done += amount
        self.skipped += amount

    def advance(self, amount: int = 1) -> None:
        """Count finished work."""
        self.done += amount
        if time.monotonic() - self.last > SECONDS_A_LINE:
            self.line()

    def line(self) -> None:
        """Write a line now."""
        self.last = time.monotonic()
        rate = (self.done - self.skipped) / max(self.last - self.began, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f}s" if rate else "unknown"
        text = (
            f"Progress: {self.done}/{self.total} {self.unit} | Rate: {rate:.1f} {self.unit}/s | ETA: {left}"
        )
        print(text, file=self.stream, flush=True)


def say(line: str) -> None:
    """Print a line at once, without characters that cannot be seen or encoded."""
    print(visible(line), flush=True)
