"""One pass over the weights: whatever its blocks, threads and memory, the same features."""

import pytest
import torch
from builders import collect, lora_dataset, room_for

import representations
from ablation import extraction
from ablation.catalogue import NINE, REPRESENTATION_GROUPS, SPECS
from ablation.collection import LoraCollection
from ablation.extraction import Request, extract_features
from ablation.reading import WeightReader
from checkpointing import Unfinished

NAMES = [*(name for name in NINE if name != "ensemble"), *REPRESENTATION_GROUPS["product"]]
WIDTHS = {name: SPECS[name].width for name in NAMES}


@pytest.fixture
def data() -> LoraCollection:
    return collect(lora_dataset(n=40, signal=True), "x")


def features_of(data, widths=WIDTHS):
    found = extract_features(Request(data, widths))
    assert not found.errors
    return found.features


def test_features_stand_layer_by_layer_and_module_by_module(data):
    found = features_of(data)
    layers = [data.weights.read_layer(layer, 0, 40) for layer in data.layers.names]
    assert torch.allclose(
        found["stats"], torch.cat([representations.stats(w) for w in layers], dim=1), rtol=1e-6
    )
    assert [module.name for module in data.layers.modules] == [
        layer.replace("lora.down", "lora.*") for layer in data.layers.names if "lora.down" in layer
    ]
    for name in REPRESENTATION_GROUPS["product"]:
        of_modules = [
            representations.describe_module(layers[module.down], layers[module.up], [name])[0][name]
            for module in data.layers.modules
        ]
        assert torch.allclose(found[name], torch.cat(of_modules, dim=1), rtol=1e-5, atol=1e-7), name


def test_what_else_is_wanted_changes_nothing(data):
    whole = features_of(data)
    for name in NAMES:
        assert torch.allclose(
            features_of(data, {name: WIDTHS[name]})[name], whole[name], rtol=1e-6, atol=1e-7
        ), name


def test_blocks_do_not_change_a_number(data, monkeypatch):
    whole = features_of(data)
    monkeypatch.setattr(extraction, "BLOCK_ROWS", 7)
    monkeypatch.setitem(representations.SLICE_WEIGHTS, "cpu", 30)
    monkeypatch.setitem(representations.SLICE_PRODUCTS, "cpu", 60)
    pieces = features_of(data)
    for name in NAMES:
        assert torch.allclose(whole[name], pieces[name], rtol=1e-6, atol=1e-7), name


def test_the_way_of_a_gpu_gives_the_same_features(data):
    """Layers read ahead by threads and described in turn; `cpu:0` is a CPU that takes that way."""
    ours, theirs = (
        features_of(data),
        extract_features(Request(collect(data.weights.dataset, "x", "cpu:0"), WIDTHS)),
    )
    assert theirs.reading > 0 and theirs.computing > 0
    for name in NAMES:
        assert torch.equal(ours[name], theirs.features[name]), name


def test_layers_are_counted_as_they_are_done(data, monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK_ROWS", 16)
    for device in ("cpu", "cpu:0"):
        for widths in (WIDTHS, {"stats": 7}, {"product_norms": 7}):
            done = []
            extract_features(Request(collect(data.weights.dataset, "x", device), widths), done.append)
            assert sum(done) == pytest.approx(16)


def test_a_layer_that_a_gpu_has_no_room_for_is_described_in_halves(data, monkeypatch):
    ours = features_of(data)
    real, sizes = torch.Tensor.copy_, []

    def copy_(self, source, non_blocking=False):
        if non_blocking:  # the upload
            raise torch.OutOfMemoryError("pretended")
        return real(self, source)

    def describe_module(down, up, names, sketch_size):
        if len(down) > 20:
            raise torch.OutOfMemoryError("pretended")
        return real_module(down, up, names, sketch_size)

    real_module = representations.describe_module
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(representations, "describe", room_for(20, sizes))
    monkeypatch.setattr(representations, "describe_module", describe_module)
    theirs = features_of(collect(data.weights.dataset, "x", "cpu:0"))
    assert {40, 20} == set(sizes)
    for name in NAMES:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7), name


def test_a_killed_pass_loses_one_block_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK_ROWS", 7)
    data = collect(lora_dataset(n=40))
    widths = {"stats": 7, "spectral": 32}
    whole = extraction.extract_features(extraction.Request(data, widths))
    kept = Unfinished(tmp_path, "features", {"a": 1})
    real, read = WeightReader.read_layer, []

    def killed(self, layer, start, *rest):
        read.append(start)
        if start == 21 and len(read) > 3 * len(data.layers) + 5:
            raise KeyboardInterrupt
        return real(self, layer, start, *rest)

    monkeypatch.setattr(WeightReader, "read_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        extraction.extract_features(extraction.Request(data, widths), kept=kept)
    read.clear()

    def counted(self, layer, start, *rest):
        read.append(start)
        return real(self, layer, start, *rest)

    monkeypatch.setattr(WeightReader, "read_layer", counted)
    layers = []
    again = extraction.extract_features(extraction.Request(data, widths), layers.append, kept)
    assert sorted(set(read)) == [21, 28, 35] and sum(layers) == pytest.approx(len(data.layers))
    assert all(torch.equal(again.features[name], whole.features[name]) for name in widths)
    read.clear()
    fewer = extraction.extract_features(extraction.Request(data, {"spectral": 32}), kept=kept)
    assert not read and torch.equal(fewer.features["spectral"], whole.features["spectral"])
    more = extraction.extract_features(
        extraction.Request(data, {"spectral": 32, "simple_stats": 5}), kept=kept
    )
    assert set(read) == set(range(0, 40, 7)) and set(more.features) == {"spectral", "simple_stats"}
    read.clear()
    extraction.extract_features(extraction.Request(data, {"stats": 7, "simple_stats": 5}), kept=kept)
    assert not read, "a later list keeps the blocks of an earlier one"
    damaged = kept.path("rows14")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = extraction.extract_features(extraction.Request(data, widths), kept=kept)
    assert set(read) == {14} and torch.equal(again.features["stats"], whole.features["stats"])
