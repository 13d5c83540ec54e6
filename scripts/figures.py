"""Figures of a run, from results.json as a dict: `<name>(results)` draws `report_rows.<name>_rows(results)`.

None where a run has nothing for a figure. Axes are in percent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.lines
import matplotlib.patches
import matplotlib.text
import matplotlib.ticker
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from report_rows import (  # noqa: E402
    PARTS,
    accuracy_rows,
    audits_rows,
    best_representation,
    blocks_rows,
    class_drop_rows,
    confusion_rows,
    controls_rows,
    cost_rows,
    drop_rows,
    gaps_rows,
    layer_sets,
    learning_curves_rows,
    precision_recall_rows,
    representations,
    retention_rows,
    rows_of,
    scaling_rows,
    scatter_rows,
    shares,
    shortened,
)

from settings import CHOICES, LAYER_SET_GROUPS, group_of, title_of  # noqa: E402

WIDTH, WIDE = 3.4, 7.0                # inches: one column of a paper, and two
INK, PAPER, FAINT = "#1b1e23", "#fefefe", "#9aa0a8"     # the page replaces INK and PAPER by its own colours
LEADER = "#6b727c"                                      # of lines from a name to its point
ON_DARK, ON_LIGHT = "#ffffff", "#000001"                # of numbers in coloured cells; not black, which SVG leaves to the page
# Okabe and Ito's colours, which the colour-blind can tell apart: one for each layer set, everywhere
COLOURS = {"all_layers": "#0072B2", "visual_only": "#D55E00", "text_only": "#009E73", "random_half": "#CC79A7", "by_block": "#E69F00"}
FURTHER_COLOURS = ("#56B4E9", "#7F6000", "#5D3A9B", "#8C8C8C")
STYLE = {
    "font.size": 7.5, "axes.titlesize": 7.5, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "font.family": "DejaVu Sans",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.0,
    "text.parse_math": False, "pdf.fonttype": 42, "svg.fonttype": "none", "figure.constrained_layout.use": True, "savefig.transparent": False,
}


NAMED_COLOURS: dict[str, str] = {}    # of the sets that a user named, as they were first drawn


def colour_of(layer_set: str) -> str:
    """The same for a group's sets, and for a user's set wherever it is drawn."""
    name = group_of(layer_set) or layer_set
    return COLOURS.get(name) or NAMED_COLOURS.setdefault(name, FURTHER_COLOURS[len(NAMED_COLOURS) % len(FURTHER_COLOURS)])


def drawn(function: Callable[[dict], Figure | None]) -> Callable[[dict], Figure | None]:
    """With this module's style, which matplotlib reads as things are made."""
    def draw(results: dict) -> Figure | None:
        with matplotlib.rc_context(STYLE):
            return function(results)
    draw.__name__, draw.__doc__ = function.__name__, function.__doc__
    return draw


def key_of_layer_sets(figure: Figure, names: list[str]) -> None:
    """The layer sets' names in their colours, above everything: the key to the colours."""
    shown = dict.fromkeys(LAYER_SET_GROUPS.get(group_of(name), title_of(name)) for name in names)
    colours = {LAYER_SET_GROUPS.get(group_of(name), title_of(name)): colour_of(name) for name in names}
    handles = [matplotlib.lines.Line2D([], [], linestyle="", marker="o", markersize=4, color=colours[title], label=title) for title in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles) if len(handles) < 5 else 3, frameon=False, handletextpad=-0.2,
                  columnspacing=0.6, borderpad=0, labelcolor="linecolor", fontsize=7)


