"""Reads every weight of a collection once, and measures what the report of `inspect_dataset.py` says."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from ablation.catalogue import GROUP_COLUMN, NINE, PARTS, SPECS
from ablation.collection import LoraCollection
from ablation.columns import Columns, group_column_of
from ablation.fields import InputError
from ablation.inspection.columns import INSPECTED, ColumnCensus, Moments
from ablation.inspection.likeness import Likeness, initialisation
from ablation.inspection.text import findings
from ablation.layers import module_and_side
from ablation.making.progress import ProgressLine
from ablation.reading import BLOCK_ROWS
from representations import describe

SAMPLE_ROWS = 500  # rows between which `down` and `up` are compared, chosen by a fixed seed
MIXER = np.uint64(0x9E3779B97F4A7C15)  # odd: joins the hashes of a row's layers so that their order counts


def inspect(data: LoraCollection, name: str, groups: tuple[str, list] | None) -> dict:
    """Everything that the report says about a collection, as JSON values;
    `groups` is a column's name and values.
    """
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(data.num_rows)[:SAMPLE_ROWS])
    likeness = {side: Likeness(data.labels[chosen]) for side in ("down", "up")}
    columns = {representation: ColumnCensus(representation) for representation in NINE}
    hashes = np.zeros(data.num_rows, np.uint64)
    zeros: Counter[str] = Counter()
    progress = ProgressLine(len(data.layers), "layers", sys.stderr)
    for layer, facts in read_layers(data, chosen):
        side, shape = module_and_side(layer)[1], data.layers.layouts[layer]
        hashes = hashes * MIXER + facts.hashes
        zeros[side] += facts.zeros
        if side in likeness:
            likeness[side].add(facts.sampled, facts.std, shape.rows, shape.cols)
        for census in columns.values():
            census.add(facts.moments)
        progress.advance()
    report = {
        "dataset": name,
        **contents(data),
        "zero_matrices": dict(zeros),
        "classes": class_balance(data),
        "duplicate_rows": duplicates(data, hashes),
        "initialisation": initialisation(likeness["down"]) if likeness["down"].layers else None,
        "class_signal": {side: alike.class_signal(rng) for side, alike in likeness.items() if alike.layers},
        "representations": {representation: census.summary() for representation, census in columns.items()},
        "groups": leaks(data, *groups) if groups else None,
    }
    report["findings"] = findings(report)
    return report


class LayerFacts(NamedTuple):
    """Facts about one layer's weights."""

    moments: Moments
    std: float  # of all its weights
    zeros: int  # rows whose matrix is zero
    hashes: np.ndarray  # (N,) uint64, of each row's matrix
    sampled: np.ndarray  # (S, rows * cols)


def read_layers(data: LoraCollection, chosen: np.ndarray) -> Iterator[tuple[str, LayerFacts]]:
    """Every layer's name and facts, in order.
    Each core reads one layer; no more layers are in memory than cores.
    """
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for first in range(0, len(data.layers), workers):
                some = data.layers.names[first : first + workers]
                yield from zip(
                    some, pool.map(lambda layer: read_layer_once(data, layer, chosen), some), strict=True
                )
    finally:
        torch.set_num_threads(workers)


def read_layer_once(data: LoraCollection, layer: str, chosen: np.ndarray) -> LayerFacts:
    """The facts of a layer; the weights of rows `chosen` (S,) are kept.
    Raises InputError for a weight that is not finite.
    """
    moments, sampled, hashes = Moments(), [], np.zeros(data.num_rows, np.uint64)
    count = zeros = 0
    total = squares = 0.0
    for start in range(0, data.num_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, data.num_rows)
        w = data.weights.read_layer(layer, start, stop)  # (n, rows, cols)
        x = w.flatten(1).numpy()  # (n, rows * cols)
        count += x.size
        total += x.sum(dtype=np.float64)
        squares += float((x.astype(np.float64) ** 2).sum())
        zeros += int((~x.any(1)).sum())
        hashes[start:stop] = [xxhash.xxh3_64_intdigest(row) for row in x]
        features, failed = describe(w, INSPECTED)
        if failed:
            raise next(iter(failed.values()))
        moments.add(torch.cat([features[part] for part in INSPECTED], dim=1).double().numpy())
        sampled.append(x[chosen[(chosen >= start) & (chosen < stop)] - start])
    std = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
    return LayerFacts(moments, std, zeros, hashes, np.concatenate(sampled))


