"""Table 4: seconds by stage, beside what the device can do at best, and what follows for larger collections.

The layers are those of the published sets (128 of SD 1.5, rank 1), the 18 cells have their columns; all
numbers are random and made on the device, so no file is read and nothing is uploaded.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ablation.benchmark.stages import operations_of
from ablation.benchmark.timing import peak, start_of_peak
from ablation.catalogue import NINE, SPECS
from ablation.device_check.board import FAILED, MEASURED, NO_ROOM, Board, Finding
from ablation.device_check.limits import DeviceLimits, measure_limits, operations_of_step, show_limits
from ablation.device_check.sizes import CheckSizes
from ablation.layers import sd15_shapes
from ablation.reading import BLOCK_ROWS
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.task import Task
from ablation.training import resolve_training, train_runs
from representations import PRODUCT_REPRESENTATIONS, describe, describe_module

STATED_EPOCHS = 50  # of each run: what training is scaled to
TIMED_CLASSES = 10
VISUAL_SHARE = 0.5  # of the published layers
EXTRAPOLATED = {50_000: "15 to 18", 100_000: "24 to 30"}  # rows, and the origin's hours
SPEED_HEADINGS = ("seconds", "rate", "of the limit", "peak memory", "remarks")


@dataclass
class Spent:
    """Seconds of one number of rows, by stage; those of training are for STATED_EPOCHS."""

    rows: int
    seconds: dict[str, float] = field(default_factory=dict)


def synchronise(device: str) -> None:
    """Wait until the device is idle."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def free_device(device: str) -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def timed_once(function: Callable[[], object], device: str) -> float:
    """Seconds of one call, from idle to idle."""
    synchronise(device)
    began = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - began


