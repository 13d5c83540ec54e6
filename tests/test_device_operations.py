"""What the program asks of an accelerator: the same numbers as the host's, by operations that CUDA has.

A tensor of the class `Elsewhere` says that it lies on another device, and computes on the host. Every path
that runs on a device is run on such tensors: its results must be the host's, an operation that mixes tensors
of both places fails, and each operation is recorded. What is recorded must have a CUDA kernel and a row in
docs/gpu.md.
"""

import contextlib
import dataclasses
import functools
import re
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
import torchgen
from builders import collect, lora_dataset
from conftest import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import representations
from ablation import training
from ablation.audits import AUDIT_CLASSES
from ablation.catalogue import CHOICES, SPECS
from ablation.extraction import Request, extract_features
from ablation.fit import Fit
from ablation.fitted import FITTED
from ablation.packed import PackedEpoch
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.streamed import streamed
from ablation.task import Task
from representations import PRODUCT_REPRESENTATIONS, REPRESENTATIONS, LayerBatch, ModuleBatch

PAGE = ROOT / "docs" / "gpu.md"
# Of torch's devices one without a kernel of its own, on which gradients are computed in the calling thread.
DEVICE = "lazy"


# --- a device that records


class Elsewhere(torch.Tensor):
    """A tensor on DEVICE; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, **layout)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside a recording")


class Arguments(TorchFunctionMode):
    """Calls that torch answers before operations are seen: data and indices that come as Python lists."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and "device" in kwargs:
            return torch.tensor(*args, **kwargs | {"device": None}).to(kwargs["device"])
        if function is torch.Tensor.tolist:
            return function(args[0].cpu())
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i, dtype=torch.long) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        return function(*args, **kwargs)


class Recording(TorchDispatchMode):
    """Runs operations on tensors of DEVICE, and keeps their names."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch would import its compiler, which takes seconds

    def __init__(self):
        super().__init__()
        self.operations = {}  # name -> {name with overload}
        self.waits = []  # names of operations that the host waits for
        self.uploads = []  # shapes of tensors that are copied from the host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, Elsewhere)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not there and target != DEVICE:
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        overload = function._schema.overload_name
        self.operations.setdefault(name, set()).add(f"{name}.{overload}".removesuffix("."))
        self.check(function, name, tensors, target)
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
        held = kwargs | ({"device": "cpu"} if target == DEVICE else {})
        found = function(*args, **held)
        if target not in (None, DEVICE):
            return found
        written = [x for x in there if any(x.held is y for y in tree_leaves(found))]
        if written:  # in place: the tensors that were handed in
            return written[0]
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, found)

    def check(self, function, name, tensors, target):
        """Refuse a mixture of places; note what the host waits for and what it sends."""
        here = [x for x in tensors if not isinstance(x, Elsewhere)]
        moves = name in ("_to_copy", "copy_")
        if len(here) < len(tensors) and any(x.ndim for x in here) and not moves and "index" not in name:
            raise RuntimeError(f"{function} of tensors in two places: {[tuple(x.shape) for x in here]}")
        masks = [x for x in tensors if x.dtype == torch.bool and "index" in name]
        if name in ("_local_scalar_dense", "nonzero") or masks or (moves and target == "cpu"):
            self.waits.append(name)
        if here and (moves or "index" in name):
            self.uploads += [tuple(x.shape) for x in here if x.ndim]


class AtOnce:
    """A pool that runs each job in the calling thread, the only one that is recorded."""

    def __init__(self, workers):
        self.workers = workers

    def submit(self, function, *arguments):
        job = Future()
        try:
            job.set_result(function(*arguments))
        except Exception as error:
            job.set_exception(error)
        return job

    def map(self, function, items):
        return [function(item) for item in items]

    def shutdown(self, cancel_futures=False):
        pass


class HostGenerator(torch.Generator):
    """Random numbers of the host, whatever device they are asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextlib.contextmanager
def recording():
    """Run the block with DEVICE there; yields what is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("ablation.") and hasattr(module, "ThreadPoolExecutor"):
                patch.setattr(module, "ThreadPoolExecutor", AtOnce)
        patch.setattr(torch, "Generator", HostGenerator)
        with Arguments(), Recording() as record:
            yield record


# --- the paths, each a function of the device


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def layers_of(shape):
    """Seven matrices, of which one has rank 1 and one is constant."""
    w = drawn(7, *shape)
    w[3] = w[3, :1] * torch.arange(1.0, shape[0] + 1)[:, None]
    w[5] = 0.1
    return w


def describe_layers(shape, device):
    """Each of the nine alone, so that none finds its sums computed by another."""
    w = layers_of(shape).to(device)
    return {name: function(LayerBatch(w)).cpu() for name, function in REPRESENTATIONS.items()}


def describe_modules(shape, device):
    """Each of the product's alone. One module has lost a direction, one is 0."""
    r, inner, outer = shape
    down, up = drawn(7, r, inner), drawn(7, outer, r, seed=1)
    down[2, -1] = down[2, 0]
    up[4] = 0
    return {
        name: function(ModuleBatch(down.to(device), up.to(device))).cpu()
        for name, function in PRODUCT_REPRESENTATIONS.items()
    }


