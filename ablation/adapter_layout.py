"""The header of an adapter file -> its layout: modules, their kinds, and the columns that they become."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ablation.adapter_kinds import KINDS, SCALARS, BadFile, Sizes, kind_of, refused_kind
from ablation.adapter_names import parse_key, style_of
from ablation.adapter_storage import WEIGHT_TYPES, TensorHeader
from ablation.fused_modules import Part, diffusers_parts, family_of, in_blocks

MAGNITUDE = "dora_magnitude"  # end of the columns of a DoRA's magnitudes
LONGEST_KEY = 1000  # characters of a tensor's name


class FileModule(NamedTuple):
    """A module of a file. `keys` maps the roles of its tensors to their names in the file."""

    kind: str
    own: str  # its name in the file, without PEFT's prefix
    keys: Mapping[str, str]
    sizes: Sizes  # of the whole module, also where this is a part of it
    dimensions: int  # the most of any of its tensors
    part: Part | None = None  # of a fused module

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.sizes.rank // (self.part.blocks if self.part else 1)

    @property
    def outputs(self) -> int:
        """Rows of `up`."""
        return self.part.stop - self.part.start if self.part else self.sizes.outputs


class Layout(NamedTuple):
    """What a file holds. `columns` [(column, rows, cols)] sorted; `modules` by canonical name, sorted."""

    style: str
    columns: tuple[tuple[str, int, int], ...]
    modules: dict[str, FileModule]
    alphas: dict[str, str]  # module -> name of its alpha
    flattened: tuple[str, ...]  # columns that hold a convolution
    magnitudes: dict[str, str]  # column of a DoRA's magnitudes -> the tensor's name in the file

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the modules, each once."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def kind(self) -> str:
        """The kinds of the modules: `LoRA`, `LoHa`, `DoRA of LoRA`, `LoCon + LoRA`."""
        kinds = " + ".join(sorted({module.kind for module in self.modules.values()}))
        return f"DoRA of {kinds}" if self.magnitudes else kinds


class Reading(NamedTuple):
    """How files are read: `leave_out`, a pattern of tensors that do not count; whether fused modules are
    split.
    """

    leave_out: str = ""
    split_qkv: bool = False


@functools.lru_cache(maxsize=64)  # a collection has a handful of layouts, and each costs hundreds of names
def layout_of_tensors(
    headers: tuple[TensorHeader, ...],
    reading: Reading = Reading(),  # noqa: B008 (immutable)
    diagonal: frozenset[str] = frozenset(),
) -> Layout:
    """The layout of some tensors. `diagonal`: the modules, as the file names them, whose fused `up` is block
    diagonal. Raises BadFile.
    """
    kept = [entry for entry in headers if not (reading.leave_out and re.search(reading.leave_out, entry[0]))]
    modules: dict[str, FileModule] = {}
    whole = modules_of(kept)
    family = family_of(whole) if reading.split_qkv else None
    for name, module in sorted(whole.items()):
        parts = diffusers_parts(family, name, module.sizes.outputs, module.sizes.inputs) if family else []
        if module.own in diagonal:
            parts = in_blocks(parts)
        for part in parts:
            add_once(modules, part.module, module._replace(part=part))
        if not parts:
            add_once(modules, name, module)
    columns, flattened, magnitudes = [], [], {}
    for name, module in sorted(modules.items()):
        down, up = (f"{name}.lora.{side}.weight" for side in ("down", "up"))
        columns += [(down, module.rank, module.sizes.inputs), (up, module.outputs, module.rank)]
        if module.sizes.is_convolution:
            flattened.append(down)
        if "magnitude" in module.keys:
            magnitudes[f"{name}.{MAGNITUDE}"] = module.keys["magnitude"]
    return Layout(
        style=style_of_file([key for module in modules.values() for key in module.keys.values()]),
        columns=tuple(sorted(columns)),
        modules=dict(sorted(modules.items())),
        alphas={name: m.keys["alpha"] for name, m in sorted(modules.items()) if "alpha" in m.keys},
        flattened=tuple(flattened),
        magnitudes=magnitudes,
    )


def style_of_file(keys: list[str]) -> str:
    """The tool whose names most tensors follow. Raises BadFile where only some are PEFT's: their scale stands
    in adapter_config.json, that of the others in the file.
    """
    styles = {key: style_of(key) for key in keys}
    counts = Counter(styles.values())
    if "peft" in counts and len(counts) > 1:
        other = next(key for key, style in styles.items() if style != "peft")
        raise BadFile(f"holds names of PEFT and others, such as '{other}': their scales stand in two places")
    return counts.most_common(1)[0][0]


def add_once(modules: dict[str, FileModule], name: str, module: FileModule) -> None:
    """Add a module. Raises BadFile if there is one of that name."""
    if name in modules:
        raise BadFile(f"holds '{modules[name].own}' and '{module.own}', both of which are {name}")
    modules[name] = module


def modules_of(headers: list[TensorHeader]) -> dict[str, FileModule]:
    """The modules by canonical name. Raises BadFile if there is none, if one is not whole, or for a tensor
    that belongs to none.
    """
    by_module: dict[str, dict[str, TensorHeader]] = {}
    own_names: dict[str, str] = {}
    strays = []
    for entry in headers:
        if len(entry[0]) > LONGEST_KEY:
            raise BadFile(f"'{entry[0][:60]}...' is a name of {len(entry[0])} characters")
        parsed = parse_key(entry[0])
        if parsed is None:
            strays.append(entry[0])
            continue
        tensors = by_module.setdefault(parsed.module, {})
        if parsed.role in tensors:
            raise BadFile(
                f"holds '{tensors[parsed.role][0]}' and '{entry[0]}', both of which are the {parsed.role} of "
                f"{parsed.module}: two adapters in one file; keep one with --leave-out"
            )
        tensors[parsed.role] = entry
        if parsed.own and own_names.setdefault(parsed.module, parsed.own) != parsed.own:
            raise BadFile(
                f"holds '{own_names[parsed.module]}' and '{parsed.own}', both of which are {parsed.module}"
            )
    has_layers = any(set(tensors) - SCALARS for tensors in by_module.values())
    refuse_strays(strays, [entry[0] for entry in headers if entry[0] not in strays] if has_layers else [])
    if not has_layers:
        raise BadFile("holds no LoRA layer")
    for name, tensors in by_module.items():
        if set(tensors) <= SCALARS:
            key = next(iter(tensors.values()))[0]
            raise BadFile(f"'{key}' is the alpha of a module that has no weights")
        by_module[name] = tensors
    return {name: file_module(name, own_names[name], tensors) for name, tensors in by_module.items()}


def refuse_strays(strays: list[str], of_layers: list[str]) -> None:
    """Raise BadFile for tensors of no kind of adapter that is read; `of_layers` are the file's others."""
    if not strays:
        return
    by_kind: dict[str, list[str]] = {}
    for key in strays:
        kind = refused_kind(key)
        if kind is None:
            raise BadFile(
                f"holds '{key}', which is no `down`, `up` or alpha of a LoRA nor of another kind of adapter "
                "that is read, or it is a whole model; name what may be ignored with --leave-out"
            )
        by_kind.setdefault(kind.name, []).append(key)
    names = " and ".join(by_kind)
    if not of_layers:
        raise BadFile(f"holds '{strays[0]}', of {names}, which `up @ down` does not describe")
    raise BadFile(
        f"holds {len(strays)} tensors beside its layers, such as '{strays[0]}', of {names}: leave them out "
        f"with --leave-out '{leaving_out(strays, of_layers)}'"
    )


