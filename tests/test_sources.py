"""Names of data sets, files by split, and surveys."""

import os

import numpy as np
import pyarrow as pa
import pytest
from builders import collect, load, lora_columns, lora_dataset
from conftest import ROOT
from datasets import DatasetDict

from ablation.data_files import files_by_split
from ablation.settings import InputError
from ablation.sources import resolve_name
from ablation.survey import survey


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


LAYER = sorted(lora_columns(1))[2]


def test_names_that_mean_nothing_are_refused_with_what_would_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="unknown dataset '2k': use 1k, 10k, 50k, 100k, small, digits, digits-named, sanity"
    ):
        load("2k")
    with pytest.raises(InputError, match=r"no such file or folder: '\./1k'"):
        load("./1k")
    (tmp_path / "notes.csv").write_text("a,b")
    with pytest.raises(InputError, match="neither Parquet nor Arrow"):
        load("notes.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"cannot load data set 'broken\.parquet'"):
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
        ("broken.parquet", "cannot be read"),
        ("cut", "cannot be read"),
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
        ("train-00000-of-00001.parquet", "train"),
        ("data/mine-00000-of-00001-0af3.parquet", "mine"),
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


@pytest.mark.parametrize(
    "files, reason",
    [
        (["train-00000-of-00003", "train-00001-of-00003"], "lacks 1 of 3 shards, such as train-00002"),
        (["parquet-train-00000-of-00002"], "lacks 1 of 2 shards, such as parquet-train-00001-of-00002"),
        (["train-00000-of-00001-aa", "train-00000-of-00001-bb"], "holds shards of 'train' twice"),
        (["train-00000-of-00001", "train-00000-of-00002"], "holds 'train' in 1 and 2 shards"),
    ],
)
def test_a_set_of_shards_is_whole_or_refused(tmp_path, files, reason):
    for file in files:
        (tmp_path / f"{file}.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=reason):
        files_by_split(tmp_path)
