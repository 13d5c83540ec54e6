"""The tensors of an adapter file: names, types, shapes and values, from safetensors or from a pickle.

A pickle is read with torch's `weights_only`, which makes tensors and plain containers and runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from ablation.adapter_kinds import BadFile

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

FLOAT_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
INTEGER_TYPES = {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOAT8 = {  # as torch calls them
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
WEIGHT_TYPES = (*FLOAT_TYPES, "BF16", *FLOAT8)
# Other spellings, of `deserialize` and of torch
STORED_TYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
} | {name: code for code, name in FLOAT8.items()}

TensorHeader = tuple[str, str, tuple[int, ...]]  # name, type and shape of a tensor


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | np.ndarray

    def as_numbers(self) -> np.ndarray:
        """Its values, flat, as float64: for single numbers. Raises BadFile as `as_float32`."""
        if self.dtype == "F64" or self.dtype in INTEGER_TYPES:
            return np.frombuffer(self.data, (FLOAT_TYPES | INTEGER_TYPES)[self.dtype]).astype(np.float64)
        return self.as_float32().astype(np.float64)

    def as_float32(self) -> np.ndarray:
        """Its values, flat, exactly but for a float64 (which is rounded, and may become inf).
        Raises BadFile for a type that is no number's.
        """
        if self.dtype == "BF16":  # the upper half of a float32
            return (np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        if self.dtype in FLOAT8:
            return from_float8(self)
        if self.dtype not in FLOAT_TYPES | INTEGER_TYPES:
            raise BadFile(f"holds a tensor of type {self.dtype}, which is not understood")
        values = np.frombuffer(self.data, (FLOAT_TYPES | INTEGER_TYPES)[self.dtype])
        with np.errstate(over="ignore"):
            return values.astype(np.float32)


def from_float8(tensor: Stored) -> np.ndarray:
    """The values of an 8-bit float tensor. Raises BadFile if torch does not know the type."""
    import torch

    kind = getattr(torch, FLOAT8[tensor.dtype], None)
    if kind is None:
        raise BadFile(f"holds a tensor of type {tensor.dtype}, which this torch does not read")
    as_bytes = torch.from_numpy(np.frombuffer(tensor.data, np.uint8).copy())
    return as_bytes.view(kind).to(torch.float32).numpy()


def refuse_no_file(path: Path) -> None:
    """Raise BadFile for a pipe, a socket or a device, which might be waited for without end."""
    if path.exists() and not path.is_file():
        raise BadFile("is no regular file")


def read_headers_of(path: Path) -> tuple[TensorHeader, ...]:
    """Name, type and shape of every tensor, by name. Of safetensors no weight is read. Raises BadFile."""
    refuse_no_file(path)
    if path.suffix in PICKLES:
        return headers_of_tensors(read_pickle(path))
    try:
        with safe_open(path, framework="np") as file:
            slices = [(key, file.get_slice(key)) for key in sorted(file.keys())]
            return tuple((key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot be read: {' '.join(str(error).split())}") from error


def read_tensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, and the metadata in its header. Raises BadFile."""
    refuse_no_file(path)
    if path.suffix in PICKLES:
        return read_pickle(path), {}
    try:
        content = path.read_bytes()
        tensors = dict(deserialize(content))
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot be read: {' '.join(str(error).split())}") from error
    return {
        key: Stored(STORED_TYPE_NAMES.get(each["dtype"], each["dtype"]), tuple(each["shape"]), each["data"])
        for key, each in sorted(tensors.items())
    }, header_metadata(content)


def headers_of_tensors(tensors: dict[str, Stored]) -> tuple[TensorHeader, ...]:
    """Name, type and shape of tensors that were read."""
    return tuple((key, tensor.dtype, tensor.shape) for key, tensor in tensors.items())


def header_metadata(content: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__") or {}


def read_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a pickle that holds a dictionary of them, or one under "state_dict". Raises BadFile."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no types for a damaged file
        if type(error).__name__ == "UnpicklingError":
            raise BadFile(
                "a pickle that is damaged, or holds more than tensors, which could run code: convert it if "
                "you trust it"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise BadFile(f"cannot be read: {type(error).__name__}: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise BadFile(f"a pickle of {type(content).__name__}: a dictionary of tensors is expected")
    try:
        return {key: as_stored(key, content[key]) for key in sorted(content, key=str)}
    except (RuntimeError, ArithmeticError, TypeError, ValueError, MemoryError) as error:
        raise BadFile(f"a pickle of no plain tensors: {' '.join(str(error).split())[:200]}") from error


def as_stored(key: Any, value: Any) -> Stored:
    """A tensor, or number, of a pickle. Raises BadFile for anything else."""
    import torch

    if isinstance(value, (int, float)) and isinstance(key, str):  # such as an alpha
        value = torch.tensor(value)
    is_plain = isinstance(key, str) and isinstance(value, torch.Tensor)
    is_plain = is_plain and not (value.is_nested or value.is_meta) and value.layout == torch.strided
    if not is_plain or value.nbytes > value.untyped_storage().nbytes():  # the last: repeated without end
        raise BadFile(f"a pickle that holds {type(value).__name__} under {str(key)[:60]!r}: no plain tensor")
    name = str(value.dtype).removeprefix("torch.")
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    return Stored(STORED_TYPE_NAMES.get(name, name), tuple(value.shape), data)
