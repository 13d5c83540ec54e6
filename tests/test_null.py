"""Random halves of the modules: which they are, how they are read, and what their places mean."""

import json
import shutil

import builders
import numpy as np
import pytest
import scipy.stats
import torch
from builders import lora_dataset
from running import FAST, folder
from sklearn.linear_model import Ridge
from sklearn.model_selection import StratifiedKFold

from ablation import half_reader, null_reading, ridge
from ablation.catalogue import NULL_HALVES, NULL_PRODUCT
from ablation.collection import View
from ablation.half_reader import ModuleColumns, read_view
from ablation.halves import ModuleSets, module_sets, why_no_halves
from ablation.layers import ColumnLayout, Layers, sd15_shapes
from ablation.null import null_evidence
from ablation.ridge import RIDGE_SHARES, RidgeReader, RidgeTask
from ablation.robustness import place_among
from ablation.splits import Split
from ablation.task import TrainingError
from checkpointing import read_arrays


def layers_of(names):
    return Layers(sorted(names), {name: ColumnLayout(name, 2, 2, "float32", True) for name in names})


def block(number, kind, projection, side="down"):
    return (
        f"unet.down_blocks.{number}.attentions.0.transformer_blocks.0.{kind}.{projection}.lora.{side}.weight"
    )


# --- the halves


def test_each_half_has_as_many_modules_of_each_block_as_the_visual_layers():
    layers = layers_of([name for name, _, _ in sd15_shapes(1)])
    sets = module_sets(layers)
    assert sets.halves.shape == (NULL_HALVES, 64) and sets.is_text_equal and not why_no_halves(layers)
    names = sorted({name.partition(".lora.")[0] for name in layers.names})
    of_block = np.array(
        [name.partition(".attentions")[0] + name[name.index(".attentions") :][:13] for name in names]
    )
    for chosen in [*sets.halves, *sets.tuning, sets.named[2]]:
        counts = [int(chosen[of_block == one].sum()) for one in np.unique(of_block)]
        assert counts == [int(sets.named[1][of_block == one].sum()) for one in np.unique(of_block)]
    assert sets.named[0].all() and not (sets.named[1] & sets.named[2]).any()
    assert len({chosen.tobytes() for chosen in [*sets.halves, *sets.tuning]}) == NULL_HALVES + len(
        sets.tuning
    )
    third = [sets.module_of[i] for i in layers.positions("random_half.3")]
    assert sets.halves[3].nonzero()[0].tolist() == sorted(set(third))


def test_halves_tell_nothing_where_few_are_possible_or_the_kinds_are_unknown():
    few = [block(i, kind, p) for i in range(2) for kind in ("attn1", "attn2") for p in ("to_q", "to_v")]
    assert "36 different halves" in why_no_halves(layers_of(few))
    assert not why_no_halves(layers_of([*few, block(2, "attn1", "to_q"), block(2, "attn2", "to_q")]))
    assert why_no_halves(layers_of([name for name in few if "attn1" in name])).startswith(
        "the blocks allow 1 "
    )
    assert "not known" in why_no_halves(layers_of(["some.thing.lora.down.weight"]))


def test_text_layers_are_a_half_only_if_each_block_has_as_many():
    names = [block(i, kind, p) for i in range(4) for kind in ("attn1", "attn2") for p in ("to_q", "to_v")]
    assert module_sets(layers_of(names)).is_text_equal
    assert not module_sets(layers_of([*names, block(0, "attn2", "to_k")])).is_text_equal


# --- the reader


def task_of(rng, rows=40, widths=(3, 5, 2, 4, 6), weighted=False):
    """Rows of three classes, seen through modules with columns of these widths."""
    labels = np.arange(rows + 30) % 3
    modules = np.repeat(np.arange(len(widths)), widths)
    x = rng.normal(size=(len(labels), len(modules))) + 0.7 * rng.normal(size=(3, len(modules)))[labels]
    x = ((x - x[:rows].mean(0)) / x[:rows].std(0)).astype(np.float32)
    weights = rng.uniform(0.2, 3, rows) if weighted else None
    return RidgeTask(x, modules, labels, (rows, 14, 16), len(widths), 3, weights)


