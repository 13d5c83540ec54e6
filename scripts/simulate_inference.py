#!/usr/bin/env python3
"""How often the tests and intervals of the experiment are right:
simulated experiments with a known drop, as the tables of docs/statistics.md.

--table chooses; each number is a rate over --experiments, with its
Monte-Carlo error.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import _root  # noqa: F401
from threadpoolctl import threadpool_limits

from ablation.simulated_choice import CHOICE_WORLDS, simulate_choice
from ablation.simulated_openings import COLLECTIONS, simulate_openings
from ablation.simulation import (
    FIVE_FOLDS,
    HARD,
    ONE_SPLIT,
    FoldWorld,
    simulate,
    simulate_data_sets,
    simulate_family,
    simulate_folds,
    simulate_splits,
)
from ablation.worlds import (
    EQUAL_MARGIN,
    EQUAL_WORLDS,
    SMALLEST_WORLDS,
    UNEVEN_WORLDS,
    WORLDS,
    simulate_equal,
    simulate_smallest,
    simulate_uneven,
    simulate_world,
)

DROP, LOST = 0.08, 0.2  # true drop in points of a split, and share of the classes' distance that is lost


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--table", choices=list(TABLES), default="folds", help="which table (default: folds)")
    add("--experiments", type=int, default=1000, help="for each row of the table (default: 1000)")
    add("--only", default="", metavar="TEXT", help="rows whose name has this text")
    add("--rows", type=int, default=5000, help="of each data set of the table mlp (default: 5000)")
    add("--data-sets", type=int, default=20, help="of the table mlp (default: 20)")
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
    change: dict[str, float] | None,
    simulate_one: Callable[[Any, int, int], dict[str, float]],
    arguments: argparse.Namespace,
) -> None:
    """Two rows for each world: as it is, without a drop, and with the `change` that makes one, if any."""
    changes = ({},) if change is None else ({}, change)
    for (name, world), changed in itertools.product(worlds.items(), changes):
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


def print_mlp(arguments: argparse.Namespace) -> None:
    """The table of the program's own MLP on disjoint data sets."""
    print(
        "| the MLP, 5 folds | scatter of the drops, points | standard error claimed | ratio "
        "| claimed a drop |"
    )
    print("|---|---|---|---|---|")
    world = dataclasses.replace(HARD, rows=arguments.rows, learner="mlp")
    sets = arguments.data_sets
    for rounds, found in enumerate(simulate_data_sets(world, sets, arguments.seed), 1):
        print(
            f"| {arguments.rows:,} rows, {rounds} round{'s' * (rounds > 1)} | {100 * found['scatter']:.2f} "
            f"| {100 * found['standard error']:.2f} | {found['ratio']:.2f} ± {found['error of ratio']:.2f} "
            f"| {found['claims']} of {sets} |"
        )


def print_hard_worlds(arguments: argparse.Namespace) -> None:
    """The table of worlds that are hard on a test."""
    print(
        "| world | true drop, points | drop claimed, % | 95 % interval holds it, % "
        "| true error / standard error |"
    )
    print("|---|---|---|---|---|")
    for name, (world, drop) in WORLDS.items():
        if arguments.only in name:
            for one in (world, world.falling(drop)):
                found = simulate_world(one, arguments.experiments, arguments.seed)
                ratio = found.pop("ratio")
                print_row(name, found, arguments.experiments, f" {ratio:.2f} |")


def print_choices(arguments: argparse.Namespace) -> None:
    """The table of three ways to choose the representations of the primary hypothesis."""
    print(
        "| nine representations, chance 10 % | chosen | stated, % | falls, % of all | rises | bias, points "
        "| interval holds, % of stated | kept holds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (world, representations) in CHOICE_WORLDS.items():
        if arguments.only in name:
            rules = simulate_choice(world, representations, arguments.experiments, arguments.seed)
            for rule, found in rules.items():
                stated = max(1, round(found["stated"] * arguments.experiments))
                cells = [rate(found[key], arguments.experiments) for key in ("stated", "falls", "rises")]
                cells += ["-" if math.isnan(found["bias"]) else f"{100 * found['bias']:+.2f}"]
                cells += [rate(found[key], stated) for key in ("held", "kept")]
                print(f"| {name} | {rule} | {' | '.join(cells)} |", flush=True)


def print_uneven(arguments: argparse.Namespace) -> None:
    """The table of uneven classes."""
    print(
        "| uneven classes, 260 groups of 2 | true drop, points | drop claimed, % | 95 % interval holds it, % "
        "| above chance, % | accuracy alone above chance |"
    )
    print("|---|---|---|---|---|---|")
    print_worlds(UNEVEN_WORLDS, None, simulate_uneven, arguments)


def print_equal(arguments: argparse.Namespace) -> None:
    """The table of equality to within 2 points."""
    print("| equal to within 2 points | claimed at a true drop of 2 points, % | at a true drop of 0 |")
    print("|---|---|---|")
    for name, world in EQUAL_WORLDS.items():
        if arguments.only in name:
            rates = [
                simulate_equal(world.falling(drop), EQUAL_MARGIN, arguments.experiments, arguments.seed)
                for drop in (EQUAL_MARGIN, 0.0)
            ]
            cells = [rate(value, arguments.experiments) for value in rates]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_smallest(arguments: argparse.Namespace) -> None:
    """The table of the smallest detectable drop, which should be found with 80 %."""
    print(
        "| smallest detectable drop | stated, points | found, % | stated if its error is that of no drop "
        "| found, % |"
    )
    print("|---|---|---|---|---|")
    for name, world in SMALLEST_WORLDS.items():
        if arguments.only in name:
            found = simulate_smallest(world, arguments.experiments, arguments.seed)
            cells = [
                f"{100 * found[f'stated{how}']:.1f} | {rate(found[f'found{how}'], arguments.experiments)}"
                for how in ("", " as it was")
            ]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_openings(arguments: argparse.Namespace) -> None:
    """The table of openings where it is known which layers hold the class."""
    print(
        "| what holds the class | falls, % | ends with: hold part | nothing shows more | less is lost "
        "| right | something false |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, world in COLLECTIONS.items():
        if arguments.only in name:
            with threadpool_limits(1, "blas"):  # small systems are solved faster by one thread
                found = simulate_openings(world, arguments.experiments, arguments.seed)
            cells = [rate(value, arguments.experiments) for value in found.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_row(name: str, found: dict[str, float], experiments: int, further: str = "") -> None:
    """A row of a table: its name, the true drop, and the rates."""
    order = ("drop", "claimed", "covered")
    names = [*(key for key in order if key in found), *(key for key in found if key not in order)]
    cells = [rate(found[key], experiments) for key in names if key != "drop"]
    print(f"| {name} | {100 * found['drop']:.1f} | {' | '.join(cells)} |{further}", flush=True)


TABLES = {
    "one-split": print_one_split,
    "folds": print_folds,
    "splits": print_splits,
    "family": print_family,
    "worlds": print_hard_worlds,
    "chosen": print_choices,
    "uneven": print_uneven,
    "equal": print_equal,
    "smallest": print_smallest,
    "mlp": print_mlp,
    "openings": print_openings,
}


if __name__ == "__main__":
    main()
