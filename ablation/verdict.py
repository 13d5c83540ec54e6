"""What the inference found about the drop, in sentences of at most 25 words, and no more than it shows: the
answer, and the numbers behind it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ablation.catalogue import MAIN_COMPARISON, NULL_SETS, SHUFFLED, SPECS, words_of
from ablation.cells import spoken_cell
from ablation.estimators import LEVEL
from ablation.family import FEWEST_UNITS
from ablation.opening import more_of, opening, outcome
from ablation.reservations import (
    LISTED,
    are,
    drop_of,
    group_sentences,
    in_percent,
    names_of,
    nuisance_points,
    others_above_chance,
    reservations,
)
from ablation.text_table import margin_text

FEWEST_RUNS = 5  # from as many on, the spread over runs is known well enough for a claim about new runs


class Verdict(NamedTuple):
    """What was found, in sentences: the answer, the numbers behind it, and what it does not say."""

    opening: list[str]
    numbers: list[str]
    reservations: list[str]

    @property
    def text(self) -> str:
        """All sentences, as one paragraph."""
        return " ".join([*self.opening, *self.numbers, *self.reservations])


def verdict(inference: dict[str, Any], is_overlapping: bool = False) -> Verdict:
    """The verdict on the main comparison; `inference` is what `infer` returns.

    It is {} if train, validation and test are the same rows (`is_overlapping`), or if no cell is finished.
    """
    if not inference:
        if is_overlapping:
            return Verdict(["No verdict: train, validation and test are the same rows."], [], [])
        return Verdict(["No verdict: no cell of the tables is finished."], [], [])
    suspect, fine = suspicion(inference)
    reason = why_no_verdict(inference)
    if reason:
        beside = [*others_above_chance(inference), *filter(None, [" ".join(group_sentences(inference))])]
        return Verdict([*suspect, reason], [], [*beside, *fine, *nuisance_points(inference)])
    return Verdict(
        [*suspect, *opening(inference)],
        [
            *average_sentences(inference),
            *plain_sentences(inference),
            *single_sentences(inference),
            *half_by_half_sentences(inference),
        ],
        [*reservations(inference), *fine, *nuisance_points(inference)],
    )


# --- controls


def suspicion(inference: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What shuffled labels say of the experiment, if they were tried: a suspicion, or that there is none."""
    check = inference["shuffled"]
    if check is None:
        return [], []
    count = len(check["cells"])
    if not check["suspect"]:
        return [], [
            f"With shuffled labels no cell is shown to be above chance (p = {check['p']:.3f} for all {count} "
            "together, by the MLP on the first split)."
        ]
    cells = {name: cell for name, cell in check["cells"].items() if cell["p_adjusted"] < check["level"]}
    name, cell = next(iter(cells.items()))
    spoken = spoken_cell(name.removesuffix(f".{SHUFFLED}"))
    accuracy = f"{in_percent(cell['accuracy'])} where {in_percent(cell['expected'])} are due"
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return [
        f"SUSPECT: trained on shuffled labels, {spoken} ({accuracy}){more} {are(len(cells))} above chance.",
        f"By chance this happens with p = {check['p']:.4f} for all {count} cells together, less than "
        f"{check['level']:g}.",
        "Something other than the weights tells the label. Until it is found, no number here means what it "
        "seems to.",
    ], []


# --- the answer


def why_no_verdict(inference: dict[str, Any]) -> str:
    """Why nothing can be said of the drop, '' if something can."""
    if not MAIN_COMPARISON.entries_in(inference):
        first, second = map(words_of, MAIN_COMPARISON[:2])
        return f"No verdict: no representation was run with {first} and with {second} alone."
    entries = MAIN_COMPARISON.entries_in(inference)
    has_seeds = not all(SPECS[entry["representation"]].classifier for entry in entries)
    if inference["runs"] < FEWEST_RUNS and has_seeds:
        return (
            f"No verdict: {inference['runs']} runs a cell do not tell how runs differ; --num-runs "
            f"{FEWEST_RUNS} or more would."
        )
    if inference["splits_with_groups"]:
        return (
            "No verdict: several splits of few groups find hardly any drop; --folds 5 tests every group, in "
            "place of --num-splits."
        )
    primary = inference["primary"]
    if primary is None:
        return (
            f"No representation is shown to be above chance ({in_percent(inference['score_chance'])}), so no "
            "drop is stated."
        )
    if primary["units"] < FEWEST_UNITS:
        what = "test rows" if inference["groups"] is None else "groups of test rows"
        return (
            f"Nothing can be told from {primary['units']} {what}: at least {FEWEST_UNITS} are needed for any "
            "claim."
        )
    return ""


