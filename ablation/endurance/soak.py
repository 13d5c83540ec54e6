"""Random actions, one after another, beside a model of what must be true after each."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from ablation.endurance.damages import damages
from ablation.endurance.kills import Counts
from ablation.endurance.trial import Ended, Trial, make_data, visible_files

SEEDS = ("42", "7")  # of training: two settings whose cells differ
SOAK_FAULTS = ("wrong results", "wrong status", "traceback", "unreadable", "foreign", "hangs")


@dataclass
class Model:
    """What the folder should be: the data and the setting of the last command, those of its finished cells,
    and the content of every unbroken experiment, made when it is first needed.
    """

    folder: Path
    data: int = 0
    seed: str = SEEDS[0]
    finished_with: set[tuple[int, str]] = field(default_factory=set)
    known: dict[tuple[int, str], dict] = field(default_factory=dict)

    @property
    def now(self) -> tuple[int, str]:
        """Data and setting of the next command."""
        return self.data, self.seed

    def expected(self) -> dict:
        """The content of an unbroken experiment with the present data and setting."""
        if self.now not in self.known:
            place = self.folder / f"unbroken-{self.data}-{self.seed}"
            trial = Trial.at(place, self.data)
            ended = trial.run("--seed", self.seed)
            assert ended.status == 0, ended.text
            self.known[self.now] = trial.results()
            shutil.rmtree(place)
        return self.known[self.now]


def soak(folder: Path, actions: int, seed: int = 0) -> Counts:
    """How often each action was taken, and the faults."""
    draw = random.Random(seed)
    counts, model = Counts(), Model(folder)
    trial = Trial.at(folder / "soaked")
    chosen = [draw.choice(list(ACTIONS)) for _ in range(actions)]
    for number, action in enumerate(chosen):
        counts[action] += 1
        try:
            ACTIONS[action](trial, model, draw, counts)
        except TimeoutError:
            counts["hangs"] += 1
        if number % 4 == 3 or number == actions - 1:
            run_to_end(trial, model, draw, counts)
    shutil.rmtree(trial.place)
    return counts


def run_to_end(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Run, with --rerun-stale if cells of other settings are in the way; the results must be right."""
    ended = trial.run("--seed", model.seed)
    check(ended, counts)
    if ended.status == 2:
        others = model.finished_with - {model.now}
        counts["wrong status"] += not others
        ended = trial.run("--seed", model.seed, "--rerun-stale")
        check(ended, counts)
    counts["wrong status"] += ended.status != 0
    if ended.status == 0:
        counts["unreadable"] += len(trial.unreadable(trial.output))
        counts["wrong results"] += trial.results() != model.expected()
        counts["foreign"] += len(trial.foreign())
        model.finished_with = {model.now}


def check(ended: Ended, counts: Counts) -> None:
    """Count what no process may do."""
    counts["traceback"] += "Traceback" in ended.text
    counts["wrong status"] += ended.status not in (0, 2, 3)


# --- actions


def kill_it(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Start the program and kill it."""
    trial.start("--seed", model.seed).end_after(draw.uniform(0, 1), signal.SIGKILL)
    model.finished_with |= {model.now}


def stop_it(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Start the program and end it by a signal."""
    number = draw.choice((signal.SIGTERM, signal.SIGINT))
    ended = trial.start("--seed", model.seed).end_after(draw.uniform(0, 1), number)
    counts["wrong status"] += ended.status not in (0, 2, 128 + number, -number)
    model.finished_with |= {model.now}


def change_a_setting(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Ask for another seed from now on."""
    model.seed = draw.choice(SEEDS)


def rebuild_the_data(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Write the data set anew, the same or another one."""
    model.data = draw.choice((0, 1))
    make_data(trial.place, model.data)


def delete_a_file(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Remove a file of the output folder or of the cache."""
    files = visible_files(trial.output, trial.place / "cache")
    if files:
        draw.choice(files).unlink()


def damage_a_file(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Damage a file of the output folder or of the cache, but for what is refused until a user acts."""
    files = [path for path in visible_files(trial.output, trial.place / "cache") if path.stat().st_size]
    if files:
        path = draw.choice(files)
        kinds = [how for kind, how in damages(path.stat().st_size, 3, 3, draw) if kind not in REFUSED]
        draw.choice(kinds)(path)


def remove_a_folder(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Remove the cache, or a part of the output folder."""
    chosen = draw.choice([trial.place / "cache", trial.output / "predictions", trial.output])
    shutil.rmtree(chosen, ignore_errors=True)


def two_at_once(trial: Trial, model: Model, draw: random.Random, counts: Counts) -> None:
    """Start the program twice; one of them may be refused."""
    both = [trial.start("--seed", model.seed) for _ in range(2)]
    ended = [process.wait() for process in both]
    for one in ended:
        check(one, counts)
    counts["wrong status"] += [one.status for one in ended].count(3) == 2
    model.finished_with |= {model.now}


ACTIONS = {
    "kill": kill_it,
    "stop": stop_it,
    "change a setting": change_a_setting,
    "rebuild the data": rebuild_the_data,
    "delete a file": delete_a_file,
    "damage a file": damage_a_file,
    "remove a folder": remove_a_folder,
    "two at once": two_at_once,
}
REFUSED = ("a folder", "a pipe", "a link", "a link to nothing")
