"""Labels, groups, metadata columns, and the views of a collection."""

import numpy as np
import pytest
from builders import collect, lora_dataset, split_of
from datasets import Dataset

from ablation.settings import InputError
from ablation.splits import SplitSpec


@pytest.mark.parametrize(
    "kind, classes",
    [("string", ["Ape", "cat", "dog"]), ("integer", [3, 7, 9]), ("classlabel", ["zebra", "apple", "mango"])],
)
def test_labels(kind, classes):
    data = collect(lora_dataset(label_kind=kind), "x")
    assert data.classes == classes
    raw = lora_dataset(label_kind=kind)
    names = (
        raw["category_label"][:]
        if kind != "classlabel"
        else [raw.features["category_label"].int2str(i) for i in raw["category_label"]]
    )
    assert [classes[i] for i in data.labels] == list(names)
    other = collect(lora_dataset(label_kind=kind), "x", label_column="group")
    assert other.classes == [f"g{i}" for i in range(5)]


def test_integer_labels_are_in_numeric_order():
    dataset = lora_dataset().remove_columns("category_label").add_column("category_label", [10, 9, 2] * 8)
    assert collect(dataset, "x").classes == [2, 9, 10]


def test_the_same_rows_are_seen_with_another_split_or_other_labels():
    data = collect(lora_dataset(n=60), "x", group_column="group", split_seed=7)
    assert data.view().split is data.split and data.view().labels is data.labels
    for kind in ("random", "stratified"):
        view = data.view(SplitSpec(kind, 8))
        expected = split_of(60, 8, kind, data.labels)
        assert all(np.array_equal(a, b) for a, b in zip(view.split[:3], expected[:3], strict=True))
        assert data.view(SplitSpec(kind, 8)) is view and not np.array_equal(
            view.split.train, data.split.train
        )
    shuffled = data.view(None, "shuffled")
    assert (
        sorted(shuffled.labels) == sorted(data.labels) and 0.2 < (shuffled.labels == data.labels).mean() < 0.5
    )
    assert np.array_equal(shuffled.split.test, data.split.test) and np.array_equal(
        shuffled.labels, data.view(None, "shuffled").labels
    )
    with pytest.raises(InputError, match="--split stratified is not possible here"):
        collect(lora_dataset(n=12), "x").view(SplitSpec("stratified", 1))


def test_metadata_are_the_numeric_columns_that_are_no_weights():
    rows = lora_dataset(n=24).to_dict()
    rows |= {
        "num_images": list(range(24)),
        "step_loss": [None, float("nan")] + [0.5] * 22,
        "max_train_steps": ["many"] * 24,
        "flag": [True, False] * 12,
    }
    dataset = Dataset.from_dict(rows)
    data = collect(dataset, "x", metadata_columns=("flag", "num_images"))
    assert list(data.metadata) == ["num_images", "step_loss", "flag"] and data.metadata[
        "num_images"
    ].tolist() == list(range(24))
    assert (
        np.isnan(data.metadata["step_loss"][:2]).all()
        and data.metadata["step_loss"][2] == 0.5
        and data.metadata["flag"].tolist() == [1, 0] * 12
    )
    assert collect(lora_dataset(n=24), "x").metadata == {}
    numbered = Dataset.from_dict(rows | {"category_label": list(np.arange(24) % 2)})
    for column, reason in (
        ("group", "is not numeric in data set 'x': use num_images, step_loss, flag"),
        ("nothing", "is not there"),
        ("category_label", "is the label"),
    ):
        with pytest.raises(InputError, match=reason):
            collect(numbered, "x", metadata_columns=(column,))


def test_groups_are_numbered_by_value_and_rows_without_one_are_alone():
    rows = lora_dataset(n=12).to_dict()
    rows["group"] = ["a", "b", None, "a", None, "b", "c", "a", "c", "c", "c", "c"]
    data = collect(Dataset.from_dict(rows), "x", group_column="group")
    assert data.groups.tolist() == [0, 1, 2, 0, 3, 1, 4, 0, 4, 4, 4, 4]
    # The default, where it is absent.
    assert collect(Dataset.from_dict(rows), "x", group_column="category_name").groups is None
    with pytest.raises(
        InputError, match="has no column 'leaf': give --group-column, one of category_label, group"
    ):
        collect(Dataset.from_dict(rows), "x", group_column="leaf")
