"""Folders as people have them: snapshots of the Hub, downloads of Civitai, checkpoints of one training,
what trainers write into headers, copies.
"""

import json
import os
import socket
import warnings

import inspect_dataset
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk
from running import FAST, folder
from safetensors.numpy import load_file, save_file
from test_build_dataset import make_files

import visual_ablation_experiment as experiment
from ablation.adapter_kinds import BadFile
from ablation.columns import Columns, group_column_of
from ablation.fields import InputError
from ablation.layers import is_layer
from ablation.making import duplicates
from ablation.making.duplicates import duplicate_files
from ablation.making.headers import chosen_columns, header_values
from ablation.making.inputs import find_inputs
from ablation.making.sidecars import civitai_values, field_at, read_fields
from ablation.making.trainings import group_by_training, training_by_name

REVISIONS = ("a" * 40, "b" * 40)


def adapter(path, number=0, metadata=None):
    """One adapter under any name; files of one number have the same content."""
    (made,) = make_files(path.parent / f".made-{path.stem}", n=1, first=number)
    save_file(load_file(made), path, metadata=metadata)
    return path


def column(name, output="out"):
    return load_from_disk(output)[name][:]


def made(place, output="out"):
    return json.loads((place / output / "build.json").read_text())


# --- the Hub


def snapshot(hub, model, revision, files):
    """A model in the Hub's cache: links in a snapshot, contents in blobs. `files`: name -> number."""
    top = hub / f"models--{model}"
    for name in ("blobs", "refs", f".no_exist/{revision}", f"snapshots/{revision}"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (hub / ".locks" / top.name).mkdir(parents=True, exist_ok=True)
    (hub / ".locks" / top.name / "x.safetensors").write_bytes(b"")
    (top / "refs/main").write_text(revision)
    (top / ".no_exist" / revision / "adapter_model.safetensors").write_bytes(b"")
    for name, number in files.items():
        blob = top / "blobs" / f"sha{number}"
        if not blob.exists():
            adapter(top / "blobs" / "new.safetensors", number).rename(blob)
        link = top / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return top


def test_snapshots_of_the_hub(place, build):
    first = snapshot(place / "hub", "owner--cat", REVISIONS[0], {"x.safetensors": 0, "y.safetensors": 1})
    snapshot(place / "hub", "owner--cat", REVISIONS[1], {"x.safetensors": 0, "y.safetensors": 2})
    snapshot(place / "hub", "owner--dog", REVISIONS[0], {"x.safetensors": 3})
    status, said = build("hub")
    assert status == 0, said
    assert "5 found = 5 written + 0 bad" in said and "hidden or trainer-state files passed over" in said
    cat = [f"models--owner--cat/snapshots/{r}/{name}.safetensors" for r in REVISIONS for name in "xy"]
    assert column("lora_file") == [*cat, f"models--owner--dog/snapshots/{REVISIONS[0]}/x.safetensors"]
    assert column("category_label") == ["models--owner--cat"] * 4 + ["models--owner--dog"]
    # one blob in two revisions is a copy; another one is another row, of the same training
    assert made(place)["duplicates"] == [[cat[0], cat[2]]]
    assert f"{cat[0]} = {cat[2]}" in said and "WARNING: the same weights" not in said
    assert column("training") == [f"models--owner--cat/{name}" for name in "xyxy"] + ["models--owner--dog/x"]
    # ten rows or fewer are not divided, so nothing lies on both sides
    assert "random split" not in said and made(place)["test_rows_with_their_training_in_train"] == 0
    # a pattern for every file does not find contents a second time
    assert find_inputs([place / "hub"], "*").files == column("lora_file")
    assert find_inputs([first / "blobs"], "sha*").files == ["sha0", "sha1", "sha2"]
    with pytest.raises(InputError, match=r"no sha\* file"):
        find_inputs([first], "sha*")


def test_the_class_in_the_folder_of_one_model(place, build):
    top = snapshot(
        place / "hub", "owner--zoo", REVISIONS[0], {"cat/x.safetensors": 0, "dog/x.safetensors": 1}
    )
    for where in (top, top / "snapshots", top / "snapshots" / REVISIONS[0]):
        status, said = build(where, "--overwrite")
        assert status == 0 and column("category_label") == ["cat", "dog"], said
    alone = snapshot(place / "hub", "owner--cat", REVISIONS[0], {"x.safetensors": 2})
    assert build(alone, "--overwrite")[0] == 0 and column("category_label") == ["models--owner--cat"]
    assert build(top, alone, "--overwrite")[0] == 0
    assert column("category_label") == ["models--owner--cat", "models--owner--zoo", "models--owner--zoo"]
    assert build(alone, output="one")[0] == 0
    alone = alone.rename(place / "hub/models--owner--mine")
    assert build(alone, output="one")[0] == 2  # the same files with another class
    alone = alone.rename(place / "hub/models--owner--cat")
    (place / "renamed").symlink_to(alone)
    assert build("renamed", "--overwrite")[0] == 0 and column("category_label") == ["models--owner--cat"]


def test_metadata_stands_beside_the_link(place, build):
    for model, label in (("a--b", "cat"), ("c--d", "dog")):
        top = snapshot(
            place / "hub", model, REVISIONS[0], {"x.safetensors": len(label + model) + ord(label[0])}
        )
        (top / "blobs/metadata.json").write_text('{"category_label": "wrong"}')
        text = json.dumps({"category_label": label})
        (top / "snapshots" / REVISIONS[0] / "metadata.json").write_text(text)
    status, said = build("hub")
    assert status == 0 and "labels from metadata" in said and column("category_label") == ["cat", "dog"]


def test_a_link_to_a_blob_that_is_gone(place, build):
    top = snapshot(place / "hub", "a--b", REVISIONS[0], {"x.safetensors": 0, "y.safetensors": 1})
    (top / "blobs/sha1").unlink()
    status, said = build("hub")
    assert status == 2 and f"snapshots/{REVISIONS[0]}/y.safetensors: cannot be read" in said
    assert build("hub", "--on-bad", "skip")[0] == 0 and len(column("rank")) == 1


def no_file(path, kind):
    """A pipe, a socket or a device under a name."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.path.relpath(path))  # a socket's path is short


NOT_READ = {  # a name beside the first adapter -> what is said of it, and the flags
    "x.safetensors": ("x.safetensors: is no regular file", []),
    "x.bin": ("x.bin: is no regular file", ["--pickles", "read"]),
    "x.pt": ("x.pt: a pickle", []),
    "adapter_config.json": ("no adapter_config.json beside it", []),
    "metadata.json": ("has no metadata.json beside it", ["--label-from", "metadata"]),
    "adapter_model.civitai.info": (
        "has none of adapter_model.civitai.info",
        ["--label-from", "civitai", "--label-field", "a"],
    ),
}


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_no_file_is_never_opened(place, build, name, kind):
    paths = make_files(place / "in", n=2, style="peft")
    for path in paths:
        (path.parent / "metadata.json").write_text('{"category_label": "c"}')
        (path.parent / "adapter_model.civitai.info").write_text('{"a": "c"}')
    there = paths[0].parent / name
    there.unlink(missing_ok=True)
    no_file(there, kind)
    reason, flags = NOT_READ[name]
    status, said = build("in", *flags)
    assert status == 2 and reason in said and "1 bad file:" in said
    status, said = build("in", *flags, "--on-bad", "skip")
    assert status == 0 and "+ 1 bad" in said, said


def link_all(folders):
    """Links from every folder to all others."""
    for folder_ in folders:
        for other in folders:
            if other != folder_:
                (folder_ / f"to_{other.name}").symlink_to(other)


def test_folders_that_link_to_each_other(place, build):
    make_files(place / "in", n=2)
    link_all([place / "in/class_0", place / "in/class_1"])
    name = "pytorch_lora_weights.safetensors"
    assert find_inputs([place / "in"], "").files == [
        f"class_0/000/{name}",
        f"class_0/to_class_1/001/{name}",
        f"class_1/001/{name}",
        f"class_1/to_class_0/000/{name}",
    ]
    crowd = [place / f"crowd/{i:02}" for i in range(30)]
    for folder_ in crowd:
        folder_.mkdir(parents=True)
    link_all(crowd)
    status, said = build("crowd")
    path = "crowd/00/to_01/to_02/to_03/to_04/to_05"
    assert status == 2 and f"'{path}' goes through 5 linked folders, and 4 are followed: remove" in said
    assert len(said.splitlines()) == 1


def test_four_links_are_followed_and_one_to_itself_is_no_folder(place, build):
    make_files(place / "in", n=1)
    (place / "in/loop").symlink_to("loop")
    (place / "in/loop.safetensors").symlink_to("loop.safetensors")
    for i in range(4):
        (place / f"far{i}").mkdir()
        (place / (f"far{i - 1}/next" if i else "in/next")).symlink_to(place / f"far{i}")
    adapter(place / "far3/x.safetensors", 1)
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "3 found = 2 written + 1 bad" in said, said
    assert "loop.safetensors: cannot be read" in said
    assert column("lora_file")[1] == "next/next/next/next/x.safetensors"
    (place / "far4").mkdir()
    (place / "far3/next").symlink_to(place / "far4")
    assert "goes through 5 linked folders" in build("in", "--overwrite")[1]


def test_hidden_folders_are_passed_over_but_not_the_one_that_is_named(place, build):
    make_files(place / ".cache/in", n=2)
    adapter(place / ".cache/in/class_0/.hidden.safetensors")
    status, said = build(".cache/in")
    assert status == 0 and "2 found" in said and "2 hidden or trainer-state files passed over" in said


# --- Civitai

INFO = {
    "id": 11,
    "modelId": 7,
    "name": "v1.0",
    "baseModel": "SDXL 1.0",
    "trainedWords": ["one", "two"],
    "tags": ["style"],
    "rating": 4.5,
    "model": {"name": "A cat", "type": "LORA", "nsfw": False, "tags": ["animal", "cat"]},
    "images": [{"url": "https://example.org/1.png", "meta": {"steps": 20}}],
}


def civitai(place, infos=None, end=".civitai.info"):
    """in/<letter>.v1.safetensors, all in one folder, each with its information and a preview."""
    infos = infos or [{**INFO, "id": i, "baseModel": ["SD 1.5", "SDXL 1.0"][i % 2]} for i in range(4)]
    (place / "in").mkdir(exist_ok=True)
    for i, info in enumerate(infos):
        adapter(place / f"in/{'abcdefgh'[i]}.v1.safetensors", i)
        (place / f"in/{'abcdefgh'[i]}.v1.preview.png").write_bytes(b"\x89PNG")
        if info is not None:
            (place / f"in/{'abcdefgh'[i]}.v1{end}").write_text(json.dumps(info))


CIVITAI = ("--label-from", "civitai")


def test_labels_from_civitai(place, build):
    civitai(place)
    status, said = build("in", *CIVITAI)
    assert status == 0, said
    assert "labels from civitai" in said and "--label-column" not in said
    rows = {name: column(name) for name in ("category_label", "lora_file", "civitai_version_id")}
    assert rows == {
        "category_label": ["SD 1.5", "SDXL 1.0"] * 2,
        "lora_file": [f"{letter}.v1.safetensors" for letter in "abcd"],
        "civitai_version_id": [0, 1, 2, 3],
    }
    assert column("civitai_base_model") == column("category_label") and column("civitai_model_id") == [7] * 4
    assert column("civitai_model") == ["A cat"] * 4 and column("civitai_type") == ["LORA"] * 4
    others = [name for name in experiment_columns() if not is_layer(name)]
    assert len(others) == 8, others  # those above, and rank


def experiment_columns(output="out"):
    return load_from_disk(output).column_names


@pytest.mark.parametrize(
    ("field", "label"),
    [
        ("model.type", "LORA"),
        ("tags", "style"),
        ("tags.0", "style"),
        ("model.tags.1", "cat"),
        ("modelId", 7),
        ("images.0.meta.steps", 20),
    ],
)
def test_a_field_in_a_field(place, build, field, label):
    civitai(place, [INFO, INFO])
    assert build("in", *CIVITAI, "--label-field", field)[0] == 0
    assert column("category_label") == [label] * 2


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("trainedWords", "is a list of 2: choose one of them, such as --label-field trainedWords.0"),
        ("model", "has fields of its own: choose one of them, such as --label-field model.name"),
        ("rating", "its 'rating' is 4.5: labels are text or whole numbers"),
        ("model.nsfw", "its 'model.nsfw' is false: labels are text or whole numbers"),
        ("model.tags.2", "has no 'model.tags.2'"),
        ("model.tags.-1", "has no 'model.tags.-1'"),
        ("name.0", "has no 'name.0'"),
        ("concept", "a.v1.civitai.info has no 'concept': it has id, modelId, name, baseModel, "),
    ],
)
def test_a_field_that_is_no_label(place, build, field, reason):
    civitai(place, [INFO, INFO])
    status, said = build("in", *CIVITAI, "--label-field", field)
    assert status == 2 and "a.v1.safetensors: " in said and reason in said
    assert len(said.splitlines()) == 3  # what is wrong, and a line a file


BAD_SIDECARS = {
    "none": (None, "has none of a.v1.civitai.info, a.v1.json, a.v1.metadata.json beside it"),
    "a folder": ("folder", "has none of"),
    "a pipe": ("pipe", "has none of"),
    "cut": (b'{"baseModel": "SD', "its a.v1.civitai.info cannot be read"),
    "empty": (b"", "its a.v1.civitai.info cannot be read"),
    "a list": (b"[1]", "its a.v1.civitai.info holds list, not fields"),
    "no UTF-8": (b'{"baseModel": "\xff"}', "its a.v1.civitai.info cannot be read"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "half a pair": (b'{"baseModel": "\\ud800"}', "is no UTF-8 text"),
    "null": (b'{"baseModel": null}', "has no 'baseModel'"),
    "no text": (b'{"baseModel": ""}', "has no 'baseModel'"),
    "an empty list": (b'{"baseModel": []}', "has no 'baseModel'"),
    "a list of a list": (b'{"baseModel": [[["x"]]]}', "labels are text or whole numbers"),
    "NaN": (b'{"baseModel": NaN}', "labels are text or whole numbers"),
    "a long number": (b'{"baseModel": ' + b"1" * 5000 + b"}", "cannot be read"),
    "hidden text": (b'{"baseModel": {"\\u001b[31m\\u202e": 1}}', "--label-field baseModel.\\x1b[31m\\u202e"),
    "huge": (b'{"baseModel": {"' + b"x" * 100_000 + b'": 1}}', "has fields of its own"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_SIDECARS.values(), ids=BAD_SIDECARS)
def test_bad_files_of_civitai(place, build, content, reason):
    civitai(place)
    path = place / "in/a.v1.civitai.info"
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    status, said = build("in", *CIVITAI)
    assert status == 2 and "a.v1.safetensors: " in said and reason in said
    assert max(map(len, said.splitlines())) < 400 and "\x1b" not in said
    status, said = build("in", *CIVITAI, "--on-bad", "skip")
    assert status == 0 and "4 found = 3 written + 1 bad" in said and "\x1b" not in said


def test_metadata_json_is_read_with_the_same_care(place, build):
    for i, path in enumerate(make_files(place / "in", n=3)):
        (path.parent / "metadata.json").write_text(json.dumps({"category_label": f"c{i}"}))
    for content, reason in (
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"category_label": "\\ud800"}', "is no UTF-8 text"),
        (
            b'{"category_label": "a", "note": "\\udfff"}',
            "its metadata.json has a 'note' that is no UTF-8 text",
        ),
        (b'{"category_label": "a", "\\udfff": 1}', "that is no UTF-8 text"),
        (b'{"category_label": "\xff"}', "its metadata.json cannot be read"),
    ):
        (place / "in/class_0/000/metadata.json").write_bytes(content)
        status, said = build("in")
        assert status == 2 and "class_0/000" in said and reason in said, said
    (place / "in/class_0/000/metadata.json").write_text('\ufeff{"category_label": "a", "no\\u001b[2Jte": 1}')
    status, said = build("in")
    assert status == 0 and "2 files have no 'no\\x1b[2Jte'" in said and column("category_label")[0] == "a"


def test_a_file_too_large_to_describe_an_adapter(place, monkeypatch):
    monkeypatch.setattr("ablation.making.sidecars.LARGEST_SIDECAR", 10)
    (place / "x.json").write_text('{"a": "0123456789"}')
    with pytest.raises(BadFile, match=r"its x.json cannot be read: it has more than"):
        read_fields(place / "x.json")
    assert read_fields(place / "y.json") is None


def test_the_first_file_that_has_the_field(place):
    path = place / "x.safetensors"
    (place / "x.metadata.json").write_text(
        json.dumps({"base_model": "Flux.1 D", "model_name": "m" * 600, "civitai": {"id": 3, "a": "manager"}})
    )
    assert civitai_values(path, "base_model") == {
        "category_label": "Flux.1 D",
        "civitai_base_model": "Flux.1 D",
        "civitai_model": "m" * 499 + "…",
        "civitai_version_id": 3,
    }
    assert civitai_values(path, "a")["category_label"] == "manager"
    (place / "x.json").write_text(json.dumps({"sd version": "SDXL", "a": "json", "modelId": "seven"}))
    assert civitai_values(path, "a")["category_label"] == "json"
    assert civitai_values(path, "sd version")["category_label"] == "SDXL"
    fields = {"a": "info", "id": True, "baseModel": ["x"]}
    (place / "x.civitai.info").write_text(json.dumps(fields))
    values = civitai_values(path, "a")
    assert values["category_label"] == "info" and values["civitai_version_id"] == 3
    assert values["civitai_base_model"] == "Flux.1 D" and "civitai_model_id" not in values
    fields |= {"modelId": 2**70, "model": {"name": "\ud800", "type": ""}}
    (place / "x.civitai.info").write_text(json.dumps(fields))
    values = civitai_values(path, "a")
    assert values["civitai_model"] == "m" * 499 + "…" and "civitai_type" not in values
    assert "civitai_model_id" not in values
    (place / "x.json").write_text("{")
    with pytest.raises(BadFile, match=r"its x.json cannot be read"):
        civitai_values(path, "a")


def test_places_of_fields():
    fields = {"a.b": 1, "a": {"b": 2, "c.d": 3}, "l": [{"x": 4}]}
    found = [field_at(fields, place) for place in ("a.b", "a.c.d", "l.0.x", "l.1", "l.x", "a.b.c", "", "z.z")]
    assert found == [1, 3, 4, None, None, None, fields, None]
    assert field_at(fields, "a." * 100_000 + "a") is None and field_at([1], "²") is None


def test_a_changed_sidecar_is_another_input(place, build):
    civitai(place)
    assert build("in", *CIVITAI)[0] == 0
    assert "already built" in build("in", *CIVITAI)[1]
    (place / "in/a.v1.civitai.info").write_text(json.dumps({**INFO, "baseModel": "Other"}))
    status, said = build("in", *CIVITAI)
    assert status == 2 and "--overwrite" in said
    assert build("in", *CIVITAI, "--overwrite")[0] == 0 and column("category_label")[0] == "Other"
    assert build("in", *CIVITAI, "--label-field", "model.type")[0] == 2  # another field, another data set
    (place / "in/b.v1.json").write_text("{}")  # a further file that counts
    assert build("in", *CIVITAI)[0] == 2


def test_a_field_needs_a_source_of_fields(place, build):
    make_files(place / "in", n=2)
    status, said = build("in", "--label-field", "x")
    assert status == 2 and "--label-field x needs --label-from metadata or civitai, not folder" in said


# --- checkpoints of one training


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("cat/name-000001.safetensors", "cat/name"),
        ("cat/name-step00000500.safetensors", "cat/name"),
        ("cat/name_000000250.safetensors", "cat/name"),
        ("cat/name.safetensors", "cat/name"),
        ("cat/run/checkpoint-500/pytorch_lora_weights.safetensors", "cat/run/pytorch_lora_weights"),
        ("cat/run/pytorch_lora_weights.safetensors", "cat/run/pytorch_lora_weights"),
        ("cat/run/epoch-3/adapter_model.safetensors", "cat/run/adapter_model"),
        ("cat/run/epoch3/adapter_model.safetensors", "cat/run/adapter_model"),
        ("cat/run/step500/adapter_model.safetensors", "cat/run/adapter_model"),
        ("cat/my-2024-05-01_10-20-30-save-500-3-20.safetensors", "cat/my"),
        ("cat/2024-05-01_10-20-30-save-500-3-20.safetensors", "cat/last"),
        ("cat/epoch-3.safetensors", "cat/last"),
        ("cat/step-500.safetensors", "cat/last"),
        ("cat/epoch-000003.safetensors", "cat/last"),
        ("cat/at-step00000500.safetensors", "cat/last"),
        ("cat/last.safetensors", "cat/last"),
        # what a person numbers, or dates
        ("cat/cat-1.safetensors", "cat/cat-1"),
        ("cat/cat-01.safetensors", "cat/cat-01"),
        ("cat/cat-0001.safetensors", "cat/cat-0001"),
        ("cat/cat_250.safetensors", "cat/cat_250"),
        ("cat/cat-240115.safetensors", "cat/cat-240115"),
        ("cat/cat-20240115.safetensors", "cat/cat-20240115"),
        ("cat/cat_123456789.safetensors", "cat/cat_123456789"),
        ("cat/cat-step5.safetensors", "cat/cat-step5"),
        ("cat/v1.5-e10.safetensors", "cat/v1.5-e10"),
        ("cat/checkpoints/x.safetensors", "cat/checkpoints/x"),
        ("cat/my-checkpoint-5/x.safetensors", "cat/my-checkpoint-5/x"),
        ("cat/000001.safetensors", "cat/000001"),
    ],
)
def test_the_names_that_trainers_give(name, training):
    assert training_by_name(name.split("/")) == training


def test_a_training_needs_several_files_and_sessions_join_names():
    assert group_by_training({"a-000001": "a", "b": "b"}, {}) == {}
    by_name = {"a1": "a", "a2": "a", "b": "b", "c": "c", "d": "d", "e": "e"}
    assert group_by_training(by_name, {"b": "s", "a2": "s", "c": "t", "d": "t", "e": "u"}) == {
        **dict.fromkeys(("a1", "a2", "b"), "a"),
        **dict.fromkeys(("c", "d"), "c"),
        "e": "e",
    }
    chain = group_by_training({c: c for c in "dcba"} | {"d2": "d"}, {"d": "1", "c": "1", "d2": "2", "a": "2"})
    assert chain == {"d": "a", "c": "a", "b": "b", "a": "a", "d2": "a"}


NAMES = ("{}-000001", "{}-000002", "{}")


def trained(place, trainings=8, classes=2):
    """in/class_<c>/<run>{,-000001,-000002}.safetensors, each file with weights of its own."""
    for run in range(trainings):
        for i, name in enumerate(NAMES):
            folder_ = place / f"in/class_{run % classes}"
            folder_.mkdir(parents=True, exist_ok=True)
            adapter(folder_ / f"{name.format(f'run{run}')}.safetensors", 3 * run + i)


def test_checkpoints_of_one_training_share_a_value(place, build):
    trained(place, 5)
    adapter(place / "in/class_0/alone.safetensors", 50)
    status, said = build("in")
    assert status == 0, said
    files = column("lora_file")
    expected = [name.removesuffix(".safetensors").split("-")[0] for name in files]
    assert column("training") == expected and len(set(expected)) == 6
    assert "15 files are of 5 trainings with several files" in said
    found = made(place)
    assert found["trainings"] == dict.fromkeys(sorted(set(expected) - {"class_0/alone"}), 3)
    shared = found["test_rows_with_their_training_in_train"]
    assert shared == shared_by_a_random_split(expected) > 0
    assert "Nulls" not in said
    line = f"both sides ({shared} test rows at seed 42): run with --split grouped"
    assert [text for text in said.splitlines() if text.startswith("WARNING")] == [
        f"WARNING: a random split puts files of one training on {line}"
    ]


def shared_by_a_random_split(trainings):
    """The origin's split, as `datasets` makes it."""
    first = Dataset.from_dict({"t": trainings}).train_test_split(test_size=0.3, seed=42)
    test = first["test"].train_test_split(test_size=0.67, seed=42)["test"]
    return sum(value in first["train"]["t"][:] for value in test["t"][:])


def test_files_that_a_person_numbered_are_trainings_of_their_own(place, build):
    (place / "in/cat").mkdir(parents=True)
    for i in range(12):
        adapter(place / f"in/cat/cat-{i}.safetensors", i)
    status, said = build("in")
    assert status == 0 and "training" not in experiment_columns() and "WARNING" not in said
    assert made(place)["trainings"] == {}


def test_a_field_called_training_wins(place, build):
    trained(place, 4)
    rows = [
        f"{path.relative_to(place / 'in')},c,mine{i % 2}" for i, path in enumerate((place / "in").rglob("r*"))
    ]
    (place / "labels.csv").write_text("\n".join(["file,label,training", *rows]))
    status, said = build("in", "--labels", "labels.csv")
    assert status == 0 and sorted(column("training")) == ["mine0"] * 6 + ["mine1"] * 6
    assert made(place)["trainings"] == {"mine0": 6, "mine1": 6} and "12 files are of 2 trainings" in said


def test_a_row_without_a_training_is_one_by_itself(place, build):
    make_files(place / "in", n=12)
    files = [f"class_{i % 2}/{i:03}/pytorch_lora_weights.safetensors" for i in range(12)]
    rows = [f"{name},c,{'x' if i == 5 else ''}" for i, name in enumerate(files)]
    (place / "labels.csv").write_text("\n".join(["file,label,training", *rows]))
    status, said = build("in", "--labels", "labels.csv")
    assert status == 0 and "random split" not in said and made(place)["trainings"] == {}
    assert made(place)["test_rows_with_their_training_in_train"] == 0


def test_with_another_group_column_the_remedy_names_this_one(place, build):
    trained(place, 4)
    rows = [f"{path.relative_to(place / 'in')},c,g" for path in (place / "in").rglob("run*")]
    (place / "labels.csv").write_text("\n".join(["file,label,category_name", *rows]))
    said = build("in", "--labels", "labels.csv")[1]
    assert "run with --split grouped --group-column training" in said


def test_a_renamed_file_is_told_by_its_session(place, build):
    session = {"ss_session_id": "123", "ss_training_started_at": "1700000000.5"}
    (place / "in/cat").mkdir(parents=True)
    headers = {
        "early": session,
        "late": session,
        "older": {"ss_session_id": "123"},
        "other": session | {"ss_session_id": "124"},
        "third": session | {"ss_training_started_at": "1700000001.5"},
    }
    for i, (name, stated) in enumerate(headers.items()):
        adapter(place / f"in/cat/{name}.safetensors", i, stated)
    assert build("in")[0] == 0
    assert dict(zip(column("lora_file"), column("training"), strict=True)) == {
        "cat/early.safetensors": "cat/early",
        "cat/late.safetensors": "cat/early",
        "cat/older.safetensors": "cat/older",
        "cat/other.safetensors": "cat/other",
        "cat/third.safetensors": "cat/third",
    }


def test_the_experiment_splits_by_training(place, build, capsys):
    trained(place, 14)
    assert build("in")[0] == 0
    capsys.readouterr()
    flags = ["--dataset", "./out", "--representations", "stats", "--layer-sets", "all_layers", *FAST]
    assert experiment.main([*flags, "--split", "grouped", "--dry-run"]) == 0
    assert experiment.main([*flags, "--split", "grouped"]) == 0
    said = capsys.readouterr().out
    assert "Groups: 14 by 'training'; 0 of" in said
    results = json.loads((folder(place, "out") / "results.json").read_text())
    assert results["data"]["split"]["test"] > 0
    assert experiment.main([*flags, "--output-dir", "random"]) == 0
    assert "--split grouped keeps groups together" in capsys.readouterr().out
    assert inspect_dataset.main(["./out", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert groups["column"] == "training" and groups["groups"] == 14 and groups["on_both_sides"] > 0


def test_which_column_has_the_groups():
    text, number, other = pa.string(), pa.int64(), pa.float64()
    usual = Columns("c", "category_name")
    assert group_column_of({"c": text, "training": text, "category_name": text}, usual) == "category_name"
    assert group_column_of({"c": text, "training": text}, usual) == "training"
    assert group_column_of({"c": text, "training": number}, usual) == "training"
    assert group_column_of({"c": text, "training": other}, usual) == ""
    assert group_column_of({"c": text}, usual) == ""
    assert group_column_of({"c": text, "training": text}, Columns("training", "category_name")) == ""
    assert group_column_of({"c": text, "training": text}, Columns("c", "")) == ""
    assert group_column_of({"c": text, "training": text, "x": text}, Columns("c", "x")) == "x"


# --- headers

STATED = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "16",
    "ss_network_alpha": "8.0",
    "ss_learning_rate": "1e-04",
    "ss_unet_lr": "None",
    "ss_text_encoder_lr": "[0.1, 0.2]",
    "ss_steps": "1" * 30,
    "ss_output_name": "007",
    "ss_tag_frequency": json.dumps({"10_cat": {"cat": 3, "grass": 1}, "5_dog": {"cat": 1}}),
    "ss_optimizer": "",
    "ss_lr_scheduler": "None",
    "ss_sd_model_name": "x" * 1000,
    "ss_mine": "3",
    "ss_other": "nan",
    "modelspec.architecture": "stable-diffusion-v1/lora",
}


def test_numbers_of_headers_are_numbers():
    columns = chosen_columns(["all", "ss_mine", "ss_other"])
    assert header_values(STATED, columns) == {
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": 16,
        "ss_network_alpha": 8.0,
        "ss_learning_rate": 1e-4,
        "ss_output_name": "007",
        "ss_tag_frequency": 2,
        "ss_sd_model_name": "x" * 499 + "…",
        "ss_mine": 3,
        "ss_other": "nan",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    for text in ("[]", "{", "[1]", '{"a": [1]}', '{"a": 1}', "[" * 100_000, '"x"'):
        assert header_values({"ss_tag_frequency": text}, columns) in ({}, {"ss_tag_frequency": 0}), text
    for text in ("1e999", "inf", "-", "0x10", "1_000", "١"):
        assert header_values({"ss_learning_rate": text, "ss_steps": text}, columns) == {}, text
    assert header_values({"ss_steps": "500.0", "ss_seed": "1.5", "ss_epoch": "-3"}, columns) == {
        "ss_steps": 500,
        "ss_epoch": -3,
    }


def with_headers(place, stated, n=4):
    """in/class_<c>/<i>.safetensors with these headers; `stated`: number -> header."""
    for i in range(n):
        path = place / f"in/class_{i % 2}/{i}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter(path, i, stated(i))


def test_headers_become_columns_when_asked(place, build):
    with_headers(place, lambda i: {**STATED, "ss_steps": str(100 * i)} if i else None)
    status, said = build("in", output="without")
    assert status == 0 and not [name for name in experiment_columns("without") if "ss_" in name]
    status, said = build("in", "--header-columns", "all", "ss_mine")
    assert status == 0, said
    assert column("ss_steps") == [None, 200, 100, 300] and column("ss_mine") == [None, 3, 3, 3]
    assert column("ss_network_alpha") == [None, 8.0, 8.0, 8.0] and column("modelspec.architecture")[0] is None
    assert "ss_unet_lr" not in experiment_columns() and "1 files have no 'ss_steps'" in said
    assert build("in")[0] == 2  # other columns, another data set
    assert build("in", "--header-columns", "ss_output_name", output="one")[0] == 0
    assert column("ss_output_name", "one") == [None, "007", "007", "007"]


def test_a_number_of_a_header_can_be_a_control(place, build, run_on):
    with_headers(place, lambda i: {"ss_steps": str(100 + i % 2), "ss_network_dim": "16"}, n=24)
    assert build("in", "--header-columns", "ss_steps", "ss_network_dim")[0] == 0
    assert run_on("./out", "--controls", "metadata", "--metadata-columns", "ss_steps") == 0


@pytest.fixture
def run_on(place, capsys):
    def run_on(dataset, *flags):
        flags = ("--representations", "stats", "--layer-sets", "all_layers", *flags)
        return experiment.main(["--dataset", dataset, *flags, *FAST])

    return run_on


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["rank"], "--header-columns 'rank' is a column that this program writes"),
        (["training"], "is a column that this program writes"),
        (["x.lora.down.weight"], "is a column that this program writes"),
        (["ss_nothing"], "no file's header states 'ss_nothing', which --header-columns names; they state"),
    ],
)
def test_header_columns_that_cannot_be(place, build, names, says):
    with_headers(place, lambda i: {"ss_steps": "1"})
    status, said = build("in", "--header-columns", *names)
    assert status == 2 and says in said and len(said.splitlines()) == 1 and not (place / "out").exists()


