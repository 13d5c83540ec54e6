"""What the answer is about and what it does not show, in sentences of at most 25 words; and what all
sentences share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ablation.catalogue import (
    CLASSIFIERS,
    GROUP_COLUMN,
    MAIN_COMPARISON,
    SIZE_MATCHED_COMPARISON,
    TRAINING_COLUMN,
    VISUAL_TEXT_COMPARISON,
    words_of,
)
from ablation.estimators import LEVEL, holm
from ablation.opening import Numbers, outcome

MANY_SPLITS = 5  # from as many on, the corrected test over splits has enough power
FEWEST_HALVES = 19  # random halves: with fewer no place among them is rarer than 1 in 20
LISTED = 3  # names in one sentence


def in_percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f} %"


def names_of(entries: list[Numbers]) -> str:
    """The representations of some entries; beyond LISTED the first ones and how many more there are."""
    names = [entry["representation"] for entry in entries]
    if len(names) > LISTED + 1:
        return f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"
    return ", ".join(names)


def drop_of(entry: Numbers) -> str:
    """A representation's drop with the interval that holds for all of them together, as a sentence."""
    low, high = (100 * end for end in entry["simultaneous_interval"])
    points = f"{100 * entry['drop']:+.1f} points (together 95 %: {low:+.1f} to {high:+.1f})"
    return f"{entry['representation']}: {points}."


