"""Table 2: the two trainers on the device beside each other, and beside a plain loop on the CPU.

Without dropout in float64 the trainers agree to rounding (LOSS_BOUND). The learning rate there is a power of
two: on a GPU the packed trainer keeps its rates in float32, and 1e-3 is not one of its numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ablation import packed, training
from ablation.catalogue import PARTS
from ablation.device_check.board import NOT_HERE, Board, Finding, judged
from ablation.device_check.sizes import CheckSizes
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.task import Run, Task
from ablation.training import prepare, train_runs

LOSS_BOUND = 1e-10  # docs/training.md
OTHER_DEVICE_BOUND = 1e-8  # of the losses of the first COMPARED_EPOCHS
COMPARED_EPOCHS = 5
FIRST_LOSS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}  # relative, of the first epoch's loss
SPREADS = 2.0  # accuracies may differ by so many stds of the seeds
EXACT_RATE = 2.0**-10
BOTH_TRAINERS = ("sequential", "packed")


def blobs(n: int, noise: float, dtype: torch.dtype) -> Task:
    """Three classes that overlap, so that the best epoch is not the last one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    x = rng.normal(size=(3, 10))[labels] + noise * rng.normal(size=(n, 10))
    rows = rng.permutation(n)
    split = Split(rows[: n * 7 // 10], rows[n * 7 // 10 : n * 8 // 10], rows[n * 8 // 10 :], False)
    return Task(torch.from_numpy(x).to(dtype), labels, split, 3)


class TrainingChecks:
    """The checks of one device. What several of them compare is trained once."""

    def __init__(self, device: str, sizes: CheckSizes):
        self.device, self.sizes = device, sizes
        self.exact = TrainingSettings(
            num_runs=3,
            hidden_dim=24,
            batch_size=16,
            max_epochs=sizes.epochs,
            dropout=0.0,
            learning_rate=EXACT_RATE,
        )
        self.usual = TrainingSettings(
            num_runs=sizes.seeds, hidden_dim=64, batch_size=32, max_epochs=min(sizes.epochs, 20)
        )
        self.task64 = blobs(120, 4.0, torch.float64)
        self.task32 = blobs(sizes.blob_rows, 2.0, torch.float32)

    def train(self, task: Task, settings: TrainingSettings, trainer: str, **changes: Any) -> list[Run]:
        """The runs of a task on the device, by one trainer, with some settings changed."""
        chosen = dataclasses.replace(settings, trainer=trainer, **changes)
        return train_runs(task, chosen, self.device).runs

    @cached_property
    def sequential64(self) -> list[Run]:
        """By the sequential trainer in float64 without dropout."""
        return self.train(self.task64, self.exact, "sequential")

    @cached_property
    def packed64(self) -> list[Run]:
        """By the packed trainer in float64 without dropout."""
        return self.train(self.task64, self.exact, "packed")

    @cached_property
    def sequential32(self) -> list[Run]:
        """By the sequential trainer in float32 with dropout."""
        return self.train(self.task32, self.usual, "sequential")

    def runs32(self, trainer: str, precision: str) -> list[Run]:
        """By one trainer in one precision with dropout."""
        if (trainer, precision) == ("sequential", "float32"):
            return self.sequential32
        return self.train(self.task32, self.usual, trainer, precision=precision)

    # --- the checks

    def initial_weights(self) -> Finding:
        """Initial weights of both trainers on the device: bit by bit those that torch draws on the CPU."""
        wrong = []
        dtype, device = self.task32.features.dtype, torch.device(self.device)
        models = [packed.build_model(seed, 10, 3, self.usual) for seed in self.usual.seeds]
        pack = packed.Pack(models, self.usual, device, dtype)
        for number, seed in enumerate(self.usual.seeds):
            expected = plain_model_of(seed, self.usual.hidden_dim, 0.0).state_dict()
            values = iter([w for name, w in expected.items() if name.endswith(("weight", "bias"))])
            own = training.build_model(seed, 10, 3, self.usual).to(device)
            for name, parameter in own.named_parameters():
                truth = next(values)
                in_pack = pack.parameters[name][number].detach().t().cpu()
                if not (torch.equal(parameter.detach().cpu(), truth) and torch.equal(in_pack, truth)):
                    wrong.append(f"seed {seed}, {name}")
        return judged(not wrong, {"found": "; ".join(wrong[:5]) or f"{len(models)} seeds, equal bit by bit"})

    def batch_orders(self) -> Finding:
        """Batch orders of both trainers: bit by bit those of the definition."""
        wrong = []
        for seed in self.usual.seeds:
            orders = [order(seed) for order in (plain_order, training.batch_order, packed.batch_order)]
            for epoch in (1, 2, 3):
                first, *others = (torch.randperm(100, generator=order) for order in orders)
                wrong += [f"seed {seed}, epoch {epoch}" for x in others if not torch.equal(x, first)]
        return judged(not wrong, {"found": "; ".join(wrong[:5]) or "3 epochs of each seed, equal bit by bit"})

    def exact_runs(self, trainer: str) -> list[Run]:
        """By one trainer in float64 without dropout."""
        return self.packed64 if trainer == "packed" else self.sequential64

    def plain_loop(self, trainer: str) -> Finding:
        """Runs in float64 without dropout beside torch's own modules on the CPU."""
        return compared_runs(
            self.exact_runs(trainer), plain_runs(self.task64, self.exact), COMPARED_EPOCHS, OTHER_DEVICE_BOUND
        )

    def trainers_agree(self) -> Finding:
        """The packed trainer beside the sequential one, in float64 without dropout."""
        return compared_runs(self.packed64, self.sequential64)

    def graphs_agree(self) -> Finding:
        """Steps that are replayed as CUDA graphs beside steps that run kernel by kernel."""
        if torch.device(self.device).type != "cuda":
            return Finding(NOT_HERE)
        replayed, graphs, warned = trained_with_graphs(lambda: self.train(self.task64, self.exact, "packed"))
        with recording_by(kernel_by_kernel):
            plain = self.train(self.task64, self.exact, "packed")
        if warned or not graphs:
            return judged(False, {"found": "; ".join(warned[:1]) or "no step was recorded"})
        finding = compared_runs(replayed, plain)
        finding.shown["found"] += f"; {graphs} graphs"
        return finding

    def best_epoch(self, trainer: str) -> Finding:
        """Predictions are those of the best validation epoch: a run of just so many epochs makes them too."""
        runs = self.exact_runs(trainer)
        labels, split, wrong = self.task64.labels, self.task64.split, []
        for run in runs:
            accuracy = float((run.predictions["val"] == labels[split.val]).mean())
            if run.best_epoch != run.val_accuracy.index(max(run.val_accuracy)) + 1:
                wrong.append(f"seed {run.seed}: the best epoch is not {run.best_epoch}")
            if abs(accuracy - max(run.val_accuracy)) > 1e-9:
                wrong.append(f"seed {run.seed}: {accuracy:.3f} is not the best validation accuracy")
            (again,) = self.train(
                self.task64, self.exact, trainer, num_runs=1, seed=run.seed, max_epochs=run.best_epoch
            )
            parts = [
                part for part in PARTS if not np.array_equal(run.predictions[part], again.predictions[part])
            ]
            wrong += [f"seed {run.seed}: predictions of {part}" for part in parts]
        early = sum(run.best_epoch < len(run.val_accuracy) for run in runs)
        if not early:
            wrong.append("every best epoch was the last: nothing is shown")
        return judged(not wrong, {"found": "; ".join(wrong[:5]) or f"{early} of {len(runs)} before the last"})

    def is_repeatable(self, trainer: str) -> Finding:
        """The same runs twice, in float32 with dropout: equal bit by bit."""
        first = self.runs32(trainer, "float32")
        again = self.train(self.task32, self.usual, trainer)
        wrong = [f"seed {a.seed}" for a, b in zip(first, again, strict=True) if not equal_runs(a, b)]
        return judged(not wrong, {"found": "; ".join(wrong) or f"{len(first)} runs, equal bit by bit"})

    def accuracy(self, trainer: str, precision: str) -> Finding:
        """Accuracies, and the first epoch's losses, beside the sequential trainer's in float32."""
        if precision == "tf32" and torch.device(self.device).type != "cuda":
            return Finding(NOT_HERE)
        runs, reference = self.runs32(trainer, precision), self.sequential32
        ours, theirs = (accuracies_on_test(self.task32, each) for each in (runs, reference))
        allowed = SPREADS * max(ours.std(), theirs.std()) + 1 / len(self.task32.split.test)
        first = max(abs(a.train_loss[0] / b.train_loss[0] - 1) for a, b in zip(runs, reference, strict=True))
        difference = float(ours.mean() - theirs.mean())
        shown = {
            "found": f"{100 * ours.mean():.1f} ± {100 * ours.std():.1f} %, {100 * difference:+.1f} points; "
            f"first losses differ by {first:.1e}",
            "bound": f"{100 * allowed:.1f} points; {FIRST_LOSS[precision]:g}",
        }
        is_right = abs(difference) <= allowed and first <= FIRST_LOSS[precision]
        is_reset = torch.get_float32_matmul_precision() == "highest"
        if not is_reset:
            shown["found"] += "; products stay in tf32 after training"
        return judged(is_right and is_reset, shown, accuracies=ours.tolist(), difference=difference)


# --- an oracle: torch's own modules on the CPU


def plain_order(seed: int) -> torch.Generator:
    """The generator of a run's batch orders, from the definition."""
    state = np.random.SeedSequence([seed, *b"batches"]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def plain_model_of(seed: int, hidden: int, dropout: float) -> nn.Sequential:
    """The MLP of ten columns and three classes as torch draws it from a seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs in (10, hidden, hidden):
            layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(hidden, 3))


def plain_runs(task: Task, settings: TrainingSettings) -> list[Run]:
    """The first COMPARED_EPOCHS of each run on the CPU; losses, accuracies and learning rates alone."""
    prepared, runs = prepare(task, "cpu"), []
    (x, y), (x_val, y_val) = prepared.train, prepared.val
    for seed in settings.seeds:
        model = plain_model_of(seed, settings.hidden_dim, 0.0).to(torch.float64)
        adam = torch.optim.Adam(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, mode="max", factor=0.5, patience=10)
        order, run = plain_order(seed), Run(seed)
        for _ in range(min(COMPARED_EPOCHS, settings.max_epochs)):
            model.train()
            total, seen = 0.0, 0
            for batch in torch.randperm(len(y), generator=order).split(settings.batch_size):
                if len(batch) < 2:
                    continue
                adam.zero_grad()
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                adam.step()
                total, seen = total + loss.item() * len(batch), seen + len(batch)
            run.train_loss.append(total / seen)
            run.learning_rate.append(adam.param_groups[0]["lr"])
            model.eval()
            with torch.no_grad():
                run.val_accuracy.append(int((model(x_val).argmax(1) == y_val).sum()) / len(y_val))
            plateau.step(run.val_accuracy[-1])
        runs.append(run)
    return runs


# --- comparing


def compared_runs(ours: list[Run], theirs: list[Run], epochs: int = 0, bound: float = LOSS_BOUND) -> Finding:
    """Runs beside each other: losses to `bound`, all else exactly; of the first `epochs` only, if given."""
    wrong, largest = [], 0.0
    for a, b in zip(ours, theirs, strict=True):
        kept = slice(0, epochs or None)
        for what in ("learning_rate", "val_accuracy"):
            if getattr(a, what)[kept] != getattr(b, what)[kept]:
                wrong.append(f"seed {a.seed}: {what}")
        if not epochs and a.best_epoch != b.best_epoch:
            wrong.append(f"seed {a.seed}: best epochs {a.best_epoch} and {b.best_epoch}")
        losses, others = np.array(a.train_loss[kept]), np.array(b.train_loss[kept])
        if len(losses) != len(others):
            wrong.append(f"seed {a.seed}: {len(losses)} and {len(others)} epochs")
            continue
        largest = max(largest, float(np.abs(losses - others).max()))
        if not epochs:
            parts = [part for part in PARTS if not np.array_equal(a.predictions[part], b.predictions[part])]
            wrong += [f"seed {a.seed}: predictions of {part}" for part in parts]
    shown = {"found": "; ".join([f"losses to {largest:.1e}", *wrong[:5]]), "bound": f"{bound:g}"}
    return judged(largest <= bound and not wrong, shown, loss_difference=largest, differences=wrong)


def equal_runs(a: Run, b: Run) -> bool:
    """True if two runs have the same losses, accuracies and predictions bit by bit."""
    same = a.train_loss == b.train_loss and a.val_accuracy == b.val_accuracy
    return same and all(np.array_equal(a.predictions[part], b.predictions[part]) for part in PARTS)


def accuracies_on_test(task: Task, runs: list[Run]) -> np.ndarray:
    """Test accuracy of each run."""
    truth = task.labels[task.split.test]
    return np.array([(run.predictions["test"] == truth).mean() for run in runs])


Record = Callable[[Callable[[], None], torch.device], Callable[[], None]]


@contextlib.contextmanager
def recording_by(record: Record) -> Iterator[None]:
    """Within this context the packed trainer's steps are recorded by another function."""
    usual = packed.record_graph
    packed.record_graph = record  # type: ignore[assignment]
    try:
        yield
    finally:
        packed.record_graph = usual


def kernel_by_kernel(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The function itself in place of a recorded graph."""
    return function


def trained_with_graphs(train: Callable[[], list[Run]]) -> tuple[list[Run], int, list[str]]:
    """Runs, how many CUDA graphs were recorded, and warnings of steps that could not be recorded."""
    recorded, usual = [], packed.record_graph

    def counting(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
        replay = usual(function, device)
        recorded.append(device)
        return replay

    with recording_by(counting), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runs = train()
    texts = [str(warning.message) for warning in told]
    return runs, len(recorded), [text for text in texts if "not recorded" in text]


def check_training(board: Board, device: str, sizes: CheckSizes) -> None:
    """Add the rows of the table."""
    checks = TrainingChecks(device, sizes)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        board.check("initial weights", checks.initial_weights)
        board.check("batch orders", checks.batch_orders)
        for name in BOTH_TRAINERS:
            plain = functools.partial(checks.plain_loop, name)
            board.check(f"{name}, float64, beside a plain loop on the CPU", plain)
        board.check("packed beside sequential, float64", checks.trainers_agree)
        board.check("CUDA graphs beside none, float64", checks.graphs_agree)
        for name in BOTH_TRAINERS:
            board.check(f"{name}, weights of the best epoch", functools.partial(checks.best_epoch, name))
            board.check(f"{name}, twice, float32", functools.partial(checks.is_repeatable, name))
        for name in BOTH_TRAINERS:
            for precision in FIRST_LOSS:
                accuracy = functools.partial(checks.accuracy, name, precision)
                board.check(f"{name}, {precision}, accuracy", accuracy)
    finally:
        torch.set_float32_matmul_precision(before)
