#!/usr/bin/env python3
"""Compare the cells of two output folders of one data set: does another device, precision, trainer or type of
the feature cache change accuracies?

Both folders must have the same rows, split and runs. Rows are taken as independent; with groups among them
intervals are too narrow. Differences are those of the first folder minus the second's.
"""

import argparse
import operator
import sys
from pathlib import Path

import _root  # noqa: F401 (puts the project on the path)

from ablation.cells import cells_named
from ablation.family import Margin, averaged, compared, mean_sample
from ablation.samples import Sample, samples_of
from ablation.text_table import Column, table
from checkpointing import ResultStore


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="an output folder, visual_ablation_<data set>")
    parser.add_argument("second", type=Path)
    parser.add_argument("--margin", type=float, default=0.02, help="differences below it count as equal")
    arguments = parser.parse_args(argv)
    first, second = samples_in(arguments.first), samples_in(arguments.second)
    pairs = {name: (first[name], second[name]) for name in first if name in second}
    if not pairs:
        print("error: the folders have no cell in common", file=sys.stderr)
        return 2
    lines = [compared_row(name, *pair, arguments.margin) for name, pair in pairs.items()]
    names = averaged(pairs)
    first_mean, second_mean = (mean_sample([pairs[name][i] for name in names]) for i in (0, 1))
    lines.append(compared_row(f"mean of {len(names)}", first_mean, second_mean, arguments.margin))
    headings = {"cell": -40, "first": 7, "second": 8, "points": 8, "95 % interval": 20, "p (equal)": 11}
    columns = [
        Column(heading, width, operator.itemgetter(place))
        for place, (heading, width) in enumerate(headings.items())
    ]
    print("\n".join(table(columns, lines)))
    return 0


def samples_in(folder: Path) -> dict[str, Sample]:
    """The answers of every finished cell in a folder, by the cell's name."""
    store = ResultStore(folder)
    predictions = {cell: store.load_predictions(cell.name) for cell in cells_named(store.names())}
    return {cell.name: s for of_kind in samples_of(predictions, None).values() for cell, s in of_kind.items()}


def compared_row(name: str, first: Sample, second: Sample, margin: float) -> list[str]:
    """A line of the table."""
    entry = compared(first, second, Margin(margin))
    if entry is None:
        return [name, "", "", "other rows", "", ""]
    low, high = (100 * end for end in entry["interval"])
    numbers = [f"{100 * first.mean:.1f}", f"{100 * second.mean:.1f}", f"{100 * entry['drop']:+.2f}"]
    return [name, *numbers, f"{low:+.2f} .. {high:+.2f}", f"{entry['p_equivalence']:.4f}"]


if __name__ == "__main__":
    sys.exit(main())
