"""The figure of random halves: what the visual layers are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ablation.report.rows import Results
from ablation.report.style import COLOURS, INK, WIDTH, drawn, key_of_layer_sets, name_rows

MARKED = ("all_layers", "visual_only", "text_only")
BARS = 24  # of a histogram of halves


@drawn
def halves(results: Results) -> Figure | None:
    """Scores of random halves with the visual, the text half and all layers marked: histograms of the mean
    over the representations and of the product, then each representation.
    """
    null = (results.get("inference") or {}).get("null")
    if not null:
        return None
    tops = [(f"mean of {len(null['representations'])}", null["mean"])]
    product = null["product"]
    if product and product["representation"] not in null["representations"]:
        tops.append((product["representation"], product))
    entries = null["entries"]
    heights = [0.85] * len(tops) + [0.25 + 0.17 * len(entries)]
    figure = Figure((WIDTH, sum(heights) + 0.75))
    *histograms, strips = figure.subplots(len(heights), 1, height_ratios=heights)
    for axes, (title, entry) in zip(histograms, tops, strict=True):
        draw_histogram(axes, title, entry)
    for y, entry in enumerate(entries):
        draw_strip(strips, y, entry)
    name_rows(strips, [entry["representation"] for entry in entries])
    strips.set_xlabel(f"test {results['inference']['score']} by {null['reader']}, %")
    key_of_layer_sets(figure, [*MARKED, "random_half.0"])
    return figure


def draw_histogram(axes: Any, title: str, entry: dict[str, Any]) -> None:
    """How many halves have which score, with the three sets as lines."""
    scores = 100 * np.array(entry["halves"])
    axes.hist(scores, BARS, color=COLOURS["random_half"], alpha=0.45, gid="halves")
    for layer_set in MARKED:
        axes.axvline(100 * entry[layer_set], color=COLOURS[layer_set], linewidth=1.6, gid=layer_set)
    place = entry["visual"]
    axes.set_title(
        f"{title}: visual half is {place['rank']} of {1 + len(scores)}, p = {place['p_two_sided']:.2f}",
        loc="left",
        color=INK,
    )
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def draw_strip(axes: Any, y: int, entry: dict[str, Any]) -> None:
    """A representation's halves as ticks on a line, with the three sets as points."""
    scores = 100 * np.array(entry["halves"])
    axes.plot(
        scores,
        np.full(len(scores), y),
        "|",
        color=COLOURS["random_half"],
        alpha=0.35,
        markersize=5,
        gid="half",
    )
    for layer_set in MARKED:
        axes.plot([100 * entry[layer_set]], [y], "o", color=COLOURS[layer_set], markersize=3, gid=layer_set)
