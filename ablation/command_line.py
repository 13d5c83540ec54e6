"""Flags and a YAML file -> Settings, and what to do with them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ablation.actions import (
    Actions,
    add_file_actions,
    add_parts,
    add_questions,
    add_workers,
    refuse_contradictions,
)
from ablation.catalogue import DIVIDING, EMBEDDED, EMBEDDED_FOLDS, THOROUGH
from ablation.conversion import build_settings, convert
from ablation.fields import InputError, flag, shortened_text
from ablation.settings import Settings, TrainingSettings, setting_fields
from checkpointing import read_bytes

CONFIG_BYTES = 20_000  # of a --config file; YAML of this size is read in less than a second
SECTIONS = {  # of --help; every setting stands in one of them
    "data": (
        "dataset",
        "data_split",
        "revision",
        "streaming",
        "label_column",
        "group_column",
        "metadata_columns",
    ),
    "what is computed": (
        "representations",
        "layer_sets",
        "architecture",
        "random_halves",
        "halves_by",
        "sketch_size",
        "pca_components",
    ),
    "splits, controls and tests": (
        "split",
        "folds",
        "repeats",
        "num_splits",
        "split_seed",
        "audit",
        "audit_rows",
        "controls",
        "classifiers",
        "train_fractions",
        "margin",
        "margin_share",
    ),
    "training": (
        "num_runs",
        "seed",
        "hidden_dim",
        "dropout",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "max_epochs",
        "patience",
        "trainer",
        "precision",
        "device",
        "memory_gb",
        "ray_cpus",
        "ray_gpus",
    ),
    "files": ("output_dir", "cache_features", "cache_dir", "cache_dtype"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        """Raise the error that ends the program with status 2."""
        raise InputError(f"{message}; see --help")


def parse_command_line(argv: list[str] | None, description: str) -> tuple[Settings, Actions]:
    """Settings by precedence: defaults, then --config, then the flags that were typed. Raises InputError.

    `description` is the program's docstring: its first paragraph heads --help, its exit statuses close it.
    """
    parsed = vars(build_parser(description).parse_args(argv))
    config, quick, thorough = (parsed.pop(name) for name in ("config", "quick", "thorough"))
    actions = Actions(**{f.name: parsed.pop(f.name) for f in dataclasses.fields(Actions) if f.name in parsed})
    fields = setting_fields()
    # A flag such as --controls without a value means all of its choices.
    typed = {name: every_choice(fields[name]) if value == [] else value for name, value in parsed.items()}
    actions = dataclasses.replace(
        actions,
        cells=tuple(",".join(actions.cells).replace(",", " ").split()),
        devices=tuple(actions.devices),
        argv=tuple(sys.argv[1:] if argv is None else argv),
    )
    refuse_contradictions(actions)
    if quick:
        if "num_runs" in typed:
            raise InputError(
                f"--quick means 3 runs and --num-runs {typed['num_runs']} another number: leave one out"
            )
        typed["num_runs"] = 3
    from_file: dict[str, Any] = {}
    if config is not None:
        from_file = read_yaml(config)
        build_settings(from_file, config)  # a bad value in the file is an error even if a flag replaces it
    chosen = (THOROUGH if thorough else {}) | from_file | typed
    actions = dataclasses.replace(actions, default_sets="layer_sets" not in from_file | typed)
    return build_settings(preset(chosen) | chosen), actions


def every_choice(f: dataclasses.Field) -> tuple[str, ...]:
    """What a flag without a value means. Raises InputError for a flag that needs one (--num-runs=--)."""
    if not isinstance(f.metadata["allowed"], tuple) or f.default != ():
        raise InputError(f"{flag(f.name)} needs a value: {f.metadata['help']}")
    return f.metadata["allowed"]


def preset(chosen: dict[str, Any]) -> dict[str, Any]:
    """What the data set has a default of its own for: embedded collections are cross-validated, if the runs
    can be spread over the folds and no setting says how the rows are divided.
    """
    dataset = chosen.get("dataset", Settings.dataset)
    runs = convert(setting_fields()["num_runs"], chosen.get("num_runs", TrainingSettings.num_runs))
    if dataset not in EMBEDDED or runs % EMBEDDED_FOLDS or any(name in chosen for name in DIVIDING):
        return {}
    return {"folds": EMBEDDED_FOLDS}


def build_parser(description: str) -> Parser:
    """The parser of the experiment's command line."""
    parser = Parser(
        description=description.split("\n\n")[0],
        epilog=description[description.index("Exit status") :],
        allow_abbrev=False,
    )
    fields = setting_fields()
    for title, names in SECTIONS.items():
        section = parser.add_argument_group(title)
        for name in names:
            add_setting(section, fields[name])
        if title == "data":
            section.add_argument(
                "--config",
                metavar="FILE.yaml",
                help="settings from a file, named as the flags with _ for -; flags that are typed win",
            )
        if title == "splits, controls and tests":
            section.add_argument(
                "--thorough",
                action="store_true",
                help="what a paper needs beside the table: text_only, the table and 19 random halves by a "
                "linear classifier, nearest neighbours, metadata and norms, a gauge audit of 100 rows, "
                "smaller training sets; a flag or file that names one of these wins",
            )
        if title == "training":
            section.add_argument(
                "--quick", action="store_true", help="3 runs instead of 10; not together with --num-runs"
            )
        if title == "files":
            add_file_actions(section)
    add_workers(parser.add_argument_group("several devices and machines"))
    add_parts(parser.add_argument_group("a part of the experiment, beside other processes"))
    add_questions(parser.add_argument_group("questions, which run nothing"))
    return parser


