"""What the two trainers share: the MLP, its random streams, Adam, the learning rate, the record of a run.

Suffixes name the axes: R runs, B rows of a batch, N rows, D features, H hidden units, C classes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ablation.settings import TrainingSettings
from ablation.streamed import Matrix, rows_on
from ablation.task import Run, TrainingError

HIDDEN_LAYERS = 3
LR_FACTOR, LR_PATIENCE = 0.5, 10  # of ReduceLROnPlateau on validation accuracy
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
EVAL_ROWS = 4096  # rows in one forward pass without gradients
DRAWING = threading.Lock()  # of the process's random generator
DROPOUT_STEPS = 8  # steps whose dropout is drawn at once


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task as the trainers take it: standardised columns,
    class numbers on the device, and the rows of each part.

    `x_ND` may lie on the host, or be streamed; rows after the labels' N are the task's extra rows.
    """

    x_ND: Matrix
    y_N: Tensor
    parts: dict[str, Tensor]
    num_classes: int
    weights_C: Tensor | None = None  # of a row in the loss, by its class; None: alike

    @property
    def device(self) -> torch.device:
        """Where models are trained."""
        return self.y_N.device

    @cached_property
    def train(self) -> tuple[Matrix, Tensor]:
        """Columns (n, D), where `x_ND` lies, and class numbers (n,), on the device, of the training rows.
        One copy for all runs.
        """
        return self.rows_of("train")

    @cached_property
    def val(self) -> tuple[Matrix, Tensor]:
        """The same of the validation rows."""
        return self.rows_of("val")

    def rows_of(self, part: str) -> tuple[Matrix, Tensor]:
        """A copy of the columns and class numbers of a part."""
        rows = self.parts[part]
        return self.x_ND[rows], rows_on(self.y_N, rows, self.device)

    def predict(self, classes_of: Callable[[Matrix], Tensor]) -> dict[str, np.ndarray]:
        """Predictions (..., n) of every part,
        where `classes_of` maps columns (n, D) to class numbers (..., n).

        The N rows and the extra rows are predicted apart, so that extra rows do not change the rounding of
        the others.
        """
        N = len(self.y_N)
        sections = [x for x in (self.x_ND[:N], self.x_ND[N:]) if len(x)]
        classes = torch.cat([classes_of(x) for x in sections], dim=-1).cpu()
        return {part: classes[..., rows.cpu()].numpy() for part, rows in self.parts.items()}


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set how float32 matrix products are computed: exactly, or in tf32 on a GPU.
    (bfloat16 is left to `autocast`.)
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- random streams


def stream_seed(seed: int, stream: str) -> int:
    """A different seed for each random stream of a run:
    batch order and dropout must not repeat the same numbers.
    """
    return int(np.random.SeedSequence([seed, *stream.encode()]).generate_state(1)[0])


def batch_order(seed: int) -> torch.Generator:
    """The generator of a run's permutations of the training rows, one permutation an epoch."""
    return torch.Generator().manual_seed(stream_seed(seed, "batches"))


def batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """The epoch's batches along the last axis.
    A last batch of one row is left out, because BatchNorm cannot use it.
    """
    parts = order.split(batch_size, dim=-1)
    return list(parts if parts[-1].shape[-1] > 1 else parts[:-1])


