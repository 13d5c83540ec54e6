"""Both trainers against a plain loop and each other, and what a run must and must not do."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref

import numpy as np
import oracles
import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from ablation import mlp, packed, training
from ablation.catalogue import PARTS
from ablation.packed import Pack, PackedEpoch, Replayed, train_packed
from ablation.settings import InputError, TrainingSettings
from ablation.splits import Split
from ablation.task import Listener, Task, TrainingError
from ablation.training import prepare, resolve_training, standardise, train_sequential
from checkpointing import Unfinished

SILENT = Listener()
SMALL = TrainingSettings(
    num_runs=3, hidden_dim=24, batch_size=16, max_epochs=40, dropout=0.0, trainer="sequential"
)


def problem(n=120, dim=10, classes=3, noise=2.0, seed=0, dtype=torch.float64):
    """Blobs that overlap, so that validation accuracy
    moves for a while and its best epoch is not its last.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = rng.normal(size=(classes, dim))[labels] + noise * rng.normal(size=(n, dim))
    rows = rng.permutation(n)
    split = Split(rows[: n * 7 // 10], rows[n * 7 // 10 : n * 8 // 10], rows[n * 8 // 10 :], False)
    return torch.from_numpy(x).to(dtype), labels, split


def prepared(x, labels, split, classes=3):
    return prepare(Task(x, labels, split, classes), "cpu")


def train_runs(x, labels, split, classes, settings, listener=SILENT, extra=None):
    return training.train_runs(Task(x, labels, split, classes, extra or {}), settings, "cpu", listener)


def patch_everywhere(monkeypatch, name, value):
    """Replace a function in every module of training that uses it."""
    modules = [module for module in (mlp, training, packed) if hasattr(module, name)]
    assert modules
    for module in modules:
        monkeypatch.setattr(module, name, value)


def run_both(settings, **kwargs):
    x, labels, split = problem(**kwargs)
    arguments = (prepared(x, labels, split), settings, SILENT)
    return train_sequential(*arguments), train_packed(*arguments)


def assert_same_runs(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.best_epoch == b.best_epoch
        assert a.learning_rate == b.learning_rate
        assert a.val_accuracy == b.val_accuracy
        assert np.allclose(a.train_loss, b.train_loss, rtol=0, atol=1e-10)
        for part in PARTS:
            assert np.array_equal(a.predictions[part], b.predictions[part])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dropout": 0.5},
        {"dropout": 0.3, "batch_size": 19},
        {"patience": 60, "max_epochs": 80},
        {"weight_decay": 0.1},
        {"learning_rate": 0.03},
        {"batch_size": 21},
        {"num_runs": 1},
        {"seed": 7},
    ],
    ids=str,
)
def test_packed_equals_sequential_in_float64(overrides):
    settings = dataclasses.replace(SMALL, **overrides)
    sequential, packed = run_both(settings)
    assert_same_runs(sequential, packed)
    if overrides.get("patience"):
        assert any(len(set(run.learning_rate)) > 1 for run in packed), (
            "the learning rate was to fall in this test"
        )
    if not overrides:
        assert len({len(run.train_loss) for run in packed}) > 1, (
            "runs were to stop at different epochs in this test"
        )


def test_sequential_equals_a_loop_written_from_the_definition():
    x, labels, split = problem()
    data = prepared(x, labels, split)
    x, y, parts = data.x_ND, data.y_N, data.parts
    runs = train_sequential(data, SMALL, SILENT)
    for run in runs:
        order = mlp.batch_order(run.seed)

        def batches(epoch, order=order):
            permutation = torch.randperm(len(parts["train"]), generator=order)
            return [permutation[i : i + 16] for i in range(0, len(permutation), 16)]

        truth = oracles.train_one_model(x, y, parts["train"], parts["val"], 3, SMALL, run.seed, batches)
        assert np.allclose(run.train_loss, truth["loss"], rtol=0, atol=1e-10)
        assert run.val_accuracy == truth["val_acc"] and run.learning_rate == truth["lr"]
        assert run.best_epoch == truth["best_epoch"]
        for part in PARTS:
            assert np.array_equal(run.predictions[part], truth["predictions"][parts[part]].numpy())


@pytest.mark.parametrize("trainer", [train_sequential, train_packed])
def test_the_best_epoch_is_scored_and_not_the_last(trainer):
    x, labels, split = problem(noise=4.0)
    data = prepared(x, labels, split)
    runs = trainer(data, SMALL, SILENT)
    assert all(run.best_epoch < len(run.val_accuracy) for run in runs), (
        "the best epoch was not to be the last in this test"
    )
    for run in runs:
        epochs = len(run.val_accuracy)
        assert epochs in (run.best_epoch + SMALL.patience, SMALL.max_epochs)
        assert run.val_accuracy.index(max(run.val_accuracy)) == run.best_epoch - 1  # ties: the earliest
        # Trained for just so long, the same seed ends in that very state: train, val and test must be
        # predicted by it.
        shorter = dataclasses.replace(SMALL, num_runs=1, seed=run.seed, max_epochs=run.best_epoch)
        (again,) = trainer(data, shorter, SILENT)
        for part in PARTS:
            assert np.array_equal(run.predictions[part], again.predictions[part])
        accuracy = (run.predictions["val"] == labels[split.val]).mean()
        assert accuracy == pytest.approx(max(run.val_accuracy))


def test_initial_weights_and_batches_do_not_depend_on_the_trainer_or_on_r():
    for r in (1, 4):
        settings = dataclasses.replace(SMALL, num_runs=r)
        models = [mlp.build_model(seed, 10, 3, settings) for seed in settings.seeds]
        pack = Pack(models, settings, torch.device("cpu"), torch.float32)
        torch.manual_seed(42)
        expected = torch.nn.Linear(10, 24)
        assert torch.equal(pack.parameters["0.weight"][0], expected.weight.T)
        assert torch.equal(models[0][0].bias, expected.bias)
    assert not torch.equal(pack.parameters["0.weight"][0], pack.parameters["0.weight"][1])
    first, again = (torch.randperm(50, generator=mlp.batch_order(42)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randperm(50, generator=mlp.batch_order(43)))


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_training_twice_gives_the_same_and_another_seed_does_not(trainer):
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(SMALL, dropout=0.5, trainer=trainer, max_epochs=5)
    state = torch.get_rng_state()
    first = train_runs(x, labels, split, 3, settings).runs
    torch.rand(7)  # the caller's own generator plays no part
    again = train_runs(x, labels, split, 3, settings).runs
    assert [run.train_loss for run in first] == [run.train_loss for run in again]
    other = train_runs(x, labels, split, 3, dataclasses.replace(settings, seed=99)).runs
    assert first[0].train_loss != other[0].train_loss
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    train_runs(x, labels, split, 3, settings)
    assert torch.equal(torch.rand(3), expected)  # nor is it moved


def test_a_packed_run_does_not_depend_on_how_many_run_beside_it():
    x, labels, split = problem()
    settings = dataclasses.replace(SMALL, dropout=0.5, trainer="packed", max_epochs=6)
    three = train_runs(x, labels, split, 3, settings).runs
    one = train_runs(x, labels, split, 3, dataclasses.replace(settings, num_runs=1, seed=44)).runs
    assert np.allclose(three[2].train_loss, one[0].train_loss, rtol=0, atol=1e-10)


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_dropout_comes_from_the_runs_own_seed(trainer, monkeypatch):
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(SMALL, trainer=trainer, dropout=0.5, max_epochs=1)
    real = mlp.build_model
    patch_everywhere(monkeypatch, "build_model", lambda seed, *rest: real(1, *rest))
    patch_everywhere(monkeypatch, "batch_order", lambda seed: torch.Generator().manual_seed(1))
    losses = [run.train_loss[0] for run in train_runs(x, labels, split, 3, settings).runs]
    assert len(set(losses)) == 3
    undropped = [
        run.train_loss[0]
        for run in train_runs(x, labels, split, 3, dataclasses.replace(settings, dropout=0.0)).runs
    ]
    assert max(undropped) - min(undropped) < 1e-5


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_rows_keep_their_places_when_predicted_in_pieces(trainer, monkeypatch):
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(SMALL, trainer=trainer, max_epochs=8)
    whole = train_runs(x, labels, split, 3, settings).runs
    patch_everywhere(monkeypatch, "EVAL_ROWS", 7)
    for ours, theirs in zip(train_runs(x, labels, split, 3, settings).runs, whole, strict=True):
        for part in PARTS:
            assert np.array_equal(ours.predictions[part], theirs.predictions[part])


def test_tf32_is_switched_on_for_the_training_only():
    with mlp.arithmetic("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    with mlp.arithmetic("float32"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


def test_dropout_is_torchs_in_distribution():
    """Against torch.nn.Dropout in the same model:
    the same mean loss over seeds, and not that without dropout.
    """
    x, labels, split = problem(n=240, noise=1.5, dtype=torch.float32)
    settings = dataclasses.replace(SMALL, num_runs=12, dropout=0.5, max_epochs=8, hidden_dim=32)

    def losses(settings):
        return np.array([run.train_loss[-1] for run in train_runs(x, labels, split, 3, settings).runs])

    ours, without = losses(settings), losses(dataclasses.replace(settings, dropout=0.0))
    with pytest.MonkeyPatch.context() as patch:
        real = mlp.build_model

        def build_model(*arguments):
            model = real(*arguments)
            for i, module in enumerate(model):
                if isinstance(module, mlp.Dropout):
                    model[i] = torch.nn.Dropout(0.5)
            return model

        patch_everywhere(patch, "build_model", build_model)
        patch.setattr(training, "step_of", step_by_autograd)
        theirs = losses(settings)
    assert not np.array_equal(ours, theirs)
    assert abs(ours.mean() - theirs.mean()) < 4 * np.hypot(ours.std(ddof=1), theirs.std(ddof=1)) / np.sqrt(12)
    assert without.mean() < ours.mean() - 0.1


def step_by_autograd(model, data, settings):
    return training.autograd_step(model, settings, data.weights_C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "overrides", [{}, {"dropout": 0.5}, {"hidden_dim": 37, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_step_without_autograd_is_that_of_autograd_to_the_bit(monkeypatch, dtype, overrides, is_weighted):
    settings = dataclasses.replace(SMALL, max_epochs=6, **overrides)
    x, labels, split = problem(dtype=dtype)
    task = Task(x, labels, split, 4, is_weighted=is_weighted)  # class 3 has no row
    ours = training.train_runs(task, settings)
    used = []
    monkeypatch.setattr(training, "step_of", lambda *given: used.append(given) or step_by_autograd(*given))
    same_to_the_bit(ours, training.train_runs(task, settings))
    assert len(used) == 3


def test_the_step_without_autograd_leaves_the_same_model():
    """Parameters and BatchNorm's statistics, which predictions on three classes hardly show."""
    settings = dataclasses.replace(SMALL, dropout=0.5)
    x, labels, split = problem(dtype=torch.float32)
    data, models = prepared(x, labels, split), []
    for make in (training.step_of, step_by_autograd):
        model = mlp.build_model(42, 10, 3, settings)
        factors = mlp.dropout_factors(42, 16, settings, next(model.parameters()))
        step = make(model, data, settings)
        for batch in torch.arange(64).split(16):
            step(data.x_ND[batch], data.y_N[batch], next(factors), 1e-3)
        models.append(model.state_dict())
    ours, theirs = models
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "num_batches" not in name)


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_differs_between_runs_layers_and_steps(dropout):
    settings, like = (
        dataclasses.replace(SMALL, dropout=dropout, hidden_dim=201),
        torch.zeros(1, dtype=torch.float64),
    )
    runs = [mlp.dropout_factors(seed, 51, settings, like) for seed in (1, 2)]
    steps = [next(factors) for factors in runs for _ in range(mlp.DROPOUT_STEPS + 2)]
    assert all(step.shape == (3, 51, 201) and step.dtype == torch.float64 for step in steps)
    flat = torch.stack(steps).flatten(2).flatten(0, 1)  # (each layer of each step of each run, B*H)
    assert set(flat.unique().tolist()) == {0.0, 1 / (1 - dropout)}
    draws = flat.numel()
    assert float((flat > 0).double().mean()) == pytest.approx(
        1 - dropout, abs=5 * np.sqrt(dropout * (1 - dropout) / draws)
    )
    agreement = torch.corrcoef(flat).fill_diagonal_(0).abs().max()  # 1 where two are the same
    assert agreement < 6 / np.sqrt(51 * 201)


def test_standardise_uses_the_training_rows_and_drops_what_is_constant_there():
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, size=(30, 600)).astype(np.float32)
    x[:, 7] = 0.1  # constant everywhere
    x[:20, 300] = 4  # constant over the training rows only
    x[:, 301] = 1e-3 * x[:, 301] + 1e4
    out = standardise(torch.from_numpy(x), torch.arange(20)).numpy()
    assert out.shape == (30, 598) and out.dtype == np.float32
    wide = np.delete(x, [7, 300], axis=1).astype(np.float64)
    expected = (wide - wide[:20].mean(0)) / wide[:20].std(0, ddof=0)
    assert np.allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_refuses_what_cannot_be_trained(trainer):
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(SMALL, trainer=trainer)
    with pytest.raises(TrainingError, match="no column varies"):
        train_runs(torch.ones_like(x), labels, split, 3, settings)
    with pytest.raises(TrainingError, match="loss is"):
        train_runs(x, labels, split, 3, dataclasses.replace(settings, learning_rate=1e30))
    one = split._replace(train=split.train[:1])
    with pytest.raises(TrainingError):
        train_runs(x, labels, one, 3, settings)


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_a_last_batch_of_one_row_is_left_out(trainer):
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(
        SMALL, trainer=trainer, batch_size=(len(split.train) - 1) // 1, max_epochs=3
    )
    assert len(split.train) % settings.batch_size == 1
    assert len(train_runs(x, labels, split, 3, settings).runs[0].train_loss) == 3


def test_runs_on_all_cores_give_what_one_core_gives_and_leave_the_threads_as_they_were():
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(SMALL, dropout=0.5, num_runs=4, max_epochs=5)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results[threads] = [run.train_loss for run in train_runs(x, labels, split, 3, settings).runs]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[1] == results[3]


def test_a_run_that_fails_ends_the_others_at_once(monkeypatch):
    x, labels, split = problem(dtype=torch.float32)
    settings = dataclasses.replace(SMALL, num_runs=50, max_epochs=10**6, patience=10**6)

    def interrupt(run, number):
        raise KeyboardInterrupt

    short = dataclasses.replace(settings, max_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train_runs(x, labels, split, 3, short, Listener(on_run=interrupt))
    real = mlp.record_epoch

    def fail_first(run, *arguments):
        if run.seed == 42:
            raise FloatingPointError("only this one")
        return real(run, *arguments)

    patch_everywhere(monkeypatch, "record_epoch", fail_first)
    with pytest.raises(FloatingPointError, match="only this one"):
        train_runs(x, labels, split, 3, settings)  # the others would go on for hours


def test_bfloat16_trains_and_tf32_needs_a_gpu():
    x, labels, split = problem(n=400, noise=0.7, dtype=torch.float32)
    for trainer in ("sequential", "packed"):
        settings = dataclasses.replace(SMALL, precision="bfloat16", trainer=trainer, max_epochs=3)
        run = train_runs(x, labels, split, 3, settings).runs[0]
        full = train_runs(x, labels, split, 3, dataclasses.replace(settings, precision="float32")).runs[0]
        assert run.train_loss != full.train_loss
        assert run.train_loss[0] == pytest.approx(full.train_loss[0], rel=0.05)
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        resolve_training(TrainingSettings(precision="tf32"), "cpu")


def test_auto_is_a_fixed_rule_by_device():
    assert resolve_training(TrainingSettings(), "cpu").trainer == "sequential"
    assert resolve_training(TrainingSettings(precision="tf32"), "cuda:1").trainer == "packed"
    assert resolve_training(TrainingSettings(trainer="packed"), "cpu").trainer == "packed"


def test_callback_hears_of_every_run_in_order():
    x, labels, split = problem(dtype=torch.float32)
    for trainer in ("sequential", "packed"):
        heard = []
        settings = dataclasses.replace(SMALL, trainer=trainer, max_epochs=2)
        result = train_runs(
            x,
            labels,
            split,
            3,
            settings,
            Listener(lambda run, number, heard=heard: heard.append((number, run.seed))),
        )
        assert heard == [(1, 42), (2, 43), (3, 44)]
        assert result.trained_dim == 10 and all(run.seconds > 0 for run in result.runs)


def test_a_training_step_runs_on_a_device_that_is_not_the_cpu(monkeypatch):
    def adam(*lists, lr, **rest):  # torch has no fake kernel for it
        assert {tensor.device.type for tensors in lists for tensor in tensors} | {lr.device.type} == {"meta"}
        calls.append([tensor.shape for tensor in lists[0]] == [tensor.shape for tensor in lists[1]])

    calls = []
    monkeypatch.setattr(mlp, "adam", adam)
    settings = dataclasses.replace(SMALL, dropout=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(30, 10, device="meta")
        y = torch.empty(30, dtype=torch.long, device="meta")
        rows = torch.empty(3, 16, dtype=torch.long, device="meta")
        pack = Pack([mlp.build_model(s, 10, 3, settings) for s in (1, 2, 3)], settings, x.device, x.dtype)
        dropout = torch.empty(3, 3, 16, 24, device="meta")
        epoch = PackedEpoch(pack, x, y)
        epoch.step(rows, dropout)
        assert epoch.total_R.shape == (3,) and epoch.total_R.device.type == "meta"
        assert calls == [True] * 3
        pack.keep([0, 2])
        assert pack.predict(x).shape == (2, 30) and pack.predict(x).device.type == "meta"


def test_features_on_the_host_are_moved_batch_by_batch(monkeypatch):
    """A step, a run's prediction and a pack's with features on one device and all else on another."""
    monkeypatch.setattr(mlp, "adam", lambda *lists, lr, **rest: None)
    settings = dataclasses.replace(SMALL, dropout=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, y = torch.empty(30, 10), torch.empty(30, dtype=torch.long, device="meta")
        rows, dropout = torch.empty(3, 16, dtype=torch.long), torch.empty(3, 3, 16, 24, device="meta")
        pack = Pack([mlp.build_model(s, 10, 3, settings) for s in (1, 2, 3)], settings, y.device, x.dtype)
        epoch = PackedEpoch(pack, x, y)
        assert not epoch.replays()
        epoch.step(rows, dropout)
        assert epoch.total_R.device.type == "meta" and pack.predict(x).device.type == "meta"
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(10, 3))
        assert training.predict(model, x, settings, y.device).device.type == "meta"


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_features_that_a_gpu_has_no_room_for_stay_on_the_host_and_change_no_number(monkeypatch, trainer):
    x, labels, split = problem()
    settings = dataclasses.replace(SMALL, trainer=trainer, dropout=0.5)
    whole = train_runs(x, labels, split, 3, settings).runs
    monkeypatch.setattr(training, "home_of", lambda features, device: "cpu:0")
    assert_same_runs(train_runs(x, labels, split, 3, settings).runs, whole)


def test_where_features_lie_goes_by_the_room_that_their_copies_need(monkeypatch):
    features = torch.zeros(1000, 10)
    # Of which torch has 20,000 for what comes.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30_000)
    for free, home in (
        (training.COPIES * 40_000 - 20_000, "cuda:1"),
        (training.COPIES * 40_000 - 20_001, "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert training.home_of(features, "cuda:1") == home
    assert training.home_of(features, "cpu") == "cpu"


@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_rows_that_are_only_predicted_change_nothing_and_are_standardised_as_the_others(trainer):
    x, labels, split = problem()
    x = 5 + x * torch.linspace(0.1, 10, 10)
    settings = dataclasses.replace(SMALL, trainer=trainer, dropout=0.5)
    alone = train_runs(x, labels, split, 3, settings).runs
    extra = {"the same": x[split.test], "others": 100 * x[split.test], "none": x[:0]}
    together = train_runs(x, labels, split, 3, settings, extra=extra).runs
    assert_same_runs(together, alone)
    for run in together:
        assert np.array_equal(run.predictions["the same"], run.predictions["test"])
        assert not np.array_equal(run.predictions["others"], run.predictions["test"])
        assert run.predictions["none"].shape == (0,)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recorded_steps_train_as_ordinary_ones(monkeypatch, dropout):
    """As on a GPU, but for the recording itself:
    what is replayed reads the places that were filled at the record.
    """

    def record(function, device):
        recorded.append(device)
        return function

    def step(self, *arguments):
        """A graph reads and writes where it did when it was recorded."""

        def places():
            kept = [
                *self.pack.state().values(),
                *(t for part in self.pack.adam for t in part),
                self.rates_R,
                self.total_R,
            ]
            return [tensor.data_ptr() for tensor in (*kept, self.x_train, self.y_train)]

        before = self.__dict__.setdefault("places", places())
        assert places() == before
        real_step(self, *arguments)
        assert places() == before

    recorded, real_step = [], PackedEpoch.step
    monkeypatch.setattr(PackedEpoch, "step", step)
    monkeypatch.setattr(PackedEpoch, "replays", lambda self: True)
    monkeypatch.setattr(packed, "record_graph", record)
    x, labels, split = problem()
    arguments = (
        prepared(x, labels, split),
        dataclasses.replace(SMALL, dropout=dropout, batch_size=19),
        SILENT,
    )
    replayed = train_packed(*arguments)
    monkeypatch.undo()
    assert_same_runs(train_packed(*arguments), replayed)
    assert len(recorded) >= 2 * 2  # two sizes of batch, and again after a run has left


def test_replayed_calls_see_the_arguments_of_each_call():
    seen = []
    replayed = Replayed(lambda x: seen.append(x.clone()), lambda function, device: function)
    for i in range(5):
        argument = torch.full((2,), float(i))
        replayed(argument)
        argument.fill_(-1)
    assert [x.tolist() for x in seen] == [[i, i] for i in (0, 1, 2, 3, 4)]


def test_a_step_that_cannot_be_recorded_still_trains():
    def record(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    seen = []
    replayed = Replayed(lambda x: seen.append(x.clone()), record)
    with pytest.warns(UserWarning, match="runs kernel by kernel: operation not permitted"):
        for i in range(4):
            replayed(torch.full((2,), float(i)))
    assert [x.tolist() for x in seen] == [[i, i] for i in range(4)]
    with pytest.raises(torch.OutOfMemoryError):
        failing = Replayed(
            lambda x: None,
            lambda function, device: (_ for _ in ()).throw(torch.OutOfMemoryError("pretended")),
        )
        for _ in range(3):
            failing(torch.zeros(1))


def test_classes_weigh_alike_in_both_trainers_where_rows_are_weighted():
    x, labels, split = problem()
    labels = np.where((labels == 2) & (np.arange(len(labels)) % 3 > 0), 0, labels)  # class 2 becomes rare
    task = Task(x, labels, split, 4, is_weighted=True)  # class 3 has no row
    counts = np.bincount(labels[split.train], minlength=4)
    weights = task.class_weights
    assert weights[3] == 0 and weights[:3] * counts[:3] == pytest.approx(np.full(3, counts.sum() / 3))
    data = prepare(task, "cpu")
    sequential, packed = train_sequential(data, SMALL, SILENT), train_packed(data, SMALL, SILENT)
    assert_same_runs(sequential, packed)
    plain = train_sequential(prepare(task._replace(is_weighted=False), "cpu"), SMALL, SILENT)
    assert plain[0].train_loss != sequential[0].train_loss


# --- what a kill leaves of a cell


def interrupted(settings, kept, epochs, task):
    """Train, and end as a kill would after so many epochs of all runs together."""
    seen = []

    def on_epoch(run):
        seen.append(run.seed)
        if len(seen) == epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train_runs(task, settings, "cpu", Listener(on_epoch=on_epoch), kept)
    return seen


def same_to_the_bit(ours, theirs):
    for a, b in zip(ours.runs, theirs.runs, strict=True):
        assert (a.seed, a.best_epoch, a.train_loss) == (b.seed, b.best_epoch, b.train_loss)
        assert (a.val_accuracy, a.learning_rate) == (b.val_accuracy, b.learning_rate)
        assert a.predictions.keys() == b.predictions.keys()
        assert all(np.array_equal(a.predictions[rows], b.predictions[rows]) for rows in a.predictions)
    assert ours.trained_dim == theirs.trained_dim


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("epochs", [1, 4, 40, 50])
def test_a_killed_pack_goes_on_with_the_same_numbers(tmp_path, monkeypatch, dropout, epochs):
    settings = dataclasses.replace(
        SMALL, trainer="packed", dropout=dropout, patience=11, max_epochs=40, batch_size=19
    )
    x, labels, split = problem(dtype=torch.float32)
    task = Task(x, labels, split, 3, {"changed": x[:5]})
    whole = training.train_runs(task, settings)
    monkeypatch.setattr(packed, "KEEP_SECONDS", 0.0)
    kept = Unfinished(tmp_path, "cell", {"a": 1})
    ended = [interrupted(settings, kept, epochs, task), interrupted(settings, kept, 5, task)]
    assert epochs < sum(len(run.train_loss) for run in whole.runs)
    trained = []
    again = training.train_runs(task, settings, "cpu", Listener(on_epoch=trained.append), kept)
    same_to_the_bit(again, whole)
    lost = sum(map(len, ended)) + len(trained) - sum(len(run.train_loss) for run in whole.runs)
    assert 0 <= lost <= 2 * 3, "of each kill the epoch at work is lost, of three runs"
    other = Unfinished(tmp_path, "cell", {"a": 2})
    same_to_the_bit(training.train_runs(task, settings, "cpu", SILENT, other), whole)


def test_a_pack_is_kept_now_and_then(tmp_path, monkeypatch):
    saved, real = [], Unfinished.save
    monkeypatch.setattr(Unfinished, "save", lambda self, *what: (saved.append(what[0]), real(self, *what)))
    settings = dataclasses.replace(SMALL, trainer="packed")
    x, labels, split = problem()
    kept = Unfinished(tmp_path, "cell", {})
    training.train_runs(Task(x, labels, split, 3), settings, "cpu", SILENT, kept)
    assert saved == [], "it was over long before the first time"
    monkeypatch.setattr(packed, "KEEP_SECONDS", 0.0)
    runs = training.train_runs(Task(x, labels, split, 3), settings, "cpu", SILENT, kept).runs
    epochs = max(len(run.train_loss) for run in runs)
    assert saved == ["pack"] * (epochs - 1), "after the last one there is nothing to go on with"


def test_finished_runs_of_a_killed_cell_are_used_again(tmp_path):
    settings = dataclasses.replace(SMALL, num_runs=5, dropout=0.5)
    x, labels, split = problem(dtype=torch.float32)
    task = Task(x, labels, split, 3, {"changed": x[:5]})
    whole = training.train_runs(task, settings)
    lengths = [len(run.train_loss) for run in whole.runs]
    kept = Unfinished(tmp_path, "cell", {})
    interrupted(settings, kept, sum(lengths[:3]) + 2, task)
    stored = {path.name for path in kept.folder.glob("run*")}
    assert 2 <= len(stored) <= 4
    trained = []
    again = training.train_runs(task, settings, "cpu", Listener(on_epoch=trained.append), kept)
    same_to_the_bit(again, whole)
    assert {f"run{run.seed}.safetensors" for run in trained} & stored == set()


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 40])
def test_dropout_after_some_steps_is_that_of_a_run_that_took_them(steps):
    settings, like = dataclasses.replace(SMALL, dropout=0.5), torch.zeros(1)
    drawn = mlp.dropout_factors(5, 16, settings, like)
    later = mlp.dropout_factors(5, 16, settings, like, steps)
    for _ in range(steps):
        next(drawn)
    assert all(torch.equal(next(drawn), next(later)) for _ in range(20))


# --- a pack that a device has no room for


ROOMY = dataclasses.replace(SMALL, trainer="packed", num_runs=7, dropout=0.5, batch_size=19, max_epochs=12)


def without_room(monkeypatch, most, after=0):
    """Memory ends in step number `after` + 1 of a pack of more than `most` runs; in its building if it is -1.
    Returns the sizes of the packs that were begun.
    """
    begun, build, step = [], Pack.__init__, PackedEpoch.step

    def refuse():
        raise torch.OutOfMemoryError("pretended")

    def build_or_refuse(self, models, *rest):
        begun.append(len(models))
        self.steps_taken, self.first_size = 0, len(models)
        if after < 0 and len(models) > most:
            refuse()
        build(self, models, *rest)

    def step_or_refuse(self, *given):
        self.pack.steps_taken += 1
        if self.pack.first_size > most and self.pack.steps_taken > after:
            refuse()
        step(self, *given)

    monkeypatch.setattr(Pack, "__init__", build_or_refuse)
    monkeypatch.setattr(PackedEpoch, "step", step_or_refuse)
    return begun


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(packed.log, "propagate", True)
    monkeypatch.setattr(packed.log, "filters", [])
    return caplog


@pytest.mark.parametrize("after", [-1, 0, 3, 40])
def test_a_pack_without_room_is_trained_as_halves_with_the_same_numbers(monkeypatch, logged, after):
    x, labels, split = problem()
    task = Task(x, labels, split, 3, {"changed": x[:5]})
    whole = training.train_runs(task, ROOMY)
    begun, told = without_room(monkeypatch, 2, after), []
    listener = Listener(on_run=lambda run, number: told.append((run.seed, number)))
    halves = training.train_runs(task, ROOMY, "cpu", listener)
    assert begun == [7, 3, 1, 2, 4, 2, 2]
    assert told == [(42 + i, i + 1) for i in range(7)]
    assert_same_runs(halves.runs, whole.runs)
    assert [run.seed for run in halves.runs] == ROOMY.seeds
    for a, b in zip(halves.runs, whole.runs, strict=True):
        assert np.array_equal(a.predictions["changed"], b.predictions["changed"])
    assert warnings_of(logged) == [
        f"out of memory on cpu: the pack of {R} runs is trained as {R // 2} and {R - R // 2}"
        for R in (7, 3, 4)
    ]


def test_one_run_without_room_ends_the_training(monkeypatch, logged):
    begun = without_room(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        training.train_runs(Task(*problem(), 3), ROOMY)
    assert begun == [7, 3, 1]


def test_the_whole_pack_is_gone_before_its_halves_are_built(monkeypatch):
    """Without the collector of cycles: its tensors would take the room that the halves need."""
    without_room(monkeypatch, 4, after=3)
    built, alive, real = [], [], packed.PackedTraining.__init__

    def build(self, *given):
        alive.append(sum(reference() is not None for reference in built))
        real(self, *given)
        built.extend([weakref.ref(self), weakref.ref(self.pack.parameters["0.weight"])])

    monkeypatch.setattr(packed.PackedTraining, "__init__", build)
    monkeypatch.setattr(PackedEpoch, "replays", lambda self: True)
    monkeypatch.setattr(packed, "record_graph", lambda function, device: function)
    gc.disable()
    try:
        training.train_runs(Task(*problem(), 3), ROOMY)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("epochs", [1, 2, 8, 25, 40, 70])
def test_a_killed_half_goes_on_with_the_same_numbers(tmp_path, monkeypatch, epochs):
    x, labels, split = problem(dtype=torch.float32)
    task = Task(x, labels, split, 3, {"changed": x[:5]})
    settings = dataclasses.replace(ROOMY, patience=11)
    begun = without_room(monkeypatch, 4, after=6)
    whole = training.train_runs(task, settings)
    assert begun == [7, 3, 4]
    monkeypatch.setattr(packed, "KEEP_SECONDS", 0.0)
    kept, trained = Unfinished(tmp_path, "cell", {"a": 1}), []
    ended = [interrupted(settings, kept, epochs, task), interrupted(settings, kept, 3, task)]
    begun.clear()
    again = training.train_runs(task, settings, "cpu", Listener(on_epoch=trained.append), kept)
    same_to_the_bit(again, whole)
    names = {path.stem for path in kept.folder.iterdir()}
    assert names == {"pack", "pack42-44", "pack45-48"} and kept.names_in("pack") == {packed.HALVED}
    if epochs > 7:  # the whole pack, which has no room, was given up before the kill
        assert begun == [3, 4]
        lost = sum(map(len, ended)) + len(trained) - sum(len(run.train_loss) for run in whole.runs)
        assert lost <= 7 + 2 * 4, "the epoch of the whole pack, and of each kill the epoch at work"


# --- the precision of products outside training


def test_the_environment_does_not_make_float32_products_less_exact(tmp_path):
    """Pca and the kernels multiply in float32 before the MLP is trained."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; assert torch.get_float32_matmul_precision() == 'high'\n"
        "import visual_ablation_experiment as experiment\n"
        "from ablation import features; seen = []\n"
        "real = features.load_or_extract\n"
        "def spy(*given):\n"
        "    seen.append(torch.get_float32_matmul_precision()); return real(*given)\n"
        "features.load_or_extract = spy\n"
        "flags = ['--dataset', 'sanity-check', '--representations', 'pca', '--no-report']\n"
        "flags += ['--num-runs', '1', '--max-epochs', '1', '--hidden-dim', '4']\n"
        "assert experiment.main(flags) == 0\n"
        "assert [*seen, torch.get_float32_matmul_precision()] == ['highest'] * 2, seen\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
