"""Standardise, then train R runs of the MLP: features and labels -> curves, best epochs and predictions.

Two trainers with the same arithmetic. `train_sequential` is the reference: each run is an nn.Sequential with torch's Adam
and ReduceLROnPlateau; on a CPU one run a core. `train_packed` stacks the R models along a leading axis and takes each step
for all of them at once; a GPU records the step and replays it. They agree to rounding: initial weights, batch order and,
on one device, dropout of a run are bit-equal whatever the trainer and R.

Suffixes name the axes: R runs, B rows of a batch, N rows, D features, H hidden units, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam

from settings import InputError, TrainingSettings

log = logging.getLogger("visual_ablation")

HIDDEN_LAYERS = 3
LR_FACTOR, LR_PATIENCE = 0.5, 10    # ReduceLROnPlateau on validation accuracy
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
EVAL_ROWS = 4096                    # rows a forward pass without gradients
COLUMN_BLOCK = 256                  # columns standardised at a time in float64
DROPOUT_STEPS = 8                   # steps whose dropout is drawn at a time
COPIES = 4                          # room for so many of the features: as they come, standardised, the training rows, all else
WARM_UP = 2                         # ordinary steps before one is recorded as a CUDA graph
PARTS = ("train", "val", "test")


class TrainingError(Exception):
    """Training cannot go on, and why; the cell fails."""


@dataclass
class Run:
    """What one seed gave. Epochs count from 1; the lists have one entry an epoch."""

    seed: int
    best_epoch: int = 0
    train_loss: list[float] = field(default_factory=list)      # mean over the epoch's rows, with dropout
    val_accuracy: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)   # that the epoch was trained with
    predictions: dict[str, np.ndarray] = field(default_factory=dict)   # part of the split -> (n,) class numbers
    seconds: float = 0.0


OnRun = Callable[[Run, int], None]
OnEpoch = Callable[[Run], None]


@dataclass
class TrainedRuns:
    runs: list[Run]
    trained_dim: int     # columns that vary over the training rows


def resolve_training(settings: TrainingSettings, device: str) -> TrainingSettings:
    """`auto` made definite: packed on a GPU, where a step is bound by launches; sequential on a CPU. Raises InputError for tf32 there."""
    on_gpu = torch.device(device).type == "cuda"
    if settings.precision == "tf32" and not on_gpu:
        raise InputError("--precision tf32 needs a CUDA GPU: use float32 or bfloat16 on a CPU")
    trainer = settings.trainer if settings.trainer != "auto" else ("packed" if on_gpu else "sequential")
    return dataclasses.replace(settings, trainer=trainer)


def train_runs(features: Tensor, labels: np.ndarray, split, num_classes: int, settings: TrainingSettings, device: str = "cpu",
               on_run: OnRun = lambda run, number: None, on_epoch: OnEpoch = lambda run: None,
               also: dict[str, Tensor] | None = None) -> TrainedRuns:
    """Train one MLP a seed on `features` (N, D) and `labels` (N,), and predict every row of the split.

    `split` has the row numbers `train`, `val` and `test`. `on_run(run, number)` is called as runs finish, number from 1,
    `on_epoch(run)` after each epoch of each run, from any thread. `also` has the features (n, D) of rows that are only
    predicted, by name. Raises TrainingError if no column varies over the training rows, if there is one such row only, or
    if a loss is not finite.
    """
    if len(split.train) < 2:
        raise TrainingError("one training row: BatchNorm needs at least two")
    features = torch.cat([features, *also.values()]) if also else features
    home = home_of(features, device)
    parts = {name: torch.from_numpy(np.asarray(getattr(split, name))).to(home) for name in PARTS}
    rows = len(labels)
    for name, extra in (also or {}).items():
        parts[name] = torch.arange(rows, rows + len(extra), device=home)
        rows += len(extra)
    x_ND = standardise(features.to(home), parts["train"])
    y_N = torch.from_numpy(labels).to(device)
    trainer = {"sequential": train_sequential, "packed": train_packed}[settings.trainer]
    new_scheduler(settings)   # a process's first optimizer makes torch import its compiler: seconds that are not a run's
    with arithmetic(settings.precision):
        runs = trainer(x_ND, y_N, parts, num_classes, settings, on_run, on_epoch)
    return TrainedRuns(runs, x_ND.shape[1])


def home_of(features: Tensor, device: str) -> str:
    """Where features lie while they are trained on: on the device, or on the host if a GPU has no room for their copies; batches are then moved."""
    if torch.device(device).type != "cuda":
        return device
    size, (free, _) = features.numel() * features.element_size(), torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)     # what torch keeps for its next tensors
    if COPIES * size <= free:
        return device
    log.info(f"The features ({size / 1e9:.1f} GB) stay in the host's memory: {device} has {free / 1e9:.1f} GB free")
    return "cpu"


def standardise(x_ND: Tensor, train_rows: Tensor) -> Tensor:
    """The columns that vary over the training rows, minus those rows' mean, over their population std, both in float64.

    A constant column (max == min) carries nothing, but its weights would still take Adam's absolute steps.
    """
    kept = []
    for block in x_ND.split(COLUMN_BLOCK, dim=1):
        low, high = block[train_rows].aminmax(dim=0)
        wide = block[:, high > low].double()
        if wide.shape[1]:
            std, mean = torch.std_mean(wide[train_rows], dim=0, correction=0)
            kept.append(((wide - mean) / std).to(x_ND.dtype))
    if not kept:
        raise TrainingError("no column varies over the training rows: there is nothing to learn from")
    return torch.cat(kept, dim=1)


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """float32 matrix products exact, or in tf32 on a GPU. bfloat16 is autocast where the model runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- what both trainers share


