"""Flags that are no settings: they change what is done or shown, and no number."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ablation.fields import InputError


@dataclass(frozen=True)
class Actions:
    """What a command does beside its settings."""

    rerun_stale: bool = False
    dry_run: bool = False
    status: bool = False
    watch: bool = False
    report: bool = True
    tensorboard: bool = False
    cells: tuple[str, ...] = ()  # names, or a share such as 2/8; (): all
    features_only: bool = False
    rows: str = ""  # with features_only: a:b, or a share
    results_only: bool = False
    devices: tuple[str, ...] = ()  # one process each
    ray: str = ""  # the address of a cluster
    workers: int = 0  # of a plan on paper
    argv: tuple[str, ...] = ()  # as typed
    default_sets: bool = False  # --layer-sets is the default: a set without a layer is left out

    @property
    def has_workers(self) -> bool:
        """True if other processes run the cells."""
        return bool(self.devices or self.ray)

    @property
    def is_unit(self) -> bool:
        """True for a part of an experiment, which does not hold the output folder."""
        return bool(self.cells or self.features_only or self.results_only)


def refuse_contradictions(actions: Actions) -> None:
    """Raise InputError for flags that do not go together."""
    if actions.watch and not actions.status:
        raise InputError("--watch goes with --status")
    if actions.rows and not actions.features_only:
        raise InputError("--rows goes with --features-only")
    parts = {
        "--cells": actions.cells,
        "--features-only": actions.features_only,
        "--results-only": actions.results_only,
        "--devices": actions.devices,
        "--ray": actions.ray,
    }
    given = [name for name, value in parts.items() if value]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} do not go together: give one")
    is_planned = actions.dry_run and given in (["--devices"], ["--ray"])
    if given and (actions.status or (actions.dry_run and not is_planned)):
        raise InputError(f"{given[0]} does not go with {'--status' if actions.status else '--dry-run'}")
    if given and actions.tensorboard:
        raise InputError(f"--tensorboard does not go with {given[0]}: its curves are written by one process")
    if actions.workers and not actions.dry_run:
        raise InputError("--workers goes with --dry-run: --devices and --ray start processes")
    if not 0 <= actions.workers <= 100_000:
        raise InputError(f"--workers {actions.workers} is out of range: use 1 to 100,000")


def add_file_actions(section: argparse._ArgumentGroup) -> None:
    """Flags about files that are written beside the results."""
    section.add_argument(
        "--rerun-stale",
        action="store_true",
        help="set finished cells made with other settings aside and run them again",
    )
    section.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="report.html, figures/ and tables/ beside the results",
    )
    section.add_argument(
        "--tensorboard",
        action="store_true",
        help="learning curves as TensorBoard's event files too, in tensorboard/",
    )


def add_parts(section: argparse._ArgumentGroup) -> None:
    """Flags of an experiment that several processes share."""
    section.add_argument(
        "--cells",
        nargs="+",
        default=(),
        metavar="NAME",
        help="run these cells alone, such as all_layers_stats,visual_only_stats; or a share of all cells: "
        "2/8 is the second of eight",
    )
    section.add_argument(
        "--features-only",
        action="store_true",
        help="make all features but those fitted to training rows, leave them in the cache, train nothing",
    )
    section.add_argument(
        "--rows",
        default="",
        metavar="A:B",
        help="with --features-only: of the rows A to B-1, on the grid of blocks; or a share, such as 2/8",
    )
    section.add_argument(
        "--results-only",
        action="store_true",
        help="train nothing; write the results and the report of the cells that are finished",
    )


def add_workers(section: argparse._ArgumentGroup) -> None:
    """Flags that start other processes for the cells."""
    section.add_argument(
        "--devices",
        nargs="+",
        default=(),
        metavar="DEVICE",
        help="a process for each of these, such as cuda:0 cuda:1, or cpu cpu",
    )
    section.add_argument(
        "--ray",
        default="",
        metavar="ADDRESS",
        help="cells and rows as tasks of a Ray cluster: local starts one, auto finds one, or its address",
    )


def add_questions(section: argparse._ArgumentGroup) -> None:
    """Flags that answer a question and end."""
    section.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would run and why, and the memory and disk it needs; run nothing",
    )
    section.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="with --dry-run: how N processes would share the cells",
    )
    section.add_argument(
        "--status",
        action="store_true",
        help="say what is finished, from the output folder's files alone; run nothing",
    )
    section.add_argument(
        "--watch",
        action="store_true",
        help="with --status: again and again until all is finished, with rate and ETA",
    )
