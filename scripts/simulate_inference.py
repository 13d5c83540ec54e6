#!/usr/bin/env python3
"""How often the tests and intervals of the experiment are right:
simulated experiments with a known drop, as a table.

For each number of test rows and each true drop: how often a drop is claimed (p < 0.05), how often the 95 %
interval covers the truth, and the same of two ways that the program does not take: the sign-flip test alone,
which takes the runs that happened to be made for all runs, and the t test over seeds, which takes the test
rows that happened to be drawn for all rows.

With --groups the examples come in groups, and the groups are the sample. With --splits K small learners are
trained on K random splits of simulated rows instead, and the corrected test over splits stands beside a plain
t test over them.
"""

import argparse
import itertools

import _root  # noqa: F401

from ablation.simulation import FoldWorld, World, simulate, simulate_folds, simulate_splits


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--experiments", type=int, default=1000, help="for each row of the table (default: 1000)")
    text = "test rows (default: 201 2000 10000)"
    add("--rows", type=int, nargs="+", default=[201, 2000, 10000], help=text)
    text = "true drops (default: 0 0.01 0.02 0.05 0.1)"
    add("--drops", type=float, nargs="+", default=[0, 0.01, 0.02, 0.05, 0.1], help=text)
    add("--run-sd", type=float, default=0.02, help="std of a run's shift of all examples (default: 0.02)")
    add("--groups", type=int, default=0, help="of the test rows (default: 0, none)")
    text = "numbers of splits; --rows are then those of the data set"
    add("--splits", type=int, nargs="+", default=[], help=text)
    text = "with --splits: share of the classes' distance that is lost (default: 0 0.2 0.5)"
    add("--lost", type=float, nargs="+", default=[0, 0.2, 0.5], help=text)
    text = "with folds: each row is tested once in each of --rounds by small learners trained on the others"
    add("--folds", type=int, default=0, help=text)
    add("--rounds", type=int, default=2, help="with --folds (default: 2)")
    add("--grouped", action="store_true", help="with --folds and --groups: folds of whole groups")
    add("--seed", type=int, default=0, help="of the simulation (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.folds:
        print_folds(arguments)
    elif arguments.splits:
        print_splits(arguments)
    else:
        print_rows(arguments)


def print_rows(arguments: argparse.Namespace) -> None:
    """The table of one split."""
    print(
        "| test rows | true drop, points | drop claimed | 95 % interval holds it | claimed by sign flips "
        "alone | by a t test over seeds | BCa interval over seeds holds it |"
    )
    print("|---|---|---|---|---|---|---|")
    for n, drop in itertools.product(arguments.rows, arguments.drops):
        world = World(n=n, drop=drop, run_sd=arguments.run_sd, groups=arguments.groups)
        rates = simulate(world, arguments.experiments, arguments.seed)
        cells = " | ".join(f"{100 * rate:.1f} %" for rate in rates.values())
        print(f"| {n} | {100 * drop:g} | {cells} |", flush=True)


def print_folds(arguments: argparse.Namespace) -> None:
    """The table of a cross-validation."""
    print("| rows | groups | true drop, points | drop claimed | 95 % interval holds it | by rows alone |")
    print("|---|---|---|---|---|---|")
    for rows, lost in itertools.product(arguments.rows, arguments.lost):
        world = FoldWorld(rows, arguments.groups, arguments.folds, arguments.rounds, lost, arguments.grouped)
        rates = simulate_folds(world, arguments.experiments, arguments.seed)
        by_rows = f"{100 * rates['covered by rows']:.1f} %" if "covered by rows" in rates else "-"
        print(
            f"| {rows} | {arguments.groups or '-'} | {100 * rates['drop']:.1f} "
            f"| {100 * rates['claimed']:.1f} % | {100 * rates['covered']:.1f} % | {by_rows} |",
            flush=True,
        )


def print_splits(arguments: argparse.Namespace) -> None:
    """The table of several splits."""
    print(
        "| rows | splits | true drop, points | drop claimed | 95 % interval holds it "
        "| claimed by a plain t test over splits |"
    )
    print("|---|---|---|---|---|---|")
    for rows, splits, lost in itertools.product(arguments.rows, arguments.splits, arguments.lost):
        rates = simulate_splits(rows, lost, splits, arguments.experiments, arguments.seed)
        print(
            f"| {rows} | {splits} | {100 * rates['drop']:.1f} | {100 * rates['claimed']:.1f} % "
            f"| {100 * rates['covered']:.1f} % | {100 * rates['plain']:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
