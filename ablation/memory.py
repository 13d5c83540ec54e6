"""How much memory this process may still take."""

from __future__ import annotations

import contextlib
import math
import resource
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # a control group without a limit names a number beyond this, or "max"


def free_memory() -> float:
    """Bytes that this process may take: what the machine has free, within the limits that it runs under.

    Files that are mapped or cached count as free, because the kernel gives up their pages. Infinite where the
    system tells nothing.
    """
    return min(free_on_machine(), free_in_control_group(), free_address_space())


def free_on_machine() -> float:
    """Bytes that the kernel could give without swapping."""
    return numbers_in(MEMINFO).get("MemAvailable", math.inf) * 1024


def free_in_control_group() -> float:
    """Bytes left under the limit of this process's control group and of those above it."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers:
                root, limit, usage = CGROUPS, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = root / name.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    left = min(left, left_in_group(folder, limit, usage))
    return left


def left_in_group(folder: Path, limit: str, usage: str) -> float:
    """Bytes left in one control group; infinite if it has no limit."""
    try:
        most = int((folder / limit).read_text())
        if most >= UNLIMITED:
            return math.inf
        pages = numbers_in(folder / "memory.stat")
        reclaimable = pages.get("inactive_file", 0) + pages.get("active_file", 0)
        return max(most - int((folder / usage).read_text()) + reclaimable, 0)
    except (OSError, ValueError):  # no such file; "max"
        return math.inf


def free_address_space() -> float:
    """Bytes left under `ulimit -v`."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return math.inf
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return max(most - pages * resource.getpagesize(), 0)


def numbers_in(path: Path) -> dict[str, int]:
    """The lines `name number` or `name: number kB` of a file of the kernel; {} if there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
