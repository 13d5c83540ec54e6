"""Cross-validation: folds against scikit-learn, its estimator against simulation and statsmodels."""

import dataclasses
import functools
import json
import math
import threading

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
import torch
from builders import lora_dataset
from running import FAST, cell_files, folder, visible
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from ablation import estimators, family, fold_estimators, simulation
from ablation.conversion import build_settings
from ablation.fold_estimators import OVERLAP, fold_standard_error, variance_of_runs
from ablation.planned_runs import PlannedRun, PlannedRuns, runs_by_round
from ablation.reservations import about
from ablation.settings import InputError
from ablation.splits import SplitSpec, fold_splits
from ablation.task import Listener, Task
from ablation.training import Watch, train_alone
from ablation.work_pool import Pool
from checkpointing import Unfinished

LABELS = np.arange(200) % 4
GROUPS = np.arange(200) % 40  # ten of each class


# --- folds


@pytest.mark.parametrize("kind", ["random", "stratified", "grouped"])
def test_every_row_is_tested_once_in_each_partition(kind):
    splits = fold_splits(200, SplitSpec(kind, 3, folds=5, partitions=2), LABELS, GROUPS)
    assert len(splits) == 10
    for partition in (splits[:5], splits[5:]):
        assert sorted(np.concatenate([split.test for split in partition])) == list(range(200))
    assert not np.array_equal(splits[0].test, splits[5].test)
    for split in splits:
        assert sorted(np.concatenate(split[:3])) == list(range(200)) and not split.overlap
        assert (len(split.train), len(split.val), len(split.test)) == (140, 20, 40)


def test_stratified_folds_are_scikit_learns_by_group_where_groups_have_a_row_for_each_fold():
    (first, *_) = fold_splits(200, SplitSpec("stratified", 7, folds=5), LABELS, GROUPS)
    expected = next(StratifiedKFold(5, shuffle=True, random_state=7).split(GROUPS, GROUPS))[1]
    assert np.array_equal(first.test, expected)
    small = np.arange(200) % 100  # two rows a group
    (first, *_) = fold_splits(200, SplitSpec("stratified", 7, folds=5), LABELS, small)
    expected = next(StratifiedKFold(5, shuffle=True, random_state=7).split(LABELS, LABELS))[1]
    assert np.array_equal(first.test, expected)


def test_grouped_folds_keep_groups_whole_in_validation_too():
    splits = fold_splits(200, SplitSpec("grouped", 1, folds=5), LABELS, GROUPS)
    expected = next(StratifiedGroupKFold(5, shuffle=True, random_state=1).split(LABELS, LABELS, GROUPS))[1]
    assert np.array_equal(splits[0].test, expected)
    for split in splits:
        parts = [set(GROUPS[rows].tolist()) for rows in split[:3]]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.parametrize(
    "spec, groups, reason",
    [
        (SplitSpec("grouped", 0, 5), None, "needs a column of groups"),
        (SplitSpec("grouped", 0, 5), LABELS, "need 6 groups: the data set has 4"),
        (SplitSpec("stratified", 0, 60), GROUPS, "needs 60 rows of each class: one has 50"),
        (SplitSpec("random", 0, 201), GROUPS, "are more than the 200 rows"),
    ],
)
def test_folds_that_are_not_possible_are_refused(spec, groups, reason):
    with pytest.raises(InputError, match=reason):
        fold_splits(200, spec, LABELS, groups)


@pytest.mark.parametrize("kind", ["random", "stratified", "grouped"])
@pytest.mark.parametrize("classes, of_class", [(20, 6), (2, 6), (5, 3), (30, 5)])
def test_small_classes_are_folded_or_refused(kind, classes, of_class):
    labels = np.repeat(np.arange(classes), of_class)
    groups = np.arange(len(labels)) // 2
    try:
        splits = fold_splits(len(labels), SplitSpec(kind, 0, folds=5), labels, groups)
    except InputError as error:
        assert "--folds 5" in str(error) and (of_class < 5 or kind == "grouped")
        return
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(len(labels)))
    assert all(len(split.val) and len(split.train) > len(split.val) for split in splits)


def test_runs_are_spread_over_folds_and_partitions():
    training = build_settings({"num_runs": 12}).training
    planned = runs_by_round(3, 2, training)
    assert [one.fold for one in planned] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert [one.seed for one in planned] == list(range(42, 54))


