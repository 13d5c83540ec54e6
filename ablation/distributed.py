"""Parts of an experiment that several processes share: cells, rows of features, and who writes the results.

A part is the same command with --cells, --features-only or --results-only. It locks the cells and blocks that
it works on, and not the folder. Files are whole and equal whoever makes them, so a part that is made twice,
where a file system has no locks, costs time and no number.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ablation.catalogue import SPECS, components_of
from ablation.cells import Cell, groups_of
from ablation.fields import InputError, shortened_text
from ablation.log import Progress
from ablation.provenance import announce
from ablation.stopping import end_process
from checkpointing import ResultStore, is_locked, read_events

if TYPE_CHECKING:
    from ablation.context import Context, Ledger
    from ablation.layers import Layers
    from ablation.settings import Settings

log = logging.getLogger("visual_ablation")

PART_BEGINS = "This command is a part of the experiment"  # begins a line; what comes after it is its own work
LOOK_SECONDS = 1.0  # between two looks at what other processes hold
WORKER = (
    "VISUAL_ABLATION_WORKER"  # set for the processes that an experiment starts, which leave the results to it
)
HIDDEN_COST = 1024  # columns whose products take as long as those of the two inner hidden layers
MOST_SHARES = 100_000
SHARE = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


# --- cells


class CellSizes(NamedTuple):
    """What the columns of a cell are counted from."""

    settings: Settings
    layers: Layers
    num_rows: int
    num_classes: int


def sizes_of(context: Context) -> CellSizes:
    """The sizes of an experiment whose data set is open."""
    data = context.data
    return CellSizes(context.settings, data.layers, data.num_rows, len(data.classes))


def chosen_cells(names: tuple[str, ...], cells: list[Cell], sizes: CellSizes) -> list[Cell]:
    """The cells that --cells names, or a share such as 2/8 of them; all without a name.

    Raises InputError for another name.
    """
    if not names:
        return cells
    share = share_in(names[0], "--cells") if len(names) == 1 else None
    if share is not None:
        number, of = share
        return [cell for group in balanced_shares(cells, sizes, of)[number - 1] for cell in group]
    known = {cell.name: cell for cell in cells}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"use {shortened_text(', '.join(known))}"
            raise InputError(f"--cells '{shortened_text(name)}' is no cell of these settings: {hint}")
    return [known[name] for name in dict.fromkeys(names)]


def share_in(text: str, flag: str) -> tuple[int, int] | None:
    """2/8 as (2, 8); None for other text. Raises InputError unless 1 <= 2 <= 8."""
    match = SHARE.fullmatch(text)
    if match is None:
        return None
    number, of = map(int, match.groups())
    if not 1 <= number <= of <= MOST_SHARES:
        raise InputError(
            f"{flag} {text}: shares are counted from 1/{of} to {of}/{of}, of {MOST_SHARES:,} at most"
        )
    return number, of


def balanced_shares(cells: list[Cell], sizes: CellSizes, count: int) -> list[list[list[Cell]]]:
    """Groups of cells dealt to `count` shares, the longest first, each to the share with least to do.

    It depends on the settings and the data set alone, not on what is finished, so that processes which do not
    know of each other agree.
    """
    shares: list[list[list[Cell]]] = [[] for _ in range(count)]
    costs = [0.0] * count
    for group in longest_first(cells, sizes):
        least = costs.index(min(costs))
        shares[least].append(group)
        costs[least] += cost_of(group[0], sizes)
    return shares


def longest_first(cells: list[Cell], sizes: CellSizes) -> list[list[Cell]]:
    """Groups of cells that share their runs, those that take longest first."""
    return sorted(groups_of(cells), key=lambda group: -cost_of(group[0], sizes))


def cost_of(cell: Cell, sizes: CellSizes) -> float:
    """The expected time of a cell, in columns: its own and those that stand for the hidden layers."""
    return columns_expected(cell, sizes) + HIDDEN_COST


def columns_expected(cell: Cell, sizes: CellSizes) -> float:
    """Columns of a cell, as far as they are known before it runs."""
    settings, layers, name = sizes.settings, sizes.layers, cell.representation
    positions = layers.positions(cell.layer_set)
    by_layer = SPECS[name].source == "layer" and name != "centroid_cosine"
    modules = 0 if by_layer else len(layers.module_positions(cell.layer_set))  # some layers have no module
    if not SPECS[name].fitted:
        count = len(positions) if by_layer else modules
        return count * sum(map(settings.width_of, components_of(name)))
    known = {
        "flat_vec": sum(layers.layouts[layers.names[position]].size for position in positions),
        "centroid_cosine": 2 * modules * sizes.num_classes,
        "kernel_ridge": sizes.num_rows,
        "metadata": len(settings.metadata_columns),
    }
    return known.get(name, settings.pca_components)


def describe_shares(cells: list[Cell], sizes: CellSizes, count: int) -> list[str]:
    """How `count` processes would share cells, by their expected times, for the log."""
    shares = balanced_shares(cells, sizes, count)
    costs = [sum(cost_of(group[0], sizes) for group in share) for share in shares]
    whole = sum(costs)
    units = longest_first(cells, sizes)
    longest = cost_of(units[0][0], sizes) / whole
    lines = [
        f"Plan for {count} processes: {len(units)} units, each a cell with its audits, the longest first"
    ]
    for number, (share, cost) in enumerate(zip(shares, costs, strict=True), 1):
        names = ", ".join(group[0].name for group in share)
        lines.append(
            f"  {number:>3}: {100 * cost / whole:5.1f} % of the work: {shortened_text(names) or 'nothing'}"
        )
    share_of_longest = f"the longest unit is {100 * longest:.0f} % of the work"
    return [*lines, f"Expected speed-up: {whole / max(costs):.1f} of {count}; {share_of_longest}"]


def groups_in_turn(context: Context, groups: list[list[Cell]]) -> Iterator[list[Cell]]:
    """Each group of cells that share their runs; one that another process holds comes when that let it go.

    An empty list before it waits for other processes.
    """
    store = context.store
    waiting = deque(groups)
    announced: set[str] = set()
    began = len(read_events(store.folder / "events.jsonl"))
    while waiting:
        held = 0
        for _ in range(len(waiting)):
            group = waiting.popleft()
            holders = [cell.name for cell in group if is_locked(store.path(cell.name))]
            if not holders:
                if not (is_worker() and failures_reported(store, group, began)):
                    yield group
                continue
            held += 1
            waiting.append(group)
            if holders[0] not in announced and not is_worker():  # whose neighbours are at work all the time
                announced.add(holders[0])
                log.info(f"{holders[0]} is at work in another process: it comes last")
        if waiting and held == len(waiting):
            yield []
            with Progress(None, f"waiting for other processes that work on {held} cells"):
                wait_for_one(waiting, store)


def wait_for_one(groups: deque[list[Cell]], store: ResultStore) -> None:
    """Wait until other processes hold all cells of one group no more."""
    while all(any(is_locked(store.path(cell.name)) for cell in group) for group in groups):
        time.sleep(LOOK_SECONDS)


# --- rows


def chosen_rows(text: str, num_rows: int) -> range:
    """The rows that --rows names: 0:4096, 4096:, a share such as 2/8, or all of '' (bounds beyond are cut).

    Raises InputError for other text.
    """
    share = share_in(text, "--rows")
    if share is not None:
        number, of = share
        return range(num_rows * (number - 1) // of, num_rows * number // of)
    match = re.fullmatch(r"([0-9]{0,12}):([0-9]{0,12})", text or ":")
    if match is None:
        raise InputError(
            f"--rows '{shortened_text(text)}': use A:B for the rows A to B-1, or a share such as 2/8"
        )
    start, stop = int(match.group(1) or 0), int(match.group(2) or num_rows)
    if match.group(2) and start > stop:
        raise InputError(f"--rows {text}: its end is before its beginning")
    return range(min(start, num_rows), min(stop, num_rows))


# --- what other processes did


def failures_reported(store: ResultStore, cells: list[Cell], after: int = 0) -> dict[Cell, str]:
    """Why each of these cells failed, by its last event after the first so many of all; cells that finished
    or never ran are left out.
    """
    last: dict[str, str] = {}
    for event in read_events(store.folder / "events.jsonl")[after:]:
        if event["event"] in ("failed", "finished") and isinstance(event.get("cell"), str):
            last[event["cell"]] = str(event.get("error", "")) if event["event"] == "failed" else ""
    return {cell: last[cell.name] for cell in cells if last.get(cell.name)}


def last_end(store: ResultStore) -> int:
    """How many events there were when the results were last written; 0 if they never were."""
    events = [event["event"] for event in read_events(store.folder / "events.jsonl")]
    return len(events) - events[::-1].index("ended") if "ended" in events else 0


# --- the end of a part


def end_with_parent() -> None:
    """End this process, if it is a worker's, when the one that started it is gone."""
    if not is_worker():
        return
    parent = os.environ[WORKER]

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(LOOK_SECONDS)
        end_process(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def is_worker() -> bool:
    """True in a process that an experiment started for a part of it."""
    return WORKER in os.environ


def finish_features(context: Context, ledger: Ledger) -> int:
    """Say that a part of the features is made. Returns the exit status."""
    for cell, reason in ledger.failures.items():
        log.error(f"{cell.name} will fail: {reason}")
    status = 1 if ledger.failures else 0
    announce(context.store.folder, "left", status=status, seconds=context.clock.seconds)
    return status


def finish_part(context: Context, ledger: Ledger) -> int | None:
    """End a part of an experiment: its exit status, while other cells are left; None if it is the last, which
    writes the results. Failures that other processes met are added to the ledger.
    """
    store = context.store
    own = dict(ledger.failures)
    missing = [
        cell
        for cell in ledger.cells
        if cell not in own and store.state(cell.name, ledger.inputs[cell]).kind != "done"
    ]
    # A cell that another process works on has not failed, whatever became of it before.
    ended = [cell for cell in missing if not is_locked(store.path(cell.name))]
    after = 0 if context.actions.results_only else last_end(store)
    ledger.failures |= failures_reported(store, ended, after)
    left = [cell for cell in missing if cell not in ledger.failures]
    status = 1 if own else 0
    announce(store.folder, "left", status=status, seconds=context.clock.seconds)
    if is_worker():
        return status
    if context.actions.results_only:
        ledger.failures |= dict.fromkeys(left, "it has not run yet")
        for cell in missing:
            log.error(f"{cell.name} is missing: {ledger.failures[cell]}")
        return None
    if left:
        names = shortened_text(", ".join(cell.name for cell in left))
        log.info(f"{len(left)} cells are left, so the results are not written yet: {names}")
        return status
    return None
