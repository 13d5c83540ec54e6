#!/usr/bin/env python3
"""Look at a collection of LoRAs before believing what is read out of it.

Says what is in it (rows, classes, layers, ranks, shapes, memory) and what could mislead: `down` matrices that are still their
initialisation, representation columns that say nothing or the same twice at this rank, duplicate rows, unequal classes, and
groups whose rows lie on both sides of the split. Reads each weight once, a block of rows of one layer at a time.

Exit status: 0 the collection was read, whatever was found; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from progress import Progress  # noqa: E402

from lora_data import BLOCK_ROWS, LoraData, attention_kind, load_lora_data  # noqa: E402
from representations import describe  # noqa: E402
from settings import ATTENTION_KINDS, ENSEMBLE_PARTS, NINE, REPRESENTATIONS, InputError  # noqa: E402

SAMPLE_ROWS = 500          # rows between which `down` and `up` are compared, chosen by a fixed seed
PERMUTATIONS = 999         # of the labels, for the p-values
SAME = 1e-6                # of a column's variance: what others leave unexplained of a column that they determine
ROUNDING = 1e-6            # of a column's size: a spread below it is float32's rounding, not the collection's
LIKE_INITIAL = 0.05        # how far std(down) may be from an initialisation's
CORRELATED = 0.01          # mean cosine between rows above which they are not independent draws
SIGNIFICANT = 0.0025       # four tests a report: one report in a hundred alarms falsely
MIXER = np.uint64(0x9E3779B97F4A7C15)   # odd: joins the hashes of a row's layers so that their order counts
COPY = 0.99                # cosine of the most alike rows from which one is nearly a copy of the other

COLUMN_NAMES = {           # of each representation, as in the project's design
    "simple_stats": ["frobenius", "mean", "std", "max", "min"],
    "rank_based": ["p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "iqr", "range"],
    "stats": ["mean", "std", "median", "min", "max", "skewness", "kurtosis"],
    "spectral": [*(f"s_{i}" for i in range(1, 11)), *(f"share_{i}" for i in range(1, 11)), *(f"gap_{i}" for i in range(1, 10)),
                 "entropy", "condition", "nuclear"],
    "matrix_norms": ["frobenius", "nuclear", "spectral", "one", "inf", "nuclear/frobenius", "spectral/frobenius"],
    "distribution": ["p5", "p10", "p25", "p50", "p75", "p90", "p95", "iqr", "deviation", "variation", "skewness", "kurtosis"],
    "frequency": [*(f"f_{i}" for i in range(1, 11)), "mean", "std", "max", "share_of_ten"],
    "info_theoretic": ["entropy", "entropy/log50"],
}
COLUMN_NAMES["ensemble"] = [f"{part}.{name}" for part in ENSEMBLE_PARTS for name in COLUMN_NAMES[part]]
PARTS = [name for name in NINE if name != "ensemble"]
STARTS = dict(zip(PARTS, np.cumsum([0] + [REPRESENTATIONS[name].width for name in PARTS[:-1]]).tolist(), strict=True))
POSITIONS = {name: np.arange(start, start + REPRESENTATIONS[name].width) for name, start in STARTS.items()}
POSITIONS["ensemble"] = np.concatenate([POSITIONS[part] for part in ENSEMBLE_PARTS])


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    try:
        data = load_lora_data(arguments.name, data_split=arguments.data_split, revision=arguments.revision, label_column=arguments.label_column,
                              split_seed=arguments.split_seed)
        groups = read_groups(data, arguments.group_column)
        report = inspect(data, arguments.name, groups)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if arguments.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_report(report)
    return 0


def inspect(data: LoraData, name: str, groups: tuple[str, list] | None) -> dict:
    """Everything that is said about a collection, as JSON values."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(data.num_rows)[:SAMPLE_ROWS])
    likeness = {side: Likeness(data.labels[chosen]) for side in ("down", "up")}
    columns = {representation: ColumnCensus(representation) for representation in NINE}
    hashes, zeros = np.zeros(data.num_rows, np.uint64), Counter()
    progress = Progress(len(data.layers), "layers", sys.stderr)
    for layer, found in read_layers(data, chosen):
        side, shape = side_of(layer), data.matrices[layer]
        hashes = hashes * MIXER + found.hashes
        zeros[side] += found.zeros
        if side in likeness:
            likeness[side].add(found.sampled, found.std, shape.rows, shape.cols)
        for census in columns.values():
            census.add(found.moments)
        progress.advance()
    report = {
        "dataset": name,
        **contents(data),
        "zero_matrices": dict(zeros),
        "classes": class_balance(data),
        "duplicate_rows": duplicates(data, hashes),
        "initialisation": initialisation(likeness["down"]) if likeness["down"].layers else None,
        "class_signal": {side: found.class_signal(rng) for side, found in likeness.items() if found.layers},
        "representations": {representation: census.summary() for representation, census in columns.items()},
        "groups": leaks(data, *groups) if groups else None,
    }
    report["findings"] = findings(report)
    return report


