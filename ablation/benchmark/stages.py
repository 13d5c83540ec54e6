"""Times of reading, features and training, each beside the origin's way and the limit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import representations
from ablation.benchmark.origin import describe_one_by_one, read_formatted, train_from_loader
from ablation.benchmark.timing import Measured, Row, gemm_rate, interleaved
from ablation.catalogue import NINE, REPRESENTATION_GROUPS, SPECS, components_of
from ablation.cell_columns import Features
from ablation.cells import Cell, cells_of
from ablation.collection import LoraCollection
from ablation.extraction import Request, extract_features
from ablation.mlp import HIDDEN_LAYERS
from ablation.reading import BLOCK_ROWS, ReadAhead
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.task import Task, TrainedRuns
from ablation.training import resolve_training, standardise, train_runs
from ablation.work_pool import one_thread_a_core

BENCHMARKED_SETS = ("all_layers", "visual_only")
PRECISIONS = ("float32", "bfloat16")
YARDSTICK_WEIGHTS = 2**17  # sorted, transformed and summed at a time: they stay in a core's cache
COPY_WEIGHTS = 2**28  # the plain copy reads and writes at most 1 GiB, which no cache holds


@dataclass(frozen=True)
class StageOptions:
    """How a stage is timed. `origin_layers`: layers on which the origin's way is measured."""

    repeats: int
    origin_layers: int
    runs: int
    epochs: int
    batch_size: int


def time_reading(data: LoraCollection, options: StageOptions) -> list[Row]:
    """Every layer's weights into memory of our own; the limit is a plain copy of the same bytes."""
    reader, layers = data.weights, data.layers.names
    some, factor = layers_for_origin(data, options.origin_layers)
    blocks = [
        (start, min(start + BLOCK_ROWS, data.num_rows)) for start in range(0, data.num_rows, BLOCK_ROWS)
    ]

    def ours() -> None:
        for start, stop in blocks:
            for layer in layers:
                with reader.buffer() as buffer:
                    reader.read_layer(layer, start, stop, buffer)

    def ahead() -> None:
        for start, stop in blocks:
            for _ in ReadAhead(reader, layers, start, stop, torch.get_num_threads()):
                pass

    def one_by_one() -> None:
        read_formatted(data, some)

    gigabytes = total_weights(data) * 4 / 1e9
    ours_timed, origin, limit = interleaved(
        options.repeats,
        reader.device,
        (ahead if reader.on_gpu else ours, 1),
        (one_by_one, factor),
        (copier(data), 1),
    )
    return [Row("read", f"{len(layers)} layers, {gigabytes:.2f} GB", ours_timed, origin, limit)]


def total_weights(data: LoraCollection) -> int:
    """Weights of the whole collection."""
    return data.layers.weights_per_row * data.num_rows


def copier(data: LoraCollection) -> Callable[[], None]:
    """A function that copies as many bytes as the data set has, a block of a layer at a time."""
    total, block = total_weights(data), data.weights.block_weights
    source, target = (np.ones(min(total, COPY_WEIGHTS), np.float32) for _ in range(2))

    def copy() -> None:
        for start in range(0, total, block):
            size = min(block, total - start)
            place = start % max(len(source) - size, 1)
            np.copyto(target[place : place + size], source[place : place + size])

    return copy


