"""Tests and intervals against scipy and statsmodels, and by simulated experiments whose truth is known."""

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

import inference
from inference import chance_level, difference, holm, over_splits, sign_flip_test, spread_of_mean, training_noise, two_level_bootstrap


def experiment(rng, n=201, runs=10, drop=0.0, base=0.45, run_sd=0.0, groups=0):
    """Whether each run was right on each example, for two layer sets: (R, n) twice, and the group of each example.

    Every example has its own chance of being right with each layer set, from Beta distributions of means base and base - drop
    that are correlated through what makes an example easy; runs shift all examples by a normal amount of std `run_sd`.
    """
    group = rng.integers(0, groups, n) if groups else None
    shared = rng.normal(size=n)
    right = []
    for mean in (base, base - drop):
        z = shared + 0.8 * rng.normal(size=n) + (rng.normal(size=groups)[group] if groups else 0)
        chance = scipy.stats.beta.ppf(scipy.stats.norm.cdf(z / math.sqrt(1.64 + bool(groups))), 1.5 * mean, 1.5 * (1 - mean))
        right.append(rng.random((runs, n)) < chance + run_sd * rng.normal(size=(runs, 1)))
    return *right, group


# --- against scipy and statsmodels


@pytest.mark.parametrize("seed", range(3))
def test_the_sign_flip_test_is_scipys_permutation_test_of_paired_samples(seed):
    rng = np.random.default_rng(seed)
    few, many = rng.normal(0.4, 1, 11), rng.normal(0.1, 1, 60)
    exact = scipy.stats.permutation_test((few,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(few) == pytest.approx(exact.pvalue)
    approximate = scipy.stats.permutation_test((many,), np.sum, permutation_type="samples", n_resamples=99_999, rng=rng)
    assert sign_flip_test(many) == pytest.approx(approximate.pvalue, abs=4 * math.sqrt(0.25 / 9999))


def test_groups_flip_as_one_and_examples_without_a_difference_do_not_count():
    d, groups = np.array([1.0, 1, 1, -1, 0, 0, 1]), np.array([5, 5, 7, 7, 7, 9, 9])
    assert sign_flip_test(d, groups) == pytest.approx(sign_flip_test(np.array([2.0, 1.0]))) == 0.5
    assert sign_flip_test(np.concatenate([d, np.zeros(50)])) == sign_flip_test(d) and sign_flip_test(np.zeros(9)) == 1


def test_one_run_is_the_paired_t_test_and_its_equivalence_test():
    first, second, _ = experiment(np.random.default_rng(0), runs=1, drop=0.08)
    found, d = difference(first, second, 0.05), first[0].astype(float) - second[0]
    expected = scipy.stats.ttest_1samp(d, 0)
    assert found["p_examples_and_runs"] == pytest.approx(expected.pvalue) and found["standard_error"] == pytest.approx(scipy.stats.sem(d))
    assert found["p_equivalence"] == pytest.approx(ttost_paired(first[0].astype(float), second[0].astype(float), -0.05, 0.05)[0])
    low, high = expected.confidence_interval()
    assert found["interval"][0] <= low and found["interval"][1] >= high and found["training_noise_interval"] is None
    assert found["d_z"] == pytest.approx(d.mean() / d.std(ddof=1))


@pytest.mark.parametrize("groups", [0, 12])
def test_the_spread_is_that_of_two_way_mean_squares(groups):
    first, second, group = experiment(np.random.default_rng(1), n=40, runs=6, run_sd=0.05, groups=groups)
    D = first.astype(float) - second
    R, n = D.shape
    mean = sum(D[r, i] for r in range(R) for i in range(n)) / (R * n)
    rows, columns = [sum(D[r]) / n for r in range(R)], [sum(D[:, i]) / R for i in range(n)]
    runs = n * sum((row - mean) ** 2 for row in rows) / (R - 1)
    rest = sum((D[r, i] - rows[r] - columns[i] + mean) ** 2 for r in range(R) for i in range(n)) / ((n - 1) * (R - 1))
    if groups:
        names = sorted(set(group))
        sums = [sum(columns[i] - mean for i in range(n) if group[i] == name) for name in names]
        examples, freedom = R / n * sum(s**2 for s in sums) * len(names) / (len(names) - 1), len(names) - 1
    else:
        examples, freedom = R * sum((column - mean) ** 2 for column in columns) / (n - 1), n - 1
    total = max(examples + runs - rest, examples, runs)
    found = spread_of_mean(D, group)
    assert found.error == pytest.approx(math.sqrt(total / (n * R)))
    assert found.freedom == pytest.approx(total**2 / (examples**2 / freedom + runs**2 / (R - 1) + rest**2 / ((n - 1) * (R - 1))))


def test_groups_of_one_are_no_groups():
    first, second, _ = experiment(np.random.default_rng(2), n=30)
    D = first.astype(float) - second
    alone = np.random.default_rng(0).permutation(30)
    assert spread_of_mean(D, alone).error == pytest.approx(spread_of_mean(D).error)
    assert sign_flip_test(D.mean(0), alone) == pytest.approx(sign_flip_test(D.mean(0)), abs=0.02)


def test_holm_is_statsmodels():
    rng = np.random.default_rng(0)
    for size in (1, 2, 9, 36):
        p = rng.random(size) ** 3
        assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


def test_splits_are_corrected_for_the_rows_they_share():
    drops = np.array([0.05, 0.02, 0.08, 0.04, 0.01])
    found = over_splits(drops, 700, 201)
    error = math.sqrt(np.var(drops, ddof=1) * (1 / 5 + 201 / 700))
    assert found["standard_error"] == pytest.approx(error) and found["drop"] == pytest.approx(0.04)
    assert found["p"] == pytest.approx(2 * scipy.stats.t.sf(0.04 / error, 4))
    assert found["interval"] == pytest.approx(scipy.stats.t.interval(0.95, 4, 0.04, error))
    assert found["p"] > scipy.stats.ttest_1samp(drops, 0).pvalue


def test_training_noise_is_scipys_bca_over_runs_and_says_nothing_of_one():
    drops = np.random.default_rng(0).normal(0.05, 0.02, 10)
    low, high = training_noise(drops)
    assert low < drops.mean() < high and high - low < 0.05
    assert training_noise(drops[:1]) is None and training_noise(np.full(4, 0.1)) == (0.1, 0.1)


def test_chance_is_the_largest_class_of_the_test_rows():
    assert chance_level(np.array([0, 0, 2, 1, 0])) == 0.6
    assert inference.binomial_error(0.5, 201) == pytest.approx(0.0353, abs=1e-4)


def test_nothing_is_claimed_where_nothing_differs():
    same = np.random.default_rng(0).random((3, 50)) < 0.5
    found = difference(same, same, 0.02)
    assert (found["drop"], found["p"], found["interval"], found["d_z"]) == (0, 1, (0, 0), None) and found["cohens_h"] == 0
    one = difference(np.ones((3, 1), bool), np.zeros((3, 1), bool), 0.02)
    assert one["p"] == 1 and one["p_equivalence"] == 1 and one["interval"] == (-1, 1) and one["smallest"] == 1


# --- by simulation


EXPERIMENTS = 1000
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)   # three standard errors of a rate of 5 %


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(inference, "FLIPS", 499)
    for function in (inference.sign_flip_test, inference.two_level_bootstrap):
        monkeypatch.setattr(inference, function.__name__, lambda *a, f=function: f(*a, 499 if f is sign_flip_test else 400))
    monkeypatch.setattr(inference, "training_noise", lambda drops: None)


@pytest.mark.parametrize("setting", [{}, {"run_sd": 0.03}, {"groups": 40, "run_sd": 0.02}, {"runs": 3, "run_sd": 0.02}], ids=str)
def test_without_an_effect_a_drop_is_claimed_no_oftener_than_promised(quick, setting):
    rng, claimed, missed = np.random.default_rng(7), 0, 0
    for _ in range(EXPERIMENTS):
        first, second, groups = experiment(rng, **setting)
        found = difference(first, second, 0.02, groups)
        claimed += found["p"] < 0.05
        missed += not found["interval"][0] <= 0 <= found["interval"][1]
    assert claimed / EXPERIMENTS <= ALLOWED and missed / EXPERIMENTS <= ALLOWED


def test_a_difference_as_large_as_the_margin_is_not_called_equivalent_oftener_than_promised(quick):
    rng = np.random.default_rng(8)
    wrong = sum(difference(*experiment(rng, n=1000, drop=0.05, run_sd=0.01)[:2], 0.05)["p_equivalence"] < 0.05 for _ in range(300))
    assert wrong / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_the_smallest_difference_is_found_as_often_as_it_says(quick):
    rng = np.random.default_rng(9)
    smallest = np.median([difference(*experiment(rng, run_sd=0.01)[:2], 0.02)["smallest"] for _ in range(50)])
    found = [difference(*experiment(rng, drop=smallest, run_sd=0.01)[:2], 0.02)["p"] < 0.05 for _ in range(300)]
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
        first, second, _ = experiment(rng, n=4000, run_sd=0.03)
        found = difference(first, second, 0.02)
        alone, both = alone + (found["p_sign_flip"] < 0.05), both + (found["p"] < 0.05)
    assert alone / 60 > 0.2 and both / 60 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_bootstraps_of_groups_draw_whole_groups():
    rng = np.random.default_rng(12)
    first, second, groups = experiment(rng, n=300, groups=20)
    D = first.astype(float) - second
    narrow, wide = two_level_bootstrap(D), two_level_bootstrap(D, groups)
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])
