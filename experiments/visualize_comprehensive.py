#!/usr/bin/env python3
"""The dashboard of eight panels, PNG and PDF, from a run's folder or its metrics.parquet."""

import argparse
import contextlib
import sys
from pathlib import Path

import polars as pl
from sae_analysis import InputError
from sae_analysis.dashboard import draw, layers_of
from sae_analysis.rows import columns, measures
from sae_analysis.runs import TABLE, read_manifest
from sae_analysis.summary import as_text, compare


def visualise(run: Path, output: Path | None) -> list[Path]:
    """Draw the dashboard of a run, print its summary, and return the figures' paths. Raises InputError."""
    file = run / TABLE if run.is_dir() else run
    try:
        table = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read {file} ({reason}): give the folder of a finished run") from None
    layers = layers_of(table)
    check(table, layers, file)
    manifest: dict = {}
    # A table of another program has no manifest of ours: the title says that its model is unknown.
    with contextlib.suppress(InputError):
        manifest = read_manifest(file.parent)
    comparison = compare(table, tuple(layers))
    print("\n".join([*as_text(comparison), *([manifest["warning"]] if "warning" in manifest else [])]))
    return draw(table, comparison, output or file.parent / "figures", manifest)


def check(table: pl.DataFrame, layers: list[int], file: Path) -> None:
    """Raise InputError for a table that is not of experiment 6; the original's lacks residual_consistency."""
    needed = [name for name in columns(tuple(layers)) if not name.startswith("residual_consistency")]
    missing = [name for name in needed if name not in table.columns]
    if not layers or missing:
        name = missing[0] if layers else "l<layer>_fact_l0_norm"
        raise InputError(f"{file} has no column {name}: give a table of experiment 6")
    numbers = [
        name for pair in measures(tuple(layers)).values() for name in pair[:2] if name in table.columns
    ]
    for name in numbers:
        if not table[name].dtype.is_numeric() or not table[name].cast(pl.Float64).is_finite().all(
            ignore_nulls=False
        ):
            raise InputError(f"{file}: column {name} does not hold a number in every row")
    if table.is_empty():
        raise InputError(f"{file} has no rows")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or a metrics.parquet")
    parser.add_argument(
        "--output", type=Path, help="folder of the figures (default: figures/ beside the table)"
    )
    values = parser.parse_args(argv)
    try:
        for path in visualise(values.run, values.output):
            print(path)
        return 0
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
