"""The answers of `null_reading` -> where the visual half stands among random halves, and the text half.

Every half has as many modules of each block as the visual layers. If the text layers held no more than other
layers, the visual half would be one of these halves, and each place among them equally likely. So the share
of halves that read no more is the p-value of a randomisation test.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ablation.catalogue import NULL_HALVES, NULL_PRODUCT, NULL_SETS
from ablation.estimators import LEVEL, holm
from ablation.family import Margin, compared, mean_sample
from ablation.robustness import place_among
from ablation.samples import Sample

CONTRAST_KEYS = ("drop", "interval", "p", "dof", "standard_error")
Entry = dict[str, Any]
Answers = dict[str, np.ndarray]  # of one representation; see `NullReading.answers`


def null_evidence(
    answers: dict[str, Answers],
    names: list[str],
    groups: np.ndarray | None,
    labels: np.ndarray | None,
    chance: float = 0.0,
) -> dict[str, Any] | None:
    """Where the visual half stands, for results.json; None without answers.

    `names` are the representations of the primary hypothesis: `entries` are by representation, `mean` is over
    those of them that were read. `product` is the entry of NULL_PRODUCT. With `labels` (N,), the classes of
    the data set's rows, scores are balanced accuracies. `chance` is that of the score. `tests` has the
    p-values of what sentences say, with Holm's correction over all of them.
    """
    samples = {name: samples_of_sets(own, groups, labels) for name, own in answers.items()}
    halves = {name: scores_of_halves(own, labels is not None) for name, own in answers.items()}
    of_table = [name for name in names if name in samples]
    if not of_table:
        return None
    some = next(iter(answers.values()))
    is_text_equal = bool(some["is_text_equal"])
    by_name = {
        name: {"representation": name, **entry_of(samples[name], halves[name], is_text_equal)}
        for name in dict.fromkeys([*of_table, *([NULL_PRODUCT] if NULL_PRODUCT in samples else [])])
    }
    mean = entry_of(
        {layer_set: mean_sample([samples[name][layer_set] for name in of_table]) for layer_set in NULL_SETS},
        np.mean([halves[name] for name in of_table], axis=0),
        is_text_equal,
    )
    all_layers = mean_sample([samples[name][NULL_SETS[0]] for name in of_table])
    mean["p_above_chance"] = replace(all_layers, chance=chance).accuracy["p_above_chance"]
    product = None if of_table == [NULL_PRODUCT] else by_name.get(NULL_PRODUCT)
    return {
        "halves": NULL_HALVES,
        "reader": "ridge regression",
        "representations": of_table,
        "is_text_equal": is_text_equal,
        "train_rows": int(some["train_rows"]),
        "test_rows": sum(len(rows) for key, rows in some.items() if key.startswith("rows.")),
        "mean": mean,
        "product": product,
        "entries": [by_name[name] for name in of_table],
        "tests": tests_of(mean, product),
    }


def tests_of(mean: Entry, product: Entry | None) -> list[dict[str, Any]]:
    """What sentences say: of the mean and of the product, the place of the visual half on either side, and,
    where the text layers are as many, their difference.
    """
    tests = []
    for of, entry in (("mean", mean), ("product", product)):
        if entry is not None:
            tests.append({"of": of, "what": "place", "p": entry["visual"]["p_two_sided"]})
            if entry["text_minus_visual"] is not None:
                tests.append({"of": of, "what": "text_minus_visual", "p": entry["text_minus_visual"]["p"]})
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return tests


def samples_of_sets(own: Answers, groups: np.ndarray | None, labels: np.ndarray | None) -> dict[str, Sample]:
    """Right or wrong, row by row, of NULL_SETS; with `labels` the row values of balanced accuracy."""
    views = sorted(int(key.removeprefix("rows.")) for key in own if key.startswith("rows."))
    is_folds = len(own["hits.0"]) > own["runs.0"].shape[0]
    samples = {}
    for number, layer_set in enumerate(NULL_SETS):
        sample = Sample(
            right={str(v): own[f"predictions.{v}"][number] == own[f"labels.{v}"] for v in views},
            rows={str(v): own[f"rows.{v}"] for v in views},
            ratio=float(np.mean([own[f"ratio.{v}"] for v in views])),
            chance=0.0,
            groups=groups,
            runs=own["runs.0"] if is_folds else None,
        )
        samples[layer_set] = sample if labels is None else sample.balanced(labels)
    return samples


def scores_of_halves(own: Answers, is_balanced: bool) -> np.ndarray:
    """The score of each half, (H,): the mean over the views."""
    scores = []
    for v in range(sum(key.startswith("hits.") for key in own)):
        hits, counts = own[f"hits.{v}"].sum(0), own[f"counts.{v}"].sum(0)  # (H, C), (C,)
        occurs = counts > 0
        recalls = hits[:, occurs] / counts[occurs]
        scores.append(recalls.mean(1) if is_balanced else hits.sum(1) / counts.sum())
    return np.mean(scores, axis=0)


def entry_of(samples: dict[str, Sample], halves: np.ndarray, is_text_equal: bool) -> Entry:
    """The scores of all sets, how much the visual half and the random ones lose, the places of the visual and
    the text layers, and their difference, which is None where they are not as many.
    """
    scores = {layer_set: sample.mean for layer_set, sample in samples.items()}
    whole, visual, text = NULL_SETS
    falls = scores[whole] - halves
    low, high = np.quantile(falls, [LEVEL / 2, 1 - LEVEL / 2])
    contrast = compared(samples[text], samples[visual], Margin())
    assert contrast is not None  # both are of the same rows
    return {
        **scores,
        "random_half": float(halves.mean()),
        "fall": scores[whole] - scores[visual],
        "fall_of_halves": {"mean": float(falls.mean()), "middle": (float(low), float(high))},
        "halves": halves.tolist(),
        "visual": place_among(scores[visual], halves.tolist()),
        "text": place_among(scores[text], halves.tolist()),
        "text_minus_visual": {key: contrast[key] for key in CONTRAST_KEYS} if is_text_equal else None,
    }
