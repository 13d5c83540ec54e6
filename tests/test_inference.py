"""Tests and intervals against scipy and statsmodels, and by simulated experiments whose truth is known."""

import math
import re

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import simulate_inference
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from ablation import estimators, family, inference, resampling, samples, simulated_choice, simulation, worlds
from ablation import verdict as sentences
from ablation.cells import Cell
from ablation.estimators import (
    SplitRows,
    binomial_error,
    chance_level,
    difference,
    difference_over_splits,
    holm,
    sign_flip_test,
    standard_error,
    training_noise,
    two_level_bootstrap,
)
from ablation.family import Margin
from ablation.fold_estimators import variance_of_runs
from ablation.samples import Sample
from ablation.simulation import World


def verdict(found):
    """The verdict; every one that a test asks for has sentences of at most 25 words."""
    text = sentences.verdict(found).text
    for sentence in re.split(r"(?<=\.) ", text):
        assert len(sentence.split()) <= 25, sentence
    return text


def experiment(rng, **world):
    return simulation.experiment(rng, World(**world))


# --- against scipy and statsmodels


@pytest.mark.parametrize("seed", range(3))
def test_the_sign_flip_test_is_scipys_permutation_test_of_paired_samples(seed):
    rng = np.random.default_rng(seed)
    few, many = rng.normal(0.4, 1, 11), rng.normal(0.1, 1, 60)
    exact = scipy.stats.permutation_test((few,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(few) == pytest.approx(exact.pvalue)
    approximate = scipy.stats.permutation_test(
        (many,), np.sum, permutation_type="samples", n_resamples=99_999, rng=rng
    )
    assert sign_flip_test(many) == pytest.approx(approximate.pvalue, abs=4 * math.sqrt(0.25 / 9999))


def test_groups_flip_as_one_and_examples_without_a_difference_do_not_count():
    d, groups = np.array([1.0, 1, 1, -1, 0, 0, 1]), np.array([5, 5, 7, 7, 7, 9, 9])
    assert sign_flip_test(d, groups) == pytest.approx(sign_flip_test(np.array([2.0, 1.0]))) == 0.5
    assert (
        sign_flip_test(np.concatenate([d, np.zeros(50)])) == sign_flip_test(d)
        and sign_flip_test(np.zeros(9)) == 1
    )


def test_one_run_is_the_paired_t_test_and_its_equivalence_test():
    first, second, _ = experiment(np.random.default_rng(0), runs=1, drop=0.08)
    found, d = difference(first, second, 0.05), first[0].astype(float) - second[0]
    expected, error = scipy.stats.ttest_1samp(d, 0), scipy.stats.sem(d)
    assert found["standard_error"] == pytest.approx(error)
    assert (
        found["p_examples_and_runs"]
        == pytest.approx(2 * scipy.stats.t.sf(d.mean() / error, 200))
        == pytest.approx(expected.pvalue, abs=0.005)
    )
    equal = ttost_paired(first[0].astype(float), second[0].astype(float), -0.05, 0.05)[0]
    assert found["p_equivalence"] == pytest.approx(equal, abs=0.005)
    low, high = expected.confidence_interval()
    assert (
        found["interval"][0] <= low
        and found["interval"][1] >= high
        and found["training_noise_interval"] is None
    )
    assert found["d_z"] == pytest.approx(d.mean() / d.std(ddof=1))


@pytest.mark.parametrize("groups", [0, 12])
def test_the_spread_is_that_of_two_way_mean_squares(groups):
    first, second, group = experiment(np.random.default_rng(1), n=40, runs=6, run_sd=0.05, groups=groups)
    D = first.astype(float) - second
    R, n = D.shape
    mean = sum(D[r, i] for r in range(R) for i in range(n)) / (R * n)
    rows, columns = [sum(D[r]) / n for r in range(R)], [sum(D[:, i]) / R for i in range(n)]
    runs = n * sum((row - mean) ** 2 for row in rows) / (R - 1)
    rest = sum((D[r, i] - rows[r] - columns[i] + mean) ** 2 for r in range(R) for i in range(n)) / (
        (n - 1) * (R - 1)
    )
    group = np.arange(n) if group is None else group
    names = sorted(set(group))
    sizes = [sum(group == name) for name in names]
    left_out = []  # how far the mean moves when a unit is left out, times n
    for name in names:
        others = [columns[i] for i in range(n) if group[i] != name]
        left_out.append((mean - sum(others) / len(others)) * n)
    G = len(names)
    examples = R / n * sum(move**2 for move in left_out) * (G - 1) / G
    freedom = n**2 / sum(size**2 for size in sizes) - 1
    total = max(examples + runs - rest, examples, runs)
    found = standard_error(D, group)
    assert found.error == pytest.approx(math.sqrt(total / (n * R)))
    assert found.dof == pytest.approx(
        total**2 / (examples**2 / freedom + runs**2 / (R - 1) + rest**2 / ((n - 1) * (R - 1)))
    )


def test_groups_of_one_are_no_groups():
    first, second, _ = experiment(np.random.default_rng(2), n=30)
    D = first.astype(float) - second
    alone = np.random.default_rng(0).permutation(30)
    assert standard_error(D, alone).error == pytest.approx(standard_error(D).error)
    assert sign_flip_test(D.mean(0), alone) == pytest.approx(sign_flip_test(D.mean(0)), abs=0.02)


def test_holm_is_statsmodels():
    rng = np.random.default_rng(0)
    for size in (1, 2, 9, 36):
        p = rng.random(size) ** 3
        assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


def test_training_noise_is_scipys_bca_over_runs_and_says_nothing_of_one():
    drops = np.random.default_rng(0).normal(0.05, 0.02, 10)
    low, high = training_noise(drops)
    assert low < drops.mean() < high and high - low < 0.05
    assert training_noise(drops[:1]) is None and training_noise(np.full(4, 0.1)) == (0.1, 0.1)


@pytest.mark.parametrize("shares", [(0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.1, 0.1)])
def test_chance_is_what_a_rule_fitted_on_the_training_labels_scores(shares):
    rng = np.random.default_rng(0)
    train, test = rng.choice(4, 300, p=shares), rng.choice(4, 80, p=shares)
    many = np.tile(test, 2000)  # every row is answered by a draw of its own
    scores = [
        DummyClassifier(strategy=strategy, random_state=0).fit(train, train).score(many, many)
        for strategy in ("most_frequent", "stratified", "uniform")
    ]
    assert chance_level(test, train) == pytest.approx(max(scores), abs=0.005)


def test_the_binomial_error_is_that_of_a_mean():
    assert binomial_error(0.5, 201) == pytest.approx(0.0353, abs=1e-4)


def test_nothing_is_claimed_where_nothing_differs():
    same = np.random.default_rng(0).random((3, 50)) < 0.5
    found = difference(same, same, 0.02)
    assert (found["drop"], found["p"], found["d_z"], found["cohens_h"]) == (0, 1, None, 0)
    assert found["p_equivalence"] == pytest.approx(0.98**50)
    # What 50 examples alike leave open.
    bound = scipy.stats.binomtest(0, 50).proportion_ci(method="exact").high
    assert found["interval"] == pytest.approx((-bound, bound)) and found["smallest"] >= bound - 1e-9
    one = difference(np.ones((3, 1), bool), np.zeros((3, 1), bool), 0.02)
    assert one["p"] == 1 and one["p_equivalence"] == 1 and one["interval"] == (-1, 1) and one["smallest"] == 1


# --- by simulation


def allowed(experiments):
    """A rate of 5 % and three of its standard errors."""
    return 0.05 + 3 * math.sqrt(0.05 * 0.95 / experiments)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(resampling, "FLIPS", 499)
    monkeypatch.setattr(family, "JOINT_FLIPS", 799)
    for function in (estimators.sign_flip_test, estimators.two_level_bootstrap):
        monkeypatch.setattr(
            estimators, function.__name__, lambda *a, f=function: f(*a, 499 if f is sign_flip_test else 400)
        )
    monkeypatch.setattr(estimators, "training_noise", lambda drops: None)


@pytest.mark.parametrize(
    "setting, experiments",
    [
        ({"run_sd": 0.02}, 1000),
        ({"groups": 40, "run_sd": 0.02}, 400),
        ({}, 300),
        ({"runs": 3, "run_sd": 0.02}, 300),
        ({"runs": 2, "run_sd": 0.02, "n": 1000}, 300),
    ],
    ids=str,
)
def test_without_an_effect_a_drop_is_claimed_no_oftener_than_promised(quick, setting, experiments):
    rng, claimed, missed = np.random.default_rng(7), 0, 0
    for _ in range(experiments):
        first, second, groups = experiment(rng, **setting)
        found = difference(first, second, 0.02, groups)
        claimed += found["p"] < 0.05
        missed += not found["interval"][0] <= 0 <= found["interval"][1]
    assert claimed / experiments <= allowed(experiments) and missed / experiments <= allowed(experiments)


@pytest.mark.parametrize("n", [100, 150, 201])
@pytest.mark.parametrize("runs", [1, 10])
def test_a_few_examples_that_differ_by_chance_are_no_proof_of_equality(quick, n, runs):
    """All that differ do so one way, and the true drop is the margin itself."""
    rng, wrong = np.random.default_rng(14), 0
    for _ in range(400):
        lost = rng.random(n) < 0.02
        first = np.ones((runs, n), bool)
        wrong += difference(first, first & ~lost, 0.02)["p_equivalence"] < 0.05
    assert wrong / 400 <= allowed(400)


def accuracy_of(right):
    """Of runs (R, n) on one split."""
    return Sample({"": right}, {"": np.arange(right.shape[1])}, 0.25, 0.1, None).accuracy


def test_an_accuracy_near_one_keeps_its_interval(quick):
    rng = np.random.default_rng(15)
    held = [accuracy_of(np.tile(rng.random(150) < 0.98, (3, 1)))["interval"] for _ in range(400)]
    assert np.mean([low <= 0.98 <= high for low, high in held]) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)


def test_groups_too_few_for_any_claim_are_said():
    cells = predictions(np.random.default_rng(16), {"stats": 0.5}, n=50, base=0.9)
    groups = np.concatenate([np.arange(50) // 10, np.arange(100) + 10])
    found = inference.infer(cells, groups, Margin(0.02))
    assert (
        found["comparisons"][0]["entries"][0]["smallest"] is None
        and found["comparisons"][0]["entries"][0]["p"] >= 2 / 2**5
    )
    text = verdict(found)
    assert text.startswith("Nothing can be told from 5 groups of test rows: at least 6 are needed")


def test_differences_by_class_are_paired_and_of_whole_groups():
    cells = predictions(np.random.default_rng(31), {"stats": 0.2}, n=200, runs=1)
    groups = np.arange(1000) // 4
    arrays = cells[Cell("stats", "all_layers")]
    other = cells[Cell("stats", "visual_only")]
    for of, given in ((None, None), (groups, groups)):
        found = inference.infer(cells, given, Margin())["classes"]
        assert [entry["class"] for entry in found] == sorted(set(arrays["test_labels"].tolist()))
        for entry in found:
            rows = arrays["test_labels"] == entry["class"]
            a, b = (
                (x["test_predictions"] == x["test_labels"])[0, rows].astype(float) for x in (arrays, other)
            )
            error = standard_error((a - b)[None], None if of is None else of[arrays["test_rows"][rows]])
            half = scipy.stats.t.ppf(0.975, error.dof) * error.error
            assert (entry["first"], entry["second"]) == (a.mean(), b.mean())
            assert entry["drop"] == pytest.approx((a - b).mean())
            assert entry["interval"][1] == pytest.approx(min(1.0, entry["drop"] + half))


def test_a_margin_may_be_a_share_of_the_accuracy_above_chance():
    """Two one-sided t tests of contrasts, and what is kept: Fieller's interval decides alike."""
    cells = predictions(np.random.default_rng(32), {"stats": 0.05}, n=1500, runs=1, base=0.8)
    for share in (0.02, 0.05, 0.1, 0.2):
        entry = inference.infer(cells, None, Margin(share=share))["comparisons"][0]["entries"][0]
        a, b = (
            (x["test_predictions"] == x["test_labels"])[0].astype(float)
            for x in (cells[Cell("stats", name)] for name in ("all_layers", "visual_only"))
        )
        chance = inference.infer(cells, None, Margin())["chance"]
        above = scipy.stats.ttest_1samp(b - (1 - share) * a - share * chance, 0, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(b - (1 + share) * a + share * chance, 0, alternative="less").pvalue
        assert entry["p_equivalence"] == pytest.approx(max(above, below))
        assert entry["margin"] == pytest.approx(share * (a.mean() - chance))
    low, high = entry["retained"]["interval"]
    kept = (b.mean() - chance) / (a.mean() - chance)
    assert low < kept < high and kept == pytest.approx(entry["retained"]["share"])


def test_too_few_runs_give_no_verdict():
    for runs in (1, 2, 4):
        found = inference.infer(
            predictions(np.random.default_rng(17), {"stats": 0.4}, runs=runs), None, Margin(0.02)
        )
        assert verdict(found).startswith("No verdict: ") and "--num-runs 5 or more" in verdict(found)


def test_what_is_not_above_chance_is_neither_equal_nor_lost():
    cells = predictions(np.random.default_rng(18), {"stats": 0.3}) | predictions(
        np.random.default_rng(18), {"spectral": 0.0}, base=0.25
    )
    text = verdict(inference.infer(cells, None, Margin(0.3)))
    assert (
        "spectral is not shown to be above chance" in text
        and "equal" not in text
        and "1 of 2 representations falls by itself" in text
        and "Average of 1 representation:" in text
    )


def test_a_difference_as_large_as_the_margin_is_not_called_equivalent_oftener_than_promised(quick):
    rng = np.random.default_rng(8)
    wrong = sum(
        difference(*experiment(rng, n=1000, drop=0.05, run_sd=0.01)[:2], 0.05)["p_equivalence"] < 0.05
        for _ in range(300)
    )
    assert wrong / 300 <= allowed(300)


def test_the_smallest_difference_is_found_as_often_as_it_says(quick):
    rng = np.random.default_rng(9)
    smallest = np.median([difference(*experiment(rng, run_sd=0.01)[:2], 0.02)["smallest"] for _ in range(50)])
    found = [
        difference(*experiment(rng, drop=smallest, run_sd=0.01)[:2], 0.02)["p"] < 0.05 for _ in range(300)
    ]
    assert 0.7 < np.mean(found) < 0.92


def test_the_t_test_over_seeds_would_claim_far_too_often():
    """Why seeds are not the sample: what this program does not do."""
    rng = np.random.default_rng(10)
    claimed = 0
    for _ in range(300):
        first, second, _ = experiment(rng)
        claimed += scipy.stats.ttest_1samp(first.mean(1) - second.mean(1), 0).pvalue < 0.05
    assert claimed / 300 > 0.15


def test_the_sign_flip_test_alone_takes_the_runs_of_a_large_test_set_for_an_effect(quick):
    rng, alone, both = np.random.default_rng(11), 0, 0
    for _ in range(60):
        first, second, _ = experiment(rng, n=2000, run_sd=0.04)
        found = difference(first, second, 0.02)
        alone, both = alone + (found["p_sign_flip"] < 0.05), both + (found["p"] < 0.05)
    assert alone / 60 > 0.2 and both / 60 < allowed(60)


@pytest.mark.parametrize("groups", [0, 150])
def test_many_examples_are_bootstrapped_as_few(monkeypatch, groups):
    first, second, group = experiment(np.random.default_rng(13), n=900, run_sd=0.02, groups=groups)
    D = first.astype(float) - second
    drawn = two_level_bootstrap(D, group, 20_000)
    monkeypatch.setattr(resampling, "MANY_UNITS", 100)
    assert two_level_bootstrap(D, group, 20_000) == pytest.approx(drawn, abs=0.05 * (drawn[1] - drawn[0]))


def test_bootstraps_of_groups_draw_whole_groups():
    rng = np.random.default_rng(12)
    first, second, groups = experiment(rng, n=300, groups=20)
    D = first.astype(float) - second
    narrow, wide = two_level_bootstrap(D), two_level_bootstrap(D, groups)
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])


# --- several splits


def test_the_corrected_test_over_splits_is_written_from_its_definition():
    rng = np.random.default_rng(21)
    first, second, tests = simulation.split_experiment(rng, rows=200, splits=6, lost=0.3)
    found = difference_over_splits(first, second, 0.02, SplitRows(tests, 2 / 7))
    drops = [a.mean() - b.mean() for a, b in zip(first, second, strict=True)]
    error = math.sqrt(np.var(drops, ddof=1) * (1 / 6 + 2 / 7))
    assert found["drops"] == pytest.approx(drops) and found["drop"] == pytest.approx(np.mean(drops))
    assert found["standard_error"] == pytest.approx(error)
    assert found["p"] == pytest.approx(2 * scipy.stats.t.sf(abs(np.mean(drops)) / error, 5))
    assert found["interval"] == pytest.approx(
        scipy.stats.t.interval(0.95, 5, loc=np.mean(drops), scale=error)
    )


@pytest.mark.parametrize("rows, splits", [(100, 3), (200, 5), (200, 10)])
def test_over_splits_of_nothing_a_drop_is_claimed_no_oftener_than_promised(rows, splits, monkeypatch):
    monkeypatch.setattr(estimators, "training_noise", lambda drops: None)
    found = simulation.simulate_splits(rows, 0.0, splits, 400, seed=1)
    assert found["claimed"] <= allowed(400) and found["covered"] >= 1 - allowed(400)
    assert found["plain"] > 0.1  # what the correction is for
    assert simulation.simulate_splits(rows, 0.6, splits, 100, seed=1)["claimed"] > 0.2


def test_splits_that_all_agree_claim_neither_a_drop_nor_equality_they_cannot_show():
    right, tests = [np.ones((3, 20), bool)] * 4, [np.arange(k, k + 20) for k in range(4)]
    found = difference_over_splits(right, right, 0.02, SplitRows(tests, 2 / 7))
    assert found["p"] == 1 and found["interval"][1] >= 1 - 0.025 ** (1 / 23) and found["p_equivalence"] > 0.05


def with_splits(rng, splits, **kwargs):
    """`predictions` of several random splits."""
    cells = {}
    for number in range(splits):
        rows = rng.permutation(3 * kwargs.get("n", 400))
        for cell, arrays in predictions(rng, **kwargs).items():
            cells[cell._replace(split=f"random{number}" if number else "")] = arrays | {
                "test_rows": rows[: len(arrays["test_rows"])],
                "train_rows": rows[len(arrays["test_rows"]) :],
            }
    return cells


def test_a_run_of_several_splits_speaks_of_all_of_them():
    cells = with_splits(np.random.default_rng(22), 5, drops={"stats": 0.3, "spectral": 0.0}, n=300)
    found = inference.infer(cells, None, Margin(0.02))
    (main,) = found["comparisons"]
    of = {
        layer_set: [
            cells[cell] for cell in cells if cell.representation == "stats" and cell.layer_set == layer_set
        ]
        for layer_set in ("all_layers", "visual_only")
    }
    right = {
        layer_set: [arrays["test_predictions"] == arrays["test_labels"] for arrays in of_set]
        for layer_set, of_set in of.items()
    }
    alone = difference_over_splits(
        *right.values(), 0.02, SplitRows([arrays["test_rows"] for arrays in of["all_layers"]], 0.5)
    )
    smallest = alone.pop("smallest")  # of one test alone
    assert found["splits"] == 5 and {key: main["entries"][0][key] for key in alone} == alone
    assert main["entries"][0]["smallest"] > smallest
    assert found["accuracies"]["all_layers_stats"]["accuracy"] == pytest.approx(
        np.mean([part.mean() for part in right["all_layers"]])
    )
    assert set(found["accuracies"]) == {cell.name for cell in cells if not cell.split}
    text = verdict(found)
    assert (
        "It is from 5 random splits." in text
        and "1 of 2 representations falls by itself" in text
        and "With the visual layers alone accuracy falls by" in text
    )
    assert "degrees of freedom: 1" in verdict(
        inference.infer(
            with_splits(np.random.default_rng(23), 2, drops={"stats": 0.02}, base=0.9), None, Margin(0.02)
        )
    )
    del cells[Cell("stats", "visual_only", split="random3")]  # a cell that failed
    entry = inference.infer(cells, None, Margin(0.02))["comparisons"][0]["entries"][0]
    assert len(entry["drops"]) == 4
    assert "It is from 5 random splits (stats: 4)." in verdict(inference.infer(cells, None, Margin(0.02)))


def test_random_splits_of_groups_are_no_narrower_than_groups_allow():
    """What a group has in common every random split has alike:
    the first split's groups say how much that may be.
    """
    rng = np.random.default_rng(24)
    groups = np.arange(900) // 15
    lucky = rng.random(60) < 0.5  # the groups that the visual layers know
    cells = with_splits(rng, 5, drops={"stats": 0.0}, n=300)
    for cell, arrays in cells.items():
        wrong = (cell.layer_set == "visual_only") & ~lucky[groups[arrays["test_rows"]]]
        arrays["test_predictions"] = np.where(
            wrong, arrays["test_labels"] + 1, arrays["test_labels"]
        ) * np.ones((5, 1), int)
    with_groups, without = (
        inference.infer(cells, of, Margin(0.02))["comparisons"][0]["entries"][0] for of in (groups, None)
    )
    assert np.ptp(without["interval"]) < 0.15 < 0.24 < np.ptp(with_groups["interval"]) and without["p"] < 1e-3


def test_what_a_random_split_has_above_a_grouped_one_is_the_inflation():
    rng = np.random.default_rng(25)
    cells = predictions(rng, {"stats": 0.1}, base=0.8, n=400)
    cells |= {
        cell._replace(split="grouped0"): arrays
        for cell, arrays in predictions(rng, {"stats": 0.1}, base=0.4, n=300).items()
    }
    groups = np.arange(1200) % 60
    found = inference.infer(cells, groups, Margin(0.02))
    assert [entry["cell"] for entry in found["inflation"]] == ["all_layers_stats", "visual_only_stats"]
    assert len(found["comparisons"][0]["entries"]) == 1
    for entry in found["inflation"]:
        two = [cells[Cell.named(name)] for name in (entry["cell"], entry["cell"] + ".grouped0")]
        shares = [(arrays["test_predictions"] == arrays["test_labels"]).mean() for arrays in two]
        assert entry["inflation"] == pytest.approx(shares[0] - shares[1]) and entry["interval"][0] > 0.2
    mean = 100 * np.mean([entry["inflation"] for entry in found["inflation"]])
    assert (
        f"accuracy came out {mean:.1f} points lower in the mean of 2 cells; it is shown to be lower for 2 of "
        "them" in verdict(found)
    )
    other_way = {
        cell._replace(split="" if cell.split else "random0"): arrays for cell, arrays in cells.items()
    }
    as_main = inference.infer(other_way, groups, Margin(0.02), "grouped")
    assert as_main["inflation"] == found["inflation"] and as_main["split"] == "grouped"
    none = predictions(rng, {"stats": 0.1}, n=400)
    none |= {
        cell._replace(split="grouped0"): arrays
        for cell, arrays in predictions(rng, {"stats": 0.1}, n=400).items()
    }
    assert "it is shown to be lower for none of them" in verdict(inference.infer(none, groups, Margin(0.02)))


def test_the_first_split_under_another_name_is_not_a_second_one():
    """Left in the folder by a command whose kinds of split stood in another order."""
    cells = predictions(np.random.default_rng(31), {"stats": 0.0}, n=300)
    again = {cell._replace(split="random0"): arrays for cell, arrays in cells.items()}
    assert inference.infer(cells | again, None, Margin(0.02)) == inference.infer(cells, None, Margin(0.02))


# --- what is kept, equality, balanced accuracy, the primary hypothesis


def one_split_samples(rng, groups=None, **world):
    """Samples of both layer sets of one split, chance 0.1."""
    first, second, group = experiment(rng, **world)
    rows = {"": np.arange(first.shape[1])}
    return [Sample({"": right}, rows, 0.25, 0.1, group) for right in (first, second)]


def fold_samples(rng, world):
    """Samples of both layer sets of a simulated cross-validation."""
    return worlds.samples_of_world(rng, world)[0]["0"]


def test_what_is_kept_is_fiellers_interval_where_degrees_of_freedom_are_constant():
    for seed in range(5):
        first, second = one_split_samples(np.random.default_rng(seed), n=150, runs=1, drop=0.05, base=0.6)
        a, b = (of.right[""][0] - 0.1 for of in (first, second))
        t, n = scipy.stats.t.isf(0.025, 149), 150
        (v_a, v_ab), (_, v_b) = np.cov(a, b) / n
        middle = a.mean() * b.mean() - t**2 * v_ab
        denominator = a.mean() ** 2 - t**2 * v_a
        half = math.sqrt(middle**2 - denominator * (b.mean() ** 2 - t**2 * v_b))
        found = family.retained(first, second)
        assert found["interval"] == pytest.approx(
            ((middle - half) / denominator, (middle + half) / denominator), abs=1e-6
        )
        assert found["share"] == pytest.approx(b.mean() / a.mean())


def test_what_is_kept_excludes_all_of_it_just_if_the_interval_of_the_drop_excludes_none():
    rng, decided = np.random.default_rng(41), []
    for trial in range(60):
        drop = (0.0, 0.04, 0.08)[trial % 3]
        world = worlds.ProbitWorld((90, 2, 4), rounds=1 + trial % 2, run_sd=0.1, recalls=(0.6,)).falling(drop)
        first, second = fold_samples(rng, world)
        kept, (low, high) = family.retained(first, second), first.minus(second, 0.02)["interval"]
        assert (low > 0) == (kept["interval"][1] < 1) and (high < 0) == (kept["interval"][0] > 1)
        decided.append(low > 0)
    assert 5 < sum(decided) < 55


def test_nothing_is_kept_of_what_is_not_clearly_above_chance():
    rng = np.random.default_rng(42)
    for base, is_told in ((0.13, False), (0.6, True)):
        first, second = one_split_samples(rng, n=100, base=base)
        above = (first.mean - 0.1) / first.standard_error_of({"": first.right[""] - 0.1}).error
        assert (family.retained(first, second) is not None) == is_told == (above > 4)


@pytest.mark.parametrize("more, less, n, margin", [(3, 1, 105, 0.02), (0, 2, 60, 0.1), (40, 12, 300, 0.15)])
def test_the_score_test_has_the_likelihood_of_the_margin(more, less, n, margin):
    """Against the restricted estimate by numerical maximisation of the trinomial likelihood."""

    def unlikely(p_less):
        rest = 1 - 2 * p_less - margin
        terms = ((more, p_less + margin), (less, p_less), (n - more - less, rest))
        return -sum(count * math.log(p) for count, p in terms if count)

    found = scipy.optimize.minimize_scalar(
        unlikely, bounds=(1e-9, (1 - margin) / 2 - 1e-9), method="bounded", options={"xatol": 1e-10}
    )
    z = (more - less - n * margin) / math.sqrt(n * (2 * found.x + margin * (1 - margin)))
    assert estimators.tango(more, less, n, margin) == pytest.approx(scipy.stats.norm.cdf(z), abs=1e-5)


def test_the_score_test_of_few_pairs_is_the_published_one():
    """Tango (1998), two ways to clean 44 contact lenses: z = 1.709 for a margin of 0.1."""
    assert scipy.stats.norm.isf(estimators.tango(1, 0, 44, 0.1)) == pytest.approx(1.709, abs=5e-4)


def test_shares_of_units_keep_the_mean_and_count_in_units_of_their_size():
    rng = np.random.default_rng(43)
    by_row, groups = rng.integers(-1, 2, 90) / 2, rng.integers(0, 20, 90)
    shares = estimators.unit_means(by_row, groups)
    assert shares.mean() == pytest.approx(by_row.mean()) and len(shares) == len(set(groups))
    whole = rng.integers(-1, 2, 300).astype(float)
    more, less = (whole > 0).sum(), (whole < 0).sum()
    expected = max(estimators.tango(more, less, 300, 0.1), estimators.tango(less, more, 300, 0.1))
    assert estimators.score_test_of_equivalence(whole, 0.1) == pytest.approx(expected)
    assert estimators.score_test_of_equivalence(whole / 4, 0.025) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["one split of 105 at 99 %", "520 rows without groups at 99 %"])
def test_a_drop_of_the_margin_near_the_ceiling_is_not_called_equal_oftener_than_promised(name):
    world = worlds.EQUAL_WORLDS[name]
    assert worlds.simulate_equal(world.falling(0.02), 0.02, 400, seed=0) <= allowed(400)
    assert worlds.simulate_equal(world, 0.02, 100, seed=0) > 0.5


def test_the_smallest_drop_near_the_ceiling_has_the_variance_that_it_leaves():
    for by_error, a in ((0.03, 0.97), (0.06, 0.97), (0.1, 0.9)):
        found = estimators.smallest_drop(by_error, a)
        b = a - found
        grown = math.sqrt((a * (1 - a) + b * (1 - b)) / (2 * a * (1 - a)))
        assert found == pytest.approx(by_error * grown) and found > 1.1 * by_error
    for a in (0.33, 1.0, None):
        assert estimators.smallest_drop(0.06, a) == 0.06
    assert estimators.smallest_drop(3.0, 0.9) == 1


def test_row_values_of_uneven_classes_are_scikit_learns_balanced_accuracy():
    rng = np.random.default_rng(44)
    labels, told = rng.choice(4, 200, p=[0.6, 0.2, 0.1, 0.1]), rng.integers(0, 4, (3, 120))
    rows = rng.permutation(200)[:120]
    plain = Sample({"": told == labels[rows]}, {"": rows}, 0.25, 0.6, None)
    found = plain.balanced(labels)
    scores = [balanced_accuracy_score(labels[rows], of_run) for of_run in told]
    assert found.mean == pytest.approx(np.mean(scores)) and found.chance == 0.25
    sizes = np.bincount(labels[rows])
    assert found.weight == pytest.approx(120 / (4 * sizes.min()))
    one = Sample({"": plain.right[""][:1]}, {"": rows}, 0.25, 0.6, None).balanced(labels)
    recalls = [(told[0] == c)[labels[rows] == c].mean() for c in range(4)]
    variance = sum(r * (1 - r) / size for r, size in zip(recalls, sizes, strict=True)) / 16
    error = one.standard_error_of(one.right).error
    assert error == pytest.approx(math.sqrt(variance * 120 / 119))


def test_classes_are_uneven_from_half_more_than_their_share_on():
    assert samples.has_uneven_classes(np.repeat([3, 7], [76, 24]))
    assert not samples.has_uneven_classes(np.repeat([3, 7], [75, 25]))
    assert samples.has_uneven_classes(np.repeat(range(10), [20, *[10] * 9]))


def uneven_predictions(rng, recalls, n=520):
    """Two classes 10:1, whose recalls are these with all layers and with the visual ones."""
    labels = (np.arange(n) % 11 == 0).astype(int)
    cells = {}
    for layer_set, of_set in zip(("all_layers", "visual_only"), recalls, strict=True):
        right = rng.random((5, n)) < np.array(of_set)[labels]
        cells[Cell("stats", layer_set)] = {
            "test_rows": np.arange(n),
            "test_labels": labels,
            "train_rows": np.arange(n, 3 * n),
            "train_labels": np.tile(labels, 2),
            "test_predictions": np.where(right, labels, 1 - labels),
        }
    return cells


def test_uneven_classes_are_compared_by_balanced_accuracy():
    cells = uneven_predictions(np.random.default_rng(45), ((0.8, 0.8), (0.65, 0.65)))
    found = inference.infer(cells, None, Margin())
    assert (found["score"], found["score_chance"]) == ("balanced accuracy", 0.5)
    assert found["chance"] == pytest.approx(10 / 11, abs=0.01) and found["above_chance"] == ["stats"]
    balanced = {}
    for cell, arrays in cells.items():
        entry, told = found["accuracies"][cell.name], arrays["test_predictions"]
        balanced[cell.layer_set] = np.mean(
            [balanced_accuracy_score(arrays["test_labels"], of) for of in told]
        )
        assert entry["accuracy"] == pytest.approx((told == arrays["test_labels"]).mean())
        assert entry["balanced_accuracy"] == pytest.approx(balanced[cell.layer_set])
        low, high = entry["balanced_interval"]
        assert low < entry["balanced_accuracy"] < high and entry["p_above_chance"] < 0.01
    drop = balanced["all_layers"] - balanced["visual_only"]
    primary = found["primary"]
    assert primary["drop"] == found["comparisons"][0]["entries"][0]["drop"] == pytest.approx(drop)
    assert primary["accuracy"] == pytest.approx(balanced["all_layers"]) and primary["p"] < 0.05
    kept = (balanced["visual_only"] - 0.5) / (balanced["all_layers"] - 0.5)
    assert primary["retained"]["share"] == pytest.approx(kept)
    even = inference.infer(predictions(np.random.default_rng(46), {"stats": 0.1}), None, Margin())
    assert (even["score"], even["score_chance"]) == ("accuracy", even["chance"])
    assert "balanced_accuracy" not in even["accuracies"]["all_layers_stats"]


def test_uneven_classes_that_are_all_alike_are_as_equal_as_the_rarest_class_shows():
    found = inference.infer(uneven_predictions(np.random.default_rng(47), ((1, 1), (1, 1))), None, Margin())
    units = 2 * 48  # twice the rows of the rare one of two classes
    (entry,) = found["comparisons"][0]["entries"]
    assert entry["p_equivalence"] == pytest.approx(0.98**units) and entry["p"] == 1
    assert entry["interval"][1] == pytest.approx(1 - 0.025 ** (1 / units))
    wilson = scipy.stats.binomtest(units, units).proportion_ci(method="wilson")
    assert found["accuracies"]["all_layers_stats"]["balanced_interval"][0] == pytest.approx(wilson.low)
    assert found["above_chance"] == ["stats"]


def test_the_primary_hypothesis_is_of_representations_that_read_with_both_layer_sets(monkeypatch):
    rng, chosen = np.random.default_rng(48), simulated_choice.nine((0.6, 0.1), (0.1, 0.0))
    pairs, _ = worlds.samples_of_world(rng, worlds.ProbitWorld(), chosen)
    names = family.representations_that_read(pairs)
    p_values = {name: family.mean_sample(pair).accuracy["p_above_chance"] for name, pair in pairs.items()}
    assert "0" in names and names == [name for name, p in p_values.items() if p < 0.05]
    assert family.primary(pairs, Margin())["representations"] == names
    none = {name: pairs[name] for name in pairs if p_values[name] > 0.3}
    assert none and family.primary(none, Margin()) is None and family.representations_that_read({}) == []
    # Each alone just fails and their mean does not: then all are taken.
    monkeypatch.setattr(family, "p_above_chance", lambda samples: 0.06 if len(samples) == 2 else 0.001)
    assert family.representations_that_read(pairs) == list(pairs)


def test_a_choice_by_the_mean_of_both_layer_sets_does_not_make_a_drop():
    """Near chance the choice by the first layer set does."""
    found = simulated_choice.simulate_choice(
        *simulated_choice.CHOICE_WORLDS["nine at 13 %, no drop"], 60, seed=0
    )
    assert found["first"]["bias"] > 0.01 > 0.005 > abs(found["each"]["bias"])
    assert found["each"]["falls"] + found["each"]["rises"] <= allowed(60)


def test_heterogeneity_tells_opposite_drops_from_one_for_all(monkeypatch):
    monkeypatch.setattr(family, "JOINT_FLIPS", 799)
    rng, wrong = np.random.default_rng(49), 0
    alike, opposite = (
        simulated_choice.nine((0.33, 0.06))[:4],
        simulated_choice.nine((0.33, 0.12), (0.33, -0.12))[:2],
    )
    for _ in range(80):
        pairs, _ = worlds.samples_of_world(rng, worlds.ProbitWorld(), alike)
        wrong += family.heterogeneity(list(pairs.values())) < 0.05
    assert wrong / 80 <= allowed(80)
    pairs, _ = worlds.samples_of_world(rng, worlds.ProbitWorld(), opposite)
    assert family.heterogeneity(list(pairs.values())) < 0.01
    assert family.heterogeneity(list(pairs.values())[:1]) is None
    first = pairs["0"][0]
    entry = family.mean_drop(pairs, Margin())
    assert entry["heterogeneity"] == family.heterogeneity(list(pairs.values()))
    D = {"": (pairs["0"][0].right[""] * 1.0 - pairs["0"][1].right[""])}
    D[""] -= pairs["1"][0].right[""] * 1.0 - pairs["1"][1].right[""]
    p = estimators.p_of_mean(D[""].mean() / 2, first.standard_error_of({"": D[""] / 2}))
    assert entry["heterogeneity"] == pytest.approx(p, abs=1e-2)  # of two, each is the other's mirror image


def test_correlated_runs_widen_the_primary_interval_by_their_shared_variance():
    rng = np.random.default_rng(50)
    first, second = fold_samples(rng, worlds.ProbitWorld(run_sd=0.5))
    entry = family.mean_drop({"stats": (first, second)}, Margin())
    D = first.right[""].astype(float) - second.right[""]
    spread = first.standard_error_of({"": D})
    plus, minus, *_ = variance_of_runs(D, first.runs)
    assert spread.runs_variance == pytest.approx((plus - minus) * 10) and spread.runs_variance > 0
    for found, rho in zip(entry["sensitivity"], (0.1, 0.3), strict=True):
        error = math.sqrt(spread.error**2 + rho / (1 - rho) * spread.runs_variance)
        half = scipy.stats.t.isf(0.025, spread.dof) * error
        assert found["correlation"] == rho
        assert found["interval"] == pytest.approx((D.mean() - half, D.mean() + half))
    alone = standard_error(D[:1])
    assert alone.runs_variance is None
    single = experiment(rng, n=400, runs=8, run_sd=0.2)
    difference_of = single[0].astype(float) - single[1]
    runs, rest = difference_of.mean(1).var(ddof=1), difference_of - difference_of.mean(0)
    rest = ((rest - rest.mean(1)[:, None]) ** 2).sum() / (399 * 7) / 400
    assert standard_error(difference_of).runs_variance == pytest.approx(runs - rest)


def test_splits_of_groups_are_flagged():
    cells = with_splits(np.random.default_rng(51), 2, drops={"stats": 0.3})
    for groups in (np.arange(1200) // 2, None):
        assert inference.infer(cells, groups, Margin())["splits_with_groups"] is (groups is not None)
    first = {cell: arrays for cell, arrays in cells.items() if not cell.split}
    assert inference.infer(first, np.arange(1200) // 2, Margin())["splits_with_groups"] is False


# --- controls and other classifiers


def shuffled_predictions(rng, cells, runs=3, n=150, classes=5, know=0.0):
    """Of cells trained on shuffled labels: predictions that have nothing to do with the test labels, but for
    a part `know` in the first cell.
    """
    labels = rng.choice(classes, n, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    found = {}
    for i, cell in enumerate(cells):
        # Runs that agree.
        guess = np.where(
            rng.random((runs, n)) < 0.7, rng.integers(0, classes, n), rng.integers(0, classes, (runs, n))
        )
        knows = (rng.random((runs, n)) < know) & (i == 0)
        found[cell] = {
            "test_rows": np.arange(n),
            "train_rows": np.arange(n, 4 * n),
            "train_labels": np.arange(3 * n) % classes,
            "test_labels": labels,
            "test_predictions": np.where(knows, labels, guess),
        }
    return found


SHUFFLED = [
    Cell(name, layer_set, labels="shuffled")
    for name in ("stats", "spectral", "frequency")
    for layer_set in ("all_layers", "visual_only")
]


def test_runs_without_a_fault_are_called_suspect_no_oftener_than_promised(monkeypatch):
    monkeypatch.setattr(inference, "SHUFFLES", 399)
    rng = np.random.default_rng(26)
    p_values = np.array(
        [inference.check_shuffled_labels(shuffled_predictions(rng, SHUFFLED, n=60))["p"] for _ in range(400)]
    )
    assert (p_values < 0.01).mean() <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 400) and (
        p_values < 0.05
    ).mean() <= allowed(400)
    assert (p_values < 0.5).mean() > 0.4  # and it is not conservative either


def test_one_cell_is_tested_as_scipys_permutation_test_does():
    ((cell, arrays),) = shuffled_predictions(np.random.default_rng(27), SHUFFLED[:1], know=0.06).items()
    expected = scipy.stats.permutation_test(
        (arrays["test_labels"],),
        lambda labels: (arrays["test_predictions"] == labels).mean(),
        permutation_type="pairings",
        n_resamples=4000,
        alternative="greater",
        random_state=np.random.default_rng(0),
    ).pvalue
    assert (
        inference.check_shuffled_labels({cell: arrays})["p"] == pytest.approx(expected, abs=0.02)
        and expected < 0.2
    )


def test_labels_that_leak_into_one_cell_make_the_run_suspect():
    cells = predictions(np.random.default_rng(28), {"stats": 0.0}) | shuffled_predictions(
        np.random.default_rng(28), SHUFFLED, know=0.2
    )
    found = inference.infer(cells, None, Margin(0.02))
    assert found["shuffled"]["suspect"] and verdict(found).startswith(
        "SUSPECT: trained on shuffled labels, stats of all layers ("
    )
    assert not any("shuffled" in name for name in found["accuracies"])
    fine = inference.infer(
        cells | shuffled_predictions(np.random.default_rng(29), SHUFFLED), None, Margin(0.02)
    )
    assert not fine["shuffled"][
        "suspect"
    ] and "With shuffled labels no cell is shown to be above chance (p = 0." in verdict(fine)


def test_controls_and_classifiers_stand_beside_the_table_and_not_in_it():
    rng = np.random.default_rng(30)
    cells = predictions(rng, {"stats": 0.0}, n=300)
    others = predictions(rng, {"stats": 0.4}, n=300, runs=1, base=0.7)
    cells |= {cell._replace(classifier="linear"): arrays for cell, arrays in others.items()}
    cells[Cell("metadata", "no_layers")] = cells[Cell("stats", "all_layers")]
    cells[Cell("norms", "all_layers")] = cells[Cell("stats", "visual_only")]
    cells[Cell("stats", "up_only")] = cells[Cell("stats", "visual_only")]
    found = inference.infer(cells, None, Margin(0.02))
    assert [entry["representation"] for entry in found["comparisons"][0]["entries"]] == ["stats"] and found[
        "ranking"
    ] == []
    assert [entry["cell"] for entry in found["controls"]] == [
        "no_layers_metadata",
        "all_layers_norms",
        "up_only_stats",
    ]
    (linear,) = found["classifiers"]
    right = [arrays["test_predictions"] == arrays["test_labels"] for arrays in others.values()]
    assert (
        linear["classifier"] == "linear"
        and linear["entries"][0]["p"] == difference(*right, 0.02)["p"] < 0.001
    )
    assert found["accuracies"]["all_layers_stats.linear"]["accuracy"] == pytest.approx(right[0].mean())
    assert "The metadata columns alone, without any weight, give" in verdict(found)
    cells[Cell("metadata", "no_layers")] = predictions(rng, {"stats": 0.0}, n=300, base=0.25)[
        Cell("stats", "all_layers")
    ]
    assert "are not shown to tell the class" in verdict(inference.infer(cells, None, Margin(0.02)))


# --- a whole run


def predictions(rng, drops: dict[str, float], n=400, runs=5, base=0.6, classes=4):
    """Saved predictions of a run: every representation with all layers right with chance `base`, with the
    visual ones with base - drop.
    """
    labels = rng.integers(0, classes, n)
    train_labels = np.arange(2 * n) % classes
    cells = {}
    for name, drop in drops.items():
        first, second, _ = experiment(rng, n=n, runs=runs, drop=drop, base=base)
        for layer_set, right in (("all_layers", first), ("visual_only", second)):
            cells[Cell(name, layer_set)] = {
                "test_rows": np.arange(n),
                "test_labels": labels,
                "train_rows": np.arange(n, 3 * n),
                "train_labels": train_labels,
                "test_predictions": np.where(right, labels, (labels + 1) % classes),
            }
    return cells


def test_the_whole_run_says_of_each_representation_what_its_own_data_say():
    cells = predictions(np.random.default_rng(0), {"stats": 0.3, "spectral": 0.0, "frequency": -0.08})
    found = inference.infer(cells, None, Margin(0.02))
    (main,) = found["comparisons"]
    assert (
        (main["first"], main["second"]) == ("all_layers", "visual_only")
        and found["groups"] is None
        and found["test_rows"] == 400
    )
    for entry in main["entries"]:
        a, b = (
            cells[Cell(entry["representation"], layer_set)] for layer_set in ("all_layers", "visual_only")
        )
        right = [one["test_predictions"] == one["test_labels"] for one in (a, b)]
        alone = difference(*right, 0.02)
        smallest = alone.pop("smallest")  # of one test alone
        assert {key: entry[key] for key in alone} == alone and entry["smallest"] > smallest
        accuracy = found["accuracies"][f"visual_only_{entry['representation']}"]
        assert accuracy["accuracy"] == pytest.approx(right[1].mean())
        assert accuracy["binomial_error"] == pytest.approx(
            math.sqrt(right[1].mean() * (1 - right[1].mean()) / 400)
        )
        assert accuracy["interval"][0] < right[1].mean() < accuracy["interval"][1]
    assert [entry["p_holm"] for entry in main["entries"]] == holm([entry["p"] for entry in main["entries"]])
    arrays = cells[Cell("stats", "all_layers")]
    assert found["chance"] == chance_level(arrays["test_labels"], arrays["train_labels"])
    assert len(found["ranking"]) == 3 and all(pair["difference"] >= 0 for pair in found["ranking"])
    text = verdict(found)
    mean = 100 * np.mean([entry["drop"] for entry in main["entries"]])
    assert text.startswith(
        f"With the visual layers alone accuracy falls by {mean:.1f} points on average (95 %"
    )
    assert "1 of 3 representations falls by itself (p < 0.05, corrected for all). stats: +" in text
    assert "rise" not in text and "One random split tests 400 rows; --folds 5 tests all." in text
    assert found["primary"]["drop"] == pytest.approx(mean / 100)


def test_groups_that_training_rows_share_are_counted_and_taken_whole():
    cells = predictions(np.random.default_rng(1), {"stats": 0.1}, n=60)
    # Test rows have groups 0 to 9, training rows 5 to 24.
    groups = np.concatenate([np.arange(60) // 6, np.arange(120) // 6 + 5])
    found = inference.infer(cells, groups, Margin(0.02))
    assert found["groups"] == 10 and found["test_rows_that_share_a_group_with_training"] == 30
    (entry,) = found["comparisons"][0]["entries"]
    a, b = (cells[Cell("stats", layer_set)] for layer_set in ("all_layers", "visual_only"))
    D = (a["test_predictions"] == a["test_labels"]).astype(float) - (
        b["test_predictions"] == b["test_labels"]
    )
    assert entry["standard_error"] == pytest.approx(standard_error(D, groups[:60]).error)
    assert "30 of 60 test rows share their group with a training row" in verdict(found)


def test_the_verdict_is_never_stronger_than_the_numbers():
    nothing = inference.infer(
        predictions(np.random.default_rng(2), {"stats": 0.0}, base=0.25), None, Margin(0.02)
    )
    assert "No representation is shown to be above chance" in verdict(nothing)
    equal = inference.infer(
        predictions(np.random.default_rng(3), {"stats": 0.0}, n=20_000), None, Margin(0.05)
    )
    assert verdict(equal).startswith(
        "With the visual layers alone accuracy stays the same on average, to within 5"
    )
    assert "For stats the two are equal to within 5 points" in verdict(equal)
    assert verdict({}).startswith("No verdict") and inference.infer({}, None, Margin(0.02)) == {}
    one_set = {
        cell: arrays
        for cell, arrays in predictions(np.random.default_rng(4), {"stats": 0.1}).items()
        if cell.layer_set == "all_layers"
    }
    assert verdict(inference.infer(one_set, None, Margin(0.02))).startswith(
        "No verdict: no representation was run with all layers and"
    )


@pytest.mark.slow
def test_over_many_experiments_no_verdict_claims_a_drop_that_is_not_there(quick, monkeypatch):
    for name in ("ranking", "class_differences"):  # which the sentence of a drop does not rest on
        monkeypatch.setattr(inference, name, lambda *samples: [])
    rng, claims = np.random.default_rng(5), 0
    for _ in range(200):
        found = inference.infer(
            predictions(rng, dict.fromkeys(("stats", "spectral", "frequency"), 0.0), n=150, runs=5),
            None,
            Margin(0.02),
        )
        claims += "accuracy falls by" in verdict(found)
    assert claims / 200 <= allowed(200)


def test_a_run_with_one_run_beside_others_is_ranked_too():
    cells = predictions(np.random.default_rng(6), {"stats": 0.0, "spectral": 0.1})
    one = cells[Cell("stats", "all_layers")]
    one["test_predictions"] = one["test_predictions"][:1]
    found = inference.infer(cells, None, Margin(0.02))
    assert [entry["representation"] for entry in found["comparisons"][0]["entries"]] == ["spectral"] and len(
        found["ranking"]
    ) == 1


TABLES = {
    "one-split": "520 rows, 3",
    "splits": "200 rows, 3",
    "folds": "105 rows, ridge",
    "family": "520 rows, 3",
    "worlds": "6 groups of 40",
    "uneven": "2 classes 10:1, recalls 80",
}


@pytest.mark.parametrize("table, only", TABLES.items())
def test_the_tables_of_the_documentation_are_made_by_their_command(table, only, capsys, monkeypatch):
    monkeypatch.setattr(family, "JOINT_FLIPS", 799)
    simulate_inference.main(["--table", table, "--experiments", "20", "--only", only])
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith(f"| {only}") for line in lines)
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    for line in lines:
        _, drop, claimed, *rest = line.strip("| ").split(" | ")
        held = rest[-1] if table == "family" else rest[0]
        assert float(held.split(" ")[0]) >= 65, line
        if drop == "0.0" or table == "family":
            assert float(claimed.split(" ")[0]) <= 30, line


@pytest.mark.parametrize(
    "table, only, rows",
    [
        ("chosen", "nine at 33 %", 4),
        ("equal", "one split of 105 at 97", 1),
        ("smallest", "one split of 105 at 33", 1),
        ("mlp", "", 2),
    ],
)
def test_the_other_tables_have_a_row_for_each_world(table, only, rows, capsys, monkeypatch):
    size = ["--rows", "60", "--data-sets", "2"]
    simulate_inference.main(["--table", table, "--experiments", "3", "--only", only, *size])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + rows and len({line.count("|") for line in lines}) == 1


def test_two_runs_leave_one_degree_of_freedom():
    first, second, _ = experiment(np.random.default_rng(19), n=1000, runs=2)
    D = first.astype(float) - second
    assert standard_error(D).dof <= 1 < standard_error(np.vstack([D, D])).dof


@pytest.mark.parametrize("many", [10, 10_000])
def test_a_bootstrap_of_runs_alone_is_as_wide_as_their_standard_error(monkeypatch, many):
    """Every example alike: what is drawn again are the runs,
    and what drawing from R of them takes away is given back.
    """
    monkeypatch.setattr(resampling, "MANY_UNITS", many)
    runs = np.random.default_rng(20).normal(0, 0.03, 5)
    low, high = two_level_bootstrap(np.tile(runs[:, None], (1, 200)), resamples=40_000)
    assert (high - low) / 2 == pytest.approx(1.96 * scipy.stats.sem(runs), rel=0.06)


def test_fewer_rounds_are_repeated_in_turn():
    right = np.array([[True, False], [False, False]])
    sample = Sample({"": right}, {"": np.arange(2)}, 0.25, 0.5, None)
    assert np.array_equal(sample.repeated("", 4), right[[0, 1, 0, 1]])
    assert np.array_equal(sample.repeated("", 2), right)


def test_a_representation_with_one_run_counts_in_the_primary_hypothesis():
    """kernel_ridge has one run beside the others' ten; no other may be called at chance for it."""
    cells = predictions(np.random.default_rng(40), {"stats": 0.3, "spectral": 0.3})
    for layer_set in ("all_layers", "visual_only"):
        one = cells[Cell("stats", layer_set)]
        one["test_predictions"] = one["test_predictions"][:1]
    found = inference.infer(cells, None, Margin(0.02))
    drops = {entry["representation"]: entry["drop"] for entry in found["comparisons"][0]["entries"]}
    assert sorted(found["primary"]["representations"]) == ["spectral", "stats"]
    assert found["primary"]["drop"] == pytest.approx(np.mean(list(drops.values())))
    assert verdict(found).startswith("With the visual layers alone accuracy falls by")


def test_signs_of_many_rows_are_drawn_in_blocks_with_the_same_numbers(monkeypatch):
    from ablation import family

    sums = np.random.default_rng(0).normal(size=(3, 700))
    monkeypatch.setattr(family, "JOINT_FLIPS", 99)
    whole = family.joint_flips(sums)
    monkeypatch.setattr(family, "SIGNS_AT_ONCE", 7 * 700)
    assert np.allclose(family.joint_flips(sums), whole, rtol=0, atol=1e-12)
    assert len(list(family.sign_blocks(99, 700, 0))) == 15
