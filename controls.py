"""What the results must withstand: audits that change the weights of rows, other classifiers in the MLP's place, shuffled labels.

An audit is a set of changed rows: which row of the data set each comes from, in which variant, and how its weights are
changed as they are read. What is drawn depends on the layer and on the block's first row alone, not on threads or devices.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lora_data import BLOCK_ROWS, LoraData
from training import COLUMN_BLOCK, PARTS, OnRun, Run, TrainedRuns, standardise

log = logging.getLogger("visual_ablation")

GAUGE_STRETCH = 2.0                        # a direction is scaled by at most this, or by at least its inverse
NOISE_LEVELS = (0.01, 0.05, 0.10, 0.20)    # std of the noise over the std of the row's layer
SEED = 0
PROBE_PENALTIES = tuple(10.0**power for power in range(-4, 2))   # scikit-learn's C: the inverse of a penalty on the squared weights
PROBE_ITERATIONS = 2000
BOOSTING_ITERATIONS, BOOSTING_PATIENCE = 100, 10
BOOSTING_LEAVES, BOOSTING_BINS = 8, 32     # few of both: a data set has some hundred rows and up to ten thousand columns, and time goes with both


class Audit:
    """Changed rows, block by block; within a block variant by variant."""

    name: str
    variants: tuple[str, ...]              # as the results name them

    def __init__(self, data: LoraData, rows: np.ndarray):
        """`rows` of the data set are changed, in every variant."""
        self.num_rows = data.num_rows
        self.chosen = np.zeros(data.num_rows, dtype=bool)
        self.chosen[rows] = True

    def rows_in(self, start: int, stop: int) -> np.ndarray:
        """Row numbers of the changed rows that come from rows start:stop, in order."""
        return np.tile(np.flatnonzero(self.chosen[start:stop]) + start, len(self.variants))

    @cached_property
    def rows(self) -> np.ndarray:
        """(E,) the row of the data set that each changed row comes from."""
        return np.concatenate([self.rows_in(start, min(start + BLOCK_ROWS, self.num_rows)) for start in range(0, self.num_rows, BLOCK_ROWS)])

    def positions(self, variant: str, rows: np.ndarray) -> np.ndarray:
        """Where the changed rows of a variant that come from `rows` stand in `self.rows`."""
        by_row = np.argsort(self.rows, kind="stable").reshape(-1, len(self.variants))   # a row's variants come in their order
        place = np.full(self.num_rows, -1)
        place[self.chosen] = by_row[:, self.variants.index(variant)]
        return place[rows]

    def change(self, data: LoraData, position: int, start: int, stop: int, w: Tensor) -> Tensor:
        """The changed rows of `w` (n, rows, cols), a layer of rows start:stop: (e, rows, cols) with e = len(rows_in(start, stop))."""
        raise NotImplementedError

    def changes(self, x: Tensor, changed: Tensor, train_rows: np.ndarray) -> dict[str, dict[str, float]]:
        """How far each variant's features, among `changed` (E, D), lie from those of the rows that they come from, in `x` (N, D).

        In units of each column's spread, its std over all rows, for the columns that vary over the training rows: the
        `largest` over rows and columns, and the root of the mean square, `rms`.
        """
        rows = np.flatnonzero(self.chosen)
        positions = {variant: self.positions(variant, rows) for variant in self.variants}
        largest, squares, columns = dict.fromkeys(self.variants, 0.0), dict.fromkeys(self.variants, 0.0), 0
        for before, after in zip(x.split(COLUMN_BLOCK, dim=1), changed.split(COLUMN_BLOCK, dim=1), strict=True):
            low, high = before[train_rows].aminmax(dim=0)
            before, after = before[:, high > low].double(), after[:, high > low]
            columns += before.shape[1]
            for variant in self.variants if before.shape[1] else ():
                difference = (after[positions[variant]] - before[rows]) / before.std(0, correction=0)
                largest[variant] = max(largest[variant], float(difference.abs().max()))
                squares[variant] += float(difference.square().mean(0).sum())
        return {variant: {"largest": largest[variant], "rms": (squares[variant] / max(columns, 1)) ** 0.5} for variant in self.variants}


class GaugeAudit(Audit):
    """Every row as another pair of the same product, (up G, inv(G) down): what is read off a LoRA must not depend on that.

    G = Q D Q' with random orthogonal Q and Q', and D of either sign between 1 / GAUGE_STRETCH and GAUGE_STRETCH, is drawn for
    each row and module. A layer without a partner stays as it is.
    """

    name, variants = "gauge", ("re-gauged",)

    def __init__(self, data: LoraData, test_rows: np.ndarray):
        super().__init__(data, np.arange(data.num_rows))

    def change(self, data: LoraData, position: int, start: int, stop: int, w: Tensor) -> Tensor:
        module = data.module_at.get(position)
        if module is None:
            return w
        down_side = module.down == position
        rank = w.shape[1] if down_side else w.shape[2]
        left, stretch, right = (torch.from_numpy(part).to(w.device) for part in gauges(module.name, start, stop - start, rank))
        if down_side:
            return ((right.mT / stretch[:, None]) @ (left.mT @ w.double())).float()
        return ((w.double() @ left * stretch[:, None]) @ right).float()


def gauges(module: str, start: int, n: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q (n, r, r), the diagonal of D (n, r) and Q' (n, r, r), float64."""
    rng = np.random.default_rng([SEED, *module.encode(), start])
    left, right = (np.linalg.qr(rng.normal(size=(n, rank, rank)))[0] for _ in range(2))
    return left, rng.choice([-1.0, 1.0], (n, rank)) * GAUGE_STRETCH ** rng.uniform(-1, 1, (n, rank)), right


