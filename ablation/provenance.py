"""What ran, on what, how long: the manifest, the events, versions and machine."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation.analysis_plan import analysis_plan
from ablation.command_line import typed_command
from checkpointing import (
    CannotWrite,
    append_event,
    file_stamps,
    hash_of,
    read_own,
    utc_now,
    with_checksum,
    write_json,
)

if TYPE_CHECKING:
    from ablation.cells import Cell
    from ablation.context import Context, Ledger

log = logging.getLogger("visual_ablation")

PACKAGES = ("torch", "datasets", "numpy", "scipy", "scikit-learn", "pyarrow", "safetensors", "xxhash")


@functools.cache  # reading them takes 30 ms, and every checkpoint has them
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def machine(device: str) -> dict[str, Any]:
    """The machine, in a few fields."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": gpu,
    }


KEPT_FORMAT = 1  # of runs, packs and blocks that are kept until the whole is finished


def computed_by(device: str) -> dict[str, Any]:
    """What decides how kept parts round, and how they are written: parts made otherwise are not used."""
    import torch

    own = {key: machine(device)[key] for key in ("device", "gpu", "threads")}
    return {"format": KEPT_FORMAT, "torch": torch.__version__, **own}


def made_on(device: str) -> dict[str, Any]:
    """When and where a checkpoint was made: recorded with it, and never compared."""
    return {"time": utc_now(), "machine": machine(device), "versions": versions()}


RUNNING = "not ended"  # of an experiment at work, or ended by a kill


def write_manifest(context: Context, ledger: Ledger, status: int | None, ended: str) -> None:
    """Write manifest.json: when the cells begin, and again at the end. A command that has no cell to run
    leaves it as it is, if it tells of an end and of the present files of the data set.

    `ended` says how the command ended; `status` is its exit status, None if an error or a signal ended it.
    Manifests of earlier commands are kept in `earlier`.
    """
    path = context.store.folder / "manifest.json"
    previous = context.store.read_own("manifest.json")
    data = previous.get("data")
    is_current = isinstance(data, dict) and data.get("stamps") == context.data.files.stamps
    if not ledger.missing and is_current and previous.get("ended") != RUNNING:
        return
    earlier = previous.pop("earlier", [])
    earlier = earlier if isinstance(earlier, list) else []  # a damaged one of an earlier version
    if previous and previous.get("process") != context.clock.command:
        earlier = [*earlier, previous]
    made = {**manifest(context, ledger, status), "ended": ended, "earlier": earlier}
    write_json(path, with_checksum(made), indent=2)


def manifest(context: Context, ledger: Ledger, status: int | None) -> dict[str, Any]:
    """What this command ran, on what, how long (seconds by stage)."""
    data, store = context.data, context.store
    return {
        "command": typed_command(),
        "settings": dataclasses.asdict(context.settings),
        "data": {
            "dataset": context.settings.dataset,
            "architecture": data.layers.found.title,
            "identity": data.files.identity,
            "files": data.files.paths,
            "stamps": data.files.stamps,
        },
        "analysis_plan": hash_of(analysis_plan(context.settings, data)),
        "cells_run": [
            cell.name
            for cell in ledger.missing
            if cell not in ledger.failures and store.path(cell.name).exists()
        ],
        "cells_failed": {cell.name: error for cell, error in ledger.failures.items()},
        "exit_status": status,
        "started": context.clock.started,
        "process": context.clock.command,
        "seconds": context.clock.seconds,
        "versions": versions(),
        "machine": machine(context.device),
    }


def changed_files(folder: Path) -> list[str]:
    """Files of the data set that changed, moved or were touched since the last command in a folder."""
    try:
        data = read_own(folder / "manifest.json").get("data", {})
        before = dict(zip(data["files"], data["stamps"], strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or of an earlier version
        return []
    changed = []
    for file, stamp in before.items():
        try:
            (now,) = file_stamps([file])
        except OSError:
            now = None
        if now != stamp:
            changed.append(file)
    return changed


# --- events.jsonl


def announce(folder: Path, event: str, **fields) -> None:
    """Append an event to the output folder's events.jsonl. If that fails it is logged: results go on."""
    try:
        append_event(folder / "events.jsonl", event=event, **fields)
    except CannotWrite as error:
        log.warning(f"the event '{event}' is lost: {error}")


def announce_finished(folder: Path, cell: Cell, record: dict) -> None:
    """Append the event of a finished cell, with its scores."""
    scores = {f"{part}_acc": record[f"{part}_acc_mean"] for part in ("train", "val", "test")}
    announce(
        folder,
        "finished",
        cell=cell.name,
        representation=cell.representation,
        layer_set=cell.layer_set,
        runs=len(record["per_run_results"]),
        seconds=record["training_time_total"],
        **scores,
        test_acc_std=record["test_acc_std"],
        test_f1=record["test_f1_mean"],
        best_epoch=record["best_epoch_mean"],
        feature_dim=record["feature_dim"],
        trained_dim=record["trained_dim"],
    )
