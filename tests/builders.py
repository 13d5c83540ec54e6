"""Small data sets for the tests, in every layout that a column can have, and records of finished cells."""

import types

import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, List, Value

import representations
from ablation.collection import Columns, View, collect_rows
from ablation.scores import cell_record
from ablation.sources import open_dataset
from ablation.splits import Split, SplitSpec, split_rows

LAYOUTS = ("nested", "array2d", "fixed", "large", "float16", "float64")
MODULES = [
    f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.{kind}.{p}.lora"
    for i in range(2)
    for kind in ("attn1", "attn2")
    for p in ("to_q", "to_v")
]


def matrix_feature(layout, rows, cols):
    if layout == "array2d":
        return Array2D((rows, cols), "float32")
    if layout == "fixed":
        return List(List(Value("float32"), length=cols), length=rows)
    if layout == "large":
        from datasets import LargeList

        return LargeList(LargeList(Value("float32")))
    return List(List(Value(layout if layout.startswith("float") else "float32")))


def lora_columns(n=24, rank=2, width=6, seed=0, signal=None, knowing=("attn2",)):
    """{column: (n, rows, cols) float32};
    `signal` (n,) scales the matrices of the attention kinds `knowing`.
    """
    rng = np.random.default_rng(seed)
    columns = {}
    for module in MODULES:
        for side, shape in (("down", (rank, width)), ("up", (width, rank))):
            w = rng.normal(size=(n, *shape)).astype(np.float32)
            if signal is not None and any(kind in module for kind in knowing):
                w *= np.asarray(signal, dtype=np.float32)[:, None, None]
            columns[f"{module}.{side}.weight"] = w
    return columns


def labels_of(kind, n):
    """A labels column and its feature."""
    numbers = np.arange(n) % 3
    if kind == "string":
        return [["cat", "dog", "Ape"][i] for i in numbers], Value("string")
    if kind == "integer":
        return [[7, 3, 9][i] for i in numbers], Value("int64")
    return numbers.tolist(), ClassLabel(names=["zebra", "apple", "mango", "never"])


def lora_dataset(n=24, layout="nested", label_kind="string", seed=0, signal=0.0, **kwargs) -> Dataset:
    """`signal`: by how much the scale of a class's matrices lies above that of the one before."""
    labels, feature = labels_of(label_kind, n)
    strengths = [1 + signal * (i % 3) for i in range(n)] if signal else None
    columns = lora_columns(n, seed=seed, signal=strengths, **kwargs)
    features = {name: matrix_feature(layout, *w.shape[1:]) for name, w in columns.items()}
    features |= {"category_label": feature, "group": Value("string")}
    rows = {name: w.tolist() for name, w in columns.items()}
    return Dataset.from_dict(
        rows | {"category_label": labels, "group": [f"g{i % 5}" for i in range(n)]},
        features=Features(features),
    )


def room_for(rows, sizes):
    """`representations.describe` on a device with memory for so many;
    notes in `sizes` how many it was asked for.
    """

    def describe(w, names):
        sizes.append(len(w))
        if len(w) > rows:
            raise torch.OutOfMemoryError("pretended")
        return real(w, names)

    real = representations.describe
    return describe


def split_of(n, seed, kind="random", labels=None, groups=None):
    """The split of n rows by kind and seed."""
    return split_rows(n, SplitSpec(kind, seed), labels, groups)


def collect(
    dataset,
    name="x",
    device="cpu",
    *,
    label_column="category_label",
    group_column="",
    metadata_columns=(),
    split_seed=42,
):
    """The collection in an open data set."""
    columns = Columns(label_column, group_column, metadata_columns)
    return collect_rows(dataset, name, device, columns, SplitSpec("random", split_seed))


def load(name, device="cpu", *, data_split="", revision="", **kwargs):
    """The collection that a name means."""
    return collect(open_dataset(name, data_split, revision), name, device, **kwargs)


def scored_runs(test_accuracies, n=40):
    """Runs whose test predictions are right for the first so many of n rows."""
    labels = {part: np.arange(n) % 2 for part in ("train", "val", "test")}
    runs = []
    for i, accuracy in enumerate(test_accuracies):
        right = labels["test"].copy()
        right[round(accuracy * n) :] = 1 - right[round(accuracy * n) :]
        predictions = {"train": labels["train"], "val": labels["val"], "test": right}
        runs.append(
            types.SimpleNamespace(
                seed=42 + i,
                best_epoch=i + 1,
                predictions=predictions,
                seconds=2.0,
                train_loss=[1.0],
                val_accuracy=[0.5],
                learning_rate=[1e-3],
                fold=0,
            )
        )
    return types.SimpleNamespace(runs=runs, trained_dim=4), labels


def record_of(cell, accuracies):
    """The record of a cell whose runs have these test accuracies on 40 rows."""
    runs, labels = scored_runs(accuracies)
    rows = np.arange(40)
    view = View(labels["train"], Split(rows, rows, rows, False))
    return cell_record(cell, runs, view, 2, {"num_layers": 8, "feature_dim": 40})
