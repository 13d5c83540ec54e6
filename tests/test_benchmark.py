"""The benchmark: that its yardsticks do the work that they stand for, and that it counts right."""

import dataclasses
import json

import benchmark
import numpy as np
import pytest
import torch
from builders import lora_dataset
from running import FAST
from test_training import SMALL, problem, train_runs
from torch.utils.flop_counter import FlopCounterMode

from ablation import mlp
from ablation.benchmark import batch_and_precision, stages, timing, utilisation
from ablation.benchmark.origin import describe_one_by_one, train_from_loader
from ablation.benchmark.utilisation import RunSpan
from ablation.training import standardise
from visual_ablation_experiment import main as run_program


@pytest.fixture
def small_set(tmp_path):
    lora_dataset(n=40, signal=True).save_to_disk(tmp_path / "loras")
    return str(tmp_path / "loras")


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """Times that mean nothing, soon measured."""
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.01)
    monkeypatch.setattr(timing, "GEMM_SIDE", 128)
    monkeypatch.setattr(timing.gemm_rate, "__defaults__", (0.05,))


def run(capsys, *flags):
    assert benchmark.main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_stage_is_measured_beside_its_yardstick_and_its_limit(small_set, capsys):
    report = run(
        capsys,
        "--dataset",
        small_set,
        "--repeats",
        "2",
        "--runs",
        "2",
        "--epochs",
        "1",
        "--origin-layers",
        "3",
    )
    assert [row["stage"] for row in report["stages"]] == ["read", *["features"] * 3, "train", "train"]
    for row in report["stages"]:
        assert row["times_faster_than_origin"] == pytest.approx(
            np.median(row["origin_all_seconds"]) / np.median(row["ours_all_seconds"])
        )
        assert row["times_slower_than_limit"] > 0 and len(row["ours_all_seconds"]) == 2
    assert report["rates"]["float32"] > 0


@pytest.mark.slow
def test_one_stage_as_a_table_on_synthetic_rows(capsys):
    assert benchmark.main(["--stage", "read", "--rows", "5", "--repeats", "1", "--origin-layers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "5 rows"
        and lines[-1].startswith("| read | 128 layers, 0.00 GB |")
        and lines[-1].count("|") == lines[-2].count("|")
    )


@pytest.mark.slow
def test_batch_sizes_and_precisions(small_set, capsys):
    found = run(
        capsys,
        "--dataset",
        small_set,
        "--batch-sizes",
        "16",
        "8",
        "--representations",
        "stats",
        "--runs",
        "2",
    )["batch_sizes"]
    assert [one["batch_size"] for one in found] == [16, 8]
    assert all(
        16 <= one["epochs"] <= 300 and one["seconds"] > 0 and 0 <= one["test_accuracy"] <= 1 for one in found
    )
    (found,) = run(
        capsys, "--dataset", small_set, "--precisions", "--representations", "stats", "--seeds", "3"
    )["precisions"]
    assert found["difference"] == pytest.approx(found["bfloat16"] - found["float32"]) and found["seeds"] == 3


def test_operations_are_those_that_torch_counts():
    x, labels, split = problem(n=100, dtype=torch.float32)
    model = mlp.build_model(0, 10, 3, SMALL)
    with FlopCounterMode(display=False) as counter:
        loss = torch.nn.functional.cross_entropy(model(x[split.train]), torch.from_numpy(labels[split.train]))
        loss.backward()
        with torch.no_grad():
            model.eval()(x[split.val])
    assert stages.operations_of(10, 3, split, SMALL) == counter.get_total_flops()


def test_the_origins_loop_learns_what_ours_learns():
    x, labels, split = problem(noise=1.0, dtype=torch.float32)
    standardised, y = standardise(x, torch.from_numpy(split.train)), torch.from_numpy(labels)
    theirs = [
        train_from_loader(standardised, y, split, 3, dataclasses.replace(SMALL, seed=seed))
        for seed in SMALL.seeds
    ]
    ours = train_runs(x, labels, split, 3, SMALL).runs
    truth = labels[split.test]
    accuracy = [
        np.mean([(run.predictions["test"] == truth).mean() for run in runs]) for runs in (ours, theirs)
    ]
    assert abs(accuracy[0] - accuracy[1]) < 0.1 and accuracy[1] > 0.6
    assert all(len(run.train_loss) <= SMALL.max_epochs for run in theirs)


def test_the_origins_features_are_of_every_row():
    w = torch.randn(5, 2, 30)
    assert all(len(part) == 5 for part in describe_one_by_one(w))


@pytest.mark.parametrize(
    "shift, spread, equivalent",
    [(0.0, 0.01, True), (0.009, 0.01, False), (0.005, 0.001, True), (0.0, 0.2, False), (0.03, 0.001, False)],
)
def test_equivalence_is_an_interval_within_the_margin(shift, spread, equivalent):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=80)
    found = batch_and_precision.equivalence(shift + spread * (noise - noise.mean()) / noise.std(ddof=1))
    assert (
        (found["p"] < batch_and_precision.TEST_LEVEL)
        == equivalent
        == (
            found["low"] > -batch_and_precision.EQUAL_WITHIN
            and found["high"] < batch_and_precision.EQUAL_WITHIN
        )
    )
    half = 1.6644 * spread / np.sqrt(80)  # Student's t, 79 degrees of freedom, 95% quantile
    assert found["difference"] == pytest.approx(shift, abs=1e-12) and found["high"] - found[
        "low"
    ] == pytest.approx(2 * half, rel=1e-3)


