"""The runs of a cell as one pack: R models stacked along a leading axis take each step together.

On a GPU a step is recorded as a CUDA graph and replayed. `training.py` has the reference that trains one
model after another. Suffixes name the axes: R runs, B rows of a batch, N rows, D features, H hidden units, C
classes, L hidden layers.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablation.mlp import (
    EVAL_ROWS,
    AdamState,
    Prepared,
    adam_step,
    autocast,
    batch_order,
    batches,
    build_model,
    dropout_factors,
    has_stopped,
    learning_rate_of,
    new_scheduler,
    record_epoch,
    rows_on,
)
from ablation.settings import TrainingSettings
from ablation.task import Listener, Run

WARM_UP = 2  # ordinary steps before one is recorded as a CUDA graph


class Pack:
    """R models of the same shape:
    their parameters stacked along a leading axis, and Adam's state for them.
    """

    def __init__(
        self,
        models: list[nn.Sequential],
        settings: TrainingSettings,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.settings = settings
        self.linears = [i for i, module in enumerate(models[0]) if isinstance(module, nn.Linear)]

        def stack(tensors: list[Tensor]) -> Tensor:
            """Weights as (in, out), so that their gradients come in that order of memory too."""
            return torch.stack([t.detach().t() for t in tensors]).to(device, dtype)

        names = [name for name, _ in models[0].named_parameters()]
        self.parameters = {
            name: stack([m.get_parameter(name) for m in models]).requires_grad_() for name in names
        }
        statistics = [name for name, tensor in models[0].named_buffers() if tensor.is_floating_point()]
        self.statistics = {name: stack([m.get_buffer(name) for m in models]) for name in statistics}
        self.adam = AdamState.before(list(self.parameters.values()), (len(models),))

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def logits(self, x_RBD: Tensor, training: bool, dropout_LRBH: Tensor | None = None) -> Tensor:
        """Logits (R, B, C). `dropout_LRBH` holds dropout's factors for each hidden layer."""
        p, h = self.parameters, x_RBD
        for level, i in enumerate(self.linears[:-1]):
            h = torch.baddbmm(p[f"{i}.bias"][:, None], h, p[f"{i}.weight"])  # (R, B, H)
            h = F.relu(self.batch_norm(h, i + 1, training))
            if dropout_LRBH is not None:
                h = h * dropout_LRBH[level]
        i = self.linears[-1]
        return torch.baddbmm(p[f"{i}.bias"][:, None], h, p[f"{i}.weight"])

    def batch_norm(self, h_RBH: Tensor, i: int, training: bool) -> Tensor:
        """BatchNorm1d of every run in one call, whose channels are the R*H units."""
        R, B, H = h_RBH.shape
        units = h_RBH.transpose(0, 1).reshape(B, R * H)
        units = F.batch_norm(
            units,
            self.statistics[f"{i}.running_mean"].view(-1),
            self.statistics[f"{i}.running_var"].view(-1),
            self.parameters[f"{i}.weight"].view(-1),
            self.parameters[f"{i}.bias"].view(-1),
            training,
        )
        return units.view(B, R, H).transpose(0, 1)

    def step(self, gradients: tuple[Tensor, ...], rates_R: Tensor) -> None:
        """One step of Adam for each run, at its own learning rate."""
        for r, rate in enumerate(rates_R):
            stacks = (self.parameters.values(), gradients, *self.adam)
            parameters, gradients_of_run, *state = ([tensor[r] for tensor in tensors] for tensors in stacks)
            adam_step(parameters, gradients_of_run, AdamState(*state), rate, self.settings)

    def state(self) -> dict[str, Tensor]:
        """Everything that a prediction depends on: parameters and BatchNorm statistics, (R, ...) each."""
        return {name: tensor.detach() for name, tensor in (self.parameters | self.statistics).items()}

    def keep(self, positions: list[int]) -> None:
        """Keep the runs at `positions` and drop the others, so that stopped runs cost nothing."""
        for tensors in (self.parameters, self.statistics):
            for name, tensor in tensors.items():
                tensors[name] = tensor.detach()[positions].requires_grad_(tensor.requires_grad)
        self.adam = AdamState(*([tensor[positions] for tensor in tensors] for tensors in self.adam))

    @torch.no_grad()
    def predict(self, x_ND: Tensor) -> Tensor:
        """Class numbers (R, N)."""
        device = next(iter(self.parameters.values())).device
        with autocast(device, self.settings.precision):
            classes = [
                self.logits(part.to(device).expand(len(self), *part.shape), False).argmax(2)
                for part in x_ND.split(EVAL_ROWS)
            ]
        return torch.cat(classes, dim=1)


