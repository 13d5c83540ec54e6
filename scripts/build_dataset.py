#!/usr/bin/env python3
"""Turn folders of LoRA files (.safetensors of diffusers, PEFT or kohya's scripts) into a data set that the experiment reads.

Every file becomes a row, every module's `down` and `up` a column under diffusers' dotted name, whatever tool wrote the file. A
file that cannot become a row is named with the reason. Rerun the same command to resume.

Labels (--label-from):
  folder    the first folder below FOLDER; where several FOLDERs are given, the name of the FOLDER
  metadata  the field --label-field of a metadata.json beside the file; each of its fields becomes a column
  csv       a table --labels with columns file,label; each further column becomes a column. `file` is the path below FOLDER,
            preceded by FOLDER's name where there are several
Default: csv if --labels is given; else metadata if any file has a metadata.json beside it; else folder.

Exit status: 0 the data set is written; 2 bad input; 3 another process builds it.
"""

from __future__ import annotations

import argparse
import collections
import csv
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features, List, Value

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arrow_folder import arrow_matrices, finish_folder, write_shard  # noqa: E402
from lora_files import BadFile, Layout, read_adapter, survey_file  # noqa: E402
from progress import Progress  # noqa: E402

from checkpointing import Held, holding, write_json  # noqa: E402
from lora_data import attention_kind  # noqa: E402
from settings import ATTENTION_KINDS, InputError  # noqa: E402

VERSION = 1                   # raise it whenever the same inputs give another data set
SHARD_BYTES = 256_000_000     # of weights; what a kill can cost
BATCH_BYTES = 32_000_000      # of weights held in memory at a time
NAMED = 20                    # bad files named in an error; all of them are in build.json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What trainers leave beside the weights: no adapter, and nobody takes it for one.
TRAINER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)\w*\.(bin|pt|pth|pkl)")
OWN_COLUMNS = ("lora_file", "lora_scale")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    work = arguments.output.parent / f".{arguments.output.name}.building"
    try:
        with holding(work):
            try:
                build(arguments, work)
            finally:
                if not (work / "set").exists():      # nothing to resume from
                    shutil.rmtree(work)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Held:
        print(f"error: another process builds {arguments.output}: wait for it", file=sys.stderr, flush=True)
        return 3
    return 0


def build(arguments: argparse.Namespace, work: Path) -> None:
    began = time.monotonic()
    if arguments.output.exists() and not (arguments.output / "build.json").is_file():
        raise InputError(f"{arguments.output} exists and was not built by this program: choose another --output")
    inputs = find_inputs(arguments.folders, arguments.pattern)
    labels = label_source(arguments, inputs)
    plan = make_plan(arguments, inputs, labels)
    if arguments.output.exists() and not arguments.overwrite:
        made = json.loads((arguments.output / "build.json").read_text(encoding="utf-8"))
        if made["fingerprint"] != plan.fingerprint:
            raise InputError(f"{arguments.output} exists, built from other files or with other options: choose another --output, or --overwrite")
        refuse_bad(arguments, made["bad"])
        say(f"{arguments.output} is already built from these files with these options: {made['rows']} rows")
        return
    say(f"{len(plan.kept)} files to read, {len(plan.layout.columns)} layers of rank {plan.rank}, {plan.row_bytes * len(plan.kept) / 1e9:.2f} GB "
        f"of weights; labels from {labels.kind}")
    prepare(work, plan.fingerprint)
    records = list(write_shards(arguments, plan, labels, work))
    bad = plan.bad + [tuple(entry) for record in records for entry in record["bad"]]
    names = [record["name"] for record in records if record["rows"]]
    if not names:
        raise InputError(f"no file is left: {describe_bad(bad)}")
    rows = sum(record["rows"] for record in records)
    if rows + len(bad) + plan.other_rank != len(inputs.files) + len(inputs.pickles):
        raise RuntimeError(f"{len(inputs.files)} files became {rows} rows and {len(bad)} bad ones: this is a defect of the builder")
    finish_folder(work / "set", plan.features, names, plan.fingerprint)
    summary = {
        "fingerprint": plan.fingerprint, "version": VERSION, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "rows": rows, "files": len(inputs.files) + len(inputs.pickles), "bad": bad, "of_another_rank": plan.other_rank, "rank": plan.rank,
        "styles": plan.styles, "labels_from": labels.kind, "rows_per_class": dict(sum((collections.Counter(r["classes"]) for r in records),
                                                                                   collections.Counter())),
        "alpha": arguments.alpha, "rows_scaled": sum(record["scaled"] for record in records), "modules": list(plan.layout.modules),
        "flattened": list(plan.layout.flattened), "nulls": labels.nulls(),
    }
    write_json(work / "set" / "build.json", summary, indent=2)
    if arguments.output.exists():
        shutil.rmtree(arguments.output)
    os.replace(work / "set", arguments.output)
    print_summary(arguments, plan, inputs, summary, time.monotonic() - began)


