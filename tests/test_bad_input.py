"""Inputs that a user can get wrong, each with its exact answer: data sets, YAML files and flags.

An input is accepted (exit status 0, and what was made of it is checked) or refused (exit status 2 and one
line that names the value, the place and the remedy; nothing is left behind). Each is asked twice, by a run
and with --dry-run. A dry run reads names, settings and the headers of files. It must refuse what these show,
with the line of the run; cases with `dry=False` can only be refused by a run, which reads labels and weights.
"""

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import without_times

import visual_ablation_experiment as experiment
from ablation.catalogue import DATASET_NAMES
from ablation.settings import setting_fields

FAST = {
    "--representations": "simple_stats",
    "--layer-sets": "all_layers",
    "--num-runs": "1",
    "--max-epochs": "2",
    "--hidden-dim": "4",
    "--batch-size": "8",
    "--device": "cpu",
}
DOWN = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"
UP = DOWN.replace("lora.down", "lora.up")
SHAPES = {DOWN: (2, 3), UP: (4, 2)}
LABEL = "category_label"
NAN, INF = float("nan"), float("inf")
HUGE = "99999999999999999999999"  # needs more than 64 bits


@dataclass(frozen=True)
class Case:
    """An input and its answer. `build()` writes the data set to the working folder and returns its name."""

    id: str
    build: Callable[[], str]
    flags: tuple[str, ...] = ()
    # The line of the refusal after "error: ", as it is or as a regular expression; None: accepted.
    error: str | re.Pattern | None = None
    dry: bool = True  # --dry-run refuses it too
    config: str = ""  # text of the YAML file
    data: dict = field(default_factory=dict)  # what results.json must say: rows, classes, layers, ...
    made_with: dict = field(default_factory=dict)  # settings that the checkpoint must be made with
    like: Callable[[], str] | None = None  # a data set that gives the same numbers


def accepted(id, build, *flags, **how) -> Case:
    return Case(id, build, flags, **how)


def refused(id, build, error, *flags, **how) -> Case:
    return Case(id, build, flags, error, **how)