def contents(data: LoraCollection) -> dict:
    """Rows, layers, ranks, shapes and bytes."""
    summary = data.summary()
    shapes: dict[tuple, int] = Counter()
    for layer, word in zip(data.layers.names, data.layers.words, strict=True):
        shapes[
            word, module_and_side(layer)[1], data.layers.layouts[layer].rows, data.layers.layouts[layer].cols
        ] += 1
    ranks = Counter(
        matrix.rows if module_and_side(layer)[1] == "down" else matrix.cols
        for layer, matrix in data.layers.layouts.items()
    )
    size = 4 * summary["weights_per_row"]
    width = sum(SPECS[part].width for part in INSPECTED)
    return {
        "rows": summary["rows"],
        "split": summary["split"],
        "split_overlaps": data.split.overlap,
        "architecture": summary["architecture"],
        "layers": summary["layers"],
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "shapes": [
            dict(zip(("kind", "side", "rows", "cols", "layers"), (*shape, count), strict=True))
            for shape, count in sorted(shapes.items())
        ],
        "weights_per_row": summary["weights_per_row"],
        "bytes": {
            "row": size,
            "weights": size * summary["rows"],
            "features": 4 * width * len(data.layers) * summary["rows"],
        },
    }


def class_balance(data: LoraCollection) -> dict:
    """Rows of each class, in all and in each part of the split."""
    counts = np.bincount(data.labels, minlength=len(data.classes))
    parts = {
        part: np.bincount(data.labels[data.split.rows(part)], minlength=len(data.classes)) for part in PARTS
    }
    return {
        "count": len(data.classes),
        "rows": {str(name): int(count) for name, count in zip(data.classes, counts, strict=True)},
        "smallest": int(counts.min()),
        "largest": int(counts.max()),
        "always_guessing_the_largest": float(parts["test"][parts["train"].argmax()] / parts["test"].sum()),
        "missing_in": {
            part: [str(data.classes[i]) for i in np.flatnonzero(count == 0)]
            for part, count in parts.items()
            if (count == 0).any()
        },
    }


def duplicates(data: LoraCollection, hashes: np.ndarray) -> dict:
    """Sets of rows with equal weights.
    `hashes` (N,) are taken for the rows: equal 64-bit hashes count as equal.
    """
    _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    members = defaultdict(list)
    for row in np.flatnonzero(counts[which] > 1):
        members[which[row]].append(int(row))
    sides = sides_of(data)
    sets = list(members.values())
    return {
        "sets": len(sets),
        "rows": sum(map(len, sets)),
        "too_many": sum(len(rows) - 1 for rows in sets),
        "sets_on_both_sides": sum(len({sides[row] for row in rows}) > 1 for rows in sets),
        "sets_of_several_classes": sum(len({int(data.labels[row]) for row in rows}) > 1 for rows in sets),
        "first": sorted(sets)[:5],
    }


def sides_of(data: LoraCollection) -> np.ndarray:
    """(N,) the part of the split that a row lies in; "all" where the parts overlap."""
    sides = np.full(data.num_rows, "all", dtype="U5")
    if not data.split.overlap:
        for part in PARTS:
            sides[data.split.rows(part)] = part
    return sides


def read_groups(data: LoraCollection, column: str) -> tuple[str, list] | None:
    """The name and values of the group column; None if none was requested or is there by default."""
    names = data.weights.dataset.column_names
    if not column:
        types = dict(zip(names, data.weights.dataset.data.schema.types, strict=True))
        column = group_column_of(types, Columns(group=GROUP_COLUMN))
        if not column:
            return None
    if column not in names or column in data.layers.layouts:
        raise InputError(
            f"no --group-column '{column}': use one of "
            f"{', '.join(name for name in names if name not in data.layers.layouts)}"
        )
    values = data.weights.dataset.with_format(None)[column][:]
    return column, [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]


def leaks(data: LoraCollection, column: str, values: list) -> dict:
    """Groups with rows in the training part and in another part:
    knowledge of such a group is not knowledge of the class.
    """
    sides = sides_of(data)
    where, labels = defaultdict(set), defaultdict(set)
    held_out: Counter[str] = Counter()
    for value, side, label in zip(values, sides, data.labels, strict=True):
        where[value].add(str(side))
        labels[value].add(int(label))
    trained = {value for value, parts in where.items() if "train" in parts and value is not None}
    for value, side in zip(values, sides, strict=True):
        held_out[str(side)] += value in trained
    crossing = sorted(
        (value for value, parts in where.items() if value in trained and len(parts) > 1), key=str
    )
    return {
        "column": column,
        "groups": len(where) - (None in where),
        "rows_without": sum(value is None for value in values),
        "on_both_sides": len(crossing),
        "first": [str(value) for value in crossing[:5]],
        "groups_of_several_classes": sum(len(own) > 1 for value, own in labels.items() if value is not None),
        "test_rows_with_their_group_in_train": held_out["test"],
        "test_rows": int((sides == "test").sum()),
        "is_the_label": all(len(own) == 1 for own in labels.values()) and len(where) == len(data.classes),
    }
