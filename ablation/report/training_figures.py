"""Figures of trained runs: confusions, learning curves, gaps, precision and recall, cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.patches
import matplotlib.text
import matplotlib.ticker
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ablation.catalogue import PARTS, group_of, title_of
from ablation.report.rows import (
    Results,
    best_representation,
    class_names,
    gaps_rows,
    layer_sets,
    representations,
    rows_of,
    scatter_rows,
    shares,
)
from ablation.report.style import (
    FAINT,
    INK,
    LEADER,
    WIDE,
    WIDTH,
    colour_bar,
    colour_of,
    drawn,
    key_of_layer_sets,
    name_rows,
)

# Points, where a name may stand.
SHIFTS = [
    (radius * math.cos(angle), radius * math.sin(angle))
    for radius in (7, 14, 22, 31, 41)
    for angle in np.deg2rad([0, 180, 90, 270, 45, 135, 225, 315])
]


@drawn
def confusion(results: Results) -> Figure | None:
    """The representation that is best with all layers, layer sets side by side;
    every true class is a line of shares.
    """
    sets = [name for name in layer_sets(results) if not group_of(name)]
    if not sets:
        return None
    best = best_representation(results)
    sets = [name for name in sets if best in rows_of(results, name)][:3]
    matrices = [shares(rows_of(results, name)[best]) for name in sets]
    classes = class_names(results, 12)
    figure = Figure((WIDE, 1.3 + 0.95 * WIDE / 3))
    grid = figure.subplots(1, 3, squeeze=False)[0]
    high = max(float(np.nanmax(matrix)) for matrix in matrices)
    for axes in grid[len(sets) :]:
        axes.set_axis_off()
    for axes, name, matrix in zip(grid, sets, matrices, strict=False):
        image = axes.imshow(matrix, vmin=0, vmax=high, cmap="cividis", interpolation="nearest")
        axes.set_title(f"{best}, {title_of(name)}", color=colour_of(name))
        few = len(classes) <= 20
        axes.set_xticks(range(len(classes)) if few else [], classes if few else [], rotation=90, fontsize=5.5)
        axes.set_yticks(
            range(len(classes)) if few and axes is grid[0] else [],
            classes if few and axes is grid[0] else [],
            fontsize=5.5,
        )
        axes.tick_params(length=0)
    colour_bar(figure, image, grid)
    return figure


@drawn
def confusion_all(results: Results) -> Figure | None:
    """Small confusion matrices of every representation; None if there is only one."""
    sets, names = [name for name in layer_sets(results) if not group_of(name)][:4], representations(results)
    if not sets or len(names) < 2:
        return None
    per_line = max(1, 6 // len(sets))
    columns, lines = per_line * len(sets), -(-len(names) // per_line)
    side = WIDE / max(columns, 4)
    figure = Figure((side * columns, 0.5 + lines * (side + 0.05)))
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = [
        (
            name,
            layer_set,
            grid[i // per_line, (i % per_line) * len(sets) + j],
            shares(rows_of(results, layer_set)[name]),
        )
        for i, name in enumerate(names)
        for j, layer_set in enumerate(sets)
        if name in rows_of(results, layer_set)
    ]
    high = max(float(np.nanmax(matrix)) for *_, matrix in panels)
    for axes in grid.flat:
        axes.set_axis_off()
    for name, layer_set, axes, matrix in panels:
        image = axes.imshow(matrix, vmin=0, vmax=high, cmap="cividis", interpolation="nearest")
        axes.set_title(f"{name}\n{title_of(layer_set)}", color=colour_of(layer_set), fontsize=6.5)
    colour_bar(figure, image, grid)
    return figure


@drawn
def gaps(results: Results) -> Figure | None:
    """Train, validation and test accuracy on one line: what was learned by heart."""
    rows = gaps_rows(results)
    if not rows:
        return None
    names, sets = representations(results), list(dict.fromkeys(row["layer_set"] for row in rows))
    figure = Figure((min(WIDE, 1.2 + 2.1 * len(sets)), 0.75 + 0.19 * len(names)))
    markers = {"train": "|", "val": "d", "test": "o"}
    for axes, layer_set in zip(
        figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True
    ):
        for row in (row for row in rows if row["layer_set"] == layer_set):
            y, values = names.index(row["representation"]), [100 * row[part] for part in PARTS]
            axes.plot([min(values), max(values)], [y, y], color=FAINT, linewidth=0.8)
            for part, value in zip(PARTS, values, strict=True):
                axes.plot(
                    [value],
                    [y],
                    markers[part],
                    color=colour_of(layer_set),
                    markersize=5 if part == "train" else 3,
                    gid=part,
                )
        name_rows(axes, names)
        axes.set_xlim(0, 103)
        axes.set_title(title_of(layer_set), color=colour_of(layer_set), loc="left")
        axes.set_xlabel("accuracy, %")
    handles = [
        matplotlib.lines.Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=INK,
            markersize=5 if part == "train" else 3,
            label={"val": "validation"}.get(part, part),
        )
        for part, marker in markers.items()
    ]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=3, frameon=False, handletextpad=0, columnspacing=1.0
    )
    return figure


def scatter(axes, rows: list[dict], x: Callable[[dict], float], y: Callable[[dict], float]) -> None:
    """Points in their layer set's colour; those of the first layer set have their representation's name, at
    the nearest place that is free.
    """
    for row in rows:
        axes.plot([x(row)], [y(row)], "o", color=colour_of(row["layer_set"]), markersize=3.5, gid="point")
    figure = axes.get_figure()
    canvas = FigureCanvasAgg(figure)
    axes.autoscale_view()
    canvas.draw()
    renderer = canvas.get_renderer()
    taken = [axes.transData.transform((x(row), y(row))) for row in rows]
    boxes: list[Bbox] = []
    frame = axes.get_window_extent(renderer)
    for row in (row for row in rows if row["layer_set"] == rows[0]["layer_set"]):
        for shift in SHIFTS:
            line = (
                {"arrowstyle": "-", "linewidth": 0.5, "color": LEADER, "shrinkA": 0, "shrinkB": 2}
                if math.hypot(*shift) > 8
                else None
            )
            text = axes.annotate(
                row["representation"],
                (x(row), y(row)),
                xytext=shift,
                textcoords="offset points",
                fontsize=6,
                arrowprops=line,
                ha="left" if shift[0] > 1 else "right" if shift[0] < -1 else "center",
                va="center",
            )
            text.update_positions(renderer)
            box = matplotlib.text.Text.get_window_extent(text, renderer)  # without its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if (
                inside
                and not any(box.overlaps(other) for other in boxes)
                and not any(box.contains(*point) for point in taken)
            ):
                boxes.append(box)
                break
            text.remove()
    axes.grid(color=FAINT, linewidth=0.3, alpha=0.6)
    axes.set_axisbelow(True)


@drawn
def precision_recall(results: Results) -> Figure | None:
    """Macro precision against macro recall of the test rows, with the line where they are equal."""
    rows = scatter_rows(results)
    if not rows:
        return None
    figure = Figure((WIDTH, 2.9))
    axes = figure.subplots()
    values = [100 * row[score] for row in rows for score in ("precision", "recall")]
    span = max(values) - min(values) + 2
    axes.plot([0, 100], [0, 100], color=FAINT, linewidth=0.6)
    axes.set_xlim(min(values) - 0.08 * span, max(values) + 0.08 * span)
    axes.set_ylim(min(values) - 0.08 * span, max(values) + 0.08 * span)
    axes.set_xlabel("macro recall, %")
    axes.set_ylabel("macro precision, %")
    key_of_layer_sets(figure, list(dict.fromkeys(row["layer_set"] for row in rows)))
    scatter(axes, rows, lambda row: 100 * row["recall"], lambda row: 100 * row["precision"])
    return figure


@drawn
def cost(results: Results) -> Figure | None:
    """Accuracy against the number of columns, and against the seconds of a run."""
    rows = scatter_rows(results)
    if not rows:
        return None
    figure = Figure((WIDE, 2.7))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, label in zip(panels, ("columns", "seconds a run"), strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlabel(label)
    panels[0].set_ylabel("test accuracy, %")
    key_of_layer_sets(figure, list(dict.fromkeys(row["layer_set"] for row in rows)))
    for axes, quantity in zip(panels, ("feature_dim", "seconds_a_run"), strict=True):
        scatter(axes, rows, functools.partial(drawable, quantity), lambda row: 100 * row["accuracy"])
    return figure


def drawable(quantity: str, row: dict) -> float:
    """The value of a quantity in a row, large enough for a logarithmic axis."""
    return max(row[quantity], 1e-3)


@drawn
def learning_curves(results: Results) -> Figure | None:
    """Validation accuracy by epoch, a panel for each representation; None where no run has epochs."""
    sets = [name for name in layer_sets(results) if not group_of(name)]
    curves = {
        (name, layer_set): curves_of(results, layer_set, name)
        for name in representations(results)
        for layer_set in sets
    }
    names = [name for name in representations(results) if any(curves[name, s] for s in sets)]
    if not names:
        return None
    lines = -(-len(names) // 3)
    figure = Figure((WIDE, 0.5 + 1.45 * lines))
    grid = figure.subplots(lines, 3, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        for layer_set in sets:
            draw_learning_curves(axes, curves[name, layer_set], colour_of(layer_set))
        axes.set_title(name, loc="left")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation, %")
    for axes in list(grid.flat[max(0, len(names) - 3) : len(names)]):
        axes.set_xlabel("epoch")
        axes.tick_params(labelbottom=True)
    key_of_layer_sets(figure, sets)
    return figure


def curves_of(results: Results, layer_set: str, name: str) -> list[dict]:
    """The learning curves of a cell's runs that have epochs."""
    record = rows_of(results, layer_set).get(name, {})
    return [curve for curve in record.get("learning_curves", []) if curve["val_acc_history"]]


def draw_learning_curves(axes: Any, curves: list[dict], colour: str) -> None:
    """Runs faint, best epochs as points, and bold the mean while at least half of the runs go on."""
    histories = [100 * np.array(curve["val_acc_history"]) for curve in curves]
    for curve, history in zip(curves, histories, strict=True):
        axes.plot(range(1, len(history) + 1), history, color=colour, alpha=0.22, linewidth=0.5)
        best = curve["best_epoch"]
        axes.plot([best], [history[best - 1]], ".", color=colour, markersize=2.5, gid="best")
    if histories:
        last = sorted(map(len, histories), reverse=True)[(len(histories) - 1) // 2]
        mean = [np.mean([h[epoch] for h in histories if epoch < len(h)]) for epoch in range(last)]
        axes.plot(range(1, last + 1), mean, color=colour, linewidth=1.4, gid="mean")
