"""Every representation against its float64 oracle, its invariances with their sensitivity twins, and other devices."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import representations
import settings as project
from representations import REPRESENTATIONS, Layer

NAMES = list(REPRESENTATIONS)
SHAPES = [(1, 320), (320, 1), (1280, 1), (2, 64), (64, 2), (4, 320), (64, 64), (48, 17), (1, 1), (1, 2), (3, 7), (1, 25)]
KINDS = ["normal", "offset", "uniform", "heavy", "tiny", "large", "integers", "wave", "shared base"]


def draw(kind, n, rows, cols, seed=0):
    rng = np.random.default_rng([seed, rows, cols])
    shape = (n, rows, cols)
    entry = np.arange(rows * cols).reshape(rows, cols)
    w = {
        "normal": lambda: rng.normal(size=shape),
        "offset": lambda: 3 + 0.5 * rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-1, 2, shape),
        "heavy": lambda: rng.standard_t(2, shape),
        "tiny": lambda: 1e-6 * rng.normal(size=shape),
        "large": lambda: 1e12 * rng.normal(size=shape),
        "integers": lambda: rng.integers(-4, 9, shape),        # ties, and entries on the edges of histogram bins
        "wave": lambda: 1000 * np.cos(0.7 * entry) + rng.normal(size=shape),            # one FFT bin far above the others
        "shared base": lambda: rng.normal(size=(rows, cols)) + 1e-3 * rng.normal(size=shape),   # rows that differ by little
    }[kind]()
    return w.astype(np.float32)


def assert_agrees(name, w, spread=None):
    """Within 1e-5 of each column's spread over the rows, and the float32 that holds the result."""
    ours = REPRESENTATIONS[name](torch.from_numpy(w)).numpy()
    truth = oracles.represent(name, w)
    assert ours.shape == truth.shape == (len(w), project.REPRESENTATIONS[name].width)
    assert ours.dtype == np.float32
    spread = truth.std(0) if spread is None else spread
    allowed = 1e-5 * spread + 2e-7 * np.abs(truth).max(0) + 1e-13
    worst = np.abs(ours - truth) / allowed
    assert np.isfinite(ours).all() and worst.max() <= 1, (name, np.unravel_index(worst.argmax(), worst.shape), worst.max())


def test_names_order_widths_and_versions_stand_in_settings_too():
    assert list(project.REPRESENTATIONS) == NAMES
    for name, function in REPRESENTATIONS.items():
        assert function(torch.randn(2, 3, 4)).shape == (2, project.REPRESENTATIONS[name].width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_float64_oracle(name, shape, kind):
    assert_agrees(name, draw(kind, 12, *shape))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 320), (4, 320), (64, 64), (1, 1), (3, 7)], ids=str)
def test_constant_matrices(name, shape):
    values = np.array([0.1, 0, -7.3, 1e-6, 2**20], dtype=np.float32)
    w = np.broadcast_to(values[:, None, None], (5, *shape)).copy()
    ours = REPRESENTATIONS[name](torch.from_numpy(w)).numpy()
    truth = oracles.represent(name, w)
    # The singular values and bins that are 0 in exact arithmetic are rounding in both: judge those by the matrix's scale.
    scale = np.abs(w).max((1, 2), keepdims=True)[:, 0] * w[0].size
    assert (np.abs(ours - truth) <= 2e-6 * np.abs(truth) + 2e-6 * np.maximum(scale, 1e-3)).all()


@pytest.mark.parametrize("shape", [(1, 1280), (7, 3), (64, 1280)], ids=str)
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-30, 3e30])
def test_a_constant_has_no_spread_no_skew_and_no_entropy(value, shape):
    w = torch.full((1, *shape), value)
    assert REPRESENTATIONS["stats"](w)[0, [1, 5, 6]].tolist() == [0, 0, 0]
    assert REPRESENTATIONS["distribution"](w)[0, [7, 8, 9, 10, 11]].tolist() == [0] * 5
    assert REPRESENTATIONS["simple_stats"](w)[0, 2] == 0
    assert REPRESENTATIONS["info_theoretic"](w).tolist() == [[0, 0]]


def test_a_zero_matrix_is_all_zeros():
    for name, function in REPRESENTATIONS.items():
        assert (function(torch.zeros(2, 3, 5)) == 0).all(), name


