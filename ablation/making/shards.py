"""Writing a build's rows, shard by shard: a build that was killed goes on after its last finished shard."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ablation.adapter_kinds import BadFile, best_of_rank
from ablation.adapters import SMALLEST, Adapter, read_adapter
from ablation.making.arrow_folder import arrow_matrices, write_shard
from ablation.making.labels import Labels, as_type
from ablation.making.plan import BuildOptions, BuildPlan, difference_of_columns, refuse_bad
from ablation.making.progress import ProgressLine, say
from checkpointing import write_json

BATCH_BYTES = 32_000_000  # of weights held in memory at a time


@dataclass
class Shard:
    """What a shard holds."""

    name: str
    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # (file, reason)
    scaled: int = 0  # rows with a scale other than 1
    classes: dict[str, int] = field(default_factory=dict)  # rows of each class
    kinds: dict[str, int] = field(default_factory=dict)  # rows of each kind of adapter
    styles: dict[str, int] = field(default_factory=dict)  # rows of each key style
    largest_error: float = 0.0  # of the rows' rank_error, and their sum
    sum_of_errors: float = 0.0


class ShardWriter:
    """Writes the shards of a plan into a working folder."""

    def __init__(self, options: BuildOptions, plan: BuildPlan, labels: Labels, work: Path):
        self.options, self.plan, self.labels, self.work = options, plan, labels, work
        self.progress = ProgressLine(len(plan.kept), "files")

    def prepare(self) -> None:
        """Drop what a killed build was writing, and the shards of another build that was not finished."""
        marker = self.work / "plan.json"
        # This process holds the folder, so nobody is writing there now.
        for half_written in [*self.work.glob(".*.tmp"), *self.work.glob("set/.*.tmp")]:
            half_written.unlink()
        this_plan = {"fingerprint": self.plan.fingerprint}
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != this_plan:
            say("an unfinished build of other files, or with other options, is dropped")
            shutil.rmtree(self.work / "set", ignore_errors=True)
            for record in self.work.glob("shard-*.json"):
                record.unlink()
        write_json(marker, this_plan)

    def write(self) -> Iterator[Shard]:
        """Write one shard after another, or find it finished.

        Raises InputError at a file that cannot become a row, unless such files are skipped.
        """
        starts = range(0, len(self.plan.kept), self.plan.shard_rows)
        for number, start in enumerate(starts):
            names = self.plan.kept[start : start + self.plan.shard_rows]
            name = f"data-{number:05}-of-{len(starts):05}.arrow"
            path, marker = self.work / "set" / name, self.work / f"shard-{number:05}.json"
            shard = finished_shard(path, marker)
            if shard is not None:
                say(f"{name} is finished: {shard.rows} rows are kept")
                refuse_bad(self.options.on_bad, shard.bad)
                self.progress.skip(len(names))
            else:
                shard = Shard(name)
                shard.rows = write_shard(path, self.plan.features.arrow_schema, self.tables(names, shard))
                write_json(marker, {**asdict(shard), "hash": hash_of_file(path)})
            yield shard
        self.progress.line()

    def tables(self, names: list[str], shard: Shard) -> Iterator[pa.Table]:
        """The rows of some files, batch by batch; `shard` is brought up to date.

        Every batch uses the same block of memory.
        """
        plan = self.plan
        schema = plan.features.arrow_schema
        size = min(len(names), max(1, BATCH_BYTES // plan.row_bytes), 1000)
        weights = {column: np.empty((size, r, c), np.float32) for column, r, c in plan.columns}
        for start in range(0, len(names), size):
            rows: list[dict[str, Any]] = []
            for name in names[start : start + size]:
                targets = {column: w[len(rows)] for column, w in weights.items()}
                try:
                    rows.append(self.read_row(name, targets, shard))
                except BadFile as error:
                    shard.bad.append((name, str(error)))
                    refuse_bad(self.options.on_bad, shard.bad)
                self.progress.advance()
            if rows:
                columns = [arrow_matrices(w[: len(rows)]) for w in weights.values()]
                for other in schema.names[len(columns) :]:
                    columns.append(pa.array([row[other] for row in rows], type=schema.field(other).type))
                yield pa.Table.from_arrays(columns, schema=schema)

    def read_row(self, name: str, targets: dict[str, np.ndarray], shard: Shard) -> dict[str, Any]:
        """Fill `targets` (column -> (rows, cols)) with a file's weights;
        returns its other columns. Raises BadFile.
        """
        values = self.labels.of(name)
        alpha = self.options.alpha
        path = self.labels.inputs.path(name)
        adapter = read_adapter(path, self.options.reading, with_scales=alpha != "ignore")
        frame = self.options.frame_of(adapter.layout)
        if frame != self.plan.frame:
            what = difference_of_columns(frame, self.plan.frame)
            raise BadFile(f"changed while it was read: {what}")
        scales = adapter.scales or {}
        error = self.fill(targets, adapter)
        if alpha == "apply":
            apply_scales(scales, targets)
        # From here on the file is a row.
        shard.largest_error = max(shard.largest_error, error)
        shard.sum_of_errors += error
        shard.scaled += any(scale != 1 for scale in scales.values())
        for counts, value in (
            (shard.classes, str(values[self.labels.label])),
            (shard.kinds, adapter.layout.kind),
            (shard.styles, adapter.layout.style),
        ):
            counts[value] = counts.get(value, 0) + 1
        row = {
            "rank": max(adapter.layout.ranks),
            "lora_file": name,
            "lora_scale": list(scales.values()),
            "rank_error": error,
            **{column: adapter.magnitudes.get(column) for column in self.plan.magnitudes},
        }
        stated = {
            key: as_type(values.get(key), kind)
            for key, kind in self.plan.others.items()
            if key in values or key not in row
        }
        return row | stated

    def fill(self, targets: dict[str, np.ndarray], adapter: Adapter) -> float:
        """Fill `targets` with a file's matrices at the data set's rank; returns the relative error of its
        products, which is 0 but for --rank svd. Raises BadFile.
        """
        lost = total = 0.0
        scales = adapter.scales or {}
        largest = max(map(abs, scales.values()), default=1.0) or 1.0  # whose square may be beyond float64
        for module, down, up in adapter.factors():
            sides = [f"{module}.lora.{side}.weight" for side in ("down", "up")]
            if self.options.svd_rank:
                best_down, best_up, its_loss, energy = best_of_rank(
                    down.astype(np.float64), up.astype(np.float64), self.options.svd_rank
                )
                weight = (scales.get(module, largest) / largest) ** 2
                lost, total = lost + weight * its_loss, total + weight * energy
                down, up = as_float32(best_down, module), as_float32(best_up, module)
            for side, matrix in zip(sides, (down, up), strict=True):
                rows, cols = matrix.shape
                target = targets[side]
                if rows > target.shape[0] or cols > target.shape[1]:
                    raise BadFile("changed while it was read: its rank is larger")
                target[:rows, :cols] = matrix
                target[rows:] = target[:, cols:] = 0
        return float(np.sqrt(lost / total)) if total else 0.0


def as_float32(factor: np.ndarray, module: str) -> np.ndarray:
    """A factor of an approximation as float32. Raises BadFile for one that is too large, or that is too small
    and would lose its digits.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = factor.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise BadFile(f"the approximation of '{module}' is beyond float32")
    if 0 < np.abs(factor).max(initial=0) < SMALLEST:
        raise BadFile(f"the approximation of '{module}' is too small for float32")
    return rounded


def apply_scales(scales: dict[str, float], targets: dict[str, np.ndarray]) -> None:
    """Multiply each module's `up` with its scale. Raises BadFile if a product is beyond float32, or a scale
    is so small that it would lose its digits.
    """
    for module, scale in scales.items():
        if scale == 1:
            continue
        up = targets[f"{module}.lora.up.weight"]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            factor = np.float32(scale)
            up *= factor
        if not np.isfinite(up).all():
            raise BadFile(f"the `up` of '{module}' times alpha / rank = {scale:g} is beyond float32")
        if scale != 0 and abs(factor) < SMALLEST:
            raise BadFile(f"the scale of '{module}', alpha / rank = {scale:g}, is too small for float32")


def finished_shard(path: Path, marker: Path) -> Shard | None:
    """A shard that an earlier build finished and that has not changed since, or None."""
    if not (marker.is_file() and path.is_file()):
        return None
    record = json.loads(marker.read_text(encoding="utf-8"))
    return Shard(**record) if record.pop("hash") == hash_of_file(path) else None


def hash_of_file(path: Path) -> str:
    """128-bit xxHash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
