"""What a build is going to write, from the headers and labels of all files:
nothing of a file's weights is read.
"""

from __future__ import annotations

import collections
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash
from datasets import Features, List, Value

from ablation.adapter_kinds import REFUSED_KINDS, BadFile
from ablation.adapter_layout import Layout, Reading
from ablation.adapters import survey_file
from ablation.fields import InputError
from ablation.making.inputs import Inputs
from ablation.making.labels import Labels
from ablation.making.progress import ProgressLine

BUILD_VERSION = 2  # raise it whenever the same inputs give another data set
SHARD_BYTES = 256_000_000  # of weights; a kill can cost so many
MAX_NAMED = 20  # bad files named in an error; build.json has all of them
OWN_COLUMNS = ("lora_file", "lora_scale", "rank_error")

ColumnShapes = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build that change its rows, or what happens to files that cannot become rows."""

    pattern: str = ""
    alpha: str = "apply"
    rank: str = ""  # "4": files of that rank; "pad": zeros to the largest; "svd:4": the best approximation
    leave_out: str = ""
    split_qkv: bool = False
    pickles: str = "refuse"
    on_bad: str = "error"
    shard_rows: int | None = None

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading(self.leave_out, self.split_qkv)

    @property
    def svd_rank(self) -> int:
        """The rank of `--rank svd:R`, else 0."""
        return int(self.rank.removeprefix("svd:")) if self.rank.startswith("svd:") else 0

    @property
    def pads(self) -> bool:
        """True for `--rank pad`."""
        return self.rank == "pad"

    def frame_of(self, layout: Layout) -> ColumnShapes:
        """What two files of a data set must share: columns and shapes, with --rank pad and svd whatever the
        rank.
        """
        any_rank = self.svd_rank or (1 if self.pads else 0)
        return (
            columns_of_rank(layout, dict.fromkeys(layout.modules, any_rank)) if any_rank else layout.columns
        )


class BuildPlan(NamedTuple):
    """What is going to be written."""

    layout: Layout  # of one of the files
    columns: ColumnShapes  # of the data set
    frame: ColumnShapes  # what a file must have (`BuildOptions.frame_of`)
    features: Features
    kept: list[str]  # files that become rows, unless a weight turns out bad
    bad: list[tuple[str, str]]  # (file, reason)
    other_rank: int  # files left out by --rank
    rank: str
    others: dict[str, str]  # columns besides weights and magnitudes -> type
    magnitudes: tuple[str, ...]  # columns of the magnitudes of DoRA
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
        what = (layout.style, layout.kind, layout.columns, tuple(layout.magnitudes))
        number = self.numbers.setdefault(what, len(self.numbers))
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
    chosen = choose_files(options, inputs, headers, rank)
    for name in chosen.files:
        labels.survey(labels.of(name))
    refuse_bad(options.on_bad, headers.bad)
    labels.survey_headers(chosen.files)
    columns, rank = columns_and_rank(options, chosen.layouts, rank)
    magnitudes = tuple(sorted({column for layout in chosen.layouts for column in layout.magnitudes}))
    others = other_columns(labels, {*(column for column, _, _ in columns), *magnitudes})
    row_bytes = 4 * sum(rows * cols for _, rows, cols in columns)
    return BuildPlan(
        layout=chosen.layouts[0],
        columns=columns,
        frame=chosen.frame,
        features=dataset_features(columns, others, magnitudes, options),
        kept=chosen.files,
        bad=headers.bad,
        other_rank=chosen.other_rank,
        rank=rank,
        others=others,
        magnitudes=magnitudes,
        row_bytes=row_bytes,
        shard_rows=options.shard_rows or max(1, SHARD_BYTES // row_bytes),
        fingerprint=fingerprint,
    )


class Chosen(NamedTuple):
    """The files that share a frame, and their layouts."""

    frame: ColumnShapes
    files: list[str]
    layouts: list[Layout]
    other_rank: int  # files that --rank leaves out


def choose_files(options: BuildOptions, inputs: Inputs, headers: Headers, rank: str) -> Chosen:
    """The files of this rank whose frame is the most frequent one; the others of this rank are bad."""
    frame = choose_frame(options, headers, rank)
    frames = [options.frame_of(layout) for layout in headers.layouts]
    files, numbers, other_rank = [], [], 0
    for name, number in zip(inputs.files, headers.number_of_file, strict=True):
        if number < 0:
            continue
        if rank and rank_text(headers.layouts[number]) != rank:
            other_rank += 1
        elif frames[number] != frame:
            headers.bad.append((name, difference_of_columns(frames[number], frame)))
        else:
            files.append(name)
            numbers.append(number)
    layouts = [headers.layouts[number] for number in dict.fromkeys(numbers)]
    return Chosen(frame, files, layouts, other_rank)


def fingerprint_of(options: BuildOptions, inputs: Inputs, labels: Labels) -> str:
    """A hash of the options, and of the sizes and times of all files and of those beside them that count."""
    named = [
        BUILD_VERSION,
        sorted(inputs.roots),
        options.pattern,
        options.alpha,
        options.rank,
        options.leave_out,
        options.split_qkv,
        options.pickles,
        labels.kind,
        labels.label,
        inputs.above,
        labels.civitai_field,
        labels.header_columns,
        options.shard_rows,
    ]
    digest = xxhash.xxh3_128(json.dumps(named).encode())
    for name in inputs.files:
        path = inputs.path(name)
        always = (path, path.parent / "adapter_config.json", path.parent / "metadata.json")
        for file in (*always, *labels.files_beside(path)):
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
    pickle = (
        "a pickle, which can run code when it is loaded: convert it to safetensors, or give --pickles read, "
        "which reads tensors and runs nothing"
    )
    headers = Headers(bad=[(name, pickle) for name in inputs.pickles])
    progress = ProgressLine(len(inputs.files), "headers")
    for name in inputs.files:
        try:
            layout = survey_file(inputs.path(name), options.reading)
            refuse_other_rank(layout, labels.of(name).get("rank"))
            headers.add(layout)
        except BadFile as error:
            headers.bad.append((name, str(error)))
            headers.add(None)
        progress.advance()
    return headers


def refuse_other_rank(layout: Layout, said) -> None:
    """Raise BadFile if a file's label says another rank than its weights have, which may be the rank of
    their parts (LoHa, LoKr).
    """
    known = {max(layout.ranks), *(module.sizes.divisor for module in layout.modules.values())}
    if said is not None and str(said) not in map(str, known):
        raise BadFile(f"is of rank {rank_text(layout)} but its label says {said}")


def choose_rank(options: BuildOptions, headers: Headers) -> str:
    """The rank of the data set: --rank, or the only one there is; '' where ranks are made equal. Raises
    InputError otherwise.
    """
    if options.pads or options.svd_rank:
        return ""
    by_rank: collections.Counter[str] = collections.Counter()
    for number, count in headers.counts().items():
        by_rank[rank_text(headers.layouts[number])] += count
    rank = options.rank or next(iter(by_rank), "")
    if rank and (rank not in by_rank or (not options.rank and len(by_rank) > 1)):
        in_order = sorted(by_rank.items(), key=lambda item: (len(item[0]), item[0]))
        counts = ", ".join(f"{count} of rank {each}" for each, count in in_order)
        remedy = (
            f"none is of --rank {options.rank}"
            if options.rank
            else "choose one with --rank, or make them equal with --rank pad or --rank svd:R"
        )
        and_bad = f"; and {describe_bad(headers.bad)}" if headers.bad else ""
        raise InputError(f"the files have these ranks: {counts}; a data set has one: {remedy}{and_bad}")
    return rank


def choose_frame(options: BuildOptions, headers: Headers, rank: str) -> ColumnShapes:
    """The frame that most files of this rank have. Raises InputError if there is no such file."""
    by_frame: collections.Counter[ColumnShapes] = collections.Counter()
    for number, count in headers.counts().items():
        if rank in ("", rank_text(headers.layouts[number])):
            by_frame[options.frame_of(headers.layouts[number])] += count
    if not by_frame:
        raise InputError(f"no file can become a row: {describe_bad(headers.bad)}")
    return max(by_frame, key=lambda frame: (by_frame[frame], frame))


def columns_and_rank(options: BuildOptions, layouts: list[Layout], rank: str) -> tuple[ColumnShapes, str]:
    """The data set's columns, and its rank in words, for files of these layouts."""
    if options.svd_rank:
        return options.frame_of(layouts[0]), f"{options.svd_rank} (best approximations)"
    if options.pads:
        largest = {name: max(layout.modules[name].rank for layout in layouts) for name in layouts[0].modules}
        text = "+".join(map(str, sorted(set(largest.values()))))
        return columns_of_rank(layouts[0], largest), f"{text} (padded)"
    return layouts[0].columns, rank