@pytest.mark.parametrize("shape", [(4, 320), (320, 4), (16, 16), (12, 40)], ids=str)
@pytest.mark.parametrize("name", ["spectral", "matrix_norms", "ensemble"])
def test_rank_deficient_and_ill_conditioned_matrices(name, shape):
    rng = np.random.default_rng(5)
    m = min(shape)
    batch = []
    for low in (1e-3, 1e-5, 1e-7, 1e-10, 0.0):
        u, _ = np.linalg.qr(rng.normal(size=(shape[0], m)))
        v, _ = np.linalg.qr(rng.normal(size=(shape[1], m)))
        batch.append(u * np.geomspace(1, low, m) @ v.T if low else np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1])))
    exact = rng.normal(size=(2, *shape))
    exact[:, :, 1:] = exact[:, :, :1] * 2.0 ** rng.integers(-2, 3, shape[1] - 1)     # rank 1 even in float32
    w = np.concatenate([np.stack(batch), exact]).astype(np.float32)
    ours = REPRESENTATIONS[name](torch.from_numpy(w)).numpy()[:, :32]
    truth = oracles.represent(name, w)[:, :32]
    assert np.abs(ours - truth).max() <= 1e-5 * np.abs(truth).max()
    gaps = slice(20, 29) if name != "matrix_norms" else slice(0, 0)
    assert np.abs(ours[:, gaps] - truth[:, gaps]).max(initial=0) < 1e-5


def test_histogram_edges_fall_as_numpys_do():
    rng = np.random.default_rng(1)
    for scale in (1, 0.1, 1 / 3, 1e-6, 1e6):
        w = (rng.integers(0, 51, (40, 1, 400)) * np.float32(scale)).astype(np.float32)
        assert_agrees("info_theoretic", w)


def test_few_fft_bins_are_padded_and_many_counted_twice():
    out = REPRESENTATIONS["frequency"](torch.tensor([[[3.0, 4.0]]]))[0]
    assert out.tolist() == pytest.approx([7, 1] + [0] * 8 + [4, 3, 7, 1])
    wave = torch.cos(torch.arange(64) * 2 * torch.pi * 5 / 64)[None, None]
    assert REPRESENTATIONS["frequency"](wave)[0, :3].tolist() == pytest.approx([32, 32, 0], abs=1e-4)


def test_refuses_what_is_not_a_batch_of_matrices():
    for shape in [(3, 4), (2, 0, 4), (0, 3, 4)]:
        with pytest.raises(ValueError, match="batch"):
            REPRESENTATIONS["stats"](torch.zeros(shape))


# --- invariances, each with the change that must show

