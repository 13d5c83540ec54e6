"""Predictions -> confusion counts -> scores -> the record of a finished cell.

A trained run hands over predictions. How they are counted and what a score means stands here and nowhere
else. C classes, R runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ablation.catalogue import NEIGHBOURS, PARTS
from ablation.cells import Cell

if TYPE_CHECKING:
    from ablation.collection import View
    from ablation.task import Run, TrainedRuns

UNUSED = -1  # the part of a row that a run neither learns nor is tested on
SCORED_PARTS = ("val", "test")
# Of each scored part, in the records and in results.json.
SCORES = ("acc", "balanced_acc", "f1", "precision", "recall")


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): rows are true classes, columns predicted classes,
    all C of them whether they occur or not.
    """
    counts = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and the macro averages of F1, precision and recall, as fractions, from counts (C, C).

    Averages run over the classes that occur among the labels or the predictions; a ratio 0/0 counts as 0
    (scikit-learn's macro average with zero_division=0). Balanced accuracy is the mean recall of the classes
    that occur among the labels (scikit-learn's balanced_accuracy_score).
    """
    true, predicted, hits = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    occurs = (true + predicted) > 0

    def macro(numerator, denominator) -> float:
        ratios = np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
        return float(ratios[occurs].mean()) if occurs.any() else 0.0

    return {
        "acc": float(hits.sum() / confusion.sum()),
        "balanced_acc": float((hits[true > 0] / true[true > 0]).mean()),
        "f1": macro(2 * hits, true + predicted),
        "precision": macro(hits, predicted),
        "recall": macro(hits, true),
    }


def part_scores(confusions: dict[str, np.ndarray]) -> dict[str, float]:
    """SCORES of each scored part (`test_acc`, ...) from its confusion counts."""
    by_part = {part: scores(confusions[part]) for part in SCORED_PARTS}
    return {f"{part}_{score}": by_part[part][score] for score in SCORES for part in SCORED_PARTS}


def run_scores(
    labels: dict[str, np.ndarray], run: Run, num_classes: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """A run's scores (`train_acc`, and SCORES of val and test) and its confusion counts by part.

    `labels` has the class numbers of the rows of each part.
    """
    confusions = {part: confusion_matrix(labels[part], run.predictions[part], num_classes) for part in labels}
    return {"train_acc": scores(confusions["train"])["acc"], **part_scores(confusions)}, confusions


def mean_and_std(values) -> tuple[float, float]:
    """Mean and population std over the runs (0 for one run)."""
    return float(np.mean(values)), float(np.std(values))


# --- the record of a cell


def cell_record(
    cell: Cell, trained: TrainedRuns, view: View, num_classes: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """The record of a finished cell under the origin's keys. `sizes` has num_layers and feature_dim."""
    per_run, confusions = [], []
    for number, run in enumerate(trained.runs, 1):
        scores_of_run, counts = run_scores(view.labels_by_part(run.fold), run, num_classes)
        timing = {"training_time": run.seconds, "best_epoch": run.best_epoch}
        fold = {"fold": run.fold} if view.folds else {}
        own: dict[str, Any] = {"run": number, **scores_of_run, **timing, "feature_dim": sizes["feature_dim"]}
        per_run.append(own | fold)
        confusions.append(counts)
    record: dict[str, Any] = {
        "representation": f"{cell.representation}_{cell.layer_set}",
        "num_layers": sizes["num_layers"],
        "feature_dim": sizes["feature_dim"],
        "trained_dim": trained.trained_dim,
        **summaries(per_run),
        "training_time_total": sum(run["training_time"] for run in per_run),
        "per_run_results": per_run,
        "learning_curves": [learning_curve(run) for run in trained.runs],
    }
    for part in SCORED_PARTS:
        record[f"{part}_confusion_matrices"] = [counts[part].tolist() for counts in confusions]
    for part in PARTS:
        record[f"{part}_acc_all_runs"] = [run[f"{part}_acc"] for run in per_run]
    return record


def summaries(per_run: list[dict]) -> dict[str, float]:
    """`<key>_mean` and `<key>_std` over the runs for every score, the time and the best epoch."""
    summary = {}
    for key in (key for key in per_run[0] if key not in ("run", "feature_dim", "fold")):
        summary[f"{key}_mean"], summary[f"{key}_std"] = mean_and_std([run[key] for run in per_run])
    return summary


def learning_curve(run: Run) -> dict[str, Any]:
    """A run's history by epoch."""
    return {
        "val_acc_history": run.val_accuracy,
        "train_loss_history": run.train_loss,
        "learning_rate_history": run.learning_rate,
        "best_epoch": run.best_epoch,
    }


def with_derived_scores(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its val and test scores derived anew from the confusion counts.

    So a new or corrected metric needs no new run.
    """
    per_run = []
    for number, run in enumerate(record["per_run_results"]):
        counts = {part: np.array(record[f"{part}_confusion_matrices"][number]) for part in SCORED_PARTS}
        per_run.append({**run, **part_scores(counts)})
    return {**record, **summaries(per_run), "per_run_results": per_run}


# --- predictions


def stacked_predictions(trained: TrainedRuns, part: str) -> np.ndarray:
    """Predictions (R, n) of a part of the rows."""
    return np.stack([run.predictions[part] for run in trained.runs]).astype(np.int32)


def fold_arrays(trained: TrainedRuns, view: View) -> dict[str, np.ndarray]:
    """For predictions/<cell>.npz of a cross-validation: class numbers (N,) of all rows; of each run the
    predictions (R, N), the part that each row was in (R, N), as a position in PARTS, seed and fold (R,). A
    row that a smaller training set leaves out has prediction -1 and part UNUSED.
    """
    N, R = len(view.labels), len(trained.runs)
    predictions, parts = np.full((R, N), -1, np.int32), np.full((R, N), UNUSED, np.int8)
    neighbours = np.full((R, N), -1, np.int32)
    for r, run in enumerate(trained.runs):
        for position, part in enumerate(PARTS):
            rows = view.split_of(run.fold).rows(part)
            predictions[r, rows], parts[r, rows] = run.predictions[part], position
        if NEIGHBOURS in run.predictions:
            neighbours[r, view.split_of(run.fold).test] = run.predictions[NEIGHBOURS]
    return {
        **({NEIGHBOURS: neighbours} if (neighbours >= 0).any() else {}),
        "labels": view.labels.astype(np.int32),
        "predictions": predictions,
        "parts": parts,
        "seeds": np.array([run.seed for run in trained.runs]),
        "folds": np.array([run.fold for run in trained.runs]),
    }


def prediction_arrays(trained: TrainedRuns, view: View) -> dict[str, np.ndarray]:
    """For predictions/<cell>.npz: of each part the row numbers (n,),
    class numbers (n,) and predictions (R, n).
    """
    if view.folds:
        return fold_arrays(trained, view)
    arrays = {}
    for part, labels in view.labels_by_part().items():
        arrays[f"{part}_rows"] = view.split.rows(part)
        arrays[f"{part}_labels"] = labels.astype(np.int32)
        arrays[f"{part}_predictions"] = stacked_predictions(trained, part)
    arrays["seeds"] = np.array([run.seed for run in trained.runs])
    if all(NEIGHBOURS in run.predictions for run in trained.runs):
        arrays[NEIGHBOURS] = stacked_predictions(trained, NEIGHBOURS)
    return arrays


# --- audits


def audit_record(
    cell: Cell, trained: TrainedRuns, view: View, audited: np.ndarray, changes: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What an audit adds to the record of the runs that it scores: of each variant of the test rows that are
    `audited` (N,), accuracies as they are and as changed.

    `changes` has by variant how far the features moved. `agreement` is the share of test predictions that
    stay the same. In cross-validation an accuracy is that of a round, in which each row is tested once.
    """
    runs = trained.runs
    rows = [view.split_of(run.fold).test for run in runs]
    kept = [rows_of_run[audited[rows_of_run]] for rows_of_run in rows]
    rounds = sum(int(rows[0][0] in rows_of_run) for rows_of_run in rows) if view.folds else len(runs)

    def by_round(of_runs: list[np.ndarray]) -> list[np.ndarray]:
        size = len(runs) // rounds
        return [np.concatenate(of_runs[r * size : (r + 1) * size]) for r in range(rounds)]

    before = by_round([run.predictions["test"][audited[of]] for run, of in zip(runs, rows, strict=True)])
    truth = by_round([view.labels[of] for of in kept])

    def of_variant(variant: str, change: dict[str, float]) -> dict[str, Any]:
        name = f"{cell.audit} {variant}"
        none = np.array([], int)  # of a run that tests none of the audited rows
        after = by_round(
            [run.predictions[name] if len(of) else none for run, of in zip(runs, kept, strict=True)]
        )
        accuracies = shares_alike(after, truth)
        mean, std = mean_and_std(accuracies)
        return {
            "test_acc_mean": mean,
            "test_acc_std": std,
            "test_acc_all_runs": accuracies,
            "unchanged_acc_mean": float(np.mean(shares_alike(before, truth))),
            "change": change,
            "agreement": float(np.mean(shares_alike(after, before))),
        }

    variants = {variant: of_variant(variant, change) for variant, change in changes.items()}
    count = len(np.unique(np.concatenate(kept)))
    return {"audit": cell.audit, "layer_set": cell.layer_set, "audited_rows": count, "variants": variants}


def shares_alike(first: list[np.ndarray], second: list[np.ndarray]) -> list[float]:
    """Of each run the share of rows that two arrays of classes give alike."""
    return [float(np.mean(a == b)) for a, b in zip(first, second, strict=True)]


def variant_arrays(
    cell: Cell, trained: TrainedRuns, view: View, audited: np.ndarray, variants: list[str]
) -> dict[str, np.ndarray]:
    """What an audit adds to predictions/<cell>.npz: predictions of each variant of the test rows, (R, n).

    In cross-validation, and where not all test rows are audited, (R, N) over all rows, -1 where a run has
    none.
    """
    arrays = {}
    whole = not view.folds and audited[view.split.test].all()
    for variant in variants:
        name = f"{cell.audit} {variant}"
        if whole:
            arrays[f"{variant}_predictions"] = stacked_predictions(trained, name)
            continue
        stacked = np.full((len(trained.runs), len(view.labels)), -1, np.int32)
        for r, run in enumerate(trained.runs):
            rows = view.split_of(run.fold).test
            if audited[rows].any():
                stacked[r, rows[audited[rows]]] = run.predictions[name]
        arrays[f"{variant}_predictions"] = stacked
    return arrays
