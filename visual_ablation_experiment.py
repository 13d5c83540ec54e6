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
import dataclasses
import errno
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
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from checkpointing import (
    FeatureCache,
    Held,
    ResultStore,
    State,
    all_cells,
    append_event,
    file_stamps,
    hash_of,
    holding,
    identify,
    locked,
    utc_now,
    write_bytes,
    write_json,
)
from settings import (
    ENSEMBLE_PARTS,
    LAYER_SETS,
    REPRESENTATIONS,
    TRAINING_VERSION,
    Cell,
    InputError,
    Settings,
    build_settings,
    flag,
    read_yaml,
    setting_fields,
)

log = logging.getLogger("visual_ablation")


def main(argv: list[str] | None = None) -> int:
    log_to_stdout()
    try:
        settings, action = parse_command_line(argv)
        if action.status:
            return print_status(settings)
        if action.dry_run:
            return print_plan(settings)
        from lora_data import resolve_name

        resolve_name(settings.dataset)   # a name that means nothing leaves no folder behind
        with holding(output_folder(settings)):
            return run_experiment(settings, action.rerun_stale)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Held as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3


# --- the experiment


def run_experiment(settings: Settings, rerun_stale: bool) -> int:
    from training import resolve_training

    clock = Clock()
    store = ResultStore(output_folder(settings))
    device = find_device(settings.device)
    settings = dataclasses.replace(settings, training=resolve_training(settings.training, device))
    data = load(settings, device, clock)
    made_with = descriptions(settings, data)
    moved = store.clear(made_with, settings.cells, rerun_stale)
    for line in moved:
        log.info(line)
    if moved:
        save_results(store, settings, data, made_with, {})   # or, until this run ends, the files would tell of cells that are gone
    missing = [cell for cell in settings.cells if store.state(cell, made_with[cell]).kind == "missing"]
    print_progress_summary(settings, missing)
    announce(store, "started", command=command(), cells=[cell.name for cell in missing])

    features, failures = load_or_extract(data, missing, settings, clock)      # each weight is read once
    disk_full = False
    for cell in missing:
        try:
            if cell in failures or disk_full:
                raise CellError(failures.get(cell, "not run: no space left for its results"))
            with clock("training"), locked(store.path(cell)):
                run_cell(cell, features, data, settings, device, store, made_with[cell])
        except Exception as error:  # this cell is lost and reported; the others go on
            disk_full |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            known = isinstance(error, CellError)
            failures[cell] = str(error) if known else describe_error(error)
            log.error(f"{cell.name} FAILED: {failures[cell]}" + ("" if known else f"\n{traceback.format_exc()}"))
            announce(store, "failed", cell=cell.name, error=failures[cell])
    return write_results(store, settings, data, made_with, missing, failures, clock)


class CellError(Exception):
    """Why a cell cannot be computed, with nothing to add."""


def run_cell(cell: Cell, features: dict, data, settings: Settings, device: str, store: ResultStore, made_with: dict) -> None:
    """Train, score and save one cell."""
    from reporting import cell_record, prediction_arrays, run_scores
    from training import PARTS, train_runs

    if store.state(cell, made_with).kind == "done":
        return   # by another process, while this one waited for the lock
    x = slice_layers(feature_matrix(features, cell), cell, data)
    log.info(f"\n[{settings.cells.index(cell) + 1}/{len(settings.cells)}] {cell.name}: {x.shape[1]} columns")
    refuse_non_finite_features(x, cell, data)
    labels = {part: data.labels[getattr(data.split, part)] for part in PARTS}

    def on_run(run, number: int) -> None:
        found, _ = run_scores(labels, run, len(data.classes))
        log.info(f"Run {number}/{settings.training.num_runs}: Train={found['train_acc']:.4f}, Val={found['val_acc']:.4f}, "
                 f"Test={found['test_acc']:.4f}, Time={run.seconds:.1f}s")
        progress.advance()

    def on_epoch(run) -> None:
        end_if_stopped()
        progress.note = f"epoch {len(run.train_loss)} of the run with seed {run.seed}"

    with Progress(settings.training.num_runs, "runs") as progress:
        trained = train_runs(x, data.labels, data.split, len(data.classes), settings.training, device, on_run, on_epoch)
    record = cell_record(cell, trained, labels, len(data.classes), len(data.layers_of(cell.layer_set)), x.shape[1])
    record["asked"] = asked(settings)
    record["made_on"] = {"time": utc_now(), "machine": machine(device), "versions": versions()}
    store.save(cell, record, prediction_arrays(trained, labels, data.split), made_with)
    log.info("Results: " + ", ".join(f"{part.title()}={record[f'{part}_acc_mean']:.4f}±{record[f'{part}_acc_std']:.4f}" for part in PARTS)
             + f", best epoch {record['best_epoch_mean']:.0f}, {trained.trained_dim} columns trained")
    announce(store, "finished", cell=cell.name, seconds=record["training_time_total"], test_acc=record["test_acc_mean"])


