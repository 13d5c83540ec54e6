"""Resumption, and data that changes under a finished run."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import lora_dataset
from running import (
    FAST,
    SCRIPT,
    cell_files,
    checkpoints,
    experiment_data,
    folder,
    never,
    settle,
    snapshot,
    visible,
    without_times,
)

import checkpointing
from ablation import cells_at_work, extraction, feature_blocks, features
from ablation.catalogue import SPECS
from ablation.reading import WeightReader
from checkpointing import CRASH, CannotWrite, Unfinished

# --- resuming


def test_a_finished_run_is_only_read_again(run, place, monkeypatch):
    run()
    before, results = (
        snapshot(folder(place) / "checkpoints"),
        json.loads((folder(place) / "results.json").read_text()),
    )
    manifest = (folder(place) / "manifest.json").read_bytes()
    monkeypatch.setattr(WeightReader, "read_layer", never)
    monkeypatch.setattr("ablation.training.train_one", never)
    status, log = run()
    assert status == 0 and "Total Progress:       18/18 (100.0%)" in log
    assert "All experiments already completed! Loading results from checkpoints..." in log
    assert (
        snapshot(folder(place) / "checkpoints") == before
        and json.loads((folder(place) / "results.json").read_text()) == results
    )
    assert (folder(place) / "manifest.json").read_bytes() == manifest, "how long the cells took is still told"


def test_three_deleted_cells_and_only_those_run_again(run, place, monkeypatch):
    run()
    gone = ["all_layers_ensemble.json", "visual_only_spectral.json", "visual_only_ensemble.json"]
    before, whole = snapshot(folder(place) / "checkpoints"), cell_files(place)
    for name in gone:
        (folder(place) / "checkpoints" / name).unlink()
    monkeypatch.setattr(WeightReader, "read_layer", never)  # the features are cached
    status, log = run()
    assert status == 0
    for line in (
        "All Layers Config:    8/9 completed, 1 remaining",
        "Visual-Only Config:   7/9 completed, 2 remaining",
        "Total Progress:       15/18 (83.3%)",
        "Resuming from checkpoints. Will run 3 remaining...",
    ):
        assert line in log.splitlines()
    assert log.count("Run 1/2") == 3
    after = snapshot(folder(place) / "checkpoints")
    assert {name for name in after if after[name] != before[name]} == set(gone)
    assert cell_files(place) == whole


def test_without_a_cache_only_what_is_missing_is_computed(run, place):
    run("--no-cache-features")
    assert not (place / ".feature_cache").exists()
    (folder(place) / "checkpoints" / "visual_only_stats.json").unlink()
    status, log = run("--no-cache-features")
    assert status == 0 and "Computing stats\n" in log


def test_a_folder_collects_cells_over_several_commands(run, place):
    run("--representations", "stats", "--layer-sets", "visual_only")
    _, log = run(
        "--representations", "frequency", "stats", "--layer-sets", "all_layers", "visual_only", "text_only"
    )
    assert (
        "Text-Only Config:     0/2 completed, 2 remaining" in log
        and "Total Progress:       1/6 (16.7%)" in log
    )
    run("--representations", "simple_stats", "--layer-sets", "text_only")
    results = json.loads((folder(place) / "results.json").read_text())
    assert [row["representation"] for row in results["text_only_results"]] == [
        f"{name}_text_only" for name in ("simple_stats", "stats", "frequency")
    ]
    assert [entry["representation"] for entry in results["comparison"]] == ["stats", "frequency"]


CHANGES = [
    ["--num-runs", "3"],
    ["--max-epochs", "4"],
    ["--hidden-dim", "9"],
    ["--batch-size", "9"],
    ["--dropout", "0.4"],
    ["--weight-decay", "0.01"],
    ["--learning-rate", "0.01"],
    ["--patience", "2"],
    ["--seed", "7"],
    ["--trainer", "packed"],
    ["--precision", "bfloat16"],
    ["--split-seed", "7"],
    ["--label-column", "group"],
]


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_each_setting_that_changes_a_number_makes_old_cells_stale(run, place, change):
    chosen = ["--representations", "info_theoretic"]
    run(*chosen)
    before = snapshot(folder(place) / "checkpoints")
    status, log = run(*chosen, *change)
    assert (
        status == 2
        and "were made with other settings" in log
        and "--rerun-stale" in log
        and "another --output-dir" in log
    )
    named = {"--split-seed": "rows of the split", "--label-column": "labels"}.get(
        change[0], change[0][2:].replace("-", "_")
    )
    assert named in log
    assert snapshot(folder(place) / "checkpoints") == before
    status, log = run(*chosen, *change, "--rerun-stale")
    assert status == 0 and log.count("Set aside stale checkpoint") == 2 and log.count("Run 1/") == 2
    assert len(checkpoints_set_aside(place)) == 2
    assert run(*chosen, *change)[0] == 0


def checkpoints_set_aside(place):
    return sorted(path.name for path in (folder(place) / "set_aside").glob("*.json"))


def test_settings_that_change_no_number_change_nothing(run, place):
    run("--representations", "stats")
    before = snapshot(folder(place) / "checkpoints")
    assert (
        run(
            "--representations", "stats", "--cache-dir", "elsewhere", "--device", "cpu", "--no-cache-features"
        )[0]
        == 0
    )
    assert snapshot(folder(place) / "checkpoints") == before


def test_a_new_version_of_a_representation_makes_its_cells_stale_and_the_ensembles(run, place, monkeypatch):
    run()
    monkeypatch.setitem(SPECS, "spectral", SPECS["spectral"]._replace(version=99))
    status, log = run()
    assert status == 2 and "4 finished cells" in log
    status, log = run("--rerun-stale")
    assert status == 0 and log.count("Run 1/2") == 4 and "cached features of spectral are not used" in log


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_damaged_checkpoints_are_set_aside_and_run_again(run, place, damage):
    run()
    whole = cell_files(place)
    path = folder(place) / "checkpoints" / "all_layers_stats.json"
    content = path.read_bytes()
    position = content.index(b"test_acc_mean") + len(b'test_acc_mean": 0.')
    flipped = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": flipped}[damage])
    status, log = run("--status")
    assert (
        "Total Progress:       17/18 (94.4%)" in log
        and "all_layers_stats is damaged" in log
        and path.exists()
    )
    status, log = run()
    assert (
        status == 0 and "Set aside damaged checkpoint all_layers_stats" in log and log.count("Run 1/2") == 1
    )
    assert checkpoints_set_aside(place) == ["all_layers_stats.1.json"] and cell_files(place) == whole


def test_damaged_features_are_computed_again_and_said_so(run, place):
    run("--representations", "stats")
    (path,) = (place / ".feature_cache").rglob("stats.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 64]))
    status, log = run("--representations", "stats", "--layer-sets", "text_only")
    assert status == 0 and "WARNING: cached features of stats are not used" in log
    assert path.read_bytes() == good


def test_killed_in_the_middle_and_rerun_equals_a_run_that_was_not(run, place):
    run("--output-dir", "whole")
    command = [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--output-dir", "killed"]
    done = folder(place, output="killed") / "checkpoints"
    killed = subprocess.run(command, capture_output=True, env={**os.environ, CRASH: "committed 5"})
    assert killed.returncode == -signal.SIGKILL
    finished = snapshot(done)
    assert len(finished) == 5
    status, log = run("--output-dir", "killed")
    assert status == 0 and f"Will run {18 - len(finished)} remaining..." in log
    assert {name: content for name, content in snapshot(done).items() if name in finished} == finished
    assert cell_files(place, output="killed") == cell_files(place, output="whole")


# --- the data set changes under a finished run


def test_a_data_set_rebuilt_at_the_same_path_gets_neither_old_cells_nor_old_features(run, place):
    run("--representations", "stats")
    shutil.rmtree("loras")
    lora_dataset(n=40, signal=True, seed=9).save_to_disk("loras")
    status, log = run("--representations", "stats")
    assert status == 2 and "the weights of the data set changed" in log
    status, log = run("--representations", "stats", "--rerun-stale")
    assert status == 0 and "Computing stats\n" in log
    fresh = run("--representations", "stats", "--output-dir", "fresh", "--cache-dir", "fresh_cache")
    assert fresh[0] == 0 and cell_files(place, output="fresh") == cell_files(place)


def test_one_row_changed_in_place_is_noticed(run, place):
    settle(*Path("loras").iterdir())
    run("--representations", "stats")
    assert any((place / ".feature_cache" / "identities").iterdir())
    (file,) = (place / "loras").glob("*.arrow")
    stat, content = file.stat(), file.read_bytes()
    weight = np.float32(
        experiment_data().weights.read_layer(experiment_data().layers.names[0], 7, 8)[0, 1, 2]
    ).tobytes()
    assert content.count(weight) == 1
    with file.open("r+b") as opened:
        opened.seek(content.index(weight))
        opened.write(np.float32(0.123).tobytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    status, log = run("--representations", "stats")
    assert status == 2 and "the weights of the data set changed" in log
    status, log = run("--representations", "stats", "--output-dir", "other")
    assert status == 0 and "Computing stats\n" in log


def test_the_same_data_moved_keeps_its_features(run, place, monkeypatch):
    run("--representations", "stats")
    shutil.move("loras", "elsewhere")
    monkeypatch.setattr(WeightReader, "read_layer", never)
    status, log = run("--representations", "stats", dataset="./elsewhere")
    assert status == 0 and "Cached features: stats" in log and checkpoints(place, name="elsewhere")


def test_a_parquet_file_rebuilt_at_the_same_path_is_noticed(run, place):
    lora_dataset(n=40).to_parquet("loras.parquet")
    run("--representations", "stats", dataset="loras.parquet")
    lora_dataset(n=40, seed=3).to_parquet("loras.parquet")
    later = os.stat("loras.parquet").st_mtime_ns + 10**9  # however fast this was
    os.utime("loras.parquet", ns=(later, later))
    status, log = run("--representations", "stats", dataset="loras.parquet")
    assert status == 2 and "the weights of the data set changed" in log


# --- what is told and kept besides


def test_the_status_says_that_the_data_changed_since(run, place):
    run("--representations", "stats")
    assert "changed, moved or were touched" not in run("--representations", "stats", "--status")[1]
    os.utime(next(Path("loras").glob("*.arrow")), (1, 1))
    status, log = run("--representations", "stats", "--status")
    assert status == 0 and "1 files of the data set changed, moved or were touched since the last run" in log


def test_cached_features_are_as_readable_as_other_files(run, place):
    run("--representations", "stats")
    (features,) = (place / ".feature_cache").rglob("*.safetensors")
    results = folder(place) / "results.json"
    assert stat.S_IMODE(features.stat().st_mode) == stat.S_IMODE(results.stat().st_mode)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"{", b'{"failed_cells": 3}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["results.json", "manifest.json"])
def test_a_damaged_file_of_results_is_set_aside_and_made_again(run, place, name, content):
    run("--representations", "stats")
    path = folder(place) / name
    before = without_times(json.loads(path.read_text()))
    path.write_bytes(content)
    status, log = run("--representations", "stats", "frequency")
    assert status == 0 and "Traceback" not in log
    assert run("--representations", "stats")[0] == 0
    if name == "results.json":
        assert [p.read_bytes() for p in path.parent.glob("set_aside/results.*.json")] == [content]
        again = without_times(json.loads(path.read_text()))
        assert again["label_mapping"] == before["label_mapping"]
        assert [row["cell"] for row in again["all_layers_results"]] == [
            "all_layers_stats",
            "all_layers_frequency",
        ]
    else:
        assert json.loads(path.read_text())["ended"] == "finished"


def test_a_cached_identity_that_is_nested_deeply_is_made_again(run, place):
    settle(*Path("loras").iterdir())
    run("--representations", "stats")
    (memory,) = (place / ".feature_cache" / "identities").iterdir()
    good = memory.read_bytes()
    memory.write_bytes(b"[" * 100_000)
    assert run("--representations", "stats", "frequency")[0] == 0 and memory.read_bytes() == good


@pytest.mark.parametrize(
    "name", ["results.txt", "results.json", "manifest.json", "events.jsonl", "report.html"]
)
def test_a_folder_where_a_file_belongs_is_refused_before_training(run, place, name):
    (folder(place) / name).mkdir(parents=True)
    status, log = run("--representations", "stats")
    assert status == 2 and f"{name} is no file: move it away" in log and "Run 1" not in log


@pytest.mark.parametrize("name", ["checkpoints", "predictions", "set_aside", ".unfinished", "figures"])
def test_a_file_where_a_folder_belongs_is_refused_before_training(run, place, name):
    folder(place).mkdir(parents=True)
    (folder(place) / name).write_text("")
    status, log = run("--representations", "stats")
    assert status == 2 and f"{name} is no folder: move it away" in log and "Run 1" not in log


def test_foreign_files_do_not_count_as_finished_cells(run, place):
    run("--representations", "stats")
    done = folder(place) / "checkpoints"
    (done / "notes.txt").write_text("mine")
    (done / "all_layers_magic.json").write_text("{}")
    (done / "a_folder").mkdir()
    status, log = run("--representations", "stats")
    assert status == 0 and log.count("Set aside checkpoints/") == 3
    assert visible(done) == ["all_layers_stats.json", "visual_only_stats.json"]
    assert (folder(place) / "set_aside" / "notes.1.txt").exists()


def test_one_core_or_two_give_the_same_numbers(place):
    """In processes of their own: this one may be forked later, and must have no threads of torch then."""
    chosen = ("--no-cache-features", "--representations", "nine", "product", "--layer-sets", "all_layers")
    for threads in ("1", "2"):
        command = [
            sys.executable,
            str(SCRIPT),
            "--dataset",
            "./loras",
            *FAST,
            *chosen,
            "--output-dir",
            threads,
        ]
        # The test command sets both, and torch heeds both.
        chosen_threads = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        subprocess.run(command, capture_output=True, check=True, env=os.environ | chosen_threads)
    assert cell_files(place, output="1") == cell_files(place, output="2")


# --- what is kept of a cell, or of a pass, that is not finished


def many_rows(monkeypatch):
    """Blocks of seven rows, so that a pass over 40 rows has six."""
    for module in (extraction, feature_blocks, features):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)


def test_blocks_of_weights_that_changed_meanwhile_are_not_kept(run, place, monkeypatch):
    many_rows(monkeypatch)
    (file,) = Path("loras").glob("*.arrow")
    real = WeightReader.read_layer

    def read_layer(self, layer, start, *rest):
        if start == 14:
            os.utime(file, (1, 1))
        return real(self, layer, start, *rest)

    monkeypatch.setattr(WeightReader, "read_layer", read_layer)
    status, log = run("--representations", "stats")
    assert status == 2 and "changed while they were read" in log
    assert not [*(place / ".feature_cache").rglob("rows*"), *(place / ".feature_cache").rglob("stats*")]


def test_blocks_are_used_where_the_disk_has_room_only_because_they_are_there(run, place, monkeypatch):
    many_rows(monkeypatch)
    whole = 40 * 16 * 7 * 4  # bytes of the features
    usage = features.shutil.disk_usage(place)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage._replace(free=int(1.8 * whole)))
    status, log = run("--representations", "stats")
    assert status == 0 and "WARNING: blocks of features are not kept" in log
    assert not list((place / ".feature_cache").rglob("rows*"))
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage._replace(free=whole // 2))
    status, log = run("--representations", "simple_stats")
    assert status == 2 and "the feature cache needs 0.0 MB" in log and "--no-cache-features" in log


@pytest.mark.parametrize("changed", ["threads", "torch", "format"])
def test_what_was_kept_on_another_device_or_by_another_torch_is_not_mixed_in(
    run, place, monkeypatch, changed
):
    run("--output-dir", "whole", "--representations", "stats")
    real, saved = cells_at_work.computed_by, []
    monkeypatch.setattr(cells_at_work, "computed_by", lambda device: real(device) | {changed: "another"})
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("ablation.runs.cell_record", interrupt)
        run("--representations", "stats")
    assert len(list((folder(place) / ".unfinished").rglob("run*"))) == 2
    monkeypatch.setattr(cells_at_work, "computed_by", real)
    monkeypatch.setattr(Unfinished, "save", lambda self, name, arrays: saved.append(name))
    assert run("--representations", "stats")[0] == 0
    assert sorted(saved) == ["run42"] * 2 + ["run43"] * 2
    assert cell_files(place) == cell_files(place, output="whole")


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_disk_that_takes_no_kept_run_costs_no_cell(run, place, monkeypatch):
    def full(self, name, arrays):
        raise CannotWrite.to(self.path(name), OSError(28, "No space left on device"))

    monkeypatch.setattr(Unfinished, "save", full)
    status, log = run("--representations", "stats")
    assert status == 0 and log.count("WARNING: a kill would lose more of this cell: cannot write ") == 4


def test_a_cell_that_cannot_be_read_for_the_moment_is_not_set_aside(run, place, monkeypatch):
    run("--representations", "stats")
    kept, real = snapshot(folder(place) / "checkpoints"), checkpointing.read_bytes

    def read_bytes(path):
        if path.name == "all_layers_stats.json":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "read_bytes", read_bytes)
        status, log = run("--representations", "stats")
    assert status == 2 and "cannot read" in log and "Input/output error" in log
    assert snapshot(folder(place) / "checkpoints") == kept and not (folder(place) / "set_aside").exists()


def test_the_manifest_ends_with_the_command_that_found_all_finished(run, place):
    run("--representations", "stats")
    path = folder(place) / "manifest.json"
    killed = {**json.loads(path.read_text()), "ended": "not ended", "exit_status": None, "earlier": 3}
    path.write_text(json.dumps({key: value for key, value in killed.items() if key != "checksum"}))
    assert run("--representations", "stats")[0] == 0
    manifest = json.loads(path.read_text())
    assert (manifest["ended"], manifest["exit_status"]) == ("finished", 0)
