"""Everything that can go wrong, and what it costs."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import lora_dataset, room_for
from datasets import Dataset
from running import BOTH, cell_files, folder, interfere, never, settle, snapshot, visible

import representations
import visual_ablation_experiment as experiment
from ablation.catalogue import NINE
from ablation.reading import WeightReader


def test_a_representation_that_fails_takes_its_cells_and_no_others(run, place, monkeypatch):
    def broken(w):
        raise FloatingPointError("did not converge")

    monkeypatch.setitem(representations.REPRESENTATIONS, "spectral", broken)
    status, log = run()
    assert status == 1 and "did not converge" in log and "Traceback" in log and "4 cells FAILED" in log
    assert len(visible(folder(place) / "checkpoints")) == 14
    results = json.loads((folder(place) / "results.json").read_text())
    assert {failed["cell"] for failed in results["failed_cells"]} == {
        cell.name for cell in BOTH if cell.representation in ("spectral", "ensemble")
    }
    assert [entry["representation"] for entry in results["comparison"]] == [
        name for name in NINE if name not in ("spectral", "ensemble")
    ]
    for entry in results["comparison"]:
        assert entry["drop"] == pytest.approx(entry["all_layers"] - entry["visual_only"])
    assert "FAILED" in (folder(place) / "results.txt").read_text()
    monkeypatch.undo()
    os.chdir(place)
    status, log = run()
    assert status == 0 and log.count("Run 1/2") == 4
    assert json.loads((folder(place) / "results.json").read_text())["failed_cells"] == []


def test_a_cell_whose_features_are_not_finite_fails_with_layer_and_row(run, place):
    rows = lora_dataset(n=40).to_dict()
    layer = next(name for name in sorted(rows) if "attn1" in name)
    rows[layer][17] = [[3e38] * 6] * 2
    Dataset.from_dict(rows, features=lora_dataset(n=40).features).save_to_disk("huge")
    status, log = run("--representations", "simple_stats", "rank_based", dataset="./huge")
    assert status == 1 and f"layer '{layer}', row 17, is inf" in log
    assert visible(folder(place, "huge") / "checkpoints") == [
        "all_layers_rank_based.json",
        "visual_only_rank_based.json",
    ]


@pytest.mark.parametrize("weight", [3e38, 1e18, 1e-38, 0.0])
def test_weights_of_any_size_are_computed_or_fail_in_one_line_a_cell(run, place, weight):
    rows = lora_dataset(n=40, signal=True).to_dict()
    for name in filter(lambda name: name.endswith("weight"), rows):
        scaled = weight * np.sign(rows[name]) if weight == 3e38 else weight * np.array(rows[name])
        rows[name] = scaled.tolist()
    Dataset.from_dict(rows, features=lora_dataset(n=40).features).save_to_disk("sized")
    status, log = run("--representations", "nine", "kernel_pca", "kernel_ridge", "pca", dataset="./sized")
    assert "Traceback" not in log and "ArpackError" not in log and status == (weight != 1e18)
    done = {name.removesuffix(".json") for name in visible(folder(place, "sized") / "checkpoints")}
    failed = set(re.findall(r"^(\S+) FAILED: TrainingError: .+$", log, re.M))
    assert done | failed >= {cell.name for cell in BOTH} and not done & failed
    assert ("WARNING: weights up to" in log) == (weight >= 1e18)
    if weight == 3e38:  # float64 holds the products of these, and the moments of a layer
        assert {"all_layers_kernel_ridge", "all_layers_stats", "all_layers_info_theoretic"} <= done
    if weight == 0.0:
        assert "all_layers_kernel_pca FAILED: TrainingError: no column varies" in log and not done


def test_a_cell_in_which_no_column_varies_fails_and_says_so(run, place):
    rows = lora_dataset(n=40).to_dict()
    for name in rows:
        if "attn1" in name:
            rows[name] = [rows[name][0]] * 40
    Dataset.from_dict(rows, features=lora_dataset(n=40).features).save_to_disk("frozen")
    status, log = run("--representations", "stats", dataset="./frozen")
    assert status == 1 and "visual_only_stats FAILED: TrainingError: no column varies" in log
    assert visible(folder(place, "frozen") / "checkpoints") == ["all_layers_stats.json"]


def test_out_of_memory_on_the_device_halves_the_block_and_goes_on(run, place, monkeypatch):
    run("--output-dir", "enough")
    sizes = []
    monkeypatch.setattr(representations, "describe", room_for(10, sizes))
    status, log = run("--output-dir", "tight", "--no-cache-features")
    assert status == 0 and max(sizes) == 40 and 10 in sizes and "WARNING: out of memory on cpu" in log
    assert cell_files(place, output="tight") == cell_files(place, output="enough")
    monkeypatch.setattr(
        representations,
        "describe",
        lambda w, names: (_ for _ in ()).throw(torch.OutOfMemoryError("pretended")),
    )
    status, log = run("--output-dir", "none", "--no-cache-features")
    assert status == 1 and "18 cells FAILED" in log and "OutOfMemoryError: pretended" in log


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--dataset", "2k"], "unknown dataset '2k'"),
        (["--dropout", "2"], "--dropout 2.0 is out of range"),
        (["--device", "cuda:7"], "is not there"),
        (["--device", "abacus"], "unknown --device 'abacus'"),
        (["--precision", "tf32"], "needs a CUDA GPU"),
        (["--nonsense"], "unrecognized"),
        (["--label-column", "absent"], "no column 'absent'"),
        (["--quick", "--num-runs", "2"], "leave one out"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(place, capsys, flags, reason):
    assert experiment.main(["--dataset", "./loras", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and reason in captured.err


def test_bad_rows_end_with_status_2_naming_column_and_row(run, place):
    rows = lora_dataset(n=40).to_dict()
    layer = sorted(rows)[5]
    rows[layer][33][0][1] = float("nan")
    Dataset.from_dict(rows, features=lora_dataset(n=40).features).save_to_disk("bad")
    status, log = run(dataset="./bad")
    assert status == 2 and f"column '{layer}', row 33: the weight at (0, 1) is nan" in log
    assert not (folder(place, "bad") / "checkpoints").exists()


def test_a_layer_set_without_layers_is_refused(run):
    columns = [name for name in lora_dataset(n=2).column_names if "attn2" in name]
    lora_dataset(n=40).remove_columns(columns).save_to_disk("visual")
    status, log = run("--layer-sets", "all_layers", "text_only", dataset="./visual")
    assert status == 2 and "no layer for --layer-sets text_only" in log
    assert run("--representations", "stats", dataset="./visual")[0] == 0


def test_few_rows_are_warned_of_in_the_log_and_the_results(run, place):
    status, log = run(
        dataset="sanity-check",
        fast=["--num-runs", "1", "--max-epochs", "2", "--hidden-dim", "8", "--no-report"],
    )
    assert status == 0 and "WARNING: ten rows or fewer" in log and "no accuracy here means anything" in log
    results = json.loads((folder(place, "sanity-check") / "results.json").read_text())
    assert (
        results["splits_overlap"] is True and results["num_all_layers"] == 20 and results["num_classes"] == 3
    )


def test_layers_that_are_neither_attention_count_in_all_layers(run, place):
    whole = lora_dataset(n=40)
    name = next(column for column in whole.column_names if "attn2" in column)
    whole.rename_column(name, name.replace("attn2", "ff")).save_to_disk("mixed")
    status, log = run("--representations", "stats", dataset="./mixed")
    assert status == 0 and "8 attn1, 7 attn2, 1 other" in log
    results = json.loads((folder(place, "mixed") / "results.json").read_text())
    assert (results["num_all_layers"], results["num_visual_layers"], results["num_text_layers"]) == (16, 8, 7)
    assert results["all_layers_results"][0]["feature_dim"] == 16 * 7


def test_a_later_command_keeps_what_an_earlier_one_reported(run, place, monkeypatch):
    def broken(w):
        raise FloatingPointError("did not converge")

    with monkeypatch.context() as patch:
        patch.setitem(representations.REPRESENTATIONS, "spectral", broken)
        assert run("--representations", "spectral")[0] == 1
    assert run("--representations", "stats")[0] == 0
    failed = json.loads((folder(place) / "results.json").read_text())["failed_cells"]
    assert [entry["error"] for entry in failed] == [
        "features of spectral: FloatingPointError: did not converge"
    ] * 2
    manifest = json.loads((folder(place) / "manifest.json").read_text())
    assert manifest["cells_run"] == ["all_layers_stats", "visual_only_stats"]
    assert [sorted(entry["cells_failed"]) for entry in manifest["earlier"]] == [
        ["all_layers_spectral", "visual_only_spectral"]
    ]
    assert run("--representations", "spectral")[0] == 0
    assert json.loads((folder(place) / "results.json").read_text())["failed_cells"] == []


@pytest.mark.parametrize("how", ["full", "a file"])
def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_cell(run, place, monkeypatch, how):
    settle(*Path("loras").iterdir())
    if how == "a file":
        (place / "cache").write_text("")
    else:
        import safetensors.numpy

        real = safetensors.numpy.save_file

        def full(arrays, path, **kwargs):
            if "cache" in str(path):
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
            real(arrays, path, **kwargs)

        monkeypatch.setattr("safetensors.numpy.save_file", full)
    status, log = run("--representations", "stats", "--cache-dir", "cache")
    of_stats = " of stats" if how == "full" else ""
    assert status == 0 and f"WARNING: features{of_stats} are not cached: cannot write cache" in log
    assert ("WARNING: the content hash is not remembered" in log) == (how == "a file")


def test_an_output_folder_that_cannot_be_made_is_bad_input(run, place):
    (place / "file").write_text("")
    status, log = run("--output-dir", "file")
    assert status == 2 and "error: cannot write to file" in log and "another --output-dir" in log
    status, log = run(dataset="2k")
    assert status == 2 and not (place / "visual-ablation-results").exists()


def test_without_locks_it_runs_and_says_so(run, place, monkeypatch):
    def acquire(*arguments, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    status, log = run("--representations", "stats")
    assert status == 0 and "WARNING: no lock on" in log and len(visible(folder(place) / "checkpoints")) == 2


def test_a_cell_that_another_process_finishes_meanwhile_is_not_run_again(run, place, monkeypatch):
    run("--representations", "stats")
    real = experiment.print_progress_summary
    kept = snapshot(folder(place) / "checkpoints")

    def finish_meanwhile(settings, missing):
        shutil.move("away.json", folder(place) / "checkpoints" / "all_layers_stats.json")
        real(settings, missing)

    shutil.move(folder(place) / "checkpoints" / "all_layers_stats.json", "away.json")
    monkeypatch.setattr(experiment, "print_progress_summary", finish_meanwhile)
    monkeypatch.setattr("ablation.training.train_one", never)
    assert run("--representations", "stats")[0] == 0
    assert snapshot(folder(place) / "checkpoints") == kept


@pytest.mark.parametrize(
    "harm, kind", [("deleted", "missing"), ("emptied", "damaged"), ("predictions", "damaged")]
)
def test_cells_that_vanish_during_the_run_are_failures(run, place, monkeypatch, harm, kind):
    def action():
        first = folder(place) / "checkpoints" / "all_layers_stats.json"
        {
            "deleted": first.unlink,
            "emptied": lambda: first.write_bytes(b""),
            "predictions": (folder(place) / "predictions" / "all_layers_stats.npz").unlink,
        }[harm]()

    interfere(monkeypatch, action)
    status, log = run("--representations", "stats", "frequency")
    assert status == 1 and f"all_layers_stats FAILED: its files are {kind} at the end of the run" in log
    assert [
        entry["cell"] for entry in json.loads((folder(place) / "results.json").read_text())["failed_cells"]
    ] == ["all_layers_stats"]


def test_data_that_changes_while_it_is_read_is_neither_cached_nor_used(run, place, monkeypatch):
    real = WeightReader.read_layer
    monkeypatch.setattr(
        WeightReader,
        "read_layer",
        lambda self, *what: (os.utime(self.dataset.cache_files[0]["filename"]), real(self, *what))[1],
    )
    status, log = run("--representations", "stats")
    assert (
        status == 2
        and "changed while they were read" in log
        and not list((place / ".feature_cache").rglob("*.safetensors"))
    )


def test_results_never_tell_of_cells_that_were_set_aside(run, place, monkeypatch):
    run("--representations", "stats", "frequency")

    def interrupt():
        raise KeyboardInterrupt

    interfere(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--representations", "stats", "frequency", "--seed", "7", "--rerun-stale")
    assert json.loads((folder(place) / "results.json").read_text())["all_layers_results"] == []


def test_a_full_disk_ends_the_training_and_names_what_was_not_run(run, place, monkeypatch):
    from checkpointing import CannotWrite, ResultStore

    def full(self, name, *arguments):
        raise CannotWrite.to(self.path(name), OSError(28, "No space left on device"))

    monkeypatch.setattr(ResultStore, "save", full)
    status, log = run("--representations", "stats", "frequency")
    assert status == 1 and log.count("Run 1/2") <= 2 and "Traceback" not in log
    assert log.count("FAILED: not run: cannot write ") >= 3 and "all_layers_frequency.json: No space" in log
