"""results.json and results.txt: comparisons matched by name."""

import numpy as np
import pytest
from builders import record_of

from ablation import results as results_module
from ablation.cells import Cell
from ablation.results_text import results_text


def header():
    return {
        "dataset": "x",
        "num_runs": 2,
        "num_classes": 2,
        "num_all_layers": 8,
        "num_visual_layers": 4,
        "num_text_layers": 4,
        "label_mapping": {},
        "splits_overlap": False,
        "data": {"rows": 120, "split": {"train": 40, "val": 40, "test": 40}},
        "inference": {},
        "verdict": "No verdict.",
    }


def test_the_comparison_goes_by_name_where_cells_are_missing():
    records = {}
    for i, name in enumerate(("simple_stats", "stats", "frequency")):
        records[Cell(name, "all_layers")] = record_of(
            Cell(name, "all_layers"), [0.9 - 0.1 * i, 0.8 - 0.1 * i]
        )
    for name in ("frequency", "simple_stats"):  # stats failed there, and the order is another
        records[Cell(name, "visual_only")] = record_of(Cell(name, "visual_only"), [0.6, 0.4])
    records[Cell("frequency", "text_only")] = record_of(Cell("frequency", "text_only"), [0.3, 0.3])
    results = results_module.collect(records, {Cell("stats", "visual_only"): "ValueError: no"}, {}, header())
    assert [entry["representation"] for entry in results["comparison"]] == ["simple_stats", "frequency"]
    first, last = results["comparison"]
    assert (first["all_layers"], first["visual_only"], first["text_only"]) == (
        pytest.approx(0.85),
        pytest.approx(0.5),
        None,
    )
    assert last["drop"] == pytest.approx(0.65 - 0.5) and last["text_only"] == pytest.approx(0.3)
    assert last["drop_std"] == pytest.approx(np.std([0.7 - 0.6, 0.6 - 0.4]))
    assert last["retention"] is None  # nothing was inferred, so nothing is shown to be above chance
    assert [row["representation"] for row in results["visual_only_results"]] == [
        "simple_stats_visual_only",
        "frequency_visual_only",
    ]
    assert results["failed_cells"] == [
        {
            "cell": "visual_only_stats",
            "representation": "stats",
            "layer_set": "visual_only",
            "error": "ValueError: no",
        }
    ]
    text = results_text(results)
    assert (
        "stats               FAILED: ValueError: no" in text and "1 cells FAILED: visual_only_stats" in text
    )
    (line,) = [line for line in text.splitlines() if line.startswith("frequency") and "15.0±5.0" in line]
    assert line.split() == ["frequency", "65.0±5.0", "50.0±10.0", "30.0±0.0", "15.0±5.0", "-", "-"]


def test_results_of_nothing_are_still_results():
    results = results_module.collect({}, {}, {}, header())
    assert results["all_layers_results"] == [] == results["visual_only_results"] == results["comparison"]
    assert "text_only_results" not in results and "drop" not in results_text(results)
