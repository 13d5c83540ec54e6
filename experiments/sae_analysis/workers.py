"""Batches -> what their texts give: in this process, in one process a device, or on Ray.

Several workers take contiguous ranges of the same batches, so that their numbers are those of one process.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from . import EXPERIMENTS, ROOT, AnalysisError
from .batches import Batch, Measured, Measurer
from .progress import Clock, log_to_stdout
from .settings import Settings, resolve_device


class Task(NamedTuple):
    """What a worker needs to know once."""

    settings: Settings
    toy: Path | None
    device: str


Result = tuple[Batch, list[Measured], dict[str, float]]  # with the seconds of each stage

_measurers: dict[Task, Measurer] = {}  # of this process, so that a model is loaded once


def measure(task: Task, batch: Batch) -> Result:
    """Measure a batch in this process, which loads the model for its first."""
    clock = Clock(resolve_device(task.device))
    if task not in _measurers:
        with clock("load"):
            _measurers[task] = loaded(task)
    measurer = _measurers[task]
    measurer.clock = clock
    return batch, measurer.measure(batch), clock.by_stage


def loaded(task: Task) -> Measurer:
    """A measurer with its own copy of the model."""
    from .language_model import load

    settings = task.settings
    return Measurer(load(settings, task.toy, task.device), settings.seed, settings.noise_draws)


def results(batches: list[Batch], settings: Settings, toy: Path | None) -> Iterator[Result]:
    """The results of all batches, in the order in which they are finished."""
    if settings.ray:
        return on_ray(batches, settings, toy)
    if settings.devices:
        return on_devices(batches, settings, toy)
    task = Task(settings, toy, settings.device)
    return (measure(task, batch) for batch in batches)


def ranges(batches: list[Batch], count: int) -> list[list[Batch]]:
    """The batches as `count` contiguous ranges of about as many tokens each."""
    ends = list(itertools.accumulate(sum(len(text.tokens) for text in batch) for batch in batches))
    total = ends[-1] if ends else 0
    parts: list[list[Batch]] = [[] for _ in range(count)]
    for batch, end in zip(batches, ends, strict=True):
        parts[min((end - 1) * count // max(total, 1), count - 1)].append(batch)
    return parts


def on_devices(batches: list[Batch], settings: Settings, toy: Path | None) -> Iterator[Result]:
    """One process a device. Raises AnalysisError if a process ends before its work does."""
    import torch.multiprocessing

    context = torch.multiprocessing.get_context("spawn")
    threads = max(torch.get_num_threads() // len(settings.devices), 1)
    pools = [
        ProcessPoolExecutor(1, context, initializer=begin_worker, initargs=(threads, os.getpid()))
        for _ in settings.devices
    ]
    try:
        futures = [
            pool.submit(measure, Task(settings, toy, device), batch)
            for pool, device, part in zip(pools, settings.devices, ranges(batches, len(pools)), strict=True)
            for batch in part
        ]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise AnalysisError("a worker process was ended from outside; --resume goes on from here") from None
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


def begin_worker(threads: int, parent: int) -> None:
    """Prepare a worker's process: it shares the cores with the others, and ends when its parent does."""
    import torch

    torch.set_num_threads(threads)
    log_to_stdout()
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process when its parent is gone, so that a killed run leaves no worker on a GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def on_ray(batches: list[Batch], settings: Settings, toy: Path | None) -> Iterator[Result]:
    """A worker of Ray for each of --devices, or on --device, or for each GPU of the cluster, or on a CPU."""
    import ray

    paths = f"{EXPERIMENTS}:{ROOT}"
    ray.init(
        address="local" if settings.ray == "local" else settings.ray,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
        include_dashboard=False if settings.ray == "local" else None,
        log_to_driver=True,
    )
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        chosen = () if settings.device == "auto" else (settings.device,)
        devices = settings.devices or chosen or ("cuda",) * gpus or ("cpu",)
        kinds = [device.partition(":")[0] for device in devices]  # Ray shows a worker its own GPU alone
        remote: Any = ray.remote(RayWorker)
        workers = [
            remote.options(num_gpus=int(kind == "cuda"), num_cpus=1).remote(Task(settings, toy, kind))
            for kind in kinds
        ]
        waiting = [
            worker.measure.remote(batch)
            for worker, part in zip(workers, ranges(batches, len(workers)), strict=True)
            for batch in part
        ]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayActorError as error:
        raise AnalysisError(f"a worker of Ray was lost ({error}); --resume goes on from here") from None
    finally:
        ray.shutdown()


class RayWorker:
    """A worker of Ray: one model on one device."""

    def __init__(self, task: Task):
        log_to_stdout()
        self.task = task

    def measure(self, batch: Batch) -> Result:
        """Measure a batch."""
        return measure(self.task, batch)
