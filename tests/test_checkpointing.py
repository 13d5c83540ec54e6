"""Files that are whole or not there, identities,
the feature cache, locks, and what a store makes of damage.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from running import settle

import checkpointing
from checkpointing import (
    FeatureCache,
    Held,
    Refused,
    ResultStore,
    differences,
    hash_of,
    holding,
    identify,
    replacing,
    write_bytes,
    write_json,
)

CELL = "all_layers_stats"
MADE_WITH = {"num_runs": 3, "data": "abc", "dropout": 0.5}


def saved(tmp_path, cell=CELL, made_with=MADE_WITH):
    store = ResultStore(tmp_path)
    store.prepare()
    store.save(
        cell, {"test_acc_mean": 0.25, "curve": [0.1, 1 / 3]}, {"test_predictions": np.arange(6)}, made_with
    )
    return store


# --- files


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_writer_that_is_killed_leaves_the_old_file_and_a_hidden_one_that_goes_later(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, pathlib, checkpointing\n"
        f"with checkpointing.replacing(pathlib.Path({str(path)!r})) as t:\n t.write_text('half'); "
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (leftover,) = [name for name in os.listdir(tmp_path) if name != "a.json"]
    assert leftover.startswith(".") and json.loads(path.read_text()) == {"old": 1}
    elsewhere = tmp_path / ".a.json.another-host.1.tmp"
    elsewhere.write_text("half")
    running = tmp_path / f".a.json.{socket.gethostname()}.{os.getppid()}.tmp"
    running.write_text("half")
    write_json(path, {"new": 2})
    assert sorted(os.listdir(tmp_path)) == sorted([elsewhere.name, running.name, "a.json"]), (
        "others may be writing those"
    )


def test_an_event_after_one_that_was_cut_off_has_a_line_of_its_own(tmp_path):
    path = tmp_path / "events.jsonl"
    checkpointing.append_event(path, event="a")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-9])
    checkpointing.append_event(path, event="c")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and lines[0] == whole and lines[1] == whole[:-9] + b"\n"
    assert [event["event"] for event in checkpointing.read_events(path)] == ["a", "c"]
    path.write_bytes(whole.replace(b'"a"', b'"b"'))
    assert checkpointing.read_events(path) == [], "a changed character is noticed"


def test_hashes_do_not_depend_on_the_order_of_keys():
    assert hash_of({"a": 1, "b": [0.1]}) == hash_of({"b": [0.1], "a": 1}) != hash_of({"a": 1, "b": [0.2]})
    assert hash_of(np.arange(3)) == hash_of(np.arange(3)) != hash_of(np.arange(4))


# --- identity


@pytest.fixture
def counted(tmp_path):
    calls = []
    file = tmp_path / "data.arrow"
    file.write_bytes(b"weights")
    settle(file)

    def identity(which=(), cache_dir=tmp_path / "cache", files=None):
        return identify(
            [str(file)] if files is None else files,
            list(which),
            lambda: (calls.append(1), hash_of(file.read_bytes()))[1],
            cache_dir,
        )

    return file, identity, calls


def test_unchanged_files_are_not_hashed_again(counted, tmp_path, monkeypatch):
    file, identity, calls = counted
    first, again = identity(), identity()
    assert (first[1], again[1]) == (False, True) and first[0] == again[0] and len(calls) == 1
    assert identity(which=["other rows"])[1] is False
    assert identity(cache_dir=None)[1] is False and identity(files=[])[1] is False
    # Same size and modification time, other content: the inode's own change time tells.
    stat = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = identity()
    assert changed[1] is False and changed[0] != first[0]


def test_a_file_that_was_touched_moved_or_just_written_is_hashed(counted):
    file, identity, _ = counted
    first = identity()
    os.utime(file)
    assert identity() == (first[0], False)
    assert identity() == (first[0], False), "too fresh: an edit within the same tick would go unseen"
    settle(file)
    assert identity() == (first[0], False) and identity() == (first[0], True)


def test_a_damaged_memory_is_not_believed(counted, tmp_path):
    _, identity, _ = counted
    first = identity()
    (memory,) = (tmp_path / "cache" / "identities").iterdir()
    for content in ("", "{}", "[1]", memory.read_text().replace(first[0][:4], "0000", 1)):
        memory.write_text(content)
        assert identity()[0] == first[0]


# --- feature cache


def version_one(representation):
    return {"version": 1}


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, "identity", ["a", "b"], version_one)


SHAPE = (7, 14)


def test_features_come_back_bit_for_bit(cache, tmp_path):
    features = np.random.default_rng(0).normal(size=(7, 14)).astype(np.float32)
    assert cache.load("stats", SHAPE) == (None, "")
    cache.save("stats", {"features": features})
    found, problem = cache.load("stats", SHAPE)
    assert problem == "" and found.keys() == {"features"}
    assert found["features"].dtype == np.float32 and np.array_equal(found["features"], features)
    assert [path.name for path in cache.folder.iterdir() if not path.name.startswith(".")] == [
        "stats.safetensors"
    ]
    assert FeatureCache(tmp_path, "other", ["a", "b"], version_one).load("stats", SHAPE)[0] is None


def test_features_of_other_layers_or_versions_are_not_used(cache, tmp_path):
    cache.save("stats", {"features": np.zeros((2, 14), np.float32)})
    other = FeatureCache(tmp_path, "identity", ["a", "c"], version_one)
    assert "another version" in other.load("stats", (2, 14))[1]
    assert "another shape" in cache.load("stats", (14, 2))[1]
    cache.description_of = lambda representation: {"version": 99}
    assert "another version" in cache.load("stats", (2, 14))[1]


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped in the data", "flipped in the header"])
def test_damaged_features_are_not_used(cache, damage):
    cache.save("stats", {"features": np.random.default_rng(0).normal(size=(7, 14)).astype(np.float32)})
    path = cache.path("stats")
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = b""
    elif damage == "truncated":
        content = content[:-20]
    else:
        content[-9 if "data" in damage else 30] ^= 4
    path.write_bytes(content)
    found, problem = cache.load("stats", SHAPE)
    assert found is None and problem


def test_a_file_that_grows_row_by_row_is_the_file_of_the_whole_or_none(cache):
    features = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    cache.save("stats", {"features": features})
    whole = cache.path("stats").read_bytes()
    with (
        pytest.raises(ValueError, match="of features were written"),
        cache.growing("stats", SHAPE, {}) as file,
    ):
        file.append("features", features[:5])
    assert cache.path("stats").read_bytes() == whole
    with cache.growing("stats", SHAPE, {}) as file:
        for part in (features[:3], features[3:]):
            file.append("features", part)
    assert np.array_equal(cache.load("stats", SHAPE)[0]["features"], features)


# --- results


def test_a_saved_cell_is_done_and_comes_back(tmp_path):
    store = saved(tmp_path)
    assert (
        store.state(CELL, MADE_WITH).kind == "done"
        and store.state("visual_only_stats", MADE_WITH).kind == "missing"
    )
    assert store.load(CELL)["curve"] == [0.1, 1 / 3]
    with np.load(store.predictions_path(CELL), allow_pickle=False) as arrays:
        assert arrays["test_predictions"].tolist() == list(range(6))


def test_a_cell_from_before_there_were_other_splits_has_a_random_one(tmp_path):
    store = saved(tmp_path)
    assert store.state(CELL, MADE_WITH | {"split_kind": "random"}).kind == "done"
    assert (
        store.state(CELL, MADE_WITH | {"split_kind": "grouped"}).why
        == "split_kind was random, is now grouped"
    )


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    store = saved(tmp_path)
    path = store.path(CELL)
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in (0, 5):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            state = store.state(CELL, MADE_WITH)
            if (
                state.kind == "done"
            ):  # the bit made no difference to the value, such as a space that became a tab
                assert json.loads(bad) == json.loads(good)
    path.write_bytes(good)
    assert store.state(CELL, MADE_WITH).kind == "done"


@pytest.mark.parametrize(
    "damage",
    ["empty", "truncated", "not json", "a list", "no predictions", "flipped predictions", "another cell's"],
)
def test_damaged_cells_are_set_aside_with_the_reason(tmp_path, damage):
    store = saved(tmp_path)
    path, predictions = store.path(CELL), store.predictions_path(CELL)
    if damage in ("empty", "truncated", "not json", "a list"):
        path.write_bytes(
            {"empty": b"", "truncated": path.read_bytes()[:-30], "not json": b"\xff\xfe", "a list": b"[]"}[
                damage
            ]
        )
    elif damage == "no predictions":
        predictions.unlink()
    elif damage == "flipped predictions":
        content = bytearray(predictions.read_bytes())
        content[40] ^= 1
        predictions.write_bytes(content)
    else:
        other = "text_only_stats"
        saved(tmp_path, other)
        os.replace(store.path(other), path)
    assert store.state(CELL, MADE_WITH).kind == "damaged"
    (line,) = store.clear({CELL: MADE_WITH}, [CELL], rerun_stale=False)
    assert "damaged checkpoint all_layers_stats" in line
    assert not path.exists() and (tmp_path / "set_aside" / "all_layers_stats.1.json").exists()
    assert (tmp_path / "set_aside" / "all_layers_stats.1.txt").read_text().startswith("damaged: ")
    saved(tmp_path)
    path.write_bytes(b"")
    store.clear({CELL: MADE_WITH}, [CELL], rerun_stale=False)
    assert (tmp_path / "set_aside" / "all_layers_stats.2.json").exists()


def test_stale_cells_stop_the_run_unless_told_otherwise(tmp_path):
    store = saved(tmp_path)
    wanted = MADE_WITH | {"num_runs": 10, "data": "xyz"}
    with pytest.raises(
        Refused,
        match=r"1 finished cells in .* were made with other settings \(num_runs was 3, is now 10; "
        r"the weights of the data set changed\): choose another --output-dir, or give --rerun-stale",
    ):
        store.clear({CELL: wanted}, [CELL], rerun_stale=False)
    assert store.path(CELL).exists()
    assert store.clear({CELL: wanted}, [], rerun_stale=False) == [], "a cell that nobody asked for stays"
    (line,) = store.clear({CELL: wanted}, [CELL], rerun_stale=True)
    assert (
        "stale" in line
        and not store.path(CELL).exists()
        and (tmp_path / "set_aside" / "all_layers_stats.1.npz").exists()
    )


def test_differences_are_told_only_for_what_is_known():
    assert differences(MADE_WITH, {"dropout": 0.5}) == []
    assert differences(MADE_WITH, {"dropout": 0.1, "new": 1}) == [
        "dropout was 0.5, is now 0.1",
        "new was None, is now 1",
    ]


# --- locks


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib, checkpointing\n"
        f"with checkpointing.holding(pathlib.Path({str(tmp_path)!r})): print('held')"
    )
    with holding(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1 and "another process holds" in other.stderr
        with pytest.raises(Held), holding(tmp_path):
            pass
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "held\n"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


def test_the_lock_of_a_cell_is_not_seen_by_ls(tmp_path):
    store = ResultStore(tmp_path)
    store.prepare()
    with checkpointing.locked(store.path(CELL)):
        assert [name for name in os.listdir(store.checkpoints) if not name.startswith(".")] == []
    write_bytes(store.path(CELL), b"x")
    assert [name for name in os.listdir(store.checkpoints) if not name.startswith(".")] == [
        "all_layers_stats.json"
    ]
