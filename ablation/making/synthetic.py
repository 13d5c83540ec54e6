"""A collection of random LoRAs with the published topology, with a signal where it is wanted.

The signal's carrier may be the norms: every class has its own scale in every layer, so that a representation
that sees the size of a matrix can tell the classes apart. Or the product: `down` is noise as a LoRA is
initialised, and `up` answers to it as training would, up = noise + a (b . down) with a and b of the class, so
that up @ down has the part a b' in common over a class. a holds +1 and -1 in equal number, and the a of two
classes differ by a cyclic shift, so that no statistic, spectrum or Fourier magnitude of a single matrix
depends on the class, not even in distribution.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Array2D, ClassLabel, Features, List, Value

from ablation.layers import attention_kind, sd15_shapes
from ablation.making.arrow_folder import arrow_matrices, finish_folder, write_shard
from ablation.making.progress import say

FILE_BYTES = 500_000_000
SYNTHETIC_CLASSES = 10
LAYOUTS = ("nested", "array2d", "fixed")
STRENGTHS = {"norms": 0.01, "product": 1.0}  # the default of each carrier
SIGNAL_KINDS = {"none": (), "attn1": ("attn1",), "attn2": ("attn2",), "both": ("attn1", "attn2")}


@dataclass(frozen=True)
class SyntheticRecipe:
    """What the rows depend on.
    A row depends on the seed and its number, not on the number of rows or the layout.

    `strength`, for norms: std of the log of a class's scale in a layer; for the product: std of the signal in
    `up` over that of its noise.
    """

    rows: int = 1000
    rank: int = 1
    layout: str = "nested"
    signal: str = "both"
    carrier: str = "norms"
    strength: float = STRENGTHS["norms"]
    seed: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Attention kinds that know the class."""
        return SIGNAL_KINDS[self.signal]

    @property
    def shapes(self) -> list[tuple[str, int, int]]:
        """(layer, rows, cols) of every layer."""
        return sd15_shapes(self.rank)


def synthetic_features(recipe: SyntheticRecipe) -> Features:
    """The columns as `datasets` knows them."""

    def matrix(rows: int, cols: int):
        if recipe.layout == "array2d":
            return Array2D((rows, cols), "float32")
        if recipe.layout == "fixed":
            return List(List(Value("float32"), length=cols), length=rows)
        return List(List(Value("float32")))

    columns = {layer: matrix(rows, cols) for layer, rows, cols in recipe.shapes}
    return Features(
        columns | {"category_label": ClassLabel(names=[f"class_{i}" for i in range(SYNTHETIC_CLASSES)])}
    )


def class_directions(seed: int, number: int, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """A (C, out) and b (C, in), of length 1, of the product's part a b' in the layer with this number.

    The a are cyclic shifts of one sequence of as many +1 as -1.
    """
    rng = np.random.default_rng([seed, 3, number])
    signs = rng.permutation(np.where(np.arange(out) % 2, -1.0, 1.0))
    shifts = rng.choice(out, SYNTHETIC_CLASSES, replace=out < SYNTHETIC_CLASSES)
    a = np.stack([np.roll(signs, shift) for shift in shifts])
    b = rng.normal(size=(SYNTHETIC_CLASSES, inner))
    return a.astype(np.float32), (b / np.linalg.norm(b, axis=1)[:, None]).astype(np.float32)


def make_shard(recipe: SyntheticRecipe, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Rows start:stop."""
    labels = np.random.default_rng([recipe.seed, 0]).integers(0, SYNTHETIC_CLASSES, stop)[start:]
    columns: list[pa.Array] = []
    down = np.zeros((0, 0, 0), np.float32)
    for number, (layer, rows, cols) in enumerate(recipe.shapes, 1):
        rng = np.random.Generator(np.random.SFC64([recipe.seed, 2, number, start]))
        weights = rng.standard_normal((stop - start, rows, cols), dtype=np.float32)
        has_signal = attention_kind(layer) in recipe.kinds
        if has_signal and recipe.carrier == "norms":
            normal = np.random.default_rng([recipe.seed, 1, number]).normal(size=SYNTHETIC_CLASSES)
            scales = np.exp(recipe.strength * normal).astype(np.float32)
            weights *= scales[labels][:, None, None]
        if has_signal and recipe.carrier == "product" and ".up." in layer:
            a, b = class_directions(recipe.seed, number, rows, down.shape[2])
            seen = np.einsum("nrd,nd->nr", down, b[labels])
            weights += recipe.strength * a[labels][:, :, None] * seen[:, None]
        down = weights  # `up` is next to `down` in sorted order
        array = arrow_matrices(weights, recipe.layout)
        if recipe.layout == "array2d":
            array = pa.ExtensionArray.from_storage(schema.field(layer).type, array)
        columns.append(array)
    return pa.Table.from_arrays([*columns, pa.array(labels)], schema=schema)


def write_synthetic(recipe: SyntheticRecipe, output: Path) -> None:
    """Write a collection to a new folder, which is read like one written by save_to_disk."""
    began = time.perf_counter()
    features = synthetic_features(recipe)
    schema = features.arrow_schema
    row_bytes = 4 * sum(rows * cols for _, rows, cols in recipe.shapes)
    shard_rows = max(1, FILE_BYTES // row_bytes)
    starts = range(0, recipe.rows, shard_rows)
    output.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(starts):05}.arrow" for i in range(len(starts))]
    for name, start in zip(names, starts, strict=True):
        stop = min(start + shard_rows, recipe.rows)
        write_shard(output / name, schema, [make_shard(recipe, start, stop, schema)])
        say(f"{stop}/{recipe.rows} rows, {time.perf_counter() - began:.1f}s")
    finish_folder(output, features, names, f"synthetic-{recipe.seed}")
