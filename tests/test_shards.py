"""Parquet shards that are read one after another: the numbers of the whole, and a resumption at a shard."""

import datasets
import pytest
from builders import lora_dataset
from running import cell_files

from ablation import audits, extraction, feature_blocks, features, fit, reading, shards
from ablation.fields import InputError
from ablation.shards import ShardReader, find_shards

STATS = ("--representations", "stats", "product_norms")


@pytest.fixture
def sharded(place, monkeypatch):
    """The rows of `loras` in three shards, of which one is empty, and blocks of seven rows."""
    for module in (audits, extraction, feature_blocks, features, fit, reading, shards):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    whole = lora_dataset(n=40, signal=True)
    (place / "hub" / "data").mkdir(parents=True)
    for number, rows in enumerate((range(11), range(0), range(11, 25), range(25, 40))):
        whole.select(rows).to_parquet(place / "hub" / "data" / f"train-{number:05}-of-00004.parquet")
    return place


def test_cells_of_streamed_shards_are_those_of_the_whole(run, sharded, monkeypatch):
    assert run(*STATS, "--audit", "noise", "--output-dir", "whole")[0] == 0
    loaded = []
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **how: loaded.append(how) or real(*args, **how)
    )
    flags = (*STATS, "flat_vec", "--audit", "noise", "--output-dir", "streamed", "--streaming")
    status, log = run(*flags, dataset="./hub")
    assert status == 0 and "Skipped, it reads the weights again, which --streaming does not keep" in log
    assert loaded and all(how["streaming"] for how in loaded)
    streamed, whole = cell_files(sharded, name="hub", output="streamed"), cell_files(sharded, output="whole")
    assert without_identity(streamed) == without_identity(whole) and len(whole) == 8
    assert not list((sharded / "hf").rglob("*.arrow"))  # no copy
    status, log = run(*flags, dataset="./hub")
    assert status == 0 and "All experiments already completed" in log


def without_identity(cells):
    """Cells less the identity of the data, which is that of the files, and what hashes it."""
    for cell in cells.values():
        del cell["fingerprint"], cell["made_with"]["data"]
    return cells


def test_a_kill_at_a_shard_is_resumed_there(run, sharded, monkeypatch):
    real, opened = ShardReader.open_block, []

    def killed(self, start, stop):
        if start == 28:
            raise KeyboardInterrupt
        real(self, start, stop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardReader, "open_block", killed)
        run(*STATS, "--streaming", dataset="./hub")
    monkeypatch.setattr(ShardReader, "open_block", lambda s, a, b: opened.append(a) or real(s, a, b))
    status, log = run(*STATS, "--streaming", dataset="./hub")
    assert status == 0 and opened == [28, 35] and log.count("Reading from shard 3 of 3 on") == 1
    run(*STATS, "--output-dir", "whole")
    ours, whole = cell_files(sharded, name="hub"), cell_files(sharded, output="whole")
    assert without_identity(ours) == without_identity(whole)


def test_what_cannot_be_streamed_is_refused(run, sharded):
    for dataset, flags, reason in (
        ("./loras", (), "--streaming reads Parquet files; data set './loras' has none"),
        ("sanity-check", (), "--streaming reads Parquet files"),
        ("./hub", ("--data-split", "train[:50%]"), "takes one whole split"),
        ("./hub", ("--data-split", "test"), "has no split 'test'"),
        ("./hub", ("--label-column", "nothing"), "has no column 'nothing'"),
    ):
        status, log = run("--streaming", *flags, dataset=dataset)
        assert status == 2 and reason in log, log
    array = lora_dataset(n=12, layout="array2d")
    array.to_parquet(sharded / "array.parquet")
    status, log = run("--streaming", dataset="./array.parquet")
    assert status in (0, 2)  # an older datasets writes Array2D as a type of its own


def test_shards_that_change_while_they_are_read_are_noticed(sharded):
    found = find_shards("./hub", "", "")
    assert found.counts == [11, 14, 15] and found.num_rows == 40
    layouts = shards.layouts_of(found)
    longer = shards.Shards(found.name, found.urls, [11, 14, 20], True)
    reader = ShardReader(longer, shards.Layers(sorted(layouts), layouts), "cpu")
    reader.open_block(28, 35)
    with pytest.raises(InputError, match=r"in place of rows 35 to 41|cannot read rows 35 to 41"):
        reader.open_block(35, 42)


def test_files_on_the_hub_are_known_by_their_address(monkeypatch):
    addresses = ["hf://datasets/a/b@0123/data/train-0.parquet"]
    found = shards.Shards("a/b", addresses, [3], False)
    other = shards.Shards("a/b", [addresses[0].replace("0123", "4567")], [3], False)
    assert found.identity() == found.identity() != other.identity()