class LayerFacts(NamedTuple):
    """What is kept of one layer's weights."""

    moments: Moments
    std: float               # of all its weights
    zeros: int               # rows whose matrix is zero
    hashes: np.ndarray       # (N,) uint64, of each row's matrix
    sampled: np.ndarray      # (S, rows * cols)


def read_layers(data: LoraData, chosen: np.ndarray) -> Iterator[tuple[str, LayerFacts]]:
    """Every layer's facts in their order. One layer a core, as the experiment does, and no more layers in memory than cores."""
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for first in range(0, len(data.layers), workers):
                some = data.layers[first:first + workers]
                yield from zip(some, pool.map(lambda layer: read_layer_once(data, layer, chosen), some), strict=True)
    finally:
        torch.set_num_threads(workers)


def read_layer_once(data: LoraData, layer: str, chosen: np.ndarray) -> LayerFacts:
    """`chosen` (S,) rows are kept. Raises InputError for a weight that cannot be, naming column and row."""
    moments, sampled, hashes = Moments(), [], np.zeros(data.num_rows, np.uint64)
    count = zeros = 0
    total = squares = 0.0
    for start in range(0, data.num_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, data.num_rows)
        w = data.read_layer(layer, start, stop)                          # (n, rows, cols)
        x = w.flatten(1).numpy()                                         # (n, rows * cols)
        count += x.size
        total += x.sum(dtype=np.float64)
        squares += float((x.astype(np.float64) ** 2).sum())
        zeros += int((~x.any(1)).sum())
        hashes[start:stop] = [xxhash.xxh3_64_intdigest(row) for row in x]
        found, failed = describe(w, PARTS)
        if failed:
            raise next(iter(failed.values()))
        moments.add(torch.cat([found[part] for part in PARTS], dim=1).double().numpy())
        sampled.append(x[chosen[(chosen >= start) & (chosen < stop)] - start])
    std = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
    return LayerFacts(moments, std, zeros, hashes, np.concatenate(sampled))


def side_of(layer: str) -> str:
    """down, up or neither, in any tool's spelling."""
    found = re.search(r"[._](down|up|A|B)(?:\.[^.]+)?[._]weight$", layer)
    return {"down": "down", "A": "down", "up": "up", "B": "up"}[found[1]] if found else "other"


# --- what is in it


def contents(data: LoraData) -> dict:
    card = data.card()
    shapes: dict[tuple, int] = Counter()
    for layer in data.layers:
        shapes[attention_kind(layer), side_of(layer), data.matrices[layer].rows, data.matrices[layer].cols] += 1
    ranks = Counter(matrix.rows if side_of(layer) == "down" else matrix.cols for layer, matrix in data.matrices.items())
    size = 4 * card["weights_per_row"]
    width = sum(REPRESENTATIONS[part].width for part in PARTS)
    return {
        "rows": card["rows"], "split": card["split"], "split_overlaps": data.split.overlap, "layers": card["layers"],
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "shapes": [dict(zip(("kind", "side", "rows", "cols", "layers"), (*shape, count), strict=True)) for shape, count in sorted(shapes.items())],
        "weights_per_row": card["weights_per_row"],
        "bytes": {"row": size, "weights": size * card["rows"], "features": 4 * width * len(data.layers) * card["rows"]},
    }


