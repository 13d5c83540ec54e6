"""A run's table -> the dashboard of eight panels, PNG and PDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checkpointing import make_folder, replacing

from .rows import COMPLETIONS, PAIRED, measures
from .summary import LEVEL, half_interval

COLOURS = {"fact": "#2b6cb0", "hall": "#d9822b"}
NAMES = {"fact": "fact", "hall": "hallucination"}
SHAPES = {
    "Spherical": "#4c78a8",
    "Oblate": "#72b7b2",
    "Prolate": "#e45756",
    "Triaxial": "#b8b0ac",
    "None": "#333333",
}
OFFSET = 0.18  # of fact and hallucination about their common place


def draw(table: pl.DataFrame, comparison: pl.DataFrame, folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """Write comprehensive_dashboard.png and .pdf; returns their paths."""
    layers = layers_of(table)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(17, 9.5), layout="constrained")
        axes = figure.subplots(2, 4, gridspec_kw={"width_ratios": (1, 1, 1, 1.25)}).ravel()
        by_layer(axes[0], table, layers, "l0_norm", "A  Active features", "features above 0")
        by_layer(axes[1], table, layers, "reconstruction_error", "B  Reconstruction error", "|x - SAE(x)|")
        by_layer(axes[2], table, layers, "dimensionality", "C  Dimensionality", "participation ratio")
        shape_classes(axes[3], table, layers)
        first = layers[0]
        by_domain(
            axes[4], table, "centroid_drift", f"E  Centroid drift, layer {first}", "degrees from the prompt"
        )
        by_domain(axes[5], table, "axis_twist", f"F  Axis twist, layer {first}", "degrees from the prompt")
        by_domain(axes[6], table, "stability", f"G  Stability under noise, layer {first}", "Jaccard index")
        effect_sizes(axes[7], comparison, layers)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False)
        figure.supxlabel(
            "Boxes: median and quartiles; whiskers: 5 to 95 %. Points: means with 95 % intervals.", fontsize=9
        )
        figure.suptitle(title(table, manifest), fontsize=12)
        return [save(figure, folder / f"comprehensive_dashboard.{end}") for end in ("png", "pdf")]


def layers_of(table: pl.DataFrame) -> list[int]:
    """The layers of a table, from its columns."""
    end = "_fact_l0_norm"
    return sorted(int(name[1 : -len(end)]) for name in table.columns if name.endswith(end))


def title(table: pl.DataFrame, manifest: dict[str, Any]) -> str:
    """What was measured, and the warning of a toy."""
    model = manifest.get("settings", {}).get("model", "unknown")
    lines = [f"Facts and hallucinations in SAE features: {table.height} samples, model: {model}"]
    return "\n".join([*lines, *([manifest["warning"]] if "warning" in manifest else [])])


def by_layer(ax: Axes, table: pl.DataFrame, layers: list[int], name: str, heading: str, unit: str) -> None:
    """Boxes of a measure of each layer: median, quartiles, 5th and 95th percentile."""
    for text, shift in zip(COMPLETIONS, (-OFFSET, OFFSET), strict=True):
        boxes = ax.boxplot(
            [table[f"l{layer}_{text}_{name}"].to_numpy() for layer in layers],
            positions=np.arange(len(layers)) + shift,
            widths=0.3,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "white"},
        )
        for box in boxes["boxes"]:
            box.set(facecolor=COLOURS[text], edgecolor=COLOURS[text])
        ax.plot([], [], color=COLOURS[text], linewidth=6, label=NAMES[text])
    ax.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    ax.set_ylim(bottom=0)
    ax.set_ylabel(unit)
    ax.set_title(heading, loc="left", fontweight="bold")


def shape_classes(ax: Axes, table: pl.DataFrame, layers: list[int]) -> None:
    """Shares of the shape classes, a bar for each layer and completion."""
    places, ticks = [], []
    left = np.zeros(2 * len(layers))
    columns = [f"l{layer}_{text}_shape_class" for layer in layers for text in COMPLETIONS]
    for i, layer in enumerate(layers):
        for j, text in enumerate(COMPLETIONS):
            places.append(i + (j - 0.5) * 0.42)
            ticks.append(f"layer {layer}, {NAMES[text]}")
    for shape, colour in SHAPES.items():
        shares = np.array([(table[name] == shape).mean() for name in columns], dtype=float)
        if shares.any():
            ax.barh(places, shares, left=left, height=0.36, color=colour, label=shape)
            left += shares
    ax.set_yticks(places, ticks)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of samples")
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=5, frameon=False, handlelength=1)
    ax.set_title("D  Shape of the active features", loc="left", fontweight="bold")


def by_domain(ax: Axes, table: pl.DataFrame, name: str, heading: str, unit: str) -> None:
    """Means of a measure with 95 % intervals (t), a pair for each domain."""
    domains = table["domain"].unique(maintain_order=True).to_list()
    for text, shift in zip(COMPLETIONS, (-OFFSET, OFFSET), strict=True):
        for place, domain in enumerate(domains):
            values = table.filter(pl.col("domain") == domain)[f"{name}_{text}"].to_numpy().astype(float)
            half = half_interval(values) if len(values) > 1 else 0.0
            ax.errorbar(place + shift, values.mean(), yerr=half, fmt="o", color=COLOURS[text], capsize=3)
    ax.set_xticks(range(len(domains)), domains)
    ax.set_ylabel(unit)
    ax.set_xlim(-0.5, len(domains) - 0.5)
    ax.set_title(heading, loc="left", fontweight="bold")


def effect_sizes(ax: Axes, comparison: pl.DataFrame, layers: list[int]) -> None:
    """Cohen's d of every measure in every domain; * where Holm's correction leaves a difference."""
    compared = set(comparison["measure"])
    names = [name for name in measures(tuple(layers)) if name in compared]
    domains = comparison["domain"].unique(maintain_order=True).to_list()
    ax.set_title("H  Cohen's d of the pairs", loc="left", fontweight="bold")
    if not domains:
        ax.axis("off")
        ax.text(0.5, 0.5, "no domain has two samples", ha="center", transform=ax.transAxes)
        return
    cells = {(row["measure"], row["domain"]): row for row in comparison.to_dicts()}
    grid = np.array(
        [[cells.get((name, d), {}).get("cohens_d", np.nan) for d in domains] for name in names], dtype=float
    )
    limit = max(0.5, float(np.nanmax(np.abs(grid))))
    ax.imshow(grid, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for i, name in enumerate(names):
        for j, domain in enumerate(domains):
            row = cells.get((name, domain))
            if row:
                star = "*" if row["p_holm"] < LEVEL else ""
                dark = abs(row["cohens_d"]) > 0.6 * limit
                ax.text(
                    j, i, f"{row['cohens_d']:+.2f}{star}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
    signs = {name: " (fact - hall.)" if sign < 0 else "" for name, sign in PAIRED.items()}
    ax.set_yticks(range(len(names)), [name + signs.get(name, "") for name in names], fontsize=7)
    ax.set_xticks(range(len(domains)), domains)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("hallucination - fact if not said otherwise; * p < 0.05 after Holm")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a whole file."""
    make_folder(path.parent)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
    return path
