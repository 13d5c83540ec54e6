#!/usr/bin/env python3
"""The dashboard of eight panels, PNG and PDF, from a run's folder or its metrics.parquet."""

import argparse
import contextlib
import sys
from pathlib import Path

import polars as pl
from sae_analysis import InputError
from sae_analysis.dashboard import draw, layers_of
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
    if not layers or "domain" not in table.columns:
        raise InputError(
            f"{file} has no columns l<layer>_fact_l0_norm and domain: give a table of experiment 6"
        )
    manifest: dict = {}
    with contextlib.suppress(
        InputError
    ):  # a table of another program: the title says that its model is unknown
        manifest = read_manifest(file.parent)
    comparison = compare(table, tuple(layers))
    print("\n".join([*as_text(comparison), *([manifest["warning"]] if "warning" in manifest else [])]))
    return draw(table, comparison, output or file.parent / "figures", manifest)


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
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