def class_balance(data: LoraData) -> dict:
    counts = np.bincount(data.labels, minlength=len(data.classes))
    parts = {part: np.bincount(data.labels[getattr(data.split, part)], minlength=len(data.classes)) for part in ("train", "val", "test")}
    return {
        "count": len(data.classes),
        "rows": {str(name): int(count) for name, count in zip(data.classes, counts, strict=True)},
        "smallest": int(counts.min()), "largest": int(counts.max()),
        "always_guessing_the_largest": float(parts["test"][parts["train"].argmax()] / parts["test"].sum()),
        "missing_in": {part: [str(data.classes[i]) for i in np.flatnonzero(count == 0)] for part, count in parts.items() if (count == 0).any()},
    }


def duplicates(data: LoraData, hashes: np.ndarray) -> dict:
    """Rows whose every weight is another row's. (Equal 64-bit hashes are taken for equal rows.)"""
    _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    members = defaultdict(list)
    for row in np.flatnonzero(counts[which] > 1):
        members[which[row]].append(int(row))
    sides = sides_of(data)
    sets = list(members.values())
    return {
        "sets": len(sets), "rows": sum(map(len, sets)), "too_many": sum(len(rows) - 1 for rows in sets),
        "sets_on_both_sides": sum(len({sides[row] for row in rows}) > 1 for rows in sets),
        "sets_of_several_classes": sum(len({int(data.labels[row]) for row in rows}) > 1 for rows in sets),
        "first": sorted(sets)[:5],
    }


def sides_of(data: LoraData) -> np.ndarray:
    """(N,) the part of the split that a row lies in; one and the same for all where the parts overlap."""
    sides = np.full(data.num_rows, "all", dtype="U5")
    if not data.split.overlap:
        for part in ("train", "val", "test"):
            sides[getattr(data.split, part)] = part
    return sides


def read_groups(data: LoraData, column: str) -> tuple[str, list] | None:
    """A column's name and values; category_name unless another is asked for, None if that is not there."""
    names = data.dataset.column_names
    if not column:
        if "category_name" not in names:
            return None
        column = "category_name"
    if column not in names or column in data.matrices:
        raise InputError(f"no --group-column '{column}': use one of {', '.join(name for name in names if name not in data.matrices)}")
    values = data.dataset.with_format(None)[column][:]
    return column, [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]


def leaks(data: LoraData, column: str, values: list) -> dict:
    """Groups with rows in the training part and in another: what is learnt about the group is not knowledge of the class."""
    sides = sides_of(data)
    where, labels, held_out = defaultdict(set), defaultdict(set), Counter()
    for value, side, label in zip(values, sides, data.labels, strict=True):
        where[value].add(str(side))
        labels[value].add(int(label))
    of_group = {value for value, found in where.items() if "train" in found and value is not None}
    for value, side in zip(values, sides, strict=True):
        held_out[str(side)] += value in of_group
    crossing = sorted((value for value, found in where.items() if value is not None and "train" in found and len(found) > 1), key=str)
    return {
        "column": column, "groups": len(where) - (None in where), "rows_without": sum(value is None for value in values),
        "on_both_sides": len(crossing), "first": [str(value) for value in crossing[:5]],
        "groups_of_several_classes": sum(len(found) > 1 for value, found in labels.items() if value is not None),
        "test_rows_with_their_group_in_train": held_out["test"], "test_rows": int((sides == "test").sum()),
        "is_the_label": all(len(found) == 1 for found in labels.values()) and len(where) == len(data.classes),
    }


# --- is `down` its initialisation, and does it know the class?


