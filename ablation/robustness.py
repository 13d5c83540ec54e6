"""What else a reviewer asks of a drop: does it hold for random halves of the modules, for smaller training
sets, and is a test row told because a training row is nearly the same?
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ablation.catalogue import CLASSIFIERS, MAIN_COMPARISON, NEIGHBOURS, SPECS, group_of
from ablation.cells import Cell
from ablation.family import Margin, mean_drop
from ablation.samples import TEST, Predictions, Sample

TIE = 1e-9  # accuracies that differ by less are of equally many right answers
Samples = dict[Cell, Sample]


def further_evidence(
    samples: Samples, predictions: Predictions, groups: np.ndarray | None, names: list[str], margin: Margin
) -> dict[str, Any]:
    """All of it, for results.json. The learning curve is over the representations `names`."""
    return {
        "random_halves": random_halves(samples),
        "learning_curve": curve_over_training_sizes(samples, names, margin),
        "neighbours": neighbours(predictions, groups),
    }


def random_halves(samples: Samples) -> dict[str, Any] | None:
    """Where the visual layers stand among random halves of the modules, which have as many; None without any.

    If the visual layers were a half like the others, each place would be equally likely. So with n halves
    `p_lower`, the share of the n + 1 sets that read no more than the visual layers, is the p-value of a
    randomisation test that they read less; `p_higher` likewise. `entries` are by representation, `mean` is
    over all of them.
    """
    draws = {cell: sample for cell, sample in samples.items() if group_of(cell.layer_set) == "random_half"}
    used = {cell.classifier for cell in draws if not SPECS[cell.representation].classifier} or {""}
    for classifier in (name for name in ("", *CLASSIFIERS) if name in used):
        halves: dict[str, list[float]] = {}
        for cell, sample in draws.items():
            if cell.own_classifier == (SPECS[cell.representation].classifier or classifier):
                halves.setdefault(cell.representation, []).append(sample.mean)
        kept = {
            name: Cell(name, MAIN_COMPARISON.second, classifier="" if SPECS[name].classifier else classifier)
            for name in halves
        }
        halves = {name: values for name, values in halves.items() if kept[name] in samples}
        if not halves:
            continue
        entries = [
            {"representation": name, **place(samples[kept[name]].mean, halves[name])} for name in halves
        ]
        most = max(map(len, halves.values()))
        whole = [name for name in halves if len(halves[name]) == most]
        mean = place(
            float(np.mean([samples[kept[name]].mean for name in whole])),
            np.mean([halves[name] for name in whole], axis=0).tolist(),
        )
        return {"classifier": classifier or "mlp", "draws": most, "entries": entries, "mean": mean}
    return None


def place(visual: float, halves: list[float]) -> dict[str, Any]:
    """The visual layers' accuracy, those of the halves, and its place among them."""
    return {"visual": visual, "halves": halves, **place_among(visual, halves)}


def place_among(value: float, halves: list[float]) -> dict[str, Any]:
    """The place of an accuracy among others, the lowest is 1, and the p-values of a randomisation test that
    it is lower, higher, or either.
    """
    others = np.array(halves)
    lower, higher = (int((side * (others - value) <= TIE).sum()) for side in (1, -1))
    p_lower, p_higher = ((1 + count) / (1 + len(others)) for count in (lower, higher))
    return {
        "rank": 1 + len(others) - higher,
        "p_lower": p_lower,
        "p_higher": p_higher,
        "p_two_sided": min(1.0, 2 * min(p_lower, p_higher)),
    }


def curve_over_training_sizes(samples: Samples, names: list[str], margin: Margin) -> list[dict[str, Any]]:
    """The mean drop over the representations `names`, and the accuracies, on smaller training sets, the
    smallest first.
    """
    curve = []
    fractions = {cell.fraction: cell.train_percent for cell in samples if cell.fraction}
    for fraction, percent in sorted(fractions.items(), key=lambda item: item[1]):
        pairs = {
            name: (samples[first], samples[second])
            for name in names
            if (first := Cell(name, MAIN_COMPARISON.first, fraction=fraction)) in samples
            and (second := Cell(name, MAIN_COMPARISON.second, fraction=fraction)) in samples
        }
        if pairs:
            found = mean_drop(pairs, margin)
            keys = ("accuracy", "accuracy_of_second", "drop", "interval", "p", "representations")
            curve.append({"share": percent / 100, **{key: found[key] for key in keys}})
    return curve


def neighbours(predictions: Predictions, groups: np.ndarray | None) -> list[dict[str, Any]]:
    """Of each cell with nearest neighbours: the share of test rows whose nearest training row has their
    class, and, where there are groups, their group.
    """
    entries = []
    for cell, arrays in predictions.items():
        if NEIGHBOURS not in arrays or cell.split:
            continue
        nearest = arrays[NEIGHBOURS]
        if "parts" in arrays:
            is_test = arrays["parts"] == TEST
            rows = np.broadcast_to(np.arange(is_test.shape[1]), is_test.shape)[is_test]
            nearest, right = nearest[is_test], (arrays["predictions"] == arrays["labels"])[is_test]
        else:
            rows = np.broadcast_to(arrays["test_rows"], nearest.shape)
            right = arrays["test_predictions"] == arrays["test_labels"]
        same_group = None if groups is None else float((groups[nearest] == groups[rows]).mean())
        entries.append({"cell": cell.name, "same_class": float(right.mean()), "same_group": same_group})
    return entries
