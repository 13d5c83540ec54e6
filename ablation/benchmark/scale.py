"""How time, memory and disk of an experiment grow with the number of rows: measured, and by a straight line.

Each data set is run by the program itself, in a process of its own, under a limit of memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ablation.memory import CGROUPS, numbers_in

SAMPLE_SECONDS = 0.2
PIECE_BYTES_READ = 2**24
HASHED = re.compile(r"Content hash of ([\d.]+) GB of weights: \w+ \(([\d.]+)s\)")
PASSED = re.compile(r"Features of (\d+) rows .*: ([\d.]+)s \(reading ([\d.]+)s, computing ([\d.]+)s\)")


@dataclass
class ScaleRun:
    """One run. Seconds by stage; bytes of the files read, of the cache, and of the program's own memory."""

    rows: int
    file_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0  # its own pages; pages of files can be taken back at any time
    cache_bytes: int = 0


def run_measured(program: Path, data: Path, work: Path, limit: int, flags: Sequence[str]) -> ScaleRun:
    """Run the program on a data set, cold, in the folder `work`. `limit`: bytes of memory, 0 for none.

    Raises SystemExit if it fails, and OSError if the limit cannot be set.
    """
    files = [file for file in sorted(data.rglob("*")) if file.suffix in (".arrow", ".parquet")]
    found = ScaleRun(rows=0, file_bytes=sum(file.stat().st_size for file in files))
    drop_page_cache()
    found.seconds["plain read"] = time_of_reading(files)
    drop_page_cache()
    command = [sys.executable, str(program), "--dataset", str(data), "--no-report", *flags]
    with control_group(limit) as enter, open(work / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=work, stdout=log, stderr=subprocess.STDOUT, preexec_fn=enter)
        over = threading.Event()
        sampler = threading.Thread(target=sample, args=(process.pid, found, over))
        sampler.start()
        status = process.wait()
        over.set()
        sampler.join()
    text = (work / "log.txt").read_text()
    if status != 0:
        raise SystemExit(f"error: the program ended with {status}; its last lines:\n{text[-2000:]}")
    (manifest,) = work.glob("*/*/manifest.json")
    spent = json.loads(manifest.read_text())["seconds"]
    hashed, passed = HASHED.search(text), PASSED.search(text)
    assert hashed is not None and passed is not None, text
    found.rows = int(passed[1])
    pass_seconds = float(passed[2])
    found.seconds |= {
        "open": spent["load"],
        "hash": float(hashed[2]),
        "features": pass_seconds,
        "cache": spent["read"] + spent["features"] - float(hashed[2]) - pass_seconds,
        "training": spent["training"],
        "all": spent["total"],
    }
    caches = [file for file in work.rglob("*.safetensors") if ".unfinished" not in file.parts]
    found.cache_bytes = sum(file.stat().st_size for file in caches)
    return found


def time_of_reading(files: list[Path]) -> float:
    """Seconds that a plain reading of files from front to back takes."""
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(PIECE_BYTES_READ):
                pass
    return time.perf_counter() - began


def drop_page_cache() -> None:
    """Forget the files that the system keeps in memory, where this process may do so."""
    with contextlib.suppress(OSError):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")


def sample(pid: int, found: ScaleRun, over: threading.Event) -> None:
    """Note the most memory of its own that a process has, until it is over."""
    while not over.wait(SAMPLE_SECONDS):
        own = numbers_in(Path(f"/proc/{pid}/status")).get("RssAnon", 0) * 1024
        found.memory_bytes = max(found.memory_bytes, own)


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Callable[[], object] | None]:
    """A function that puts a process into a control group with this limit of memory; None without a limit.

    Pages of files count there too, and are given up at the limit. Raises OSError where it cannot be made.
    """
    if not limit:
        yield None
        return
    is_old = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if is_old else CGROUPS) / f"scale-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_old else "memory.max")).write_text(str(limit))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):  # its last process is not gone yet
                group.rmdir()
                break
            time.sleep(SAMPLE_SECONDS)


# --- the line through two smaller data sets


def predicted(measured: list[ScaleRun], rows: int) -> ScaleRun:
    """What the line through the two next smaller measured sizes says of a number of rows.

    Memory lies on no line: it stops growing where a cell's columns are read from disk.
    """
    small, large = sorted((one for one in measured if one.rows < rows), key=lambda one: one.rows)[-2:]

    def on_line(first: float, second: float) -> float:
        slope = (second - first) / (large.rows - small.rows)
        return first + slope * (rows - small.rows)

    seconds = {stage: on_line(small.seconds[stage], large.seconds[stage]) for stage in small.seconds}
    return ScaleRun(
        rows,
        int(on_line(small.file_bytes, large.file_bytes)),
        seconds,
        cache_bytes=int(on_line(small.cache_bytes, large.cache_bytes)),
    )


def scale_table(measured: list[ScaleRun], wanted: Sequence[int]) -> str:
    """Measured and predicted sizes side by side, as a table in Markdown."""
    stages = list(measured[0].seconds)
    head = ["rows", "", *(f"{stage} s" for stage in stages), "memory GB", "cache GB", "files GB"]
    lines = [head, ["---"] * len(head)]
    further = [rows for rows in wanted if sum(one.rows < rows for one in measured) > 1]
    for one in measured:
        lines.append(scale_row(one, "measured", stages))
        if sum(smaller.rows < one.rows for smaller in measured) > 1:
            lines.append(scale_row(predicted(measured, one.rows), "predicted", stages))
    lines += [scale_row(predicted(measured, rows), "predicted", stages) for rows in further]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scale_row(one: ScaleRun, how: str, stages: list[str]) -> list[str]:
    """A row of the table."""
    sizes = [
        f"{size / 1e9:.2f}" if size else "" for size in (one.memory_bytes, one.cache_bytes, one.file_bytes)
    ]
    return [f"{one.rows:,}", how, *(f"{one.seconds[stage]:,.1f}" for stage in stages), *sizes]
