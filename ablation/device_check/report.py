"""What was checked on, and device_check.json and device_check.md."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablation.benchmark.timing import processor
from ablation.device_check.board import FAILED, NOT_RUN, Board
from checkpointing import make_folder, utc_now, write_bytes, write_json

PROJECT_FOLDER = Path(__file__).resolve().parent.parent.parent
NVIDIA = Path("/proc/driver/nvidia/version")
NEEDED_PACKAGES = ("datasets", "pyarrow", "scikit-learn", "scipy", "safetensors", "xxhash")
JSON_NAME, PAGE_NAME = "device_check.json", "device_check.md"


def machine_of(device: str) -> dict[str, Any]:
    """The device, the machine and the versions."""
    found: dict[str, Any] = {
        "device": device,
        "name": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": NVIDIA.read_text().splitlines()[0] if NVIDIA.exists() else None,
        "commit": commit_of(PROJECT_FOLDER),
        "time": utc_now(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "processor": processor()}
        found |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found | {"packages": {name: version_of(name) for name in NEEDED_PACKAGES}}


def version_of(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str | None:
    """The git commit of a folder, with "+ changes" if files differ from it; None without git."""
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0].strip() + (" + changes" if answers[1].strip() else "")


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The machine as lines of Markdown."""
    named = {key: value for key, value in machine.items() if value is not None and key != "packages"}
    packages = ", ".join(f"{name} {found or 'not installed'}" for name, found in machine["packages"].items())
    return [*(f"- {key}: {value}" for key, value in named.items()), f"- packages: {packages}"]


def write_check(folder: Path, machine: dict[str, Any], board: Board, seconds: float) -> None:
    """Write both files. Raises CannotWrite if the folder does not take them."""
    named = {"failures": board.named(FAILED), "not_run": board.named(NOT_RUN)}
    values = {"machine": machine, "seconds": seconds, "finished": board.is_finished, **named}
    values["tables"] = board.values()
    make_folder(folder)
    write_json(folder / JSON_NAME, values, indent=2)
    lines = [f"# Check of {machine['name']}", "", *machine_lines(machine), f"- seconds: {seconds:.0f}", ""]
    for table in board.tables:
        lines += [*table.lines(), ""]
    lines += board.summary()
    write_bytes(folder / PAGE_NAME, ("\n".join(lines) + "\n").encode())