@pytest.mark.parametrize(
    "chosen, reason",
    [
        ({"folds": 3}, "--num-runs 10 cannot be spread evenly over --folds 3: use 9 or 12"),
        ({"folds": 5, "repeats": 3}, "over --folds 5 --repeats 3: use 15"),
        ({"folds": 1}, "use 2 or more"),
        ({"repeats": 2}, "go with --folds"),
        ({"split": ["auto"]}, "go with --folds"),
        ({"folds": 5, "split": ["auto", "random"]}, "stands alone"),
        ({"folds": 5, "num_splits": 2}, "--repeats divides the rows again"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(chosen, reason):
    with pytest.raises(InputError, match=reason):
        build_settings(chosen)


def test_runs_of_folds_are_what_each_is_alone_however_many_train_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.normal(size=(60, 8))).float()
    labels = np.arange(60) % 3
    splits = fold_splits(60, SplitSpec("stratified", 0, folds=5, partitions=2), labels)
    settings = build_settings({"max_epochs": 4, "hidden_dim": 16, "batch_size": 8}).training
    tasks = [Task(x, labels, split, 3) for split in splits]

    def train(task, one, stop):
        alone = dataclasses.replace(settings, num_runs=1, seed=one.seed, trainer="sequential")
        return train_alone(task, alone, "cpu", Watch(stop, Listener()))

    planned = runs_by_round(5, 2, settings)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [train(tasks[one.fold], one, threading.Event()).runs[0] for one in planned]
        torch.set_num_threads(6)
        runs = [
            PlannedRun(one.number, lambda one=one: functools.partial(train, tasks[one.fold], one))
            for one in planned
        ]
        batch = PlannedRuns(runs, kept=Unfinished(tmp_path, "cell", {}))
        with Pool(6) as pool:
            assert list(pool.finished([batch])) == [batch]
        together = batch.trained().runs
    finally:
        torch.set_num_threads(threads)
    for ours, expected in zip(together, alone, strict=True):
        assert ours.train_loss == expected.train_loss and ours.seed == expected.seed
        for part in ("train", "val", "test"):
            assert np.array_equal(ours.predictions[part], expected.predictions[part])


# --- the estimator


def world(rng, n=300, folds=5, rounds=2, groups=0, run_sd=0.05):
    """D (m, n), runs (m, n) and groups of a cross-validation without a drop: two classifiers whose rows are
    alike, whose groups differ, and each of whose runs shifts the rows that it tests.
    """
    runs = np.empty((rounds, n), int)
    for j in range(rounds):
        runs[j, rng.permutation(n)] = j * folds + np.arange(n) % folds
    group = rng.integers(0, groups, n) if groups else None
    easy, right = rng.normal(size=n), []
    for _ in range(2):
        z = easy + 0.8 * rng.normal(size=n)
        if group is not None:
            z = z + 0.5 * rng.normal(size=groups)[group]
        chance = scipy.stats.norm.cdf(z - 0.5) + run_sd * rng.normal(size=rounds * folds)[runs]
        right.append(rng.random((rounds, n)) < chance)
    return right[0].astype(float) - right[1], runs, group


@pytest.mark.parametrize(
    "setting",
    [{}, {"rounds": 1}, {"run_sd": 0.0}, {"rounds": 3, "run_sd": 0.1}, {"groups": 30}, {"n": 2000}],
    ids=str,
)
def test_without_a_drop_one_is_claimed_as_often_as_promised(setting, monkeypatch):
    for name in ("OVERLAP", "OVERLAP_UNSEEN"):
        monkeypatch.setattr(fold_estimators, name, 1.0)  # these rows know of no training set
    rng, experiments = np.random.default_rng(11), 500
    claimed = 0
    for _ in range(experiments):
        D, runs, groups = world(rng, **setting)
        spread = fold_standard_error(D, runs, groups)
        claimed += 2 * scipy.stats.t.sf(abs(D.mean()) / spread.error, spread.dof) < 0.05
    three = 3 * math.sqrt(0.05 * 0.95 / experiments)
    assert 0.05 - three <= claimed / experiments <= 0.05 + three


def test_the_groups_part_is_statsmodels_cluster_robust_error():
    D, runs, groups = world(np.random.default_rng(1), groups=25, run_sd=0.0)
    D = np.tile(D.mean(0), (2, 1))  # no run differs from another
    groups = np.arange(300) % 25  # of equal size, where the jackknife is the robust error
    found = fold_standard_error(D, runs, groups)
    robust = sm.OLS(D[0], np.ones(300)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    assert found.error == pytest.approx(OVERLAP * robust.bse[0] * math.sqrt(25 / 24), rel=1e-9)
    assert found.dof == pytest.approx(24)


def test_the_rows_part_is_the_error_of_a_mean_stretched_for_overlap():
    D, runs, _ = world(np.random.default_rng(2))
    D = np.tile(D.mean(0), (2, 1))
    found = fold_standard_error(D, runs)
    assert found.error == pytest.approx(OVERLAP * scipy.stats.sem(D[0])) and found.dof == pytest.approx(299)


def test_the_overlap_of_training_sets_counts_more_where_rounds_cannot_show_it():
    runs = world(np.random.default_rng(9), rounds=1)[1]
    same = np.concatenate([runs, runs + 5])
    other = np.concatenate([runs, world(np.random.default_rng(10), rounds=1)[1] + 5])
    renumbered = np.concatenate([runs, 9 - runs])  # the same folds under other numbers
    many = world(np.random.default_rng(11), rounds=3)[1]
    stretches = [fold_estimators.overlap_of(of, None) for of in (runs, other, same, renumbered, many)]
    unseen = fold_estimators.OVERLAP_UNSEEN
    assert stretches == [OVERLAP, OVERLAP, unseen, unseen, unseen]
    divided, whole = np.arange(300) % 25, runs[0] * 10 + np.arange(300) % 3
    assert [fold_estimators.overlap_of(runs, groups) for groups in (divided, whole)] == [OVERLAP, OVERLAP]
    both = np.stack([runs[0], (runs[0] + whole % 3) % 5 + 5])  # whole groups in another division
    assert [fold_estimators.overlap_of(both, groups) for groups in (divided, whole)] == [OVERLAP, unseen]


@pytest.fixture
def only_rates(monkeypatch):
    """Leave out what no rate of a simulation rests on: the sign-flip test too where the t test claims
    nothing, because the larger p-value of the two counts. Fewer flips, which make no rate larger.
    """

    def p_values(D, spread, groups):
        t_test = estimators.p_of_mean(float(D.mean()), spread)
        flip = estimators.sign_flip_test(D.mean(0), groups, 499) if t_test < estimators.LEVEL else 0.0
        return flip, t_test

    monkeypatch.setattr(fold_estimators, "p_values_of_mean", p_values)
    monkeypatch.setattr(estimators, "training_noise", lambda drops: None)
    monkeypatch.setattr(family, "retained", lambda first, second: None)
    monkeypatch.setattr(family, "JOINT_FLIPS", 799)


@pytest.mark.slow
def test_learners_that_share_training_rows_are_judged_as_promised(only_rates):
    """Ridge regression on simulated data sets: the short form of a table of the documentation."""
    hard = dataclasses.replace(simulation.HARD, rows=200, columns=30)
    for change in ({}, {"groups": 100, "grouped": True}, {"rounds": 4}):
        rates = simulation.simulate_folds(dataclasses.replace(hard, **change), 300, seed=5)
        error = math.sqrt(0.05 * 0.95 / 300)
        assert abs(rates["covered"] - 0.95) <= 3 * error + 0.01, (change, rates)
        assert rates["claimed"] <= 0.05 + 3 * error + 0.01, (change, rates)


@pytest.mark.slow
def test_nine_representations_are_judged_together_as_promised(only_rates):
    world_of = simulation.FoldWorld(rows=200, lost=0.4)
    none = simulation.simulate_family(world_of, 0, 150, seed=6)
    some = simulation.simulate_family(world_of, 3, 150, seed=6)
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    for found in (none, some):
        assert found["wrong by max-T"] <= limit and found["together"] >= 1 - limit
    assert some["found by max-T"] >= some["found by Holm"] > 0.3


@pytest.mark.parametrize("plus", [0.1, 1.0, 1.5, 4.0])
def test_degrees_of_freedom_are_those_of_the_truncated_sum(plus):
    """Against a million draws of the three mean squares."""
    rng, draws = np.random.default_rng(15), 10**6
    units = 0.8 * rng.chisquare(30, draws) / 30
    more, less = max(plus, 1.0) * rng.chisquare(9, draws) / 9, rng.chisquare(500, draws) / 500
    total = units + np.maximum(more - less, 0)
    found = fold_estimators.degrees_of_freedom((0.8, 30), (plus, 9), (1.0, 500))
    assert found == pytest.approx(2 * total.mean() ** 2 / total.var(), rel=0.06)


def test_degrees_of_freedom_do_not_jump_with_the_sign_of_the_runs_part():
    of = functools.partial(fold_estimators.degrees_of_freedom, (0.8, 259), minus=(1.0, 511))
    below, at, above = (of(plus=(plus, 9)) for plus in (0.5, 1.0, 1.001))
    assert below == at == pytest.approx(above, rel=0.01) and 9 < at < 40
    # Many runs say more than few, and no scatter of runs leaves the units' degrees of freedom.
    assert of(plus=(1.0, 99)) > 2 * at
    assert fold_estimators.degrees_of_freedom((0.8, 259), (0.0, 9), (0.0, 511)) == pytest.approx(259)


def test_a_drop_is_replicated_if_each_round_shows_it_by_itself():
    rng, found = np.random.default_rng(16), []
    for trial in range(30):
        D, runs, groups = world(rng, groups=(0, 100)[trial % 2])
        D = D + 0.12
        p_values = []
        for j in range(2):
            spread = fold_standard_error(D[j : j + 1], runs[j : j + 1], groups)
            p_values.append(2 * scipy.stats.t.sf(abs(D[j].mean()) / spread.error, spread.dof))
        found.append(fold_estimators.is_replicated(D, runs, groups))
        assert found[-1] == (max(p_values) < 0.05 and D[0].mean() > 0 and D[1].mean() > 0)
    assert 0 < sum(found) < 30
    D, runs, _ = world(rng)
    assert fold_estimators.is_replicated(D[:1], runs[:1], None) is None
    assert fold_estimators.is_replicated(np.stack([D[0] + 0.5, D[1] - 0.4]), runs, None) is False
    right = (D > 0, D < 0)
    entry = fold_estimators.difference_of_folds(right, 0.02, runs, None)
    assert entry["replicated"] is fold_estimators.is_replicated(right[0] * 1.0 - right[1], runs, None)


def test_the_runs_part_is_the_sum_of_squares_adjusted_for_rows():
    """Against ordinary least squares with and without a column for each run."""
    D, runs, _ = world(np.random.default_rng(3), n=60, run_sd=0.2)
    m, n = D.shape
    rows = np.kron(np.ones((m, 1)), np.eye(n))
    of_runs = (runs.ravel()[:, None] == np.arange(10)).astype(float)
    without = sm.OLS(D.ravel(), rows).fit()
    whole = sm.OLS(D.ravel(), np.hstack([rows, of_runs])).fit()
    plus, minus, runs_dof, rest_dof = variance_of_runs(D, runs)
    share = sum((count / (m * n)) ** 2 for count in np.bincount(runs.ravel()))
    scale = share * 9 / (n * (m - 1))
    assert (runs_dof, rest_dof) == (9, n * (m - 1) - 9)
    assert plus == pytest.approx((without.ssr - whole.ssr) / 9 * scale)
    assert minus == pytest.approx(whole.ssr / rest_dof * scale)


def test_rounds_that_share_their_folds_have_fewer_degrees_of_freedom():
    """Against ordinary least squares: runs of one fold test the same rows, so fewer differences are seen."""
    D, runs, _ = world(np.random.default_rng(12), n=60, rounds=1, run_sd=0.3)
    D = np.concatenate([D, world(np.random.default_rng(13), n=60, rounds=1, run_sd=0.3)[0]])
    runs = np.concatenate([runs, runs + 5])
    rows = np.kron(np.ones((2, 1)), np.eye(60))
    of_runs = (runs.ravel()[:, None] == np.arange(10)).astype(float)
    without, whole = sm.OLS(D.ravel(), rows).fit(), sm.OLS(D.ravel(), np.hstack([rows, of_runs])).fit()
    plus, minus, runs_dof, rest_dof = variance_of_runs(D, runs)
    assert (runs_dof, rest_dof) == (5, 55) == (without.df_resid - whole.df_resid, whole.df_resid)
    assert plus / minus == pytest.approx((without.ssr - whole.ssr) / 5 / whole.mse_resid)


@pytest.mark.parametrize("n, rounds", [(1, 1), (1, 2), (3, 1), (4, 2)])
def test_of_too_few_rows_nothing_is_claimed(n, rounds):
    runs = np.arange(n * rounds).reshape(rounds, n)  # every answer by a run of its own
    for groups in (None, np.arange(n)):
        found = fold_standard_error(np.ones((rounds, n)), runs, groups)
        assert found.error == math.inf and found.half_width == math.inf


# --- several representations at once


def test_the_family_is_wrong_no_oftener_than_promised_and_finds_more_than_holm(monkeypatch):
    monkeypatch.setattr(family, "JOINT_FLIPS", 799)
    rng, wrong, found, by_holm = np.random.default_rng(5), 0, 0, 0
    experiments = 300
    for trial in range(experiments):
        shared, own = rng.normal(size=(1, 40)), rng.normal(size=(9, 40))
        sums = 2 * shared + own + (1.0 if trial % 2 else 0.0)
        flips = family.joint_flips(sums, seed=trial)
        p = scipy.stats.ttest_1samp(sums, 0, axis=1).pvalue.tolist()
        adjusted = np.array(family.step_down(p, flips))
        assert (adjusted >= np.array(p) - 1e-12).all()
        if trial % 2:
            found += (adjusted < 0.05).sum()
            by_holm += (np.array(family.holm(p)) < 0.05).sum()
        else:
            wrong += adjusted.min() < 0.05
    half = experiments / 2
    assert wrong / half <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / half) and found > 1.1 * by_holm


def test_one_representation_alone_needs_no_correction():
    sums = np.random.default_rng(6).normal(0.4, 1, (1, 60))
    p = float(scipy.stats.ttest_1samp(sums[0], 0).pvalue)
    flips = family.joint_flips(sums)
    assert family.step_down([p], flips)[0] == pytest.approx(p, abs=0.01)
    assert family.critical_deviate(flips) == pytest.approx(1.96, abs=0.06)


def test_equivalence_in_a_family_is_claimed_no_oftener_than_promised_and_oftener_than_by_holm(monkeypatch):
    """The true difference of all nine is the margin itself, so every claim is wrong."""
    monkeypatch.setattr(family, "JOINT_FLIPS", 799)
    rng, experiments, wrong, wrong_by_holm = np.random.default_rng(8), 400, 0, 0
    for trial in range(experiments):
        shared, own = rng.normal(size=(1, 60)), rng.normal(size=(9, 60))
        sums = 2 * shared + own
        p = scipy.stats.ttest_1samp(sums, 0, axis=1, alternative="less").pvalue.tolist()
        flips = family.joint_flips(sums, seed=trial)
        wrong += min(family.step_down(p, flips, -np.ones(9))) < 0.05
        wrong_by_holm += min(family.holm(p)) < 0.05
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / experiments)
    assert wrong_by_holm < wrong and wrong / experiments <= limit


# --- a whole run

CHOSEN = ("--folds", "5", "--representations", "stats", "pca", "kernel_ridge", "--pca-components", "3")
TEN = ["--num-runs", "10", *FAST[2:]]


def test_a_cross_validation_is_one_checkpoint_a_cell_and_tests_every_row(run, place):
    status, log = run(*CHOSEN, fast=TEN)
    assert status == 0, log
    assert len(visible(folder(place) / "checkpoints")) == 6
    with np.load(folder(place) / "predictions" / "visual_only_stats.npz", allow_pickle=False) as arrays:
        parts, predictions, labels = arrays["parts"], arrays["predictions"], arrays["labels"]
        assert predictions.shape == parts.shape == (10, 40) and ((parts == 2).sum(0) == 2).all()
        accuracy = (predictions == labels)[parts == 2].mean()
    results = json.loads((folder(place) / "results.json").read_text())
    found = results["inference"]
    assert found["folds"] == {"folds": 5, "rounds": 2} and found["runs"] == 10 and found["test_rows"] == 40
    assert found["accuracies"]["visual_only_stats"]["accuracy"] == pytest.approx(accuracy)
    per_run = results["visual_only_results"][0]["per_run_results"]
    assert [one["fold"] for one in per_run] == list(range(10))
    assert {entry["representation"] for entry in found["comparisons"][0]["entries"]} == {
        "stats",
        "pca",
        "kernel_ridge",
    }
    assert not (folder(place) / ".unfinished").exists()
    assert "All experiments already completed!" in run(*CHOSEN, fast=TEN)[1]
    status, log = run(*CHOSEN[2:], fast=TEN)
    assert status == 2 and "the split changed" in log
    status, log = run("--status", *CHOSEN[2:], fast=TEN)
    assert "folds was 5, is now 0" in log


def test_audits_of_other_rows_are_stale_both_ways(run, place):
    chosen = ("--folds", "5", "--representations", "stats", "--audit", "noise")
    assert run(*chosen, "--audit-rows", "5", fast=TEN)[0] == 0
    for other in ([], ["--audit-rows", "9"]):
        status, log = run(*chosen, *other, fast=TEN)
        assert status == 2 and "audit_version was 1, on 5 rows" in log
    assert run(*chosen, "--rerun-stale", fast=TEN)[0] == 0
    status, log = run(*chosen, "--audit-rows", "5", fast=TEN)
    assert status == 2 and "audit_version was 1, is now 1, on 5 rows" in log


def test_unfinished_runs_without_an_audit_are_none_of_an_audited_cell(run, place, monkeypatch):
    from ablation import runs as runs_module

    real, trained = runs_module.train_alone, []

    def ended(*arguments):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*arguments)

    whole = ("--folds", "5", "--representations", "stats", "--layer-sets", "all_layers")
    monkeypatch.setattr(runs_module, "train_alone", ended)
    with pytest.raises(KeyboardInterrupt):
        run(*whole, fast=TEN)
    monkeypatch.setattr(runs_module, "train_alone", real)
    status, log = run(*whole, "--audit", "gauge", fast=TEN)
    assert status == 0, log
    assert len(visible(folder(place) / "checkpoints")) == 2


