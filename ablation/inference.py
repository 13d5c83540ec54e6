"""The saved predictions of an experiment's cells -> accuracies with intervals,
comparisons, ranking, inflation, controls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import scipy.stats

from ablation.catalogue import (
    CLASSIFIERS,
    COMPARISONS,
    LAYER_SET_GROUPS,
    MAIN_COMPARISON,
    Comparison,
    group_of,
)
from ablation.cells import Cell
from ablation.estimators import LEVEL, POWER, StandardError, holm, p_of_mean
from ablation.family import Margin, adjust_family, compared, p_above_chance, primary
from ablation.resampling import RESAMPLING_SEED, sign_flip_test
from ablation.robustness import further_evidence
from ablation.samples import (
    TEST,
    TRAIN,
    Predictions,
    Sample,
    has_uneven_classes,
    join_first_split,
    labels_by_row,
    labels_of_rows,
    samples_of,
    tested_answers,
    tested_predictions,
)

SHUFFLES = 1999  # permutations of the test labels in the check of shuffled labels
SUSPECT_LEVEL = 0.01  # share of runs without a fault that the check calls suspect


def infer(
    predictions: Predictions, groups: np.ndarray | None, margin: Margin, kind: str = "random"
) -> dict[str, Any]:
    """What the saved predictions of an experiment's cells say; {} if no cell of the tables is among them.

    `groups` (N,) are the groups of the data set's rows, if any; `kind` is the first split's. `accuracies` are
    over all splits of that kind; `score` is what is compared, `score_chance` its chance: balanced accuracy
    where classes are uneven; `comparisons` are of two layer sets, representation by representation;
    `max_t` has the main comparison's corrected p-values and `classes` its differences class by class;
    `classifiers` has the main comparison by each classifier beside the MLP; `ranking` every two
    representations; `inflation` what other splits have above grouped ones.
    """
    predictions = of_test_rows(predictions, kind)
    shuffled = {cell: predictions.pop(cell) for cell in list(predictions) if cell.labels}
    samples = join_first_split(samples_of(predictions, groups), kind)
    of_kind = samples.get(kind, {})
    plain = {cell: sample for cell, sample in of_kind.items() if cell.is_plain}
    if not plain:
        return {}
    first_arrays = next(arrays for cell, arrays in predictions.items() if cell.is_plain)
    representations = list(dict.fromkeys(cell.representation for cell in plain))
    labels = labels_by_row(predictions)
    scored, is_balanced = scores_of(of_kind, labels, next(iter(plain.values())))
    accuracies = {
        cell.name: accuracy_entry(sample, scored[cell])
        for cell, sample in of_kind.items()
        if cell.layer_set != "random_half"
    }
    compared_sets = comparisons_of(scored, representations, margin)
    main = compared_sets["primary"]
    tested = representations if main is None else main["representations"]
    first_set = MAIN_COMPARISON.first
    return {
        **test_set_facts(first_arrays, groups, next(iter(plain.values())).chance),
        **design_facts(list(plain.values()), margin, kind),
        "score": "balanced accuracy" if is_balanced else "accuracy",
        "score_chance": scored[next(iter(plain))].chance,
        "accuracies": accuracies,
        **compared_sets,
        "classes": class_differences(sample_pairs(of_kind, representations, MAIN_COMPARISON), labels),
        **further_evidence(scored, predictions, groups, tested, margin),
        "ranking": ranking({c.representation: s for c, s in plain.items() if c.layer_set == first_set}),
        "inflation": all_inflation(samples),
        "controls": [control_entry(cell, accuracies[cell.name]) for cell in of_kind if cell.is_control],
        "shuffled": check_shuffled_labels(shuffled) if shuffled else None,
    }


def comparisons_of(samples: dict[Cell, Sample], representations: list[str], margin: Margin) -> dict[str, Any]:
    """Every two layer sets that are compared, by the MLP and other classifiers, and what is tested first."""
    above = above_chance(sample_pairs(samples, representations, MAIN_COMPARISON))

    def compare(comparison: Comparison, classifier: str = "") -> dict[str, Any]:
        pairs = sample_pairs(samples, representations, comparison, classifier)
        mean = primary(pairs, margin)
        entries = compare_layer_sets(pairs, margin, above)
        return {"first": comparison.first, "second": comparison.second, "mean": mean, "entries": entries}

    comparisons = [compare(comparison) for comparison in COMPARISONS]
    by_classifier = [{"classifier": name, **compare(MAIN_COMPARISON, name)} for name in CLASSIFIERS]
    return {
        "above_chance": above,
        "primary": comparisons[0]["mean"],
        "max_t": {entry["representation"]: entry["p_max_t"] for entry in comparisons[0]["entries"]},
        "comparisons": [comparison for comparison in comparisons if comparison["entries"]],
        "classifiers": [found for found in by_classifier if found["entries"]],
    }


def of_test_rows(predictions: Predictions, kind: str) -> Predictions:
    """The predictions of the test rows as they are, each split once.

    A split called grouped0 is the first of its kind. It was left by a command that named another kind first,
    and it is the same split as ''.
    """
    return {
        cell: arrays for cell, arrays in predictions.items() if not cell.audit and cell.split != f"{kind}0"
    }


def control_entry(cell: Cell, accuracy: dict[str, Any]) -> dict[str, Any]:
    """A control's accuracy with its interval."""
    named = {"cell": cell.name, "representation": cell.representation, "layer_set": cell.layer_set}
    return named | accuracy


