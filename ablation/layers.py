"""Names of layers -> attention kind, block and module; layer sets -> positions of layers.

A LoRA layer is a column that holds one matrix a row. A module is the pair of a layer `down` (r, in) and a
layer `up` (out, r): up @ down is the change of one matrix of the model.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ablation.catalogue import CONTROL_SETS, LAYER_SETS, group_of
from ablation.fields import InputError
from ablation.settings import Settings

RANDOM_HALF_SEED = 0

# The end of a layer column's name: diffusers' lora.down.weight, PEFT's lora_A.weight and
# lora_A.<adapter>.weight, kohya's lora_down.weight.
LAYER_NAME = re.compile(r"(?:^|[._])lora(?:_linear_layer)?[._](down|up|A|B)(?:[._]\w+)?[._]weight$")


def is_layer(column: str) -> bool:
    """True if a column's name is that of a LoRA layer."""
    return LAYER_NAME.search(column) is not None


def module_and_side(layer: str) -> tuple[str, str]:
    """The name that the two layers of a module share,
    and the side of this layer: "down" (lora_A) or "up" (lora_B).
    """
    match = LAYER_NAME.search(layer)
    if match is None:
        raise ValueError(f"'{layer}' is no name of a LoRA layer")
    side = "down" if match.group(1) in ("down", "A") else "up"
    return layer[: match.start(1)] + "*" + layer[match.end(1) :], side


def attention_kind(layer: str) -> str:
    """attn1 (self-attention, visual), attn2 (cross-attention, text) or other;
    dots and underscores both separate.
    """
    match = re.search(r"(?:^|[._])(attn[12])(?:[._]|$)", layer)
    return match.group(1) if match else "other"


def block_of(layer: str) -> str:
    """The U-Net block of an attention layer, without the names before it: down_blocks.0.attentions.1."""
    name = re.split(r"[._]attn[12](?=[._])", layer)[0]
    name = re.sub(r"^.*?(?=(?:down_blocks|up_blocks|mid_block)[._])", "", name)
    return re.sub(r"[._]transformer_blocks[._]\d+$", "", name)


def single_block_set(layer: str) -> str:
    """The layer set of --layer-sets by_block that holds an attention layer."""
    return f"by_block.{block_of(layer)}.{attention_kind(layer)}"


def expand_layer_sets(layer_sets: tuple[str, ...], layers: list[str], random_halves: int) -> list[str]:
    """Replace the names of groups by their members:
    `random_half` becomes `random_half.0`, `random_half.1`, ...

    `by_block` becomes one set for each block and attention kind that occurs among the names `layers`.
    """
    blocks = dict.fromkeys(single_block_set(layer) for layer in layers if attention_kind(layer) != "other")
    groups = {
        "random_half": [f"random_half.{draw}" for draw in range(random_halves)],
        "by_block": list(blocks),
    }
    return [member for layer_set in layer_sets for member in groups.get(layer_set, [layer_set])]


class ColumnLayout(NamedTuple):
    """How a column holds one (rows, cols) matrix a row, read off its Arrow type and its first row."""

    column: str
    rows: int
    cols: int
    dtype: str  # of a stored weight
    in_arrow: bool  # False: only the formatter of `datasets` can read it

    @property
    def size(self) -> int:
        """Weights of one matrix."""
        return self.rows * self.cols


class Module(NamedTuple):
    """A module: the positions in `Layers.names` of its `down` and its `up` layer."""

    name: str
    down: int
    up: int