class Likeness:
    """How alike the rows are in the matrices of one side: mean cosine over the layers between every two of S sampled rows."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels                                             # (S,)
        self.cosines = np.zeros((len(labels), len(labels)))              # (S, S) summed over layers
        self.sizes: list[np.ndarray] = []                                # a layer's log norms, (S,)
        self.variance = 0.0                                              # of a summed cosine of independent rows
        self.layers: list[tuple[float, int, int]] = []                   # std over all rows, rows, cols

    def add(self, x: np.ndarray, std: float, rows: int, cols: int) -> None:
        """A layer's sampled rows, x (S, rows * cols), and the std of all its weights."""
        norms = np.linalg.norm(x.astype(np.float64), axis=1)
        unit = x / np.where(norms > 0, norms, 1.0)[:, None]
        self.cosines += unit @ unit.T
        self.sizes.append(np.log(np.where(norms > 0, norms, 1.0)))
        self.variance += 1 / x.shape[1]
        self.layers.append((std, rows, cols))

    def between_rows(self) -> dict:
        """The mean and the largest cosine of two different rows, and the std that chance gives a pair of independent rows."""
        pairs = self.cosines[np.triu_indices(len(self.labels), 1)] / len(self.layers)
        chance = math.sqrt(self.variance) / len(self.layers)
        if not len(pairs):
            return {"pairs": 0, "mean": 0.0, "largest": 0.0, "by_chance": chance, "z": 0.0}
        return {"pairs": len(pairs), "mean": float(pairs.mean()), "largest": float(pairs.max()), "by_chance": chance,
                "z": float(pairs.mean() / chance * math.sqrt(len(pairs)))}

    def class_signal(self, rng: np.random.Generator) -> dict:
        """Are rows of a class more alike than others, in direction (cosine) and in size (norm)? p-values by permuting labels.

        direction: mean cosine within classes minus between them. size: share of the variance of a layer's log norm that lies
        between classes (eta squared), mean over the layers; chance gives (C - 1) / (S - 1).
        """
        one_hot = np.eye(self.labels.max() + 1)[self.labels]
        one_hot = one_hot[:, one_hot.any(0)]                             # (S, C)
        in_class = one_hot.sum(0)
        cosines = self.cosines / len(self.layers)
        np.fill_diagonal(cosines, 0.0)
        within = float((in_class * (in_class - 1)).sum())
        between = len(self.labels) * (len(self.labels) - 1) - within
        sizes = np.stack(self.sizes, axis=1)                             # (S, L)
        spread = sizes - sizes.mean(0)
        alive = np.ptp(sizes, axis=0) > 1e-9                             # a layer of equal norms has no variance to explain
        spread = spread[:, alive] / np.sqrt((spread[:, alive] ** 2).sum(0))

        def measure(members: np.ndarray) -> tuple[float, float]:
            inside = float(np.einsum("sc,sc->", members, cosines @ members))
            direction = inside / within - (cosines.sum() - inside) / between if within and between else 0.0
            size = float((((members.T @ spread) ** 2) / in_class[:, None]).sum() / max(alive.sum(), 1))
            return direction, size

        found = measure(one_hot)
        null = np.array([measure(one_hot[rng.permutation(len(self.labels))]) for _ in range(PERMUTATIONS)])   # (P, 2)
        # A difference of a rounding error is none: without it equal values would win or lose by their last bit.
        p = (1 + (null >= np.array(found) - 1e-12).sum(0)) / (1 + PERMUTATIONS)
        chance = (one_hot.shape[1] - 1) / max(len(self.labels) - 1, 1)
        return {
            "rows": len(self.labels),
            "direction": {"within_minus_between": float(found[0]), "p": float(p[0])},
            "size": {"variance_between_classes": float(found[1]), "by_chance": chance, "p": float(p[1])},
            "significant": bool((p <= SIGNIFICANT).any()),
        }


def initialisation(down: Likeness) -> dict:
    """std(down) over the std of two initialisations, per layer; and whether rows were drawn independently.

    gaussian: N(0, 1/rank), as the published sets and PEFT's init_lora_weights="gaussian". kaiming: uniform with variance
    1 / (3 in), PEFT's default.
    """
    ratios = {"gaussian": [std * rank for std, rank, _ in down.layers], "kaiming": [std * math.sqrt(3 * cols) for std, _, cols in down.layers]}
    found = {name: {"lowest": min(values), "mean": float(np.mean(values)), "highest": max(values)} for name, values in ratios.items()}
    like = [name for name, ratio in found.items() if ratio["lowest"] > 1 - LIKE_INITIAL and ratio["highest"] < 1 + LIKE_INITIAL]
    rows = down.between_rows()
    return {"std": float(np.mean([std for std, _, _ in down.layers])), "std_over_initial": found, "std_is_that_of": like[0] if like else None,
            "between_rows": rows, "rows_are_correlated": bool(rows["mean"] > CORRELATED and rows["z"] > 3)}