def test_a_column_has_one_source(place, build):
    with_headers(place, lambda i: {"ss_steps": "1"})
    for i in range(2):
        (place / f"in/class_{i}/metadata.json").write_text('{"category_label": "a", "ss_steps": 5}')
    status, said = build("in", "--header-columns", "ss_steps")
    assert (
        status == 2
        and "'ss_steps' stands in the header of class_0/0.safetensors and among its fields" in said
    )
    assert build("in")[0] == 0 and column("ss_steps") == [5] * 4


def test_several_base_models_are_reported(place, build):
    with_headers(place, lambda i: {"ss_base_model_version": f"sd_v{i % 2}"} if i < 3 else None)
    status, said = build("in")
    line = "WARNING: several base models by ss_base_model_version: 2 sd_v0, 1 sd_v1, 1 do not say"
    assert status == 0 and line in said
    assert made(place)["base_models"] == {"ss_base_model_version": {"sd_v0": 2, "sd_v1": 1}}
    with_headers(place, lambda i: {"ss_base_model_version": "sd_v1", "modelspec.architecture": "sd/lora"})
    status, said = build("in", "--overwrite")
    assert status == 0 and "base models" not in said


def test_hostile_text_in_a_header(place, build):
    names = ["a\x1b[31m\u202e", "b\nFiles:   0 found", "x" * 100_000, "nul\0", "=1+1", "e", "f"]
    with_headers(place, lambda i: {"ss_sd_model_name": names[i], "ss_output_name": names[i]}, n=7)
    status, said = build("in", "--header-columns", "all")
    assert status == 0 and "WARNING: several base models by ss_sd_model_name" in said
    assert "\x1b" not in said and "\0" not in said and max(map(len, said.splitlines())) < 1000
    assert max(map(len, made(place)["base_models"]["ss_sd_model_name"])) < 200
    assert said.count("\nFiles:") == 1 and "and 2 more" in said
    assert column("ss_output_name")[0] == names[0] and "nul\0" in column("ss_output_name")


