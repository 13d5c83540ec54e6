"""Texts of the command line and values of a YAML file -> Settings."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from ablation.catalogue import AUTO
from ablation.fields import InputError, ShortRepr, flag, shortened_text
from ablation.settings import Settings, TrainingSettings, setting_fields


def build_settings(values: Mapping[str, Any], source: str = "the command line") -> Settings:
    """Settings from a flat mapping of names to values; text is converted to the setting's type.

    Raises InputError for an unknown name, a value of the wrong type or out of range, naming `source`.
    """
    known = setting_fields()
    for name in values:
        if name not in known:
            text = shortened_text(name)
            close = difflib.get_close_matches(text, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(known)
            raise InputError(f"unknown setting '{text}' in {source}: {hint}")
    training = {f.name for f in dataclasses.fields(TrainingSettings)}
    try:
        converted = {name: convert(known[name], value) for name, value in values.items()}
        if converted.get("folds") and "split" not in converted:
            converted["split"] = (AUTO,)
        return Settings(
            training=TrainingSettings(**{k: v for k, v in converted.items() if k in training}),
            **{k: v for k, v in converted.items() if k not in training},
        )
    except InputError as error:
        raise InputError(f"{error} (from {source})" if source != "the command line" else str(error)) from None


TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping of names to lists",
    "tuple[str, ...]": "a list of names",
}


def convert(f: dataclasses.Field, value: Any) -> Any:
    """Convert a value from the command line or YAML (which reads 1e-4 as text) to the field's type.

    Raises InputError if the value is not of that type.
    """
    try:
        return CONVERTERS[str(f.type)](value, f)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{flag(f.name)} {ShortRepr().repr(value)} is not {TYPE_NAMES[str(f.type)]}: {f.metadata['help']}"
        ) from None


def to_int(value: Any, f: dataclasses.Field) -> int:
    """10, '10' or 10.0 as 10, exactly."""
    refuse_no_number(value)
    if isinstance(value, int):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return int(value[:4000])  # Python reads at most 4,300 digits; these are beyond any range
    if float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def to_float(value: Any, f: dataclasses.Field) -> float:
    """A number or its text, but no boolean."""
    refuse_no_number(value)
    return float(value)


def refuse_no_number(value: Any) -> None:
    """Raise ValueError for a value that is neither a number nor text."""
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError


def to_bool(value: Any, f: dataclasses.Field) -> bool:
    """A boolean and nothing else."""
    if not isinstance(value, bool):
        raise ValueError
    return value


def to_text(value: Any, f: dataclasses.Field) -> str:
    """Text, or a whole number as text."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError
    return str(value)


def to_patterns(value: Any, f: dataclasses.Field) -> dict[str, tuple[str, ...]]:
    """A mapping of names to a pattern or a list of patterns."""
    if not isinstance(value, dict):
        raise ValueError
    return {name_text(name): names_in(patterns) for name, patterns in value.items()}


def to_names(value: Any, f: dataclasses.Field) -> tuple[str, ...]:
    """A name or a list of names, in which the names of groups are replaced by the group's members."""
    names = names_in(value)
    groups = f.metadata["groups"]
    expanded = [member for name in names for member in groups.get(name, (name,))]
    return tuple(dict.fromkeys(expanded) if groups.keys() & set(names) else expanded)


def names_in(value: Any) -> tuple[str, ...]:
    """A name, or a list of names, as names. Raises ValueError for anything else, such as lists in a list."""
    if isinstance(value, (str, int, float)):
        return (name_text(value),)
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(map(name_text, value))


def name_text(value: Any) -> str:
    """A name as text; YAML reads some as numbers. Raises ValueError for what is no name."""
    refuse_no_number(value)
    return str(value)


CONVERTERS = {
    "int": to_int,
    "float": to_float,
    "bool": to_bool,
    "str": to_text,
    "dict": to_patterns,
    "tuple[str, ...]": to_names,
}
