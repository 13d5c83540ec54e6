"""Learning curves as TensorBoard's event files, for --tensorboard."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ablation.cells import Cell
from ablation.fields import InputError

CURVES = ("val_acc", "train_loss", "learning_rate")


def check_installed() -> None:
    """Raise InputError if tensorboard is not installed: better now than after hours."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the flag out"
        ) from None


def log_curves(folder: Path, records: dict[Cell, dict]) -> None:
    """Validation accuracy, training loss and learning rate by epoch,
    in a folder for each run of each cell.
    """
    from torch.utils.tensorboard import SummaryWriter

    for cell, record in records.items():
        for number, curve in enumerate(record["learning_curves"], 1):
            run_folder = folder / "tensorboard" / cell.name / f"run_{number}"
            with contextlib.closing(SummaryWriter(str(run_folder))) as writer:
                for name in CURVES:
                    for epoch, value in enumerate(curve[f"{name}_history"], 1):
                        writer.add_scalar(name, value, epoch)
