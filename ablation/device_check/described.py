"""Table 1: every representation on the device beside a float64 oracle on the CPU.

The error of a number is allowed to be SPREAD_BOUND of its column's spread (the std over the rows of a case,
as the oracle has it), and what float32 and float64 cannot hold: RESULT_ROUNDING of the column's largest
value, because results are float32; and ORACLE_ROUNDING of the row's largest number in weight units, or
RATIO_ROUNDING in a column without a unit, because a singular value or Fourier magnitude that is 0 in exact
arithmetic is rounding in the oracle too. "Share of the spread" is shown for the columns whose spread is at
least CLEAR of their largest value; in the others float32's own rounding is more than a small part of it.

Not judged: the relative gap after a singular value below NOISE of the largest, which is a ratio of two
roundings.
"""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ablation.catalogue import NINE, SPECS
from ablation.device_check.board import Board, Finding, judged
from ablation.device_check.oracles import LAYER_ORACLES, MODULE_ORACLES, Array
from ablation.device_check.sizes import LARGE_MATRIX, CheckSizes
from representations import PRODUCT_REPRESENTATIONS, describe, describe_module

SPREAD_BOUND = 1e-5  # docs/representations.md
RESULT_ROUNDING = 2e-7
ORACLE_ROUNDING = 1e-12
RATIO_ROUNDING = 1e-10
CLEAR = 0.05
NOISE = 1e-10
NO_ERROR = 1e-30  # an error below it is none: all numbers of a zero matrix are 0
# Columns without a unit, all others are in weight units, or in powers of them.
RATIOS = {
    "stats": (5, 6),
    "spectral": tuple(range(10, 31)),
    "matrix_norms": (5, 6),
    "distribution": (9, 10, 11),
    "frequency": (13,),
    "info_theoretic": (0, 1),
    "product_spectral": tuple(range(10, 31)),
    "product_norms": (5, 6),
}
GAPS = slice(20, 29)  # of `spectral` and `product_spectral`; the singular values are columns 0 to 9
MATRIX_KINDS = (
    "normal",
    "offset",
    "ties",
    "heavy tails",
    "tiny",
    "1e30",
    "of rank one",
    "constant",
    "constant of 1e30",
    "zeros",
)
MODULE_KINDS = ("initial", "trained", "less than its rank", "zeros")


class Deviation(NamedTuple):
    """The largest error of a representation in one case."""

    case: str
    of_allowed: float  # the error over the allowed error: at most 1 is right
    of_spread: float  # the error over the spread, of the columns where that says something; NaN without any
    column: int


@dataclass
class Deviations:
    """The errors of one representation in all its cases, and the exceptions of cases that gave no numbers."""

    cases: list[Deviation] = field(default_factory=list)
    exceptions: dict[str, Exception] = field(default_factory=dict)

    def finding(self) -> Finding:
        """The row of the table."""
        worst = max(self.cases, key=lambda one: one.of_allowed, default=Deviation("-", 0.0, math.nan, 0))
        shares = [one.of_spread for one in self.cases if not math.isnan(one.of_spread)]
        failing = [one.case for one in self.cases if not one.of_allowed <= 1] + list(self.exceptions)
        shown = {
            "error, of the spread": f"{max(shares):.1e}" if shares else "-",
            "of the allowed": f"{worst.of_allowed:.2g}",
            "cases": str(len(self.cases) + len(self.exceptions)),
            "worst case": f"{worst.case}, column {worst.column}",
        }
        if failing:
            shown["failing"] = f"{len(failing)} cases fail: {', '.join(failing[:5])}"
        for error in list(self.exceptions.values())[:1]:
            traceback.print_exception(error)
            shown["error"] = f"{type(error).__name__}: {error}"[:300]
        is_right = not failing and bool(self.cases)
        return judged(is_right, shown, cases=[one._asdict() for one in self.cases])


def ratios_of(name: str) -> list[int]:
    """Columns without a unit."""
    if name != "ensemble":
        return list(RATIOS.get(name, ()))
    columns, start = [], 0
    for part in ("spectral", "matrix_norms", "distribution", "frequency", "info_theoretic"):
        columns += [start + column for column in RATIOS.get(part, ())]
        start += SPECS[part].width
    return columns