def average_sentences(inference: dict[str, Any]) -> list[str]:
    """The averages behind the opening, and what is kept of the accuracy above chance."""
    primary = inference["primary"]
    first, second = map(words_of, MAIN_COMPARISON[:2])
    chosen = len(primary["representations"])
    what = "Average" if inference["score"] == "accuracy" else f"Average {inference['score']}"
    sentences = [
        f"{what} of {chosen} representation{'s' * (chosen > 1)}: {in_percent(primary['accuracy'])} with "
        f"{first}, {in_percent(primary['accuracy_of_second'])} with {second}, "
        f"{in_percent(inference['score_chance'])} by chance."
    ]
    kept = primary["retained"]
    if kept is not None:
        low, high = (100 * end for end in kept["interval"])
        sentences.append(
            f"With {second} {100 * kept['share']:.0f} % of the accuracy above chance is kept (95 % interval "
            f"{low:.0f} to {high:.0f})."
        )
    return sentences


def plain_sentences(inference: dict[str, Any]) -> list[str]:
    """Accuracy itself, where the classes are so uneven that the answer is of balanced accuracy."""
    if inference["score"] == "accuracy":
        return []
    entries = inference["accuracies"]
    names = inference["primary"]["representations"]
    first, second = (
        sum(entries[f"{layer_set}_{name}"]["accuracy"] for name in names) / len(names)
        for layer_set in MAIN_COMPARISON[:2]
    )
    return [
        f"Accuracy itself is {in_percent(first)} and {in_percent(second)}, by chance "
        f"{in_percent(inference['chance'])}: classes are uneven, so all classes weigh alike here."
    ]


def half_by_half_sentences(inference: dict[str, Any]) -> list[str]:
    """What the null's reader makes of all layers and of each half: of the table's representations, and of the
    products.
    """
    null = inference.get("null")
    if not null:
        return []
    mean, product = null["mean"], null["product"]
    sentences = [f"By ridge regression {sets_read(mean, null)}."]
    if null["is_text_equal"] and more_of(null, "mean") == "none":
        sentences.append(f"Text less visual: {difference_text(mean)}, {not_shown(mean)}.")
    if product is None:
        return sentences
    is_stronger = product[MAIN_COMPARISON.first] > mean[MAIN_COMPARISON.first]
    what = "a stronger reader" if is_stronger else "a reader of the products"
    sentences.append(f"{product['representation']}, {what}: {sets_read(product, null)}.")
    if null["is_text_equal"]:
        said = {
            "text": "so by the products the text layers hold more",
            "visual": "so by the products the visual layers hold more",
            "none": not_shown(product),
        }[more_of(null, "product")]
        sentences.append(f"Text less visual by it: {difference_text(product)}, {said}.")
    return sentences


def sets_read(entry: dict[str, Any], null: dict[str, Any]) -> str:
    """What all layers and each half read; the text layers are called a half if they are as many."""
    text_layers = "text half" if null["is_text_equal"] else "text layers"
    whole, visual, text = (in_percent(entry[name]) for name in NULL_SETS)
    return (
        f"all layers read {whole}, the visual half {visual}, the {text_layers} {text}, random halves "
        f"{in_percent(entry['random_half'])}"
    )


def not_shown(entry: dict[str, Any]) -> str:
    """Words for a difference of text and visual that is not shown."""
    low, high = entry["text_minus_visual"]["interval"]
    return "which shows no difference" if low <= 0 <= high else "not shown after the correction for all tests"


def difference_text(entry: dict[str, Any]) -> str:
    """Text less visual, with its interval."""
    found = entry["text_minus_visual"]
    low, high = (100 * end for end in found["interval"])
    return f"{100 * found['drop']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"


def single_sentences(inference: dict[str, Any]) -> list[str]:
    """Which representations show a change by themselves, and which are not above chance.

    Of a cross-validation in several rounds only those are named that each round shows.
    """
    entries = MAIN_COMPARISON.entries_in(inference)
    able = [entry for entry in entries if entry["representation"] in inference["above_chance"]]
    unable = [entry for entry in entries if entry not in able]
    sentences = []
    changed = [entry for entry in able if entry["p_max_t"] < LEVEL and entry["drop"] != 0]
    for word, sign in (("fall", 1), ("rise", -1)):
        shown = sorted((e for e in changed if sign * e["drop"] > 0), key=lambda entry: entry["p_max_t"])
        if shown and outcome(inference) == f"{word}s":
            verb = f"{word}s" if len(shown) == 1 else word
            sentences.append(
                f"{len(shown)} of {len(entries)} representation{'s' * (len(entries) > 1)} {verb} by "
                f"{'itself' if len(shown) == 1 else 'themselves'} (p < {LEVEL:g}, corrected for all)."
            )
            named = [entry for entry in shown if entry.get("replicated") is not False]
            sentences += map(drop_of, named[:LISTED])
            if not named:
                sentences.append("None of them is shown by each round alone, so none is named.")
    if outcome(inference) in ("falls", "rises") and not sentences and len(able) > 1:
        sentences.append("No single representation shows it by itself, corrected for all of them.")
    equal = [entry for entry in able if entry["p_equivalence_max_t"] < LEVEL and entry not in changed]
    if equal and outcome(inference) == "same":
        sentences.append(f"For {names_of(equal)} the two are equal to within {margin_text(inference)}.")
    if unable:
        sentences.append(
            f"{names_of(unable)} {are(len(unable))} not shown to be above chance "
            f"({in_percent(inference['score_chance'])})."
        )
    return sentences
