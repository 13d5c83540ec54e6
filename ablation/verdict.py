"""What the inference found about the drop, in sentences of at most 25 words, and no more than it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ablation.catalogue import MAIN_COMPARISON, SHUFFLED, SIZE_MATCHED_COMPARISON, Comparison, words_of
from ablation.cells import spoken_cell
from ablation.estimators import LEVEL, POWER, holm

MANY_SPLITS = 5  # from as many on, the corrected test over splits has enough power
FEWEST_RUNS = 3  # from as many on, the spread over runs is known well enough for a claim about new runs
LISTED = 3  # names in one sentence

Numbers = dict[str, Any]


def verdict(inference: dict[str, Any], is_overlapping: bool = False) -> str:
    """One paragraph about the drop, with its conditions; `inference` is what `infer` returns.

    It is {} if train, validation and test are the same rows (`is_overlapping`), or if no cell is finished.
    """
    if not inference:
        if is_overlapping:
            return "No verdict: train, validation and test are the same rows."
        return "No verdict: no cell of the tables is finished."
    sentences = [*suspicion(inference), *drop_sentences(inference), *nuisances(inference)]
    return " ".join(sentences)


# --- numbers and lists in sentences


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
    """A representation's drop with its interval, as a sentence."""
    low, high = (100 * end for end in entry["interval"])
    points = f"{100 * entry['drop']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"
    return f"{entry['representation']}: {points}."


def are(count: int) -> str:
    """The verb of a sentence about `count` things."""
    return "is" if count == 1 else "are"


# --- controls


def suspicion(inference: dict[str, Any]) -> list[str]:
    """What shuffled labels say of the experiment, if they were tried."""
    check = inference["shuffled"]
    if check is None:
        return []
    count = len(check["cells"])
    if not check["suspect"]:
        return [
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
    ]


def nuisances(inference: dict[str, Any]) -> list[str]:
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
            f"The metadata columns alone, without any weight, give {numbers}.",
            "So what the weights tell may in part be how the LoRAs were made.",
        ]
    return [f"The metadata columns alone are not shown to tell the class: {numbers}."]


# --- the drop


@dataclass(frozen=True)
class Classified:
    """The entries of the main comparison by what is shown:
    not above chance, a fall, a rise, equality, or nothing.
    """

    entries: list[Numbers]
    unable: list[Numbers]
    lost: list[Numbers]
    gained: list[Numbers]
    equal: list[Numbers]
    undecided: list[Numbers]


def entries_of(inference: dict[str, Any], comparison: Comparison) -> list[Numbers]:
    """The entries of a comparison, [] if it was not run."""
    for compared in inference["comparisons"]:
        if (compared["first"], compared["second"]) == (comparison.first, comparison.second):
            return compared["entries"]
    return []


def classify(inference: dict[str, Any], entries: list[Numbers]) -> Classified:
    """Sort the entries of the main comparison by what is shown, after Holm's correction."""
    accuracies = inference["accuracies"]
    cells = [accuracies[f"{MAIN_COMPARISON.first}_{entry['representation']}"] for entry in entries]
    above = holm([cell["p_above_chance"] for cell in cells])
    able = [entry for entry, p in zip(entries, above, strict=True) if p < LEVEL]
    changed = [entry for entry in able if entry["p_holm"] < LEVEL and entry["drop"] != 0]
    equal = [entry for entry in able if entry["p_equivalence_holm"] < LEVEL and entry not in changed]
    return Classified(
        entries=entries,
        unable=[entry for entry in entries if entry not in able],
        lost=[entry for entry in changed if entry["drop"] > 0],
        gained=[entry for entry in changed if entry["drop"] < 0],
        equal=equal,
        undecided=[entry for entry in able if entry not in changed + equal],
    )


def drop_sentences(inference: dict[str, Any]) -> list[str]:
    """What is shown about the drop of the main comparison, and under which conditions."""
    entries = entries_of(inference, MAIN_COMPARISON)
    if not entries:
        first, second = map(words_of, MAIN_COMPARISON[:2])
        return [f"No verdict: no representation was run with {first} and with {second} alone."]
    if inference["runs"] < FEWEST_RUNS:
        return [
            f"No verdict: {inference['runs']} runs a cell do not tell how runs differ; --num-runs "
            f"{FEWEST_RUNS} or more would."
        ]
    classified = classify(inference, entries)
    return [
        *chance_sentences(classified, inference["chance"]),
        *change_sentences(classified, inference["margin"]),
        *undecided_sentences(classified, inference),
        *size_matched_sentences(inference),
        *scope_sentences(inference, entries),
        *group_sentences(inference),
    ]


