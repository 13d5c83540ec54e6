"""What a build says of its rows as a whole: copies, checkpoints of one training, several base models."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from ablation.catalogue import GROUP_COLUMN, TRAINING_COLUMN
from ablation.log import visible
from ablation.making.labels import Labels
from ablation.making.progress import say
from ablation.splits import SMALLEST_SPLIT, SplitSpec, split_rows

SPLIT_SEED = 42  # of the experiment's first split
SHOWN_GROUPS = 5  # of copies; build.json has all
SHOWN_VALUES = 5
NAME_CHARACTERS = 100

Findings = dict[str, Any]


def findings_of(labels: Labels, rows: Sequence[str], duplicates: Iterable[Sequence[str]]) -> Findings:
    """What build.json says of the rows, given as the names of their files in order, as a whole.

    `duplicates` are groups of files with the same content, whether they became rows or not.
    """
    became_rows = set(rows)
    copies = [[name for name in group if name in became_rows] for group in duplicates]
    copies = [group for group in copies if len(group) > 1]
    return {
        "duplicates": copies,
        "duplicates_with_several_labels": [group for group in copies if has_several_labels(labels, group)],
        "base_models": labels.headers.base_models_of(rows),
        **trainings_found(labels, rows),
    }


def has_several_labels(labels: Labels, names: Iterable[str]) -> bool:
    """True if files have different labels."""
    return len({str(labels.of(name)[labels.label]) for name in names}) > 1


def trainings_found(labels: Labels, rows: Sequence[str]) -> Findings:
    """How many rows each training with several rows has, and how many test rows of the experiment's random
    split share theirs with a training row. A row without a training is one by itself.
    """
    if TRAINING_COLUMN not in labels.types:
        return {"trainings": {}, "test_rows_with_their_training_in_train": 0}
    stated = [labels.trainings.get(name) or labels.of(name).get(TRAINING_COLUMN) for name in rows]
    counts = collections.Counter(str(value) for value in stated if value is not None)
    split = split_rows(len(rows), SplitSpec("random", SPLIT_SEED))
    trained = {stated[row] for row in split.train} - {None}
    shared = 0 if split.overlap else sum(stated[row] in trained for row in split.test)
    return {
        "trainings": {value: count for value, count in sorted(counts.items()) if count > 1},
        "test_rows_with_their_training_in_train": shared,
    }


# --- what is said


def say_findings(found: Findings, rows: int, others: Iterable[str]) -> None:
    """Say what was found. `others` are the names of the columns besides the weights."""
    say_duplicates(found["duplicates"], found["duplicates_with_several_labels"])
    for field, counts in found["base_models"].items():
        if len(counts) > 1:
            say(
                f"WARNING: several base models by {field}: {most_frequent(counts)}"
                f"{of_the_rest(rows - sum(counts.values()))}: a class may be known by its base; "
                f"--header-columns {field} makes it a column"
            )
    trainings = found["trainings"]
    if not trainings:
        return
    say(
        f"Groups:  {sum(trainings.values())} files are of {len(trainings)} trainings with several files; the "
        f"column {TRAINING_COLUMN} says which"
    )
    if rows < SMALLEST_SPLIT:
        return
    column = f" --group-column {TRAINING_COLUMN}" if GROUP_COLUMN in others else ""
    shared = found["test_rows_with_their_training_in_train"]
    say(
        f"WARNING: a random split {'puts' if shared else 'may put'} files of one training on both sides "
        f"({shared} test rows at seed {SPLIT_SEED}): run with --split grouped{column}"
    )


def say_duplicates(groups: Sequence[Sequence[str]], mixed: Sequence[Sequence[str]]) -> None:
    """Name the copies; those with several labels are a warning."""
    if not groups:
        return
    shown = [*mixed, *(group for group in groups if group not in mixed)][:SHOWN_GROUPS]
    say(f"Copies:  {sum(map(len, groups)) - len(groups)} files have the content of another file")
    for group in shown:
        start = "WARNING: the same weights under several labels: " if group in mixed else "         "
        say(start + " = ".join(visible(name, NAME_CHARACTERS) for name in group[:SHOWN_VALUES]) + more(group))
    if len(groups) > len(shown):
        say(f"         and {len(groups) - len(shown)} more groups, named in build.json")


def most_frequent(counts: dict[str, int]) -> str:
    """Counts and values, the most frequent first."""
    in_order = sorted(counts, key=lambda value: (-counts[value], value))
    named = ", ".join(
        f"{counts[value]} {visible(value, NAME_CHARACTERS)}" for value in in_order[:SHOWN_VALUES]
    )
    return named + more(in_order)


def more(values: Sequence[Any]) -> str:
    """How many values are not shown."""
    return f" and {len(values) - SHOWN_VALUES} more" if len(values) > SHOWN_VALUES else ""


def of_the_rest(count: int) -> str:
    """How many files do not state a value."""
    return f", {count} do not say" if count > 0 else ""