def sklearn_outputs(task, mask, share, rows):
    """Outputs of scikit-learn's ridge regression in float64, with the penalty as a share of the kernel's mean
    diagonal over the training rows.
    """
    x = task.columns[:, mask[task.modules]].astype(float)
    weights = np.ones(task.sizes[0]) if task.weights is None else task.weights
    train = x[task.train]
    centred = train - np.average(train, 0, weights)
    penalty = share * float((weights[:, None] * centred**2).sum()) / task.sizes[0]
    model = Ridge(penalty).fit(train, np.eye(3)[task.labels[task.train]], weights)
    return model.predict(x[rows])


@pytest.mark.parametrize("rows", [10, 40], ids=["wide", "narrow"])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_the_reader_is_ridge_regression_as_scikit_learn_has_it(rows, weighted, monkeypatch):
    task = task_of(np.random.default_rng(rows), rows, weighted=weighted)
    masks = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0]], bool)
    reader = RidgeReader(task)
    for share in RIDGE_SHARES:
        expected = [sklearn_outputs(task, mask, share, task.test) for mask in masks]
        outputs = whole(reader, masks, share) + reader.mean
        assert np.allclose(outputs, expected, rtol=0, atol=2e-5)
        assert np.array_equal(reader.classes(masks, share), np.argmax(expected, axis=2))
    monkeypatch.setattr(ridge, "BLOCK_VALUES", 300)  # a few rows at a time
    monkeypatch.setattr(ridge, "SETS_AT_ONCE", 1)
    assert np.allclose(whole(RidgeReader(task), masks, 1.0), whole(reader, masks, 1.0), rtol=0, atol=1e-5)


def whole(reader, masks, share):
    """All outputs (S, n, C) for the test rows."""
    test = reader.task.test
    found = np.full((len(masks), test.stop - test.start, 3), np.nan)
    for places, rows, outputs in reader.outputs(masks, share, test):
        found[places, rows.start - test.start : rows.stop - test.start] = outputs
    return found


def test_the_penalty_has_the_least_squared_error_on_the_validation_rows():
    for seed in range(6):
        task = task_of(np.random.default_rng(seed), 25)
        masks = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], bool)
        truth = np.eye(3)[task.labels[task.val]]
        errors = [
            np.mean([((sklearn_outputs(task, mask, share, task.val) - truth) ** 2).mean() for mask in masks])
            for share in RIDGE_SHARES
        ]
        assert RidgeReader(task).best_share(masks) == RIDGE_SHARES[int(np.argmin(errors))]


def test_a_set_without_a_column_that_varies_answers_the_most_frequent_class():
    task = task_of(np.random.default_rng(1))
    empty = np.zeros((1, 5), bool)
    frequent = np.bincount(task.labels[task.train]).argmax()
    assert (RidgeReader(task).classes(empty, 1.0) == frequent).all()
    with pytest.raises(np.linalg.LinAlgError, match="not positive"):
        ridge.solved(-np.eye(3, dtype=np.float32) * 5, 1.0, np.ones((3, 1), np.float32))


# --- simulated collections

PAIRS, WIDTH = 7, 3  # modules of each kind, columns of each


def sets_of(rng, halves=39):
    """Sets of 7 visual and 7 text modules: halves of all, as in one block."""

    def draw(count):
        masks = np.zeros((count, 2 * PAIRS), bool)
        for mask in masks:
            mask[rng.choice(2 * PAIRS, PAIRS, replace=False)] = True
        return masks

    visual = np.arange(2 * PAIRS) < PAIRS
    named = np.stack([np.ones(2 * PAIRS, bool), visual, ~visual])
    return ModuleSets(np.arange(2 * PAIRS), named, draw(halves), draw(2), True)


