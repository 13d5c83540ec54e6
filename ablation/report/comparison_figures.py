"""Figures of several runs beside each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ablation.catalogue import CHOICES, group_of
from ablation.report.rows import Results, Rows, scaling_rows
from ablation.report.style import INK, STYLE, WIDE, colour_of, key_of_layer_sets

MARKERS = "osD^vP*X"  # one for each group of runs that a line may join


class Quantity(NamedTuple):
    """A quantity of `scaling_rows`: its key,
    the keys of its interval's ends ('' without one), and the axis label.
    """

    key: str
    low: str
    high: str
    label: str


def against_size(runs: list[Results], quantity: Quantity) -> Figure | None:
    """A quantity against the number of LoRAs, a panel for each representation; None where there is none."""
    with matplotlib.rc_context(STYLE):
        rows = [
            row
            for row in scaling_rows(runs)
            if row[quantity.key] is not None and row["rows"] and not group_of(row["layer_set"])
        ]
        if not rows:
            return None
        names = [name for name in CHOICES if any(row["representation"] == name for row in rows)]
        sets = list(dict.fromkeys(row["layer_set"] for row in rows))
        sizes = sorted({row["rows"] for row in rows})
        lines = -(-len(names) // 3)
        figure = Figure((WIDE, 0.7 + 1.5 * lines))
        grid = figure.subplots(lines, 3, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            draw_curves(axes, [row for row in rows if row["representation"] == name], quantity, rows)
            axes.set_title(name, loc="left")
            axes.set_xscale("log")
            axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        for axes in grid[:, 0]:
            axes.set_ylabel(quantity.label)
        for axes in list(grid.flat[max(0, len(names) - 3) : len(names)]):
            axes.set_xlabel("LoRAs in the data set")
            axes.tick_params(labelbottom=True)
        key_of_layer_sets(figure, sets)
        key_of_groups(figure, rows)
        return figure


def draw_curves(axes: Any, rows: Rows, quantity: Quantity, all_rows: Rows) -> None:
    """A representation's curves: a colour for each layer set, a marker for each group of runs.

    Sizes are drawn a little apart, in the order of the sets and groups of `all_rows`.
    """
    sets = list(dict.fromkeys(row["layer_set"] for row in all_rows))
    groups = list(dict.fromkeys(row["group"] for row in all_rows))
    for i, layer_set in enumerate(sets):
        for number, group in enumerate(groups):
            points = [row for row in rows if (row["layer_set"], row["group"]) == (layer_set, group)]
            points.sort(key=lambda row: row["rows"])
            colour = colour_of(layer_set)
            dodge = 1.04 ** (number * len(sets) + i - (len(groups) * len(sets) - 1) / 2)
            axes.plot(
                [dodge * row["rows"] for row in points],
                [100 * row[quantity.key] for row in points],
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                markersize=3,
                gid="curve",
            )
            for row in points:
                if row.get(quantity.low) is not None:
                    ends = [100 * row[quantity.low], 100 * row[quantity.high]]
                    axes.plot([dodge * row["rows"]] * 2, ends, color=colour, linewidth=0.8, gid="interval")


def key_of_groups(figure: Figure, rows: Rows) -> None:
    """Write below the figure which experiments have which marker, if there are several groups."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if len(groups) < 2:
        return
    handles = []
    for number, group in enumerate(groups):
        names = ", ".join(dict.fromkeys(row["run"] for row in rows if row["group"] == group))
        marker = MARKERS[number % len(MARKERS)]
        handle = Line2D([], [], linestyle="", marker=marker, color=INK, markersize=3, label=names)
        handles.append(handle)
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=6.5)


def scaling(runs: list[Results]) -> Figure | None:
    """Test accuracy against the number of LoRAs."""
    return against_size(runs, Quantity("accuracy", "low", "high", "test accuracy, %"))


def scaling_drop(runs: list[Results]) -> Figure | None:
    """The drop against the number of LoRAs."""
    return against_size(runs, Quantity("drop", "drop_low", "drop_high", "drop, points"))


def scaling_retention(runs: list[Results]) -> Figure | None:
    """What is retained against the number of LoRAs."""
    return against_size(runs, Quantity("retention", "", "", "retained, %"))