def test_a_killed_cross_validation_goes_on_with_the_runs_that_it_has(run, place, monkeypatch):
    from ablation import runs as runs_module

    real, trained = runs_module.train_alone, []

    def ended(task, settings, *rest):
        if len(trained) == 6:
            raise KeyboardInterrupt
        trained.append(settings.seed)
        return real(task, settings, *rest)

    whole = ("--folds", "5", "--representations", "stats", "--layer-sets", "all_layers")
    run(*whole, "--output-dir", "whole", fast=TEN)
    monkeypatch.setattr(runs_module, "train_alone", ended)
    with pytest.raises(KeyboardInterrupt):
        run(*whole, fast=TEN)
    kept = len(visible(folder(place) / ".unfinished" / "all_layers_stats"))
    assert 4 <= kept <= 6
    trained.clear()
    monkeypatch.setattr(runs_module, "train_alone", lambda *rest: (trained.append(1), real(*rest))[1])
    assert run(*whole, fast=TEN)[0] == 0 and len(trained) == 10 - kept
    assert cell_files(place) == cell_files(place, output="whole")


def test_groups_are_kept_together_where_there_are_some(run, place):
    rows = lora_dataset(n=90, signal=1.0).to_dict()
    from datasets import Dataset

    rows["category_name"] = [f"{i % 3} {i % 18}" for i in range(90)]
    Dataset.from_dict(rows).save_to_disk("leaves")
    chosen = ("--folds", "5", "--representations", "stats", "--classifiers", "linear")
    five = ["--num-runs", "5", *FAST[2:]]
    status, log = run(*chosen, dataset="./leaves", fast=five)
    assert status == 0, log
    found = json.loads((folder(place, "leaves") / "results.json").read_text())
    assert found["inference"]["test_rows_that_share_a_group_with_training"] == 0
    assert about(found["inference"]) == (
        "This is about image sets (`category_name`) that were not trained on, of the same 3 classes, and new "
        "runs."
    )
    made = json.loads((folder(place, "leaves") / "checkpoints" / "all_layers_stats.json").read_text())
    assert made["made_with"]["is_weighted"]
    status, log = run(
        "--split", "stratified", "grouped", *chosen, "--output-dir", "both", dataset="./leaves", fast=five
    )
    assert status == 0, log
    found = json.loads((folder(place, "leaves", "both") / "results.json").read_text())["inference"]
    assert [entry["split"] for entry in found["inflation"]] == ["stratified"] * 2


