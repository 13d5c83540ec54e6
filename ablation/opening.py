"""The answer in plain sentences, from three facts: whether accuracy falls without the text layers, where the
visual half stands among random halves of the modules, and whether the text half reads more than the visual.

docs/statistics.md has the table of all combinations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ablation.catalogue import MAIN_COMPARISON, NULL_SETS
from ablation.estimators import LEVEL

Numbers = dict[str, Any]

REMOVED = MAIN_COMPARISON.removed
HOLD_PART = f"So {REMOVED} hold part of what the classifier reads."
NOT_MORE = f"So nothing shows that {REMOVED} hold more than other layers of their number."
NOT_MORE_OF_THESE = NOT_MORE.replace("So nothing shows", "So these representations do not show")
LESS_IS_LOST = f"So less is lost without {REMOVED} than without other layers of their number."


class Facts(NamedTuple):
    """What the opening says. `outcome`: falls, rises, same or open. `place` of the visual half among random
    halves: lower, among or higher, by a test of both sides. `more`: the half that reads more, text or visual;
    none if that is not shown. Both are "" where they are not known.
    """

    outcome: str
    place: str
    more: str


def facts_of(inference: Numbers) -> Facts:
    """The facts that an inference has shown."""
    null = inference.get("null")
    if not null or null["mean"]["p_above_chance"] >= LEVEL:  # a reader that reads nothing compares nothing
        return Facts(outcome(inference), "", "")
    return Facts(outcome(inference), place_in(null, "mean"), more_of(null, "mean"))


def outcome(inference: Numbers) -> str:
    """What the primary hypothesis came to: "falls", "rises", "same" or "open"."""
    primary = inference["primary"]
    if primary["p"] < LEVEL and primary["drop"] != 0:
        return "falls" if primary["drop"] > 0 else "rises"
    return "same" if primary["p_equivalence"] < LEVEL else "open"


def is_shown(null: Numbers, of: str, what: str) -> bool:
    """True if a test of the null is significant after the correction for all that is said."""
    return any((test["of"], test["what"]) == (of, what) and test["p_holm"] < LEVEL for test in null["tests"])


def place_in(null: Numbers, of: str) -> str:
    """The place of the visual half among the random ones, by the mean or the product."""
    if not is_shown(null, of, "place"):
        return "among"
    return "lower" if null[of]["visual"]["p_lower"] < null[of]["visual"]["p_higher"] else "higher"


def more_of(null: Numbers, of: str) -> str:
    """The half that reads more; "" where the text layers are not as many."""
    if not null["is_text_equal"]:
        return ""
    if not is_shown(null, of, "text_minus_visual"):
        return "none"
    return "text" if null[of]["text_minus_visual"]["drop"] > 0 else "visual"


# --- sentences


def opening(inference: Numbers) -> list[str]:
    """The answer in sentences that need no knowledge of statistics."""
    facts = facts_of(inference)
    return [
        *drop_sentences(inference, facts.outcome),
        *null_sentences(inference, facts),
        *meaning(inference, facts),
    ]


def drop_sentences(inference: Numbers, result: str) -> list[str]:
    """Whether accuracy falls with the visual layers alone."""
    primary, score = inference["primary"], inference["score"]
    drop = 100 * primary["drop"]
    low, high = (100 * end for end in primary["interval"])
    if result in ("falls", "rises"):
        sign = 1 if result == "falls" else -1
        low, high = sorted((sign * low, sign * high))
        change = f"{result} by {abs(drop):.1f} points on average (95 % interval {low:.1f} to {high:.1f})"
        return [f"With the visual layers alone {score} {change}."]
    difference = f"difference {drop:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}"
    if result == "same":
        margin = 100 * primary["margin"]
        return [
            f"With the visual layers alone {score} stays the same on average, to within {margin:g} points "
            f"({difference}).",
            *opposite_sentences(primary),
        ]
    sentences = [
        f"This experiment is too small to tell whether {score} falls on average without {REMOVED}.",
        f"The drop came out at {drop:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}).",
    ]
    if primary["smallest"] is not None:
        sentences.append(
            f"A drop of about {100 * primary['smallest']:.1f} points would be found four times in five."
        )
    if inference["folds"] is None:
        sentences.append("--folds 5 tests every row, and would find a smaller one.")
    return sentences


def opposite_sentences(primary: Numbers) -> list[str]:
    """What an average that stays the same says of single representations."""
    p = primary["heterogeneity"]
    if p is None:
        return []
    if p < LEVEL:
        return [f"But the representations differ in their drops (p = {p:.3f})."]
    return ["Single representations may still differ."]


def null_sentences(inference: Numbers, facts: Facts) -> list[str]:
    """How much a random half of the layers loses, beside the visual half by the same reader."""
    if not facts.place:
        why = inference.get("null_problem") or "this run has none"
        return [
            "Layers are gone too, and this run does not tell whether others would be missed as much.",
            "The reader of random halves is not above chance."
            if inference.get("null")
            else f"No random half was read: {why}.",
        ]
    mean = inference["null"]["mean"]
    halves, visual = mean["fall_of_halves"]["mean"], mean["fall"]
    sign, verb = (1, "loses") if halves >= 0 else (-1, "gains")
    low, high = sorted(100 * sign * end + 0.0 for end in mean["fall_of_halves"]["middle"])  # and no -0.0
    extent = ""
    if halves * visual > 0:
        is_less = (facts.place == "lower") == (sign > 0)
        extent = " as much:" if facts.place == "among" else " less:" if is_less else " more:"
    return [
        f"Keeping a random half of the layers {verb}{extent} {100 * abs(halves):.1f} points (middle 95 %: "
        f"{low:.1f} to {high:.1f}) by ridge regression.",
        f"Keeping the visual half {'loses' if visual >= 0 else 'gains'} {100 * abs(visual):.1f} points by "
        "the same reader.",
    ]


def meaning(inference: Numbers, facts: Facts) -> list[str]:
    """What the three facts together say of the text layers, and what the products show beyond them."""
    if not facts.place:
        return []
    null = inference["null"]
    contrast = [contrast_sentence(null["mean"])] if facts.more in ("text", "visual") else []
    further = product_sentences(null)
    if facts.place == "lower" or facts.more == "text":
        return [*contrast, HOLD_PART] if facts.outcome == "falls" else [*contrast, *further]
    if facts.place == "higher":
        return [*contrast, LESS_IS_LOST, *further]
    return [*contrast, NOT_MORE_OF_THESE if further else NOT_MORE, *further]


def product_sentences(null: Numbers) -> list[str]:
    """What the representation of the products shows of the text layers, if it shows that they hold more."""
    product = null["product"]
    if product is None:
        return []
    whole = NULL_SETS[0]
    reader = "a stronger reader" if product[whole] > null["mean"][whole] else "a reader of the products"
    found, name = product["text_minus_visual"], product["representation"]
    if more_of(null, "product") != "text":
        return []
    low, high = (100 * end for end in found["interval"])
    return [
        f"But by {name}, {reader}, the text half reads {100 * found['drop']:.1f} points more than the visual "
        f"half (95 % interval {low:.1f} to {high:.1f})."
    ]


def contrast_sentence(entry: Numbers) -> str:
    """How much more one half reads than the other, by ridge regression."""
    found = entry["text_minus_visual"]
    more, less, sign = ("text", "visual", 1) if found["drop"] > 0 else ("visual", "text", -1)
    low, high = sorted(100 * sign * end for end in found["interval"])
    return (
        f"The {more} half reads {100 * sign * found['drop']:.1f} points more than the {less} half (95 % "
        f"interval {low:.1f} to {high:.1f})."
    )
