"""The builder: files that diffusers and PEFT save themselves,
kohya's style, every refusal, labels, resumption, memory.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import load
from conftest import ROOT
from running import FAST
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

import visual_ablation_experiment as experiment
from ablation.adapter_names import dotted, parse_key
from ablation.adapters import BadFile, read_adapter, survey_file
from ablation.layers import attention_kind, is_layer
from ablation.making import build as builder
from ablation.making import progress
from ablation.making.adapter_files import random_matrices, write_adapter
from ablation.making.arrow_folder import arrow_matrices

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    f"{BLOCK}.attn1.to_q": (8, 8),
    f"{BLOCK}.attn2.to_v": (8, 6),
    f"{BLOCK}.ff.net.0.proj": (16, 8),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (4, 4),
}
STYLES = ("diffusers", "peft", "kohya")


def shapes_of(rank=2, modules=MODULES):
    shapes = []
    for module, (out, inputs) in modules.items():
        shapes += [(f"{module}.lora.down.weight", rank, inputs), (f"{module}.lora.up.weight", out, rank)]
    return shapes


def make_files(folder, n=6, rank=2, style="diffusers", classes=2, alpha=None, first=0):
    """FOLDER/class_<c>/<number>/<weights>."""
    modules = {name: shape for name, shape in MODULES.items() if style != "peft" or name.startswith("unet")}
    return [
        write_adapter(
            folder / f"class_{i % classes}" / f"{i:03}",
            style,
            random_matrices(i, classes, shapes_of(rank, modules), 0),
            alpha or rank,
        )
        for i in range(first, first + n)
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path


def weights_of(output="out", label_column="category_label"):
    """{column: (rows, r, c)} of a data set that was built."""
    data = load(f"./{output}", label_column=label_column)
    return {layer: data.weights.read_layer(layer, 0, data.num_rows).numpy() for layer in data.layers.names}


def column(name, output="out"):
    return load(f"./{output}").weights.dataset.with_format(None)[name][:]


# --- names


@pytest.mark.parametrize(
    ("key", "module", "side"),
    [
        (f"{BLOCK}.attn1.to_q.lora.down.weight", f"{BLOCK}.attn1.to_q", "down"),
        (f"{BLOCK}.attn1.to_q.lora_A.weight", f"{BLOCK}.attn1.to_q", "down"),
        (f"base_model.model.{BLOCK[5:]}.attn1.to_q.lora_B.weight", f"{BLOCK}.attn1.to_q", "up"),
        (f"base_model.model.{BLOCK[5:]}.attn1.to_q.lora_B.my_adapter.weight", f"{BLOCK}.attn1.to_q", "up"),
        (f"{BLOCK}.attn2.processor.to_out_lora.up.weight", f"{BLOCK}.attn2.to_out.0", "up"),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
            f"{BLOCK}.attn2.to_out.0",
            "up",
        ),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj.alpha",
            f"{BLOCK}.ff.net.0.proj",
            "alpha",
        ),
        (f"{BLOCK}.attn1.to_q.alpha", f"{BLOCK}.attn1.to_q", "alpha"),
        (
            "lora_unet_up_blocks_1_upsamplers_0_conv.lora_down.weight",
            "unet.up_blocks.1.upsamplers.0.conv",
            "down",
        ),
        (
            "lora_unet_mid_block_resnets_0_time_emb_proj.lora_down.weight",
            "unet.mid_block.resnets.0.time_emb_proj",
            "down",
        ),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "down",
        ),
        (
            "lora_te2_text_model_encoder_layers_11_self_attn_out_proj.lora_up.weight",
            "text_encoder_2.text_model.encoder.layers.11.self_attn.out_proj",
            "up",
        ),
        (
            "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "down",
        ),
        (
            "base_model.model.encoder.layers.0.mlp.fc2.lora_A.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
            "down",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
            "up",
        ),
        (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
            f"{BLOCK}.attn1.to_q",
            "down",
        ),
        (
            "lora_unet_output_blocks_3_1_proj_in.lora_down.weight",
            "unet.up_blocks.1.attentions.0.proj_in",
            "down",
        ),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            "transformer.double_blocks.0.img_attn.qkv",
            "down",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj",
            "down",
        ),
    ],
)
def test_a_name_in_any_style(key, module, side):
    assert parse_key(key)[:2] == (module, side)
    assert is_layer(f"{module}.lora.down.weight")


@pytest.mark.parametrize(
    "key", ["x.lora_embedding_A", "x.lora_B.bias", "conv_in.weight", "x.diff", "y.oft_R"]
)
def test_a_name_that_is_no_lora(key):
    assert parse_key(key) is None


def test_the_attention_kind_is_recognised_in_every_style():
    for kind, other in (("attn1", "attn2"), ("attn2", "attn1")):
        keys = [
            f"{BLOCK}.{kind}.to_q.lora.up.weight",
            f"base_model.model.{BLOCK[5:]}.{kind}.to_q.lora_B.weight",
            f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{kind}_to_q.lora_up.weight",
            f"lora_unet_input_blocks_1_1_transformer_blocks_0_{kind}_to_q.lora_up.weight",
            f"lora_unet_strange_blocks_0_{kind}_to_q.lora_up.weight",
        ]
        assert (
            {attention_kind(parse_key(key).module + ".lora.up.weight") for key in keys} == {kind} != {other}
        )
    assert (
        attention_kind("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora.up.weight") == "other"
    )


@pytest.fixture(scope="module")
def big_models():
    """The U-Nets of Stable Diffusion 1.5 and XL (narrower)
    and both kinds of CLIP text encoder, without memory.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        return [
            UNet2DConditionModel(cross_attention_dim=768),
            UNet2DConditionModel(
                block_out_channels=(32, 64, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=32,
                use_linear_projection=True,
                cross_attention_dim=32,
                norm_num_groups=8,
                attention_head_dim=8,
            ),
            CLIPTextModel(CLIPTextConfig()),
            CLIPTextModelWithProjection(CLIPTextConfig()),
        ]


def test_underscores_become_the_dots_of_every_module_with_weights(big_models):
    names = {
        name
        for model in big_models
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    }
    assert len(names) > 1000
    names |= {
        f"text_model.{name}" for name in names if name.startswith(("encoder.layers", "embeddings", "final"))
    }
    assert {name: dotted(name.replace(".", "_")) for name in names} == {name: name for name in names}
    assert len({name.replace(".", "_") for name in names}) == len(names)


# --- files of the libraries themselves


def tiny_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
    )


