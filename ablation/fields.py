"""What a setting is: a dataclass field with its unit, its range or choices, and its flag."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any


class InputError(Exception):
    """Bad input or settings. The message is one line that names the value, the choice and the remedy.

    It ends the program with exit status 2.
    """


MANY = 2**31 - 1  # the largest count that torch, NumPy and Arrow all take
SHORT_TEXT = 100  # characters of a value that a message shows


@dataclass(frozen=True)
class Range:
    """An interval of numbers; `open_low` and `open_high` leave out its ends."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = (value if isinstance(value, int) else f"{value:g}" for value in (self.low, self.high))
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {low}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{low}, {high}{right}"


def setting(default, help: str, allowed: Range | tuple[str, ...] | None = None, groups=None) -> Any:
    """A dataclass field with its help text and its allowed values.

    `allowed` is a Range, a tuple of choices, or None for any value of the field's type. `groups` maps names
    to the several choices that each of them stands for.
    """
    metadata = {"help": help, "allowed": allowed, "groups": groups or {}}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


class ShortRepr(reprlib.Repr):
    """The beginning of a value, whatever its size."""

    def repr_int(self, value: int, level: int) -> str:
        """A whole number; Python writes none of more than 4,300 digits."""
        return str(value) if value.bit_length() <= 300 else f"about 2**{value.bit_length()}"


def shortened_text(value: Any) -> str:
    """A value as a message shows it; of a list or mapping the beginning."""
    text = value if isinstance(value, str) else ShortRepr().repr(value)
    return text if len(text) <= SHORT_TEXT else f"{text[:SHORT_TEXT]}... ({len(text):,} characters)"


def is_utf8(text: str) -> bool:
    """True if a text can be encoded: names from the command line may hold bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
