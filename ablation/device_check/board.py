"""The rows of the tables: printed as they come, and written to device_check.json and device_check.md."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

RIGHT, FAILED, MEASURED = "passed", "FAILED", "measured"
NOT_HERE, NO_ROOM = "not on this device", "does not fit"
NOT_RUN = "not run"  # for lack of a package


@dataclass
class Finding:
    """What a check found. `shown` goes by heading into the table, `figures` are further JSON values."""

    verdict: str
    shown: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def judged(is_right: bool, shown: dict[str, str], **figures: Any) -> Finding:
    """A finding that passed, or failed."""
    return Finding(RIGHT if is_right else FAILED, shown, figures)


def finite_json(value: Any) -> Any:
    """A JSON value in which a number that is not finite is a text."""
    if isinstance(value, dict):
        return {key: finite_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class CheckTable:
    """A table: its title, its headings after the first two (check, verdict), and its rows."""

    title: str
    headings: Sequence[str]
    rows: list[tuple[str, Finding]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The table in Markdown."""
        return [*self.head(), *(self.line(*row) for row in self.rows)]

    def head(self) -> list[str]:
        """Title and headings."""
        headings = ["check", "verdict", *self.headings]
        return [f"## {self.title}", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]

    def line(self, name: str, finding: Finding) -> str:
        """A row. What stands under no heading follows in the last column."""
        other = [text for heading, text in finding.shown.items() if heading not in self.headings]
        cells = [finding.shown.get(heading, "") for heading in self.headings]
        cells[-1] = "; ".join(filter(None, [cells[-1], *other]))
        texts = [name, finding.verdict, *cells]
        return "| " + " | ".join(text.replace("|", "/").replace("\n", " ") for text in texts) + " |"


@dataclass
class Board:
    """All tables of one check of a device."""

    tables: list[CheckTable] = field(default_factory=list)
    is_finished: bool = False

    def open(self, title: str, *headings: str) -> None:
        """Begin a table."""
        self.tables.append(CheckTable(title, headings))
        print("\n" + "\n".join(self.tables[-1].head()), flush=True)

    def add(self, name: str, finding: Finding) -> None:
        """Add a row to the present table, and print it."""
        table = self.tables[-1]
        table.rows.append((name, finding))
        print(table.line(name, finding), flush=True)

    def check(self, name: str, function: Callable[[], Finding]) -> None:
        """Add the row of a check. An exception in it is a failed row; its traceback goes to stderr."""
        found: list[Finding] = []
        if self.guard(name, lambda: found.append(function())):
            self.add(name, found[0])

    def guard(self, name: str, function: Callable[[], None]) -> bool:
        """Run a function that adds its rows itself. An exception in it is a failed row. True without one."""
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            self.add(name, Finding(FAILED, {"error": f"{type(error).__name__}: {error}"[:500]}))
            return False
        return True

    def named(self, verdict: str) -> list[str]:
        """The rows with a verdict, a line each."""
        return [
            f"{table.title}: {name}: {finding.verdict}"
            for table in self.tables
            for name, finding in table.rows
            if finding.verdict == verdict
        ]

    def summary(self) -> list[str]:
        """The last lines: what failed, and what was not run."""
        if not self.is_finished:
            return [*self.named(FAILED), "Not finished: the check still runs, or it was broken off."]
        not_run = self.named(NOT_RUN)
        head = ["", "Not run, because a package is not installed:", ""] if not_run else []
        listed = [[f"- {line}" for line in lines] for lines in (self.named(FAILED), not_run)]
        return [*(listed[0] or ["Nothing failed."]), *head, *listed[1]]

    def values(self) -> list[dict[str, Any]]:
        """The tables as JSON values."""
        return [
            {
                "title": table.title,
                "rows": [
                    {
                        "check": name,
                        "verdict": found.verdict,
                        "shown": found.shown,
                        "figures": finite_json(found.figures),
                    }
                    for name, found in table.rows
                ],
            }
            for table in self.tables
        ]
