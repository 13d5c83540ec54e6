#!/usr/bin/env python3
"""How often the tests and intervals of the experiment are right:
simulated experiments with a known drop, as the tables of docs/statistics.md.

--table one-split, folds, splits or family chooses; each number is a rate over --experiments, with its
Monte-Carlo error.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import _root  # noqa: F401

from ablation.simulation import (
    FIVE_FOLDS,
    ONE_SPLIT,
    FoldWorld,
    simulate,
    simulate_family,
    simulate_folds,
    simulate_splits,
)

DROP, LOST = 0.08, 0.2  # true drop in points of a split, and share of the classes' distance that is lost


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--table", choices=list(TABLES), default="folds", help="which table (default: folds)")
    add("--experiments", type=int, default=1000, help="for each row of the table (default: 1000)")
    add("--only", default="", metavar="TEXT", help="rows whose name has this text")
    add("--seed", type=int, default=0, help="of the simulation (default: 0)")
    arguments = parser.parse_args(argv)
    TABLES[arguments.table](arguments)


def rate(value: float, experiments: int) -> str:
    """A rate with its Monte-Carlo error."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f} ± {100 * math.sqrt(value * (1 - value) / experiments):.1f}"


def print_one_split(arguments: argparse.Namespace) -> None:
    """The table of one split."""
    print(
        "| one split | true drop, points | drop claimed, % | 95 % interval holds it, % "
        "| claimed by sign flips alone | by a t test over seeds |"
    )
    print("|---|---|---|---|---|---|")
    print_worlds(ONE_SPLIT, {"drop": DROP}, simulate, arguments)


def print_folds(arguments: argparse.Namespace) -> None:
    """The table of a cross-validation."""
    print(
        "| 5 folds, 2 rounds | true drop, points | drop claimed, % | 95 % interval holds it, % "
        "| by rows alone |"
    )
    print("|---|---|---|---|---|")
    print_worlds(FIVE_FOLDS, {"lost": LOST}, simulate_with_rows, arguments)


def simulate_with_rows(world: FoldWorld, experiments: int, seed: int) -> dict[str, float]:
    """The rates of a cross-validation, with a place for what only groups have."""
    return {"covered by rows": math.nan} | simulate_folds(world, experiments, seed)


def print_worlds(
    worlds: Mapping[str, Any],
    change: dict[str, float],
    simulate_one: Callable[[Any, int, int], dict[str, float]],
    arguments: argparse.Namespace,
) -> None:
    """Two rows for each world: as it is, without a drop, and with the `change` that makes one."""
    for (name, world), changed in itertools.product(worlds.items(), ({}, change)):
        if arguments.only in name:
            found = simulate_one(dataclasses.replace(world, **changed), arguments.experiments, arguments.seed)
            print_row(name, found, arguments.experiments)


def print_splits(arguments: argparse.Namespace) -> None:
    """The table of several splits."""
    print(
        "| rows, splits | true drop, points | drop claimed, % | 95 % interval holds it, % "
        "| claimed by a plain t test over splits |"
    )
    print("|---|---|---|---|---|")
    for rows, splits, lost in itertools.product((200, 1000), (3, 5, 10), (0.0, 0.2)):
        name = f"{rows} rows, {splits} splits"
        if arguments.only in name:
            found = simulate_splits(rows, lost, splits, arguments.experiments, arguments.seed)
            print_row(name, found, arguments.experiments)


def print_family(arguments: argparse.Namespace) -> None:
    """The table of nine representations at once."""
    print(
        "| nine representations | true drop, points | a wrong claim by max-T, % | found by max-T "
        "| a wrong claim by Holm | found by Holm | all nine intervals hold |"
    )
    print("|---|---|---|---|---|---|---|")
    for (groups, grouped), falling in itertools.product(((0, False), (100, True)), (0, 3)):
        name = f"520 rows{f' in {groups} groups' if groups else ''}, {falling} of 9 fall"
        if arguments.only in name:
            world = FoldWorld(groups=groups, grouped=grouped, lost=LOST)
            found = simulate_family(world, falling, arguments.experiments, arguments.seed)
            print_row(name, found, arguments.experiments)


def print_row(name: str, found: dict[str, float], experiments: int) -> None:
    """A row of a table: its name, the true drop, and the rates."""
    order = ("drop", "claimed", "covered")
    names = [*(key for key in order if key in found), *(key for key in found if key not in order)]
    cells = [rate(found[key], experiments) for key in names if key != "drop"]
    print(f"| {name} | {100 * found['drop']:.1f} | {' | '.join(cells)} |", flush=True)


TABLES = {"one-split": print_one_split, "folds": print_folds, "splits": print_splits, "family": print_family}


if __name__ == "__main__":
    main()
