"""Representations that are fitted to training rows: against dense oracles, and what they must not see."""

import dataclasses
import errno
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import sklearn.decomposition
import torch
from builders import collect, lora_columns
from conftest import ROOT
from datasets import Dataset
from running import cell_files, never
from sklearn.kernel_ridge import KernelRidge
from sklearn.preprocessing import KernelCenterer

from ablation import audits, classifiers, fit, fitted_cache, kernels
from ablation.audits import GaugeAudit, NoiseAudit
from ablation.catalogue import CACHED_FITS, REPRESENTATION_GROUPS, SPECS
from ablation.cells import cells_of
from ablation.classifiers import train_kernel_ridge
from ablation.collection import LoraCollection
from ablation.fit import FIT_SEED, Fit
from ablation.fitted import FITTED, FOLDS
from ablation.fitted_cache import fitted_features, path_of
from ablation.reading import WeightReader
from ablation.settings import InputError, Settings
from ablation.splits import Split
from ablation.status import cached_fits
from ablation.task import Listener, Task, TrainingError
from checkpointing import CannotWrite

N = 60


def make_data(seed=0, rank=2, labels=None) -> LoraCollection:
    columns = lora_columns(n=N, rank=rank, seed=seed)
    labels = np.arange(N) % 3 if labels is None else labels
    data = collect(
        Dataset.from_dict(
            {name: w.tolist() for name, w in columns.items()} | {"category_label": labels.tolist()}
        ),
        "x",
    )
    rows = np.random.default_rng(1).permutation(N)
    data.first = data.first._replace(split=Split(rows[:40], rows[40:48], rows[48:], False))
    return data


def computed(name, fit):
    """A fitted representation as a tensor."""
    return FITTED[name](fit).to("cpu")


def fit_of(data, layer_set, **kwargs):
    """The fit of the collection's own split and labels."""
    return Fit(data, data.view(), layer_set, **kwargs)


def modules_of(data, layer_set):
    read = lambda position: data.weights.read_layer(data.layers.names[position], 0, N).numpy()
    return [
        (read(data.layers.modules[i].down), read(data.layers.modules[i].up))
        for i in data.layers.module_positions(layer_set)
    ]


def flat(data, layer_set):
    return np.concatenate(
        [
            data.weights.read_layer(data.layers.names[i], 0, N).numpy().reshape(N, -1)
            for i in data.layers.positions(layer_set)
        ],
        axis=1,
    )


@pytest.fixture(params=["all_layers", "visual_only"])
def layer_set(request):
    return request.param


def test_the_registry_is_the_one_of_the_settings():
    assert list(FITTED) == [*REPRESENTATION_GROUPS["fitted"], "metadata"]


OF_WEIGHTS = REPRESENTATION_GROUPS["fitted"]


def test_metadata_are_centred_and_what_is_not_there_says_nothing_itself():
    data = make_data()
    data.metadata = {
        "num_images": np.arange(N, dtype=float),
        "step_loss": np.where(np.arange(N) % 3 == 0, np.nan, 5.0),
    }
    found, train = computed("metadata", fit_of(data, "no_layers")).numpy(), data.split.train
    assert np.allclose(found[:, 0], np.arange(N) - train.mean()) and np.allclose(found[:, 1], 0)
    assert found[:, 2].tolist() == [1] * N and found[:, 3].tolist() == (np.arange(N) % 3 != 0).tolist()


def test_flat_vec_is_all_weights(layer_set):
    data = make_data()
    assert np.array_equal(computed("flat_vec", fit_of(data, layer_set)).numpy(), flat(data, layer_set))


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_changed_rows_follow_the_rows_and_move_none(name, monkeypatch):
    """What is fitted does not depend on them; a changed row that did not change has its row's features."""
    monkeypatch.setattr(fit, "BLOCK_ROWS", 16)
    monkeypatch.setattr(audits, "BLOCK_ROWS", 16)
    data = make_data()
    noise, gauge = NoiseAudit.of_test_rows(N, data.split.test), GaugeAudit.of_test_rows(N, data.split.test)
    alone, together = (
        computed(name, fit_of(data, "all_layers")),
        computed(name, fit_of(data, "all_layers", audits=(noise, gauge))),
    )
    assert together.shape == (N + len(noise.rows) + N, alone.shape[1])
    assert torch.equal(together[:N], alone)
    slightly = together[N:][noise.positions("1%", data.split.test)] - alone[data.split.test]
    strongly = together[N:][noise.positions("20%", data.split.test)] - alone[data.split.test]
    assert 0 < slightly.abs().mean() < 0.2 * strongly.abs().mean()
    regauged = together[N + len(noise.rows) :]
    invariant = name in ("centroid_cosine", "kernel_pca", "kernel_ridge")
    assert (
        (regauged - alone).abs().max() < 1e-4 * alone.abs().max()
    ) == invariant  # of training rows, too: they keep their folds