# --- what the columns of the representations say


class Moments:
    """Of one layer's columns (of all parts, side by side): range, mean and products, from blocks (n, k) float64."""

    def __init__(self):
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        if not self.count:
            self.origin = x.mean(0)                                      # near the mean, so that the products stay small
            self.low, self.high = x.min(0), x.max(0)
            self.sums, self.products = 0.0, 0.0
        centred = x - self.origin
        self.count += len(x)
        self.sums = self.sums + centred.sum(0)                           # (k,)
        self.products = self.products + centred.T @ centred              # (k, k)
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))

    def constant(self) -> np.ndarray:
        return self.high == self.low                                     # (k,)

    def rounding(self) -> np.ndarray:
        """Columns whose spread is float32's rounding of a constant."""
        size = np.maximum(np.abs(self.low), np.abs(self.high))
        return ~self.constant() & (self.high - self.low <= ROUNDING * size)

    def correlations(self, which: np.ndarray) -> np.ndarray:
        mean = self.sums[which] / self.count
        covariance = self.products[np.ix_(which, which)] / self.count - np.outer(mean, mean)
        std = np.sqrt(covariance.diagonal())
        return covariance / np.outer(std, std)


class ColumnCensus:
    """How many columns of a representation vary, differ and are free, layer by layer."""

    def __init__(self, representation: str):
        self.names, self.positions = COLUMN_NAMES[representation], POSITIONS[representation]
        self.layers = 0
        self.what = {kind: Counter() for kind in ("constant", "rounding", "duplicate", "collinear")}   # kind -> column -> layers
        self.same_as: dict[str, Counter] = defaultdict(Counter)
        self.free: list[int] = []
        self.effective: list[float] = []
        self.few_rows = False

    def add(self, moments: Moments) -> None:
        self.layers += 1
        constant, rounding = moments.constant()[self.positions], moments.rounding()[self.positions]
        for kind, flags in (("constant", constant), ("rounding", rounding)):
            self.what[kind].update(self.names[i] for i in np.flatnonzero(flags))
        alive = np.flatnonzero(~constant & ~rounding)
        self.few_rows |= len(alive) >= moments.count
        if not len(alive):
            self.free.append(0)
            self.effective.append(0.0)
            return
        correlations = moments.correlations(self.positions[alive])
        twins, determined = redundant(correlations)
        for i, twin in twins.items():
            self.what["duplicate"][self.names[alive[i]]] += 1
            self.same_as[self.names[alive[i]]][self.names[alive[twin]]] += 1
        self.what["collinear"].update(self.names[alive[i]] for i in determined)
        self.free.append(len(alive) - len(twins) - len(determined))
        # Participation ratio of the eigenvalues, (sum of them)^2 / sum of their squares: the number of directions of equal weight.
        self.effective.append(len(alive) ** 2 / float((correlations**2).sum()))

    def summary(self) -> dict:
        def listed(kind: str) -> dict:
            return {"a_layer": sum(self.what[kind].values()) / self.layers,
                    "in_every_layer": [name for name in self.names if self.what[kind][name] == self.layers],
                    "in_some_layers": [name for name in self.names if 0 < self.what[kind][name] < self.layers]}

        return {"width": len(self.names), **{kind: listed(kind) for kind in self.what},
                "same_as": {name: found.most_common(1)[0][0] for name, found in self.same_as.items()},
                "degrees_of_freedom": float(np.mean(self.free)), "effective": float(np.mean(self.effective)), "too_few_rows": self.few_rows}


