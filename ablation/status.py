"""Questions that run nothing: --status and --watch (what is finished),
--dry-run (what would run, and what it needs).
"""

from __future__ import annotations

import calendar
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ablation.actions import Actions
from ablation.analysis_plan import expectation, tested_rows
from ablation.catalogue import (
    AUDITS,
    AUTO,
    CACHED_FITS,
    LAYER_SET_GROUPS,
    METADATA_COLUMNS,
    NULL_HALVES,
    SPECS,
    components_of,
)
from ablation.cells import Cell
from ablation.columns import Columns, group_column_of, numeric_columns, refuse_columns
from ablation.command_line import find_device
from ablation.distributed import CellSizes, describe_shares
from ablation.fingerprints import requested_inputs
from ablation.halves import why_no_halves
from ablation.layers import ColumnLayout, Layers, layers_of, refuse_empty_layer_sets
from ablation.log import Clock, duration
from ablation.provenance import changed_files
from ablation.results import reported_entries
from ablation.selection import NO_LAYER, USUAL_CLASSES, Contents, list_cells, possible_cells
from ablation.settings import Settings
from ablation.splits import SMALLEST_SPLIT, refuse_impossible, split_names, split_spec
from ablation.survey import Survey, survey
from checkpointing import ResultStore, State, is_held, parts_at_work, read_events, read_own, refuse_place

log = logging.getLogger("visual_ablation")

WATCH_SECONDS = 10.0
TRAIN_SHARE = 0.7  # of the rows; in cross-validation somewhat more
METADATA_CELL = Cell("metadata", "no_layers")
REASONS = {  # why a cell runs or not, in the plan
    "done": "kept, if the data set has not changed",
    "missing": "runs: no checkpoint",
    "damaged": "runs: damaged checkpoint, ",
    "stale": "stops the run, or runs with --rerun-stale: ",
}


def print_progress_summary(cells: list[Cell], missing: list[Cell]) -> None:
    """How many cells of each kind are finished, the table's first, and in total."""
    log.info("PROGRESS SUMMARY")
    for title in dict.fromkeys(cell.title for cell in sorted(cells, key=lambda cell: not cell.is_plain)):
        total = sum(cell.title == title for cell in cells)
        left = sum(cell.title == title for cell in missing)
        log.info(f"{title + ':':<22}{total - left}/{total} completed, {left} remaining")
    total = len(cells)
    done = total - len(missing)
    log.info(f"{'Total Progress:':<22}{done}/{total} ({100 * done / max(total, 1):.1f}%)")
    if not missing:
        log.info("All experiments already completed! Loading results from checkpoints...")
    elif done:
        log.info(f"Resuming from checkpoints. Will run {len(missing)} remaining...")
    else:
        log.info(f"No finished cell of these settings yet. Will run {len(missing)}...")


def print_results(folder: Path, text: str, clock: Clock, has_page: bool) -> None:
    """The tables of results.txt, seconds by stage, and where the results lie."""
    log.info("\n" + text.rstrip())
    seconds = ", ".join(f"{stage} {spent:.1f}" for stage, spent in clock.seconds.items())
    log.info(f"\nSeconds: {seconds}")
    page = f" and {folder / 'report.html'}" if has_page else ""
    log.info(f"Results: {folder / 'results.txt'}{page}")


def cell_states(settings: Settings, layers: Layers | None = None) -> dict[Cell, State]:
    """The state of every cell that the settings ask for, from the files of the output folder alone.

    `layers` are the data set's, where they are known.
    """
    store = ResultStore(settings.output_folder)
    layer_sets = list(settings.layer_sets)
    if set(layer_sets) & set(LAYER_SET_GROUPS):
        if layers is None:
            layers = layers_of(settings, reported_layers(store.folder), {})
        layer_sets = layers.expand(settings.layer_sets, settings.random_halves)
    if "by_block" in settings.layer_sets and not any(name.startswith("by_block.") for name in layer_sets):
        log.info(
            "The blocks of --layer-sets by_block are not known before the first run: they are not counted"
        )
    skipped = reported_entries(store.folder, "skipped_cells", "reason")
    if settings.metadata_columns:  # they may not have been named when the cell was skipped
        skipped.pop(METADATA_CELL, None)
    if not has_reported_kinds(settings):
        skipped = {cell: reason for cell, reason in skipped.items() if not str(reason).startswith(NO_LAYER)}
    cells = [cell for cell in list_cells(settings, layer_sets) if cell not in skipped]
    return {cell: store.state(cell.name, requested_inputs(settings, cell)) for cell in cells}