def load(settings: Settings, device: str, clock: Clock):
    """The data set, with the hash of its weights as `data.identity`."""
    with clock("load"), Progress(None, f"loading {settings.dataset}"):
        from datasets import disable_progress_bars

        from lora_data import load_lora_data

        if not sys.stdout.isatty():
            disable_progress_bars()
        data = load_lora_data(settings.dataset, device, data_split=settings.data_split, revision=settings.revision,
                              label_column=settings.label_column, split_seed=settings.split_seed)
    card = data.card()
    log.info(f"Data set: {settings.dataset} | {card['rows']} rows, {card['classes']} classes | device: {device}")
    log.info(f"Layers: {len(data.layers)} ({', '.join(f'{n} {kind}' for kind, n in card['layers'].items() if n)}) "
             f"of rank {', '.join(map(str, card['ranks']))} | {card['weights_per_row']:,} weights a row")
    log.info("Split: " + ", ".join(f"{part} {n}" for part, n in card["split"].items()))
    if data.split.overlap:
        log.warning("ten rows or fewer: train, validation and test are the same rows, so accuracies mean nothing")
    for layer_set in settings.layer_sets:
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


def load_or_extract(data, cells: list[Cell], settings: Settings, clock: Clock) -> tuple[dict, dict[Cell, str]]:
    """Features (N, L*k) of every representation that `cells` need, from the cache or from the weights; and which cells failed."""
    import torch

    wanted = [name for name in REPRESENTATIONS if any(name in parts_of(cell.representation) for cell in cells)]
    features, cache = {}, None
    if settings.cache_features:
        cache = FeatureCache(cache_folder(settings), data.identity, data.layers)
        with clock("features"), Progress(None, "loading cached features"):
            for name in wanted:
                found, problem = cache.load(name)
                if problem:
                    log.warning(f"cached features of {name} are not used: {problem}; computing them again")
                elif found is not None:
                    features[name] = torch.from_numpy(found)
    if features:
        log.info(f"Cached features: {', '.join(features)}")
    absent = [name for name in wanted if name not in features]
    errors = {}
    if absent:
        log.info(f"Computing {', '.join(absent)}")
        computed, errors = extract_features(data, absent, clock)
        if file_stamps(data.files) != data.stamps:
            raise InputError("the files of the data set changed while they were read: run again when nothing writes to them")
        features |= computed
        with clock("features"), Progress(len(computed), "representations cached") as progress:
            for name in computed if cache else []:
                try:
                    cache.save(name, computed[name].numpy())
                except OSError as error:
                    log.warning(f"features of {name} are not cached: {error}")
                progress.advance()
    failures = {}
    for cell in cells:
        for part in parts_of(cell.representation):
            if part in errors:
                failures.setdefault(cell, f"features of {part}: {describe_error(errors[part])}")
    return features, failures


def parts_of(representation: str) -> tuple[str, ...]:
    """What is computed and cached for it: itself, or the parts that an ensemble is joined from."""
    return ENSEMBLE_PARTS if representation == "ensemble" else (representation,)


def extract_features(data, wanted: list[str], clock: Clock) -> tuple[dict, dict[str, Exception]]:
    """Every representation in `wanted` of all rows and layers, (N, L*k) each, layer-major; and the errors of those that failed."""
    import torch

    from lora_data import BLOCK_ROWS

    features = {name: torch.empty(data.num_rows, len(data.layers), REPRESENTATIONS[name].width) for name in wanted}
    errors: dict[str, Exception] = {}
    seconds = {"read": 0.0, "features": 0.0}
    starts = range(0, data.num_rows, BLOCK_ROWS)
    began = time.perf_counter()
    with Progress(len(data.layers), "layers") as progress:
        for start in starts:
            stop = min(start + BLOCK_ROWS, data.num_rows)
            names = [name for name in wanted if name not in errors]
            found, failed = extract(data, names, start, stop, seconds, lambda: progress.advance(1 / len(starts)))
            errors |= failed
            for name, block in found.items():
                features[name][start:stop] = block
    data.spare.clear()                                                       # the buffers
    wall = time.perf_counter() - began
    read = wall * seconds["read"] / (sum(seconds.values()) or 1)             # the threads' seconds overlap
    clock.add("read", read)
    clock.add("features", wall - read)
    log.info(f"Features of {data.num_rows} rows x {len(data.layers)} layers, in blocks of {min(BLOCK_ROWS, data.num_rows)} rows "
             f"({data.block_weights * 4 / 1e6:.1f} MB a layer at most): {wall:.1f}s (reading {read:.1f}s, computing {wall - read:.1f}s)")
    return {name: x.flatten(1) for name, x in features.items() if name not in errors}, errors


