"""Names of modules in LoRA files of diffusers, PEFT and kohya's scripts -> one canonical name.

`<component>.<module path>`, the module path being diffusers' with dots: unet.down_blocks.0.attentions.0....
"""

from __future__ import annotations

import re

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
}
PEFT_PREFIX = "base_model.model."
# PEFT does not say which model of a pipeline it wraps: the first part of the module's path does.
FIRST_PARTS = {
    "unet": (
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_in",
        "conv_out",
        "time_embedding",
        "time_proj",
        "class_embedding",
        "add_embedding",
        "encoder_hid_proj",
    ),
    "text_encoder": ("text_model",),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
}
# Parts of module paths that hold an underscore themselves, in the U-Nets of Stable Diffusion 1, 2 and XL
# (diffusers' names, and those of the first implementation, which kohya's files for XL keep) and in CLIP's
# text model. Every other underscore is a dot.
UNDERSCORED = """
    down_blocks mid_block up_blocks transformer_blocks time_embedding time_proj time_emb_proj
    add_embedding class_embedding encoder_hid_proj linear_1 linear_2 conv_in conv_out conv_norm_out
    conv_shortcut proj_in proj_out to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out
    group_norm text_model text_projection self_attn q_proj k_proj v_proj out_proj layer_norm1
    layer_norm2 final_layer_norm token_embedding position_embedding input_blocks middle_block
    output_blocks in_layers emb_layers out_layers skip_connection time_embed label_emb
""".split()
PLAIN = """
    attentions resnets downsamplers upsamplers attn1 attn2 ff net proj conv conv1 conv2 norm norm1 norm2
    norm3 encoder layers mlp fc1 fc2 embeddings op out
""".split()
BY_LENGTH = sorted(({tuple(name.split("_")) for name in UNDERSCORED}), key=len, reverse=True)


def dotted(name: str) -> str:
    """A module path whose dots were made underscores,
    as it was: down_blocks_0_attentions_0_proj_in -> down_blocks.0.attentions.0.proj_in.

    A name with a word that these models do not have stays as it is, and so stays unique.
    """
    words, parts = name.split("_"), []
    while words:
        length = next((len(known) for known in BY_LENGTH if tuple(words[: len(known)]) == known), 1)
        if length == 1 and not (words[0].isdigit() or words[0] in PLAIN):
            return name
        parts.append("_".join(words[:length]))
        del words[:length]
    return ".".join(parts)


def canonical_module(name: str) -> str:
    """`<component>.<module path>` of a module as a file names it; a component nobody can tell is left out."""
    prefix = next((prefix for prefix in KOHYA_PREFIXES if name.startswith(prefix)), "")
    if prefix:
        component, path = KOHYA_PREFIXES[prefix], dotted(name.removeprefix(prefix))
    else:
        # The processors of early diffusers held the LoRA.
        path = name.removeprefix(PEFT_PREFIX).replace(".processor.", ".")
        component, _, rest = path.partition(".")
        if component in COMPONENTS:
            path = rest
        else:
            first = "text_model" if path.startswith("encoder.layers.") else component
            component = next((which for which, parts in FIRST_PARTS.items() if first in parts), "")
    if component.startswith("text_encoder"):
        # CLIPTextModel since transformers 5
        path = re.sub(r"^encoder\.layers\.", "text_model.encoder.layers.", path)
        path = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", path)  # early diffusers
    return f"{component}.{path}" if component else path


SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}
WEIGHT = re.compile(
    r"(?P<module>.+?)(?P<joint>[._])lora(?:_linear_layer)?[._](?P<side>down|up|A|B)(?:\.(?P<adapter>[^.]+))?\.weight"
)
ALPHA = re.compile(r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")


def parse_key(key: str) -> tuple[str, str] | None:
    """(canonical module, "down" | "up" | "alpha") of a tensor's name, or None for what is neither."""
    weight, alpha = WEIGHT.fullmatch(key), ALPHA.fullmatch(key)
    if weight:
        module = canonical_module(weight["module"])
        if weight["joint"] == "_" and module.endswith(".to_out"):
            module += ".0"  # in early diffusers to_out_lora stands for to_out.0
        return module, SIDES[weight["side"]]
    return (canonical_module(alpha["module"]), "alpha") if alpha else None


def own_name(key: str) -> str:
    """The module of a weight as its file names it, without PEFT's prefix."""
    weight = WEIGHT.fullmatch(key)
    if weight is None:
        raise ValueError(f"'{key}' is no weight of a LoRA")
    return weight["module"].removeprefix(PEFT_PREFIX)


def style_of(key: str) -> str:
    """The tool whose names a tensor's name follows: diffusers, peft or kohya."""
    if key.startswith(PEFT_PREFIX):
        return "peft"
    return "kohya" if key.startswith(tuple(KOHYA_PREFIXES)) else "diffusers"