def dropout_factors(
    seed: int, batch_size: int, settings: TrainingSettings, like: Tensor, steps: int = 0
) -> Iterator[Tensor]:
    """Endless dropout factors of a run, (L, B, H) for each step after the first `steps`,
    L hidden layers: 0 for a dropped unit, else 1/(1-p).

    They have the device and dtype of `like`. On a CPU each unit takes 32 bits of PCG64, which is exact to
    1e-10 and twelve times faster than torch's Bernoulli numbers.
    """
    shape, keep = (DROPOUT_STEPS, HIDDEN_LAYERS, batch_size, settings.hidden_dim), 1 - settings.dropout
    blocks, rest = divmod(steps, DROPOUT_STEPS)

    def drawn_by_pcg() -> Iterator[Tensor]:
        bits = np.random.PCG64(stream_seed(seed, "dropout"))
        words = -(-math.prod(shape) // 2)  # of 64 bits
        bits.advance(blocks * words)
        while True:
            kept = bits.random_raw(words).view(np.uint32)[: math.prod(shape)] < round(keep * 2**32)
            factor = torch.tensor(1 / keep, dtype=like.dtype).numpy()
            yield from torch.from_numpy(np.multiply(kept, factor)).view(shape)  # by NumPy: seven times faster

    def drawn_by_torch() -> Iterator[Tensor]:
        generator = torch.Generator(like.device).manual_seed(stream_seed(seed, "dropout"))
        for number in itertools.count():
            kept = torch.empty(shape, dtype=like.dtype, device=like.device)
            kept.bernoulli_(keep, generator=generator)
            if number >= blocks:
                yield from kept.mul_(1 / keep)

    drawn = drawn_by_pcg() if like.device.type == "cpu" else drawn_by_torch()
    return itertools.islice(drawn, rest, None)


# --- the model


class Dropout(nn.Module):
    """Multiplies by factors that are handed to it,
    so that they come from the run's own stream; without factors, by 1.
    """

    def __init__(self):
        super().__init__()
        self.factors: Tensor | None = None  # (B, H): 0 or 1/(1-p)

    def forward(self, h_BH: Tensor) -> Tensor:
        """Multiply hidden units (B, H)."""
        return h_BH if self.factors is None else h_BH * self.factors


def build_model(seed: int, inputs: int, num_classes: int, settings: TrainingSettings) -> nn.Sequential:
    """The MLP on the CPU, with torch's default initial weights drawn from `seed` alone.

    torch's own layers draw from one generator of the process, so one model at a time is built.
    """
    with DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(HIDDEN_LAYERS):
            layers += [
                nn.Linear(inputs, settings.hidden_dim),
                nn.BatchNorm1d(settings.hidden_dim),
                nn.ReLU(),
                Dropout(),
            ]
            inputs = settings.hidden_dim
        return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Products in bfloat16 inside this context, if that is the precision."""
    return (
        torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    )


# --- the optimizer


class RateHolder(torch.optim.Optimizer):
    """A learning rate for a scheduler to change. The constructors of torch's optimizers import its compiler,
    which takes two seconds.
    """

    def __init__(self, rate: float):
        self.param_groups = [{"lr": rate}]


def new_scheduler(settings: TrainingSettings) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Torch's plateau rule for one run. `learning_rate_of` reads the present learning rate."""
    return plateau(RateHolder(settings.learning_rate))


def learning_rate_of(scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau) -> float:
    """The present learning rate."""
    return scheduler.optimizer.param_groups[0]["lr"]


def plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Halve the learning rate when validation accuracy has not risen for LR_PATIENCE epochs."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=LR_FACTOR, patience=LR_PATIENCE
    )


class AdamState(NamedTuple):
    """Adam's moments and step counts, one entry for each parameter."""

    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]

    @classmethod
    def before(cls, parameters: list[Tensor], runs: tuple[int, ...] = ()) -> AdamState:
        """The state before the first step, of single parameters or,
        with `runs` = (R,), of parameters (R, ...).
        """
        first, second = ([torch.zeros_like(p, requires_grad=False) for p in parameters] for _ in range(2))
        return cls(first, second, [torch.zeros(runs, device=p.device) for p in parameters])


@torch.no_grad()
def adam_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamState,
    rate: float | Tensor,
    settings: TrainingSettings,
) -> None:
    """One step of torch's Adam with L2 weight decay in the gradient, at the learning rate `rate`.

    It calls torch's function, because the optimizer class takes as long again for its own bookkeeping.
    """
    # The fused kernel assumes that gradients have the parameters' order of memory.
    gradients = [gradient.contiguous() for gradient in gradients]
    adam(
        list(parameters),
        list(gradients),
        state.first,
        state.second,
        [],
        state.steps,
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=rate,
        weight_decay=settings.weight_decay,
        eps=ADAM_EPS,
        maximize=False,
    )


# --- the record of a run


def record_epoch(run: Run, loss: float, correct: int, num_val: int, learning_rate: float) -> bool:
    """Add an epoch to a run. Returns True if it is the best so far;
    of equally good epochs the earliest is the best.

    Raises TrainingError for a loss that is not finite.
    """
    accuracy = correct / num_val
    is_best = not run.val_accuracy or accuracy > run.val_accuracy[run.best_epoch - 1]
    run.train_loss.append(loss)
    run.val_accuracy.append(accuracy)
    run.learning_rate.append(learning_rate)
    epoch = len(run.train_loss)
    if not np.isfinite(loss):
        raise TrainingError(
            f"run with seed {run.seed}: the loss is {loss} in epoch {epoch}; try a lower --learning-rate"
        )
    if is_best:
        run.best_epoch = epoch
    return is_best


def has_stopped(run: Run, settings: TrainingSettings) -> bool:
    """True after `max_epochs`, or `patience` epochs without a new best one."""
    epoch = len(run.train_loss)
    return epoch >= settings.max_epochs or epoch - run.best_epoch >= settings.patience
