"""Every setting of the experiment: name, type, default, unit and range in one place, checked where it enters.

Imports nothing heavy, so that --help and --status answer at once. The numbers of columns and the versions of the
representations stand here too, beside their names; a test ties them to the functions that compute them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml


class InputError(Exception):
    """Bad input or settings: one line that names the value, the choice and the remedy. Ends the program with status 2."""


KERNEL_ROWS = 20_000   # at most: a kernel holds a number for every row and training row


class Representation(NamedTuple):
    of: str               # what it is made from: each "layer", each "module", which is a down and its up, or the "row"
    width: int            # columns a layer or module; 0 of those that are fitted
    version: int          # raise it whenever a number changes: caches and checkpoints of the old version become stale
    options: tuple[str, ...] = ()   # the settings that change its numbers
    fitted: bool = False  # to the training rows: made when its cell runs, of as many columns as it finds, and not cached
    most_rows: float = math.inf     # of a data set
    control: bool = False           # of --controls alone, not a representation to choose


REPRESENTATIONS = {
    "simple_stats": Representation("layer", 5, 1),
    "rank_based": Representation("layer", 11, 1),
    "stats": Representation("layer", 7, 1),
    "spectral": Representation("layer", 32, 1),
    "matrix_norms": Representation("layer", 7, 1),
    "distribution": Representation("layer", 12, 1),
    "frequency": Representation("layer", 14, 1),
    "info_theoretic": Representation("layer", 2, 1),
    "ensemble": Representation("layer", 67, 1),
    "product_spectral": Representation("module", 32, 1),
    "product_norms": Representation("module", 7, 1),
    "product_moments": Representation("module", 4, 1),
    "product_quantiles": Representation("module", 18, 1),
    "product_sketch": Representation("module", 256, 1, options=("sketch_size",)),   # at the default size
    "product_directions": Representation("module", 128, 1),
    "pca": Representation("layer", 0, 1, options=("pca_components",), fitted=True),
    "centroid_cosine": Representation("module", 0, 1, fitted=True),
    "kernel_pca": Representation("module", 0, 1, options=("pca_components",), fitted=True, most_rows=KERNEL_ROWS),
    "kernel_ridge": Representation("module", 0, 1, fitted=True, most_rows=KERNEL_ROWS),
    "flat_vec": Representation("layer", 0, 1, fitted=True),
    "norms": Representation("layer", 1, 1, control=True),
    "metadata": Representation("row", 0, 1, fitted=True, control=True),
}
ENSEMBLE_PARTS = ("spectral", "matrix_norms", "distribution", "frequency", "info_theoretic")
CHOICES = {name: known for name, known in REPRESENTATIONS.items() if not known.control}
REPRESENTATION_GROUPS = {
    "nine": tuple(name for name, known in CHOICES.items() if known.of == "layer" and not known.fitted),
    "product": tuple(name for name, known in CHOICES.items() if known.of == "module" and not known.fitted),
    "fitted": tuple(name for name, known in CHOICES.items() if known.fitted),
    "all": tuple(CHOICES),
}
NINE = REPRESENTATION_GROUPS["nine"]

ATTENTION_KINDS = ("attn1", "attn2", "other")  # self-attention, cross-attention, neither


def parts_of(representation: str) -> tuple[str, ...]:
    """What is computed and cached for it: itself, or what it is joined or taken from."""
    return {"ensemble": ENSEMBLE_PARTS, "norms": ("simple_stats",)}.get(representation, (representation,))


class LayerSet(NamedTuple):
    title: str               # as in the progress summary
    kinds: tuple[str, ...]   # the attention kinds whose layers it keeps


LAYER_SETS = {
    "all_layers": LayerSet("All Layers", ATTENTION_KINDS),
    "visual_only": LayerSet("Visual-Only", ("attn1",)),
    "text_only": LayerSet("Text-Only", ("attn2",)),
}

CONTROL_SETS = {"down_only": "Down-Only", "up_only": "Up-Only", "no_layers": "No Layers"}   # of --controls alone
LAYER_SET_GROUPS = {"random_half": "Random Half", "by_block": "By Block"}   # several sets each, named after the group: random_half.3


def group_of(layer_set: str) -> str:
    """The group that a layer set belongs to, or '' for one that stands alone."""
    group = layer_set.split(".")[0]
    return group if group in LAYER_SET_GROUPS and layer_set != group else ""


def title_of(layer_set: str) -> str:
    """As in the progress summary: the sets of a group share it, one that a YAML file names has its name."""
    if group_of(layer_set):
        return LAYER_SET_GROUPS[group_of(layer_set)]
    return LAYER_SETS[layer_set].title if layer_set in LAYER_SETS else CONTROL_SETS.get(layer_set, layer_set)


INFERENCE_VERSION = 4   # raise it whenever a test, an interval or the verdict says something else of the same predictions
TRAINING_VERSION = 2  # raise it whenever training gives other numbers from the same settings

ALIASES = {
    "1k": "jacekduszenko/lora-ws-1k",
    "10k": "jacekduszenko/lora-ws-10k",
    "50k": "jacekduszenko/lora-ws-50k",
    "100k": "jacekduszenko/lora-ws-100k",
    "small": "jacekduszenko/weights-dataset-small",
}
DATASET_NAMES = (
    "1k, 10k, 50k, 100k, small, digits, sanity-check, a folder written by save_to_disk, "
    "a file or folder of Parquet or Arrow, or owner/name on the Hub"
)


GROUP_COLUMN = "category_name"   # used where a data set has it
AUDIT_VERSION = 1   # raise it whenever an audit gives other numbers
CLASSIFIER_VERSION = 1   # the same, of the classifiers beside the MLP


class AuditKind(NamedTuple):
    title: str            # as in the progress summary
    changed_rows: float   # about so many for each row of the data set


AUDITS = {"gauge": AuditKind("Gauge Audit", 1.0), "noise": AuditKind("Noise Audit", 0.8)}
SPLITS = ("random", "stratified", "grouped")
CLASSIFIERS = {"linear": "Linear Probe", "boosting": "Gradient Boosting"}   # beside the MLP
SHUFFLED = "shuffled"
CONTROLS = (SHUFFLED, "metadata", "norms", "down", "up")
METADATA_COLUMNS = ("num_images", "max_train_steps", "step_loss")   # where a data set has them
SUFFIXES = {"split": rf"(?:{'|'.join(SPLITS)})\d+", "classifier": "|".join(CLASSIFIERS), "labels": SHUFFLED, "audit": "|".join(AUDITS)}


class Cell(NamedTuple):
    """One number of the paper's table: a representation of a layer set. Or the same in another way, which is what its last fields say."""

    representation: str
    layer_set: str
    audit: str = ""        # scored on test rows that were changed
    split: str = ""        # a further one: random1, grouped0
    classifier: str = ""   # in place of the MLP
    labels: str = ""       # shuffled

    @property
    def name(self) -> str:
        """Stem of the cell's files: `all_layers_stats`, `all_layers_stats.gauge`, `all_layers_stats.random1.linear`."""
        return ".".join([f"{self.layer_set}_{self.representation}", *filter(None, (getattr(self, field) for field in SUFFIXES))])

    @classmethod
    def named(cls, name: str) -> Cell | None:
        """The cell whose files have this stem, or None if it is no cell's."""
        found = re.fullmatch("(.+?)" + "".join(rf"(?:\.(?P<{field}>{known}))?" for field, known in SUFFIXES.items()), name)
        if found is None:
            return None
        stem, ways = found.group(1), {field: way or "" for field, way in found.groupdict().items()}
        for representation in sorted(REPRESENTATIONS, key=len, reverse=True):            # simple_stats before stats
            layer_set = stem.removesuffix(f"_{representation}")
            if layer_set not in ("", stem):
                return cls(representation, layer_set, **ways)
        return None

    @property
    def trained(self) -> Cell:
        """The cell whose runs an audit scores; of that cell, itself."""
        return self._replace(audit="")

    @property
    def control(self) -> bool:
        """Of the null battery."""
        return bool(self.labels) or REPRESENTATIONS[self.representation].control or self.layer_set in CONTROL_SETS

    @property
    def plain(self) -> bool:
        """One of the table itself: by the MLP, of the first split."""
        return not (self.control or self.audit or self.split or self.classifier)

    @property
    def title(self) -> str:
        """As in the progress summary: of all cells of its kind."""
        if self.audit:
            return AUDITS[self.audit].title
        if self.control:
            return "Controls"
        return CLASSIFIERS[self.classifier] if self.classifier else "Further Splits" if self.split else f"{title_of(self.layer_set)} Config"


