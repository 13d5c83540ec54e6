"""The columns of metrics.parquet, and the row of a sample. Names are those of the public original."""

from __future__ import annotations

from typing import Any

from .samples import Sample

COMPLETIONS = ("fact", "hall")
LAYER_MEASURES = ("l0_norm", "reconstruction_error", "gini", "sphericity", "shape_class", "dimensionality")
# Measure of a completion -> 1 if its _diff is hallucination - fact, -1 if it is fact - hallucination.
PAIRED = {
    "centroid_drift": 1,
    "axis_twist": 1,
    "stability": -1,
    "entropy": 1,
    "cross_layer_consistency": -1,
    "residual_consistency": -1,
}


def columns(layers: tuple[int, ...]) -> list[str]:
    """The names of all columns, in order."""
    return [
        "sample_id",
        "domain",
        "complexity",
        *(f"l{layer}_{text}_{name}" for layer in layers for text in COMPLETIONS for name in LAYER_MEASURES),
        *(f"{name}_{end}" for name in PAIRED for end in (*COMPLETIONS, "diff")),
    ]


def measures(layers: tuple[int, ...]) -> dict[str, tuple[str, str, int]]:
    """Every measure that is a number: its columns of fact and hallucination, and the sign of its difference.

    A layer's measures are compared as hallucination - fact.
    """
    found = {name: (f"{name}_fact", f"{name}_hall", sign) for name, sign in PAIRED.items()}
    for layer in layers:
        for name in LAYER_MEASURES:
            if name != "shape_class":
                found[f"l{layer}_{name}"] = f"l{layer}_fact_{name}", f"l{layer}_hall_{name}", 1
    return found


def row_of(
    sample: Sample, by_layer: dict[tuple[int, str], tuple], paired: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """A sample's row: (layer, "fact" or "hall") -> LAYER_MEASURES, and measure -> its two values."""
    row: dict[str, Any] = {"sample_id": sample.id, "domain": sample.domain, "complexity": sample.complexity}
    for (layer, text), values in by_layer.items():
        for name, value in zip(LAYER_MEASURES, values, strict=True):
            row[f"l{layer}_{text}_{name}"] = value
    for name, sign in PAIRED.items():
        fact, hall = paired[name]
        row |= {f"{name}_fact": fact, f"{name}_hall": hall, f"{name}_diff": sign * (hall - fact)}
    return row
