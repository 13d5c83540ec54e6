"""Every setting of the experiment: name, type, default,
unit and range in one place, checked where it enters. (Over 400 lines, because they are one list.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ablation.catalogue import (
    ARCHITECTURES,
    AUDITS,
    AUTO,
    CHOICES,
    CLASSIFIERS,
    CONTROL_SETS,
    CONTROLS,
    DATASET_NAMES,
    GROUP_COLUMN,
    LAYER_SET_GROUPS,
    LAYER_SETS,
    METADATA_COLUMNS,
    NINE,
    REPRESENTATION_GROUPS,
    SPECS,
    SPLITS,
)
from ablation.fields import MANY, InputError, Range, flag, is_utf8, setting, shortened_text

LONGEST_NAME = 60  # characters of a layer set's name, which becomes a part of file names


@dataclass(frozen=True)
class TrainingSettings:
    """Everything about training that can change a number in results.json."""

    num_runs: int = setting(10, "runs, with seeds seed .. seed + num_runs - 1", Range(1, 100_000))
    seed: int = setting(42, "seed of the first run: initial weights, batch order, dropout", Range(0, 2**31))
    hidden_dim: int = setting(512, "units in each of the three hidden layers", Range(1, 65_536))
    dropout: float = setting(0.5, "probability of zeroing a hidden unit", Range(0, 1, open_high=True))
    batch_size: int = setting(64, "rows a step (BatchNorm needs two)", Range(2, MANY))
    learning_rate: float = setting(1e-3, "Adam's first learning rate", Range(0, open_low=True))
    weight_decay: float = setting(1e-4, "L2 penalty added to the gradient", Range(0))
    max_epochs: int = setting(300, "epochs at most", Range(1, MANY))
    patience: int = setting(
        15, "epochs without a new best validation accuracy before a run stops", Range(1, MANY)
    )
    trainer: str = setting(
        "auto",
        "train one model after another, or all runs as one pack; auto: packed on a GPU, sequential on a CPU",
        ("auto", "sequential", "packed"),
    )
    precision: str = setting(
        "float32",
        "arithmetic of the matrix products while training; tf32 needs a GPU",
        ("float32", "tf32", "bfloat16"),
    )

    def __post_init__(self):
        check_fields(self)

    @property
    def seeds(self) -> list[int]:
        """One seed for each run."""
        return list(range(self.seed, self.seed + self.num_runs))


@dataclass(frozen=True)
class Settings:
    """What to read, what to compute, where to put it. `training` holds the rest.

    One class of many fields, because they are one flat set of names: the flags, the keys of a YAML file and
    `settings` of results.json. Nothing below the command line takes it whole for a field or two.
    """

    dataset: str = setting("digits", f"data set: {DATASET_NAMES}")
    data_split: str = setting("", "split of the data set to read (default: train, or the only one there is)")
    revision: str = setting("", "branch, tag or commit of a data set on the Hub")
    streaming: bool = setting(
        False,
        "read Parquet shards one after another, from the Hub without a copy here, and keep features alone",
    )
    label_column: str = setting(
        "category_label", "column that holds the class: strings, integers or ClassLabel"
    )
    representations: tuple[str, ...] = setting(
        NINE,
        f"which to compute; also {', '.join(REPRESENTATION_GROUPS)} for those of a kind",
        tuple(CHOICES),
        REPRESENTATION_GROUPS,
    )
    layer_sets: tuple[str, ...] = setting(
        ("all_layers", "visual_only"),
        f"which to train on: {', '.join([*LAYER_SETS, *LAYER_SET_GROUPS])}, or a name of named_layer_sets",
    )
    named_layer_sets: dict = setting(
        {}, "in a YAML file: a mapping of names to lists of shell patterns on layer names"
    )
    architecture: str = setting(
        AUTO,
        "the model that was adapted, which tells visual layers from text layers; auto: by the layers' names",
        (AUTO, *ARCHITECTURES),
    )
    layer_sides: dict = setting({}, "in a YAML file: shell patterns on layer names, for visual and for text")
    random_halves: int = setting(
        5,
        "draws of random_half: as many modules of each block as visual_only has, of both kinds",
        Range(1, 100),
    )
    halves_by: str = setting(
        "mlp",
        "what reads random_half: the MLP, or one of --classifiers, which is much faster",
        ("mlp", *CLASSIFIERS),
    )
    split: tuple[str, ...] = setting(
        ("random",),
        "70/10/20 rows: random (the origin's), stratified by class, or grouped (no group of --group-column "
        "in two parts); the tables show the first, further kinds are set beside it; auto, for --folds: "
        "grouped where there are groups, else stratified",
        (*SPLITS, AUTO),
    )
    folds: int = setting(
        0,
        "cross-validation: every row is tested once in each of so many folds; 0: one split of 70/10/20; "
        "without this flag 5 for the embedded digits",
        Range(0, MANY),
    )
    repeats: int = setting(
        0,
        "partitions of the rows into folds, over which the runs are spread; 0: each run of a fold its own",
        Range(0, 100_000),
    )
    num_splits: int = setting(
        1,
        "splits of each kind, with seeds split_seed .. split_seed + num_splits - 1; each has the same runs",
        Range(1, 1000),
    )
    group_column: str = setting(
        GROUP_COLUMN, "column of what rows have in common (such as their images), where there is one"
    )
    margin: float = setting(
        0.02,
        "accuracies that differ by less count as equal in the test of equivalence",
        Range(0, 1, open_low=True),
    )
    margin_share: float = setting(
        0.0,
        "the margin as a share of the accuracy above chance with all layers, in place of --margin",
        Range(0, 1, open_high=True),
    )
    audit: tuple[str, ...] = setting(
        (), "score the trained runs on test rows whose weights are changed", tuple(AUDITS)
    )
    audit_rows: int = setting(0, "test rows that an audit changes, at most; 0: all", Range(0, MANY))
    controls: tuple[str, ...] = setting(
        (),
        "cells that should not read the class as the weights do, or that show what else reads it; also all: "
        "labels shuffled, metadata columns alone, norms of the layers alone, down or up matrices alone",
        CONTROLS,
        {"all": CONTROLS},
    )
    metadata_columns: tuple[str, ...] = setting(
        (), f"numeric columns for the metadata control, besides {', '.join(METADATA_COLUMNS)}"
    )
    classifiers: tuple[str, ...] = setting(
        (),
        "beside the MLP: multinomial logistic regression, gradient boosting, the nearest training row",
        tuple(CLASSIFIERS),
    )
    train_fractions: tuple[str, ...] = setting(
        (), "shares of the training rows to train on too, such as 0.25 0.5 1: does the drop depend on them?"
    )
    sketch_size: int = setting(16, "rows and columns of product_sketch", Range(1, 64))
    pca_components: int = setting(128, "components of pca and kernel_pca, at most", Range(1, MANY))
    split_seed: int = setting(42, "seed of the 70/10/20 split", Range(0, 2**32, open_high=True))
    output_dir: str = setting("visual-ablation-results", "folder that gets visual_ablation_<data set>/")
    cache_features: bool = setting(True, "keep the computed features on disk")
    cache_dir: str = setting(".feature_cache", "folder of the feature cache")
    cache_dtype: str = setting(
        "float32",
        "how features are stored; float16 takes half of the disk and int8 a quarter, and both change numbers",
        ("float32", "float16", "int8"),
    )
    memory_gb: float = setting(
        0.0,
        "GB that a cell's columns may take in all their copies; more are read from disk batch by batch, with "
        "the same numbers; 0: what is free",
        Range(0),
    )
    ray_cpus: float = setting(1.0, "CPUs that a task of --ray takes", Range(0, open_low=True))
    ray_gpus: float = setting(1.0, "GPUs that a task of --ray takes, where the cluster has any", Range(0))
    device: str = setting("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self):
        check_fields(self)
        check_texts(self)
        check_lists(self)
        check_named_layer_sets(self.named_layer_sets)
        check_layer_sides(self)
        check_layer_sets(self)
        check_folds(self)
        check_fractions(self.train_fractions)
        if self.cache_dtype != "float32" and (self.audit or not self.cache_features):
            raise InputError(
                f"--cache-dtype {self.cache_dtype} goes neither with --audit, which measures smaller changes "
                "than its rounding, nor with --no-cache-features: use float32"
            )
        if {"down", "up"} & set(self.controls) and not self.representations_of("layer"):
            raise InputError(
                "--controls down and up need one of --representations that describes single layers"
            )
        if self.classifiers and all(SPECS[name].classifier for name in self.representations):
            raise InputError(
                "--classifiers need one of --representations besides kernel_ridge, which is a classifier "
                "itself"
            )
        for name in ("dataset", "label_column", "output_dir", "cache_dir"):
            if not getattr(self, name):
                raise InputError(f"{flag(name)} is empty: give a name")

    def representations_of(self, source: str) -> list[str]:
        """The chosen representations that describe a "layer", or a "module"."""
        return [name for name in self.representations if SPECS[name].source == source]

    def width_of(self, representation: str) -> int:
        """Columns of one layer or module."""
        if representation == "product_sketch":
            return self.sketch_size**2
        return SPECS[representation].width

    def options_of(self, representation: str) -> dict:
        """The settings that change a representation's numbers."""
        return {option: getattr(self, option) for option in SPECS[representation].options}

    @property
    def partitions(self) -> int:
        """Partitions of the rows into folds."""
        return self.repeats or max(1, self.training.num_runs // self.folds) if self.folds else 1

    @property
    def fractions(self) -> list[str]:
        """Smaller training sets as cells bear them: train25 for 0.25; the whole one is the table's own."""
        percents = sorted(round(100 * float(share)) for share in self.train_fractions)
        return [f"train{percent}" for percent in percents if percent < 100]

    @property
    def short_name(self) -> str:
        """The alias, or the last part of the data set's path; for `.` and the like the folder's own name."""
        last = self.dataset.rstrip("/").split("/")[-1]
        if last not in ("", ".", "..", "~"):
            return last
        return Path(self.dataset).expanduser().resolve().name or "root"

    @property
    def output_folder(self) -> Path:
        """The folder that gets the results of this data set."""
        return Path(self.output_dir).expanduser() / f"visual_ablation_{self.short_name}"

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the feature cache, or None without a cache."""
        return Path(self.cache_dir).expanduser() if self.cache_features else None


def setting_fields() -> dict[str, dataclasses.Field]:
    """Every setting by name, in the order of --help."""
    fields = (*dataclasses.fields(Settings), *dataclasses.fields(TrainingSettings))
    return {f.name: f for f in fields if f.name != "training"}


# --- checks


def check_fields(settings: Settings | TrainingSettings) -> None:
    """Raise InputError unless every field of the dataclass has an allowed value."""
    for f in dataclasses.fields(settings):
        allowed, value = f.metadata.get("allowed"), getattr(settings, f.name)
        if isinstance(allowed, Range) and not (value in allowed and abs(value) < math.inf):
            raise InputError(
                f"{flag(f.name)} {shortened_text(value)} is out of range: use a value {allowed} "
                f"({f.metadata['help']})"
            )
        if isinstance(allowed, tuple):
            for choice in value if isinstance(value, tuple) else (value,):
                if choice not in allowed:
                    choices = ", ".join([*f.metadata["groups"], *allowed])
                    raise InputError(f"unknown {flag(f.name)} '{shortened_text(choice)}': use {choices}")


def check_texts(settings: Settings) -> None:
    """Raise InputError for a name that cannot be written to a file as UTF-8, or that holds a NUL."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and "\0" in text:
                raise InputError(f"{flag(f.name)} {shortened_text(text)!r} holds a NUL: leave it out")
            if isinstance(text, str) and not is_utf8(text):
                raise InputError(
                    f"{flag(f.name)} {shortened_text(text)!r} cannot be written as UTF-8: rename it, or set "
                    "PYTHONUTF8=1 if it is UTF-8, because this process reads names in another encoding"
                )
    for name in ("output_dir", "cache_dir"):
        try:
            Path(getattr(settings, name)).expanduser()
        except RuntimeError:
            raise InputError(f"{flag(name)} {getattr(settings, name)}: there is no such user") from None
    if not is_utf8(settings.short_name):
        raise InputError(
            f"--dataset {settings.dataset}: the name of that folder, {settings.short_name!r}, cannot be "
            "written as UTF-8: rename it"
        )


def check_lists(settings: Settings) -> None:
    """Raise InputError for a list that names a choice twice, or that is empty and must not be."""
    for f in dataclasses.fields(settings):
        chosen = getattr(settings, f.name)
        if not isinstance(chosen, tuple):
            continue
        if len(set(chosen)) < len(chosen):
            raise InputError(f"{flag(f.name)} names one twice: {shortened_text(' '.join(chosen))}")
        if not chosen and f.name in ("representations", "layer_sets", "split"):
            raise InputError(f"{flag(f.name)} names nothing")


def check_named_layer_sets(named: Mapping[str, tuple[str, ...]]) -> None:
    """Raise InputError unless each name can stand in a file's name and has at least one pattern."""
    taken = [*LAYER_SETS, *LAYER_SET_GROUPS, *CONTROL_SETS]
    for name, patterns in named.items():
        if len(name) > LONGEST_NAME:
            raise InputError(
                f"named_layer_sets: '{shortened_text(name)}' is too long for a file's name: use at most "
                f"{LONGEST_NAME} characters"
            )
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*", name) or name in taken:
            raise InputError(
                f"named_layer_sets: '{name}' is no name for a layer set: use letters, digits, - and _, and "
                "none of " + ", ".join(taken)
            )
        if any(name.endswith(f"_{prefix}") for prefix in ambiguous_prefixes()):
            raise InputError(
                f"named_layer_sets: the files of '{name}' would be taken for another representation's: "
                "choose another name"
            )
        if not patterns:
            raise InputError(f"named_layer_sets: '{name}' has no pattern: give a list such as ['*.to_q.*']")


def check_layer_sides(settings: Settings) -> None:
    """Raise InputError unless layer_sides has patterns for visual, text or both, and is the only say."""
    for side, patterns in settings.layer_sides.items():
        if side not in ("visual", "text") or not patterns:
            example = "{visual: ['*.self_attn.*'], text: ['*.cross_attn.*']}"
            raise InputError(
                f"layer_sides: '{shortened_text(side)}': give visual or text patterns: {example}"
            )
    if settings.layer_sides and settings.architecture != AUTO:
        raise InputError("--architecture and layer_sides both say which layers are visual: leave one out")


def ambiguous_prefixes() -> set[str]:
    """Prefixes that make one representation's name another's:
    `simple`, because simple_stats ends with stats.
    """
    return {
        longer.removesuffix(f"_{shorter}")
        for longer in SPECS
        for shorter in SPECS
        if longer.endswith(f"_{shorter}")
    }


def check_folds(settings: Settings) -> None:
    """Raise InputError unless the runs can be spread evenly over the folds of --folds and their repeats."""
    folds, repeats, runs = settings.folds, settings.repeats, settings.training.num_runs
    if folds == 0:
        if repeats or AUTO in settings.split:
            raise InputError("--repeats and --split auto go with --folds")
        return
    if folds == 1:
        raise InputError("--folds 1 leaves no row to train on: use 2 or more")
    if AUTO in settings.split and len(settings.split) > 1:
        raise InputError("--split auto stands alone: name the kinds, such as --split grouped random")
    if settings.num_splits > 1:
        raise InputError("--num-splits does not go with --folds: --repeats divides the rows again")
    step = folds * max(1, repeats)
    if runs % step:
        below, above = runs // step * step, (runs // step + 1) * step
        nearest = f"{below} or {above}" if below else f"{above}"
        what = f"--folds {folds}" + (f" --repeats {repeats}" if repeats else "")
        raise InputError(f"--num-runs {runs} cannot be spread evenly over {what}: use {nearest}")


def check_fractions(shares: tuple[str, ...]) -> None:
    """Raise InputError unless the shares are whole percents above 0 and at most 1."""
    for share in shares:
        try:
            percent = 100 * float(share)
        except ValueError:
            percent = math.nan
        if not (1 <= percent <= 100 and math.isclose(percent, round(percent), abs_tol=1e-6)):
            raise InputError(
                f"--train-fractions {shortened_text(share)} is no share of the training rows: use numbers "
                "such as 0.25, at most 1, in whole percents"
            )


def check_layer_sets(settings: Settings) -> None:
    """Raise InputError for a layer set that neither the catalogue nor the YAML file names."""
    known = [*LAYER_SETS, *LAYER_SET_GROUPS, *settings.named_layer_sets]
    for layer_set in settings.layer_sets:
        if layer_set not in known:
            raise InputError(
                f"unknown --layer-sets '{shortened_text(layer_set)}': use {', '.join(known)}, "
                "or name one in named_layer_sets of a --config file"
            )
