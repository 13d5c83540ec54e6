"""What --thorough adds: smaller training sets, random halves by a linear classifier, nearest neighbours."""

import json
import re

import numpy as np
import pytest
from builders import load, lora_dataset
from running import FAST, folder
from sklearn.neighbors import KNeighborsClassifier

from ablation import inference, robustness
from ablation.catalogue import THOROUGH
from ablation.cells import Cell
from ablation.command_line import parse_command_line
from ablation.conversion import build_settings
from ablation.family import Margin
from ablation.inference_text import inference_lines
from ablation.samples import Sample
from ablation.selection import list_cells
from ablation.settings import InputError
from ablation.splits import SplitSpec
from ablation.training import standardise
from ablation.verdict import verdict

TEN = ["--num-runs", "10", *FAST[2:]]


def settings_of(*argv):
    return parse_command_line(list(argv), "x\n\nExit status: 0")[0]


# --- what is asked for


def test_thorough_is_a_set_of_defaults_over_which_flags_win():
    chosen = settings_of("--thorough")
    assert chosen == build_settings(THOROUGH | {"folds": 5})
    assert settings_of("--thorough", "--random-halves", "3", "--audit-rows", "7").random_halves == 3
    assert settings_of("--dataset", "1k", "--thorough").folds == 0
    assert settings_of().classifiers == () == settings_of().train_fractions


def test_the_cells_of_a_thorough_run():
    halves = [f"random_half.{i}" for i in range(19)]
    layer_sets = ["all_layers", "visual_only", "text_only", *halves]
    cells = list_cells(settings_of("--thorough", "--representations", "stats", "kernel_ridge"), layer_sets)
    names = {cell.name for cell in cells}
    assert len(names) == len(cells)
    assert "random_half.18_stats.linear" in names and "random_half.18_kernel_ridge" in names
    assert "random_half.0_stats" not in names and "random_half.0_stats.gauge" not in names
    assert {"text_only_stats.train25", "all_layers_kernel_ridge.train50", "visual_only_stats.gauge"} <= names
    assert {"all_layers_stats.nearest", "no_layers_metadata", "text_only_norms"} <= names
    assert "all_layers_stats.train25.linear" not in names and "all_layers_kernel_ridge.nearest" not in names
    for name in names:
        assert Cell.named(name).name == name
    few = Cell.named("all_layers_stats.train25")
    assert (few.train_percent, few.is_plain, few.title) == (25, False, "Fewer Training Rows")
    assert few.spoken == "stats of all layers, 25 % of the training rows"


def test_halves_by_a_classifier_bring_what_they_are_set_beside():
    chosen = settings_of(
        "--layer-sets", "all_layers", "random_half", "--halves-by", "linear", "--random-halves", "2"
    )
    names = {cell.name for cell in list_cells(chosen, ["all_layers", "random_half.0", "random_half.1"])}
    assert {"random_half.0_stats.linear", "visual_only_stats.linear"} <= names
    assert "all_layers_stats.linear" not in names and "visual_only_stats" not in names


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "nan", "half", "0.001", "0.255"])
def test_what_is_no_share_of_the_training_rows_is_refused(share):
    with pytest.raises(InputError, match=f"--train-fractions {share} is no share"):
        build_settings({"train_fractions": ["0.5", share]})


def test_shares_of_the_training_rows_hold_each_other_and_keep_the_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora_dataset(n=90).save_to_disk("loras")
    data = load("./loras")
    for spec in (None, SplitSpec("stratified", 1, folds=5)):
        whole = data.view(spec)
        quarter, half = (data.view(spec, train_percent=percent) for percent in (25, 50))
        splits = zip(
            whole.folds or [whole.split],
            half.folds or [half.split],
            quarter.folds or [quarter.split],
            strict=True,
        )
        for full, some, few in splits:
            assert set(few.train) < set(some.train) < set(full.train)
            assert np.array_equal(few.test, full.test) and np.array_equal(few.val, full.val)
            counts = np.bincount(data.labels[full.train])
            assert np.abs(np.bincount(data.labels[few.train]) - counts / 4).max() <= 0.5


# --- numbers


def test_the_place_among_random_halves_is_a_randomisation_test():
    found = robustness.place(0.3, [0.1, 0.2, 0.3, 0.4])
    assert (found["rank"], found["p_lower"], found["p_higher"]) == (3, 4 / 5, 3 / 5)
    rng = np.random.default_rng(0)
    p = [
        robustness.place(value, others)["p_lower"] for value, *others in rng.normal(size=(4000, 20)).tolist()
    ]
    # Uniform on 1/20 .. 1 where the visual layers are a half like the others.
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.011)
    assert np.mean(p) == pytest.approx(10.5 / 20, abs=0.02)


