"""Every representation against its float64 oracle,
its invariances with their sensitivity twins, and batches. Other devices: test_device_operations.py.
"""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import representations
from ablation import catalogue as project
from representations import (
    PRODUCT_REPRESENTATIONS,
    REPRESENTATIONS,
    LayerBatch,
    ModuleBatch,
    describe_module,
    function_of,
)

COMPUTED = {name: spec for name, spec in project.CHOICES.items() if not spec.fitted}
NAMES = [name for name, spec in COMPUTED.items() if spec.source == "layer"]
FUNCTIONS = {name: function_of(name) for name in COMPUTED}
SHAPES = [
    (1, 320),
    (320, 1),
    (1280, 1),
    (2, 64),
    (64, 2),
    (4, 320),
    (64, 64),
    (48, 17),
    (1, 1),
    (1, 2),
    (3, 7),
    (1, 25),
]
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
        "integers": lambda: rng.integers(-4, 9, shape),  # ties, and entries on the edges of histogram bins
        "wave": lambda: (
            1000 * np.cos(0.7 * entry) + rng.normal(size=shape)
        ),  # one FFT bin far above the others
        "shared base": lambda: (
            rng.normal(size=(rows, cols)) + 1e-3 * rng.normal(size=shape)
        ),  # rows that differ by little
    }[kind]()
    return w.astype(np.float32)


def assert_agrees(name, w, spread=None):
    """Within 1e-5 of each column's spread over the rows, and the float32 that holds the result."""
    ours = FUNCTIONS[name](torch.from_numpy(w)).numpy()
    truth = oracles.represent(name, w)
    assert ours.shape == truth.shape == (len(w), project.SPECS[name].width)
    assert ours.dtype == np.float32
    spread = truth.std(0) if spread is None else spread
    allowed = 1e-5 * spread + 2e-7 * np.abs(truth).max(0) + 1e-13
    worst = np.abs(ours - truth) / allowed
    assert np.isfinite(ours).all() and worst.max() <= 1, (
        name,
        np.unravel_index(worst.argmax(), worst.shape),
        worst.max(),
    )


def test_the_catalogue_has_the_registries_names_in_their_order():
    assert list(project.NINE) == list(REPRESENTATIONS)
    assert list(project.REPRESENTATION_GROUPS["product"])[:6] == list(PRODUCT_REPRESENTATIONS)


def test_the_ensemble_is_the_parts_that_the_catalogue_names():
    w = torch.randn(3, 4, 5)
    parts = [FUNCTIONS[part](w) for part in project.ENSEMBLE_MEMBERS]
    assert torch.equal(FUNCTIONS["ensemble"](w), torch.cat(parts, dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_has_each_width(name):
    assert FUNCTIONS[name](torch.randn(2, 3, 4)).shape == (2, project.SPECS[name].width)


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
    ours = FUNCTIONS[name](torch.from_numpy(w)).numpy()
    truth = oracles.represent(name, w)
    # The singular values and bins that are 0 in exact arithmetic are rounding in both: judge those by the
    # matrix's scale.
    scale = np.abs(w).max((1, 2), keepdims=True)[:, 0] * w[0].size
    assert (np.abs(ours - truth) <= 2e-6 * np.abs(truth) + 2e-6 * np.maximum(scale, 1e-3)).all()


@pytest.mark.parametrize("shape", [(1, 1280), (7, 3), (64, 1280)], ids=str)
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-30, 3e30])
def test_a_constant_has_no_spread_no_skew_and_no_entropy(value, shape):
    w = torch.full((1, *shape), value)
    assert FUNCTIONS["stats"](w)[0, [1, 5, 6]].tolist() == [0, 0, 0]
    assert FUNCTIONS["distribution"](w)[0, [7, 8, 9, 10, 11]].tolist() == [0] * 5
    assert FUNCTIONS["simple_stats"](w)[0, 2] == 0
    assert FUNCTIONS["info_theoretic"](w).tolist() == [[0, 0]]


def test_a_zero_matrix_is_all_zeros():
    for name in NAMES:
        assert (FUNCTIONS[name](torch.zeros(2, 3, 5)) == 0).all(), name


