"""Kinds of adapter against the libraries that apply them: PEFT, LyCORIS and diffusers; names, splits, ranks.

The oracle of a kind is the change that the library makes to a layer's output or weight.
"""

import json
import logging
import os
import re
from pathlib import Path

import inspect_dataset
import numpy as np
import pytest
import torch
from builders import load
from safetensors.torch import load_file, save_file
from torch import nn

import visual_ablation_experiment as experiment
from ablation.adapter_kinds import REFUSED_KINDS, BadFile, best_of_rank, refused_kind
from ablation.adapter_layout import Reading
from ablation.adapter_names import dotted, parse_key
from ablation.adapters import read_adapter, survey_file
from ablation.fused_modules import diffusers_parts

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path


def product(adapter, module):
    """The change scale * up @ down in float64."""
    up, down = (
        adapter.matrices[f"{module}.lora.{side}.weight"].astype(np.float64) for side in ("up", "down")
    )
    return adapter.scales[module] * up @ down


def agree(found, expected):
    """Equal to 1e-6 of the largest entry: float32's own precision."""
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


# --- LyCORIS: what its layers add to the output of the toy's


class Toy(nn.Module):
    """A linear layer and a convolution under names of a U-Net."""

    def __init__(self):
        super().__init__()
        attention = nn.ModuleDict({"proj_in": nn.Linear(24, 32)})
        resnet = nn.ModuleDict({"conv1": nn.Conv2d(8, 16, 3, padding=1)})
        block = nn.ModuleDict({"attentions": nn.ModuleList([attention]), "resnets": nn.ModuleList([resnet])})
        self.down_blocks = nn.ModuleList([block])


TOY_MODULES = {
    "unet.down_blocks.0.attentions.0.proj_in": "down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.resnets.0.conv1": "down_blocks.0.resnets.0.conv1",
}
LYCORIS = {  # settings, kinds, and which tensors must be among those saved
    "lora": ({"algo": "lora"}, "LoRA", "lora_up"),
    "locon": ({"algo": "locon", "use_tucker": True}, "LoCon + LoRA", "lora_mid"),
    "loha": ({"algo": "loha"}, "LoHa", "hada_w2_b"),
    "loha tucker": ({"algo": "loha", "use_tucker": True}, "LoHa", "hada_t1"),
    "lokr": ({"algo": "lokr", "factor": 2}, "LoKr", "lokr_w2_a"),
    "lokr two products": (
        {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
        "LoKr",
        "lokr_w1_b",
    ),
    "lokr tucker": ({"algo": "lokr", "factor": 2, "use_tucker": True}, "LoKr", "lokr_t2"),
    "lokr whole": ({"algo": "lokr", "full_matrix": True}, "LoKr", "lokr_w2"),
}


@pytest.fixture(params=LYCORIS.values(), ids=LYCORIS)
def lycoris_file(request, place):
    """(file, what each module adds to the output of an input, kind) of a network that LyCORIS made."""
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    settings, kind, tensor = request.param
    torch.manual_seed(0)
    toy = Toy().double()
    inputs = {"proj_in": torch.randn(40, 24).double(), "conv1": torch.randn(2, 8, 7, 7).double()}
    before = {path: toy.get_submodule(path)(inputs[path.split(".")[-1]]) for path in TOY_MODULES.values()}
    dims = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 3}
    network = create_lycoris(toy, 1.0, **(dims | settings)).double()
    network.apply_to()
    with torch.no_grad():
        for lora in network.loras:
            for parameter in lora.parameters():
                parameter.copy_(torch.randn(parameter.shape))
                parameter.copy_(parameter.float())  # what the file holds
    network.eval()
    state = {key: value.float().contiguous() for key, value in network.state_dict().items()}
    assert any(tensor in key for key in state)
    save_file(state, "x.safetensors")
    with torch.no_grad():
        changes = {
            name: toy.get_submodule(path)(inputs[path.split(".")[-1]]) - before[path]
            for name, path in TOY_MODULES.items()
        }
    return place / "x.safetensors", changes, inputs, kind


def test_what_lycoris_saves_is_what_its_layers_add(lycoris_file):
    path, changes, inputs, kind = lycoris_file
    adapter = read_adapter(path)
    assert adapter.layout.kind == kind and adapter.layout.modules.keys() == changes.keys()
    for module, change in changes.items():
        weight = torch.from_numpy(product(adapter, module))
        x = inputs[module.split(".")[-1]]
        if x.ndim == 2:
            found = x @ weight.T
        else:
            found = nn.functional.conv2d(x, weight.reshape(16, 8, 3, 3), padding=1)
        agree(found.numpy(), change.detach().numpy())


# --- PEFT: the change of weight that it computes itself


class Small(nn.Module):
    """A model whose modules PEFT adapts: names of a U-Net, a convolution, an embedding, a head."""

    def __init__(self):
        super().__init__()
        attention = nn.ModuleDict({"to_q": nn.Linear(12, 16), "to_k": nn.Linear(12, 16)})
        block = nn.ModuleDict({"attn1": attention, "conv1": nn.Conv2d(4, 8, 3)})
        self.down_blocks = nn.ModuleList([block])
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return x


TARGETS = ["to_q", "to_k", "conv1"]


def peft_files(config, randomised=True):
    """Save a model that this configuration adapts; returns (file, the adapted model)."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Small(), config)
    if randomised:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if re.search(r"lora_|hada_|lokr_", name):
                    parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained("saved")
    return Path("saved/adapter_model.safetensors"), model


def peft_changes(model):
    """Module -> the change of its weight, (out, rest)."""
    changes = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            changes[f"unet.{name.removeprefix('base_model.model.')}"] = delta.reshape(len(delta), -1).numpy()
    return changes


def peft_configs():
    """Name -> (configuration, kind)."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    patterns = {"rank_pattern": {"to_q": 2, "^down.*conv1": 3}, "alpha_pattern": {"o_q": 9, "attn1.to_k": 5}}
    return {
        "lora": (LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS), "LoRA"),
        "patterns": (LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **patterns), "LoRA"),
        "rslora": (LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS), "LoRA"),
        "loha": (LoHaConfig(r=3, alpha=5, target_modules=TARGETS), "LoHa"),
        "loha of a convolution": (
            LoHaConfig(r=3, alpha=5, target_modules=TARGETS, use_effective_conv2d=True, **patterns),
            "LoHa",
        ),
        "lokr": (LoKrConfig(r=2, alpha=5, target_modules=TARGETS, decompose_factor=2), "LoKr"),
        "lokr of a convolution": (
            LoKrConfig(
                r=2,
                alpha=5,
                target_modules=TARGETS,
                use_effective_conv2d=True,
                decompose_both=True,
                **patterns,
            ),
            "LoKr",
        ),
        "lokr whole": (LoKrConfig(r=200, alpha=50, target_modules=TARGETS), "LoKr"),
    }


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")  # o_q ends no name after a dot
@pytest.mark.parametrize("name", ["lora", "patterns", "rslora", "loha", "loha of a convolution", "lokr",
                                  "lokr of a convolution", "lokr whole"])  # fmt: skip
