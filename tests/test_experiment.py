"""The program as its users meet it: a run, its resumption, everything that can go wrong, and the command
line.
"""

import contextlib
import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import load, lora_columns, lora_dataset, room_for
from conftest import ROOT
from datasets import Dataset

import representations
import visual_ablation_experiment as experiment
from ablation import log as program_log
from ablation import status as program_status
from ablation.catalogue import CHOICES, NINE, REPRESENTATIONS
from ablation.cells import Cell, cells_of
from ablation.log import Progress, duration
from ablation.reading import WeightReader

SCRIPT = ROOT / "visual_ablation_experiment.py"
FAST = ["--num-runs", "2", "--max-epochs", "3", "--hidden-dim", "8", "--batch-size", "8", "--no-report"]
BOTH = cells_of(("all_layers", "visual_only"), NINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in with a data set `loras` of 40 rows whose attn2 layers know the class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    lora_dataset(n=40, signal=True).save_to_disk("loras")
    return tmp_path


@pytest.fixture
def run(place, capsys):
    """Run the program in this process: (exit status, log)."""

    def run(*flags, dataset="./loras", fast=FAST):
        capsys.readouterr()
        status = experiment.main(["--dataset", dataset, *fast, *flags])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def folder(place, name="loras", output="visual-ablation-results"):
    return place / output / f"visual_ablation_{name}"


def checkpoints(place, **kwargs):
    return sorted(os.listdir(folder(place, **kwargs) / "checkpoints"))


def visible(path):
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def snapshot(path):
    return {
        file.name: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes())
        for file in sorted(path.iterdir())
        if file.name[0] != "."
    }


UNKEYED = ("checksum", "predictions_hash", "made_on")


def without_times(record):
    """A record less what may differ between two runs that are the same: seconds, and hashes that cover
    them.
    """
    if isinstance(record, dict):
        return {
            k: without_times(v) for k, v in record.items() if k[:13] != "training_time" and k not in UNKEYED
        }
    return [without_times(v) for v in record] if isinstance(record, list) else record


def cell_files(place, **kwargs):
    return {
        name: without_times(json.loads((folder(place, **kwargs) / "checkpoints" / name).read_text()))
        for name in visible(folder(place, **kwargs) / "checkpoints")
    }


def never(*arguments, **kwargs):
    raise AssertionError("this must not be called")


# --- a whole run


