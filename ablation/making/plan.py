"""What a build is going to write, from the headers and labels of all files:
nothing of a file's weights is read.
"""

from __future__ import annotations

import collections
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash
from datasets import Features, List, Value

from ablation.adapters import BadFile, Layout, survey_file
from ablation.fields import InputError
from ablation.making.inputs import Inputs
from ablation.making.labels import Labels
from ablation.making.progress import ProgressLine

BUILD_VERSION = 1  # raise it whenever the same inputs give another data set
SHARD_BYTES = 256_000_000  # of weights; a kill can cost so many
MAX_NAMED = 20  # bad files named in an error; build.json has all of them
OWN_COLUMNS = ("lora_file", "lora_scale")

ColumnShapes = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build that change its rows, or what happens to files that cannot become rows."""

    pattern: str = ""
    alpha: str = "apply"
    rank: int | None = None
    leave_out: str = ""
    on_bad: str = "error"
    shard_rows: int | None = None


class BuildPlan(NamedTuple):
    """What is going to be written."""

    layout: Layout
    features: Features
    kept: list[str]  # files that become rows, unless a weight turns out bad
    bad: list[tuple[str, str]]  # (file, reason)
    other_rank: int  # files left out by --rank
    rank: str
    styles: dict[str, int]  # how many files of each key style are kept
    others: dict[str, str]  # columns besides weights -> type
    row_bytes: int
    shard_rows: int
    fingerprint: str


@dataclass
class Headers:
    """The layouts of all files, by number, because a collection has a handful of them."""

    layouts: list[Layout] = field(default_factory=list)
    numbers: dict[tuple, int] = field(default_factory=dict)
    # -1 for a file that cannot become a row.
    number_of_file: array = field(default_factory=lambda: array("i"))
    bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, layout: Layout | None) -> None:
        """The layout of the next file, None if it cannot become a row."""
        if layout is None:
            self.number_of_file.append(-1)
            return
        number = self.numbers.setdefault((layout.style, layout.columns), len(self.numbers))
        if number == len(self.layouts):
            self.layouts.append(layout)
        self.number_of_file.append(number)

    def counts(self) -> dict[int, int]:
        """Files of each layout."""
        return collections.Counter(number for number in self.number_of_file if number >= 0)


def make_plan(options: BuildOptions, inputs: Inputs, labels: Labels) -> BuildPlan:
    """Look at every file's header and label, and choose the layout that most files have.

    Raises InputError for files that cannot become rows, unless they are skipped.
    """
    fingerprint = fingerprint_of(options, inputs, labels)
    headers = read_headers(options, inputs, labels)
    rank = choose_rank(options, headers)
    columns = choose_columns(headers, rank)
    bad = headers.bad
    kept, other_rank = [], 0
    styles: collections.Counter[str] = collections.Counter()
    for name, number in zip(inputs.files, headers.number_of_file, strict=True):
        if number < 0:
            continue
        layout = headers.layouts[number]
        if rank_text(layout) != rank:
            other_rank += 1
        elif layout.columns != columns:
            bad.append((name, difference_of_columns(layout.columns, columns)))
        else:
            kept.append(name)
            styles[layout.style] += 1
            labels.survey(labels.of(name))
    refuse_bad(options.on_bad, bad)
    chosen = next(layout for layout in headers.layouts if layout.columns == columns)
    others = other_columns(labels, chosen)
    row_bytes = 4 * sum(rows * cols for _, rows, cols in columns)
    return BuildPlan(
        layout=chosen,
        features=dataset_features(columns, others, options.alpha),
        kept=kept,
        bad=bad,
        other_rank=other_rank,
        rank=rank,
        styles=dict(styles),
        others=others,
        row_bytes=row_bytes,
        shard_rows=options.shard_rows or max(1, SHARD_BYTES // row_bytes),
        fingerprint=fingerprint,
    )


def fingerprint_of(options: BuildOptions, inputs: Inputs, labels: Labels) -> str:
    """A hash of the options, and of the sizes and times of all files and of those beside them that count."""
    named = [
        BUILD_VERSION,
        sorted(inputs.roots),
        options.pattern,
        options.alpha,
        options.rank,
        options.leave_out,
        labels.kind,
        labels.label,
        options.shard_rows,
    ]
    digest = xxhash.xxh3_128(json.dumps(named).encode())
    for name in inputs.files:
        path = inputs.path(name)
        for file in (path, path.parent / "adapter_config.json", path.parent / "metadata.json"):
            digest.update(json.dumps([name, *size_and_time(file)]).encode())
    digest.update(json.dumps(labels.table, sort_keys=True).encode())
    return digest.hexdigest()


def size_and_time(path: Path) -> list[int]:
    """Size and modification time of a file; [] for one that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def read_headers(options: BuildOptions, inputs: Inputs, labels: Labels) -> Headers:
    """The layout of every file, and the reason for each that cannot become a row."""
    pickle = "a pickle, which can run code when it is loaded: convert it to safetensors"
    headers = Headers(bad=[(name, pickle) for name in inputs.pickles])
    progress = ProgressLine(len(inputs.files), "headers")
    for name in inputs.files:
        try:
            layout = survey_file(inputs.path(name), options.leave_out)
            refuse_other_rank(layout, labels.of(name).get("rank"))
            headers.add(layout)
        except BadFile as error:
            headers.bad.append((name, str(error)))
            headers.add(None)
        progress.advance()
    return headers


