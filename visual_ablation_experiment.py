#!/usr/bin/env python3
"""Can a LoRA's concept be read off its weights, and how much of it is left in the visual (attn1) layers alone?

Describes every layer of a collection of LoRAs by nine representations, trains a small MLP on each for several seeds, once
with all layers and once with the visual ones, and reports the drop in accuracy. Rerun the same command to resume.

Exit status: 0 every cell is finished; 1 a cell failed, the others ran; 2 bad input or settings; 3 another process holds
the output folder; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM.
"""

# Heavy modules (torch, datasets and what needs them) are imported in the functions that use them: --help, --status and
# --dry-run do without.

from __future__ import annotations

import argparse
import calendar
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import platform
import shlex
import signal
import sys
import threading
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from checkpointing import (
    FeatureCache,
    Held,
    ResultStore,
    State,
    append_event,
    file_stamps,
    hash_of,
    holding,
    identify,
    is_held,
    locked,
    utc_now,
    write_bytes,
    write_json,
)
from settings import (
    AUDIT_VERSION,
    AUDITS,
    CLASSIFIER_VERSION,
    CONTROL_SETS,
    INFERENCE_VERSION,
    LAYER_SET_GROUPS,
    METADATA_COLUMNS,
    REPRESENTATIONS,
    TRAINING_VERSION,
    Cell,
    InputError,
    Settings,
    build_settings,
    flag,
    parts_of,
    read_yaml,
    setting_fields,
)

if TYPE_CHECKING:
    from extraction import Features

log = logging.getLogger("visual_ablation")


def main(argv: list[str] | None = None) -> int:
    log_to_stdout()
    try:
        settings, action = parse_command_line(argv)
        if action.status:
            return watch_status(settings) if action.watch else print_status(settings)
        if action.dry_run:
            return print_plan(settings)
        from lora_data import resolve_name

        resolve_name(settings.dataset)   # a name that means nothing leaves no folder behind
        if action.tensorboard:
            tensorboard_writer()   # not installed: said before hours have gone
        with holding(output_folder(settings)):
            return run_experiment(settings, action)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Held as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3


# --- the experiment


def run_experiment(settings: Settings, action: argparse.Namespace) -> int:
    from training import resolve_training

    clock = Clock()
    store = ResultStore(output_folder(settings))
    device = find_device(settings.device)
    settings = dataclasses.replace(settings, training=resolve_training(settings.training, device))
    data = load(settings, device, clock)
    cells, skipped = possible_cells(settings, data)
    made_with = descriptions(settings, [*cells, *store.cells()], data)
    moved = store.clear(made_with, cells, action.rerun_stale)
    for line in moved:
        log.info(line)
    if moved:
        save_results(store, settings, data, made_with, {}, skipped)   # or, until this run ends, the files would tell of cells that are gone
    missing = [cell for cell in cells if store.state(cell, made_with[cell]).kind == "missing"]
    print_progress_summary(cells, missing)
    announce(store, "started", command=command(), cells=[cell.name for cell in missing])
    finished: dict[Cell, dict] = {}
    with reporting_errors("the page"):
        finished |= {cell: store.load(cell) for cell in cells if action.report and missing and cell not in missing}

    features, failures = load_or_extract(data, missing, settings, clock)      # each weight is read once
    disk_full = False
    for group in groups_of(missing):                                          # a cell and its audits: the same trained runs
        able, trace = [cell for cell in group if cell not in failures], ""
        try:
            if disk_full:
                raise CellError("not run: no space left for its results")
            with contextlib.ExitStack() as locks:
                for cell in able:
                    locks.enter_context(locked(store.path(cell)))
                run_cells(able, f"[{cells.index(group[0]) + 1}/{len(cells)}]", features, data, settings, device, store, made_with, clock)
        except Exception as error:  # these cells are lost and reported; the others go on
            disk_full |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            known = isinstance(error, CellError)
            trace = "" if known else f"\n{traceback.format_exc()}"
            reason = str(error) if known else describe_error(error)
            failures |= {cell: reason for cell in able if store.state(cell, made_with[cell]).kind != "done"}
        for cell in filter(failures.__contains__, group):
            log.error(f"{cell.name} FAILED: {failures[cell]}{trace}")
            announce(store, "failed", cell=cell.name, error=failures[cell])
            trace = ""
        with reporting_errors("the page"):
            if action.report or action.tensorboard:
                finished |= {cell: store.load(cell) for cell in group if cell not in failures and store.path(cell).exists()}
            if action.tensorboard:
                log_curves(store, {cell: finished[cell] for cell in group if cell in finished and not cell.audit})
            if action.report and finished:
                from scripts.report import refresh

                refresh(store.folder, header_of(settings, data), finished, failures, len(cells))
    return write_results(store, settings, data, made_with, cells, missing, failures, skipped, clock, action.report)


class CellError(Exception):
    """Why a cell cannot be computed, with nothing to add."""


