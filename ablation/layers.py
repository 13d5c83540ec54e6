"""Names of layers -> kind, block and module; layer sets -> positions of layers.

A LoRA layer is a column that holds one matrix a row. A module is the pair of a layer `down` (r, in) and a
layer `up` (out, r): up @ down is the change of one matrix of the model.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ablation.adapter_names import canonical_module
from ablation.architectures import Kinds, first_parts, is_text_encoder, kinds_of
from ablation.catalogue import ARCHITECTURES, AUTO, CONTROL_SETS, LAYER_SETS, NEED_KINDS, group_of
from ablation.fields import InputError
from ablation.settings import Settings

RANDOM_HALF_SEED = 0
LONGEST_BLOCK = 100  # characters of a block's name

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


def module_of(layer: str) -> str:
    """The module of a layer as its column names it."""
    match = LAYER_NAME.search(layer)
    return layer[: match.start()] if match else layer


def attention_kind(layer: str) -> str:
    """attn1 (self-attention), attn2 (cross-attention) or other; dots and underscores both separate.

    In Stable Diffusion 1, 2 and XL attn1 is visual and attn2 is text. Elsewhere the architecture decides.
    """
    match = re.search(r"(?:^|[._])(attn[12])(?:[._]|$)", layer)
    return match.group(1) if match else "other"


def block_of(layer: str) -> str:
    """The U-Net block of an attention layer, without the names before it: down_blocks.0.attentions.1."""
    name = re.split(r"[._]attn[12](?=[._])", layer)[0]
    name = re.sub(r"^.*?(?=(?:down_blocks|up_blocks|mid_block)[._])", "", name)
    return re.sub(r"[._]transformer_blocks[._]\d+$", "", name)


def block_in(module: str) -> str:
    """The block of a module of a transformer: `double_blocks.3`, `transformer_blocks.3`,
    `text_encoder.text_model.encoder.layers.0`.

    It becomes a part of a file's name: what cannot stand there is replaced by a hash.
    """
    path = re.sub(r"^(unet|transformer)\.", "", canonical_module(module))
    block = re.match(r"((text_encoder(_[23])?|transformer_2)\.)?.*?[._]\d+(?=[._]|$)", path)
    name = block.group() if block else path
    clean = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:LONGEST_BLOCK]
    return clean if clean == name else f"{clean}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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

    `named_sets` maps names of layer sets to shell patterns on layer names. `architecture` and `layer_sides`
    are the settings of these names: they decide which layers are visual, and which are text.
    """

    names: list[str]
    layouts: dict[str, ColumnLayout]
    named_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    architecture: str = AUTO
    layer_sides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def found(self) -> Kinds:
        """The architecture, and the kind of each layer. Raises InputError for unfit `layer_sides`."""
        if self.layer_sides and self.names:
            return stated_kinds(self.names, self.layer_sides)
        return kinds_of(list(map(module_of, self.names)), self.architecture)

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer: visual, text or other."""
        return self.found.kinds

    @cached_property
    def words(self) -> list[str]:
        """The kind of each layer as its architecture calls it: attn1, attn2, visual, text, text encoder."""
        own = {"visual": "attn1", "text": "attn2"} if self.found.is_sd else {}
        return [
            "text encoder"
            if kind == "text" and is_text_encoder(canonical_module(module_of(layer)))
            else own.get(kind, kind)
            for layer, kind in zip(self.names, self.kinds, strict=True)
        ]

    def count_words(self) -> dict[str, int]:
        """How many layers there are of each word."""
        main = ("attn1", "attn2") if self.found.is_sd else ("visual", "text")
        counts = {word: self.words.count(word) for word in (*main, "text encoder", "other")}
        return {word: count for word, count in counts.items() if count or word != "text encoder"}

    @cached_property
    def blocks(self) -> list[str]:
        """The block of each layer."""
        return [
            block_of(layer) if word in ("attn1", "attn2") else block_in(module_of(layer))
            for layer, word in zip(self.names, self.words, strict=True)
        ]

    @cached_property
    def single_blocks(self) -> list[str]:
        """The layer set of --layer-sets by_block that holds each layer; "" for a layer of no kind."""
        return [
            "" if word == "other" else f"by_block.{block}.{'text' if word == 'text encoder' else word}"
            for block, word in zip(self.blocks, self.words, strict=True)
        ]

    def expand(self, layer_sets: tuple[str, ...], random_halves: int) -> list[str]:
        """Replace the names of groups by their members:
        `random_half` becomes `random_half.0`, `random_half.1`, ...

        `by_block` becomes one set for each block and kind that occurs.
        """
        groups = {"random_half": [f"random_half.{draw}" for draw in range(random_halves)]}
        if "by_block" in layer_sets:
            groups["by_block"] = list(dict.fromkeys(filter(None, self.single_blocks)))
        return [member for layer_set in layer_sets for member in groups.get(layer_set, [layer_set])]

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
            return [i for i, name in enumerate(self.single_blocks) if layer_set == name]
        if group_of(layer_set) == "random_half":
            kept = self.random_half(layer_set)
            return [i for i, layer in enumerate(self.names) if module_and_side(layer)[0] in kept]
        patterns = self.named_sets.get(layer_set, ())
        return [
            i
            for i, layer in enumerate(self.names)
            if any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)
        ]

    def why_empty(self, layer_set: str) -> str:
        """Why a layer set without a layer has none, in brackets; "" if the architecture does not tell."""
        needs_visual = layer_set in ("visual_only", "random_half")
        return f" ({self.found.why_none})" if needs_visual and self.found.why_none else ""

    @cached_property
    def attention_blocks(self) -> list[dict[str, set[str]]]:
        """Names of the visual and of the text modules of each block, without those of text encoders.

        Where no block has both kinds (the refiners of Z-Image), all blocks together count as one.
        """
        blocks: dict[str, dict[str, set[str]]] = {}
        for layer, kind, word, block in zip(self.names, self.kinds, self.words, self.blocks, strict=True):
            if word not in ("other", "text encoder"):
                of_block = blocks.setdefault(block, {"visual": set(), "text": set()})
                of_block[kind].add(module_and_side(layer)[0])
        found = list(blocks.values())
        if not self.found.is_sd and not any(block["visual"] and block["text"] for block in found):
            kinds = ("visual", "text")
            found = [{kind: set().union(*(block[kind] for block in found)) for kind in kinds}]
        return found

    def modules_by_block(self) -> list[tuple[int, int]]:
        """How many visual and text modules each block has."""
        return [(len(block["visual"]), len(block["text"])) for block in self.attention_blocks]

    def random_half(self, layer_set: str) -> set[str]:
        """Names of the modules of a draw:
        in every block as many as it has visual modules, of both kinds.
        """
        rng = np.random.default_rng([RANDOM_HALF_SEED, *layer_set.encode()])
        return {
            str(name)
            for block in self.attention_blocks
            if block["visual"]
            for name in rng.choice(
                sorted(block["visual"] | block["text"]), len(block["visual"]), replace=False
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


def layers_of(settings: Settings, names: list[str], layouts: dict[str, ColumnLayout]) -> Layers:
    """The layers with what the settings say of them."""
    return Layers(names, layouts, settings.named_layer_sets, settings.architecture, settings.layer_sides)


def stated_kinds(names: list[str], layer_sides: Mapping[str, tuple[str, ...]]) -> Kinds:
    """The kind of each layer by the patterns of layer_sides.

    Raises InputError if both sides claim a layer, or a side none.
    """
    claims = {
        side: {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
        for side, patterns in layer_sides.items()
    }
    for side, claimed in claims.items():
        if not claimed:
            raise InputError(
                f"layer_sides: no layer has a name as the patterns of '{side}' say; the names begin with "
                f"{first_parts(list(map(module_of, names)))}"
            )
    both = sorted(claims.get("visual", set()) & claims.get("text", set()))
    if both:
        raise InputError(f"layer_sides: '{both[0]}' is visual and text by the patterns: make them narrower")
    kinds = [next((side for side in claims if name in claims[side]), "other") for name in names]
    return Kinds("as layer_sides says", kinds)


def refuse_empty_layer_sets(layers: Layers, settings: Settings, is_default: bool = False) -> None:
    """Raise InputError for a layer set of --layer-sets that keeps no layer of the data set.

    If the sets are those of the default (`is_default`), such a set is left out later. A set that needs the
    kinds of the layers is refused all the same where the architecture is unknown.
    """
    for layer_set in settings.layer_sets:
        if layer_set in NEED_KINDS and layers.found.problem:
            begin = first_parts(list(map(module_of, layers.names)))
            raise InputError(
                f"data set '{settings.dataset}': which layers --layer-sets {layer_set} keeps cannot be told, "
                f"because {layers.found.problem}. The names of layers begin with {begin}. Write patterns for "
                "these names in a --config file, such as "
                "layer_sides: {visual: ['*.self_attn.*'], text: ['*.cross_attn.*']}; or give --architecture "
                f"(one of {', '.join(ARCHITECTURES)}), or --layer-sets all_layers"
            )
        members = layers.expand((layer_set,), settings.random_halves)
        if not is_default and not (members and all(map(layers.positions, members))):
            raise InputError(
                f"data set '{settings.dataset}' has no layer for --layer-sets {layer_set}"
                f"{layers.why_empty(layer_set)}: leave it out"
            )