class NoiseAudit(Audit):
    """Test rows with Gaussian noise added: each level is a part of the std of the row's layer; all levels share one draw."""

    name, variants = "noise", tuple(f"{level:.0%}" for level in NOISE_LEVELS)

    def change(self, data: LoraData, position: int, start: int, stop: int, w: Tensor) -> Tensor:
        w = w[torch.from_numpy(self.chosen[start:stop]).to(w.device)]
        with data.buffer() as memory:
            noise = memory[:w.numel()]
            np.random.Generator(np.random.SFC64([SEED, *data.layers[position].encode(), start])).standard_normal(out=noise, dtype=np.float32)
            scaled = torch.from_numpy(noise).view(w.shape).to(w.device) * w.flatten(1).std(1, correction=0)[:, None, None]
            return torch.cat([w + level * scaled for level in NOISE_LEVELS])


AUDITS: dict[str, Callable[[LoraData, np.ndarray], Audit]] = {"gauge": GaugeAudit, "noise": NoiseAudit}


# --- other classifiers: one run each, on the same columns and rows as the MLP


def train_linear(x: Tensor, labels: np.ndarray, split, on_run: OnRun) -> TrainedRuns:
    """Multinomial logistic regression (scikit-learn, L-BFGS) of `labels` (N,) on the standardised columns of `x` (N, D).

    The penalty is the one of PROBE_PENALTIES with the best validation accuracy, the strongest of several.
    """
    began = time.perf_counter()
    columns, rows = standardised(x, split)
    if len(np.unique(labels[split.train])) == 1:                         # there is one answer
        return one_run({part: np.full(len(of_part), labels[split.train[0]]) for part, of_part in rows.items()}, began, columns, on_run)
    model = LogisticRegression(max_iter=PROBE_ITERATIONS, warm_start=True)
    best, found = -1.0, {}
    for penalty in PROBE_PENALTIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)          # said in the log's own words
            model.set_params(C=penalty).fit(columns[rows["train"]], labels[rows["train"]])
        if max(model.n_iter_) >= PROBE_ITERATIONS:
            log.warning(f"the linear probe did not converge in {PROBE_ITERATIONS} iterations at C = {penalty:g}")
        accuracy = np.mean(model.predict(columns[rows["val"]]) == labels[rows["val"]])
        if accuracy > best:
            best, found = accuracy, {part: model.predict(columns[of_part]) for part, of_part in rows.items()}
    return one_run(found, began, columns, on_run)


def train_boosting(x: Tensor, labels: np.ndarray, split, on_run: OnRun) -> TrainedRuns:
    """Gradient-boosted trees (scikit-learn's histogram kind) of `labels` (N,) on the columns of `x` (N, D) that vary.

    Trees are added until the validation loss has not fallen for BOOSTING_PATIENCE iterations; predictions are those of the
    iteration with the best validation accuracy, the earliest of several.
    """
    began = time.perf_counter()
    columns, rows = standardised(x, split)
    val = rows["val"][np.isin(labels[rows["val"]], labels[rows["train"]])]   # a class without a training row has no loss
    model = HistGradientBoostingClassifier(
        max_iter=BOOSTING_ITERATIONS, early_stopping=len(val) > 0, n_iter_no_change=BOOSTING_PATIENCE, random_state=SEED,
        max_leaf_nodes=BOOSTING_LEAVES, max_bins=BOOSTING_BINS,
    )
    watched = {"X_val": columns[val], "y_val": labels[val]} if len(val) else {}
    model.fit(columns[rows["train"]], labels[rows["train"]], **watched)
    accuracies = [np.mean(predicted == labels[rows["val"]]) for predicted in model.staged_predict(columns[rows["val"]])]
    best = int(np.argmax(accuracies))
    found = {part: next(itertools.islice(model.staged_predict(columns[of_part]), best, None)) for part, of_part in rows.items()}
    return one_run(found, began, columns, on_run)


def standardised(x: Tensor, split) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Columns as the MLP gets them, (N, D'), and the rows of each part."""
    return standardise(x, torch.from_numpy(split.train)).numpy(), {part: getattr(split, part) for part in PARTS}


def one_run(predictions: dict[str, np.ndarray], began: float, columns: np.ndarray, on_run: OnRun) -> TrainedRuns:
    run = Run(SEED, predictions=predictions, seconds=time.perf_counter() - began)
    on_run(run, 1)
    return TrainedRuns([run], columns.shape[1])


CLASSIFIERS: dict[str, Callable[..., TrainedRuns]] = {"linear": train_linear, "boosting": train_boosting}
