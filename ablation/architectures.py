"""Which modules of a model see the image, the text, or both: one table for every architecture.

A row lists every module that an adapter can change, by pattern on canonical names (`adapter_names`) without
their component: `transformer_blocks.3.attn.to_q`. A module is visual if it acts on image tokens that have not
met the text in this layer, text if it acts on text tokens, or brings the text to the image (cross-attention
as a whole). It is neither if both kinds of token pass it, or if it embeds, modulates or projects at the ends.

A row fits a data set if it knows every module there. If several rows fit, they must agree on every module;
else the architecture is unknown, because a guess would put a layer on the wrong side.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from ablation.adapter_names import canonical_module
from ablation.catalogue import ARCHITECTURES
from ablation.fields import shortened_text


class Architecture(NamedTuple):
    """A row of the table. `visual`, `text` and `neither` are patterns, separated by spaces: N is a number,
    a dot is a dot or an underscore, * is any text; the rest is a regular expression.
    """

    name: str  # in ARCHITECTURES: what --architecture takes
    visual: str
    text: str
    neither: str
    source: str  # where the claim can be checked
    names: str = ""  # whose names of modules these are, if there are several
    why_none: str = ""  # why no layer is visual


IN_DIFFUSERS = "diffusers"
OF_BFL = "BFL"  # Black Forest Labs, whose names kohya's scripts keep
ORIGINAL = "original"

CROSS = "(to_q|to_k|to_v|to_out(.0)?|to_qkv|to_kv)"
STREAM = "(to_q|to_k|to_v|to_qkv|to_out(.0)?)"  # of attention with a query, key and value for each stream
ADDED = "(add_q_proj|add_k_proj|add_v_proj|to_added_qkv|to_add_out)"
FEED = "net.N(.proj)?"  # diffusers' FeedForward
ENDS = "norm_out.linear proj_out"
MODULATION = "transformer_blocks.N.norm1(_context)?.linear"
REFINED = "attention.(to_q|to_k|to_v|to_out.0|qkv|out) feed_forward.wN"


def each(prefix: str, parts: str) -> str:
    """Every pattern of `parts` after a prefix."""
    return " ".join(prefix + part for part in parts.split())


DOUBLE_IN_DIFFUSERS = {
    "visual": f"transformer_blocks.N.attn.{STREAM} transformer_blocks.N.ff.{FEED}",
    "text": f"transformer_blocks.N.attn.{ADDED} transformer_blocks.N.ff_context.{FEED}",
}
SINGLE_IN_DIFFUSERS = each(
    "single_transformer_blocks.N.", "norm.linear proj_mlp proj_out attn.(to_q|to_k|to_v|to_qkv)"
)
REFINERS = {  # they attend within one kind of token, before the two are joined
    "visual": each("noise_refiner.N.", REFINED),
    "text": each("context_refiner.N.", REFINED),
    "neither": each("layers.N.", REFINED)
    + " (noise_refiner|layers).N.adaLN_modulation.N cap_embedder.N t_embedder.mlp.N",
}
CROSS_ATTENTION = {
    "visual": f"transformer_blocks.N.attn1.{CROSS}",
    "text": f"transformer_blocks.N.attn2.{CROSS}",
}
JOINED = "image and text pass through the same layers"

TABLE = (
    Architecture(
        "sd",
        visual="(*.)?attn1(.*)?",
        text="(*.)?attn2(.*)?",
        neither="(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|conv_in|conv_out"
        "|conv_norm_out|time_embedding|time_proj|time_embed|class_embedding|add_embedding|label_emb"
        "|encoder_hid_proj|out)(.*)?",
        source="diffusers: BasicTransformerBlock, UNet2DConditionModel; CompVis: SpatialTransformer",
    ),
    Architecture(
        "flux",
        **DOUBLE_IN_DIFFUSERS,
        neither=f"{MODULATION} {SINGLE_IN_DIFFUSERS} time_text_embed.* context_embedder x_embedder {ENDS}",
        source="diffusers: FluxTransformerBlock, FluxSingleTransformerBlock, FluxAttnProcessor",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "flux",
        visual="double_blocks.N.img_attn.(qkv|proj) double_blocks.N.img_mlp.N",
        text="double_blocks.N.txt_attn.(qkv|proj) double_blocks.N.txt_mlp.N",
        neither="double_blocks.N.(img|txt)_mod.lin single_blocks.N.(linearN|qkv|modulation.lin) img_in txt_in"
        " (time_in|vector_in|guidance_in).(in|out)_layer final_layer.(linear|adaLN_modulation.N)",
        source="black-forest-labs/flux: DoubleStreamBlock, SingleStreamBlock; "
        "diffusers: _convert_kohya_flux_lora_to_diffusers",
        names=OF_BFL,
    ),
    Architecture(
        "sd3",
        visual=DOUBLE_IN_DIFFUSERS["visual"] + f" transformer_blocks.N.attn2.{STREAM}",  # 3.5 medium
        text=DOUBLE_IN_DIFFUSERS["text"],
        neither=f"{MODULATION} time_text_embed.* context_embedder pos_embed.proj {ENDS}",
        source="diffusers: JointTransformerBlock, JointAttnProcessor2_0",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "sd3",
        visual=each("joint_blocks.N.x_block.", "attn2?.(qkv|proj) mlp.fcN"),
        text=each("joint_blocks.N.context_block.", "attn.(qkv|proj) mlp.fcN"),
        neither="joint_blocks.N.(x|context)_block.adaLN_modulation.N x_embedder.proj context_embedder"
        " (t|y)_embedder.mlp.N final_layer.(linear|adaLN_modulation.N)",
        source="Stability-AI/sd3.5: MMDiTX; diffusers: convert_sd3_transformer_checkpoint_to_diffusers",
        names=ORIGINAL,
    ),
    Architecture(
        "hunyuan-video",
        visual=DOUBLE_IN_DIFFUSERS["visual"],
        text=DOUBLE_IN_DIFFUSERS["text"]
        + f" context_embedder.token_refiner.refiner_blocks.N.(attn.{STREAM}|ff.{FEED})",
        neither=f"{MODULATION} {SINGLE_IN_DIFFUSERS} x_embedder.proj time_text_embed.* {ENDS} "
        "context_embedder.(proj_in|time_text_embed.*|token_refiner.refiner_blocks.N.norm_out.linear)",
        source="diffusers: HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock, "
        "HunyuanVideoTokenRefiner",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "hunyuan-video",
        visual="double_blocks.N.img_attn.(qkv|proj) double_blocks.N.img_mlp.fcN",
        text="double_blocks.N.txt_attn.(qkv|proj) double_blocks.N.txt_mlp.fcN"
        " txt_in.individual_token_refiner.blocks.N.(self_attn.(qkv|proj)|mlp.fcN)",
        neither="double_blocks.N.(img|txt)_mod.linear single_blocks.N.(linearN|modulation.linear)"
        " txt_in.individual_token_refiner.blocks.N.adaLN_modulation.N img_in.proj time_in.mlp.N"
        " txt_in.(input_embedder|t_embedder.mlp.N|c_embedder.linear_N) guidance_in.mlp.N"
        " vector_in.(in|out)_layer final_layer.(linear|adaLN_modulation.N)",
        source="Tencent/HunyuanVideo: MMDoubleStreamBlock; "
        "diffusers: _convert_hunyuan_video_lora_to_diffusers",
        names=ORIGINAL,
    ),
    Architecture(
        "qwen-image",
        visual=f"transformer_blocks.N.attn.{STREAM} transformer_blocks.N.img_mlp.{FEED}",
        text=f"transformer_blocks.N.attn.{ADDED} transformer_blocks.N.txt_mlp.{FEED}",
        neither=f"transformer_blocks.N.(img|txt)_mod.N img_in txt_in time_text_embed.* {ENDS}",
        source="diffusers: QwenImageTransformerBlock, QwenDoubleStreamAttnProcessor2_0",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "mochi",
        visual=f"transformer_blocks.N.attn1.{STREAM} transformer_blocks.N.ff.{FEED}",
        text=f"transformer_blocks.N.attn1.{ADDED} transformer_blocks.N.ff_context.{FEED}",
        neither=f"{MODULATION}(_1)? patch_embed.proj time_embed.* {ENDS}",
        source="diffusers: MochiTransformerBlock, MochiAttnProcessor2_0",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "wan",
        visual=f"(vace_)?blocks.N.attn1.{CROSS}",
        text=f"(vace_)?blocks.N.attn2.{CROSS}",
        # add_*_proj reads the embedding of a first image, not the text.
        neither="blocks.N.attn2.(add_k_proj|add_v_proj|to_added_kv) condition_embedder.* patch_embedding "
        f"(vace_)?blocks.N.ffn.{FEED} vace_blocks.N.(proj_in|proj_out) vace_patch_embedding proj_out",
        source="diffusers: WanTransformerBlock, WanVACETransformerBlock, WanAttnProcessor",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "wan",
        visual="(vace_)?blocks.N.self_attn.(q|k|v|o)",
        text="(vace_)?blocks.N.cross_attn.(q|k|v|o)",
        neither="(vace_)?blocks.N.(ffn.N|cross_attn.(k|v)_img) head.head patch_embedding time_embedding.N"
        " time_projection.N text_embedding.N img_emb.proj.N",
        source="Wan-Video/Wan2.1: WanAttentionBlock; diffusers: _convert_non_diffusers_wan_lora_to_diffusers",
        names=ORIGINAL,
    ),
    Architecture(
        "ltx",
        **CROSS_ATTENTION,
        neither=f"transformer_blocks.N.ff.{FEED} proj_in patchify_proj time_embed.* adaln_single.*"
        " caption_projection.* proj_out",
        source="diffusers: LTXVideoTransformerBlock",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "pixart",
        **CROSS_ATTENTION,
        neither=f"transformer_blocks.N.ff.{FEED} pos_embed.proj adaln_single.* caption_projection.* proj_out",
        source="diffusers: PixArtTransformer2DModel, BasicTransformerBlock",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "sana",
        **CROSS_ATTENTION,
        neither="transformer_blocks.N.ff.conv_(inverted|depth|point) patch_embed.proj time_embed.*"
        " caption_projection.* proj_out",
        source="diffusers: SanaTransformerBlock",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "lumina",
        visual="layers.N.attn1.(to_q|to_k|to_v)",
        text="layers.N.attn2.(to_q|to_k|to_v)",
        neither="layers.N.attn2.to_out(.0)? "  # of the sum of both
        "layers.N.(feed_forward.linear_N|norm1.linear) time_caption_embed.* patch_embedder.proj"
        " norm_out.linear_N",
        source="diffusers: LuminaNextDiTBlock",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "lumina2",
        visual=each("noise_refiner.N.", f"attn.{STREAM} feed_forward.linear_N"),
        text=each("context_refiner.N.", f"attn.{STREAM} feed_forward.linear_N"),
        neither=each("layers.N.", f"attn.{STREAM} feed_forward.linear_N")
        + " (noise_refiner|layers).N.norm1.linear time_caption_embed.* x_embedder norm_out.linear_N",
        source="diffusers: Lumina2Transformer2DModel.forward",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "lumina2",
        visual=REFINERS["visual"],
        text=REFINERS["text"],
        neither=REFINERS["neither"] + " x_embedder final_layer.(linear|adaLN_modulation.N)",
        source="diffusers: _convert_non_diffusers_lumina2_lora_to_diffusers",
        names=ORIGINAL,
    ),
    Architecture(
        "z-image",
        visual=REFINERS["visual"],
        text=REFINERS["text"],
        neither=REFINERS["neither"]
        + " (all_)?x_embedder(.*)? (all_)?final_layer(.*)? siglip_refiner.* siglip_embedder.*",
        source="diffusers: ZImageTransformer2DModel.forward, "
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        names=IN_DIFFUSERS,
    ),
    Architecture(
        "cogvideox",
        visual="",
        text="",
        neither=f"transformer_blocks.N.(attn1.{CROSS}|ff.{FEED}|norm(1|2).linear) patch_embed.* {ENDS}"
        " time_embedding.*",
        source="diffusers: CogVideoXBlock (joins the two kinds of token before attn1 and ff)",
        names=IN_DIFFUSERS,
        why_none=JOINED,
    ),
    Architecture(
        "krea2",
        visual="",
        text="text_fusion.(layerwise_blocks|refiner_blocks).N.(attn|ff).*",
        neither=f"transformer_blocks.N.(attn.({STREAM}|to_gate)|ff.(gate|up|down)) img_in txt_in.*"
        " time_embed.*"
        " time_mod_proj text_fusion.projector final_layer.linear",
        source="diffusers: Krea2Transformer2DModel.forward (joins the two kinds of token before the blocks)",
        names=IN_DIFFUSERS,
        why_none=JOINED,
    ),
    Architecture(
        "qwen-image-2.1",
        visual="",
        text="",
        neither=f"transformer_blocks.N.(attn.{STREAM}|img_mlp.(proj|out|gate_layer)) img_in txt_in.*"
        f" time_text_embed.* modulation.N {ENDS}",
        source="diffusers: QwenImage21Transformer2DModel.forward (joins the two kinds of token)",
        names=IN_DIFFUSERS,
        why_none=JOINED,
    ),
    Architecture(
        "language-model",
        visual="",
        text="model.layers.N.(self_attn|mlp|block_sparse_moe|linear_attn).* h.N.(attn|self_attention|mlp).* "
        "gpt_neox.layers.N.(attention|mlp).* (encoder|decoder).block.N.layer.N.* lm_head embed_out shared "
        "wte wpe model.embed_tokens gpt_neox.embed_in word_embeddings",
        neither="",
        source="transformers: LlamaForCausalLM and those named alike, GPT2, GPTJ, GPTNeoX, Falcon, Bloom, T5",
        why_none="the visual question does not apply to a language model",
    ),
)
# How the path of every module of Stable Diffusion 1, 2 and XL with attn1 or attn2 begins.
UNET_BLOCKS = "(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks).*"
# A U-Net that has one of these is no Stable Diffusion 1, 2 or XL: there attn2 may not see the text.
OTHER_UNETS = (
    "*.motion_modules.* *.temporal_transformer_blocks.* *.temp_attentions.* *.temp_convs.* transformer_in.* "
    "*.attentions.N.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj|query|key|value|proj_attn)(.*)? "
    "*.attention.(to_q|to_k|to_v|to_out)(.*)?"
)
COMPONENT = re.compile(r"(unet|transformer(_2)?)\.")
NOT_KNOWN = "unknown"  # the title of a data set of no row, or of rows that differ
TEXT_ENCODER = re.compile(r"text_encoder(_[23])?[._]")


# --- patterns


@functools.cache
def compiled(patterns: str) -> re.Pattern[str]:
    """One expression for patterns of the table; it matches whole names."""
    parts = []
    for pattern in patterns.split():
        text = re.sub(r"\bN\b|(?<=[a-z_])N(?![a-z])", r"\\d+", pattern)
        text = re.sub(r"\*", ".+", text.replace(".", "[._]"))
        parts.append(f"(?:{text})")
    return re.compile("|".join(parts) if parts else r"(?!)")


def is_text_encoder(module: str) -> bool:
    """True for a canonical name of a module of a text encoder."""
    return TEXT_ENCODER.match(module) is not None


def own_path(module: str) -> str:
    """A canonical name without its component, `unet` or `transformer`."""
    return COMPONENT.sub("", module, count=1)


def kind_in(architecture: Architecture, module: str, is_stated: bool = False) -> str:
    """What a canonical name is in an architecture: visual, text or other; "" if it has no such module.

    `is_stated`: somebody says that it is this one, so that a name need not prove it.
    """
    if is_text_encoder(module):
        return "text"
    path = own_path(module)
    patterns = {"visual": architecture.visual, "text": architecture.text, "other": architecture.neither}
    kind = next((kind for kind, some in patterns.items() if compiled(some).fullmatch(path)), "")
    if architecture.name == "sd" and not is_stated:
        is_unet = module.startswith("unet.") and not compiled(OTHER_UNETS).fullmatch(path)
        if not is_unet or (kind != "other" and not compiled(UNET_BLOCKS).fullmatch(path)):
            return ""
    return kind


# --- a collection of modules


class Kinds(NamedTuple):
    """What is known of the layers of a data set."""

    title: str  # of the architecture
    kinds: list[str]  # of each module: "visual", "text" or "other"
    problem: str = ""  # why it is unknown
    why_none: str = ""  # why no layer is visual
    is_sd: bool = False  # whose kinds are called attn1 and attn2


def kinds_of(modules: Sequence[str], chosen: str = "auto") -> Kinds:
    """The architecture of a data set, and the kind of each module, by the modules' names in its columns.

    `chosen` is a name in ARCHITECTURES, or auto: then it is found. A module that a chosen architecture does
    not have is "other".
    """
    canonical = list(map(canonical_module, modules))
    rows = [row for row in TABLE if chosen in ("auto", row.name)]
    if chosen != "auto":
        kinds = [next(filter(None, (kind_in(row, name, True) for row in rows)), "") for name in canonical]
        title, known = ARCHITECTURES[chosen], any(kinds)
        problem = "" if known else f"no layer has a name as {title} has them"
        return Kinds(title, [kind or "other" for kind in kinds], problem, rows[0].why_none, chosen == "sd")
    own = [name for name in canonical if not is_text_encoder(name)]
    if not own:
        return Kinds("text encoders alone", ["text"] * len(canonical), why_none="text encoders have none")
    rows = [row for row in rows if all(kind_in(row, name) for name in own)]
    found = {tuple(kind_in(row, name) for name in canonical) for row in rows}
    nothing = ["other"] * len(canonical)
    if not rows:
        return Kinds(NOT_KNOWN, nothing, "the architecture is unknown")
    if len(found) > 1:
        which = spoken_rows(rows)
        return Kinds(NOT_KNOWN, nothing, f"its layers may be those of {which}, which differ in what they see")
    why_none = rows[0].why_none if all(row.why_none for row in rows) else ""
    return Kinds(spoken_rows(rows), list(found.pop()), "", why_none, rows[0].name == "sd")


def spoken_rows(rows: Sequence[Architecture]) -> str:
    """Rows of the table as sentences name them: `Flux 1 or Hunyuan-Video (diffusers names)`."""
    by_names: dict[str, list[str]] = {}
    for row in rows:
        by_names.setdefault(row.names, []).append(ARCHITECTURES[row.name])
    return " or ".join(
        ", ".join(titles[:-2] + [" or ".join(titles[-2:])]) + (f" ({names} names)" if names else "")
        for names, titles in by_names.items()
    )


def first_parts(modules: Sequence[str], count: int = 6) -> str:
    """How the modules' names begin, numbers as *, for a user who writes patterns."""
    parts = (
        re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", module).rpartition(".")[0] or module for module in modules
    )
    seen = list(dict.fromkeys(parts))
    return ", ".join(map(shortened_text, seen[:count])) + (", ..." if len(seen) > count else "")