class SpeedChecks:
    """What is timed on one device."""

    def __init__(self, device: str, sizes: CheckSizes, limits: DeviceLimits):
        self.device, self.sizes, self.limits = device, sizes, limits
        shapes = sd15_shapes(1)
        self.factor = len(shapes) / sizes.timed_layers  # from the layers that are timed to all
        self.shapes = [(rows, cols) for _, rows, cols in shapes[: sizes.timed_layers]]

    def weights(self, n: int) -> dict[tuple[int, int], Tensor]:
        """A block of n rows for each shape of a layer."""
        generator = torch.Generator(self.device).manual_seed(0)
        return {
            shape: torch.randn(n, *shape, device=self.device, generator=generator)
            for shape in dict.fromkeys(self.shapes)
        }

    def layer_pass(self, n: int, blocks: dict[tuple[int, int], Tensor]) -> None:
        """The nine of every layer of n rows, as the program computes them: block by block, to the host."""
        names = [name for name in NINE if name != "ensemble"]
        for size in block_sizes(n):
            for shape in self.shapes:
                to_host(*describe(blocks[shape][:size], names))

    def module_pass(self, n: int, blocks: dict[tuple[int, int], Tensor]) -> None:
        """The product's six of every module of n rows; `up` follows `down`."""
        names = list(PRODUCT_REPRESENTATIONS)
        for size in block_sizes(n):
            for down, up in zip(self.shapes[0::2], self.shapes[1::2], strict=True):
                to_host(*describe_module(blocks[down][:size], blocks[up][:size], names))

    def features(self, n: int, spent: Spent, is_module: bool) -> Finding:
        """Seconds of the features of n rows."""
        blocks = self.weights(min(n, BLOCK_ROWS))
        run = self.module_pass if is_module else self.layer_pass
        run(min(n, 32), blocks)  # libraries set themselves up when they are first used
        before = start_of_peak(self.device)
        seconds = self.factor * timed_once(lambda: run(n, blocks), self.device)
        used = peak(self.device) - before
        spent.seconds["products" if is_module else "features"] = seconds
        read = self.factor * 4 * n * sum(rows * cols for rows, cols in self.shapes)
        shown = {
            "seconds": f"{seconds:.2f}",
            "rate": f"{read / seconds / 1e9:.2f} GB/s of weights",
            "of the limit": f"{seconds * self.limits.copy / read:.1f} x a plain copy",
            "peak memory": f"{used / 1e9:.2f} GB",
        }
        if self.factor != 1:
            shown["remarks"] = f"scaled from {len(self.shapes)} layers"
        return Finding(MEASURED, shown, {"seconds": seconds, "bytes": read, "peak_bytes": used})

    # --- training

    def settings(self) -> TrainingSettings:
        """The default settings with the runs that are timed."""
        return resolve_training(TrainingSettings(num_runs=self.sizes.timed_runs), self.device)

    def training(self, n: int, spent: Spent) -> Finding:
        """Seconds of the 18 cells on n rows: of a few epochs, scaled to STATED_EPOCHS."""
        rng, settings = np.random.default_rng(0), self.settings()
        rows, labels = rng.permutation(n), rng.integers(0, TIMED_CLASSES, n)
        split = Split(rows[: n * 7 // 10], rows[n * 7 // 10 : n * 8 // 10], rows[n * 8 // 10 :], False)
        widths = [
            int(SPECS[name].width * self.sizes.timed_layers * share)
            for share in (1.0, VISUAL_SHARE)
            for name in NINE
        ]
        generator = torch.Generator(self.device).manual_seed(0)
        before = start_of_peak(self.device)
        x = torch.randn(n, max(widths), device=self.device, generator=generator)
        epoch = fixed = operations = 0.0
        for width in widths:
            task = Task(x[:, :width], labels, split, TIMED_CLASSES)
            per_epoch, once = self.timed_cell(task, settings)
            epoch, fixed = epoch + per_epoch, fixed + once
            operations += settings.num_runs * operations_of(width, TIMED_CLASSES, split, settings)
        used = peak(self.device) - before
        seconds = fixed + STATED_EPOCHS * epoch
        spent.seconds["training"] = seconds
        return self.training_finding(seconds, epoch, operations, len(split.train), used)

    def timed_cell(self, task: Task, settings: TrainingSettings) -> tuple[float, float]:
        """Seconds of an epoch of all runs of a cell, and those that do not grow with the epochs: from a
        training of one epoch and a longer one.
        """
        spent = []
        for epochs in (1, self.sizes.timed_epochs):
            chosen = dataclasses.replace(settings, max_epochs=epochs, patience=epochs)
            train = functools.partial(train_runs, task, chosen, self.device)
            spent.append(timed_once(train, self.device))
        short, long = spent
        per_epoch = (long - short) / (self.sizes.timed_epochs - 1)
        if per_epoch <= 0:  # so short that the clock shows other things
            per_epoch = long / self.sizes.timed_epochs
        return per_epoch, max(short - per_epoch, 0.0)

    def training_finding(
        self, seconds: float, epoch: float, operations: float, train_rows: int, used: int
    ) -> Finding:
        """The row of training, from seconds of an epoch of all cells and its operations of products."""
        settings = self.settings()
        steps = 2 * len(NINE) * -(-train_rows // settings.batch_size)
        is_packed = settings.trainer == "packed"
        steps *= 1 if is_packed else settings.num_runs
        counted = settings if is_packed else dataclasses.replace(settings, num_runs=1)
        count = operations_of_step(counted, TIMED_CLASSES)
        launch = steps * self.limits.step_seconds(count)
        products = operations / self.limits.products["float32"]
        what = f"steps/s of {settings.num_runs} runs each" if is_packed else "steps/s of one run each"
        shown = {
            "seconds": f"{seconds:.1f} ({epoch:.3g} an epoch)",
            "rate": f"{steps / epoch:,.0f} {what}",
            "of the limit": f"{epoch / launch:.2f} x the launches, {epoch / products:.2f} x the products",
            "peak memory": f"{used / 1e9:.2f} GB",
            "remarks": f"{settings.trainer}; {self.sizes.timed_epochs} epochs scaled to {STATED_EPOCHS}",
        }
        figures = {
            "seconds": seconds,
            "epoch_seconds": epoch,
            "steps": steps,
            "operations_of_a_step": count,
            "launch_limit_seconds": launch,
            "product_limit_seconds": products,
            "peak_bytes": used,
        }
        return Finding(MEASURED, shown, figures)


def block_sizes(n: int) -> list[int]:
    """Rows of each block of n rows."""
    return [min(BLOCK_ROWS, n - start) for start in range(0, n, BLOCK_ROWS)]


def to_host(found: dict[str, Tensor], failed: dict[str, Exception]) -> None:
    """Bring features to the host in one transfer; raise the first error."""
    for error in failed.values():
        raise error
    torch.cat(list(found.values()), dim=1).cpu()


def unless_full(function: Callable[[], Finding], device: str, verdict: str) -> Callable[[], Finding]:
    """The check, or this verdict where the device has no room; free memory first and last."""

    def check() -> Finding:
        free_device(device)
        try:
            return function()
        except torch.OutOfMemoryError as error:
            return Finding(verdict, {"remarks": str(error).splitlines()[0][:200]})
        finally:
            free_device(device)

    return check


def hours_at(rows: int, spent: list[Spent]) -> Finding:
    """Hours of the whole experiment at a number of rows: measured, or in proportion to the largest size whose
    stages were all measured.
    """
    whole = [one for one in spent if {"features", "training"} <= one.seconds.keys()]
    if not whole:
        return Finding(NO_ROOM, {"remarks": "no size was measured as a whole"})
    nearest = min(whole, key=lambda one: (one.rows != rows, -one.rows))
    seconds = {stage: nearest.seconds[stage] * rows / nearest.rows for stage in ("features", "training")}
    hours = sum(seconds.values()) / 3600
    how = "measured" if nearest.rows == rows else f"in proportion to {nearest.rows:,} rows"
    shown = {
        "seconds": f"{hours:.3g} hours",
        "rate": f"the origin: {EXTRAPOLATED[rows]} hours",
        "remarks": f"{how}; features {seconds['features']:.0f} s, training of {STATED_EPOCHS} epochs "
        f"{seconds['training']:.0f} s; reading of files not counted",
    }
    return Finding(MEASURED, shown, {"hours": hours, "from_rows": nearest.rows, "seconds": seconds})


def check_speed(board: Board, device: str, sizes: CheckSizes) -> None:
    """Add the rows of the table."""
    measured: list[DeviceLimits] = []
    if not board.guard("limits", lambda: measured.append(measure_limits(device, sizes.seconds))):
        return
    (limits,) = measured
    show_limits(board, limits)
    checks = SpeedChecks(device, sizes, limits)
    spent: list[Spent] = []
    for n in sizes.timed_rows:
        spent.append(one := Spent(n))
        stages: dict[str, Callable[[], Finding]] = {
            "nine of 128 layers": functools.partial(checks.features, n, one, False),
            "six of 64 products": functools.partial(checks.features, n, one, True),
            f"18 cells x {sizes.timed_runs} runs": functools.partial(checks.training, n, one),
        }
        for name, stage in stages.items():
            full = FAILED if n == min(sizes.timed_rows) else NO_ROOM  # any device has room for the fewest
            board.check(f"{n:,} rows: {name}", unless_full(stage, device, full))
    for rows in EXTRAPOLATED:
        board.check(f"{rows:,} LoRAs, the whole experiment", functools.partial(hours_at, rows, spent))
