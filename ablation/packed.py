"""The runs of a cell as one pack: R models stacked along a leading axis take each step together.

On a GPU a step is recorded as a CUDA graph and replayed. `training.py` has the reference that trains one
model after another. Suffixes name the axes: R runs, B rows of a batch, N rows, D features, H hidden units, C
classes, L hidden layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablation.cuda_graphs import Replayed, record_graph
from ablation.kept_runs import keep, run_arrays, run_of
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
)
from ablation.settings import TrainingSettings
from ablation.streamed import Matrix, minibatches, rows_on
from ablation.task import Listener, Run
from checkpointing import Unfinished

log = logging.getLogger("visual_ablation")

KEEP_SECONDS = 180.0  # between two times that a pack at work is kept on disk
WHOLE_PACK = "pack"  # the file in which the pack of all runs is kept; that of a half names its seeds
HALVED = "halved"  # the one array in the file of a pack that is trained as halves: their sizes
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # state of ReduceLROnPlateau


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
    def predict(self, x_ND: Matrix) -> Tensor:
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

    def __init__(self, pack: Pack, x_train: Matrix, y_train: Tensor, weights_C: Tensor | None = None):
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

    def gathered(self, epoch: list[Tensor]) -> Iterator[Tensor | None]:
        """The columns (R, B, D) of each batch, made ahead; None where a step takes them itself."""
        device = self.y_train.device
        if isinstance(self.x_train, Tensor) and self.x_train.device.type == device.type:
            return itertools.repeat(None, len(epoch))
        return minibatches(self.x_train, epoch, device)

    def train(self, order_RN: Tensor, rates: list[float], dropouts: list[Iterator[Tensor]]) -> list[float]:
        """Train one epoch over the rows in each run's order. Returns the mean loss of each run."""
        settings = self.pack.settings
        self.rates_R.copy_(torch.tensor(rates, dtype=torch.float64))
        self.total_R.zero_()
        rows = 0
        epoch = batches(order_RN, settings.batch_size)
        for batch_RB, x_RBD in zip(epoch, self.gathered(epoch), strict=True):
            size = batch_RB.shape[1]
            dropout = []
            if settings.dropout:
                # (L, R, B, H)
                dropout = [torch.stack([next(factors)[:, :size] for factors in dropouts], dim=1)]
            if size not in self.steps:
                self.steps[size] = Replayed(self.step, record_graph) if self.replays() else self.step
            if x_RBD is None:
                self.steps[size](batch_RB, *dropout)
            else:
                self.step(batch_RB, dropout[0] if dropout else None, x_RBD)
            rows += size
        return (self.total_R / rows).tolist()

    def step(self, batch_RB: Tensor, dropout_LRBH: Tensor | None = None, x_RBD: Tensor | None = None) -> None:
        """One step of every run on its own batch, whose columns may be given; adds to the summed losses."""
        R, B = batch_RB.shape
        with autocast(self.y_train.device, self.pack.settings.precision):
            if x_RBD is None:
                x_RBD = rows_on(self.x_train, batch_RB, self.y_train.device)
            logits_RBC = self.pack.logits(x_RBD, True, dropout_LRBH)
        logits = logits_RBC.to(self.x_train.dtype).flatten(0, 1)
        losses = F.cross_entropy(logits, self.y_train[batch_RB].flatten(), self.weights_C, reduction="none")
        loss_R = losses.view(R, B).mean(1)
        gradients = torch.autograd.grad(loss_R.sum(), list(self.pack.parameters.values()))
        self.pack.step(gradients, self.rates_R)
        self.total_R += loss_R.detach() * B


def train_packed(
    data: Prepared, settings: TrainingSettings, listener: Listener, kept: Unfinished | None = None
) -> list[Run]:
    """Train all runs together. A run that stops leaves the pack; each run's time is the pack's divided by R.

    The host waits for the device between epochs, and when a step is recorded, but not within the steps of an
    epoch. The pack is kept every KEEP_SECONDS, and goes on from there after a kill with the same numbers.
    A pack that the device has no room for is trained as two halves, one after the other. Raises
    OutOfMemoryError if there is no room for one run.
    """
    runs: list[Run] = []
    for pack in trained_packs(data, settings, listener, kept):
        for run in pack:
            runs.append(run)
            listener.on_run(run, len(runs))
    return runs


