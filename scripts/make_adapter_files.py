#!/usr/bin/env python3
"""Write a folder of random LoRA files as diffusers,
PEFT or kohya's scripts name them, to try or time the builder with.

FOLDER/class_<c>/<number>/ holds a file each, with the layers of the published sets (to_q and to_v of SD
v1.5). The same --seed gives the same weights in every style.
"""

import argparse
from pathlib import Path

import _root  # noqa: F401

from ablation.layers import sd15_shapes
from ablation.making.adapter_files import STYLES, random_matrices, write_adapter


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="folder to write to")
    add("--style", choices=STYLES, required=True, help="whose names the tensors have")
    add("--files", type=int, default=200, help="how many (default: 200)")
    add("--classes", type=int, default=5, help="how many (default: 5)")
    add("--rank", type=int, default=4, help="of every LoRA (default: 4)")
    add("--alpha", type=float, help="of every module (default: the rank, which scales nothing)")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    arguments = parser.parse_args(argv)
    for number in range(arguments.files):
        shapes = sd15_shapes(arguments.rank)
        matrices = random_matrices(number, arguments.classes, shapes, arguments.seed)
        folder = arguments.folder / f"class_{number % arguments.classes}" / f"{number:05}"
        write_adapter(folder, arguments.style, matrices, arguments.alpha or arguments.rank)


if __name__ == "__main__":
    main()
