"""Which layers are visual and which are text, architecture by architecture, and what the program says of it.

The table is held against the models of diffusers themselves: a module is visual if only image tokens pass
it, and an attention is cross-attention if its query and its key see tokens of two kinds.
"""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from builders import collect
from datasets import Dataset
from diffusers.loaders import lora_conversion_utils as conversions
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from running import checkpoints, folder, visible
from tiny_models import IMAGE, TEXT, TINY, TOKENS, VARIANTS, modules_of, tokens_seen

from ablation.architectures import (
    NOT_KNOWN,
    OTHER_UNETS,
    TABLE,
    compiled,
    is_text_encoder,
    kind_in,
    kinds_of,
    own_path,
)
from ablation.catalogue import ARCHITECTURES
from ablation.fields import InputError
from ablation.layers import Layers, block_in
from ablation.report import control_figures
from ablation.report.page import data_block, failure_block
from ablation.settings import Settings

DIFFUSERS_ROWS = {row.name: row for row in TABLE if row.names == "diffusers"}
ORIGINAL_ROWS = {row.name: row for row in TABLE if row.names in ("original", "BFL")}


def kind(row, path):
    return kind_in(row, f"transformer.{path}")


# --- the table against the models


def test_every_architecture_has_a_row_with_a_source_and_every_model_is_tested():
    assert {row.name for row in TABLE} == set(ARCHITECTURES)
    assert all(row.source for row in TABLE)
    assert set(DIFFUSERS_ROWS) == set(TINY) | set(VARIANTS)
    keys = [(row.name, row.names) for row in TABLE]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", sorted(DIFFUSERS_ROWS))
def test_every_module_of_a_model_is_of_one_kind_and_every_pattern_is_of_a_module(name):
    row, modules = DIFFUSERS_ROWS[name], modules_of(name)
    assert modules
    assert {path for path in modules if not kind(row, path)} == set()
    for patterns in (row.visual, row.text, row.neither):
        for pattern in patterns.split():
            if name != "ltx" or pattern not in ("patchify_proj", "adaln_single.*"):  # of its first code
                assert any(compiled(pattern).fullmatch(path) for path in modules), pattern
    for path in modules:
        kinds = [some for some in (row.visual, row.text, row.neither) if compiled(some).fullmatch(path)]
        assert len(kinds) == 1, path


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_tokens_that_pass_a_module_decide_its_kind(name):
    row, seen = DIFFUSERS_ROWS[name], tokens_seen(name)
    image, text = TOKENS.get(name, (IMAGE, TEXT))
    by_attention = {}
    for path in seen:
        attention = re.match(r".*?\battn\w*|.*?\battention\b", path)
        if attention:
            by_attention.setdefault(attention.group(), []).append(path)
    assert by_attention
    for paths in by_attention.values():
        of = {path.split(".")[-1]: seen[path] for path in paths}
        is_cross = of["to_q"] != of["to_k"]
        for path in paths:
            expected = {image: "visual", text: "text", image + text: "other"}.get(seen[path], "text")
            expected = "text" if is_cross else expected
            if name == "lumina" and path.endswith("attn2.to_out.0"):  # of the sum of both attentions
                expected = "other"
            assert kind(row, path) == expected, path
    for path, tokens in seen.items():
        if kind(row, path) == "visual":
            assert tokens == image, path
        if kind(row, path) == "text" and not any(path in paths for paths in by_attention.values()):
            assert tokens != image, path


# --- names of the first codes


def original_up(module, rows, rank=1):
    return {
        f"{module}.lora_A.weight": torch.zeros(rank, 4),
        f"{module}.lora_B.weight": torch.zeros(rows, rank),
    }


def flux_modules():
    for stream in ("img", "txt"):
        yield f"double_blocks.0.{stream}_attn.qkv", 9216
        for part in ("attn.proj", "mlp.0", "mlp.2", "mod.lin"):
            yield f"double_blocks.0.{stream}_{part}", 3072
    yield "single_blocks.0.linear1", 21504
    yield "single_blocks.0.linear2", 3072
    yield "single_blocks.0.modulation.lin", 3072