def lora_config(**settings):
    from peft import LoraConfig

    targets = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj"]
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": targets, **settings}
    )


def randomise(model):
    """Give `up` weights too, which start as zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def products(adapter):
    """Module -> scale * up @ down of a file that was read."""
    return {
        module: adapter.scales[module]
        * adapter.matrices[f"{module}.lora.up.weight"].astype(np.float64)
        @ adapter.matrices[f"{module}.lora.down.weight"]
        for module in adapter.layout.modules
    }


def deltas(model, adapter="default"):
    """Module -> the change of its weight, as PEFT itself computes it, flattened to (out, rest)."""
    return {
        f"unet.{name.removeprefix('base_model.model.')}": module.get_delta_weight(adapter)
        .detach()
        .flatten(1)
        .numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_q": 3, "conv1": 1}},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_saves_is_the_change_that_peft_makes(place, settings):
    from peft import get_peft_model

    model = randomise(get_peft_model(tiny_unet(), lora_config(**settings)))
    model.save_pretrained("saved")
    found, expected = products(read_adapter(place / "saved/adapter_model.safetensors")), deltas(model)
    assert found.keys() == expected.keys() and len(found) == 48
    for module, change in expected.items():
        np.testing.assert_allclose(found[module], change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("converted", [True, False], ids=["diffusers keys", "peft keys"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_what_diffusers_saves_is_the_change_that_peft_makes(place, settings, converted):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = tiny_unet()
    unet.add_adapter(lora_config(**settings))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    encoder.add_adapter(lora_config(target_modules=["q_proj", "fc1"], lora_alpha=2))
    change = convert_state_dict_to_diffusers if converted else dict
    layers = {
        "unet_lora_layers": change(get_peft_model_state_dict(randomise(unet))),
        "text_encoder_lora_layers": change(get_peft_model_state_dict(randomise(encoder))),
    }
    metadata = {
        "unet_lora_adapter_metadata": unet.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": encoder.peft_config["default"].to_dict(),
    }
    for part in metadata.values():
        part["target_modules"] = sorted(part["target_modules"])
    StableDiffusionPipeline.save_lora_weights("saved", **layers, **metadata)
    adapter = read_adapter(place / "saved/pytorch_lora_weights.safetensors")
    found, expected = products(adapter), deltas(unet)
    text = {
        module: scale
        for module, scale in adapter.scales.items()
        if module.startswith("text_encoder.text_model.encoder.layers.0.")
    }
    assert sorted(module.rpartition(".")[2] for module in text) == ["fc1", "q_proj"] and set(
        text.values()
    ) == {0.5}
    assert found.keys() - text.keys() == expected.keys()
    for module, delta in expected.items():
        np.testing.assert_allclose(found[module], delta, rtol=1e-4, atol=1e-4)
    unet.save_lora_adapter("alone")  # no prefix, its configuration in the header
    alone = products(read_adapter(place / "alone/pytorch_lora_weights.safetensors"))
    assert alone.keys() == expected.keys() and all(
        np.array_equal(alone[module], found[module]) for module in alone
    )


def save_as_kohya(path, unet_state, alpha, te_state=None):
    """A state dict of PEFT names as kohya's scripts name it."""
    renamed = {}
    for prefix, state in (("lora_unet_", unet_state), ("lora_te_", te_state or {})):
        for key, value in state.items():
            module, _, side = key.removesuffix(".weight").rpartition(".lora_")
            flat = prefix + module.replace(".", "_")
            renamed[f"{flat}.lora_{'down' if side == 'A' else 'up'}.weight"] = value.contiguous()
            renamed[f"{flat}.alpha"] = torch.tensor(float(alpha))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_torch_file(renamed, path)


