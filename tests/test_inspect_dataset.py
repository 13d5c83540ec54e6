"""Looking at a collection: each diagnostic against a collection in which the answer was planted, and one in
which it was not.
"""

import json
import tracemalloc

import inspect_dataset
import numpy as np
import oracles
import pytest
from builders import collect
from datasets import Dataset, Features, List, Value

from ablation.catalogue import ENSEMBLE_MEMBERS, NINE, SPECS
from ablation.inspection import likeness, measure
from ablation.inspection.columns import COLUMN_NAMES, POSITIONS, Moments, redundant
from ablation.inspection.measure import inspect, read_groups
from ablation.reading import WeightReader
from ablation.settings import InputError

LAYERS = [
    f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.{kind}.to_q.lora"
    for i in range(2)
    for kind in ("attn1", "attn2")
]
N, RANK, WIDTH = 120, 4, 48
LABELS = np.arange(N) % 3


def planted(n=N, rank=RANK, width=WIDTH, std=None, seed=0):
    """{column: (n, rows, cols)} of Gaussian matrices, `down` with std 1/rank as at its initialisation."""
    rng = np.random.default_rng(seed)
    columns = {}
    for layer in LAYERS:
        columns[f"{layer}.down.weight"] = rng.normal(size=(n, rank, width)) * (std or 1 / rank)
        columns[f"{layer}.up.weight"] = rng.normal(size=(n, width, rank))
    return {name: w.astype(np.float32) for name, w in columns.items()}


def collection(columns, labels=LABELS, **others):
    features = {name: List(List(Value("float32"))) for name in columns}
    features |= {
        name: Value("int64" if isinstance(values[0], int) else "string") for name, values in others.items()
    }
    rows = (
        {name: w.tolist() for name, w in columns.items()}
        | others
        | {"category_label": [f"c{label}" for label in labels]}
    )
    return collect(
        Dataset.from_dict(rows, features=Features(features | {"category_label": Value("string")})), "x"
    )


def look(columns, labels=LABELS, group_column="", **others):
    data = collection(columns, labels, **others)
    return inspect(data, "x", read_groups(data, group_column))


def downs(columns):
    return [w for name, w in columns.items() if ".down." in name]


def ups(columns):
    return [w for name, w in columns.items() if ".up." in name]


def said(report, words):
    return any(words in finding for finding in report["findings"])


@pytest.fixture(scope="module")
def plain():
    """Nothing planted: a collection as it is before training, but for `up`."""
    return look(planted())


# --- what is in it


def test_contents(plain):
    assert (plain["rows"], plain["layers"], plain["ranks"]) == (
        N,
        {"attn1": 4, "attn2": 4, "other": 0},
        {"4": 8},
    )
    assert {"kind": "attn1", "side": "down", "rows": RANK, "cols": WIDTH, "layers": 2} in plain[
        "shapes"
    ] and len(plain["shapes"]) == 4
    assert (
        plain["weights_per_row"] == 8 * RANK * WIDTH and plain["bytes"]["weights"] == 4 * N * 8 * RANK * WIDTH
    )
    assert plain["bytes"]["features"] == 4 * N * 8 * (5 + 11 + 7 + 32 + 7 + 12 + 14 + 2)
    assert plain["classes"]["rows"] == {"c0": 40, "c1": 40, "c2": 40} and plain["groups"] is None


def test_ranks_of_both_sides_and_layers_of_no_attention():
    columns = {
        "unet.mid_block.ff.lora.down.weight": np.ones((12, 2, 5), np.float32),
        "unet.mid_block.ff.lora.up.weight": np.ones((12, 1, 2), np.float32),
        "unet.mid_block.attn1_to_q.lora_A.weight": np.ones((12, 3, 2), np.float32),
    }
    report = look(columns, np.arange(12) % 2)
    assert report["ranks"] == {"2": 2, "3": 1} and report["layers"] == {"attn1": 1, "attn2": 0, "other": 2}


def test_class_balance():
    labels = np.array([0] * 100 + [1] * 19 + [2])
    report = look(planted(), labels)
    classes = report["classes"]
    assert (classes["smallest"], classes["largest"]) == (1, 100)
    data = collection(planted(), labels)
    assert classes["always_guessing_the_largest"] == np.mean(labels[data.split.test] == 0)
    holding_the_one = next(part for part in ("train", "val", "test") if N - 1 in getattr(data.split, part))
    assert classes["missing_in"].keys() >= {"train", "val", "test"} - {holding_the_one} and said(
        report, "classes are unequal"
    )


