#!/usr/bin/env python3
"""Measure how time, memory and disk grow with the number of rows, under a limit of memory.

Runs the experiment on data sets of several sizes, cold, and prints what each stage takes beside what the line
through the two next smaller sizes predicts.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import _root

from ablation.benchmark.scale import ScaleRun, run_measured, scale_table


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments. Returns the exit status."""
    typed = sys.argv[1:] if argv is None else argv
    place = typed.index("--") if "--" in typed else len(typed)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="After -- come flags of the experiment, such as -- --num-runs 1 --max-epochs 2",
    )
    parser.add_argument(
        "datasets", nargs="+", type=Path, help="data sets of different sizes; a line needs two"
    )
    parser.add_argument("--limit-gb", type=float, default=0, help="of memory (control group; needs root)")
    parser.add_argument("--predict", nargs="*", type=int, default=[1_000_000], help="further numbers of rows")
    parser.add_argument("--work", type=Path, help="folder for caches and results (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file that gets the figures; those in it are shown too")
    arguments = parser.parse_args(typed[:place])
    program, flags = _root.ROOT / "visual_ablation_experiment.py", typed[place + 1 :]
    kept = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    found = [ScaleRun(**one) for one in kept]
    for data in arguments.datasets:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            limit = int(arguments.limit_gb * 2**30)
            found.append(run_measured(program, data.resolve(), Path(work), limit, flags))
        print(f"{data}: {dataclasses.asdict(found[-1])}", flush=True)
    print(scale_table(sorted(found, key=lambda one: one.rows), arguments.predict))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