def reported_layers(folder: Path) -> list[str]:
    """Names of the layers in a folder's results.json; [] if there is none, or if it is damaged."""
    try:
        names = read_own(folder / "results.json").get("layer_names", [])
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def has_reported_kinds(settings: Settings) -> bool:
    """True if the results in the output folder were made with the same say on which layers are visual."""
    try:
        made_with = read_own(settings.output_folder / "results.json")["settings"]
        sides = {side: tuple(patterns) for side, patterns in made_with.get("layer_sides", {}).items()}
        return (made_with.get("architecture", AUTO), sides) == (settings.architecture, settings.layer_sides)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def unfinished(states: dict[Cell, State]) -> list[Cell]:
    """Cells that are missing, damaged or stale."""
    return [cell for cell, state in states.items() if state.kind != "done"]


# --- --status


def print_status(settings: Settings) -> int:
    """Say what is finished; nothing is moved. Returns the exit status."""
    states = cell_states(settings)
    print_progress_summary(list(states), unfinished(states))
    for cell, state in states.items():
        if state.kind in ("damaged", "stale"):
            log.info(f"{cell.name} is {state.kind}: {state.why}")
    changed = changed_files(settings.output_folder)
    if changed:
        log.info(
            f"{len(changed)} files of the data set changed, moved or were touched since the last run, such "
            f"as {changed[0]}: the next run hashes the weights again, and stops if they differ"
        )
    return 0


@dataclass(frozen=True)
class Watched:
    """What the output folder tells at one moment. Events are those since the last run began its cells."""

    states: dict[Cell, State]
    events: list[dict]
    processes: int  # that are at work

    @property
    def done(self) -> int:
        """Finished cells."""
        return len(self.states) - len(unfinished(self.states))

    @property
    def is_loading(self) -> bool:
        """True while a process is at work and has not begun its cells."""
        return self.processes > 0 and (not self.events or any(e["event"] == "ended" for e in self.events))

    def count(self, event: str) -> int:
        """Events of this kind since the process began."""
        return 0 if self.is_loading else sum(e["event"] == event for e in self.events)

    @property
    def left(self) -> int:
        """Cells that are neither finished nor failed."""
        return len(self.states) - self.done - self.count("failed")

    def line(self) -> str:
        """Cells done, failed, running and left; rate and time to go while a process works."""
        running = 0 if self.is_loading else min(self.processes, max(self.left, 0))
        line = (
            f"{self.done}/{len(self.states)} cells done, {self.count('failed')} failed, {running} running, "
            f"{self.left - running} left" + " | loading" * self.is_loading
        )
        finished = self.count("finished")
        if running and finished:
            elapsed = calendar.timegm(time.gmtime()) - seconds_of(self.events[0]["time"])
            rate = finished / max(elapsed, 1)
            line += f" | Rate: {60 * rate:.1f} cells/min | ETA: {duration(self.left / rate)}"
        return line


def watch_status(settings: Settings) -> int:
    """Say what is finished whenever it changes, until all is. Returns the exit status."""
    folder, shown = settings.output_folder, ""
    while True:
        processes = parts_at_work(folder) or int(is_held(folder))
        watched = Watched(cell_states(settings), events_of_last_run(folder), processes)
        line = watched.line()
        if line != shown:
            log.info(line)
            shown = line
        if not watched.processes or not (watched.left or watched.is_loading):
            if watched.left:
                log.info("No run is working on this folder: the same command without --status resumes it")
            return 0
        time.sleep(WATCH_SECONDS)


def events_of_last_run(folder: Path) -> list[dict]:
    """The events since the last run began its cells, or since the first part that began after its end."""
    events = read_events(folder / "events.jsonl")
    begins, has_ended = len(events), True
    for i, event in enumerate(events):
        if event["event"] == "started" or (event["event"] == "joined" and has_ended):
            begins, has_ended = i, False
        has_ended = has_ended or event["event"] == "ended"
    return events[begins:]