def test_equal_classes_are_no_finding(plain):
    assert not said(plain, "classes are unequal")


# --- duplicate rows


def test_copies_are_found_with_their_split_and_labels():
    columns = planted()
    data = collection(columns)
    train, test = data.split.train, data.split.test
    for w in columns.values():
        w[test[0]] = w[train[0]]  # across the split
        w[train[2]] = w[train[3]] = w[train[1]]  # within it, three of a kind
    labels = np.zeros(N, int)
    labels[train[1]] = 1
    found = look(columns, labels)
    copies = found["duplicate_rows"]
    assert (
        copies["sets"],
        copies["rows"],
        copies["too_many"],
        copies["sets_on_both_sides"],
        copies["sets_of_several_classes"],
    ) == (2, 5, 3, 1, 1)
    assert sorted(copies["first"]) == sorted(
        [sorted(map(int, (train[0], test[0]))), sorted(map(int, train[1:4]))]
    )
    assert said(found, "3 rows are copies of others; 1 sets")


def test_rows_that_differ_in_one_weight_or_in_the_order_of_their_layers_are_no_copies(plain):
    assert plain["duplicate_rows"]["sets"] == 0
    columns = planted()
    for w in columns.values():
        w[1] = w[0]
    columns[f"{LAYERS[2]}.up.weight"][1, 3, 2] += 1e-6
    first, second = (f"{LAYERS[i]}.up.weight" for i in (0, 1))
    for w in columns.values():
        w[3] = w[2]
    columns[first][3], columns[second][3] = columns[second][2], columns[first][2]
    assert look(columns)["duplicate_rows"]["sets"] == 0


# --- groups


def grouped(leaking):
    """Groups of two rows of a class: on one side of the split, or one row in train and the other in test."""
    data = collection(planted())
    train, test = (getattr(data.split, part).tolist() for part in ("train", "test"))
    groups = [f"alone{i}" for i in range(N)]
    for i in range(0, 20, 2):
        groups[train[i]] = groups[train[i + 1]] = f"pair{i}"
    for i in range(leaking):
        groups[test[i]] = groups[train[i]]
    return groups, len(test)


def test_groups_on_both_sides_are_counted():
    groups, size = grouped(leaking=7)
    report = look(planted(), group_column="leaf", leaf=groups)
    found = report["groups"]
    assert (
        found["on_both_sides"]
        == len({groups[i] for i in collection(planted()).split.test} & {f"pair{i}" for i in range(20)})
        == 4
    )
    assert (found["test_rows_with_their_group_in_train"], found["test_rows"]) == (7, size) and said(
        report, "4 of"
    )
    assert found["first"] == [f"pair{i}" for i in (0, 2, 4, 6)]


def test_groups_on_one_side_are_no_finding():
    groups, _ = grouped(leaking=0)
    report = look(planted(), group_column="leaf", leaf=groups)
    assert report["groups"]["on_both_sides"] == report["groups"][
        "test_rows_with_their_group_in_train"
    ] == 0 and not said(report, "groups")


def test_category_name_is_the_group_column_and_may_be_the_class_itself():
    report = look(planted(), category_name=[f"name{label}" for label in LABELS])
    assert (
        report["groups"]["column"] == "category_name"
        and report["groups"]["is_the_label"]
        and not said(report, "groups")
    )
    nulls = look(planted(), group_column="leaf", leaf=[5 if i % 2 else None for i in range(1, N + 1)])[
        "groups"
    ]
    assert (nulls["groups"], nulls["rows_without"]) == (1, N // 2)


def test_an_unknown_group_column_is_refused():
    with pytest.raises(InputError, match="no --group-column 'nothing': use one of category_label"):
        look(planted(), group_column="nothing")


# --- initialisation and class signal


def test_down_that_is_its_initialisation_is_called_so(plain):
    found = plain["initialisation"]
    assert (
        found["std_is_that_of"] == "gaussian"
        and not found["rows_are_correlated"]
        and not plain["class_signal"]["down"]["significant"]
    )
    # A row is not compared with itself.
    assert abs(plain["class_signal"]["down"]["direction"]["within_minus_between"]) < 0.005
    assert abs(found["between_rows"]["mean"]) < 0.003 and found["between_rows"]["pairs"] == N * (N - 1) // 2
    assert said(plain, "`down` looks like its gaussian initialisation and nothing else")


def test_the_chance_spread_of_a_pair_of_rows_is_what_pairs_have(plain):
    """Means over four layers of cosines of independent directions in 192 dimensions."""
    assert plain["initialisation"]["between_rows"]["by_chance"] == pytest.approx(
        1 / np.sqrt(4 * RANK * WIDTH)
    )
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 200, RANK * WIDTH))
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    pairs = np.einsum("lid,ljd->ij", x, x)[np.triu_indices(200, 1)] / 4
    assert pairs.std() == pytest.approx(plain["initialisation"]["between_rows"]["by_chance"], rel=0.05)


