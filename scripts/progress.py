"""Lines of progress for the scripts: whole lines, so that a log file reads well."""

import sys
import time

SECONDS_A_LINE = 10.0


class Progress:
    """A line with rate and time left, at most every SECONDS_A_LINE."""

    def __init__(self, total: int, unit: str, stream=None):
        self.total, self.unit, self.stream = total, unit, stream or sys.stdout
        self.done = self.skipped = 0
        self.began = self.last = time.monotonic()

    def skip(self, amount: int) -> None:
        """Count what an earlier run has done, without crediting this one with its speed."""
        self.done += amount
        self.skipped += amount

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if time.monotonic() - self.last > SECONDS_A_LINE:
            self.line()

    def line(self) -> None:
        self.last = time.monotonic()
        rate = (self.done - self.skipped) / max(self.last - self.began, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f}s" if rate else "unknown"
        print(f"Progress: {self.done}/{self.total} {self.unit} | Rate: {rate:.1f} {self.unit}/s | ETA: {left}", file=self.stream, flush=True)