def test_the_kernel_is_that_of_the_dense_products(layer_set, monkeypatch):
    monkeypatch.setattr(fit, "BLOCK_ROWS", 16)
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 7)
    data = make_data(rank=3)
    expected = oracles.linear_kernel(modules_of(data, layer_set))[:, data.split.train]
    for tile in (kernels.KERNEL_TILE, 9 * 40 * 7):
        monkeypatch.setattr(kernels, "KERNEL_TILE", tile)
        found = computed("kernel_ridge", fit_of(data, layer_set)).numpy()
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_kernel_of_training_rows_alone():
    """As in a data set of ten rows or fewer."""
    data = make_data()
    rows = np.random.default_rng(2).permutation(N)
    data.first = data.first._replace(split=Split(rows, rows, rows, True))
    expected = oracles.linear_kernel(modules_of(data, "all_layers"))[:, rows]
    found = computed("kernel_ridge", fit_of(data, "all_layers")).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(found[rows], found[rows].T)


def aligned(found, expected):
    """`found` with each column's sign as in `expected`."""
    return found * np.sign((found * expected).sum(0))


@pytest.mark.parametrize("components", [5, 30])
def test_pca_of_few_rows_is_exact(layer_set, components, monkeypatch):
    """40 training rows span fewer directions than are looked at from 20 components on;
    below, what is lost is bounded.
    """
    monkeypatch.setattr(fit, "BLOCK_ROWS", 16)
    data = make_data()
    x, train = flat(data, layer_set), data.split.train
    found = computed("pca", fit_of(data, layer_set, components=components)).numpy()
    exact = sklearn.decomposition.PCA(components, svd_solver="full").fit(x[train])
    assert found.shape == (N, components)
    if components == 30:
        expected = exact.transform(x)
        assert np.abs(aligned(found, expected) - expected).max() < 1e-3 * np.abs(expected).max()
    assert found[train].var(0, ddof=1).sum() > 0.5 * exact.explained_variance_.sum()
    assert (np.diff(found[train].var(0)) <= 1e-6).all() and np.abs(found[train].mean(0)).max() < 1e-4
    largest = found[train][np.abs(found[train]).argmax(0), np.arange(components)]
    assert (largest > 0).all()


def test_pca_finds_what_stands_out_and_needs_three_readings(monkeypatch):
    data = make_data()
    signal = np.random.default_rng(3).normal(size=(N, 3)) * [30, 20, 10]
    reads, real = [], WeightReader.read_on_host

    def read_on_host(self, layer, start, stop, buffer=None):
        reads.append(layer)
        w = real(self, layer, start, stop, buffer)
        directions = torch.from_numpy(
            np.random.default_rng(len(layer) + self.layers.names.index(layer)).normal(size=(3, w[0].numel()))
        )
        return w + (torch.from_numpy(signal[start:stop]) @ directions).view(w.shape).float()

    monkeypatch.setattr(WeightReader, "read_on_host", read_on_host)
    found = computed("pca", fit_of(data, "all_layers", components=4)).numpy()
    assert sorted(reads) == sorted(3 * data.layers.names)
    fit = fit_of(data, "all_layers")
    x = torch.cat([fit.read(position).flatten(1) for position in fit.positions], dim=1).double().numpy()
    expected = sklearn.decomposition.PCA(3, svd_solver="full").fit(x[data.split.train]).transform(x)
    assert np.abs(aligned(found[:, :3], expected) - expected).max() < 0.02 * np.abs(expected).max()


def test_pca_has_no_more_components_than_there_are():
    data = make_data()
    data.first = data.first._replace(split=Split(np.arange(5), np.arange(5, 9), np.arange(9, 20), False))
    found = computed("pca", fit_of(data, "all_layers", components=128))
    assert found.shape == (N, 4) and found.isfinite().all()
    assert computed("kernel_pca", fit_of(data, "all_layers", components=128)).shape == (N, 4)


