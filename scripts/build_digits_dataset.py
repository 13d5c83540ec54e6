#!/usr/bin/env python3
"""Make a real weight-space data set on a CPU: many LoRAs,
each fine-tuned on a few images of one handwritten digit.

With --prompt neutral all LoRAs see one and the same context, so the text path never meets the class; with
--prompt named each sees its digit's own, as in the published sets. The two share seeds, images and the UNet.
A run that was stopped goes on from its last finished block when the same command is given again.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch

from ablation.making.digits import DigitsRecipe, build_digits

COUNTS = (
    "loras",
    "rank",
    "steps",
    "images",
    "groups",
    "batch_size",
    "pretrain_steps",
    "pretrain_batch",
    "block_size",
    "threads",
)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    arguments = parse_command_line(argv)
    torch.set_num_threads(arguments.threads)
    fields: dict[str, Any] = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(DigitsRecipe)}
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    build_digits(arguments.output, arguments.loras, DigitsRecipe(**fields), arguments.block_size)


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked; a bad one ends the program with status 2."""
    default = DigitsRecipe()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.parquet", help="file to write")
    add("--loras", type=int, default=520, help="how many")
    text = "one context for all, or the digit's own"
    add("--prompt", choices=("neutral", "named"), default=default.prompt, help=text)
    add("--rank", type=int, default=default.rank, help="of every LoRA")
    add(
        "--steps",
        type=int,
        nargs="+",
        default=default.steps,
        help="training steps: one of these for each LoRA",
    )
    add("--images", type=int, nargs="+", default=default.images, help="images: one of these for each LoRA")
    text = "parts of each digit's images; a LoRA's images are of one"
    add("--groups", type=int, default=default.groups, help=text)
    text = "how images are divided: by chance, or into k-means clusters of their pixels"
    add("--grouping", choices=("random", "clusters"), default=default.grouping, help=text)
    add("--learning-rate", type=float, default=default.learning_rate, help="Adam's, for the LoRAs")
    add("--batch-size", type=int, default=default.batch_size, help="images a step")
    add("--pretrain-steps", type=int, default=default.pretrain_steps, help="of the UNet")
    add("--pretrain-batch", type=int, default=default.pretrain_batch, help="images a step of the UNet")
    add("--seed", type=int, default=default.seed, help="of everything that is random")
    add("--block-size", type=int, default=20, help="LoRAs trained at once")
    add("--threads", type=int, default=1, help="of torch; another number may change the last digits")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".parquet":
        parser.error(f"--output {arguments.output}: the name of a Parquet file ends in .parquet")
    for name in COUNTS:
        value = getattr(arguments, name)
        if min(value if isinstance(value, (list, tuple)) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if arguments.seed < 0 or not arguments.learning_rate > 0:
        parser.error("--seed is at least 0 and --learning-rate above it")
    return arguments


if __name__ == "__main__":
    main()
