"""The folder of a run: manifest, rows that are finished, and the table.

Finished rows lie in a hidden part file, a line of JSON each, until the table is written; so a run that was
killed loses the batch in work and no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch

from checkpointing import hash_of, holding, replacing, utc_now, write_bytes, write_json

from . import AnalysisError, InputError
from .progress import log
from .rows import columns
from .samples import FILES
from .settings import FREE, TINY, Settings
from .toy import WARNING

PART = ".metrics.part.jsonl"
TABLE = "metrics.parquet"
MEASURES_VERSION = 1  # raise it when a change of the code changes a number


class Run:
    """A run's folder. `rows` has the finished rows by sample id."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.rows: dict[str, dict] = {}

    def write_manifest(self, **more: Any) -> None:
        """Add to the manifest, and write it."""
        self.manifest |= more
        write_json(self.folder / "manifest.json", self.manifest, indent=2)

    def read_part(self) -> None:
        """Read the rows of a run that was stopped; damaged lines are dropped and measured again."""
        path = self.folder / PART
        content = path.read_bytes() if path.exists() else b""
        names, dropped = set(columns(tuple(self.manifest["settings"]["layers"]))), 0
        for line in content.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and set(row) == names and not not_finite(row):
                self.rows[row["sample_id"]] = row
            else:
                dropped += 1
        if dropped:
            log.warning(f"{dropped} damaged lines of {path} are dropped; their samples are measured again")
            write_bytes(path, b"".join(json.dumps(row).encode() + b"\n" for row in self.rows.values()))

    def add(self, rows: list[dict]) -> None:
        """Keep finished rows on disk. Raises AnalysisError for a number that is none."""
        for row in rows:
            if wrong := not_finite(row):
                raise AnalysisError(f"sample {row['sample_id']}: {wrong[0]} is not finite")
            self.rows[row["sample_id"]] = row
        with (self.folder / PART).open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def write_table(self, ids: list[str], layers: tuple[int, ...]) -> pl.DataFrame:
        """Write metrics.parquet, a row for each id in this order."""
        rows = [self.rows[id_] for id_ in ids]
        # Files may have complexities of several kinds; a column has one.
        if len({type(row["complexity"]) for row in rows}) > 1:
            rows = [row | {"complexity": str(row["complexity"])} for row in rows]
        table = pl.DataFrame({name: [row[name] for row in rows] for name in columns(layers)})
        with replacing(self.folder / TABLE) as temporary:
            warning = {"warning": self.manifest["warning"]} if "warning" in self.manifest else {}
            table.write_parquet(temporary, metadata=warning)
        return table


def not_finite(row: dict) -> list[str]:
    """The columns of a row that hold NaN or infinity."""
    return [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]


@contextlib.contextmanager
def opened(settings: Settings, identity: dict, samples: dict) -> Iterator[Run]:
    """A new run, or the one that --resume names, held by this process; the manifest says how it ended.

    `identity` describes the model, `samples` the data. Raises InputError, Held and Refused.
    """
    folder = Path(settings.resume) if settings.resume else new_folder(Path(settings.output_dir))
    with holding(folder):
        if settings.resume:
            run = Run(folder, read_manifest(folder))
            check_same(run.manifest, identity, samples)
            begun = {"time": utc_now(), "command": shlex.join(sys.argv)}
            run.manifest["resumed"] = [*run.manifest.get("resumed", []), begun]
        else:
            run = Run(folder, described(settings, identity, samples))
        run.read_part()
        run.write_manifest(status="running")
        try:
            yield run
        except BaseException as error:
            if isinstance(error, InputError) and not run.rows and not settings.resume:
                shutil.rmtree(folder)  # nothing was begun
                raise
            reason = f"{type(error).__name__}: {error}"[:500]
            with contextlib.suppress(OSError):  # the disk may be full; the first error is the one to report
                run.write_manifest(status="stopped", ended=utc_now(), reason=reason)
            raise
        run.manifest.pop("reason", None)
        run.write_manifest(status="finished", ended=utc_now())
        (folder / PART).unlink(missing_ok=True)


def new_folder(parent: Path) -> Path:
    """A folder YYYYMMDD_HHMMSS that no other run has. Raises InputError."""
    stamp = time.strftime("%Y%m%d_%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            with contextlib.suppress(FileExistsError):
                folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
                folder.mkdir()
                return folder
    except OSError as error:
        raise InputError(f"cannot write to {parent}: {error.strerror}; choose another --output-dir") from None
    raise InputError(f"too many runs begin now in {parent}: choose another --output-dir")


def described(settings: Settings, identity: dict, samples: dict) -> dict[str, Any]:
    """The manifest of a run that begins."""
    every = settings.result_settings()
    manifest: dict[str, Any] = {"status": "running", "started": utc_now()}
    if settings.model == TINY:
        manifest["warning"] = WARNING
    return manifest | {
        "command": shlex.join(sys.argv),
        "settings": every,
        "free_settings": {name: getattr(settings, name) for name in FREE},
        "model": identity,
        "samples": samples,
        "machine": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions(),
        "notes": [
            "cross_layer_consistency compares features of two SAEs by index, though an index means another "
            "feature in each: residual_consistency compares what they stand for."
        ],
    }


def versions() -> dict[str, str]:
    """The versions that numbers may depend on, of the measures first."""
    names = ("torch", "transformers", "transformer-lens", "sae-lens", "numpy")
    return {"measures": str(MEASURES_VERSION)} | {name: version(name) for name in names}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run. Raises InputError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        manifest = None
    settings = manifest.get("settings") if isinstance(manifest, dict) else None
    known = {field.name for field in dataclasses.fields(Settings)} - set(FREE)
    if (
        not isinstance(settings, dict)
        or set(settings) != known
        or not {"model", "samples", "free_settings"} <= set(manifest)
    ):
        raise InputError(
            f"{folder} has no manifest of a run of this version: give the folder of a run that was stopped"
        )
    return manifest


def check_same(manifest: dict[str, Any], identity: dict, samples: dict) -> None:
    """Raise InputError if the model, the data or the code changed since a run began."""
    for name, now in (("model", identity), ("samples", samples), ("versions", versions())):
        if hash_of(manifest.get(name)) != hash_of(now):
            raise InputError(f"the {name} of this run changed since it began: start another run")


def describe_samples(folder: Path, domains: tuple[str, ...], count: int) -> dict[str, Any]:
    """The files of samples, with their hashes, for the manifest."""
    return {
        "count": count,
        "files": {FILES[name]: hash_of((folder / FILES[name]).read_bytes()) for name in domains},
    }
