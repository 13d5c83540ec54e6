"""Scores against scikit-learn, and the record of a cell."""

import numpy as np
import pytest
from builders import record_of
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from ablation import scores as scoring
from ablation.cells import Cell


@pytest.mark.parametrize(
    "case",
    [
        "all occur",
        "absent from labels",
        "absent from predictions",
        "absent from both",
        "one class",
        "perfect",
        "all wrong",
    ],
)
def test_scores_are_scikit_learns(case):
    rng = np.random.default_rng(3)
    labels, predictions = rng.integers(0, 6, 200), rng.integers(0, 6, 200)
    if case == "absent from labels":
        labels[labels == 2] = 3
    elif case == "absent from predictions":
        predictions[predictions == 2] = 3
    elif case == "absent from both":
        labels[labels == 2], predictions[predictions == 2] = 3, 4
    elif case == "one class":
        labels[:] = predictions[:] = 5
    elif case == "perfect":
        predictions = labels.copy()
    elif case == "all wrong":
        predictions = (labels + 1) % 6
    counts = scoring.confusion_matrix(labels, predictions, 6)
    assert np.array_equal(counts, confusion_matrix(labels, predictions, labels=range(6)))
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, average="macro", zero_division=0
    )
    expected = {
        "acc": accuracy_score(labels, predictions),
        "balanced_acc": balanced_accuracy_score(labels, predictions),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }
    assert scoring.scores(counts) == pytest.approx(expected, abs=1e-12)
    assert set(scoring.SCORES) == set(expected)


def test_a_record_has_the_origins_keys_and_true_numbers():
    cell = Cell("stats", "all_layers")
    found = record_of(cell, [0.5, 0.7, 0.9])
    names = [f"{part}_{score}" for part in ("val", "test") for score in ("acc", "f1", "precision", "recall")]
    names += ["train_acc", "training_time", "best_epoch"]
    for name in names:
        assert {f"{name}_mean", f"{name}_std"} <= found.keys()
        assert found[f"{name}_mean"] == pytest.approx(
            np.mean([run[name] for run in found["per_run_results"]])
        )
    assert (
        found["representation"] == "stats_all_layers"
        and found["num_layers"] == 8
        and found["feature_dim"] == 40
        and found["trained_dim"] == 4
    )
    assert found["test_acc_all_runs"] == pytest.approx([0.5, 0.7, 0.9])
    assert found["test_acc_std"] == pytest.approx(np.std([0.5, 0.7, 0.9]))
    assert found["training_time_total"] == 6.0 and found["best_epoch_mean"] == 2
    assert [run["run"] for run in found["per_run_results"]] == [1, 2, 3]
    assert (
        np.array(found["test_confusion_matrices"]).shape == (3, 2, 2)
        and np.array(found["val_confusion_matrices"]).sum() == 120
    )
    assert set(found["learning_curves"][0]) >= {"val_acc_history", "train_loss_history", "best_epoch"}
    assert record_of(cell, [0.5])["test_acc_std"] == 0


def test_scores_are_derived_from_counts_whatever_the_record_says():
    record = record_of(Cell("stats", "all_layers"), [0.5, 0.7])
    per_run = [{**run, "test_f1": 9.0} for run in record["per_run_results"]]
    old = {key: value for key, value in record.items() if not key.startswith("val_recall")}
    assert scoring.with_derived_scores({**old, "test_f1_mean": 9.0, "per_run_results": per_run}) == record