def test_kaiming_initialisation():
    columns = planted()
    rng = np.random.default_rng(1)
    for w in downs(columns):
        w[:] = rng.uniform(-1, 1, w.shape) / np.sqrt(WIDTH)
    assert look(columns)["initialisation"]["std_is_that_of"] == "kaiming"


def test_down_that_has_grown_is_not_its_initialisation():
    report = look(planted(std=1.1 / RANK))
    assert report["initialisation"]["std_is_that_of"] is None and not said(report, "and nothing else")
    assert report["initialisation"]["std_over_initial"]["gaussian"]["mean"] == pytest.approx(1.1, abs=0.01)


def test_one_layer_that_has_grown_is_enough():
    columns = planted()
    downs(columns)[1][:] *= 1.2
    assert look(columns)["initialisation"]["std_is_that_of"] is None


def test_a_common_seed_shows_as_correlated_rows():
    columns = planted()
    for w in downs(columns):
        w[:] = 0.9 * w[:1] + np.sqrt(1 - 0.81) * w
    report = look(columns)
    assert report["initialisation"]["rows_are_correlated"] and report["initialisation"]["between_rows"][
        "mean"
    ] == pytest.approx(0.81, abs=0.05)
    assert said(report, "`down` is alike in all rows") and not said(report, "and nothing else")


def test_a_row_trained_on_from_another_is_found(plain):
    columns = planted()
    for w in downs(columns):
        w[50] = w[7] + 0.01 * w[50]
    assert said(look(columns), "two rows have nearly the same `down`") and not said(plain, "two rows")


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_direction_of_the_class_is_a_signal(side):
    columns = planted()
    rng = np.random.default_rng(5)
    for w in {"down": downs, "up": ups}[side](columns):
        direction = rng.normal(size=(3, *w.shape[1:]))
        w += 0.2 * w.std() * direction[LABELS]
        w /= np.linalg.norm(w, axis=(1, 2), keepdims=True)  # its size says nothing
    report = look(columns)
    signal, other = report["class_signal"][side], report["class_signal"]["up" if side == "down" else "down"]
    assert (
        signal["direction"]["p"] == 0.001
        and signal["size"]["p"] > 0.0025
        and signal["direction"]["within_minus_between"] > 0.01
    )
    assert not other["significant"] and said(report, f"`{side}` knows the class")


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_size_of_the_class_is_a_signal(side):
    columns = planted()
    for w in {"down": downs, "up": ups}[side](columns):
        w *= np.array([1, 1.1, 1.2], np.float32)[LABELS][:, None, None]
    report = look(columns)
    signal, other = report["class_signal"][side], report["class_signal"]["up" if side == "down" else "down"]
    assert (
        signal["size"]["p"] == 0.001
        and signal["direction"]["p"] > 0.0025
        and signal["size"]["variance_between_classes"] > 0.3
    )
    assert not other["significant"]


def test_the_p_values_are_those_of_chance_without_a_signal():
    rng = np.random.default_rng(0)
    p = []
    for seed in range(8):
        report = look(planted(width=12, n=40, seed=seed), rng.permutation(LABELS[:40]))
        p += [
            report["class_signal"][side][what]["p"]
            for side in ("down", "up")
            for what in ("direction", "size")
        ]
    assert min(p) > 0.001 and sum(value <= 0.1 for value in p) <= 8 and 0.3 < np.mean(p) < 0.7


def test_equal_norms_carry_no_signal():
    columns = planted()
    for w in downs(columns):
        w /= np.linalg.norm(w, axis=(1, 2), keepdims=True)
    assert look(columns)["class_signal"]["down"]["size"]["p"] > 0.0025


def test_untrained_modules_are_counted(plain):
    columns = planted()
    ups(columns)[0][:5] = 0
    report = look(columns)
    assert (
        report["zero_matrices"] == {"down": 0, "up": 5}
        and said(report, "5 `up` matrices are zero")
        and not said(plain, "zero")
    )


# --- columns


def test_every_column_has_its_name():
    assert {name: len(names) for name, names in COLUMN_NAMES.items()} == {
        name: SPECS[name].width for name in NINE
    }
    assert all(len(set(names)) == len(names) for names in COLUMN_NAMES.values())
    assert sorted(
        np.concatenate([positions for name, positions in POSITIONS.items() if name != "ensemble"])
    ) == list(range(90))


