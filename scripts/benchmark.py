#!/usr/bin/env python3
"""Time each stage of the experiment beside the origin's way
of doing it and beside what the machine can do at best.

    read       every layer's weights into memory of our own; the origin: through the torch formatter after a
               split; the limit: a plain copy of the same bytes
    features   nine representations of every layer, then six of every product, reading included; the origin:
               the formatter's tensors, and each representation on its own with torch.quantile, fft2, svdvals
               and histogram; the limit: the copy again, and one sort, FFT and float64 sum
    train      runs of the 18 cells; the origin: one model after another from a DataLoader with torch's plain
               Adam and all cores, on all columns; the limit: the matrix products at the rate that the command
               measures for large ones

Times are medians of interleaved runs: ours, the origin's, the limit's, and again. The origin's are measured
on a part (some layers, one run) and scaled to the whole. `--batch-sizes` and `--precisions` compare settings
of training instead, `--utilisation` says how busy the cores are while the program trains.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import _root
import torch

from ablation.benchmark.batch_and_precision import (
    PRECISION_HEAD,
    batch_table,
    compare_batch_sizes,
    compare_precisions,
    joint_claim,
    precision_line,
)
from ablation.benchmark.stages import PRECISIONS, STAGES, StageOptions, stage_table
from ablation.benchmark.timing import gemm_rate, machine_text
from ablation.benchmark.utilisation import measure_utilisation, utilisation_table
from ablation.catalogue import SPECS
from ablation.collection import LoraCollection, collect_rows
from ablation.command_line import find_device
from ablation.fields import InputError
from ablation.settings import TrainingSettings
from ablation.sources import open_dataset
from visual_ablation_experiment import main as run_program


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments. Returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in ("rows", "rank", "repeats", "runs", "epochs", "origin_layers", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if min(arguments.seeds, arguments.batch_size, *(arguments.batch_sizes or [2])) < 2:
        parser.error("--seeds, --batch-size and --batch-sizes are at least 2")
    try:
        device = find_device(arguments.device)
        with tempfile.TemporaryDirectory() as folder:
            name = arguments.dataset or make_synthetic(f"{folder}/loras", arguments)
            if arguments.utilisation:
                report = measure_utilisation(run_program, name, arguments.runs, Path(folder))
                print(json.dumps(report, indent=2) if arguments.json else utilisation_table(report))
            else:
                measure(collect_rows(open_dataset(name), name, device), arguments)
    except InputError as error:
        parser.error(str(error))
    return 0


def make_synthetic(folder: str, arguments: argparse.Namespace) -> str:
    """Write the synthetic collection that is measured; returns its folder."""
    command = [sys.executable, str(_root.ROOT / "scripts" / "make_synthetic_dataset.py"), folder]
    options = ["--layout", arguments.layout, "--rows", str(arguments.rows), "--rank", str(arguments.rank)]
    subprocess.run(command + options, check=True, stdout=subprocess.DEVNULL)
    return folder


def measure(data: LoraCollection, arguments: argparse.Namespace) -> None:
    """Measure what the arguments ask for, and print it."""
    device = data.weights.device
    rates = {precision: gemm_rate(getattr(torch, precision), device) for precision in PRECISIONS}
    report = {
        "machine": machine_text(device, rates),
        "rates": rates,
        "rows": data.num_rows,
        "weights_per_row": data.layers.weights_per_row,
    }
    if arguments.batch_sizes:
        settings = TrainingSettings(num_runs=arguments.runs, precision=arguments.precision)
        rows = compare_batch_sizes(data, arguments.representations, arguments.batch_sizes, settings)
        report["batch_sizes"], text = rows, batch_table(rows)
    elif arguments.precisions:
        rows = compare_precisions(data, arguments.representations, arguments.seeds)
        lines = [PRECISION_HEAD, *map(precision_line, rows), "", joint_claim(rows)]
        report["precisions"], text = rows, "\n".join(lines)
    else:
        options = StageOptions(
            arguments.repeats, arguments.origin_layers, arguments.runs, arguments.epochs, arguments.batch_size
        )
        names = list(STAGES) if arguments.stage == "all" else [arguments.stage]
        timed = [row for name in names for row in STAGES[name](data, options)]
        report["stages"], text = [row.summary() for row in timed], stage_table(timed)
    if arguments.json:
        print(json.dumps(report, indent=2), flush=True)
    else:
        print(f"{report['machine']}\n{data.num_rows} rows\n\n{text}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=1000, help="of the synthetic collection (published topology, 128 layers)")
    add("--rank", type=int, default=1, help="of the synthetic collection")
    layouts = ("nested", "array2d", "fixed")
    add("--layout", choices=layouts, default="nested", help="of the synthetic collection")
    add("--dataset", help="measure on this data set instead of a synthetic one")
    add("--stage", choices=(*STAGES, "all"), default="all", help="which stage to time")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--repeats", type=int, default=3, help="of each measurement, interleaved")
    add("--runs", type=int, default=10, help="of each cell")
    add("--epochs", type=int, default=5, help="of each run in the stage train")
    add("--batch-size", type=int, default=64, help="of the stage train")
    add("--origin-layers", type=int, default=4, help="layers that the origin's way is measured on")
    text = "whole runs at each of these, instead of the stages"
    add("--batch-sizes", type=int, nargs="+", metavar="N", help=text)
    text = "of all layers, for --batch-sizes and --precisions"
    names = tuple(SPECS)
    add("--representations", choices=names, nargs="+", default=["ensemble"], metavar="NAME", help=text)
    precisions = ("float32", "tf32", "bfloat16")
    add("--precision", choices=precisions, default="float32", help="for --batch-sizes")
    text = "bfloat16's accuracies against float32's, instead of the stages"
    add("--precisions", action="store_true", help=text)
    add("--seeds", type=int, default=80, help="runs of each precision for --precisions")
    text = "how busy the cores are while the program trains on a CPU, instead of the stages"
    add("--utilisation", action="store_true", help=text)
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