class PackedEpoch:
    """Trains epochs of a pack as long as its runs stay the same.

    The tensors that its steps read and write stay in place, so that recorded steps can be replayed.
    """

    def __init__(self, pack: Pack, x_train: Tensor, y_train: Tensor, weights_C: Tensor | None = None):
        self.pack, self.x_train, self.y_train, self.weights_C = pack, x_train, y_train, weights_C
        device = y_train.device
        # Loss summed over the epoch's rows.
        self.total_R = torch.zeros(len(pack), dtype=torch.float64, device=device)
        rate_type = torch.float32 if device.type == "cuda" else torch.float64  # as Adam's kernel takes them
        self.rates_R = torch.zeros(len(pack), dtype=rate_type, device=device)
        self.steps: dict[int, Callable[..., None]] = {}  # by the size of the batch

    def replays(self) -> bool:
        """True if steps are recorded and replayed."""
        return self.x_train.is_cuda

    def train(self, order_RN: Tensor, rates: list[float], dropouts: list[Iterator[Tensor]]) -> list[float]:
        """Train one epoch over the rows in each run's order. Returns the mean loss of each run."""
        settings = self.pack.settings
        self.rates_R.copy_(torch.tensor(rates, dtype=torch.float64))
        self.total_R.zero_()
        rows = 0
        for batch_RB in batches(order_RN, settings.batch_size):
            size = batch_RB.shape[1]
            dropout = []
            if settings.dropout:
                # (L, R, B, H)
                dropout = [torch.stack([next(factors)[:, :size] for factors in dropouts], dim=1)]
            if size not in self.steps:
                self.steps[size] = Replayed(self.step, record_graph) if self.replays() else self.step
            self.steps[size](batch_RB, *dropout)
            rows += size
        return (self.total_R / rows).tolist()

    def step(self, batch_RB: Tensor, dropout_LRBH: Tensor | None = None) -> None:
        """One step of every run on its own batch; adds to the summed losses."""
        R, B = batch_RB.shape
        with autocast(self.y_train.device, self.pack.settings.precision):
            x_RBD = rows_on(self.x_train, batch_RB, self.y_train.device)
            logits_RBC = self.pack.logits(x_RBD, True, dropout_LRBH)
        logits = logits_RBC.to(self.x_train.dtype).flatten(0, 1)
        losses = F.cross_entropy(logits, self.y_train[batch_RB].flatten(), self.weights_C, reduction="none")
        loss_R = losses.view(R, B).mean(1)
        gradients = torch.autograd.grad(loss_R.sum(), list(self.pack.parameters.values()))
        self.pack.step(gradients, self.rates_R)
        self.total_R += loss_R.detach() * B


