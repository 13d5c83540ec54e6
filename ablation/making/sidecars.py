"""Files beside an adapter that describe it: metadata.json, and those that downloaders of Civitai write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ablation.adapter_kinds import BadFile
from ablation.fields import is_utf8, shortened_text

LARGEST_SIDECAR = 64_000_000  # bytes; Civitai's are below 1 MB
LONGEST_TEXT = 500  # characters of a text column that is not asked for by name
# What is taken from Civitai's files besides the label: column -> places of the field, the first that is
# there counts. The names of LoRA Manager's `.metadata.json` stand after Civitai's own.
CIVITAI_COLUMNS: dict[str, tuple[str, ...]] = {
    "civitai_base_model": ("baseModel", "base_model"),
    "civitai_model": ("model.name", "model_name"),
    "civitai_model_id": ("modelId",),
    "civitai_type": ("model.type",),
    "civitai_version_id": ("id",),
}


class Sidecar(NamedTuple):
    """The fields of a file beside an adapter."""

    name: str
    fields: dict[str, Any]


def read_fields(path: Path) -> dict[str, Any] | None:
    """The fields of a JSON file; None if there is no such file.

    Raises BadFile for a file that is damaged or that holds anything but fields.
    """
    try:
        if not path.is_file():  # nothing, a folder, or a pipe, which would never end
            return None
        with path.open("rb") as file:
            content = file.read(LARGEST_SIDECAR + 1)
        if len(content) > LARGEST_SIDECAR:
            raise ValueError(f"it has more than {LARGEST_SIDECAR // 10**6} MB")
        fields = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise BadFile(f"its {path.name} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"its {path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise BadFile(f"its {path.name} holds {type(fields).__name__}, not fields")
    return fields


def refuse_no_label(value: Any, name: str, source: str) -> None:
    """Raise BadFile unless a value, of the field `name` of the file `source`, is a text or a whole number."""
    if value in (None, ""):
        raise BadFile(f"its {source} has no '{name}'")
    if isinstance(value, (float, bool, list, dict)):
        shown = json.dumps(value) if isinstance(value, (float, bool)) else shortened_text(value)
        raise BadFile(f"its '{name}' is {shown}: labels are text or whole numbers")
    refuse_no_text(value, name, source)


def refuse_no_text(value: Any, name: str, source: str) -> None:
    """Raise BadFile for a text with half of a surrogate pair, which no data set can hold."""
    if isinstance(value, str) and not is_utf8(value):
        raise BadFile(f"its {source} has a '{shortened_text(name)}' that is no UTF-8 text")


# --- Civitai


def civitai_files(path: Path) -> list[Path]:
    """Where a file's fields from Civitai may stand: `x.civitai.info`, `x.json` or `x.metadata.json`."""
    return [path.with_name(f"{path.stem}{end}") for end in (".civitai.info", ".json", ".metadata.json")]


def civitai_sidecars(path: Path) -> list[Sidecar]:
    """What stands beside an adapter from Civitai. Raises BadFile if nothing does, or if it is damaged."""
    sidecars = []
    for file in civitai_files(path):
        fields = read_fields(file)
        if fields is None:
            continue
        sidecars.append(Sidecar(file.name, fields))
        if isinstance(fields.get("civitai"), dict):  # LoRA Manager keeps Civitai's answer there
            sidecars.append(Sidecar(file.name, fields["civitai"]))
    if not sidecars:
        names = ", ".join(file.name for file in civitai_files(path))
        raise BadFile(f"has none of {names} beside it")
    return sidecars


def civitai_values(path: Path, label_field: str) -> dict[str, Any]:
    """The label of an adapter from Civitai, from the field `label_field`, and CIVITAI_COLUMNS.

    Raises BadFile if there is no label.
    """
    sidecars = civitai_sidecars(path)
    values: dict[str, Any] = {"category_label": civitai_label(sidecars, label_field)}
    for column, places in CIVITAI_COLUMNS.items():
        stated = [field_at(sidecar.fields, place) for place in places for sidecar in sidecars]
        wanted = int if column.endswith("_id") else str
        plain = [value for value in stated if is_plain(value, wanted)]
        if plain:
            values[column] = short(plain[0])
    return values


def civitai_label(sidecars: list[Sidecar], name: str) -> Any:
    """The field of that name in the first sidecar that has it. Raises BadFile if it is no label."""
    stated = ((sidecar.name, field_at(sidecar.fields, name)) for sidecar in sidecars)
    source, value = next((item for item in stated if item[1] not in (None, "", [])), ("", None))
    if value is None:
        sources = ", ".join(dict.fromkeys(sidecar.name for sidecar in sidecars))
        there = shortened_text(", ".join(key for sidecar in sidecars for key in sidecar.fields))
        raise BadFile(f"its {sources} has no '{name}': it has {there or 'no field'}")
    if isinstance(value, list):
        if len(value) > 1:
            raise BadFile(
                f"its '{name}' in {source} is a list of {len(value)}: choose one of them, such as "
                f"--label-field {name}.0"
            )
        value = value[0]
    if isinstance(value, dict):
        inner = next(iter(value), "name")
        raise BadFile(
            f"its '{name}' in {source} has fields of its own: choose one of them, such as --label-field "
            f"{name}.{shortened_text(inner)}"
        )
    refuse_no_label(value, name, source)
    return value


def field_at(fields: Any, place: str) -> Any:
    """The value at a place such as `model.type` or `tags.0`; None if there is none."""
    while place:
        if isinstance(fields, dict):
            if place in fields:
                return fields[place]
            head, _, place = place.partition(".")
            fields = fields.get(head)
        elif isinstance(fields, list):
            head, _, place = place.partition(".")
            is_position = head.isascii() and head.isdecimal() and len(head) < 10
            fields = fields[int(head)] if is_position and int(head) < len(fields) else None
        else:
            return None
    return fields


def is_plain(value: Any, wanted: type) -> bool:
    """True for a text that can be stored, or for a whole number of 64 bits."""
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, str) and value != "" and is_utf8(value)


def short(value: Any) -> Any:
    """A text of LONGEST_TEXT characters at most, cut ones with an ellipsis; other values as they are."""
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[: LONGEST_TEXT - 1]}…"
    return value
