"""The program as its users meet it: whole runs, what they write, and what the results mean."""

import json

import numpy as np
import pytest
import torch
from builders import lora_dataset
from datasets import Dataset
from running import BOTH, cell_files, checkpoints, experiment_data, folder, snapshot, visible

import representations
from ablation import cells_at_work
from ablation.catalogue import NINE, SPECS
from ablation.cells import cells_of
from ablation.estimators import difference
from ablation.reading import WeightReader

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
        assert [row["feature_dim"] for row in rows] == [layers * SPECS[name].width for name in NINE]
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


@pytest.mark.slow
def test_what_only_the_text_layers_know_is_lost_without_them(run, place):
    lora_dataset(n=200, signal=True).save_to_disk("many")
    chosen = "--layer-sets all_layers visual_only text_only --representations simple_stats --num-runs 3"
    fast = "--max-epochs 20 --hidden-dim 32 --batch-size 16 --learning-rate 0.01 --no-report"
    status, _ = run(*chosen.split(), dataset="./many", fast=fast.split())
    assert status == 0
    (entry,) = json.loads((folder(place, "many") / "results.json").read_text())["comparison"]
    assert (
        min(entry["text_only"], entry["all_layers"]) > 0.75
        and entry["visual_only"] < 0.7
        and entry["drop"] > 0.25
    )


def test_features_are_the_representations_of_the_layers_in_their_order(run, place, monkeypatch):
    seen = {}
    real = cells_at_work.plan_runs

    def plan_runs(context, prepared, *rest):
        seen[prepared.cell] = prepared.task.features.clone()
        real(context, prepared, *rest)

    monkeypatch.setattr(cells_at_work, "plan_runs", plan_runs)
    run("--representations", "stats", "ensemble", "--layer-sets", "all_layers", "visual_only", "text_only")
    data = experiment_data()
    whole = {layer: data.weights.read_layer(layer, 0, data.num_rows) for layer in data.layers.names}
    for cell in cells_of(("all_layers", "visual_only", "text_only"), ("stats", "ensemble")):
        pattern = {"all_layers": "attn", "visual_only": "attn1", "text_only": "attn2"}[cell.layer_set]
        layers = [layer for layer in data.layers.names if pattern in layer]
        expected = torch.cat(
            [representations.REPRESENTATIONS[cell.representation](whole[layer]) for layer in layers], dim=1
        )
        assert torch.allclose(seen[cell], expected, rtol=1e-6), cell


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
        and f"Groups: 12 by 'leaf'; {n} of {n} test rows share theirs with a training row: --split grouped"
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
    assert entry["p"] == difference(*right, 0.02)["p"]
    assert text in log and text.index("VERDICT") > text.index("All Layers minus Text-Only") > text.index(
        "Chance:"
    )
    assert " ".join(text.split("VERDICT")[1].replace("\n- ", "\n").split()) == results["verdict"]
    # No cell depends on it.
    run("--representations", "stats", "frequency", "--margin", "0.5", "--num-runs", "3")
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
    # Touched by somebody.
    path.write_text(path.read_text().replace('"verdict": "', '"verdict": "All is well. '))
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
    status, _ = run("--representations", "stats", "product_norms", "--num-runs", "5", dataset="./shuffled")
    verdict = json.loads((folder(place, "shuffled") / "results.json").read_text())["verdict"]
    assert (
        status == 0
        and verdict.startswith("No representation is shown to be above chance")
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
    "accuracy falls by": "lost",
    "accuracy rises by": "gained",
    "accuracy stays the same": "same",
    "too small to tell": "open",
    "No representation is shown to be above chance": "unable",
}


@pytest.mark.slow
@pytest.mark.parametrize("knowing", TRUTHS, ids="+".join)
@pytest.mark.parametrize("strength", [1.0, 0.06], ids=["strong", "weak"])
def test_the_verdict_is_right_where_the_answer_is_known_or_says_that_it_cannot_tell(
    run, place, knowing, strength
):
    lora_dataset(n=400, signal=strength, knowing=knowing).save_to_disk("known")
    flags = "--num-runs 5 --max-epochs 20 --hidden-dim 32 --batch-size 32 --learning-rate 0.01 --margin 0.05"
    fast = [*flags.split(), "--no-report"]
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
        *("shuffled", "metadata", "norms", "down", "up"),
        "--classifiers",
        *("linear", "boosting"),
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
    # The plain run leaves and shows them.
    status, log = run("--representations", "stats", "--group-column", "leaf", dataset="./leaves")
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
    planned = run("--representations", "stats", "--controls", "--output-dir", "new", "--dry-run")[1]
    skipped, cells = planned.split("PROGRESS SUMMARY")
    assert "no_layers_metadata" in skipped and "no_layers_metadata" not in cells
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