def redundant(correlations: np.ndarray) -> tuple[dict[int, int], list[int]]:
    """Columns that are an earlier one up to scale and offset (column -> the earlier one), and those that several earlier ones determine."""
    twins, determined = {}, []
    left = correlations.copy()                                           # what the columns gone through leave of the rest
    for i in range(len(left)):
        if left[i, i] > SAME:
            left -= np.outer(left[:, i], left[i]) / left[i, i]
            continue
        same = np.flatnonzero(correlations[i, :i] ** 2 > 1 - SAME)
        if len(same):
            twins[i] = int(same[0])
        else:
            determined.append(i)
    return twins, determined


# --- what is said


def findings(report: dict) -> list[str]:
    """What a reader should not miss, a sentence each."""
    says = []
    down, groups, same, classes = report["initialisation"], report["groups"], report["duplicate_rows"], report["classes"]
    signal = report["class_signal"]
    if report["split_overlaps"]:
        says.append("ten rows or fewer: train, validation and test are the same rows")
    if same["sets"]:
        says.append(f"{same['too_many']} rows are copies of others; {same['sets_on_both_sides']} sets of equal rows lie on both sides of the split, "
                    f"{same['sets_of_several_classes']} have several labels")
    if report["zero_matrices"].get("up"):
        says.append(f"{report['zero_matrices']['up']} `up` matrices are zero: those modules were not trained")
    if down:
        rows = down["between_rows"]
        if down["std_is_that_of"] and not down["rows_are_correlated"] and not signal["down"]["significant"]:
            says.append(f"`down` looks like its {down['std_is_that_of']} initialisation and nothing else: its std is the initialisation's, rows are "
                        "uncorrelated, no class signal; what was learnt is in `up`, or in the product up @ down")
        if down["rows_are_correlated"]:
            says.append(f"`down` is alike in all rows (mean cosine {rows['mean']:.2f}): a common seed, or a common part that was learnt")
        if rows["largest"] > COPY and rows["mean"] < COPY / 2:
            says.append(f"two rows have nearly the same `down` (cosine {rows['largest']:.4f}): copies, or one was trained on from the other")
    for side in ("down", "up"):
        if side in signal and signal[side]["significant"]:
            size, direction = signal[side]["size"], signal[side]["direction"]
            says.append(f"`{side}` knows the class: direction p = {direction['p']:.3f}, size p = {size['p']:.3f}")
    if groups and groups["on_both_sides"] and not groups["is_the_label"]:
        says.append(f"{groups['on_both_sides']} of {groups['groups']} groups ({groups['column']}) lie in train and elsewhere; so do "
                    f"{groups['test_rows_with_their_group_in_train']} of {groups['test_rows']} test rows: accuracy may be knowledge of the group")
    if classes["largest"] > 2 * classes["smallest"]:
        says.append(f"classes are unequal: {classes['smallest']} to {classes['largest']} rows; always guessing the largest is right in "
                    f"{classes['always_guessing_the_largest']:.0%} of the test rows")
    for part, names in classes["missing_in"].items():
        says.append(f"{len(names)} classes have no {part} row, the first {names[0]}")
    freedom = {name: (found["degrees_of_freedom"], found["width"]) for name, found in report["representations"].items() if not found["too_few_rows"]}
    dead = [f"{name} ({free:.0f} of {width})" for name, (free, width) in freedom.items() if free < width / 2]
    if dead:
        says.append(f"less than half of the columns are free at this rank in {', '.join(dead)}")
    return says