def seconds_of(moment: str) -> int:
    """A time of `checkpointing.utc_now` in seconds since 1970."""
    return calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))


# --- --dry-run


def print_plan(settings: Settings, actions: Actions) -> int:
    """Say what would run and why, and what it needs.
    Reads file headers and writes nothing. Returns the exit status.
    """
    surveyed = survey(settings.dataset, settings.data_split, settings.revision)
    layers = None
    if surveyed is not None:
        layouts = {layer: ColumnLayout(layer, rows, cols, "", True) for layer, rows, cols in surveyed.shapes}
        layers = layers_of(settings, list(layouts), layouts)
    skipped = refuse_what_a_run_refuses(settings, surveyed, layers, actions)
    states = cell_states(settings, layers)
    states = {cell: state for cell, state in states.items() if cell not in skipped}
    print_progress_summary(list(states), unfinished(states))
    log.info(f"\nOutput folder: {settings.output_folder}")
    for cell, state in states.items():
        log.info(f"  {cell.name:<28} {REASONS[state.kind]}{state.why}")
    if surveyed is None or layers is None:
        log.info(f"\nData set {settings.dataset}: its size is not known before the download")
    else:
        print_needs(settings, surveyed, unfinished(states))
        log.info(f"Architecture: {layers.found.title}")
        if surveyed.rows >= SMALLEST_SPLIT:
            why = why_no_halves(layers)
            log.info(
                f"Beside the cells: {f'no random halves, {why}' if why else f'{NULL_HALVES} random halves'}"
            )
            for line in expectation(settings, tested_rows(settings, surveyed.rows)):
                log.info(f"Tests:   {line}")
        sizes = CellSizes(settings, layers, surveyed.rows, USUAL_CLASSES)
        print_shares(settings, actions, list(unfinished(states)), sizes)
    return 0


def print_shares(settings: Settings, actions: Actions, cells: list[Cell], sizes: CellSizes) -> None:
    """Say how several processes would share the cells, if there are to be several."""
    count = actions.workers or len(actions.devices)
    if actions.ray and not count:
        from ablation.ray_tasks import count_slots

        count = count_slots(settings, actions.ray)
    if count and cells:
        for line in ["", *describe_shares(cells, sizes, count)]:
            log.info(line)


def refuse_what_a_run_refuses(
    settings: Settings, surveyed: Survey | None, layers: Layers | None, actions: Actions
) -> set[Cell]:
    """The cells that the data set has nothing for.

    Raises the InputError or Refused that a run would end with, as far as settings and file headers tell.
    """
    refuse_devices(settings, actions)
    refuse_place(settings.output_folder)
    if surveyed is None or surveyed.columns is None or layers is None:
        return set()
    columns = Columns(settings.label_column, settings.group_column, settings.metadata_columns)
    refuse_columns(surveyed.columns, settings.dataset, columns)
    numeric = numeric_columns(surveyed.columns, settings.label_column)
    wanted = {*METADATA_COLUMNS, *settings.metadata_columns}
    contents = Contents(
        layers,
        surveyed.rows,
        {name: None for name in numeric if name in wanted},
        surveyed.rows < SMALLEST_SPLIT,
        keeps_weights=not settings.streaming,
    )
    has_groups = bool(group_column_of(surveyed.columns, columns))
    for name in split_names(settings):
        refuse_impossible(surveyed.rows, split_spec(settings, name), has_groups)
    refuse_empty_layer_sets(layers, settings, actions.default_sets)
    _, skipped = possible_cells(settings, contents)
    return set(skipped)


def refuse_devices(settings: Settings, actions: Actions) -> None:
    """Raise the InputError of a run for devices that are not there, are not used, or do not go together, and
    for a precision that they do not have. Imports torch only to look for a GPU.
    """
    device, precision = settings.device, settings.training.precision
    if actions.devices:
        from ablation.workers import kind_of_workers

        for name in actions.devices:  # in their order, as a run meets them
            find_device(name)
        device = kind_of_workers(settings, actions)
    elif device != "auto" or precision == "tf32":
        device = find_device(device)
    if precision == "tf32":
        from ablation.training import resolve_training

        resolve_training(settings.training, device)


