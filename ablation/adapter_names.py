"""Names of tensors in adapter files -> (canonical name of the module, what the tensor is in it).

A canonical name is `<component>.<module path>`, the path being diffusers' with dots:
unet.down_blocks.0.attentions.0.... The U-Net names of the first Stable Diffusion code (input_blocks.4.1)
become diffusers' too. Transformers whose first code names its modules otherwise than diffusers (Flux, SD 3,
Wan) keep the names of their file, with dots; `fused_modules.py` turns Flux's and SD 3's into diffusers'.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "transformer_2")
# Of kohya's scripts, OneTrainer and LyCORIS; "" where the first part of the path tells the component.
FLAT_PREFIXES = {
    "lora_unet_": "",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}
PEFT_PREFIX = "base_model.model."
PEFT_START = re.compile(rf"({'|'.join(COMPONENTS)})?\.?\bbase_model\.model\.")
COMFY_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# PEFT and kohya's scripts do not say which model of a pipeline they adapt: the module's path does.
FIRST_PARTS = {
    "unet": (
        r"(down|up)_blocks|mid_block|conv_in|conv_out|time_embedding\.linear_\d|time_proj|class_embedding"
        r"|add_embedding|encoder_hid_proj"
    ),
    "text_encoder": r"text_model",
    "transformer": (
        r"(single_|joint_)?transformer_blocks|(double|single|joint)_blocks"
        r"|blocks\.\d+\.(self_attn|cross_attn|attn1|attn2|ffn)"
        r"|(layers|context_refiner|noise_refiner)\.\d+\.(attention|feed_forward|adaLN_modulation)"
    ),
}
# Parts of module paths that hold an underscore themselves: in the U-Nets of Stable Diffusion, in diffusers'
# transformers and those of the first codes, and in text encoders. Every other underscore is a dot.
UNDERSCORED = """
    down_blocks mid_block up_blocks transformer_blocks time_embedding time_proj time_emb_proj
    add_embedding class_embedding encoder_hid_proj linear_1 linear_2 linear_3 conv_in conv_out conv_norm_out
    conv_shortcut proj_in proj_out to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out
    group_norm text_model text_projection self_attn q_proj k_proj v_proj out_proj layer_norm1
    layer_norm2 final_layer_norm token_embedding position_embedding input_blocks middle_block
    output_blocks in_layers emb_layers out_layers skip_connection time_embed label_emb
    single_transformer_blocks joint_transformer_blocks adaLN_modulation adaln_single all_final_layer
    all_x_embedder aspect_ratio_embedder cap_embedder caption_embedder caption_proj caption_projection
    condition_embedder context_embedder context_refiner conv_depth conv_inverted conv_point
    distilled_guidance_layer double_stream_modulation_img double_stream_modulation_txt feed_forward
    ff_context guidance_embedder image_embedder img_in img_mlp img_mod in_proj linear_in linear_out
    noise_refiner norm1_context norm_out out_projection patch_embed patch_embedding pos_embed proj_mlp
    refiner_blocks resolution_embedder single_stream_modulation t_embedder text_embedder text_proj
    time_caption_embed time_condition_embed time_embedder time_guidance_embed time_step_proj
    time_text_embed timestep_embedder to_kv to_qkv to_added_qkv to_qkv_mlp_proj token_refiner txt_in txt_mlp
    txt_mod x_embedder double_blocks single_blocks joint_blocks x_block context_block img_attn txt_attn
    final_layer time_in vector_in guidance_in in_layer out_layer cross_attn k_img v_img text_embedding
    time_projection img_emb individual_token_refiner input_embedder c_embedder y_embedder gate_proj
    up_proj down_proj wi_0 wi_1 norm_q norm_k norm_added_q norm_added_k
""".split()
PLAIN = """
    attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 conv2 norm norm1 norm2
    norm3 encoder layers mlp fc1 fc2 embeddings op out attention attn blocks emb ffn linear w1 w2 w3 qkv
    lin modulation linear1 linear2 q k v o head block layer SelfAttention DenseReluDense wi wo model pooler
