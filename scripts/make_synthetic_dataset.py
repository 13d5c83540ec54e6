#!/usr/bin/env python3
"""Write a data set of random LoRAs with the published topology: 128 layers of SD v1.5, ten classes.

A signal may be planted in the chosen attention kind: in the norms of single matrices, or in the products up @
down alone. The folder is read like one written by save_to_disk. Rows depend on --seed and their number alone.
"""

import argparse
import shutil
from pathlib import Path

import _root  # noqa: F401

from ablation.making.synthetic import LAYOUTS, SIGNAL_KINDS, STRENGTHS, SyntheticRecipe, write_synthetic


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("output", type=Path, help="folder to write; an existing one is refused without --overwrite")
    add("--rows", type=int, default=1000, help="LoRAs (default: 1000)")
    add("--rank", type=int, default=1, help="of every LoRA (default: 1)")
    add("--layout", choices=LAYOUTS, default="nested", help="how a matrix is stored (default: nested)")
    text = "attention kinds that know the class (default: both)"
    add("--signal", choices=tuple(SIGNAL_KINDS), default="both", help=text)
    text = "what of the weights knows the class (default: norms)"
    add("--carrier", choices=tuple(STRENGTHS), default="norms", help=text)
    text = (
        "norms: std of the log of a class's scale in a layer (default: 0.01); product: std of the signal in "
        "`up` over that of its noise (default: 1)"
    )
    add("--strength", type=float, help=text)
    add("--seed", type=int, default=0, help="of everything that is random (default: 0)")
    add("--overwrite", action="store_true", help="replace an existing data set")
    arguments = parser.parse_args(argv)
    if arguments.rows < 1 or arguments.rank < 1:
        parser.error("--rows and --rank are at least 1")
    output, strength = arguments.output, arguments.strength
    if output.exists():
        if not (arguments.overwrite and (output / "state.json").is_file()):
            parser.error(f"{output} exists: choose another folder, or --overwrite to replace a data set")
        shutil.rmtree(output)
    recipe = SyntheticRecipe(
        rows=arguments.rows,
        rank=arguments.rank,
        layout=arguments.layout,
        signal=arguments.signal,
        carrier=arguments.carrier,
        strength=STRENGTHS[arguments.carrier] if strength is None else strength,
        seed=arguments.seed,
    )
    write_synthetic(recipe, output)


if __name__ == "__main__":
    main()