def test_names_stand_for_what_the_columns_hold():
    w = np.random.default_rng(0).normal(size=(3, 20))
    values = {
        name: dict(zip(COLUMN_NAMES[name], getattr(oracles, name)(w), strict=True))
        for name in ("simple_stats", "rank_based", "stats", "spectral", "matrix_norms", "distribution")
    }
    assert (
        values["simple_stats"]["max"] == values["stats"]["max"] == w.max()
        and values["simple_stats"]["min"] == w.min()
    )
    assert (
        values["rank_based"]["p75"] - values["rank_based"]["p25"]
        == values["rank_based"]["iqr"]
        == values["distribution"]["iqr"]
    )
    assert (
        values["spectral"]["s_1"] == pytest.approx(np.linalg.norm(w, 2)) == values["matrix_norms"]["spectral"]
    )
    assert (
        values["spectral"]["nuclear"] == pytest.approx(values["matrix_norms"]["nuclear"])
        and values["spectral"]["s_4"] == 0
    )
    assert values["matrix_norms"]["one"] == pytest.approx(np.abs(w).sum(0).max())


def test_redundant_columns_known_answer():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 500))
    columns = np.stack([a, b, 2 * a + 3, a + b, c, -b, a + 1e-2 * rng.normal(size=500)])
    assert redundant(np.corrcoef(columns)) == ({2: 0, 5: 1}, [3])
    assert redundant(np.eye(4)) == ({}, [])


def test_the_columns_that_rank_one_leaves():
    found = look(planted(rank=1))["representations"]
    spectral = found["spectral"]
    beyond = (
        [f"s_{i}" for i in range(2, 11)]
        + [f"share_{i}" for i in range(1, 11)]
        + [f"gap_{i}" for i in range(1, 10)]
        + ["entropy", "condition"]
    )
    assert spectral["constant"]["in_every_layer"] == beyond
    assert spectral["degrees_of_freedom"] == 1 and spectral["effective"] == pytest.approx(1)
    assert spectral["duplicate"]["in_every_layer"] == ["nuclear"] and spectral["same_as"]["nuclear"] == "s_1"
    norms = found["matrix_norms"]
    assert norms["degrees_of_freedom"] == 3 and norms["duplicate"]["in_every_layer"] == [
        "nuclear",
        "spectral",
    ]
    dead = (
        norms["constant"]["in_every_layer"]
        + norms["rounding"]["in_every_layer"]
        + norms["rounding"]["in_some_layers"]
    )
    assert {"nuclear/frobenius", "spectral/frobenius"} <= set(dead) | set(norms["constant"]["in_some_layers"])


def test_the_columns_that_rank_four_leaves(plain):
    found = plain["representations"]
    assert found["simple_stats"]["degrees_of_freedom"] == 5 and found["stats"]["degrees_of_freedom"] == 7
    assert (
        found["info_theoretic"]["same_as"] == {"entropy/log50": "entropy"}
        and found["info_theoretic"]["degrees_of_freedom"] == 1
    )
    assert (
        found["rank_based"]["collinear"]["in_every_layer"] == ["iqr", "range"]
        and found["rank_based"]["degrees_of_freedom"] == 9
    )
    assert (
        found["spectral"]["constant"]["a_layer"] == 18
        and "s_4" not in found["spectral"]["constant"]["in_every_layer"]
    )
    assert 1 < found["stats"]["effective"] < 7
    parts = sum(found[part]["degrees_of_freedom"] for part in ENSEMBLE_MEMBERS)
    assert found["ensemble"]["degrees_of_freedom"] < parts  # they repeat each other
    assert not any(known["too_few_rows"] for known in found.values()) and said(plain, "spectral (12 of 32)")


def test_planted_constant_columns(plain):
    columns = planted()
    for w in columns.values():
        w[:, 0, 0] = 50
        w[:, 1, 1] = -50
    found = look(columns)["representations"]
    assert (
        found["simple_stats"]["constant"]["in_every_layer"] == ["max", "min"]
        and found["simple_stats"]["degrees_of_freedom"] == 3
    )
    assert plain["representations"]["simple_stats"]["constant"]["in_every_layer"] == []
    only = planted()
    downs(only)[2][:, 0, 0] = 50
    assert look(only)["representations"]["simple_stats"]["constant"] == {
        "a_layer": 1 / 8,
        "in_every_layer": [],
        "in_some_layers": ["max"],
    }


