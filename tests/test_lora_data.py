"""Names, columns, labels and splits: the Arrow path against the formatter, and everything that must be
refused.
"""

import os
import re
import shutil
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import LAYOUTS, collect, load, lora_columns, lora_dataset, split_of
from conftest import ROOT
from datasets import Array3D, Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

from ablation import collection, reading
from ablation.layers import (
    ColumnLayout,
    Layers,
    attention_kind,
    block_of,
    expand_layer_sets,
    is_layer,
    module_and_side,
    sd15_shapes,
)
from ablation.reading import ReadAhead
from ablation.settings import InputError
from ablation.sources import files_by_split, resolve_name
from ablation.splits import SplitSpec
from ablation.survey import survey


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


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


LAYER = sorted(lora_columns(1))[2]
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
    assert sum(len(sum(m, [])) for m in matrices) == 16
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
        assert reading.copy_finite(signed, target) == np.isfinite(signed).all()
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


# --- columns and labels


@pytest.mark.parametrize(
    "name, kind",
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight", "attn1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora.up.weight", "attn2"),
        ("base_model.model.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k.lora_A.weight", "attn2"),
        (
            "base_model.model.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_k.lora_B.default.weight",
            "attn1",
        ),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "attn1"),
        ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0_lora_up_weight", "attn2"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.lora.down.weight", "other"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight", "other"),
    ],
)
def test_layer_names_of_all_tools(name, kind):
    assert is_layer(name) and attention_kind(name) == kind


@pytest.mark.parametrize(
    "name",
    [
        "category_label",
        "lora.alpha",
        "lora_unet_down_blocks_0_attn1_to_q.alpha",
        "rank",
        "flora.down.weight",
        "unet.attn1.to_q.weight",
        "explora_down.weight",
    ],
)
def test_other_columns_are_no_layers(name):
    assert not is_layer(name)


@pytest.mark.parametrize(
    "down, up",
    [
        ("unet.attn1.to_q.lora.down.weight", "unet.attn1.to_q.lora.up.weight"),
        ("base.attn1.to_q.lora_A.weight", "base.attn1.to_q.lora_B.weight"),
        ("a.to_q.lora_A.default.weight", "a.to_q.lora_B.default.weight"),
        (
            "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight",
        ),
        ("a.to_q_lora.down.weight", "a.to_q_lora.up.weight"),
    ],
)
def test_the_two_layers_of_a_module_share_its_name(down, up):
    assert module_and_side(down) == (module_and_side(up)[0], "down") and module_and_side(up)[1] == "up"


def test_modules_of_a_layer_set_and_what_it_cuts_apart():
    data = collect(lora_dataset(), "x")
    assert len(data.layers.modules) == 8 and [
        len(data.layers.module_positions(name)) for name in ("all_layers", "visual_only", "text_only")
    ] == [8, 4, 4]
    for module in data.layers.modules:
        down, up = data.layers.names[module.down], data.layers.names[module.up]
        assert down.replace("down.weight", "up.weight") == up and "down.weight" in down
    assert not data.layers.without_partner("all_layers")
    lone = next(layer for layer in data.layers.names if "attn2" in layer and "up.weight" in layer)
    cut = collect(data.weights.dataset.remove_columns(lone), "x")
    assert len(cut.layers.modules) == 7 and cut.layers.without_partner("visual_only") == []
    assert (
        cut.layers.without_partner("text_only")
        == [lone.replace("up.weight", "down.weight")]
        == cut.layers.without_partner("all_layers")
    )


@pytest.mark.parametrize(
    "kind, classes",
    [("string", ["Ape", "cat", "dog"]), ("integer", [3, 7, 9]), ("classlabel", ["zebra", "apple", "mango"])],
)
def test_labels(kind, classes):
    data = collect(lora_dataset(label_kind=kind), "x")
    assert data.classes == classes
    raw = lora_dataset(label_kind=kind)
    names = (
        raw["category_label"][:]
        if kind != "classlabel"
        else [raw.features["category_label"].int2str(i) for i in raw["category_label"]]
    )
    assert [classes[i] for i in data.labels] == list(names)
    other = collect(lora_dataset(label_kind=kind), "x", label_column="group")
    assert other.classes == [f"g{i}" for i in range(5)]


def test_integer_labels_are_in_numeric_order():
    dataset = lora_dataset().remove_columns("category_label").add_column("category_label", [10, 9, 2] * 8)
    assert collect(dataset, "x").classes == [2, 9, 10]


# --- split