SMALL = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10_000))
ENTRYWISE = ["rank_based", "stats", "simple_stats", "distribution", "info_theoretic"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(SMALL)
def test_rows_do_not_see_their_neighbours(name, case):
    rows, cols, seed = case
    w = torch.from_numpy(draw("normal", 5, rows, cols, seed))
    others = torch.from_numpy(draw("heavy", 5, rows, cols, seed + 1))
    mixed = others.clone()
    mixed[2] = w[2]
    function = REPRESENTATIONS[name]
    assert torch.allclose(function(w)[2], function(mixed)[2], rtol=1e-5, atol=1e-5)
    assert torch.allclose(function(w.flip(0)), function(w).flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_but_they_see_their_own_matrix(name):
    w = torch.from_numpy(draw("normal", 2, 4, 30))
    out = REPRESENTATIONS[name](w)
    assert (out[0] - out[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ENTRYWISE)
@settings(max_examples=15, deadline=None)
@given(SMALL)
def test_the_order_of_entries_does_not_matter(name, case):
    rows, cols, seed = case
    w = torch.from_numpy(draw("normal", 4, rows, cols, seed))
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(seed))
    shuffled = w.flatten(1)[:, order].view_as(w)
    assert torch.allclose(REPRESENTATIONS[name](w), REPRESENTATIONS[name](shuffled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["spectral", "matrix_norms", "frequency"])
def test_but_it_does_to_the_spectrum(name):
    w = torch.from_numpy(draw("normal", 4, 6, 9))
    order = torch.randperm(54, generator=torch.Generator().manual_seed(0))
    shuffled = w.flatten(1)[:, order].view_as(w)
    assert (REPRESENTATIONS[name](w) - REPRESENTATIONS[name](shuffled)).abs().max() > 0.1


@settings(max_examples=15, deadline=None)
@given(SMALL)
def test_permuting_rows_and_columns_keeps_the_spectrum_and_the_norms(case):
    rows, cols, seed = case
    w = torch.from_numpy(draw("normal", 4, rows, cols, seed))
    generator = torch.Generator().manual_seed(seed)
    permuted = w[:, torch.randperm(rows, generator=generator)][:, :, torch.randperm(cols, generator=generator)]
    for name in ("spectral", "matrix_norms"):
        assert torch.allclose(REPRESENTATIONS[name](w), REPRESENTATIONS[name](permuted), rtol=2e-4, atol=1e-4)


def test_a_transpose_swaps_the_induced_norms_and_keeps_the_rest():
    w = torch.from_numpy(draw("normal", 4, 6, 9))
    there, back = REPRESENTATIONS["matrix_norms"](w), REPRESENTATIONS["matrix_norms"](w.mT.contiguous())
    assert torch.allclose(there[:, [0, 1, 2, 4, 3, 5, 6]], back, rtol=1e-5)
    assert not torch.allclose(there, back, rtol=1e-2)
    for name in ("frequency", "spectral", *ENTRYWISE):
        assert torch.allclose(REPRESENTATIONS[name](w), REPRESENTATIONS[name](w.mT.contiguous()), rtol=1e-4, atol=1e-5)


SCALES_WITH_WEIGHTS = {
    "simple_stats": range(5), "rank_based": range(11), "stats": range(5), "spectral": [*range(10), 31],
    "matrix_norms": range(5), "distribution": range(9), "frequency": range(13), "info_theoretic": [],
}


@pytest.mark.parametrize("name", SCALES_WITH_WEIGHTS)
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0.25, 2.0, 1024.0]), st.integers(0, 1000))
def test_columns_in_weight_units_scale_and_the_others_do_not(name, factor, seed):
    w = torch.from_numpy(draw("offset", 4, 5, 8, seed))
    before, after = REPRESENTATIONS[name](w), REPRESENTATIONS[name](w * factor)
    scaled = torch.zeros(before.shape[1], dtype=torch.bool)
    scaled[list(SCALES_WITH_WEIGHTS[name])] = True
    assert torch.allclose(after[:, scaled], before[:, scaled] * factor, rtol=1e-5)
    assert torch.allclose(after[:, ~scaled], before[:, ~scaled], rtol=1e-4, atol=1e-6)


# --- devices


@pytest.mark.parametrize("shape", [(1, 320), (1280, 1), (4, 64), (64, 64), (1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_a_device_that_is_not_the_cpu(name, shape):
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = REPRESENTATIONS[name](torch.empty(7, *shape, device="meta"))
    assert out.device.type == "meta" and out.dtype == torch.float32
    assert out.shape == (7, project.REPRESENTATIONS[name].width)


def test_many_matrices_are_decomposed_in_batches(monkeypatch):
    w = torch.from_numpy(draw("normal", 10, 4, 9))
    whole = Layer(w).singular_values
    monkeypatch.setattr(representations, "EIGH_BATCH", 3)
    assert torch.equal(Layer(w).singular_values, whole)


def test_describe_shares_work_names_failures_and_leaves_out_of_memory_to_the_caller(monkeypatch):
    w = torch.from_numpy(draw("normal", 10, 4, 9))
    monkeypatch.setitem(representations.SLICE_WEIGHTS, "cpu", 100)

    def fails(message):
        def function(layer):
            raise RuntimeError(message)
        return function
    monkeypatch.setitem(REPRESENTATIONS, "stats", fails("did not converge"))
    found, failed = representations.describe(w, ["simple_stats", "stats", "spectral"])
    assert set(found) == {"simple_stats", "spectral"} and str(failed["stats"]) == "did not converge"
    assert torch.allclose(found["spectral"], REPRESENTATIONS["spectral"](w))
    monkeypatch.setitem(REPRESENTATIONS, "stats", fails("CUFFT_ALLOC_FAILED"))
    with pytest.raises(torch.OutOfMemoryError):
        representations.describe(w, ["stats"])


def test_torchs_sort_gives_what_numpys_does():
    w = torch.from_numpy(draw("integers", 6, 4, 50))
    assert torch.equal(Layer(w).sorted, Layer(w).x.sort(dim=1).values)
