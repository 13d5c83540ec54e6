"""What an error costs: a cell, the page, or the experiment; and where each is written down."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ablation.cells import Cell
from ablation.log import describe_error
from ablation.provenance import announce, write_manifest
from ablation.stopping import end_if_stopped, name_of_stop
from checkpointing import CannotWrite

if TYPE_CHECKING:
    from ablation.context import Context, Ledger

log = logging.getLogger("visual_ablation")


@contextlib.contextmanager
def noting_the_end(context: Context, ledger: Ledger) -> Iterator[None]:
    """Write to the manifest and the events how an error or a signal ended the experiment."""
    try:
        yield
    except BaseException as error:
        how = name_of_stop() or describe_error(error)
        if not context.actions.is_unit:  # the manifest is that of the whole
            with contextlib.suppress(SystemExit, OSError):  # the signal again, after the file is written
                write_manifest(context, ledger, None, how)
        with contextlib.suppress(SystemExit):
            announce(
                context.store.folder, "left" if context.actions.is_unit else "ended", status=None, how=how
            )
        raise


@contextlib.contextmanager
def noting_failures(context: Context, ledger: Ledger, cells: list[Cell]) -> Iterator[None]:
    """Log an error, and note it as the failure of those of the cells that were not saved before it.

    After an error the later cells are computed; if the disk takes no results they fail too.
    """
    from ablation.task import TrainingError

    def unsaved(cells: list[Cell]) -> list[Cell]:
        return [cell for cell in cells if context.store.state(cell.name, ledger.inputs[cell]).kind != "done"]

    try:
        yield
    except Exception as error:
        end_if_stopped()
        if not isinstance(error, (TrainingError, CannotWrite)):  # their message says it all
            log.error(traceback.format_exc().rstrip())
        lost = dict.fromkeys(unsaved(cells), describe_error(error))
        if isinstance(error, CannotWrite):
            lost = dict.fromkeys(unsaved(ledger.missing), f"not run: {error}") | lost
        for cell, reason in lost.items():
            ledger.failures.setdefault(cell, reason)


def announce_failures(context: Context, ledger: Ledger, cells: list[Cell]) -> None:
    """Log and announce the cells of a group that failed, whenever that was."""
    for cell in cells:
        if cell in ledger.failures:
            log.error(f"{cell.name} FAILED: {ledger.failures[cell]}")
            announce(context.store.folder, "failed", cell=cell.name, error=ledger.failures[cell])


@contextlib.contextmanager
def logging_errors(what: str, remedy: str = "scripts/report.py makes it anew") -> Iterator[None]:
    """Log an error with its traceback and go on; results are not affected."""
    try:
        yield
    except Exception as error:
        end_if_stopped()
        log.error(f"{what} could not be written: {describe_error(error)}; {remedy}\n{traceback.format_exc()}")
