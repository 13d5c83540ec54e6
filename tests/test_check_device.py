"""The check of a device: its oracles, that it passes on the CPU, and that it names what is broken."""

import json
import subprocess
import sys
import types
from functools import cached_property

import check_device
import numpy as np
import oracles
import pytest
import sklearn.decomposition
import torch
from conftest import ROOT

import representations
from ablation import fitted, kernels, packed, training
from ablation.catalogue import SPECS
from ablation.device_check import board as boards
from ablation.device_check import described, limits, run, speed_rows, stand_ins, training_rows
from ablation.device_check.board import FAILED, MEASURED, NO_ROOM, NOT_HERE, NOT_RUN, RIGHT, Board, Finding
from ablation.device_check.fitted_rows import check_fitted, generated_fit
from ablation.device_check.oracles import (
    LAYER_ORACLES,
    MODULE_ORACLES,
    true_centroid_cosines,
    true_products,
    true_score_products,
)
from ablation.device_check.sizes import QUICK, TIMED_ROWS, CheckSizes, sizes_for

TINY = CheckSizes(
    rows=8,
    large_rows=2,
    shapes=((1, 1), (3, 7), (4, 320)),
    layers=((1, 640),),
    small_modules=((3, 2, 9), (2, 24, 16)),
    modules=((1, 64, 48),),
    many=200,
    blob_rows=200,
    seeds=3,
    epochs=12,
    program_rows=40,
    program_runs=1,
    program_epochs=2,
    timed_rows=(60, 130),
    timed_layers=8,
    timed_runs=1,
    timed_epochs=2,
    seconds=0.02,
)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """Times that mean nothing, soon measured."""
    from ablation.benchmark import timing

    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.001)
    monkeypatch.setattr(timing, "GEMM_SIDE", 64)
    monkeypatch.setitem(limits.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(limits, "UPLOAD_BYTES", 2**18)


def verdicts(board):
    return {name: found.verdict for table in board.tables for name, found in table.rows}


def failing(board):
    return {name for name, verdict in verdicts(board).items() if verdict == FAILED}


# --- the oracles beside those of the tests


@pytest.mark.parametrize("kind", described.MATRIX_KINDS)
@pytest.mark.parametrize("name", LAYER_ORACLES)
def test_oracles_of_layers_are_the_tests_own(name, kind):
    for shape in [(1, 1), (3, 7), (16, 4), (1, 50)]:
        for w in described.drawn_matrices(kind, 3, *shape).astype(np.float64):
            ours, theirs = LAYER_ORACLES[name](w), getattr(oracles, name)(w)
            scale = 1e-12 * np.abs(theirs).max()
            gaps = described.deviation("", name, np.array([ours]), np.array([theirs]))
            assert np.allclose(ours, theirs, rtol=1e-9, atol=scale) or gaps.of_allowed <= 1


@pytest.mark.parametrize("kind", described.MODULE_KINDS)
@pytest.mark.parametrize("name", MODULE_ORACLES)
def test_oracles_of_modules_are_the_tests_own(name, kind):
    if (name, kind) == ("product_directions", "less than its rank"):
        return  # directions beyond the rank are rounding
    for shape in [(2, 24, 16), (3, 2, 9), (4, 30, 20)]:
        for down, up in zip(*described.drawn_modules(kind, 3, *shape), strict=True):
            down, up = down.astype(np.float64), up.astype(np.float64)
            ours, theirs = MODULE_ORACLES[name](down, up), getattr(oracles, name)(down, up)
            gaps = described.deviation("", name, np.array([ours]), np.array([theirs]))
            assert np.allclose(ours, theirs, rtol=1e-7, atol=1e-9) or gaps.of_allowed <= 1


def test_oracles_of_fitted_representations_are_the_tests_own():
    fit, modules = generated_fit("cpu", 10)
    train, labels = fit.view.split.train, fit.view.labels
    dense = true_products(modules)
    assert np.allclose(dense @ dense.T, oracles.linear_kernel(modules))
    folds = np.random.default_rng(fitted.FIT_SEED).permutation(len(train)) % fitted.FOLDS
    expected = oracles.centroid_cosines(modules, labels, train, folds, 3)
    assert np.allclose(true_centroid_cosines(modules, labels, train, 3), expected, atol=1e-9)
    scores = sklearn.decomposition.PCA(10, svd_solver="full").fit(dense[train]).transform(dense)
    assert np.allclose(true_score_products(dense, train, 10), scores @ scores.T, atol=1e-6 * dense.var())


# --- a device that is right


def test_everything_but_the_program_passes_on_the_cpu(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    arguments = ["--device", "cpu", "--skip-program", "--output-dir", str(folder)]
    assert check_device.main(arguments, TINY) == 0
    printed = capsys.readouterr().out
    assert "Nothing failed." in printed and f"send {folder / 'device_check.json'}" in printed
    found = json.loads((folder / "device_check.json").read_text())
    assert found["finished"]
    tables = {table["title"][:1]: table["rows"] for table in found["tables"]}
    assert list(tables) == ["1", "2", "3", "4"] and found["failures"] == []
    names = [row["check"] for row in tables["1"]]
    assert names == [name for name, spec in SPECS.items() if not spec.control or spec.fitted]
    assert {row["verdict"] for row in tables["1"]} == {RIGHT}
    assert {row["verdict"] for row in tables["2"]} == {RIGHT, NOT_HERE}
    assert [row["verdict"] for row in tables["3"]] == ["left out"]
    assert {row["verdict"] for row in tables["4"]} == {MEASURED}
    assert found["machine"]["torch"] == torch.__version__ and "driver" in found["machine"]
    page = (folder / "device_check.md").read_text()
    for table in found["tables"]:
        assert f"## {table['title']}\n" in page and f"## {table['title']}\n" in printed
        assert all(f"| {row['check']} | {row['verdict']} |" in page for row in table["rows"])


@pytest.mark.slow
def test_the_program_passes_on_the_cpu(tmp_path):
    from ablation.device_check.program_rows import check_program

    board = Board()
    board.open("program", "found")
    check_program(board, "cpu", TINY, tmp_path)
    assert list(verdicts(board).values()) == [RIGHT] * 3 + [NOT_HERE] * 2, board.values()


def test_bad_input_is_an_error_line_and_status_2(tmp_path, capsys):
    for words, message in [
        (["--device", "cpu", "--rows", "99"], "--rows 99 is out of range: use a value from 100 to"),
        (["--device", "gpu"], "unknown --device 'gpu'"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
    ]:
        assert check_device.main([*words, "--output-dir", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    (tmp_path / "file").touch()
    assert check_device.main(["--device", "cpu", "--output-dir", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (RuntimeError("as wanted"), None)])
def test_a_check_that_is_broken_off_does_not_say_that_nothing_failed(
    tmp_path, capsys, monkeypatch, error, status
):
    def end(*sizes):
        raise error

    monkeypatch.setattr(run, "check_described", end)
    arguments = ["--device", "cpu", "--output-dir", str(tmp_path)]
    if status is None:
        with pytest.raises(RuntimeError, match="as wanted"):
            check_device.main(arguments, TINY)
    else:
        assert check_device.main(arguments, TINY) == status
        assert capsys.readouterr().err.startswith("Stopped: ")
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert not found["finished"] and found["tables"] == []
    page = (tmp_path / "device_check.md").read_text()
    assert page.endswith("\nNot finished: the check still runs, or it was broken off.\n")


def test_sizes():
    assert sizes_for(10_000, False).timed_rows == (1_000, 10_000)
    assert sizes_for(500, False).timed_rows == (500,)
    assert sizes_for(20_000, False).timed_rows == (1_000, 10_000, 20_000)
    assert sizes_for(10**6, False).timed_rows == (*TIMED_ROWS, 10**6)
    assert sizes_for(10**6, True) == QUICK and QUICK.timed_rows == (1_000,)


# --- packages that are not installed

HIDDEN = """
import importlib.machinery, sys
from dataclasses import replace

hidden = ("datasets", "pyarrow", "xxhash", "sklearn", "scipy")
usual = importlib.machinery.PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in hidden else usual(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
import check_device
from ablation.benchmark import timing
from ablation.device_check.sizes import QUICK

timing.LEAST_SECONDS = 0.001

sizes = replace(QUICK, rows=4, shapes=((3, 7),), layers=(), small_modules=((2, 24, 16),), modules=(), many=50,
                seeds=2, epochs=8, timed_rows=(40,), timed_layers=8, timed_runs=1, seconds=0.01)
sys.exit(check_device.main(sys.argv[1:], sizes))
"""


def test_without_datasets_all_but_the_program_runs(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", HIDDEN, "--device", "cpu", "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT / "scripts",
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "device_check.json").read_text())
    assert len(found["tables"]) == 4 and found["failures"] == [] and len(found["not_run"]) == 2
    assert "kernel_pca: not run" in found["not_run"][0]  # scikit-learn computes it
    end = ["Nothing failed.", "", "Not run, because a package is not installed:", ""]
    end = "\n".join([*end, *(f"- {line}" for line in found["not_run"]), ""])
    assert end in ended.stdout and (tmp_path / "device_check.md").read_text().endswith(end)
    (program,) = found["tables"][2]["rows"]
    assert program["verdict"] == NOT_RUN
    assert program["shown"]["found"] == "datasets, pyarrow, xxhash, sklearn, scipy not installed"
    assert all(row["verdict"] == MEASURED for row in found["tables"][3]["rows"])


def test_a_stand_in_serves_imports_alone():
    with stand_ins.stand_ins(("no_such_package",)):
        from no_such_package.inner import Something

        Something()
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed"):
        Something()
    with pytest.raises(ModuleNotFoundError):
        import no_such_package  # noqa: F401
    assert not stand_ins.missing_packages()


# --- representations that are broken on purpose


def described_board(device="cpu"):
    board = Board()
    board.open("numbers", *run.NUMBER_HEADINGS)
    described.check_described(board, device, TINY)
    return board


def shifted_percentiles(monkeypatch):
    usual = representations.percentiles_of
    shifted = lambda x, percents: usual(x, tuple(min(p + 0.01, 100) for p in percents))
    monkeypatch.setattr(representations, "percentiles_of", shifted)


def sums_in_float32(monkeypatch):
    def central_sums(self):
        d = self.x - self.x.mean(1)[:, None]
        return tuple(part.sum(1).double() for part in (d.abs(), d**2, d**3, d**4))

    broken = cached_property(central_sums)
    broken.__set_name__(representations.LayerBatch, "central_sums")
    monkeypatch.setattr(representations.LayerBatch, "central_sums", broken)


def gram_in_float32(monkeypatch):
    def singular_values(self):
        wide = self.w if self.w.shape[1] <= self.w.shape[2] else self.w.mT
        return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min(0).sqrt().flip(1).double()

    broken = cached_property(singular_values)
    broken.__set_name__(representations.LayerBatch, "singular_values")
    monkeypatch.setattr(representations.LayerBatch, "singular_values", broken)


def swapped_columns(monkeypatch):
    order = [0, 1, 2, 4, 3, 5, 6]
    monkeypatch.setitem(
        representations.REPRESENTATIONS, "stats", lambda layer: representations.stats(layer)[:, order]
    )


def wrong_in_one_row(monkeypatch):
    def last_row_of_the_first(layer):
        return representations.matrix_norms(layer)[[0, *range(len(layer.w) - 1)]]

    monkeypatch.setitem(representations.REPRESENTATIONS, "matrix_norms", last_row_of_the_first)


def not_a_number(monkeypatch):
    monkeypatch.setitem(
        representations.REPRESENTATIONS,
        "info_theoretic",
        lambda layer: layer.x[:, :1].expand(-1, 2) * torch.nan,
    )


def wrong_sign(monkeypatch):
    usual = representations.product_directions
    monkeypatch.setitem(
        representations.PRODUCT_REPRESENTATIONS, "product_directions", lambda m: usual(m).abs()
    )


def other_projections(monkeypatch):
    usual = representations.projection
    other = lambda count, size, side, device: usual(count, size, side, device).flip(0)
    monkeypatch.setattr(representations, "projection", other)


@pytest.mark.parametrize(
    "break_it, names",
    [
        (shifted_percentiles, {"rank_based", "distribution", "ensemble", "product_quantiles"}),
        (sums_in_float32, {"simple_stats", "stats", "distribution", "ensemble"}),
        (gram_in_float32, {"spectral", "ensemble"}),
        (swapped_columns, {"stats"}),
        (wrong_in_one_row, {"matrix_norms"}),
        (not_a_number, {"info_theoretic"}),
        (wrong_sign, {"product_directions"}),
        (other_projections, {"product_sketch", "product_directions"}),
    ],
)
def test_a_broken_representation_is_named(monkeypatch, break_it, names):
    break_it(monkeypatch)
    board = described_board()
    assert names <= failing(board) and "norms" not in failing(board)
    assert failing(board) <= names | {"matrix_norms", "frequency"}
    assert all(any(name in line for line in board.named(FAILED)) for name in names)


def test_an_exception_is_a_row_and_the_other_cases_go_on(monkeypatch, capsys):
    usual = representations.frequency

    def fails(layer):
        if layer.w.shape[1:] == (3, 7):
            raise RuntimeError("no such kernel")
        return usual(layer)

    monkeypatch.setitem(representations.REPRESENTATIONS, "frequency", fails)
    board = described_board()
    rows = dict(board.tables[0].rows)
    assert rows["frequency"].shown["error"] == "RuntimeError: no such kernel"
    assert "normal 3 x 7" in rows["frequency"].shown["failing"]
    assert failing(board) == {"frequency"} and "no such kernel" in capsys.readouterr().err


def test_a_case_that_cannot_be_computed_is_a_row(monkeypatch):
    monkeypatch.setattr(described, "describe_module", lambda *rest: {}["a fault"])
    board = described_board()
    module_rows = {name for name in failing(board) if name.startswith("representations of ")}
    count = len(list(described.module_cases(TINY))) + 1
    assert len(module_rows) == count and failing(board) - module_rows == set(MODULE_ORACLES)


def test_numbers_on_another_device_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *arguments, **named: self)
    with pytest.raises(RuntimeError, match="the numbers are not on cuda:0"):
        described.described_on("cuda:0", ["stats"], described.drawn_matrices("normal", 2, 3, 4))


@pytest.mark.parametrize("name", ["pca", "centroid_cosine", "kernel_pca", "kernel_ridge", "metadata"])
def test_a_broken_fitted_representation_is_named(monkeypatch, name):
    usual = fitted.FITTED[name]
    monkeypatch.setitem(fitted.FITTED, name, lambda fit: usual(fit) * (1 + 1e-4))
    board = Board()
    board.open("fitted", *run.NUMBER_HEADINGS)
    check_fitted(board, "cpu")
    assert failing(board) == {name}


def test_products_of_less_than_float32_are_found(monkeypatch):
    def in_tf32(*factors):
        """Ten bits of the mantissa, as TF32 keeps them."""
        cut = lambda x: (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
        first, second = (cut(a.contiguous()) @ cut(b.contiguous()).mT for a, b in factors)
        return first * second

    monkeypatch.setattr(kernels, "product_of_inner", in_tf32)
    board = Board()
    board.open("fitted", *run.NUMBER_HEADINGS)
    check_fitted(board, "cpu")
    assert failing(board) == {"kernel_pca", "kernel_ridge"}


# --- trainers that are broken on purpose


def trained_board(monkeypatch):
    board = Board()
    board.open("training", "found", "bound")
    monkeypatch.setattr(training_rows, "FIRST_LOSS", {"float32": 1e-4})
    training_rows.check_training(board, "cpu", TINY)
    return board


def another_order(monkeypatch):
    monkeypatch.setattr(packed, "batch_order", lambda seed: torch.Generator().manual_seed(seed))


def another_rate(monkeypatch):
    usual = packed.learning_rate_of
    monkeypatch.setattr(packed, "learning_rate_of", lambda scheduler: 1.01 * usual(scheduler))


def other_weights(monkeypatch):
    usual = packed.build_model
    monkeypatch.setattr(packed, "build_model", lambda seed, *rest: usual(seed + 1, *rest))


def first_weights_kept(module):
    def break_it(monkeypatch):
        usual = module.record_epoch
        only_first = lambda run, *rest: usual(run, *rest) and len(run.train_loss) == 1
        monkeypatch.setattr(module, "record_epoch", only_first)

    return break_it


def dropout_of_no_seed(monkeypatch):
    usual, calls = packed.dropout_factors, iter(range(10**6))
    monkeypatch.setattr(packed, "dropout_factors", lambda seed, *rest: usual(next(calls), *rest))


def labels_of_others(monkeypatch):
    usual = training.prepare

    def prepare(task, device):
        prepared = usual(task, device)
        return prepared._replace(y_N=prepared.y_N.roll(1))

    monkeypatch.setattr(training, "prepare", prepare)


@pytest.mark.parametrize(
    "break_it, names",
    [
        (another_order, {"batch orders", "packed beside sequential, float64"}),
        (
            another_rate,
            {"packed, float64, beside a plain loop on the CPU", "packed beside sequential, float64"},
        ),
        (other_weights, {"initial weights", "packed beside sequential, float64"}),
        (first_weights_kept(packed), {"packed, weights of the best epoch"}),
        (first_weights_kept(training), {"sequential, weights of the best epoch"}),
        (dropout_of_no_seed, {"packed, twice, float32"}),
        (labels_of_others, {"sequential, float64, beside a plain loop on the CPU"}),
    ],
    ids=["order", "rate", "weights", "best of packed", "best of sequential", "dropout", "labels"],
)
def test_a_broken_trainer_is_named(monkeypatch, break_it, names):
    break_it(monkeypatch)
    assert names <= failing(trained_board(monkeypatch))


def test_graphs_are_compared_where_steps_are_replayed(monkeypatch):
    """On the CPU, with a function in place of a graph."""
    checks = training_rows.TrainingChecks("cuda", TINY)
    real = training.train_runs
    monkeypatch.setattr(
        training_rows, "train_runs", lambda task, settings, device: real(task, settings, "cpu")
    )
    monkeypatch.setattr(packed.PackedEpoch, "replays", lambda self: True)
    monkeypatch.setattr(packed, "record_graph", lambda function, device: function)
    assert checks.graphs_agree().verdict == RIGHT

    def records_another(function, device):
        calls = iter(range(10**6))
        return lambda: function() if next(calls) % 5 else None  # every fifth replay does nothing

    monkeypatch.setattr(packed, "record_graph", records_another)
    assert checks.graphs_agree().verdict == FAILED

    def fails(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(packed, "record_graph", fails)
    finding = checks.graphs_agree()
    assert finding.verdict == FAILED and "not permitted" in finding.shown["found"]
    monkeypatch.setattr(packed.PackedEpoch, "replays", lambda self: False)
    assert checks.graphs_agree().shown["found"] == "no step was recorded"


# --- the program


def programs(tmp_path, device="cuda"):
    from ablation.device_check.program_rows import Programs

    return Programs(tmp_path, device, TINY)


def result(tmp_path, status=0, text="", accuracies=(0.5, 0.6)):
    from ablation.device_check.program_rows import Result

    folder = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    (folder / "checkpoints").mkdir(parents=True)
    record = {"test_acc_all_runs": list(accuracies), "training_time_mean": len(text)}
    (folder / "checkpoints" / "all_layers_ensemble.json").write_text(json.dumps(record))
    return Result(status, text, 1.0, folder, folder)


def test_a_difference_from_the_run_without_a_break_is_named(tmp_path, monkeypatch):
    from ablation.device_check import program_rows

    monkeypatch.setattr(program_rows, "TABLE_CELLS", 1)
    ours = programs(tmp_path)
    assert ours.beside_whole(result(tmp_path), "").verdict == FAILED  # nothing to compare with
    ours.whole = result(tmp_path)
    assert ours.beside_whole(result(tmp_path, text="slower"), "").verdict == RIGHT
    assert ours.beside_whole(result(tmp_path, status=1), "").verdict == FAILED
    finding = ours.beside_whole(result(tmp_path, accuracies=(0.5, 0.61)), "")
    assert finding.verdict == FAILED and "all_layers_ensemble.json" in finding.shown["different"]


def test_a_pack_is_tried_with_less_and_less_memory(tmp_path, monkeypatch):
    from ablation.device_check.program_rows import LIMITS, PEAK_LINE

    ours, shares = programs(tmp_path), []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=1000)
    )
    told = "out of memory on cuda:0: 5 runs at once in place of 10"

    def run(name, data, flags, share=None):
        assert "--device" in flags and "cuda:0" in flags
        shares.append(share)
        text = {0.0: f"{PEAK_LINE}400", LIMITS[1] * 400 / 1000: told}.get(share, "")
        return result(tmp_path, text=text, accuracies=accuracies if text == told else (0.5, 0.6))

    monkeypatch.setattr(ours, "run", run)
    accuracies = (0.52, 0.59)
    assert ours.pack_shrinks().verdict == RIGHT
    assert shares == [0.0, *(limit * 400 / 1000 for limit in LIMITS[:2])]
    accuracies = (0.9, 0.91)
    assert ours.pack_shrinks().verdict == FAILED
    told = "nothing of the kind"
    with pytest.raises(RuntimeError, match="no run ended well with the line"):
        ours.pack_shrinks()


def test_large_layers_are_a_collection_of_two_kinds(tmp_path):
    import datasets

    from ablation.device_check.program_rows import write_large_layers

    write_large_layers(tmp_path / "large", TINY)
    found = datasets.load_from_disk(str(tmp_path / "large"))
    assert len(found) == TINY.memory_rows and len(found.column_names) == 5
    assert np.shape(
        found[0]["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight"]
    ) == (1280, TINY.memory_rank)


# --- speed


def speed_board():
    board = Board()
    board.open("speed", *speed_rows.SPEED_HEADINGS)
    speed_rows.check_speed(board, "cpu", TINY)
    return board


def test_what_does_not_fit_is_a_row_and_no_failure(monkeypatch):
    usual = speed_rows.train_runs

    def train_runs(task, *rest):
        if len(task.labels) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return usual(task, *rest)

    monkeypatch.setattr(speed_rows, "train_runs", train_runs)
    board = speed_board()
    found = verdicts(board)
    assert found["130 rows: 18 cells x 1 runs"] == NO_ROOM and found["60 rows: 18 cells x 1 runs"] == MEASURED
    assert board.named(FAILED) == []
    (hours,) = (f for name, f in board.tables[0].rows if name.startswith("50,000"))
    assert hours.figures["from_rows"] == 60


def test_hours_are_in_proportion_to_the_largest_size_that_was_measured():
    small = speed_rows.Spent(1000, {"features": 3.0, "training": 60.0})
    large = speed_rows.Spent(10_000, {"features": 20.0, "training": 340.0})
    half = speed_rows.Spent(50_000, {"features": 100.0})
    finding = speed_rows.hours_at(50_000, [small, large, half])
    assert (
        finding.figures["hours"] == pytest.approx(5 * 360 / 3600) and finding.figures["from_rows"] == 10_000
    )
    half.seconds["training"] = 1700.0
    finding = speed_rows.hours_at(50_000, [small, large, half])
    assert finding.figures["hours"] == pytest.approx(0.5) and "measured" in finding.shown["remarks"]
    assert speed_rows.hours_at(50_000, []).verdict == NO_ROOM


def test_operations_of_a_step_grow_with_the_runs_and_not_with_the_batch():
    settings = training.TrainingSettings(num_runs=1, hidden_dim=8, batch_size=4)
    one = limits.operations_of_step(settings, 3)
    assert 20 < one < 300
    assert limits.operations_of_step(settings, 3) == one
    more = limits.operations_of_step(training.TrainingSettings(num_runs=3, hidden_dim=8, batch_size=9), 3)
    assert one < more < 4 * one


def test_the_least_time_of_a_step():
    graphs = limits.DeviceLimits(1, 1, launch=5e-6, replay=8e-6, in_graph=2e-6, products={})
    assert graphs.step_seconds(101) == pytest.approx(208e-6)
    assert limits.DeviceLimits(1, 1, 5e-6, 0, 0, {}).step_seconds(100) == pytest.approx(500e-6)


def test_a_row_of_the_table_is_one_line():
    table = boards.CheckTable("t", ("a", "b"))
    finding = Finding(FAILED, {"a": "1", "error": "first | second\nthird"})
    assert table.line("x", finding) == "| x | FAILED | 1 | first / second third |"
    board = Board([table])
    board.add("x", Finding(FAILED, {}, {"of_allowed": float("inf"), "cases": [{"share": float("nan")}]}))
    assert board.values()[0]["rows"][0]["figures"] == {"of_allowed": "inf", "cases": [{"share": "nan"}]}


def test_a_device_without_room_for_the_fewest_rows_fails(monkeypatch):
    def full(*job):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed_rows, "train_runs", full)
    found = verdicts(speed_board())
    assert found["60 rows: 18 cells x 1 runs"] == FAILED and found["130 rows: 18 cells x 1 runs"] == NO_ROOM