""".split()
BY_LENGTH = sorted(({tuple(name.split("_")) for name in UNDERSCORED}), key=len, reverse=True)


def dotted(name: str) -> str:
    """A module path whose dots were made underscores, as it was:
    down_blocks_0_attentions_0_proj_in -> down_blocks.0.attentions.0.proj_in.

    A name with a word that these models do not have stays as it is, and so stays unique.
    """
    return ".".join(parts_of(name)) or name


def parts_of(name: str) -> list[str]:
    """The parts of such a path; none if a word is not known."""
    words, parts = name.split("_"), []
    while words:
        length = next((len(known) for known in BY_LENGTH if tuple(words[: len(known)]) == known), 1)
        if length == 1 and not (words[0].isdigit() or words[0] in PLAIN):
            return []
        parts.append("_".join(words[:length]))
        del words[:length]
    return parts


# --- modules


RESNET_PARTS = {  # of a residual block in the first Stable Diffusion code -> diffusers
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)")
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
LAYERS_A_BLOCK = 3  # of input_blocks and output_blocks, in every U-Net of Stable Diffusion 1, 2 and XL


def diffusers_unet_path(path: str) -> str:
    """The path in diffusers of a module that is named as in the first code of Stable Diffusion 1, 2 and XL
    (input_blocks.4.1.proj_in -> down_blocks.1.attentions.0.proj_in); any other path as it is.
    """
    if path in UNET_ENDS:
        return UNET_ENDS[path]
    head, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    if head == "middle_block" and number in MIDDLE and rest:
        return in_diffusers_block(f"mid_block.{MIDDLE[number]}", rest) or path
    block = UNET_BLOCK.fullmatch(path)
    if block is None:
        return path
    side, part, rest = ("down" if block[1] == "input" else "up"), block[3], block[4]
    # input_blocks.0 is conv_in, so that the blocks of three begin at 1.
    block_number, layer = divmod(int(block[2]) - (side == "down"), LAYERS_A_BLOCK)
    if rest == ("op" if side == "down" else "conv"):
        return f"{side}_blocks.{block_number}.{side}samplers.0.conv"
    which = {"0": "resnets", "1": "attentions"}.get(part, "")
    return in_diffusers_block(f"{side}_blocks.{block_number}.{which}.{layer}", rest) if which else path


def in_diffusers_block(block: str, rest: str) -> str:
    """A part of a residual block, or of an attention block (which is named alike), after the block's name."""
    return f"{block}.{RESNET_PARTS.get(rest, rest) if '.resnets.' in block else rest}"


def component_of(path: str) -> str:
    """The model of a pipeline that has a module path, or '' if the path does not tell."""
    return next((which for which, parts in FIRST_PARTS.items() if re.match(rf"({parts})(\.|$)", path)), "")


def without_peft(name: str) -> str:
    """A module's name without the prefix of PEFT, which may come after that of a component."""
    found = PEFT_START.match(name)
    if found is None:
        return name
    return (f"{found[1]}." if found[1] else "") + name[found.end() :]


@functools.lru_cache(maxsize=100_000)
def canonical_module(name: str) -> str:
    """`<component>.<module path>` of a module as a file names it; a component nobody can tell is left out."""
    prefix = next((prefix for prefix in FLAT_PREFIXES if name.startswith(prefix)), "")
    comfy = next((prefix for prefix in COMFY_PREFIXES if name.startswith(prefix)), "")
    if prefix:
        flat = name.removeprefix(prefix).removeprefix("_")
        path = diffusers_unet_path(dotted(flat))
        component = FLAT_PREFIXES[prefix] or component_of(path)
        if prefix == "lora_unet_" and not component:
            component = "transformer" if parts_of(flat) else "unet"
    elif comfy:
        path = diffusers_unet_path(name.removeprefix(comfy))
        component = component_of(path) or "transformer"
    else:
        # The processors of early diffusers held the LoRA.
        path = without_peft(name).replace(".processor.", ".")
        first, _, rest = path.partition(".")
        if first in COMPONENTS:
            component, path = first, rest
        else:
            component = "text_encoder" if path.startswith("encoder.layers.") else component_of(path)
        if component in ("unet", ""):
            path = diffusers_unet_path(path)
            component = component or component_of(path)
    if component.startswith("text_encoder"):
        # CLIPTextModel since transformers 5
        path = re.sub(r"^encoder\.layers\.", "text_model.encoder.layers.", path)
        path = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", path)  # early diffusers
    # Hunyuan-Video writes img_attn_qkv where Flux has img_attn.qkv; flat names cannot tell them apart.
    path = re.sub(r"\.(img|txt)_attn_(qkv|proj)$", r".\1_attn.\2", path)
    return f"{component}.{path}" if component else path