def print_needs(settings: Settings, surveyed: Survey, to_run: list[Cell]) -> None:
    """The memory and disk that these cells need."""

    def size(name: str) -> float:
        return feature_bytes(name, surveyed, settings)

    components = {name for cell in to_run for name in components_of(cell.representation)}
    cached = sum(size(name) for name in components if not SPECS[name].fitted)
    growth = 1 + sum(AUDITS[audit].changed_rows for audit in settings.audit)
    fits = sum(growth * size(name) * count for name, count in cached_fits(settings, to_run).items())
    per_cell = [sum(map(size, components_of(cell.representation))) for cell in to_run]
    memory, largest = growth * cached, growth * max(per_cell, default=0)
    weights = gigabytes(surveyed.weight_bytes)
    log.info(
        f"\nData set {settings.dataset}: {surveyed.rows} rows, {len(surveyed.shapes)} layers, {weights} of "
        "weights"
    )
    share = {"float32": 1, "float16": 2, "int8": 4}[settings.cache_dtype]
    log.info(
        f"Memory:  {gigabytes(4 * largest)} while the largest cell trains, if that is free; with less its "
        "columns are read from disk batch by batch"
        if settings.cache_features
        else f"Memory:  {gigabytes(memory + 3 * largest)}: without a cache all features stay in memory"
    )
    if settings.cache_features:
        log.info(
            f"Disk:    {gigabytes(growth * cached / share + fits)} feature cache in {settings.cache_dir}, "
            f"and {gigabytes(growth * cached)} more while it is made; less what is cached already"
        )
    if surveyed.is_downloaded and not settings.streaming:
        log.info(
            f"Disk:    about {weights} download in the cache of huggingface_hub (HF_HOME), unless it is "
            "there already"
        )
    if surveyed.is_copied and not settings.streaming:
        log.info(
            f"Disk:    {weights} Arrow copy in the cache of datasets (HF_DATASETS_CACHE), unless it is there "
            "already"
        )


def cached_fits(settings: Settings, to_run: list[Cell]) -> Counter[str]:
    """How many files the feature cache gets of each fitted representation: of each layer set and split."""
    fits = {(cell.representation, cell.layer_set, cell.split, cell.labels, cell.fraction) for cell in to_run}
    kernels = {("kernel_ridge", *fit[1:]) for fit in fits if fit[0] == "kernel_pca"}  # which it is made of
    names = Counter(fit[0] for fit in [*fits, *(kernels - fits)] if fit[0] in CACHED_FITS)
    return Counter(
        {name: count * max(1, settings.folds * settings.partitions) for name, count in names.items()}
    )


# Bytes of the features of all rows, of each representation that is fitted to training rows. The number of
# classes is not known before the data set is opened: centroid_cosine takes ten.
FITTED_BYTES: dict[str, Callable[[Survey, Settings], float]] = {
    "flat_vec": lambda surveyed, settings: surveyed.weight_bytes,
    "pca": lambda surveyed, settings: 4 * surveyed.rows * settings.pca_components,
    "centroid_cosine": lambda surveyed, settings: 4 * surveyed.rows * 2 * (len(surveyed.shapes) // 2) * 10,
    "kernel_pca": lambda surveyed, settings: TRAIN_SHARE * 8 * surveyed.rows**2,
    "kernel_ridge": lambda surveyed, settings: TRAIN_SHARE * 8 * surveyed.rows**2,
    "metadata": lambda surveyed, settings: 0,
}


def feature_bytes(name: str, surveyed: Survey, settings: Settings) -> float:
    """Bytes of a representation's features of all rows."""
    rows, layers = surveyed.rows, len(surveyed.shapes)
    modules = layers // 2
    spec = SPECS[name]
    if not spec.fitted:
        return 4 * rows * settings.width_of(name) * (modules if spec.source == "module" else layers)
    return FITTED_BYTES[name](surveyed, settings)


def gigabytes(size: float) -> str:
    """Bytes as gigabytes."""
    return f"{size / 1e9:.2f} GB"
