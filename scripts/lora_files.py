"""One adapter's safetensors file, as diffusers, PEFT or kohya's scripts save it -> matrices under canonical column names.

The same LoRA gives the same columns whatever wrote it: `<component>.<module path>.lora.down.weight` (r, in) and
`.lora.up.weight` (out, r), the module path being diffusers' with dots. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open


class BadFile(Exception):
    """Why a file cannot become a row, in one line."""


# --- what a file calls a module, and what we call it

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
                  "lora_te3_": "text_encoder_3", "lora_transformer_": "transformer"}
PEFT_PREFIX = "base_model.model."
# PEFT does not say which model of a pipeline it wraps: the first part of the module's path does.
FIRST_PARTS = {
    "unet": ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "time_proj", "class_embedding",
             "add_embedding", "encoder_hid_proj"),
    "text_encoder": ("text_model",),
    "transformer": ("transformer_blocks", "single_transformer_blocks"),
}
# Parts of module paths that hold an underscore themselves, in the U-Nets of Stable Diffusion 1, 2 and XL (diffusers' names, and
# those of the first implementation, which kohya's files for XL keep) and in CLIP's text model. Every other underscore is a dot.
UNDERSCORED = (
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "time_embedding", "time_proj", "time_emb_proj", "add_embedding",
    "class_embedding", "encoder_hid_proj", "linear_1", "linear_2", "conv_in", "conv_out", "conv_norm_out", "conv_shortcut",
    "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "group_norm", "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1", "layer_norm2",
    "final_layer_norm", "token_embedding", "position_embedding",
    "input_blocks", "middle_block", "output_blocks", "in_layers", "emb_layers", "out_layers", "skip_connection", "time_embed", "label_emb",
)
PLAIN = {"attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1", "conv2",
         "norm", "norm1", "norm2", "norm3", "encoder", "layers", "mlp", "fc1", "fc2", "embeddings", "op", "out"}
BY_LENGTH = sorted(({tuple(name.split("_")) for name in UNDERSCORED}), key=len, reverse=True)


def dotted(name: str) -> str:
    """A module path whose dots were made underscores, as it was: down_blocks_0_attentions_0_proj_in -> down_blocks.0.attentions.0.proj_in.

    A name with a word that these models do not have stays as it is, and so stays unique.
    """
    words, parts = name.split("_"), []
    while words:
        length = next((len(known) for known in BY_LENGTH if tuple(words[:len(known)]) == known), 1)
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
        path = name.removeprefix(PEFT_PREFIX).replace(".processor.", ".")    # the processors of early diffusers held the LoRA
        component, _, rest = path.partition(".")
        if component in COMPONENTS:
            path = rest
        else:
            first = "text_model" if path.startswith("encoder.layers.") else component
            component = next((which for which, parts in FIRST_PARTS.items() if first in parts), "")
    if component.startswith("text_encoder"):
        path = re.sub(r"^encoder\.layers\.", "text_model.encoder.layers.", path)     # CLIPTextModel since transformers 5
        path = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", path)  # early diffusers
    return f"{component}.{path}" if component else path


SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}
WEIGHT = re.compile(r"(?P<module>.+?)(?P<joint>[._])lora(?:_linear_layer)?[._](?P<side>down|up|A|B)(?:\.(?P<adapter>[^.]+))?\.weight")
ALPHA = re.compile(r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")


def parse_key(key: str) -> tuple[str, str] | None:
    """(canonical module, "down" | "up" | "alpha") of a tensor's name, or None for what is neither."""
    if found := WEIGHT.fullmatch(key):
        module = canonical_module(found["module"])
        if found["joint"] == "_" and module.endswith(".to_out"):   # early diffusers: to_out_lora stands for to_out.0
            module += ".0"
        return module, SIDES[found["side"]]
    if found := ALPHA.fullmatch(key):
        return canonical_module(found["module"]), "alpha"
    return None