def name_rows(axes, names: list[str]) -> None:
    """Representations down the y axis, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.3, alpha=0.6)
    axes.set_axisbelow(True)


# --- accuracy and the drop


@drawn
def accuracy(results: dict) -> Figure | None:
    """A point with its interval for each representation and layer set; the line is chance."""
    rows = accuracy_rows(results)
    if not rows:
        return None
    names, sets = representations(results), list(dict.fromkeys(row["layer_set"] for row in rows))
    figure = Figure((WIDTH, 0.55 + len(names) * (0.1 + 0.075 * len(sets))))
    axes = figure.subplots()
    offsets = {name: (i - (len(sets) - 1) / 2) * 0.7 / max(len(sets), 1) for i, name in enumerate(sets)}
    for row in rows:
        y, x, colour = names.index(row["representation"]) + offsets[row["layer_set"]], 100 * row["accuracy"], colour_of(row["layer_set"])
        if row["low"] is not None:
            axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=1.0, solid_capstyle="butt", gid="interval")
        axes.plot([x], [y], "o", color=colour, markersize=3, gid="point")
    chance = (results.get("inference") or {}).get("chance")
    if chance is not None:
        axes.axvline(100 * chance, color=INK, linewidth=0.7, linestyle=(0, (3, 2)), gid="chance")
        axes.annotate("chance", (100 * chance, 1), xycoords=("data", "axes fraction"), xytext=(2, 1), textcoords="offset points", fontsize=6.5)
    name_rows(axes, names)
    axes.set_xlim(0, min(102, max([100 * (row["high"] or row["accuracy"]) for row in rows] + [100 * (chance or 0)]) * 1.04 + 1))
    axes.set_xlabel("test accuracy, %" + (" (95 % intervals)" if any(row["low"] is not None for row in rows) else ""))
    key_of_layer_sets(figure, sets)
    return figure


@drawn
def drop(results: dict) -> Figure | None:
    """The drop without the text layers with its interval; filled where it is shown (p < 0.05 after Holm's correction)."""
    rows = drop_rows(results)
    if not rows:
        return None
    figure = Figure((WIDTH, 0.5 + 0.19 * len(rows)))
    axes = figure.subplots()
    margin = 100 * rows[0]["margin"]
    axes.axvspan(-margin, margin, color=FAINT, alpha=0.25, linewidth=0, gid="margin")
    axes.axvline(0, color=INK, linewidth=0.7)
    for y, row in enumerate(rows):
        shown = row["p_holm"] < 0.05
        axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=COLOURS["visual_only"], gid="interval")
        axes.plot([100 * row["drop"]], [y], "o", markersize=3.5, color=COLOURS["visual_only"], gid="point",
                  markerfacecolor=COLOURS["visual_only"] if shown else PAPER)
    name_rows(axes, [row["representation"] for row in rows])
    axes.set_xlabel(f"all layers − visual only, points\n(filled: p < 0.05; band: ±{margin:g})")
    return figure


# --- classes


@drawn
def class_drop(results: dict) -> Figure | None:
    """By class, for the representation that is best with all layers; the largest drop first."""
    rows = class_drop_rows(results)
    if not rows:
        return None
    best = best_representation(results) if any(row["representation"] == best_representation(results) for row in rows) else rows[0]["representation"]
    rows = sorted((row for row in rows if row["representation"] == best), key=lambda row: -row["drop"])
    figure = Figure((WIDTH, 0.6 + max(0.11, 0.17 - 0.001 * len(rows)) * len(rows)))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.7)
    for y, row in enumerate(rows):
        axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=COLOURS["visual_only"], linewidth=0.8, gid="interval")
        axes.plot([100 * row["drop"]], [y], "o", markersize=3, color=COLOURS["visual_only"], gid="point")
    name_rows(axes, shortened([row["class"] for row in rows]))
    axes.tick_params(axis="y", labelsize=7 if len(rows) <= 30 else 5.5)
    axes.set_xlabel(f"{best}: recall,\nall layers − visual only, points")
    return figure


def colour_bar(figure: Figure, image, grid) -> None:
    bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.set_label("share of a true class's rows (line) that were given a class (column)")


@drawn
def confusion(results: dict) -> Figure | None:
    """The representation that is best with all layers, layer sets side by side; every true class is a line of shares."""
    sets = [name for name in layer_sets(results) if not group_of(name)]
    if not sets:
        return None
    best = best_representation(results)
    sets = [name for name in sets if best in rows_of(results, name)][:3]
    matrices = [shares(rows_of(results, name)[best]) for name in sets]
    classes = shortened(list(results.get("label_mapping", {})), 12)
    figure = Figure((WIDE, 1.3 + 0.95 * WIDE / 3))
    grid = figure.subplots(1, 3, squeeze=False)[0]
    high = max(float(np.nanmax(matrix)) for matrix in matrices)
    for axes in grid[len(sets):]:
        axes.set_axis_off()
    for axes, name, matrix in zip(grid, sets, matrices, strict=False):
        image = axes.imshow(matrix, vmin=0, vmax=high, cmap="cividis", interpolation="nearest")
        axes.set_title(f"{best}, {title_of(name)}", color=colour_of(name))
        few = len(classes) <= 20
        axes.set_xticks(range(len(classes)) if few else [], classes if few else [], rotation=90, fontsize=5.5)
        axes.set_yticks(range(len(classes)) if few and axes is grid[0] else [], classes if few and axes is grid[0] else [], fontsize=5.5)
        axes.tick_params(length=0)
    colour_bar(figure, image, grid)
    return figure


