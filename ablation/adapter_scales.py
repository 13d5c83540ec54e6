"""What a module's `up @ down` is multiplied with when the adapter is used: alpha / rank, or what its
configuration says.

alpha stands in the file (kohya, LyCORIS), in adapter_config.json beside it (PEFT), or in the file's header
(diffusers). Without one it is the rank, as diffusers and ComfyUI take it, so that the scale is 1; a PEFT file
without its configuration is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablation.adapter_kinds import BadFile
from ablation.adapter_layout import FileModule, Layout
from ablation.adapter_names import COMPONENTS

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
REPEATED_GROUP = re.compile(r"\)[+*{]")  # such as (a|a)+, whose search may take exponential time
MOST_REPEATS = 3  # such as .*, each of which may multiply the time by the length of a name
# Initialisations that take a part out of the base model, so that the product is no change of the model that
# the adapter was trained from.
OF_A_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PEFT_KINDS = ("LORA", "ADALORA", "LOHA", "LOKR")
OTHER_VARIANTS = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "target_parameters",
)
ADALORA_EPS = 1e-5  # PEFT adds it to the rank


Configurations = dict[str, dict]  # by component; of a single model under ""


def configurations_of(
    path: Path, layout: Layout, metadata: Mapping[str, str], is_needed: bool
) -> Configurations:
    """What adapter_config.json beside a file, or its header, says of it. Raises BadFile for a kind of
    adapter that is not read; and, if `is_needed`, where PEFT's configuration is not there.

    adapter_config.json counts for PEFT's names, and for others if neither alphas nor a header say more.
    """
    beside = path.parent / "adapter_config.json"
    has_lora_a = any(
        re.search(r"\.lora_[AB]\b", key) for m in layout.modules.values() for key in m.keys.values()
    )
    try:
        if "lora_adapter_metadata" in metadata and layout.style != "peft":
            configs = by_component(json.loads(metadata["lora_adapter_metadata"]))
        elif beside.is_file() and (layout.style == "peft" or (layout.style == "diffusers" and has_lora_a)):
            configs = {"": json.loads(beside.read_text(encoding="utf-8"))}
        elif layout.style == "peft" and is_needed and not layout.alphas:
            raise BadFile(
                "no adapter_config.json beside it, so its alpha is unknown: add it, or build with --alpha "
                "ignore"
            )
        else:
            return {}
        for config in configs.values():
            refuse_other_products(config)
    except UNREADABLE as error:
        if not is_needed:  # a configuration that cannot be read says nothing else either
            return {}
        raise BadFile(f"its alpha cannot be read ({type(error).__name__}: {error})") from error
    return configs


def scales_of(layout: Layout, numbers: Mapping[str, float], configs: Configurations) -> dict[str, float]:
    """The scale of each module, in the order of `layout.modules`. Raises BadFile.

    `numbers` are the values of its one-number tensors (alpha, ranknum).
    """
    if layout.alphas:
        return {name: stored_scale(module, numbers) for name, module in layout.modules.items()}
    try:
        return {name: scale_of(module, numbers, configs) for name, module in layout.modules.items()}
    except UNREADABLE as error:
        raise BadFile(f"its alpha cannot be read ({type(error).__name__}: {error})") from error


def scale_of(module: FileModule, numbers: Mapping[str, float], configs: Configurations) -> float:
    """The scale of a module by the configuration of its component, or of the file's only model."""
    component = next((which for which in COMPONENTS if module.own.startswith(f"{which}.")), "")
    if component in configs:
        return peft_scale(configs[component], module.own.removeprefix(f"{component}."), module, numbers)
    if "" in configs:
        return peft_scale(configs[""], module.own, module, numbers)
    return stored_scale(module, numbers)


def stored_scale(module: FileModule, numbers: Mapping[str, float]) -> float:
    """By the alpha in the file itself; 1 without one."""
    if module.kind == "AdaLoRA":
        if not {"alpha", "ranknum"} <= module.keys.keys():
            raise BadFile(
                "an AdaLoRA adapter without its configuration: its alpha and first rank are unknown"
            )
        return numbers[module.keys["alpha"]] / (numbers[module.keys["ranknum"]] + ADALORA_EPS)
    if "alpha" not in module.keys or module.sizes.divisor is None:
        return 1.0
    return numbers[module.keys["alpha"]] / module.sizes.divisor


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


def peft_scale(config: dict, name: str, module: FileModule, numbers: Mapping[str, float]) -> float:
    """As PEFT computes it from a configuration: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    `rank_pattern` and `alpha_pattern` map ends of module names, or regular expressions, to values. Source:
    peft/utils/other.py get_pattern_key, tuners/lora, tuners/adalora, tuners/lycoris_utils.
    """
    key = "alpha" if module.kind in ("LoHa", "LoKr") else "lora_alpha"
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    if module.kind == "AdaLoRA":  # which knows no alpha_pattern, and keeps the scale of the first rank
        first: float = numbers.get(module.keys.get("ranknum", "")) or config["init_r"]
        alpha = config[key]
        scale = (alpha if alpha > 0 else first) / (first + ADALORA_EPS)
    else:
        alpha, stated = by_pattern(alphas, name, config[key]), by_pattern(ranks, name, config.get("r"))
        rank = module.sizes.divisor or stated
        if stated is not None and stated != rank:
            raise BadFile(f"module '{module.own}' has rank {rank}, but its configuration says {stated}")
        if module.kind == "LoKr" and module.dimensions == 3:
            raise BadFile(f"module '{module.own}' is a LoKr of a Conv1d, whose parts PEFT orders otherwise")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"alpha {alpha}")
    return scale


def refuse_other_products(config: dict) -> None:
    """Raise BadFile for a configuration of PEFT under which `up @ down` is not the change of the model."""
    kind = str(config.get("peft_type") or "LORA").upper()
    variants = [name for name in OTHER_VARIANTS if config.get(name)]
    if kind not in PEFT_KINDS or variants:
        raise BadFile(
            f"its configuration says {variants[0] if variants else kind}, a kind of adapter that is not read"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OF_A_CHANGED_BASE):
        raise BadFile(
            f"was trained from a base model that init_lora_weights '{start}' had changed: save it with "
            "path_initial_model_for_weight_conversion of PEFT"
        )


def by_pattern(patterns: dict, name: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with. Raises ValueError for one that could be
    searched for without end.
    """
    for end in patterns:
        repeats = len(re.findall(r"[*+]|\{\d*,", end))
        if len(end) > LONGEST_PATTERN or REPEATED_GROUP.search(end) or repeats > MOST_REPEATS:
            raise ValueError(f"the pattern '{end[:LONGEST_PATTERN]}' could be searched for without end")
    return next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", name)), default)