def style_of(key: str) -> str:
    if key.startswith(PEFT_PREFIX):
        return "peft"
    return "kohya" if key.startswith(tuple(KOHYA_PREFIXES)) else "diffusers"


# --- a file's layers, from its header


class Layout(NamedTuple):
    """What a file holds. `columns` [(column, rows, cols)] sorted; `keys` column -> the tensor's name in the file."""

    style: str                                  # diffusers, peft or kohya
    columns: tuple[tuple[str, int, int], ...]
    keys: dict[str, str]
    alphas: dict[str, str]                      # module -> name of its alpha
    modules: dict[str, tuple[str, int]]         # module -> (as the file names it, rank), sorted
    flattened: tuple[str, ...]                  # columns of more than two dimensions in the file

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for _, rank in self.modules.values()}))


NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}   # as `deserialize` may spell them


@functools.lru_cache(maxsize=64)   # a collection has a handful of layouts, and each costs hundreds of names
def layout_of(entries: tuple[tuple[str, str, tuple[int, ...]], ...], leave_out: str = "") -> Layout:
    """The layout of (name, dtype, shape) entries without those whose name `leave_out` is found in. Raises BadFile."""
    entries = [entry for entry in entries if not (leave_out and re.search(leave_out, entry[0]))]
    columns, keys, alphas, sides, flattened, styles = [], {}, {}, {}, [], Counter()
    for key, dtype, shape in entries:
        parsed = parse_key(key)
        if parsed is None:
            raise BadFile(f"holds '{key}', which is no `down`, `up` or alpha of a LoRA: a kind of adapter that `up @ down` does not "
                          "describe, or a whole model; name what may be ignored with --leave-out")
        module, side = parsed
        if side == "alpha":
            alphas[module] = key
            continue
        column = f"{module}.lora.{side}.weight"
        if column in keys:
            raise BadFile(f"holds '{keys[column]}' and '{key}', both of which are {column}: two adapters in one file")
        if dtype not in NUMPY_TYPES:
            raise BadFile(f"'{key}' is stored as {dtype}: float16, bfloat16, float32 and float64 are understood")
        if len(shape) < 2 or 0 in shape:
            raise BadFile(f"'{key}' has shape {list(shape)}: a matrix is expected")
        if len(shape) > 2:
            if side == "up" and any(size != 1 for size in shape[2:]):
                raise BadFile(f"'{key}' has shape {list(shape)}: an `up` convolution has kernel 1 x 1")
            flattened.append(column)
        keys[column] = key
        sides.setdefault(module, {})[side] = (key, shape)
        columns.append((column, shape[0], math.prod(shape[1:])))
        styles[style_of(key)] += 1
    modules = {}
    for module in sorted(sides):
        missing = {"down", "up"} - sides[module].keys()
        if missing:
            raise BadFile(f"module '{module}' has no `{missing.pop()}`")
        (key, down), (_, up) = sides[module]["down"], sides[module]["up"]
        if down[0] != up[1]:
            raise BadFile(f"module '{module}': `down` {list(down)} and `up` {list(up)} have different ranks")
        modules[module] = (WEIGHT.fullmatch(key)["module"].removeprefix(PEFT_PREFIX), down[0])
    if not modules:
        raise BadFile("holds no LoRA layer")
    if strangers := sorted(alphas.keys() - modules.keys()):
        raise BadFile(f"'{alphas[strangers[0]]}' is the alpha of a module that has no weights")
    return Layout(styles.most_common(1)[0][0], tuple(sorted(columns)), keys, alphas, modules, tuple(sorted(flattened)))


