"""What the user sees: progress, and seconds by stage."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from ablation import log as program_log
from ablation.log import LineHandler, duration

from .samples import TEXTS

log = logging.getLogger("sae_analysis")

INTERVAL = 5.0  # seconds between lines


def log_to_stdout() -> None:
    """Send messages to stdout, as whole lines; a log that cannot be written costs no sample."""
    log.handlers[:] = [LineHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


class Progress:
    """A tqdm bar on a terminal; otherwise a line every INTERVAL seconds and one at the end."""

    def __init__(self, total: int, done: int, texts: int):
        self.total, self.done = total, done
        self.texts, self.texts_done = texts, 0  # to do; done
        self.started = self.last = time.monotonic()
        self.bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="samples", desc="Progress", file=sys.stdout)

    def advance(self, samples: int, texts: int) -> None:
        """Count samples that are finished, and the texts that were read."""
        self.done += samples
        self.texts_done += texts
        if self.bar is not None:
            self.bar.update(samples)
        elif time.monotonic() - self.last >= INTERVAL or self.done == self.total:
            self.last = time.monotonic()
            log.info(self.line())

    def line(self) -> str:
        """Samples done, rate, and time to go; the rate counts texts, which are finished more evenly."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = self.texts_done / elapsed
        samples = rate / len(TEXTS)
        left = duration((self.texts - self.texts_done) / rate) if rate else "unknown"
        return f"Progress: {self.done}/{self.total} samples | Rate: {samples:.1f} samples/sec | ETA: {left}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class Clock(program_log.Clock):
    """Seconds by stage of the work on a device."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.by_stage, self.device = {}, device

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the seconds of a `with` block to a stage; waits until the GPU has finished it."""
        with super().__call__(stage):
            yield
            if self.device.startswith("cuda"):
                import torch

                torch.cuda.synchronize(self.device)


def peak_memory() -> dict[str, int]:
    """Most bytes that this process had in memory, and that torch had on its GPUs together.

    Workers of --devices and --ray have memory of their own, which is not counted.
    """
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpus = range(torch.cuda.device_count())
    return {"host": host, "gpu": sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)}
