"""Experiment 6: its samples, and its measures against float64 NumPy in the residual space."""

import json
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import DATA
from sae_analysis import InputError, measures
from sae_analysis.samples import FILES, read_samples, spread

# --- samples


def test_there_are_fifty_samples_a_domain_whose_completions_are_of_like_length():
    samples = read_samples(DATA)
    assert len(samples) == 200 and len({sample.id for sample in samples}) == 200
    assert len({sample.prompt for sample in samples}) == 200
    for domain in FILES:
        own = [sample for sample in samples if sample.domain == domain]
        assert len(own) == 50 and {sample.complexity for sample in own} <= {1, 2, 3}
        lengths = np.array([[len(sample.fact), len(sample.hallucination)] for sample in own])
        assert abs(lengths[:, 0].mean() - lengths[:, 1].mean()) < 4
    first = samples[0]
    assert first.texts == (
        first.prompt,
        f"{first.prompt} {first.fact}",
        f"{first.prompt} {first.hallucination}",
    )
    assert all(sample.fact != sample.hallucination for sample in samples)


def test_some_samples_are_spread_over_the_domains():
    few = spread(read_samples(DATA), 6)
    assert [sample.domain for sample in few].count("entity") == 2 and len(few) == 6
    assert {sample.domain for sample in spread(read_samples(DATA, ["logical"]), 3)} == {"logical"}


def test_the_files_domain_counts(tmp_path):
    row = {
        "id": 7,
        "domain": "geography",
        "complexity": "high",
        "prompt": "a",
        "fact": "b",
        "hallucination": "c",
    }
    (tmp_path / FILES["entity"]).write_text(json.dumps([row]))
    (sample,) = read_samples(tmp_path, ["entity"])
    assert (sample.id, sample.domain, sample.complexity) == ("7", "entity", "high")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda rows: {"rows": rows}, "is no list"),
        (lambda rows: rows[:3] + ["text"], "index 3 is no object"),
        (
            lambda rows: rows[:2] + [{k: v for k, v in rows[2].items() if k != "fact"}],
            "index 2 has no 'fact'",
        ),
        (lambda rows: [rows[0] | {"prompt": " "}], "index 0: 'prompt' is empty"),
        (lambda rows: [rows[0] | {"fact": 3}], "index 0: 'fact' is empty or no text"),
        (lambda rows: [rows[0], rows[1], rows[0]], "index 2: id 'entity_001' stands twice"),
        (lambda rows: [rows[0] | {"id": "logical_001"}], "index 0: id 'logical_001' stands in .* too"),
        (lambda rows: [rows[0] | {"complexity": [1]}], "'complexity' is neither"),
        (lambda rows: [rows[0] | {"complexity": float("nan")}], "'complexity' is neither"),
        (lambda rows: [rows[0] | {"complexity": 10**40}], "'complexity' is neither"),
        (lambda rows: [rows[0] | {"id": True}], "'id' is empty or no text"),
        (lambda rows: [rows[0] | {"fact": "\ud800"}], "'fact' holds half of a surrogate pair"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_with_file_and_index(tmp_path, change, reason):
    shutil.copytree(DATA, tmp_path / "data")
    path = tmp_path / "data" / FILES["entity"]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=reason):
        read_samples(tmp_path / "data")


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / FILES["entity"]).write_bytes(b"\xef\xbb\xbf" + (DATA / FILES["entity"]).read_bytes())
    assert len(read_samples(tmp_path, ["entity"])) == 50


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*bench_logical_inversions.json"):
        read_samples(tmp_path, ["logical"])
    (tmp_path / FILES["logical"]).write_text("[{")
    with pytest.raises(InputError, match="cannot read"):
        read_samples(tmp_path, ["logical"])


# --- measures


def some_features(seed=0, texts=12, width=90, d=24):
    """Features of which many are 0, of one text all and of others all but one or two; and a decoder."""
    rng = np.random.default_rng(seed)
    f = rng.exponential(size=(texts, width)) * (rng.random((texts, width)) < 0.3)
    f[0], f[1], f[2] = 0.0, 0.0, 0.0
    f[1, 5], f[2, [3, 8]] = 2.0, [1.0, 0.25]
    return f, rng.normal(size=(width, d))


def dense_geometry(f, decoder):
    """Of one text, from the d x d covariance."""
    active = f > 0
    if not active.any():
        return np.zeros(decoder.shape[1]), np.zeros(decoder.shape[1]), 0.0, 0.0, "None"
    w, rows = f[active] / f[active].sum(), decoder[active]
    c = w @ rows
    values, vectors = np.linalg.eigh((rows - c).T @ np.diag(w) @ (rows - c))
    values = np.where(values[::-1] > 1e-12 * values[-1], values[::-1], 0.0)
    if values[0] == 0:
        return c, np.zeros_like(c), 0.0, 0.0, "Prolate"
    a, b, third = np.sqrt(values[:3])
    if b / a > 0.9 and third / a > 0.9:
        shape = "Spherical"
    elif b / a > 0.8 and third / a < 0.6:
        shape = "Oblate"
    elif b / a < 0.6 and third / a < 0.6:
        shape = "Prolate"
    else:
        shape = "Triaxial"
    return c, vectors[:, -1], third / a, values.sum() ** 2 / (values**2).sum(), shape