@pytest.mark.parametrize("shape", [(4, 320), (320, 4), (16, 16), (12, 40)], ids=str)
@pytest.mark.parametrize("name", ["spectral", "matrix_norms", "ensemble"])
def test_rank_deficient_and_ill_conditioned_matrices(name, shape):
    rng = np.random.default_rng(5)
    m = min(shape)
    batch = []
    for low in (1e-3, 1e-5, 1e-7, 1e-10, 0.0):
        u, _ = np.linalg.qr(rng.normal(size=(shape[0], m)))
        v, _ = np.linalg.qr(rng.normal(size=(shape[1], m)))
        batch.append(
            u * np.geomspace(1, low, m) @ v.T
            if low
            else np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))
        )
    # Of norm 1: rounding is 1e-16 of that, and a gap divides it by 1e-8.
    exact = rng.normal(size=(2, *shape)) / 64
    exact[:, :, 1:] = exact[:, :, :1] * 2.0 ** rng.integers(-2, 3, shape[1] - 1)  # rank 1 even in float32
    w = np.concatenate([np.stack(batch), exact]).astype(np.float32)
    ours = FUNCTIONS[name](torch.from_numpy(w)).numpy()[:, :32]
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
    out = FUNCTIONS["frequency"](torch.tensor([[[3.0, 4.0]]]))[0]
    assert out.tolist() == pytest.approx([7, 1] + [0] * 8 + [4, 3, 7, 1])
    wave = torch.cos(torch.arange(64) * 2 * torch.pi * 5 / 64)[None, None]
    assert FUNCTIONS["frequency"](wave)[0, :3].tolist() == pytest.approx([32, 32, 0], abs=1e-4)


def test_refuses_what_is_not_a_batch_of_matrices():
    for shape in [(3, 4), (2, 0, 4), (0, 3, 4)]:
        with pytest.raises(ValueError, match="batch"):
            FUNCTIONS["stats"](torch.zeros(shape))


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
    function = FUNCTIONS[name]
    assert torch.allclose(function(w)[2], function(mixed)[2], rtol=1e-5, atol=1e-5)
    assert torch.allclose(function(w.flip(0)), function(w).flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_but_they_see_their_own_matrix(name):
    w = torch.from_numpy(draw("normal", 2, 4, 30))
    out = FUNCTIONS[name](w)
    assert (out[0] - out[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ENTRYWISE)
@settings(max_examples=15, deadline=None)
@given(SMALL)
def test_the_order_of_entries_does_not_matter(name, case):
    rows, cols, seed = case
    w = torch.from_numpy(draw("normal", 4, rows, cols, seed))
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(seed))
    shuffled = w.flatten(1)[:, order].view_as(w)
    assert torch.allclose(FUNCTIONS[name](w), FUNCTIONS[name](shuffled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["spectral", "matrix_norms", "frequency"])
def test_but_it_does_to_the_spectrum(name):
    w = torch.from_numpy(draw("normal", 4, 6, 9))
    order = torch.randperm(54, generator=torch.Generator().manual_seed(0))
    shuffled = w.flatten(1)[:, order].view_as(w)
    assert (FUNCTIONS[name](w) - FUNCTIONS[name](shuffled)).abs().max() > 0.1


@settings(max_examples=15, deadline=None)
@given(SMALL)
def test_permuting_rows_and_columns_keeps_the_spectrum_and_the_norms(case):
    rows, cols, seed = case
    w = torch.from_numpy(draw("normal", 4, rows, cols, seed))
    generator = torch.Generator().manual_seed(seed)
    permuted = w[:, torch.randperm(rows, generator=generator)][
        :, :, torch.randperm(cols, generator=generator)
    ]
    for name in ("spectral", "matrix_norms"):
        assert torch.allclose(FUNCTIONS[name](w), FUNCTIONS[name](permuted), rtol=2e-4, atol=1e-4)


def test_a_transpose_swaps_the_induced_norms_and_keeps_the_rest():
    w = torch.from_numpy(draw("normal", 4, 6, 9))
    there, back = FUNCTIONS["matrix_norms"](w), FUNCTIONS["matrix_norms"](w.mT.contiguous())
    assert torch.allclose(there[:, [0, 1, 2, 4, 3, 5, 6]], back, rtol=1e-5)
    assert not torch.allclose(there, back, rtol=1e-2)
    for name in ("frequency", "spectral", *ENTRYWISE):
        assert torch.allclose(FUNCTIONS[name](w), FUNCTIONS[name](w.mT.contiguous()), rtol=1e-4, atol=1e-5)


SCALES_WITH_WEIGHTS = {
    "simple_stats": range(5),
    "rank_based": range(11),
    "stats": range(5),
    "spectral": [*range(10), 31],
    "matrix_norms": range(5),
    "distribution": range(9),
    "frequency": range(13),
    "info_theoretic": [],
}


@pytest.mark.parametrize("name", SCALES_WITH_WEIGHTS)
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0.25, 2.0, 1024.0]), st.integers(0, 1000))
def test_columns_in_weight_units_scale_and_the_others_do_not(name, factor, seed):
    w = torch.from_numpy(draw("offset", 4, 5, 8, seed))
    before, after = FUNCTIONS[name](w), FUNCTIONS[name](w * factor)
    scaled = torch.zeros(before.shape[1], dtype=torch.bool)
    scaled[list(SCALES_WITH_WEIGHTS[name])] = True
    assert torch.allclose(after[:, scaled], before[:, scaled] * factor, rtol=1e-5)
    assert torch.allclose(after[:, ~scaled], before[:, ~scaled], rtol=1e-4, atol=1e-6)