def settings_of(id, content, error=None, *flags, **how) -> Case:
    """A case of a YAML file, given as text or bytes, with a data set in which nothing is wrong."""

    def build():
        Path("a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return plain()

    text = content if isinstance(content, str) else content.decode(errors="replace")
    return Case(id, build, ("--config", "a.yaml", *flags), error, config=text, **how)


# --- tables


def matrices(name=DOWN, n=12, at=()):
    """Small whole numbers, which every type of number holds; `at` maps rows to other values."""
    rows = np.random.default_rng(len(name)).integers(-9, 10, (n, *SHAPES[name])).tolist()
    for row, value in dict(at).items():
        rows[row] = value
    return rows


def with_weight(value, row=3, i=0, j=1):
    """The matrices of DOWN with another weight at (i, j) of a row."""
    rows = matrices()
    rows[row][i][j] = value
    return rows


def nested(kind):
    return pa.list_(pa.list_(kind))


def fixed(rows, cols):
    return pa.list_(pa.list_(pa.float32(), cols), rows)


FLOAT = nested(pa.float32())
INT = nested(pa.int64())


def loras(n=12, columns=()):
    """A table of n LoRAs with two layers and three classes; `columns` replaces, adds or (None) removes."""
    made = {name: pa.array(matrices(name, n), FLOAT) for name in SHAPES}
    made[LABEL] = pa.array([["cat", "dog", "ape"][i % 3] for i in range(n)])
    made |= dict(columns)
    return pa.table({name: values for name, values in made.items() if values is not None})


def stored_as(kind_of):
    """A table whose layers have the type `kind_of(rows, cols)`."""
    return loras(columns={name: pa.array(matrices(name), kind_of(*SHAPES[name])) for name in SHAPES})


def halves():
    """A table with float16 weights, which PyArrow makes of NumPy's alone."""
    flat = {name: np.array(matrices(name), np.float16).reshape(-1, SHAPES[name][1]) for name in SHAPES}
    lists = {}
    for name, lines in flat.items():
        items = pa.FixedSizeListArray.from_arrays(pa.array(lines.ravel()), lines.shape[1])
        lists[name] = pa.FixedSizeListArray.from_arrays(items, SHAPES[name][0])
    return loras(columns={name: values.cast(nested(pa.float16())) for name, values in lists.items()})


def arrays():
    """A table with the matrices of `datasets.Array2D`."""
    from datasets.features.features import Array2DExtensionType

    made = {}
    for name, shape in SHAPES.items():
        kind = Array2DExtensionType(shape, "float32")
        made[name] = pa.ExtensionArray.from_storage(kind, pa.array(matrices(name), kind.storage_type))
    return loras(columns=made)


def not_utf8():
    """Twelve texts, three of which are no UTF-8."""
    offsets = np.arange(13, dtype=np.int32)
    return pa.Array.from_buffers(
        pa.string(), 12, [None, pa.py_buffer(offsets), pa.py_buffer(b"abcabc\xff\xfe\x80abc")]
    )


def twice(name):
    """A table with two columns of that name."""
    table = loras()
    return table.append_column(name, table.column(name))


# --- data sets: each function returns the function that writes one and returns its name


def write_arrow(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_disk(folder, *shards, split=None):
    """A folder as `save_to_disk` writes it."""
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, table in zip(names, shards, strict=True):
        write_arrow(table, folder / name)
    state = dict.fromkeys(["_fingerprint", "_format_columns", "_format_type"]) | {
        "_data_files": [{"filename": name} for name in names],
        "_format_kwargs": {},
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def disk(table, name="./loras", split=None):
    def build():
        write_disk(Path(name), table(), split=split)
        return name

    return build


plain = disk(loras)


def column(name, values, kind=None):
    """A saved data set in which a column is added or replaced."""
    return disk(lambda: loras(columns={name: pa.array(values, kind)}))


def weights(values, kind=FLOAT):
    return column(DOWN, values, kind)


def labels(values, kind=None):
    return column(LABEL, values, kind)


def without(*names):
    return disk(lambda: loras(columns=dict.fromkeys(names)))


def splits(*names):
    """A saved DatasetDict; the first split has 12 rows, the second 13, ..."""

    def build():
        for i, name in enumerate(names):
            write_disk(Path("loras", name), loras(12 + i), split=name)
        Path("loras").mkdir(exist_ok=True)
        Path("loras", "dataset_dict.json").write_text(json.dumps({"splits": names}))
        return "./loras"

    return build


def tree(contents, name="./loras"):
    """A folder of these files, whose contents are functions that return tables or bytes."""

    def build():
        Path("loras").mkdir()
        for file, content in contents.items():
            path = Path("loras", file)
            made = content()
            if isinstance(made, bytes):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(made)
            elif path.suffix == ".arrow":
                write_arrow(made, path)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as sink:
                    pq.write_table(made, sink)
        return name

    return build


def spoilt(build, action):
    """A data set to whose folder something is done afterwards."""

    def both():
        name = build()
        action(Path("loras"))
        return name

    return both


def parquet_named(name):
    def build():
        with Path(name).open("wb") as sink:
            pq.write_table(loras(), sink)
        return f"./{name}"

    return build


def as_bytes(write, table):
    sink = pa.BufferOutputStream()
    write(table, sink)
    return sink.getvalue().to_pybytes()


def parquet_bytes():
    return as_bytes(pq.write_table, loras())


def arrow_bytes(new_writer=pa.ipc.new_stream):
    def write(table, sink):
        with new_writer(sink, table.schema) as writer:
            writer.write_table(table)

    return as_bytes(write, loras())


def rows(start, stop):
    return lambda: loras().slice(start, stop - start)


def text(content):
    return lambda: content


def named(name):
    """A name at which nothing is."""
    return lambda: name


def replaced(file, content):
    return lambda folder: (folder / file).write_text(content)


def with_features(labels_feature):
    """The file dataset_info.json of a data set with this feature of labels."""
    matrix = {
        "_type": "List",
        "feature": {"_type": "List", "feature": {"dtype": "float32", "_type": "Value"}},
    }
    features = {DOWN: matrix, UP: matrix, LABEL: labels_feature}
    return replaced("dataset_info.json", json.dumps({"features": features}))


def class_labels(numbers, names=("x", "y", "z")):
    feature = {"names": names, "_type": "ClassLabel"}
    return spoilt(labels(numbers, pa.int64()), with_features(feature))


SHARD = "data-00000-of-00001.arrow"
FIRST, SECOND = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
TWO_SHARDS = {FIRST: rows(0, 5), SECOND: rows(5, 12)}


def two_shards():
    write_disk(Path("loras"), rows(0, 5)(), rows(5, 12)())
    return "./loras"


# --- lines of refusals


def no_matrix(kind):
    return f"column '{DOWN}', row 0: a LoRA layer is a matrix of numbers, this column holds {kind}"


def bad_weight(value, place="row 3: the weight at (0, 1)"):
    return f"column '{DOWN}', {place} is {value} as float32: repair or leave out that row"


def other_shape(row, found, expected):
    return (
        f"column '{DOWN}', row {row}: a list of {found} where the column's first row has {expected}: every "
        "row's matrix must have the same shape"
    )


RAGGED_FIRST = f"column '{DOWN}', row 0: the lines of its matrix have 2 and 4 values: all need the same"


def bad_label_type(kind, name=LABEL):
    return f"column '{name}' holds {kind}: labels are strings, integers or ClassLabel; give --label-column"


def unknown_setting(name, hint=""):
    return f"unknown setting '{name}' in a.yaml: {hint or 'known: ' + ', '.join(setting_fields())}"


def help_of(name):
    return setting_fields()[name].metadata["help"]


def not_a(kind, name, value, place=""):
    """`value` as Python writes it."""
    return f"--{name.replace('_', '-')} {value} is not {kind}: {help_of(name)}{place}"


def out_of_range(name, value, allowed, place=""):
    flag = name.replace("_", "-")
    return f"--{flag} {value} is out of range: use a value {allowed} ({help_of(name)}){place}"


def below_range(name, value, low, place=""):
    """A whole number under its range, whose upper end may be stated."""
    start = re.escape(f"--{name.replace('_', '-')} {value} is out of range: use a value ")
    end = re.escape(f" ({help_of(name)}){place}")
    return re.compile(rf"{start}(at least {low}|in \[{low}, \d+\]){end}")


def not_64_bits(name):
    return re.compile(rf"--{name.replace('_', '-')} {HUGE} is out of range: use a value .*\d\d.*")


def unknown_choice(name, value, place=""):
    allowed = setting_fields()[name].metadata
    choices = ", ".join([*allowed["groups"], *allowed["allowed"]])
    return f"unknown --{name.replace('_', '-')} '{value}': use {choices}{place}"


FROM = " (from a.yaml)"
WHOLE, NUMBER, BOOL, TEXT, NAMES = ("a whole number", "a number", "true or false", "text", "a list of names")
MAPPING = "a mapping of names to lists"
NULL_WEIGHT = f"column '{DOWN}', row 3: null: every row needs every weight"
EMPTY_FIRST = f"column '{DOWN}', row 0: null or empty where a matrix is expected"
NOT_UTF8 = re.compile(r".*a\\udcff.* UTF-8.*")
NO_PRODUCT = (
    f"column '{DOWN}' is 2 x 3 and '{UP}' 4 x 3: the rows of the first must be the columns of the second; "
    "leave out representations of the product and the gauge audit"
)
NO_ROWS = "data set './loras' has no rows"
NO_FILE = "'./loras' holds no Parquet or Arrow file, and was not written by save_to_disk"
NAMES_NOTHING = f"use {DATASET_NAMES}"


def damaged(reason, file="loras"):
    """The line of a file that cannot be read, whose reason PyArrow words."""
    return re.compile(rf"cannot (load|read) data set '\./{re.escape(file)}': .*{reason}.*")


# --- data sets

# The tables are dense, so that a case can be read at a glance: the formatter leaves them alone.
# fmt: off
GOOD_WEIGHTS = [
    accepted("nested lists", plain, data={"rows": 12, "classes": 3, "layers": 2, "overlap": False}),
    accepted("lists of fixed size", disk(lambda: stored_as(fixed)), like=plain),
    accepted("large lists", disk(lambda: stored_as(lambda *_: pa.large_list(pa.large_list(pa.float32())))),
            like=plain),
    accepted("Array2D", disk(arrays), like=plain),
    accepted("float16", disk(halves), like=plain),
    accepted("float64", disk(lambda: stored_as(lambda *_: nested(pa.float64()))), like=plain),
    accepted("int8", disk(lambda: stored_as(lambda *_: nested(pa.int8()))), like=plain),
    accepted("int64", disk(lambda: stored_as(lambda *_: INT)), like=plain),
    accepted("booleans", weights([[[i % 2 == 0, True, False]] * 2 for i in range(12)], nested(pa.bool_())),
            like=weights([[[(i + 1) % 2, 1, 0]] * 2 for i in range(12)])),
    accepted("whole number of 2**62", weights(with_weight(2**62), INT), like=weights(with_weight(2.0**62))),
    accepted("a constant layer", weights([[[1, 2, 3]] * 2] * 12), data={"layers": 2, "rows": 12}),
    accepted("down without up", without(UP), data={"layers": 1, "rows": 12}),
    accepted("up without down", without(DOWN), data={"layers": 1, "rows": 12}),
    accepted("modules that cannot be multiplied", column(UP, [[[1, 2, 3]] * 4] * 12, FLOAT)),
]
BAD_WEIGHTS = [
    refused("decimals", weights([[[Decimal(i)] * 3] * 2 for i in range(12)], nested(pa.decimal128(5))),
            no_matrix("list<item: list<item: decimal128(5, 0)>>")),
    refused("texts of numbers", weights([[["1"] * 3] * 2] * 12, nested(pa.string())),
            no_matrix("list<item: list<item: string>>")),
    refused("a matrix as text", weights(["[[1, 2, 3]]"] * 12, pa.string()), no_matrix("string")),
    refused("bytes", weights([b"abc"] * 12, pa.binary()), no_matrix("binary")),
    refused("structs", weights([{"a": 1}] * 12, pa.struct({"a": pa.float32()})),
            no_matrix("struct<a: float>")),
    refused("scalars", weights([1] * 12, pa.float32()), no_matrix("float")),
    refused("vectors", weights([[1, 2]] * 12, pa.list_(pa.float32())), no_matrix("list<item: float>")),
    refused("three dimensions", weights([[[[1, 2]]]] * 12, pa.list_(FLOAT)),
            no_matrix("list<item: list<item: list<item: float>>>")),
    refused("a column of the null type", weights([None] * 12, pa.null()), no_matrix("null")),
    refused("list views", disk(lambda: stored_as(lambda *_: pa.list_view(pa.list_view(pa.float32())))),
            re.compile(rf".*'{re.escape(DOWN)}'.*list_view<.*")),
    refused("NaN", weights(with_weight(NAN)), bad_weight("nan"), dry=False),
    refused("infinity", weights(with_weight(INF)), bad_weight("inf"), dry=False),
    refused("minus infinity", weights(with_weight(-INF)), bad_weight("-inf"), dry=False),
    refused("NaN in the last place", weights(with_weight(NAN, 11, 1, 2)),
            bad_weight("nan", "row 11: the weight at (1, 2)"), dry=False),
    refused("NaN in a list of fixed size", weights(with_weight(NAN), fixed(2, 3)), bad_weight("nan"),
            dry=False),
    refused("beyond float32", weights(with_weight(1e300), nested(pa.float64())), bad_weight("inf"),
            dry=False),
    refused("a null weight", weights(with_weight(None)), NULL_WEIGHT, dry=False),
    refused("a null weight in a list of fixed size", weights(with_weight(None), fixed(2, 3)), NULL_WEIGHT,
            dry=False),
    refused("a null whole number", weights(with_weight(None), INT), bad_weight("nan"), dry=False),
    refused("a null row", weights(matrices(at={3: None})), NULL_WEIGHT, dry=False),
    refused("a null line", weights(matrices(at={3: [None, [1, 2, 3]]})), NULL_WEIGHT, dry=False),
    refused("more lines", weights(matrices(at={5: [[1, 2, 3]] * 3})), other_shape(5, 3, 2), dry=False),
    refused("fewer lines", weights(matrices(at={5: [[1, 2, 3]]})), other_shape(5, 1, 2), dry=False),
    refused("longer lines", weights(matrices(at={5: [[1, 2, 3, 4]] * 2})), other_shape(5, 4, 3), dry=False),
    refused("ragged with the right total", weights(matrices(at={5: [[1, 2, 3, 4], [1, 2]]})),
            other_shape(5, 4, 3), dry=False),
    refused("transposed", weights(matrices(at={5: [[1, 2]] * 3})), other_shape(5, 3, 2), dry=False),
    refused("an empty matrix", weights(matrices(at={5: []})), other_shape(5, 0, 2), dry=False),
    refused("empty lines", weights(matrices(at={5: [[], []]})), other_shape(5, 0, 3), dry=False),
    refused("another shape from the second row on", weights(matrices(at={0: [[1, 2, 3]]})),
            other_shape(1, 2, 1), dry=False),
    refused("a ragged first row", weights(matrices(at={0: [[1, 2, 3, 4], [1, 2]]})), RAGGED_FIRST),
    refused("ragged whole numbers", weights(matrices(at={5: [[1, 2, 3, 4], [1, 2]]}), INT),
            f"column '{DOWN}', row 5: not a matrix of 2 x 3 as in the first row", dry=False),
    refused("a first row of ragged whole numbers", weights(matrices(at={0: [[1, 2, 3, 4], [1, 2]]}), INT),
            RAGGED_FIRST),
    refused("a null first row", weights(matrices(at={0: None})), EMPTY_FIRST),
    refused("an empty first row", weights(matrices(at={0: []})), EMPTY_FIRST),
    refused("a null first line", weights(matrices(at={0: [None, [1, 2, 3]]})), EMPTY_FIRST),
    refused("rank 0", weights([[]] * 12), EMPTY_FIRST),
    refused("rank 0 of fixed size", weights([[]] * 12, fixed(0, 3)), EMPTY_FIRST),
    refused("rank 0 of up", column(UP, [[[]] * 4] * 12, FLOAT), EMPTY_FIRST.replace(DOWN, UP)),
    refused("no layer", without(*SHAPES), "data set './loras' has no LoRA layer: expected columns such as "
            f"'...lora.down.weight', found {LABEL}"),
    refused("a layer twice", disk(lambda: twice(DOWN)),
            re.compile(rf".*{re.escape(DOWN)}.* (2 times|twice).*")),
    refused("products of half a module", without(UP),
            "nothing can be computed: 1 layers of all_layers are there "
            f"without the other half of their module, such as '{DOWN}'; choose other --representations or "
            "--layer-sets", "--representations", "product_norms"),
    refused("products that cannot be", column(UP, [[[1, 2, 3]] * 4] * 12, FLOAT), NO_PRODUCT,
            "--representations", "product_norms"),
    refused("a gauge audit that cannot be", column(UP, [[[1, 2, 3]] * 4] * 12, FLOAT), NO_PRODUCT, "--audit",
            "gauge"),
    refused("no text layer", plain,
            "data set './loras' has no layer for --layer-sets text_only: leave it out", "--layer-sets",
            "all_layers", "text_only"),
    refused("blocks without attention", disk(lambda: loras(columns={DOWN: None, UP: None,
            "unet.mid_block.ff.lora.down.weight": pa.array(matrices(), FLOAT)})),
            re.compile("data set './loras' has no .*--layer-sets by_block.*"), "--layer-sets", "by_block"),
    refused("layers of an unknown model", disk(lambda: loras(columns={DOWN: None, UP: None,
            "ff.lora.down.weight": pa.array(matrices(), FLOAT)})),
            re.compile("data set './loras': .*--layer-sets visual_only .* the architecture is unknown.*"
                       "begin with ff.*layer_sides: .*--layer-sets all_layers"),
            "--layer-sets", "visual_only"),
    refused("layers of another model than stated", plain,
            re.compile("data set './loras': .*because no layer has a name as Wan has them.*"),
            "--architecture", "wan", "--layer-sets", "visual_only"),
]
ROWS = [
    accepted("two rows", disk(lambda: loras(2)), data={"rows": 2, "classes": 2, "overlap": True}),
    accepted("ten rows", disk(lambda: loras(10)), data={"rows": 10, "classes": 3, "overlap": True}),
    accepted("eleven rows", disk(lambda: loras(11)), data={"rows": 11, "classes": 3, "overlap": False}),
    refused("one row", disk(lambda: loras(1)),
            f"column '{LABEL}' of data set './loras' has one class (cat): two or more are needed", dry=False),
    refused("no row", disk(lambda: loras(0)), NO_ROWS),
    refused("no row in Parquet", tree({"a.parquet": rows(0, 0)}), NO_ROWS),
    refused("no column", disk(lambda: pa.table({})), NO_ROWS),
    refused("no column in Parquet", tree({"a.parquet": lambda: pa.table({})}), NO_ROWS),
    accepted("one file of two without rows", tree({"a.parquet": rows(0, 0), "b.parquet": loras}), like=plain),
]
LABELS = [
    accepted("large texts", labels(["a", "b"] * 6, pa.large_string()), data={"classes": 2}),
    accepted("a dictionary", labels(["cat", "dog", "ape"] * 4, pa.dictionary(pa.int32(), pa.string())),
            like=plain),
    accepted("100,000 characters", labels(["a" * 100_000, "b"] * 6), data={"classes": 2}),
    accepted("a class for each row", labels([f"c{i}" for i in range(12)]), data={"classes": 12}),
    accepted("unsigned 64-bit numbers", labels([0, 2**64 - 1] * 6, pa.uint64()),
            data={"classes": 2, "label_mapping": {"0": 0, str(2**64 - 1): 1}}),
    accepted("the least 64-bit number", labels([1, -(2**63)] * 6),
            data={"classes": 2, "label_mapping": {str(-(2**63)): 0, "1": 1}}),
    accepted("small numbers", labels([10, 9, -1] * 4, pa.int8()),
            data={"label_mapping": {"-1": 0, "9": 1, "10": 2}}),
    accepted("numbers as texts", labels(["10", "9", "nan"] * 4),
            data={"label_mapping": {"10": 0, "9": 1, "nan": 2}}),
    accepted("two unicode forms", labels(["\u00e9", "e\u0301"] * 6), data={"classes": 2}),
    accepted("a space at the end", labels(["a", "a "] * 6), data={"label_mapping": {"a": 0, "a ": 1}}),
    accepted("an empty text", labels(["", "a"] * 6), data={"label_mapping": {"": 0, "a": 1}}),
    accepted("line breaks, tabs and NULs", labels(["a\nb", "a\tb", "a\0"] * 4), data={"classes": 3}),
    accepted("words for nothing", labels(["None", "NaN", "null"] * 4), data={"classes": 3}),
    accepted("a ClassLabel", class_labels([0, 1, 2] * 4), data={"label_mapping": {"x": 0, "y": 1, "z": 2}}),
    accepted("a column with an odd name", column("my label\n", ["a", "b"] * 6), "--label-column",
            "my label\n", data={"classes": 2}),
    refused("a ClassLabel of -1", class_labels([0, 1, -1] * 4),
            f"column '{LABEL}', row 2: no label: leave out unlabelled rows", dry=False),
    refused("a ClassLabel without a name", class_labels([0, 1, 7] * 4),
            re.compile(f"column '{LABEL}', row 2: .*7.*"), dry=False),
    refused("a ClassLabel with a name twice", class_labels([0, 1, 2] * 4, ("x", "x", "z")),
            re.compile("cannot load data set './loras': Some label names are duplicated.*"), dry=False),
    refused("no UTF-8", disk(lambda: loras(columns={LABEL: not_utf8()})),
            re.compile(f"column '{LABEL}', row 6: .*UTF-8.*"), dry=False),
    refused("no UTF-8 in Parquet", tree({"a.parquet": lambda: loras(columns={LABEL: not_utf8()})}),
            re.compile(f"column '{LABEL}', row 6: .*UTF-8.*"), dry=False),
    refused("one null", labels(["a", "b", None] * 4),
            f"column '{LABEL}', row 2: null: every row needs a label", dry=False),
    refused("the null type", labels([None] * 12), re.compile(f"column '{LABEL}'.*null.*")),
    refused("one class", labels(["a"] * 12),
            f"column '{LABEL}' of data set './loras' has one class (a): two or more are needed", dry=False),
    refused("floats", labels([1.0, 2.0] * 6), bad_label_type("double")),
    refused("truth values", labels([True, False] * 6), bad_label_type("bool")),
    refused("lists", labels([["a"], ["b"]] * 6), bad_label_type("list<item: string>")),
    refused("structs", labels([{"a": 1}, {"a": 2}] * 6), bad_label_type("struct<a: int64>")),
    refused("bytes", labels([b"a", b"b"] * 6), bad_label_type("binary")),
    refused("days", labels([date(2020, 1, 1), date(2021, 1, 1)] * 6), bad_label_type("date32[day]")),
    refused("moments", labels([datetime(2020, 1, 1), datetime(2021, 1, 1)] * 6),
            bad_label_type("timestamp[us]")),
    refused("decimals", labels([Decimal(1), Decimal(2)] * 6), bad_label_type("decimal128(1, 0)")),
    refused("a layer", plain, bad_label_type("list<item: list<item: float>>", DOWN), "--label-column", DOWN),
    refused("no such column", plain,
            f"data set './loras' has no column 'concept': give --label-column, one of {LABEL}",
            "--label-column", "concept"),
    refused("no column at all", without(LABEL),
            re.compile(rf"data set './loras' has no column '{LABEL}': .*")),
    refused("the column twice", disk(lambda: twice(LABEL)), re.compile(f".*{LABEL}.* (2 times|twice).*")),
]
GROUPED = ("--group-column", "g", "--split", "grouped")
METADATA = ("--controls", "metadata", "--metadata-columns", "m")
NOT_NUMERIC = re.compile("--metadata-columns m is not numeric in data set './loras': (?!use none).*")
FEW_GROUPS = re.compile(r"--split grouped .*\b(one|two|1|2) groups?\b.*")
OTHER_COLUMNS = [
    accepted("groups of lists", column("category_name", [["a"], ["b"], ["c"]] * 4), like=plain),
    accepted("groups of NaN", column("category_name", [1.0, 2.0, NAN] * 4), like=plain),
    accepted("groups of bytes", column("category_name", [b"\xff", b"b"] * 6), like=plain),
    accepted("no group in any row", column("g", [None] * 12), *GROUPED, data={"rows": 12}),
    refused("groups that are no UTF-8", disk(lambda: loras(columns={"category_name": not_utf8()})),
            re.compile("column 'category_name', row 6: .*UTF-8.*"), dry=False),
    refused("no group column", plain,
            f"data set './loras' has no column 'g': give --group-column, one of {LABEL}", "--group-column",
            "g"),
    refused("grouped without groups", plain, "--split grouped needs a column of groups: give --group-column",
            "--split", "grouped"),
    refused("one group", column("g", ["a"] * 12), FEW_GROUPS, *GROUPED, dry=False),
    refused("two groups", column("g", ["a", "b"] * 6), FEW_GROUPS, *GROUPED, dry=False),
    refused("a class of one row", labels(["a"] * 11 + ["b"]),
            re.compile("--split stratified .*class '?b'? .*"), "--split", "stratified", dry=False),
    accepted("texts as metadata", column("num_images", ["1", "2"] * 6), "--controls", "metadata",
            data={"skipped": ["no_layers_metadata"]}),
    accepted("infinite metadata", column("m", [INF, -INF] * 6), *METADATA,
            data={"skipped": ["no_layers_metadata"]}),
    accepted("missing metadata", column("m", [None] * 12, pa.float32()), *METADATA,
            data={"skipped": ["no_layers_metadata"]}),
    accepted("metadata that are NaN in some rows", column("m", [NAN, 1.0] * 6), *METADATA,
            data={"skipped": []}),
    accepted("truth values as metadata", column("m", [True, False] * 6), *METADATA, data={"skipped": []}),
    accepted("unsigned 64-bit metadata", column("m", [2**64 - 1, 1] * 6, pa.uint64()), *METADATA,
            data={"skipped": []}),
    refused("metadata of text", column("m", ["1", "2"] * 6), NOT_NUMERIC, *METADATA),
    refused("metadata of lists", column("m", [[1], [2]] * 6), NOT_NUMERIC, *METADATA),
    refused("metadata of days", column("m", [date(2020, 1, 1)] * 12), NOT_NUMERIC, *METADATA),
    refused("metadata of text beside numbers",
            disk(lambda: loras(columns={"m": pa.array(["1"] * 12), "steps": pa.array(range(12))})),
            "--metadata-columns m is not numeric in data set './loras': use steps", *METADATA),
    refused("no such metadata", column("steps", range(12)),
            "--metadata-columns m is not there in data set './loras': use steps", *METADATA),
    refused("the label as metadata", labels([1, 2, 3] * 4),
            re.compile(f"--metadata-columns {LABEL} is the label in data set './loras': (?!use none).*"),
            "--metadata-columns", LABEL),
    refused("a layer as metadata", plain,
            re.compile(f"--metadata-columns {re.escape(DOWN)} is (?!not there).*"), "--metadata-columns",
            DOWN),
    refused("more folds than rows", plain, "--folds 13 are more than the 12 rows of the data set", "--folds",
            "13", "--num-runs", "13"),
    refused("folds of nine rows", disk(lambda: loras(9)),
            "--folds needs 11 rows or more: the data set has 9", "--folds", "2", "--num-runs", "2"),
    refused("folds of small classes", plain, "--folds 5 needs 5 rows of each class: one has 4", "--folds",
            "5", "--num-runs", "5", dry=False),
]
MISSING_SHARD = re.compile(r".*(train|data)-0000[01]-of-00002\.(parquet|arrow).*")
DAMAGED_SECOND = re.compile(r"cannot (load|read) data set './loras': .*b\.parquet.*")
STATE_FILE = re.compile(r"cannot (load|read) data set '(\./)?loras': .*state\.json.*")
DICT_FILE = re.compile(r"cannot (load|read) data set '(\./)?loras': .*dataset_dict\.json.*")
INFO_FILE = re.compile(r"cannot (load|read) data set '(\./)?loras': .*dataset_info\.json.*")
NO_FOOTER = "Parquet magic bytes not found in footer.*"
FILES = [
    accepted("two shards", two_shards, like=plain),
    accepted("two Parquet shards", tree(TWO_SHARDS), like=plain),
    accepted("Parquet in nested folders", tree({"a/b.parquet": rows(0, 5), "x/y/z/a.parquet": rows(5, 12)}),
            like=plain),
    accepted("columns in another order",
            tree({"a.parquet": rows(0, 6), "b.parquet": lambda: rows(6, 12)().select([LABEL, UP, DOWN])}),
            like=plain),
    accepted("float32 beside float64", tree({"a.parquet": rows(0, 6),
            "b.parquet": lambda: stored_as(lambda *_: nested(pa.float64())).slice(6)}), like=plain),
    accepted("Arrow with a footer", tree({"a.arrow": lambda: arrow_bytes(pa.ipc.new_file)}), like=plain),
    accepted("a folder named as a file", tree({"a.parquet/b.parquet": loras}, "./loras/a.parquet"),
            like=plain),
    accepted("a cache file beside the shards",
            spoilt(plain, lambda folder: write_arrow(loras(30), folder / "cache-1234.arrow")), like=plain),
    accepted("one split", splits("only"), like=plain),
    accepted("train of two splits", splits("test", "train"), data={"rows": 13}),
    accepted("the split that is asked for", splits("a", "b"), "--data-split", "b", data={"rows": 13}),
    accepted("a part of a split", tree({"a.parquet": loras}), "--data-split", "train[:50%]",
            data={"rows": 6}),
    refused("no split", splits(), re.compile("data set './loras' has no split.*")),
    refused("no train split", splits("a", "b"),
            "data set './loras' has several splits and none is 'train': give --data-split, one of a, b"),
    refused("no such split", splits("a", "b"), "data set './loras' has no split 'c': use one of a, b",
            "--data-split", "c"),
    refused("no such split of files", tree({"a.parquet": loras}),
            "data set './loras' has no split 'test': use one of train", "--data-split", "test"),
    refused("a part that is none", tree({"a.parquet": loras}), re.compile(r".*train\[:5x\].*"),
            "--data-split", "train[:5x]"),
    refused("a split of a single data set", plain,
            "data set './loras' has no split 'test': it has none; leave out --data-split", "--data-split",
            "test"),
    refused("a split without its folder",
            spoilt(splits("train"), replaced("dataset_dict.json", '{"splits": ["train", "test"]}')),
            re.compile(".*loras/test.*")),
    refused("dataset_dict.json cut off", spoilt(splits("train"), replaced("dataset_dict.json", "{")),
            DICT_FILE),
    refused("dataset_dict.json without splits", spoilt(splits("train"), replaced("dataset_dict.json", "{}")),
            DICT_FILE),
    refused("state.json cut off", spoilt(plain, replaced("state.json", "{")), STATE_FILE),
    refused("state.json empty", spoilt(plain, replaced("state.json", "{}")), STATE_FILE),
    refused("state.json of a list", spoilt(plain, replaced("state.json", "[]")), STATE_FILE),
    refused("dataset_info.json cut off", spoilt(plain, replaced("dataset_info.json", "{")), INFO_FILE),
    refused("no dataset_info.json", spoilt(plain, lambda folder: (folder / "dataset_info.json").unlink()),
            INFO_FILE),
    refused("a shard missing",
            spoilt(two_shards, lambda folder: (folder / "data-00001-of-00002.arrow").unlink()),
            MISSING_SHARD),
    refused("every shard missing", spoilt(plain, lambda folder: (folder / SHARD).unlink()),
            re.compile(f".*{SHARD}.*")),
    refused("a Parquet shard missing", tree({FIRST: rows(0, 5)}), MISSING_SHARD),
    refused("the first Parquet shard missing", tree({SECOND: rows(5, 12)}), MISSING_SHARD),
    refused("an Arrow shard missing", tree({"data-00001-of-00002.arrow": rows(0, 5)}), MISSING_SHARD),
    refused("shards of two counts", tree(TWO_SHARDS | {"train-00000-of-00001.parquet": loras}),
            re.compile(r".*\btrain\b.*")),
    refused("Parquet beside Arrow", tree({"a.parquet": loras, "b.arrow": loras}),
            "'./loras' holds both Parquet and Arrow files: give a folder of one kind"),
    refused("Parquet cut off", tree({"a.parquet": lambda: parquet_bytes()[:-20]}), damaged(NO_FOOTER)),
    refused("a Parquet file cut off",
            tree({"a.parquet": lambda: parquet_bytes()[:-20]}, "./loras/a.parquet"),
            damaged(NO_FOOTER, "loras/a.parquet")),
    refused("one of two files cut off",
            tree({"a.parquet": loras, "b.parquet": lambda: parquet_bytes()[:-20]}), DAMAGED_SECOND),
    refused("one of two files empty", tree({"a.parquet": loras, "b.parquet": text(b"")}), DAMAGED_SECOND),
    refused("Arrow cut off", tree({"a.arrow": lambda: arrow_bytes()[:-500]}),
            damaged(".*bytes for message.*")),
    refused("Arrow cut off in its header", tree({"a.arrow": lambda: arrow_bytes()[:100]}),
            damaged("Not an Arrow file")),
    refused("a saved data set cut off",
            spoilt(plain, lambda folder: (folder / SHARD).write_bytes(arrow_bytes()[:-500])),
            damaged(".*bytes for message.*")),
    refused("an empty Parquet file", tree({"a.parquet": text(b"")}), damaged("Parquet file size is 0 bytes")),
    refused("an empty Arrow file", tree({"a.arrow": text(b"")}), damaged("File is too small: 0")),
    refused("an empty file of a saved data set", spoilt(plain, replaced(SHARD, "")),
            damaged("(Tried reading schema message, was null or length 0|File is too small: 0)")),
    refused("text in a Parquet file", tree({"a.parquet": text(b"cat,1\n")}),
            damaged("Parquet (file size is 6 bytes, smaller|magic bytes not found in footer).*")),
    refused("text in an Arrow file", tree({"a.arrow": text(b"label,weight\ncat,1\n")}),
            damaged("Not an Arrow file")),
    refused("a file without a layer",
            tree({"a.parquet": rows(0, 6), "b.parquet": lambda: loras(columns={UP: None})}),
            f"column '{UP}', row 6: null: every row needs every weight"),
    refused("a file of another shape", tree({"a.parquet": rows(0, 6),
            "b.parquet": lambda: loras(columns={DOWN: pa.array([[[1, 2]]] * 12, FLOAT)})}),
            other_shape(6, 1, 2), dry=False),
    refused("a file in capitals", tree({"a.PARQUET": parquet_bytes}), NO_FILE),
    refused("a folder of CSV", tree({"a.csv": text(b"a,b\n")}), NO_FILE),
    refused("an empty folder", tree({}), NO_FILE),
    refused("a CSV file", tree({"a.csv": text(b"a,b\n")}, "./loras/a.csv"),
            "'./loras/a.csv' is neither Parquet "
            "nor Arrow: give a file that ends in .parquet or .arrow, or a folder of them"),
    refused("--revision of a folder", plain,
            "--revision main needs a data set on the Hub, './loras' is local", "--revision", "main"),
]
PATHS = [
    accepted(f"a path with {what}", parquet_named(f"{name}.parquet"), like=plain)
    for what, name in [
        ("a space", "a b"),
        ("a percent sign", "50%20"),
        ("brackets", "x[1]"),
        ("a star", "s*"),
        ("braces", "{a,b}"),
        ("unicode", "\u00fcn\u00ef \U0001f642"),
        ("quotes", "q'\"q"),
        ("a backslash", "a\\b"),
        ("a tab", "a\tb"),
        ("a line break", "a\nb"),
        ("a dot in front", ".hidden"),
        ("an equals sign", "a=b"),
    ]
] + [
    refused("a path with a variable", parquet_named("a$HOME.parquet"),
            "'./a$HOME.parquet': in a$HOME.parquet datasets would replace $... by a variable: rename it"),
    accepted("a path with a dollar sign", parquet_named("a$.parquet"), like=plain),
    refused("a path that is not UTF-8", parquet_named("a\udcff.parquet"), NOT_UTF8),
    refused("a folder that is not UTF-8", disk(loras, "./a\udcff"), NOT_UTF8),
    accepted("a folder with a line break", disk(loras, "./a\nb"), like=plain),
    accepted("a folder with a pattern", disk(loras, "./a %20 [b] *"), like=plain),
    accepted("a slash at the end", disk(loras, "./loras/"), like=plain),
    accepted("a folder named as Parquet", disk(loras, "./a.parquet"), like=plain),
    refused("nothing there", named("./none"), "no such file or folder: './none'"),
    refused("no file there", named("none.parquet"), "no such file or folder: 'none.parquet'"),
    refused("a link to itself", lambda: os.symlink("loop", "loop") or "./loop",
            "no such file or folder: './loop'"),
    refused("no name of a data set", named("2k"), f"unknown dataset '2k': {NAMES_NOTHING}"),
    refused("too many slashes", named("a/b/c"), f"unknown dataset 'a/b/c': {NAMES_NOTHING}"),
    refused("a space as a name", named(" "), f"unknown dataset ' ': {NAMES_NOTHING}"),
    refused("no name", named(""), "--dataset is empty: give a name"),
    refused("5,000 characters", named("x" * 5000),
            re.compile(r"cannot look for data set 'x{100}\.\.\. \(5,000 characters\)': File name too long")),
    refused("a NUL in a name", named("a\0b"), re.compile("(unknown dataset|--dataset) 'a.+b'.*: .*")),
    refused("a NUL in a path", named("./a\0b"),
            re.compile(r"(no such file or folder:|--dataset) '\./a.+b'.*")),
    refused("no such user", named("~nobody-at-all/x"),
            "cannot look for data set '~nobody-at-all/x': Could not determine home directory."),
    refused("a line break in a path", named("./a\nb"), re.compile(r"no such file or folder: '\./a.+b'")),
    refused("a line break in a name", named("a\nb"), re.compile("unknown dataset 'a.+b': .*")),
]

# --- YAML files

LISTS = "representations layer_sets controls metadata_columns classifiers train_fractions audit split".split()
BOMB = f"{LISTS[0]}: &{LISTS[0]} [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in itertools.pairwise(LISTS)
)
NO_SIDE = (
    "layer_sides: '{}': give visual or text patterns: "
    "{{visual: ['*.self_attn.*'], text: ['*.cross_attn.*']}} (from a.yaml)"
)
LAYER_SET = (
    "named_layer_sets: '{}' is no name for a layer set: use letters, digits, - and _, and none of "
    "all_layers, visual_only, text_only, random_half, by_block, down_only, up_only, no_layers (from a.yaml)"
)


def not_read(reason, place):
    """The line of a file that is no YAML, or none that is accepted; PyYAML words it."""
    return re.compile(rf"cannot read --config a\.yaml: .*{reason}.*\b{place}\b.*")


NO_LIST = re.compile("--(representations|layer-sets|controls|train-fractions) .* is not a list of names: .*")
NO_PATTERNS = re.compile(
    "(--)?named[-_]layer[-_]sets:? .*(is not a mapping of names to lists|no name|pattern).*"
)
YAML = [
    settings_of("an empty file", "", made_with={"num_runs": 1}),
    settings_of("comments alone", "# nothing yet\n", made_with={"num_runs": 1}),
    settings_of("null", "null\n", made_with={"num_runs": 1}),
    settings_of("a byte order mark", "\ufeffnum_runs: 3\n", made_with={"num_runs": 3}),
    settings_of("carriage returns", "num_runs: 3\r\nseed: 5\r\n", made_with={"num_runs": 3, "seed": 5}),
    settings_of("JSON", '{"num_runs": 3, "representations": ["simple_stats"]}', made_with={"num_runs": 3}),
    settings_of("a whole float", "num_runs: 3.0\n", made_with={"num_runs": 3}),
    settings_of("a quoted number", "num_runs: '3'\n", made_with={"num_runs": 3}),
    settings_of("bytes for a number", "num_runs: !!binary Mw==\n",
            re.compile("--num-runs b'3' is not a whole number: .*")),
    settings_of("octal", "num_runs: 010\n", made_with={"num_runs": 8}),
    settings_of("hexadecimal", "num_runs: 0x3\n", made_with={"num_runs": 3}),
    settings_of("1e-4", "learning_rate: 1e-4\n", made_with={"learning_rate": 1e-4}),
    settings_of("one name for a list", "representations: simple_stats\n",
            made_with={"representation": "simple_stats"}),
    settings_of("numbers for shares", "train_fractions: [0.5, 1]\n",
            data={"further": ["all_layers_simple_stats.train50"]}),
    settings_of("a layer set of one's own",
            "named_layer_sets: {a: '*.down.*'}\nlayer_sets: [all_layers, a]\n", data={"layers": 2}),
    settings_of("--quick beside num_runs", "num_runs: 5\n", None, "--quick", made_with={"num_runs": 3}),
    settings_of("a slip", "droput: 0.1\n", unknown_setting("droput", "did you mean 'dropout'?")),
    settings_of("a dash for _", "num-runs: 3\n", unknown_setting("num-runs", "did you mean 'num_runs'?")),
    settings_of("an unknown key", "zzzz: 1\n", unknown_setting("zzzz")),
    settings_of("a number as a key", "3: 4\n", unknown_setting("3")),
    settings_of("a flag that is no setting", "quick: true\n", unknown_setting("quick")),
    settings_of("a line break in a key", '"a\\nb": 1\n', re.compile("unknown setting 'a.+b' in a.yaml: .*")),
    settings_of("a list as a key", "? [a, b]\n: 1\n", not_read("key", "line 1, column 3")),
    settings_of("a key twice", "num_runs: 3\nnum_runs: 4\n",
            not_read("'num_runs' stands twice", "line [12], column 1")),
    settings_of("an inner key twice", "named_layer_sets: {a: ['*'], a: ['x']}\n",
            not_read("'a' stands twice", "line 1, column (19|30)")),
    settings_of("text for a number", "num_runs: ten\n", not_a(WHOLE, "num_runs", "'ten'", FROM)),
    settings_of("true for a number", "num_runs: true\n", not_a(WHOLE, "num_runs", "True", FROM)),
    settings_of("false for a float", "dropout: false\n", not_a(NUMBER, "dropout", "False", FROM)),
    settings_of("half a run", "num_runs: 2.5\n", not_a(WHOLE, "num_runs", "2.5", FROM)),
    settings_of("a list for a number", "num_runs: [3]\n", not_a(WHOLE, "num_runs", "[3]", FROM)),
    settings_of("a mapping for a number", "num_runs: {a: 3}\n", not_a(WHOLE, "num_runs", "{'a': 3}", FROM)),
    settings_of("null for a number", "num_runs:\n", not_a(WHOLE, "num_runs", "None", FROM)),
    settings_of("a day for a number", "num_runs: 2024-01-02\n",
            not_a(WHOLE, "num_runs", "datetime.date(2024, 1, 2)", FROM)),
    settings_of("Python's octal", "num_runs: 0o10\n", not_a(WHOLE, "num_runs", "'0o10'", FROM)),
    settings_of("a comma in a float", "dropout: '0,5'\n", not_a(NUMBER, "dropout", "'0,5'", FROM)),
    settings_of("infinite seed", "seed: .inf\n", not_a(WHOLE, "seed", "inf", FROM)),
    settings_of("1e400 as a seed", "seed: 1e400\n", not_a(WHOLE, "seed", "'1e400'", FROM)),
    settings_of("NaN", "dropout: .nan\n", out_of_range("dropout", "nan", "in [0, 1)", FROM)),
    settings_of("1e400", "learning_rate: 1e400\n", out_of_range("learning_rate", "inf", "above 0", FROM)),
    settings_of("no run", "num_runs: 0\n", below_range("num_runs", 0, 1, FROM)),
    settings_of("no run, and a flag", "num_runs: 0\n", below_range("num_runs", 0, 1, FROM), "--num-runs",
            "3"),
    settings_of("runs beyond 64 bits", f"num_runs: {HUGE}\n", not_64_bits("num_runs")),
    settings_of("a seed beyond 64 bits", f"seed: {HUGE}\n",
            re.compile(rf"--seed {HUGE} is out of range: .*2,?147,?483,?648.*")),
    settings_of("a number of 5,000 digits", f"seed: {'9' * 5000}\n",
            re.compile("cannot read --config a.yaml: .*")),
    settings_of("0 for false", "cache_features: 0\n", not_a(BOOL, "cache_features", "0", FROM)),
    settings_of("text for false", "cache_features: 'no'\n", not_a(BOOL, "cache_features", "'no'", FROM)),
    settings_of("no for text", "trainer: no\n", not_a(TEXT, "trainer", "False", FROM)),
    settings_of("null for text", "output_dir: ~\n", not_a(TEXT, "output_dir", "None", FROM)),
    settings_of("a float for text", "dataset: 1.5\n", not_a(TEXT, "dataset", "1.5", FROM)),
    settings_of("an empty text", "output_dir: ''\n", "--output-dir is empty: give a name (from a.yaml)"),
    settings_of("a mapping for a list", "representations: {simple_stats: x}\n", NO_LIST),
    settings_of("a mapping for controls", "controls: {down: 1}\n", NO_LIST),
    settings_of("a mapping for shares", "train_fractions: {0.5: 1}\n", NO_LIST),
    settings_of("null for a list", "representations:\n", not_a(NAMES, "representations", "None", FROM)),
    settings_of("a number for a list", "representations: 3\n",
            re.compile(".*--representations '?3'?.*(use nine|not a list of names).*")),
    settings_of("an empty list", "representations: []\n", "--representations names nothing (from a.yaml)"),
    settings_of("commas in one name", "representations: stats, spectral\n",
            unknown_choice("representations", "stats, spectral", FROM)),
    settings_of("a list in a list", "representations: [[stats]]\n",
            re.compile(".*--representations.*stats.*(use nine|not a list of names).*")),
    settings_of("null in a list", "representations: [stats, null]\n",
            re.compile(".*--representations.*None.*(use nine|not a list of names).*")),
    settings_of("a list that holds itself", "representations: &a [*a]\n",
            re.compile(".*--representations.*(use nine|not a list of names).*|cannot read --config .*")),
    settings_of("a name twice", "representations: [stats, stats]\n",
            "--representations names one twice: stats stats (from a.yaml)"),
    settings_of("a line break in a name", 'representations: ["a\\nb"]\n',
            re.compile("unknown --representations 'a.+b': use nine.*")),
    settings_of("a list for a mapping", "named_layer_sets: [a]\n",
            not_a(MAPPING, "named_layer_sets", "['a']", FROM)),
    settings_of("null as patterns", "named_layer_sets: {a: null}\n",
            not_a(MAPPING, "named_layer_sets", "{'a': None}", FROM)),
    settings_of("a mapping as patterns", "named_layer_sets: {a: {b: c}}\n", NO_PATTERNS),
    settings_of("true as a pattern", "named_layer_sets: {a: [true]}\n", NO_PATTERNS),
    settings_of("lists as patterns", "named_layer_sets: {a: [[b]]}\n", NO_PATTERNS),
    settings_of("null as a layer set", "named_layer_sets: {null: ['*']}\n", NO_PATTERNS),
    settings_of("yes as a layer set", "named_layer_sets: {yes: ['*']}\n", NO_PATTERNS),
    settings_of("a mapping that holds itself", "named_layer_sets: &a {x: *a}\n",
            re.compile(f"{NO_PATTERNS.pattern}|cannot read --config a.yaml: .*")),
    settings_of("a list for sides", "layer_sides: [a]\n", not_a(MAPPING, "layer_sides", "['a']", FROM)),
    settings_of("a mapping as a side", "layer_sides: {visual: {b: c}}\n",
            not_a(MAPPING, "layer_sides", "{'visual': {'b': 'c'}}", FROM)),
    settings_of("a side of another name", "layer_sides: {image: ['*']}\n", NO_SIDE.format("image")),
    settings_of("a side without a pattern", "layer_sides: {text: []}\n", NO_SIDE.format("text")),
    settings_of("sides beside an architecture", "layer_sides: {visual: ['*']}\narchitecture: sd\n",
            "--architecture and layer_sides both say which layers are visual: leave one out (from a.yaml)"),
    settings_of("a layer on both sides", "layer_sides: {visual: ['*'], text: ['*']}\n",
            re.compile("layer_sides: 'unet.* is visual and text by the patterns: make them narrower")),
    settings_of("a side of no layer", "layer_sides: {text: ['x*']}\n",
            re.compile("layer_sides: no layer has a name as the patterns of 'text' say; .* with unet.*")),
    settings_of("two dots as a layer set", "named_layer_sets: {'..': ['*']}\n", LAYER_SET.format("..")),
    settings_of("a path as a layer set", "named_layer_sets: {'../x': ['*']}\n", LAYER_SET.format("../x")),
    settings_of("a slash in a layer set", "named_layer_sets: {a/b: ['*']}\n", LAYER_SET.format("a/b")),
    settings_of("a taken name", "named_layer_sets: {all_layers: ['*']}\n", LAYER_SET.format("all_layers")),
    settings_of("a line break in a layer set", 'named_layer_sets: {"a\\n": ["*"]}\n',
            re.compile("named_layer_sets: 'a.+' is no name for a layer set: .*")),
    settings_of("a layer set of 300 characters",
            f"named_layer_sets: {{{'a' * 300}: ['*']}}\nlayer_sets: [{'a' * 300}]\n",
            re.compile("named_layer_sets: 'a+.*' .*characters.*")),
    settings_of("a pattern without a layer", "named_layer_sets: {a: ['x*']}\nlayer_sets: [a]\n",
            "data set './loras' has no layer for --layer-sets a: leave it out"),
    settings_of("a tab", "num_runs:\t3\n",
            not_read(r"character '\\t' that cannot start", "line 1, column 10")),
    settings_of("a list at the top", "- num_runs\n",
            "--config a.yaml holds list, not a mapping: write lines such as 'num_runs: 3'"),
    settings_of("text at the top", "num_runs\n",
            "--config a.yaml holds str, not a mapping: write lines such as 'num_runs: 3'"),
    settings_of("two documents", "seed: 3\n---\nseed: 4\n",
            not_read("expected a single document", "line 2, column 1")),
    settings_of("UTF-16", "seed: 3\n".encode("utf-16"),
            re.compile("cannot read --config a.yaml: .*utf-8.* position 0: .*")),
    settings_of("Latin-1", b"output_dir: caf\xe9\n",
            re.compile("cannot read --config a.yaml: .*position 15: .*")),
    settings_of("any bytes", bytes(range(256)), re.compile("cannot read --config a.yaml: .*")),
    settings_of("a NUL", b"seed: 3\0\n", not_read("character #x0000", "position 7")),
    settings_of("a tag of Python", "!!python/object/apply:os.system ['touch owned']\n",
            not_read("tag 'tag:yaml.org,2002:python/object/apply:os.system'", "line 1, column 1")),
    settings_of("an unknown tag", "seed: !x 3\n", not_read("tag '!x'", "line 1, column 7")),
    settings_of("a number that its tag forbids", "seed: !!int x\n",
            re.compile("cannot read --config a.yaml: .*'x'.*")),
    settings_of("a truth that its tag forbids", "cache_features: !!bool maybe\n",
            re.compile("cannot read --config a.yaml: .*maybe.*")),
    settings_of("no such day", "output_dir: 2024-13-45\n",
            "cannot read --config a.yaml: month must be in 1..12"),
    settings_of("an open bracket", "representations: [stats\n",
            not_read("flow sequence.* line 1, column 18", "line 2, column 1")),
    settings_of("an unknown alias", "seed: *x\n", not_read("alias 'x'", "line 1, column 7")),
    settings_of("an alias bomb", BOMB,
            re.compile("cannot read --config a.yaml: .*alias.*|.*list of names.*")),
    settings_of("lists for text", "dataset: [[[[x]]]]\n", not_a(TEXT, "dataset", "[[[['x']]]]", FROM)),
    settings_of("2,000 brackets", f"named_layer_sets: {'{a: ' * 2000}1{'}' * 2000}\n",
            re.compile("cannot read --config a.yaml: (maximum recursion depth.*|it is nested too deeply)")),
    settings_of("200,000 keys", "".join(f"k{i}: 1\n" for i in range(200_000)),
            re.compile("unknown setting 'k0' in a.yaml: .*|cannot read --config a.yaml: .*")),
]

# --- flags


def flag(id, error, *flags, **how):
    """A refused flag of a data set in which nothing is wrong. Without an `id` the flags name the case."""
    return refused(id or " ".join(flags)[:60], plain, error, *flags, **how)


def takes(*flags, **how):
    """An accepted flag."""
    return accepted(" ".join(flags)[:60], plain, *flags, **how)


def whole_numbers():
    """Each whole number below its range, beyond 64 bits, and as what is no whole number."""
    lows = dict.fromkeys(["num_runs", "hidden_dim", "max_epochs", "patience", "pca_components"], 1)
    lows |= {"random_halves": 1, "num_splits": 1, "sketch_size": 1, "batch_size": 2}
    lows |= {"folds": 0, "repeats": 0, "audit_rows": 0}
    odd = iter(["", "x", "nan", "inf", "1.5", "1e400", "0x10", " ", "ten", "1,000", "-inf", "1 000"])
    for name, low in lows.items():
        option = "--" + name.replace("_", "-")
        yield flag("", below_range(name, low - 1, low), f"{option}={low - 1}")
        value = next(odd)
        yield flag("", not_a(WHOLE, name, repr(value)), f"{option}={value}")
        yield flag("", not_64_bits(name), f"{option}={HUGE}")


def fractions():
    """Each number with a fraction, outside its range and as what is no number."""
    ranges = {
        "dropout": "in [0, 1)",
        "learning_rate": "above 0",
        "weight_decay": "at least 0",
        "margin": "in (0, 1]",
        "margin_share": "in [0, 1)",
    }
    bad = {
        "dropout": ["-0.1", "1.0", "nan"],
        "learning_rate": ["0.0", "-1.0", "nan", "inf"],
        "weight_decay": ["-0.1", "nan", "inf"],
        "margin": ["0.0", "1.5", "-inf"],
        "margin_share": ["-0.1", "1.0", "nan"],
    }
    odd = iter(["", "x", "0,5", "50%", "1/2"])
    for name, allowed in ranges.items():
        option = "--" + name.replace("_", "-")
        for value in bad[name]:
            yield flag("", out_of_range(name, value, allowed), f"{option}={value}")
        value = next(odd)
        yield flag("", not_a(NUMBER, name, repr(value)), f"{option}={value}")


NUMBERS = [
    *whole_numbers(),
    *fractions(),
    flag("", re.compile("--seed -1 is out of range: use a value in .*2,?147,?483,?648.*"), "--seed=-1"),
    flag("", re.compile("--seed 2147483649 is out of range: use a value in .*2,?147,?483,?648.*"), "--seed",
            "2147483649"),
    flag("", re.compile("--split-seed 4294967296 is out of range: use a value in .*4,?294,?967,?29[56].*"),
            "--split-seed", "4294967296"),
    flag("", re.compile(r"--batch-size 9223372036854775808 is out of range: use a value .*[0-9]{3}.*"),
            "--batch-size", str(2**63)),
    flag("", out_of_range("random_halves", "101", "in [1, 100]"), "--random-halves", "101"),
    flag("", out_of_range("num_splits", "1001", "in [1, 1000]"), "--num-splits", "1001"),
    flag("", out_of_range("sketch_size", "65", "in [1, 64]"), "--sketch-size", "65"),
    flag("", re.compile("(?!.*Range).*--num-runs.*"), "--num-runs=--"),
    takes("--seed", "2147483648", made_with={"seed": 2**31}),
    takes("--seed=-0", made_with={"seed": 0}),
    takes("--seed", "1", "--seed", "2", made_with={"seed": 2}),
    takes("--split-seed", "4294967295", data={"rows": 12}),
    takes("--random-halves", "100", like=plain),
    takes("--sketch-size", "64", like=plain),
    takes("--batch-size", "2", made_with={"batch_size": 2}),
    takes("--patience", "1", "--max-epochs", "1000000", made_with={"max_epochs": 1_000_000, "patience": 1}),
    takes("--num-runs", "3.0", made_with={"num_runs": 3}),
    takes("--num-runs=+2", made_with={"num_runs": 2}),
    takes("--dropout", "0", made_with={"dropout": 0}),
    takes("--dropout", "5e-324", made_with={"dropout": 5e-324}),
    takes("--weight-decay", "1e-400", made_with={"weight_decay": 0}),
    takes("--learning-rate", "5e-324", made_with={"learning_rate": 5e-324}),
    takes("--margin", "1", like=plain),
    takes("--margin", "5e-324", like=plain),
    takes("--quick", made_with={"num_runs": 3}),
]


def no_device(name):
    return f"unknown --device '{name}': use auto, cpu, cuda or cuda:N"


def refused_device(name, reason):
    return re.compile(
        f"--device {name} is refused: features are computed in float64, which {reason}.*; use auto, cpu, "
        "cuda or cuda:N"
    )


DEVICES = [
    takes("--device", "cpu", like=plain),
    takes("--device", "cpu:0", like=plain),
    flag("", re.compile("(unknown )?--device '?cpu:1'?.*: .*use .*cpu.*"), "--device", "cpu:1"),
    flag("", re.compile("(unknown )?--device '?cpu:99'?.*: .*use .*cpu.*"), "--device", "cpu:99"),
    flag("", re.compile(r"--device cuda:99 is not there: torch sees (cpu alone|cpu(, cuda:\d+ \([^()]+\))+)"),
            "--device", "cuda:99"),
    flag("", refused_device("mps", "MPS does not have"), "--device", "mps"),
    flag("", refused_device("mps:0", "MPS does not have"), "--device", "mps:0"),
    flag("", refused_device("xpu", "some Intel GPUs do not have"), "--device", "xpu"),
    flag("", refused_device("xpu:1", "some Intel GPUs do not have"), "--device", "xpu:1"),
    flag("", refused_device("xpu:1", "some Intel GPUs do not have"), "--devices", "cpu", "xpu:1"),
    *[
        flag("", no_device(name), "--device", name)
        for name in (
            "meta",
            "CPU",
            "MPS",
            "mps:x",
            "xpu:-1",
            "cudax",
            "",
            "0",
            " cpu",
            "auto:0",
            "cuda:x",
            "cuda:-1",
            f"cuda:{HUGE}",
        )
    ],
    flag("a line break in a device", re.compile("unknown --device 'c.+u': use auto, cpu, cuda or cuda:N"),
            "--device", "c\npu"),
]


def unrecognized(*flags):
    return flag("", f"unrecognized arguments: {' '.join(flags)}; see --help", *flags)


def no_share(share):
    return (
        f"--train-fractions {share} is no share of the training rows: use numbers such as 0.25, at most 1, "
        "in whole percents"
    )


def no_layer_set(name):
    return (
        f"unknown --layer-sets '{name}': use all_layers, visual_only, text_only, random_half, by_block, or "
        "name one in named_layer_sets of a --config file"
    )


WORDS = [
    unrecognized("--num-run", "3"),
    unrecognized("--num_runs", "3"),
    unrecognized("--Num-Runs", "3"),
    unrecognized("--datset", "x"),
    unrecognized("--quik"),
    unrecognized("--no-quick"),
    unrecognized("stray"),
    flag("", "unrecognized arguments: yes; see --help", "--cache-features", "yes"),
    flag("", "argument --rerun-stale: ignored explicit argument 'yes'; see --help", "--rerun-stale=yes"),
    flag("", "argument --num-runs: expected one argument; see --help", "--num-runs"),
    flag("", "argument --representations: expected at least one argument; see --help", "--representations"),
    flag("", unknown_choice("representations", "stat"), "--representations", "stat"),
    flag("", unknown_choice("representations", "stats,spectral"), "--representations", "stats,spectral"),
    flag("", unknown_choice("representations", "norms"), "--representations", "norms"),
    flag("", unknown_choice("representations", ""), "--representations", ""),
    flag("", "--representations names one twice: stats stats", "--representations", "stats", "stats"),
    flag("", no_layer_set("all"), "--layer-sets", "all"),
    flag("", no_layer_set("random_half.0"), "--layer-sets", "random_half.0"),
    flag("", no_layer_set("up_only"), "--layer-sets", "up_only"),
    flag("", "--layer-sets names one twice: all_layers all_layers", "--layer-sets", "all_layers",
            "all_layers"),
    flag("", "unknown --trainer 'fast': use auto, sequential, packed", "--trainer", "fast"),
    flag("", "unknown --trainer '': use auto, sequential, packed", "--trainer", ""),
    flag("", "unknown --precision 'float16': use float32, tf32, bfloat16", "--precision", "float16"),
    flag("", "unknown --audit 'rain': use gauge, noise", "--audit", "rain"),
    flag("", "unknown --classifiers 'forest': use linear, boosting, nearest", "--classifiers", "forest"),
    flag("", "unknown --halves-by 'svm': use mlp, linear, boosting, nearest", "--halves-by", "svm"),
    flag("", "--split names one twice: random random", "--split", "random", "random"),
    *[
        flag("", no_share(share), "--train-fractions", share)
        for share in ("0", "1.5", "0.255", "x", "nan", "inf")
    ],
    takes("--representations", "simple_stats", "--no-report", "--report", "--no-report", like=plain),
]
CONFLICTS = [
    flag("", "--precision tf32 needs a CUDA GPU: use float32 or bfloat16 on a CPU", "--precision", "tf32"),
    flag("", "--quick means 3 runs and --num-runs 3 another number: leave one out", "--quick", "--num-runs",
            "3"),
    flag("", "--watch goes with --status", "--watch"),
    flag("", "--repeats and --split auto go with --folds", "--repeats", "2"),
    flag("", "--repeats and --split auto go with --folds", "--split", "auto"),
    flag("", "--folds 1 leaves no row to train on: use 2 or more", "--folds", "1"),
    flag("", "--num-runs 3 cannot be spread evenly over --folds 2: use 2 or 4", "--folds", "2", "--num-runs",
            "3"),
    flag("", "--num-splits does not go with --folds: --repeats divides the rows again", "--folds", "5",
            "--num-splits", "2"),
    flag("", "--split auto stands alone: name the kinds, such as --split grouped random", "--folds", "2",
            "--split", "grouped", "auto"),
    flag("", "--controls down and up need one of --representations that describes single layers",
            "--controls", "up", "--representations", "product_norms"),
    flag("",
            "--classifiers need one of --representations besides kernel_ridge, which is a classifier itself",
            "--classifiers", "linear", "--representations", "kernel_ridge"),
    flag("", "--output-dir is empty: give a name", "--output-dir", ""),
    flag("", "--cache-dir is empty: give a name", "--cache-dir", ""),
    flag("", "--label-column is empty: give a name", "--label-column", ""),
    flag("a file as --output-dir",
            "cannot write to a.yaml/visual_ablation_loras: Not a directory; choose another --output-dir",
            "--output-dir", "a.yaml"),
    flag("--output-dir with a NUL", re.compile(".*--output-dir.*"), "--output-dir", "a\0b"),
    flag("--output-dir of no user", re.compile(".*--output-dir.*"), "--output-dir", "~nobody-at-all/x"),
    flag("--output-dir of 300 characters",
            re.compile("cannot write to x+/.*: File name too long; choose another --output-dir or a .*name"),
            "--output-dir", "x" * 300),
    flag("--cache-dir with a NUL", re.compile(".*--cache-dir.*"), "--cache-dir", "a\0b", "--cache-features"),
    flag("--config of nothing", re.compile("(cannot read )?--config .*(No such file|is empty).*"),
            "--config", ""),
    flag("--config of no file", "cannot read --config b.yaml: [Errno 2] No such file or directory: 'b.yaml'",
            "--config", "b.yaml"),
    flag("--config of a folder", "cannot read --config .: [Errno 21] Is a directory: '.'", "--config", "."),
    flag("--config with a NUL", re.compile("cannot read --config a.+b: embedded null byte"), "--config",
            "a\0b"),
    takes("--output-dir", "a\nb", like=plain),
]
CASES = {
    "weights": GOOD_WEIGHTS + BAD_WEIGHTS,
    "rows": ROWS,
    "labels": LABELS,
    "columns": OTHER_COLUMNS,
    "files": FILES,
    "paths": PATHS,
    "yaml": YAML,
    "numbers": NUMBERS,
    "devices": DEVICES,
    "words": WORDS,
    "conflicts": CONFLICTS,
}
# fmt: on


# --- the two questions


PARAMETERS = [
    pytest.param(case, id=f"{table}: {case.id}") for table, listed in CASES.items() for case in listed
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a cache of `datasets` elsewhere."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (place / "a.yaml").write_text("")
    return place


def ask(case, name, *more):
    """Run the program; flags and keys of the YAML file win over those of FAST."""
    own = [typed for typed in FAST if typed in case.flags or typed[2:].replace("-", "_") in case.config]
    own += ["--num-runs"] * ("--quick" in case.flags)
    fast = [word for typed, value in FAST.items() if typed not in own for word in (typed, value)]
    dataset = [] if "dataset:" in case.config else ["--dataset", name]
    return experiment.main([*dataset, *fast, "--no-report", "--no-cache-features", *case.flags, *more])


def check_refusal(status, printed, error):
    assert status == 2
    assert printed.startswith("error: ") and printed.endswith("\n")
    line = printed.removeprefix("error: ")[:-1]
    assert "\n" not in line and "\r" not in line
    if isinstance(error, re.Pattern):
        assert error.fullmatch(line), line
    else:
        assert line == error


def record_in(place):
    """The only checkpoint, or that of the table, without times and without what names the data set."""
    (path,) = place.rglob("all_layers_simple_stats.json")
    return without_times(json.loads(path.read_text()))


def numbers_of(record):
    """A record without the fingerprint of weights, which covers the type that they are stored in."""
    kept = {key: value for key, value in record.items() if key not in ("fingerprint", "made_with", "asked")}
    made_with = {key: value for key, value in record["made_with"].items() if key != "data"}
    return kept | {"made_with": made_with}


def summary_of(results):
    """What `Case.data` can ask for, from results.json."""
    return {
        "rows": results["data"]["rows"],
        "classes": results["num_classes"],
        "layers": results["num_all_layers"],
        "overlap": results["splits_overlap"],
        "label_mapping": results["label_mapping"],
        "skipped": [entry["cell"] for entry in results["skipped_cells"]],
        "further": [entry["cell"] for entry in results["further_cells"]],
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The numbers that a data set gives, computed once for each function that writes one."""
    known = {}

    def numbers(build):
        if build not in known:
            place = tmp_path_factory.mktemp("reference")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                assert ask(accepted("reference", build), build()) == 0
            known[build] = numbers_of(record_in(place))
        return known[build]

    return numbers


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_run_accepts_or_refuses(case, here, capsys, reference):
    name = case.build()
    status = ask(case, name)
    printed = capsys.readouterr().err
    if case.error is not None:
        check_refusal(status, printed, case.error)
        assert not [*here.rglob("checkpoints"), *here.rglob("results.json"), *here.rglob("owned")]
        return
    assert (status, printed) == (0, "")
    record = record_in(here)
    (results,) = here.rglob("results.json")
    summary = summary_of(json.loads(results.read_text()))
    assert {key: summary[key] for key in case.data} == case.data
    assert {key: record["made_with"][key] for key in case.made_with} == case.made_with
    if case.like:
        assert numbers_of(record) == reference(case.like)


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_dry_run_refuses_what_headers_show_and_writes_nothing(case, here, capsys):
    name = case.build()
    before = sorted(here.rglob("*"))
    status = ask(case, name, "--dry-run")
    printed = capsys.readouterr().err
    if case.error is not None and case.dry:
        check_refusal(status, printed, case.error)
    else:
        assert (status, printed) == (0, "")
    assert sorted(here.rglob("*")) == before


def test_the_table_is_as_large_as_it_should_be_and_names_no_case_twice():
    names = [f"{table} {case.id}" for table, listed in CASES.items() for case in listed]
    assert len(names) == len(set(names)) >= 160
