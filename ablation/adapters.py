"""One adapter's safetensors file, as diffusers,
PEFT or kohya's scripts save it -> matrices under canonical column names.

The same LoRA gives the same columns whatever wrote it: `<component>.<module path>.lora.down.weight` (r, in)
and `.lora.up.weight` (out, r), the module path being diffusers' with dots. Nothing is unpickled.
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

from ablation.adapter_names import COMPONENTS, own_name, parse_key, style_of

LONGEST_PATTERN = 300  # characters of a regular expression in a file
# What a file of a foreign program can raise as its scales are read.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    ArithmeticError,
    re.error,
)
REPEATED_GROUP = re.compile(r"\)[+*{?]")  # such as (a|a)+, whose search may take exponential time


class BadFile(Exception):
    """Why a file cannot become a row, in one line."""


# --- a file's layers, from its header


class Layout(NamedTuple):
    """What a file holds. `columns` [(column, rows, cols)] sorted;
    `keys` column -> the tensor's name in the file.
    """

    style: str  # diffusers, peft or kohya
    columns: tuple[tuple[str, int, int], ...]
    keys: dict[str, str]
    alphas: dict[str, str]  # module -> name of its alpha
    modules: dict[str, tuple[str, int]]  # module -> (as the file names it, rank), sorted
    flattened: tuple[str, ...]  # columns of more than two dimensions in the file

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the modules, each once."""
        return tuple(sorted({rank for _, rank in self.modules.values()}))


NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# Other spellings of `deserialize`
DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


TensorHeader = tuple[str, str, tuple[int, ...]]  # name, dtype and shape of a tensor


@functools.lru_cache(maxsize=64)  # a collection has a handful of layouts, and each costs hundreds of names
def layout_of_tensors(entries: tuple[TensorHeader, ...], leave_out: str = "") -> Layout:
    """The layout of some tensors without those in whose
    name the pattern `leave_out` is found. Raises BadFile.
    """
    columns: list[tuple[str, int, int]] = []
    keys: dict[str, str] = {}
    alphas: dict[str, str] = {}
    sides: dict[str, dict[str, TensorHeader]] = {}
    flattened = []
    for entry in entries:
        key, _, shape = entry
        if leave_out and re.search(leave_out, key):
            continue
        module, side = parsed_key(key)
        if side == "alpha":
            alphas[module] = key
            continue
        column = f"{module}.lora.{side}.weight"
        if column in keys:
            raise BadFile(
                f"holds '{keys[column]}' and '{key}', both of which are {column}: two adapters in one file"
            )
        check_weight(entry, side)
        if len(shape) > 2:
            flattened.append(column)
        keys[column] = key
        sides.setdefault(module, {})[side] = entry
        columns.append((column, shape[0], math.prod(shape[1:])))
    modules = modules_of(sides, alphas)
    styles = Counter(map(style_of, keys.values()))
    style = styles.most_common(1)[0][0]
    return Layout(style, tuple(sorted(columns)), keys, alphas, modules, tuple(sorted(flattened)))


def parsed_key(key: str) -> tuple[str, str]:
    """`parse_key`, but raises BadFile for a tensor that is no part of a LoRA."""
    parsed = parse_key(key)
    if parsed is None:
        raise BadFile(
            f"holds '{key}', which is no `down`, `up` or alpha of a LoRA: a kind of adapter that `up @ down` "
            "does not describe, or a whole model; name what may be ignored with --leave-out"
        )
    return parsed


def check_weight(entry: TensorHeader, side: str) -> None:
    """Raise BadFile unless a `down` or `up` is a matrix, or a convolution, of a float type."""
    key, dtype, shape = entry
    if dtype not in NUMPY_TYPES:
        raise BadFile(f"'{key}' is stored as {dtype}: float16, bfloat16, float32 and float64 are understood")
    if len(shape) < 2 or 0 in shape:
        raise BadFile(f"'{key}' has shape {list(shape)}: a matrix is expected")
    if side == "up" and any(size != 1 for size in shape[2:]):
        raise BadFile(f"'{key}' has shape {list(shape)}: an `up` convolution has kernel 1 x 1")


def modules_of(
    sides: dict[str, dict[str, TensorHeader]], alphas: dict[str, str]
) -> dict[str, tuple[str, int]]:
    """Module -> (as the file names it, rank), sorted.
    Raises BadFile if a module is not whole, or if there is none.
    """
    modules = {}
    for module in sorted(sides):
        missing = {"down", "up"} - sides[module].keys()
        if missing:
            raise BadFile(f"module '{module}' has no `{missing.pop()}`")
        key, _, down = sides[module]["down"]
        _, _, up = sides[module]["up"]
        if down[0] != up[1]:
            raise BadFile(f"module '{module}': `down` {list(down)} and `up` {list(up)} have different ranks")
        modules[module] = (own_name(key), down[0])
    if not modules:
        raise BadFile("holds no LoRA layer")
    strangers = sorted(alphas.keys() - modules.keys())
    if strangers:
        raise BadFile(f"'{alphas[strangers[0]]}' is the alpha of a module that has no weights")
    return modules


