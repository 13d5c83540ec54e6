#!/usr/bin/env python3
"""Turn folders of LoRA files (.safetensors of diffusers, PEFT or kohya's scripts)
into a data set that the experiment reads.

Every file becomes a row, every module's `down` and `up` a column under diffusers' dotted name, whatever tool
wrote the file. A file that cannot become a row is named with the reason. Rerun the same command to resume.

Labels (--label-from):
  folder    the first folder below FOLDER; where several FOLDERs are given, the name of the FOLDER
  metadata  the field --label-field of a metadata.json beside the file; each of its fields becomes a column
  civitai   the field --label-field of x.civitai.info beside x.safetensors, or else of x.json or
            x.metadata.json; model.type is a field in a field, tags.0 the first of several
  csv       a table --labels with columns file,label; each further column becomes a column. `file` is the path
            below FOLDER, preceded by FOLDER's name where there are several
Default: csv if --labels is given; else metadata if any file has a metadata.json beside it; else folder.

Exit status: 0 the data set is written; 2 bad input; 3 another process builds it.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import _root  # noqa: F401

from ablation.making.build import BuildRequest, run_build
from ablation.making.plan import SHARD_BYTES, BuildOptions


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments. Returns the exit status."""
    arguments = parse_command_line(argv)
    return run_build(
        BuildRequest(
            folders=arguments.folders,
            output=Path(os.path.normpath(arguments.output)),
            label_from=arguments.label_from,
            labels=arguments.labels,
            label_field=arguments.label_field,
            header_columns=tuple(arguments.header_columns),
            overwrite=arguments.overwrite,
            options=BuildOptions(
                pattern=arguments.pattern,
                alpha=arguments.alpha,
                rank=arguments.rank,
                leave_out=arguments.leave_out,
                split_qkv=arguments.split_qkv,
                pickles=arguments.pickles,
                on_bad=arguments.on_bad,
                shard_rows=arguments.shard_rows,
            ),
        )
    )


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked; a bad one ends the program with status 2. More than 50 lines of flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="searched with all its subfolders and links")
    add("--output", type=Path, required=True, metavar="PATH", help="folder to write")
    kinds = ("folder", "metadata", "civitai", "csv")
    add("--label-from", choices=kinds, help="where classes come from (default: see above)")
    add("--labels", type=Path, metavar="FILE.csv", help="the table for --label-from csv")
    text = "field that every file must have (default: category_label of metadata.json, baseModel of Civitai)"
    add("--label-field", default="", metavar="NAME", help=text)
    text = (
        "columns from the header of each file, as kohya's scripts write it: ss_network_dim, ss_steps, ...; "
        "all: those that the builder knows"
    )
    add("--header-columns", nargs="+", default=(), metavar="NAME", help=text)
    text = (
        "alpha / rank: multiply `up` with it, so that up @ down is the change to the model; or write it into "
        "the column lora_scale, a number a module in the order of build.json's modules; or neither (default: "
        "apply)"
    )
    add("--alpha", choices=("apply", "record", "ignore"), default="apply", help=text)
    text = (
        "R: keep the files whose every module has this rank; pad: fill up with zeros to the largest rank; "
        "svd:R: the best approximation of up @ down of rank R, its error in the column rank_error (default: "
        "a mix is refused)"
    )
    add("--rank", default="", metavar="R|pad|svd:R", help=text)
    text = "split Flux's and SD 3's fused query, key and value, and name modules as diffusers does"
    add("--split-qkv", action="store_true", help=text)
    text = "read .bin, .pt, .pth, .ckpt, .pkl too, tensors alone and no code (default: refuse)"
    add("--pickles", choices=("refuse", "read"), default="refuse", help=text)
    text = "names of the files to look at (default: *.safetensors, and pickles to refuse)"
    add("--pattern", default="", metavar="GLOB", help=text)
    text = "ignore tensors in whose name, as in the file, this is found: '^lora_te_'"
    add("--leave-out", default="", metavar="REGEX", help=text)
    text = "what a file that cannot become a row does (default: error)"
    add("--on-bad", choices=("error", "skip"), default="error", help=text)
    text = f"rows a shard (default: {SHARD_BYTES // 10**6} MB of weights)"
    add("--shard-rows", type=int, metavar="N", help=text)
    add("--overwrite", action="store_true", help="replace a data set that this program built")
    arguments = parser.parse_args(argv)
    if arguments.shard_rows is not None and arguments.shard_rows < 1:
        parser.error("--shard-rows is at least 1")
    if not re.fullmatch(r"|pad|(svd:)?[1-9]\d{0,5}", arguments.rank):
        parser.error(f"--rank {arguments.rank}: use a whole number from 1 on, pad, or svd: and a number")
    try:
        re.compile(arguments.leave_out)
    except re.error as error:
        parser.error(f"--leave-out {arguments.leave_out} is no regular expression: {error}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