def add_setting(section: argparse._ArgumentGroup, f: dataclasses.Field) -> None:
    """Add a setting's flag, with its default and its choices in the help text."""
    default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
    allowed = f.metadata["allowed"]
    choices = f": {', '.join(allowed)}" if isinstance(allowed, tuple) else ""
    shows_default = default != "" and f.default != allowed
    help = f"{f.metadata['help']}{choices}" + (f" (default: {default})" if shows_default else "")
    help = help.replace("%", "%%")
    if f.type == "bool":
        section.add_argument(
            flag(f.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help
        )
        return
    if not str(f.type).startswith("tuple"):
        metavar = {"int": "N", "float": "X"}.get(str(f.type), "TEXT")
        section.add_argument(flag(f.name), default=argparse.SUPPRESS, metavar=metavar, help=help)
        return
    may_be_bare = f.default == () and isinstance(allowed, tuple)
    section.add_argument(
        flag(f.name),
        nargs="*" if may_be_bare else "+",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=help + " (without names: all)" * may_be_bare,
    )


class UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key that stands twice. Plain YAML keeps the last one silently."""

    def construct_mapping(self, node, deep=False):
        """A mapping, after a check of its keys."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse("a key is a name", key_node)
            key = self.construct_object(key_node)
            if key in seen:
                self.refuse(f"'{key}' stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def refuse(self, problem: str, node: yaml.Node) -> NoReturn:
        """Raise the error that names a place in the file."""
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: str) -> dict[str, Any]:
    """The settings in a YAML file, unchecked. Raises InputError if it cannot be read or is not a mapping."""
    if not path:
        raise InputError("--config is empty: give the name of a YAML file")
    try:
        content = read_bytes(Path(path))
        if len(content) > CONFIG_BYTES:
            raise InputError(
                f"cannot read --config {path}: it has {len(content):,} bytes, a file of settings at most "
                f"{CONFIG_BYTES:,}"
            )
        stream = io.StringIO(content.decode())
        stream.name = path  # what errors call it
        values = yaml.load(stream, UniqueKeyLoader)  # a SafeLoader makes plain objects only
    except RecursionError:
        raise InputError(f"cannot read --config {path}: it is nested too deeply") from None
    except LookupError as error:  # a tag that forbids its value, such as !!bool maybe
        raise InputError(f"cannot read --config {path}: {error} is not what its tag says") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {path}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise InputError(f"--config {path} holds {kind}, not a mapping: write lines such as 'num_runs: 3'")
    return values


REFUSED_DEVICES = {  # kinds of device that torch has and this program does not use, with the reason
    "mps": "features are computed in float64, which MPS does not have",
    "xpu": "features are computed in float64, which some Intel GPUs do not have, and no result was checked "
    "on one",
}


def find_device(name: str) -> str:
    """The device that a setting names: cpu, cuda or cuda:N; `auto` is cuda if there is one, else cpu.
    Raises InputError if it is not there, or is of a kind that is not used.
    """
    if name in ("cpu", "cpu:0"):
        return "cpu"
    match = re.fullmatch(r"auto|(cuda|mps|xpu)(?::([0-9]{1,3}))?", name)
    if match is None:
        raise InputError(f"unknown --device '{shortened_text(name)}': use auto, cpu, cuda or cuda:N")
    kind, number = match.groups()
    if kind in REFUSED_DEVICES:
        raise InputError(
            f"--device {name} is refused: {REFUSED_DEVICES[kind]}; use auto, cpu, cuda or cuda:N"
        )
    # Without this setting cuBLAS may sum in another order when a command is run again.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if kind is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = torch.cuda.device_count()
    if int(number or 0) >= there:
        gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(there)]
        seen = ", ".join(["cpu", *gpus]) if gpus else "cpu alone"
        raise InputError(f"--device {name} is not there: torch sees {seen}")
    return name if number is None else f"cuda:{int(number)}"


def typed_command() -> str:
    """The command line of this process, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