def deviation(case: str, name: str, ours: Array, truth: Array) -> Deviation:
    """The largest error of numbers (n, k) beside the true ones."""
    if ours.shape != truth.shape:
        raise ValueError(f"{name} of {case}: {ours.shape} numbers, {truth.shape} expected")
    is_ratio = np.zeros(truth.shape[1], dtype=bool)
    is_ratio[ratios_of(name)] = True
    in_units = np.abs(truth[:, ~is_ratio]).max(1, keepdims=True, initial=0)  # (n, 1)
    spread, largest = truth.std(0), np.abs(truth).max(0)
    floor = np.where(is_ratio, RATIO_ROUNDING, ORACLE_ROUNDING * in_units)
    allowed = SPREAD_BOUND * spread + RESULT_ROUNDING * largest + floor + NO_ERROR
    if not truth.any():  # as of zero matrices: exactly 0
        allowed = np.full_like(truth, NO_ERROR)
    error = np.where(np.isfinite(ours), np.abs(ours - truth), np.inf)
    if name in ("spectral", "product_spectral", "ensemble"):
        error[:, GAPS][truth[:, :9] < NOISE * truth[:, :1]] = 0
    of_allowed = error / allowed
    clear = (spread >= CLEAR * largest) & (SPREAD_BOUND * spread > floor.max(0))
    of_spread = float((error / np.where(spread > 0, spread, 1))[:, clear].max()) if clear.any() else math.nan
    column = int(of_allowed.max(0).argmax())
    return Deviation(case, float(of_allowed.max()), of_spread, column)


# --- cases


def rows_of_case(size: int, sizes: CheckSizes) -> int:
    """Rows of a case whose matrices have so many weights."""
    return sizes.rows if size <= LARGE_MATRIX else sizes.large_rows


def drawn_matrices(kind: str, n: int, rows: int, cols: int) -> Array:
    """A batch (n, rows, cols) float32 of one of MATRIX_KINDS."""
    rng = np.random.default_rng([rows, cols, *kind.encode()])
    shape = (n, rows, cols)
    w: Array
    if kind == "offset":
        w = 100 + rng.normal(size=shape)
    elif kind == "ties":  # and entries on the edges of histogram bins
        w = rng.integers(-4, 9, shape)
    elif kind == "heavy tails":
        w = rng.standard_t(3, shape)
    elif kind == "of rank one":
        w = rng.normal(size=(n, rows, 1)) * rng.normal(size=(n, 1, cols))
    elif kind.startswith("constant"):
        values = np.linspace(-7.3, 8.1, n)[:, None, None]
        w = np.broadcast_to(values, shape) * (1e30 if "1e30" in kind else 1.0)
    else:
        scale = {"normal": 1.0, "tiny": 1e-6, "1e30": 1e30, "zeros": 0.0}[kind]
        w = scale * rng.normal(size=shape)
    return w.astype(np.float32)


def drawn_modules(kind: str, n: int, r: int, inner: int, out: int) -> tuple[Array, Array]:
    """`down` (n, r, in) and `up` (n, out, r), float32, of one of MODULE_KINDS: `down` as a LoRA is
    initialised, and `up` as it learns.
    """
    rng = np.random.default_rng([r, inner, out, *kind.encode()])
    down, up = rng.normal(size=(n, r, inner)), 1e-2 * rng.normal(size=(n, out, r))
    if kind == "trained":  # one direction stands out
        seen = (down @ rng.normal(size=(inner, 1)) / inner)[:, :, 0]
        up += 0.1 * rng.normal(size=(1, out, 1)) * seen[:, None]
    elif kind == "less than its rank":
        up[:, :, -1] = 2 * up[:, :, 0]
    elif kind == "zeros":
        up *= 0
    return down.astype(np.float32), up.astype(np.float32)


def matrix_cases(sizes: CheckSizes) -> Iterator[tuple[str, Array]]:
    """Every kind on small shapes, and normal matrices of the layers of known models."""
    shapes = [(kind, shape) for kind in MATRIX_KINDS for shape in sizes.shapes]
    shapes += [("normal", shape) for shape in sizes.layers]
    for kind, (rows, cols) in shapes:
        n = rows_of_case(rows * cols, sizes)
        yield f"{kind} {rows} x {cols}", drawn_matrices(kind, n, rows, cols)