def columns_of_rank(layout: Layout, ranks: Mapping[str, int]) -> ColumnShapes:
    """The columns of a layout if its modules had these ranks."""
    columns = []
    for name, module in layout.modules.items():
        columns.append((f"{name}.lora.down.weight", ranks[name], module.sizes.inputs))
        columns.append((f"{name}.lora.up.weight", module.outputs, ranks[name]))
    return tuple(sorted(columns))


def other_columns(labels: Labels, weights: set[str]) -> dict[str, str]:
    """Columns besides the weights -> type. Raises InputError for a field that is called as one of ours."""
    others = labels.columns()
    taken = sorted(others.keys() & (set(OWN_COLUMNS) | weights))
    if taken:
        raise InputError(
            f"'{taken[0]}' among the fields is a column that this program writes: rename the field"
        )
    return others | ({} if "rank" in others else {"rank": "int64"}) | {"lora_file": "string"}


def dataset_features(
    columns: ColumnShapes, others: dict[str, str], magnitudes: tuple[str, ...], options: BuildOptions
) -> Features:
    """The columns as `datasets` knows them."""
    features = {column: List(List(Value("float32"))) for column, _, _ in columns}
    features |= {key: Value(kind) for key, kind in others.items()}
    if options.alpha == "record":
        features["lora_scale"] = List(Value("float64"))
    if options.svd_rank:
        features["rank_error"] = Value("float64")
    return Features(features | {column: List(Value("float32")) for column in magnitudes})


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
    for kind, count in refused_kinds(in_order).items():
        lines.append(f"({count} of them for {kind})")
    return f"{len(in_order)} bad file{'s' if len(in_order) != 1 else ''}:\n  " + "\n  ".join(lines)


def refused_kinds(bad: Iterable[Sequence[str]]) -> dict[str, int]:
    """Kinds of adapter that are refused -> how many files hold some of it."""
    return dict(
        collections.Counter(kind.name for _, reason in bad for kind in REFUSED_KINDS if kind.name in reason)
    )


def refuse_bad(on_bad: str, bad: Sequence[Sequence[str]]) -> None:
    """Raise InputError if there are bad files and they are not to be skipped."""
    if bad and on_bad == "error":
        raise InputError(f"{describe_bad(bad)}\nrepair or remove them, or leave them out with --on-bad skip")
