#!/usr/bin/env python3
"""Write a data set of random LoRAs with the published topology: 128 layers of SD v1.5, ten classes, nested float32 lists.

A signal may be planted in the chosen attention kind. Its carrier is the norms: every class has its own scale in every
layer, so that a representation that sees the size of a matrix can tell the classes apart there and nowhere else. Or the
product: `down` is noise as a LoRA is initialised, and `up` answers to it as training would, up = noise + a (b . down) with
a and b of the class, so that up @ down has the part a b' in common over a class. a is +1 and -1 in equal number, and those
of two classes differ by a cyclic shift, so that no statistic, spectrum or Fourier magnitude of a single matrix depends on
the class, not even in distribution. The folder is read like one written by save_to_disk. Rows depend on --seed and their
number alone, not on --rows, --layout or --signal's other kinds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Array2D, ClassLabel, Features, List, Value

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arrow_folder import arrow_matrices, finish_folder, write_shard  # noqa: E402

from lora_data import attention_kind, sd15_shapes  # noqa: E402

SHARD_BYTES = 500_000_000
NUM_CLASSES = 10
STRENGTHS = {"norms": 0.01, "product": 1.0}   # where none is given
SIGNAL_KINDS = {"none": (), "attn1": ("attn1",), "attn2": ("attn2",), "both": ("attn1", "attn2")}


def features_of(shapes: list[tuple[str, int, int]], layout: str) -> Features:
    """The columns as `datasets` knows them."""
    def matrix(rows: int, cols: int):
        return {"nested": List(List(Value("float32"))), "array2d": Array2D((rows, cols), "float32"),
                "fixed": List(List(Value("float32"), length=cols), length=rows)}[layout]

    columns = {layer: matrix(rows, cols) for layer, rows, cols in shapes}
    return Features(columns | {"category_label": ClassLabel(names=[f"class_{i}" for i in range(NUM_CLASSES)])})


def class_directions(seed: int, number: int, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """a (C, out), cyclic shifts of one sequence of as many +1 as -1, and b (C, in) of length 1, for the product's part a b'."""
    rng = np.random.default_rng([seed, 3, number])
    signs = rng.permutation(np.where(np.arange(out) % 2, -1.0, 1.0))
    a = np.stack([np.roll(signs, shift) for shift in rng.choice(out, NUM_CLASSES, replace=out < NUM_CLASSES)])
    b = rng.normal(size=(NUM_CLASSES, inner))
    return a.astype(np.float32), (b / np.linalg.norm(b, axis=1)[:, None]).astype(np.float32)


def make_shard(start: int, stop: int, seed: int, shapes, layout: str, kinds: tuple[str, ...], carrier: str, strength: float,
               schema: pa.Schema) -> pa.Table:
    """Rows start:stop."""
    labels = np.random.default_rng([seed, 0]).integers(0, NUM_CLASSES, stop)[start:]
    columns, down = [], np.zeros(0)
    for number, (layer, rows, cols) in enumerate(shapes, 1):
        rng = np.random.Generator(np.random.SFC64([seed, 2, number, start]))
        weights = rng.standard_normal((stop - start, rows, cols), dtype=np.float32)
        if attention_kind(layer) in kinds and carrier == "norms":
            scales = np.exp(strength * np.random.default_rng([seed, 1, number]).normal(size=NUM_CLASSES)).astype(np.float32)
            weights *= scales[labels][:, None, None]
        if attention_kind(layer) in kinds and carrier == "product" and ".up." in layer:
            a, b = class_directions(seed, number, rows, down.shape[2])
            seen = np.einsum("nrd,nd->nr", down, b[labels])
            weights += strength * a[labels][:, :, None] * seen[:, None]
        down = weights                                                   # `up` is next to it in sorted order
        array = arrow_matrices(weights, layout)
        columns.append(pa.ExtensionArray.from_storage(schema.field(layer).type, array) if layout == "array2d" else array)
    return pa.Table.from_arrays([*columns, pa.array(labels)], schema=schema)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder to write; an existing one is refused without --overwrite")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--layout", choices=("nested", "array2d", "fixed"), default="nested", help="how a matrix is stored (default: nested)")
    parser.add_argument("--signal", choices=tuple(SIGNAL_KINDS), default="both", help="attention kinds that know the class (default: both)")
    parser.add_argument("--carrier", choices=tuple(STRENGTHS), default="norms", help="what of the weights knows it (default: norms)")
    parser.add_argument("--strength", type=float, help="norms: std of the log of a class's scale in a layer (default: 0.01); "
                        "product: std of the signal in `up` over that of its noise (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.rows < 1 or arguments.rank < 1:
        parser.error("--rows and --rank are at least 1")
    strength = STRENGTHS[arguments.carrier] if arguments.strength is None else arguments.strength
    if arguments.output.exists():
        if not (arguments.overwrite and (arguments.output / "state.json").is_file()):
            parser.error(f"{arguments.output} exists: choose another folder, or --overwrite to replace a data set")
        shutil.rmtree(arguments.output)
    began = time.perf_counter()
    shapes = sd15_shapes(arguments.rank)
    features = features_of(shapes, arguments.layout)
    schema = features.arrow_schema
    row_bytes = 4 * sum(rows * cols for _, rows, cols in shapes)
    shard_rows = max(1, SHARD_BYTES // row_bytes)
    starts = range(0, arguments.rows, shard_rows)
    arguments.output.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(starts):05}.arrow" for i in range(len(starts))]
    for name, start in zip(names, starts, strict=True):
        stop = min(start + shard_rows, arguments.rows)
        kinds = SIGNAL_KINDS[arguments.signal]
        table = make_shard(start, stop, arguments.seed, shapes, arguments.layout, kinds, arguments.carrier, strength, schema)
        write_shard(arguments.output / name, schema, [table])
        print(f"{stop}/{arguments.rows} rows, {time.perf_counter() - began:.1f}s", flush=True)
    finish_folder(arguments.output, features, names, f"synthetic-{arguments.seed}")


if __name__ == "__main__":
    main()