def cells_of(layer_sets, representations, audits=()) -> list[Cell]:
    """An audit stands right after the cell that it audits: they share the trained runs."""
    return [Cell(representation, layer_set, audit) for layer_set in layer_sets for representation in representations for audit in ("", *audits)]


@dataclass(frozen=True)
class Range:
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def setting(default, help, allowed=None, groups=None):
    """A field with its help text and what it may be: a Range, a tuple of choices, or None for anything of its type.

    `groups` are names that stand for several choices.
    """
    how = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return field(**how, metadata={"help": help, "allowed": allowed, "groups": groups or {}})


@dataclass(frozen=True)
class TrainingSettings:
    """Everything about training that can change a number in results.json."""

    num_runs: int = setting(10, "runs, with seeds seed .. seed + num_runs - 1", Range(1))
    seed: int = setting(42, "seed of the first run: initial weights, batch order, dropout", Range(0, 2**31))
    hidden_dim: int = setting(512, "units in each of the three hidden layers", Range(1))
    dropout: float = setting(0.5, "probability of zeroing a hidden unit", Range(0, 1, open_high=True))
    batch_size: int = setting(64, "rows a step (BatchNorm needs two)", Range(2))
    learning_rate: float = setting(1e-3, "Adam's first learning rate", Range(0, open_low=True))
    weight_decay: float = setting(1e-4, "L2 penalty added to the gradient", Range(0))
    max_epochs: int = setting(300, "epochs at most", Range(1))
    patience: int = setting(15, "epochs without a new best validation accuracy before a run stops", Range(1))
    trainer: str = setting(
        "auto", "one model after another, or all runs as one pack; auto: packed on a GPU, sequential on a CPU",
        ("auto", "sequential", "packed"),
    )
    precision: str = setting(
        "float32", "arithmetic of the matrix products while training; tf32 needs a GPU", ("float32", "tf32", "bfloat16")
    )

    def __post_init__(self):
        check_fields(self)

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.num_runs))


