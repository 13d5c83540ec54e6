"""What a device can do at best: copies, launches, replays, products. All clocks are read when it is idle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ablation.benchmark.timing import gemm_rate, interleaved
from ablation.cuda_graphs import record_graph
from ablation.device_check.board import MEASURED, Board, Finding
from ablation.mlp import arithmetic
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.task import Task
from ablation.training import train_runs

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # more than any cache holds
UPLOAD_BYTES = 2**26
LAUNCHES = 1000  # of a tiny operation, in one measurement
IN_GRAPH = 200  # tiny operations in one recorded graph


@dataclass
class DeviceLimits:
    """Rates of a device. Of a CPU, those of graphs are 0."""

    copy: float  # bytes a second: copied from the device's memory to itself
    upload: float  # bytes a second: from the host's memory to the device's
    launch: float  # seconds of a tiny operation, launched by itself
    replay: float  # seconds of the replay of a graph that holds one tiny operation
    in_graph: float  # seconds of each further tiny operation in a replayed graph
    products: dict[str, float]  # operations a second of large products, by precision

    def step_seconds(self, operations: int) -> float:
        """The least seconds of a training step of so many operations: replayed on a GPU, else launched."""
        if self.replay:
            return self.replay + (operations - 1) * self.in_graph
        return operations * self.launch


def median_seconds(function: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds of one of the `calls` that a function makes."""
    return interleaved(3, device, (function, 1 / calls))[0].median


def measure_limits(device: str, seconds: float) -> DeviceLimits:
    """Measure the limits of a device; products take `seconds` for each precision."""
    kind = torch.device(device).type
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    on_host = torch.ones(UPLOAD_BYTES // 4)
    place = target[: len(on_host)]
    upload = median_seconds(lambda: place.copy_(on_host), device)
    tiny = torch.zeros(1, device=device)

    def several(count: int) -> None:
        for _ in range(count):
            tiny.add_(1)

    launch = median_seconds(lambda: several(LAUNCHES), device, LAUNCHES)
    replay = in_graph = 0.0
    if kind == "cuda":
        replay, whole = (replay_seconds(count, several, device) for count in (1, IN_GRAPH))
        in_graph = max(whole - replay, 0.0) / (IN_GRAPH - 1)
    with arithmetic("float32"):
        products = {
            name: gemm_rate(getattr(torch, name), device, seconds) for name in ("float32", "bfloat16")
        }
    if kind == "cuda":
        with arithmetic("tf32"):
            products["tf32"] = gemm_rate(torch.float32, device, seconds)
    return DeviceLimits(4 * len(source) / copy, UPLOAD_BYTES / upload, launch, replay, in_graph, products)


def replay_seconds(count: int, several: Callable[[int], None], device: str) -> float:
    """Seconds of one replay of a graph of so many tiny operations."""
    replay = record_graph(lambda: several(count), torch.device(device))

    def repeated() -> None:
        for _ in range(LAUNCHES // 10):
            replay()

    return median_seconds(repeated, device, LAUNCHES // 10)


class OperationCount(TorchDispatchMode):
    """Counts the operations of torch that are no views: on a GPU, about the kernels that they launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        self.count += not getattr(function, "is_view", False)
        return function(*args, **(kwargs or {}))


def operations_of_step(settings: TrainingSettings, num_classes: int) -> int:
    """Operations of one step of the packed trainer for the runs of the settings.

    Counted on the CPU, which dispatches the same operations: the difference between an epoch of four batches
    and one of two.
    """
    counts = []
    for batches in (2, 4):
        rows = torch.arange(batches * settings.batch_size + 2).numpy()
        split = Split(rows[:-2], rows[-2:], rows[-2:], False)
        task = Task(torch.randn(len(rows), 8), rows % num_classes, split, num_classes)
        chosen = dataclasses.replace(settings, trainer="packed", precision="float32", max_epochs=1)
        with OperationCount() as count:
            train_runs(task, chosen, "cpu")
        counts.append(count.count)
    return (counts[1] - counts[0]) // 2


def show_limits(board: Board, limits: DeviceLimits) -> None:
    """Add a row for each limit."""
    rows = {
        "limit: copy within the device's memory": f"{limits.copy / 1e9:.1f} GB/s",
        "limit: from the host's memory to the device": f"{limits.upload / 1e9:.1f} GB/s",
        "limit: launch of a tiny operation": f"{1e6 * limits.launch:.2f} µs",
    }
    if limits.replay:
        rows["limit: replay of a graph"] = f"{1e6 * limits.replay:.2f} µs"
        rows["limit: tiny operation in a graph"] = f"{1e6 * limits.in_graph:.2f} µs"
    for precision, rate in limits.products.items():
        rows[f"limit: products, {precision}"] = f"{rate / 1e12:.2f} TFLOP/s"
    for name, text in rows.items():
        board.add(name, Finding(MEASURED, {"rate": text}))
    board.tables[-1].rows[-1][1].figures["limits"] = asdict(limits)
