"""All tables of one check, one after another."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ablation.device_check.board import NOT_RUN, Board, Finding
from ablation.device_check.described import check_described
from ablation.device_check.fitted_rows import check_fitted
from ablation.device_check.report import machine_lines, machine_of, write_check
from ablation.device_check.sizes import CheckSizes
from ablation.device_check.speed_rows import SPEED_HEADINGS, check_speed
from ablation.device_check.training_rows import check_training

NUMBER_HEADINGS = ("error, of the spread", "of the allowed", "cases", "worst case")


def run_check(
    device: str, sizes: CheckSizes, folder: Path, missing: tuple[str, ...], with_program: bool = True
) -> Board:
    """Run every table, print it, and write both files to a folder after each.

    `missing` has the packages that are not installed; without them the program cannot run. Raises CannotWrite
    if the folder does not take the files.
    """
    began, board, machine = time.monotonic(), Board(), machine_of(device)
    print("\n".join(machine_lines(machine)), flush=True)
    write_check(folder, machine, board, 0.0)

    def keep() -> None:
        write_check(folder, machine, board, time.monotonic() - began)

    board.open("1. Representations beside float64 on the CPU", *NUMBER_HEADINGS)
    check_described(board, device, sizes)
    check_fitted(board, device)
    keep()
    board.open("2. Training", "found", "bound")
    check_training(board, device, sizes)
    keep()
    board.open("3. The program", "found")
    if not with_program:
        board.add("the program", Finding("left out", {"found": "--skip-program"}))
    elif missing:
        board.add("the program", Finding(NOT_RUN, {"found": f"{', '.join(missing)} not installed"}))
    else:
        run_program_checks(board, device, sizes)
    keep()
    board.open("4. Speed", *SPEED_HEADINGS)
    check_speed(board, device, sizes)
    board.is_finished = True
    keep()
    return board


def run_program_checks(board: Board, device: str, sizes: CheckSizes) -> None:
    """The third table, in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="device-check-") as place:

        def check() -> None:
            # Here, because it needs packages that the other tables do without.
            from ablation.device_check.program_rows import check_program

            check_program(board, device, sizes, Path(place))

        board.guard("the collections", check)