# --- of the product

PRODUCT_NAMES = [name for name, spec in COMPUTED.items() if spec.source == "module"]
# R, in, out.
MODULES = [
    (1, 320, 320),
    (1, 768, 320),
    (2, 64, 48),
    (4, 96, 64),
    (8, 40, 24),
    (4, 1, 1),
    (3, 2, 9),
    (1, 1, 1),
    (5, 3, 40),
]


def draw_module(kind, n, r, inner, out, seed=0):
    """`down` as a LoRA is initialised and `up` as it learns:
    with one direction far above the others; or degenerate ones.
    """
    rng = np.random.default_rng([seed, r, inner, out])
    down, up = rng.normal(size=(n, r, inner)), 1e-2 * rng.normal(size=(n, out, r))
    if kind == "trained":
        up += (
            0.1
            * rng.normal(size=(1, out, 1))
            * (down @ rng.normal(size=(inner, 1)) / inner)[:, :, 0][:, None]
        )
    if kind == "less than its rank":
        up[:, :, -1] = 2 * up[:, :, 0]
    if kind == "ill-conditioned":
        down *= np.geomspace(1, 1e-6, r)[None, :, None]
    return down.astype(np.float32), up.astype(np.float32)


def product(name, down, up, **options):
    found, failed = describe_module(torch.as_tensor(down), torch.as_tensor(up), [name], **options)
    assert not failed, failed
    return found[name]


def assert_product_agrees(name, down, up):
    ours, truth = product(name, down, up).numpy(), oracles.represent_product(name, down, up)
    assert ours.shape == truth.shape == (len(down), project.SPECS[name].width) and ours.dtype == np.float32
    allowed = 1e-5 * truth.std(0) + 2e-7 * np.abs(truth).max(0) + 1e-13
    if (
        name == "product_directions"
    ):  # what lies beyond the last direction that is there is rounding: judged by the row
        allowed = allowed + 1e-6 * np.abs(truth).max()
    worst = np.abs(ours - truth) / allowed
    assert np.isfinite(ours).all() and worst.max() <= 1, (
        name,
        np.unravel_index(worst.argmax(), worst.shape),
        worst.max(),
    )


@pytest.mark.parametrize("kind", ["initial", "trained"])
@pytest.mark.parametrize("shape", MODULES, ids=str)
@pytest.mark.parametrize("name", PRODUCT_NAMES)
def test_a_product_representation_equals_its_oracle_on_the_dense_product(name, shape, kind):
    assert_product_agrees(name, *draw_module(kind, 12, *shape))


@pytest.mark.parametrize("kind", ["less than its rank", "ill-conditioned"])
@pytest.mark.parametrize("shape", [(2, 64, 48), (4, 96, 64)], ids=str)
@pytest.mark.parametrize("name", ["product_norms", "product_moments", "product_quantiles", "product_sketch"])
def test_products_of_less_than_their_rank(name, shape, kind):
    assert_product_agrees(name, *draw_module(kind, 12, *shape))