@pytest.mark.parametrize("most", [0, 12])
def test_audits_score_every_run_on_changed_rows_that_it_did_not_see(run, place, most):
    """The gauge changes no product, and as many rows are audited as were asked for."""
    chosen = (
        "--folds",
        "5",
        "--representations",
        "stats",
        "product_norms",
        "kernel_ridge",
        "--audit",
        "gauge",
    )
    status, log = run(*chosen, "--audit-rows", str(most), fast=TEN)
    assert status == 0, log
    results = json.loads((folder(place) / "results.json").read_text())
    for entry in results["audits"]:
        name, found = entry["cell"].removesuffix(".gauge"), entry["variants"]["re-gauged"]
        assert entry["audited_rows"] == (most or 40)
        with np.load(folder(place) / "predictions" / f"{entry['cell']}.npz", allow_pickle=False) as arrays:
            changed, as_it_is, labels = (
                arrays["re-gauged_predictions"],
                arrays["predictions"],
                arrays["labels"],
            )
            is_test = arrays["parts"] == 2
        audited = changed >= 0
        assert (audited.sum(0) == 2 * audited.any(0)).all() and (is_test | ~audited).all()
        assert audited.any(0).sum() == (most or 40)
        # Every audited row counts once in each of the two rounds.
        assert found["test_acc_mean"] == pytest.approx((changed == labels)[audited].mean())
        assert found["unchanged_acc_mean"] == pytest.approx((as_it_is == labels)[audited].mean())
        assert found["agreement"] == pytest.approx((changed == as_it_is)[audited].mean())
        if "stats" not in name:
            assert found["agreement"] == 1 and found["unchanged_acc_mean"] == found["test_acc_mean"]