def trained_packs(
    data: Prepared,
    settings: TrainingSettings,
    listener: Listener,
    kept: Unfinished | None,
    name: str = WHOLE_PACK,
) -> Iterator[list[Run]]:
    """Yields the runs of a pack; or those of its halves, if the device has no room for the whole.

    `name` is that of the file in which the pack is kept.
    """
    R = settings.num_runs
    sizes = [R // 2, R - R // 2]
    if not (kept and kept.names_in(name) == {HALVED}):
        runs = None
        try:
            runs = train_at_once(data, settings, listener, kept, name)
        except torch.OutOfMemoryError:
            if R == 1:
                raise
        # Outside the except clause, whose traceback keeps the tensors alive.
        if runs is not None:
            yield runs
            return
        log.warning(
            f"out of memory on {data.device}: the pack of {R} runs is trained as {sizes[0]} and {sizes[1]}"
        )
        keep(kept, name, {HALVED: np.array(sizes)})
    for first, size in ((0, sizes[0]), (sizes[0], sizes[1])):
        half = dataclasses.replace(settings, num_runs=size, seed=settings.seed + first)
        own_name = f"{WHOLE_PACK}{half.seeds[0]}-{half.seeds[-1]}"
        yield from trained_packs(data, half, listener, kept, own_name)


def train_at_once(
    data: Prepared, settings: TrainingSettings, listener: Listener, kept: Unfinished | None, name: str
) -> list[Run]:
    """Train and predict the runs of one pack, which is kept under its name."""
    training = PackedTraining(data, settings)
    training.train(listener, kept, name)
    predictions = data.predict(training.best_pack().predict)
    seconds = training.seconds() / len(training.runs)
    for r, run in enumerate(training.runs):
        run.predictions = {part: classes_RN[r] for part, classes_RN in predictions.items()}
        run.seconds = seconds
    return training.runs


class PackedTraining:
    """The runs of a pack while they train. Lists have an entry for each run;
    `alive` has the numbers of those in the pack.
    """

    def __init__(self, data: Prepared, settings: TrainingSettings):
        self.began = time.perf_counter()
        self.settings = settings
        self.runs = [Run(seed) for seed in settings.seeds]
        self.alive = list(range(len(self.runs)))
        (self.x_train, self.y_train), (self.x_val, self.y_val) = data.train, data.val
        self.weights_C = data.weights_C
        inputs = data.x_ND.shape[1]
        models = [build_model(run.seed, inputs, data.num_classes, settings) for run in self.runs]
        self.pack = Pack(models, settings, data.device, data.x_ND.dtype)
        self.best = {name: tensor.clone() for name, tensor in self.pack.state().items()}
        self.schedulers = [new_scheduler(settings) for _ in self.runs]
        self.orders = [batch_order(run.seed) for run in self.runs]
        self.dropouts = [self.dropout_of(run) for run in self.runs]

    def dropout_of(self, run: Run) -> Iterator[Tensor]:
        """The dropout factors of a run's next steps."""
        batch_size, like = min(self.settings.batch_size, len(self.x_train)), self.pack.parameters["0.bias"]
        steps = len(run.train_loss) * len(batches(self.y_train, self.settings.batch_size))
        return dropout_factors(run.seed, batch_size, self.settings, like, steps)

    def seconds(self) -> float:
        """Seconds since training began, without those between a kill and the command that went on."""
        return time.perf_counter() - self.began

    def train(self, listener: Listener, kept: Unfinished | None = None, name: str = WHOLE_PACK) -> None:
        """Train until every run has stopped. The pack is kept under its name, a half also at its end."""
        arrays = kept.load(name) if kept else None
        if arrays is not None:
            self.restore(arrays)
            log.info(f"An earlier command trained {max(len(run.train_loss) for run in self.runs)} epochs")
        last_kept = time.monotonic()
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
                if kept and self.alive and time.monotonic() - last_kept >= KEEP_SECONDS:
                    keep(kept, name, self.arrays())
                    last_kept = time.monotonic()
            if name != WHOLE_PACK:  # another half follows
                keep(kept, name, self.arrays())
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

    # --- kept on disk

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, BatchNorm statistics and Adam's state of the pack, and each run's best, by name."""
        adam = {
            f"{kind}.{i}": x
            for kind in AdamState._fields
            for i, x in enumerate(getattr(self.pack.adam, kind))
        }
        best = {f"best.{name}": tensor for name, tensor in self.best.items()}
        return self.pack.state() | adam | best

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that the next epochs depend on."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.tensors().items()}
        for r, run in enumerate(self.runs):
            state = self.schedulers[r].state_dict()
            arrays[f"run{r}.plateau"] = np.array(
                [learning_rate_of(self.schedulers[r]), *map(state.get, PLATEAU)]
            )
            arrays[f"run{r}.order"] = self.orders[r].get_state().numpy()
            arrays |= {f"run{r}.{name}": array for name, array in run_arrays(run).items()}
        return arrays | {"alive": np.array(self.alive), "pack_seconds": np.array(self.seconds())}

    @torch.no_grad()
    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` returned."""
        self.alive = arrays["alive"].tolist()
        self.pack.keep(self.alive)
        for name, tensor in self.tensors().items():
            tensor.copy_(torch.from_numpy(arrays[name]))
        for r in range(len(self.runs)):
            prefix = f"run{r}."
            own = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
            rate, *state = own["plateau"].tolist()
            self.schedulers[r].load_state_dict(dict(zip(PLATEAU, state, strict=True)))
            self.schedulers[r].optimizer.param_groups[0]["lr"] = rate
            self.orders[r].set_state(torch.from_numpy(own["order"]))
            self.runs[r] = run_of(own)
        self.dropouts = [self.dropout_of(run) for run in self.runs]
        self.began -= float(arrays["pack_seconds"])

    def best_pack(self) -> Pack:
        """The pack with every run as it was in its best epoch."""
        for name, tensor in self.best.items():
            stacks = self.pack.parameters if name in self.pack.parameters else self.pack.statistics
            stacks[name] = tensor
        return self.pack
