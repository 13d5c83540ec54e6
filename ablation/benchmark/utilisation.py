"""How busy the cores are while the program trains on a CPU, and what its runs would take on more cores.

A core is busy while it trains a run. Of a run's seconds most are steps (forward, backward and update of a
batch); the others draw dropout, gather the rows of batches, and predict.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from ablation import training
from ablation.cells_at_work import Group

SIMULATED_CORES = (2, 16, 64)


class RunSpan(NamedTuple):
    """A run on the time line of `time.perf_counter`, in seconds; `in_steps` of them were steps."""

    cell: str
    began: float
    ended: float
    in_steps: float

    @property
    def seconds(self) -> float:
        """How long a core was busy with it."""
        return self.ended - self.began


def measure_utilisation(run: Callable[[list[str]], int], dataset: str, runs: int, work: Path) -> dict:
    """Run the program, cold, in the folder `work`, and say how busy the cores were.

    `run` is the program's `main`. Raises SystemExit if it fails.
    """
    flags = ["--output-dir", str(work / "results"), "--cache-dir", str(work / "cache")]
    said = io.StringIO()
    with recording(work / "spans.jsonl"), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run(["--dataset", dataset, "--device", "cpu", "--num-runs", str(runs), *flags])
    if status != 0:
        raise SystemExit(
            f"error: the program ended with {status}; its last lines:\n{said.getvalue()[-2000:]}"
        )
    (manifest,) = (work / "results").glob("*/manifest.json")
    seconds = json.loads(manifest.read_text())["seconds"]
    return utilisation_of(read_spans(work / "spans.jsonl"), seconds, torch.get_num_threads())


@contextlib.contextmanager
def recording(file: Path) -> Iterator[None]:
    """Note every run that the program trains meanwhile as a line of a file, whichever process trains it."""
    steps = threading.local()  # a run stays in its thread
    train, step_of = Group.train, training.step_of

    def timed_step_of(*arguments: Any) -> training.Step:
        step = step_of(*arguments)

        def timed(*batch: Any) -> torch.Tensor:
            began = time.perf_counter()
            loss = step(*batch)
            steps.seconds += time.perf_counter() - began
            return loss

        return timed

    def timed_train(group: Group, *job: Any) -> Any:
        began, steps.seconds = time.perf_counter(), 0.0
        trained = train(group, *job)
        span = RunSpan(group.cells[0].name, began, time.perf_counter(), steps.seconds)
        with open(file, "a") as lines:
            lines.write(json.dumps(span) + "\n")
        return trained

    with patch.object(Group, "train", timed_train), patch.object(training, "step_of", timed_step_of):
        yield


def read_spans(file: Path) -> list[RunSpan]:
    """The runs that `recording` noted, in the order in which they began."""
    spans = [RunSpan(*json.loads(line)) for line in file.read_text().splitlines()]
    return sorted(spans, key=lambda span: span.began)


def utilisation_of(spans: list[RunSpan], seconds: dict[str, float], cores: int) -> dict[str, Any]:
    """Shares of core-seconds. `seconds` of the program are by stage, with `training` and `total`."""
    busy, in_steps = sum(span.seconds for span in spans), sum(span.in_steps for span in spans)
    by_cell = {
        name: [span for span in spans if span.cell == name] for name in dict.fromkeys(s.cell for s in spans)
    }
    return {
        "cores": cores,
        "seconds": seconds,
        "busy_core_seconds": busy,
        "busy_share_of_training": busy / (cores * seconds["training"]),
        "busy_share_of_the_command": busy / (cores * seconds["total"]),
        "step_share_of_training": in_steps / (cores * seconds["training"]),
        "seconds_by_busy_cores": seconds_by_busy_cores(spans),
        "cells": [cell_entry(name, of_cell) for name, of_cell in by_cell.items()],
        "simulated": {count: simulated([span.seconds for span in spans], count) for count in SIMULATED_CORES},
    }


def cell_entry(name: str, spans: list[RunSpan]) -> dict[str, Any]:
    """The runs of a cell."""
    busy = sum(span.seconds for span in spans)
    return {
        "cell": name,
        "runs": len(spans),
        "busy_core_seconds": busy,
        "longest_run": max(span.seconds for span in spans),
        "step_share_of_runs": sum(span.in_steps for span in spans) / busy,
    }


def seconds_by_busy_cores(spans: Sequence[RunSpan]) -> dict[int, float]:
    """For how long so many runs were at work at a time, while the first to the last run was trained."""
    changes = sorted([(span.began, 1) for span in spans] + [(span.ended, -1) for span in spans])
    at_work, by_count = 0, dict[int, float]()
    for (moment, change), (later, _) in itertools.pairwise(changes):
        at_work += change
        by_count[at_work] = by_count.get(at_work, 0.0) + later - moment
    return dict(sorted(by_count.items()))


def simulated(durations: Sequence[float], cores: int) -> dict[str, float]:
    """Runs of these seconds, each begun in this order by the first free of so many equal cores.

    `least` is a bound of any order: the longest run, or all runs spread evenly.
    """
    free_at = [0.0] * cores
    for duration in durations:
        heapq.heapreplace(free_at, free_at[0] + duration)
    total = sum(durations)
    least, longest_first = max(*durations, total / cores), max(free_at)
    return {"seconds": longest_first, "least": least, "busy_share": total / (cores * longest_first)}


def utilisation_table(report: dict[str, Any]) -> str:
    """What `utilisation_of` found, as Markdown."""
    lines = ["| cell | runs | core-seconds | longest run (s) | of a run: steps |", "|---|---|---|---|---|"]
    for cell in report["cells"]:
        seconds = f"{cell['busy_core_seconds']:.2f} | {cell['longest_run']:.2f}"
        lines.append(f"| {cell['cell']} | {cell['runs']} | {seconds} | {cell['step_share_of_runs']:.1%} |")
    seconds, cores = report["seconds"], report["cores"]
    counts = ", ".join(f"{n}: {s:.2f} s" for n, s in report["seconds_by_busy_cores"].items())
    lines += [
        "",
        f"{cores} cores; the command {seconds['total']:.1f} s, of these training {seconds['training']:.1f} s",
        f"Busy with runs: {report['busy_share_of_training']:.1%} of the core-seconds of training, "
        f"{report['busy_share_of_the_command']:.1%} of the command's; with steps: "
        f"{report['step_share_of_training']:.1%} of training",
        f"Busy cores, from the first run to the last: {counts}",
        "",
        "| cores, on paper | these runs in this order (s) | any order at least (s) | busy |",
        "|---|---|---|---|",
    ]
    for count, paper in report["simulated"].items():
        lines.append(
            f"| {count} | {paper['seconds']:.2f} | {paper['least']:.2f} | {paper['busy_share']:.1%} |"
        )
    return "\n".join(lines)
