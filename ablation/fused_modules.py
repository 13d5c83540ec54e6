"""Modules of the first code of Flux and SD 3 -> diffusers' modules, for --split-qkv.

There one matrix makes query, key and value; diffusers has three. Such a LoRA is split by the rows of `up`:
each part has its rows and the whole `down`. Where `up` is block diagonal, because q, k and v were trained
with a LoRA each and then joined, each part has its block of both instead. Either way the products are the
same numbers. Sources: `convert_flux_transformer_checkpoint_to_diffusers`,
`convert_sd3_transformer_checkpoint_to_diffusers` of diffusers' single_file_utils.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Of each family: the module's path -> the blocks and the modules in them, of equal height; other names.
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SECOND_QKV = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
FUSED = {
    "flux": {
        r"double_blocks\.(\d+)\.img_attn\.qkv": ("transformer_blocks", *QKV),
        r"double_blocks\.(\d+)\.txt_attn\.qkv": ("transformer_blocks", *ADDED_QKV),
        r"single_blocks\.(\d+)\.qkv": ("single_transformer_blocks", *QKV),
    },
    "sd3": {
        r"joint_blocks\.(\d+)\.x_block\.attn\.qkv": ("transformer_blocks", *QKV),
        r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv": ("transformer_blocks", *SECOND_QKV),
        r"joint_blocks\.(\d+)\.context_block\.attn\.qkv": ("transformer_blocks", *ADDED_QKV),
    },
}
SINGLE = r"single_blocks\.(\d+)\.linear1"  # q, k, v of the input's width, and the feed-forward's first layer
SINGLE_PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
RENAMED = {
    "flux": {
        r"double_blocks\.(\d+)\.img_attn\.proj": r"transformer_blocks.\1.attn.to_out.0",
        r"double_blocks\.(\d+)\.txt_attn\.proj": r"transformer_blocks.\1.attn.to_add_out",
        r"double_blocks\.(\d+)\.img_mlp\.0": r"transformer_blocks.\1.ff.net.0.proj",
        r"double_blocks\.(\d+)\.img_mlp\.2": r"transformer_blocks.\1.ff.net.2",
        r"double_blocks\.(\d+)\.txt_mlp\.0": r"transformer_blocks.\1.ff_context.net.0.proj",
        r"double_blocks\.(\d+)\.txt_mlp\.2": r"transformer_blocks.\1.ff_context.net.2",
        r"double_blocks\.(\d+)\.img_mod\.lin": r"transformer_blocks.\1.norm1.linear",
        r"double_blocks\.(\d+)\.txt_mod\.lin": r"transformer_blocks.\1.norm1_context.linear",
        r"single_blocks\.(\d+)\.linear2": r"single_transformer_blocks.\1.proj_out",
        r"single_blocks\.(\d+)\.modulation\.lin": r"single_transformer_blocks.\1.norm.linear",
        r"img_in": "x_embedder",
        r"txt_in": "context_embedder",
        r"time_in\.in_layer": "time_text_embed.timestep_embedder.linear_1",
        r"time_in\.out_layer": "time_text_embed.timestep_embedder.linear_2",
        r"vector_in\.in_layer": "time_text_embed.text_embedder.linear_1",
        r"vector_in\.out_layer": "time_text_embed.text_embedder.linear_2",
        r"guidance_in\.in_layer": "time_text_embed.guidance_embedder.linear_1",
        r"guidance_in\.out_layer": "time_text_embed.guidance_embedder.linear_2",
        r"final_layer\.linear": "proj_out",
        r"final_layer\.adaLN_modulation\.1": "norm_out.linear",
    },
    "sd3": {
        r"joint_blocks\.(\d+)\.x_block\.attn\.proj": r"transformer_blocks.\1.attn.to_out.0",
        r"joint_blocks\.(\d+)\.x_block\.attn2\.proj": r"transformer_blocks.\1.attn2.to_out.0",
        r"joint_blocks\.(\d+)\.context_block\.attn\.proj": r"transformer_blocks.\1.attn.to_add_out",
        r"joint_blocks\.(\d+)\.x_block\.mlp\.fc1": r"transformer_blocks.\1.ff.net.0.proj",
        r"joint_blocks\.(\d+)\.x_block\.mlp\.fc2": r"transformer_blocks.\1.ff.net.2",
        r"joint_blocks\.(\d+)\.context_block\.mlp\.fc1": r"transformer_blocks.\1.ff_context.net.0.proj",
        r"joint_blocks\.(\d+)\.context_block\.mlp\.fc2": r"transformer_blocks.\1.ff_context.net.2",
        r"joint_blocks\.(\d+)\.x_block\.adaLN_modulation\.1": r"transformer_blocks.\1.norm1.linear",
        r"joint_blocks\.(\d+)\.context_block\.adaLN_modulation\.1": (
            r"transformer_blocks.\1.norm1_context.linear"
        ),
        r"x_embedder\.proj": "pos_embed.proj",
        r"context_embedder": "context_embedder",
        r"t_embedder\.mlp\.0": "time_text_embed.timestep_embedder.linear_1",
        r"t_embedder\.mlp\.2": "time_text_embed.timestep_embedder.linear_2",
        r"y_embedder\.mlp\.0": "time_text_embed.text_embedder.linear_1",
        r"y_embedder\.mlp\.2": "time_text_embed.text_embedder.linear_2",
        r"final_layer\.linear": "proj_out",
        r"final_layer\.adaLN_modulation\.1": "norm_out.linear",
    },
}
IN_TRANSFORMER = "transformer."
# diffusers has scale before shift, the first code shift before scale.
SWAPPED = "norm_out.linear"


class Part(NamedTuple):
    """One of diffusers' modules in a fused one: the rows `start:stop` of `up`, with its halves swapped or
    not; block `block` of `blocks` of the rank, where `up` is block diagonal (else 0 of 1).
    """

    module: str
    start: int
    stop: int
    is_swapped: bool = False
    block: int = 0
    blocks: int = 1

    def rows_of(self, up: np.ndarray) -> np.ndarray:
        """The part's rows of `up`, or of something else with a value for each row."""
        rows = up[self.start : self.stop]
        return np.concatenate([rows[len(rows) // 2 :], rows[: len(rows) // 2]]) if self.is_swapped else rows

    def of(self, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part's (down, up)."""
        up = self.rows_of(up)
        rank = len(down) // self.blocks
        ranks = slice(self.block * rank, (self.block + 1) * rank) if self.blocks > 1 else slice(None)
        return down[ranks], up[:, ranks]


def family_of(modules: Iterable[str]) -> str | None:
    """The model whose first code names a file's modules, if all of them are Flux's or all SD 3's, and some
    are of its blocks; those of a text encoder do not count.
    """
    paths = [name.removeprefix(IN_TRANSFORMER) for name in modules if name.startswith(IN_TRANSFORMER)]
    for family, own in FUSED.items():
        patterns = [*own, *RENAMED[family], *([SINGLE] if family == "flux" else [])]
        known = [next((p for p in patterns if re.fullmatch(p, path)), None) for path in paths]
        if all(known) and any("blocks" in str(pattern) for pattern in known):
            return family
    return None


def diffusers_parts(family: str, module: str, outputs: int, inputs: int) -> list[Part]:
    """The modules of diffusers in a module (canonical name) of the first code; [] if it is none of those."""
    if not module.startswith(IN_TRANSFORMER):
        return []
    path = module.removeprefix(IN_TRANSFORMER)
    for pattern, (blocks, *names) in FUSED[family].items():
        found = re.fullmatch(pattern, path)
        if found and outputs % len(names) == 0:
            height = outputs // len(names)
            within = [f"{IN_TRANSFORMER}{blocks}.{found[1]}.{name}" for name in names]
            return one_below_another(within, [height] * len(names))
    found = re.fullmatch(SINGLE, path)
    if found and family == "flux" and outputs > 3 * inputs:
        within = [f"{IN_TRANSFORMER}single_transformer_blocks.{found[1]}.{name}" for name in SINGLE_PARTS]
        return one_below_another(within, [inputs] * 3 + [outputs - 3 * inputs])
    for pattern, name in RENAMED[family].items():
        found = re.fullmatch(pattern, path)
        if found:
            name = found.expand(name)
            is_last_context = name.endswith("norm1_context.linear") and outputs == 2 * inputs
            return [Part(f"{IN_TRANSFORMER}{name}", 0, outputs, name == SWAPPED or is_last_context)]
    return []


def one_below_another(modules: list[str], heights: list[int]) -> list[Part]:
    """Modules one below the other."""
    ends = np.cumsum(heights).tolist()
    return [Part(name, end - height, end) for name, height, end in zip(modules, heights, ends, strict=True)]


def is_block_diagonal(up: np.ndarray, parts: list[Part]) -> bool:
    """True if the rows of each part use only its own share of the rank, which is all zeros for the others.

    A matrix of zeros, as before training, is not.
    """
    rank, left = divmod(up.shape[1], len(parts))
    if left or len(parts) == 1 or rank == 0 or not up.any():
        return False
    for i, part in enumerate(parts):
        rows = up[part.start : part.stop]
        if rows[:, : i * rank].any() or rows[:, (i + 1) * rank :].any():
            return False
    return True


def in_blocks(parts: list[Part]) -> list[Part]:
    """The parts of a module whose `up` is block diagonal."""
    return [part._replace(block=i, blocks=len(parts)) for i, part in enumerate(parts)]
