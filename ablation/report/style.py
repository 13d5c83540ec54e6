"""Colours, sizes and helpers that the figures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.lines
from matplotlib.figure import Figure

from ablation.catalogue import LAYER_SET_GROUPS, group_of, title_of
from ablation.text_table import shortened

CLASS_LENGTH = 20  # characters of a class's name
LABEL_LENGTH = 120  # of any other name
WIDTH, WIDE = 3.4, 7.0  # inches: one column of a paper, and two
INK, PAPER, FAINT = "#1b1e23", "#fefefe", "#9aa0a8"  # the page replaces INK and PAPER by its own colours
LEADER = "#6b727c"  # of lines from a name to its point
# Of numbers in coloured cells; not black, which SVG leaves to the page.
ON_DARK, ON_LIGHT = ("#ffffff", "#000001")
# Okabe and Ito's colours, which the colour-blind can tell apart: one for each layer set, everywhere
COLOURS = {
    "all_layers": "#0072B2",
    "visual_only": "#D55E00",
    "text_only": "#009E73",
    "random_half": "#CC79A7",
    "by_block": "#E69F00",
}
FURTHER_COLOURS = ("#56B4E9", "#7F6000", "#5D3A9B", "#8C8C8C")
STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
    "savefig.transparent": False,
}
NAMED_COLOURS: dict[str, str] = {}  # of the layer sets that a user named, in the order of their first drawing


def colour_of(layer_set: str) -> str:
    """A layer set's colour: one for all sets of a group,
    and the same for a user's set wherever it is drawn.
    """
    name = group_of(layer_set) or layer_set
    return COLOURS.get(name) or NAMED_COLOURS.setdefault(
        name, FURTHER_COLOURS[len(NAMED_COLOURS) % len(FURTHER_COLOURS)]
    )


def drawn(function: Callable[[Any], Figure | None]) -> Callable[[Any], Figure | None]:
    """Draw a figure in this module's style, which matplotlib reads as artists are made."""

    def draw(results: Any) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            figure = function(results)
            if figure is not None:  # laid out once, not again for each format
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
            return figure

    draw.__name__, draw.__doc__ = function.__name__, function.__doc__
    return draw


def key_of_layer_sets(figure: Figure, names: list[str]) -> None:
    """Write the layer sets' names in their colours above the figure, as the key to the colours."""
    shown = dict.fromkeys(LAYER_SET_GROUPS.get(group_of(name), title_of(name)) for name in names)
    colours = {LAYER_SET_GROUPS.get(group_of(name), title_of(name)): colour_of(name) for name in names}
    handles = [
        matplotlib.lines.Line2D(
            [], [], linestyle="", marker="o", markersize=4, color=colours[title], label=title
        )
        for title in shown
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles) if len(handles) < 5 else 3,
        frameon=False,
        handletextpad=-0.2,
        columnspacing=0.6,
        borderpad=0,
        labelcolor="linecolor",
        fontsize=7,
    )


def name_rows(axes, names: list[str], length: int = LABEL_LENGTH) -> None:
    """Name the rows down the y axis, the first at the top, each with at most `length` characters."""
    axes.set_yticks(range(len(names)), shortened(names, length))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.3, alpha=0.6)
    axes.set_axisbelow(True)


def colour_bar(figure: Figure, image: Any, grid: Any) -> None:
    """The key to the shades of confusion matrices."""
    bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.set_label("share of a true class's rows (line) that were given a class (column)")
