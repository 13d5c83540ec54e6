"""How an experiment grows: the line through two sizes, and what a run under measurement tells."""

import pytest
from running import FAST, SCRIPT

from ablation.benchmark.scale import ScaleRun, predicted, run_measured, scale_table


def of_rows(rows, seconds, memory):
    return ScaleRun(rows, 4000 * rows, {"hash": seconds, "all": 2 * seconds}, memory, 100 * rows)


def test_a_size_is_predicted_by_the_line_through_the_two_next_smaller():
    measured = [of_rows(1000, 3.0, 500), of_rows(100_000, 210.0, 9000), of_rows(2000, 5.0, 600)]
    assert predicted(measured, 198_000).seconds["hash"] == pytest.approx(210 + 205)
    assert predicted(measured, 100_000).seconds["hash"] == pytest.approx(201)
    found = predicted(measured[::2], 1_000_000)
    assert found.seconds == pytest.approx({"hash": 2001.0, "all": 4002.0})
    assert (found.memory_bytes, found.file_bytes, found.cache_bytes) == (0, 4_000_000_000, 100_000_000)
    lines = scale_table(sorted(measured, key=lambda one: one.rows), [1_000_000]).splitlines()
    assert len(lines) == 2 + 3 + 2 and lines[0].startswith("| rows |")
    assert "| 100,000 | predicted | 201.0 | 402.0 |" in lines[5]


def test_a_run_is_measured_stage_by_stage(place):
    (place / "work").mkdir()
    flags = [*FAST, "--representations", "stats", "--layer-sets", "all_layers"]
    found = run_measured(SCRIPT, place / "loras", place / "work", 0, flags)
    assert found.rows == 40 and found.cache_bytes > 40 * 16 * 7 * 4 and found.memory_bytes > 10**7
    assert list(found.seconds) == ["plain read", "open", "hash", "features", "cache", "training", "all"]
    assert found.seconds["all"] > found.seconds["training"] > 0