def test_set_facts(arrays: dict[str, np.ndarray], groups: np.ndarray | None, chance: float) -> dict[str, Any]:
    """Size, classes and groups of the test rows, how many are of a class without a training row, and how many
    share their group with a training row: of the first split, in a cross-validation of the folds of its first
    round.
    """
    if "parts" in arrays:
        first_round = arrays["parts"][: len(np.unique(tested_answers(arrays)[1][0]))]
        splits = [(np.flatnonzero(of == TEST), np.flatnonzero(of == TRAIN)) for of in first_round]
    else:
        splits = [(arrays["test_rows"], arrays["train_rows"])]
    labels = labels_of_rows(arrays)
    tested = np.concatenate([rows for rows, _ in splits])
    facts: dict[str, Any] = {
        "test_rows": len(tested),
        "classes_tested": len(np.unique(labels[tested])),
        "test_rows_of_untrained_classes": sum(
            int((~np.isin(labels[rows], labels[train_rows])).sum()) for rows, train_rows in splits
        ),
        "groups": None,
        "chance": chance,
    }
    shared = None
    if groups is not None:
        facts["groups"] = len(np.unique(groups[tested]))
        shared = sum(int(np.isin(groups[rows], groups[train_rows]).sum()) for rows, train_rows in splits)
    return facts | {"test_rows_that_share_a_group_with_training": shared}


def design_facts(samples: list[Sample], margin: Margin, kind: str) -> dict[str, Any]:
    """How the tests are made: levels, splits, runs and folds."""
    return {
        "margin": margin.points,
        "margin_share": margin.share,
        "level": LEVEL,
        "power": POWER,
        "split": kind,
        "splits": max(len(sample.right) for sample in samples),
        "runs": max(sample.num_runs for sample in samples),
        "folds": folds_of(samples[0]),
        "splits_with_groups": samples[0].groups is not None
        and max(len(sample.right) for sample in samples) > 1,
    }