def test_only_all_precisions_together_are_called_equivalent():
    def row(name, p):
        numbers = dict.fromkeys(("float32", "bfloat16", "difference", "low", "high"), 0.5)
        return {"representation": name, **numbers, "p": p}

    assert "equivalent" not in batch_and_precision.precision_line(row("stats", 0.001))
    rows = [row("stats", 0.001), row("spectral", 0.04)]
    assert batch_and_precision.joint_claim(rows).startswith("All 2 together are shown to be equivalent")
    rows.append(row("frequency", 0.06))
    assert "All 3 together are not shown to be equivalent" in batch_and_precision.joint_claim(rows)


def test_equivalence_of_runs_that_all_differ_alike():
    assert (
        batch_and_precision.equivalence(np.zeros(3))["p"] == 0
        and batch_and_precision.equivalence(np.full(3, 0.02))["p"] == 1
    )


def test_refuses_what_it_cannot_measure(capsys):
    for flags, reason in (
        (["--repeats", "0"], "--repeats is at least 1"),
        (["--seeds", "1"], "at least 2"),
        (["--batch-sizes", "0"], "at least 2"),
        (["--dataset", "./nowhere"], "no such file or folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(flags)
        assert reason in capsys.readouterr().err


def test_the_peak_of_memory_is_that_of_the_work_alone():
    large = torch.ones(2**25)  # 128 MiB that is given back before
    del large
    before = timing.start_of_peak("cpu")
    work = torch.ones(2**24)  # 64 MiB
    del work
    assert 0.9 * 2**26 < timing.peak("cpu") - before < 1.5 * 2**26


# --- busy cores

TWO_CELLS = ["--representations", "stats", "--layer-sets", "all_layers", "visual_only"]


def test_the_program_is_recorded_run_by_run(small_set, capsys, monkeypatch):
    options = FAST[FAST.index("--max-epochs") :]
    monkeypatch.setattr(benchmark, "run_program", lambda flags: run_program([*flags, *options, *TWO_CELLS]))
    report = run(capsys, "--dataset", small_set, "--utilisation", "--runs", "3")
    assert [(cell["cell"], cell["runs"]) for cell in report["cells"]] == [
        ("all_layers_stats", 3),
        ("visual_only_stats", 3),
    ]
    for cell in report["cells"]:
        assert 0 < cell["step_share_of_runs"] < 1
        assert cell["longest_run"] < cell["busy_core_seconds"] <= 3 * cell["longest_run"]
    assert 0 < report["step_share_of_training"] < report["busy_share_of_training"] <= 1
    assert report["busy_share_of_the_command"] < report["busy_share_of_training"]
    busy = sum(int(count) * seconds for count, seconds in report["seconds_by_busy_cores"].items())
    assert busy == pytest.approx(report["busy_core_seconds"])
    text = utilisation.utilisation_table(report)
    assert "| visual_only_stats | 3 |" in text and "| 64 |" in text


def test_a_program_that_fails_is_not_recorded(small_set, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "run_program", lambda flags: run_program([*flags, "--hidden-dim", "0"]))
    with pytest.raises(SystemExit, match=r"ended with 2(?s:.*)hidden-dim"):
        benchmark.main(["--dataset", small_set, "--utilisation"])


def test_busy_cores_are_counted_on_a_line_of_time():
    spans = [RunSpan("a", 0, 4, 3), RunSpan("a", 1, 3, 1), RunSpan("b", 4, 5, 1), RunSpan("b", 7, 8, 0)]
    assert utilisation.seconds_by_busy_cores(spans) == {0: 2, 1: 4, 2: 2}
    report = utilisation.utilisation_of(spans, {"training": 8, "total": 10}, 2)
    assert (report["busy_core_seconds"], report["busy_share_of_training"]) == (8, 0.5)
    assert (report["busy_share_of_the_command"], report["step_share_of_training"]) == (0.4, 5 / 16)


@pytest.mark.parametrize(
    "durations, cores, seconds, least",
    [
        ([3, 3, 2, 2, 2], 2, 7, 6),  # the best order takes 6, the longest first 7
        ([5, 1, 1], 2, 5, 5),
        ([2], 4, 2, 2),
        ([1, 1, 1, 4], 2, 5, 4),  # the longest last waits for a core
    ],
)
def test_longest_first_on_paper(durations, cores, seconds, least):
    paper = utilisation.simulated(durations, cores)
    assert (paper["seconds"], paper["least"]) == (seconds, least)
    assert paper["busy_share"] == sum(durations) / (cores * seconds)
