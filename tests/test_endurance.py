"""The short form of scripts/crash_test.py: kills, damage, signals, and random actions beside a model.

It runs in a process of its own, because it forks, and this one may have threads.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMAND = ROOT / "scripts" / "crash_test.py"
# A program that breaks a promise: parts of finished cells stay. The crash test must find that.
BROKEN = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import checkpointing, crash_test
checkpointing.Unfinished.remove = lambda self: None
sys.exit(crash_test.main(["--rounds", "1"]))
"""


def crash_test(tmp_path, *flags):
    command = [sys.executable, str(COMMAND), "--folder", str(tmp_path), *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--test", "kills", "--rounds", "8"),
        ("--test", "signals", "--rounds", "2"),
        ("--test", "soak", "--rounds", "12"),
        ("--test", "damage", "--truncations", "1", "--flips", "2", "--sample", "24"),
    ],
    ids=lambda flags: flags[1],
)
def test_nothing_is_lost_torn_wrong_or_made_again(tmp_path, flags):
    done = crash_test(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{flags[1]}, " in done.stdout and not list(tmp_path.rglob("*.json")), "its folders are removed"


@pytest.mark.slow
def test_a_promise_that_is_broken_is_found():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert done.returncode == 1 and "left over" in done.stdout, done.stdout + done.stderr
