"""Features and labels -> trained runs: standardise the columns, then train R runs of the MLP.

There are two trainers with the same arithmetic. The sequential one, here, is the reference: each run is an
nn.Sequential with torch's Adam and ReduceLROnPlateau, and on a CPU each core trains one run. The packed one
(`packed.py`) takes each step for all runs at once. They agree to rounding: initial weights, batch order and,
on one device, dropout of a run are bit-equal whatever the trainer and R.

Suffixes name the axes: R runs, B rows of a batch, N rows, D features, H hidden units, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablation.catalogue import PARTS
from ablation.cpu_step import CpuStep
from ablation.fields import InputError
from ablation.mlp import (
    EVAL_ROWS,
    AdamState,
    Dropout,
    Prepared,
    adam_step,
    arithmetic,
    autocast,
    batch_order,
    batches,
    build_model,
    dropout_factors,
    has_stopped,
    learning_rate_of,
    new_scheduler,
    record_epoch,
)
from ablation.packed import train_packed
from ablation.planned_runs import PlannedRun, PlannedRuns, Train
from ablation.settings import TrainingSettings
from ablation.streamed import COLUMN_BLOCK, Matrix, column_blocks, joined, minibatches, some, stream
from ablation.task import Listener, Run, Task, TrainedRuns, TrainingError
from ablation.work_pool import Pool
from checkpointing import Unfinished

log = logging.getLogger("visual_ablation")

COPIES = 4  # of the features that must fit on a GPU: as they come, standardised, the training rows, all else


def resolve_training(settings: TrainingSettings, device: str) -> TrainingSettings:
    """Replace the trainer `auto`: packed on a GPU, where a step is bound by launches; sequential on a CPU.

    Raises InputError for tf32 on a CPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if settings.precision == "tf32" and not on_gpu:
        raise InputError("--precision tf32 needs a CUDA GPU: use float32 or bfloat16 on a CPU")
    trainer = settings.trainer if settings.trainer != "auto" else ("packed" if on_gpu else "sequential")
    return dataclasses.replace(settings, trainer=trainer)


def train_runs(
    task: Task,
    settings: TrainingSettings,
    device: str = "cpu",
    listener: Listener | None = None,
    kept: Unfinished | None = None,
) -> TrainedRuns:
    """Train one MLP for each seed, and predict every row of the split and every extra row.

    `kept` has what an earlier command trained of these runs, and gets what this one trains.
    Raises TrainingError if no column varies over the training rows, if there is only one training row, or if
    a loss is not finite.
    """
    prepared = prepare(task, device)
    trainer = {"sequential": train_sequential, "packed": train_packed}[settings.trainer]
    with arithmetic(settings.precision):
        runs = trainer(prepared, settings, listener or Listener(), kept)
    return TrainedRuns(runs, prepared.x_ND.shape[1])


def prepare(task: Task, device: str) -> Prepared:
    """The task's columns standardised, its rows by part, its labels on the device."""
    if len(task.split.train) < 2:
        raise TrainingError("one training row: BatchNorm needs at least two")
    features = joined([task.features, *task.extra.values()])
    home = home_of(features, device)
    parts = {part: torch.from_numpy(task.split.rows(part)).to(home) for part in PARTS}
    rows = len(task.labels)
    for name, extra in task.extra.items():
        parts[name] = torch.arange(rows, rows + len(extra), device=home)
        rows += len(extra)
    x_ND = standardise(
        features.to(home) if isinstance(features, Tensor) else features, parts["train"], device
    )
    weights = task.class_weights
    weights_C = None if weights is None else torch.from_numpy(weights).to(device, x_ND.dtype)
    return Prepared(x_ND, torch.from_numpy(task.labels).to(device), parts, task.num_classes, weights_C)


def home_of(features: Matrix, device: str) -> str:
    """Where features lie while they are trained on:
    the device, or the host if they are streamed or if a GPU has no room for their copies.
    """
    if not isinstance(features, Tensor):
        return "cpu"
    if torch.device(device).type != "cuda":
        return device
    size, (free, _) = features.numel() * features.element_size(), torch.cuda.mem_get_info(device)
    # Kept by torch for new tensors.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if size * COPIES <= free:
        return device
    log.info(
        f"The features ({size / 1e9:.1f} GB) stay in the host's memory: {device} has {free / 1e9:.1f} GB free"
    )
    return "cpu"