def collection(device):
    """24 rows of 16 layers."""
    return collect(lora_dataset(n=24, signal=0.5), "x", device)


def extract(audit, device):
    """The whole pass over a data set, of the rows as they are or as an audit changes them."""
    data = collection(device)
    names = [name for name in CHOICES if not SPECS[name].fitted]
    widths = {name: SPECS[name].width for name in names}
    changed = AUDIT_CLASSES[audit].of_test_rows(24, np.arange(5)) if audit else None
    found = extract_features(Request(data, widths, audit=changed))
    assert not found.errors
    return found.features


def fit(name, device):
    """A fitted representation of the rows and of changed ones."""
    data = collection(device)
    audits = tuple(kind.of_test_rows(24, data.split.test) for kind in AUDIT_CLASSES.values())
    x = FITTED[name](Fit(data, data.view(), "all_layers", audits=audits))
    return {name: x.to("cpu")}


def task_of(kind):
    """Rows of three classes with 11 columns of which one is constant; some rows are predicted alone."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    x = torch.from_numpy(rng.normal(size=(3, 11))[labels] + 2 * rng.normal(size=(90, 11)))
    x[:, 4] = 1
    rows = rng.permutation(90)
    features = streamed(x) if kind == "streamed" else x
    split = Split(rows[:63], rows[63:72], rows[72:], False)
    return Task(features, labels, split, 3, {"more": x[:9]}, is_weighted=kind == "weighted")


SMALL = TrainingSettings(num_runs=3, hidden_dim=12, batch_size=16, dropout=0.0, patience=2, max_epochs=9)


def train(trainer, kind, device):
    """Runs of which some stop before the others. Dropout differs between devices: all but its shape is left
    out.
    """
    settings = dataclasses.replace(SMALL, trainer=trainer, dropout=0.5 if kind == "dropout" else 0.0)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "on the host":
            patch.setattr(training, "home_of", lambda features, device: "cpu")
        runs = training.train_runs(task_of(kind), settings, device).runs
    found = {}
    for run in runs:
        found |= {f"{run.seed} {part}": torch.from_numpy(x) for part, x in run.predictions.items()}
        found[f"{run.seed} loss"] = torch.tensor(run.train_loss, dtype=torch.float64)
    return found if kind != "dropout" else {name: torch.zeros(x.shape[:0]) for name, x in found.items()}


LAYER_SHAPES = ((1, 320), (1280, 1), (4, 64), (64, 64), (1, 1))
MODULE_SHAPES = ((1, 320, 300), (4, 64, 48), (3, 2, 9))
ON_THE_HOST = ("flat_vec", "metadata")  # fitted representations that ask nothing of a device
TASKS = ("plain", "weighted", "dropout", "on the host", "streamed")
PATHS = {
    **{f"layers {shape}": functools.partial(describe_layers, shape) for shape in LAYER_SHAPES},
    **{f"modules {shape}": functools.partial(describe_modules, shape) for shape in MODULE_SHAPES},
    **{f"extraction, audit {audit}": functools.partial(extract, audit) for audit in (None, *AUDIT_CLASSES)},
    **{f"fit {name}": functools.partial(fit, name) for name in FITTED if name not in ON_THE_HOST},
    **{
        f"{trainer} training, {kind}": functools.partial(train, trainer, kind)
        for trainer in ("sequential", "packed")
        for kind in TASKS
    },
}


@functools.cache
def run_elsewhere(path):
    """What a path gives on DEVICE, and its recording."""
    representations.projection.cache_clear()  # which may lie there already
    with recording() as record:
        return PATHS[path](DEVICE), record


# --- the tests


@pytest.mark.parametrize("path", PATHS)
def test_a_device_gives_the_numbers_of_the_host(path):
    there, record = run_elsewhere(path)
    here = PATHS[path]("cpu")
    assert there.keys() == here.keys() and here
    for name in here:
        assert type(there[name]) is torch.Tensor, name
        torch.testing.assert_close(there[name], here[name], msg=lambda text: f"{path}, {name}: {text}")
    assert record.operations


# --- kernels


# Keys under which the table has a kernel for CUDA, or one that is made of other operations. An entry without
# keys is made of others too, and one with a loop has its kernels generated for CPU and CUDA.
FOR_CUDA = {"CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
FOR_CUDA |= {"CompositeImplicitAutograd"}


@functools.cache
def native_functions():
    """{operation with its overload: its entry} of the table that torch is built from."""
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    entries = (folder / "native_functions.yaml").read_text().split("\n- func: ")[1:]
    return {entry.partition("(")[0]: entry for entry in entries}


def has_cuda_kernel(operation):
    """True if the operation has a kernel for CUDA, or one for all devices, or is made of others."""
    entry = native_functions()[operation]
    delegate = re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE)
    if delegate:
        return has_cuda_kernel(delegate[1])
    _, is_dispatched, table = entry.partition("\n  dispatch:\n")
    keys = set(re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+):", table, re.MULTILINE))))
    return not is_dispatched or "ufunc_inner_loop:" in entry or bool(keys & FOR_CUDA)


@pytest.mark.parametrize("path", PATHS)
def test_every_operation_has_a_cuda_kernel(path):
    _, record = run_elsewhere(path)
    overloads = set().union(*record.operations.values())
    assert {name for name in overloads if not has_cuda_kernel(name)} == set()


def test_what_has_no_kernel_what_is_mixed_and_what_waits_are_found():
    with recording() as record:
        x = torch.rand(3, 4).to(DEVICE)
        torch.histogram(x, 5)
        with pytest.raises(RuntimeError, match="in two places"):
            x + torch.ones(4)
        assert record.waits == [] and record.uploads == [(3, 4)]
        assert (x + 1).sum().item() > 12 and len(x.nonzero()) == 12 and len(x[x > 2]) == 0
        x[x > 2] = 0
        assert x.cpu().shape == (3, 4) and len(x.tolist()) == 3
        assert record.waits == [
            "_local_scalar_dense", "nonzero", "index", "index_put_", "_to_copy", "_to_copy",
        ]  # fmt: skip
        assert x[:, [0, 2]].shape == (3, 2) and record.uploads == [(3, 4), (2,)]
    overloads = set().union(*record.operations.values())
    assert {name for name in overloads if not has_cuda_kernel(name)} == {"histogram.bin_ct"}


# --- steps


@pytest.mark.parametrize("kind", ["plain", "weighted", "dropout"])
@pytest.mark.parametrize("trainer", ["sequential", "packed"])
def test_a_training_step_neither_waits_nor_copies_from_the_host(trainer, kind, monkeypatch):
    steps = []

    def watched(step):
        def run(*arguments):
            before = len(record.waits), len(record.uploads)
            result = step(*arguments)
            steps.append((record.waits[before[0] :], record.uploads[before[1] :]))
            return result

        return run

    monkeypatch.setattr(PackedEpoch, "step", watched(PackedEpoch.step))
    step_of = training.step_of
    monkeypatch.setattr(training, "step_of", lambda *given: watched(step_of(*given)))
    with recording() as record:
        train(trainer, kind, DEVICE)
    assert len(steps) > 9 and all(step == ([], []) for step in steps)
    assert record.waits and record.uploads  # of epochs, and before them


# --- the page


def page_rows():
    """{operation: its row} of the page's table of operations; a row is {heading: cell}."""
    lines = PAGE.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| operations |"))
    headings, found = lines[first].strip("| ").split(" | "), {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")]
        row = dict(zip(headings, cells, strict=True))
        for name in re.findall(r"`(\w+)`", row["operations"]):
            assert name not in found, name
            found[name] = row
    return found


@functools.cache
def all_operations():
    """Names of the operations on any path."""
    return set().union(*(run_elsewhere(path)[1].operations for path in PATHS))


@pytest.mark.parametrize("path", PATHS)
def test_every_operation_stands_on_the_page(path):
    _, record = run_elsewhere(path)
    assert set(record.operations) - set(page_rows()) == set()


def test_every_operation_on_the_page_is_used():
    assert set(page_rows()) - all_operations() == set()


def test_the_page_says_of_every_operation_that_waits_that_it_does():
    waiting = set().union(*(run_elsewhere(path)[1].waits for path in PATHS))
    silent = {name for name, row in page_rows().items() if row["waits"] == "no"}
    assert waiting & silent == set() and {"nonzero", "index", "_to_copy"} < waiting


def test_the_page_says_no_to_no_operation_that_torch_names_as_not_deterministic():
    text = torch.use_deterministic_algorithms.__doc__.lower()
    named = set(re.findall(r":(?:func|class):`torch\.(?:\w+\.)*(\w+)`", text)) | {"nll_loss"}
    assert {"histc", "cumsum", "gather", "index_put", "nllloss"} <= named
    is_named = lambda operation: any(operation.strip("_").startswith(name) for name in named)
    found = {name: row["named"] for name, row in page_rows().items() if is_named(name)}
    assert set(found) == {
        "bmm", "gather", "index_put", "index_put_", "nll_loss_forward", "nll_loss_backward",
    }  # fmt: skip
    assert not [name for name, answer in found.items() if answer.startswith("no")]
