"""The synthetic collection: the published topology,
the signal where it was asked for, the same rows whatever the layout.
"""

import contextlib
import io

import numpy as np
import pytest
import torch
from builders import load
from make_synthetic_dataset import main

from ablation.making.synthetic import class_directions


def make(path, *flags):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main([str(path), *flags])
        except SystemExit as end:
            return end.code, errors.getvalue()
    return 0, errors.getvalue()


def mean_square_by_class(data, kind):
    """Spread between classes of the mean square weight of the layers of a kind,
    in units of what chance gives.
    """
    layers = [layer for layer, of in zip(data.layers.names, data.layers.words, strict=True) if of == kind][
        :16
    ]
    # (n, layers)
    values = torch.stack(
        [data.weights.read_layer(layer, 0, data.num_rows).square().mean((1, 2)) for layer in layers], dim=1
    )
    labels = torch.from_numpy(data.labels)
    means = torch.stack([values[labels == c].mean(0) for c in range(len(data.classes))])
    within = torch.stack(
        [values[labels == c].var(0) / (labels == c).sum() for c in range(len(data.classes))]
    ).mean(0)
    return float((means.var(0) / within).mean())


@pytest.mark.parametrize(
    "signal, knowing",
    [("none", ()), ("attn1", ("attn1",)), ("attn2", ("attn2",)), ("both", ("attn1", "attn2"))],
)
def test_the_signal_is_where_it_was_planted_and_nowhere_else(tmp_path, signal, knowing):
    assert make(tmp_path / "set", "--rows", "120", "--signal", signal, "--strength", "0.2")[0] == 0
    data = load(str(tmp_path / "set"))
    assert (
        len(data.layers.names) == 128
        and sum(shape.rows * shape.cols for shape in data.layers.layouts.values()) == 99_648
        and len(data.classes) == 10
    )
    for kind in ("attn1", "attn2"):
        spread = mean_square_by_class(data, kind)
        assert spread > 5 if kind in knowing else spread < 2, (kind, spread)


def kernel_by_class(data, kind):
    """Mean inner product of two rows' products,
    less its mean over pairs of different classes, over the std of one pair.
    """
    kernel = np.zeros((data.num_rows, data.num_rows))
    for module in data.layers.modules:
        if data.layers.words[module.down] == kind:
            down, up = (
                data.weights.read_layer(data.layers.names[position], 0, data.num_rows).double().numpy()
                for position in (module.down, module.up)
            )
            kernel += np.einsum("iok,jol,ika,jla->ij", up, up, down, down, optimize=True)
    same = data.labels[:, None] == data.labels
    pairs = ~np.eye(len(kernel), dtype=bool)
    return (
        (kernel[same & pairs].mean() - kernel[~same].mean())
        / kernel[~same].std()
        * np.sqrt((same & pairs).sum() / 2)
    )


@pytest.mark.parametrize("rank", ["1", "2"])
def test_a_signal_in_the_product_is_in_nothing_else(tmp_path, rank):
    assert (
        make(tmp_path / "set", "--rows", "120", "--signal", "attn1", "--carrier", "product", "--rank", rank)[
            0
        ]
        == 0
    )
    data = load(str(tmp_path / "set"))
    assert kernel_by_class(data, "attn1") > 6 and abs(kernel_by_class(data, "attn2")) < 4
    assert mean_square_by_class(data, "attn1") < 2
    a, b = class_directions(0, 1, 320, 64)
    assert np.abs(a).tolist() == np.ones((10, 320)).tolist() and np.abs(a.sum(1)).max() == 0
    # No Fourier magnitude tells.
    assert np.allclose(np.abs(np.fft.fft(a)), np.abs(np.fft.fft(a[0])), atol=1e-3)
    assert np.abs(a @ a.T / 320 - np.eye(10)).max() < 0.25 and np.allclose((b**2).sum(1), 1)


def test_rows_depend_on_the_seed_alone(tmp_path):
    for name, flags in {
        "a": ["--rows", "30"],
        "b": ["--rows", "20", "--layout", "array2d"],
        "c": ["--rows", "20", "--layout", "fixed"],
        "d": ["--rows", "20", "--seed", "1"],
    }.items():
        assert make(tmp_path / name, *flags)[0] == 0
    sets = {name: load(str(tmp_path / name)) for name in "abcd"}
    layer = sets["a"].layers.names[5]
    first = {name: data.weights.read_layer(layer, 0, 20) for name, data in sets.items()}
    assert (
        torch.equal(first["a"], first["b"])
        and torch.equal(first["a"], first["c"])
        and not torch.equal(first["a"], first["d"])
    )
    assert (
        sets["a"].weights.dataset["category_label"][:20].tolist()
        == sets["b"].weights.dataset["category_label"][:].tolist()
    )


def test_ranks_and_folders(tmp_path):
    assert make(tmp_path / "set", "--rows", "4", "--rank", "4")[0] == 0
    assert load(str(tmp_path / "set")).summary()["ranks"] == [4]
    status, error = make(tmp_path / "set", "--rows", "4")
    assert status == 2 and "choose another folder, or --overwrite" in error
    assert make(tmp_path / "set", "--rows", "5", "--overwrite")[0] == 0
    assert load(str(tmp_path / "set")).num_rows == 5
    (tmp_path / "mine").mkdir()
    assert make(tmp_path / "mine", "--overwrite")[0] == 2 and (tmp_path / "mine").exists()
