"""The short form of scripts/crash_test.py: kills, damage, signals, and random actions beside a model.

It runs in a process of its own, because it forks, and this one may have threads; in one, because each would
import torch anew.
"""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

COMMAND = ROOT / "scripts" / "crash_test.py"
FLAGS = {
    "kills": ("--rounds", "8"),
    "signals": ("--rounds", "2"),
    "soak": (
        "--rounds",
        "9",
        "--seed",
        "1358",
    ),  # a seed that draws every action, damage when there are files
    "damage": ("--truncations", "1", "--flips", "2", "--sample", "24"),
}
# The last is a program that breaks a promise: parts of finished cells stay. The crash test must find that.
PROGRAM = f"""
import runpy, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import checkpointing
folder = sys.argv[1]
def crash_test(name, *flags):
    sys.argv = [{str(COMMAND)!r}, "--folder", folder, *flags]
    print("begin", name, flush=True)
    try: runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended: print("status", ended.code, flush=True)
for name, flags in {FLAGS!r}.items(): crash_test(name, "--test", name, *flags)
checkpointing.Unfinished.remove = lambda self: None
crash_test("broken", "--rounds", "1")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("crashes")


@pytest.fixture(scope="module")
def printed(folder):
    """What each of the crash tests printed, its status last; under "" what went wrong besides."""
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first, *rest = re.split(r"^begin (\w+)\n", done.stdout, flags=re.M)
    return dict(zip(rest[::2], rest[1::2], strict=True)) | {"": first}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_nothing_is_lost_torn_wrong_or_made_again(printed, folder, name):
    assert printed.get(name, "").endswith("\nstatus 0\n"), printed
    assert f"\n{name}, " in printed[name] and not list(folder.rglob("*.json")), "its folders are removed"


@pytest.mark.slow
def test_a_promise_that_is_broken_is_found(printed):
    assert printed["broken"].endswith("\nstatus 1\n") and "left over" in printed["broken"], printed
