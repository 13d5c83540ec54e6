"""A cell: one number of the table. Its name is the stem of its files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from ablation.catalogue import AUDITS, CLASSIFIERS, CONTROL_SETS, SHUFFLED, SPECS, SPLITS, group_of, title_of

# How each further field of a Cell is written in a file's name, in this order:
# all_layers_stats.random1.linear.json
SUFFIXES = {
    "split": rf"(?:{'|'.join(SPLITS)})\d+",
    "fraction": r"train\d+",
    "classifier": "|".join(CLASSIFIERS),
    "labels": SHUFFLED,
    "audit": "|".join(AUDITS),
}


class Cell(NamedTuple):
    """A representation of a layer set: one number of the paper's table.

    The further fields are empty for the cells of the table itself. They mark the same cell with another
    split, fewer training rows, another classifier, shuffled labels, or scored on changed rows.
    """

    representation: str
    layer_set: str
    audit: str = ""  # gauge, noise
    split: str = ""  # a further split: random1, grouped0
    classifier: str = ""  # in place of the MLP
    labels: str = ""  # shuffled
    fraction: str = ""  # a smaller training set: train25 for a quarter of the training rows

    @property
    def name(self) -> str:
        """The stem of the cell's files: `all_layers_stats`, `all_layers_stats.random1.linear`."""
        suffixes = filter(None, (getattr(self, field) for field in SUFFIXES))
        return ".".join([f"{self.layer_set}_{self.representation}", *suffixes])

    @classmethod
    def named(cls, name: str) -> Cell | None:
        """The cell whose files have this stem, or None if it is no cell's."""
        optional = [rf"(?:\.(?P<{field}>{pattern}))?" for field, pattern in SUFFIXES.items()]
        match = re.fullmatch("(.+?)" + "".join(optional), name)
        if match is None:
            return None
        stem, suffixes = match.group(1), {field: text or "" for field, text in match.groupdict().items()}
        for representation in sorted(SPECS, key=len, reverse=True):  # simple_stats before stats
            layer_set = stem.removesuffix(f"_{representation}")
            if layer_set not in ("", stem):
                return cls(representation, layer_set, **suffixes)
        return None

    @property
    def trained(self) -> Cell:
        """The cell whose runs this cell scores: itself, unless it is an audit."""
        return self._replace(audit="")

    @property
    def is_control(self) -> bool:
        """True for the cells of --controls."""
        return bool(self.labels) or SPECS[self.representation].control or self.layer_set in CONTROL_SETS

    @property
    def is_plain(self) -> bool:
        """True for the cells of the table itself: by the MLP, of the first split."""
        return not (self.is_control or self.audit or self.split or self.classifier or self.fraction)

    @property
    def train_percent(self) -> int:
        """The share of the training rows that it is trained on, in percent."""
        return int(self.fraction.removeprefix("train")) if self.fraction else 100

    @property
    def own_classifier(self) -> str:
        """The classifier that is trained in place of the MLP, or ''."""
        return self.classifier or SPECS[self.representation].classifier

    @property
    def title(self) -> str:
        """The line of the progress summary that counts this cell."""
        if self.audit:
            return AUDITS[self.audit].title
        if self.is_control:
            return "Controls"
        if self.fraction:
            return "Fewer Training Rows"
        if self.classifier:
            return CLASSIFIERS[self.classifier]
        return "Further Splits" if self.split else f"{title_of(self.layer_set)} Config"

    @property
    def spoken(self) -> str:
        """The cell as people say it: `stats of all layers, shuffled labels`."""
        layers = self.layer_set.replace("_", " ").replace(".", " ")
        if group_of(self.layer_set) == "by_block":
            layers = self.layer_set.removeprefix("by_block.")
        words = [f"{self.representation} of {layers}"]
        words += [f"split {self.split}"] if self.split else []
        words += [f"{self.train_percent} % of the training rows"] if self.fraction else []
        words += [CLASSIFIERS[self.classifier].lower()] if self.classifier else []
        words += ["shuffled labels"] if self.labels else []
        words += [AUDITS[self.audit].title.lower()] if self.audit else []
        return ", ".join(words)

    def identified(self) -> dict[str, str]:
        """The cell's name and its fields that are not empty, for results.json."""
        return {"cell": self.name} | {field: value for field, value in self._asdict().items() if value}


def cells_of(
    layer_sets: Iterable[str], representations: Iterable[str], audits: Iterable[str] = ()
) -> list[Cell]:
    """Every representation of every layer set. An audit stands right after the cell whose runs it scores."""
    return [
        Cell(representation, layer_set, audit)
        for layer_set in layer_sets
        for representation in representations
        for audit in ("", *audits)
    ]


def cells_named(names: Iterable[str]) -> list[Cell]:
    """The cells whose files have these names; names of other files are left out."""
    return [cell for cell in map(Cell.named, names) if cell is not None]


def groups_of(cells: list[Cell]) -> list[list[Cell]]:
    """Consecutive cells that share their trained runs: a cell and its audits."""
    return [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.trained)]


def spoken_cell(name: str) -> str:
    """The name of a cell's files as people say it."""
    cell = Cell.named(name)
    return name if cell is None else cell.spoken