@pytest.mark.parametrize("n", [11, 24, 200, 1000])
@pytest.mark.parametrize("seed", [42, 7])
def test_the_split_is_the_origins_row_for_row(n, seed):
    dataset = lora_dataset(n=n, rank=1, width=2).add_column("row", list(range(n)))
    first = dataset.train_test_split(test_size=0.3, seed=seed)
    second = first["test"].train_test_split(test_size=0.67, seed=seed)
    split = split_of(n, seed)
    for ours, theirs in zip(split, (first["train"], second["train"], second["test"]), strict=False):
        assert ours.tolist() == list(theirs["row"])
    assert sorted(np.concatenate(split[:3])) == list(range(n)) and not split.overlap


def test_ten_rows_or_fewer_are_not_divided():
    for n in (2, 10):
        split = split_of(n, 42)
        assert split.overlap and all(part.tolist() == list(range(n)) for part in split[:3])
    assert not split_of(11, 42).overlap


# --- names


def test_names_that_mean_nothing_are_refused_with_what_would_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError,
        match="unknown dataset '2k': use 1k, 10k, 50k, 100k, small, digits, sanity-check, a folder written",
    ):
        load("2k")
    with pytest.raises(InputError, match="no such file or folder: './1k'"):
        load("./1k")
    (tmp_path / "notes.csv").write_text("a,b")
    with pytest.raises(InputError, match="neither Parquet nor Arrow"):
        load("notes.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot load data set 'broken.parquet'"):
        load("broken.parquet")
    with pytest.raises(InputError, match="--revision main needs a data set on the Hub"):
        load("sanity-check", revision="main")


def test_an_alias_is_the_hubs_or_embedded_even_where_a_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora_dataset().save_to_disk("1k")
    assert resolve_name("1k") == ("hub", "jacekduszenko/lora-ws-1k")
    assert resolve_name("./1k") == ("disk", "1k")
    lora_dataset().save_to_disk("digits")
    assert resolve_name("digits") == ("files", str(ROOT / "data" / "digits.parquet"))
    assert resolve_name("./digits") == ("disk", "digits")
    assert resolve_name("someone/their-loras") == ("hub", "someone/their-loras")
    assert load("./1k").num_rows == 24


def test_the_hub_is_asked_for_the_id_the_split_and_the_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: (asked.append((args, kwargs)), lora_dataset())[1]
    )
    load("50k", data_split="test", revision="v2")
    assert asked == [(("jacekduszenko/lora-ws-50k",), {"split": "test", "revision": "v2"})]


@pytest.mark.parametrize("layout", ["nested", "array2d", "fixed"])
@pytest.mark.parametrize("form", ["disk", "disk dict", "parquet", "parquet folder", "hub folder", "arrow"])
def test_every_local_form(tmp_path, form, layout):
    dataset, other = lora_dataset(layout=layout), lora_dataset(layout=layout, seed=5)
    path = tmp_path / "loras"
    if form == "disk":
        dataset.save_to_disk(path, num_shards=2)
    elif form == "disk dict":
        DatasetDict(test=other, train=dataset).save_to_disk(path)
    elif form == "parquet":
        path = tmp_path / "loras.parquet"
        dataset.to_parquet(path)
    elif form == "parquet folder":
        path.mkdir()
        dataset.select(range(10)).to_parquet(path / "a.parquet")
        dataset.select(range(10, 24)).to_parquet(path / "b.parquet")
    elif form == "hub folder":  # as `push_to_hub` lays it out, with a card
        (path / "data").mkdir(parents=True)
        (path / "README.md").write_text("---\nlicense: mit\n---\n")
        for i in range(2):
            dataset.shard(2, i, contiguous=True).to_parquet(path / "data" / f"train-{i:05}-of-00002.parquet")
        other.to_parquet(path / "data" / "test-00000-of-00001.parquet")
    else:
        path = tmp_path / "loras.arrow"
        table = dataset.with_format("arrow")[:]
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    data = load(str(path))
    expected = lora_columns()
    for layer in data.layers.names:
        assert np.array_equal(data.weights.read_layer(layer, 0, 24).numpy(), expected[layer])
    assert (
        data.files.paths
        and data.weights.content_hash() == collect(lora_dataset(), "x").weights.content_hash()
    )
    seen = survey(str(path))
    assert seen.rows == 24
    assert seen.shapes == [
        (layer, data.layers.layouts[layer].rows, data.layers.layouts[layer].cols)
        for layer in data.layers.names
    ]
    assert seen.is_copied == (not form.startswith("disk")) and not seen.is_downloaded
    if form in ("disk dict", "hub folder"):
        test = load(str(path), data_split="test")
        assert np.array_equal(test.weights.read_layer(LAYER, 0, 24).numpy(), lora_columns(seed=5)[LAYER])
        assert survey(str(path), "test").rows == 24
        assert form == "disk dict" or survey(str(path), "test[:50%]").rows == 24
        with pytest.raises(InputError, match="validation"):
            load(str(path), data_split="validation")