def hunyuan_modules():
    for stream in ("img", "txt"):
        yield f"double_blocks.0.{stream}_attn_qkv", 9216
        for part in ("attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear"):
            yield f"double_blocks.0.{stream}_{part}", 3072
    yield "single_blocks.0.linear1", 21504
    yield "single_blocks.0.linear2", 3072
    yield "single_blocks.0.modulation.linear", 3072


def wan_modules():
    for attention, parts in (("self_attn", "qkvo"), ("cross_attn", [*"qkvo", "k_img", "v_img"])):
        for part in parts:
            yield f"blocks.0.{attention}.{part}", 8
    yield from (("blocks.0.ffn.0", 8), ("blocks.0.ffn.2", 8))
    yield from (("text_embedding.0", 8), ("text_embedding.2", 8), ("time_embedding.0", 8))


def refined_modules(qkv):
    for block in ("noise_refiner.0", "context_refiner.0", "layers.0"):
        yield f"{block}.attention.qkv", qkv
        yield f"{block}.attention.out", 8
        for number in (1, 2, 3):
            yield f"{block}.feed_forward.w{number}", 8
        if block != "context_refiner.0":
            yield f"{block}.adaLN_modulation.1", 8


def flux_prefixed(module):
    return "lora_unet_" + module.replace(".", "_")


CONVERTED = [  # name, modules with the rows of their `up`, their prefix, diffusers' function
    ("flux", flux_modules(), flux_prefixed, conversions._convert_kohya_flux_lora_to_diffusers),
    (
        "hunyuan-video",
        hunyuan_modules(),
        "transformer.{}".format,
        conversions._convert_hunyuan_video_lora_to_diffusers,
    ),
    (
        "wan",
        wan_modules(),
        "diffusion_model.{}".format,
        conversions._convert_non_diffusers_wan_lora_to_diffusers,
    ),
    (
        "lumina2",
        refined_modules(3840),
        "diffusion_model.{}".format,
        conversions._convert_non_diffusers_lumina2_lora_to_diffusers,
    ),
]


@pytest.mark.parametrize("name, modules, prefixed, convert", CONVERTED, ids=[case[0] for case in CONVERTED])
def test_a_module_has_the_kind_of_the_module_that_diffusers_makes_of_it(name, modules, prefixed, convert):
    """Each module's `up` holds a number of its own, which tells where diffusers puts it."""
    modules, tensors = list(modules), {}
    is_kohya = prefixed is flux_prefixed
    for number, (module, rows) in enumerate(modules, 1):
        down, up = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
        tensors[f"{prefixed(module)}.{down}.weight"] = torch.zeros(1, 4)
        tensors[f"{prefixed(module)}.{up}.weight"] = torch.full((rows, 1), float(number))
    made = {key: w for key, w in convert(tensors).items() if "lora_B" in key}
    found = set()
    for key, w in made.items():
        number = int(w.flatten()[0])
        found.add(number)
        target = key.removeprefix("transformer.").partition(".lora_B")[0]
        assert kind(ORIGINAL_ROWS[name], modules[number - 1][0]) == kind(DIFFUSERS_ROWS[name], target), key
    assert found == set(range(1, len(modules) + 1))
    spelled = [prefixed(module) for module, _ in modules]
    kinds = kinds_of(spelled)
    assert ARCHITECTURES[name] in kinds.title
    assert kinds.kinds == [kind(ORIGINAL_ROWS[name], module) for module, _ in modules]
    assert {"visual", "text", "other"} <= set(kinds.kinds)


