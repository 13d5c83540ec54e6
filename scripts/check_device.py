#!/usr/bin/env python3
"""Does this device give the right numbers, and how fast?

Four tables: every representation beside a float64 oracle on the CPU; the trainers beside each other and a
plain loop; the program from end to end (killed, resumed, out of memory, two processes on the device); seconds
by stage beside what the device can do at best. They are printed as they come, and written to
device_check.json and device_check.md. Nothing is downloaded.

Exit status: 0 nothing failed (what is not run for lack of a package is named at the end); 1 a check failed;
2 bad input; 130 broken off by Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

import _root  # noqa: F401 (puts the project on the path)

from ablation.device_check.sizes import TIMED_ROWS, CheckSizes, sizes_for
from ablation.device_check.stand_ins import missing_packages, stand_ins
from ablation.fields import InputError

LEAST_ROWS, MOST_ROWS = 100, 1_000_000


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    summary, more, status = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{summary} {more}", epilog=status, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", help="auto, cpu, cuda or cuda:N")
    sizes = ", ".join(f"{rows:,}" for rows in TIMED_ROWS)
    text = f"speed is measured at so many rows, and at those of {sizes} that are fewer"
    add("--rows", type=int, default=10_000, help=text)
    add("--quick", action="store_true", help="fewer cases, and speed at 1,000 rows alone")
    add("--skip-program", action="store_true", help="leave the third table out, which needs `datasets`")
    add("--output-dir", type=Path, default=Path(), help="folder that gets device_check.json and .md")
    return parser


def main(argv: list[str] | None = None, sizes: CheckSizes | None = None) -> int:
    """Run the command with these arguments; `sizes` replaces those of --rows and --quick. Returns the exit
    status.
    """
    arguments, missing = build_parser().parse_args(argv), missing_packages()
    with stand_ins(missing):
        from ablation.command_line import find_device
        from ablation.device_check.board import FAILED
        from ablation.device_check.report import JSON_NAME
        from ablation.device_check.run import run_check
        from checkpointing import CannotWrite
    try:
        if not LEAST_ROWS <= arguments.rows <= MOST_ROWS:
            allowed = f"{LEAST_ROWS} to {MOST_ROWS:,}"
            raise InputError(f"--rows {arguments.rows} is out of range: use a value from {allowed}")
        device, folder = find_device(arguments.device), arguments.output_dir
        chosen = sizes or sizes_for(arguments.rows, arguments.quick)
        board = run_check(device, chosen, folder, missing, not arguments.skip_program)
    except (InputError, CannotWrite) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print(
            f"Stopped: {arguments.output_dir / JSON_NAME} has the tables that are finished", file=sys.stderr
        )
        return 130
    print("\n".join(["", *board.summary(), ""]))
    print(f"With a bug report send {folder / JSON_NAME}, and what was printed to stderr.")
    return 1 if board.named(FAILED) else 0


if __name__ == "__main__":
    sys.exit(main())