def test_several_splits_without_train_must_be_chosen_from(tmp_path):
    DatasetDict(a=lora_dataset(), b=lora_dataset()).save_to_disk(tmp_path / "two")
    with pytest.raises(
        InputError, match="several splits and none is 'train': give --data-split, one of a, b"
    ):
        load(str(tmp_path / "two"))
    with pytest.raises(InputError, match="several splits and none is 'train'"):
        survey(str(tmp_path / "two"))
    DatasetDict(only=lora_dataset()).save_to_disk(tmp_path / "one")
    assert load(str(tmp_path / "one")).num_rows == 24


def test_a_survey_refuses_what_a_run_would_refuse(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    lora_dataset().save_to_disk(tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:3000])
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("broken.parquet", "cannot read"),
        ("cut", "cannot read"),
        ("empty", "holds no Parquet or Arrow"),
    ):
        with pytest.raises(InputError, match=reason):
            survey(str(tmp_path / name))
        with pytest.raises(InputError):
            load(str(tmp_path / name))


def test_splits_in_folders_are_told_apart(tmp_path):
    for split, seed in (("train", 0), ("test", 5)):
        (tmp_path / split).mkdir()
        lora_dataset(seed=seed).to_parquet(tmp_path / split / "0.parquet")
    assert survey(str(tmp_path)).rows == load(str(tmp_path)).num_rows == 24


@pytest.mark.parametrize("name", ["run[1].parquet", "star*.parquet", "what?.parquet", "plain.parquet"])
def test_a_path_is_no_pattern(tmp_path, name):
    for decoy in ("run1.parquet", "starry.parquet", "whatx.parquet"):
        lora_dataset(n=30, seed=9).to_parquet(tmp_path / decoy)
    lora_dataset().to_parquet(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / name)
    assert load(str(tmp_path / name)).num_rows == survey(str(tmp_path / name)).rows == 24
    (tmp_path / "folder[1]").mkdir()
    (tmp_path / "folder[1]" / "a.parquet").write_bytes((tmp_path / name).read_bytes())
    assert load(str(tmp_path / "folder[1]")).num_rows == 24


def test_every_file_of_a_folder_counts_and_nothing_else_in_it(tmp_path, monkeypatch):
    tmp_path = tmp_path / "set"
    tmp_path.mkdir()
    lora_dataset(n=24).to_parquet(tmp_path / "a_test_set.parquet")
    lora_dataset(n=30).to_parquet(tmp_path / "other.parquet")
    lora_dataset(n=12).to_parquet(tmp_path / "more.parquet")
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path), "."):
        assert load(name).num_rows == survey(name).rows == 42
    assert load(".", data_split="test").num_rows == survey(".", "test").rows == 24
    (tmp_path / "b.arrow").write_bytes(b"")
    with pytest.raises(InputError, match="both Parquet and Arrow"):
        load(".")


@pytest.mark.parametrize(
    "file, split",
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/mine-00001-of-00002.parquet", "mine"),
        ("test/0.parquet", "test"),
        ("val.parquet", "validation"),
        ("a_dev_b.parquet", "validation"),
        ("latest.parquet", "train"),
        ("contest/x.parquet", "train"),
        ("x.parquet", "train"),
    ],
)
def test_splits_by_the_names_of_files(tmp_path, file, split):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    assert list(files_by_split(tmp_path)) == [split]


def test_labels_that_numpy_would_change(tmp_path):
    base = lora_dataset(n=12).remove_columns("category_label")
    assert collect(base.add_column("category_label", ["a", "a\0", "b"] * 4), "x").classes == ["a", "a\0", "b"]
    big = base.add_column("category_label", np.array([1, 2, 2**64 - 1] * 4, dtype=np.uint64))
    assert collect(big, "x").classes == [1, 2, 2**64 - 1]