def test_kernel_pca_is_pca_of_the_dense_products(layer_set):
    data = make_data()
    x = oracles.dense_products(modules_of(data, layer_set))
    found = computed("kernel_pca", fit_of(data, layer_set, components=8)).numpy()
    expected = sklearn.decomposition.PCA(8, svd_solver="full").fit(x[data.split.train]).transform(x)
    assert np.abs(aligned(found, expected) - expected).max() < 1e-3 * np.abs(expected).max()


def test_kernel_ridge_is_ridge_regression_on_the_dense_products(layer_set, monkeypatch):
    monkeypatch.setattr(classifiers, "RIDGE_PENALTIES", (0.1,))
    data = make_data()
    kernel, runs = computed("kernel_ridge", fit_of(data, layer_set)), []
    extra = {"again": kernel[data.split.test[:5]]}
    task = Task(kernel, data.labels, data.split, 3, extra)
    trained = train_kernel_ridge(task, Listener(lambda run, number: runs.append(number)))
    x, train = oracles.dense_products(modules_of(data, layer_set)), data.split.train
    x = x - x[train].mean(0)
    targets = np.eye(3)[data.labels[train]]
    penalty = 0.1 * (x[train] ** 2).sum() / len(train)
    weights = x[train].T @ np.linalg.solve(
        x[train] @ x[train].T + penalty * np.eye(len(train)), targets - targets.mean(0)
    )
    expected = (x @ weights + targets.mean(0)).argmax(1)
    (run,) = trained.runs
    for part in ("train", "val", "test"):
        assert np.array_equal(run.predictions[part], expected[getattr(data.split, part)])
    assert (
        np.array_equal(run.predictions["again"], run.predictions["test"][:5])
        and runs == [1]
        and trained.trained_dim == 40
    )


def test_kernel_ridge_takes_the_penalty_that_the_validation_rows_like():
    data = make_data()
    kernel = computed("kernel_ridge", fit_of(data, "all_layers"))
    alone = []
    with pytest.MonkeyPatch.context() as patch:
        for penalty in sorted(classifiers.RIDGE_PENALTIES, reverse=True):
            patch.setattr(classifiers, "RIDGE_PENALTIES", (penalty,))
            alone.append(
                train_kernel_ridge(Task(kernel, data.labels, data.split, 3), Listener()).runs[0].predictions
            )
    accuracy = [np.mean(one["val"] == data.labels[data.split.val]) for one in alone]
    chosen = train_kernel_ridge(Task(kernel, data.labels, data.split, 3), Listener()).runs[0].predictions
    assert len(set(accuracy)) > 1 and np.array_equal(chosen["test"], alone[int(np.argmax(accuracy))]["test"])


def test_kernel_ridge_with_weights_is_scikit_learns(monkeypatch):
    """Classes of 24, 12 and 4 training rows."""
    data = make_data()
    rows = np.random.default_rng(1).permutation(N)
    labels = np.empty(N, dtype=int)
    labels[rows] = np.repeat([0, 1, 2, 0, 1, 2], [24, 12, 4, 7, 7, 6])
    kernel = computed("kernel_ridge", fit_of(data, "all_layers"))
    own = data.split.train
    centre = KernelCenterer().fit(kernel[own].numpy())
    weights = len(own) / 3 / np.bincount(labels[own])[labels[own]]
    targets = np.eye(3)[labels[own]]
    mean = np.average(targets, axis=0, weights=weights)
    scale = centre.transform(kernel[own].numpy()).trace() / len(own)
    for penalty in (1e-3, 1.0):
        monkeypatch.setattr(classifiers, "RIDGE_PENALTIES", (penalty,))
        task = Task(kernel, labels, data.split, 3, is_weighted=True)
        (trained,) = train_kernel_ridge(task, Listener()).runs
        ridge = KernelRidge(alpha=penalty * scale, kernel="precomputed")
        ridge.fit(centre.transform(kernel[own].numpy()), targets - mean, weights)
        for part in ("train", "val", "test"):
            outputs = ridge.predict(centre.transform(kernel[data.split.rows(part)].numpy())) + mean
            assert np.array_equal(trained.predictions[part], outputs.argmax(1))


