#!/usr/bin/env python3
"""Look at a collection of LoRAs before believing what is read out of it.

Says what is in it (rows, classes, layers, ranks, shapes, memory) and what could mislead: `down` matrices that
are still their initialisation, representation columns that say nothing or the same twice at this rank,
duplicate rows, unequal classes, and groups whose rows lie on both sides of the split. Reads each weight once,
a block of rows of one layer at a time.

Exit status: 0 the collection was read, whatever the findings; 2 bad input.
"""

import argparse
import json
import sys

import _root  # noqa: F401

from ablation.collection import Columns, collect_rows
from ablation.fields import InputError
from ablation.inspection.measure import inspect, read_groups
from ablation.inspection.text import print_report
from ablation.log import visible
from ablation.sources import open_dataset
from ablation.splits import SplitSpec
from ablation.text_table import TEXT_LENGTH


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments. Returns the exit status."""
    arguments = parse_command_line(argv)
    try:
        dataset = open_dataset(arguments.name, arguments.data_split, arguments.revision)
        spec = SplitSpec("random", arguments.split_seed)
        data = collect_rows(dataset, arguments.name, columns=Columns(arguments.label_column), spec=spec)
        report = inspect(data, arguments.name, read_groups(data, arguments.group_column))
    except InputError as error:
        print(f"error: {visible(str(error), TEXT_LENGTH)}", file=sys.stderr, flush=True)
        return 2
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_report(report)
    return 0


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a bad one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="a data set, named as for --dataset of the experiment")
    add("--json", action="store_true", help="print one JSON object instead of text")
    text = "column whose groups should not cross the split (default: category_name, or else training)"
    add("--group-column", default="", metavar="NAME", help=text)
    text = "column that holds the class (default: category_label)"
    add("--label-column", default="category_label", metavar="NAME", help=text)
    text = "split of the data set (default: train, or the only one there is)"
    add("--data-split", default="", metavar="NAME", help=text)
    text = "branch, tag or commit of a data set on the Hub"
    add("--revision", default="", metavar="TEXT", help=text)
    text = "seed of the experiment's 70/10/20 split (default: 42)"
    add("--split-seed", type=int, default=42, metavar="N", help=text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
