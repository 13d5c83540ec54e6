"""Features stored in fewer bits: each column between its least and largest value, as float16 or int8.

A stored number c stands for middle + c * half, where half is half of the column's range: float16 keeps 11
bits of each c in -1..1, int8 the nearest of 255 steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ablation.streamed import Matrix, stream

CODES = 127  # steps of int8 from the middle to an end
NOT_FINITE = -128  # the int8 of a value that is no number


class Scale(NamedTuple):
    """The middle and half of the range of each column, (D,) float32."""

    middle: np.ndarray
    half: np.ndarray


def scale_between(low: np.ndarray, high: np.ndarray) -> Scale:
    """The scale of columns whose finite values lie between `low` and `high` (D,); of a constant column exact.

    A column without a finite value has low = inf and high = -inf.
    """
    known = low <= high
    wide_low, wide_high = (np.where(known, x, 0).astype(np.float64) for x in (low, high))
    middle, half = (wide_low + wide_high) / 2, (wide_high - wide_low) / 2
    return Scale(middle.astype(np.float32), half.astype(np.float32))


def bounds_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest finite value of each column of x (n, D); inf and -inf without any."""
    finite = np.isfinite(x)
    low = np.min(x, axis=0, where=finite, initial=np.inf)
    return low, np.max(x, axis=0, where=finite, initial=-np.inf)


def encode(x: np.ndarray, scale: Scale, dtype: str) -> np.ndarray:
    """Rows x (n, D) float32 in another type."""
    finite = np.isfinite(x)
    shifted = np.where(finite, x, scale.middle).astype(np.float64) - scale.middle
    share = np.divide(shifted, scale.half, out=np.zeros_like(shifted), where=scale.half > 0).clip(-1, 1)
    if dtype == "float16":
        return np.where(finite, share, np.nan).astype(np.float16)
    return np.where(finite, np.rint(share * CODES), NOT_FINITE).astype(np.int8)


def encoded(x: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The arrays that stand for features x (N, D) float32 in a file: `features`, and their scale."""
    if dtype == "float32":
        return {"features": x}
    scale = scale_between(*bounds_of(x))
    return {"features": encode(x, scale, dtype), **scale._asdict()}


def decoded(arrays: dict[str, np.ndarray]) -> Matrix:
    """The features that stored arrays stand for; of another type than float32 they are decoded when used."""
    stored = arrays["features"]
    if stored.dtype == np.float32:
        return torch.from_numpy(stored)
    scale = Scale(arrays["middle"], arrays["half"])

    def make(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        own = Scale(scale.middle[start:stop], scale.half[start:stop])
        return torch.from_numpy(decode(stored[:, start:stop][rows.numpy()], own))

    return stream(make, *stored.shape)


def decode(stored: np.ndarray, scale: Scale) -> np.ndarray:
    """Rows (n, D) float32 of stored ones; NaN for what was not finite."""
    share = stored.astype(np.float32)
    if stored.dtype == np.int8:
        share = np.where(stored == NOT_FINITE, np.float32(np.nan), share / CODES)
    return scale.middle + share * scale.half