@pytest.mark.parametrize("repeats, runs", [("1", "10"), ("2", "20")])
def test_representations_with_fewer_rounds_are_compared_and_averaged_too(run, place, repeats, runs):
    """kernel_ridge has a run for each fold of each division, the MLP has more."""
    lora_dataset(n=40, signal=3.0).save_to_disk("clear")
    names = ("simple_stats", "stats", "kernel_ridge", "product_norms")
    chosen = ("--folds", "5", "--repeats", repeats, "--representations", *names)
    fast = ["--num-runs", runs, "--max-epochs", "6", "--learning-rate", "0.01", *FAST[4:]]
    status, log = run(*chosen, dataset="./clear", fast=fast)
    assert status == 0, log
    found = json.loads((folder(place, "clear") / "results.json").read_text())["inference"]
    assert len(found["ranking"]) == 6
    if found["primary"]:
        assert set(found["primary"]["representations"]) >= set(found["above_chance"])


def test_rows_that_share_their_groups_are_counted_over_all_folds(run, place):
    from datasets import Dataset

    rows = lora_dataset(n=40).to_dict()
    rows["category_name"] = [f"{i % 3} {i % 6}" if i < 30 else f"alone {i}" for i in range(40)]
    Dataset.from_dict(rows).save_to_disk("some")
    chosen = ("--folds", "5", "--split", "random", "--representations", "stats")
    status, log = run(*chosen, dataset="./some", fast=TEN)
    assert status == 0, log
    found = json.loads((folder(place, "some") / "results.json").read_text())["inference"]
    assert found["test_rows"] == 40 and 25 <= found["test_rows_that_share_a_group_with_training"] <= 30


def test_shuffled_labels_are_checked_in_folds_too(run, place):
    chosen = ("--folds", "5", "--representations", "stats", "--controls", "shuffled")
    status, log = run(*chosen, fast=TEN)
    assert status == 0, log
    found = json.loads((folder(place) / "results.json").read_text())["inference"]["shuffled"]
    for cell, entry in found["cells"].items():
        with np.load(folder(place) / "predictions" / f"{cell}.npz", allow_pickle=False) as arrays:
            right = (arrays["predictions"] == arrays["labels"])[arrays["parts"] == 2]
        assert entry["accuracy"] == pytest.approx(right.mean())
