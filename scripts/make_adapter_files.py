#!/usr/bin/env python3
"""Write a folder of random LoRA files as diffusers, PEFT or kohya's scripts name them, to try or time the builder with.

FOLDER/class_<c>/<number>/ holds a file each, with the layers of the published sets (to_q and to_v of SD v1.5) unless told
otherwise. The same --seed gives the same weights in every style. A class has its own scale, so that the experiment finds it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lora_data import sd15_shapes  # noqa: E402

STYLES = ("diffusers", "peft", "kohya")


def write_adapter(folder: Path, style: str, matrices: dict[str, np.ndarray], alpha: float) -> Path:
    """Write matrices of canonical columns as a tool would: the file it makes, and for PEFT its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {}
    rank = next(len(matrix) for column, matrix in matrices.items() if ".lora.down." in column)
    for column, matrix in matrices.items():
        module, _, side = column.removesuffix(".weight").rpartition(".lora.")
        if style == "diffusers":
            renamed[column] = matrix
            renamed[f"{module}.alpha"] = np.array(alpha, dtype=np.float32)
        elif style == "peft":
            renamed[f"base_model.model.{module.removeprefix('unet.')}.lora_{'A' if side == 'down' else 'B'}.weight"] = matrix
        else:
            flat = module.replace("text_encoder.", "te.", 1).replace(".", "_")
            renamed[f"lora_{flat}.lora_{side}.weight"] = matrix
            renamed[f"lora_{flat}.alpha"] = np.array(alpha, dtype=np.float32)
    name = {"diffusers": "pytorch_lora_weights", "peft": "adapter_model", "kohya": "lora"}[style]
    save_file(renamed, folder / f"{name}.safetensors")
    if style == "peft":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
    return folder / f"{name}.safetensors"


def random_matrices(number: int, num_classes: int, shapes, seed: int) -> dict[str, np.ndarray]:
    """Column -> matrix of the adapter with that number, whose class is its number modulo the classes."""
    rng = np.random.default_rng([seed, number])
    scale = np.float32(1 + 0.1 * (number % num_classes))
    return {column: scale * rng.standard_normal((rows, cols), dtype=np.float32) for column, rows, cols in shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, help="default: the rank, which scales nothing")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in range(arguments.files):
        matrices = random_matrices(number, arguments.classes, sd15_shapes(arguments.rank), arguments.seed)
        folder = arguments.folder / f"class_{number % arguments.classes}" / f"{number:05}"
        write_adapter(folder, arguments.style, matrices, arguments.alpha or arguments.rank)


if __name__ == "__main__":
    main()