def possible_cells(settings: Settings, data) -> tuple[list[Cell], dict[Cell, str]]:
    """The cells that this data set has something for, and why the others are left out. Raises InputError if none is left."""
    from lora_data import expand_layer_sets

    skipped = {}
    if "gauge" in settings.audit:
        data.modules   # a pair that cannot be multiplied ends the run here, and not after hours  # noqa: B018
    wanted = settings.cells(expand_layer_sets(settings.layer_sets, data.layers, settings.random_halves))
    of_modules = dict.fromkeys(cell.layer_set for cell in wanted if REPRESENTATIONS[cell.representation].of == "module")
    without_partner = {layer_set: data.layers_without_partner(layer_set) for layer_set in of_modules}
    for cell in wanted:
        known, alone = REPRESENTATIONS[cell.representation], without_partner.get(cell.layer_set)
        if known.of == "module" and alone:
            skipped[cell] = f"{len(alone)} layers of {cell.layer_set} are there without the other half of their module, such as '{alone[0]}'"
        elif data.num_rows > known.most_rows:
            skipped[cell] = f"for at most {known.most_rows:,} rows, the data set has {data.num_rows:,}"
        elif known.of == "row" and not data.metadata:
            skipped[cell] = f"the data set has no numeric column {', '.join(METADATA_COLUMNS)}; --metadata-columns names others"
        elif known.of == "row" and not data.metadata_vary:
            skipped[cell] = f"{', '.join(data.metadata)} are the same for all training rows"
        elif cell.layer_set in CONTROL_SETS and known.of != "row" and not data.layers_of(cell.layer_set):
            skipped[cell] = f"the data set has no layer of {cell.layer_set}"
    for reason in dict.fromkeys(skipped.values()):
        log.info(f"Skipped, {reason}: {', '.join(cell.name for cell, of_cell in skipped.items() if of_cell == reason)}")
    cells = [cell for cell in wanted if cell not in skipped]
    if not cells:
        raise InputError(f"nothing can be computed: {next(iter(skipped.values()))}; choose other --representations or --layer-sets")
    return cells, skipped


