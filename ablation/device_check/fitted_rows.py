"""Table 1, continued: representations that are fitted to training rows.

Their products are in float32 on the device, so the bound is PRODUCT_BOUND of the largest number of the kind.
What is compared is what the definition fixes: kernels and cosines as they are; the scores of pca and
kernel_pca by their products between all rows, which no sign and no turn among components of equal variance
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ablation.catalogue import SPECS
from ablation.collection import View
from ablation.device_check.board import NOT_RUN, Board, Finding, judged
from ablation.device_check.oracles import Array, true_centroid_cosines, true_products, true_score_products
from ablation.fit import Fit
from ablation.fitted import FITTED
from ablation.layers import ColumnLayout, Layers
from ablation.splits import Split

PRODUCT_BOUND = 1e-5
FIT_ROWS, FIT_CLASSES, FIT_TRAIN = 60, 3, 40
FIT_MODULES = ((2, 160, 128), (4, 256, 160), (1, 64, 48))  # (rank, in, out)


class GeneratedWeights:
    """Layers in memory, read as a data set's are."""

    def __init__(self, layers: Layers, weights: dict[str, Tensor], device: str):
        self.layers, self.weights, self.device = layers, weights, device

    def read_on_host(self, layer: str, start: int, stop: int, buffer: Array | None = None) -> Tensor:
        """One layer of rows start:stop, (n, rows, cols)."""
        return self.weights[layer][start:stop].clone()

    def read_rows(self, layer: str, rows: Tensor) -> Tensor:
        """One layer of the rows with these numbers, (n, rows * cols)."""
        return self.weights[layer][rows].flatten(1)


def generated_fit(device: str, components: int) -> tuple[Fit, list[tuple[Array, Array]]]:
    """A collection of random modules as a fitted representation sees it, and its modules (down, up)."""
    rng = np.random.default_rng(0)
    labels = np.arange(FIT_ROWS) % FIT_CLASSES
    weights, layouts, modules = {}, {}, []
    for number, (r, inner, out) in enumerate(FIT_MODULES):
        signal = 1 + 0.5 * labels[:, None, None]
        down, up = rng.normal(size=(FIT_ROWS, r, inner)), rng.normal(size=(FIT_ROWS, out, r)) * signal
        modules.append((down.astype(np.float32), up.astype(np.float32)))
        block = f"unet.down_blocks.{number}.attentions.0.transformer_blocks.0.attn1.to_q.lora"
        for side, w in zip(("down", "up"), modules[-1], strict=True):
            name = f"{block}.{side}.weight"
            weights[name] = torch.from_numpy(w)
            layouts[name] = ColumnLayout(name, w.shape[1], w.shape[2], "float", True)
    layers = Layers(sorted(weights), layouts)
    rows = rng.permutation(FIT_ROWS)
    split = Split(rows[:FIT_TRAIN], rows[FIT_TRAIN : FIT_TRAIN + 8], rows[FIT_TRAIN + 8 :], False)
    data = SimpleNamespace(
        num_rows=FIT_ROWS,
        layers=layers,
        weights=GeneratedWeights(layers, weights, device),
        labels=labels,
        classes=list(range(FIT_CLASSES)),
        metadata={"steps": np.where(rows % 4 == 0, np.nan, rows * 1.0)},
    )
    return Fit(cast(Any, data), View(labels, split), "all_layers", components), modules


def all_weights(fit: Fit) -> Array:
    """Every weight of every row, (n, D) float64."""
    return torch.cat([fit.read(position).flatten(1) for position in fit.positions], dim=1).double().numpy()


def fitted_truth(name: str, fit: Fit, modules: list[tuple[Array, Array]]) -> Array:
    """What `fixed_part` of the representation should be."""
    train = fit.view.split.train
    if name == "pca":
        return true_score_products(all_weights(fit), train, fit.components)
    if name == "kernel_pca":
        return true_score_products(true_products(modules), train, fit.components)
    if name == "kernel_ridge":
        dense = true_products(modules)
        return dense @ dense[train].T
    if name == "centroid_cosine":
        return true_centroid_cosines(modules, fit.view.labels, train, FIT_CLASSES)
    if name == "flat_vec":
        return all_weights(fit)
    (steps,) = fit.data.metadata.values()
    has_value = np.isfinite(steps)
    mean = steps[train][has_value[train]].mean()
    return np.stack([np.where(has_value, steps - mean, 0), has_value], axis=1)


def fixed_part(name: str, found: Tensor) -> Array:
    """What the definition fixes of a representation's numbers (n, k)."""
    x = found.double().cpu().numpy()
    return x @ x.T if name in ("pca", "kernel_pca") else x


def fitted_finding(name: str, device: str) -> Finding:
    """Compare one fitted representation."""
    fit, modules = generated_fit(device, FIT_TRAIN - 1)
    ours = fixed_part(name, FITTED[name](fit).to("cpu"))
    truth = fitted_truth(name, fit, modules)
    if ours.shape != truth.shape:
        raise ValueError(f"{ours.shape} numbers, {truth.shape} expected")
    error, spread = np.abs(ours - truth), truth.std()
    if not np.isfinite(ours).all():
        error = np.full_like(error, np.inf)
    of_allowed = float(error.max() / (PRODUCT_BOUND * np.abs(truth).max()))
    shown = {
        "error, of the spread": f"{error.max() / spread:.1e}",
        "of the allowed": f"{of_allowed:.2g}",
        "cases": "1",
        "worst case": f"{len(FIT_MODULES)} modules, {FIT_ROWS} rows",
    }
    return judged(of_allowed <= 1, shown, of_allowed=of_allowed)


def check_fitted(board: Board, device: str) -> None:
    """Add a row for each representation that is fitted to training rows."""
    for name in [name for name, spec in SPECS.items() if spec.fitted]:
        board.check(name, finding_or_missing(name, device))


def finding_or_missing(name: str, device: str) -> Callable[[], Finding]:
    """The check of a representation; "not run" if the package that it is fitted with is not installed."""

    def check() -> Finding:
        try:
            return fitted_finding(name, device)
        except ModuleNotFoundError as error:
            return Finding(NOT_RUN, {"worst case": str(error)})

    return check