def answers_of(rng, strengths, rows=120, classes=4, halves=39):
    """What halves tell of simulated rows whose modules know the class as strongly as `strengths` say."""
    labels = np.arange(rows) % classes
    modules = np.repeat(np.arange(2 * PAIRS), WIDTH)
    means = rng.normal(size=(classes, len(modules))) * np.repeat(strengths, WIDTH)
    x = torch.from_numpy((rng.normal(size=(rows, len(modules))) + means[labels]).astype(np.float32))
    folds = []
    for rest, test in StratifiedKFold(3, shuffle=True, random_state=int(rng.integers(1000))).split(x, labels):
        folds.append(Split(rest[len(rest) // 8 :], rest[: len(rest) // 8], test, False))
    view = View(labels, folds[0], tuple(folds))
    sets = sets_of(rng, halves)
    found = read_view(ModuleColumns(lambda numbers: x[numbers], modules), view, folds, sets)
    facts = {"is_text_equal": np.array(True), "train_rows": np.array(70)}
    return facts | {f"{key}.0": values for key, values in found.items()}


def test_where_all_modules_know_as_much_each_place_is_equally_likely():
    rng = np.random.default_rng(3)
    alike = np.full(2 * PAIRS, 0.25)
    p_values, contrasts = [], []
    for _ in range(60):
        found = null_evidence({"stats": answers_of(rng, alike)}, ["stats"], None, None)
        p_values.append(found["mean"]["visual"]["p_lower"])
        contrasts.append(found["mean"]["text_minus_visual"]["p"])
    # With ties p-values are a little too large; so the test is of how many are small.
    assert np.mean(np.array(p_values) <= 0.05) <= scipy.stats.binom.ppf(0.999, 60, 0.05) / 60
    assert np.mean(np.array(contrasts) < 0.05) <= scipy.stats.binom.ppf(0.999, 60, 0.05) / 60
    assert 0.3 < np.mean(p_values) < 0.75


def test_a_half_that_knows_nothing_is_lowest_and_the_other_reads_more():
    rng = np.random.default_rng(4)
    for strengths, is_lower in (
        ([0.0] * PAIRS + [0.4] * PAIRS, True),
        ([0.4] * PAIRS + [0.0] * PAIRS, False),
    ):
        answers = answers_of(rng, np.array(strengths))
        found = null_evidence({"stats": answers}, ["stats"], None, None)
        entry = found["mean"]
        assert entry["visual"]["rank"] == (1 if is_lower else 40)
        assert entry["text"]["rank"] == (40 if is_lower else 1)
        contrast = entry["text_minus_visual"]
        assert contrast["p"] < 0.001 and (contrast["drop"] > 0) == is_lower
        assert {test["what"] for test in found["tests"]} == {"place", "text_minus_visual"}


def test_scores_are_shares_of_right_answers_and_balanced_ones_mean_recalls():
    answers = answers_of(np.random.default_rng(5), np.full(2 * PAIRS, 0.3))
    labels, told = answers["labels.0"], answers["predictions.0"]
    plain = null_evidence({"stats": answers}, ["stats"], None, None)["mean"]
    balanced = null_evidence({"stats": answers}, ["stats"], None, labels)["mean"]
    for number, layer_set in enumerate(("all_layers", "visual_only", "text_only")):
        assert plain[layer_set] == pytest.approx((told[number] == labels).mean())
        recalls = [(told[number][:, labels == c] == c).mean() for c in range(4)]
        assert balanced[layer_set] == pytest.approx(np.mean(recalls))
    assert plain["halves"] == pytest.approx(answers["hits.0"].sum((0, 2)) / answers["counts.0"].sum())
    assert plain["fall_of_halves"]["mean"] == pytest.approx(plain["all_layers"] - np.mean(plain["halves"]))
    recalls = answers["hits.0"].sum(0) / answers["counts.0"].sum(0)
    assert balanced["halves"] == pytest.approx(recalls.mean(1))


def test_text_layers_that_are_not_as_many_are_not_compared():
    answers = answers_of(np.random.default_rng(6), np.full(2 * PAIRS, 0.3)) | {
        "is_text_equal": np.array(False)
    }
    found = null_evidence({"stats": answers}, ["stats"], None, None)
    assert found["mean"]["text_minus_visual"] is None
    assert [test["what"] for test in found["tests"]] == ["place"] and not found["is_text_equal"]


def test_p_values_of_a_place_count_the_set_itself_and_ties():
    assert place_among(0.1, [0.2, 0.3, 0.4]) == {
        "rank": 1,
        "p_lower": 0.25,
        "p_higher": 1.0,
        "p_two_sided": 0.5,
    }
    tied = place_among(0.3, [0.1, 0.3 + 1e-13, 0.5, 0.6])
    assert (tied["rank"], tied["p_lower"], tied["p_higher"]) == (2, 0.6, 0.8)


# --- the program


@pytest.fixture
def four_blocks(monkeypatch):
    """Rows with four blocks of two visual and two text modules; the text ones know the class."""
    modules = [
        f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.{kind}.{p}.lora"
        for i in range(4)
        for kind in ("attn1", "attn2")
        for p in ("to_q", "to_v")
    ]
    monkeypatch.setattr(builders, "MODULES", modules)
    return lambda name, **given: lora_dataset(
        **{"n": 60, "signal": 1.0, "knowing": ("attn2",)} | given
    ).save_to_disk(name)


def null_of(place, name="wide"):
    return json.loads((folder(place, name) / "results.json").read_text())["inference"]["null"]


def test_every_run_has_the_halves_and_a_second_command_reads_none(run, place, four_blocks):
    four_blocks("wide")
    chosen = ("--representations", "stats", "simple_stats", "--num-runs", "5")
    fast = [flag for flag in FAST if flag not in ("--num-runs", "2")]
    status, log = run(*chosen, dataset="./wide", fast=fast)
    assert status == 0 and "Reading 199 random halves of the modules by 3 representations" in log
    kept = folder(place, "wide") / "null"
    assert {path.stem for path in kept.glob("*.safetensors")} == {"stats", "simple_stats", NULL_PRODUCT}
    found = null_of(place)
    assert {entry["representation"] for entry in found["entries"]} == {"simple_stats", "stats"}
    assert found["mean"]["visual"]["rank"] == 1 and found["product"]["representation"] == NULL_PRODUCT
    text = (folder(place, "wide") / "results.txt").read_text()
    assert "Visual layers among 199 random halves" in text

    assert "Reading" not in run(*chosen, dataset="./wide", fast=fast)[1] and null_of(place) == found
    (kept / "stats.safetensors").write_bytes((kept / "stats.safetensors").read_bytes()[:-8])
    (folder(place, "wide") / ".finished.json").unlink(missing_ok=True)
    status, log = run(*chosen, dataset="./wide", fast=fast)
    assert status == 0 and "by 1 representation (" in log and null_of(place) == found
    shutil.rmtree(kept)
    (folder(place, "wide") / ".finished.json").unlink(missing_ok=True)
    run(*chosen, "--no-cache-features", dataset="./wide", fast=fast)
    assert null_of(place) == found


def test_what_is_read_is_what_scikit_learn_reads_of_the_same_columns(run, place, four_blocks, monkeypatch):
    """The visual half of `stats` by the program, against its definition on the weights themselves."""
    four_blocks("wide")
    monkeypatch.setattr(half_reader.RidgeReader, "best_share", lambda self, masks: 1.0)
    run("--representations", "stats", dataset="./wide")
    arrays, _ = read_arrays(folder(place, "wide") / "null" / "stats.safetensors")
    data = builders.load("./wide")
    from representations import stats

    split = data.split
    visual = [name for name in data.layers.names if ".attn1." in name]
    x = (
        torch.cat([stats(data.weights.read_layer(name, 0, data.num_rows)) for name in visual], 1)
        .double()
        .numpy()
    )
    x = (x - x[split.train].mean(0)) / x[split.train].std(0)
    penalty = float((x[split.train] ** 2).sum()) / len(split.train)
    model = Ridge(penalty).fit(x[split.train], np.eye(3)[data.labels[split.train]])
    rows = arrays["rows.0"]
    assert sorted(split.test.tolist()) == rows.tolist()
    assert np.array_equal(arrays["predictions.0"][1, 0], model.predict(x[rows]).argmax(1))


def test_of_many_rows_some_are_read_and_the_same_in_every_fold(run, place, four_blocks, monkeypatch):
    four_blocks("wide")
    monkeypatch.setattr(null_reading, "TRAIN_ROWS", 20)
    monkeypatch.setattr(null_reading, "VAL_ROWS", 3)
    monkeypatch.setattr(null_reading, "TEST_ROWS", 30)
    status, _ = run(
        "--representations", "stats", "--folds", "3", "--num-runs", "6", dataset="./wide", fast=FAST[2:]
    )
    assert status == 0
    arrays, _ = read_arrays(folder(place, "wide") / "null" / "stats.safetensors")
    assert len(arrays["rows.0"]) == 30 and arrays["predictions.0"].shape == (3, 2, 30)
    assert arrays["train_rows"] == 20 and arrays["counts.0"].sum() == 60
    assert sorted(np.unique(arrays["runs.0"])) == list(range(6))
    found = null_of(place)
    assert found["train_rows"] == 20 and found["test_rows"] == 30


def test_an_error_of_the_halves_costs_no_cell_and_is_not_hidden(run, place, four_blocks, monkeypatch):
    four_blocks("wide")

    def fail(*given):
        raise RuntimeError("no factor")

    with monkeypatch.context() as patched:
        patched.setattr(half_reader, "RidgeReader", fail)
        status, log = run("--representations", "stats", dataset="./wide")
    results = json.loads((folder(place, "wide") / "results.json").read_text())
    assert status == 1 and "Random halves FAILED: RuntimeError: no factor" in log and "Traceback" in log
    assert not results["failed_cells"] and results["inference"]["null"] is None
    assert "no factor" in results["inference"]["null_problem"]
    assert run("--representations", "stats", dataset="./wide")[0] == 0 and null_of(place)


def test_a_representation_that_cannot_be_read_leaves_the_others(run, place, four_blocks, monkeypatch):
    four_blocks("wide")
    real = half_reader.ridge_task

    def task(columns, *given):
        if len(columns.modules) == 7 * 32:  # of stats
            raise TrainingError("no column varies")
        return real(columns, *given)

    with monkeypatch.context() as patched:
        patched.setattr(half_reader, "ridge_task", task)
        status, log = run("--representations", "stats", "simple_stats", dataset="./wide")
    found = null_of(place)
    assert status == 1 and "Random halves FAILED: stats: no column varies" in log
    assert found["representations"] == ["simple_stats"] and found["product"]
    assert run("--representations", "stats", "simple_stats", dataset="./wide")[0] == 0
    assert sorted(null_of(place)["representations"]) == ["simple_stats", "stats"]


def test_representations_that_an_earlier_command_read_count_too(run, place, four_blocks):
    four_blocks("wide")
    run("--representations", "stats", dataset="./wide")
    assert "by 1 representation (" in run("--representations", "simple_stats", dataset="./wide")[1]
    assert sorted(null_of(place)["representations"]) == ["simple_stats", "stats"]


def test_other_answers_of_the_halves_make_the_verdict_anew(run, place, four_blocks, monkeypatch):
    four_blocks("wide")
    run("--representations", "stats", dataset="./wide")
    before = null_of(place)
    shutil.rmtree(folder(place, "wide") / "null")
    (folder(place, "wide") / ".finished.json").unlink(missing_ok=True)
    monkeypatch.setattr(half_reader.RidgeReader, "best_share", lambda self, masks: 1e4)
    run("--representations", "stats", dataset="./wide")
    assert null_of(place)["mean"]["halves"] != before["mean"]["halves"]


def test_with_fitted_representations_alone_no_half_is_read_and_the_reason_is_said(run, place, four_blocks):
    four_blocks("wide")
    status, log = run("--representations", "pca", dataset="./wide")
    results = json.loads((folder(place, "wide") / "results.json").read_text())
    assert status == 0 and "Reading" not in log and not (folder(place, "wide") / "null").exists()
    assert "fitted" in results["inference"]["null_problem"] and "fitted" in results["analysis_plan"]["null"]


def test_a_run_without_such_halves_says_why(run, place):
    fast = [*FAST[2:], "--num-runs", "5"]
    status, log = run("--representations", "stats", fast=fast)
    assert status == 0 and "no random halves: the blocks allow 36 different halves" in log
    results = json.loads((folder(place) / "results.json").read_text())
    assert results["inference"]["null"] is None and not (folder(place) / "null").exists()
    assert "36 different halves" in results["inference"]["null_problem"]


def test_the_last_of_several_parts_reads_the_halves(run, place, four_blocks):
    four_blocks("wide")
    run("--representations", "stats", dataset="./wide")
    whole = null_of(place)
    for part in ("1/2", "2/2"):
        status, log = run(
            "--representations", "stats", "--cells", part, "--output-dir", "parts", dataset="./wide"
        )
        assert status == 0
    assert "Reading 199 random halves" in log
    results = json.loads((folder(place, "wide", "parts") / "results.json").read_text())
    assert results["inference"]["null"] == whole


def test_the_page_shows_the_halves(run, place, four_blocks):
    four_blocks("wide")
    run("--representations", "stats", dataset="./wide", fast=[*FAST[:-1]])
    report = folder(place, "wide")
    assert (report / "figures" / "halves.png").stat().st_size > 5000
    page = (report / "report.html").read_text()
    assert "Compared with any other half of the layers" in page and "Beside random halves" in page
    lines = (report / "tables" / "halves.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * NULL_HALVES
    heads, *rows = (report / "tables" / "null.csv").read_text().splitlines()
    assert heads.startswith("representation,all_layers,visual_only,text_only") and len(rows) == 3