def sd3_checkpoint():
    """A checkpoint of the first code, each tensor with a number of its own."""
    parts = {
        "x_block": ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2"),
        "context_block": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    }
    modules = [
        f"joint_blocks.{block}.{stream}.{part}"
        for block in (0, 1)
        for stream, own in parts.items()
        for part in (*own, "adaLN_modulation.1")
        if not (block == 1 and (part.startswith("attn2") or (stream, part) == ("context_block", "attn.proj")))
        if not (block == 1 and stream == "context_block" and part.startswith("mlp"))
    ]
    modules += ["x_embedder.proj", "context_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    modules += [
        "y_embedder.mlp.0",
        "y_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    tensors = {"pos_embed": torch.zeros(6, 6)}
    for number, module in enumerate(modules, 1):
        for end, shape in (("weight", (6, 6)), ("bias", (6,))):
            tensors[f"{module}.{end}"] = torch.full(shape, float(number))
    return modules, tensors


def test_modules_of_the_first_code_of_sd3_have_the_kinds_of_diffusers_modules():
    modules, tensors = sd3_checkpoint()
    found = set()
    for key, w in convert_sd3_transformer_checkpoint_to_diffusers(tensors).items():
        if key.endswith("weight"):
            number = int(w.flatten()[0])
            found.add(number)
            target = key.removesuffix(".weight")
            assert (
                kind(ORIGINAL_ROWS["sd3"], modules[number - 1]) == kind(DIFFUSERS_ROWS["sd3"], target) != ""
            )
    assert found == set(range(1, len(modules) + 1))
    assert kinds_of([f"lora_unet_{module.replace('.', '_')}" for module in modules]).title == (
        "Stable Diffusion 3 (original names)"
    )


LANGUAGE_MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", {"num_hidden_layers": 1}),
    "Phi3ForCausalLM": ("Phi3Config", {"num_hidden_layers": 1, "pad_token_id": 0}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"num_hidden_layers": 1}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_layer": 1}),
    "GPTJForCausalLM": ("GPTJConfig", {"n_layer": 1}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {"num_hidden_layers": 1}),
    "FalconForCausalLM": ("FalconConfig", {"num_hidden_layers": 1}),
    "BloomForCausalLM": ("BloomConfig", {"n_layer": 1}),
    "T5ForConditionalGeneration": ("T5Config", {"num_layers": 1}),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_module_of_a_language_model_is_text(name):
    import transformers

    config, settings = LANGUAGE_MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    modules = [
        f"base_model.model.{path}"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    found = kinds_of(modules)
    assert (
        found.title == "language model"
        and set(found.kinds) == {"text"}
        and "does not apply" in found.why_none
    )


# --- finding the architecture

SD = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
FLUX_RAW = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mod_lin")
TITLES = [
    ([f"{SD}.attn1.to_q", f"{SD}.attn2.to_v", f"{SD}.ff.net.2"], "Stable Diffusion 1, 2 or XL", "vto"),
    (["lora_unet_input_blocks_4_1_transformer_blocks_3_attn1_to_q"], "Stable Diffusion 1, 2 or XL", "v"),
    (
        [f"{SD}.attn2.processor.to_v", "lora_te_text_model_encoder_layers_0_mlp_fc1"],
        "Stable Diffusion 1, 2 or XL",
        "tt",
    ),
    (
        ["base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
        "Stable Diffusion 1, 2 or XL",
        "v",
    ),
    (FLUX_RAW, "Flux 1 (BFL names)", "vo"),
    (
        ["double_blocks.3.txt_attn.proj", "single_blocks.3.linear2", "double_blocks.1.txt_mlp.0"],
        "Flux 1 (BFL names)",
        "tot",
    ),
    (
        ["transformer.double_blocks.0.img_attn.qkv"],
        "Flux 1 (BFL names) or Hunyuan-Video (original names)",
        "v",
    ),
    (
        [
            "transformer.transformer_blocks.0.attn.add_q_proj",
            "transformer.single_transformer_blocks.0.attn.to_q",
        ],
        "Flux 1 or Hunyuan-Video (diffusers names)",
        "to",
    ),
    (
        ["transformer.transformer_blocks.0.attn.to_out.0", "transformer.x_embedder"],
        "Flux 1 (diffusers names)",
        "vo",
    ),
    (["lora_transformer_transformer_blocks_0_attn_to_q", "lora_transformer_context_embedder"], None, "vo"),
    (
        ["transformer.transformer_blocks.0.attn2.to_q", "transformer.transformer_blocks.0.ff_context.net.2"],
        "Stable Diffusion 3 (diffusers names)",
        "vt",
    ),
    (["lora_unet_blocks_0_cross_attn_k", "lora_unet_blocks_0_self_attn_o"], "Wan (original names)", "tv"),
    (["base_model.model.blocks.0.attn1.to_q"], "Wan (diffusers names)", "v"),
    (["transformer_2.blocks.0.attn1.to_q", "transformer.blocks.0.attn2.to_k"], "Wan (diffusers names)", "vt"),
    (
        ["transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn2.to_q"],
        "LTX-Video, PixArt or Sana (diffusers names)",
        "vt",
    ),
    (
        ["transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.norm2.linear"],
        "CogVideoX (diffusers names)",
        "oo",
    ),
    (["transformer.transformer_blocks.7.img_mlp.net.2"], "Qwen-Image (diffusers names)", "v"),
    (["diffusion_model.layers.0.attention.to_q"], None, "o"),
    (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"], "text encoders alone", "t"),
    (
        [
            "lora_unet_down_blocks_0_strange_attn1_to_q",
            "unet.middle_block.strange.attn2.to_q",
            "lora_unet_output_blocks_11_strange_attn2_to_q",
        ],
        "Stable Diffusion 1, 2 or XL",
        "vtt",
    ),
]
LETTERS = {"v": "visual", "t": "text", "o": "other"}


@pytest.mark.parametrize("modules, title, letters", TITLES, ids=[case[0][0] for case in TITLES])
def test_the_architecture_is_found_from_names_in_every_style(modules, title, letters):
    found = kinds_of(modules)
    assert found.title == title or title is None, found
    assert found.kinds == [LETTERS[letter] for letter in letters] and not found.problem


@pytest.mark.parametrize(
    "modules, problem",
    [
        (
            ["transformer.transformer_blocks.0.attn1.to_q"],
            "CogVideoX",
        ),  # PixArt's is visual, CogVideoX's is not
        (["transformer.transformer_blocks.0.attn.to_q"], "Krea 2"),  # Flux's is visual, Krea 2's is not
        (["transformer.nothing.0.attn1.to_q"], NOT_KNOWN),
        (["x_attn1_to_q"], NOT_KNOWN),
        ([f"{SD}.attn1.to_q", "transformer.blocks.0.attn1.to_q"], NOT_KNOWN),  # two models
        (["unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_q"], NOT_KNOWN),
        (["unet.down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn2.to_q"], NOT_KNOWN),
        (["unet.down_blocks.0.attentions.0.to_q"], NOT_KNOWN),
        (["unet.mid_block.temp_attentions.0.transformer_blocks.0.attn2.to_k"], NOT_KNOWN),
        (["lora_unet_mid_block_temp_attentions_0_transformer_blocks_0_attn2_to_k"], NOT_KNOWN),
        (["unet.transformer_in.transformer_blocks.0.attn2.to_k"], NOT_KNOWN),
        ([f"{SD}.attn1.to_q", "unet.down_blocks.0.temp_convs.0.conv1.2"], NOT_KNOWN),
        (["unet.down_blocks.0.2.attention.to_q"], NOT_KNOWN),  # Stable Cascade
        (["transformer.transformer_blocks.0.audio_attn1.to_q"], NOT_KNOWN),  # LTX 2
        (["lora_unet_transformer_blocks_0_audio_attn2_to_q"], NOT_KNOWN),
        (["unet.attn1.to_q"], NOT_KNOWN),
        (["unet.stages.0.down_blocks.0.attn2.to_q"], NOT_KNOWN),
        (["base_model.model.model.visual.blocks.0.attn.qkv"], NOT_KNOWN),  # a vision-language model
        ([*FLUX_RAW, "transformer.double_blocks.0.img_attn.other"], NOT_KNOWN),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_not_certain_is_unknown(modules, problem):
    found = kinds_of(modules)
    assert found.title == NOT_KNOWN and problem in found.problem
    assert found.kinds == ["other"] * len(modules)


def test_a_chosen_architecture_decides_and_leaves_other_layers_out():
    modules = ["transformer.transformer_blocks.0.attn1.to_q", "transformer.strange"]
    assert kinds_of(modules, "pixart")[:2] == ("PixArt", ["visual", "other"])
    assert kinds_of(modules, "cogvideox").kinds == ["other", "other"]
    assert kinds_of(["x_attn1_to_q", "y.attn2", "z"], "sd").kinds == ["visual", "text", "other"]
    assert kinds_of(modules, "flux").problem and kinds_of(["double_blocks_0_img_attn_qkv"], "flux").kinds == [
        "visual"
    ]


NOT_OF_SD = (
    "UNet3DConditionModel",
    "I2VGenXLUNet",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
    "StableCascadeUNet",
    "Kandinsky3UNet",
    "UVit2DModel",
    "UNet2DModel",
    "UNet1DModel",
)


@pytest.mark.parametrize("name", [*NOT_OF_SD, "UNet2DConditionModel"])
def test_which_unet_of_diffusers_is_stable_diffusion(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    modules = [f"unet.{path}" for path, module in model.named_modules() if isinstance(module, kinds)]
    attention = [path for path in modules if re.search(r"\.(to_)?(q|k|v|query|key|value)$", path)]
    for some in (modules, attention, [f"lora_{path.replace('.', '_')}" for path in attention]):
        assert some and (kinds_of(some).title == NOT_KNOWN) == (name in NOT_OF_SD)


def test_attention_over_time_does_not_see_the_text():
    """In a U-Net of frames attn2 sees the text or other frames, by the part that it is in."""
    blocks = {"down_block_types": ("CrossAttnDownBlock3D",), "up_block_types": ("CrossAttnUpBlock3D",)}
    sizes = {"block_out_channels": (8,), "attention_head_dim": 4, "cross_attention_dim": 12}
    model = diffusers.UNet3DConditionModel(**blocks, **sizes, layers_per_block=1, norm_num_groups=4)
    seen = {}
    for path, module in model.named_modules():
        if path.endswith("attn2.to_k"):
            module.register_forward_hook(lambda _, given, __, path=path: seen.update({path: given[0].shape}))
    with torch.no_grad():
        model(torch.zeros(1, 4, 3, 8, 8), 1, torch.zeros(1, TEXT, 12))
    of_text = {path for path, shape in seen.items() if shape[1:] == (TEXT, 12)}
    other = {path for path in seen if compiled(OTHER_UNETS).fullmatch(path)}
    assert of_text and other and other == seen.keys() - of_text


def test_a_unet_of_motion_is_kept_apart():
    assert compiled(OTHER_UNETS).fullmatch(own_path("unet.mid_block.motion_modules.0.proj_in"))
    assert not compiled(OTHER_UNETS).fullmatch(own_path(f"{SD}.attn1.to_q"))
    assert is_text_encoder("text_encoder_2.x") and not is_text_encoder("unet.text_encoder")


@pytest.mark.parametrize(
    "module, block",
    [
        ("transformer.double_blocks.3.img_attn.qkv", "double_blocks.3"),
        ("lora_unet_double_blocks_12_img_attn_qkv", "double_blocks.12"),
        ("transformer.transformer_blocks.3.attn.to_q", "transformer_blocks.3"),
        ("blocks.3.attn1.to_q", "blocks.3"),
        ("transformer_2.blocks.3.attn1.to_q", "transformer_2.blocks.3"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0"),
        ("base_model.model.model.layers.7.self_attn.q_proj", "model.layers.7"),
        ("lm_head", "lm_head"),
    ],
)
def test_the_block_of_a_transformers_module(module, block):
    assert block_in(module) == block


def test_the_name_of_a_block_can_stand_in_a_files_name_and_stays_its_own():
    odd = ["a/b.0.x", "a-b.0.x", "a\n.0.x", "a" * 300 + ".0.x", "a" * 301 + ".0.x"]
    names = list(map(block_in, odd))
    assert len(set(names)) == len(odd) and names[1] == "a-b.0"
    assert all(re.fullmatch(r"[\w.-]{1,120}", name) for name in names)


# --- layers


def layers(*modules, **kwargs):
    names = [f"{module}.lora.{side}.weight" for module in modules for side in ("down", "up")]
    return Layers(sorted(names), {}, **kwargs)


FLUX = [
    *(
        f"transformer.double_blocks.{i}.{stream}_attn.{part}"
        for i in (0, 1)
        for stream in ("img", "txt")
        for part in ("qkv", "proj")
    ),
    *(f"transformer.double_blocks.{i}.{stream}_mod.lin" for i in (0, 1) for stream in ("img", "txt")),
    *(f"transformer.single_blocks.{i}.linear{j}" for i in (0, 1) for j in (1, 2)),
    *(f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)),
]


def test_layer_sets_of_flux():
    own = layers(*FLUX)
    count = lambda name: len(own.positions(name))
    assert own.count_words() == {"visual": 8, "text": 8, "text encoder": 4, "other": 16}
    assert [count(name) for name in ("all_layers", "visual_only", "text_only")] == [36, 8, 12]
    blocks = own.expand(("by_block",), 0)
    assert blocks == [
        *(f"by_block.text_encoder.text_model.encoder.layers.{i}.text" for i in (0, 1)),
        *(f"by_block.double_blocks.{i}.{kind}" for i in (0, 1) for kind in ("visual", "text")),
    ]
    assert [count(name) for name in blocks] == [2, 2, 4, 4, 4, 4]
    chosen = own.positions("random_half.0")
    assert len(chosen) == 8 and {own.words[i] for i in chosen} <= {"visual", "text"}
    assert sorted(own.blocks[i] for i in chosen) == ["double_blocks.0"] * 4 + ["double_blocks.1"] * 4


def test_text_encoders_are_text_in_stable_diffusion_and_leave_its_halves_alone():
    modules = [f"{SD}.{kind}.{part}" for kind in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v")]
    alone, both = layers(*modules), layers(*modules, FLUX[-1])
    assert both.count_words() == {"attn1": 6, "attn2": 6, "text encoder": 2, "other": 0}
    assert alone.count_words() == {"attn1": 6, "attn2": 6, "other": 0}
    assert len(both.positions("text_only")) == 8 and len(alone.positions("text_only")) == 6
    for draw in range(5):
        names = [[own.names[i] for i in own.positions(f"random_half.{draw}")] for own in (alone, both)]
        assert names[0] == names[1] and len(names[0]) == 6


def test_halves_are_drawn_from_all_blocks_where_none_has_both_kinds():
    blocks = ("noise_refiner.0", "noise_refiner.1", "context_refiner.0", "context_refiner.1", "layers.0")
    own = layers(
        *(f"transformer.{block}.attention.{part}" for block in blocks for part in ("to_q", "to_k", "to_v")),
        FLUX[-1],
    )
    halves = [own.positions(f"random_half.{draw}") for draw in range(5)]
    for half in halves:
        assert len(half) == 12 == len(own.positions("visual_only"))
        assert {own.words[i] for i in half} == {"visual", "text"}
    assert len(set(map(tuple, halves))) == 5


def test_stated_sides():
    own = layers(
        "m.0.self_attn.q",
        "m.0.cross_attn.q",
        "m.0.mlp",
        layer_sides={"visual": ("*self_attn*",), "text": ("*cross*",)},
    )
    assert own.count_words() == {"visual": 2, "text": 2, "other": 2} and not own.found.problem
    assert own.expand(("by_block",), 0) == ["by_block.m.0.text", "by_block.m.0.visual"]
    with pytest.raises(InputError, match="visual and text by the patterns"):
        _ = layers("m.0.attn", layer_sides={"visual": ("*attn*",), "text": ("m.*",)}).found
    with pytest.raises(InputError, match=r"no layer has a name as the patterns of 'text' say.* m\.\*"):
        _ = layers("m.0.attn", layer_sides={"visual": ("*attn*",), "text": ("x.*",)}).found


# --- settings


@pytest.mark.parametrize(
    "sides, error",
    [
        ({"image": ("*",)}, "'image': give visual or text patterns"),
        ({"visual": ()}, "'visual': give visual or text patterns"),
    ],
)
def test_layer_sides_are_checked(sides, error):
    with pytest.raises(InputError, match=error):
        Settings(layer_sides=sides)
    with pytest.raises(InputError, match="both say which layers are visual"):
        Settings(layer_sides={"visual": ("*",)}, architecture="flux")
    with pytest.raises(InputError, match="unknown --architecture 'flix': use auto, sd, flux,"):
        Settings(architecture="flix")


# --- the program


def save(name, modules, rows=40):
    """A data set whose adapters have these modules."""
    rng = np.random.default_rng(0)
    columns = {
        f"{module}.lora.{side}.weight": rng.normal(size=(rows, *shape)).tolist()
        for module in modules
        for side, shape in (("down", (1, 3)), ("up", (3, 1)))
    }
    Dataset.from_dict(columns | {"category_label": ["a", "b"] * (rows // 2)}).save_to_disk(name)


STATS = ("--representations", "stats")


def written(place, name):
    return tuple(
        json.loads((folder(place, name) / f"{file}.json").read_text()) for file in ("results", "manifest")
    )


def test_flux_is_named_and_recorded_wherever_it_is_asked_for(run, place, capsys):
    import inspect_dataset

    save("flux", FLUX)
    status, log = run("--dry-run", *STATS, dataset="./flux")
    assert status == 0 and "Architecture: Flux 1 (BFL names)" in log and "visual_only_stats" in log
    sets = ("--layer-sets", "all_layers", "visual_only", "text_only", "by_block", "random_half")
    status, log = run(*STATS, *sets, "--random-halves", "1", dataset="./flux")
    assert status == 0, log
    assert "Architecture: Flux 1 (BFL names)" in log
    assert "Layers: 36 (8 visual, 8 text, 4 text encoder, 16 other) of rank 1" in log
    results, manifest = written(place, "flux")
    assert results["architecture"] == manifest["data"]["architecture"] == "Flux 1 (BFL names)"
    assert (results["num_visual_layers"], results["num_text_layers"]) == (8, 12)
    assert results["visual_only_results"][0]["num_layers"] == 8
    assert "by_block.double_blocks.1.text_stats.json" in checkpoints(place, name="flux")
    text = (folder(place, "flux") / "results.txt").read_text()
    assert "Layers:    36 (8 visual, 8 text, 4 text encoder; Flux 1 (BFL names))" in text
    assert ("architecture", "Flux 1 (BFL names)") in data_block(results | {"name": "flux"})["entries"]
    figure = control_figures.blocks(results)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"double 0", "double 1", "text_encoder 1", "visual", "text"} <= set(words)
    assert inspect_dataset.main(["./flux"]) == 0
    assert "Architecture: Flux 1 (BFL names)" in capsys.readouterr().out


LLAMA = [f"base_model.model.model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qv"]
WHY = "(the visual question does not apply to a language model)"


def test_a_language_model_runs_all_layers_and_says_why_no_more(run, place):
    save("llama", LLAMA)
    skipped = f"Skipped, the data set has no layer of visual_only {WHY}: visual_only_stats"
    status, log = run("--dry-run", *STATS, dataset="./llama")
    assert status == 0 and skipped in log and "Total Progress:       0/1" in log
    status, log = run(*STATS, dataset="./llama")
    assert status == 0 and skipped in log and "Architecture: language model" in log, log
    assert visible(folder(place, "llama") / "checkpoints") == ["all_layers_stats.json"]
    results, _ = written(place, "llama")
    assert [entry["cell"] for entry in results["skipped_cells"]] == ["visual_only_stats"]
    assert WHY in (folder(place, "llama") / "results.txt").read_text()
    assert WHY in failure_block(results)["entries"][0][1]
    assert "No verdict: no representation was run with all layers and with the visual layers" in log
    for question in ("--status", "--dry-run"):
        status, log = run(question, *STATS, dataset="./llama")
        assert status == 0 and "Total Progress:       1/1 (100.0%)" in log
    status, log = run(*STATS, dataset="./llama")
    assert status == 0 and "All experiments already completed!" in log
    (place / "typed.yaml").write_text("layer_sets: [all_layers, visual_only]\n")
    for typed in (("--layer-sets", "all_layers", "visual_only"), ("--config", "typed.yaml")):
        for more in ((), ("--dry-run",)):
            status, log = run(*STATS, *typed, *more, "--output-dir", "typed", dataset="./llama")
            assert status == 2 and f"no layer for --layer-sets visual_only {WHY}: leave it out" in log
    assert run(*STATS, "--layer-sets", "all_layers", "--output-dir", "typed", dataset="./llama")[0] == 0


STRANGE = [f"transformer.stages.{i}.{kind}.q" for i in (0, 1) for kind in ("own_attn", "their_attn")]
SIDES = "layer_sides: {visual: ['*.own_attn.*'], text: ['*.their_attn.*']}\n"


def test_an_unknown_architecture_is_refused_with_the_lines_to_write(run, place):
    save("strange", STRANGE)
    for more in ((), ("--dry-run",)):
        status, log = run(*STATS, *more, dataset="./strange")
        (line,) = (line for line in log.splitlines() if line.startswith("error"))
        assert status == 2 and "because the architecture is unknown" in line
        assert "transformer.stages.*.own_attn, transformer.stages.*.their_attn." in line
        assert "layer_sides: {visual: ['*.self_attn.*'], text: ['*.cross_attn.*']}" in line
    status, log = run(*STATS, "--layer-sets", "all_layers", dataset="./strange")
    assert status == 0 and "Architecture: unknown" in log and "Layers: 8 (8 other)" in log
    (place / "sides.yaml").write_text(SIDES)
    assert "0/1" in run("--status", *STATS, "--config", "sides.yaml", dataset="./strange")[1]
    status, log = run(*STATS, "--config", "sides.yaml", dataset="./strange")
    assert status == 0 and "Architecture: as layer_sides says" in log and "(4 visual, 4 text)" in log
    results, _ = written(place, "strange")
    assert results["visual_only_results"][0]["num_layers"] == 4
    status, log = run(*STATS, "--architecture", "wan", "--output-dir", "other", dataset="./strange")
    assert status == 2 and "no layer has a name as Wan has them" in log


def test_sides_that_were_stated_after_a_set_was_left_out_are_asked_for(run, place):
    save("joined", [f"transformer.transformer_blocks.0.{part}" for part in ("attn1.to_q", "norm2.linear")])
    status, log = run(*STATS, dataset="./joined")
    why = "(image and text pass through the same layers)"
    assert status == 0 and f"no layer of visual_only {why}" in log, log
    assert "1/1 (100.0%)" in run("--status", *STATS, dataset="./joined")[1]
    (place / "sides.yaml").write_text("layer_sides: {visual: ['*attn1*']}\n")
    assert "1/2 (50.0%)" in run("--status", *STATS, "--config", "sides.yaml", dataset="./joined")[1]
    status, log = run(*STATS, "--config", "sides.yaml", dataset="./joined")
    assert status == 0 and "Will run 1 remaining" in log
    results, _ = written(place, "joined")
    assert results["skipped_cells"] == [] and results["visual_only_results"]


def test_columns_of_the_hub_with_raw_names_are_told_apart(place):
    save("raw", [*FLUX_RAW, "lora_unet_double_blocks_0_txt_attn_proj"], rows=12)
    data = collect(Dataset.load_from_disk("raw"), "raw")
    assert data.summary()["layers"] == {"visual": 2, "text": 2, "other": 2}
    assert data.summary()["architecture"] == "Flux 1 (BFL names)"