@dataclass
class Layers:
    """The layer columns of a collection, sorted by name, and the layer sets and modules that they make.

    `named_sets` maps names of layer sets to shell patterns on layer names.
    """

    names: list[str]
    layouts: dict[str, ColumnLayout]
    named_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def kinds(self) -> list[str]:
        """The attention kind of each layer."""
        return [attention_kind(layer) for layer in self.names]

    @property
    def weights_per_row(self) -> int:
        """Weights of one LoRA."""
        return sum(self.layouts[layer].size for layer in self.names)

    def positions(self, layer_set: str) -> list[int]:
        """Positions in `names` of the layers that a layer set keeps; none for an unknown name."""
        known = LAYER_SETS | CONTROL_SETS
        if layer_set in known:
            kinds, side = known[layer_set].kinds, known[layer_set].side
            return [
                i
                for i, layer in enumerate(self.names)
                if self.kinds[i] in kinds and side in ("", module_and_side(layer)[1])
            ]
        if group_of(layer_set) == "by_block":
            return [i for i, layer in enumerate(self.names) if layer_set == single_block_set(layer)]
        if group_of(layer_set) == "random_half":
            kept = self.random_half(layer_set)
            return [i for i, layer in enumerate(self.names) if module_and_side(layer)[0] in kept]
        patterns = self.named_sets.get(layer_set, ())
        return [
            i
            for i, layer in enumerate(self.names)
            if any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)
        ]

    def random_half(self, layer_set: str) -> set[str]:
        """Names of the modules of a draw:
        in every block as many as it has attn1 modules, of both attention kinds.
        """
        rng = np.random.default_rng([RANDOM_HALF_SEED, *layer_set.encode()])
        blocks: dict[str, dict[str, set[str]]] = {}
        for layer, kind in zip(self.names, self.kinds, strict=True):
            if kind != "other":
                of_block = blocks.setdefault(block_of(layer), {"attn1": set(), "attn2": set()})
                of_block[kind].add(module_and_side(layer)[0])
        return {
            str(name)
            for block in blocks.values()
            for name in rng.choice(
                sorted(block["attn1"] | block["attn2"]), len(block["attn1"]), replace=False
            )
        }

    # --- modules

    @cached_property
    def modules(self) -> list[Module]:
        """Every pair of layers, by name. Raises InputError for a pair whose ranks differ."""
        sides: dict[str, dict[str, int]] = {}
        for position, layer in enumerate(self.names):
            name, side = module_and_side(layer)
            sides.setdefault(name, {})[side] = position
        modules = [Module(name, **both) for name, both in sorted(sides.items()) if len(both) == 2]
        for module in modules:
            down, up = (self.layouts[self.names[position]] for position in (module.down, module.up))
            if down.rows != up.cols:
                raise InputError(
                    f"column '{down.column}' is {down.rows} x {down.cols} and '{up.column}' {up.rows} x "
                    f"{up.cols}: the rows of the first must be the columns of the second; leave out "
                    "representations of the product and the gauge audit"
                )
        return modules

    def check_modules(self) -> None:
        """Raise InputError now, and not after hours, if the layers of a module cannot be multiplied."""
        _ = self.modules

    @cached_property
    def module_at(self) -> dict[int, Module]:
        """The module of each layer that has one, by the layer's position."""
        return {position: module for module in self.modules for position in (module.down, module.up)}

    def module_positions(self, layer_set: str) -> list[int]:
        """Positions in `modules` of the modules of which a layer set keeps both layers."""
        kept = set(self.positions(layer_set))
        return [i for i, module in enumerate(self.modules) if {module.down, module.up} <= kept]

    def without_partner(self, layer_set: str) -> list[str]:
        """Names of the layers of the set whose module's other layer is not in the set."""
        paired = {
            position
            for i in self.module_positions(layer_set)
            for position in (self.modules[i].down, self.modules[i].up)
        }
        return [self.names[position] for position in self.positions(layer_set) if position not in paired]


def sd15_shapes(rank: int) -> list[tuple[str, int, int]]:
    """(name, rows, cols) of the layers of the published sets, sorted by name.

    They are `down` and `up` of to_q and to_v in the 32 attention blocks of SD v1.5: blocks of 320, 640 and
    1,280 channels, a text embedding of 768, 99,648 weights a row at rank 1.
    """
    blocks = [
        ("down_blocks.0", 2, 320),
        ("down_blocks.1", 2, 640),
        ("down_blocks.2", 2, 1280),
        ("mid_block", 1, 1280),
        ("up_blocks.1", 3, 1280),
        ("up_blocks.2", 3, 640),
        ("up_blocks.3", 3, 320),
    ]
    shapes = []
    for block, attentions, channels in blocks:
        for attention in range(attentions):
            for kind in ("attn1", "attn2"):
                for projection in ("to_q", "to_v"):
                    path = (
                        f"unet.{block}.attentions.{attention}.transformer_blocks.0.{kind}.{projection}.lora"
                    )
                    inputs = 768 if (kind, projection) == ("attn2", "to_v") else channels
                    shapes.append((f"{path}.down.weight", rank, inputs))
                    shapes.append((f"{path}.up.weight", channels, rank))
    return sorted(shapes)


def refuse_empty_layer_sets(layers: Layers, settings: Settings) -> None:
    """Raise InputError for a layer set of --layer-sets that keeps no layer of the data set."""
    for layer_set in settings.layer_sets:
        members = expand_layer_sets((layer_set,), layers.names, settings.random_halves)
        if not members or not all(map(layers.positions, members)):
            raise InputError(
                f"data set '{settings.dataset}' has no layer for --layer-sets {layer_set}: leave it out"
            )
