"""Columns that do not fit the memory: the same numbers as in memory; and how much memory is free."""

import resource

import numpy as np
import pytest
import torch
from builders import collect, lora_dataset
from datasets import concatenate_datasets
from running import cell_files

from ablation import feature_blocks, features, fit, memory, streamed
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.streamed import StreamedRows, column_blocks, joined, minibatches, stream
from ablation.task import Task, TrainingError
from ablation.training import standardise, train_runs
from checkpointing import ArrayFile, CannotWrite, Unfinished

N, D, E = 300, 600, 40
CPU = torch.device("cpu")


@pytest.fixture
def x():
    """Columns of very different sizes, one of them constant."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 4, D)
    x[:, 5] = 3.0
    return x


def streamed_from(x):
    """The rows of a tensor, made when they are asked for."""
    return stream(lambda rows, start, stop: x[rows, start:stop], *x.shape)


@pytest.mark.parametrize("group_bytes", [1, 2**30])
def test_streamed_columns_are_standardised_to_the_same_bits(x, monkeypatch, group_bytes):
    monkeypatch.setattr(streamed, "GROUP_BYTES", group_bytes)
    train = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:200]
    found = standardise(streamed_from(x), train)
    assert isinstance(found, StreamedRows) and torch.equal(found.to("cpu"), standardise(x, train))
    wide = np.delete(x.double().numpy(), 5, axis=1)
    expected = (wide - wide[train].mean(0)) / wide[train].std(0)
    assert np.abs(found.to("cpu").numpy() - expected).max() < 1e-5
    with pytest.raises(TrainingError, match="no column varies"):
        standardise(streamed_from(torch.ones(N, 3)), train)


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_streamed_runs_are_those_in_memory(x, trainer):
    order = np.random.default_rng(0).permutation(N)
    split = Split(order[:200], order[200:240], order[240:], False)
    settings = TrainingSettings(num_runs=2, max_epochs=2, hidden_dim=16, trainer=trainer)
    labels, changed = np.arange(N) % 3, x[:E] * 1.1
    in_memory = train_runs(Task(x, labels, split, 3, {"changed": changed}), settings)
    task = Task(streamed_from(x), labels, split, 3, {"changed": streamed_from(changed)})
    from_disk = train_runs(task, settings)
    for ours, theirs in zip(from_disk.runs, in_memory.runs, strict=True):
        assert ours.train_loss == theirs.train_loss and ours.val_accuracy == theirs.val_accuracy
        assert ours.predictions.keys() == {"train", "val", "test", "changed"}
        assert all(
            np.array_equal(ours.predictions[part], theirs.predictions[part]) for part in ours.predictions
        )
    with pytest.raises(TrainingError, match="600 columns of 300 rows do not fit the memory"):
        _ = task.in_memory


def test_streamed_rows_are_indexed_split_and_joined_as_tensors(x, monkeypatch):
    monkeypatch.setattr(streamed, "PIECE_VALUES", 7 * D)
    rows = streamed_from(x)
    chosen = torch.tensor([[3, 1, 4], [1, 5, 9]])
    assert torch.equal(rows[chosen].to("cpu"), x[chosen]) and rows[chosen].shape == (2, 3, D)
    assert torch.equal(rows[10:][np.array([2, 0])].to("cpu"), x[[12, 10]])
    assert [len(part) for part in rows.split(128)] == [128, 128, 44]
    assert torch.equal(rows[chosen[0]].columns(100, 300), x[chosen[0], 100:300])
    mixed = joined([rows[:5], x[50:53], rows[20:22]])
    assert torch.equal(mixed[torch.tensor([9, 0, 6, 4])].to("cpu"), x[[21, 0, 51, 4]])
    assert torch.equal(torch.cat(list(column_blocks(rows, chosen[1])), dim=1), x[chosen[1]])
    batches = list(chosen.T)
    assert all(map(torch.equal, minibatches(rows, batches, CPU), (x[batch] for batch in batches)))


def test_an_error_of_a_batch_that_is_made_ahead_is_raised():
    def fail(rows, start, stop):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(minibatches(stream(fail, 9, 2), [torch.arange(3)] * 3, CPU))


# --- the program


@pytest.fixture
def seven_rows(monkeypatch):
    """Blocks of seven rows, so that a pass over 40 rows has six."""
    from ablation import audits, extraction, reading

    for module in (audits, extraction, feature_blocks, features, fit, reading):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)


CHOSEN = ("--representations", "stats", "ensemble", "product_norms", "flat_vec", "--audit", "noise", "gauge")


def test_cells_whose_columns_stay_on_disk_are_those_in_memory(run, place, seven_rows):
    status, log = run(*CHOSEN, "--output-dir", "in_memory")
    assert status == 0 and "stay on disk" not in log
    status, log = run(*CHOSEN, "--output-dir", "on_disk", "--memory-gb", "1e-9")
    assert status == 0 and log.count("stay on disk and are read batch by batch") == 8
    assert "Cached features of the gauge audit: stats, spectral" in log and "Computing" not in log
    assert cell_files(place, output="on_disk") == cell_files(place, output="in_memory")


def test_the_pass_holds_one_block_and_the_cache_is_mapped(run, place, seven_rows, monkeypatch):
    monkeypatch.setattr(
        "ablation.features.extract_features", lambda *arguments: pytest.fail("all rows at once")
    )
    made = []
    real = feature_blocks.Block.extract
    monkeypatch.setattr(
        feature_blocks.Block, "extract", lambda block, on: (made.append(block.num_rows), real(block, on))
    )
    loaded = []
    real_load = features.FeatureCache.load
    monkeypatch.setattr(
        features.FeatureCache, "load", lambda *arguments: loaded.append(real_load(*arguments)) or loaded[-1]
    )
    assert run("--representations", "stats")[0] == 0
    assert made == [7, 7, 7, 7, 7, 5]
    mapped = [x for x, _ in loaded if x is not None]
    assert mapped and all(isinstance(x["features"], np.memmap) for x in mapped)
    assert not [*(place / ".feature_cache").rglob("rows*")]


@pytest.mark.parametrize("flags", [(), ("--features-only",)])
def test_a_cached_file_that_cannot_be_used_is_made_anew_by_blocks(run, place, seven_rows, flags):
    run("--representations", "stats", "--output-dir", "first")
    (file,) = (place / ".feature_cache").rglob("stats.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + b"x" + whole[-8:])
    status, log = run("--representations", "stats", "--output-dir", "second", *flags)
    assert status == 0 and "cached features of stats are not used" in log
    assert file.read_bytes() == whole and "stay in memory" not in log


def test_rows_are_read_from_arrow_in_any_order():
    data = collect(concatenate_datasets([lora_dataset(n=12), lora_dataset(n=18, seed=1)]), "x")
    for layer in data.layers.names[:3]:
        whole = data.weights.read_layer(layer, 0, 30).flatten(1)
        rows = torch.tensor([29, 3, 3, 0])
        assert torch.equal(data.weights.read_rows(layer, rows), whole[rows])


# --- memory


def test_free_memory_is_the_least_of_what_is_allowed(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.free_on_machine() == 5_120_000
    (tmp_path / "memory.max").write_text("4000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 500000\ninactive_file 200000\n")
    assert memory.left_in_group(tmp_path, "memory.max", "memory.current") == 1_700_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.left_in_group(tmp_path, "memory.max", "memory.current") == float("inf")
    monkeypatch.setattr(memory, "free_in_control_group", lambda: 3.0)
    assert memory.free_memory() == 3.0


def test_a_limit_of_the_address_space_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**15, 10**15))
    assert 0 < memory.free_address_space() < 10**15


def test_no_other_columns_are_made_than_those_asked_for(run, place, seven_rows, monkeypatch):
    """The spread of columns is taken in groups: each group must not make whole rows."""
    made, real = [], StreamedRows.columns

    def columns(self, start, stop):
        found = real(self, start, stop)
        whole = self.to("cpu")
        assert torch.equal(found, whole[:, start:stop])
        made.append((start, min(stop, self.width)))
        return found

    monkeypatch.setattr(streamed, "GROUP_BYTES", 1)
    monkeypatch.setattr(streamed, "COLUMN_BLOCK", 30)
    monkeypatch.setattr(StreamedRows, "columns", columns)
    for flags in (("--cache-dtype", "int8"), ("--audit", "noise")):
        chosen = ("--representations", "ensemble", "flat_vec", "--memory-gb", "1e-9")
        assert run(*chosen, *flags, "--output-dir", flags[1])[0] == 0
    assert {stop - start for start, stop in made} >= {30}


@pytest.mark.parametrize("what", ["blocks", "files"])
def test_a_disk_that_takes_no_features_costs_no_result(run, place, seven_rows, monkeypatch, what):
    run("--representations", "stats", "--output-dir", "whole", "--cache-dir", "other")

    def full(self, *arguments):
        raise CannotWrite.to(place, OSError(28, "No space left on device"))

    place_of = {"blocks": (Unfinished, "save"), "files": (ArrayFile, "append")}[what]
    with monkeypatch.context() as patch:
        patch.setattr(*place_of, full)
        status, log = run("--representations", "stats")
    assert status == 0 and "No space left on device: the features stay in memory" in log
    assert cell_files(place) == cell_files(place, output="whole")
    assert not [
        *(place / ".feature_cache").rglob("*.safetensors.*"),
        *(place / ".feature_cache").rglob("stats*"),
    ]