def test_a_file_replaced_with_the_same_time_stamp_is_read_anew(tmp_path):
    """As `cp -p`, rsync and tar do; the cache of `datasets` would answer with the old rows."""
    path = tmp_path / "loras.parquet"
    lora_dataset().to_parquet(path)
    before = load(str(path)).weights.content_hash()
    stat = path.stat()
    lora_dataset(seed=4).to_parquet(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(str(path)).weights.content_hash() != before


def test_surveys_of_what_is_not_a_local_file():
    shapes = survey("50k").shapes
    assert len(shapes) == 128 and sum(rows * cols for _, rows, cols in shapes) == 99_648
    assert sum(".attn1." in layer for layer, *_ in shapes) == 64
    assert survey("someone/their-loras") is None
    data = load("sanity-check")
    assert survey("sanity-check").shapes == [
        (layer, data.layers.layouts[layer].rows, data.layers.layouts[layer].cols)
        for layer in data.layers.names
    ]
    assert (data.num_rows, len(data.layers.names), len(data.classes)) == (5, 20, 3)


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
    shapes = [
        {"rank": 2, "width": 6},
        {"rank": 6, "width": 2},
        {"rank": 3, "width": 4},
    ]  # the same twelve weights a row
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


def test_the_data_set_is_opened_with_the_torch_format():
    data = collect(lora_dataset(), "x", "cpu")
    assert data.weights.dataset.format["type"] == "torch" and data.weights.dataset.format[
        "format_kwargs"
    ] == {"device": "cpu"}


# --- splits by class and by group


def parts_of(split):
    return [set(part.tolist()) for part in split[:3]]


def test_every_kind_of_split_uses_every_row_once_and_depends_on_its_seed():
    labels, groups = np.arange(200) % 5, np.arange(200) // 8
    for kind in ("random", "stratified", "grouped"):
        first, again, other = (split_of(200, seed, kind, labels, groups) for seed in (42, 42, 43))
        train, val, test = parts_of(first)
        assert train | val | test == set(range(200)) and len(train) + len(val) + len(test) == 200
        assert abs(len(train) - 140) <= 12 and abs(len(test) - 40) <= 12
        assert parts_of(again) == [train, val, test] != parts_of(other) and first.overlap is False
    assert parts_of(split_of(200, 42)) == parts_of(split_of(200, 42, "random", labels, groups))


def test_a_stratified_split_has_every_class_in_proportion():
    labels = np.repeat(np.arange(4), [100, 50, 30, 20])
    train, val, test = split_of(200, 1, "stratified", labels)[:3]
    for part, share in ((train, 0.7), (val, 0.1), (test, 0.2)):
        assert (
            np.abs(np.bincount(labels[part], minlength=4) - share * np.array([100, 50, 30, 20])).max() <= 1.5
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_grouped_split_parts_no_group_and_leaves_every_class_to_train_on(seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(20), 15))  # two groups a class, as the digits have
    labels = groups // 2
    split = split_of(300, seed, "grouped", labels, groups)
    kinds = [set(groups[part].tolist()) for part in split[:3]]
    assert (
        not kinds[0] & kinds[1]
        and not kinds[0] & kinds[2]
        and not kinds[1] & kinds[2]
        and set.union(*kinds) == set(range(20))
    )
    assert set(labels[split.train].tolist()) == set(range(10))


def test_the_same_rows_are_seen_with_another_split_or_other_labels():
    data = collect(lora_dataset(n=60), "x", group_column="group", split_seed=7)
    assert data.view().split is data.split and data.view().labels is data.labels
    for kind in ("random", "stratified"):
        view = data.view(SplitSpec(kind, 8))
        expected = split_of(60, 8, kind, data.labels)
        assert all(np.array_equal(a, b) for a, b in zip(view.split[:3], expected[:3], strict=True))
        assert data.view(SplitSpec(kind, 8)) is view and not np.array_equal(
            view.split.train, data.split.train
        )
    shuffled = data.view(None, "shuffled")
    assert (
        sorted(shuffled.labels) == sorted(data.labels) and 0.2 < (shuffled.labels == data.labels).mean() < 0.5
    )
    assert np.array_equal(shuffled.split.test, data.split.test) and np.array_equal(
        shuffled.labels, data.view(None, "shuffled").labels
    )
    with pytest.raises(InputError, match="--split stratified is not possible here"):
        collect(lora_dataset(n=12), "x").view(SplitSpec("stratified", 1))


def test_metadata_are_the_numeric_columns_that_are_no_weights():
    rows = lora_dataset(n=24).to_dict()
    rows |= {
        "num_images": list(range(24)),
        "step_loss": [None, float("nan")] + [0.5] * 22,
        "max_train_steps": ["many"] * 24,
        "flag": [True, False] * 12,
    }
    dataset = Dataset.from_dict(rows)
    data = collect(dataset, "x", metadata_columns=("flag", "num_images"))
    assert list(data.metadata) == ["num_images", "step_loss", "flag"] and data.metadata[
        "num_images"
    ].tolist() == list(range(24))
    assert (
        np.isnan(data.metadata["step_loss"][:2]).all()
        and data.metadata["step_loss"][2] == 0.5
        and data.metadata["flag"].tolist() == [1, 0] * 12
    )
    assert collect(lora_dataset(n=24), "x").metadata == {}
    numbered = Dataset.from_dict(rows | {"category_label": list(np.arange(24) % 2)})
    for column, reason in (
        ("group", "is not numeric in data set 'x': use num_images, step_loss, flag"),
        ("nothing", "is not there"),
        ("category_label", "is the label"),
    ):
        with pytest.raises(InputError, match=reason):
            collect(numbered, "x", metadata_columns=(column,))


def test_splits_that_cannot_be_are_refused():
    labels = np.arange(40) % 2
    with pytest.raises(InputError, match="--split grouped needs a column of groups: give --group-column"):
        split_of(40, 42, "grouped", labels)
    with pytest.raises(InputError, match="--split grouped is not possible here"):
        split_of(40, 42, "grouped", labels, np.zeros(40, dtype=int))
    with pytest.raises(InputError, match="--split stratified is not possible here"):
        split_of(40, 42, "stratified", np.array([0] * 39 + [1]))


def test_groups_are_numbered_by_value_and_rows_without_one_are_alone():
    rows = lora_dataset(n=12).to_dict()
    rows["group"] = ["a", "b", None, "a", None, "b", "c", "a", "c", "c", "c", "c"]
    data = collect(Dataset.from_dict(rows), "x", group_column="group")
    assert data.groups.tolist() == [0, 1, 2, 0, 3, 1, 4, 0, 4, 4, 4, 4]
    assert (
        collect(Dataset.from_dict(rows), "x", group_column="category_name").groups is None
    )  # the default, where it is absent
    with pytest.raises(
        InputError, match="has no column 'leaf': give --group-column, one of category_label, group"
    ):
        collect(Dataset.from_dict(rows), "x", group_column="leaf")


# --- layer sets


def of_published_topology():
    shapes = sd15_shapes(1)
    layouts = {layer: ColumnLayout(layer, rows, cols, "float", True) for layer, rows, cols in shapes}
    return Layers([layer for layer, _, _ in shapes], layouts)


def test_random_halves_have_the_modules_of_visual_only_by_block_from_both_kinds():
    layers = of_published_topology()
    visual, seen = Counter(block_of(layers.names[i]) for i in layers.positions("visual_only")), set()
    for draw in range(5):
        chosen = layers.positions(f"random_half.{draw}")
        chosen_names = [layers.names[i] for i in chosen]
        assert Counter(map(block_of, chosen_names)) == visual and len(chosen) == 64
        assert not layers.without_partner(f"random_half.{draw}")  # whole modules
        kinds = Counter(map(attention_kind, chosen_names))
        assert kinds["attn1"] > 8 and kinds["attn2"] > 8
        assert chosen == layers.positions(f"random_half.{draw}")
        seen.add(tuple(chosen))
    assert len(seen) == 5


def test_by_block_is_one_set_for_each_block_and_kind():
    layers = of_published_topology()
    sets = expand_layer_sets(("all_layers", "by_block", "random_half"), layers.names, 2)
    blocks = [name for name in sets if name.startswith("by_block.")]
    assert sets[0] == "all_layers" and sets[-2:] == ["random_half.0", "random_half.1"] and len(blocks) == 32
    assert blocks[0] == "by_block.down_blocks.0.attentions.0.attn1"
    found = [i for name in blocks for i in layers.positions(name)]
    assert sorted(found) == list(range(128)) and {len(layers.positions(name)) for name in blocks} == {4}


@pytest.mark.parametrize(
    "layer, block",
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora.up.weight",
            "mid_block.attentions.0",
        ),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "down_blocks_1_attentions_0",
        ),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_3_attn1_to_q.lora_down.weight",
            "lora_unet_input_blocks_4_1",
        ),
    ],
)
def test_the_block_of_a_layer_in_each_style_of_names(layer, block):
    assert block_of(layer) == block


def test_named_sets_are_patterns_on_layer_names():
    layers = of_published_topology()
    layers.named_sets = {
        "queries": ("*.to_q.*",),
        "ups": ("*.up.weight",),
        "ends": ("unet.mid_block.*", "*up_blocks.3*"),
    }
    assert [len(layers.positions(name)) for name in ("queries", "ups", "ends", "unknown")] == [
        64,
        64,
        8 + 24,
        0,
    ]
    assert len(layers.without_partner("ups")) == 64 and not layers.without_partner("queries")