@dataclass(frozen=True)
class Settings:
    """What to read, what to compute, where to put it. `training` holds the rest."""

    dataset: str = setting("digits", f"data set: {DATASET_NAMES}")
    data_split: str = setting("", "split of the data set to read (default: train, or the only one there is)")
    revision: str = setting("", "branch, tag or commit of a data set on the Hub")
    label_column: str = setting("category_label", "column that holds the class: strings, integers or ClassLabel")
    representations: tuple[str, ...] = setting(
        NINE, f"which to compute; also {', '.join(REPRESENTATION_GROUPS)} for those of a kind", tuple(CHOICES), REPRESENTATION_GROUPS
    )
    layer_sets: tuple[str, ...] = setting(
        ("all_layers", "visual_only"), f"which to train on: {', '.join([*LAYER_SETS, *LAYER_SET_GROUPS])}, or a name of named_layer_sets"
    )
    named_layer_sets: dict = setting({}, "in a YAML file: a mapping of names to lists of shell patterns on layer names")
    random_halves: int = setting(5, "draws of random_half: of every block as many modules as visual_only has, of both kinds", Range(1, 100))
    split: tuple[str, ...] = setting(
        ("random",), "70/10/20 rows: random (the origin's), stratified by class, or grouped: no group of --group-column in two parts; the first "
        "is the one of the tables, others are set beside it", SPLITS,
    )
    num_splits: int = setting(1, "splits of each kind, with seeds split_seed .. split_seed + num_splits - 1; each has the same runs", Range(1, 1000))
    group_column: str = setting(GROUP_COLUMN, "column of what rows have in common (such as their images), where there is one")
    margin: float = setting(0.02, "accuracies that differ by less count as equal in the test of equivalence", Range(0, 1, open_low=True))
    audit: tuple[str, ...] = setting((), "score the trained runs on test rows whose weights are changed", tuple(AUDITS))
    controls: tuple[str, ...] = setting(
        (), "what must not, or should not, read the class as the weights do; also all: labels shuffled, metadata columns alone, norms of the "
        "layers alone, down or up matrices alone", CONTROLS, {"all": CONTROLS},
    )
    metadata_columns: tuple[str, ...] = setting((), f"numeric columns for the metadata control, besides {', '.join(METADATA_COLUMNS)}")
    classifiers: tuple[str, ...] = setting((), "beside the MLP: multinomial logistic regression, gradient boosting", tuple(CLASSIFIERS))
    sketch_size: int = setting(16, "rows and columns of product_sketch", Range(1, 64))
    pca_components: int = setting(128, "components of pca and kernel_pca, at most", Range(1))
    split_seed: int = setting(42, "seed of the 70/10/20 split", Range(0, 2**32, open_high=True))
    output_dir: str = setting("visual-ablation-results", "folder that gets visual_ablation_<data set>/")
    cache_features: bool = setting(True, "keep the computed features on disk")
    cache_dir: str = setting(".feature_cache", "folder of the feature cache")
    device: str = setting("auto", "auto (cuda if there is one), cpu, cuda or cuda:N")
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self):
        check_fields(self)
        for name in (f.name for f in dataclasses.fields(self) if f.type.startswith("tuple")):
            chosen = getattr(self, name)
            if len(set(chosen)) < len(chosen):
                raise InputError(f"{flag(name)} names one twice: {' '.join(chosen)}")
            if not chosen and name in ("representations", "layer_sets", "split"):
                raise InputError(f"{flag(name)} names nothing")
        for name, patterns in self.named_layer_sets.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*(_[A-Za-z0-9-]+)*", name) or name in (*LAYER_SETS, *LAYER_SET_GROUPS, *CONTROL_SETS):
                raise InputError(f"named_layer_sets: '{name}' is no name for a layer set: use letters, digits, - and _, and none of "
                                 + ", ".join([*LAYER_SETS, *LAYER_SET_GROUPS, *CONTROL_SETS]))
            if any(Cell.named(f"{name}_{known}") != Cell(known, name) for known in REPRESENTATIONS):   # x_simple, x_product
                raise InputError(f"named_layer_sets: the files of '{name}' would be taken for another representation's: choose another name")
            if not patterns:
                raise InputError(f"named_layer_sets: '{name}' has no pattern: give a list such as ['*.to_q.*']")
        for layer_set in self.layer_sets:
            if layer_set not in (*LAYER_SETS, *LAYER_SET_GROUPS, *self.named_layer_sets):
                known = ", ".join([*LAYER_SETS, *LAYER_SET_GROUPS, *self.named_layer_sets])
                raise InputError(f"unknown --layer-sets '{layer_set}': use {known}, or name one in named_layer_sets of a --config file")
        if {"down", "up"} & set(self.controls) and all(REPRESENTATIONS[name].of != "layer" for name in self.representations):
            raise InputError("--controls down and up need one of --representations that describes single layers")
        if self.classifiers and set(self.representations) == {"kernel_ridge"}:
            raise InputError("--classifiers need one of --representations besides kernel_ridge, which is a classifier itself")
        for name in ("dataset", "label_column", "output_dir", "cache_dir"):
            if not getattr(self, name):
                raise InputError(f"{flag(name)} is empty: give a name")

    def cells(self, layer_sets: list[str]) -> list[Cell]:
        """Of these layer sets, the settings' own with their groups expanded (lora_data.expand_layer_sets)."""
        table = cells_of(layer_sets, self.representations)
        further = [cell._replace(split=split) for split in self.splits if split for cell in table]
        others = [cell._replace(classifier=classifier) for classifier in self.classifiers for cell in table + further
                  if cell.representation != "kernel_ridge"]              # is a classifier itself
        return cells_of(layer_sets, self.representations, self.audit) + further + others + self.control_cells(layer_sets)

    def control_cells(self, layer_sets: list[str]) -> list[Cell]:
        """The null battery, of the layer sets that stand alone."""
        alone = [layer_set for layer_set in layer_sets if not group_of(layer_set)]
        layers = [name for name in self.representations if REPRESENTATIONS[name].of == "layer"]
        cells = {
            SHUFFLED: [cell._replace(labels=SHUFFLED) for cell in cells_of(alone, self.representations)],
            "metadata": [Cell("metadata", "no_layers")],
            "norms": cells_of(alone, ["norms"]),
            "down": cells_of(["down_only"], layers),
            "up": cells_of(["up_only"], layers),
        }
        return [cell for control in CONTROLS if control in self.controls for cell in cells[control]]

    @property
    def splits(self) -> list[str]:
        """Names of the splits, as in a cell; the first one's is ''."""
        return ["" if (kind, number) == (self.split[0], 0) else f"{kind}{number}" for kind in self.split for number in range(self.num_splits)]

    def split_of(self, name: str) -> tuple[str, int]:
        """Kind and seed of the split of that name, whether these settings ask for it or not."""
        kind = name.rstrip("0123456789")
        return (kind, self.split_seed + int(name[len(kind):])) if name else (self.split[0], self.split_seed)

    def width_of(self, representation: str) -> int:
        """Columns a layer or module."""
        return self.sketch_size**2 if representation == "product_sketch" else REPRESENTATIONS[representation].width

    def options_of(self, representation: str) -> dict:
        """The settings that change a representation's numbers."""
        return {option: getattr(self, option) for option in REPRESENTATIONS[representation].options}

    @property
    def short_name(self) -> str:
        """The alias, or the last part of the data set's path; of `.` and the like, the folder's own name."""
        last = self.dataset.rstrip("/").split("/")[-1]
        return last if last not in ("", ".", "..", "~") else Path(self.dataset).expanduser().resolve().name or "root"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def setting_fields() -> dict[str, dataclasses.Field]:
    """Every setting by name, in the order of --help."""
    fields = (*dataclasses.fields(Settings), *dataclasses.fields(TrainingSettings))
    return {f.name: f for f in fields if f.name != "training"}


