"""What trainers write into the header of a safetensors file besides the tensors: base model, steps, rates."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ablation.catalogue import TRAINING_COLUMN
from ablation.fields import InputError, shortened_text
from ablation.making.sidecars import short

ALL = "all"
# The columns of --header-columns all, and how each is read. Any other name can be asked for too.
HEADER_COLUMNS = {
    "modelspec.architecture": "text",
    "modelspec.title": "text",
    "ss_base_model_version": "text",
    "ss_clip_skip": "whole",
    "ss_epoch": "whole",
    "ss_learning_rate": "number",
    "ss_lr_scheduler": "text",
    "ss_max_train_steps": "whole",
    "ss_network_alpha": "number",
    "ss_network_dim": "whole",
    "ss_network_module": "text",
    "ss_num_epochs": "whole",
    "ss_num_train_images": "whole",
    "ss_optimizer": "text",
    "ss_output_name": "text",
    "ss_resolution": "text",
    "ss_sd_model_name": "text",
    "ss_seed": "whole",
    "ss_steps": "whole",
    "ss_tag_frequency": "tags",
    "ss_text_encoder_lr": "number",
    "ss_unet_lr": "number",
}
# Fields that tell the base model. Each is compared with itself alone, because they spell it differently.
BASE_FIELDS = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
SESSION_FIELDS = ("ss_session_id", "ss_training_started_at")  # kohya: alike in the files of one training
WRITTEN_ELSEWHERE = ("category_label", "lora_file", "lora_scale", "rank", "rank_error", TRAINING_COLUMN)
MOST_NAMES = 1000  # names of fields that are remembered to say which there are
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})(\.0*)?")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?")


def stated_in_header(path: Path) -> dict[str, str]:
    """The metadata in a file's header; {} if it has none, or if it is no safetensors file."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def header_values(stated: Mapping[str, str], columns: Iterable[str]) -> dict[str, Any]:
    """The values of some columns; a column that the header does not state, or states as None, is left out."""
    values = {}
    for column in columns:
        value = as_stated(stated.get(column, ""), HEADER_COLUMNS.get(column, "any"))
        if value is not None:
            values[column] = value
    return values


def as_stated(text: str, kind: str) -> Any:
    """A text of the header as text, whole number, number, number of tags, or any of these; None if it is
    none.
    """
    if text in ("", "None"):
        return None
    if kind == "tags":
        return count_of_tags(text)
    if kind in ("whole", "any") and WHOLE.fullmatch(text) and (kind == "whole" or "." not in text):
        return int(text.partition(".")[0])
    if kind in ("number", "any") and NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return short(text) if kind in ("text", "any") else None


def count_of_tags(text: str) -> int | None:
    """How many different tags `ss_tag_frequency` ({folder: {tag: images}}) has, or None."""
    try:
        return len(set().union(*(tags.keys() for tags in json.loads(text).values())))
    except (ValueError, AttributeError, RecursionError):
        return None


def chosen_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that --header-columns names. Raises InputError for a name that another column has."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name in WRITTEN_ELSEWHERE or ".lora." in name or not name:
            raise InputError(
                f"--header-columns '{name}' is a column that this program writes: choose others, such as "
                "ss_base_model_version, or all"
            )
    if ALL in chosen:
        chosen = [*HEADER_COLUMNS, *(name for name in chosen if name != ALL and name not in HEADER_COLUMNS)]
    return tuple(chosen)


@dataclass
class HeaderSurvey:
    """What the headers of the files that become rows state."""

    base_models: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> those of BASE_FIELDS
    sessions: dict[str, str] = field(default_factory=dict)  # file -> what tells its training
    names: set[str] = field(default_factory=set)  # of the fields in any header

    def add(self, name: str, stated: Mapping[str, str]) -> None:
        """Remember what the header of the file `name` states."""
        bases = {
            base: sys.intern(shortened_text(stated[base]))
            for base in BASE_FIELDS
            if as_stated(stated.get(base, ""), "text")
        }
        if bases:
            self.base_models[name] = bases
        session = [stated.get(part, "None") for part in SESSION_FIELDS]
        if not {"None", ""} & set(session):
            self.sessions[name] = shortened_text(json.dumps(session))
        if len(self.names) < MOST_NAMES:
            self.names.update(stated)

    def base_models_of(self, names: Iterable[str]) -> dict[str, dict[str, int]]:
        """How many of some files state each base model, for each of BASE_FIELDS that is stated."""
        counts: dict[str, dict[str, int]] = {}
        for name in names:
            for base, value in self.base_models.get(name, {}).items():
                of_base = counts.setdefault(base, {})
                of_base[value] = of_base.get(value, 0) + 1
        return counts

    def refuse_absent(self, columns: Iterable[str]) -> None:
        """Raise InputError for a column that was asked for by name and that no header states."""
        absent = [column for column in columns if column not in HEADER_COLUMNS and column not in self.names]
        if absent and len(self.names) < MOST_NAMES:
            there = ", ".join(sorted(self.names)[:20]) or "nothing"
            raise InputError(
                f"no file's header states '{absent[0]}', which --header-columns names; they state {there}"
            )