def times(count: int) -> str:
    """A number of times."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def are(count: int) -> str:
    """The verb of a sentence about `count` things."""
    return "is" if count == 1 else "are"


# --- reservations


def size_matched_sentences(inference: dict[str, Any]) -> list[str]:
    """Whether the visual layers are worse than random halves of the modules, which lose as many columns."""
    halves = SIZE_MATCHED_COMPARISON.entries_in(inference)
    if not halves:
        return []
    worse = [entry for entry in halves if entry["p_max_t"] < LEVEL and entry["drop"] > 0]
    better = [entry for entry in halves if entry["p_max_t"] < LEVEL and entry["drop"] < 0]
    result = f"lower for {names_of(worse)}" if worse else "not shown to be lower for any representation"
    kept = words_of(SIZE_MATCHED_COMPARISON.second)
    sentences = [
        "Random halves of the modules lose as many columns.",
        f"Against them accuracy with {kept} is {result}.",
        *map(drop_of, worse),
    ]
    return sentences + ([f"It is higher for {names_of(better)}."] if better else [])


def reservations(inference: dict[str, Any]) -> list[str]:
    """What the answer is about, and what it does not show, each with the flag that would tell more."""
    points = (
        [about(inference)],
        split_sentences(inference),
        sensitivity_sentences(inference),
        size_sentences(inference),
        classifier_sentences(inference),
        text_sentences(inference),
        curve_sentences(inference),
        group_sentences(inference),
    )
    return [" ".join(sentences) for sentences in points if sentences]


def size_sentences(inference: dict[str, Any]) -> list[str]:
    """What the cells of --layer-sets random_half say of fewer columns, beside the null."""
    if inference["random_halves"] and inference["random_halves"]["draws"] >= FEWEST_HALVES:
        said = half_sentences(inference["random_halves"], outcome(inference))
        return said[:1] if inference.get("null") else said  # the opening draws the conclusion
    if SIZE_MATCHED_COMPARISON.entries_in(inference):
        return size_matched_sentences(inference)
    return []


def half_sentences(halves: Numbers, result: str) -> list[str]:
    """The place of the visual layers among random halves of the modules, and what it says of a fall."""
    mean, kept = halves["mean"], words_of(MAIN_COMPARISON.second)
    below, draws = mean["rank"] - 1, halves["draws"]
    sentences = [
        f"On average {kept} read more than {below} of {draws} random halves, which have as many modules "
        f"({classifier_words(halves['classifier'])})."
    ]
    if result != "falls":
        return sentences
    if mean["p_lower"] <= LEVEL:
        p = mean["p_lower"]
        return [*sentences, f"So the fall is more than that of losing half of the modules (p = {p:.2f})."]
    return [*sentences, "So the fall may be that of losing half of the modules."]


def classifier_words(classifier: str) -> str:
    """A classifier in words."""
    return "by the MLP" if classifier == "mlp" else f"by the {CLASSIFIERS[classifier].lower()}"


def classifier_sentences(inference: dict[str, Any]) -> list[str]:
    """Whether a linear classifier says the same."""
    found = next((one for one in inference["classifiers"] if one["classifier"] == "linear"), None)
    if found is None or found["mean"] is None:
        return ["One kind of classifier was tried; --classifiers linear would tell whether another agrees."]
    mean, primary = found["mean"], inference["primary"]
    low, high = (100 * end for end in mean["interval"])
    numbers = f"{100 * mean['drop']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
    is_shown, same_sign = mean["p"] < LEVEL, mean["drop"] * primary["drop"] > 0
    if primary["p"] < LEVEL:
        return [
            f"A linear classifier agrees: {numbers}."
            if is_shown and same_sign
            else f"A linear classifier does not show it: {numbers}. Claim no more than what holds for both."
        ]
    return [f"By a linear classifier the drop is {numbers}."]


def others_above_chance(inference: dict[str, Any]) -> list[str]:
    """Where no representation is above chance by the MLP: which other classifiers are above it."""
    if inference["above_chance"]:
        return []
    points, first = [], MAIN_COMPARISON.first
    for one in inference["classifiers"]:
        names = [entry["representation"] for entry in one["entries"]]
        cells = [inference["accuracies"][f"{first}_{name}.{one['classifier']}"] for name in names]
        p_values = holm([cell["p_above_chance"] for cell in cells])
        able = [{"representation": name} for name, p in zip(names, p_values, strict=True) if p < LEVEL]
        if able:
            points.append(
                f"By the {CLASSIFIERS[one['classifier']].lower()} {names_of(able)} {are(len(able))} above "
                "chance. So the MLP may be trained too little, or its settings may not fit."
            )
    return points


def text_sentences(inference: dict[str, Any]) -> list[str]:
    """The visual layers against the text layers, which have as many modules."""
    mean = VISUAL_TEXT_COMPARISON.found_in(inference)["mean"]
    if mean is None:
        return []
    first, second = map(words_of, VISUAL_TEXT_COMPARISON[:2])
    low, high = (100 * end for end in mean["interval"])
    difference = f"{100 * mean['drop']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
    return [
        f"Accuracy with {first} alone less that with {second} alone: {difference}"
        f"{'' if mean['p'] < LEVEL else ', which shows no difference'}."
    ]


def curve_sentences(inference: dict[str, Any]) -> list[str]:
    """The drop on smaller training sets."""
    return [
        f"On {100 * one['share']:.0f} % of the training rows the mean drop is {100 * one['drop']:+.1f} "
        "points."
        for one in inference["learning_curve"][:LISTED]
    ]


GROUP_WORDS = {GROUP_COLUMN: "image sets", TRAINING_COLUMN: "trainings"}


def about(inference: dict[str, Any]) -> str:
    """Which further examples the answer is about."""
    if inference["groups"] is None:
        return "This is about further LoRAs of these classes and new runs."
    column = inference.get("group_column", "")
    groups = f"{GROUP_WORDS.get(column, 'groups')}{f' (`{column}`)' if column else ''}"
    if inference["test_rows_of_untrained_classes"] == inference["test_rows"]:
        return f"This is about concepts that were not trained on ({groups}), and new runs."
    if inference["test_rows_that_share_a_group_with_training"] == 0:
        return (
            f"This is about {groups} that were not trained on, of the same {inference['classes_tested']} "
            "classes, and new runs."
        )
    return f"This is about further {groups} and new runs, each tested beside rows of its own."


def sensitivity_sentences(inference: dict[str, Any]) -> list[str]:
    """The interval if runs were correlated because their training sets overlap."""
    found = inference["primary"]["sensitivity"]
    if not found:
        return []
    ends = [[f"{100 * end:+.1f}" for end in one["interval"]] for one in found]
    now = [f"{100 * end:+.1f}" for end in inference["primary"]["interval"]]
    first = "Runs that share training rows are taken as uncorrelated."
    if all(own == now for own in ends):
        return [first, "They scatter too little here to tell what a correlation would add to the interval."]
    said = ", ".join(
        f"{'with' if i else 'With'} a correlation of {one['correlation']:g} {low} to {high}"
        for i, (one, (low, high)) in enumerate(zip(found, ends, strict=True))
    )
    return [first, f"{said} would be the interval of the drop."]


def split_sentences(inference: dict[str, Any]) -> list[str]:
    """How the rows were divided, and what more would show."""
    splits, kind, folds = inference["splits"], inference["split"], inference["folds"]
    if folds is not None:
        return [
            f"Every row was tested {times(folds['rounds'])}, in {folds['folds']} folds, by models that were "
            "trained on other rows."
        ]
    entries = MAIN_COMPARISON.entries_in(inference)
    fewer = {entry["representation"]: entry["splits"] for entry in entries if entry["splits"] < splits}
    if splits == 1:
        return [f"One {kind} split tests {inference['test_rows']} rows; --folds 5 tests all."]
    some = f" ({', '.join(f'{name}: {number}' for name, number in list(fewer.items())[:LISTED])})"
    sentences = [f"It is from {splits} {kind} splits{some if fewer else ''}."]
    if splits < MANY_SPLITS:
        sentences += [
            f"With {splits} splits the corrected test has little power (degrees of freedom: {splits - 1}).",
            "--folds 5 would show more.",
        ]
    return sentences


def group_sentences(inference: dict[str, Any]) -> list[str]:
    """What is known of new groups."""
    kind = inference["split"]
    inflated = [entry for entry in inference["inflation"] if entry["split"] == kind or kind == "grouped"]
    shared = inference["test_rows_that_share_a_group_with_training"]
    if inflated:
        clear = [entry for entry in inflated if entry["p_holm"] < LEVEL and entry["inflation"] > 0]
        mean = float(np.mean([entry["inflation"] for entry in inflated]))
        return [
            "On grouped splits no test row shares its group with a training row.",
            f"There accuracy came out {100 * abs(mean):.1f} points {'lower' if mean >= 0 else 'higher'} in "
            f"the mean of {len(inflated)} cells; it is shown to be lower for {len(clear) or 'none'} of them.",
        ]
    if shared:
        return [
            f"{shared} of {inference['test_rows']} test rows share their group with a training row."
            if inference["folds"] is None
            else "Test rows share their groups with training rows.",
            "For groups that were not trained on accuracies may be lower and drops others; --split grouped "
            "--folds 5 would tell.",
        ]
    return []


def nuisance_points(inference: dict[str, Any]) -> list[str]:
    """What the metadata columns alone tell, if they were tried."""
    entry = next((e for e in inference["controls"] if e["representation"] == "metadata"), None)
    if entry is None:
        return []
    low, high = entry["interval"]
    numbers = (
        f"{in_percent(entry['accuracy'])} (95 % interval {100 * low:.1f} to {100 * high:.1f}, chance "
        f"{in_percent(inference['chance'])})"
    )
    if entry["p_above_chance"] < LEVEL:
        return [
            f"The metadata columns alone, without any weight, give {numbers}. "
            "So what the weights tell may in part be how the LoRAs were made."
        ]
    return [f"The metadata columns alone are not shown to tell the class: {numbers}."]