@pytest.fixture
def one_adapter_everywhere(place):
    """all/<style>/... : one adapter of alpha 8 and rank 4, as each tool saves it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model, get_peft_model_state_dict

    unet = tiny_unet()
    unet.add_adapter(lora_config())
    state = get_peft_model_state_dict(randomise(unet))
    metadata = unet.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    StableDiffusionPipeline.save_lora_weights(
        "all/diffusers",
        unet_lora_layers=convert_state_dict_to_diffusers(state),
        unet_lora_adapter_metadata=metadata,
    )
    randomise(get_peft_model(tiny_unet(), lora_config())).save_pretrained("all/peft")
    named = get_peft_model(tiny_unet(), lora_config(), adapter_name="mine")
    randomise(named).save_pretrained("all/named")
    # With the adapter's name left in, as torch.save of a state dict and some trainers leave it.
    (place / "all/with_name").mkdir()
    saved = load_file("all/peft/adapter_model.safetensors")
    saved = {re.sub(r"(lora_[AB])\.weight", r"\1.mine.weight", key): value for key, value in saved.items()}
    save_file(saved, place / "all/with_name/adapter_model.safetensors")
    shutil.copy("all/peft/adapter_config.json", "all/with_name")
    save_as_kohya(place / "all/kohya/lora.safetensors", state, 8)
    return place


def test_the_same_adapter_in_every_style_is_the_same_row(one_adapter_everywhere, build):
    status, said = build("all", "--label-from", "folder")
    assert status == 0, said
    assert column("lora_file") == [
        "diffusers/pytorch_lora_weights.safetensors",
        "kohya/lora.safetensors",
        "named/mine/adapter_model.safetensors",
        "peft/adapter_model.safetensors",
        "with_name/adapter_model.safetensors",
    ]
    assert "Styles:  1 diffusers, 1 kohya, 3 peft" in said and "not 1 in 5 files" in said
    weights = weights_of()
    assert len(weights) == 96
    for values in weights.values():
        assert (values == values[0]).all() and values.any()
    # the file's own weights, times alpha / rank = 2 in `up`
    raw = load_file("all/peft/adapter_model.safetensors")
    prefix = f"base_model.model.{BLOCK[5:]}.attn1.to_q.lora_"
    assert np.array_equal(weights[f"{BLOCK}.attn1.to_q.lora.down.weight"][0], raw[f"{prefix}A.weight"])
    assert np.array_equal(weights[f"{BLOCK}.attn1.to_q.lora.up.weight"][0], 2 * raw[f"{prefix}B.weight"])
    # convolutions, and that it is said
    conv = "unet.down_blocks.0.resnets.0.conv1.lora.down.weight"
    original = raw["base_model.model.down_blocks.0.resnets.0.conv1.lora_A.weight"]
    assert original.ndim == 4 and np.array_equal(weights[conv][0], original.reshape(4, -1))
    assert re.search(r"Flat: +\d+ columns hold convolutions", said)
    made = json.loads((one_adapter_everywhere / "out/build.json").read_text())
    assert conv in made["flattened"] and f"{BLOCK}.attn1.to_q.lora.down.weight" not in made["flattened"]


def test_diffusers_reads_our_kohya_files_as_the_same_modules(one_adapter_everywhere):
    """The kohya style of these tests is one that diffusers understands,
    and it finds the modules that we find.
    """
    from diffusers import StableDiffusionPipeline

    state, alphas = StableDiffusionPipeline.lora_state_dict("all/kohya", weight_name="lora.safetensors")
    theirs = {parse_key(key)[0] for key in state}
    layout = survey_file(one_adapter_everywhere / "all/kohya/lora.safetensors")
    assert theirs == layout.modules.keys() and set(alphas.values()) == {8.0} and len(theirs) == 48


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32], ids=str)
def test_every_float_type_becomes_float32_exactly(place, build, dtype):
    generator = torch.Generator().manual_seed(0)
    truth = {}
    for i in range(2):
        tensors = {
            name: torch.randn(rows, cols, generator=generator).to(dtype) for name, rows, cols in shapes_of()
        }
        (place / f"in/c{i}").mkdir(parents=True)
        save_torch_file(tensors, place / f"in/c{i}/x.safetensors")
        for name, value in tensors.items():
            truth.setdefault(name, []).append(value.float().numpy())
    assert build("in")[0] == 0
    for name, values in weights_of().items():
        assert values.dtype == np.float32 and np.array_equal(values, np.stack(truth[name]))


# --- alpha


def test_alpha_is_applied_recorded_or_ignored(place, build):
    make_files(place / "in", n=4, style="kohya", alpha=1.0)
    for choice in ("apply", "record", "ignore"):
        assert build("in", "--alpha", choice, output=choice)[0] == 0
    applied, recorded, ignored = (weights_of(choice) for choice in ("apply", "record", "ignore"))
    for name in applied:
        factor = 0.5 if ".lora.up." in name else 1
        assert (
            np.array_equal(recorded[name], ignored[name])
            and np.array_equal(applied[name], factor * ignored[name])
            and ignored[name].any()
        )
    modules = json.loads((place / "record/build.json").read_text())["modules"]
    assert column("lora_scale", "record") == [[0.5] * len(modules)] * 4 and modules == sorted(MODULES)
    assert "lora_scale" not in load("./apply").weights.dataset.column_names


def test_lora_scale_stands_in_the_order_of_the_modules(place, build):
    for i in range(2):
        path = write_adapter(place / f"in/c{i}", "kohya", random_matrices(i, 2, shapes_of(), 0), 2)
        tensors = load_file(path)
        for number, key in enumerate(sorted(key for key in tensors if key.endswith(".alpha"))):
            tensors[key] = np.array(2.0 * (number + i), dtype=np.float32)
        save_file(tensors, path)
    assert build("in", "--alpha", "record")[0] == 0
    modules = json.loads((place / "out/build.json").read_text())["modules"]
    by_kohya_name = sorted(
        modules, key=lambda module: "lora_" + module.replace("text_encoder", "te", 1).replace(".", "_")
    )
    for i, scales in enumerate(column("lora_scale")):
        assert dict(zip(modules, scales, strict=True)) == {
            module: number + i for number, module in enumerate(by_kohya_name)
        }


def test_a_peft_file_without_its_configuration_has_no_known_alpha(place, build):
    for path in make_files(place / "in", style="peft"):
        (path.parent / "adapter_config.json").unlink()
    status, said = build("in")
    assert status == 2 and "class_0/000/adapter_model.safetensors: no adapter_config.json beside it" in said
    assert build("in", "--alpha", "ignore")[0] == 0


# --- labels


def test_labels_from_folders(place, build):
    make_files(place / "in", n=5)
    assert build("in")[0] == 0
    assert column("category_label") == ["class_0"] * 3 + ["class_1"] * 2
    assert (
        column("lora_file")[0] == "class_0/000/pytorch_lora_weights.safetensors" and column("rank") == [2] * 5
    )
    # with several FOLDERs each is a class, and the same files get its name before theirs
    assert build("in/class_1", "in/class_0", output="two")[0] == 0
    assert column("category_label", "two") == ["class_0"] * 3 + ["class_1"] * 2
    assert column("lora_file", "two") == column("lora_file")


def test_a_file_in_no_class_folder(place, build):
    path = make_files(place / "in")[0]
    shutil.copy(path, place / "in/stray.safetensors")
    status, said = build("in")
    assert status == 2 and "stray.safetensors: lies in no folder below FOLDER" in said


def metadata(i, **more):
    return {
        "category_label": f"n0{i % 2}",
        "category_name": ["tench", "cock"][i % 2],
        "num_images": 10 + i,
        "leaf_id": i % 3,
        "rank": 2,
        "max_train_steps": 200,
        "step_loss": 0.25 if i else 1,
        "resumed": i > 2,
        "prompt": None if i == 1 else "a photo",
        "tags": ["x", i],
        **more,
    }


def with_metadata(place, **more):
    for i, path in enumerate(make_files(place / "in")):
        (path.parent / "metadata.json").write_text(json.dumps(metadata(i, **more)))


def test_labels_from_metadata_and_every_field_is_a_column(place, build):
    with_metadata(place)
    status, said = build("in")  # metadata.json is there, so it is used
    assert status == 0 and "labels from metadata" in said
    rows = load("./out").weights.dataset.with_format(None).select_columns(list(metadata(0)))
    order = [0, 2, 4, 1, 3, 5]  # rows are sorted by path
    expected = [metadata(i) | {"tags": json.dumps(["x", i])} for i in order]
    assert rows[:] == {key: [row[key] for row in expected] for key in expected[0]}
    types = {key: str(feature.dtype) for key, feature in rows.features.items()}
    assert types == {
        "category_label": "string",
        "category_name": "string",
        "num_images": "int64",
        "leaf_id": "int64",
        "rank": "int64",
        "max_train_steps": "int64",
        "step_loss": "float64",
        "resumed": "bool",
        "prompt": "string",
        "tags": "string",
    }
    assert "Nulls:   1 files have no 'prompt'" in said


def test_another_field_can_be_the_label(place, build):
    with_metadata(place)
    status, said = build("in", "--label-field", "leaf_id")
    assert status == 0 and load("./out", label_column="leaf_id").classes == [0, 1, 2]
    status, said = build("in", "--label-field", "concept", output="other")
    assert status == 2 and "metadata.json has no 'concept'" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "has no metadata.json beside it"),
        ("{", "its metadata.json cannot be read"),
        ("[1]", "holds list, not fields"),
        ('{"rank": 2}', "has no 'category_label'"),
        ('{"category_label": 0.5}', "labels are text or whole numbers"),
        ('{"category_label": "a", "rank": 4}', "is of rank 2 but its label says 4"),
    ],
)
def test_bad_metadata(place, build, content, reason):
    with_metadata(place)
    path = place / "in/class_0/000/metadata.json"
    path.unlink() if content is None else path.write_text(content)
    status, said = build("in")
    assert status == 2 and "class_0/000/pytorch_lora_weights.safetensors: " in said and reason in said
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "6 found = 5 written + 1 bad" in said and reason in said


def write_csv(path, rows, header=("file", "label", "seed", "note")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def csv_rows(n=6):
    return [
        (f"class_{i % 2}/{i:03}/pytorch_lora_weights.safetensors", i % 3, 7 - i, "007" if i else "")
        for i in range(n)
    ]


def test_labels_from_a_csv(place, build):
    make_files(place / "in")
    write_csv(place / "labels.csv", reversed(csv_rows()))
    assert build("in", "--labels", "labels.csv")[0] == 0
    assert column("category_label") == [i % 3 for i in (0, 2, 4, 1, 3, 5)] and column("seed") == [
        7,
        5,
        3,
        6,
        4,
        2,
    ]
    assert column("note") == [None, "007", "007", "007", "007", "007"]  # no number: Python would write 7


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        (csv_rows(5), None, "class_1/005/pytorch_lora_weights.safetensors: has no line in --labels"),
        (
            csv_rows() + [("nowhere.safetensors", 1, 1, "")],
            None,
            "names 1 files that are not there, the first 'nowhere.safetensors'",
        ),
        (
            csv_rows() + csv_rows(1),
            None,
            "line 8: 'class_0/000/pytorch_lora_weights.safetensors' for the second time",
        ),
        (
            [(name, "" if i else "a", seed, note) for i, (name, _, seed, note) in enumerate(csv_rows())],
            None,
            "line 3: no label",
        ),
        ([row[:3] for row in csv_rows()], None, "line 2: 4 values are expected"),
        (csv_rows(), ("path", "label", "seed", "note"), "starts with path,label,seed,note"),
    ],
)
def test_a_bad_csv(place, build, rows, header, says):
    make_files(place / "in")
    write_csv(place / "labels.csv", rows, **({"header": header} if header else {}))
    status, said = build("in", "--labels", "labels.csv")
    assert status == 2 and says in said and not (place / "out").exists()


def test_label_options_that_contradict(place, build):
    make_files(place / "in")
    (place / "l.csv").write_text("file,label\n")
    for flags in (
        ["--label-from", "csv"],
        ["--label-from", "folder", "--labels", "l.csv"],
        ["--label-field", "x", "--label-from", "folder"],
    ):
        assert build("in", *flags)[0] == 2


# --- refusals


def damage(path):
    path.write_bytes(path.read_bytes()[:-10])


def edit(change):
    def apply(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


Q_DOWN = f"{BLOCK}.attn1.to_q.lora.down.weight"


def set_value(key, value):
    return edit(lambda tensors: tensors[key].__setitem__((1, 2), value))


def replace(key, value):
    return edit(lambda tensors: tensors.__setitem__(key, value))


BAD = {
    "truncated": (damage, "cannot be read"),
    "no safetensors": (lambda path: path.write_text("hello"), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "nan": (set_value(Q_DOWN, np.nan), f"'{Q_DOWN}': the weight at (1, 2) is nan"),
    "infinity": (set_value(Q_DOWN, np.inf), "the weight at (1, 2) is inf"),
    "beyond float32": (replace(Q_DOWN, np.full((2, 8), 1e300)), "the weight at (0, 0) is inf as float32"),
    "no layer": (lambda path: save_file({}, path), "holds no LoRA layer"),
    "a whole model": (
        lambda path: save_file({"conv_in.weight": np.ones((2, 2))}, path),
        "holds 'conv_in.weight', which is no `down`, `up` or alpha",
    ),
    "OFT": (
        replace(f"{BLOCK}.attn1.to_q.oft_R.weight", np.ones(8)),
        "of OFT or BOFT adapters (rotations): leave them out with --leave-out",
    ),
    "no up": (
        edit(lambda tensors: tensors.pop(f"{BLOCK}.attn1.to_q.lora.up.weight")),
        f"module '{BLOCK}.attn1.to_q' has no `up`",
    ),
    "ranks that do not fit": (
        replace(Q_DOWN, np.ones((3, 8), np.float32)),
        "`down` [3, 8] and `up` [8, 2] have different ranks",
    ),
    "two adapters": (
        replace(f"{BLOCK}.attn1.to_q.lora_A.second.weight", np.ones((2, 8), np.float32)),
        "two adapters in one file",
    ),
    "integers": (replace(Q_DOWN, np.ones((2, 8), np.int8)), "is stored as I8"),
    "a vector": (replace(Q_DOWN, np.ones(8, np.float32)), "has shape [8]: a matrix is expected"),
    "a layer fewer": (
        edit(lambda tensors: [tensors.pop(key) for key in list(tensors) if "ff.net" in key]),
        "lacks 2 layers that most files have",
    ),
    "a layer more": (
        edit(
            lambda tensors: [
                tensors.__setitem__(key.replace("to_q", "to_k"), value)
                for key, value in list(tensors.items())
            ]
        ),
        "has 2 layers that most files lack",
    ),
    "another shape": (replace(Q_DOWN, np.ones((2, 9), np.float32)), "has 1 layers of another shape"),
    "alpha is nan": (
        replace(f"{BLOCK}.attn1.to_q.alpha", np.array(np.nan, np.float32)),
        "is not one finite number",
    ),
    "alpha of nothing": (
        replace("unet.elsewhere.alpha", np.array(1, np.float32)),
        "is the alpha of a module that has no weights",
    ),
    "a wide up": (
        replace(f"{BLOCK}.attn1.to_q.lora.up.weight", np.ones((8, 2, 3, 3), np.float32)),
        "an `up` convolution has kernel 1 x 1",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_named_with_the_reason(place, build, spoil, reason):
    spoil(make_files(place / "in")[2])
    status, said = build("in")
    assert (
        status == 2
        and "class_0/002/pytorch_lora_weights.safetensors: " in said
        and reason in said
        and "--on-bad skip" in said
    )
    assert not (place / "out").exists() and "changed while" not in said
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "6 found = 5 written + 1 bad" in said and reason in said
    assert column("lora_file") == [
        f"class_{i % 2}/{i:03}/pytorch_lora_weights.safetensors" for i in (0, 4, 1, 3, 5)
    ]
    (bad,) = json.loads((place / "out/build.json").read_text())["bad"]
    assert bad[0].startswith("class_0/002") and reason in bad[1]
    expected = [random_matrices(i, 2, shapes_of(), 0)[Q_DOWN] for i in (0, 4, 1, 3, 5)]
    assert np.array_equal(weights_of()[Q_DOWN], np.stack(expected))  # the rows after it did not slip
    assert build("in")[0] == 2  # finished or not: a set that is short stays an error


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "x.pt", "x.ckpt", "adapter.pth", "x.pkl"])
def test_pickles_are_refused_unread(place, build, name):
    make_files(place / "in")
    (place / "in/class_1" / name).write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    status, said = build("in")
    assert status == 2 and f"class_1/{name}: a pickle, which can run code" in said
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "7 found = 6 written + 1 bad" in said and not (place / "owned").exists()
    assert build("in", "--pattern", "*.safetensors", output="other")[0] == 0


def test_what_a_trainer_leaves_is_passed_over_and_said(place, build):
    make_files(place / "in")
    for name in ("optimizer.bin", "training_args.bin", "random_states_0.pkl", ".hidden.safetensors"):
        (place / "in/class_0" / name).write_bytes(b"x")
    status, said = build("in")
    assert (
        status == 0
        and "6 found = 6 written + 0 bad" in said
        and "4 hidden or trainer-state files passed over" in said
    )


def test_a_mix_of_ranks_is_refused_with_the_counts(place, build):
    make_files(place / "in", n=6, rank=2)
    make_files(place / "in", n=3, rank=4, first=6)
    status, said = build("in")
    assert status == 2 and "6 of rank 2, 3 of rank 4" in said and "--rank" in said
    status, said = build("in", "--rank", "4")
    assert status == 0 and "9 found = 3 written + 0 bad + 6 of another rank" in said
    assert column("rank") == [4] * 3 and weights_of()[Q_DOWN].shape == (3, 4, 8)
    status, said = build("in", "--rank", "3", output="other")
    assert status == 2 and "none is of --rank 3" in said


def test_tensors_can_be_left_out_by_name(place, build):
    make_files(place / "in", style="kohya")
    assert build("in", "--leave-out", "^lora_te_|_ff_")[0] == 0
    assert len(weights_of()) == 4


def test_bad_folders_and_outputs(place, build):
    make_files(place / "in")
    (place / "empty").mkdir()
    (place / "mine").mkdir()
    (place / "mine/precious.txt").write_text("x")
    for flags, output, says in (
        (["nowhere"], "out", "no such folder: 'nowhere'"),
        (["empty"], "out", "no .safetensors file in empty"),
        (["in", "in/class_0"], "out", "overlap"),
        (["in"], "mine", "was not built by this program"),
    ):
        status, said = build(*flags, output=output)
        assert status == 2 and says in said
    assert build("in", "--overwrite", output="mine")[0] == 2 and (place / "mine/precious.txt").exists()
    assert sorted(os.listdir(place)) == ["empty", "in", "mine"]  # nothing is left behind


def test_links_are_followed_and_a_circle_ends(place, build):
    make_files(place / "real")
    (place / "in").mkdir()
    for name in ("class_0", "class_1"):
        (place / "in" / name).symlink_to(place / "real" / name)
    (place / "real/class_0/circle").symlink_to(place / "in")
    status, said = build("in")
    assert status == 0 and "6 found = 6 written" in said


# --- an output that exists, kill and resume


def test_the_same_command_again_builds_nothing_and_another_is_refused(place, build):
    make_files(place / "in")
    assert build("in")[0] == 0
    before = os.stat(place / "out/data-00000-of-00001.arrow")
    status, said = build("in")
    assert (
        status == 0
        and "already built" in said
        and os.stat(place / "out/data-00000-of-00001.arrow").st_mtime_ns == before.st_mtime_ns
    )
    make_files(place / "in", n=1, first=6)
    status, said = build("in")
    assert status == 2 and "--overwrite" in said and len(column("rank")) == 6
    assert build("in", "--overwrite")[0] == 0 and len(column("rank")) == 7


# The program, killed when it reads its twentieth file.
KILLED = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
import build_dataset
from ablation.making.shards import ShardWriter

real, names = ShardWriter.read_row, []

def read_row(*arguments):
    names.append(1)
    if len(names) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

ShardWriter.read_row = read_row
build_dataset.main(sys.argv[1:])
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.json"}


def test_a_killed_build_keeps_its_finished_shards(place, build):
    make_files(place / "in", n=300)
    build("in", "--shard-rows", "3", output="fresh")
    flags = ["in", "--shard-rows", "3", "--output", "out"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *flags], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = place / ".out.building"
    assert not (place / "out").exists()
    # What it was writing, had it been killed in the middle of a shard's file.
    (work / "set/.data-00050-of-00100.arrow.1.tmp").write_bytes(b"half")
    done = {path.stem for path in work.glob("shard-*.json")}
    assert done == {f"shard-{number:05}" for number in range(6)}
    kept = {
        path.name: path.stat().st_ino
        for path in (work / "set").glob("data-*")
        if f"shard-{path.name[5:10]}" in done
    }
    damaged = work / "set/data-00001-of-00100.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"oops")  # a shard that is not what it was is made again
    status, said = build("in", "--shard-rows", "3")
    assert (
        status == 0
        and said.count("is finished") == len(done) - 1
        and "data-00001-of-00100.arrow is finished" not in said
    )
    assert files_of(place / "out") == files_of(place / "fresh")
    changed = [name for name, inode in kept.items() if (place / "out" / name).stat().st_ino != inode]
    assert changed == ["data-00001-of-00100.arrow"] and not work.exists()


def stop_at_nan(place, build):
    """A build that stopped at a NaN in its last shard, the first one being finished."""
    paths = make_files(place / "in")
    set_value(Q_DOWN, np.nan)(paths[5])
    assert build("in", "--shard-rows", "3")[0] == 2
    assert (place / ".out.building/shard-00000.json").exists() and not (
        place / ".out.building/shard-00001.json"
    ).exists()


def test_a_build_that_stopped_at_a_bad_file_goes_on_with_skip(place, build):
    stop_at_nan(place, build)
    status, said = build("in", "--shard-rows", "3", "--on-bad", "skip")
    assert status == 0 and "data-00000-of-00002.arrow is finished" in said and len(column("rank")) == 5


@pytest.mark.parametrize("change", ["a file", "an option", "the labels"])
def test_shards_of_other_inputs_are_dropped(place, build, change):
    stop_at_nan(place, build)
    flags = []
    if change == "a file":
        make_files(place / "in", n=1, first=5)
    elif change == "an option":
        flags = ["--alpha", "ignore", "--on-bad", "skip"]
    else:
        write_csv(place / "labels.csv", csv_rows())
        flags = ["--labels", "labels.csv", "--on-bad", "skip"]
    status, said = build("in", "--shard-rows", "3", *flags)
    assert status == 0 and "is dropped" in said and "is finished" not in said


def test_another_label_in_the_table_is_another_input(place, build):
    make_files(place / "in")
    write_csv(place / "labels.csv", csv_rows())
    assert build("in", "--labels", "labels.csv")[0] == 0
    write_csv(place / "labels.csv", [(name, label + 1, seed, note) for name, label, seed, note in csv_rows()])
    status, said = build("in", "--labels", "labels.csv")
    assert status == 2 and "--overwrite" in said


def test_bad_files_in_a_finished_shard_are_still_bad(place, build, monkeypatch):
    """Skipped by a build that was interrupted, they stop the next one, which does not skip."""
    set_value(Q_DOWN, np.nan)(make_files(place / "in")[0])
    with monkeypatch.context() as interrupted:
        interrupted.setattr(builder, "finish_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build("in", "--shard-rows", "3", "--on-bad", "skip")
    status, said = build("in", "--shard-rows", "3")
    assert (
        status == 2
        and "is finished" in said
        and "the weight at (1, 2) is nan" in said
        and not (place / "out").exists()
    )


def test_two_builders_of_one_output(place, build):
    from checkpointing import holding

    make_files(place / "in")
    with holding(place / ".out.building"):
        status, said = build("in")
    assert status == 3 and "another process builds out" in said


def test_progress_has_rate_and_time_left(place, build, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    make_files(place / "in")
    said = build("in")[1]
    assert re.search(r"Progress: 3/6 files \| Rate: [\d.]+ files/s \| ETA: \d+s", said)


def test_memory_does_not_grow_with_the_number_of_files(place):
    """Ten times the files, 90 MB more weights: the peak may differ by a little, not by the weights."""
    modules = {f"{BLOCK}.attn1.to_q": (320, 320), f"{BLOCK}.attn2.to_v": (320, 768)}
    first = write_adapter(place / "a/x/0", "diffusers", random_matrices(0, 2, shapes_of(60, modules), 0), 60)
    for i in range(1, 300):
        (place / f"a/{'xy'[i % 2]}/{i}").mkdir(parents=True)
        os.link(first, place / f"a/{'xy'[i % 2]}/{i}/{first.name}")
    for i in range(30):
        shutil.copytree(place / f"a/{'xy'[i % 2]}/{i}", place / f"b/{'xy'[i % 2]}/{i}", copy_function=os.link)
    peaks = {}
    # The kernel's peak of this very program: getrusage counts that of the process which started it.
    code = (
        "import re, sys, build_dataset; from ablation.making import shards; shards.BATCH_BYTES = 4_000_000; "
        "status = build_dataset.main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    for name in ("a", "b"):
        found = subprocess.run(
            [sys.executable, "-c", code, name, "--output", f"out_{name}"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[name] = int(found.stdout.split()[-1]) / 1024
    size = sum(path.stat().st_size for path in (place / "out_a").glob("*.arrow")) / 1e6
    assert size > 100 and peaks["a"] - peaks["b"] < 25, (peaks, size)


# --- the experiment runs on it


@pytest.mark.parametrize("style", STYLES)
def test_the_experiment_runs_on_what_was_built(place, build, capsys, style):
    make_files(place / "in", n=40, style=style)
    status, said = build("in")
    assert status == 0
    dataset = re.search(r"--dataset (\S+)", said)[1]
    data = load(dataset)
    assert data.summary()["rows_per_class"] == {"class_0": 20, "class_1": 20} and all(
        data.layers.layouts[layer].in_arrow for layer in data.layers.names
    )
    assert experiment.main(["--dataset", dataset, *FAST]) == 0
    results = json.loads((place / "visual-ablation-results/visual_ablation_out/results.json").read_text())
    assert len(results["all_layers_results"]) == len(results["visual_only_results"]) == 9
    # the files of PEFT hold no text encoder, whose layers are on the text side
    assert (results["num_visual_layers"], results["num_text_layers"]) == (2, 2 if style == "peft" else 4)


def test_one_column_in_arrow_is_what_was_put_in():
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert (
        arrow_matrices(weights).to_pylist()
        == arrow_matrices(weights, "fixed").to_pylist()
        == weights.tolist()
    )


def test_an_unreadable_alpha_is_a_bad_file(place):
    (path,) = make_files(place / "in", n=1, style="peft")
    for content in ("{", "{}", '{"lora_alpha": null}', '{"lora_alpha": "x"}', '{"lora_alpha": NaN}', "[]"):
        (path.parent / "adapter_config.json").write_text(content)
        with pytest.raises(BadFile, match="its alpha cannot be read"):
            read_adapter(path)
    assert read_adapter(path, with_scales=False).scales is None