@pytest.mark.parametrize("kind", ["less than its rank", "ill-conditioned", "initial", "trained"])
@pytest.mark.parametrize("shape", [(2, 64, 48), (4, 96, 64), (3, 2, 9)], ids=str)
def test_singular_values_and_directions_of_ill_conditioned_products(shape, kind):
    down, up = draw_module(kind, 12, *shape)
    module = ModuleBatch(torch.from_numpy(down), torch.from_numpy(up))
    dense = up.astype(np.float64) @ down
    truth = np.linalg.svd(dense, compute_uv=False)[:, : module.m]
    assert np.abs(module.singular_values.numpy() - truth).max() <= 1e-12 * truth.max()
    assert np.abs(module.singular_values.numpy() / truth - 1)[truth > 1e-9 * truth.max()].max() < 1e-6
    left, right = module.directions(shape[0], whole=True)
    # Balanced factors of the same product.
    assert np.abs((left.mT @ right).numpy() - dense).max() <= 1e-12 * np.abs(dense).max()
    for vectors in (left, right):
        gram = (vectors @ vectors.mT).numpy()[:, : module.m, : module.m]
        assert np.abs(gram - np.eye(module.m) * truth[:, None]).max() <= 1e-9 * truth.max()


def test_both_kinds_of_rows_in_one_batch_stay_apart():
    """Well- and ill-conditioned rows take different ways; each row's numbers are its own."""
    well, ill = draw_module("initial", 5, 4, 30, 20), draw_module("ill-conditioned", 5, 4, 30, 20)
    down, up = (np.stack([well[side], ill[side]], 1).reshape(10, *well[side].shape[1:]) for side in (0, 1))
    assert (
        ModuleBatch(torch.from_numpy(down), torch.from_numpy(up)).svd_of_grams[3].tolist()
        == [False, True] * 5
    )
    for name in PRODUCT_NAMES:
        mixed = product(name, down, up)
        assert torch.allclose(mixed[0::2], product(name, *well), rtol=1e-5, atol=1e-9), name
        assert torch.allclose(mixed[1::2], product(name, *ill), rtol=1e-5, atol=1e-9), name


def regauged(down, up, rng):
    r = down.shape[1]
    q, p = (np.linalg.qr(rng.normal(size=(len(down), r, r)))[0] for _ in range(2))
    G = q * rng.uniform(0.5, 2, (len(down), 1, r)) * rng.choice([-1, 1], (len(down), 1, r)) @ p
    return (np.linalg.inv(G) @ down).astype(np.float32), (up @ G).astype(np.float32)


@pytest.mark.parametrize("name", PRODUCT_NAMES)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(8, 40), st.integers(8, 40), st.integers(0, 1000))
def test_a_product_representation_does_not_see_the_gauge(name, r, inner, out, seed):
    down, up = draw_module("initial", 16, r, inner, out, seed)
    before, after = product(name, down, up), product(name, *regauged(down, up, np.random.default_rng(seed)))
    spread = before.std(0)
    assert ((after - before).abs() <= 1e-3 * spread + 2e-7 * before.abs().amax(0)).all()


@pytest.mark.parametrize("name", [*NAMES, *PRODUCT_NAMES])
def test_but_the_nine_do_and_the_products_see_another_adapter(name):
    down, up = draw_module("initial", 16, 3, 30, 20)
    other_down, other_up = regauged(down, up, np.random.default_rng(1))
    if name in PRODUCT_NAMES:
        other_down, other_up = down, up * np.float32(1.5) if name != "product_sketch" else up[::-1].copy()
        before, after = product(name, down, up), product(name, other_down, other_up)
    else:
        before, after = (
            FUNCTIONS[name](torch.from_numpy(down)),
            FUNCTIONS[name](torch.from_numpy(other_down)),
        )
    assert ((after - before).abs() > 0.1 * before.std(0)).any(dim=1).all()


def test_moving_channels_keeps_what_does_not_depend_on_their_order_and_changes_what_does():
    down, up = draw_module("initial", 8, 2, 30, 20)
    rng = np.random.default_rng(0)
    moved = down[:, :, rng.permutation(30)], up[:, rng.permutation(20)]
    for name in PRODUCT_NAMES:
        same = torch.allclose(product(name, down, up), product(name, *moved), rtol=1e-4, atol=1e-7)
        assert same == (name not in ("product_sketch", "product_directions")), name