def test_a_penalty_below_the_rounding_is_left_out_with_a_line(monkeypatch, caplog):
    monkeypatch.setattr(classifiers.log, "propagate", True)
    data = make_data()
    kernel = computed("kernel_ridge", fit_of(data, "all_layers"))
    monkeypatch.setattr(classifiers, "RIDGE_PENALTIES", (0.1,))
    alone = train_kernel_ridge(Task(kernel, data.labels, data.split, 3), Listener()).runs[0].predictions
    monkeypatch.setattr(classifiers, "RIDGE_PENALTIES", (-1.0, 0.1))
    found = train_kernel_ridge(Task(kernel, data.labels, data.split, 3), Listener()).runs[0].predictions
    assert "the penalty -1 is below the rounding of the kernel: left out" in caplog.text
    assert all(np.array_equal(found[part], alone[part]) for part in alone)


def test_a_kernel_without_room_is_refused_before_it_is_computed(monkeypatch):
    monkeypatch.setattr(kernels, "free_memory", lambda: 8.0 * N * 40)
    monkeypatch.setattr(WeightReader, "read_on_host", never)
    for name in ("kernel_pca", "kernel_ridge"):
        with pytest.raises(TrainingError, match="products of 60 rows with 40 training rows take"):
            FITTED[name](fit_of(make_data(), "all_layers"))


def test_products_that_do_not_differ_are_nothing_to_learn_from():
    data = make_data()
    for kernel in (torch.zeros(N, 40, dtype=torch.float64), torch.full((N, 40), 3.7, dtype=torch.float64)):
        with pytest.raises(TrainingError, match="nothing to learn from"):
            train_kernel_ridge(Task(kernel, data.labels, data.split, 3), Listener())


PEAK = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np, torch
from ablation import fitted
from ablation.collection import View
from ablation.fit import Fit
from ablation.layers import ColumnLayout, Layers
from ablation.splits import Split

names = ["layer_" + letter + ".lora.down.weight" for letter in "abcdefgh"]

class Generated:
    num_rows = 20_000
    layers = Layers(names, {{name: ColumnLayout(name, 1, 1000, "float", True) for name in names}})
    class weights:
        device, noise = "cpu", torch.randn(1024, 1, 1000)
        @classmethod
        def read_on_host(cls, layer, start, stop, buffer=None):
            return cls.noise[:stop - start] * ord(layer[6])

