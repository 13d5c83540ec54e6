"""Random LoRA files as diffusers, PEFT or kohya's scripts name them, to try or time the builder with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

STYLES = ("diffusers", "peft", "kohya")
FILE_NAMES = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model", "kohya": "lora"}


def write_adapter(folder: Path, style: str, matrices: dict[str, np.ndarray], alpha: float) -> Path:
    """Write matrices of canonical columns as a tool would; returns the file.

    For PEFT its adapter_config.json is written too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    renamed: dict[str, np.ndarray] = {}
    rank = next(len(matrix) for column, matrix in matrices.items() if ".lora.down." in column)
    for column, matrix in matrices.items():
        module, _, side = column.removesuffix(".weight").rpartition(".lora.")
        if style == "diffusers":
            renamed[column] = matrix
            renamed[f"{module}.alpha"] = np.array(alpha, dtype=np.float32)
        elif style == "peft":
            letter = "A" if side == "down" else "B"
            renamed[f"base_model.model.{module.removeprefix('unet.')}.lora_{letter}.weight"] = matrix
        else:
            flat = module.replace("text_encoder.", "te.", 1).replace(".", "_")
            renamed[f"lora_{flat}.lora_{side}.weight"] = matrix
            renamed[f"lora_{flat}.alpha"] = np.array(alpha, dtype=np.float32)
    path = folder / f"{FILE_NAMES[style]}.safetensors"
    save_file(renamed, path)
    if style == "peft":
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def random_matrices(
    number: int, num_classes: int, shapes: list[tuple[str, int, int]], seed: int
) -> dict[str, np.ndarray]:
    """Column -> matrix of the adapter with this number, whose class is its number modulo the classes.

    A class has its own scale, so that the experiment can tell it.
    """
    rng = np.random.default_rng([seed, number])
    scale = np.float32(1 + 0.1 * (number % num_classes))
    return {
        column: scale * rng.standard_normal((rows, cols), dtype=np.float32) for column, rows, cols in shapes
    }
