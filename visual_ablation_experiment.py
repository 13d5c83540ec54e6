#!/usr/bin/env python3
"""Can a LoRA's concept be read off its weights, and how well from its visual (attn1) layers alone?

Describes every layer of a collection of LoRAs by nine representations, trains a small MLP on each for several
seeds, once with all layers and once with the visual ones, and reports the drop in accuracy. Rerun the same
command to resume.

Exit status: 0 every cell is finished; 1 a cell failed, the others ran, or the disk takes no results; 2 bad
input or settings; 3 another process holds the output folder; 129, 130, 131, 143 ended by SIGHUP, SIGINT,
SIGQUIT, SIGTERM.
"""

# Modules that import torch or datasets are imported in the functions that use them: --help, --status and
# --dry-run do without.

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ablation.actions import Actions
from ablation.analysis_plan import announce_plan
from ablation.cells import Cell, cells_named
from ablation.command_line import find_device, parse_command_line, typed_command
from ablation.distributed import (
    PART_BEGINS,
    chosen_cells,
    chosen_rows,
    end_with_parent,
    finish_features,
    finish_part,
    sizes_of,
)
from ablation.failures import announce_failures, logging_errors, noting_the_end
from ablation.fields import InputError
from ablation.log import Clock, Progress, close_log, log_to_stdout, visible
from ablation.nothing_left import FinishedBefore
from ablation.provenance import RUNNING, announce, write_manifest
from ablation.results import header_of, save_results
from ablation.selection import contents_of, possible_cells
from ablation.settings import Settings
from ablation.sources import resolve_name
from ablation.status import print_plan, print_progress_summary, print_results, print_status, watch_status
from ablation.stopping import STOPPED, handle_signals, name_of_stop, signals_winning
from checkpointing import CannotWrite, Held, Refused, ResultStore, crash_point, holding, locked, taking_part

if TYPE_CHECKING:
    from ablation.context import Context, Ledger

log = logging.getLogger("visual_ablation")


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments (default: those of the process). Returns the exit status."""
    log_to_stdout()
    try:
        with signals_winning():
            return answer(argv)
    except (InputError, Refused, Held, CannotWrite) as error:
        line = visible(str(error)).replace("\n", "\\n")
        print(f"error: {line}", file=sys.stderr, flush=True)
        return {Held: 3, CannotWrite: 1}.get(type(error), 2)
    except SystemExit:
        if name_of_stop():
            log.info(f"Stopped by {name_of_stop()}: {STOPPED}")
        raise


def answer(argv: list[str] | None) -> int:
    """Answer a question, or run the experiment. Returns the exit status."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise InputError("the working folder is gone: change to another one") from None
    settings, actions = parse_command_line(argv, __doc__)
    if actions.status:
        return watch_status(settings) if actions.watch else print_status(settings)
    if actions.dry_run:
        return print_plan(settings, actions)
    resolve_name(settings.dataset)  # a name that means nothing must leave no folder behind
    if actions.tensorboard:
        from ablation.tensorboard import check_installed

        check_installed()
    with (taking_part if actions.is_unit else holding)(settings.output_folder):
        return run_experiment(settings, actions)


# --- the experiment


def run_experiment(settings: Settings, actions: Actions) -> int:
    """Load the data, list the cells, extract features, train each cell, report. Returns the exit status."""
    before = FinishedBefore(settings, actions)
    if before.is_unchanged() and (not actions.report or has_report(settings.output_folder)):
        return before.show()  # without torch and datasets, which take seconds to import

    from ablation.cells_at_work import train_cells
    from ablation.features import extract_rows, load_or_extract
    from ablation.null_reading import null_cells, read_null
    from ablation.workers import run_by_workers

    with before.listening():
        context = open_context(settings, actions)
        cells, skipped = possible_cells(context.settings, contents_of(context.data))
    ledger = open_ledger(context, cells, skipped, before)
    with noting_the_end(context, ledger):
        if actions.features_only:
            rows = chosen_rows(actions.rows, context.data.num_rows)
            ledger.failures = extract_rows(context, cells, rows)
            return finish_features(context, ledger)
        left = run_by_workers(context, ledger) if actions.has_workers else ledger.missing
        of_null = [] if actions.is_unit else null_cells(context, ledger)
        features, failures = load_or_extract(context, [*left, *of_null])  # each weight is read once
        ledger.failures |= {cell: reason for cell, reason in failures.items() if cell in left}
        context.store.prepare()
        crash_point("cached")
        page = LivePage(context, ledger)
        with contextlib.closing(train_cells(context, ledger, left, features)) as groups:
            for group in groups:  # a cell and its audits, which share the trained runs
                announce_failures(context, ledger, group)
                page.show(group)
        read_null(context, ledger, features)
        status = finish(context, ledger)
    if status == 0:
        before.remember(context, ledger)
    return status


def open_context(settings: Settings, actions: Actions) -> Context:
    """Open the data set, and make settings definite that depend on the device."""
    import torch

    from ablation.context import Context
    from ablation.loading import load
    from ablation.training import resolve_training
    from ablation.workers import kind_of_workers

    clock = Clock()
    torch.set_float32_matmul_precision("highest")  # whatever the environment says; `arithmetic` alone differs
    device = find_device(actions.devices[0] if actions.devices else settings.device)
    trained_on = kind_of_workers(settings, actions) if actions.has_workers else device
    settings = dataclasses.replace(settings, training=resolve_training(settings.training, trained_on))
    store = ResultStore(settings.output_folder)
    store.check()
    data = load(settings, device, clock, actions.default_sets)
    return Context(settings, actions, device, data, store, clock)


