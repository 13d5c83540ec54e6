"""Figures of controls, audits and single blocks."""

from __future__ import annotations

import re
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.text
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ablation.cells import spoken_cell
from ablation.report.rows import Results, audits_rows, blocks_rows, controls_rows
from ablation.report.style import COLOURS, FAINT, INK, ON_DARK, ON_LIGHT, WIDE, WIDTH, drawn, name_rows


@drawn
def controls(results: Results) -> Figure | None:
    """Accuracy of each control with its interval and chance; of shuffled labels with the range that chance
    allows a single cell.
    """
    rows = controls_rows(results)
    if not rows:
        return None
    figure = Figure((WIDE * 0.75, 0.7 + 0.16 * len(rows)))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if row["low"] is not None:
            axes.plot(
                [100 * row["low"], 100 * row["high"]], [y, y], color=COLOURS["all_layers"], gid="interval"
            )
        axes.plot([100 * row["accuracy"]], [y], "o", color=COLOURS["all_layers"], markersize=3, gid="point")
        if row["spread_of_chance"] is not None:
            axes.plot(
                [100 * (row["chance"] + side * 1.96 * row["spread_of_chance"]) for side in (-1, 1)],
                [y, y],
                color=FAINT,
                linewidth=2.5,
                alpha=0.6,
                zorder=1,
                gid="range",
            )
        axes.plot([100 * row["chance"]], [y], "|", color=INK, markersize=6, gid="chance")
    name_rows(axes, [spoken_cell(row["cell"]) for row in rows])
    axes.set_xlim(left=0)
    axes.set_xlabel("test accuracy, %\n(strokes: chance; grey: its range for one cell)")
    check = (results.get("inference") or {}).get("shuffled")
    if check:
        axes.set_title(f"shuffled labels: p = {check['p']:.3f} for all cells together", loc="left")
    return figure


@drawn
def audits(results: Results) -> Figure | None:
    """Predictions that stay, all layers: under noise by its level, and after a change of gauge."""
    rows = [row for row in audits_rows(results) if row["layer_set"] == "all_layers"] or audits_rows(results)
    if not rows:
        return None
    kinds, names = (
        list(dict.fromkeys(row["audit"] for row in rows)),
        list(dict.fromkeys(row["representation"] for row in rows)),
    )
    figure = Figure((1.2 + 2.2 * len(kinds), 0.6 + 0.19 * len(names)))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        variants = list(dict.fromkeys(row["variant"] for row in rows if row["audit"] == kind))
        shades = matplotlib.colormaps["cividis"](np.linspace(0.85, 0.1, len(variants)))
        for row in (row for row in rows if row["audit"] == kind):
            axes.plot(
                [100 * row["agreement"]],
                [names.index(row["representation"])],
                "o",
                markersize=3.5,
                gid=row["variant"],
                color=shades[variants.index(row["variant"])],
            )
        name_rows(axes, names)
        axes.set_xlim(0, 103)
        axes.set_title(
            f"{kind}: " + (", ".join(variants) + " (dark: more)" if len(variants) > 1 else variants[0]),
            loc="left",
            fontsize=6.5,
        )
        axes.set_xlabel("predictions that stay, %")
    return figure


# Kind of layer -> layer set of the same colour, and column of a block.
SET_OF_KIND = {"attn1": "visual_only", "visual": "visual_only", "attn2": "text_only", "text": "text_only"}
KIND_COLUMNS = tuple(dict.fromkeys(SET_OF_KIND.values()))


@drawn
def blocks(results: Results) -> Figure | None:
    """A map of the model, each kind of layer of each block alone,
    by the representation whose mean is highest.

    Down blocks of a U-Net stand on the left from the top, the middle block below, up blocks on the right. The
    blocks of a transformer run down the left side, then down the right.
    """
    rows = [row for row in blocks_rows(results) if row["attention"] in SET_OF_KIND]
    if not rows:
        return None
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["representation"], []).append(row["accuracy"])
    best = max(means, key=lambda name: np.mean(means[name]))
    accuracies = {
        (row["block"], SET_OF_KIND[row["attention"]]): 100 * row["accuracy"]
        for row in rows
        if row["representation"] == best
    }
    columns = block_columns(sorted({block for block, _ in accuracies}, key=natural))
    height = max(len(columns["down"]), len(columns["up"]))
    figure = Figure((WIDTH, 0.6 + 0.24 * (height + len(columns["mid"]))))
    axes = figure.subplots()
    for side, x in (("down", 0.0), ("mid", 3.0), ("up", 6.0)):
        top = {"down": 0, "mid": height, "up": height - len(columns["up"])}[side]
        for i, block in enumerate(columns[side]):
            draw_block(axes, accuracies, block, (x, top + i), is_named_right=side == "up")
    axes.set_xlim(-1.6, 9.2)
    axes.set_ylim(height + len(columns["mid"]) - 0.4, -1.2)
    for x in (0.0, 6.0):
        for j, layer_set in enumerate(KIND_COLUMNS):
            kinds = dict.fromkeys(
                row["attention"] for row in rows if SET_OF_KIND[row["attention"]] == layer_set
            )
            heading = ", ".join(sorted(kinds))
            axes.text(x + 0.9 * j + 0.44, -0.75, heading, ha="center", fontsize=6, color=COLOURS[layer_set])
    axes.set_axis_off()
    axes.set_title(f"{best}: test accuracy of each block alone, %", loc="left")
    return figure


def natural(block: str) -> list[tuple[int, str]]:
    """A key that sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", block)]


def block_columns(blocks: list[str]) -> dict[str, list[str]]:
    """The blocks of each column of the map, from the top. Blocks that are no U-Net's join the down blocks of
    a U-Net; if there are no others, half of them stands on each side.
    """
    sides = ("down", "mid", "up")
    if not any(block.startswith(sides) for block in blocks):
        half = (len(blocks) + 1) // 2
        return {"down": blocks[:half], "mid": [], "up": blocks[half:]}
    columns = {side: [block for block in blocks if block.startswith(side)] for side in sides}
    columns["up"].reverse()
    columns["down"] += [block for block in blocks if not block.startswith(sides)]
    return columns


def draw_block(
    axes: Any, accuracies: dict, block: str, place: tuple[float, float], is_named_right: bool
) -> None:
    """A block's cells, one for each kind of layer, shaded by accuracy, with the block's name beside them."""
    x, y = place
    low, high = min(accuracies.values()), max(accuracies.values())
    for j, layer_set in enumerate(KIND_COLUMNS):
        value = accuracies.get((block, layer_set))
        if value is None:
            continue
        share = (value - low) / (high - low) if high > low else 0.5
        shade = matplotlib.colormaps["cividis"](share)
        corner = (x + 0.9 * j, y - 0.45)
        axes.add_patch(Rectangle(corner, 0.88, 0.9, facecolor=shade, linewidth=0, gid="block"))
        ink = ON_DARK if share < 0.55 else ON_LIGHT
        text = f"{value:.0f}"
        axes.text(x + 0.9 * j + 0.44, y, text, ha="center", va="center", fontsize=6.5, color=ink)
    name = block.replace("_blocks.", " ").replace(".attentions.", ".").replace("mid_block", "mid")
    name = name.replace(".text_model.encoder.layers.", " ")
    side, anchor = (x + 1.9, "left") if is_named_right else (x - 0.1, "right")
    axes.text(side, y, name, ha=anchor, va="center", fontsize=6.5)