fit = Fit(Generated(), View(None, Split(np.arange(14_000), None, None, False)), "all_layers", 4)
a, b = torch.randn(2, 1000, 1000); a @ b                                  # what the first product takes
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
fitted.pca(fit)
print((peak() - before) / 80e6)
"""


def test_pca_holds_a_block_of_one_layer_at_a_time():
    """Eight layers of 80 MB in twenty blocks: a few blocks, and a few numbers a row."""
    done = subprocess.run([sys.executable, "-c", PEAK.format(root=str(ROOT))], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 0.7, done


# --- the cache


def set_up_cache(monkeypatch, caplog):
    """Errors if something is fitted; the log."""
    monkeypatch.setattr(fitted_cache.log, "propagate", True)
    caplog.set_level("INFO")
    for name in CACHED_FITS:
        monkeypatch.setitem(FITTED, name, never)


def cached_fit(**kwargs):
    """A fit of the same data, labels and split as ever."""
    data = make_data()
    data.files.identity = "weights"
    return fit_of(data, "visual_only", audits=(GaugeAudit.of_test_rows(N, data.split.test),), **kwargs)


@pytest.mark.parametrize("name", CACHED_FITS)
def test_cached_features_are_those_that_were_computed_bit_for_bit(name, tmp_path, monkeypatch, caplog):
    alone = computed(name, cached_fit())
    first = fitted_features(name, cached_fit(), tmp_path)
    with monkeypatch.context() as patch:
        set_up_cache(patch, caplog)
        again = fitted_features(name, cached_fit(), tmp_path)
    assert f"Cached features: {name} of visual_only" in caplog.text
    assert torch.equal(first, alone) and torch.equal(again, alone) and again.dtype == alone.dtype
    path = path_of(name, cached_fit(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr(fitted_cache.log, "propagate", True)
    assert torch.equal(fitted_features(name, cached_fit(), tmp_path), alone)
    assert f"cached features of {name} are not used: its content does not match its hash" in caplog.text
    assert path.read_bytes() == content


def test_a_file_of_another_version_is_computed_again(tmp_path, monkeypatch, caplog):
    fitted_features("pca", cached_fit(), tmp_path)
    monkeypatch.setitem(SPECS, "pca", SPECS["pca"]._replace(version=99))
    set_up_cache(monkeypatch, caplog)
    with pytest.raises(AssertionError, match="must not be called"):
        fitted_features("pca", cached_fit(), tmp_path)
    assert "cached features of pca are not used: made by another version" in caplog.text


def test_kernels_share_their_products(tmp_path, monkeypatch):
    first = fitted_features("kernel_pca", cached_fit(), tmp_path)
    path_of("kernel_pca", cached_fit(), tmp_path).unlink()
    monkeypatch.setattr(kernels, "products_of_rows", never)
    assert torch.equal(fitted_features("kernel_pca", cached_fit(), tmp_path), first)
    assert fitted_features("kernel_ridge", cached_fit(), tmp_path).shape == (2 * N, 40)


def test_whatever_a_fit_sees_and_nothing_else_names_its_file(tmp_path):
    def files(name, of_data=lambda data: None, layer_set="all_layers", **kwargs):
        data = make_data()
        data.files.identity = "weights"
        of_data(data)
        return path_of(name, fit_of(data, layer_set, **kwargs), tmp_path)

    def with_rows(change):
        return lambda data: setattr(data, "first", data.first._replace(split=change(data.split)))

    def relabel(row):
        def change(data):
            labels = data.labels.copy()
            labels[row(data)] = (labels[row(data)] + 1) % 3
            data.labels = labels

        return change

    audits = [kind.of_test_rows(N, np.arange(10)) for kind in (GaugeAudit, NoiseAudit)]
    for name in CACHED_FITS:
        seen = [
            {},
            {"layer_set": "visual_only"},
            {"of_data": lambda data: setattr(data.files, "identity", "others")},
            {"of_data": with_rows(lambda split: split._replace(train=split.train[:-1]))},
            {"of_data": with_rows(lambda split: split._replace(train=split.train[::-1].copy()))},
            *({"audits": (audit,)} for audit in audits),
            {"audits": (GaugeAudit(N, np.arange(9)),)},
        ]
        assert len({files(name, **kwargs) for kwargs in seen}) == len(seen)
        of_components = files(name, components=7) != files(name)
        assert of_components == (name in ("pca", "kernel_pca"))
        of_labels = files(name, relabel(lambda data: data.split.train[0])) != files(name)
        assert of_labels == (name == "centroid_cosine")
        assert files(name, relabel(lambda data: data.split.test)) == files(name)
        assert files(name, with_rows(lambda split: split._replace(test=split.test[1:]))) == files(name)


def test_a_disk_that_takes_no_file_costs_a_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fitted_cache.log, "propagate", True)
    alone = computed("pca", cached_fit())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1.9 * alone.nbytes))
        assert torch.equal(fitted_features("pca", cached_fit(), tmp_path), alone)
    assert "features of pca are not cached: they take 0.0 MB" in caplog.text
    (tmp_path / "file").write_text("")
    assert torch.equal(fitted_features("pca", cached_fit(), tmp_path / "file" / "cache"), alone)
    assert "features of pca are not cached: cannot write" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(fitted_cache, "write_arrays", full_disk)
        assert torch.equal(fitted_features("pca", cached_fit(), tmp_path), alone)
    assert "No space left" in caplog.text and not list(tmp_path.glob("*.safetensors"))


def test_nothing_is_cached_of_files_that_changed_meanwhile(tmp_path):
    fit = cached_fit()
    fit.data.files.paths = [str(tmp_path / "gone")]
    with pytest.raises(InputError, match="changed while they were read"):
        fitted_features("pca", fit, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def full_disk(path, *arguments):
    raise CannotWrite.to(path, OSError(errno.ENOSPC, "No space left on device"))


SETS = ("all_layers", "visual_only")


def test_the_plan_counts_the_files_of_every_fold_and_the_kernel_of_kernel_pca():
    settings = Settings(folds=5, repeats=2)
    found = cached_fits(settings, cells_of(SETS, ("stats", "flat_vec", "kernel_pca"), ("noise",)))
    assert found == {"kernel_pca": 2 * 5 * 2, "kernel_ridge": 2 * 5 * 2}


def test_a_second_command_reads_what_the_first_fitted(run, place):
    chosen = ("--representations", *CACHED_FITS, "--audit", "noise")
    status, log = run(*chosen, "--output-dir", "first")
    # kernel_ridge has its kernel in the file that kernel_pca wrote.
    assert status == 0 and log.count("Cached features: ") == 2 == log.count("Cached features: kernel_ridge")
    names = [path.name.split("-")[0] for path in place.glob(".feature_cache/*/*-*.safetensors")]
    expected = cached_fits(Settings(representations=CACHED_FITS), cells_of(SETS, CACHED_FITS, ("noise",)))
    assert Counter(names) == expected == dict.fromkeys(CACHED_FITS, 2)
    status, log = run(*chosen, "--output-dir", "second")
    assert status == 0 and log.count("Cached features: ") == 2 * len(CACHED_FITS)
    status, log = run(*chosen, "--output-dir", "third", "--no-cache-features")
    assert status == 0 and "Cached features" not in log
    files = [cell_files(place, output=output) for output in ("first", "second", "third")]
    assert len(files[0]) == 2 * 2 * len(CACHED_FITS) and files[0] == files[1] == files[2]


# --- what no row may see


def folds_of(train):
    return np.random.default_rng(FIT_SEED).permutation(len(train)) % FOLDS


def test_centroid_cosines_equal_the_loop_over_rows(layer_set):
    data = make_data()
    found = computed("centroid_cosine", fit_of(data, layer_set)).numpy()
    expected = oracles.centroid_cosines(
        modules_of(data, layer_set), data.labels, data.split.train, folds_of(data.split.train), 3
    )
    assert found.shape == expected.shape == (N, 2 * 3 * len(data.layers.module_positions(layer_set)))
    assert np.abs(found - expected).max() < 1e-5


def with_labels(data, labels):
    return dataclasses.replace(data, labels=labels, views={})


def test_a_training_row_never_sees_its_own_label():
    data = make_data()
    row = data.split.train[7]
    before = computed("centroid_cosine", fit_of(data, "all_layers"))
    labels = data.labels.copy()
    labels[row] = (labels[row] + 1) % 3
    after = computed("centroid_cosine", fit_of(with_labels(data, labels), "all_layers"))
    folds = folds_of(data.split.train)
    of_its_fold = data.split.train[folds == folds[7]]
    others = np.setdiff1d(np.arange(N), of_its_fold)
    assert torch.equal(after[of_its_fold], before[of_its_fold])
    assert ((after - before)[others].abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_no_label_or_weight_of_another_row_than_the_training_rows_is_seen(name):
    data = make_data()
    outside = np.concatenate([data.split.val, data.split.test])
    labels = data.labels.copy()
    labels[outside] = (labels[outside] + 1) % 3
    before = computed(name, fit_of(data, "all_layers"))
    assert torch.equal(computed(name, fit_of(with_labels(data, labels), "all_layers")), before)
    foreign = make_data(seed=9)
    foreign.first = data.first
    real = WeightReader.read_on_host

    def read_on_host(self, layer, start, stop, buffer=None):
        w = real(self, layer, start, stop, buffer)
        w[data.split.test] = 100 * real(foreign.weights, layer, start, stop)[data.split.test]
        return w

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightReader, "read_on_host", read_on_host)
        patch.setattr(
            WeightReader,
            "read_rows",
            lambda self, layer, rows: read_on_host(self, layer, 0, N).flatten(1)[rows],
        )
        after = computed(name, fit_of(data, "all_layers"))
    kept = np.setdiff1d(np.arange(N), data.split.test)
    assert torch.allclose(after[kept], before[kept], rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert not torch.allclose(after[data.split.test], before[data.split.test], rtol=1e-2)


def test_labels_that_mean_nothing_are_not_found_again_in_the_training_rows():
    """Planted leakage: in the centroid of its own class a row's vector would give its label away."""
    rng, ours, leaky = np.random.default_rng(0), [], []
    for seed in range(5):
        data = make_data(seed=seed, labels=rng.integers(0, 3, N))
        train = data.split.train
        unfolded = [np.nan] * len(train)  # unequal to itself: every row meets its own label
        naive = oracles.centroid_cosines(modules_of(data, "visual_only"), data.labels, train, unfolded, 3)
        for found, hits in (
            (computed("centroid_cosine", fit_of(data, "visual_only")).numpy(), ours),
            (naive, leaky),
        ):
            hits.append(np.mean(found.reshape(N, -1, 3).sum(1)[train].argmax(1) == data.labels[train]))
    assert np.mean(leaky) > 0.7
    assert np.mean(ours) < 1 / 3 + 3 * np.sqrt(2 / 9 / (5 * 40))