def groups_of(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that share their trained runs, in order."""
    return [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.trained)]


def run_cells(cells: list[Cell], number: str, features: Features, data, settings: Settings, device: str, store: ResultStore,
              made_with: dict[Cell, dict], clock: Clock) -> None:
    """Train, score and save a cell, its audits, or both: they share the trained runs."""
    from reporting import audit_record, cell_record, prediction_arrays, variant_arrays
    from training import PARTS

    cells = [cell for cell in cells if store.state(cell, made_with[cell]).kind != "done"]   # by another process, while this one waited
    if not cells:
        return
    cell, audits = cells[0].trained, [features.audits[one.audit] for one in cells if one.audit]
    view = view_of(data, cell, settings)
    with clock("features"), Progress(None, f"computing {cell.representation}"):
        x, changed = features.of(cell, audits, view)
        refuse_non_finite_features(x, cell, data)
    if REPRESENTATIONS[cell.representation].fitted:   # it has read the weights just now
        refuse_changed_files(data)
    log.info(f"\n{number} {' + '.join(one.name for one in cells)}: {x.shape[1]} columns")
    also = {f"{audit.name} {variant}": changed[audit.name][audit.positions(variant, view.split.test)]
            for audit in audits for variant in audit.variants}
    labels = {part: view.labels[getattr(view.split, part)] for part in PARTS}
    with clock("training"):
        trained = train_cell(cell, x, also, view, labels, settings, device)
    provenance = {"asked": asked(settings, cell), "made_on": {"time": utc_now(), "machine": machine(device), "versions": versions()}}
    for one in cells:
        record = cell_record(one, trained, labels, len(data.classes), len(data.layers_of(one.layer_set)), x.shape[1])
        arrays = prediction_arrays(trained, labels, view.split)
        if one.audit:
            with clock("features"):
                changes = features.audits[one.audit].changes(x, changed[one.audit], view.split.train)
            record |= audit_record(one, trained, labels["test"], changes)
            arrays |= variant_arrays(one, trained, changes)
            found = ", ".join(f"{variant}={entry['test_acc_mean']:.4f}±{entry['test_acc_std']:.4f}" for variant, entry in record["variants"].items())
            log.info(f"Audit {one.audit}: Test={record['test_acc_mean']:.4f}±{record['test_acc_std']:.4f}, {found}")
        else:
            found = ", ".join(f"{part.title()}={record[f'{part}_acc_mean']:.4f}±{record[f'{part}_acc_std']:.4f}" for part in PARTS)
            log.info(f"Results: {found}, best epoch {record['best_epoch_mean']:.0f}, {trained.trained_dim} columns trained")
        store.save(one, record | provenance, arrays, made_with[one])
        scores = {f"{part}_acc": record[f"{part}_acc_mean"] for part in PARTS} | {"test_acc_std": record["test_acc_std"]}
        announce(store, "finished", cell=one.name, representation=one.representation, layer_set=one.layer_set, runs=len(trained.runs),
                 seconds=record["training_time_total"], **scores, test_f1=record["test_f1_mean"], best_epoch=record["best_epoch_mean"],
                 feature_dim=record["feature_dim"], trained_dim=record["trained_dim"])


def train_cell(cell: Cell, x, also: dict, data, labels: dict, settings: Settings, device: str):
    """The runs of a cell, with a line a run. `also` has the columns of rows that are only predicted."""
    from reporting import run_scores
    from training import train_runs

    runs = 1 if cell.representation == "kernel_ridge" or cell.classifier else settings.training.num_runs

    def on_run(run, number: int) -> None:
        found, _ = run_scores(labels, run, len(data.classes))
        log.info(f"Run {number}/{runs}: Train={found['train_acc']:.4f}, Val={found['val_acc']:.4f}, "
                 f"Test={found['test_acc']:.4f}, Time={run.seconds:.1f}s")
        progress.advance()

    def on_epoch(run) -> None:
        end_if_stopped()
        progress.note = f"epoch {len(run.train_loss)} of the run with seed {run.seed}"

    with Progress(runs, "runs") as progress:
        if cell.representation == "kernel_ridge":
            from fitted import train_kernel_ridge

            return train_kernel_ridge(x, data.labels, data.split, len(data.classes), on_run, also)
        if cell.classifier:
            from controls import CLASSIFIERS

            return CLASSIFIERS[cell.classifier](x, data.labels, data.split, on_run)
        return train_runs(x, data.labels, data.split, len(data.classes), settings.training, device, on_run, on_epoch, also)


def load(settings: Settings, device: str, clock: Clock):
    """The data set, with the hash of its weights as `data.identity`."""
    import numpy as np

    with clock("load"), Progress(None, f"loading {settings.dataset}"):
        from datasets import disable_progress_bars

        from lora_data import expand_layer_sets, load_lora_data

        if not sys.stdout.isatty():
            disable_progress_bars()
        data = load_lora_data(settings.dataset, device, data_split=settings.data_split, revision=settings.revision, split=settings.split[0],
                              label_column=settings.label_column, group_column=settings.group_column,
                              metadata_columns=settings.metadata_columns, split_seed=settings.split_seed)
        data.named_sets = settings.named_layer_sets
        views = [view_of(data, Cell("", "", split=split), settings) for split in settings.splits]   # one that is not possible ends the run here
    card = data.card()
    log.info(f"Data set: {settings.dataset} | {card['rows']} rows, {card['classes']} classes | device: {device}")
    log.info(f"Layers: {len(data.layers)} ({', '.join(f'{n} {kind}' for kind, n in card['layers'].items() if n)}) "
             f"of rank {', '.join(map(str, card['ranks']))} | {card['weights_per_row']:,} weights a row")
    log.info(f"Split: {settings.split[0]}, " + ", ".join(f"{part} {n}" for part, n in card["split"].items())
             + (f"; and beside it {', '.join(settings.splits[1:])}" if len(settings.splits) > 1 else ""))
    if data.groups is not None and not data.split.overlap:
        shared = int(np.isin(data.groups[data.split.test], data.groups[data.split.train]).sum())
        log.info(f"Groups: {len(np.unique(data.groups))} by '{settings.group_column}'; {shared} of {len(data.split.test)} test rows share theirs "
                 "with a training row" + ("" if not shared or "grouped" in settings.split else ": --split grouped keeps groups together"))
    for split, view in zip(settings.splits, views, strict=True):
        absent = sorted(set(range(len(data.classes))) - set(data.labels[view.split.train].tolist()))
        if absent:
            names = ", ".join(str(data.classes[number]) for number in absent)
            log.warning(f"no training row of class {names}{f' in split {split}' * bool(split)}: its rows cannot be told")
    if data.split.overlap:
        log.warning("ten rows or fewer: train, validation and test are the same rows, so accuracies mean nothing")
    for layer_set in expand_layer_sets(settings.layer_sets, data.layers, settings.random_halves):
        if not data.layers_of(layer_set):
            raise InputError(f"data set '{settings.dataset}' has no layer for --layer-sets {layer_set}: leave it out")
    with clock("read"), Progress(len(data.layers), "layers hashed") as progress:
        start = time.perf_counter()
        which = [settings.data_split, data.num_rows, data.layers]
        data.stamps = file_stamps(data.files)
        data.identity, remembered = identify(data.files, which, lambda: data.content_hash(progress.advance), cache_folder(settings))
    if not remembered:
        size = 4 * card["weights_per_row"] * card["rows"] / 1e9
        log.info(f"Content hash of {size:.2f} GB of weights: {data.identity} ({time.perf_counter() - start:.1f}s)")
    return data


def view_of(data, cell: Cell, settings: Settings):
    """The data set as a cell sees it: with its split and its labels."""
    return data.seen_as(settings.split_of(cell.split) if cell.split else None, cell.labels)


def load_or_extract(data, cells: list[Cell], settings: Settings, clock: Clock) -> tuple[Features, dict[Cell, str]]:
    """What the columns of `cells` are taken from, from the cache or from the weights; and which cells failed."""
    import torch

    from controls import AUDITS
    from extraction import Features

    features = Features(data, settings.pca_components)
    failures: dict[Cell, str] = {}

    def wanted(audit: str) -> list[str]:
        parts = {part for cell in cells if cell.audit == audit for part in parts_of(cell.representation)}
        return [name for name in REPRESENTATIONS if name in parts and not REPRESENTATIONS[name].fitted]

    def compute(names: list[str], audit=None) -> dict:
        found, errors = extract_features(data, names, settings, clock, audit)
        for cell in cells:
            for part in parts_of(cell.representation):
                if part in errors and (audit is None or audit.name == cell.audit):
                    failures.setdefault(cell, f"features of {part}: {describe_error(errors[part])}")
        return found

    # an audit's change is measured against the features of the rows as they are
    names = [name for name in REPRESENTATIONS if any(name in wanted(audit) for audit in ("", *settings.audit))]
    cache = FeatureCache(cache_folder(settings), data.identity, data.layers, settings.options_of) if settings.cache_features else None
    if cache:
        with clock("features"), Progress(None, "loading cached features"):
            for name in names:
                found, problem = cache.load(name)
                if problem:
                    log.warning(f"cached features of {name} are not used: {problem}; computing them again")
                elif found is not None:
                    features.computed[name] = torch.from_numpy(found)
    if features.computed:
        log.info(f"Cached features: {', '.join(features.computed)}")
    absent = [name for name in names if name not in features.computed]
    if absent:
        log.info(f"Computing {', '.join(absent)}")
        computed = compute(absent)
        features.computed |= computed
        with clock("features"), Progress(len(computed), "representations cached") as progress:
            for name in computed if cache else []:
                try:
                    cache.save(name, computed[name].numpy())
                except OSError as error:
                    log.warning(f"features of {name} are not cached: {error}")
                progress.advance()
    for name in settings.audit:
        if any(cell.audit == name for cell in cells):
            features.audits[name] = AUDITS[name](data, data.split.test)
            if wanted(name):
                log.info(f"Computing {', '.join(wanted(name))} of the rows that the {name} audit changes")
                features.changed[name] = compute(wanted(name), features.audits[name])
    return features, failures


def extract_features(data, names: list[str], settings: Settings, clock: Clock, audit=None) -> tuple[dict, dict[str, Exception]]:
    """Features (N, P*k) of every row, or of an audit's, and the errors of those that failed; with the log and the clock of this program."""
    import extraction
    from lora_data import BLOCK_ROWS

    with Progress(len(data.layers), "layers") as progress:
        widths = {name: settings.width_of(name) for name in names}
        found, errors, reading, computing = extraction.extract_features(data, widths, progress.advance, settings.sketch_size, audit)
    clock.add("read", reading)
    clock.add("features", computing)
    refuse_changed_files(data)
    log.info(f"Features of {data.num_rows if audit is None else len(audit.rows)} rows x {len(data.layers)} layers, in blocks of "
             f"{min(BLOCK_ROWS, data.num_rows)} rows ({data.block_weights * 4 / 1e6:.1f} MB a layer at most): {reading + computing:.1f}s "
             f"(reading {reading:.1f}s, computing {computing:.1f}s)")
    return found, errors


def refuse_changed_files(data) -> None:
    if file_stamps(data.files) != data.stamps:
        raise InputError("the files of the data set changed while they were read: run again when nothing writes to them")


def refuse_non_finite_features(x, cell: Cell, data) -> None:
    finite = x.isfinite()
    if not finite.all():
        from extraction import places_of

        row, column = (~finite).nonzero()[0].tolist()
        if REPRESENTATIONS[cell.representation].fitted:
            raise ValueError(f"feature {column} of row {row} is {x[row, column]}")
        places = places_of(cell, data)
        place, column_there = divmod(column, x.shape[1] // len(places))
        names = data.layers if REPRESENTATIONS[cell.representation].of == "layer" else [module.name for module in data.modules]
        raise ValueError(f"feature {column_there} of layer '{names[places[place]]}', row {row}, is {x[row, column]}")


def write_results(store: ResultStore, settings: Settings, data, made_with: dict, cells: list[Cell], ran: list[Cell], failures: dict,
                  skipped: dict, clock: Clock, report: bool) -> int:
    """results.json, results.txt, manifest.json, the report and the last table of the log. Returns the exit status."""
    for cell in cells:
        state = store.state(cell, made_with[cell])
        if cell not in failures and state.kind != "done":   # finished, then touched by somebody else
            failures[cell] = f"its files are {state.kind} at the end of the run{': ' + state.why if state.why else ''}"
            log.error(f"{cell.name} FAILED: {failures[cell]}")
    text = save_results(store, settings, data, made_with, failures, skipped)
    status = 1 if failures else 0
    path = store.folder / "manifest.json"
    if ran or not path.exists():
        entry = manifest(settings, data, ran, failures, clock, status)
        previous = read_json(path)
        earlier = [*previous.pop("earlier", []), previous] if previous else []
        write_json(path, {**entry, "earlier": earlier}, indent=2)
    announce(store, "ended", status=status, seconds=clock.seconds)
    if report and store.cells():
        with reporting_errors("the report"), Progress(None, "writing the report"):
            from scripts.report import is_current, write_report

            if not is_current(store.folder):
                write_report(store.folder)
    log.info("\n" + text.rstrip())
    log.info("\nSeconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in clock.seconds.items()))
    log.info(f"Results: {store.folder / 'results.txt'}" + (f" and {store.folder / 'report.html'}" if report else ""))
    return status


@contextlib.contextmanager
def reporting_errors(what: str):
    """A page, or what it shows, that cannot be made costs its traceback in the log, and no result."""
    try:
        yield
    except Exception as error:
        log.error(f"{what} could not be written: {describe_error(error)}; scripts/report.py makes it anew\n{traceback.format_exc()}")


def tensorboard_writer(folder: Path | None = None):
    """A writer of event files in `folder`. Raises InputError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave the flag out") from None
    return SummaryWriter(str(folder)) if folder else None


def log_curves(store: ResultStore, records: dict[Cell, dict]) -> None:
    """Validation accuracy, training loss and learning rate by epoch, a folder for each run of each cell."""
    for cell, record in records.items():
        for number, curve in enumerate(record["learning_curves"], 1):
            with contextlib.closing(tensorboard_writer(store.folder / "tensorboard" / cell.name / f"run_{number}")) as writer:
                for name in ("val_acc", "train_loss", "learning_rate"):
                    for epoch, value in enumerate(curve[f"{name}_history"], 1):
                        writer.add_scalar(name, value, epoch)


def save_results(store: ResultStore, settings: Settings, data, made_with: dict, failures: dict[Cell, str], skipped: dict[Cell, str]) -> str:
    """results.json and results.txt of every current cell in the folder. Returns the text."""
    from reporting import collect, results_text

    states = {cell: store.state(cell, wanted) for cell, wanted in made_with.items()}
    records = {cell: store.load(cell) for cell, state in states.items() if state.kind == "done"}
    left_out = [cell.name for cell, state in states.items() if state.kind == "stale"]
    if left_out:
        log.warning(f"left out of the results, made with other settings: {', '.join(left_out)}")
    header = header_of(settings, data) | inferred(store, records, settings, data)
    earlier = {cell: reason for cell, reason in earlier_entries(store, "skipped_cells", "reason").items() if cell not in made_with}
    failed = {cell: error for cell, error in earlier_entries(store, "failed_cells", "error").items() if cell not in records}
    results = collect(records, failed | failures, earlier | skipped, header)
    text = results_text(results)
    write_json(store.folder / "results.json", results, indent=2)
    write_bytes(store.folder / "results.txt", text.encode())
    return text


def header_of(settings: Settings, data) -> dict:
    """The top of results.json: what was run on what."""
    card = data.card()
    return {
        "dataset": settings.dataset,
        "num_runs": settings.training.num_runs,
        "layer_names": data.layers,
        "num_classes": len(data.classes),
        "num_all_layers": len(data.layers),
        "num_visual_layers": card["layers"]["attn1"],
        "num_text_layers": card["layers"]["attn2"],
        "label_mapping": {str(name): index for index, name in enumerate(data.classes)},
        "splits_overlap": data.split.overlap,
        "data": {"identity": data.identity, **card},
        "settings": dataclasses.asdict(settings),
    }


def inferred(store: ResultStore, records: dict[Cell, dict], settings: Settings, data) -> dict:
    """`inference` and `verdict`: those of results.json if they were made from the same predictions, else anew."""
    groups = None if data.groups is None else hash_of(data.groups)
    predictions = {cell.name: record["predictions_hash"] for cell, record in records.items()}
    made_from = hash_of([INFERENCE_VERSION, settings.margin, settings.split[0], data.split.overlap, groups, predictions])
    keys = ("inference", "verdict", "inference_made_from")
    old = read_json(store.folder / "results.json")
    kept = {key: old.get(key) for key in keys}
    if kept["inference_made_from"] == made_from and old.get("inference_check") == hash_of(kept):
        return kept | {"inference_check": old["inference_check"]}
    from inference import infer, verdict  # scipy.stats takes a second to import

    of_cells = {cell: store.load_predictions(cell) for cell in records}
    found = {} if data.split.overlap else infer(of_cells, data.groups, settings.margin, settings.split[0])
    made = dict(zip(keys, (found, verdict(found), made_from), strict=True))
    return made | {"inference_check": hash_of(made)}


def earlier_entries(store: ResultStore, key: str, text: str) -> dict[Cell, str]:
    """What an earlier command reported under a key of results.json: cells, and the text that came with each."""
    reported = {Cell.named(entry["cell"]): entry[text] for entry in read_json(store.folder / "results.json").get(key, [])}
    return {cell: found for cell, found in reported.items() if cell is not None}


def read_json(path: Path) -> dict:
    """A file that this program wrote; {} where there is none or it is damaged, because it only adds to what is written anew."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(f"{path} is not readable and is written anew: {error}")
        return {}


def manifest(settings: Settings, data, ran: list[Cell], failures: dict, clock: Clock, status: int) -> dict:
    """What ran, on what, how long."""
    return {
        "command": command(),
        "settings": dataclasses.asdict(settings),
        "data": {"dataset": settings.dataset, "identity": data.identity, "files": data.files},
        "cells_run": [cell.name for cell in ran if cell not in failures],
        "cells_failed": {cell.name: error for cell, error in failures.items()},
        "exit_status": status,
        "started": clock.started,
        "seconds": clock.seconds,
        "versions": versions(),
        "machine": machine(data.device),
    }


def versions() -> dict[str, str]:
    packages = ("torch", "datasets", "numpy", "scipy", "scikit-learn", "pyarrow", "safetensors", "xxhash")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def machine(device: str) -> dict:
    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device, "gpu": gpu}


# --- what is finished, what would run


def output_folder(settings: Settings) -> Path:
    return Path(settings.output_dir).expanduser() / f"visual_ablation_{settings.short_name}"


def cache_folder(settings: Settings) -> Path | None:
    return Path(settings.cache_dir).expanduser() if settings.cache_features else None


def asked(settings: Settings, cell: Cell) -> dict:
    """Settings that act through the data: recorded with a cell, compared only where the data itself is not at hand."""
    kind, seed = settings.split_of(cell.split)
    found = {name: getattr(settings, name) for name in ("data_split", "revision", "label_column")} | {"split_seed": seed, "split_kind": kind}
    if cell.representation == "metadata":
        found |= {"metadata_columns": list(dict.fromkeys([*METADATA_COLUMNS, *settings.metadata_columns]))}
    return found | ({"group_column": settings.group_column} if kind == "grouped" else {})


def descriptions(settings: Settings, cells: list[Cell], data=None) -> dict[Cell, dict]:
    """What each cell's numbers depend on; without `data`, what the settings alone tell."""
    training = dataclasses.asdict(settings.training)
    if training["trainer"] == "auto":    # becomes definite with the device
        del training["trainer"]
    shared = {"training_version": TRAINING_VERSION, **training}

    @functools.cache
    def layers(layer_set: str) -> dict:
        return {"layers": hash_of([data.layers[i] for i in data.layers_of(layer_set)])}

    @functools.cache
    def rows(split: str, labels: str) -> dict:
        try:
            view = view_of(data, Cell("", "", split=split, labels=labels), settings)
        except InputError as error:          # of a cell that another command left in the folder
            return {"split": f"not possible any more: {error}"}
        return {"labels": hash_of([view.labels.tolist(), view.classes]), "split": hash_of([part.tolist() for part in view.split[:3]])}

    def of(cell: Cell) -> dict:
        found = {"representation": cell.representation, "representation_version": [REPRESENTATIONS[part].version for part in versions_of(cell)],
                 **settings.options_of(cell.representation), **shared}
        if cell.audit:
            found |= {"audit": cell.audit, "audit_version": AUDIT_VERSION}
        if cell.classifier:
            found |= {"classifier": cell.classifier, "classifier_version": CLASSIFIER_VERSION}
        if data is None:
            return found | asked(settings, cell)
        if cell.representation == "metadata":
            found |= {"metadata": hash_of([[name, hash_of(values)] for name, values in data.metadata.items()])}
        return found | {"data": data.identity} | layers(cell.layer_set) | rows(cell.split, cell.labels)

    return {cell: of(cell) for cell in cells}


def versions_of(cell: Cell) -> list[str]:
    """The representations whose versions a cell depends on."""
    return list(dict.fromkeys([cell.representation, *parts_of(cell.representation)]))


def print_progress_summary(cells: list[Cell], missing: list[Cell]) -> None:
    log.info("PROGRESS SUMMARY")
    for title in dict.fromkeys(cell.title for cell in sorted(cells, key=lambda cell: not cell.plain)):
        total = sum(cell.title == title for cell in cells)
        left = sum(cell.title == title for cell in missing)
        log.info(f"{title + ':':<22}{total - left}/{total} completed, {left} remaining")
    total = len(cells)
    done = total - len(missing)
    log.info(f"{'Total Progress:':<22}{done}/{total} ({100 * done / total:.1f}%)")
    if not missing:
        log.info("All experiments already completed! Loading results from checkpoints...")
    elif done:
        log.info(f"Resuming from checkpoints. Will run {len(missing)} remaining...")
    else:
        log.info(f"No finished cell of these settings yet. Will run {len(missing)}...")


def cell_states(settings: Settings, layers: list[str] | None = None) -> dict[Cell, State]:
    """Of the cells that the settings ask for, from the files of the output folder alone; and `layers`, where their names are known."""
    store = ResultStore(output_folder(settings))
    layer_sets = list(settings.layer_sets)
    if set(layer_sets) & set(LAYER_SET_GROUPS):
        from lora_data import expand_layer_sets

        layers = read_json(store.folder / "results.json").get("layer_names", []) if layers is None else layers
        layer_sets = expand_layer_sets(settings.layer_sets, layers, settings.random_halves)
    if "by_block" in settings.layer_sets and not any(name.startswith("by_block.") for name in layer_sets):
        log.info("The blocks of --layer-sets by_block are not known before the first run: they are not counted")
    cells = settings.cells(layer_sets)
    wanted, skipped = descriptions(settings, cells), earlier_entries(store, "skipped_cells", "reason")
    if settings.metadata_columns:                                # may not have been named then
        skipped.pop(Cell("metadata", "no_layers"), None)
    return {cell: store.state(cell, wanted[cell]) for cell in cells if cell not in skipped}


def print_status(settings: Settings) -> int:
    """What is finished; nothing is moved."""
    states = cell_states(settings)
    print_progress_summary(list(states), [cell for cell, state in states.items() if state.kind != "done"])
    for cell, state in states.items():
        if state.kind in ("damaged", "stale"):
            log.info(f"{cell.name} is {state.kind}: {state.why}")
    return 0


WATCH_SECONDS = 10.0


def watch_status(settings: Settings) -> int:
    """Cells done, running and left, their rate and the time to go, until all are done; from the output folder's files alone."""
    folder, shown = output_folder(settings), ""
    while True:
        states = cell_states(settings)
        done = [cell for cell, state in states.items() if state.kind == "done"]
        events = read_events(folder / "events.jsonl")
        last = max((i for i, event in enumerate(events) if event["event"] == "started"), default=len(events))
        since, going = events[last:], is_held(folder)
        loading = going and (not since or any(event["event"] == "ended" for event in since))   # the next run has not begun its cells
        finished, failed = ([] if loading else [event for event in since if event["event"] == kind] for kind in ("finished", "failed"))
        left = len(states) - len(done) - len(failed)
        running = int(going and not loading and left > 0)
        line = f"{len(done)}/{len(states)} cells done, {len(failed)} failed, {running} running, {left - running} left" + " | loading" * loading
        if running and finished:
            rate = len(finished) / max(calendar.timegm(time.gmtime()) - seconds_of(since[0]["time"]), 1)
            line += f" | Rate: {60 * rate:.1f} cells/min | ETA: {duration(left / rate)}"
        if line != shown:
            log.info(line)
            shown = line
        if not going or not (left or loading):
            if left:
                log.info("No run is working on this folder: the same command without --status resumes it")
            return 0
        time.sleep(WATCH_SECONDS)


def read_events(path: Path) -> list[dict]:
    """Whole lines of events.jsonl; one that was cut off by a kill is left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def seconds_of(moment: str) -> int:
    return calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))


REASONS = {"done": "kept, if the data set has not changed", "missing": "runs: no checkpoint", "damaged": "runs: damaged checkpoint, ",
           "stale": "stops the run, or runs with --rerun-stale: "}


def print_plan(settings: Settings) -> int:
    """What would run and why, and the memory and disk it needs; nothing is read but file headers, nothing written."""
    from lora_data import survey

    found = survey(settings.dataset, settings.data_split)
    states = cell_states(settings, None if found is None else [layer for layer, _, _ in found.shapes])
    if found is not None:
        states = {cell: state for cell, state in states.items() if found.rows <= REPRESENTATIONS[cell.representation].most_rows}
        if found.numeric is not None and not set(found.numeric) & {*METADATA_COLUMNS, *settings.metadata_columns}:
            states.pop(Cell("metadata", "no_layers"), None)
    to_run = [cell for cell, state in states.items() if state.kind != "done"]
    print_progress_summary(list(states), to_run)
    log.info(f"\nOutput folder: {output_folder(settings)}")
    for cell, state in states.items():
        log.info(f"  {cell.name:<28} {REASONS[state.kind]}{state.why}")
    if found is None:
        log.info(f"\nData set {settings.dataset}: its size is not known before the download")
        return 0
    weights = 4 * found.rows * sum(rows * cols for _, rows, cols in found.shapes)

    def size_of(name: str) -> int:
        """Bytes of a representation of all rows; of centroid_cosine if there are ten classes."""
        modules = len(found.shapes) // 2
        fitted = {"flat_vec": weights, "pca": 4 * found.rows * settings.pca_components, "centroid_cosine": 4 * found.rows * 2 * modules * 10,
                  "metadata": 0}
        if REPRESENTATIONS[name].fitted:
            return fitted.get(name, 8 * found.rows**2)                   # or a kernel
        return 4 * found.rows * settings.width_of(name) * (modules if REPRESENTATIONS[name].of == "module" else len(found.shapes))

    parts = {part for cell in to_run for part in parts_of(cell.representation)}
    cached = sum(size_of(part) for part in parts if not REPRESENTATIONS[part].fitted)
    growth = 1 + sum(AUDITS[audit].changed_rows for audit in settings.audit)
    features, largest = growth * cached, growth * max((sum(map(size_of, parts_of(cell.representation))) for cell in to_run), default=0)
    log.info(f"\nData set {settings.dataset}: {found.rows} rows, {len(found.shapes)} layers, {gigabytes(weights)} of weights")
    log.info(f"Memory:  {gigabytes(features)} features, up to {gigabytes(3 * largest)} more while the largest cell trains")
    if settings.cache_features:
        log.info(f"Disk:    {gigabytes(cached)} feature cache in {settings.cache_dir}, less what is cached already")
    if found.downloaded:
        log.info(f"Disk:    about {gigabytes(weights)} download in the cache of huggingface_hub (HF_HOME), unless it is there already")
    if found.copied:
        log.info(f"Disk:    {gigabytes(weights)} Arrow copy in the cache of datasets (HF_DATASETS_CACHE), unless it is there already")
    return 0


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# --- the command line


def parse_command_line(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Settings by precedence: defaults, then --config, then the flags that were typed. Raises InputError."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=__doc__[__doc__.index("Exit status"):], allow_abbrev=False)
    known = setting_fields()
    for name, f in known.items():
        if f.type == "dict":   # for --config alone
            continue
        default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        allowed = f.metadata["allowed"]
        choices = f": {', '.join(allowed)}" if isinstance(allowed, tuple) else ""
        help = f"{f.metadata['help']}{choices}" + (f" (default: {default})" if default != "" and default != allowed else "")
        optional = f.default == () and isinstance(allowed, tuple)   # without names: all of them
        help = help.replace("%", "%%") + " (without names: all)" * optional
        if f.type == "bool":
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            several = {"nargs": "*" if optional else "+"} if f.type.startswith("tuple") else {}
            metavar = "NAME" if several else {"int": "N", "float": "X"}.get(f.type, "TEXT")
            parser.add_argument(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=help, **several)
    parser.add_argument("--quick", action="store_true", help="3 runs instead of 10; not together with --num-runs")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file, named as the flags with _ for -; flags that are typed win")
    parser.add_argument("--rerun-stale", action="store_true", help="set finished cells made with other settings aside and run them again")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, and the memory and disk it needs; run nothing")
    parser.add_argument("--status", action="store_true", help="say what is finished, from the output folder's files alone; run nothing")
    parser.add_argument("--watch", action="store_true", help="with --status: again and again until all is finished, with rate and ETA")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True, help="report.html, figures/ and tables/ beside the results")
    parser.add_argument("--tensorboard", action="store_true", help="learning curves as TensorBoard's event files too, in tensorboard/")
    typed = {name: known[name].metadata["allowed"] if value == [] else value for name, value in vars(parser.parse_args(argv)).items()}
    action = argparse.Namespace(**{name: typed.pop(name) for name in ACTIONS})
    if action.watch and not action.status:
        raise InputError("--watch goes with --status")
    if action.quick:
        if "num_runs" in typed:
            raise InputError(f"--quick means 3 runs and --num-runs {typed['num_runs']} another number: leave one out")
        typed["num_runs"] = 3
    from_file = {}
    if action.config is not None:
        from_file = read_yaml(action.config)
        build_settings(from_file, action.config)   # a bad value in the file is an error even where a flag replaces it
    return build_settings(from_file | typed), action


ACTIONS = ("quick", "config", "rerun_stale", "dry_run", "status", "watch", "report", "tensorboard")   # flags that are no settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def find_device(name: str) -> str:
    """`auto` made definite. Raises InputError for a device that is not there."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # or cuBLAS may sum in another order when a command is run again
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown --device '{name}': use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    return name


def command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


# --- the log, the clock and signals


class LineHandler(logging.StreamHandler):
    """Messages to stdout, flushed, above a bar where there is one; remembers when it last wrote.

    A log that cannot be written (its disk full, its reader gone) costs lines, which are counted, and never a cell.
    """

    last = time.monotonic()
    lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "WARNING: " if record.levelno == logging.WARNING else ""
        if LineHandler.lost:
            prefix = f"({LineHandler.lost} lines of the log could not be written)\n{prefix}"
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print(prefix + record.getMessage(), file=sys.stdout, flush=True)
            LineHandler.lost = 0
        except OSError:
            LineHandler.lost += 1
        LineHandler.last = time.monotonic()


def close_log() -> None:
    """What is left in stdout's buffer is written or dropped, so that a broken log does not change the exit status."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_to_stdout() -> None:
    if sys.stdout is None:               # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")   # a terminal without ± shows a question mark
    log.handlers[:] = [LineHandler()]
    log.setLevel(logging.INFO)
    log.propagate = False


class Progress:
    """A tqdm bar under a terminal; otherwise a whole line whenever SILENCE seconds passed without one, and one at the end.

    `total` may be None for work that cannot be counted: `unit` then says what it is.
    """

    SILENCE = 20.0   # seconds; the promise is a line every 30

    def __init__(self, total: int | None, unit: str):
        self.total, self.unit, self.done = total, unit, 0.0
        self.note = ""   # what is going on within a unit
        self.started = time.monotonic()
        self.over = threading.Event()
        self.bar = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from tqdm import tqdm

            form = "{desc}" if self.total is None else "{l_bar}{bar}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}]"
            self.bar = tqdm(total=self.total, unit=self.unit, desc=self.unit, leave=False, file=sys.stdout, bar_format=form)
        else:
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.over.set()
        if self.bar is not None:
            self.bar.close()
        elif self.unit == "layers" and exception[0] is None:
            log.info(self.line())

    def advance(self, amount: float = 1.0) -> None:
        end_if_stopped()
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)

    def watch(self) -> None:
        while not self.over.wait(1.0):
            if time.monotonic() - LineHandler.last > self.SILENCE:
                log.info(self.line())

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        if self.total is None:
            return f"Progress: {self.unit} | {duration(elapsed)} so far"
        rate = self.done / elapsed
        shown = f"{rate:.1f} {self.unit}/s" if rate >= 0.1 else f"{3600 * rate:.1f} {self.unit}/h"
        eta = duration((self.total - self.done) / rate) if rate else "unknown"
        return f"Progress: {int(self.done + 1e-6)}/{self.total} {self.unit} | Rate: {shown} | ETA: {eta}" + (f" | {self.note}" if self.note else "")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Clock:
    """Seconds by stage, for the manifest."""

    def __init__(self):
        self.began = time.perf_counter()
        self.started = utc_now()
        self.spent = dict.fromkeys(("load", "read", "features", "training"), 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str):
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def add(self, stage: str, seconds: float) -> None:
        self.spent[stage] += seconds

    @property
    def seconds(self) -> dict[str, float]:
        return {**self.spent, "total": time.perf_counter() - self.began}


def announce(store: ResultStore, event: str, **what) -> None:
    append_event(store.folder / "events.jsonl", event=event, **what)


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def handle_signals() -> None:
    """End with 128 + signal, locks released and temporary files removed; under nohup an ignored SIGHUP stays ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


stopped_by: int | None = None


def stop(number: int, frame) -> None:
    global stopped_by
    stopped_by = number
    log.info(f"Stopped by {signal.Signals(number).name}: finished cells are kept, rerun the same command to resume")
    end_if_stopped()


def end_if_stopped() -> None:
    """Called again as work goes on: the exit that a signal raises can be lost in a library that drops every exception as it is imported."""
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


if __name__ == "__main__":
    handle_signals()
    try:
        status = main()
    finally:
        close_log()
    sys.exit(status)