class Replayed:
    """A function of tensors that returns nothing, recorded as a CUDA graph and replayed.

    Launching the hundred kernels of a step takes longer than their work. The first WARM_UP calls are
    ordinary, on the stream that is recorded later. After them the arguments are copied to where the recorded
    kernels read them. A function that cannot be recorded runs kernel by kernel, with the same numbers and a
    warning.
    """

    def __init__(
        self,
        function: Callable[..., None],
        record: Callable[[Callable[[], None], torch.device], Callable[[], None]],
    ):
        self.function, self.record = function, record
        self.calls = 0
        self.places: list[Tensor] = []
        self.replay: Callable[[], None] | None = None

    def __call__(self, *arguments: Tensor) -> None:
        """Run the function, or replay it, on these tensors."""
        self.calls += 1
        device = arguments[0].device
        if self.calls <= WARM_UP:
            with side_stream(device):
                self.function(*arguments)
            return
        if self.replay is None:
            self.places = [argument.clone() for argument in arguments]
            run = functools.partial(self.function, *self.places)
            try:
                self.replay = self.record(run, device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # recording runs no kernel, so nothing has to be undone
                warnings.warn(
                    f"a training step is not recorded as a CUDA graph and runs kernel by kernel: {error}",
                    stacklevel=2,
                )
                self.replay = run
        for place, argument in zip(self.places, arguments, strict=True):
            place.copy_(argument)
        self.replay()


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that records:
    each stream of a device that multiplies matrices keeps memory for itself.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a GPU's recording stream,
    after all earlier work and before all later work; no effect on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    stream, present = recording_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(present)
    with torch.cuda.stream(stream):  # makes its device the present one, too
        yield
    present.wait_stream(stream)


def record_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the kernels of a function as a CUDA graph; returns the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with side_stream(device), warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty graph, which would train nothing, is only warned of
        with torch.cuda.graph(graph, stream=recording_stream(device)):
            function()
    return graph.replay


def train_packed(data: Prepared, settings: TrainingSettings, listener: Listener) -> list[Run]:
    """Train all runs together. A run that stops leaves the pack; each run's time is the pack's divided by R.

    The host waits for the device between epochs, and when a step is recorded, but not within the steps of an
    epoch.
    """
    start = time.perf_counter()
    training = PackedTraining(data, settings)
    training.train(listener)
    predictions = data.predict(training.best_pack().predict)
    seconds = (time.perf_counter() - start) / len(training.runs)
    for r, run in enumerate(training.runs):
        run.predictions = {part: classes_RN[r] for part, classes_RN in predictions.items()}
        run.seconds = seconds
        listener.on_run(run, r + 1)
    return training.runs


class PackedTraining:
    """The runs of a pack while they train. Lists have an entry for each run;
    `alive` has the numbers of those in the pack.
    """

    def __init__(self, data: Prepared, settings: TrainingSettings):
        self.settings = settings
        self.runs = [Run(seed) for seed in settings.seeds]
        self.alive = list(range(len(self.runs)))
        self.x_train, self.y_train = data.rows_of("train")
        self.x_val, self.y_val = data.rows_of("val")
        self.weights_C = data.weights_C
        inputs = data.x_ND.shape[1]
        models = [build_model(run.seed, inputs, data.num_classes, settings) for run in self.runs]
        self.pack = Pack(models, settings, data.device, data.x_ND.dtype)
        self.best = {name: tensor.clone() for name, tensor in self.pack.state().items()}
        self.schedulers = [new_scheduler(settings) for _ in self.runs]
        self.orders = [batch_order(run.seed) for run in self.runs]
        batch_size, like = min(settings.batch_size, len(self.x_train)), self.pack.parameters["0.bias"]
        self.dropouts = [dropout_factors(run.seed, batch_size, settings, like) for run in self.runs]

    def train(self, listener: Listener) -> None:
        """Train until every run has stopped."""
        epoch = PackedEpoch(self.pack, self.x_train, self.y_train, self.weights_C)
        try:
            while self.alive:
                self.train_epoch(epoch, listener)
                staying = [
                    i for i, r in enumerate(self.alive) if not has_stopped(self.runs[r], self.settings)
                ]
                if len(staying) < len(self.alive):
                    self.alive = [self.alive[i] for i in staying]
                    self.pack.keep(staying)
                    epoch.steps.clear()  # recorded steps hold a GPU's memory
                    epoch = PackedEpoch(self.pack, self.x_train, self.y_train, self.weights_C)
        finally:
            epoch.steps.clear()

    def train_epoch(self, epoch: PackedEpoch, listener: Listener) -> None:
        """One epoch of every run in the pack, its validation,
        and a copy of the runs that are better than ever.
        """
        alive, N = self.alive, len(self.x_train)
        rates = [learning_rate_of(self.schedulers[r]) for r in alive]
        order_RN = torch.stack([torch.randperm(N, generator=self.orders[r]) for r in alive])
        losses = epoch.train(order_RN.to(self.y_train.device), rates, [self.dropouts[r] for r in alive])
        correct = (self.pack.predict(self.x_val) == self.y_val).sum(1).tolist()
        improved = []
        for position, (r, loss) in enumerate(zip(alive, losses, strict=True)):
            if record_epoch(self.runs[r], loss, correct[position], len(self.y_val), rates[position]):
                improved.append(position)
            self.schedulers[r].step(self.runs[r].val_accuracy[-1])
            listener.on_epoch(self.runs[r])
        if improved:
            for name, tensor in self.pack.state().items():
                self.best[name][[alive[position] for position in improved]] = tensor[improved]

    def best_pack(self) -> Pack:
        """The pack with every run as it was in its best epoch."""
        for name, tensor in self.best.items():
            stacks = self.pack.parameters if name in self.pack.parameters else self.pack.statistics
            stacks[name] = tensor
        return self.pack
