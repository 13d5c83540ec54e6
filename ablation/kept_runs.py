"""Finished runs of a cell that is not finished: kept on disk, so that a kill loses only the runs at work."""

from __future__ import annotations

import logging

import numpy as np

from ablation.task import Run
from checkpointing import CannotWrite, Unfinished

log = logging.getLogger("visual_ablation")

PREDICTED = "predicted_"  # before the name of some rows, in the file of a run


def keep_run(kept: Unfinished | None, number: int, run: Run, trained_dim: int) -> None:
    """Keep a finished run under its number in the cell."""
    keep(kept, f"run{number}", {**run_arrays(run), "trained_dim": np.array(trained_dim)})


def keep(kept: Unfinished | None, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep a part of a cell. A disk that does not take it is logged: the cell's own files may still fit."""
    try:
        if kept is not None:
            kept.save(name, arrays)
    except CannotWrite as error:
        log.warning(f"a kill would lose more of this cell: {error}")


def kept_runs(kept: Unfinished | None, numbers: list[int]) -> dict[int, tuple[Run, int]]:
    """The runs that are kept, by number, each with the number of its trained columns."""
    if kept is None:
        return {}
    stored = {}
    for number in numbers:
        arrays = kept.load(f"run{number}")
        if arrays is not None:
            stored[number] = run_of(arrays), int(arrays["trained_dim"])
    if stored:
        log.info(f"{len(stored)} of its {len(numbers)} runs were finished by an earlier command")
    return stored


def run_arrays(run: Run) -> dict[str, np.ndarray]:
    """A run as arrays."""
    predictions = {f"{PREDICTED}{rows}": classes for rows, classes in run.predictions.items()}
    curves = {name: np.array(getattr(run, name)) for name in ("train_loss", "val_accuracy", "learning_rate")}
    numbers = {name: np.array(getattr(run, name)) for name in ("seed", "best_epoch", "seconds", "fold")}
    return {**predictions, **curves, **numbers}


def run_of(arrays: dict[str, np.ndarray]) -> Run:
    """The run that `run_arrays` made arrays of."""
    return Run(
        seed=int(arrays["seed"]),
        best_epoch=int(arrays["best_epoch"]),
        train_loss=arrays["train_loss"].tolist(),
        val_accuracy=arrays["val_accuracy"].tolist(),
        learning_rate=arrays["learning_rate"].tolist(),
        predictions={
            name.removeprefix(PREDICTED): classes
            for name, classes in arrays.items()
            if name.startswith(PREDICTED)
        },
        seconds=float(arrays["seconds"]),
        fold=int(arrays["fold"]),
    )
