"""Random halves of the modules: sets that keep as many modules of each block as the visual layers do.

They are the null of the experiment's question. If the text layers held no more than other layers, the visual
half would be a half like these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ablation.catalogue import NULL_HALVES, NULL_SETS
from ablation.layers import Layers, module_and_side

TUNING_HALVES = 4  # further halves, on which the penalty of all halves is chosen
FEWEST_DIFFERENT = 40  # with fewer different halves no place of two sides is rarer than 1 in 20


class ModuleSets(NamedTuple):
    """Sets of modules: lines of bool over the U modules.

    `module_of` (L,) is the number of each layer's module; a layer without a partner is a module by itself.
    `named` (3, U) are NULL_SETS. `halves` (NULL_HALVES, U) are `random_half.0` and so on, `tuning`
    the draws after them. `is_text_equal`: the text layers are a half of this kind too.
    """

    module_of: np.ndarray
    named: np.ndarray
    halves: np.ndarray
    tuning: np.ndarray
    is_text_equal: bool


def module_sets(layers: Layers) -> ModuleSets:
    """The sets of a collection's layers. Call it where `why_no_halves` has no reason."""
    names = [module_and_side(layer)[0] for layer in layers.names]
    number = {name: u for u, name in enumerate(sorted(set(names)))}
    module_of = np.array([number[name] for name in names])

    def masks(layer_sets: list[str]) -> np.ndarray:
        found = np.zeros((len(layer_sets), len(number)), bool)
        for mask, layer_set in zip(found, layer_sets, strict=True):
            mask[module_of[layers.positions(layer_set)]] = True
        return found

    drawn = masks([f"random_half.{draw}" for draw in range(NULL_HALVES + TUNING_HALVES)])
    counts = layers.modules_by_block()
    text_encoders = "text encoder" in layers.words
    return ModuleSets(
        module_of,
        masks(list(NULL_SETS)),
        drawn[:NULL_HALVES],
        drawn[NULL_HALVES:],
        not text_encoders and all(visual == text for visual, text in counts),
    )


def why_no_halves(layers: Layers) -> str:
    """Why random halves tell nothing of these layers; '' if they do."""
    if layers.found.problem:
        return "it is not known which layers are visual"
    different = math.prod(math.comb(visual + text, visual) for visual, text in layers.modules_by_block())
    if different < FEWEST_DIFFERENT:
        return f"the blocks allow {different} different halves, and {FEWEST_DIFFERENT} are needed"
    return ""