def open_ledger(
    context: Context, cells: list[Cell], skipped: dict[Cell, str], before: FinishedBefore
) -> Ledger:
    """Set damaged and stale files aside, and find out which cells are missing.

    Raises Refused if finished cells were made with other settings and may not be run again.
    """
    from ablation.context import Ledger
    from ablation.fingerprints import actual_inputs

    store, actions = context.store, context.actions
    own = chosen_cells(actions.cells, cells, sizes_of(context))
    inputs = actual_inputs(context, [*cells, *cells_named(store.names())])
    ledger = Ledger(cells, skipped, inputs)
    by_name = {cell.name: inputs[cell] for cell in (own if actions.is_unit else inputs)}
    clear = store.clear_cells if actions.is_unit else store.clear
    moved = clear(by_name, [cell.name for cell in own], actions.rerun_stale)
    for line in moved:
        log.info(line)
    if moved:
        with locked(store.folder / "results"):
            save_results(context, ledger)  # results.json must not list cells that were just set aside
    missing = [cell for cell in cells if store.state(cell.name, inputs[cell]).kind == "missing"]
    ledger.missing = [] if actions.results_only else [cell for cell in missing if cell in own]
    with before.listening():
        plan = announce_plan(context.settings, context.data)
    print_progress_summary(cells, missing)
    cells_to_run = [cell.name for cell in ledger.missing]
    event = "joined" if actions.is_unit else "started"
    announce(store.folder, event, command=typed_command(), cells=cells_to_run, plan=plan)
    if actions.is_unit:
        log.info(f"{PART_BEGINS}: {len(ledger.missing)} of the missing cells")
    else:
        write_manifest(context, ledger, None, RUNNING)
    return ledger


def finish(context: Context, ledger: Ledger) -> int:
    """Write the results, the manifest, the report and the last tables of the log. Returns the exit status.

    Of several processes that share the cells, the last one does so.
    """
    from ablation.null_reading import null_cells, read_null

    store = context.store
    if context.actions.is_unit:
        if (status := finish_part(context, ledger)) is not None:
            return status
        null_cells(context, ledger)
        read_null(context, ledger)
    with locked(store.folder / "results"):
        return write_all(context, ledger)


def write_all(context: Context, ledger: Ledger) -> int:
    """Write everything that is made of all cells. Returns the exit status."""
    store = context.store
    for cell in ledger.cells:
        state = store.state(cell.name, ledger.inputs[cell])
        if cell not in ledger.failures and state.kind != "done":  # another process touched a finished cell
            why = f": {state.why}" if state.why else ""
            ledger.failures[cell] = f"its files are {state.kind} at the end of the run{why}"
            log.error(f"{cell.name} FAILED: {ledger.failures[cell]}")
    store.remove_unfinished_of(cell.trained.name for cell in ledger.cells if cell not in ledger.failures)
    text = save_results(context, ledger)
    status = 1 if ledger.failures or ledger.null.failed else 0
    write_manifest(context, ledger, status, "failed cells" if status else "finished")
    announce(store.folder, "ended", status=status, seconds=context.clock.seconds)
    if context.actions.report and store.names():
        with logging_errors("the report"), Progress(None, "writing the report"):
            from ablation.report.write import write_report

            if not has_report(store.folder):
                write_report(store.folder)
    print_results(store.folder, text, context.clock, context.actions.report)
    return status


def has_report(folder: Path) -> bool:
    """True if the report of the present results is there."""
    from ablation.report.write import is_current

    return is_current(folder)


# --- the page while cells run


class LivePage:
    """Shows finished cells while others still run: report.html, and TensorBoard's curves if asked for."""

    def __init__(self, context: Context, ledger: Ledger):
        self.context, self.ledger = context, ledger
        self.records: dict[Cell, dict] = {}
        self.is_shown = not context.actions.is_unit  # several processes would write the same files
        if self.is_shown and context.actions.report and ledger.missing:
            with logging_errors("the page"):
                done = [cell for cell in ledger.cells if cell not in ledger.missing]
                self.records = {cell: context.store.load(cell.name) for cell in done}

    def show(self, cells: list[Cell]) -> None:
        """Show these cells, if they are finished. An error is logged and costs no result."""
        context, actions, store = self.context, self.context.actions, self.context.store
        if not self.is_shown or not (actions.report or actions.tensorboard):
            return
        records: dict[Cell, dict] = {}
        with logging_errors("the page"):
            done = [c for c in cells if c not in self.ledger.failures and store.path(c.name).exists()]
            records = {cell: store.load(cell.name) for cell in done}
            self.records |= records
            if actions.report and self.records:
                from ablation.report.write import refresh

                count = len(self.ledger.cells)
                refresh(store.folder, header_of(context), self.records, self.ledger.failures, count)
        if actions.tensorboard:
            with logging_errors("the curves of TensorBoard", "results.json has them"):
                from ablation.tensorboard import log_curves

                log_curves(store.folder, {cell: record for cell, record in records.items() if not cell.audit})


if __name__ == "__main__":
    handle_signals()
    end_with_parent()
    try:
        status = main()
    finally:
        close_log()
    sys.exit(status)