def test_what_peft_saves_is_the_change_that_it_makes(place, name):
    config, kind = peft_configs()[name]
    path, model = peft_files(config)
    adapter, changes = read_adapter(path), peft_changes(model)
    assert (
        adapter.layout.kind == kind and adapter.layout.modules.keys() == changes.keys() and len(changes) == 3
    )
    for module, change in changes.items():
        agree(product(adapter, module), change)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
@pytest.mark.parametrize("pruned", [False, True])
def test_adalora_is_the_change_that_peft_makes(place, pruned):
    from peft import AdaLoraConfig, PeftModel

    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=5, total_step=10, target_modules=["to_q", "to_k"], tinit=1, tfinal=1
    )
    path, model = peft_files(config)
    if pruned:
        base = "down_blocks.0.attn1"
        keep = {f"{base}.to_q.lora_E": [True, False] * 3, f"{base}.to_k.lora_E": [True] * 2 + [False] * 4}
        model.peft_config["default"].rank_pattern = keep
        model.save_pretrained("saved")
        model = PeftModel.from_pretrained(Small(), "saved")
    adapter, changes = read_adapter(path), peft_changes(model)
    assert adapter.layout.kind == "AdaLoRA" and adapter.layout.modules.keys() == changes.keys()
    assert adapter.layout.ranks == ((2, 3) if pruned else (6,))
    for module, change in changes.items():
        agree(product(adapter, module), change)
    # The same with the number of ranks and an alpha in the file, as other tools leave them.
    tensors = load_file(path)
    for module in changes:
        own = f"base_model.model.{module.removeprefix('unet.')}"
        tensors |= {f"{own}.ranknum": torch.tensor([6.0]), f"{own}.alpha": torch.tensor(5)}
    save_file(tensors, "with_ranknum.safetensors")
    again = read_adapter(Path("with_ranknum.safetensors"))
    assert again.scales == pytest.approx(adapter.scales, rel=1e-12)


def test_dora_of_peft_is_its_lora_with_the_magnitudes_beside(place):
    from peft import LoraConfig

    path, model = peft_files(LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS))
    adapter = read_adapter(path)
    assert adapter.layout.kind == "DoRA of LoRA"
    for module, change in peft_changes(model).items():
        agree(product(adapter, module), change)
        layer = model.get_submodule(f"base_model.model.{module.removeprefix('unet.')}")
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().flatten().numpy()
        assert np.array_equal(adapter.magnitudes[f"{module}.dora_magnitude"], magnitude)


def test_an_adapter_among_several_of_peft(place):
    """An adapter's name in the middle of a tensor's, as `default_0` of diffusers; two are refused."""
    from peft import LoraConfig

    path, model = peft_files(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    tensors = load_file(path)
    named = {key.replace(".weight", ".default_0.weight"): value for key, value in tensors.items()}
    save_file(named, path)
    adapter = read_adapter(path)
    for module, change in peft_changes(model).items():
        agree(product(adapter, module), change)
    save_file(
        named | {key.replace("default_0", "other"): value.clone() for key, value in named.items()}, path
    )
    with pytest.raises(BadFile, match="two adapters in one file"):
        survey_file(path)
    assert survey_file(path, Reading(r"\.other\.")).ranks == (4,)


def test_modules_to_save_are_named_with_the_pattern_that_leaves_them_out(place):
    from peft import LoraConfig

    path, model = peft_files(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, modules_to_save=["head"]))
    with pytest.raises(BadFile) as error:
        read_adapter(path)
    pattern = re.search(r"--leave-out '([^']+)'", str(error.value))
    assert pattern, error.value
    adapter = read_adapter(path, Reading(pattern[1]))
    for module, change in peft_changes(model).items():
        agree(product(adapter, module), change)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_lora_of_a_changed_base_model_is_refused(place, start):
    from peft import LoraConfig

    path, _ = peft_files(LoraConfig(r=4, init_lora_weights=start, target_modules=TARGETS[:2]), False)
    with pytest.raises(BadFile, match=f"init_lora_weights '{start}' had changed"):
        read_adapter(path)
    with pytest.raises(BadFile):  # also where no scale is wanted
        read_adapter(path, with_scales=False)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"peft_type": "POLY"}, "says POLY"),
        ({"peft_type": "XLORA"}, "says XLORA"),
        ({"use_qalora": True}, "says use_qalora"),
        ({"kasa_config": {"beta": 1}}, "says kasa_config"),
        ({"target_parameters": ["experts.up"]}, "says target_parameters"),
        ({"r": 3}, "has rank 4, but its configuration says 3"),
        ({"rank_pattern": {"to_q": 8}}, "has rank 4, but its configuration says 8"),
        ({"alpha_pattern": {"(a|a)+": 1}}, "could be searched for without end"),
        ({"alpha_pattern": {".*a.*b.*c.*d": 1}}, "could be searched for without end"),
    ],
)
def test_a_configuration_of_another_product_is_refused(place, setting, said):
    """Their tensors are called as those of a LoRA, or alike."""
    from peft import LoraConfig

    path, _ = peft_files(LoraConfig(r=4, target_modules=TARGETS))
    config = json.loads((place / "saved/adapter_config.json").read_text())
    (place / "saved/adapter_config.json").write_text(json.dumps(config | setting))
    with pytest.raises(BadFile, match=said):
        read_adapter(path)


def test_a_pattern_of_an_optional_group_is_harmless(place):
    from peft import LoraConfig

    path, model = peft_files(
        LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, alpha_pattern={r"(.*\.)?to_q": 3})
    )
    for module, change in peft_changes(model).items():
        agree(product(read_adapter(path), module), change)