def extract(data, names: list[str], start: int, stop: int, seconds: dict[str, float], on_layer) -> tuple[dict, dict[str, Exception]]:
    """Rows start:stop of every representation in `names`, (n, L, k) each on the CPU; and the errors of those that failed.

    Each weight is read once. On a CPU each core reads and describes a layer at a time; for a GPU the cores read ahead. Adds to
    `seconds` and calls `on_layer()` as layers are done.
    """
    import torch

    from lora_data import ReadAhead
    from training import one_thread_a_core

    found = {name: torch.empty(stop - start, len(data.layers), REPRESENTATIONS[name].width) for name in names}
    errors: dict[str, Exception] = {}

    def fill(position: int, w) -> None:
        began = time.perf_counter()
        for first, columns, failed in describe_rows(data, data.layers[position], names, start, stop, w):
            for name, error in failed.items():
                if name not in errors:
                    trace = "".join(traceback.format_exception(error))
                    log.error(f"{name} failed on rows {start}..{stop} of {data.layers[position]}:\n{trace}")
                errors.setdefault(name, error)
            for name, part in columns.items():
                found[name][first - start:first - start + len(part), position] = part
        seconds["features"] += time.perf_counter() - began

    def read_and_fill(position: int) -> None:
        with data.buffer() as buffer:
            began = time.perf_counter()
            w = data.read_layer(data.layers[position], start, stop, buffer)
            seconds["read"] += time.perf_counter() - began
            fill(position, w)

    if data.device == "cpu":
        with one_thread_a_core(len(data.layers)) as pool:
            for _ in pool.map(read_and_fill, range(len(data.layers))):
                on_layer()
    else:
        layers = ReadAhead(data, start, stop, torch.get_num_threads())
        for position, w in enumerate(layers):
            fill(position, w)
            on_layer()
        seconds["read"] += layers.waited
    return {name: block for name, block in found.items() if name not in errors}, errors


def describe_rows(data, layer: str, names: list[str], start: int, stop: int, w):
    """Yields (first row, {name: (n, k) on the CPU}, {name: error}) of `w`, rows start:stop of a layer; in halves if memory is short."""
    import torch

    from representations import describe

    try:
        found, failed = describe(w.to(data.device), names)               # a GPU may have had no room to read it to
        if found:
            columns = torch.cat(list(found.values()), dim=1).cpu()       # one transfer
            widths = [part.shape[1] for part in found.values()]
            found = dict(zip(found, columns.split(widths, dim=1), strict=True))
        yield start, found, failed
        return
    except torch.OutOfMemoryError as error:
        if stop - start == 1:
            yield start, {}, dict.fromkeys(names, error)
            return
        log.warning(f"out of memory on {data.device}: rows {start}..{stop} of {layer} are done in halves")
    found = None   # outside the except clause, whose traceback keeps the tensors alive
    middle = (start + stop) // 2
    yield from describe_rows(data, layer, names, start, middle, w[:middle - start])
    yield from describe_rows(data, layer, names, middle, stop, w[middle - start:])


