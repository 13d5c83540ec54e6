"""Simulated collections of which it is known which layers hold the class: how often is the opening right?

Every module has three columns, whose four class means are the corners of a tetrahedron, turned at random: so
modules of equal strength hold exactly as much, and halves of equal strengths differ by chance alone. A ridge
regression on seven eighths of the training rows stands in for a run of the MLP. The rest is the program's
own: the reader of random halves, the inference, the verdict.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from sklearn.model_selection import StratifiedKFold

from ablation.catalogue import MAIN_COMPARISON, NULL_HALVES, PARTS
from ablation.cells import Cell
from ablation.collection import View
from ablation.family import Margin
from ablation.half_reader import ModuleColumns, read_view
from ablation.halves import TUNING_HALVES, ModuleSets
from ablation.inference import infer
from ablation.null import null_evidence
from ablation.opening import HOLD_PART, LESS_IS_LOST, NOT_MORE
from ablation.ridge import RidgeReader, RidgeTask
from ablation.splits import VAL_SHARE, Split
from ablation.verdict import verdict

BLOCKS, IN_BLOCK = 7, 2  # modules of each kind in a block
OF_KIND = BLOCKS * IN_BLOCK
CORNERS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)  # of the unit sphere
OPENING_CLASSES, COLUMNS_OF_MODULE = CORNERS.shape
ROUNDS, OPENING_FOLDS = 2, 5
REPRESENTATIONS_READ = ("stats", "spectral")
RUN_SHARE = 3.0  # the penalty of the stand-in, as a share of the kernel's mean diagonal
OWN_NOISE = 0.3  # of a text module that holds what its visual twin holds


class Collection(NamedTuple):
    """Strengths of the visual and of the text modules: distances of class means from their centre, in stds of
    a row. `is_twin`: text modules hold what visual ones hold.
    `right` are conclusions that are true of it, `false` those that are not.
    """

    visual: float
    text: float
    right: tuple[str, ...]
    false: tuple[str, ...]
    is_twin: bool = False
    rows: int = 300


NOTHING_STATED = "so no drop is stated"
COLLECTIONS = {
    "only text layers hold the class": Collection(0.0, 0.45, (HOLD_PART,), (LESS_IS_LOST, "rises by")),
    "only visual layers hold it": Collection(0.45, 0.0, (LESS_IS_LOST,), (HOLD_PART, "falls by")),
    "both hold the same": Collection(0.45, 0.45, (LESS_IS_LOST, NOT_MORE), (HOLD_PART,), is_twin=True),
    "every module holds a little": Collection(0.3, 0.3, (NOT_MORE,), (HOLD_PART, LESS_IS_LOST)),
    "text modules hold half as much again": Collection(0.3, 0.45, (HOLD_PART,), (LESS_IS_LOST,)),
    "none holds anything": Collection(0.0, 0.0, (NOTHING_STATED,), (HOLD_PART, LESS_IS_LOST, "falls by")),
}


def simulate_openings(world: Collection, experiments: int, seed: int) -> dict[str, float]:
    """Rates over the experiments: of each conclusion, of one that is right, and of any false sentence."""
    rng = np.random.default_rng([seed, world.rows, round(1000 * world.visual), round(1000 * world.text)])
    told = [opening_of(rng, world) for _ in range(experiments)]

    def rate(sentences: tuple[str, ...]) -> float:
        return float(np.mean([any(sentence in text for sentence in sentences) for text in told]))

    return {
        "falls": rate(("falls by",)),
        "hold part": rate((HOLD_PART,)),
        "nothing more": rate((NOT_MORE,)),
        "less is lost": rate((LESS_IS_LOST,)),
        "right": rate(world.right),
        "false": rate(world.false),
    }


def opening_of(rng: np.random.Generator, world: Collection) -> str:
    """The opening that the program gives a simulated collection."""
    labels = np.arange(world.rows) % OPENING_CLASSES
    view, folds = folds_in(rng, labels)
    sets, modules = drawn_sets(rng), np.repeat(np.arange(2 * OF_KIND), COLUMNS_OF_MODULE)
    predictions, answers = {}, {}
    for name in REPRESENTATIONS_READ:
        x = columns_in(rng, world, labels, modules)
        found = read_view(ModuleColumns(torch.from_numpy(x).__getitem__, modules), view, folds, sets)
        facts = {"is_text_equal": np.array(True), "train_rows": np.array(len(folds[0].train))}
        answers[name] = facts | {f"{key}.0": values for key, values in found.items()}
        for layer_set, mask in zip(MAIN_COMPARISON[:2], sets.named, strict=False):
            predictions[Cell(name, layer_set)] = runs_of(rng, x[:, mask[modules]], labels, folds)
    inference = infer(predictions, None, Margin(), "stratified")
    inference |= {"null": null_evidence(answers, list(answers), None, None), "group_column": ""}
    return " ".join(verdict(inference).opening)


def folds_in(rng: np.random.Generator, labels: np.ndarray) -> tuple[View, list[Split]]:
    """Stratified folds of two rounds."""
    folds = []
    for _ in range(ROUNDS):
        splitter = StratifiedKFold(OPENING_FOLDS, shuffle=True, random_state=int(rng.integers(2**31)))
        for rest, test in splitter.split(labels, labels):
            mixed = rng.permutation(rest)
            count = round(VAL_SHARE * len(rest))
            folds.append(Split(mixed[count:], mixed[:count], test, False))
    return View(labels, folds[0], tuple(folds)), folds


def drawn_sets(rng: np.random.Generator) -> ModuleSets:
    """Visual modules, text modules, and random halves of each block."""
    is_visual = np.arange(2 * OF_KIND) < OF_KIND
    block = np.arange(OF_KIND) // IN_BLOCK
    of_block = [np.flatnonzero(np.tile(block, 2) == number) for number in range(BLOCKS)]

    def draw() -> np.ndarray:
        mask = np.zeros(2 * OF_KIND, bool)
        for own in of_block:
            mask[rng.choice(own, IN_BLOCK, replace=False)] = True
        return mask

    drawn = np.stack([draw() for _ in range(NULL_HALVES + TUNING_HALVES)])
    named = np.stack([np.ones_like(is_visual), is_visual, ~is_visual])
    return ModuleSets(np.arange(2 * OF_KIND), named, drawn[:NULL_HALVES], drawn[NULL_HALVES:], True)


def columns_in(
    rng: np.random.Generator, world: Collection, labels: np.ndarray, modules: np.ndarray
) -> np.ndarray:
    """The columns (n, D) float32 of all modules."""
    strengths = np.where(modules < OF_KIND, world.visual, world.text)
    turned = [CORNERS @ scipy.stats.ortho_group.rvs(3, random_state=rng) for _ in range(2 * OF_KIND)]
    means = np.concatenate(turned, axis=1) * strengths  # (C, D)
    x = means[labels] + rng.normal(size=(len(labels), len(modules)))
    if world.is_twin:
        half = x.shape[1] // 2
        x[:, half:] = x[:, :half] + OWN_NOISE * rng.normal(size=(len(labels), half))
    return x.astype(np.float32)


def runs_of(
    rng: np.random.Generator, x: np.ndarray, labels: np.ndarray, folds: list[Split]
) -> dict[str, np.ndarray]:
    """The predictions of one run a fold, as a cell's file has them."""
    shape = len(folds), len(labels)
    told, parts = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
    for run, fold in enumerate(folds):
        train = rng.permutation(fold.train)[: round(7 / 8 * len(fold.train))]
        rows = np.concatenate([train, fold.val, fold.test])
        of_train = x[train].astype(float)
        columns = ((x[rows] - of_train.mean(0)) / of_train.std(0)).astype(np.float32)
        sizes = len(train), len(fold.val), len(fold.test)
        one_module = np.zeros(x.shape[1], int)
        task = RidgeTask(columns, one_module, labels[rows], sizes, 1, OPENING_CLASSES)
        told[run, fold.test] = RidgeReader(task).classes(np.ones((1, 1), bool), RUN_SHARE)[0]
        parts[run, fold.val], parts[run, fold.test] = PARTS.index("val"), PARTS.index("test")
    seeds, numbers = np.arange(len(folds)), np.arange(len(folds))
    return {
        "labels": labels.astype(np.int32),
        "predictions": told,
        "parts": parts,
        "seeds": seeds,
        "folds": numbers,
    }