def module_cases(sizes: CheckSizes) -> Iterator[tuple[str, Array, Array]]:
    """Every kind on small modules, and trained ones of the modules of known models."""
    shapes = [
        (kind, shape)
        for kind in MODULE_KINDS
        for shape in sizes.small_modules
        if shape[0] > 1 or kind != "less than its rank"
    ]
    shapes += [("trained", shape) for shape in sizes.modules]
    for kind, (r, inner, out) in shapes:
        n = rows_of_case(inner * out // 4, sizes)
        yield f"{kind} rank {r}, {inner} -> {out}", *drawn_modules(kind, n, r, inner, out)


# --- checks


def described_on(
    device: str, names: list[str], *weights: Array
) -> tuple[dict[str, Array], dict[str, Exception]]:
    """Representations of a batch of matrices, or of modules (down, up), computed on the device; and the
    exceptions of those that failed.
    """
    on_device = [torch.from_numpy(w).to(device) for w in weights]
    if len(on_device) == 1:
        found, failed = describe(on_device[0], names)
    else:
        found, failed = describe_module(on_device[0], on_device[1], names)
    away = [name for name, x in found.items() if x.device.type != torch.device(device).type]
    if away:
        raise RuntimeError(f"{', '.join(away)}: the numbers are not on {device}")
    return {name: x.cpu().double().numpy() for name, x in found.items()}, failed


def true_values(name: str, *weights: Array) -> Array:
    """The oracle's numbers (n, k) of matrices, or of modules (down, up)."""
    rows = zip(*(w.astype(np.float64) for w in weights), strict=True)
    oracle = {**LAYER_ORACLES, **MODULE_ORACLES}[name]
    return np.array([oracle(*row) for row in rows])  # type: ignore[operator]


@dataclass
class CaseCheck:
    """Compares cases on a device; `found` has the errors of each representation."""

    device: str
    found: dict[str, Deviations]

    def compare(self, case: str, *weights: Array, rows: Array | None = None) -> None:
        """Add the errors of every representation of matrices, or of modules (down, up), in one case. Only
        `rows` are compared, if given.
        """
        source = "layer" if len(weights) == 1 else "module"
        names = [name for name in self.found if SPECS[name].source == source]
        if case.startswith("less than its rank"):  # directions beyond the rank are rounding
            names.remove("product_directions")
        ours, failed = described_on(self.device, names, *weights)
        chosen = weights if rows is None else tuple(w[rows] for w in weights)
        for name in names:
            if name in failed:
                self.found[name].exceptions[case] = failed[name]
                continue
            own = ours[name] if rows is None else ours[name][rows]
            self.found[name].cases.append(deviation(case, name, own, true_values(name, *chosen)))


def check_described(board: Board, device: str, sizes: CheckSizes) -> None:
    """Add a row for each of the nine, and of the product's; and one for each case that failed as a whole."""
    check = CaseCheck(device, {name: Deviations() for name in (*NINE, *PRODUCT_REPRESENTATIONS)})
    failures: dict[str, Exception] = {}

    def compare(case: str, *weights: Array, rows: Array | None = None) -> None:
        try:
            check.compare(case, *weights, rows=rows)
        except Exception as error:  # the other cases go on; the row below says which failed
            failures[case] = error

    for case, w in matrix_cases(sizes):
        compare(case, w)
    for case, down, up in module_cases(sizes):
        compare(case, down, up)
    # More at once than one call of a decomposition takes; a few are compared.
    rows = np.linspace(0, sizes.many - 1, sizes.rows).astype(int)
    compare(f"{sizes.many} matrices at once", drawn_matrices("normal", sizes.many, 4, 40), rows=rows)
    compare(f"{sizes.many} modules at once", *drawn_modules("initial", sizes.many, 4, 24, 16), rows=rows)
    for name, deviations in check.found.items():
        board.check(name, deviations.finding)
    for case, failed in failures.items():
        board.check(f"representations of {case}", functools.partial(raise_again, failed))


def raise_again(error: Exception) -> Finding:
    """Raise an error that was met before, so that it becomes a row."""
    raise error