def survey_file(path: Path, leave_out: str = "") -> Layout:
    """The layout of a file from its header; no weight is read. Raises BadFile."""
    try:
        with safe_open(path, framework="np") as file:
            slices = [(key, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118 (not a dict)
            entries = tuple((key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot be read: {' '.join(str(error).split())}") from error
    return layout_of_tensors(entries, leave_out)


# --- a file's weights


class Adapter(NamedTuple):
    """A LoRA file. `scales` maps modules,
    in the order of `layout.modules`, to alpha / rank; None if not read.
    """

    layout: Layout
    matrices: dict[str, np.ndarray]  # column -> (rows, cols) float32, as stored: no scale is applied
    scales: dict[str, float] | None


def read_adapter(path: Path, leave_out: str = "", with_scales: bool = True) -> Adapter:
    """Every matrix of a file as float32,
    those of more than two dimensions flattened to (first, rest). Raises BadFile.
    """
    try:
        content = path.read_bytes()
        tensors = dict(deserialize(content))
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot be read: {' '.join(str(error).split())}") from error
    for tensor in tensors.values():
        tensor["dtype"] = DTYPE_NAMES.get(tensor["dtype"], tensor["dtype"])
    entries = tuple((key, tensor["dtype"], tuple(tensor["shape"])) for key, tensor in sorted(tensors.items()))
    layout = layout_of_tensors(entries, leave_out)
    matrices = {}
    for column, rows, cols in layout.columns:
        values = as_float32(tensors[layout.keys[column]])
        if not np.isfinite(values).all():
            where = int(np.argmin(np.isfinite(values)))
            raise BadFile(
                f"'{layout.keys[column]}': the weight at ({where // cols}, {where % cols}) is "
                f"{values[where]} as float32"
            )
        matrices[column] = values.reshape(rows, cols)
    scales = scales_of(path, layout, tensors, header_metadata(content)) if with_scales else None
    return Adapter(layout, matrices, scales)


def as_float32(tensor: dict) -> np.ndarray:
    """A tensor of `deserialize` as a flat array, exactly; a float64 beyond float32 becomes inf."""
    values = np.frombuffer(tensor["data"], dtype=NUMPY_TYPES[tensor["dtype"]])
    if tensor["dtype"] == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    if values.dtype != np.float64:
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def header_metadata(content: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def scales_of(path: Path, layout: Layout, tensors: dict, metadata: dict[str, str]) -> dict[str, float]:
    """What a module's `up @ down` is multiplied with when the adapter is used:
    alpha / rank, or what its configuration says.

    alpha stands in the file (kohya), in adapter_config.json beside it (PEFT), or in the file's header
    (diffusers). Without one it is the rank, as diffusers takes it, so that the scale is 1; a PEFT file
    without its configuration is refused.
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
            scales[module] = (
                1.0 if config is None else peft_scale(config, name.removeprefix(f"{component}."), rank)
            )
    except FileNotFoundError:
        raise BadFile(
            "no adapter_config.json beside it, so its alpha is unknown: add it, or build with --alpha ignore"
        ) from None
    except UNREADABLE as error:
        raise BadFile(f"its alpha cannot be read ({type(error).__name__}: {error})") from error
    return scales


def by_component(flat: dict) -> dict[str, dict]:
    """Diffusers keeps the configurations of a pipeline's models in one dict, as `unet.lora_alpha`; of a
    single model, as `lora_alpha`.
    """
    configs: dict[str, dict] = {}
    for name, value in flat.items():
        component, _, setting = name.partition(".")
        if component in COMPONENTS and setting:
            configs.setdefault(component, {})[setting] = value
        else:
            configs.setdefault("", {})[name] = value
    return configs


def peft_scale(config: dict, module: str, rank: int) -> float:
    """Alpha / rank, or alpha / sqrt(rank) for rsLoRA;
    `alpha_pattern` maps ends of module names, or regular expressions, to alphas.
    """
    patterns = config.get("alpha_pattern") or {}
    endless = [end for end in patterns if len(end) > LONGEST_PATTERN or REPEATED_GROUP.search(end)]
    if endless:
        raise ValueError(f"alpha_pattern '{endless[0][:LONGEST_PATTERN]}' could be searched for without end")
    alpha = next(
        (value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", module)),
        config["lora_alpha"],
    )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"alpha {alpha}")
    return scale
