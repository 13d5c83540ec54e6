"""Names of layers in every style, modules, and layer sets."""

from collections import Counter

import pytest
from builders import collect, lora_dataset

from ablation.catalogue import CONTROL_SETS, LAYER_KINDS, LAYER_SET_GROUPS, LAYER_SETS
from ablation.layers import (
    ColumnLayout,
    Layers,
    attention_kind,
    block_of,
    is_layer,
    module_and_side,
    sd15_shapes,
)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight", "attn1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora.up.weight", "attn2"),
        ("base_model.model.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k.lora_A.weight", "attn2"),
        (
            "base_model.model.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_k.lora_B.default.weight",
            "attn1",
        ),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "attn1"),
        ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0_lora_up_weight", "attn2"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.lora.down.weight", "other"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight", "other"),
    ],
)
def test_layer_names_of_all_tools(name, kind):
    assert is_layer(name) and attention_kind(name) == kind


@pytest.mark.parametrize(
    "name",
    [
        "category_label",
        "lora.alpha",
        "lora_unet_down_blocks_0_attn1_to_q.alpha",
        "rank",
        "flora.down.weight",
        "unet.attn1.to_q.weight",
        "explora_down.weight",
    ],
)
def test_other_columns_are_no_layers(name):
    assert not is_layer(name)


@pytest.mark.parametrize(
    "down, up",
    [
        ("unet.attn1.to_q.lora.down.weight", "unet.attn1.to_q.lora.up.weight"),
        ("base.attn1.to_q.lora_A.weight", "base.attn1.to_q.lora_B.weight"),
        ("a.to_q.lora_A.default.weight", "a.to_q.lora_B.default.weight"),
        (
            "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight",
        ),
        ("a.to_q_lora.down.weight", "a.to_q_lora.up.weight"),
    ],
)
def test_the_two_layers_of_a_module_share_its_name(down, up):
    assert module_and_side(down) == (module_and_side(up)[0], "down") and module_and_side(up)[1] == "up"


def test_modules_of_a_layer_set_and_what_it_cuts_apart():
    data = collect(lora_dataset(), "x")
    assert len(data.layers.modules) == 8 and [
        len(data.layers.module_positions(name)) for name in ("all_layers", "visual_only", "text_only")
    ] == [8, 4, 4]
    for module in data.layers.modules:
        down, up = data.layers.names[module.down], data.layers.names[module.up]
        assert down.replace("down.weight", "up.weight") == up and "down.weight" in down
    assert not data.layers.without_partner("all_layers")
    lone = next(layer for layer in data.layers.names if "attn2" in layer and "up.weight" in layer)
    cut = collect(data.weights.dataset.remove_columns(lone), "x")
    assert len(cut.layers.modules) == 7 and cut.layers.without_partner("visual_only") == []
    assert (
        cut.layers.without_partner("text_only")
        == [lone.replace("up.weight", "down.weight")]
        == cut.layers.without_partner("all_layers")
    )


def of_published_topology():
    shapes = sd15_shapes(1)
    layouts = {layer: ColumnLayout(layer, rows, cols, "float", True) for layer, rows, cols in shapes}
    return Layers([layer for layer, _, _ in shapes], layouts)


def test_random_halves_have_the_modules_of_visual_only_by_block_from_both_kinds():
    layers = of_published_topology()
    visual, seen = Counter(block_of(layers.names[i]) for i in layers.positions("visual_only")), set()
    for draw in range(5):
        chosen = layers.positions(f"random_half.{draw}")
        chosen_names = [layers.names[i] for i in chosen]
        assert Counter(map(block_of, chosen_names)) == visual and len(chosen) == 64
        assert not layers.without_partner(f"random_half.{draw}")  # whole modules
        kinds = Counter(map(attention_kind, chosen_names))
        assert kinds["attn1"] > 8 and kinds["attn2"] > 8
        assert chosen == layers.positions(f"random_half.{draw}")
        seen.add(tuple(chosen))
    assert len(seen) == 5


def test_by_block_is_one_set_for_each_block_and_kind():
    layers = of_published_topology()
    sets = layers.expand(("all_layers", "by_block", "random_half"), 2)
    blocks = [name for name in sets if name.startswith("by_block.")]
    assert sets[0] == "all_layers" and sets[-2:] == ["random_half.0", "random_half.1"] and len(blocks) == 32
    assert blocks[0] == "by_block.down_blocks.0.attentions.0.attn1"
    found = [i for name in blocks for i in layers.positions(name)]
    assert sorted(found) == list(range(128)) and {len(layers.positions(name)) for name in blocks} == {4}


@pytest.mark.parametrize(
    "layer, block",
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora.up.weight",
            "mid_block.attentions.0",
        ),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "down_blocks_1_attentions_0",
        ),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_3_attn1_to_q.lora_down.weight",
            "lora_unet_input_blocks_4_1",
        ),
    ],
)
def test_the_block_of_a_layer_in_each_style_of_names(layer, block):
    assert block_of(layer) == block


def test_named_sets_are_patterns_on_layer_names():
    layers = of_published_topology()
    layers.named_sets = {
        "queries": ("*.to_q.*",),
        "ups": ("*.up.weight",),
        "ends": ("unet.mid_block.*", "*up_blocks.3*"),
    }
    assert [len(layers.positions(name)) for name in ("queries", "ups", "ends", "unknown")] == [
        64,
        64,
        8 + 24,
        0,
    ]
    assert len(layers.without_partner("ups")) == 64 and not layers.without_partner("queries")


def test_every_layer_set_of_the_catalogue_names_known_layers_and_has_a_title_of_its_own():
    sets = LAYER_SETS | CONTROL_SETS
    for name, spec in sets.items():
        assert set(spec.kinds) <= set(LAYER_KINDS) and spec.side in ("", "down", "up"), name
    titles = [spec.title for spec in sets.values()] + list(LAYER_SET_GROUPS.values())
    assert len(set(titles)) == len(titles)