def test_a_zero_product_has_no_direction_and_nothing_invented():
    for down, up in (
        (torch.zeros(2, 3, 5), torch.ones(2, 4, 3)),
        (torch.ones(2, 1, 5), torch.zeros(2, 4, 1)),
    ):
        for name in PRODUCT_NAMES:
            assert (product(name, down, up) == 0).all(), name


def test_the_sketch_is_linear_in_the_product_and_keeps_inner_products_on_average():
    down, up = draw_module("initial", 2, 2, 400, 300)
    # W_0 + W_1 as one module.
    joined = (np.concatenate([down[:1], down[1:]], axis=1), np.concatenate([up[:1], up[1:]], axis=2))
    parts = product("product_sketch", down, up, sketch_size=40)
    assert torch.allclose(
        product("product_sketch", *joined, sketch_size=40)[0], parts.sum(0), rtol=1e-4, atol=1e-4
    )
    assert parts.shape == (2, 1600)
    dense = up.astype(np.float64) @ down
    assert float((parts[0] ** 2).mean()) == pytest.approx((dense[0] ** 2).sum(), rel=0.2)
    small = product("product_sketch", down, up, sketch_size=3).view(2, 3, 3)
    assert torch.allclose(small, parts.view(2, 40, 40)[:, :3, :3], rtol=1e-5)


def test_slices_of_rows_do_not_change_a_product(monkeypatch):
    down, up = draw_module("trained", 10, 4, 30, 20)
    whole = {name: product(name, down, up) for name in PRODUCT_NAMES}
    monkeypatch.setitem(representations.SLICE_PRODUCTS, "cpu", 700)
    for name in PRODUCT_NAMES:
        assert torch.allclose(product(name, down, up), whole[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(
    "down, up", [((4, 2, 5), (4, 6, 3)), ((4, 2, 5), (3, 6, 2)), ((4, 2, 5), (4, 0, 2)), ((2, 5), (6, 2))]
)
def test_what_is_no_module_is_refused(down, up):
    with pytest.raises(ValueError, match="expected down"):
        ModuleBatch(torch.zeros(down), torch.zeros(up))


# --- devices


def test_many_matrices_are_decomposed_in_batches(monkeypatch):
    w = torch.from_numpy(draw("normal", 10, 4, 9))
    whole = LayerBatch(w).singular_values
    monkeypatch.setattr(representations, "EIGH_BATCH", 3)
    assert torch.equal(LayerBatch(w).singular_values, whole)


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
    assert torch.allclose(found["spectral"], FUNCTIONS["spectral"](w))
    monkeypatch.setitem(REPRESENTATIONS, "stats", fails("CUFFT_ALLOC_FAILED"))
    with pytest.raises(torch.OutOfMemoryError):
        representations.describe(w, ["stats"])


def test_torchs_sort_gives_what_numpys_does():
    w = torch.from_numpy(draw("integers", 6, 4, 50))
    assert torch.equal(LayerBatch(w).sorted, LayerBatch(w).x.sort(dim=1).values)


@pytest.mark.parametrize("columns", [0, 1, 7, 10, 11, 640])
def test_the_largest_entries_are_those_of_a_full_sort(columns):
    x = torch.from_numpy(np.random.default_rng(columns).integers(0, 40, (20, columns)) / 8.0)
    expected = np.sort(x.numpy(), axis=1)[:, ::-1][:, : representations.TOP]
    assert np.array_equal(representations.largest(x, representations.TOP).numpy(), expected)


@pytest.mark.parametrize("shape", [(4, 1, 9), (4, 9, 1), (4, 1, 1), (4, 3, 5)])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_largest_sum_along_an_axis_is_that_of_numpy(shape, dim):
    w = torch.from_numpy(np.random.default_rng(1).random(shape).astype(np.float32))
    expected = w.numpy().sum(axis=dim, dtype=np.float64).max(axis=1)
    assert np.allclose(representations.largest_sum(w, dim).numpy(), expected, rtol=1e-14)