def test_a_name_that_is_no_text(place, build):
    make_files(place / "in", n=2)
    os.rename(place / "in/class_0", os.fsencode(place / "in") + b"/class_\xff")
    status, said = build("in")
    assert status == 2 and "its name is no UTF-8 text: rename it" in said
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "class_\\udcff" in said


# --- copies


def test_copies_are_named_and_with_two_labels_a_warning(place, build):
    make_files(place / "in", n=6)
    name = "pytorch_lora_weights.safetensors"
    copy = (place / f"in/class_0/000/{name}").read_bytes()
    for target in ("class_1/copy", "class_0/copy"):
        (place / "in" / target).mkdir()
        (place / "in" / target / name).write_bytes(copy)
    (place / "in/class_1/link").mkdir()
    (place / f"in/class_1/link/{name}").symlink_to(place / f"in/class_1/001/{name}")
    status, said = build("in")
    assert status == 0, said
    mixed = [f"class_0/000/{name}", f"class_0/copy/{name}", f"class_1/copy/{name}"]
    same = [f"class_1/001/{name}", f"class_1/link/{name}"]
    assert made(place)["duplicates"] == [mixed, same]
    assert made(place)["duplicates_with_several_labels"] == [mixed]
    assert "Copies:  3 files have the content of another file" in said
    assert f"WARNING: the same weights under several labels: {' = '.join(mixed)}\n" in said
    assert f"         {' = '.join(same)}\n" in said and len(column("rank")) == 9


