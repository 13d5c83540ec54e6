"""Blocks of weights: the Arrow path against the formatter, and everything that must be refused."""

import re
import shutil
import threading

import numpy as np
import pytest
import torch
import xxhash
from builders import LAYOUTS, collect, load, lora_columns, lora_dataset
from datasets import Array3D, Dataset, Features, List, Value, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

from ablation import collection, reading
from ablation.reading import ReadAhead
from ablation.settings import InputError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


LAYER = sorted(lora_columns(1))[2]


@pytest.fixture(params=[3, reading.PIECE], ids="pieces of {}".format)
def pieces(request, monkeypatch):
    """Checks and copies that end anywhere in a matrix."""
    monkeypatch.setattr(reading, "PIECE", request.param)


def assert_both_paths_agree(data, expected=None):
    """`read_layer` and the formatter, bit for bit, in pieces that start and end anywhere."""
    n = data.num_rows
    for layer in data.layers.names:
        for start, stop in ((0, n), (1, n - 1), (n // 2, n // 2 + 1)):
            ours = data.weights.read_layer(layer, start, stop)
            assert ours.dtype == torch.float32 and ours.shape[0] == stop - start
            assert torch.equal(ours, data.weights.read_layer_formatted(layer, start, stop))
            if expected is not None:
                assert np.array_equal(ours.numpy(), expected[layer][start:stop])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrow_and_formatter_agree_bit_for_bit_in_every_layout(layout, pieces):
    data = collect(lora_dataset(layout=layout), "x")
    assert all(data.layers.layouts[layer].in_arrow for layer in data.layers.names)
    expected = lora_columns()
    if layout == "float16":
        expected = {name: w.astype(np.float16).astype(np.float32) for name, w in expected.items()}
    assert_both_paths_agree(data, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_gives_the_same_tensors_in_order(threads):
    data = collect(lora_dataset(n=30), "x")
    ahead = ReadAhead(data.weights, data.layers.names, 7, 29, threads)
    found = list(ahead)
    assert len(found) == len(data.layers.names) and ahead.waited > 0
    for layer, w in zip(data.layers.names, found, strict=True):
        assert torch.equal(w, data.weights.read_layer_formatted(layer, 7, 29))
    assert 1 <= len(data.weights.free_buffers) <= threads


def test_reading_ahead_stops_at_what_it_cannot_read():
    rows = lora_columns(n=6)
    rows[LAYER][4, 1, 1] = np.nan
    data = collect(
        Dataset.from_dict(
            {name: w.tolist() for name, w in rows.items()} | {"category_label": ["a", "b"] * 3}
        ),
        "x",
    )
    before = threading.active_count()
    with pytest.raises(InputError, match=f"column '{re.escape(LAYER)}', row 4"):
        list(ReadAhead(data.weights, data.layers.names, 0, 6, 2))
    assert threading.active_count() <= before


def test_a_buffer_is_used_again_and_large_enough_for_every_layer():
    data = collect(lora_dataset(), "x")
    with data.weights.buffer() as buffer, data.weights.buffer() as other:
        assert not np.shares_memory(buffer, other)
        for layer in data.layers.names:
            w = data.weights.read_layer(layer, 0, 24, buffer)
            assert np.shares_memory(w.numpy(), buffer) and torch.equal(
                w, data.weights.read_layer(layer, 0, 24)
            )
    with data.weights.buffer() as again:
        assert again is buffer or again is other


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ["slice", "chunks", "sliced chunks", "shuffled", "split"])
def test_sliced_chunked_and_reordered_tables(layout, change, pieces):
    whole = lora_dataset(n=30, layout=layout)
    parts = [lora_dataset(n=4, layout=layout, seed=1), whole, lora_dataset(n=3, layout=layout, seed=2)]
    dataset = {
        "slice": lambda: whole.select(range(5, 21)),
        "chunks": lambda: concatenate_datasets(parts),
        "sliced chunks": lambda: concatenate_datasets(
            [part.select(range(1, len(part) - 1)) for part in parts]
        ).select(range(1, 27)),
        "shuffled": lambda: whole.shuffle(seed=3),
        "split": lambda: whole.train_test_split(test_size=0.5, seed=1)["test"],
    }[change]()
    data = collect(dataset, "x")
    assert_both_paths_agree(data)
    layer = data.layers.names[3]
    assert np.array_equal(
        data.weights.read_layer(layer, 0, data.num_rows).numpy(),
        np.array(dataset[layer][:], dtype=np.float32),
    )


def test_what_arrow_cannot_read_goes_through_the_formatter_with_a_warning(caplog):
    rows = {"a.attn1.lora.down.weight": [[[1, 2], [3, 4]]] * 12, "category_label": ["x", "y"] * 6}
    features = Features(
        {"a.attn1.lora.down.weight": List(List(Value("int32"))), "category_label": Value("string")}
    )
    collection.log.propagate = True
    data = collect(Dataset.from_dict(rows, features=features), "x")
    assert "torch formatter" in caplog.text
    assert data.weights.read_layer(data.layers.names[0], 2, 5).tolist() == [[[1, 2], [3, 4]]] * 3
    assert len(data.weights.content_hash()) == 32


# --- refusals


def with_rows(**rows):
    base = lora_dataset(n=12).to_dict()
    for index, value in rows.get("replace", {}).items():
        base[LAYER][index] = value
    return Dataset.from_dict(base, features=lora_dataset(n=12).features)


GOOD = [[0.0] * 6] * 2


@pytest.mark.parametrize(
    "bad, reason",
    [
        ([[0.0] * 5 + [float("nan")], [0.0] * 6], r"row 7: the weight at \(0, 5\) is nan"),
        ([[0.0] * 6, [float("-inf")] + [0.0] * 5], r"row 7: the weight at \(1, 0\) is -inf"),
        ([[0.0] * 5 + [None], [0.0] * 6], "row 7: null"),
        ([[0.0] * 6, None], "row 7: null"),
        (None, "row 7: null"),
        ([[0.0] * 6], "row 7: a list of 1 where the column's first row has 2"),
        ([[0.0] * 5, [0.0] * 7], "row 7: a list of 5 where the column's first row has 6"),
        ([[0.0] * 4] * 3, "row 7: a list of 3 where the column's first row has 2"),
    ],
)
def test_bad_rows_are_named(bad, reason, pieces):
    data = collect(with_rows(replace={7: bad}), "x")
    with pytest.raises(InputError, match=f"column '{LAYER}', {reason}"):
        data.weights.read_layer(LAYER, 0, 12)
    with pytest.raises(InputError):
        data.weights.read_layer_formatted(LAYER, 0, 12)
    if "weight at" not in reason:
        with pytest.raises(InputError, match=reason):
            data.weights.content_hash()
    assert data.weights.read_layer(LAYER, 0, 7).shape == (7, 2, 6)


@pytest.mark.parametrize(
    "matrices, reason",
    [
        ([(2, 2), [[1.0, 1.0, 1.0], [1.0]], (4, 1), (1, 4)], "row 2: a list of 4"),
        ([(2, 2), [[1.0, 1.0, 1.0], [1.0]], (2, 2), (2, 2)], "row 1: a list of 3"),
        ([(2, 2), (2, 2), (4, 1), (1, 4)], "row 2: a list of 4"),
    ],
)
def test_ragged_rows_whose_totals_fit_are_refused(matrices, reason, pieces):
    matrices = [np.ones(m).tolist() if isinstance(m, tuple) else m for m in matrices]
    assert sum(np.size(row) for m in matrices for row in m) == 16
    rows = {"a.attn1.lora.down.weight": matrices * 3, "category_label": ["x", "y"] * 6}
    features = Features(
        {"a.attn1.lora.down.weight": List(List(Value("float32"))), "category_label": Value("string")}
    )
    data = collect(Dataset.from_dict(rows, features=features), "x")
    with pytest.raises(InputError, match=reason):
        data.weights.read_layer(data.layers.names[0], 0, 12)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_finite_is_what_numpy_calls_finite(values):
    values = np.array(values, dtype=np.float32)
    for signed in (values, -values):
        target = np.empty_like(signed)
        assert (
            reading.copy_largest(signed, target) == np.where(np.isnan(signed), np.inf, np.abs(signed)).max()
        )
        assert np.array_equal(target, signed, equal_nan=True)


def test_a_float64_weight_beyond_float32_is_refused():
    dataset = lora_dataset(n=12, layout="float64").to_dict()
    dataset[LAYER][4] = [[1e300] * 6] * 2
    data = collect(Dataset.from_dict(dataset, features=lora_dataset(n=12, layout="float64").features), "x")
    with pytest.raises(InputError, match="row 4: the weight at"):
        data.weights.read_layer(LAYER, 0, 12)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: lora_dataset().select([]), "no rows"),
        (lambda: lora_dataset().remove_columns(sorted(lora_columns(1))), "no LoRA layer"),
        (
            lambda: lora_dataset().remove_columns("category_label"),
            "no column 'category_label': give --label-column, one of group",
        ),
        (lambda: lora_dataset().select([0, 3, 6, 9]), "has one class"),
        (
            lambda: lora_dataset().remove_columns("category_label").add_column("category_label", [0.5] * 24),
            "holds double",
        ),
        (
            lambda: (
                lora_dataset()
                .remove_columns("category_label")
                .add_column("category_label", ["a", "b", None] * 8)
            ),
            "row 2: null",
        ),
        (
            lambda: lora_dataset(label_kind="classlabel").map(
                lambda row, i: {"category_label": -1 if i == 5 else 0}, with_indices=True
            ),
            "row 5: no label",
        ),
        (
            lambda: Dataset.from_dict(
                {"a.lora.down.weight": [[1.0, 2.0]] * 4, "category_label": list("abab")}
            ),
            "row 0: a LoRA layer is a matrix",
        ),
        (
            lambda: Dataset.from_dict({"a.lora.down.weight": [[[]]] * 4, "category_label": list("abab")}),
            "row 0: null or empty|row 0: a LoRA layer",
        ),
        (
            lambda: Dataset.from_dict(
                {"a.lora.down.weight": [[[[1.0]]]] * 4, "category_label": list("abab")},
                features=Features(
                    {"a.lora.down.weight": Array3D((1, 1, 1), "float32"), "category_label": Value("string")}
                ),
            ),
            "matrix",
        ),
    ],
)
def test_data_sets_that_cannot_be_used_are_refused(make, reason):
    with pytest.raises(InputError, match=reason):
        collect(make(), "x")