@drawn
def confusion_all(results: dict) -> Figure | None:
    """The same for every representation, small."""
    sets, names = [name for name in layer_sets(results) if not group_of(name)][:4], representations(results)
    if not sets or len(names) < 2:
        return None
    per_line = max(1, 6 // len(sets))
    columns, lines = per_line * len(sets), -(-len(names) // per_line)
    side = WIDE / max(columns, 4)
    figure = Figure((side * columns, 0.5 + lines * (side + 0.05)))
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = [(name, layer_set, grid[i // per_line, (i % per_line) * len(sets) + j], rows_of(results, layer_set).get(name))
              for i, name in enumerate(names) for j, layer_set in enumerate(sets)]
    panels = [(name, layer_set, axes, shares(record)) for name, layer_set, axes, record in panels if record is not None]
    high = max(float(np.nanmax(matrix)) for *_, matrix in panels)
    for axes in grid.flat:
        axes.set_axis_off()
    for name, layer_set, axes, matrix in panels:
        image = axes.imshow(matrix, vmin=0, vmax=high, cmap="cividis", interpolation="nearest")
        axes.set_title(f"{name}\n{title_of(layer_set)}", color=colour_of(layer_set), fontsize=6.5)
    colour_bar(figure, image, grid)
    return figure


# --- what is retained, gaps, other scores


@drawn
def retention(results: dict) -> Figure | None:
    rows = retention_rows(results)
    if not rows:
        return None
    names, sets = [name for name in representations(results) if any(row["representation"] == name for row in rows)], list(
        dict.fromkeys(row["layer_set"] for row in rows))
    grid = np.full((len(names), len(sets)), np.nan)
    for row in rows:
        grid[names.index(row["representation"]), sets.index(row["layer_set"])] = 100 * row["retention"]
    figure = Figure((max(2.4, min(WIDE, 1.5 + 0.55 * len(sets))), 0.8 + 0.19 * len(names)))
    axes = figure.subplots()
    high = max(100.0, np.nanmax(grid))
    axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=high)
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=ON_DARK if value < 0.55 * high else ON_LIGHT)
    axes.set_yticks(range(len(names)), names)
    titles = [title_of(name) + (f" {name.split('.')[1]}" if group_of(name) else "") for name in sets]
    axes.set_xticks(range(len(sets)), titles, rotation=30, ha="right")
    axes.tick_params(length=0)
    axes.set_title("accuracy kept, % of all layers'", loc="left")
    return figure


@drawn
def gaps(results: dict) -> Figure | None:
    """Train, validation and test accuracy on one line: what was learned by heart."""
    rows = gaps_rows(results)
    if not rows:
        return None
    names, sets = representations(results), list(dict.fromkeys(row["layer_set"] for row in rows))
    figure = Figure((min(WIDE, 1.2 + 2.1 * len(sets)), 0.75 + 0.19 * len(names)))
    markers = {"train": "|", "val": "d", "test": "o"}
    for axes, layer_set in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True):
        for row in (row for row in rows if row["layer_set"] == layer_set):
            y, values = names.index(row["representation"]), [100 * row[part] for part in PARTS]
            axes.plot([min(values), max(values)], [y, y], color=FAINT, linewidth=0.8)
            for part, value in zip(PARTS, values, strict=True):
                axes.plot([value], [y], markers[part], color=colour_of(layer_set), markersize=5 if part == "train" else 3, gid=part)
        name_rows(axes, names)
        axes.set_xlim(0, 103)
        axes.set_title(title_of(layer_set), color=colour_of(layer_set), loc="left")
        axes.set_xlabel("accuracy, %")
    handles = [matplotlib.lines.Line2D([], [], linestyle="", marker=marker, color=INK, markersize=5 if part == "train" else 3,
                                       label={"val": "validation"}.get(part, part)) for part, marker in markers.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, handletextpad=0, columnspacing=1.0)
    return figure


SHIFTS = [(radius * math.cos(angle), radius * math.sin(angle)) for radius in (7, 14, 22, 31, 41)
          for angle in np.deg2rad([0, 180, 90, 270, 45, 135, 225, 315])]     # points, where a name may stand


def scatter(axes, rows: list[dict], x: Callable[[dict], float], y: Callable[[dict], float]) -> None:
    """Points in their layer set's colour; those of the first layer set have their representation's name, at the nearest place that is free."""
    for row in rows:
        axes.plot([x(row)], [y(row)], "o", color=colour_of(row["layer_set"]), markersize=3.5, gid="point")
    figure = axes.get_figure()
    canvas = FigureCanvasAgg(figure)
    axes.autoscale_view()
    canvas.draw()
    renderer, taken, boxes = canvas.get_renderer(), [axes.transData.transform((x(row), y(row))) for row in rows], []
    frame = axes.get_window_extent(renderer)
    for row in (row for row in rows if row["layer_set"] == rows[0]["layer_set"]):
        for shift in SHIFTS:
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": LEADER, "shrinkA": 0, "shrinkB": 2} if math.hypot(*shift) > 8 else None
            text = axes.annotate(row["representation"], (x(row), y(row)), xytext=shift, textcoords="offset points", fontsize=6, arrowprops=line,
                                 ha="left" if shift[0] > 1 else "right" if shift[0] < -1 else "center", va="center")
            text.update_positions(renderer)
            box = matplotlib.text.Text.get_window_extent(text, renderer)      # without its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in boxes) and not any(box.contains(*point) for point in taken):
                boxes.append(box)
                break
            text.remove()
    axes.grid(color=FAINT, linewidth=0.3, alpha=0.6)
    axes.set_axisbelow(True)


@drawn
def precision_recall(results: dict) -> Figure | None:
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
def cost(results: dict) -> Figure | None:
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
        scatter(axes, rows, lambda row, quantity=quantity: max(row[quantity], 1e-3), lambda row: 100 * row["accuracy"])
    return figure


# --- learning


@drawn
def learning_curves(results: dict) -> Figure | None:
    """Validation accuracy by epoch: runs faint, best epochs as points, bold the mean while at least half of the runs go on."""
    sets = [name for name in layer_sets(results) if not group_of(name)]
    names = [name for name in representations(results) if any(
        curve["val_acc_history"] for layer_set in sets for curve in rows_of(results, layer_set).get(name, {}).get("learning_curves", []))]
    if not names:
        return None
    lines = -(-len(names) // 3)
    figure = Figure((WIDE, 0.5 + 1.45 * lines))
    grid = figure.subplots(lines, 3, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(names):]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        for layer_set in sets:
            curves = [curve for curve in rows_of(results, layer_set).get(name, {}).get("learning_curves", []) if curve["val_acc_history"]]
            colour = colour_of(layer_set)
            for curve in curves:
                history = 100 * np.array(curve["val_acc_history"])
                axes.plot(range(1, len(history) + 1), history, color=colour, alpha=0.22, linewidth=0.5)
                axes.plot([curve["best_epoch"]], [history[curve["best_epoch"] - 1]], ".", color=colour, markersize=2.5, gid="best")
            if curves:
                histories = [100 * np.array(curve["val_acc_history"]) for curve in curves]
                last = sorted(map(len, histories), reverse=True)[(len(histories) - 1) // 2]
                mean = [np.mean([history[epoch] for history in histories if epoch < len(history)]) for epoch in range(last)]
                axes.plot(range(1, last + 1), mean, color=colour, linewidth=1.4, gid="mean")
        axes.set_title(name, loc="left")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation, %")
    for axes in list(grid.flat[max(0, len(names) - 3):len(names)]):
        axes.set_xlabel("epoch")
        axes.tick_params(labelbottom=True)
    key_of_layer_sets(figure, sets)
    return figure


# --- controls, audits, single blocks


@drawn
def controls(results: dict) -> Figure | None:
    """Accuracy of each control with its interval and chance; of shuffled labels with the range that chance allows a single cell."""
    rows = controls_rows(results)
    if not rows:
        return None
    figure = Figure((WIDE * 0.75, 0.55 + 0.16 * len(rows)))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if row["low"] is not None:
            axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=COLOURS["all_layers"], gid="interval")
        axes.plot([100 * row["accuracy"]], [y], "o", color=COLOURS["all_layers"], markersize=3, gid="point")
        if row["spread_of_chance"] is not None:
            axes.plot([100 * (row["chance"] + side * 1.96 * row["spread_of_chance"]) for side in (-1, 1)], [y, y], color=FAINT, linewidth=2.5,
                      alpha=0.6, zorder=1, gid="range")
        axes.plot([100 * row["chance"]], [y], "|", color=INK, markersize=6, gid="chance")
    name_rows(axes, [row["cell"] for row in rows])
    axes.set_xlim(left=0)
    axes.set_xlabel("test accuracy, % (strokes: chance; grey: its range for one cell)")
    check = (results.get("inference") or {}).get("shuffled")
    if check:
        axes.set_title(f"shuffled labels: p = {check['p']:.3f} for all cells together", loc="left")
    return figure


@drawn
def audits(results: dict) -> Figure | None:
    """Predictions that stay, all layers: under noise by its level, and after a change of gauge."""
    rows = [row for row in audits_rows(results) if row["layer_set"] == "all_layers"] or audits_rows(results)
    if not rows:
        return None
    kinds, names = list(dict.fromkeys(row["audit"] for row in rows)), list(dict.fromkeys(row["representation"] for row in rows))
    figure = Figure((1.2 + 2.2 * len(kinds), 0.6 + 0.19 * len(names)))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        variants = list(dict.fromkeys(row["variant"] for row in rows if row["audit"] == kind))
        shades = matplotlib.colormaps["cividis"](np.linspace(0.85, 0.1, len(variants)))
        for row in (row for row in rows if row["audit"] == kind):
            axes.plot([100 * row["agreement"]], [names.index(row["representation"])], "o", markersize=3.5, gid=row["variant"],
                      color=shades[variants.index(row["variant"])])
        name_rows(axes, names)
        axes.set_xlim(0, 103)
        axes.set_title(f"{kind}: " + (", ".join(variants) + " (dark: more)" if len(variants) > 1 else variants[0]), loc="left", fontsize=6.5)
        axes.set_xlabel("predictions that stay, %")
    return figure


@drawn
def blocks(results: dict) -> Figure | None:
    """A map of the U-Net: down blocks on the left from the top, the middle one below, up blocks on the right; each attention kind alone.

    By the representation whose mean over blocks is highest.
    """
    rows = blocks_rows(results)
    if not rows:
        return None
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["representation"], []).append(row["accuracy"])
    best = max(means, key=lambda name: np.mean(means[name]))
    found = {(row["block"], row["attention"]): 100 * row["accuracy"] for row in rows if row["representation"] == best}
    order = sorted({block for block, _ in found})
    sides = {"down": [block for block in order if block.startswith("down")], "mid": [block for block in order if block.startswith("mid")],
             "up": [block for block in order if block.startswith("up")][::-1]}
    sides["down"] += [block for block in order if not block.startswith(("down", "mid", "up"))]
    height = max(len(sides["down"]), len(sides["up"]))
    figure = Figure((WIDTH, 0.6 + 0.24 * (height + len(sides["mid"]))))
    axes = figure.subplots()
    low, high = min(found.values()), max(found.values())
    shade = matplotlib.colormaps["cividis"]
    for side, x in (("down", 0.0), ("mid", 3.0), ("up", 6.0)):
        for i, block in enumerate(sides[side]):
            y = i + height - len(sides[side]) if side == "up" else i + height * (side == "mid")
            for j, kind in enumerate(("attn1", "attn2")):
                value = found.get((block, kind))
                if value is None:
                    continue
                part = (value - low) / (high - low) if high > low else 0.5
                axes.add_patch(matplotlib.patches.Rectangle((x + 0.9 * j, y - 0.45), 0.88, 0.9, facecolor=shade(part), linewidth=0, gid="block"))
                axes.text(x + 0.9 * j + 0.44, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=ON_DARK if part < 0.55 else ON_LIGHT)
            name = block.replace("_blocks.", " ").replace(".attentions.", ".").replace("mid_block", "mid")
            axes.text(x - 0.1 if side != "up" else x + 1.9, y, name, ha="right" if side != "up" else "left", va="center", fontsize=6.5)
    axes.set_xlim(-1.6, 9.2)
    axes.set_ylim(height + len(sides["mid"]) - 0.4, -1.2)
    for x in (0.0, 6.0):
        for j, kind in enumerate(("attn1", "attn2")):
            axes.text(x + 0.9 * j + 0.44, -0.75, kind, ha="center", fontsize=6, color=COLOURS[("visual_only", "text_only")[j]])
    axes.set_axis_off()
    axes.set_title(f"{best}: test accuracy of each block alone, %", loc="left")
    return figure


MARKERS = "osD^vP*X"       # one for runs that a line may join


# --- several runs: results with a `name` of their own, and a `group` that those share whose accuracies may be joined by a line


def against_size(runs: list[dict], quantity: str, low: str, high: str, label: str) -> Figure | None:
    """A quantity of scaling_rows against the number of LoRAs, a panel for each representation."""
    with matplotlib.rc_context(STYLE):
        rows = [row for row in scaling_rows(runs) if row[quantity] is not None and row["rows"] and not group_of(row["layer_set"])]
        if not rows:
            return None
        names = [name for name in CHOICES if any(row["representation"] == name for row in rows)]
        sets, sizes = list(dict.fromkeys(row["layer_set"] for row in rows)), sorted({row["rows"] for row in rows})
        groups, lines = list(dict.fromkeys(row["group"] for row in rows)), -(-len(names) // 3)
        figure = Figure((WIDE, 0.7 + 1.5 * lines))
        grid = figure.subplots(lines, 3, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(names):]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            for i, layer_set in enumerate(sets):
                for number, group in enumerate(groups):
                    points = sorted((row for row in rows if (row["representation"], row["layer_set"], row["group"]) == (name, layer_set, group)),
                                    key=lambda row: row["rows"])
                    colour, dodge = colour_of(layer_set), 1.04 ** (number * len(sets) + i - (len(groups) * len(sets) - 1) / 2)
                    axes.plot([dodge * row["rows"] for row in points], [100 * row[quantity] for row in points], color=colour,
                              marker=MARKERS[number % len(MARKERS)], markersize=3, gid="curve")
                    for row in (row for row in points if row.get(low) is not None):
                        axes.plot([dodge * row["rows"]] * 2, [100 * row[low], 100 * row[high]], color=colour, linewidth=0.8, gid="interval")
            axes.set_title(name, loc="left")
            axes.set_xscale("log")
            axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        for axes in grid[:, 0]:
            axes.set_ylabel(label)
        for axes in list(grid.flat[max(0, len(names) - 3):len(names)]):
            axes.set_xlabel("LoRAs in the data set")
            axes.tick_params(labelbottom=True)
        key_of_layer_sets(figure, sets)
        if len(groups) > 1:
            shown = {group: ", ".join(dict.fromkeys(row["run"] for row in rows if row["group"] == group)) for group in groups}
            handles = [matplotlib.lines.Line2D([], [], linestyle="", marker=MARKERS[number % len(MARKERS)], color=INK, markersize=3, label=names_of)
                       for number, names_of in enumerate(shown.values())]
            figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=6.5)
        return figure


def scaling(runs: list[dict]) -> Figure | None:
    return against_size(runs, "accuracy", "low", "high", "test accuracy, %")


def scaling_drop(runs: list[dict]) -> Figure | None:
    return against_size(runs, "drop", "drop_low", "drop_high", "drop, points")


def scaling_retention(runs: list[dict]) -> Figure | None:
    return against_size(runs, "retention", "", "", "retained, %")


COMPARISONS: dict[str, tuple[str, Callable[[list[dict]], list[dict]], Callable[[list[dict]], Figure | None]]] = {
    "scaling": ("Accuracy and size", scaling_rows, scaling),
    "scaling_drop": ("The drop and size", lambda runs: [], scaling_drop),
    "scaling_retention": ("What is retained, and size", lambda runs: [], scaling_retention),
}
FIGURES: dict[str, tuple[str, Callable[[dict], list[dict]], Callable[[dict], Figure | None]]] = {
    "accuracy": ("Test accuracy", accuracy_rows, accuracy),
    "drop": ("The drop without the text layers", drop_rows, drop),
    "class_drop": ("The drop by class", class_drop_rows, class_drop),
    "retention": ("What is retained", retention_rows, retention),
    "learning_curves": ("Learning curves", learning_curves_rows, learning_curves),
    "confusion": ("Confusion matrices", confusion_rows, confusion),
    "confusion_all": ("Confusion matrices of every representation", lambda results: [], confusion_all),
    "gaps": ("Training, validation and test", gaps_rows, gaps),
    "precision_recall": ("Precision against recall", precision_recall_rows, precision_recall),
    "cost": ("Columns and seconds against accuracy", cost_rows, cost),
    "controls": ("Controls", controls_rows, controls),
    "audits": ("Audits", audits_rows, audits),
    "blocks": ("Where in the U-Net", blocks_rows, blocks),
}
