"""Timing functions in turn, and what the machine can do at best."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LEAST_SECONDS = 0.3  # a turn lasts at least so long
GEMM_SIDE = 2048  # of the square matrices whose product gives a CPU's rate
GEMM_SIDE_TIMES_ON_GPU = 4  # smaller products leave part of a large GPU idle


@dataclass(frozen=True)
class Measured:
    """Seconds of the repeats, each already scaled to the whole."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({min(self.seconds):.3g}..{max(self.seconds):.3g})"


@dataclass(frozen=True)
class Row:
    """A stage: ours, the origin's way, the limit. `operations` counts those of the matrix products."""

    stage: str
    what: str
    ours: Measured
    origin: Measured
    limit: Measured
    operations: int = 0

    def summary(self) -> dict:
        """The row as JSON values."""
        timed = {"ours": self.ours, "origin": self.origin, "limit": self.limit}
        return {
            "stage": self.stage,
            "what": self.what,
            **{f"{name}_seconds": measured.median for name, measured in timed.items()},
            **{f"{name}_all_seconds": measured.seconds for name, measured in timed.items()},
            "times_faster_than_origin": self.origin.median / self.ours.median,
            "times_slower_than_limit": self.ours.median / self.limit.median,
            "operations": self.operations,
        }


Timed = tuple[Callable[[], object], float]  # a function, and the factor from its seconds to the whole


def interleaved(repeats: int, device: str, *functions: Timed, warm_up: int = 1) -> list[Measured]:
    """Time the functions in turn, `repeats` times, after `warm_up` turns that do not count.

    A short function is called again until a turn has lasted LEAST_SECONDS, and the mean is taken.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(-warm_up, repeats):
        for (function, factor), of_function in zip(functions, seconds, strict=True):
            calls, began, spent = 0, time.perf_counter(), 0.0
            while spent < LEAST_SECONDS:
                function()
                if device != "cpu":
                    torch.cuda.synchronize(device)
                calls, spent = calls + 1, time.perf_counter() - began
            if repeat >= 0:
                of_function.append(spent / calls * factor)
    return [Measured(of_function) for of_function in seconds]


def gemm_rate(dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """Floating-point operations a second of large square products on all cores,
    or on the GPU; the best of several.
    """
    side, products = (GEMM_SIDE, 1) if device == "cpu" else (GEMM_SIDE * GEMM_SIDE_TIMES_ON_GPU, 10)
    a = torch.randn(side, side, device=device, dtype=dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(products):
            a @ a
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / products)
    return 2 * side**3 / best


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def machine_text(device: str, rates: dict[str, float]) -> str:
    """The machine in a line; `rates` are those of large products, by precision."""
    gpu = "" if device == "cpu" else f"; {torch.cuda.get_device_name(device)}"
    measured = ", ".join(f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in rates.items())
    threads = f"{torch.get_num_threads()} threads"
    return f"{processor()}, {threads}{gpu}; torch {torch.__version__}; large products: {measured}"


# --- memory


def start_of_peak(device: str) -> int:
    """Bytes in use (on a GPU: by tensors); the peak is measured from here."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is in use now
    return status_bytes("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since `start_of_peak`."""
    return torch.cuda.max_memory_allocated(device) if device != "cpu" else status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A size in /proc/self/status."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024
