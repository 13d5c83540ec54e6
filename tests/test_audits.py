"""Audits: which rows are changed, how, and what is said about it."""

import numpy as np
import pytest
import torch
from builders import collect, lora_columns, lora_dataset
from datasets import Dataset

from ablation import audits, extraction
from ablation.audits import AUDIT_CLASSES, GAUGE_STRETCH, NOISE_LEVELS, GaugeAudit, NoiseAudit
from ablation.catalogue import AUDITS
from ablation.collection import LoraCollection
from ablation.extraction import Request, extract_features
from representations import REPRESENTATIONS, describe_module

TEST = np.array([23, 4, 17, 9, 0])


@pytest.fixture(params=[1024, 7])
def data(request, monkeypatch) -> LoraCollection:
    """24 rows of rank 2, in one block or in four."""
    for module in (audits, extraction):
        monkeypatch.setattr(module, "BLOCK_ROWS", request.param)
    return collect(lora_dataset(n=24), "x")


def changed_layers(data, audit):
    """Every layer as the audit reads it, block by block: (E, rows, cols) each."""
    found = []
    for position, layer in enumerate(data.layers.names):
        blocks = []
        for start in range(0, data.num_rows, extraction.BLOCK_ROWS):
            stop = min(start + extraction.BLOCK_ROWS, data.num_rows)
            blocks.append(
                audit.change(
                    data.weights, position, (start, stop), data.weights.read_layer(layer, start, stop)
                )
            )
            assert len(blocks[-1]) == len(audit.rows_in(start, stop))
        found.append(torch.cat(blocks).double())
    return found


def test_settings_name_the_audits():
    assert list(AUDIT_CLASSES) == list(AUDITS)
    data = collect(lora_dataset(n=50), "x")
    for name, kind in AUDITS.items():
        assert (
            len(AUDIT_CLASSES[name].of_test_rows(data.num_rows, np.arange(10)).rows) == kind.changed_rows * 50
        )


def test_positions_find_the_row_in_its_variant(data):
    for make in AUDIT_CLASSES.values():
        audit = make.of_test_rows(data.num_rows, TEST)
        seen = {}
        for position, row in enumerate(audit.rows):
            seen.setdefault(row, []).append(position)
        for i, variant in enumerate(audit.variants):
            assert audit.positions(variant, TEST).tolist() == [seen[row][i] for row in TEST]


def test_a_gauge_changes_both_layers_and_not_their_product(data):
    audit = GaugeAudit.of_test_rows(data.num_rows, TEST)
    assert audit.rows.tolist() == list(range(24))
    layers, changed = (
        [data.weights.read_layer(layer, 0, 24).double() for layer in data.layers.names],
        changed_layers(data, audit),
    )
    for module in data.layers.modules:
        before, after = (of[module.up] @ of[module.down] for of in (layers, changed))
        assert (after - before).abs().max() < 1e-5 * before.abs().max()
        G = torch.linalg.pinv(layers[module.up]) @ changed[module.up]  # (n, r, r)
        s = torch.linalg.svdvals(G)
        assert s.min() > 0.999 / GAUGE_STRETCH and s.max() < 1.001 * GAUGE_STRETCH
        # Each row's own, of either sign.
        assert (G - G[:1]).abs().amax((1, 2))[1:].min() > 0.01 and G.det().sign().unique().tolist() == [-1, 1]
        assert (
            not torch.allclose(
                G, torch.linalg.pinv(layers[data.layers.modules[0].up]) @ changed[data.layers.modules[0].up]
            )
            or module is data.layers.modules[0]
        )


def test_a_layer_without_a_partner_has_no_gauge():
    columns = lora_columns(n=12)
    alone = next(name for name in columns if "up" in name)
    del columns[alone]
    data = collect(
        Dataset.from_dict(
            {name: w.tolist() for name, w in columns.items()} | {"category_label": ["a", "b"] * 6}
        ),
        "x",
    )
    partner = data.layers.names.index(alone.replace("up", "down"))
    w = data.weights.read_layer(data.layers.names[partner], 0, 12)
    assert len(data.layers.modules) == 7 and torch.equal(
        GaugeAudit.of_test_rows(data.num_rows, TEST).change(data.weights, partner, (0, 12), w), w
    )


