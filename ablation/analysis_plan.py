"""What will be tested, stated before any cell is trained: a record, its hash, and what such an experiment
can find.

A reader who finds the same hash in the log, the manifest and the results knows that the tests were not
chosen after the numbers had been seen.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation.catalogue import (
    AUTO,
    INFERENCE_VERSION,
    MAIN_COMPARISON,
    NULL_HALVES,
    NULL_PRODUCT,
    NULL_VERSION,
    SPECS,
)
from ablation.fields import InputError
from ablation.halves import why_no_halves
from ablation.settings import Settings
from checkpointing import hash_of, read_events

if TYPE_CHECKING:
    from ablation.collection import LoraCollection

log = logging.getLogger("visual_ablation")

PRIMARY = (
    "the mean drop from all_layers to visual_only, one test, over the representations whose mean accuracy "
    "with both layer sets is above chance, if any of them or their mean is so after Holm's correction"
)
FAMILY = "then each representation's drop, by step-down max-T over joint sign flips"
# Settings that change no test.
NO_PART = (
    "output_dir",
    "cache_features",
    "cache_dir",
    "device",
    "dataset",
    "memory_gb",
    "ray_cpus",
    "ray_gpus",
    "streaming",
)
# So that plans of before they existed have their hash.
NO_PART_AT_DEFAULT = {"architecture": AUTO, "layer_sides": {}, "cache_dtype": "float32"}
# The standard error of a drop times the root of the tested rows: of one representation (the median of the
# nine), and of their mean. Those of `digits`: 2.2 and 1.0 points on 520 rows (docs/statistics.md).
SPREAD_OF_ONE, SPREAD_OF_MEAN = 0.5, 0.23
# Correlation of the drops of two rows of a group in `digits`, whose groups have DIGITS_GROUP rows: the mean
# over the nine. (That of their mean is 0.0 with a standard error of 0.06.)
GROUP_CORRELATION, DIGITS_GROUP = 0.04, 2
TEST_SHARE = 0.2  # of a 70/10/20 split
SHORT = 12  # characters of the hash in the log


def analysis_plan(settings: Settings, data: LoraCollection) -> dict[str, Any]:
    """The settings that decide what is tested, the order of the tests, and the data."""
    chosen = dataclasses.asdict(settings)
    left_out = {*NO_PART, *(name for name, default in NO_PART_AT_DEFAULT.items() if chosen[name] == default)}
    return {
        "primary": PRIMARY,
        "family": FAMILY,
        "null": null_plan(settings, data),
        "null_version": NULL_VERSION,
        "inference_version": INFERENCE_VERSION,
        "data": data.files.identity,
        "settings": {name: value for name, value in chosen.items() if name not in left_out},
    }


def why_no_null(settings: Settings, data: LoraCollection) -> str:
    """Why no random halves are read; '' if they are."""
    if not {MAIN_COMPARISON.first, MAIN_COMPARISON.second} <= set(settings.layer_sets):
        return "all layers and the visual layers are not compared"
    if data.split.overlap:
        return "train, validation and test are the same rows"
    if all(SPECS[name].fitted for name in settings.representations):
        return "the representations are fitted to all layers of a set, and have no columns of single layers"
    return why_no_halves(data.layers)


def reads_product(data: LoraCollection) -> bool:
    """True if the null's reader gets NULL_PRODUCT: the weights can be read again, and multiplied."""
    try:
        return data.weights.keeps_weights and not data.layers.without_partner(MAIN_COMPARISON.first)
    except InputError:  # modules whose ranks differ
        return False


def null_plan(settings: Settings, data: LoraCollection) -> str:
    """What is read beside the cells."""
    why = why_no_null(settings, data)
    if why:
        return f"no random halves: {why}"
    further = f" and of {NULL_PRODUCT}" if reads_product(data) else ""
    return (
        f"beside it, by ridge regression of the same representations{further}: the place of visual_only "
        f"among {NULL_HALVES} random halves of as many modules, and text_only less visual_only, by Holm's "
        "method; the opening follows from these and the primary hypothesis (docs/statistics.md)"
    )


def announce_plan(settings: Settings, data: LoraCollection) -> str:
    """Log the plan and what it can find. Returns its hash."""
    own = hash_of(analysis_plan(settings, data))
    log.info(f"Plan of analysis {own[:SHORT]}: {PRIMARY}; {FAMILY}; {null_plan(settings, data)}.")
    if not data.split.overlap:
        groups = data.groups
        if groups is not None and not settings.folds:
            groups = groups[data.split.test]
        for line in expectation(settings, tested_rows(settings, data.num_rows), group_size(groups)):
            log.info(line)
    return own


def stated_plan(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan for results.json: its hash, when it was first stated in this folder, and how many other plans
    were stated there.
    """
    own = hash_of(plan)
    events = reversed(read_events(folder / "events.jsonl"))
    stated = {event["plan"]: event["time"] for event in events if event.get("plan")}
    return {"hash": own, "first_stated": stated.get(own), "other_plans": len(stated.keys() - {own}), **plan}


def tested_rows(settings: Settings, rows: int) -> int:
    """About how many rows of a data set with so many are tested at least once."""
    return rows if settings.folds else round(TEST_SHARE * rows)


def group_size(groups: np.ndarray | None) -> float:
    """Rows in the group of a row (n,), the mean over the rows; 1 without groups."""
    if groups is None:
        return 1.0
    sizes = np.unique(groups, return_counts=True)[1]
    return float((sizes**2).sum() / sizes.sum())


def expectation(settings: Settings, rows: int, size: float = DIGITS_GROUP) -> list[str]:
    """What an experiment that tests so many rows can find, and what it cannot, for the log. `size` is that of
    a row's group: rows of one group tell less.
    """
    wider = math.sqrt((1 + (size - 1) * GROUP_CORRELATION) / (1 + (DIGITS_GROUP - 1) * GROUP_CORRELATION))
    smallest = (1.96 + 0.84) * SPREAD_OF_MEAN * wider / math.sqrt(rows)
    lines = [
        f"About {rows:,} rows are tested. If they vary as those of digits do, a mean drop of about "
        f"{100 * smallest:.1f} points would be found four times in five."
    ]
    needed = math.ceil(min(1.645 * SPREAD_OF_ONE * wider / settings.margin, 1e9) ** 2 / 100) * 100
    if not settings.margin_share and rows < needed:
        lines.append(
            f"That one representation is equal to within {100 * settings.margin:g} points cannot be shown "
            f"below about {needed:,} tested rows; a larger --margin, or --margin-share, can be met."
        )
    return lines