def stream_seed(seed: int, stream: str) -> int:
    """A seed of its own for each random stream of a run, so that batch order and dropout do not repeat the same numbers."""
    return int(np.random.SeedSequence([seed, *stream.encode()]).generate_state(1)[0])


class Dropout(nn.Module):
    """Dropout with factors that are handed to it, so that they can come from a run's own stream; nothing without them."""

    def __init__(self):
        super().__init__()
        self.factors: Tensor | None = None                               # (B, H): 0 or 1/(1-p)

    def forward(self, h_BH: Tensor) -> Tensor:
        return h_BH if self.factors is None else h_BH * self.factors


def dropout_factors(seed: int, batch_size: int, settings: TrainingSettings, like: Tensor) -> Iterator[Tensor]:
    """A run's endless dropout, (L, B, H) a step: 0 for a unit that is dropped, 1/(1-p) for one that is kept. On `like`'s device, in its dtype.

    On a CPU 32 bits of PCG64 a unit, so p is good to 1e-10: torch's own Bernoulli numbers take twelve times as long there.
    """
    shape, keep = (DROPOUT_STEPS, HIDDEN_LAYERS, batch_size, settings.hidden_dim), 1 - settings.dropout
    if like.device.type == "cpu":
        bits = np.random.PCG64(stream_seed(seed, "dropout"))
        words = -(-math.prod(shape) // 2)                                # of 64 bits
        while True:
            kept = bits.random_raw(words).view(np.uint32)[:math.prod(shape)] < round(keep * 2**32)
            yield from torch.from_numpy(kept).view(shape).to(like.dtype).mul_(1 / keep)
    generator = torch.Generator(like.device).manual_seed(stream_seed(seed, "dropout"))
    while True:
        yield from torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep, generator=generator).mul_(1 / keep)


def build_model(seed: int, inputs: int, num_classes: int, settings: TrainingSettings) -> nn.Sequential:
    """The MLP on the CPU with torch's default initial weights, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(HIDDEN_LAYERS):
            layers += [nn.Linear(inputs, settings.hidden_dim), nn.BatchNorm1d(settings.hidden_dim), nn.ReLU(), Dropout()]
            inputs = settings.hidden_dim
        return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def batch_order(seed: int) -> torch.Generator:
    """The generator behind a run's permutations, one an epoch."""
    return torch.Generator().manual_seed(stream_seed(seed, "batches"))


def batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """The epoch's batches along the last axis; a last one of a single row is left out, BatchNorm cannot use it."""
    parts = order.split(batch_size, dim=-1)
    return list(parts if parts[-1].shape[-1] > 1 else parts[:-1])


def autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def rows_of(x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """x[rows] on the device, wherever x lies."""
    return x[rows.to(x.device)].to(device)


def by_part(classes_of: Callable[[Tensor], Tensor], x_ND: Tensor, own: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Predictions (..., n) of each part. The data's `own` rows are predicted apart from what follows, which must not change their rounding."""
    classes = torch.cat([classes_of(x) for x in (x_ND[:own], x_ND[own:]) if len(x)], dim=-1).cpu()
    return {name: classes[..., rows.cpu()] for name, rows in parts.items()}


def new_scheduler(settings: TrainingSettings):
    """torch's plateau rule on a learning rate of its own; `.optimizer.param_groups[0]["lr"]` is the present one."""
    holder = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    return plateau(holder)


def plateau(optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=LR_FACTOR, patience=LR_PATIENCE)


class AdamState(NamedTuple):
    """What Adam remembers of each of several parameters."""

    first: list[Tensor]    # moments
    second: list[Tensor]
    steps: list[Tensor]    # made so far

    @classmethod
    def before(cls, parameters: list[Tensor], runs: tuple[int, ...] = ()) -> AdamState:
        """The first step of single parameters, or of parameters (R, ...) of `runs` = (R,)."""
        first, second = ([torch.zeros_like(p, requires_grad=False) for p in parameters] for _ in range(2))
        return cls(first, second, [torch.zeros(runs, device=p.device) for p in parameters])


@torch.no_grad()
def adam_step(parameters: list[Tensor], gradients: list[Tensor], state: AdamState, rate: float | Tensor, settings: TrainingSettings) -> None:
    """torch's Adam with L2 weight decay in the gradient; its function, because the class takes as long again for its own bookkeeping."""
    gradients = [gradient.contiguous() for gradient in gradients]        # the fused kernel takes the parameters' order of memory for granted
    adam(parameters, gradients, state.first, state.second, [], state.steps, fused=True, amsgrad=False, beta1=BETA1, beta2=BETA2, lr=rate,
         weight_decay=settings.weight_decay, eps=ADAM_EPS, maximize=False)


def record_epoch(run: Run, loss: float, correct: int, num_val: int, learning_rate: float) -> bool:
    """Note an epoch; True if it is the run's best so far. Ties go to the earliest. Raises TrainingError for a loss that is not finite."""
    accuracy = correct / num_val
    is_best = not run.val_accuracy or accuracy > run.val_accuracy[run.best_epoch - 1]
    run.train_loss.append(loss)
    run.val_accuracy.append(accuracy)
    run.learning_rate.append(learning_rate)
    epoch = len(run.train_loss)
    if not np.isfinite(loss):
        raise TrainingError(f"run with seed {run.seed}: the loss is {loss} in epoch {epoch}; try a lower --learning-rate")
    if is_best:
        run.best_epoch = epoch
    return is_best


def has_stopped(run: Run, settings: TrainingSettings) -> bool:
    epoch = len(run.train_loss)
    return epoch >= settings.max_epochs or epoch - run.best_epoch >= settings.patience


# --- one model a run


def train_sequential(x_ND: Tensor, y_N: Tensor, parts: dict[str, Tensor], num_classes: int, settings: TrainingSettings,
                     on_run: OnRun, on_epoch: OnEpoch) -> list[Run]:
    """Run after run; on a CPU as many at a time as there are cores, each on one: small products gain little from a second."""
    models = [build_model(seed, x_ND.shape[1], num_classes, settings).to(y_N.device, x_ND.dtype) for seed in settings.seeds]
    stop, runs = threading.Event(), []
    with one_thread_a_core(settings.num_runs if y_N.device.type == "cpu" else 1) as pool:
        try:
            for run in pool.map(lambda seed, model: train_one(model, x_ND, y_N, parts, settings, seed, stop, on_epoch), settings.seeds, models):
                runs.append(run)
                on_run(run, len(runs))
        finally:
            stop.set()
    return runs


@contextlib.contextmanager
def one_thread_a_core(most: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses, `most` at most, among which torch's own threads are shared out. What waits is cancelled at the end."""
    threads = torch.get_num_threads()
    workers = min(threads, most)
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def train_one(model: nn.Sequential, x_ND: Tensor, y_N: Tensor, parts: dict[str, Tensor], settings: TrainingSettings, seed: int,
              stop: threading.Event, on_epoch: OnEpoch) -> Run:
    """One run: the plain loop. Ends with a TrainingError within a step once `stop` is set."""
    start, device = time.perf_counter(), y_N.device
    parameters = list(model.parameters())
    state = AdamState.before(parameters)
    scheduler = new_scheduler(settings)
    order, run, best = batch_order(seed), Run(seed), {}
    x_train, y_train = x_ND[parts["train"]], rows_of(y_N, parts["train"], device)
    x_val, y_val = x_ND[parts["val"]], rows_of(y_N, parts["val"], device)
    dropouts = [module for module in model if isinstance(module, Dropout)]
    factors = dropout_factors(seed, min(settings.batch_size, len(x_train)), settings, parameters[0])
    while not has_stopped(run, settings):
        model.train()
        learning_rate = scheduler.optimizer.param_groups[0]["lr"]
        total, rows = torch.zeros((), dtype=torch.float64, device=device), 0
        permutation = torch.randperm(len(x_train), generator=order).to(device)
        for batch in batches(permutation, settings.batch_size):
            if stop.is_set():
                raise TrainingError("stopped")
            if settings.dropout:
                factors_LBH = next(factors)
                for level, dropout in enumerate(dropouts):
                    dropout.factors = factors_LBH[level, :len(batch)]
            with autocast(device, settings.precision):
                logits_BC = model(rows_of(x_train, batch, device))
            loss = F.cross_entropy(logits_BC.to(x_ND.dtype), y_train[batch])
            adam_step(parameters, torch.autograd.grad(loss, parameters), state, learning_rate, settings)
            total += loss.detach() * len(batch)
            rows += len(batch)
        for dropout in dropouts:
            dropout.factors = None
        correct = int((predict(model, x_val, settings, device) == y_val).sum())
        if record_epoch(run, total.item() / rows, correct, len(y_val), learning_rate):
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}   # a copy: training goes on
        scheduler.step(run.val_accuracy[-1])
        on_epoch(run)
    model.load_state_dict(best)
    found = by_part(lambda x: predict(model, x, settings, device), x_ND, len(y_N), parts)
    run.predictions = {name: classes.numpy() for name, classes in found.items()}
    run.seconds = time.perf_counter() - start
    return run


@torch.no_grad()
def predict(model: nn.Module, x_ND: Tensor, settings: TrainingSettings, device: torch.device) -> Tensor:
    """Class numbers (N,), with BatchNorm's running statistics; dropout has no mask then."""
    model.eval()
    with autocast(device, settings.precision):
        return torch.cat([model(part.to(device)).argmax(1) for part in x_ND.split(EVAL_ROWS)])


# --- all runs as one pack


class Pack:
    """R models of the same shape with their parameters stacked along a leading axis, and Adam's state for them."""

    def __init__(self, models: list[nn.Sequential], settings: TrainingSettings, device: torch.device, dtype: torch.dtype):
        self.settings = settings
        self.linears = [i for i, module in enumerate(models[0]) if isinstance(module, nn.Linear)]
        # weights as (in, out), so that their gradients come in that order of memory too
        stack = lambda tensors: torch.stack([t.detach().t() for t in tensors]).to(device, dtype)  # noqa: E731
        names = [name for name, _ in models[0].named_parameters()]
        self.parameters = {name: stack([m.get_parameter(name) for m in models]).requires_grad_() for name in names}
        statistics = [name for name, tensor in models[0].named_buffers() if tensor.is_floating_point()]
        self.statistics = {name: stack([m.get_buffer(name) for m in models]) for name in statistics}
        self.adam = AdamState.before(list(self.parameters.values()), (len(models),))

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def logits(self, x_RBD: Tensor, training: bool, dropout_LRBH: Tensor | None = None) -> Tensor:
        """(R, B, C). `dropout_LRBH` holds dropout's factors for each hidden layer."""
        p, h = self.parameters, x_RBD
        for level, i in enumerate(self.linears[:-1]):
            h = torch.baddbmm(p[f"{i}.bias"][:, None], h, p[f"{i}.weight"])                            # (R, B, H)
            h = F.relu(self.batch_norm(h, i + 1, training))
            if dropout_LRBH is not None:
                h = h * dropout_LRBH[level]
        i = self.linears[-1]
        return torch.baddbmm(p[f"{i}.bias"][:, None], h, p[f"{i}.weight"])

    def batch_norm(self, h_RBH: Tensor, i: int, training: bool) -> Tensor:
        """BatchNorm1d of every run in one call: its channels are the R*H units."""
        R, B, H = h_RBH.shape
        units = h_RBH.transpose(0, 1).reshape(B, R * H)
        units = F.batch_norm(
            units, self.statistics[f"{i}.running_mean"].view(-1), self.statistics[f"{i}.running_var"].view(-1),
            self.parameters[f"{i}.weight"].view(-1), self.parameters[f"{i}.bias"].view(-1), training,
        )
        return units.view(B, R, H).transpose(0, 1)

    def step(self, gradients: tuple[Tensor, ...], rates_R: Tensor) -> None:
        """One step of Adam for each run, at its own learning rate."""
        for r, rate in enumerate(rates_R):
            stacks = (self.parameters.values(), gradients, *self.adam)
            parameters, gradients_of_run, *state = ([tensor[r] for tensor in tensors] for tensors in stacks)
            adam_step(parameters, gradients_of_run, AdamState(*state), rate, self.settings)

    def state(self) -> dict[str, Tensor]:
        """What a prediction depends on: parameters and BatchNorm statistics, (R, ...) each."""
        return {name: tensor.detach() for name, tensor in (self.parameters | self.statistics).items()}

    def keep(self, positions: list[int]) -> None:
        """Drop every other run, so that those that have stopped cost nothing."""
        for tensors in (self.parameters, self.statistics):
            for name, tensor in tensors.items():
                tensors[name] = tensor.detach()[positions].requires_grad_(tensor.requires_grad)
        self.adam = AdamState(*([tensor[positions] for tensor in tensors] for tensors in self.adam))

    @torch.no_grad()
    def predict(self, x_ND: Tensor) -> Tensor:
        """Class numbers (R, N)."""
        device = next(iter(self.parameters.values())).device
        with autocast(device, self.settings.precision):
            return torch.cat([self.logits(part.to(device).expand(len(self), *part.shape), False).argmax(2) for part in x_ND.split(EVAL_ROWS)], 1)


class PackedEpoch:
    """Epochs of a pack as long as its runs stay the same. What its steps read and write stays in place, so they can be replayed."""

    def __init__(self, pack: Pack, x_train: Tensor, y_train: Tensor):
        self.pack, self.x_train, self.y_train = pack, x_train, y_train
        device = y_train.device
        self.total_R = torch.zeros(len(pack), dtype=torch.float64, device=device)          # loss summed over the epoch's rows
        # a CPU's Adam takes rates as they are, a GPU's as float32
        self.rates_R = torch.zeros(len(pack), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        self.steps: dict[int, Callable[..., None]] = {}                                    # by the size of the batch

    def replays(self) -> bool:
        return self.x_train.is_cuda

    def train(self, order_RN: Tensor, rates: list[float], dropouts: list[Iterator[Tensor]]) -> list[float]:
        """One epoch over the rows in each run's order; the mean loss of each run."""
        settings = self.pack.settings
        self.rates_R.copy_(torch.tensor(rates, dtype=torch.float64))
        self.total_R.zero_()
        rows = 0
        for batch_RB in batches(order_RN, settings.batch_size):
            size = batch_RB.shape[1]
            dropout = [torch.stack([next(factors)[:, :size] for factors in dropouts], dim=1)] if settings.dropout else []   # (L, R, B, H)
            if size not in self.steps:
                self.steps[size] = Replayed(self.step, record_graph) if self.replays() else self.step
            self.steps[size](batch_RB, *dropout)
            rows += size
        return (self.total_R / rows).tolist()

    def step(self, batch_RB: Tensor, dropout_LRBH: Tensor | None = None) -> None:
        R, B = batch_RB.shape
        with autocast(self.y_train.device, self.pack.settings.precision):
            logits_RBC = self.pack.logits(rows_of(self.x_train, batch_RB, self.y_train.device), True, dropout_LRBH)
        losses = F.cross_entropy(logits_RBC.to(self.x_train.dtype).flatten(0, 1), self.y_train[batch_RB].flatten(), reduction="none")
        loss_R = losses.view(R, B).mean(1)
        self.pack.step(torch.autograd.grad(loss_R.sum(), list(self.pack.parameters.values())), self.rates_R)
        self.total_R += loss_R.detach() * B


class Replayed:
    """A function of tensors that returns nothing; on a GPU it is recorded as a CUDA graph and replayed.

    Launching the some hundred kernels of a step takes longer than their work. The first WARM_UP calls are ordinary ones, on the
    stream that is recorded later; from then on the arguments are copied to where the recorded kernels read them. What cannot
    be recorded runs kernel by kernel, with the same numbers and a warning.
    """

    def __init__(self, function: Callable[..., None], record: Callable[[Callable[[], None], torch.device], Callable[[], None]]):
        self.function, self.record = function, record
        self.calls = 0
        self.places: list[Tensor] = []
        self.replay: Callable[[], None] | None = None

    def __call__(self, *arguments: Tensor) -> None:
        self.calls += 1
        device = arguments[0].device
        if self.calls <= WARM_UP:
            with side_stream(device):
                self.function(*arguments)
            return
        if self.replay is None:
            self.places = [argument.clone() for argument in arguments]
            run = lambda: self.function(*self.places)  # noqa: E731
            try:
                self.replay = self.record(run, device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:                                # nothing has run: kernels were noted only
                warnings.warn(f"a training step is not recorded as a CUDA graph and runs kernel by kernel: {error}", stacklevel=2)
                self.replay = run
        for place, argument in zip(self.places, arguments, strict=True):
            place.copy_(argument)
        self.replay()


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: each stream of a device that multiplies matrices keeps memory for it."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """The recording stream of a GPU, after all before it and before all after it; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    stream, present = recording_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(present)
    with torch.cuda.stream(stream):                                      # makes its device the present one, too
        yield
    present.wait_stream(stream)


def record_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with side_stream(device), warnings.catch_warnings():
        warnings.simplefilter("error")                                   # such as that of an empty graph, which would train nothing
        with torch.cuda.graph(graph, stream=recording_stream(device)):   # nothing runs in here: kernels are noted
            function()
    return graph.replay


def train_packed(x_ND: Tensor, y_N: Tensor, parts: dict[str, Tensor], num_classes: int, settings: TrainingSettings,
                 on_run: OnRun, on_epoch: OnEpoch) -> list[Run]:
    """All runs together. A run that stops leaves the pack; each run's time is the pack's divided by R.

    The host waits for the device between epochs, and when a step is recorded, but not within the steps of an epoch.
    """
    start = time.perf_counter()
    device = y_N.device
    runs = [Run(seed) for seed in settings.seeds]
    pack = Pack([build_model(run.seed, x_ND.shape[1], num_classes, settings) for run in runs], settings, device, x_ND.dtype)
    schedulers = [new_scheduler(settings) for _ in runs]
    orders = [batch_order(run.seed) for run in runs]
    best = {name: tensor.clone() for name, tensor in pack.state().items()}
    x_train, y_train = x_ND[parts["train"]], rows_of(y_N, parts["train"], device)
    x_val, y_val = x_ND[parts["val"]], rows_of(y_N, parts["val"], device)
    dropouts = [dropout_factors(run.seed, min(settings.batch_size, len(x_train)), settings, pack.parameters["0.bias"]) for run in runs]
    alive = list(range(len(runs)))                                       # numbers of the runs in the pack, in its order
    epoch = PackedEpoch(pack, x_train, y_train)
    try:
        while alive:
            rates = [schedulers[r].optimizer.param_groups[0]["lr"] for r in alive]
            order_RN = torch.stack([torch.randperm(len(x_train), generator=orders[r]) for r in alive]).to(device)
            losses = epoch.train(order_RN, rates, [dropouts[r] for r in alive])
            correct = (pack.predict(x_val) == y_val).sum(1).tolist()
            improved = []
            for position, (r, loss) in enumerate(zip(alive, losses, strict=True)):
                if record_epoch(runs[r], loss, correct[position], len(y_val), rates[position]):
                    improved.append(position)
                schedulers[r].step(runs[r].val_accuracy[-1])
                on_epoch(runs[r])
            if improved:
                for name, tensor in pack.state().items():
                    best[name][[alive[position] for position in improved]] = tensor[improved]
            staying = [position for position, r in enumerate(alive) if not has_stopped(runs[r], settings)]
            if len(staying) < len(alive):
                alive = [alive[position] for position in staying]
                pack.keep(staying)
                epoch.steps.clear()                                          # recorded steps hold a GPU's memory
                epoch = PackedEpoch(pack, x_train, y_train)
    finally:
        epoch.steps.clear()
    for name, tensor in best.items():
        (pack.parameters if name in pack.parameters else pack.statistics)[name] = tensor
    found = by_part(pack.predict, x_ND, len(y_N), parts)
    seconds = (time.perf_counter() - start) / len(runs)
    for number, run in enumerate(runs, 1):
        run.predictions = {name: classes_RN[number - 1].numpy() for name, classes_RN in found.items()}
        run.seconds = seconds
        on_run(run, number)
    return runs