def test_a_run_writes_everything_that_is_promised(run, place):
    status, log = run()
    assert status == 0
    assert visible(folder(place) / "checkpoints") == sorted(f"{cell.name}.json" for cell in BOTH)
    assert visible(folder(place)) == [
        "checkpoints",
        "events.jsonl",
        "manifest.json",
        "predictions",
        "results.json",
        "results.txt",
    ]
    for line in (
        "PROGRESS SUMMARY",
        "All Layers Config:    0/9 completed, 9 remaining",
        "Visual-Only Config:   0/9 completed, 9 remaining",
        "Total Progress:       0/18 (0.0%)",
        "Progress: 16/16 layers | Rate: ",
    ):
        assert line in log
    assert log.count("Run 1/2: Train=") == log.count("Run 2/2: Train=") == log.count("Results: Train=") == 18
    assert "\r" not in log

    results = json.loads((folder(place) / "results.json").read_text())
    assert (results["dataset"], results["num_runs"], results["num_classes"]) == ("./loras", 2, 3)
    assert (results["num_all_layers"], results["num_visual_layers"], results["num_text_layers"]) == (16, 8, 8)
    assert results["label_mapping"] == {"Ape": 0, "cat": 1, "dog": 2} and results["splits_overlap"] is False
    for layer_set, layers in (("all_layers", 16), ("visual_only", 8)):
        rows = results[f"{layer_set}_results"]
        assert [row["representation"] for row in rows] == [f"{name}_{layer_set}" for name in NINE]
        assert [row["feature_dim"] for row in rows] == [layers * REPRESENTATIONS[name].width for name in NINE]
        assert {row["num_layers"] for row in rows} == {layers}
    assert len(results["comparison"]) == 9 and results["failed_cells"] == []
    for entry in results["comparison"]:
        assert entry["drop"] == pytest.approx(entry["all_layers"] - entry["visual_only"])

    manifest = json.loads((folder(place) / "manifest.json").read_text())
    assert set(manifest["seconds"]) == {"load", "read", "features", "training", "total"}
    assert (
        sum(manifest["seconds"][k] for k in ("load", "read", "features", "training"))
        <= manifest["seconds"]["total"]
    )
    assert (
        manifest["settings"]["training"]["trainer"] == "sequential"
        and manifest["versions"]["torch"] == torch.__version__
    )
    events = [json.loads(line) for line in (folder(place) / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started"] + ["finished"] * 18 + ["ended"]
    text = (folder(place) / "results.txt").read_text()
    assert text.rstrip() in log and text.count("simple_stats") >= 4  # two layer sets, the drop, its inference


def test_predictions_give_the_confusion_counts_and_accuracies(run, place):
    run("--representations", "stats")
    record = json.loads((folder(place) / "checkpoints" / "visual_only_stats.json").read_text())
    with np.load(folder(place) / "predictions" / "visual_only_stats.npz", allow_pickle=False) as arrays:
        data = experiment_data()
        assert arrays["seeds"].tolist() == [42, 43]
        for part in ("train", "val", "test"):
            rows, labels, predictions = (
                arrays[f"{part}_{what}"] for what in ("rows", "labels", "predictions")
            )
            assert (
                rows.tolist() == getattr(data.split, part).tolist()
                and labels.tolist() == data.labels[rows].tolist()
            )
            assert (predictions == labels).mean(1).tolist() == pytest.approx(record[f"{part}_acc_all_runs"])
            if part != "train":
                for run_number, matrix in enumerate(record[f"{part}_confusion_matrices"]):
                    for true in range(3):
                        for predicted in range(3):
                            assert (
                                matrix[true][predicted]
                                == ((labels == true) & (predictions[run_number] == predicted)).sum()
                            )


def experiment_data():
    return load("./loras")


def test_what_only_the_text_layers_know_is_lost_without_them(run, place):
    lora_dataset(n=200, signal=True).save_to_disk("many")
    status, _ = run(
        "--layer-sets",
        "all_layers",
        "visual_only",
        "text_only",
        "--representations",
        "simple_stats",
        "--num-runs",
        "3",
        "--max-epochs",
        "60",
        "--hidden-dim",
        "32",
        dataset="./many",
        fast=[],
    )
    assert status == 0
    (entry,) = json.loads((folder(place, "many") / "results.json").read_text())["comparison"]
    assert (
        min(entry["text_only"], entry["all_layers"]) > 0.75
        and entry["visual_only"] < 0.7
        and entry["drop"] > 0.25
    )


def test_features_are_the_representations_of_the_layers_in_their_order(run, place, monkeypatch):
    seen = {}
    from ablation import runs

    real = runs.train_runs
    monkeypatch.setattr(
        runs,
        "train_runs",
        lambda task, *rest: (seen.setdefault(len(seen), task.features.clone()), real(task, *rest))[1],
    )
    run("--representations", "stats", "ensemble", "--layer-sets", "all_layers", "visual_only", "text_only")
    data = experiment_data()
    whole = {layer: data.weights.read_layer(layer, 0, data.num_rows) for layer in data.layers.names}
    for number, cell in enumerate(
        cells_of(("all_layers", "visual_only", "text_only"), ("stats", "ensemble"))
    ):
        pattern = {"all_layers": "attn", "visual_only": "attn1", "text_only": "attn2"}[cell.layer_set]
        layers = [layer for layer in data.layers.names if pattern in layer]
        expected = torch.cat(
            [representations.REPRESENTATIONS[cell.representation](whole[layer]) for layer in layers], dim=1
        )
        assert torch.allclose(seen[number], expected, rtol=1e-6), cell


def test_each_weight_is_read_once_for_all_that_needs_it(run, monkeypatch):
    reads = []
    real = WeightReader.read_layer

    def read_layer(self, layer, start, stop, buffer=None):
        reads.append((layer, start, stop))
        return real(self, layer, start, stop, buffer)

    monkeypatch.setattr(WeightReader, "read_layer", read_layer)
    for names in ("nine", "product"), ("product",), ("stats",):
        reads.clear()
        run(
            "--layer-sets",
            "all_layers",
            "visual_only",
            "text_only",
            "--representations",
            *names,
            "--no-cache-features",
            "--output-dir",
            names[0],
        )
        assert len(reads) == len(set(reads)) == 16


def test_the_same_command_gives_the_same_numbers(run, place):
    for output in ("a", "b"):
        assert run("--output-dir", output, "--no-cache-features")[0] == 0
    assert cell_files(place, output="a") == cell_files(place, output="b")
    run("--output-dir", "c", "--seed", "43")
    before, after = cell_files(place, output="a"), cell_files(place, output="c")
    assert all(after[name]["learning_curves"] != before[name]["learning_curves"] for name in before)


def test_both_trainers_make_whole_cells(run, place):
    for trainer in ("sequential", "packed"):
        status, log = run(
            "--trainer",
            trainer,
            "--output-dir",
            trainer,
            "--representations",
            "stats",
            "--precision",
            "bfloat16",
        )
        assert status == 0 and log.count("Run 2/2: Train=") == 2
        assert (
            json.loads((folder(place, output=trainer) / "checkpoints" / "all_layers_stats.json").read_text())[
                "made_with"
            ]["trainer"]
            == trainer
        )


# --- products, fitted representations and audits

EVERYTHING = (
    "--representations",
    "all",
    "--audit",
    "gauge",
    "noise",
    "--pca-components",
    "5",
    "--sketch-size",
    "4",
)


def test_everything_that_can_be_asked_for_runs_and_resumes(run, place):
    status, log = run(*EVERYTHING)
    assert status == 0, log
    cells = cells_of(("all_layers", "visual_only"), CHOICES, ("gauge", "noise"))
    assert (
        visible(folder(place) / "checkpoints") == sorted(f"{cell.name}.json" for cell in cells)
        and len(cells) == 120
    )
    for line in (
        "All Layers Config:    0/20 completed, 20 remaining",
        "Visual-Only Config:   0/20",
        "Gauge Audit:          0/40",
        "Total Progress:       0/120",
    ):
        assert line in log
    results = json.loads((folder(place) / "results.json").read_text())
    assert [row["representation"] for row in results["visual_only_results"]] == [
        f"{name}_visual_only" for name in CHOICES
    ]
    columns = {row["representation"]: row["feature_dim"] for row in results["visual_only_results"]}
    # 8 layers, 4 modules, 3 classes, 28 training rows, 96 weights
    assert (
        columns["product_sketch_visual_only"] == 4 * 16
        and columns["pca_visual_only"] == 5
        and columns["kernel_ridge_visual_only"] == 28
    )
    assert columns["centroid_cosine_visual_only"] == 2 * 4 * 3 and columns["flat_vec_visual_only"] == 8 * 12
    assert [entry["representation"] for entry in results["comparison"]] == list(CHOICES)
    assert len(results["audits"]) == 80 and results["skipped_cells"] == results["failed_cells"] == []
    accuracies = {row["representation"]: row["test_acc_all_runs"] for row in results["all_layers_results"]}
    for entry in results["audits"]:
        if entry["layer_set"] == "all_layers":
            assert entry["test_acc_all_runs"] == accuracies[f"{entry['representation']}_all_layers"]
        change = [variant["change"] for variant in entry["variants"].values()]
        if entry["audit"] == "gauge" and "product" in entry["representation"]:
            assert change[0]["largest"] < 1e-3 and entry["variants"]["re-gauged"]["agreement"] == 1
        elif entry["representation"] not in ("centroid_cosine", "kernel_pca", "kernel_ridge"):
            assert 0 < change[0]["rms"] <= change[0]["largest"] and change[-1]["rms"] > 1e-3
    text = (folder(place) / "results.txt").read_text()
    assert "Gauge audit" in text and "largest change" in text and "Noise audit" in text and text in log
    before = snapshot(folder(place) / "checkpoints")
    status, log = run(*EVERYTHING)
    assert (
        status == 0
        and "All experiments already completed!" in log
        and snapshot(folder(place) / "checkpoints") == before
    )
    status, log = run("--status", *EVERYTHING)
    assert status == 0 and "Noise Audit:          40/40 completed, 0 remaining" in log


def test_an_audit_of_finished_cells_scores_the_same_runs_and_leaves_them(run, place):
    chosen = ("--representations", "ensemble", "product_norms", "centroid_cosine", "pca", "kernel_ridge")
    assert run(*chosen)[0] == 0
    before = snapshot(folder(place) / "checkpoints")
    status, log = run(*chosen, "--audit", "noise")
    assert status == 0 and "Will run 10 remaining" in log and "Cached features: spectral" in log
    after = snapshot(folder(place) / "checkpoints")
    assert {name: after[name] for name in before} == before and len(after) == 20
    for cell in cells_of(("all_layers", "visual_only"), chosen[1:]):
        plain, audit = (
            folder(place) / "predictions" / f"{cell.name}{suffix}.npz" for suffix in ("", ".noise")
        )
        with np.load(plain, allow_pickle=False) as plain, np.load(audit, allow_pickle=False) as audit:
            assert np.array_equal(plain["test_predictions"], audit["test_predictions"]), cell
            assert audit["20%_predictions"].shape == plain["test_predictions"].shape
    run("--representations", "ensemble", "--audit", "gauge", "--output-dir", "together")
    assert (
        cell_files(place, output="together")["all_layers_ensemble.json"]
        == cell_files(place)["all_layers_ensemble.json"]
    )


def test_what_a_layer_set_or_its_size_rules_out_is_skipped_and_said(run, place, monkeypatch):
    columns = lora_columns(n=40)
    del columns[next(name for name in columns if "attn1" in name and "up" in name)]
    rows = {name: w.tolist() for name, w in columns.items()} | {"category_label": ["a", "b"] * 20}
    Dataset.from_dict(rows).save_to_disk("cut")
    chosen = (
        "--representations",
        "stats",
        "product_norms",
        "--layer-sets",
        "all_layers",
        "visual_only",
        "text_only",
        "--audit",
        "gauge",
    )
    status, log = run(*chosen, dataset="./cut")
    assert (
        status == 0
        and "Skipped, 1 layers of all_layers are there without the other half of their module, such as 'unet."
        in log
    )
    names = visible(folder(place, "cut") / "checkpoints")
    assert (
        "text_only_product_norms.json" in names
        and "text_only_product_norms.gauge.json" in names
        and len(names) == 8
    )
    results = json.loads((folder(place, "cut") / "results.json").read_text())
    assert [entry["cell"] for entry in results["skipped_cells"]] == [
        f"{layer_set}_product_norms{audit}"
        for layer_set in ("all_layers", "visual_only")
        for audit in ("", ".gauge")
    ]
    assert "Skipped: visual_only_product_norms" in (folder(place, "cut") / "results.txt").read_text()
    run("--representations", "stats", dataset="./cut")  # asks for none of those that were skipped
    assert "Total Progress:       8/8 (100.0%)" in run("--status", *chosen, dataset="./cut")[1]
    status, log = run("--representations", "product", "--layer-sets", "visual_only", dataset="./cut")
    assert status == 2 and "error: nothing can be computed: 1 layers of visual_only" in log
    for name in ("kernel_pca", "kernel_ridge"):
        monkeypatch.setitem(REPRESENTATIONS, name, REPRESENTATIONS[name]._replace(max_rows=39))
    status, log = run("--representations", "stats", "kernel_ridge")
    assert (
        status == 0
        and "Skipped, for at most 39 rows, the data set has 40: all_layers_kernel_ridge, visual_only_kernel_ridge"
        in log
    )


def test_modules_whose_ranks_do_not_fit_are_refused_where_products_are_wanted(run, place):
    columns = lora_columns(n=40)
    name = next(name for name in columns if "up" in name)
    columns[name] = columns[name][:, :, :1]
    Dataset.from_dict(
        {key: w.tolist() for key, w in columns.items()} | {"category_label": ["a", "b"] * 20}
    ).save_to_disk("odd")
    assert run("--representations", "stats", dataset="./odd")[0] == 0
    for flags in (
        ["--representations", "stats", "product_norms"],
        ["--representations", "stats", "--audit", "gauge", "--no-cache-features"],
    ):
        status, log = run(*flags, dataset="./odd")
        assert status == 2 and "Computing" not in log
    assert status == 2 and f"'{name}' 6 x 1" in log


def test_options_of_a_representation_make_its_cells_and_caches_stale_and_no_others(run, place):
    chosen = ("--representations", "stats", "product_sketch", "pca")
    run(*chosen, "--sketch-size", "3")
    status, log = run(*chosen, "--sketch-size", "4")
    assert status == 2 and "2 finished cells" in log and "sketch_size was 3, is now 4" in log
    status, log = run(*chosen, "--sketch-size", "4", "--rerun-stale", "--pca-components", "3")
    assert (
        status == 0 and "Set aside stale checkpoint all_layers_pca (pca_components was 128, is now 3)" in log
    )
    assert (
        "cached features of product_sketch are not used: made by another version or with other options" in log
    )
    assert "all_layers_stats:" not in log and log.count("Set aside") == 4
    sizes = {name: record["feature_dim"] for name, record in cell_files(place).items()}
    assert sizes["all_layers_product_sketch.json"] == 8 * 16 and sizes["all_layers_pca.json"] == 3


def test_a_product_that_fails_costs_its_cells_and_their_audits_only(run, place, monkeypatch):
    def broken(module):
        raise RuntimeError("did not converge")

    monkeypatch.setitem(representations.PRODUCT_REPRESENTATIONS, "product_norms", broken)
    status, log = run("--representations", "stats", "product_norms", "product_sketch", "--audit", "gauge")
    assert (
        status == 1 and log.count("product_norms failed on rows 0..40 of unet.") == 2
    )  # of the rows, and of the audit's
    assert visible(folder(place) / "checkpoints") == sorted(
        f"{cell.name}.json"
        for cell in cells_of(("all_layers", "visual_only"), ("stats", "product_sketch"), ("gauge",))
    )
    assert log.count("product_norms FAILED: features of product_norms: RuntimeError: did not converge") == 2
    assert (
        log.count("product_norms.gauge FAILED: features of product_norms: RuntimeError: did not converge")
        == 2 * 2
    )
    assert "4 cells FAILED" in log
    assert "all_layers_product_norms.gauge" in [
        entry["cell"] for entry in json.loads((folder(place) / "results.json").read_text())["failed_cells"]
    ]


def test_an_audit_that_fails_costs_its_own_cells_and_one_without_room_goes_to_the_host(
    run, place, monkeypatch
):
    from ablation.audits import NoiseAudit

    real = NoiseAudit.change

    def no_room(self, reader, position, rows, w):
        first = position not in seen
        seen.append(position)
        if first:
            raise torch.OutOfMemoryError("pretended")
        return real(self, reader, position, rows, w)

    seen = []
    chosen = ("--representations", "stats", "product_norms", "--audit", "noise")
    run(*chosen, "--output-dir", "enough")
    monkeypatch.setattr(NoiseAudit, "change", no_room)
    status, log = run(*chosen, "--output-dir", "tight")
    assert status == 0 and log.count("are changed on the host") == 16
    assert cell_files(place, output="tight") == cell_files(place, output="enough")
    monkeypatch.setattr(NoiseAudit, "change", never)
    status, log = run(*chosen, "--output-dir", "broken")
    assert status == 1 and "the noise audit failed on rows 0..40" in log and "4 cells FAILED" in log
    assert visible(folder(place, output="broken") / "checkpoints") == sorted(
        f"{cell.name}.json" for cell in cells_of(("all_layers", "visual_only"), ("stats", "product_norms"))
    )


def test_a_fit_that_fails_costs_its_cell(run, place, monkeypatch):
    from ablation import fitted

    monkeypatch.setitem(fitted.FITTED, "pca", lambda fit: torch.full((40, 2), float("nan")))
    status, log = run("--representations", "pca", "flat_vec")
    assert status == 1 and "all_layers_pca FAILED: ValueError: feature 0 of row 0 is nan" in log
    assert visible(folder(place) / "checkpoints") == ["all_layers_flat_vec.json", "visual_only_flat_vec.json"]


def test_a_plan_counts_products_and_fits(run, place):
    status, log = run("--dry-run", *EVERYTHING)
    assert status == 0 and "Will run 120" in log and "all_layers_flat_vec.noise" in log
    memory = lambda log: float(log.split("Memory:  ")[1].split(" GB")[0])
    lora_dataset(n=30000, width=1).save_to_disk("many")
    _, plain = run("--dry-run", "--representations", "nine", "product", "kernel_ridge", dataset="./many")
    _, audited = run(
        "--dry-run", "--representations", "nine", "product", "--audit", "gauge", "noise", dataset="./many"
    )
    assert memory(audited) == pytest.approx(2.8 * memory(plain), rel=0.1) and "kernel_ridge" not in plain


# --- layer sets


SETS = {
    "layer_sets": ["all_layers", "visual_only", "random_half", "by_block", "queries", "ups"],
    "random_halves": 2,
    "named_layer_sets": {"queries": ["*.to_q.*"], "ups": ["*.up.weight"]},
    "representations": ["stats", "product_norms"],
}


def test_halves_blocks_and_named_sets_are_slices_of_one_pass(run, place, monkeypatch):
    (place / "sets.json").write_text(json.dumps(SETS))  # YAML, too
    status, log = run("--status", "--config", "sets.json")
    assert (
        status == 0
        and "by_block are not known before the first run" in log
        and "Random Half Config:   0/4" in log
    )
    status, log = run("--dry-run", "--config", "sets.json")
    assert (
        status == 0
        and "By Block Config:      0/8" in log
        and "by_block.down_blocks.1.attentions.0.attn2_stats" in log
    )
    reads, real = [], WeightReader.read_layer
    monkeypatch.setattr(
        WeightReader,
        "read_layer",
        lambda self, layer, *rest: (reads.append(layer), real(self, layer, *rest))[1],
    )
    status, log = run("--config", "sets.json", "--num-runs", "3")
    assert status == 0, log
    assert (
        len(reads) == len(set(reads)) == 16
        and "queries Config:       0/2 completed" in log
        and "Total Progress:       0/19 (0.0%)" in log
    )
    names = visible(folder(place) / "checkpoints")
    assert (
        len(names) == 19
        and "random_half.1_stats.json" in names
        and "ups_stats.json" in names
        and "ups_product_norms.json" not in names
    )
    assert "by_block.down_blocks.0.attentions.0.attn1_product_norms.json" in names
    results, text = (
        json.loads((folder(place) / "results.json").read_text()),
        (folder(place) / "results.txt").read_text(),
    )
    assert (
        results["random_half.1_results"][0]["feature_dim"] == 8 * 7
        and results["queries_results"][0]["num_layers"] == 8
    )
    assert results["by_block.down_blocks.1.attentions.0.attn2_results"][1]["feature_dim"] == 2 * 7
    pairs = [(one["first"], one["second"]) for one in results["inference"]["comparisons"]]
    assert pairs == [
        ("all_layers", "visual_only"),
        ("all_layers", "random_half"),
        ("random_half", "visual_only"),
    ]
    drops = {
        pair: one["entries"][0]["drop"]
        for pair, one in zip(pairs, results["inference"]["comparisons"], strict=True)
    }
    assert drops[pairs[0]] == pytest.approx(
        drops[pairs[1]] + drops[pairs[2]]
    )  # fewer columns, and which columns
    assert (
        "random_half_stats" not in results["inference"]["accuracies"]
        and "random_half.1_stats" in results["inference"]["accuracies"]
    )
    assert (
        "Random Halves minus Visual-Only" in text
        and "Single blocks" in text
        and "Against random halves of the modules" in results["verdict"]
    )
    before = snapshot(folder(place) / "checkpoints")
    assert "All experiments already completed!" in run("--config", "sets.json", "--num-runs", "3")[1]
    assert (
        "By Block Config:      8/8 completed, 0 remaining"
        in run("--status", "--config", "sets.json", "--num-runs", "3")[1]
    )
    status, log = run(
        "--representations", "stats", "product_norms", "--num-runs", "3"
    )  # the plain run leaves and shows them
    assert status == 0 and snapshot(folder(place) / "checkpoints") == before
    assert "random_half.1_results" in json.loads((folder(place) / "results.json").read_text())


def test_a_named_set_that_was_changed_is_stale_and_one_without_a_layer_is_refused(run, place):
    for number, pattern in enumerate(("*.to_q.*", "*.to_v.*", "*.to_nothing.*")):
        chosen = {
            "layer_sets": ["mine"],
            "named_layer_sets": {"mine": [pattern]},
            "representations": ["stats"],
        }
        (place / f"{number}.json").write_text(json.dumps(chosen))
    assert run("--config", "0.json")[0] == 0
    status, log = run("--config", "1.json")
    assert status == 2 and "the layers changed" in log
    status, log = run("--config", "2.json", "--output-dir", "other")
    assert status == 2 and "has no layer for --layer-sets mine" in log
    status, log = run("--representations", "stats", "--layer-sets", "all_layers")  # does not know the set
    assert status == 0 and "left out of the results, made with other settings: mine_stats" in log
    assert "mine_stats.json" in visible(folder(place) / "checkpoints")


# --- what the numbers mean


def test_groups_on_both_sides_of_a_random_split_are_said_and_a_grouped_one_has_none(run, place):
    rows = lora_dataset(n=120).to_dict()
    rows["leaf"] = [f"{rows['category_label'][i]} {i % 4}" for i in range(120)]
    Dataset.from_dict(rows).save_to_disk("leaves")
    chosen = ("--representations", "stats", "--group-column", "leaf")
    status, log = run(*chosen, dataset="./leaves")
    results = json.loads((folder(place, "leaves") / "results.json").read_text())
    n = results["inference"]["test_rows"]
    assert (
        status == 0
        and f"Groups: 12 by 'leaf'; {n} of {n} test rows share theirs with a training row: --split grouped keeps"
        in log
    )
    assert results["inference"]["test_rows_that_share_a_group_with_training"] == n
    assert (
        f"{n} of {n} test rows share their group with a training row"
        in (folder(place, "leaves") / "results.txt").read_text()
    )
    status, log = run(*chosen, "--split", "grouped", dataset="./leaves")
    assert status == 2 and "the rows of the split changed" in log
    assert "stats is stale" in run("--status", *chosen, "--split", "grouped", dataset="./leaves")[1]
    status, log = run(*chosen, "--split", "grouped", "--output-dir", "grouped", dataset="./leaves")
    results = json.loads((folder(place, "leaves", output="grouped") / "results.json").read_text())
    assert (
        status == 0
        and "Split: grouped, " in log
        and "0 of" in log
        and results["inference"]["test_rows_that_share_a_group_with_training"] == 0
    )
    assert (
        "2/2 (100.0%)"
        in run("--status", *chosen, "--split", "grouped", "--output-dir", "grouped", dataset="./leaves")[1]
    )
    status, log = run("--status", *chosen, "--output-dir", "grouped", dataset="./leaves")
    assert "0/2 (0.0%)" in log and "split_kind was grouped, is now random" in log


def test_the_results_end_with_what_they_mean_for_new_examples(run, place):
    from ablation import inference

    status, log = run(
        "--representations",
        "stats",
        "frequency",
        "--layer-sets",
        "all_layers",
        "visual_only",
        "text_only",
        "--num-runs",
        "3",
    )
    results, text = (
        json.loads((folder(place) / "results.json").read_text()),
        (folder(place) / "results.txt").read_text(),
    )
    assert status == 0 and [(one["first"], one["second"]) for one in results["inference"]["comparisons"]] == [
        pair[:2] for pair in inference.COMPARISONS[:3]
    ]
    with (
        np.load(folder(place) / "predictions" / "all_layers_stats.npz") as a,
        np.load(folder(place) / "predictions" / "text_only_stats.npz") as b,
    ):
        right = [one["test_predictions"] == one["test_labels"] for one in (a, b)]
    entry = results["inference"]["comparisons"][1]["entries"][0]
    assert entry["representation"] == "stats" and entry["drop"] == pytest.approx(
        right[0].mean() - right[1].mean()
    )
    assert entry["p"] == inference.difference(*right, 0.02)["p"]
    assert text in log and text.index("VERDICT") > text.index("All Layers minus Text-Only") > text.index(
        "Chance:"
    )
    assert " ".join(text.split("VERDICT")[1].split()) == results["verdict"]
    run(
        "--representations", "stats", "frequency", "--margin", "0.5", "--num-runs", "3"
    )  # no cell depends on it
    assert json.loads((folder(place) / "results.json").read_text())["inference"]["margin"] == 0.5


def test_what_was_inferred_is_kept_only_for_the_same_predictions_and_settings(run, place, monkeypatch):
    from ablation import inference

    chosen, path = ("--representations", "stats", "--num-runs", "3"), folder(place) / "results.json"
    run(*chosen)
    first, calls, real = json.loads(path.read_text()), [], inference.infer
    monkeypatch.setattr(inference, "infer", lambda *arguments: (calls.append(1), real(*arguments))[1])
    run(*chosen)
    assert not calls and {key: json.loads(path.read_text())[key] for key in ("inference", "verdict")} == {
        key: first[key] for key in ("inference", "verdict")
    }
    path.write_text(
        path.read_text().replace('"verdict": "', '"verdict": "All is well. ')
    )  # touched by somebody
    run(*chosen)
    assert len(calls) == 1 and json.loads(path.read_text())["verdict"] == first["verdict"]
    for flags in (
        ["--margin", "0.1"],
        ["--layer-sets", "all_layers", "visual_only", "text_only"],
        ["--representations", "stats", "frequency"],
    ):
        calls.clear()
        run(*chosen, *flags)
        assert len(calls) == 1, flags


def test_a_shuffled_label_is_reported_as_nothing(run, place):
    """Rows whose labels mean nothing: no representation is above chance, and the verdict says so."""
    rows = lora_dataset(n=120).to_dict()
    rows["category_label"] = np.random.default_rng(3).permutation(["cat", "dog", "ape"] * 40).tolist()
    Dataset.from_dict(rows).save_to_disk("shuffled")
    status, _ = run("--representations", "stats", "product_norms", "--num-runs", "3", dataset="./shuffled")
    verdict = json.loads((folder(place, "shuffled") / "results.json").read_text())["verdict"]
    assert (
        status == 0
        and verdict.startswith("With all layers no representation is shown to be above chance")
        and "accuracy falls" not in verdict
    )


# What the truth allows to be said of `stats`, which sees the size of a matrix, where the classes differ in
# that size in some layers only. Without the text layers: "lost", "gained", "same", "open" (cannot tell), or
# "unable" (nothing above chance to begin with).
TRUTHS = {
    (): {"unable"},
    ("attn1",): {"gained", "same", "open"},
    ("attn2",): {"lost", "open"},
    ("attn1", "attn2"): {"lost", "same", "open"},
}
SAID = {
    "accuracy falls for": "lost",
    "accuracy rises for": "gained",
    "the two are equal to within": "same",
    "this run cannot tell": "open",
    "no representation is shown to be above chance": "unable",
}


@pytest.mark.parametrize("knowing", TRUTHS, ids="+".join)
@pytest.mark.parametrize("strength", [1.0, 0.06], ids=["strong", "weak"])
def test_the_verdict_is_right_where_the_answer_is_known_or_says_that_it_cannot_tell(
    run, place, knowing, strength
):
    lora_dataset(n=400, signal=strength, knowing=knowing).save_to_disk("known")
    fast = [
        "--num-runs",
        "3",
        "--max-epochs",
        "50",
        "--hidden-dim",
        "64",
        "--batch-size",
        "16",
        "--margin",
        "0.05",
        "--no-report",
    ]
    status, _ = run("--representations", "stats", dataset="./known", fast=fast)
    results = json.loads((folder(place, "known") / "results.json").read_text())
    said = [meaning for words, meaning in SAID.items() if words in results["verdict"]]
    assert status == 0 and len(said) == 1, results["verdict"]
    assert said[0] in TRUTHS[knowing] | ({"unable"} if strength < 1 else set()), results["verdict"]
    if strength == 1.0:  # where there is something to be seen, it is seen
        assert said[0] != "open" or knowing != ("attn2",), results["verdict"]


def test_splits_classifiers_and_controls_are_more_cells_of_the_same_run(run, place, monkeypatch):
    rows = lora_dataset(n=90, signal=1.0).to_dict()
    rows["leaf"], rows["num_images"] = (
        [f"{i % 3} {i % 15}" for i in range(90)],
        [3 + i % 3 for i in range(90)],
    )
    Dataset.from_dict(rows).save_to_disk("leaves")
    chosen = (
        "--representations",
        "stats",
        "kernel_ridge",
        "--group-column",
        "leaf",
        "--split",
        "random",
        "grouped",
        "--num-splits",
        "2",
        "--controls",
        "--classifiers",
        "--metadata-columns",
        "num_images",
    )
    reads, real = [], WeightReader.read_layer
    monkeypatch.setattr(
        WeightReader,
        "read_layer",
        lambda self, layer, *rest: (reads.append(layer), real(self, layer, *rest))[1],
    )
    assert "Total Progress:       0/41 (0.0%)" in run("--dry-run", *chosen, dataset="./leaves")[1]
    status, log = run(*chosen, dataset="./leaves")
    assert status == 0, log
    assert (
        len(reads) == len(set(reads)) == 16
        and "Split: random, train 63" in log
        and "beside it random1, grouped0, grouped1" in log
    )
    for line in (
        "All Layers Config:    0/2",
        "Further Splits:       0/12",
        "Linear Probe:         0/8",
        "Controls:             0/9",
    ):
        assert line in log
    place_of = folder(place, "leaves")
    names = visible(place_of / "checkpoints")
    assert len(names) == 41 and {
        "all_layers_stats.grouped1.boosting.json",
        "visual_only_kernel_ridge.shuffled.json",
        "no_layers_metadata.json",
        "visual_only_norms.json",
        "down_only_stats.json",
        "up_only_stats.json",
    } <= set(names)
    results, text = (
        json.loads((place_of / "results.json").read_text()),
        (place_of / "results.txt").read_text(),
    )
    assert [row["representation"] for row in results["all_layers_results"]] == [
        "stats_all_layers",
        "kernel_ridge_all_layers",
    ]
    assert (
        len(results["further_cells"]) == 37
        and len(results["comparison"]) == 2
        and not results["failed_cells"]
    )
    found = results["inference"]
    assert found["splits"] == 2 and len(found["inflation"]) == 2 * 2
    assert len(found["shuffled"]["cells"]) == 4 and len(found["classifiers"]) == 2
    made_with = {
        name: json.loads((place_of / "checkpoints" / name).read_text())["made_with"] for name in names
    }
    splits = {
        made_with[f"all_layers_stats{split}.json"]["split"]
        for split in ("", ".random1", ".grouped0", ".grouped1")
    }
    assert len(splits) == 4 and made_with["all_layers_stats.random1.linear.json"]["split"] in splits
    assert (
        made_with["all_layers_stats.shuffled.json"]["labels"] != made_with["all_layers_stats.json"]["labels"]
    )
    norms = next(cell for cell in results["further_cells"] if cell["cell"] == "visual_only_norms")
    assert norms["feature_dim"] == 8
    metadata = next(cell for cell in results["further_cells"] if cell["cell"] == "no_layers_metadata")
    assert (
        found["accuracies"]["no_layers_metadata"]["accuracy"] == pytest.approx(metadata["test_acc_mean"])
        and metadata["num_layers"] == 0
    )
    assert (
        metadata["feature_dim"] == 2
        and metadata["trained_dim"] == 1
        and "The metadata columns alone" in " ".join(text.split())
    )
    for title in (
        "by other classifiers",
        "Linear Probe: All Layers minus Visual-Only",
        "Inflation: ",
        "Shuffled labels: ",
        "Controls: what a part",
    ):
        assert title in text
    with (
        np.load(place_of / "predictions" / "all_layers_stats.grouped1.npz") as arrays,
        np.load(place_of / "predictions" / "all_layers_stats.grouped1.linear.npz") as linear,
    ):
        leaves = np.array(rows["leaf"])
        assert not set(leaves[arrays["train_rows"]]) & set(leaves[arrays["test_rows"]])
        assert (
            np.array_equal(arrays["test_rows"], linear["test_rows"]) and len(linear["test_predictions"]) == 1
        )
    before = snapshot(place_of / "checkpoints")
    assert "Total Progress:       41/41 (100.0%)" in run("--status", *chosen, dataset="./leaves")[1]
    assert (
        "All experiments already completed!" in run(*chosen, dataset="./leaves")[1]
        and snapshot(place_of / "checkpoints") == before
    )
    status, log = run(
        "--representations", "stats", "--group-column", "leaf", dataset="./leaves"
    )  # the plain run leaves and shows them
    assert (
        status == 0 and snapshot(place_of / "checkpoints") == before and "left out of the results" not in log
    )
    status, log = run(*chosen, "--split-seed", "5", dataset="./leaves")
    assert status == 2 and "the rows of the split changed" in log
    rows["num_images"][0] = 99
    Dataset.from_dict(rows).save_to_disk("other/leaves")
    status, log = run(*chosen, dataset="./other/leaves")
    assert status == 2 and "1 finished cells" in log and "the metadata columns changed" in log


def test_a_further_split_is_what_a_run_with_its_seed_would_have_been(run, place):
    chosen = ("--representations", "stats", "centroid_cosine", "kernel_ridge", "--layer-sets", "all_layers")
    assert (
        run(*chosen, "--num-splits", "2")[0] == 0
        and run(*chosen, "--split-seed", "43", "--output-dir", "alone")[0] == 0
    )
    for name in ("stats", "kernel_ridge", "centroid_cosine"):
        with (
            np.load(folder(place) / "predictions" / f"all_layers_{name}.random1.npz") as further,
            np.load(folder(place, output="alone") / "predictions" / f"all_layers_{name}.npz") as alone,
        ):
            for key in set(alone.files) - {"fingerprint"}:
                assert np.array_equal(further[key], alone[key]), (name, key)
        records = (
            cell_files(place)[f"all_layers_{name}.random1.json"],
            cell_files(place, output="alone")[f"all_layers_{name}.json"],
        )
        assert records[0]["learning_curves"] == records[1]["learning_curves"], name


def test_controls_that_the_data_set_has_nothing_for_are_skipped_and_said(run, place):
    status, log = run("--representations", "stats", "--controls", "metadata", "up")
    assert (
        status == 0
        and "Skipped, the data set has no numeric column num_images, max_train_steps, step_loss" in log
    )
    results = json.loads((folder(place) / "results.json").read_text())
    assert [cell["cell"] for cell in results["skipped_cells"]] == [
        "no_layers_metadata"
    ] and "up_only_stats.json" in checkpoints(place)
    assert (
        "no_layers_metadata"
        not in run("--representations", "stats", "--controls", "--output-dir", "new", "--dry-run")[1]
    )
    status, log = run("--representations", "stats", "--split", "grouped")
    assert status == 2 and "--split grouped needs a column of groups" in log
    rows = lora_dataset(n=40).to_dict() | {"num_images": [4] * 40, "steps": list(range(40))}
    Dataset.from_dict(rows).save_to_disk("made")
    chosen = ("--representations", "stats", "--controls", "metadata")
    status, log = run(*chosen, dataset="./made")
    assert status == 0 and "Skipped, num_images are the same for all training rows: no_layers_metadata" in log
    assert "Total Progress:       2/2 (100.0%)" in run("--status", *chosen, dataset="./made")[1]
    named = (*chosen, "--metadata-columns", "steps")
    assert "Total Progress:       2/3 (66.7%)" in run("--status", *named, dataset="./made")[1]
    status, log = run(*named, dataset="./made")
    assert status == 0 and "Controls:             0/1 completed" in log
    for flags in (["--status"], []):  # num_images is among the columns anyway
        assert (
            "Total Progress:       3/3 (100.0%)"
            in run(*flags, *chosen, "--metadata-columns", "num_images", "steps", dataset="./made")[1]
        )


def test_a_named_set_is_known_in_every_split(run, place):
    (place / "sets.json").write_text(
        json.dumps({"layer_sets": ["queries"], "named_layer_sets": {"queries": ["*.to_q.*"]}})
    )
    status, log = run("--config", "sets.json", "--representations", "flat_vec", "--num-splits", "2")
    assert status == 0, log
    columns = {name: record["feature_dim"] for name, record in cell_files(place).items()}
    assert columns == {"queries_flat_vec.json": 8 * 12, "queries_flat_vec.random1.json": 8 * 12}


# --- the report


def test_the_page_follows_a_run_and_an_unchanged_one_leaves_it(run, place, monkeypatch):
    from ablation.report import write

    pages, real = [], write.refresh
    monkeypatch.setattr(
        write,
        "refresh",
        lambda folder, *rest: (real(folder, *rest), pages.append((folder / "report.html").read_text())),
    )
    chosen = ("--representations", "stats", "frequency", "--report")
    status, log = run(*chosen)
    assert (
        status == 0
        and len(pages) == 4
        and [f"Running: {n} of 4 cells were finished" in page for n, page in enumerate(pages, 1)]
        == [True] * 4
    )
    assert "report.html" in log and visible(folder(place)) == [
        "checkpoints",
        "events.jsonl",
        "figures",
        "manifest.json",
        "predictions",
        "report.html",
        "results.json",
        "results.txt",
        "tables",
    ]
    assert {"accuracy.png", "accuracy.pdf", "drop.png"} <= set(visible(folder(place) / "figures"))
    before = snapshot(folder(place) / "figures")
    page = (folder(place) / "report.html").stat().st_mtime_ns
    assert (
        run(*chosen)[0] == 0
        and snapshot(folder(place) / "figures") == before
        and (folder(place) / "report.html").stat().st_mtime_ns == page
    )
    run("--representations", "stats", "frequency", "spectral", "--report")
    assert (folder(place) / "report.html").stat().st_mtime_ns > page and "spectral" in (
        folder(place) / "tables" / "accuracy.csv"
    ).read_text()


@pytest.mark.parametrize("what", ["refresh", "write_report"])
def test_a_report_that_cannot_be_made_costs_no_result(run, place, monkeypatch, what):
    from ablation.report import write

    monkeypatch.setattr(write, what, lambda *rest: 1 / 0)
    status, log = run("--representations", "stats", "--report")
    assert (
        status == 0
        and "could not be written: ZeroDivisionError: division by zero; scripts/report.py makes it anew"
        in log
    )
    assert (
        len(checkpoints(place)) == 2 + 2 and (folder(place) / "results.json").exists()
    )  # two of them hidden locks


def test_tensorboard_is_asked_for_before_the_work(run, place, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = Path(folder)

        def add_scalar(self, name, value, epoch):
            written.append((self.folder.parent.name, self.folder.name, name, value, epoch))

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, log = run("--representations", "stats", "--tensorboard")
    assert status == 2 and "--tensorboard needs the package tensorboard" in log and not folder(place).exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    assert run("--representations", "stats", "--tensorboard")[0] == 0
    curve = json.loads((folder(place) / "checkpoints" / "visual_only_stats.json").read_text())[
        "learning_curves"
    ][1]
    assert [entry[3:] for entry in written if entry[:3] == ("visual_only_stats", "run_2", "val_acc")] == [
        (value, epoch) for epoch, value in enumerate(curve["val_acc_history"], 1)
    ]


def test_watching_a_status_tells_the_rate_and_ends_with_the_run(run, place, monkeypatch):
    status, log = run("--status", "--watch", "--representations", "stats")
    assert (
        status == 0
        and "0/2 cells done, 0 failed, 0 running, 2 left" in log
        and "No run is working on this folder" in log
    )
    assert run("--watch")[0] == 2
    run("--representations", "stats")
    assert (
        "2/2 cells done, 0 failed, 0 running, 0 left"
        in run("--status", "--watch", "--representations", "stats")[1]
    )
    (folder(place) / "checkpoints" / "visual_only_stats.json").unlink()
    with (folder(place) / "events.jsonl").open("a") as file:
        begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 30))
        file.write(
            json.dumps({"time": begun, "event": "started"})
            + "\n"
            + json.dumps({"time": begun, "event": "finished"})
            + "\n{cut"
        )
    monkeypatch.setattr(program_status, "is_held", lambda folder: len(asked) < 2)
    asked = []
    monkeypatch.setattr(program_status.time, "sleep", asked.append)
    log = run("--status", "--watch", "--representations", "stats")[1]
    assert (
        "1/2 cells done, 0 failed, 1 running, 0 left | Rate: " in log
        and "cells/min | ETA: " in log
        and len(asked) == 2
    )


# --- resuming


def test_a_finished_run_is_only_read_again(run, place, monkeypatch):
    run()
    before, results = (
        snapshot(folder(place) / "checkpoints"),
        json.loads((folder(place) / "results.json").read_text()),
    )
    manifest = (folder(place) / "manifest.json").read_bytes()
    monkeypatch.setattr(WeightReader, "read_layer", never)
    monkeypatch.setattr("ablation.runs.train_runs", never)
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
    status, log = run(
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
    monkeypatch.setitem(REPRESENTATIONS, "spectral", REPRESENTATIONS["spectral"]._replace(version=99))
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
    with open("log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None and (not done.exists() or len(visible(done)) < 5):
            time.sleep(0.005)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = snapshot(done)
    assert 5 <= len(finished) < 18
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
    time.sleep(2.2)  # the files are old enough for their identity to be remembered
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
    time.sleep(0.05)
    lora_dataset(n=40, seed=3).to_parquet("loras.parquet")
    status, log = run("--representations", "stats", dataset="loras.parquet")
    assert status == 2 and "the weights of the data set changed" in log


# --- failures


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
        dataset="sanity-check", fast=["--num-runs", "1", "--max-epochs", "2", "--hidden-dim", "8"]
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
    time.sleep(2.2)  # the files are old enough for their identity to be remembered
    if how == "a file":
        (place / "cache").write_text("")
    else:
        from safetensors import SafetensorError

        monkeypatch.setattr(
            "safetensors.numpy.save_file",
            lambda *a, **k: (_ for _ in ()).throw(SafetensorError("No space left on device")),
        )
    status, log = run("--representations", "stats", "--cache-dir", "cache")
    assert status == 0 and "WARNING: features of stats are not cached: " in log
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
    monkeypatch.setattr("ablation.runs.train_runs", never)
    assert run("--representations", "stats")[0] == 0
    assert snapshot(folder(place) / "checkpoints") == kept


def interfere(monkeypatch, action):
    """Do something to the output folder when the third cell starts."""
    real, calls = experiment.run_group, []

    def run_group(*arguments):
        calls.append(1)
        if len(calls) == 3:
            action()
        return real(*arguments)

    monkeypatch.setattr(experiment, "run_group", run_group)


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
    from checkpointing import ResultStore

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResultStore, "save", full)
    status, log = run("--representations", "stats", "frequency")
    assert (
        status == 1 and log.count("Run 1/2") == 1 and log.count("not run: no space left for its results") >= 3
    )


# --- processes


@pytest.mark.parametrize("redirect", [">/dev/full", "| head -1", ">&-"])
def test_a_log_that_cannot_be_written_costs_no_cell(place, redirect):
    command = [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--representations", "stats"]
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join(command)} {redirect}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(visible(folder(place) / "checkpoints")) == 2 and (folder(place) / "results.txt").exists()


def test_a_terminal_without_the_signs_of_the_log_shows_others(place):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--representations", "stats"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and b"Results: Train=" in done.stdout


def default_signals():
    """A shell that runs the tests in the background has SIGINT ignored, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*flags, prefix=(), **kwargs):
    return subprocess.Popen(
        [
            *prefix,
            sys.executable,
            str(SCRIPT),
            "--dataset",
            "./loras",
            "--max-epochs",
            "300",
            "--patience",
            "300",
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=default_signals,
        **kwargs,
    )


def wait_for(process, text):
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_a_run_with_their_status_and_release_the_folder(place, number, status):
    process = start()
    wait_for(process, "[1/18]")
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == status and f"Stopped by {number.name}" in rest and "Traceback" not in rest
    again = start("--hidden-dim", "8", "--representations", "stats", "--max-epochs", "1", "--num-runs", "1")
    assert "another process" not in again.communicate(timeout=60)[0] and again.returncode == 0
    assert not list((place / "visual-ablation-results").rglob("*.tmp"))


def test_a_stop_that_a_library_swallowed_ends_the_run_at_the_next_epoch(run, place, monkeypatch):
    def swallow(*arguments):
        with contextlib.suppress(SystemExit):
            program_log.stop(signal.SIGTERM, None)

    monkeypatch.setattr(program_log, "stopped_by", None)
    interfere(monkeypatch, swallow)
    with pytest.raises(SystemExit) as ended:
        run("--representations", "stats", "frequency")
    assert ended.value.code == 143 and len(visible(folder(place) / "checkpoints")) == 2


def test_under_nohup_a_hangup_is_ignored_and_the_log_has_whole_lines(place):
    lora_dataset(n=40).to_parquet("loras.parquet")  # datasets would draw a bar while it copies this
    process = start(
        "--num-runs",
        "1",
        "--hidden-dim",
        "8",
        "--max-epochs",
        "5",
        "--dataset",
        "loras.parquet",
        prefix=["nohup"],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_DATASETS_CACHE": str(place / "hf")},
    )
    log = wait_for(process, "[1/18]")
    process.send_signal(signal.SIGHUP)
    log += process.communicate(timeout=120)[0]
    assert (
        process.returncode == 0 and "\r" not in log and "Results: " in log and log.endswith("report.html\n")
    )


def test_a_second_run_on_the_same_folder_ends_with_status_3(place):
    process = start()
    try:
        wait_for(process, "[1/18]")
        second = start()
        assert "another process holds" in second.communicate(timeout=60)[0] and second.returncode == 3
        third = start("--status")
        assert "PROGRESS SUMMARY" in third.communicate(timeout=60)[0] and third.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("flag", ["--help", "--status", "--dry-run"])
def test_questions_import_neither_torch_nor_datasets_and_write_nothing(place, flag):
    code = (
        f"import sys; sys.argv = ['x', '--dataset', './loras', {flag!r}]; sys.path.insert(0, {str(ROOT)!r})\n"
        "import visual_ablation_experiment as e\n"
        "try: status = e.main()\nexcept SystemExit as error: status = error.code\n"
        "assert status == 0 and not {'torch', 'datasets'} & set(sys.modules), sorted({'torch', 'datasets'} & "
        "set(sys.modules))"
    )
    before = visible(place)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert visible(place) == before


# --- questions


def test_status_tells_what_is_finished_stale_and_damaged_and_moves_nothing(run, place):
    assert "Total Progress:       0/18 (0.0%)" in run("--status")[1]
    run("--representations", "stats", "frequency")
    path = folder(place) / "checkpoints" / "all_layers_stats.json"
    path.write_bytes(path.read_bytes()[:-9])
    before = snapshot(folder(place) / "checkpoints")
    status, log = run("--status", "--representations", "stats", "frequency")
    assert (
        status == 0
        and "All Layers Config:    1/2 completed, 1 remaining" in log
        and "all_layers_stats is damaged" in log
    )
    for change, words in (
        (["--split-seed", "7"], "split_seed was 42, is now 7"),
        (["--label-column", "group"], "label_column was category_label"),
    ):
        status, log = run("--status", "--representations", "frequency", *change)
        assert "Total Progress:       0/2 (0.0%)" in log and words in log
    status, log = run("--status", "--representations", "stats", "frequency", "--dropout", "0.1")
    assert (
        status == 0
        and "Total Progress:       0/4 (0.0%)" in log
        and "visual_only_stats is stale: dropout was 0.5, is now 0.1" in log
    )
    assert snapshot(folder(place) / "checkpoints") == before


def test_dry_run_tells_what_would_run_why_and_what_it_needs(run, place):
    lora_dataset(n=40).to_parquet("loras.parquet")
    status, log = run("--dry-run", dataset="loras.parquet")
    assert (
        status == 0
        and "all_layers_stats             runs: no checkpoint" in log
        and "Arrow copy" in log
        and "40 rows, 16 layers" in log
    )
    assert not (place / "visual-ablation-results").exists() and not (place / ".feature_cache").exists()
    run("--representations", "stats")
    status, log = run("--dry-run", "--representations", "stats", "spectral", "--num-runs", "3")
    assert (
        "all_layers_stats             stops the run, or runs with --rerun-stale: num_runs was 2, is now 3"
        in log
    )
    status, log = run("--dry-run", dataset="100k")
    assert "100000 rows, 128 layers, 39.86 GB of weights" in log and "4.61 GB features" in log
    assert "39.86 GB Arrow copy" in log and "39.86 GB download" in log
    assert "not known before the download" in run("--dry-run", dataset="someone/their-loras")[1]
    assert run("--dry-run", dataset="2k")[0] == 2


# --- the log


def test_silence_is_broken_by_a_whole_line(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SILENCE", 0.5)
    experiment.log_to_stdout()
    with Progress(128, "layers") as progress:
        progress.advance(80)
        time.sleep(3)
    with Progress(10, "runs") as progress:
        progress.note = "epoch 7"
        time.sleep(2)
    with Progress(None, "loading"):
        time.sleep(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Progress: 80/128 layers | Rate: ") and " layers/s | ETA: " in lines[0]
    assert any(line.startswith("Progress: 0/10 runs | ") and line.endswith("| epoch 7") for line in lines)
    assert any(line.startswith("Progress: loading | ") for line in lines)


def test_slow_work_has_a_rate_too():
    progress = Progress(10, "runs")
    progress.started -= 1000
    progress.advance(2)
    assert progress.line() == "Progress: 2/10 runs | Rate: 7.2 runs/h | ETA: 1h06m"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (6.4, "6s"), (130, "2m10s"), (3900, "1h05m"), (-1, "0s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_under_a_terminal_there_are_bars_and_the_lines_stand_above_them(place):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, "--representations", "stats"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal closes with the process
        while part := os.read(controller, 4096):
            shown += part
    os.close(controller)
    assert process.wait() == 0
    text = shown.decode()
    assert (
        "\r" in text.replace("\r\n", "\n")
        and "0/2 runs [" in text
        and "Run 2/2: Train=" in text
        and " | Rate: " not in text
    )


def test_cell_names_are_the_files_names():
    assert Cell("stats", "visual_only").name == "visual_only_stats"
    assert Path("checkpoints", f"{BOTH[0].name}.json") == Path("checkpoints/all_layers_simple_stats.json")