# --- which files


class Inputs(NamedTuple):
    """Files by name, sorted: the path below its FOLDER, preceded by the FOLDER's name if there are several."""

    roots: dict[str, Path]      # name of a FOLDER ("" for a single one) -> where it is
    files: list[str]
    pickles: list[str]
    passed_over: int            # hidden files and trainer state

    def path(self, name: str) -> Path:
        if "" in self.roots:
            return self.roots[""] / name
        root, _, rest = name.partition("/")
        return self.roots[root] / rest


def find_inputs(folders: list[Path], pattern: str) -> Inputs:
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"no such folder: '{folder}'")
    real = [folder.resolve() for folder in folders]
    for i, folder in enumerate(real):
        for other in real[:i]:
            if folder == other or folder in other.parents or other in folder.parents:
                raise InputError(f"'{folder}' and '{other}' overlap: their files would become two rows each")
    roots = {"": folders[0]} if len(folders) == 1 else {folder.name: path for folder, path in zip(real, folders, strict=True)}
    if len(roots) < len(folders):
        raise InputError("two FOLDERs have the same name, which tells their files apart: rename one, or give the folder above them")
    files, pickles, passed_over = [], [], 0
    for root_name, root in roots.items():
        for path in walk(root):
            name = "/".join(filter(None, (root_name, path.relative_to(root).as_posix())))
            if pattern and not fnmatch.fnmatch(path.name, pattern):
                continue
            if path.suffix not in PICKLES and path.suffix != ".safetensors" and not pattern:
                continue
            if path.name.startswith(".") or TRAINER_STATE.fullmatch(path.name):
                passed_over += 1
            else:
                (pickles if path.suffix in PICKLES else files).append(name)
    if not files:
        where = ", ".join(map(str, folders))
        more = f"; {len(pickles)} pickled files are there, which are not read: convert them to safetensors" if pickles else ""
        raise InputError(f"no {pattern or '.safetensors'} file in {where}{more}")
    return Inputs(roots, sorted(files), sorted(pickles), passed_over)


def walk(folder: Path, above: frozenset = frozenset()) -> Iterator[Path]:
    """Every file below a folder; links are followed, but not to a folder that this one lies in."""
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot look into '{folder}': {error.strerror}") from None
    for entry in found:
        if entry.is_dir():
            yield from walk(Path(entry.path), above | {here})
        else:
            yield Path(entry.path)


# --- labels and further columns


