"""Features stored in fewer bits: how far from what they stand for, and that the cells know of it."""

import json

import numpy as np
import pytest
from running import cell_files

from ablation import audits, extraction, feature_blocks, features, fit, quantised
from ablation.quantised import decoded, encoded, scale_between


@pytest.fixture
def x():
    """Columns of many sizes; one constant, one far from 0, one tiny."""
    x = np.random.default_rng(0).normal(size=(500, 40)).astype(np.float32) * np.logspace(
        -30, 30, 40, dtype=np.float32
    )
    x[:, 3], x[:, 4] = 7.1, 1e6 + np.random.default_rng(1).normal(size=500)
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype, share", [("float16", 2**-11), ("int8", 1 / 254)])
def test_stored_columns_are_within_half_a_step_of_their_range(x, dtype, share):
    found = decoded(encoded(x, dtype)).to("cpu").numpy()
    half = (x.max(0).astype(np.float64) - x.min(0)) / 2
    error = np.abs(found.astype(np.float64) - x).max(0)
    assert (error <= 1.001 * share * half + np.abs(x).max(0) * 2**-22).all()
    assert (found[:, 3] == x[:, 3]).all() and error[0] > 0
    assert encoded(x, dtype)["features"].nbytes == x.nbytes // {"float16": 2, "int8": 4}[dtype]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_not_finite_stays_so_and_changes_no_other_row(x, dtype):
    before = decoded(encoded(x, dtype)).to("cpu").numpy()
    x[7, 5], x[8, 5], x[:, 6] = np.inf, np.nan, np.nan
    after = decoded(encoded(x, dtype)).to("cpu").numpy()
    assert not np.isfinite(after[[7, 8], 5]).any() and not np.isfinite(after[:, 6]).any()
    others = np.delete(np.arange(40), [5, 6])
    assert np.array_equal(after[:, others], before[:, others]) and np.isfinite(after[9:, 5]).all()


def test_a_range_of_the_largest_numbers_does_not_overflow():
    scale = scale_between(np.float32([-3e38]), np.float32([3e38]))
    assert np.isfinite(scale.half).all() and scale.middle == 0


def test_cells_know_how_their_features_were_stored(run, place, monkeypatch):
    chosen = ("--representations", "stats", "ensemble")
    status, log = run(*chosen, "--cache-dtype", "int8")
    assert status == 0
    whole = cell_files(place)
    status, log = run(*chosen)
    assert status == 2 and "cache_dtype was int8, is now float32" in log
    run(*chosen, "--output-dir", "full")
    full = cell_files(place, output="full")
    assert whole.keys() == full.keys() and whole != full
    assert "cache_dtype" not in json.dumps(full)
    status, log = run(*chosen, "--output-dir", "full", "--cache-dtype", "float16")
    assert status == 2 and "cache_dtype was float32, is now float16" in log
    # By blocks, from the cache, and where the disk takes none the numbers are the same.
    for module in (audits, extraction, feature_blocks, features, fit):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    small = (*chosen, "--cache-dtype", "int8")
    run(*small, "--output-dir", "blocks", "--cache-dir", "other")
    assert cell_files(place, output="blocks") == whole
    run(*small, "--output-dir", "again", "--cache-dir", "other")
    assert cell_files(place, output="again") == whole
    (place / "file").write_text("no folder can be made here")
    run(*small, "--output-dir", "none", "--cache-dir", "file/cache")
    assert cell_files(place, output="none") == whole
    names = {path.name for path in (place / "other").rglob("stats*")}
    assert names == {"stats.int8.safetensors"}
    for flags in (("--audit", "noise"), ("--no-cache-features",)):
        status, log = run(*small, *flags)
        assert status == 2 and "use float32" in log


def test_a_feature_that_is_not_finite_fails_its_cell_by_name(run, place, monkeypatch):
    real = quantised.encode

    def with_nan(x, scale, dtype):
        stored = real(x, scale, dtype)
        stored[5, 9] = quantised.NOT_FINITE
        return stored

    monkeypatch.setattr(quantised, "encode", with_nan)
    status, log = run("--representations", "stats", "--cache-dtype", "int8", "--layer-sets", "all_layers")
    assert status == 1 and "feature 2 of layer " in log and "row 5, is nan" in log
