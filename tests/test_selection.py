"""Which cells run: products, fitted representations, audits, layer sets."""

import json

import numpy as np
import pytest
import torch
from builders import lora_columns, lora_dataset
from datasets import Dataset
from running import cell_files, folder, never, snapshot, visible

import representations
from ablation.catalogue import CHOICES, SPECS
from ablation.cells import cells_of
from ablation.reading import WeightReader
from ablation.reservations import size_matched_sentences

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
    count = len(CHOICES)
    assert visible(folder(place) / "checkpoints") == sorted(f"{cell.name}.json" for cell in cells)
    assert len(cells) == 6 * count >= 120  # two layer sets, each with two audits
    for line in (
        f"All Layers Config:    0/{count} completed, {count} remaining",
        f"Visual-Only Config:   0/{count}",
        f"Gauge Audit:          0/{2 * count}",
        f"Total Progress:       0/{6 * count}",
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
    assert len(results["audits"]) == 4 * count and results["skipped_cells"] == results["failed_cells"] == []
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
    assert status == 0 and f"Noise Audit:          {2 * count}/{2 * count} completed, 0 remaining" in log


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
        monkeypatch.setitem(SPECS, name, SPECS[name]._replace(max_rows=39))
    status, log = run("--representations", "stats", "kernel_ridge")
    assert (
        status == 0
        and "for at most 39 rows, the data set has 40: all_layers_kernel_ridge, visual_only_kernel_ridge"
        in log
    )


def test_nearest_is_skipped_where_it_would_take_hours(run, monkeypatch):
    """40 rows: stats has 7 columns of each of 16 layers; flat_vec 12, and 8 layers are visual."""
    chosen = ("--representations", "stats", "flat_vec", "--classifiers", "nearest")
    monkeypatch.setattr("ablation.selection.MAX_NEAREST_PRODUCTS", 40 * 40 * 7 * 16)
    for flags in ((), ("--dry-run",)):
        status, log = run(*chosen, *flags)
        skipped = (
            "Skipped, nearest is for at most 30 rows of flat_vec, here are 40: all_layers_flat_vec.nearest"
        )
        assert status == 0 and f"{skipped}\n" in log and log.count("Skipped, ") == 1


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
    # Of the rows, and of the audit's.
    assert status == 1 and log.count("product_norms failed on rows 0..40 of unet.") == 2
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
    chosen = ("--representations", "stats", "product_norms", "--audit", "noise", "--no-cache-features")
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
    assert status == 1 and "all_layers_pca FAILED: TrainingError: feature 0 of row 0 is nan" in log
    assert visible(folder(place) / "checkpoints") == ["all_layers_flat_vec.json", "visual_only_flat_vec.json"]


def test_a_plan_counts_products_and_fits(run, place):
    status, log = run("--dry-run", *EVERYTHING)
    assert status == 0 and f"Will run {6 * len(CHOICES)}" in log and "all_layers_flat_vec.noise" in log
    memory = lambda log: float(log.split("Memory:  ")[1].split(" GB")[0])
    lora_dataset(n=30000, width=1).save_to_disk("many")
    _, plain = run("--dry-run", "--representations", "nine", "product", "kernel_ridge", dataset="./many")
    _, audited = run(
        "--dry-run", "--representations", "nine", "product", "--audit", "gauge", "noise", dataset="./many"
    )
    assert (
        memory(audited) == pytest.approx(2.8 * memory(plain), rel=0.1)
        and "kernel_ridge" not in plain.split("Output folder")[1]
    )


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
    status, log = run("--config", "sets.json", "--num-runs", "5")
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
    # Fewer columns, and which columns.
    assert drops[pairs[0]] == pytest.approx(drops[pairs[1]] + drops[pairs[2]])
    assert (
        "random_half_stats" not in results["inference"]["accuracies"]
        and "random_half.1_stats" in results["inference"]["accuracies"]
    )
    assert (
        "Random Halves minus Visual-Only" in text
        and "Single blocks" in text
        and size_matched_sentences(results["inference"])[0]
        == "Random halves of the modules lose as many columns."
    )
    before = snapshot(folder(place) / "checkpoints")
    assert "All experiments already completed!" in run("--config", "sets.json", "--num-runs", "5")[1]
    assert (
        "By Block Config:      8/8 completed, 0 remaining"
        in run("--status", "--config", "sets.json", "--num-runs", "5")[1]
    )
    # The plain run leaves and shows them.
    status, log = run("--representations", "stats", "product_norms", "--num-runs", "5")
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