def test_noise_has_the_std_that_it_says_in_test_rows_only(data):
    audit = NoiseAudit.of_test_rows(data.num_rows, TEST)
    assert sorted(audit.rows) == sorted(np.repeat(TEST, len(NOISE_LEVELS))) and audit.variants == (
        "1%",
        "5%",
        "10%",
        "20%",
    )
    first = None
    for layer, changed in zip(data.layers.names, changed_layers(data, audit), strict=True):
        w = data.weights.read_layer(layer, 0, 24).double()[TEST]
        noise = [changed[audit.positions(variant, TEST)] - w for variant in audit.variants]
        for level, of_level in zip(NOISE_LEVELS, noise, strict=True):
            # One draw, scaled.
            assert torch.allclose(of_level / level, noise[-1] / NOISE_LEVELS[-1], atol=2e-4)
        ratio = noise[-1].flatten(1).std(1) / w.flatten(1).std(1, correction=0)
        assert ratio.mean() == pytest.approx(0.2, rel=0.25) and len(ratio.unique()) == len(TEST)
        first = noise[-1] if first is None else first
        assert layer == data.layers.names[0] or not torch.allclose(first.flatten(), noise[-1].flatten())


def test_what_is_drawn_does_not_depend_on_the_way_of_reading(data):
    on_gpus_way = collect(data.weights.dataset, "x", "cpu:0")
    widths = {"simple_stats": 5, "product_sketch": 256}
    for make in AUDIT_CLASSES.values():
        ours = extract_features(Request(data, widths, audit=make.of_test_rows(data.num_rows, TEST)))
        theirs = extract_features(Request(on_gpus_way, widths, audit=make.of_test_rows(data.num_rows, TEST)))
        assert not ours.errors
        for name in widths:
            assert torch.equal(ours.features[name], theirs.features[name]), name


def test_features_of_changed_rows_are_those_of_changed_weights(data):
    widths = {"stats": 7, "product_norms": 7}
    for make in AUDIT_CLASSES.values():
        audit = make.of_test_rows(data.num_rows, TEST)
        found = extract_features(Request(data, widths, audit=audit)).features
        changed = [w.float() for w in changed_layers(data, audit)]
        expected = torch.cat([REPRESENTATIONS["stats"](w) for w in changed], dim=1)
        assert torch.allclose(found["stats"], expected, rtol=1e-6, atol=1e-7)
        pairs = [
            describe_module(changed[module.down], changed[module.up], ["product_norms"])[0]["product_norms"]
            for module in data.layers.modules
        ]
        assert torch.allclose(found["product_norms"], torch.cat(pairs, dim=1), rtol=1e-6, atol=1e-7)


def test_changes_are_in_units_of_a_columns_spread(data):
    rng = np.random.default_rng(0)
    x, train = rng.normal(size=(24, 300)) * rng.uniform(0.1, 10, 300), np.arange(12)
    x[:, 5] = 2.0  # constant: left out, as the trainers do
    for make in AUDIT_CLASSES.values():
        audit = make.of_test_rows(data.num_rows, TEST)
        changed = x[audit.rows] + 0.1 * rng.normal(size=(len(audit.rows), 300))
        found = audit.changes(torch.from_numpy(x), torch.from_numpy(changed), train)
        for i, variant in enumerate(audit.variants):
            which = np.flatnonzero(audit.is_changed)
            rows = [[p for p in range(len(audit.rows)) if audit.rows[p] == row][i] for row in which]
            difference = np.delete(
                (changed[rows] - x[which]) / np.where(x.std(0) > 0, x.std(0), 1), 5, axis=1
            )
            assert found[variant] == pytest.approx(
                {"largest": np.abs(difference).max(), "rms": np.sqrt((difference**2).mean())}
            )
