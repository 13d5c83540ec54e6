"""Tables of text: a table is a tuple of Columns, so a further column is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

TEXT_WIDTH = 110


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