def test_bad_files_are_no_copies(place, build):
    paths = make_files(place / "in", n=4)
    tensors = load_file(paths[0])
    next(value for value in tensors.values() if value.ndim == 2)[0, 0] = np.nan
    for path in paths[:2]:
        save_file(tensors, path)
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and made(place)["duplicates"] == [] and "Copies" not in said


def test_only_files_that_may_be_equal_are_hashed(place, monkeypatch):
    contents = {"a": b"1" * 10, "b": b"1" * 10, "c": b"2" * 10, "d": b"1" * 11, "e": b"3" * 4 + b"1" * 6}
    for name, content in contents.items():
        (place / name).write_bytes(content)
    os.link(place / "d", place / "d2")
    hashed = []
    real = duplicates.hash_of_file
    monkeypatch.setattr(duplicates, "hash_of_file", lambda path: hashed.append(path.name) or real(path))
    monkeypatch.setattr(duplicates, "TAIL_BYTES", 6)
    paths = {name: place / name for name in (*contents, "d2")}
    assert duplicate_files(paths) == [["a", "b"], ["d", "d2"]]
    assert sorted(hashed) == ["a", "b", "e"]  # c ends otherwise; d has another size
    with pytest.raises(InputError, match=r"cannot compare .*gone"):
        duplicate_files({"gone": place / "gone"})


