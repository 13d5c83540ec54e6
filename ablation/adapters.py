"""One adapter file, whatever tool wrote it -> matrices under canonical column names.

The same adapter gives the same columns: `<component>.<module path>.lora.down.weight` (r, in) and
`.lora.up.weight` (out, r), whose product times the scale is the change of that module's matrix. What a
tensor's name means is in adapter_names, what a kind of adapter means in adapter_kinds, which columns a file
becomes in adapter_layout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ablation.adapter_kinds import KINDS, SCALARS, BadFile
from ablation.adapter_layout import MAGNITUDE, FileModule, Layout, Reading, layout_of_tensors
from ablation.adapter_scales import configurations_of, scales_of
from ablation.adapter_storage import Stored, headers_of_tensors, read_headers_of, read_tensors
from ablation.fused_modules import Part, is_block_diagonal

SMALLEST = float(np.finfo(np.float32).tiny)  # below, float32 loses digits


def survey_file(path: Path, reading: Reading = Reading()) -> Layout:  # noqa: B008 (immutable)
    """The layout of a file from its header; of weights only a fused `up` is read. Raises BadFile."""
    headers = read_headers_of(path)
    layout = layout_of_tensors(headers, reading)
    if any(module.part for module in layout.modules.values()):
        tensors, _ = read_tensors(path)
        return layout_of_tensors(headers, reading, diagonal_modules(layout, tensors))
    return layout


def diagonal_modules(layout: Layout, tensors: dict[str, Stored]) -> frozenset[str]:
    """The fused LoRA modules of a file, by its own names, whose `up` is block diagonal."""
    parts: dict[str, list[Part]] = {}
    ups: dict[str, str] = {}
    for module in layout.modules.values():
        if module.part and module.kind == "LoRA":
            parts.setdefault(module.own, []).append(module.part)
            ups[module.own] = module.keys["up"]
    return frozenset(
        own
        for own, of_module in parts.items()
        if is_block_diagonal(matrix_of(tensors[ups[own]]), sorted(of_module, key=lambda part: part.start))
    )


def matrix_of(tensor: Stored) -> np.ndarray:
    """A tensor as (first, rest), float32."""
    return tensor.as_float32().reshape(tensor.shape[0], -1)


# --- a file's weights


class Adapter:
    """An adapter file. `scales` maps modules, in the order of `layout.modules`, to what their product is
    multiplied with (None if not read); `magnitudes` maps columns to flat float32.
    """

    def __init__(self, path: Path, reading: Reading, with_scales: bool):
        self._tensors, metadata = read_tensors(path)
        headers = headers_of_tensors(self._tensors)
        self.layout = layout_of_tensors(headers, reading)
        if any(module.part for module in self.layout.modules.values()):
            self.layout = layout_of_tensors(headers, reading, diagonal_modules(self.layout, self._tensors))
        self.scales: dict[str, float] | None = None
        configs = configurations_of(path, self.layout, metadata, is_needed=with_scales)
        if with_scales:
            self.scales = scales_of(self.layout, numbers_of(self.layout, self._tensors), configs)
        self.magnitudes = {
            column: self.magnitudes_of(self.layout.modules[column.removesuffix(f".{MAGNITUDE}")])
            for column in self.layout.magnitudes
        }

    def magnitudes_of(self, module: FileModule) -> np.ndarray:
        """The magnitudes of a DoRA's module: one a row, or one a column, of its matrix."""
        key = module.keys["magnitude"]
        values = finite_values(key, self._tensors[key])
        return module.part.rows_of(values) if module.part and len(values) == module.sizes.outputs else values

    def factors(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(module, down, up) one after another: those of a LoHa may be too large to be held all at once.

        Float32, a convolution flattened to (first, rest), no scale applied. Raises BadFile.
        """
        of_module = functools.lru_cache(maxsize=1)(functools.partial(factors_of, self._tensors))
        for name, module in self.layout.modules.items():
            down, up = of_module(module.kind, tuple(module.keys.items()))
            yield name, *(module.part.of(down, up) if module.part else (down, up))

    @functools.cached_property
    def matrices(self) -> dict[str, np.ndarray]:
        """Column -> (rows, cols) of every module."""
        sides = {name: {"down": down, "up": up} for name, down, up in self.factors()}
        return {f"{name}.lora.{side}.weight": w for name, both in sides.items() for side, w in both.items()}


def read_adapter(
    path: Path,
    reading: Reading = Reading(),  # noqa: B008 (immutable)
    with_scales: bool = True,
) -> Adapter:
    """An adapter file, whose tensors are read now. Raises BadFile.

    A LoRA's matrices are those of the file bit by bit; those of other kinds are computed in float64.
    """
    return Adapter(path, reading, with_scales)


def factors_of(
    tensors: dict[str, Stored], kind: str, keys: tuple[tuple[str, str], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The (down, up) of a module whose tensors have these (role, name). Raises BadFile."""
    arrays = {
        role: finite_values(key, tensors[key]).reshape(tensors[key].shape)
        for role, key in keys
        if role not in (*SCALARS, "magnitude")
    }
    if kind == "LoRA":
        return KINDS[kind].factors(arrays)
    exact = {role: array.astype(np.float64) for role, array in arrays.items()}
    factors = KINDS[kind].factors(exact)
    with np.errstate(over="ignore", under="ignore"):
        down, up = (factor.astype(np.float32) for factor in factors)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise BadFile(f"'{keys[0][1]}': the factors of its module are beyond float32")
    if any(0 < np.abs(factor).max(initial=0) < SMALLEST for factor in factors):
        raise BadFile(f"'{keys[0][1]}': the factors of its module are too small for float32")
    return down, up


def finite_values(key: str, tensor: Stored) -> np.ndarray:
    """A tensor's values, flat float32. Raises BadFile for one that is not finite, naming its place."""
    values = tensor.as_float32()
    if not np.isfinite(values).all():
        where = int(np.argmin(np.isfinite(values)))
        cols = values.size // tensor.shape[0]
        raise BadFile(
            f"'{key}': the weight at ({where // cols}, {where % cols}) is {values[where]} as float32"
        )
    return values


def numbers_of(layout: Layout, tensors: dict[str, Stored]) -> dict[str, float]:
    """The values of the one-number tensors, by their names. Raises BadFile for one that is no number."""
    numbers = {}
    for module in layout.modules.values():
        for role in SCALARS & module.keys.keys():
            key = module.keys[role]
            values = tensors[key].as_numbers()
            if values.size != 1 or not np.isfinite(values[0]):
                raise BadFile(f"'{key}' is not one finite number")
            numbers[key] = float(values[0])
    return numbers
