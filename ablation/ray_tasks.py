"""Cells and rows as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation.cells import Cell
from ablation.device_processes import (
    POLL_SECONDS,
    PROGRAM,
    command_of,
    environment_of,
    news_of,
    start_process,
)
from ablation.distributed import longest_first, sizes_of
from ablation.fields import InputError
from ablation.log import Progress, describe_error
from ablation.memory import free_memory
from ablation.reading import BLOCK_ROWS
from ablation.stopping import SIGNALS, end_if_stopped

if TYPE_CHECKING:
    from ablation.context import Context
    from ablation.settings import Settings

log = logging.getLogger("visual_ablation")

QUIET_RAY = {  # its statistics are not sent, its own lines stay out of the log
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}
MANY_TASKS = 10**6
MAX_RETRIES = 3  # of a task whose worker was lost


def run_on_ray(context: Context, cells: list[Cell]) -> None:
    """Run cells as tasks of the Ray cluster, the longest first; before them, features as tasks of rows."""
    import ray

    settings, store = context.settings, context.store
    gpus = gpus_of_task(settings)
    slots = slots_of(settings)
    lines = queue_of_lines()
    environment = environment_of(int(settings.ray_cpus))
    remote: Any = ray.remote(run_part)
    run = remote.options(
        num_cpus=settings.ray_cpus, num_gpus=gpus, max_retries=MAX_RETRIES, retry_exceptions=[WorkerLost]
    )

    def start(label: str, *part: str) -> Any:
        command = command_of(context, "cuda" if gpus else "cpu", *part)
        return run.remote(label, command, str(Path.cwd()), environment, lines)

    log.info(
        f"{len(cells)} cells on Ray: {slots} at a time, {settings.ray_cpus:g} CPUs and {gpus:g} GPUs each"
    )
    try:
        with lines_shown(lines), Progress(len(cells), "cells") as progress:

            def look() -> None:
                progress.done = sum(store.path(cell.name).exists() for cell in cells)

            if context.data.num_rows > BLOCK_ROWS and settings.cache_features:
                shares = [f"{number}/{slots}" for number in range(1, slots + 1)]
                wait_for([start(f"rows {s}", "--features-only", "--rows", s) for s in shares], look)
            groups = longest_first(cells, sizes_of(context))
            tasks = [
                start(group[0].trained.name, "--cells", *(cell.name for cell in group)) for group in groups
            ]
            wait_for(tasks, look)
    finally:
        ray.shutdown()


class WorkerLost(Exception):
    """The process of a part was killed."""


def run_part(label: str, command: list[str], folder: str, environment: dict[str, str], lines: Any) -> int:
    """A Ray task: run a command in a folder, and put its lines into a queue. Returns its exit status.

    It may take its share of the machine's free memory. Raises WorkerLost if it was killed.
    """
    share = int(environment["OMP_NUM_THREADS"]) / (os.cpu_count() or 1)
    room = free_memory() / 1e9 * min(share, 1)
    if "--memory-gb" not in command and room < math.inf:
        command = [*command, "--memory-gb", f"{room:.3f}"]
    process = start_process(command, environment, folder)
    lines.put(f"[{label}] begins on {socket.gethostname()}")  # a second time if its first worker was lost
    for line in news_of(process):
        lines.put(f"[{label}] {line}")
    status = process.wait()
    if status < 0:
        lines.put(f"[{label}] the process was ended by {signal.Signals(-status).name}: it is started again")
        raise WorkerLost(label)
    return status


def wait_for(tasks: list[Any], look: Callable[[], None]) -> None:
    """Wait for tasks. What a task that was lost for good leaves is left to this process."""
    import ray

    while tasks:
        end_if_stopped()
        try:
            done, tasks = ray.wait(tasks, timeout=POLL_SECONDS)
        except SystemExit:  # Ray gives it another status
            end_if_stopped()
            raise
        for task in done:
            try:
                if ray.get(task) > 1:  # refused; 1 is a cell that failed, which its event tells
                    log.error("a task of Ray ended with an error, which its lines tell")
            except (WorkerLost, ray.exceptions.RayError) as error:
                log.error(f"a task of Ray was lost: {describe_error(error)}")
        look()


def connect(address: str) -> None:
    """Connect to the Ray cluster at an address; `local` starts one here, `auto` finds one that runs here.

    Raises InputError if Ray is not installed, or if the cluster is not there.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray: pip install -r requirements-ray.txt") from None
    for name, value in QUIET_RAY.items():
        os.environ.setdefault(name, value)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    dashboard = False if address == "local" else None
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            include_dashboard=dashboard,
            runtime_env={"env_vars": {"PYTHONPATH": str(PROGRAM.parent)}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: {' '.join(str(error).split())[:300]}") from None
    finally:
        for number, handler in handlers.items():  # Ray has handlers of its own
            signal.signal(number, handler)


def gpus_of_task(settings: Settings) -> float:
    """GPUs that a task takes: none where the cluster has none, or with --device cpu."""
    import ray

    return settings.ray_gpus if ray.cluster_resources().get("GPU", 0) and settings.device != "cpu" else 0.0


def slots_of(settings: Settings) -> int:
    """How many tasks the cluster can run at a time."""
    import ray

    resources, gpus = ray.cluster_resources(), gpus_of_task(settings)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_node = [
        min(int(of.get("CPU", 0) / settings.ray_cpus), int(of.get("GPU", 0) / gpus) if gpus else MANY_TASKS)
        for of in nodes
    ]
    if not sum(by_node):
        raise InputError(
            f"--ray-cpus {settings.ray_cpus:g} and --ray-gpus {gpus:g} are more than any node of the cluster "
            f"has ({resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs in all)"
        )
    return sum(by_node)


def count_slots(settings: Settings, address: str) -> int:
    """How many tasks the cluster at an address can run at a time."""
    import ray

    connect(address)
    try:
        return slots_of(settings)
    finally:
        ray.shutdown()


def queue_of_lines() -> Any:
    """A queue that tasks on any machine can put lines into."""
    from ray.util.queue import Queue

    return Queue(actor_options={"num_cpus": 0})


@contextlib.contextmanager
def lines_shown(lines: Any) -> Iterator[None]:
    """Log the lines of a queue, in a thread, until the block of a `with` statement ends and it is empty."""
    from ray.exceptions import RayError
    from ray.util.queue import Empty

    over = threading.Event()

    def show() -> None:
        with contextlib.suppress(RayError):  # the cluster is gone, and the lines with it
            while True:
                try:
                    log.info(lines.get(timeout=POLL_SECONDS))
                except Empty:
                    if over.is_set():
                        return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
        over.set()
        thread.join()
    finally:
        over.set()
