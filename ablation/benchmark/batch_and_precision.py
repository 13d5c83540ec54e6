"""Settings of training against each other: batch sizes and precisions."""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import scipy.stats

from ablation.benchmark.stages import PRECISIONS, inputs_of, train
from ablation.benchmark.timing import peak, start_of_peak
from ablation.cells import cells_of
from ablation.collection import LoraCollection
from ablation.settings import TrainingSettings
from ablation.task import TrainedRuns

EQUAL_WITHIN = 0.01  # accuracies that differ by less count as equal
TEST_LEVEL = 0.05  # of each of the two one-sided tests
PRECISION_HEAD = (
    "| representation | float32, % | bfloat16, % | difference | 90% interval | p |\n|---|---|---|---|---|---|"
)


def compare_batch_sizes(
    data: LoraCollection, representations: list[str], batch_sizes: list[int], settings: TrainingSettings
) -> list[dict]:
    """Whole runs at each batch size; everything else as in `settings`."""
    device = data.weights.device
    rows = []
    for cell, features in inputs_of(data, cells_of(["all_layers"], representations)).items():
        for batch_size in batch_sizes:
            chosen = TrainingSettings(
                num_runs=settings.num_runs, batch_size=batch_size, precision=settings.precision
            )
            before, began = start_of_peak(device), time.perf_counter()
            trained = train(features, data, chosen)
            seconds, accuracies = time.perf_counter() - began, test_accuracies(trained, data)
            rows.append(
                {
                    "representation": cell.representation,
                    "batch_size": batch_size,
                    "epochs": statistics.mean(len(run.train_loss) for run in trained.runs),
                    "seconds": seconds,
                    "extra_memory_mb": (peak(device) - before) / 1e6,
                    "test_accuracy": statistics.mean(accuracies),
                    "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                }
            )
    return rows


def batch_table(rows: list[dict]) -> str:
    """The rows of `compare_batch_sizes` as a Markdown table."""
    lines = [
        "| representation | batch size | epochs | seconds | memory, MB | test accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = f"{100 * row['test_accuracy']:.1f} ± {100 * row['test_accuracy_std']:.1f}"
        lines.append(
            f"| {row['representation']} | {row['batch_size']} | {row['epochs']:.1f} | {row['seconds']:.1f} | "
            f"{row['extra_memory_mb']:.0f} | {accuracy} |"
        )
    return "\n".join(lines)


def test_accuracies(trained: TrainedRuns, data: LoraCollection) -> list[float]:
    """Test accuracy of each run."""
    truth = data.labels[data.split.test]
    return [float((run.predictions["test"] == truth).mean()) for run in trained.runs]


def compare_precisions(data: LoraCollection, representations: list[str], seeds: int) -> list[dict]:
    """Whether bfloat16 is as accurate as float32:
    whole runs of the same seeds with each, per representation.
    """
    rows = []
    for cell, features in inputs_of(data, cells_of(["all_layers"], representations)).items():
        accuracy, seconds = {}, {}
        for precision in PRECISIONS:
            began = time.perf_counter()
            trained = train(features, data, TrainingSettings(num_runs=seeds, precision=precision))
            accuracy[precision] = np.array(test_accuracies(trained, data))
            seconds[precision] = time.perf_counter() - began
        means = {precision: float(of_runs.mean()) for precision, of_runs in accuracy.items()}
        difference = equivalence(accuracy["bfloat16"] - accuracy["float32"])
        rows.append({"representation": cell.representation, **means, **difference, "seconds": seconds})
        print(precision_line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def equivalence(differences: np.ndarray) -> dict:
    """Two one-sided t tests on the paired differences (R,) in accuracy.

    Equivalent if both reject a mean difference of EQUAL_WITHIN or more at TEST_LEVEL: just if the interval
    of level 1 - 2 TEST_LEVEL lies within it.
    """
    mean, error = differences.mean(), scipy.stats.sem(differences)
    if error == 0:  # as when no prediction changed
        low = high = mean
        p = float(abs(mean) >= EQUAL_WITHIN)
    else:
        low, high = scipy.stats.t.interval(1 - 2 * TEST_LEVEL, len(differences) - 1, mean, error)
        above = scipy.stats.ttest_1samp(differences, -EQUAL_WITHIN, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(differences, EQUAL_WITHIN, alternative="less").pvalue
        p = float(max(above, below))
    return {
        "seeds": len(differences),
        "difference": float(mean),
        "low": float(low),
        "high": float(high),
        "p": p,
    }


def precision_line(row: dict) -> str:
    """A row of `compare_precisions` as a line of a Markdown table."""
    return (
        f"| {row['representation']} | {100 * row['float32']:.2f} | {100 * row['bfloat16']:.2f} | "
        f"{100 * row['difference']:+.2f} | {100 * row['low']:+.2f} .. {100 * row['high']:+.2f} | "
        f"{row['p']:.2g} |"
    )


def joint_claim(rows: list[dict]) -> str:
    """What the rows of `compare_precisions` say together, the only claim that needs no correction: that all
    are equivalent, if the largest p-value is below TEST_LEVEL (an intersection-union test).
    """
    largest = max(row["p"] for row in rows)
    known = "are shown to be" if largest < TEST_LEVEL else "are not shown to be"
    return (
        f"All {len(rows)} together {known} equivalent to within {100 * EQUAL_WITHIN:g} points (largest p "
        f"{largest:.2g})."
    )
