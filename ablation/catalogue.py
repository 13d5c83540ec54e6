"""Everything that can be chosen by name: representations,
layer sets, comparisons, splits, controls, data sets.

This module imports nothing heavy, so that --help, --status and --dry-run answer at once. A representation is
computed by the function of the same name in `representations.py` or `fitted.py`; a test ties each entry here
to its function and to the number of columns that the function returns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

# --- representations

MAX_KERNEL_ROWS = 20_000  # a kernel holds one number for every pair of a row and a training row


class Representation(NamedTuple):
    """How a representation is made. Raise `version` whenever a number changes: old caches become stale."""

    source: str  # one vector for each "layer", for each "module" (a down and an up matrix), or for each "row"
    width: int  # columns of a layer or module; 0 where the training rows decide
    version: int
    options: tuple[str, ...] = ()  # names of the settings that change the numbers
    fitted: bool = False  # fitted to the training rows of a cell, so computed with the cell
    max_rows: float = math.inf  # of a data set
    control: bool = False  # belongs to --controls and cannot be chosen with --representations
    classifier: str = ""  # the classifier that reads it in place of the MLP


SPECS = {  # of every representation, by name
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
    "product_sketch": Representation(
        "module", 256, 1, options=("sketch_size",)
    ),  # at the default sketch_size
    "product_directions": Representation("module", 128, 1),
    "pca": Representation("layer", 0, 2, options=("pca_components",), fitted=True),
    "centroid_cosine": Representation("module", 0, 1, fitted=True),
    "kernel_pca": Representation(
        "module", 0, 2, options=("pca_components",), fitted=True, max_rows=MAX_KERNEL_ROWS
    ),
    "kernel_ridge": Representation(
        "module", 0, 2, fitted=True, max_rows=MAX_KERNEL_ROWS, classifier="kernel_ridge"
    ),
    "flat_vec": Representation("layer", 0, 1, fitted=True),
    "norms": Representation("layer", 1, 1, control=True),
    "metadata": Representation("row", 0, 1, fitted=True, control=True),
}
# The experiment's own nine, which are computed without --representations. A new representation does not
# join them.
NINE = (
    "simple_stats",
    "rank_based",
    "stats",
    "spectral",
    "matrix_norms",
    "distribution",
    "frequency",
    "info_theoretic",
    "ensemble",
)
ENSEMBLE_MEMBERS = ("spectral", "matrix_norms", "distribution", "frequency", "info_theoretic")
# Fitted representations that are cached by split: flat_vec is the data set itself, metadata takes no time.
CACHED_FITS = ("pca", "centroid_cosine", "kernel_pca", "kernel_ridge")
CHOICES = {name: spec for name, spec in SPECS.items() if not spec.control}
REPRESENTATION_GROUPS = {
    "nine": NINE,
    "product": tuple(name for name, spec in CHOICES.items() if spec.source == "module" and not spec.fitted),
    "fitted": tuple(name for name, spec in CHOICES.items() if spec.fitted),
    "all": tuple(CHOICES),
}


def components_of(representation: str) -> tuple[str, ...]:
    """Names of the representations that are computed and cached for this one:
    itself, or those it is built from.
    """
    return {"ensemble": ENSEMBLE_MEMBERS, "norms": ("simple_stats",)}.get(representation, (representation,))


NULL_PRODUCT = "product_sketch"  # which the null's reader takes besides the table's, because it reads most

# --- layer sets

LAYER_KINDS = ("visual", "text", "other")  # what a layer acts on; other: both, or neither
# What --architecture takes, and its name in sentences; architectures.py says which layers are of which kind.
ARCHITECTURES = {
    "sd": "Stable Diffusion 1, 2 or XL",
    "flux": "Flux 1",
    "sd3": "Stable Diffusion 3",
    "hunyuan-video": "Hunyuan-Video",
    "qwen-image": "Qwen-Image",
    "mochi": "Mochi",
    "wan": "Wan",
    "ltx": "LTX-Video",
    "pixart": "PixArt",
    "sana": "Sana",
    "lumina": "Lumina-Next",
    "lumina2": "Lumina 2",
    "z-image": "Z-Image",
    "cogvideox": "CogVideoX",
    "krea2": "Krea 2",
    "qwen-image-2.1": "Qwen-Image 2.1",
    "language-model": "language model",
}


class LayerSet(NamedTuple):
    """Which layers a cell sees: those of the kinds `kinds` and, if given, of one `side` of the modules."""

    title: str  # in the progress summary
    kinds: tuple[str, ...] = LAYER_KINDS
    side: str = ""  # "down" or "up"
    words: str = ""  # in sentences, where the name with spaces would not do


LAYER_SETS = {
    "all_layers": LayerSet("All Layers"),
    "visual_only": LayerSet("Visual-Only", ("visual",), words="the visual layers"),
    "text_only": LayerSet("Text-Only", ("text",), words="the text layers"),
}
CONTROL_SETS = {  # of --controls alone
    "down_only": LayerSet("Down-Only", side="down"),
    "up_only": LayerSet("Up-Only", side="up"),
    "no_layers": LayerSet("No Layers", ()),
}
# Each of these names stands for several layer sets, called random_half.0, random_half.1,
# by_block.mid_block...attn1
LAYER_SET_GROUPS = {"random_half": "Random Half", "by_block": "By Block"}
NEED_KINDS = ("visual_only", "text_only", *LAYER_SET_GROUPS)  # not possible for an unknown architecture


def group_of(layer_set: str) -> str:
    """The group of a layer set such as `random_half.3`,
    here `random_half`; '' for a set that is in no group.
    """
    group = layer_set.split(".")[0]
    return group if group in LAYER_SET_GROUPS and layer_set != group else ""


def title_of(layer_set: str) -> str:
    """The title of a layer set in the progress summary:
    its group's, its own, or the name that a YAML file gave it.
    """
    if group_of(layer_set):
        return LAYER_SET_GROUPS[group_of(layer_set)]
    known = LAYER_SETS | CONTROL_SETS
    return known[layer_set].title if layer_set in known else layer_set


def words_of(layer_set: str) -> str:
    """A layer set as sentences name it: `all layers`, `the visual layers`."""
    known = LAYER_SETS | CONTROL_SETS
    return (known[layer_set].words if layer_set in known else "") or layer_set.replace("_", " ")


class Comparison(NamedTuple):
    """Two layer sets whose test accuracies are compared.
    The drop is that of `first` minus that of `second`.
    """

    first: str
    second: str
    removed: str  # what `second` lacks of `first`, as sentences name it

    def found_in(self, inference: dict[str, Any]) -> dict[str, Any]:
        """What the inference found: `entries` by representation and their `mean`, which is None if it has
        none. Without entries if the two were not compared.
        """
        for found in inference.get("comparisons", []):
            if (found["first"], found["second"]) == (self.first, self.second):
                return found
        return {"mean": None, "entries": []}

    def entries_in(self, inference: dict[str, Any]) -> list[dict[str, Any]]:
        """What the inference found of each representation; [] if the two were not compared."""
        return self.found_in(inference)["entries"]


# The experiment's question, and the same with layer sets of equally many modules.
MAIN_COMPARISON = Comparison("all_layers", "visual_only", "the text layers")
VISUAL_TEXT_COMPARISON = Comparison("visual_only", "text_only", "")
SIZE_MATCHED_COMPARISON = Comparison("random_half", "visual_only", "")
# The null's reader takes these sets, and so many random halves: one place in 200 is the rarest.
NULL_SETS = (MAIN_COMPARISON.first, MAIN_COMPARISON.second, VISUAL_TEXT_COMPARISON.second)
NULL_HALVES = 199
COMPARISONS = (
    MAIN_COMPARISON,
    Comparison("all_layers", "text_only", "the visual layers"),
    VISUAL_TEXT_COMPARISON,
    Comparison("all_layers", "random_half", "half of the modules"),
    SIZE_MATCHED_COMPARISON,
)

# --- splits, audits, controls, classifiers

PARTS = ("train", "val", "test")  # of a split
NEIGHBOURS = "neighbours"  # among a run's predictions: the nearest training row of each test row
SPLITS = ("random", "stratified", "grouped")
AUTO = "auto"  # with --folds: grouped where there are groups, else stratified
GROUP_COLUMN = "category_name"  # used where a data set has it
# Used in its place where a data set has only this one: checkpoints of one training have the same value.
TRAINING_COLUMN = "training"


class AuditKind(NamedTuple):
    """An audit scores trained runs on rows whose weights are changed."""

    title: str  # in the progress summary
    changed_rows: float  # about how many changed rows there are for each row of the data set


AUDITS = {"gauge": AuditKind("Gauge Audit", 1.0), "noise": AuditKind("Noise Audit", 0.8)}
CLASSIFIERS = {  # beside the MLP
    "linear": "Linear Probe",
    "boosting": "Gradient Boosting",
    "nearest": "Nearest Neighbour",
}
# Rows times rows times columns that `nearest` takes: about ten minutes on two cores.
MAX_NEAREST_PRODUCTS = 7e13
SHUFFLED = "shuffled"
CONTROLS = (SHUFFLED, "metadata", "norms", "down", "up")
METADATA_COLUMNS = ("num_images", "max_train_steps", "step_loss")  # used where a data set has them

# What --thorough asks for, where no flag and no file says otherwise.
THOROUGH = {
    "layer_sets": ["all_layers", "visual_only", "text_only", "random_half"],
    "random_halves": 19,
    "halves_by": "linear",
    "classifiers": ["linear", "nearest"],
    "controls": ["metadata", "norms"],
    "audit": ["gauge"],
    "audit_rows": 100,
    "train_fractions": ["0.25", "0.5", "1"],
}

# --- data sets

ALIASES = {
    "1k": "jacekduszenko/lora-ws-1k",
    "10k": "jacekduszenko/lora-ws-10k",
    "50k": "jacekduszenko/lora-ws-50k",
    "100k": "jacekduszenko/lora-ws-100k",
    "small": "jacekduszenko/weights-dataset-small",
}
EMBEDDED = {"digits": "digits.parquet", "digits-named": "digits_named.parquet"}  # in data/
# Embedded collections are cross-validated unless the user says how their rows are divided, because one test
# set of their size cannot decide the question.
EMBEDDED_FOLDS = 5
DIVIDING = ("folds", "repeats", "split", "num_splits")  # settings that say how rows are divided
DATASET_NAMES = (
    "1k, 10k, 50k, 100k, small, digits, digits-named, sanity-check, a folder written by save_to_disk, "
    "a file or folder of Parquet or Arrow, or owner/name on the Hub"
)

# --- versions: raise one whenever the same input gives other numbers

TRAINING_VERSION = 2
AUDIT_VERSION = 1
# kernel_ridge has the version of its representation.
CLASSIFIER_VERSIONS = {"linear": 1, "boosting": 2, "nearest": 1}
NULL_VERSION = 1
INFERENCE_VERSION = 10  # also when the verdict says something else of the same predictions