@dataclass
class Labels:
    """A row's columns besides the weights. `kind` folder, metadata or csv; `types` the columns' types, known once every file was surveyed."""

    kind: str
    inputs: Inputs
    label: str = "category_label"                                    # the column that must be there for every row
    table: dict[str, dict] = field(default_factory=dict)             # of a CSV, by file
    types: dict[str, str] = field(default_factory=dict)
    present: collections.Counter = field(default_factory=collections.Counter)
    surveyed: int = 0

    def of(self, name: str) -> dict:
        """The values of a file's columns. Raises BadFile if there is no label."""
        if self.kind == "folder":
            if "" in self.inputs.roots and "/" not in name:
                raise BadFile("lies in no folder below FOLDER, so it has no class")
            return {self.label: name.partition("/")[0]}
        if self.kind == "csv":
            if name not in self.table:
                raise BadFile("has no line in --labels")
            return self.table[name]
        path = self.inputs.path(name).parent / "metadata.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadFile("has no metadata.json beside it") from None
        except (OSError, ValueError) as error:
            raise BadFile(f"its metadata.json cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(fields, dict):
            raise BadFile(f"its metadata.json holds {type(fields).__name__}, not fields")
        if fields.get(self.label) in (None, ""):
            raise BadFile(f"its metadata.json has no '{self.label}'")
        if isinstance(fields[self.label], (float, bool, list, dict)):
            raise BadFile(f"its '{self.label}' is {json.dumps(fields[self.label])}: labels are text or whole numbers")
        plain = (str, int, float, type(None))
        return {key: value if isinstance(value, plain) else json.dumps(value, sort_keys=True) for key, value in fields.items()}

    def survey(self, values: dict) -> None:
        """Widen the columns' types by one row's values."""
        self.surveyed += 1
        for key, value in values.items():
            if value is not None:
                self.types[key] = wider(self.types.get(key), type_of(value))
                self.present[key] += 1
            else:
                self.types.setdefault(key, "null")

    def nulls(self) -> dict[str, int]:
        """Column -> rows without a value, of those that were surveyed."""
        return {key: self.surveyed - self.present[key] for key in self.types if self.present[key] < self.surveyed}

    def columns(self) -> dict[str, str]:
        """Column -> type; a field that is null everywhere becomes text."""
        return {key: "string" if kind == "null" else kind for key, kind in sorted(self.types.items())}


def type_of(value) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -2**63 <= value < 2**63 else "string"
    return "float64" if isinstance(value, float) else "string"


def wider(one: str | None, other: str) -> str:
    """The type that holds both: numbers become float64, anything else text."""
    if one in (None, "null", other):
        return other
    return "float64" if {one, other} == {"int64", "float64"} else "string"


def as_type(value, kind: str):
    if value is None:
        return None
    if kind == "string":
        return value if isinstance(value, str) else json.dumps(value)
    return float(value) if kind == "float64" else value


def label_source(arguments: argparse.Namespace, inputs: Inputs) -> Labels:
    kind = arguments.label_from
    if not kind:
        described = any((inputs.path(name).parent / "metadata.json").is_file() for name in inputs.files)
        kind = "csv" if arguments.labels else "metadata" if described else "folder"
    if (kind == "csv") != bool(arguments.labels):
        raise InputError(f"--label-from {kind} and {'no --labels' if kind == 'csv' else '--labels'}: --labels FILE.csv belongs to --label-from csv")
    if arguments.label_field and kind != "metadata":
        raise InputError(f"--label-field {arguments.label_field} needs --label-from metadata, not {kind}")
    if kind == "csv":
        return Labels(kind, inputs, table=read_csv(arguments.labels, inputs))
    return Labels(kind, inputs, label=arguments.label_field or "category_label")


def read_csv(path: Path, inputs: Inputs) -> dict[str, dict]:
    """File -> columns, `label` being called category_label. Whole numbers and numbers are taken for such where a column has nothing else."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            fields = reader.fieldnames or []
            if not {"file", "label"} <= set(fields) or len(set(fields)) < len(fields) or "category_label" in fields:
                raise InputError(f"{path} starts with {','.join(fields) or 'nothing'}: expected a line file,label[,further columns], each name once")
            rows = {}
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{where}: {len(fields)} values are expected")
                name = row["file"].removeprefix("./")
                if name in rows:
                    raise InputError(f"{where}: '{name}' for the second time")
                if not row["label"]:
                    raise InputError(f"{where}: no label")
                rows[name] = row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read --labels {path}: {error}") from None
    known = {*inputs.files, *inputs.pickles}
    strangers = [name for name in rows if name not in known]
    if strangers:
        raise InputError(f"{path} names {len(strangers)} files that are not there, the first '{strangers[0]}': paths are those below FOLDER"
                         + ("" if "" in inputs.roots else ", preceded by its name"))
    for column in fields:
        if column != "file":
            read = reader_of(row[column] for row in rows.values())
            for row in rows.values():
                row[column] = read(row[column]) if row[column] else None
    return {name: {"category_label" if key == "label" else key: value for key, value in row.items() if key != "file"} for name, row in rows.items()}


def reader_of(texts) -> type:
    """int if every non-empty text is a whole number as Python writes it (007 is a name), float if every one is a number, else str."""
    kinds = {int, float}
    for text in filter(None, texts):
        if not re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
            kinds.discard(int)
        if not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?", text):
            return str
    return int if int in kinds else float


# --- what is going to be written


class Plan(NamedTuple):
    layout: Layout
    features: Features
    kept: list[str]              # files that become rows, unless a weight turns out bad
    bad: list[tuple[str, str]]   # (file, reason)
    other_rank: int              # files left out by --rank
    rank: str
    styles: dict[str, int]       # how many files of each key style are kept
    others: dict[str, str]       # columns besides weights -> type
    row_bytes: int
    shard_rows: int
    fingerprint: str


def make_plan(arguments: argparse.Namespace, inputs: Inputs, labels: Labels) -> Plan:
    """Look at every file's header and label; choose the layout that most have. Raises InputError for bad files, unless they are skipped.

    What is kept in memory of a file is its name and the number of its layout.
    """
    stamps = xxhash.xxh3_128(json.dumps([
        VERSION, sorted(inputs.roots), arguments.pattern, arguments.alpha, arguments.rank, arguments.leave_out, labels.kind, labels.label,
        arguments.shard_rows]).encode())
    bad = [(name, "a pickle, which can run code when it is loaded: convert it to safetensors") for name in inputs.pickles]
    layouts: list[Layout] = []
    number_of: dict[tuple, int] = {}
    which = array("i", [-1]) * len(inputs.files)
    counts = collections.Counter()
    progress = Progress(len(inputs.files), "headers")
    for i, name in enumerate(inputs.files):
        path = inputs.path(name)
        for part in (path, path.parent / "adapter_config.json", path.parent / "metadata.json"):
            stamps.update(json.dumps([name, *stamp(part)]).encode())
        try:
            layout = survey_file(path, arguments.leave_out)
            values = labels.of(name)
            if "rank" in values and values["rank"] not in (None, max(layout.ranks), str(max(layout.ranks))):
                raise BadFile(f"is of rank {rank_text(layout)} but its label says {values['rank']}")
            number = number_of.setdefault((layout.style, layout.columns), len(number_of))
            if number == len(layouts):
                layouts.append(layout)
            which[i] = number
            counts[number] += 1
        except BadFile as error:
            bad.append((name, str(error)))
        progress.advance()
    stamps.update(json.dumps(labels.table, sort_keys=True).encode())

    by_rank = collections.Counter()
    for number, count in counts.items():
        by_rank[rank_text(layouts[number])] += count
    wanted = str(arguments.rank) if arguments.rank else next(iter(by_rank), "")
    if wanted and (wanted not in by_rank or (not arguments.rank and len(by_rank) > 1)):
        found = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(by_rank.items(), key=lambda item: (len(item[0]), item[0])))
        remedy = "choose one with --rank" if not arguments.rank else f"none is of --rank {arguments.rank}"
        raise InputError(f"the files have these ranks: {found}; a data set has one: {remedy}" + (f"; and {describe_bad(bad)}" if bad else ""))
    of_columns = collections.Counter()
    for number, count in counts.items():
        if rank_text(layouts[number]) == wanted:
            of_columns[layouts[number].columns] += count
    if not of_columns:
        raise InputError(f"no file can become a row: {describe_bad(bad)}")
    columns = max(of_columns, key=lambda layout: (of_columns[layout], layout))
    kept, other_rank, styles = [], 0, collections.Counter()
    for i, name in enumerate(inputs.files):
        if which[i] < 0:
            continue
        layout = layouts[which[i]]
        if rank_text(layout) != wanted:
            other_rank += 1
        elif layout.columns != columns:
            bad.append((name, difference(layout.columns, columns)))
        else:
            kept.append(name)
            styles[layout.style] += 1
            labels.survey(labels.of(name))
    refuse_bad(arguments, bad)
    chosen = next(layout for layout in layouts if layout.columns == columns)
    others = labels.columns()
    if collision := sorted(others.keys() & (set(OWN_COLUMNS) | chosen.keys.keys())):
        raise InputError(f"'{collision[0]}' among the fields is a column that this program writes: rename the field")
    others = others | ({} if "rank" in others else {"rank": "int64"}) | {"lora_file": "string"}
    features = Features({column: List(List(Value("float32"))) for column, _, _ in columns} | {key: Value(kind) for key, kind in others.items()}
                        | ({"lora_scale": List(Value("float64"))} if arguments.alpha == "record" else {}))
    row_bytes = 4 * sum(rows * cols for _, rows, cols in columns)
    shard_rows = arguments.shard_rows or max(1, SHARD_BYTES // row_bytes)
    return Plan(chosen, features, kept, bad, other_rank, wanted, dict(styles), others, row_bytes, shard_rows, stamps.hexdigest())


def stamp(path: Path) -> list:
    """What changes when a file does; nothing for one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def rank_text(layout: Layout) -> str:
    return "+".join(map(str, layout.ranks))


def difference(columns, wanted) -> str:
    """In what a file's columns differ from those of most files."""
    own, others = ({column: shape for column, *shape in some} for some in (columns, wanted))
    lacks, has = sorted(others.keys() - own.keys()), sorted(own.keys() - others.keys())
    reshaped = sorted(column for column in own.keys() & others.keys() if own[column] != others[column])
    says = [f"lacks {len(lacks)} layers that most files have (the first {lacks[0]})"] if lacks else []
    says += [f"has {len(has)} layers that most files lack (the first {has[0]})"] if has else []
    if reshaped:
        first = reshaped[0]
        says.append(f"has {len(reshaped)} layers of another shape ({first}: {own[first][0]} x {own[first][1]}, "
                    f"most files {others[first][0]} x {others[first][1]})")
    return " and ".join(says)


def describe_bad(bad) -> str:
    shown = [f"{name}: {reason}" for name, reason in sorted(map(tuple, bad))[:NAMED]]
    more = [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    return f"{len(bad)} bad file{'s' if len(bad) != 1 else ''}:\n  " + "\n  ".join(shown + more)


def refuse_bad(arguments: argparse.Namespace, bad) -> None:
    if bad and arguments.on_bad == "error":
        raise InputError(f"{describe_bad(bad)}\nrepair or remove them, or leave them out with --on-bad skip")


# --- writing


def prepare(work: Path, fingerprint: str) -> None:
    """Drop what a killed build was writing, and the shards of an unfinished build of other files or with other options."""
    marker = work / "plan.json"
    for half_written in [*work.glob(".*.tmp"), *work.glob("set/.*.tmp")]:   # nobody writes there now: this process holds the folder
        half_written.unlink()
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != {"fingerprint": fingerprint}:
        say("an unfinished build of other files, or with other options, is dropped")
        shutil.rmtree(work / "set", ignore_errors=True)
        for record in work.glob("shard-*.json"):
            record.unlink()
    write_json(marker, {"fingerprint": fingerprint})


def write_shards(arguments: argparse.Namespace, plan: Plan, labels: Labels, work: Path) -> Iterator[dict]:
    """Write, or find finished, one shard after another; yields what each holds. Raises InputError at a bad file, unless they are skipped."""
    starts = range(0, len(plan.kept), plan.shard_rows)
    progress = Progress(len(plan.kept), "files")
    for number, start in enumerate(starts):
        names = plan.kept[start:start + plan.shard_rows]
        name = f"data-{number:05}-of-{len(starts):05}.arrow"
        shard, marker = work / "set" / name, work / f"shard-{number:05}.json"
        record = finished(shard, marker)
        if record is not None:
            say(f"{name} is finished: {record['rows']} rows are kept")
            refuse_bad(arguments, record["bad"])
            progress.skip(len(names))
        else:
            record = {"name": name, "rows": 0, "bad": [], "scaled": 0, "classes": {}}
            record["rows"] = write_shard(shard, plan.features.arrow_schema, tables(arguments, plan, labels, names, record, progress))
            write_json(marker, {**record, "hash": hash_of_file(shard)})
        yield record
    progress.line()


def finished(shard: Path, marker: Path) -> dict | None:
    """The record of a shard that an earlier build finished and that is still what it was then."""
    if not (marker.is_file() and shard.is_file()):
        return None
    record = json.loads(marker.read_text(encoding="utf-8"))
    return record if record.pop("hash") == hash_of_file(shard) else None


def hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def tables(arguments: argparse.Namespace, plan: Plan, labels: Labels, names: list[str], record: dict, progress: Progress) -> Iterator[pa.Table]:
    """The rows of some files, a batch at a time, in one block of memory that every batch uses again; `record` is brought up to date."""
    schema = plan.features.arrow_schema
    size = min(len(names), max(1, BATCH_BYTES // plan.row_bytes), 1000)
    weights = {column: np.empty((size, rows, cols), np.float32) for column, rows, cols in plan.layout.columns}
    for start in range(0, len(names), size):
        rows: list[dict] = []
        for name in names[start:start + size]:
            try:
                rows.append(read_row(arguments, plan, labels, name, {column: w[len(rows)] for column, w in weights.items()}, record))
            except BadFile as error:
                record["bad"].append((name, str(error)))
                refuse_bad(arguments, record["bad"])
            progress.advance()
        if rows:
            columns = [arrow_matrices(w[:len(rows)]) for w in weights.values()]
            for field_name in schema.names[len(columns):]:
                columns.append(pa.array([row[field_name] for row in rows], type=schema.field(field_name).type))
            yield pa.Table.from_arrays(columns, schema=schema)


def read_row(arguments: argparse.Namespace, plan: Plan, labels: Labels, name: str, targets: dict[str, np.ndarray], record: dict) -> dict:
    """Fill `targets` (column -> (rows, cols)) with a file's weights; returns its other columns. Raises BadFile."""
    values = labels.of(name)
    adapter = read_adapter(labels.inputs.path(name), arguments.leave_out, with_scales=arguments.alpha != "ignore")
    if adapter.layout.columns != plan.layout.columns:
        raise BadFile("changed while it was read: " + difference(adapter.layout.columns, plan.layout.columns))
    for column, matrix in adapter.matrices.items():
        targets[column][:] = matrix
    scales = adapter.scales or {}
    if arguments.alpha == "apply":
        with np.errstate(over="ignore"):
            for module, scale in scales.items():
                if scale != 1:
                    up = targets[f"{module}.lora.up.weight"]
                    up *= np.float32(scale)
                    if not np.isfinite(up).all():
                        raise BadFile(f"the `up` of '{module}' times alpha / rank = {scale:g} is beyond float32")
    record["scaled"] += any(scale != 1 for scale in scales.values())
    label = str(values[labels.label])
    record["classes"][label] = record["classes"].get(label, 0) + 1
    row = {"rank": max(adapter.layout.ranks), "lora_file": name, "lora_scale": list(scales.values())}
    return row | {key: as_type(values.get(key), kind) for key, kind in plan.others.items() if key in values or key not in row}


# --- what is said


def print_summary(arguments: argparse.Namespace, plan: Plan, inputs: Inputs, summary: dict, seconds: float) -> None:
    kinds = collections.Counter(attention_kind(column) for column, _, _ in plan.layout.columns)
    say(f"\nWrote {arguments.output}: {summary['rows']} rows, {len(summary['rows_per_class'])} classes, {len(plan.layout.columns)} layers "
        f"({', '.join(f'{kinds[kind]} {kind}' for kind in ATTENTION_KINDS)}), rank {plan.rank}, float32, "
        f"{plan.row_bytes * summary['rows'] / 1e9:.2f} GB, in {seconds:.1f}s ({summary['files'] / max(seconds, 1e-9):.1f} files/s)")
    say(f"Files:   {summary['files']} found = {summary['rows']} written + {len(summary['bad'])} bad + {plan.other_rank} of another rank"
        + (f"; {inputs.passed_over} hidden or trainer-state files passed over" if inputs.passed_over else ""))
    say("Styles:  " + ", ".join(f"{count} {style}" for style, count in sorted(plan.styles.items())))
    says = {"apply": f"applied to `up`; it is not 1 in {summary['rows_scaled']} files",
            "record": f"recorded in lora_scale, not applied; it is not 1 in {summary['rows_scaled']} files", "ignore": "ignored, nothing is scaled"}
    say(f"Scale:   alpha / rank is {says[arguments.alpha]}")
    if plan.layout.flattened:
        say(f"Flat:    {len(plan.layout.flattened)} columns hold convolutions, flattened from (r, in, height, width) to (r, in * height * width)")
    for column, count in summary["nulls"].items():
        say(f"Nulls:   {count} files have no '{column}'")
    if summary["bad"]:
        say(f"WARNING: left out, {describe_bad(summary['bad'])}")
    column = "" if "category_label" in plan.others else f" --label-column {arguments.label_field}"
    say(f"Next:    python3 visual_ablation_experiment.py --dataset {shlex.quote(as_path(arguments.output))}{column}")


def as_path(output: Path) -> str:
    """Spelled so that it cannot be taken for an alias or a name on the Hub."""
    return str(output) if output.is_absolute() or output.parts[:1] == ("..",) else f"./{output}"


def say(line: str) -> None:
    print(line, flush=True)


# --- the command line


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="searched with all its subfolders; links are followed")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder to write")
    parser.add_argument("--label-from", choices=("folder", "metadata", "csv"), help="where classes come from (default: see above)")
    parser.add_argument("--labels", type=Path, metavar="FILE.csv", help="the table for --label-from csv")
    parser.add_argument("--label-field", default="", metavar="NAME", help="field of metadata.json every file must have (default: category_label)")
    parser.add_argument("--alpha", choices=("apply", "record", "ignore"), default="apply",
                        help="alpha / rank: multiply `up` with it, so that up @ down is the change to the model; or write it into the column "
                        "lora_scale, a number a module in the order of build.json's modules; or neither (default: apply)")
    parser.add_argument("--rank", type=int, metavar="R", help="keep the files whose every module has this rank (default: a mix is refused)")
    parser.add_argument("--pattern", default="", metavar="GLOB", help="names of the files to look at (default: *.safetensors, and pickles to refuse)")
    parser.add_argument("--leave-out", default="", metavar="REGEX", help="ignore tensors in whose name, as in the file, this is found: '^lora_te_'")
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help="what a file that cannot become a row does (default: error)")
    parser.add_argument("--shard-rows", type=int, metavar="N", help=f"rows a shard (default: {SHARD_BYTES // 10**6} MB of weights)")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that this program built")
    arguments = parser.parse_args(argv)
    for name in ("rank", "shard_rows"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    try:
        re.compile(arguments.leave_out)
    except re.error as error:
        parser.error(f"--leave-out {arguments.leave_out} is no regular expression: {error}")
    arguments.output = Path(os.path.normpath(arguments.output))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