def print_report(report: dict) -> None:
    width = min(shutil.get_terminal_size((150, 24)).columns, 150)

    def line(text: str, indent: str = "") -> None:
        print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=" " * (len(indent) + 4),
                            break_long_words=False, break_on_hyphens=False))

    line(f"{report['dataset']}: {report['rows']} rows, {report['classes']['count']} classes, {report['weights_per_row']:,} weights a row")
    line("Layers:  " + ", ".join(f"{report['layers'][kind]} {kind}" for kind in ATTENTION_KINDS)
         + "; rank " + ", ".join(f"{rank} ({count} layers)" for rank, count in report["ranks"].items()))
    for shape in report["shapes"]:
        line(f"{shape['layers']:5} {shape['kind']:5} {shape['side']:5} {shape['rows']} x {shape['cols']}", "    ")
    size = report["bytes"]
    line(f"Memory:  {size['row'] / 1e6:.2f} MB a row, {size['weights'] / 1e9:.2f} GB of weights, {size['features'] / 1e9:.2f} GB of features")
    line("Split:   " + ", ".join(f"{part} {count}" for part, count in report["split"].items()))
    classes = report["classes"]
    shown = list(classes["rows"].items())[:20]
    line(f"Classes: {classes['smallest']} to {classes['largest']} rows; " + ", ".join(f"{name} {count}" for name, count in shown)
         + (", ..." if classes["count"] > len(shown) else ""))
    same = report["duplicate_rows"]
    line(f"Copies:  {same['too_many']} rows too many in {same['sets']} sets of equal rows"
         + (f", the first {'; '.join(', '.join(map(str, rows[:5])) for rows in same['first'])}" if same["sets"] else ""))
    if groups := report["groups"]:
        line(f"Groups:  {groups['groups']} in {groups['column']}, {groups['on_both_sides']} of them in train and elsewhere; "
             f"{groups['test_rows_with_their_group_in_train']} of {groups['test_rows']} test rows have their group in train"
             + ("; the groups are the classes" if groups["is_the_label"] else ""))
    if down := report["initialisation"]:
        ratios = ", ".join(f"{ratio['mean']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f}) of {name}'s"
                           for name, ratio in down["std_over_initial"].items())
        rows = down["between_rows"]
        line(f"Initial: std(down) {down['std']:.4g} is {ratios}; cosine between rows {rows['mean']:+.4f} in the mean, {rows['largest']:+.4f} at most "
             f"(by chance 0 with std {rows['by_chance']:.4f} a pair)")
    for side, found in report["class_signal"].items():
        direction, norm = found["direction"], found["size"]
        line(f"Signal:  `{side}` of {found['rows']} rows: cosine within classes minus between {direction['within_minus_between']:+.5f} "
             f"(p {direction['p']:.3f}); {norm['variance_between_classes']:.3f} of the variance of its log norm lies between classes, "
             f"by chance {norm['by_chance']:.3f} (p {norm['p']:.3f})")
    print("\nColumns a layer (mean over the layers); duplicate: an earlier one up to scale; collinear: determined by several earlier ones;\n"
          "free: the rest; effective: participation ratio of the correlations\n")
    print(f"{'representation':15} {'width':>6} {'constant':>9} {'rounding':>9} {'duplicate':>10} {'collinear':>10} {'free':>7} {'effective':>10}")
    for name, found in report["representations"].items():
        kinds = [found[kind]["a_layer"] for kind in ("constant", "rounding", "duplicate", "collinear")]
        print(f"{name:15} {found['width']:6} {kinds[0]:9.1f} {kinds[1]:9.1f} {kinds[2]:10.1f} {kinds[3]:10.1f} {found['degrees_of_freedom']:7.1f} "
              f"{found['effective']:10.1f}" + ("  (too few rows to tell)" if found["too_few_rows"] else ""))
    print()
    for name, found in report["representations"].items():
        if name != "ensemble":                                           # its parts say it
            for kind in ("constant", "rounding", "duplicate", "collinear"):
                always = [column + (f" = {found['same_as'][column]}" if kind == "duplicate" else "") for column in found[kind]["in_every_layer"]]
                if always:
                    line(f"{name}: {kind} in every layer: {', '.join(always)}")
    if report["findings"]:
        print("\nFindings")
        for text in report["findings"]:
            line(text, "  * ")


# --- the command line


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="a data set, named as for --dataset of the experiment")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--group-column", default="", metavar="NAME", help="column whose groups should not cross the split (default: category_name)")
    parser.add_argument("--label-column", default="category_label", metavar="NAME", help="column that holds the class (default: category_label)")
    parser.add_argument("--data-split", default="", metavar="NAME", help="split of the data set (default: train, or the only one there is)")
    parser.add_argument("--revision", default="", metavar="TEXT", help="branch, tag or commit of a data set on the Hub")
    parser.add_argument("--split-seed", type=int, default=42, metavar="N", help="seed of the experiment's 70/10/20 split (default: 42)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
