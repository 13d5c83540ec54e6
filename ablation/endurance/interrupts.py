"""Runs ended by signals at random moments, and resumed."""

from __future__ import annotations

import collections
import random
import shutil
import signal
from pathlib import Path

from ablation.endurance.kills import Counts, count_faults, whole_seconds
from ablation.endurance.trial import Trial
from ablation.stopping import SIGNALS

SIGNAL_FAULTS = (
    "unreadable",
    "foreign",
    "lost",
    "made again",
    "unequal",
    "left over",
    "wrong status",
    "said failed",
)
LONGEST = "longest ms"  # from a signal to the end of its process
FRESH_EVERY = 10  # of the processes one in so many imports torch itself, and is stopped during that too
FRESH_SECONDS = 4.0  # about as long as such a start takes


def signal_rounds(whole: Trial, folder: Path, rounds: int, seed: int = 0) -> dict[str, Counts]:
    """For each signal how many met a process, the longest time until that ended, and the faults.

    Every process is started in the folder that the one before left, until the experiment is finished.
    """
    draw = random.Random(seed)
    seconds = whole_seconds(folder)
    expected = whole.content()
    table: dict[str, Counts] = collections.defaultdict(Counts)
    for number in SIGNALS:
        counts = table[signal.Signals(number).name]
        finished: dict[str, tuple] = {}
        trial = Trial.at(folder / "stopped")
        for started in range(4 * rounds):
            if counts["signals"] == rounds:
                break
            fresh = started % FRESH_EVERY == FRESH_EVERY - 1
            after = draw.uniform(0, FRESH_SECONDS + seconds if fresh else seconds)
            ended = trial.start(fresh=fresh).end_after(after, number)
            early = ended.status == -number  # before the program had a handler
            counts["signals"] += ended.status in (128 + number, -number)
            counts["before it began"] += early
            if ended.status == 128 + number:
                counts[LONGEST] = max(counts[LONGEST], round(1000 * ended.seconds))
            counts["wrong status"] += ended.status not in (0, 128 + number, -number)
            counts["said failed"] += not early and ("FAILED" in ended.text or "Traceback" in ended.text)
            count_faults(trial, finished, counts)
            if ended.status == 0:  # it was faster than the signal
                counts["unequal"] += trial.content() != expected
                counts["left over"] += len(trial.leftovers())
                shutil.rmtree(trial.place)
                trial, finished = Trial.at(folder / "stopped"), {}
        counts["wrong status"] += trial.run().status != 0
        counts["unequal"] += trial.content() != expected
        counts["left over"] += len(trial.leftovers())
        shutil.rmtree(trial.place)
    return dict(table)