def standardise(x_ND: Matrix, train_rows: Tensor, device: str = "cpu") -> Matrix:
    """The columns that vary over the training rows,
    less those rows' mean, over their population std; in float64.

    A constant column (max == min) carries nothing, but its weights would still take Adam's absolute steps.
    Streamed rows stay so; the device computes their statistics, so that the numbers are those of a tensor.
    Raises TrainingError if every column is constant.
    """
    home, positions, means, stds, first = x_ND.device, [], [], [], 0
    for block in column_blocks(x_ND, train_rows):
        x_train = block.to(home if isinstance(x_ND, Tensor) else device)
        low, high = x_train.aminmax(dim=0)
        varying = (high > low).nonzero()[:, 0]
        if len(varying):
            std, mean = torch.std_mean(x_train[:, varying].double(), dim=0, correction=0)
            positions.append((varying + first).to(home))
            means.append(mean.to(home))
            stds.append(std.to(home))
        first += block.shape[1]
    if not positions:
        raise TrainingError("no column varies over the training rows: there is nothing to learn from")
    columns, mean, std = map(torch.cat, (positions, means, stds))
    if not isinstance(x_ND, Tensor):
        source = x_ND

        def make(rows: Tensor, start: int, stop: int) -> Tensor:
            own = columns[start:stop]
            first, last = int(own[0]), int(own[-1])
            x = some(source, rows, first, last + 1)[:, own - first]
            return ((x.double() - mean[start:stop]) / std[start:stop]).to(source.dtype)

        return stream(make, len(source), len(columns), source.dtype)
    out_ND = torch.empty(len(x_ND), len(columns), dtype=x_ND.dtype, device=home)
    for block in torch.arange(len(columns), device=home).split(COLUMN_BLOCK):
        out_ND[:, block] = ((x_ND[:, columns[block]].double() - mean[block]) / std[block]).to(x_ND.dtype)
    return out_ND


# --- one model a run


class Watch(NamedTuple):
    """The event that ends a run in a thread, and the listener that is told of its epochs."""

    stop: threading.Event
    listener: Listener


def train_sequential(
    data: Prepared, settings: TrainingSettings, listener: Listener, kept: Unfinished | None = None
) -> list[Run]:
    """Train run after run. On a CPU each core trains one,
    because small products gain little from a second core.
    """
    on_cpu = data.device.type == "cpu"
    runs = PlannedRuns(runs_of_seeds(lambda: data, settings, listener), listener.on_run, kept, not on_cpu)
    runs.may_fork = may_fork(settings)
    # As many threads for the last runs as for all, so that rounding does not depend on how many are missing.
    pool: Pool[PlannedRuns] = Pool(min(torch.get_num_threads(), settings.num_runs))
    with pool:
        list(pool.finished([runs]))
    return runs.trained().runs


def train_alone(task: Task, settings: TrainingSettings, device: str, watch: Watch) -> TrainedRuns:
    """Train the only run of some settings in this thread."""
    data = prepare(task, device)
    with arithmetic(settings.precision):
        if settings.trainer == "packed":
            runs = train_packed(data, settings, watch.listener)
        else:
            runs = [train_one(data, settings, settings.seed, watch)]
    return TrainedRuns(runs, data.x_ND.shape[1])


def runs_of_seeds(
    prepared: Callable[[], Prepared], settings: TrainingSettings, listener: Listener
) -> list[PlannedRun]:
    """A run for each seed, on a task that is prepared when the first one begins."""

    def begin(seed: int) -> Train:
        data = prepared()
        _ = data.train, data.val  # here, so that forks share them

        def train(stop: threading.Event) -> TrainedRuns:
            with arithmetic(settings.precision):
                run = train_one(data, settings, seed, Watch(stop, listener))
            return TrainedRuns([run], data.x_ND.shape[1])

        return train

    return [PlannedRun(seed, functools.partial(begin, seed)) for seed in settings.seeds]