def refuse_other_rank(layout: Layout, said) -> None:
    """Raise BadFile if a file's label says another rank than its weights have."""
    if said not in (None, max(layout.ranks), str(max(layout.ranks))):
        raise BadFile(f"is of rank {rank_text(layout)} but its label says {said}")


def choose_rank(options: BuildOptions, headers: Headers) -> str:
    """The rank of the data set: --rank, or the only one there is. Raises InputError otherwise."""
    by_rank: collections.Counter[str] = collections.Counter()
    for number, count in headers.counts().items():
        by_rank[rank_text(headers.layouts[number])] += count
    rank = str(options.rank) if options.rank else next(iter(by_rank), "")
    if rank and (rank not in by_rank or (not options.rank and len(by_rank) > 1)):
        in_order = sorted(by_rank.items(), key=lambda item: (len(item[0]), item[0]))
        counts = ", ".join(f"{count} of rank {each}" for each, count in in_order)
        remedy = f"none is of --rank {options.rank}" if options.rank else "choose one with --rank"
        and_bad = f"; and {describe_bad(headers.bad)}" if headers.bad else ""
        raise InputError(f"the files have these ranks: {counts}; a data set has one: {remedy}{and_bad}")
    return rank


def choose_columns(headers: Headers, rank: str) -> ColumnShapes:
    """The columns that most files of this rank have. Raises InputError if there is no such file."""
    by_columns: collections.Counter[ColumnShapes] = collections.Counter()
    for number, count in headers.counts().items():
        if rank_text(headers.layouts[number]) == rank:
            by_columns[headers.layouts[number].columns] += count
    if not by_columns:
        raise InputError(f"no file can become a row: {describe_bad(headers.bad)}")
    return max(by_columns, key=lambda columns: (by_columns[columns], columns))


def other_columns(labels: Labels, layout: Layout) -> dict[str, str]:
    """ColumnShapes besides the weights -> type.
    Raises InputError for a field that would be taken for one of ours.
    """
    others = labels.columns()
    taken = sorted(others.keys() & (set(OWN_COLUMNS) | layout.keys.keys()))
    if taken:
        raise InputError(
            f"'{taken[0]}' among the fields is a column that this program writes: rename the field"
        )
    return others | ({} if "rank" in others else {"rank": "int64"}) | {"lora_file": "string"}


def dataset_features(columns: ColumnShapes, others: dict[str, str], alpha: str) -> Features:
    """The columns as `datasets` knows them."""
    weights = {column: List(List(Value("float32"))) for column, _, _ in columns}
    scale = {"lora_scale": List(Value("float64"))} if alpha == "record" else {}
    return Features(weights | {key: Value(kind) for key, kind in others.items()} | scale)


def rank_text(layout: Layout) -> str:
    """The ranks of a file: `4`, or `4+8` where its modules differ."""
    return "+".join(map(str, layout.ranks))


def difference_of_columns(columns: ColumnShapes, usual: ColumnShapes) -> str:
    """How a file's columns differ from those of most files."""
    own = {column: shape for column, *shape in columns}
    others = {column: shape for column, *shape in usual}
    lacks, has = sorted(others.keys() - own.keys()), sorted(own.keys() - others.keys())
    reshaped = sorted(column for column in own.keys() & others.keys() if own[column] != others[column])
    phrases = []
    if lacks:
        phrases.append(f"lacks {len(lacks)} layers that most files have (the first {lacks[0]})")
    if has:
        phrases.append(f"has {len(has)} layers that most files lack (the first {has[0]})")
    if reshaped:
        first = reshaped[0]
        phrases.append(
            f"has {len(reshaped)} layers of another shape ({first}: {own[first][0]} x {own[first][1]}, "
            f"most files {others[first][0]} x {others[first][1]})"
        )
    return " and ".join(phrases)


def describe_bad(bad: Iterable[Sequence[str]]) -> str:
    """The files that cannot become rows, with the reason; the first MAX_NAMED of them."""
    in_order = sorted(map(tuple, bad))
    lines = [f"{name}: {reason}" for name, reason in in_order[:MAX_NAMED]]
    if len(in_order) > MAX_NAMED:
        lines.append(f"and {len(in_order) - MAX_NAMED} more")
    return f"{len(in_order)} bad file{'s' if len(in_order) != 1 else ''}:\n  " + "\n  ".join(lines)


def refuse_bad(on_bad: str, bad: Sequence[Sequence[str]]) -> None:
    """Raise InputError if there are bad files and they are not to be skipped."""
    if bad and on_bad == "error":
        raise InputError(f"{describe_bad(bad)}\nrepair or remove them, or leave them out with --on-bad skip")
