"""Tables of text, and text from data made fit to be shown.

A table is a tuple of Columns, so a further column is one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ablation.log import visible

TEXT_WIDTH = 110
NAME_LENGTH = 255  # characters of a name that is shown: names of cells, which are names of files, stay whole
TEXT_LENGTH = 5_000  # of any other text, such as an error: longer than any path


class Column(NamedTuple):
    """A column of a table: its heading, its width in characters,
    and the text of a row. Negative widths align left.
    """

    heading: str
    width: int
    text: Callable[[Any], str]

    def cell(self, text: str) -> str:
        """A text padded to the column's width."""
        return f"{text:<{-self.width}}" if self.width < 0 else f"{text:>{self.width}}"


def table(columns: Iterable[Column], rows: Iterable[Any]) -> list[str]:
    """The lines of a table: headings, a rule, and one line for each row."""
    columns = list(columns)
    header = "".join(column.cell(column.heading) for column in columns)
    lines = ["".join(column.cell(column.text(row)) for column in columns) for row in rows]
    return [header, "-" * len(header), *lines]


# --- text from data


def showable(value: Any) -> Any:
    """Results with every text in them fit to be shown: escaped and shortened by `visible`, each in one line.

    Names, which are the keys of mappings, stay apart from each other.
    """
    if isinstance(value, str):
        return visible(value, TEXT_LENGTH)
    if isinstance(value, dict):
        names = [key for key in value if isinstance(key, str)]
        shown = dict(zip(names, shortened(names, NAME_LENGTH), strict=True))
        return {shown.get(key, key): showable(entry) for key, entry in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return [showable(entry) for entry in value]
    return value


def shortened(names: list[str], length: int = 20) -> list[str]:
    """Names of at most `length` characters: long ones lose their middle, and those that are then alike have
    their number among all names.
    """
    short = [visible(name, length) for name in names]
    if len(set(short)) == len(short):
        return short
    count = Counter(short)
    apart = [
        name if count[name] == 1 else numbered(name, number, length) for number, name in enumerate(short)
    ]
    if len(set(apart)) == len(apart):
        return apart
    return [numbered(name, number, length) for number, name in enumerate(short)]


def numbered(name: str, number: int, length: int) -> str:
    """The beginning of a name, and its number."""
    end = f" ({number})"
    return f"{name[: length - max(5, len(end))]}{end}"


# --- numbers as text


def percent(mean: float | None, std: float | None = None) -> str:
    """A fraction as percent, with its std if given; - for None."""
    if mean is None:
        return "-"
    return f"{round(100 * mean, 1) + 0.0:.1f}" + ("" if std is None else f"±{100 * std:.1f}")


def points(value: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * value:+.1f}"


def interval_text(interval) -> str:
    """The two ends of an interval of a difference, in points; - for None."""
    if interval is None:
        return "-"
    return f"{points(interval[0])} .. {points(interval[1])}"


def accuracy_with_interval(entry: dict | None) -> str:
    """An accuracy and its 95 % interval in percent; - for None."""
    if entry is None:
        return "-"
    low, high = entry["interval"]
    return f"{percent(entry['accuracy'])} [{percent(low)}, {percent(high)}]"


def probability(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def margin_text(inference: dict[str, Any]) -> str:
    """What counts as equal, in words."""
    if inference["margin_share"]:
        return f"{100 * inference['margin_share']:g} % of the accuracy above chance"
    return f"{100 * inference['margin']:g} points"