@pytest.mark.parametrize("seed, d", [(0, 24), (1, 24), (2, 200), (3, 3)])  # n below, about and above d
def test_fault_6_the_geometry_is_that_of_the_covariance_in_the_residual_space(seed, d):
    f, decoder = some_features(seed, d=d)
    found = measures.geometry(torch.from_numpy(f), torch.from_numpy(decoder))
    for i, of_text in enumerate(f):
        centroid, axis, sphericity, dimensionality, shape = dense_geometry(of_text, decoder)
        np.testing.assert_allclose(found.centroid[i], centroid, atol=1e-10)
        assert abs(abs(float(found.axis[i] @ torch.from_numpy(axis))) - np.linalg.norm(axis)) < 1e-8
        assert float(found.sphericity[i]) == pytest.approx(sphericity, abs=1e-8)
        assert float(found.dimensionality[i]) == pytest.approx(dimensionality, rel=1e-8, abs=1e-8)
        assert found.shapes[i] == shape


def test_a_text_has_the_same_geometry_alone_and_among_others():
    f, decoder = map(torch.from_numpy, some_features(5))
    together = measures.geometry(f, decoder)
    for i in range(len(f)):
        alone = measures.geometry(f[i : i + 1], decoder)
        assert alone.shapes[0] == together.shapes[i]
        for one, all_ in zip(alone[:4], together[:4], strict=True):
            torch.testing.assert_close(one[0].abs(), all_[i].abs(), rtol=1e-9, atol=1e-9)


def test_parts_and_a_missing_axis_change_no_number(monkeypatch):
    f, decoder = map(torch.from_numpy, some_features(8))
    whole = measures.geometry(f, decoder)
    monkeypatch.setattr(measures, "MOST_NUMBERS", 40 * decoder.shape[1])
    parts = measures.geometry(f, decoder)
    monkeypatch.setattr(measures, "MOST_NUMBERS", 1)
    alone = measures.geometry(f, decoder, with_axis=False)
    assert parts.shapes == alone.shapes == whole.shapes and not alone.axis.any()
    for found in (parts, alone):
        torch.testing.assert_close(found.dimensionality, whole.dimensionality, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.sphericity, whole.sphericity, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.centroid, whole.centroid, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.axis.abs(), whole.axis.abs(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "b, c, shape", [(0.95, 0.95, "Spherical"), (0.85, 0.5, "Oblate"), (0.5, 0.4, "Prolate")]
)
def test_shapes_have_the_names_of_their_ellipsoids(b, c, shape):
    assert measures.shape_of(b, c) == shape
    assert (
        measures.shape_of(0.7, 0.5)
        == measures.shape_of(0.85, 0.7)
        == measures.shape_of(0.9, 0.9)
        == "Triaxial"
    )


def test_gini_and_entropy_are_those_of_their_definitions():
    f, _ = some_features(6, width=200)
    found, spread = measures.gini(torch.from_numpy(f)), measures.entropy(torch.from_numpy(f))
    for i, of_text in enumerate(f):
        active = np.sort(of_text[of_text > 0])
        n = len(active)
        pairs = np.abs(active[:, None] - active).sum() / (2 * n * active.sum()) if n else 0.0
        assert float(found[i]) == pytest.approx(pairs, abs=1e-12)  # the mean absolute difference
        top = np.sort(active)[-50:]
        assert float(spread[i]) == pytest.approx(scipy.stats.entropy(top) if n else 0.0, abs=1e-12)


def test_angles_have_degrees_and_axes_no_sign():
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1e-9, 0]], dtype=torch.float64)
    y = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    small = np.degrees(1e-9)
    assert measures.angle(x, y).tolist() == pytest.approx([90, 180, 45, 0, small])
    assert measures.axis_angle(x, y).tolist() == pytest.approx([90, 0, 45, 0, small])
    assert measures.cosine(x, y).tolist() == pytest.approx([0, -1, np.sqrt(0.5), 0, 1])


def test_top_sets_hold_active_features_only():
    f, _ = some_features(7)
    sets = measures.top_sets(torch.from_numpy(f))
    assert sets[0] == set() and sets[1] == {5} and sets[2] == {3, 8}
    assert sets[4] == set(np.argsort(-f[4])[:10].tolist())
    assert measures.jaccard(set(), set()) == 1.0 and measures.jaccard({1, 2}, {2, 3}) == pytest.approx(1 / 3)
    assert measures.l0_norm(torch.from_numpy(f)).tolist() == (f > 0).sum(1).tolist()