def feature_matrix(features: dict, cell: Cell):
    """(N, L, k) of the cell's representation; an ensemble's parts are joined within each layer."""
    import torch

    parts = [features[name].unflatten(1, (-1, REPRESENTATIONS[name].width)) for name in parts_of(cell.representation)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def slice_layers(x, cell: Cell, data):
    """The columns (N, L'*k) of the cell's layers: visual-only is a slice of the all-layers features."""
    chosen = data.layers_of(cell.layer_set)
    return (x if len(chosen) == x.shape[1] else x[:, chosen]).flatten(1)


def refuse_non_finite_features(x, cell: Cell, data) -> None:
    finite = x.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        layer = data.layers[data.layers_of(cell.layer_set)[column // REPRESENTATIONS[cell.representation].width]]
        raise ValueError(f"feature {column % REPRESENTATIONS[cell.representation].width} of layer '{layer}', row {row}, is {x[row, column]}")


def write_results(store: ResultStore, settings: Settings, data, made_with: dict, ran: list[Cell], failures: dict, clock: Clock) -> int:
    """results.json, results.txt, manifest.json and the last table of the log. Returns the exit status."""
    for cell in settings.cells:
        state = store.state(cell, made_with[cell])
        if cell not in failures and state.kind != "done":   # finished, then touched by somebody else
            failures[cell] = f"its files are {state.kind} at the end of the run{': ' + state.why if state.why else ''}"
            log.error(f"{cell.name} FAILED: {failures[cell]}")
    text = save_results(store, settings, data, made_with, failures)
    status = 1 if failures else 0
    path = store.folder / "manifest.json"
    if ran or not path.exists():
        entry = manifest(settings, data, ran, failures, clock, status)
        previous = read_json(path)
        earlier = [*previous.pop("earlier", []), previous] if previous else []
        write_json(path, {**entry, "earlier": earlier}, indent=2)
    announce(store, "ended", status=status, seconds=clock.seconds)
    log.info("\n" + text.rstrip())
    log.info("\nSeconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in clock.seconds.items()))
    log.info(f"Results: {store.folder / 'results.txt'}")
    return status


def save_results(store: ResultStore, settings: Settings, data, made_with: dict, failures: dict[Cell, str]) -> str:
    """results.json and results.txt of every current cell in the folder. Returns the text."""
    from reporting import collect, results_text

    states = {cell: store.state(cell, wanted) for cell, wanted in made_with.items()}
    records = {cell: store.load(cell) for cell, state in states.items() if state.kind == "done"}
    left_out = [cell.name for cell, state in states.items() if state.kind == "stale"]
    if left_out:
        log.warning(f"left out of the results, made with other settings: {', '.join(left_out)}")
    card = data.card()
    header = {
        "dataset": settings.dataset,
        "num_runs": settings.training.num_runs,
        "num_classes": len(data.classes),
        "num_all_layers": len(data.layers),
        "num_visual_layers": card["layers"]["attn1"],
        "num_text_layers": card["layers"]["attn2"],
        "label_mapping": {str(name): index for index, name in enumerate(data.classes)},
        "splits_overlap": data.split.overlap,
        "data": {"identity": data.identity, **card},
        "settings": dataclasses.asdict(settings),
    }
    results = collect(records, earlier_failures(store, records) | failures, header)
    text = results_text(results)
    write_json(store.folder / "results.json", results, indent=2)
    write_bytes(store.folder / "results.txt", text.encode())
    return text


def earlier_failures(store: ResultStore, records: dict[Cell, dict]) -> dict[Cell, str]:
    """Failures that an earlier command reported of cells that still have no checkpoint."""
    reported = read_json(store.folder / "results.json").get("failed_cells", [])
    failed = {Cell(entry["representation"], entry["layer_set"]): entry["error"] for entry in reported}
    return {cell: error for cell, error in failed.items() if cell not in records}


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
    packages = ("torch", "datasets", "numpy", "pyarrow", "safetensors", "xxhash")
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


def asked(settings: Settings) -> dict:
    """Settings that act through the data: recorded with a cell, compared only where the data itself is not at hand."""
    return {name: getattr(settings, name) for name in ("data_split", "revision", "label_column", "split_seed")}


def descriptions(settings: Settings, data=None) -> dict[Cell, dict]:
    """What a cell's numbers depend on, for every cell; without `data`, what the settings alone tell."""
    training = dataclasses.asdict(settings.training)
    if training["trainer"] == "auto":    # becomes definite with the device
        del training["trainer"]
    shared = {"training_version": TRAINING_VERSION, **training}
    layers: dict[str, dict] = {layer_set: {} for layer_set in LAYER_SETS}
    if data is None:
        shared |= asked(settings)
    else:
        shared |= {
            "data": data.identity,
            "labels": hash_of([data.labels.tolist(), data.classes]),
            "split": hash_of([part.tolist() for part in data.split[:3]]),
        }
        layers = {layer_set: {"layers": hash_of([data.layers[i] for i in data.layers_of(layer_set)])} for layer_set in LAYER_SETS}
    return {
        cell: {"representation": cell.representation, "representation_version": [REPRESENTATIONS[p].version for p in versions_of(cell)],
               **layers[cell.layer_set], **shared}
        for cell in all_cells()
    }


def versions_of(cell: Cell) -> list[str]:
    """The representations whose versions a cell depends on."""
    return list(dict.fromkeys([cell.representation, *parts_of(cell.representation)]))


def print_progress_summary(settings: Settings, missing: list[Cell]) -> None:
    log.info("PROGRESS SUMMARY")
    for layer_set in settings.layer_sets:
        total = len(settings.representations)
        left = sum(cell.layer_set == layer_set for cell in missing)
        log.info(f"{LAYER_SETS[layer_set].title + ' Config:':<22}{total - left}/{total} completed, {left} remaining")
    total = len(settings.cells)
    done = total - len(missing)
    log.info(f"{'Total Progress:':<22}{done}/{total} ({100 * done / total:.1f}%)")
    if not missing:
        log.info("All experiments already completed! Loading results from checkpoints...")
    elif done:
        log.info(f"Resuming from checkpoints. Will run {len(missing)} remaining...")
    else:
        log.info(f"No finished cell of these settings yet. Will run {len(missing)}...")


def cell_states(settings: Settings) -> dict[Cell, State]:
    """Of the cells that the settings ask for, from the files of the output folder alone."""
    store, wanted = ResultStore(output_folder(settings)), descriptions(settings)
    return {cell: store.state(cell, wanted[cell]) for cell in settings.cells}


def print_status(settings: Settings) -> int:
    """What is finished; nothing is moved."""
    states = cell_states(settings)
    print_progress_summary(settings, [cell for cell, state in states.items() if state.kind != "done"])
    for cell, state in states.items():
        if state.kind in ("damaged", "stale"):
            log.info(f"{cell.name} is {state.kind}: {state.why}")
    return 0


REASONS = {"done": "kept, if the data set has not changed", "missing": "runs: no checkpoint", "damaged": "runs: damaged checkpoint, ",
           "stale": "stops the run, or runs with --rerun-stale: "}


def print_plan(settings: Settings) -> int:
    """What would run and why, and the memory and disk it needs; nothing is read but file headers, nothing written."""
    from lora_data import survey

    found = survey(settings.dataset, settings.data_split)
    states = cell_states(settings)
    to_run = [cell for cell, state in states.items() if state.kind != "done"]
    print_progress_summary(settings, to_run)
    log.info(f"\nOutput folder: {output_folder(settings)}")
    for cell, state in states.items():
        log.info(f"  {cell.name:<28} {REASONS[state.kind]}{state.why}")
    if found is None:
        log.info(f"\nData set {settings.dataset}: its size is not known before the download")
        return 0
    parts = {part for cell in to_run for part in parts_of(cell.representation)}
    matrix = 4 * found.rows * len(found.shapes)                              # bytes of one column a layer
    features = matrix * sum(REPRESENTATIONS[part].width for part in parts)
    largest = matrix * max((REPRESENTATIONS[cell.representation].width for cell in to_run), default=0)
    weights = 4 * found.rows * sum(rows * cols for _, rows, cols in found.shapes)
    log.info(f"\nData set {settings.dataset}: {found.rows} rows, {len(found.shapes)} layers, {gigabytes(weights)} of weights")
    log.info(f"Memory:  {gigabytes(features)} features, up to {gigabytes(3 * largest)} more while the largest cell trains")
    if settings.cache_features:
        log.info(f"Disk:    {gigabytes(features)} feature cache in {settings.cache_dir}, less what is cached already")
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
    for name, f in setting_fields().items():
        default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        allowed = f.metadata["allowed"]
        choices = f": {', '.join(allowed)}" if isinstance(allowed, tuple) else ""
        help = f"{f.metadata['help']}{choices}" + (f" (default: {default})" if default != "" and default != allowed else "")
        help = help.replace("%", "%%")
        if f.type == "bool":
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        else:
            several = {"nargs": "+"} if f.type.startswith("tuple") else {}
            metavar = "NAME" if several else {"int": "N", "float": "X"}.get(f.type, "TEXT")
            parser.add_argument(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=help, **several)
    parser.add_argument("--quick", action="store_true", help="3 runs instead of 10; not together with --num-runs")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file, named as the flags with _ for -; flags that are typed win")
    parser.add_argument("--rerun-stale", action="store_true", help="set finished cells made with other settings aside and run them again")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and why, and the memory and disk it needs; run nothing")
    parser.add_argument("--status", action="store_true", help="say what is finished, from the output folder's files alone; run nothing")
    typed = vars(parser.parse_args(argv))
    action = argparse.Namespace(**{name: typed.pop(name) for name in ("quick", "config", "rerun_stale", "dry_run", "status")})
    if action.quick:
        if "num_runs" in typed:
            raise InputError(f"--quick means 3 runs and --num-runs {typed['num_runs']} another number: leave one out")
        typed["num_runs"] = 3
    from_file = {}
    if action.config is not None:
        from_file = read_yaml(action.config)
        build_settings(from_file, action.config)   # a bad value in the file is an error even where a flag replaces it
    return build_settings(from_file | typed), action


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

    @contextmanager
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