def chance_sentences(classified: Classified, chance: float) -> list[str]:
    """Which representations are not shown to be above chance."""
    unable = classified.unable
    if len(unable) == len(classified.entries):
        return [
            f"With all layers no representation is shown to be above chance ({in_percent(chance)}): there is "
            "nothing here that a drop could be taken from."
        ]
    if not unable:
        return []
    return [
        f"With all layers {names_of(unable)} {are(len(unable))} not shown to be above chance "
        f"({in_percent(chance)}), so nothing can be said of a drop."
    ]


def change_sentences(classified: Classified, margin: float) -> list[str]:
    """Which representations fall, rise, or stay equal."""
    sentences = []
    count = len(classified.entries)
    if classified.lost:
        sentences.append(
            f"Without {MAIN_COMPARISON.removed} accuracy falls for {len(classified.lost)} of {count} "
            f"representation{'s' * (count > 1)} (p < {LEVEL:g} after Holm's correction)."
        )
        sentences += map(drop_of, classified.lost)
    if classified.gained:
        sentences.append(
            f"Without {MAIN_COMPARISON.removed} accuracy rises for {len(classified.gained)} of {count}."
        )
        sentences += map(drop_of, classified.gained)
    if classified.equal:
        sentences.append(
            f"For {names_of(classified.equal)} the two are equal to within {100 * margin:g} points."
        )
    return sentences


def undecided_sentences(classified: Classified, inference: dict[str, Any]) -> list[str]:
    """For which representations the experiment cannot tell, and which drop it would have found."""
    splits = inference["splits"]
    sentences = []
    if classified.undecided:
        count, unit = inference["test_rows"], "test rows"
        if inference["groups"] is not None:
            count, unit = inference["groups"], "groups of test rows"
        sample = f"{count} {unit}" + (f" in each of {splits} splits" if splits > 1 else "")
        sentences.append(f"For {names_of(classified.undecided)} this run cannot tell.")
        sizes = [100 * entry["smallest"] for entry in classified.undecided if entry["smallest"] is not None]
        if sizes:
            span = f"{min(sizes):.1f}"
            if max(sizes) - min(sizes) >= 0.1:
                span += f" to {max(sizes):.1f}"
            sentences.append(
                f"With {sample} a drop is found with {100 * POWER:.0f} % probability only from {span} points "
                "on (before the correction)."
            )
        else:
            sentences.append(
                f"With {sample} no drop of any size could pass a test of {len(classified.entries)} at once."
            )
    if 1 < splits < MANY_SPLITS:
        sentences.append(
            f"With {splits} splits the corrected test has little power (degrees of freedom: {splits - 1})."
        )
        sentences.append(f"--num-splits {MANY_SPLITS} or more, or one, would show more.")
    return sentences


def size_matched_sentences(inference: dict[str, Any]) -> list[str]:
    """Whether the visual layers are worse than random halves of the modules, which lose as many columns."""
    halves = entries_of(inference, SIZE_MATCHED_COMPARISON)
    if not halves:
        return []
    worse = [entry for entry in halves if entry["p_holm"] < LEVEL and entry["drop"] > 0]
    better = [entry for entry in halves if entry["p_holm"] < LEVEL and entry["drop"] < 0]
    result = f"lower for {names_of(worse)}" if worse else "not shown to be lower for any representation"
    result += f", and higher for {names_of(better)}" if better else ""
    control = "Against random halves of the modules, which lose as many"
    kept = words_of(SIZE_MATCHED_COMPARISON.second)
    return [f"{control}, accuracy with {kept} is {result}.", *map(drop_of, worse)]


def scope_sentences(inference: dict[str, Any], entries: list[Numbers]) -> list[str]:
    """What the sentences are about, and what a fall alone does not show."""
    splits, kind = inference["splits"], inference["split"]
    fewer = {entry["representation"]: entry["splits"] for entry in entries if entry["splits"] < splits}
    on = f"one {kind} split" if splits == 1 else f"{splits} {kind} splits"
    if fewer:
        on += f" ({', '.join(f'{name}: {number}' for name, number in list(fewer.items())[:LISTED])})"
    sentences = [f"These are statements about new examples and new runs of this data set's kind, on {on}."]
    if not entries_of(inference, SIZE_MATCHED_COMPARISON):
        sentences += [
            f"Fewer columns are left without {MAIN_COMPARISON.removed}.",
            "So a fall alone does not show that they know something which "
            f"{words_of(MAIN_COMPARISON.second)} do not.",
            "--layer-sets random_half would tell the two apart.",
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
            f"{shared} of {inference['test_rows']} test rows share their group with a training row.",
            "For new groups accuracies may be lower and drops others.",
        ]
    return []
