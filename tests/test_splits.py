"""Which rows train, and which are tested."""

import numpy as np
import pytest
from builders import lora_dataset, split_of

from ablation.settings import InputError


@pytest.mark.parametrize("n", [11, 24, 200, 1000])
@pytest.mark.parametrize("seed", [42, 7])
def test_the_split_is_the_origins_row_for_row(n, seed):
    dataset = lora_dataset(n=n, rank=1, width=2).add_column("row", list(range(n)))
    first = dataset.train_test_split(test_size=0.3, seed=seed)
    second = first["test"].train_test_split(test_size=0.67, seed=seed)
    split = split_of(n, seed)
    for ours, theirs in zip(split, (first["train"], second["train"], second["test"]), strict=False):
        assert ours.tolist() == list(theirs["row"])
    assert sorted(np.concatenate(split[:3])) == list(range(n)) and not split.overlap


def test_ten_rows_or_fewer_are_not_divided():
    for n in (2, 10):
        split = split_of(n, 42)
        assert split.overlap and all(part.tolist() == list(range(n)) for part in split[:3])
    assert not split_of(11, 42).overlap


def parts_of(split):
    return [set(part.tolist()) for part in split[:3]]


def test_every_kind_of_split_uses_every_row_once_and_depends_on_its_seed():
    labels, groups = np.arange(200) % 5, np.arange(200) // 8
    for kind in ("random", "stratified", "grouped"):
        first, again, other = (split_of(200, seed, kind, labels, groups) for seed in (42, 42, 43))
        train, val, test = parts_of(first)
        assert train | val | test == set(range(200)) and len(train) + len(val) + len(test) == 200
        assert abs(len(train) - 140) <= 12 and abs(len(test) - 40) <= 12
        assert parts_of(again) == [train, val, test] != parts_of(other) and first.overlap is False
    assert parts_of(split_of(200, 42)) == parts_of(split_of(200, 42, "random", labels, groups))


def test_a_stratified_split_has_every_class_in_proportion():
    labels = np.repeat(np.arange(4), [100, 50, 30, 20])
    train, val, test = split_of(200, 1, "stratified", labels)[:3]
    for part, share in ((train, 0.7), (val, 0.1), (test, 0.2)):
        assert (
            np.abs(np.bincount(labels[part], minlength=4) - share * np.array([100, 50, 30, 20])).max() <= 1.5
        )


@pytest.mark.parametrize("seed", range(5))
def test_a_grouped_split_parts_no_group_and_leaves_every_class_to_train_on(seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(20), 15))  # two groups a class, as the digits have
    labels = groups // 2
    split = split_of(300, seed, "grouped", labels, groups)
    kinds = [set(groups[part].tolist()) for part in split[:3]]
    assert (
        not kinds[0] & kinds[1]
        and not kinds[0] & kinds[2]
        and not kinds[1] & kinds[2]
        and set.union(*kinds) == set(range(20))
    )
    assert set(labels[split.train].tolist()) == set(range(10))


def test_splits_that_cannot_be_are_refused():
    labels = np.arange(40) % 2
    with pytest.raises(InputError, match="--split grouped needs a column of groups: give --group-column"):
        split_of(40, 42, "grouped", labels)
    with pytest.raises(InputError, match="--split grouped is not possible here"):
        split_of(40, 42, "grouped", labels, np.zeros(40, dtype=int))
    with pytest.raises(InputError, match="--split stratified is not possible here"):
        split_of(40, 42, "stratified", np.array([0] * 39 + [1]))