def train_one(data: Prepared, settings: TrainingSettings, seed: int, watch: Watch) -> Run:
    """Train and score one run. Ends with a TrainingError within a step once `watch.stop` is set."""
    start = time.perf_counter()
    model = build_model(seed, data.x_ND.shape[1], data.num_classes, settings)
    model = model.to(data.device, data.x_ND.dtype)
    step = step_of(model, data, settings)
    scheduler = new_scheduler(settings)
    order, run, best = batch_order(seed), Run(seed), {}
    (x_train, y_train), (x_val, y_val) = data.train, data.val
    batch_size = min(settings.batch_size, len(x_train))
    factors = dropout_factors(seed, batch_size, settings, next(model.parameters()))
    while not has_stopped(run, settings):
        model.train()
        learning_rate = learning_rate_of(scheduler)
        total, rows = torch.zeros((), dtype=torch.float64, device=data.device), 0
        permutation = torch.randperm(len(x_train), generator=order).to(data.device)
        epoch = batches(permutation, settings.batch_size)
        for batch, x_BD in zip(epoch, minibatches(x_train, epoch, data.device), strict=True):
            if watch.stop.is_set():
                raise TrainingError("stopped")
            dropout = next(factors)[:, : len(batch)] if settings.dropout else None
            total += step(x_BD, y_train[batch], dropout, learning_rate) * len(batch)
            rows += len(batch)
        correct = int((predict(model, x_val, settings, data.device) == y_val).sum())
        if record_epoch(run, total.item() / rows, correct, len(y_val), learning_rate):
            # Training goes on: a copy.
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scheduler.step(run.val_accuracy[-1])
        watch.listener.on_epoch(run)
    model.load_state_dict(best)
    run.predictions = data.predict(lambda x: predict(model, x, settings, data.device))
    run.seconds = time.perf_counter() - start
    return run


def may_fork(settings: TrainingSettings) -> bool:
    """True if runs on a CPU can be trained in forks.

    Where a GPU is in sight torch refuses autograd in the forks of a process that has used it.
    """
    needs_autograd = settings.precision != "float32" or settings.trainer != "sequential"
    return not (needs_autograd and torch.cuda.is_available())


# A step of Adam on columns (B, D), class numbers (B,) and dropout's factors (L, B, H) or None, at a learning
# rate. It returns the mean loss before the step.
Step = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]


def step_of(model: nn.Sequential, data: Prepared, settings: TrainingSettings) -> Step:
    """The training step of a model: on a CPU in float32 that of `cpu_step`, which has the same numbers."""
    if data.device.type == "cpu" and settings.precision == "float32":
        return CpuStep(model, settings, data.weights_C)
    return autograd_step(model, settings, data.weights_C)


def autograd_step(model: nn.Sequential, settings: TrainingSettings, weights_C: Tensor | None) -> Step:
    """The training step of a model by autograd; rows weigh `weights_C` (C,) by their class."""
    parameters: list[Tensor] = list(model.parameters())
    state = AdamState.before(parameters)

    def step(x_BD: Tensor, y_B: Tensor, dropout_LBH: Tensor | None, learning_rate: float) -> Tensor:
        set_dropout(model, dropout_LBH)
        with autocast(x_BD.device, settings.precision):
            logits_BC = model(x_BD)
        set_dropout(model, None)
        if weights_C is None:
            loss = F.cross_entropy(logits_BC.to(x_BD.dtype), y_B)
        else:
            loss = F.cross_entropy(logits_BC.to(x_BD.dtype), y_B, weights_C, reduction="none").mean()
        adam_step(parameters, torch.autograd.grad(loss, parameters), state, learning_rate, settings)
        return loss.detach()

    return step


def set_dropout(model: nn.Sequential, factors_LBH: Tensor | None) -> None:
    """Hand each Dropout of the model its factors for the next step; None switches dropout off."""
    for level, module in enumerate(module for module in model if isinstance(module, Dropout)):
        module.factors = None if factors_LBH is None else factors_LBH[level]


@torch.no_grad()
def predict(model: nn.Module, x_ND: Matrix, settings: TrainingSettings, device: torch.device) -> Tensor:
    """Class numbers (N,), with BatchNorm's running statistics and without dropout."""
    model.eval()
    with autocast(device, settings.precision):
        return torch.cat([model(part.to(device)).argmax(1) for part in x_ND.split(EVAL_ROWS)])