def folds_of(sample: Sample) -> dict[str, int] | None:
    """Folds and rounds of a cross-validation; None for single splits."""
    if sample.runs is None:
        return None
    rounds = len(sample.runs)
    return {"folds": sample.num_runs // rounds, "rounds": rounds}


def scores_of(
    samples: dict[Cell, Sample], labels: np.ndarray, first: Sample
) -> tuple[dict[Cell, Sample], bool]:
    """The samples of the score that is compared, and whether it is balanced accuracy: where the classes of
    the rows that `first` tests are uneven.
    """
    tested = np.unique(np.concatenate(list(first.rows.values())))
    if not has_uneven_classes(labels[tested]):
        return samples, False
    return {cell: sample.balanced(labels) for cell, sample in samples.items()}, True


def accuracy_entry(plain: Sample, scored: Sample) -> dict[str, Any]:
    """A cell's accuracy, and its balanced accuracy if that is the score that is compared. `p_above_chance` is
    that of the score.
    """
    entry = plain.accuracy
    if scored is plain:
        return entry
    balanced = scored.accuracy
    return entry | {
        "p_above_chance": balanced["p_above_chance"],
        "balanced_accuracy": balanced["accuracy"],
        "balanced_interval": balanced["interval"],
    }


def above_chance(pairs: dict[str, tuple[Sample, Sample]]) -> list[str]:
    """The representations whose mean accuracy with both layer sets is above chance, after Holm's correction.

    A choice by the mean of both says nothing of their difference.
    """
    p_values = holm([p_above_chance(pair) for pair in pairs.values()])
    return [name for name, p in zip(pairs, p_values, strict=True) if p < LEVEL]


def sample_pairs(
    samples: dict[Cell, Sample], representations: list[str], comparison: Comparison, classifier: str = ""
) -> dict[str, tuple[Sample, Sample]]:
    """The samples of both layer sets of a comparison, by representation, on the splits that both have."""
    pairs = {}
    for name in representations:
        first = samples.get(Cell(name, comparison.first, classifier=classifier))
        second = samples.get(Cell(name, comparison.second, classifier=classifier))
        if first and second and (splits := first.shared_splits(second)):
            pairs[name] = first.of_splits(splits), second.of_splits(splits)
    return pairs


def compare_layer_sets(
    pairs: dict[str, tuple[Sample, Sample]], margin: Margin, above_chance: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The differences of two layer sets, by representation, adjusted for testing all of them. What is
    retained is said of representations that are `above_chance`.
    """
    entries = []
    for name, (first, second) in pairs.items():
        entry = compared(first, second, margin)
        assert entry is not None
        entry["retained"] = entry["retained"] if name in above_chance else None
        entries.append({"representation": name, **entry})
    adjust_family(entries, list(pairs.values()))
    return entries


def class_differences(pairs: dict[str, tuple[Sample, Sample]], labels: np.ndarray) -> list[dict[str, Any]]:
    """Recall of each class with both layer sets, their difference and its 95 % interval, one at a time."""
    entries = []
    for name, (first, second) in pairs.items():
        for number in np.unique(labels[labels >= 0]).tolist():
            chosen = labels == number
            a, b = first.of_rows(chosen), second.of_rows(chosen)
            splits = a.shared_splits(b)
            if not splits:
                continue
            D = {split: a.right[split] - b.right[split].astype(float) for split in splits}
            drop = float(np.mean([values.mean() for values in D.values()]))
            half = a.standard_error_of(D).half_width
            entries.append(
                {
                    "representation": name,
                    "class": number,
                    "rows": len(np.unique(np.concatenate([a.rows[split] for split in splits]))),
                    "first": a.mean,
                    "second": b.mean,
                    "drop": drop,
                    "interval": (max(-1.0, drop - half), min(1.0, drop + half)),
                }
            )
    return entries


def ranking(samples: dict[str, Sample]) -> list[dict[str, Any]]:
    """Every two representations, the better first, adjusted for testing all pairs."""
    pairs = []
    accuracies = {name: sample.accuracy["accuracy"] for name, sample in samples.items()}
    for better, worse in itertools.combinations(sorted(samples, key=lambda name: -accuracies[name]), 2):
        a, b = samples[better], samples[worse]
        longer = max((a, b), key=lambda sample: sample.num_runs)
        D = {
            split: a.repeated(split, len(hits)).astype(np.float64) - b.repeated(split, len(hits))
            for split, hits in longer.right.items()
            if split in a.right and split in b.right
        }
        if not D:
            continue
        mean = float(np.mean([d.mean() for d in D.values()]))
        p = p_of_mean(mean, longer.standard_error_of(D))
        if len(D) == 1:
            ((split, d),) = D.items()
            p = max(p, sign_flip_test(d.mean(0), a.groups_on(split)))
        pairs.append({"better": better, "worse": worse, "difference": mean, "p": p})
    adjust(pairs)
    return pairs


def all_inflation(samples: dict[str, dict[Cell, Sample]]) -> list[dict[str, Any]]:
    """The inflation of every other kind of split against grouped splits, if there are grouped ones."""
    if "grouped" not in samples:
        return []
    return [entry for kind in samples if kind != "grouped" for entry in inflation(samples, kind)]


def inflation(samples: dict[str, dict[Cell, Sample]], kind: str) -> list[dict[str, Any]]:
    """Accuracy of the table's cells on splits of this kind less that on grouped splits.

    Welch's test and 95 % interval, because the two have other test rows; `p_holm` is adjusted over the cells.
    """
    entries = []
    for cell, sample in samples[kind].items():
        grouped = samples["grouped"].get(cell)
        is_group = group_of(cell.layer_set) or cell.layer_set in LAYER_SET_GROUPS
        if grouped is None or not cell.is_plain or is_group:
            continue
        spreads = [
            s.standard_error_of({split: hits.astype(np.float64) for split, hits in s.right.items()})
            for s in (sample, grouped)
        ]
        accuracies = [s.accuracy["accuracy"] for s in (sample, grouped)]
        mean = accuracies[0] - accuracies[1]
        half, p = welch(mean, spreads)
        entries.append(
            {
                "cell": cell.name,
                "split": kind,
                "accuracy": accuracies[0],
                "grouped": accuracies[1],
                "inflation": mean,
                "interval": (max(-1.0, mean - half), min(1.0, mean + half)),
                "p": p,
            }
        )
    adjust(entries)
    return entries


def welch(mean: float, spreads: list[StandardError]) -> tuple[float, float]:
    """Half of the 95 % interval, and the two-sided p-value, of a difference of two independent means."""
    error = math.hypot(*(spread.error for spread in spreads))
    if not 0 < error < math.inf:
        return math.inf, 1.0
    dof = error**4 / sum(spread.error**4 / spread.dof for spread in spreads)
    half = float(scipy.stats.t.ppf(1 - LEVEL / 2, dof)) * error
    half = max(half, *(spread.half_width for spread in spreads))
    return half, float(2 * scipy.stats.t.sf(abs(mean) / error, dof))


def check_shuffled_labels(predictions: Predictions) -> dict[str, Any]:
    """Whether cells that were trained on shuffled labels are
    better on their test labels than on any other order.

    They must not be: in the shuffled data a test row's label could be any other row's as well. `p` is that of
    the largest accuracy of all cells, each in standard deviations above its own mean, among SHUFFLES
    permutations of the test labels: the max-T test of Westfall and Young (1993), which keeps the family-wise
    error exactly. A share of SUSPECT_LEVEL of the runs without a fault is called `suspect`. `cells` has the
    same for each cell.
    """
    tested = [tested_predictions(arrays) for arrays in predictions.values()]
    labels = tested[0][0]
    classes = np.arange(labels.max() + 1)
    # (cells, n, C)
    shares = np.stack([(answers[:, :, None] == classes).mean(0) for _, answers in tested])
    rng, rows = np.random.default_rng(RESAMPLING_SEED), np.arange(len(labels))
    orders = [labels, *(rng.permutation(labels) for _ in range(SHUFFLES))]
    accuracies = np.stack([shares[:, rows, order].mean(1) for order in orders])  # (1 + B, cells)
    spread = accuracies.std(0)
    z = (accuracies - accuracies.mean(0)) / np.where(spread > 1e-12, spread, 1.0)
    largest = z.max(1)
    cells = {
        cell.name: {
            "accuracy": float(accuracies[0, i]),
            "expected": float(accuracies[:, i].mean()),
            "spread": float(spread[i]),
            "p_adjusted": float((largest >= z[0, i] - 1e-9).mean()),
        }
        for i, cell in enumerate(predictions)
    }
    p = min(cell["p_adjusted"] for cell in cells.values())
    return {"p": p, "level": SUSPECT_LEVEL, "suspect": p < SUSPECT_LEVEL, "cells": cells}


def adjust(entries: list[dict[str, Any]]) -> None:
    """Add to each entry its p-values adjusted by Holm's method among those of all entries."""
    for key in ("p", "p_equivalence"):
        if entries and key in entries[0]:
            adjusted = holm([entry[key] for entry in entries])
            for entry, p in zip(entries, adjusted, strict=True):
                entry[f"{key}_holm"] = p