# --- identity


def test_the_content_hash_sees_weights_and_names_and_nothing_else(tmp_path):
    base = collect(lora_dataset(), "x").weights.content_hash()
    for layout in ("array2d", "fixed", "large"):
        assert collect(lora_dataset(layout=layout), "x").weights.content_hash() == base
    chunked = concatenate_datasets([lora_dataset().select(range(9)), lora_dataset().select(range(9, 24))])
    assert collect(chunked, "x").weights.content_hash() == base
    assert collect(lora_dataset(label_kind="integer"), "x").weights.content_hash() == base
    assert collect(lora_dataset(seed=1), "x").weights.content_hash() != base
    assert collect(lora_dataset(layout="float64"), "x").weights.content_hash() != base
    assert collect(lora_dataset(n=23), "x").weights.content_hash() != base
    assert (
        collect(
            lora_dataset().rename_column(LAYER, LAYER.replace("to_q", "to_k").replace("to_v", "to_w")), "x"
        ).weights.content_hash()
        != base
    )
    # The same twelve weights a row.
    shapes = [{"rank": 2, "width": 6}, {"rank": 6, "width": 2}, {"rank": 3, "width": 4}]
    hashes = set()
    for shape in shapes:
        columns = {LAYER: lora_columns(**shape)[LAYER].tolist(), "category_label": ["x", "y"] * 12}
        hashes.add(collect(Dataset.from_dict(columns), "x").weights.content_hash())
    assert len(hashes) == 3
    rows = lora_dataset().to_dict()
    rows[LAYER][11][1][2] += 1e-3
    assert (
        collect(Dataset.from_dict(rows, features=lora_dataset().features), "x").weights.content_hash() != base
    )
    lora_dataset().save_to_disk(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load(str(tmp_path / "b")).weights.content_hash() == base


@pytest.mark.parametrize("rows_at_a_time", [5, reading.HASH_ROWS])
@pytest.mark.parametrize(("layout", "stored"), [("nested", "f4"), ("float16", "f2")])
def test_the_content_hash_is_that_of_the_formatters_weights_in_order(
    layout, stored, rows_at_a_time, monkeypatch
):
    monkeypatch.setattr(reading, "HASH_ROWS", rows_at_a_time)
    data, seen = collect(lora_dataset(layout=layout), "x"), []
    digest = xxhash.xxh3_128()
    for layer in data.layers.names:
        digest.update(repr((24, *data.layers.layouts[layer])).encode())
        digest.update(data.weights.read_layer_formatted(layer, 0, 24).numpy().astype(stored).tobytes())
    assert data.weights.content_hash(lambda: seen.append(len(seen))) == digest.hexdigest()
    assert len(seen) == len(data.layers.names)


def test_the_content_hash_names_the_first_bad_row_and_ends_with_an_error_of_on_layer(monkeypatch):
    monkeypatch.setattr(reading, "HASH_ROWS", 4)
    rows = {name: w.tolist() for name, w in lora_columns(n=12).items()} | {"category_label": ["a", "b"] * 6}
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        data = collect(Dataset.from_dict(rows), "x")
        data.weights.content_hash(lambda: exec("raise KeyboardInterrupt"))
    for layer, row in ((sorted(lora_columns(1))[3], 1), (LAYER, 9), (LAYER, 6)):
        rows[layer][row] = rows[layer][row][:1]
    with pytest.raises(InputError, match=f"column '{re.escape(LAYER)}', row 6: a list of 1"):
        collect(Dataset.from_dict(rows), "x").weights.content_hash()
    assert threading.active_count() <= threads


def test_the_data_set_is_opened_with_the_torch_format():
    data = collect(lora_dataset(), "x", "cpu")
    assert data.weights.dataset.format["type"] == "torch" and data.weights.dataset.format[
        "format_kwargs"
    ] == {"device": "cpu"}
