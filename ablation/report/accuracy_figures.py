"""Figures of accuracies and of the drop."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ablation.catalogue import group_of, title_of
from ablation.report.rows import (
    Results,
    accuracy_rows,
    best_representation,
    class_drop_rows,
    drop_rows,
    representations,
    retention_rows,
)
from ablation.report.style import (
    CLASS_LENGTH,
    COLOURS,
    FAINT,
    INK,
    ON_DARK,
    ON_LIGHT,
    PAPER,
    WIDE,
    WIDTH,
    colour_of,
    drawn,
    key_of_layer_sets,
    name_rows,
)


@drawn
def accuracy(results: Results) -> Figure | None:
    """A point with its interval for each representation and layer set; the line is chance."""
    rows = accuracy_rows(results)
    if not rows:
        return None
    names, sets = representations(results), list(dict.fromkeys(row["layer_set"] for row in rows))
    figure = Figure((WIDTH, 0.55 + len(names) * (0.1 + 0.075 * len(sets))))
    axes = figure.subplots()
    offsets = {name: (i - (len(sets) - 1) / 2) * 0.7 / max(len(sets), 1) for i, name in enumerate(sets)}
    for row in rows:
        y, x, colour = (
            names.index(row["representation"]) + offsets[row["layer_set"]],
            100 * row["accuracy"],
            colour_of(row["layer_set"]),
        )
        if row["low"] is not None:
            axes.plot(
                [100 * row["low"], 100 * row["high"]],
                [y, y],
                color=colour,
                linewidth=1.0,
                solid_capstyle="butt",
                gid="interval",
            )
        axes.plot([x], [y], "o", color=colour, markersize=3, gid="point")
    chance = (results.get("inference") or {}).get("chance")
    if chance is not None:
        axes.axvline(100 * chance, color=INK, linewidth=0.7, linestyle=(0, (3, 2)), gid="chance")
        axes.annotate(
            "chance",
            (100 * chance, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, 1),
            textcoords="offset points",
            fontsize=6.5,
        )
    name_rows(axes, names)
    axes.set_xlim(
        0,
        min(
            102,
            max([100 * (row["high"] or row["accuracy"]) for row in rows] + [100 * (chance or 0)]) * 1.04 + 1,
        ),
    )
    axes.set_xlabel(
        "test accuracy, %" + (" (95 % intervals)" if any(row["low"] is not None for row in rows) else "")
    )
    key_of_layer_sets(figure, sets)
    return figure


@drawn
def drop(results: Results) -> Figure | None:
    """The drop without the text layers with its interval;
    filled where it is shown (p < 0.05, corrected for all).
    """
    rows = drop_rows(results)
    if not rows:
        return None
    figure = Figure((WIDTH, 0.5 + 0.19 * len(rows)))
    axes = figure.subplots()
    margin = 100 * rows[0]["margin"]
    axes.axvspan(-margin, margin, color=FAINT, alpha=0.25, linewidth=0, gid="margin")
    axes.axvline(0, color=INK, linewidth=0.7)
    for y, row in enumerate(rows):
        shown = row["p_max_t"] < 0.05
        axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=COLOURS["visual_only"], gid="interval")
        axes.plot(
            [100 * row["drop"]],
            [y],
            "o",
            markersize=3.5,
            color=COLOURS["visual_only"],
            gid="point",
            markerfacecolor=COLOURS["visual_only"] if shown else PAPER,
        )
    name_rows(axes, [row["representation"] for row in rows])
    axes.set_xlabel(f"all layers − visual only, points\n(filled: p < 0.05; band: ±{margin:g})")
    return figure


@drawn
def class_drop(results: Results) -> Figure | None:
    """By class, for the representation that is best with all layers; the largest drop first."""
    rows = class_drop_rows(results)
    if not rows:
        return None
    best = (
        best_representation(results)
        if any(row["representation"] == best_representation(results) for row in rows)
        else rows[0]["representation"]
    )
    rows = sorted((row for row in rows if row["representation"] == best), key=lambda row: -row["drop"])
    figure = Figure((WIDTH, 0.6 + max(0.11, 0.17 - 0.001 * len(rows)) * len(rows)))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.7)
    for y, row in enumerate(rows):
        axes.plot(
            [100 * row["low"], 100 * row["high"]],
            [y, y],
            color=COLOURS["visual_only"],
            linewidth=0.8,
            gid="interval",
        )
        axes.plot([100 * row["drop"]], [y], "o", markersize=3, color=COLOURS["visual_only"], gid="point")
    name_rows(axes, [row["class"] for row in rows], CLASS_LENGTH)
    axes.tick_params(axis="y", labelsize=7 if len(rows) <= 30 else 5.5)
    axes.set_xlabel(f"{best}: recall,\nall layers − visual only, points")
    return figure


@drawn
def retention(results: Results) -> Figure | None:
    """The share of the accuracy that each layer set retains;
    None for a single layer set, which is one column.
    """
    rows = retention_rows(results)
    sets = list(dict.fromkeys(row["layer_set"] for row in rows))
    if len(sets) < 2:
        return None
    kept = {row["representation"] for row in rows}
    names = [name for name in representations(results) if name in kept]
    grid = np.full((len(names), len(sets)), np.nan)
    for row in rows:
        grid[names.index(row["representation"]), sets.index(row["layer_set"])] = 100 * row["retention"]
    figure = Figure((max(2.4, min(WIDE, 1.5 + 0.55 * len(sets))), 0.8 + 0.19 * len(names)))
    axes = figure.subplots()
    high = max(100.0, np.nanmax(grid))
    axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=high)
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(
                x,
                y,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color=ON_DARK if value < 0.55 * high else ON_LIGHT,
            )
    axes.set_yticks(range(len(names)), names)
    titles = [title_of(name) + (f" {name.split('.')[1]}" if group_of(name) else "") for name in sets]
    axes.set_xticks(range(len(sets)), titles, rotation=30, ha="right")
    axes.tick_params(length=0)
    axes.set_title("accuracy kept, % of all layers'", loc="left")
    return figure