def leaving_out(strays: list[str], of_layers: list[str]) -> str:
    """A pattern for --leave-out that finds these tensors and none of the layers': the kinds' own if that will
    do, else their names.
    """
    kinds = dict.fromkeys(kind.pattern for key in strays if (kind := refused_kind(key)))
    pattern = "|".join(f"{each}$" for each in kinds)
    if not any(re.search(pattern, key) for key in of_layers):
        return pattern
    stems = dict.fromkeys(key.rpartition(".")[0] for key in strays)
    pattern = "|".join(rf"^{re.escape(stem)}\.[^.]+$" for stem in stems)
    if not any(re.search(pattern, key) for key in of_layers):
        return pattern
    return "|".join(f"^{re.escape(key)}$" for key in strays)


def file_module(name: str, own: str, tensors: dict[str, TensorHeader]) -> FileModule:
    """A module of these tensors (role -> header). Raises BadFile unless they fit together."""
    try:
        kind = kind_of(set(tensors))
    except BadFile as error:
        raise BadFile(f"module '{name}' {error}") from None
    for role, (key, dtype, shape) in tensors.items():
        is_vector = role in (*SCALARS, "magnitude", "E")
        if dtype not in WEIGHT_TYPES and role not in SCALARS:
            raise BadFile(
                f"'{key}' is stored as {dtype}: float8, float16, bfloat16, float32 and float64 are understood"
            )
        if not is_vector and (len(shape) < 2 or (0 in shape and kind != "AdaLoRA")):
            raise BadFile(f"'{key}' has shape {list(shape)}: a matrix is expected")
    try:
        sizes = KINDS[kind].sizes({role: shape for role, (_, _, shape) in tensors.items()})
    except BadFile as error:
        raise BadFile(f"module '{name}': {error}") from None
    keys = {role: key for role, (key, _, _) in tensors.items()}
    return FileModule(kind, own, keys, sizes, max(len(shape) for _, _, shape in tensors.values()))