# --- tensors


class TensorName(NamedTuple):
    """What a tensor's name says. `role` is one of adapter_kinds: down, up, alpha, hada_w1_a, ..."""

    module: str  # canonical
    role: str
    own: str = ""  # the module as the file names it, without PEFT's prefix


LORA_ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid", "E": "E"}
LORA = re.compile(
    r"(?P<module>.+?)(?P<joint>[._])lora(?:_linear_layer)?[._]"
    r"(?:(?P<side>down|up|mid|A|B)(?:\.(?!bias$)[^.]+)?\.weight|(?P<bare>[ABE])(?:\.(?!bias$|weight$)[^.]+)?)"
)
XLABS = re.compile(
    r"(?:diffusion_model\.)?(?P<path>(?P<kind>double|single)_blocks\.\d+)\.processor\."
    r"(?P<part>qkv|proj)_lora(?P<stream>[12]?)\.(?P<side>down|up)\.weight"
)
XLABS_PARTS = {
    ("double", "qkv", "1"): "img_attn.qkv",
    ("double", "proj", "1"): "img_attn.proj",
    ("double", "qkv", "2"): "txt_attn.qkv",
    ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "qkv",  # the first rows of linear1
    ("single", "proj", ""): "linear2",
}
ALPHA = re.compile(r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
OTHERS = re.compile(
    r"(?P<module>.+)\.(?P<role>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|ranknum|dora_scale"
    r"|lora_magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)


def parse_key(key: str) -> TensorName | None:
    """What a tensor's name says, or None for a tensor of no kind of adapter that is read."""
    xlabs = XLABS.fullmatch(key)
    if xlabs:
        part = XLABS_PARTS.get((xlabs["kind"], xlabs["part"], xlabs["stream"]))
        own = key.removesuffix(f".{xlabs['side']}.weight")
        return TensorName(f"transformer.{xlabs['path']}.{part}", xlabs["side"], own) if part else None
    lora = LORA.fullmatch(key)
    if lora:
        module = canonical_module(lora["module"])
        if lora["joint"] == "_" and module.endswith(".to_out"):
            module += ".0"  # in early diffusers to_out_lora stands for to_out.0
        own = without_peft(lora["module"])
        return TensorName(module, LORA_ROLES[lora["side"] or lora["bare"]], own)
    alpha = ALPHA.fullmatch(key)
    if alpha:
        return TensorName(canonical_module(alpha["module"]), "alpha")
    other = OTHERS.fullmatch(key)
    if other is None:
        return None
    role = "magnitude" if other["role"] in ("dora_scale", "lora_magnitude_vector") else other["role"]
    return TensorName(canonical_module(other["module"]), role, without_peft(other["module"]))


def style_of(key: str) -> str:
    """The tool whose names a tensor's name follows."""
    if PEFT_START.match(key):
        return "peft"
    if key.startswith("lycoris_"):
        return "lycoris"
    if XLABS.fullmatch(key):
        return "xlabs"
    if key.startswith(COMFY_PREFIXES):
        return "comfyui"
    return "kohya" if key.startswith(tuple(FLAT_PREFIXES)) else "diffusers"