def test_constant_rounding_and_varying_columns_over_several_blocks():
    rng = np.random.default_rng(0)
    x = np.stack(
        [np.full(40, 3.0), 3 + 1e-7 * rng.normal(size=40), rng.normal(size=40), np.r_[1.0, np.full(39, 2.0)]],
        axis=1,
    )
    moments = Moments()
    for block in np.split(x, 4):
        moments.add(block)
    assert moments.constant().tolist() == [True, False, False, False] and moments.rounding().tolist() == [
        False,
        True,
        False,
        False,
    ]
    which = np.array([2, 3])
    np.testing.assert_allclose(moments.correlations(which), np.corrcoef(x[:, which].T), atol=1e-12)


def test_a_column_that_is_only_rounding():
    columns = planted()
    for w in columns.values():
        w /= np.linalg.norm(w.astype(np.float64), axis=(1, 2), keepdims=True)
    found = look(columns)["representations"]["simple_stats"]
    assert (
        "frobenius"
        in found["rounding"]["in_every_layer"]
        + found["constant"]["in_every_layer"]
        + found["rounding"]["in_some_layers"]
    )
    assert found["degrees_of_freedom"] == 4


def test_too_few_rows_are_said():
    report = look(planted(n=20), LABELS[:20])
    assert (
        report["representations"]["frequency"]["too_few_rows"] is False
        and report["representations"]["ensemble"]["too_few_rows"] is True
    )
    assert not said(report, "ensemble (")


# --- reading, and what the command prints


def test_every_weight_is_read_once_and_blocks_do_not_matter(monkeypatch, plain):
    reads = []
    original = WeightReader.read_layer

    def read_layer(self, layer, start, stop):
        reads.extend((layer, row) for row in range(start, stop))
        return original(self, layer, start, stop)

    monkeypatch.setattr(WeightReader, "read_layer", read_layer)
    monkeypatch.setattr(measure, "BLOCK_ROWS", 25)
    report = look(planted())
    assert len(reads) == len(set(reads)) == N * 8

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        return pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value

    assert report == rounded(plain)


def test_memory_does_not_grow_with_the_weights(monkeypatch):
    """Four times the rows, 7 MB more weights:
    the peak of what NumPy holds may grow by less than a tenth of that.
    """
    monkeypatch.setattr(measure, "BLOCK_ROWS", 100)
    monkeypatch.setattr(measure, "SAMPLE_ROWS", 50)
    monkeypatch.setattr(likeness, "PERMUTATIONS", 9)
    peaks = []
    for n in (400, 1600):
        data = collection(planted(n=n), np.arange(n) % 3)
        tracemalloc.start()
        inspect(data, "x", None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.7e6, peaks


def test_a_bad_weight_is_an_error(capsys, tmp_path):
    columns = planted()
    columns[f"{LAYERS[0]}.up.weight"][3, 0, 0] = np.nan
    collection(columns).weights.dataset.with_format(None).save_to_disk(tmp_path / "set")
    assert inspect_dataset.main([str(tmp_path / "set")]) == 2
    assert "row 3: the weight at (0, 0) is nan" in capsys.readouterr().err
    assert inspect_dataset.main([str(tmp_path / "nowhere")]) == 2


def test_text_and_json(capsys, tmp_path):
    columns = planted()
    for w in columns.values():
        w[9] = w[4]
    collection(columns, leaf=[f"g{i // 2}" for i in range(N)]).weights.dataset.with_format(None).save_to_disk(
        tmp_path / "set"
    )
    assert inspect_dataset.main([str(tmp_path / "set"), "--group-column", "leaf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["rows"] == N
        and report["duplicate_rows"]["first"] == [[4, 9]]
        and report["groups"]["groups"] == N // 2
    )
    assert inspect_dataset.main([str(tmp_path / "set"), "--group-column", "leaf"]) == 0
    text = " ".join(capsys.readouterr().out.split())  # lines end where the folder's name leaves them to
    for words in (
        "120 rows, 3 classes",
        "4 attn1, 4 attn2, 0 other; rank 4 (8 layers)",
        "1 rows too many in 1 sets of equal rows, the first 4, 9",
        "Groups: 60 in leaf",
        "std(down)",
        "info_theoretic: duplicate in every layer: entropy/log50 = entropy",
        "Findings",
    ):
        assert words in text
    for finding in report["findings"]:
        assert " ".join(finding.split()) in text


def test_a_collection_too_small_to_say_anything(capsys):
    assert inspect_dataset.main(["sanity-check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split_overlaps"] and said(report, "train, validation and test are the same rows")