# --- files that turn out bad as their weights are read


def as_loha(path, value=1.0):
    """A LoHa with the layers and ranks of `make_files`."""
    made_of = {}
    for key, matrix in load_file(path).items():
        module, _, end = key.partition(".lora.")
        if end == "down.weight":
            made_of[f"{module}.hada_w1_b"] = np.full((1, matrix.shape[1]), value, np.float32)
            made_of[f"{module}.hada_w2_b"] = np.ones((2, matrix.shape[1]), np.float32)
        elif end == "up.weight":
            made_of[f"{module}.hada_w1_a"] = np.ones((matrix.shape[0], 1), np.float32)
            made_of[f"{module}.hada_w2_a"] = np.ones((matrix.shape[0], 2), np.float32)
    save_file(made_of, path, metadata={"ss_base_model_version": "other"})


def test_kinds_styles_and_base_models_are_those_of_the_rows(place, build, monkeypatch):
    paths = make_files(place / "in", n=5)
    as_loha(paths[0])
    as_loha(paths[2], np.nan)
    status, said = build("in", "--on-bad", "skip")
    assert status == 0 and "5 found = 4 written + 1 bad" in said, said
    assert "Kinds:   1 LoHa, 3 LoRA\n" in said and "Styles:  4 diffusers\n" in said
    found = made(place)
    assert found["kinds"] == {"LoHa": 1, "LoRA": 3} and found["styles"] == {"diffusers": 4}
    assert found["base_models"] == {"ss_base_model_version": {"other": 1}}

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ablation.making.build.finish_folder", fails)
        with pytest.raises(KeyboardInterrupt):
            build("in", "--on-bad", "skip", output="again")
    status, said = build("in", "--on-bad", "skip", output="again")
    assert status == 0 and "is finished: 4 rows are kept" in said
    assert {**made(place, "again"), "command": ""} == {**found, "command": ""}