def build_settings(values: dict, source: str = "the command line") -> Settings:
    """Settings from a flat mapping of names to values; text is converted to the setting's type.

    Raises InputError for an unknown name, a value of the wrong type or out of range, naming `source`.
    """
    known = setting_fields()
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(known)
            raise InputError(f"unknown setting '{name}' in {source}: {hint}")
    training = {f.name for f in dataclasses.fields(TrainingSettings)}
    try:
        converted = {name: convert(known[name], value) for name, value in values.items()}
        return Settings(
            training=TrainingSettings(**{k: v for k, v in converted.items() if k in training}),
            **{k: v for k, v in converted.items() if k not in training},
        )
    except InputError as error:
        raise InputError(f"{error} (from {source})" if source != "the command line" else str(error)) from None


def convert(f: dataclasses.Field, value):
    """A value from the command line or YAML (which reads 1e-4 as text) as the field's type; InputError if it is not one."""
    try:
        if f.type == "int" and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(float(value))
        if f.type == "float" and not isinstance(value, bool):
            return float(value)
        if f.type == "bool" and isinstance(value, bool):
            return value
        if f.type == "str" and isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        if f.type == "dict" and isinstance(value, dict):
            return {str(name): (patterns,) if isinstance(patterns, str) else tuple(map(str, patterns)) for name, patterns in value.items()}
        if f.type == "tuple[str, ...]":
            names = (value,) if isinstance(value, str) else tuple(map(str, value))
            groups = f.metadata["groups"]
            several = [part for name in names for part in groups.get(name, (name,))]
            return tuple(dict.fromkeys(several) if groups.keys() & set(names) else several)
    except (TypeError, ValueError, OverflowError):
        pass
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping of names to lists"}
    kind = kinds.get(f.type, "a list of names")
    raise InputError(f"{flag(f.name)} {value!r} is not {kind}: {f.metadata['help']}")


def check_fields(settings) -> None:
    """Raise InputError unless every field of the dataclass is among what it may be."""
    for f in dataclasses.fields(settings):
        allowed, value = f.metadata.get("allowed"), getattr(settings, f.name)
        if isinstance(allowed, Range) and not (math.isfinite(value) and value in allowed):
            raise InputError(f"{flag(f.name)} {value} is out of range: use a value {allowed} ({f.metadata['help']})")
        if isinstance(allowed, tuple):
            for one in value if isinstance(value, tuple) else (value,):
                if one not in allowed:
                    raise InputError(f"unknown {flag(f.name)} '{one}': use {', '.join([*f.metadata['groups'], *allowed])}")


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not the last one's."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """The settings in a YAML file, unchecked. Raises InputError if it cannot be read or is not a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, UniqueKeys)   # a SafeLoader: no objects but plain ones
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {path}: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds {type(values).__name__}, not a mapping: write lines such as 'num_runs: 3'")
    return values
