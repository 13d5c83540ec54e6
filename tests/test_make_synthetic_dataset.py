"""The synthetic collection: the published topology, the signal where it was asked for, the same rows whatever the layout."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lora_data import load_lora_data


def make(path, *flags):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "make_synthetic_dataset.py"), str(path), *flags], capture_output=True, text=True)
    return done.returncode, done.stderr


def mean_square_by_class(data, kind):
    """Spread between classes of the mean square weight of the layers of a kind, in units of what chance gives."""
    layers = [layer for layer, of in zip(data.layers, data.kinds, strict=True) if of == kind][:16]
    values = torch.stack([data.read_layer(layer, 0, data.num_rows).square().mean((1, 2)) for layer in layers], dim=1)     # (n, layers)
    labels = torch.from_numpy(data.labels)
    means = torch.stack([values[labels == c].mean(0) for c in range(len(data.classes))])
    within = torch.stack([values[labels == c].var(0) / (labels == c).sum() for c in range(len(data.classes))]).mean(0)
    return float((means.var(0) / within).mean())


@pytest.mark.parametrize("signal, knowing", [("none", ()), ("attn1", ("attn1",)), ("attn2", ("attn2",)), ("both", ("attn1", "attn2"))])
def test_the_signal_is_where_it_was_planted_and_nowhere_else(tmp_path, signal, knowing):
    assert make(tmp_path / "set", "--rows", "120", "--signal", signal, "--strength", "0.2")[0] == 0
    data = load_lora_data(str(tmp_path / "set"))
    assert len(data.layers) == 128 and sum(shape.rows * shape.cols for shape in data.matrices.values()) == 99_648 and len(data.classes) == 10
    for kind in ("attn1", "attn2"):
        spread = mean_square_by_class(data, kind)
        assert spread > 5 if kind in knowing else spread < 2, (kind, spread)


def test_rows_depend_on_the_seed_alone(tmp_path):
    for name, flags in {"a": ["--rows", "30"], "b": ["--rows", "20", "--layout", "array2d"], "c": ["--rows", "20", "--layout", "fixed"],
                        "d": ["--rows", "20", "--seed", "1"]}.items():
        assert make(tmp_path / name, *flags)[0] == 0
    sets = {name: load_lora_data(str(tmp_path / name)) for name in "abcd"}
    layer = sets["a"].layers[5]
    first = {name: data.read_layer(layer, 0, 20) for name, data in sets.items()}
    assert torch.equal(first["a"], first["b"]) and torch.equal(first["a"], first["c"]) and not torch.equal(first["a"], first["d"])
    assert sets["a"].dataset["category_label"][:20].tolist() == sets["b"].dataset["category_label"][:].tolist()


def test_ranks_and_folders(tmp_path):
    assert make(tmp_path / "set", "--rows", "4", "--rank", "4")[0] == 0
    assert load_lora_data(str(tmp_path / "set")).card()["ranks"] == [4]
    status, error = make(tmp_path / "set", "--rows", "4")
    assert status == 2 and "choose another folder, or --overwrite" in error
    assert make(tmp_path / "set", "--rows", "5", "--overwrite")[0] == 0
    assert load_lora_data(str(tmp_path / "set")).num_rows == 5
    (tmp_path / "mine").mkdir()
    assert make(tmp_path / "mine", "--overwrite")[0] == 2 and (tmp_path / "mine").exists()