def of_numbers(path, value, alpha=None):
    """An adapter whose matrices hold one number, and its alpha."""
    tensors = {
        key: np.full_like(matrix, value) for key, matrix in load_file(path).items() if matrix.ndim == 2
    }
    if alpha is not None:
        modules = {key.partition(".lora.")[0] for key in tensors}
        tensors |= {f"{module}.alpha": np.array(alpha, np.float64) for module in modules}
    save_file(tensors, path)


TOO_MUCH = {
    "large factors": (3e38, None, ["--rank", "svd:1"], "is beyond float32"),
    "small factors": (1e-44, None, ["--rank", "svd:1"], "is too small for float32"),
    "large alpha": (1.0, 1e300, [], "times alpha / rank = 5e+299 is beyond float32"),
    "large alpha, svd": (1.0, 1e300, ["--rank", "svd:1"], "is beyond float32"),
    "large alpha of zeros": (0.0, 1e300, [], "is beyond float32"),
    "small alpha": (1.0, 1e-320, [], "is too small for float32"),
    "small alpha, svd": (1.0, 1e-200, ["--rank", "svd:1"], "is too small for float32"),
}


@pytest.mark.parametrize(("value", "alpha", "flags", "reason"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_numbers_beyond_float32_are_bad_files(place, build, value, alpha, flags, reason):
    paths = make_files(place / "in", n=3)
    of_numbers(paths[1], value, alpha)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, said = build("in", *flags)
        assert status == 2 and "class_1/001/" in said and reason in said, said
        status, said = build("in", *flags, "--on-bad", "skip")
    assert status == 0 and "3 found = 2 written + 1 bad" in said, said
    for name in experiment_columns():
        if is_layer(name):
            assert np.isfinite(column(name)).all()


def test_the_error_of_an_approximation_with_a_large_scale(place, build):
    """With --alpha record the scale is not applied: its square is beyond float64."""
    paths = make_files(place / "in", n=2)
    for path in paths:
        tensors = {key: matrix for key, matrix in load_file(path).items() if matrix.ndim == 2}
        modules = {key.partition(".lora.")[0] for key in tensors}
        alpha = 1e200 if path == paths[0] else 2.0
        save_file(tensors | {f"{module}.alpha": np.array(alpha) for module in modules}, path)
    assert build("in", "--rank", "svd:1", "--alpha", "record")[0] == 0
    large = column("rank_error")[0]
    assert build("in", "--rank", "svd:1", "--alpha", "ignore", output="plain")[0] == 0
    assert large == pytest.approx(column("rank_error", "plain")[0], rel=1e-12) and 0 < large < 1
