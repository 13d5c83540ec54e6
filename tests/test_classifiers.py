"""Classifiers in place of the MLP, against scikit-learn."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ablation import classifiers
from ablation.catalogue import CLASSIFIERS, SPECS
from ablation.classifiers import PROBE_CS, TRAINERS
from ablation.splits import Split
from ablation.task import Listener, Task

BESIDE_THE_MLP = {name: train for name, train in TRAINERS.items() if name != "kernel_ridge"}


def blobs(n=240, columns=12, seed=0):
    """Four classes in two of the columns, another column without any spread, and a split."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    x = 50 + 3 * rng.normal(size=(n, columns))
    x[:, 0] += 6 * (labels % 2)
    x[:, 1] += 6 * (labels // 2)
    x[:, 2] = 1.5
    rows = rng.permutation(n)
    return torch.from_numpy(x).float(), labels, Split(rows[:150], rows[150:180], rows[180:], False)


def test_every_classifier_of_the_catalogue_has_a_trainer():
    assert list(BESIDE_THE_MLP) == list(CLASSIFIERS)
    fitted_with_their_own = {spec.classifier for spec in SPECS.values()} - {""}
    assert set(TRAINERS) == {*CLASSIFIERS, *fitted_with_their_own}


def test_the_linear_probe_is_scikit_learns_on_standardised_columns():
    x, labels, split = blobs()
    runs = []
    trained = TRAINERS["linear"](Task(x, labels, split, 4), Listener(lambda run, number: runs.append(number)))
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=5000)).fit(
            x[split.train].double(), labels[split.train]
        )
        for penalty in PROBE_CS
    ]
    # The first of several.
    best = max(models, key=lambda model: model.score(x[split.val].double(), labels[split.val]))
    for part in ("train", "val", "test"):
        agree = trained.runs[0].predictions[part] == best.predict(x[getattr(split, part)].double())
        assert agree.mean() > 0.98, part
    assert (
        runs == [1]
        and trained.trained_dim == 11
        and best.score(x[split.test].double(), labels[split.test]) > 0.6
    )


def test_boosting_learns_what_no_line_divides():
    x, _, split = blobs(n=600, seed=1)
    outer = ((x[:, 3] - 50).abs() > 2).long().numpy()
    accuracy = {
        name: (
            make(Task(x, outer, split, 4), Listener()).runs[0].predictions["test"] == outer[split.test]
        ).mean()
        for name, make in BESIDE_THE_MLP.items()
    }
    assert accuracy["boosting"] > 0.9 > 0.65 > accuracy["linear"]
    again = [
        TRAINERS["boosting"](Task(x, outer, split, 4), Listener()).runs[0].predictions["test"].tolist()
        for _ in range(2)
    ]
    assert again[0] == again[1]


def test_boosting_sees_fewer_rows_of_a_large_set_and_says_so(monkeypatch, caplog):
    """That is: as if the training set had these rows alone."""
    x, labels, split = blobs(n=600, seed=1)
    labels[split.train[:2]] = 7  # a rare class, which keeps a row
    boost = lambda split: TRAINERS["boosting"](Task(x, labels, split, 8), Listener()).runs[0].predictions
    seen, real = [], classifiers.HistGradientBoostingClassifier.fit
    monkeypatch.setattr(
        classifiers.HistGradientBoostingClassifier,
        "fit",
        lambda self, x, y, *rest, **more: (seen.append(y), real(self, x, y, *rest, **more))[1],
    )
    monkeypatch.setattr(classifiers.log, "propagate", True)
    caplog.set_level("INFO")
    boost(split)
    assert len(seen[0]) == len(split.train) and "Boosting trains on" not in caplog.text
    monkeypatch.setattr(classifiers, "BOOSTING_VALUES", 40 * 11 * 5)
    found = boost(split)
    counts = np.bincount(seen[1], minlength=8)
    of_all = np.bincount(labels[split.train], minlength=8)
    assert (counts == np.where(of_all > 0, np.maximum(1, (of_all * 40) // len(split.train)), 0)).all()
    assert (
        counts[7] == 1
        and f"Boosting trains on {len(seen[1])} of {len(split.train)} training rows" in caplog.text
    )
    assert len(found["train"]) == len(split.train)
    assert np.array_equal(boost(split)["test"], found["test"])


def test_a_class_that_no_row_trains_is_answered_with_another():
    x, labels, split = blobs()
    labels[split.train[labels[split.train] == 3]] = 2
    for name, make in BESIDE_THE_MLP.items():
        predictions = make(Task(x, labels, split, 4), Listener()).runs[0].predictions
        sizes = {part: len(predictions[part]) for part in ("train", "val", "test")}
        assert sizes == {"train": 150, "val": 30, "test": 60}, name
        assert 3 not in predictions["test"] and (labels[split.test] == 3).any()


def test_training_rows_of_one_class_and_validation_rows_of_unknown_ones_are_no_end():
    x, labels, split = blobs()
    one = np.where(np.isin(np.arange(len(labels)), split.train), 1, labels)
    for make in BESIDE_THE_MLP.values():
        assert set(make(Task(x, one, split, 4), Listener()).runs[0].predictions["test"]) == {1}
    unknown = np.where(np.isin(np.arange(len(labels)), split.val), 9, labels)
    for make in BESIDE_THE_MLP.values():
        assert 9 not in make(Task(x, unknown, split, 10), Listener()).runs[0].predictions["val"]


def test_a_probe_that_does_not_converge_says_so(monkeypatch, caplog):
    monkeypatch.setattr(classifiers, "PROBE_ITERATIONS", 2)
    monkeypatch.setattr(classifiers.log, "propagate", True)
    x, labels, split = blobs()
    TRAINERS["linear"](Task(x, labels, split, 4), Listener())
    assert "the linear probe did not converge in 2 iterations at C = " in caplog.text
