#!/usr/bin/env python3
"""Write the report of finished or unfinished runs: report.html, figures/ and tables/ beside results.json.

The page of one output folder stands in that folder. Of several folders, `--output` gets a page that sets them
beside each other. Every number is one of results.json or of the checkpoints.
"""

import argparse
import sys
from pathlib import Path

import _root  # noqa: F401

from ablation.fields import InputError
from ablation.forked import ProcessLost
from ablation.log import visible
from ablation.report.load import refusing_other_shapes, result_folders
from ablation.report.write import FORMATS, write_comparison, write_report
from ablation.text_table import TEXT_LENGTH
from checkpointing import CannotWrite


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    text = "output folders of the experiment; several are compared"
    add("folders", metavar="OUTPUT_DIR", nargs="+", type=Path, help=text)
    text = f"what to write, with commas between (default: all of {', '.join(FORMATS)})"
    add("--format", default=",".join(FORMATS), help=text)
    text = "folder of a comparison (default: report_comparison)"
    add("--output", type=Path, default=Path("report_comparison"), help=text)
    arguments = parser.parse_args(argv)
    formats = tuple(filter(None, arguments.format.split(",")))
    unknown = [name for name in formats if name not in FORMATS]
    try:
        if unknown or not formats:
            raise InputError(f"unknown --format '{','.join(unknown)}': use {', '.join(FORMATS)}")
        folders = [folder for path in arguments.folders for folder in result_folders(path)]
        with refusing_other_shapes(folders):
            if len(folders) == 1:
                written = write_report(folders[0], formats)
            else:
                written = write_comparison(folders, arguments.output, formats)
    except (InputError, CannotWrite, ProcessLost) as error:
        print(f"error: {visible(str(error), TEXT_LENGTH)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    for path in written:
        print(visible(str(path), TEXT_LENGTH))
    return 0


if __name__ == "__main__":
    sys.exit(main())