def sorter(data: LoraCollection) -> Callable[[], None]:
    """A function that takes one sort, one FFT and one float64 sum of every layer, each read once: the least
    that the nine need.
    """
    weights = data.weights

    def take(piece: tuple[str, int]) -> None:
        layer, start = piece
        with weights.buffer() as buffer:
            w = weights.read_layer(layer, start, min(start + BLOCK_ROWS, data.num_rows), buffer)
            for part in w.split(max(1, YARDSTICK_WEIGHTS // w[0].numel())):
                representations.sort(part.flatten(1))
                torch.fft.rfft2(part.double())
                part.flatten(1).sum(1, dtype=torch.float64)

    def take_all() -> None:
        pieces = [
            (layer, start) for start in range(0, data.num_rows, BLOCK_ROWS) for layer in data.layers.names
        ]
        with one_thread_a_core(len(pieces) if weights.device == "cpu" else 1) as pool:
            list(pool.map(take, pieces))

    return take_all


def layers_for_origin(data: LoraCollection, count: int) -> tuple[list[str], float]:
    """`count` layers at even distances, and the factor from their weights to all weights.

    Layers are sorted, so every second one is `up`; `down` and `up` are taken in turn.
    """
    layers, layouts = data.layers.names, data.layers.layouts
    count = min(count, len(layers))
    some = [layers[(i * len(layers) // count + i) % len(layers)] for i in range(count)]
    return some, data.layers.weights_per_row / sum(layouts[layer].size for layer in some)


def time_features(data: LoraCollection, options: StageOptions) -> list[Row]:
    """The nine representations of every layer, then the six of every product, reading included."""
    some, factor = layers_for_origin(data, options.origin_layers)
    device = data.weights.device

    def one_by_one() -> None:
        for layer in some:
            describe_one_by_one(torch.cat(read_formatted(data, [layer])).to(device))

    def ours(group: str) -> None:
        names = [name for name in REPRESENTATION_GROUPS[group] if name != "ensemble"]
        extract_features(Request(data, widths_of(names)))

    nine, product, origin, limit, least = interleaved(
        options.repeats,
        device,
        (functools.partial(ours, "nine"), 1),
        (functools.partial(ours, "product"), 1),
        (one_by_one, factor),
        (copier(data), 1),
        (sorter(data), 1),
    )
    return [
        Row("features", f"nine of {len(data.layers)} layers", nine, origin, limit),
        Row("features", "the same; limit: a sort, an FFT, a sum", nine, origin, least),
        Row("features", f"six of {len(data.layers.modules)} products", product, origin, limit),
    ]


def widths_of(names: list[str]) -> dict[str, int]:
    """Columns a layer or module."""
    return {name: SPECS[name].width for name in names}


def inputs_of(data: LoraCollection, cells: list[Cell]) -> dict[Cell, Tensor]:
    """(N, D) of each cell, as the experiment hands it to the trainer."""
    needed = {part for cell in cells for part in components_of(cell.representation)}
    names = [name for name, spec in SPECS.items() if name in needed and not spec.fitted]
    extracted = extract_features(Request(data, widths_of(names)))
    if extracted.errors:
        raise SystemExit(f"error: features failed: {extracted.errors}")
    features = Features(data, computed={**extracted.features})
    return {cell: features.columns_of(cell, [], data.view())[0].to("cpu") for cell in cells}


def time_training(data: LoraCollection, options: StageOptions) -> list[Row]:
    """Runs of the 18 cells; the limit is the matrix products at the rate measured for large ones."""
    cells = cells_of(BENCHMARKED_SETS, NINE)
    inputs = list(inputs_of(data, cells).values())
    base = TrainingSettings(
        num_runs=options.runs,
        max_epochs=options.epochs,
        patience=options.epochs,
        batch_size=options.batch_size,
    )
    num_classes, device = len(data.classes), data.weights.device
    y_N, train_rows = torch.from_numpy(data.labels).to(device), torch.from_numpy(data.split.train)
    # The origin keeps constant columns. It standardises once a cell, so that is not timed.
    with_constants = [standardise_all(x, train_rows).to(device) for x in inputs]
    columns = [standardise(x, train_rows).shape[1] for x in inputs]
    per_epoch = sum(operations_of(D, num_classes, data.split, base) for D in columns)
    operations = per_epoch * options.runs * options.epochs

    def origin() -> None:
        for x_ND in with_constants:
            train_from_loader(x_ND, y_N, data.split, num_classes, base)

    def ours(precision: str) -> None:
        for x_ND in inputs:
            train(x_ND, data, dataclasses.replace(base, precision=precision))

    in_precision = [(functools.partial(ours, precision), 1.0) for precision in PRECISIONS]
    one_run, *timed = interleaved(options.repeats, device, (origin, options.runs), *in_precision, warm_up=0)
    what = f"{len(cells)} cells x {options.runs} runs x {options.epochs} epochs"
    rows = []
    for precision, measured in zip(PRECISIONS, timed, strict=True):
        limit = Measured([operations / gemm_rate(getattr(torch, precision), device)])
        rows.append(Row("train", f"{what}, {precision}", measured, one_run, limit, operations))
    return rows


def standardise_all(x: Tensor, train_rows: Tensor) -> Tensor:
    """Columns (N, D) less the training rows' mean over their std + 1e-8,
    as the origin does; constants become 0.
    """
    std, mean = torch.std_mean(x[train_rows].double(), dim=0, correction=0)
    return ((x - mean) / (std + 1e-8)).float()


def operations_of(inputs: int, num_classes: int, split: Split, settings: TrainingSettings) -> int:
    """Floating-point operations of the matrix products of one run's epoch.

    Forward, two backward (one for the first layer), and validation.
    """
    hidden = settings.hidden_dim
    first, rest = inputs * hidden, (HIDDEN_LAYERS - 1) * hidden**2 + hidden * num_classes
    return 2 * (len(split.train) * (2 * first + 3 * rest) + len(split.val) * (first + rest))


def train(features: Tensor, data: LoraCollection, settings: TrainingSettings) -> TrainedRuns:
    """The runs of a cell with columns (N, D)."""
    device = data.weights.device
    task = Task(features, data.labels, data.split, len(data.classes))
    return train_runs(task, resolve_training(settings, device), device)


def stage_table(rows: list[Row]) -> str:
    """The rows as a Markdown table, with the rates of the matrix products."""
    lines = [
        "| stage | what | ours, s | origin's way, s | limit, s | faster than the origin | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        faster, of_limit = row.origin.median / row.ours.median, row.ours.median / row.limit.median
        lines.append(
            f"| {row.stage} | {row.what} | {row.ours} | {row.origin} | {row.limit.median:.3g} | "
            f"{faster:.1f}x | {of_limit:.2f}x |"
        )
    for row in rows:
        if row.operations:
            reached, rate = (row.operations / timed.median / 1e9 for timed in (row.ours, row.limit))
            lines.append(
                f"| gemm | {row.what} | {reached:.0f} GFLOP/s | | {rate:.0f} GFLOP/s | | "
                f"{100 * reached / rate:.0f} % |"
            )
    return "\n".join(lines)


STAGES: dict[str, Callable[[LoraCollection, StageOptions], list[Row]]] = {
    "read": time_reading,
    "features": time_features,
    "train": time_training,
}