def survey_file(path: Path, leave_out: str = "") -> Layout:
    """The layout of a file from its header; no weight is read. Raises BadFile."""
    try:
        with safe_open(path, framework="np") as file:
            slices = [(key, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118 (not a dict)
            entries = tuple((key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot be read: {' '.join(str(error).split())}") from error
    return layout_of(entries, leave_out)


# --- a file's weights


class Adapter(NamedTuple):
    layout: Layout
    matrices: dict[str, np.ndarray]   # column -> (rows, cols) float32, as stored: no scale applied
    scales: dict[str, float] | None   # module -> alpha / rank, in the order of layout.modules; None where nobody asked


def read_adapter(path: Path, leave_out: str = "", with_scales: bool = True) -> Adapter:
    """Every matrix of a file as float32, those of more than two dimensions flattened to (first, rest). Raises BadFile."""
    try:
        content = path.read_bytes()
        tensors = dict(deserialize(content))
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot be read: {' '.join(str(error).split())}") from error
    for tensor in tensors.values():
        tensor["dtype"] = DTYPE_NAMES.get(tensor["dtype"], tensor["dtype"])
    layout = layout_of(tuple((key, tensor["dtype"], tuple(tensor["shape"])) for key, tensor in sorted(tensors.items())), leave_out)
    matrices = {}
    for column, rows, cols in layout.columns:
        values = as_float32(tensors[layout.keys[column]])
        if not np.isfinite(values).all():
            where = int(np.argmin(np.isfinite(values)))
            raise BadFile(f"'{layout.keys[column]}': the weight at ({where // cols}, {where % cols}) is {values[where]} as float32")
        matrices[column] = values.reshape(rows, cols)
    return Adapter(layout, matrices, scales_of(path, layout, tensors, header_metadata(content)) if with_scales else None)


def as_float32(tensor: dict) -> np.ndarray:
    """A tensor of `deserialize` as a flat array, exactly; a float64 beyond float32 becomes inf."""
    values = np.frombuffer(tensor["data"], dtype=NUMPY_TYPES[tensor["dtype"]])
    if tensor["dtype"] == "BF16":                                        # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    if values.dtype != np.float64:
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def header_metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]).get("__metadata__") or {}


def scales_of(path: Path, layout: Layout, tensors: dict, metadata: dict[str, str]) -> dict[str, float]:
    """What a module's `up @ down` is multiplied with when the adapter is used: alpha / rank, or what its configuration says.

    alpha stands in the file (kohya), in adapter_config.json beside it (PEFT), or in the file's header (diffusers). Without
    one it is the rank, as diffusers takes it, so that the scale is 1; a PEFT file without its configuration is refused.
    """
    alphas = {}
    for module, key in layout.alphas.items():
        values = as_float32(tensors[key]) if tensors[key]["dtype"] in NUMPY_TYPES else np.empty(0)
        if values.size != 1 or not np.isfinite(values[0]):
            raise BadFile(f"'{key}' is not one finite number of a float type")
        alphas[module] = float(values[0])
    if alphas:
        return {module: alphas.get(module, rank) / rank for module, (_, rank) in layout.modules.items()}
    try:
        if layout.style == "peft":
            configs = {"": json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))}
        else:
            configs = by_component(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        scales = {}
        for module, (name, rank) in layout.modules.items():
            component = next((which for which in COMPONENTS if name.startswith(f"{which}.")), "")
            config = configs.get(component)
            scales[module] = 1.0 if config is None else peft_scale(config, name.removeprefix(f"{component}."), rank)
    except FileNotFoundError:
        raise BadFile("no adapter_config.json beside it, so its alpha is unknown: add it, or build with --alpha ignore") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"its alpha cannot be read ({type(error).__name__}: {error})") from error
    return scales


def by_component(flat: dict) -> dict[str, dict]:
    """Diffusers keeps the configurations of a pipeline's models in one dict, as `unet.lora_alpha`; of a single model, as `lora_alpha`."""
    configs: dict[str, dict] = {}
    for name, value in flat.items():
        component, _, setting = name.partition(".")
        if component in COMPONENTS and setting:
            configs.setdefault(component, {})[setting] = value
        else:
            configs.setdefault("", {})[name] = value
    return configs


def peft_scale(config: dict, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; `alpha_pattern` maps ends of module names, or regular expressions, to alphas."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", module)), config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"alpha {alpha}")
    return scale
