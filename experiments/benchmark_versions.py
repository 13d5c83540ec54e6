#!/usr/bin/env python3
"""Times the batched version against the sequential one: seconds, speed-up, samples/s, peak memory.

Each measurement is a process of its own; the versions take turns, and medians are shown. Loading the model
and writing the results are left out of the seconds, because they do not grow with the samples.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_analysis import EXPERIMENTS, InputError
from sae_analysis.random_gemma import make_random
from sae_analysis.samples import read_samples
from sae_analysis.settings import TINY, whole
from sae_analysis.toy import WARNING

QUICK = 20  # samples
SEQUENTIAL = "06_comprehensive_analysis.py"
BATCHED = "06_comprehensive_analysis_parallel.py"


class Timing(NamedTuple):
    """One measurement."""

    samples: int
    seconds: float
    share_of_geometry: float
    host: int  # bytes
    gpu: int


def time_version(script: str, flags: list[str]) -> Timing:
    """Run a version in a process of its own. Raises InputError with its message if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXPERIMENTS / script), *flags, "--output-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise InputError(f"{script} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
        manifest = json.loads(next(Path(folder).glob("*/manifest.json")).read_text())
    seconds: dict[str, float] = manifest["seconds"]
    measuring = seconds["measuring"] - seconds["load"]
    memory = manifest["peak_memory"]
    return Timing(
        manifest["samples"]["count"],
        measuring,
        seconds["geometry"] / measuring,
        memory["host"],
        memory["gpu"],
    )


def median(timings: list[Timing]) -> Timing:
    """The median of each number."""
    return Timing(*(statistics.median(values) for values in zip(*timings, strict=True)))


def measure(flags: list[str], batch_sizes: list[int], repeats: int) -> dict[str, Timing]:
    """Median timings by version."""
    versions = {"sequential": (SEQUENTIAL, flags)}
    for size in batch_sizes:
        versions[f"batch {size}"] = (BATCHED, [*flags, "--batch-size", str(size)])
    timings: dict[str, list[Timing]] = {name: [] for name in versions}
    for _ in range(repeats):
        for name, version in versions.items():
            timings[name].append(time_version(*version))
    return {name: median(of_version) for name, of_version in timings.items()}


def table(timings: dict[str, Timing]) -> list[str]:
    """The timings as lines, and the batch size that they recommend."""
    sequential = timings["sequential"].seconds
    lines = ["version       seconds  speed-up  samples/s  geometry  host MiB  GPU MiB"]
    for name, timing in timings.items():
        lines.append(
            f"{name:<12}{timing.seconds:>9.2f}{sequential / timing.seconds:>9.1f}x"
            f"{timing.samples / timing.seconds:>11.1f}{timing.share_of_geometry:>9.1%}"
            f"{timing.host / 2**20:>10.0f}{timing.gpu / 2**20:>9.0f}"
        )
    batched = {name: timing for name, timing in timings.items() if name != "sequential"}
    fastest = min(timing.seconds for timing in batched.values())
    # The smallest size within 5 % of the best: more needs more memory and gains nothing.
    name = next(name for name, timing in batched.items() if timing.seconds <= 1.05 * fastest)
    return [*lines, f"Recommended here: --batch-size {name.removeprefix('batch ')}"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{QUICK} samples (the default)")
    size.add_argument("--full", action="store_true", help="all samples")
    parser.add_argument("--batch-sizes", nargs="+", type=whole(1), default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=whole(1), default=3, help="measurements of each version")
    parser.add_argument(
        "--model",
        default=TINY,
        help="a --model of the analysis, or 'random': a Gemma-2 of random weights (--random-shape)",
    )
    parser.add_argument(
        "--random-shape", nargs=2, type=whole(1), default=[26, 512], metavar=("LAYERS", "WIDTH")
    )
    parser.add_argument("--random-features", type=whole(64), default=16384, help="of its SAEs")
    values, flags = parser.parse_known_args(argv)
    if {"--devices", "--ray"} & set(flags):
        parser.error("--devices and --ray are not timed: loading cannot be told from measuring there")
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags += [] if values.full else ["--max-samples", str(QUICK)]
            flags += model_flags(values, Path(folder))
            timings = measure(flags, sorted(set(values.batch_sizes)), values.repeats)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    machine = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    )
    count = timings["sequential"].samples
    print(f"{count:.0f} samples, model {values.model}, {machine}, median of {values.repeats}")
    if values.model == TINY:
        print(WARNING)
    print("\n".join(table(timings)))
    return 0


def model_flags(values: Any, folder: Path) -> list[str]:
    """The flags that name the model; a random one is made in the folder."""
    if values.model != "random":
        return ["--model", values.model]
    depth, width = values.random_shape
    texts = [text for sample in read_samples(EXPERIMENTS / "data") for text in sample.texts]
    layers = make_random(folder, texts, depth, width, values.random_features)
    return ["--model", str(folder), "--sae-release", str(folder), "--layers", *map(str, layers)]


if __name__ == "__main__":
    sys.exit(main())