def test_random_halves_and_smaller_training_sets_are_read_from_their_cells():
    rng = np.random.default_rng(1)

    def sample(accuracy):
        return Sample({"": rng.random((5, 400)) < accuracy}, {"": np.arange(400)}, 0.25, 0.1, None)

    samples = {Cell("stats", "visual_only", classifier="linear"): sample(0.3)}
    for i in range(19):
        samples[Cell("stats", f"random_half.{i}", classifier="linear")] = sample(0.5)
    for fraction, drop in (("train25", 0.1), ("train50", 0.2)):
        samples[Cell("stats", "all_layers", fraction=fraction)] = sample(0.6)
        samples[Cell("stats", "visual_only", fraction=fraction)] = sample(0.6 - drop)
    found = robustness.random_halves(samples)
    assert (found["classifier"], found["draws"], found["mean"]["rank"]) == ("linear", 19, 1)
    assert found["mean"]["p_lower"] == 0.05 and found["entries"][0]["halves"] == found["mean"]["halves"]
    samples[Cell("kernel_ridge", "visual_only")] = sample(0.5)  # has no MLP, whoever reads the halves
    for i in range(19):
        samples[Cell("kernel_ridge", f"random_half.{i}")] = sample(0.3)
    found = robustness.random_halves(samples)
    assert found["classifier"] == "linear" and len(found["entries"]) == 2
    assert {one["representation"]: one["rank"] for one in found["entries"]} == {
        "stats": 1,
        "kernel_ridge": 20,
    }
    curve = robustness.curve_over_training_sizes(samples, ["stats"], Margin())
    assert [one["share"] for one in curve] == [0.25, 0.5]
    for one, drop in zip(curve, (0.1, 0.2), strict=True):
        assert one["drop"] == pytest.approx(drop, abs=0.05) and one["interval"][0] < drop < one["interval"][1]


def test_what_only_other_classifiers_read_is_said():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 200)

    def arrays(accuracy):
        told = np.where(rng.random((5, 200)) < accuracy, labels, rng.integers(0, 4, (5, 200)))
        rows = np.arange(200)
        of_train = {"train_rows": rows + 200, "train_labels": labels}
        return {"test_rows": rows, "test_labels": labels, "test_predictions": told} | of_train

    cells = {Cell("stats", name): arrays(0.0) for name in ("all_layers", "visual_only")}
    cells |= {Cell("stats", name, classifier="linear"): arrays(0.9) for name in ("all_layers", "visual_only")}
    for fraction in ("train25", "train50"):
        cells |= {Cell("stats", cell.layer_set, fraction=fraction): arrays(0.0) for cell in list(cells)[:2]}
    found = inference.infer(cells, None, Margin())
    assert found["above_chance"] == [] and len(found["learning_curve"]) == 2
    said = verdict(found)
    assert "No representation is shown to be above chance" in said.text
    assert said.reservations[0].startswith("By the linear probe stats is above chance.")
    assert "none of which is shown" in "\n".join(inference_lines(found))


# --- a whole run


@pytest.mark.slow
def test_a_thorough_run_says_what_it_found_in_short_sentences(run, place):
    dataset = lora_dataset(n=90, signal=2.0)
    dataset.add_column("num_images", [i % 4 for i in range(90)]).save_to_disk("many")
    chosen = (
        "--thorough",
        "--folds",
        "5",
        "--representations",
        "simple_stats",
        "stats",
        "--audit-rows",
        "15",
    )
    fast = "--num-runs 5 --max-epochs 8 --hidden-dim 16 --learning-rate 0.01 --no-report".split()
    status, log = run(*chosen, dataset="./many", fast=fast)
    assert status == 0, log
    results = json.loads((folder(place, "many") / "results.json").read_text())
    found = results["inference"]
    assert found["random_halves"]["draws"] == 19 and len(found["learning_curve"]) == 2
    assert {one["classifier"] for one in found["classifiers"]} == {"linear", "nearest"}
    assert all(entry["audited_rows"] == 15 for entry in results["audits"])
    text = results["verdict"]
    for said in ("random halves", "linear classifier", "of the training rows", "the text layers alone"):
        assert said in text, text
    for sentence in re.split(r"(?<=\.) ", text):
        assert len(sentence.split()) <= 25, sentence
    shown = (folder(place, "many") / "results.txt").read_text()
    for title in ("among 19 random halves", "by the share of the training rows", "Nearest training row"):
        assert title in shown
    assert verdict(found).text == text

    with np.load(folder(place, "many") / "predictions" / "all_layers_stats.nearest.npz") as arrays:
        neighbours, predictions, parts = (arrays[key] for key in ("neighbours", "predictions", "parts"))
    data = load("./many")
    with np.load(folder(place, "many") / "predictions" / "all_layers_stats.train25.npz") as arrays:
        used = (arrays["parts"] == 0).sum(1)
    assert np.abs(used - (parts == 0).sum(1) / 4).max() <= 2
    from ablation.extraction import Request, extract_features

    x = extract_features(Request(data, {"stats": 7})).features["stats"]
    for r in range(2):
        train, test = (np.flatnonzero(parts[r] == part) for part in (0, 2))
        import torch

        columns = standardise(x, torch.from_numpy(train)).numpy().astype(np.float64)
        oracle = KNeighborsClassifier(1, algorithm="brute").fit(columns[train], data.labels[train])
        assert np.array_equal(oracle.predict(columns[test]), predictions[r, test])
        assert np.array_equal(data.labels[neighbours[r, test]], predictions[r, test])
        assert (parts[r][neighbours[r, test]] == 0).all() and (neighbours[r, train] == -1).all()
    entry = next(one for one in found["neighbours"] if one["cell"] == "all_layers_stats.nearest")
    right = (predictions == data.labels)[parts == 2].mean()
    assert entry["same_class"] == pytest.approx(right) and entry["same_group"] is None
