"""Runs killed at random moments and at every named moment of a write, and rerun until they are finished."""

from __future__ import annotations

import collections
import random
import shutil
import signal
from pathlib import Path

from ablation.endurance.trial import CELLS, Ended, Trial

# How often a run passes each moment, at most: every write passes the first four.
MOMENTS = {
    "before": 60, "half": 60, "written": 60, "renamed": 60, "cached": 1, "between": 6, "committed": 6
}  # fmt: skip
FAULTS = ("unreadable", "foreign", "lost", "made again", "unequal", "left over", "ended otherwise")
Counts = collections.Counter[str]


def kill_rounds(whole: Trial, folder: Path, rounds: int, seed: int = 0) -> dict[str, Counts]:
    """For each kind of kill how many there were, and how many faults of each kind they led to.

    A round is a new experiment, killed up to four times and then run to its end, which must be `whole`'s.
    """
    draw = random.Random(seed)
    seconds = whole_seconds(folder)
    expected = whole.content()
    table: dict[str, Counts] = {"random": Counts(), **{moment: Counts() for moment in MOMENTS}}
    for number in range(rounds):
        trial = Trial.at(folder / f"round{number}")
        kinds = [draw.choice(["random", *MOMENTS]) for _ in range(draw.randint(1, 4))]
        if number < len(table):
            kinds[0] = list(table)[number]  # every kind occurs
        finished: dict[str, tuple] = {}
        for kind in kinds:
            if kind == "random":
                ended = trial.start().end_after(draw.uniform(0, seconds), signal.SIGKILL)
            else:
                ended = trial.run(crash=f"{kind} {draw.randint(1, MOMENTS[kind])}")
            table[kind]["kills"] += ended.status == -signal.SIGKILL
            count_end(ended, (0, -signal.SIGKILL), table[kind])
            count_faults(trial, finished, table[kind])
        last = table[kinds[-1]]
        count_end(trial.run(), (0,), last)
        count_faults(trial, finished, last)
        last["unequal"] += trial.content() != expected
        last["left over"] += len(trial.leftovers())
        shutil.rmtree(trial.place)
    return table


def count_end(ended: Ended, right: tuple[int, ...], counts: Counts) -> None:
    """Count a process that ended with another status, and print its last lines."""
    if ended.status not in right:
        counts["ended otherwise"] += 1
        print(f"status {ended.status}:", *ended.text.splitlines()[-5:], sep="\n    ", flush=True)


def count_faults(trial: Trial, finished: dict[str, tuple], counts: Counts) -> None:
    """Count what is wrong in the folder now. `finished` has the cells of before, and gets those of now."""
    counts["unreadable"] += len(trial.unreadable())
    counts["foreign"] += len(trial.foreign())
    now = trial.finished()
    counts["lost"] += len(finished.keys() - now.keys())
    counts["made again"] += sum(now[name] != before for name, before in finished.items() if name in now)
    counts["foreign"] += len(now) > CELLS
    finished.update(now)


def whole_seconds(folder: Path) -> float:
    """Seconds of an experiment in a new place."""
    trial = Trial.at(folder / "timed")
    seconds = trial.run().seconds
    shutil.rmtree(trial.place)
    return seconds