def test_a_language_model_under_the_name_of_a_component(place):
    """GPT-2's modules are called transformer.h.0...., which is no component of a pipeline there."""
    from peft import LoraConfig, get_peft_model

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            block = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": nn.Linear(6, 9)})})
            self.transformer = nn.ModuleDict({"h": nn.ModuleList([block])})

    config = LoraConfig(r=2, lora_alpha=16, target_modules=["c_attn"], alpha_pattern={"h.0.attn.c_attn": 4})
    model = get_peft_model(Language(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained("saved")
    path = place / "saved/adapter_model.safetensors"
    (module,) = read_adapter(path).layout.modules
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    agree(product(read_adapter(path), module), layer.get_delta_weight("default").detach().numpy())
    # The same without PEFT's prefix, as transformers saves it: its configuration counts.
    bare = {key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}
    save_file(bare, path)
    agree(product(read_adapter(path), module), layer.get_delta_weight("default").detach().numpy())
    (place / "saved/adapter_config.json").unlink()
    assert read_adapter(path).scales == {module: 1.0}  # as diffusers takes it


def test_peft_prefixes_after_a_component_and_among_others(place):
    prefix = "unet.base_model.model.mid_block.attn1.to_q"
    pair = {
        f"{prefix}.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (2, 6)), ("B", (8, 2)))
    }
    save_file(pair, place / "adapter_model.safetensors")
    with pytest.raises(BadFile, match=r"no adapter_config\.json beside it"):
        read_adapter(place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    assert read_adapter(place / "adapter_model.safetensors").scales == {"unet.mid_block.attn1.to_q": 4.0}
    save_file(pair | lora_tensors(), place / "adapter_model.safetensors")
    with pytest.raises(BadFile, match="holds names of PEFT and others"):
        survey_file(place / "adapter_model.safetensors")


def test_adalora_knows_no_alpha_pattern(place):
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=4, lora_alpha=5, total_step=10, target_modules=["to_q"], alpha_pattern={"to_q": 40}, tinit=1,
        tfinal=1,
    )  # fmt: skip
    path, model = peft_files(config)
    for module, change in peft_changes(model).items():
        agree(product(read_adapter(path), module), change)


def test_a_bias_of_a_lora_is_left_out_by_the_pattern_that_is_given(place):
    from peft import LoraConfig

    path, model = peft_files(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_bias=True))
    with pytest.raises(BadFile, match="changes of biases") as error:
        read_adapter(path)
    pattern = re.search(r"--leave-out '([^']+)'", str(error.value))[1]
    for module, change in peft_changes(model).items():
        agree(product(read_adapter(path, Reading(pattern)), module), change)


def test_a_lokr_of_a_conv1d_is_peft_s_alone(place):
    tensors = {
        "base_model.model.x.lokr_w1": torch.ones(2, 2),
        "base_model.model.x.lokr_w2": torch.ones(2, 3, 5),
    }
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text('{"peft_type": "LOKR", "alpha": 8, "r": 2}')
    with pytest.raises(BadFile, match="a LoKr of a Conv1d"):
        read_adapter(place / "adapter_model.safetensors")


# --- diffusers: files of the first codes of Flux, and XLabs'


def random_pair(rng, outputs, rank, inputs):
    return {
        "down": torch.from_numpy(rng.standard_normal((rank, inputs)).astype(np.float32)),
        "up": torch.from_numpy(rng.standard_normal((outputs, rank)).astype(np.float32)),
    }


FLUX_MODULES = {  # of the first code, in blocks that diffusers' conversion looks for; sizes of Flux
    "double_blocks_0_img_attn_qkv": (9216, 3072),
    "double_blocks_0_img_attn_proj": (3072, 3072),
    "double_blocks_0_img_mlp_0": (12288, 3072),
    "double_blocks_0_img_mlp_2": (3072, 12288),
    "double_blocks_0_img_mod_lin": (18432, 3072),
    "double_blocks_0_txt_attn_qkv": (9216, 3072),
    "double_blocks_0_txt_attn_proj": (3072, 3072),
    "double_blocks_0_txt_mlp_0": (12288, 3072),
    "double_blocks_0_txt_mlp_2": (3072, 12288),
    "double_blocks_0_txt_mod_lin": (18432, 3072),
    "single_blocks_1_linear1": (21504, 3072),
    "single_blocks_1_linear2": (3072, 15360),
    "single_blocks_1_modulation_lin": (9216, 3072),
    "img_in": (3072, 64),
    "txt_in": (3072, 4096),
    "time_in_in_layer": (3072, 256),
    "time_in_out_layer": (3072, 3072),
    "vector_in_in_layer": (3072, 768),
    "vector_in_out_layer": (3072, 3072),
    "guidance_in_in_layer": (3072, 256),
    "guidance_in_out_layer": (3072, 3072),
    "final_layer_linear": (64, 3072),
    "final_layer_adaLN_modulation_1": (6144, 3072),
}


def flux_file(path, is_sparse):
    """A file of kohya's scripts for Flux, rank 3 and alpha 6; `is_sparse`: q, k and v were trained apart."""
    rng = np.random.default_rng(0)
    state = {}
    for module, (outputs, inputs) in FLUX_MODULES.items():
        pair = random_pair(rng, outputs, 3, inputs)
        if is_sparse and module.endswith("qkv"):
            for i in range(3):
                for j in range(3):
                    if i != j:
                        pair["up"][i * outputs // 3 : (i + 1) * outputs // 3, j] = 0
        for side, matrix in pair.items():
            state[f"lora_unet_{module}.lora_{side}.weight"] = matrix
        # diffusers leaves the alpha of the final layer alone
        state[f"lora_unet_{module}.alpha"] = torch.tensor(3.0 if "final" in module else 6.0)
    save_file(state, path)


def converted_products(state):
    """Module -> up @ down of diffusers' keys, float64."""
    products = {}
    for key, down in state.items():
        if key.endswith("lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            up = state[f"{name}.lora_B.weight"]
            name = name if name.startswith("transformer.") else f"transformer.{name}"
            products[name] = (up[:, :].double() @ down.double()[:, :]).numpy()
    return products


@pytest.mark.parametrize("is_sparse", [False, True], ids=["whole", "block diagonal"])
def test_split_flux_files_are_what_diffusers_makes_of_them(place, is_sparse, monkeypatch):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    flux_file(place / "flux.safetensors", is_sparse)
    adapter = read_adapter(place / "flux.safetensors", Reading(split_qkv=True))
    converted = _convert_kohya_flux_lora_to_diffusers(load_file(place / "flux.safetensors"))
    names = {key.removesuffix(".lora_A.weight") for key in converted if "lora_A" in key}
    assert adapter.layout.modules.keys() == {f"transformer.{n.removeprefix('transformer.')}" for n in names}
    for module in names:
        ours = f"transformer.{module.removeprefix('transformer.')}"
        up, down = converted[f"{module}.lora_B.weight"], converted[f"{module}.lora_A.weight"]
        assert adapter.matrices[f"{ours}.lora.down.weight"].shape == down.shape
        x = np.random.default_rng(1).standard_normal(down.shape[1])
        found = adapter.scales[ours] * (
            adapter.matrices[f"{ours}.lora.up.weight"].astype(np.float64)
            @ (adapter.matrices[f"{ours}.lora.down.weight"].astype(np.float64) @ x)
        )
        agree(found, up.double().numpy() @ (down.double().numpy() @ x))
    assert adapter.layout.ranks == ((1, 3) if is_sparse else (3,))
    fused = read_adapter(place / "flux.safetensors").layout
    assert (
        len(fused.modules) == len(FLUX_MODULES)
        and "transformer.double_blocks.0.img_attn.qkv" in fused.modules
    )


@pytest.mark.parametrize("is_sparse", [False, True], ids=["whole", "block diagonal"])
def test_flux_files_of_both_conventions_build_together(place, build, is_sparse):
    """The same adapter as kohya's scripts save it, and as diffusers saves what it made of that."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    for label in ("a", "b"):
        (place / "in" / label).mkdir(parents=True)
    flux_file(place / "in/a/kohya.safetensors", is_sparse)
    converted = _convert_kohya_flux_lora_to_diffusers(load_file(place / "in/a/kohya.safetensors"))
    named = {f"transformer.{key.removeprefix('transformer.')}": value for key, value in converted.items()}
    save_file({key: value.clone() for key, value in named.items()}, place / "in/b/diffusers.safetensors")
    status, said = build("in", "--split-qkv")
    assert status == 0 and "1 diffusers, 1 kohya" in said, said
    modules = json.loads((place / "out/build.json").read_text())["modules"]
    assert len(modules) == 30
    data = load("./out")
    for module in modules:
        down, up = (
            data.weights.read_layer(f"{module}.lora.{side}.weight", 0, 2).double().numpy()
            for side in ("down", "up")
        )
        x = np.random.default_rng(1).standard_normal(down.shape[2])
        agree(*(up[row] @ (down[row] @ x) for row in (0, 1)))


def test_files_of_xlabs_are_what_diffusers_makes_of_them(place):
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    rng = np.random.default_rng(0)
    modules = {f"double_blocks.0.processor.{part}_lora{i}" for part in ("qkv", "proj") for i in (1, 2)}
    modules |= {"single_blocks.1.processor.qkv_lora", "single_blocks.1.processor.proj_lora"}
    state = {}
    for module in sorted(modules):
        outputs, inputs = (24, 8) if "qkv" in module else (8, 40) if "single" in module else (8, 8)
        for side, matrix in random_pair(rng, outputs, 2, inputs).items():
            state[f"{module}.{side}.weight"] = matrix
    save_file(state, place / "xlabs.safetensors")
    adapter = read_adapter(place / "xlabs.safetensors", Reading(split_qkv=True))
    expected = converted_products(_convert_xlabs_flux_lora_to_diffusers(dict(state)))
    assert adapter.layout.style == "xlabs" and adapter.layout.modules.keys() == expected.keys()
    for module, change in expected.items():
        agree(product(adapter, module), change)
    fused = read_adapter(place / "xlabs.safetensors").layout.modules
    assert sorted(fused) == [
        "transformer.double_blocks.0.img_attn.proj",
        "transformer.double_blocks.0.img_attn.qkv",
        "transformer.double_blocks.0.txt_attn.proj",
        "transformer.double_blocks.0.txt_attn.qkv",
        "transformer.single_blocks.1.linear2",
        "transformer.single_blocks.1.qkv",
    ]


def test_of_a_file_of_xlabs_each_stream_is_looked_at_by_itself(place):
    """Block diagonal `up` in the image's module alone; and a module of zeros is not split by blocks."""
    rng = np.random.default_rng(0)
    state = {}
    for stream in "12":
        pair = random_pair(rng, 24, 3, 8)
        if stream == "1":
            pair["up"] *= torch.block_diag(*[torch.ones(8, 1)] * 3)
        state |= {f"double_blocks.0.processor.qkv_lora{stream}.{s}.weight": w for s, w in pair.items()}
        state |= {f"double_blocks.1.processor.qkv_lora{stream}.{s}.weight": 0 * w for s, w in pair.items()}
    save_file({key: value.clone() for key, value in state.items()}, place / "xlabs.safetensors")
    modules = read_adapter(place / "xlabs.safetensors", Reading(split_qkv=True)).layout.modules
    ranks = {name.removeprefix("transformer.transformer_blocks."): m.rank for name, m in modules.items()}
    assert ranks == {
        f"{block}.attn.{part}": 1 if (block, part[:2]) == (0, "to") else 3
        for block in (0, 1)
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    }


def test_the_magnitudes_of_a_fused_module_are_split_with_its_rows(place):
    rng = np.random.default_rng(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_{side}.weight": w for side, w in random_pair(rng, 12, 2, 4).items()}
    save_file(state | {f"{name}.dora_scale": torch.arange(12.0).reshape(12, 1)}, place / "x.safetensors")
    found = read_adapter(place / "x.safetensors", Reading(split_qkv=True)).magnitudes
    assert {column.split(".")[-2]: values.tolist() for column, values in found.items()} == {
        "to_q": [0, 1, 2, 3],
        "to_k": [4, 5, 6, 7],
        "to_v": [8, 9, 10, 11],
    }


@pytest.mark.parametrize(
    "modules",
    [
        ["layers.0.attention.qkv", "final_layer.adaLN_modulation.1"],  # Lumina 2
        ["transformer_blocks.0.attn.to_q", "img_in", "txt_in"],  # Qwen-Image
        ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.linear", "img_in.proj"],  # Hunyuan-Video
        ["final_layer.adaLN_modulation.1"],
    ],
)
def test_other_models_keep_their_names_with_split_qkv(place, build, modules):
    tensors = {
        f"diffusion_model.{module}.lora_{side}.weight": torch.ones(shape)
        for module in modules
        for side, shape in (("A", (2, 8)), ("B", (24, 2)))
    }
    save_file(tensors, place / "x.safetensors")
    layout = read_adapter(place / "x.safetensors", Reading(split_qkv=True)).layout
    assert layout == read_adapter(place / "x.safetensors").layout
    for label in ("a", "b"):
        (place / "in" / label).mkdir(parents=True)
        save_file(tensors, place / f"in/{label}/x.safetensors")
    assert "nothing was split or renamed" in build("in", "--split-qkv")[1]


def test_split_sd3_names_are_those_of_diffusers_model():
    """Every module of diffusers' small SD 3.5 is made from a name of the first code, and the last block's
    context norm has its halves swapped.
    """
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=6,
            caption_projection_dim=8, pooled_projection_dim=5, dual_attention_layers=(0,), sample_size=4,
        )  # fmt: skip
    sizes = {n: m.weight.shape for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    sizes = {name: (shape[0], shape[1:].numel()) for name, shape in sizes.items() if len(shape) > 1}
    sources = {"x_embedder.proj": (8, 64), "context_embedder": (8, 6), "final_layer.linear": (64, 8),
               "final_layer.adaLN_modulation.1": (16, 8), "t_embedder.mlp.0": (8, 256),
               "t_embedder.mlp.2": (8, 8), "y_embedder.mlp.0": (8, 5),
               "y_embedder.mlp.2": (8, 8)}  # fmt: skip
    for block, adaln in ((0, 48), (1, 16)):
        for stream in ("x_block", "context_block"):
            at = f"joint_blocks.{block}.{stream}"
            is_last_context = block == 1 and stream == "context_block"
            sources |= {f"{at}.attn.qkv": (24, 8)}
            sources |= {
                f"{at}.adaLN_modulation.1": (adaln if stream == "context_block" else 72 - 24 * block, 8)
            }
            if not is_last_context:
                sources |= {f"{at}.attn.proj": (8, 8), f"{at}.mlp.fc1": (32, 8), f"{at}.mlp.fc2": (8, 32)}
    sources |= {"joint_blocks.0.x_block.attn2.qkv": (24, 8), "joint_blocks.0.x_block.attn2.proj": (8, 8)}
    found = {}
    for name, (outputs, inputs) in sources.items():
        for part in diffusers_parts("sd3", f"transformer.{name}", outputs, inputs):
            found[part.module.removeprefix("transformer.")] = (
                part.stop - part.start,
                inputs,
                part.is_swapped,
            )
    assert {name: size[:2] for name, size in found.items()} == sizes
    assert {name for name, size in found.items() if size[2]} == {
        "norm_out.linear",
        "transformer_blocks.1.norm1_context.linear",
    }


# --- names


def test_names_of_the_first_code_are_those_of_diffusers():
    """All modules of Stable Diffusion 1 and XL, named as the first code does, and as kohya flattens them."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    class Config:
        layers_per_block = 2

    ends = {"0": ["in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection"], "1": ["proj_in",
            "proj_out", "transformer_blocks_0_attn1_to_q", "transformer_blocks_1_ff_net_0_proj"]}  # fmt: skip
    resnet = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2",
              "skip_connection": "conv_shortcut"}  # fmt: skip
    names = []
    for side, first, count in (("input", 1, 9), ("output", 0, 9)):
        for i in range(first, count):
            for part, tails in ends.items():
                is_sampler = side == "input" and i % 3 == 0
                for tail in (["op"] if part == "0" else []) if is_sampler else tails:
                    names.append(f"lora_unet_{side}_blocks_{i}_{part}_{tail}.lora_down.weight")
    for i, part in ((0, "0"), (1, "1"), (2, "0")):
        for tail in ends[part]:
            names.append(f"lora_unet_middle_block_{i}_{tail}.lora_down.weight")
    for key in names:
        (mapped,) = _maybe_map_sgm_blocks_to_diffusers({key: 0}, Config())
        found = parse_key(key).module
        assert dotted(found.removeprefix("unet.").replace(".", "_")) == found.removeprefix("unet.")
        flat = mapped.removeprefix("lora_unet_").removesuffix(".lora_down.weight")
        # diffusers leaves the blocks' own names and the ends of their parts to a later step
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("output_blocks", "up_blocks"),
            ("middle_block", "mid_block"),
        ):
            flat = flat.replace(old, new)
        for old, new in {**resnet, "op": "conv"}.items():
            flat = re.sub(rf"_{old}$", f"_{new}", flat)
        assert found == f"unet.{dotted(flat)}", (key, mapped)
    assert len(names) > 80


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("input_blocks_6_0_op", "down_blocks.1.downsamplers.0.conv"),
    ],
)
def test_single_modules_of_the_first_code(name, module):
    assert parse_key(f"lora_unet_{name}.lora_up.weight").module == f"unet.{module}"


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", "transformer.blocks.3.self_attn.q"),
        ("lora_unet_blocks_3_cross_attn_k_img.lora_up.weight", "transformer.blocks.3.cross_attn.k_img"),
        ("lora_unet__blocks_3_ffn_0.lora_up.weight", "transformer.blocks.3.ffn.0"),
        (
            "diffusion_model.input_blocks.1.1.proj_in.lora_up.weight",
            "unet.down_blocks.0.attentions.0.proj_in",
        ),
        ("lycoris_transformer_blocks_2_attn_to_q.lokr_w1", "transformer.transformer_blocks.2.attn.to_q"),
        ("lycoris_mid_block_attentions_0_proj_in.hada_t1", "unet.mid_block.attentions.0.proj_in"),
        (
            "lora_transformer_single_transformer_blocks_9_proj_mlp.alpha",
            "transformer.single_transformer_blocks.9.proj_mlp",
        ),
        (
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight",
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        ),
        ("double_blocks.0.img_attn_qkv.lora_A.weight", "transformer.double_blocks.0.img_attn.qkv"),
        ("lora_unet_context_embedder.lora_up.weight", "transformer.context_embedder"),
        ("lora_unet_strange_thing.lora_up.weight", "unet.strange_thing"),
    ],
)
def test_names_of_other_tools(key, module):
    assert parse_key(key).module == module


def test_underscores_become_the_dots_of_diffusers_transformers():
    """Every module with weights of the transformers, whose flat names kohya's scripts and LyCORIS write."""
    import diffusers

    small = {"num_layers": 2}
    with torch.device("meta"):
        models = [
            diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True),
            diffusers.WanTransformer3DModel(num_layers=1, image_dim=8, added_kv_proj_dim=8),
            diffusers.LTXVideoTransformer3DModel(**small),
            diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1),
            diffusers.CogVideoXTransformer3DModel(**small),
            diffusers.QwenImageTransformer2DModel(**small),
            diffusers.PixArtTransformer2DModel(**small),
            diffusers.SanaTransformer2DModel(**small),
            diffusers.Lumina2Transformer2DModel(**small),
            diffusers.Flux2Transformer2DModel(num_layers=1, num_single_layers=1),
        ]
    weights = {n: m.weight for model in models for n, m in model.named_modules() if hasattr(m, "weight")}
    names = {name for name, weight in weights.items() if weight is not None and weight.ndim > 1}
    assert len(names) > 150
    assert {name: dotted(name.replace(".", "_")) for name in names} == {name: name for name in names}


def test_files_of_both_names_of_the_unet_build_together(place, build):
    deep = "transformer_blocks_1"
    names = {  # kohya's scripts for XL, and diffusers
        f"input_blocks_4_1_{deep}_attn1_to_q": f"down_blocks.1.attentions.0.{dotted(deep)}.attn1.to_q",
        f"output_blocks_2_1_{deep}_attn2_to_k": f"up_blocks.0.attentions.2.{dotted(deep)}.attn2.to_k",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "input_blocks_7_0_emb_layers_1": "down_blocks.2.resnets.0.time_emb_proj",
    }
    tensors = {
        (old, side): torch.randn(shape) for old in names for side, shape in (("down", (2, 6)), ("up", (8, 2)))
    }
    for label in ("a", "b"):
        (place / "in" / label).mkdir(parents=True)
    flat = {f"lora_unet_{old}.lora_{side}.weight": value for (old, side), value in tensors.items()}
    save_file(flat, place / "in/a/x.safetensors")
    dotted_names = {f"unet.{names[old]}.lora.{side}.weight": value for (old, side), value in tensors.items()}
    save_file(dotted_names, place / "in/b/x.safetensors")
    status, said = build("in")
    assert status == 0 and "2 found = 2 written" in said, said
    data = load("./out")
    for layer, expected in dotted_names.items():
        both = data.weights.read_layer(layer, 0, 2).numpy()
        assert np.array_equal(both[0], expected.numpy()) and np.array_equal(both[1], expected.numpy())


# --- refused by kind

STRAYS = {  # a tensor of each kind, and the name of the kind
    "lora_unet_mid_block_attentions_0_proj_in.oft_blocks": "OFT",
    "lora_unet_mid_block_attentions_0_proj_in.oft_diag": "OFT",
    "base_model.model.mid_block.to_q.oft_R": "OFT",
    "base_model.model.mid_block.to_q.boft_R": "OFT",
    "base_model.model.mid_block.to_q.ia3_l": "(IA)3",
    "lora_unet_mid_block_attentions_0_proj_in.on_input": "(IA)3",
    "base_model.model.mid_block.to_q.vera_lambda_b": "VeRA",
    "base_model.vera_A": "VeRA",
    "lora_unet_mid_block_attentions_0_proj_in.a1.weight": "GLoRA",
    "diffusion_model.double_blocks.0.img_attn.qkv.diff": "diff",
    "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": "biases",
    "x.to_q.lora_B.bias": "biases",
    "lora_unet_mid_block_resnets_0_norm1.w_norm": "norms",
    "lora_unet_mid_block_resnets_0_norm1.b_norm": "norms",
    "base_model.model.embed.lora_embedding_A": "embeddings",
    "base_model.model.head.modules_to_save.weight": "modules_to_save",
    "base_model.model.head.weight": "modules_to_save",
    "clip_l": "textual inversion",
    "clip_g": "textual inversion",
    "bundle_emb.word.string_to_param.*": "textual inversion",
    "bundle_emb.word.clip_l": "textual inversion",
    "base_model.model.mid_block.to_q.fourierft_spectrum": "FourierFT",
}


def lora_tensors(n=2, seed=0):
    """The tensors of a plain LoRA of two modules."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{BLOCK}.{kind}.to_q.lora.{side}.weight": torch.randn(shape, generator=generator)
        for kind in ("attn1", "attn2")
        for side, shape in (("down", (n, 6)), ("up", (8, n)))
    }


@pytest.mark.parametrize("key", STRAYS)
def test_a_kind_that_is_refused_is_named(place, build, key):
    for label, seed in (("a", 0), ("b", 1), ("c", 2)):
        (place / "in" / label).mkdir(parents=True)
        save_file(lora_tensors(seed=seed), place / f"in/{label}/x.safetensors")
    save_file({key: torch.ones(4, 4)}, place / "in/a/alone.safetensors")
    status, said = build("in")
    assert status == 2 and "a/alone.safetensors" in said and STRAYS[key] in said and "(1 of them for" in said
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "4 found = 3 written + 1 bad" in said and "(1 of them for" in said
    assert list(json.loads((place / "out/build.json").read_text())["refused_kinds"].values()) == [1]
    # Beside a LoRA the pattern that is given leaves the tensor out, and nothing else.
    (place / "in/a/alone.safetensors").unlink()
    save_file(lora_tensors(seed=5) | {key: torch.ones(4, 4)}, place / "in/a/beside.safetensors")
    status, said = build("in", output="beside")
    pattern = re.search(r"--leave-out '([^']+)'", said)
    assert status == 2 and pattern and "beside its layers" in said
    status, said = build("in", "--leave-out", pattern[1], output="beside")
    assert status == 0, said
    data = load("./beside")
    assert len(data.layers) == 4
    for layer, expected in lora_tensors(seed=5).items():  # of a/beside, the first by name
        assert np.array_equal(data.weights.read_layer(layer, 0, 1).numpy()[0], expected.numpy())


def test_every_refused_kind_has_a_tensor_in_these_tests():
    assert {refused_kind(key).name for key in STRAYS} == {kind.name for kind in REFUSED_KINDS}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_mid.weight": (2, 3, 3, 3)}, "no convolution in three parts"),
        ({"lora_E": (2, 1), "lora_mid.weight": (2, 2, 3, 3)}, "has both `mid` and `lora_E`"),
        ({"lora_E": (3, 1)}, "does not fit the rank 2"),
        ({"hada_w1_a": (8, 2)}, "has tensors of several kinds of adapter"),
        ({"lora_down.weight": None, "lora_up.weight": None, "hada_w1_a": (8, 2)}, "has no `hada_w1_b`"),
        ({"lora_down.weight": None, "lora_up.weight": None, "lokr_w1": (2, 2)}, "has no `lokr_w2_a`"),
        (
            {"lora_down.weight": None, "lora_up.weight": None, "lokr_w1": (2, 2), "lokr_w2_a": (4, 2),
             "lokr_w2_b": (3, 3)},
            "do not fit together",
        ),
        ({"scalar": ()}, "which is no `down`, `up` or alpha"),
        ({"alpha": (2,)}, "is not one finite number"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(place, change, reason):
    shapes = {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)} | change
    tensors = {
        f"lora_unet_mid_block_x.{end}": torch.ones(shape)
        for end, shape in shapes.items()
        if shape is not None
    }
    save_file(tensors, place / "x.safetensors")
    with pytest.raises(BadFile, match=re.escape(reason)):
        read_adapter(place / "x.safetensors")


# --- numbers


ALPHAS = {
    "int": torch.tensor(3),
    "int32 in a list": torch.tensor([3], dtype=torch.int32),
    "uint8": torch.tensor(3, dtype=torch.uint8),
    "bfloat16": torch.tensor(3, dtype=torch.bfloat16),
    "float16 in a list": torch.tensor([3], dtype=torch.float16),
    "float64": torch.tensor(3, dtype=torch.float64),
}


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
def test_an_alpha_of_any_type_and_shape_is_a_number(place, alpha):
    tensors = lora_tensors() | {f"{BLOCK}.{kind}.to_q.alpha": alpha.clone() for kind in ("attn1", "attn2")}
    save_file(tensors, place / "x.safetensors")
    assert set(read_adapter(place / "x.safetensors").scales.values()) == {1.5}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_read_exactly(place, kind):
    every = torch.arange(256, dtype=torch.uint8).view(kind).float()
    finite = torch.where(every.isfinite(), every, 0).reshape(8, 32)
    tensors = {"x.lora_down.weight": finite.to(kind), "x.lora_up.weight": torch.ones(4, 8).to(kind)}
    save_file(tensors, place / "x.safetensors")
    adapter = read_adapter(place / "x.safetensors")
    assert np.array_equal(adapter.matrices["x.lora.down.weight"], finite.numpy())
    assert survey_file(place / "x.safetensors").columns == adapter.layout.columns


def test_numbers_that_float32_cannot_hold(place):
    halves = (("a", (8, 2), 1e15), ("b", (2, 6), 1e-25))
    loha = {f"x.hada_w{i}_{side}": torch.full(shape, value) for i in (1, 2) for side, shape, value in halves}
    save_file(loha, place / "x.safetensors")
    with pytest.raises(BadFile, match="too small for float32"):
        _ = read_adapter(place / "x.safetensors").matrices
    tiny = {
        f"{BLOCK}.{kind}.to_q.alpha": torch.tensor(1e-300, dtype=torch.float64) for kind in ("attn1", "attn2")
    }
    save_file(lora_tensors() | tiny, place / "x.safetensors")
    assert set(read_adapter(place / "x.safetensors").scales.values()) == {5e-301}


def test_halves_of_two_names_are_no_module(place):
    tensors = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 6),
               "unet.mid_block.attentions.0.proj_in.lora.up.weight": torch.ones(8, 2)}  # fmt: skip
    save_file(tensors, place / "x.safetensors")
    with pytest.raises(BadFile, match=r"both of which are unet\.mid_block\.attentions\.0\.proj_in"):
        survey_file(place / "x.safetensors")


def test_a_name_of_many_characters_is_no_module(place):
    save_file({f"{'a_' * 100_000}.lora_down.weight": torch.ones(2, 6)}, place / "x.safetensors")
    with pytest.raises(BadFile) as error:
        survey_file(place / "x.safetensors")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_pipe_is_not_waited_for(place, name):
    os.mkfifo(place / name)
    for read in (survey_file, read_adapter):
        with pytest.raises(BadFile, match="is no regular file"):
            read(place / name)


def test_the_second_transformer_of_wan_has_its_own_configuration(place):
    from safetensors.torch import save_file as save

    tensors = {f"{component}.blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(shape)
               for component in ("transformer", "transformer_2")
               for side, shape in (("A", (2, 6)), ("B", (8, 2)))}  # fmt: skip
    config = {
        "transformer.lora_alpha": 2,
        "transformer_2.lora_alpha": 6,
        "transformer.r": 2,
        "transformer_2.r": 2,
    }
    save(tensors, place / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    assert read_adapter(place / "x.safetensors").scales == {
        "transformer.blocks.0.attn1.to_q": 1.0,
        "transformer_2.blocks.0.attn1.to_q": 3.0,
    }


# --- pickles


def test_a_pickle_of_early_diffusers_is_read_when_asked_for(place, build):
    """The names and the type of file of the first LoRAs of diffusers."""
    for label, seed in (("a", 0), ("b", 1)):
        (place / "in" / label).mkdir(parents=True)
        early = {
            key.removeprefix("unet.").replace(".to_q.lora.", ".processor.to_q_lora."): value
            for key, value in lora_tensors(seed=seed).items()
        }
        torch.save(early, place / f"in/{label}/pytorch_lora_weights.bin")
    status, said = build("in")
    assert status == 2 and "2 pickled files are there, which are not read without --pickles read" in said
    status, said = build("in", "--pickles", "read")
    assert status == 0 and "2 found = 2 written" in said, said
    data = load("./out")
    for key, value in lora_tensors(seed=1).items():
        assert np.array_equal(data.weights.read_layer(key, 1, 2).numpy()[0], value.numpy())
    # The same adapter as safetensors beside the pickle is one row.
    save_file(lora_tensors(seed=0), place / "in/a/pytorch_lora_weights.safetensors")
    status, said = build("in", "--pickles", "read", output="both")
    assert status == 0 and "2 found = 2 written" in said and "1 hidden" in said


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Evil(), "which could run code"),
        ({"x": Evil()}, "which could run code"),
        ([torch.ones(2)], "a dictionary of tensors is expected"),
        ({"x.lora_down.weight": [1, 2]}, "no plain tensor"),
        ({3: torch.ones(2)}, "no plain tensor"),
        (
            {f"x.lora_{side}.weight": torch.ones(2, 2, dtype=torch.complex64) for side in ("down", "up")},
            "is stored as complex64",
        ),
        ({}, "holds no LoRA layer"),
        ({"x.alpha": 10**400}, "no plain tensors"),
        ({"x.lora_down.weight": torch.ones(1, 1).expand(2**20, 2**20)}, "no plain tensor"),
        ({"x.lora_down.weight": torch.ones(2, 3, device="meta")}, "no plain tensor"),
    ],
)
def test_a_pickle_of_anything_else_is_a_bad_file_and_runs_nothing(place, build, content, reason):
    for label, seed in (("a", 0), ("b", 1)):
        (place / "in" / label).mkdir(parents=True)
        save_file(lora_tensors(seed=seed), place / f"in/{label}/x.safetensors")
    torch.save(content, place / "in/a/bad.pt")
    status, said = build("in", "--pickles", "read")
    assert status == 2 and "a/bad.pt: " in said and reason in said and not (place / "owned").exists()


def test_a_damaged_pickle_is_a_bad_file(place):
    path = place / "x.pt"
    torch.save({"state_dict": lora_tensors()}, path)
    assert survey_file(path).ranks == (2,)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in rng.integers(0, len(whole) - 1, 20):
        path.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            survey_file(path)


# --- ranks


def best_error(matrix, rank):
    """Relative error of the best approximation, by the SVD of the whole matrix."""
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    return np.sqrt(energies[rank:].sum() / energies.sum())


@pytest.mark.parametrize(
    ("rank", "own", "shape"),
    [
        (2, 4, (9, 7)),
        (3, 12, (5, 6)),
        (8, 4, (9, 7)),
        (4, 4, (9, 7)),
        (5, 400, (300, 280)),
        (290, 400, (270, 300)),
    ],
)
def test_the_best_approximation_is_that_of_the_whole_products_svd(rank, own, shape):
    rng = np.random.default_rng(rank)
    down, up = rng.standard_normal((own, shape[1])), rng.standard_normal((shape[0], own))
    new_down, new_up, lost, energy = best_of_rank(down, up, rank)
    whole = up @ down
    assert new_down.shape == (rank, shape[1]) and new_up.shape == (shape[0], rank)
    error = np.linalg.norm(new_up @ new_down - whole) / np.linalg.norm(whole)
    assert error == pytest.approx(best_error(whole, rank), abs=1e-12)
    assert np.sqrt(max(lost, 0) / energy) == pytest.approx(error, abs=1e-9)
    np.testing.assert_allclose((new_down**2).sum(1), (new_up**2).sum(0), atol=1e-12)  # balanced
    again = best_of_rank(-down, -up, rank)  # the same product
    np.testing.assert_allclose(again[0], new_down, atol=1e-12)


def test_mixed_ranks_can_be_padded_or_approximated(place, build):
    for label, seed, n in (("a", 0, 2), ("a", 1, 4), ("b", 2, 2), ("b", 3, 3)):
        (place / "in" / label).mkdir(parents=True, exist_ok=True)
        alphas = {
            f"{BLOCK}.{kind}.to_q.alpha": torch.tensor(2.0 * n + (kind == "attn1"))
            for kind in ("attn1", "attn2")
        }
        save_file(lora_tensors(n, seed) | alphas, place / f"in/{label}/{seed}.safetensors")
    files = [read_adapter(place / f"in/{label}.safetensors") for label in ("a/0", "a/1", "b/2", "b/3")]
    status, said = build("in")
    assert status == 2 and "--rank pad or --rank svd:R" in said
    status, said = build("in", "--rank", "pad", output="padded")
    assert status == 0 and "rank 4 (padded)" in said and "exact for what looks at up @ down" in said
    for module in files[0].layout.modules:
        for row, file in enumerate(files):
            down, up = (row_of("padded", f"{module}.lora.{side}.weight", row) for side in ("down", "up"))
            own = file.layout.modules[module].rank
            assert down.shape == (4, 6) and not down[own:].any() and not up[:, own:].any()
            np.testing.assert_allclose(up @ down, product(file, module), rtol=1e-5, atol=1e-5)
    assert load("./padded").weights.dataset.with_format(None)["rank"][:] == [2, 4, 2, 3]
    status, said = build("in", "--rank", "svd:2", output="two")
    assert status == 0 and "rank 2 (best approximations)" in said and "column rank_error" in said
    errors = load("./two").weights.dataset.with_format(None)["rank_error"][:]
    for row, file in enumerate(files):
        lost = total = 0.0
        for module in file.layout.modules:
            down, up = (row_of("two", f"{module}.lora.{side}.weight", row) for side in ("down", "up"))
            whole = product(file, module)
            lost += np.linalg.norm(up @ down - whole) ** 2
            total += np.linalg.norm(whole) ** 2
            error = np.linalg.norm(up @ down - whole) / np.linalg.norm(whole)
            assert error == pytest.approx(best_error(whole, 2), abs=1e-6)
        assert errors[row] == pytest.approx(np.sqrt(lost / total), abs=1e-6)
    assert errors[0] < 1e-6 < errors[1]


def row_of(data_set, layer, row):
    """A matrix of a data set that was built, float64."""
    return load(f"./{data_set}").weights.read_layer(layer, row, row + 1).numpy()[0].astype(np.float64)


@pytest.mark.parametrize("rank", ["0", "svd:0", "svd", "pad:3", "-1", "4.5", "svd:9999999"])
def test_a_bad_rank(place, build, rank):
    with pytest.raises(SystemExit) as error:
        build("in", "--rank", rank)
    assert error.value.code == 2


# --- every kind from files to results


def randoms(shapes, number):
    """Tensors of these shapes; those of a second class are larger."""
    generator = torch.Generator().manual_seed(number)
    return {key: (1 + number % 2) * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
FIRST_CODE = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
PEFT = f"base_model.model.{BLOCK.removeprefix('unet.')}.attn1.to_q"
LORA = {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)}
FILES = {  # tensors of a file, flags of the build, kinds that build.json counts
    "LoCon": (
        {f"{CONV}.lora_down.weight": (2, 6, 1, 1), f"{CONV}.lora_mid.weight": (2, 2, 3, 3),
         f"{CONV}.lora_up.weight": (8, 2, 1, 1)} | {f"{FLAT}.{end}": shape for end, shape in LORA.items()},
        [], "LoCon + LoRA"),
    "LoHa": (
        {f"{FLAT}.hada_w{i}_{side}": shape for i in (1, 2) for side, shape in (("a", (8, 2)), ("b", (2, 6)))},
        [], "LoHa"),
    "LoKr": (
        {f"{FLAT}.lokr_w1": (2, 2), f"{FLAT}.lokr_w2_a": (4, 1), f"{FLAT}.lokr_w2_b": (1, 3)}, [], "LoKr"),
    "AdaLoRA": (
        {f"{PEFT}.lora_A": (3, 6), f"{PEFT}.lora_B": (8, 3), f"{PEFT}.lora_E": (3, 1)}, [], "AdaLoRA"),
    "DoRA": (
        {f"{FLAT}.{end}": shape for end, shape in LORA.items()} | {f"{FLAT}.dora_scale": (8, 1)}, [],
        "DoRA of LoRA"),
    "DoRA of PEFT": (
        {f"{PEFT}.lora_A.weight": (2, 6), f"{PEFT}.lora_B.weight": (8, 2),
         f"{PEFT}.lora_magnitude_vector.weight": (8,)}, [], "DoRA of LoRA"),
    "XLabs": (
        {f"double_blocks.0.processor.qkv_lora1.{side}.weight": shape
         for side, shape in (("down", (2, 8)), ("up", (24, 2)))}, [], "LoRA"),
    "split Flux": (
        {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": shape
         for side, shape in (("down", (2, 8)), ("up", (24, 2)))}, ["--split-qkv"], "LoRA"),
    "first names": (
        {f"{FIRST_CODE}.{end}": shape for end, shape in LORA.items()}
        | {f"{FIRST_CODE.replace('attn1', 'attn2')}.{end}": shape for end, shape in LORA.items()},
        [], "LoRA"),
    "pickle": ({f"{BLOCK}.attn1.processor.to_q_lora.down.weight": (2, 6),
                f"{BLOCK}.attn1.processor.to_q_lora.up.weight": (8, 2)}, ["--pickles", "read"], "LoRA"),
    "float8": ({f"{FLAT}.{end}": shape for end, shape in LORA.items()}, [], "LoRA"),
    "padded": ({f"{FLAT}.{end}": shape for end, shape in LORA.items()}, ["--rank", "pad"], "LoRA"),
    "approximated": ({f"{FLAT}.{end}": shape for end, shape in LORA.items()}, ["--rank", "svd:1"], "LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_become_results(place, build, capsys, name):
    shapes, flags, kind = FILES[name]
    for number in range(12):
        folder = place / f"in/{'ab'[number % 2]}/{number}"
        folder.mkdir(parents=True)
        tensors = randoms(shapes, number)
        if name == "float8":
            tensors = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
        if name == "pickle":
            torch.save(tensors, folder / "pytorch_lora_weights.bin")
        else:
            save_file(tensors, folder / "adapter_model.safetensors")
        config = {"lora_alpha": 5, "init_r": 3} | ({} if kind == "AdaLoRA" else {"r": 2})
        (folder / "adapter_config.json").write_text(json.dumps(config))
    status, said = build("in", *flags)
    assert status == 0 and re.search(rf"Kinds: +12 {re.escape(kind)}\n", said), said
    made = json.loads((place / "out/build.json").read_text())
    assert made["kinds"] == {kind: 12} and made["rows"] == 12
    data = load("./out").weights.dataset
    weights = {f"{module}.lora.{side}.weight" for module in made["modules"] for side in ("down", "up")}
    magnitudes = [column for column in data.column_names if column.endswith(".dora_magnitude")]
    assert set(data.column_names) >= weights and len(magnitudes) == ("DoRA" in name)
    assert set(load("./out").layers.names) == weights  # the magnitudes are in no layer set
    assert inspect_dataset.main(["./out"]) == 0
    representations = ["simple_stats", "product_norms"]
    flags = ["--num-runs", "1", "--max-epochs", "2", "--layer-sets", "all_layers", "--no-report"]
    assert experiment.main(["--dataset", "./out", "--representations", *representations, *flags]) == 0
    results = json.loads((place / "visual-ablation-results/visual_ablation_out/results.json").read_text())
    assert len(results["all_layers_results"]) == 2
