"""Readers of files under random damage: the right value or the documented error, and nothing else.

Code that can end the process (Arrow follows offsets in memory) is tried in a child.
"""

import contextlib
import faulthandler
import functools
import json
import math
import os
import shutil
import struct
import time

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from builders import collect, lora_dataset
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

import checkpointing
import visual_ablation_experiment as experiment
from ablation.actions import Actions
from ablation.adapters import BadFile, read_adapter, survey_file
from ablation.command_line import parse_command_line, read_yaml
from ablation.data_files import headers_of
from ablation.fields import InputError
from ablation.settings import Settings, setting_fields
from ablation.sources import open_dataset
from checkpointing import FeatureCache, ResultStore, Unfinished, hash_of, identify, parse_json, with_checksum

SECONDS = 5.0  # of one reading: files here are small, and what takes this long hangs


def limited(examples):
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )


def answer(read, *errors):
    """What a reader returns; None for an error of these kinds, whose message is one line."""
    began = time.process_time()
    try:
        return read()
    except errors as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 5000, error
        return None
    finally:
        assert time.process_time() - began < SECONDS


def in_child(check):
    """Run a check in a child of this process, and fail with what it says or with the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        message = b""
        faulthandler.disable()
        try:
            check()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode(errors="replace")[:4000]
        os.write(writing, message)
        os._exit(1 if message else 0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        message = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, message or f"ended by signal {-status}"


# --- damage


def flip(content, position, bit):
    damaged = bytearray(content)
    if damaged:
        damaged[position % len(damaged)] ^= 1 << bit
    return bytes(damaged)


def cut(content, position, _):
    return content[: position % (len(content) + 1)]


def splice(content, position, other):
    at, start = position % (len(content) + 1), (position * 7919 + other) % (len(content) + 1)
    return content[:at] + content[start : start + 8 * other] + content[at:]


def stamp(content, position, which):
    number = (0, 255, 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1, 1)[which]
    at = position % (len(content) + 1) & ~3
    return content[:at] + struct.pack("<Q", number) + content[at + 8 :]


DAMAGE = st.lists(
    st.tuples(st.sampled_from((flip, cut, splice, stamp)), st.integers(0, 1 << 20), st.integers(0, 7)),
    min_size=1,
    max_size=3,
)


def damaged(content, damage):
    return functools.reduce(lambda done, what: what[0](done, *what[1:]), damage, content)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def nested(depth, key='"a"'):
    return b'{"checksum": "x", %s: %s1%s}' % (key.encode(), b"[" * depth, b"]" * depth)


DEPTHS = (*range(900, 1000), 100_000)  # around what json takes, and far beyond it
HOSTILE_JSON = [
    b"",
    b"\xff\xfe",
    b"\xef\xbb\xbf[]",
    b"[]",
    b"NaN",
    b'{"a": NaN}',
    b'{"checksum": "x", "a": 1e999}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"checksum": "\\ud800", "a": "\\udfff"}',
    b'{"checksum": []}',
]


# --- settings


WORDS = (
    "!!int !!float !!bool !!null !!binary !!timestamp !!set !!omap !!str !!python/name:os.system ! & * << "
)
PIECES = [
    *WORDS.split(),
    *"'' \"\" - + . : ? | > [ ] { } , # % @ ` ~ 0x 0o 1:2 .inf .nan 1e400 2001-01-01 y no é".split(),
]
YAML_TEXT = st.lists(
    st.sampled_from([*PIECES, " ", "\n", ": ", "\n- ", "\0", "\x85", "\ufeff", *setting_fields()])
    | st.text(max_size=3),
    max_size=12,
).map("".join)


def config(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    return str(path)


def settings_or_none(*flags):
    parsed = answer(lambda: parse_command_line([*flags], experiment.__doc__), InputError)
    if parsed is not None:
        assert isinstance(parsed[0], Settings) and isinstance(parsed[1], Actions)
        assert 1 <= parsed[0].training.num_runs <= 100_000 and 0 <= parsed[0].training.dropout < 1
    return parsed


@limited(150)
@given(content=YAML_TEXT.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=40))
def test_any_text_is_a_mapping_of_settings_or_refused(tmp_path_factory, content):
    path = config(tmp_path_factory.getbasetemp(), content)
    values = answer(lambda: read_yaml(path), InputError)
    assert values is None or isinstance(values, dict)
    settings_or_none("--config", path)


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "!!int '-'", "!!int '_'", "!!float '_'"])
def test_a_number_without_digits_is_refused(tmp_path, value):
    assert settings_or_none("--config", config(tmp_path, f"num_runs: {value}".encode())) is None


VALUES = (
    JSON
    | st.sampled_from([10**400, -1, 0, 2**31, 2**63, float("inf"), float("-inf"), 1e308, [[]], {"a": ["*"]}])
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["auto", "all", "nine", "random", "cpu", "cuda:0", "all_layers", "0.5", "1e-3", " 7 "])
)


@limited(250)
@given(name=st.sampled_from(sorted(setting_fields())), value=VALUES)
def test_any_value_of_any_setting_is_taken_or_refused(tmp_path_factory, name, value):
    content = yaml.safe_dump({name: value}, allow_unicode=True).encode(errors="surrogatepass")
    from_file = settings_or_none("--config", config(tmp_path_factory.getbasetemp(), content))
    if from_file is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
        taken = getattr(from_file[0], name, None) or getattr(from_file[0].training, name, None)
        assert taken in (None, 0, value, str(value), (str(value),)), (taken, value)


@limited(100)
@given(
    flags=st.lists(
        st.sampled_from(
            [f"--{name.replace('_', '-')}" for name in setting_fields()] + ["--", "--quick", "-1"]
        )
        | st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=6),
        max_size=5,
    )
)
def test_any_command_line_is_taken_or_refused(flags):
    hypothesis.assume(not any(flag.startswith(("-h", "--h")) for flag in flags))  # which ends the program
    settings_or_none(*flags)


# --- files of JSON


@limited(150)
@given(damage=DAMAGE, value=st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_damaged_json_is_read_as_what_it_was_or_refused(tmp_path_factory, damage, value):
    value.pop("checksum", None)
    path = tmp_path_factory.getbasetemp() / "own.json"
    content = damaged(json.dumps(with_checksum(value)).encode(), damage)
    path.write_bytes(content)
    read = answer(lambda: checkpointing.read_own(path), OSError, ValueError)
    parsed = answer(lambda: parse_json(content), ValueError)
    if read is not None:  # a file from before there were checksums has none
        assert read == (value if "checksum" in parsed else parsed)


@pytest.mark.parametrize("content", HOSTILE_JSON)
def test_hostile_json_is_refused(tmp_path, content):
    path = tmp_path / "own.json"
    path.write_bytes(content)
    assert answer(lambda: checkpointing.read_own(path), ValueError) is None


def test_json_nested_at_any_depth_is_read_or_refused(tmp_path):
    store = ResultStore(tmp_path)
    store.prepare()
    for depth in DEPTHS:
        for path in (tmp_path / "own.json", store.path("cell")):
            path.write_bytes(nested(depth))
        assert answer(lambda: checkpointing.read_own(tmp_path / "own.json"), ValueError) is None
        assert store.state("cell", {}).kind == "damaged"


EVENTS = [{"event": "started", "cells": ["a"]}, {"event": "finished", "cell": "é"}, {"event": "ended"}]


@limited(100)
@given(damage=DAMAGE)
def test_damaged_events_are_left_out(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "events.jsonl"
    path.unlink(missing_ok=True)
    for event in EVENTS:
        checkpointing.append_event(path, **event)
    path.write_bytes(damaged(path.read_bytes(), damage))
    for event in answer(lambda: checkpointing.read_events(path)):
        assert isinstance(event["event"], str)
        time.strptime(event["time"], checkpointing.TIME)
    checkpointing.append_event(path, event="after")
    assert checkpointing.read_events(path)[-1]["event"] == "after"


def test_events_nested_at_any_depth_are_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = [b'{"event": "a", ' + nested(depth, '"time"')[1:] for depth in DEPTHS]
    path.write_bytes(b"\n".join(lines))
    assert checkpointing.read_events(path) == []


# --- cells


CELL = "all_layers_stats"
MADE_WITH = {"num_runs": 3, "data": "abc", "dropout": 0.5}
RECORD = {"test_acc_mean": 0.25, "curve": [0.1, 1 / 3, 1e-300], "name": "é"}


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """A store with a finished cell, and the bytes of its checkpoint and predictions."""
    store = ResultStore(tmp_path_factory.mktemp("cell"))
    store.prepare()
    store.save(CELL, RECORD, {"test_predictions": np.arange(6)}, MADE_WITH)
    return store, store.path(CELL).read_bytes(), store.predictions_path(CELL).read_bytes()


def state_of(cell, content, predictions):
    store = cell[0]
    store.path(CELL).write_bytes(content)
    store.predictions_path(CELL).write_bytes(predictions)
    state = answer(lambda: store.state(CELL, MADE_WITH))
    assert state.kind in ("done", "damaged", "stale") and "\n" not in state.why
    loaded = answer(lambda: store.load(CELL), OSError, ValueError, KeyError)
    assert (loaded is None) == (state.kind == "damaged")
    return state


@limited(200)
@given(damage=DAMAGE, which=st.sampled_from(["checkpoint", "predictions"]))
def test_a_damaged_cell_is_done_only_if_it_says_the_same(cell, damage, which):
    _, content, predictions = cell
    if which == "checkpoint":
        content = damaged(content, damage)
    else:
        predictions = damaged(predictions, damage)
    state = state_of(cell, content, predictions)
    assert (state.kind == "done") == (json_or_none(content) == json.loads(cell[1]) and predictions == cell[2])
    if state.kind == "done":
        assert state.record == json.loads(cell[1])
        assert cell[0].load_predictions(CELL)["test_predictions"].tolist() == list(range(6))


def json_or_none(content):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(content)
    return None


@limited(100)
@given(
    name=st.sampled_from([*RECORD, "cell", "made_with", "fingerprint", "predictions_hash", "checksum"]),
    value=JSON,
)
def test_a_replaced_value_is_damage(cell, name, value):
    record = json.loads(cell[1])
    content = json.dumps(record | {name: value}).encode()
    assert (state_of(cell, content, cell[2]).kind == "done") == (record[name] == value)


@limited(60)
@given(name=st.sampled_from(["cell", "made_with", "asked", "predictions_hash"]), value=JSON)
def test_a_whole_record_of_another_kind_is_damaged_or_stale(cell, name, value):
    """Its checksum is right: another program, or a later version, wrote it."""
    record = {k: v for k, v in json.loads(cell[1]).items() if k not in ("checksum", name)}
    for changed in (record, record | {name: value}):
        state = state_of(cell, json.dumps(with_checksum(changed)).encode(), cell[2])
        assert name == "asked" or state.kind != "done"


# --- the remembered identity


@pytest.fixture(scope="module")
def remembered(tmp_path_factory):
    """A function that identifies a file whose hash is remembered, and the file of that memory."""
    place = tmp_path_factory.mktemp("identity")
    file = place / "data.arrow"
    file.write_bytes(b"weights")
    old = time.time() - 3600

    def identity():
        return identify([str(file)], ["scope"], lambda: hash_of(b"weights"), place / "cache")

    os.utime(file, (old, old))
    while not identity()[1]:  # the inode's own time cannot be set back
        time.sleep(0.1)
    (memory,) = (place / "cache" / "identities").iterdir()
    return identity, memory


@limited(80)
@given(damage=DAMAGE)
def test_a_damaged_memory_gives_the_same_identity(remembered, damage):
    identity, memory = remembered
    whole = memory.read_bytes()
    memory.write_bytes(damaged(whole, damage))
    assert answer(identity)[0] == hash_of(b"weights")
    memory.write_bytes(whole)
    assert identity() == (hash_of(b"weights"), True)


@pytest.mark.parametrize(
    "content", [*HOSTILE_JSON, b'{"identity": "x"}', b'{"check": null, "identity": [[]]}']
)
def test_a_hostile_memory_gives_the_same_identity(remembered, content):
    identity, memory = remembered
    memory.write_bytes(content)
    assert answer(identity)[0] == hash_of(b"weights")
    assert identity() == (hash_of(b"weights"), True), "it is written anew"


# --- arrays in safetensors files


FEATURES = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
DESCRIPTION = {"version": 1}
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "C64": 8}
TINY = {"F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F4": 0.5}  # types that NumPy has not


def safetensors_file(header, data=b"", length=None):
    """The bytes of a safetensors file with this header: an object of JSON, or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def hostile_safetensors():
    about = {"__metadata__": {"description": "{}"}}

    def tensor(dtype, shape, *offsets):
        return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}

    byte = json.dumps(tensor("U8", [1], 0, 1)).encode()
    yield from (b"", b"\1\2")
    yield from map(safetensors_file, (b"[]", {}, {"__metadata__": 3}))
    for length in (2**31, 2**63, 2**64 - 1):
        yield safetensors_file(about, length=length)
    yield safetensors_file(b'{"__metadata__": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001)
    yield safetensors_file({"__metadata__": {"description": "[" * 100_000}})
    yield safetensors_file(b'{"__metadata__": {}, "__metadata__": {}}')
    yield safetensors_file(b'{"a": %s, "a": %s}' % (byte, byte), b"1")
    yield safetensors_file(b'{"__metadata__": {"description": "\\ud800"}}')
    overlapping = {"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}
    yield safetensors_file(about | overlapping, b"123")
    for shape in ([2**63, 0], [0, 2**62], [0, 2**40], [2**32, 2**32, 0], [1] * 100, [], [0], [-1]):
        size = max(0, 4 * math.prod(shape))
        yield safetensors_file(about | {"features": tensor("F32", shape, 0, size)}, b"\0" * size)


def refused_arrays(place, content):
    """Both readers of arrays find no use for a file."""
    unfinished = Unfinished(place, "part", {})
    cache = FeatureCache(place, "identity", ["a"], lambda name: DESCRIPTION)
    for path in (unfinished.path("0"), cache.path("stats")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert answer(lambda: unfinished.load("0")) is None
    found, problem = answer(lambda: cache.load("stats", FEATURES.shape))
    assert found is None and problem and "\n" not in problem


def test_hostile_safetensors_are_not_used(tmp_path):
    for content in hostile_safetensors():
        refused_arrays(tmp_path, content)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_features_of_another_type_are_not_used(tmp_path, dtype):
    size = 8 * WIDTHS[dtype]
    refused_arrays(tmp_path, safetensors_file(described(dtype, [8], size), b"\1" * size))


@pytest.mark.parametrize("dtype", TINY)
def test_features_of_a_type_that_numpy_has_not_are_not_used(tmp_path, dtype):
    size = int(8 * TINY[dtype])
    refused_arrays(tmp_path, safetensors_file(described(dtype, [8], size), b"\1" * size))


def described(dtype, shape, size):
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    return {"__metadata__": {"description": json.dumps(DESCRIPTION)}, "features": tensor}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    cache = FeatureCache(tmp_path_factory.mktemp("cache"), "identity", ["a"], lambda name: DESCRIPTION)
    cache.save("stats", {"features": FEATURES})
    return cache, cache.path("stats").read_bytes()


@limited(200)
@given(damage=DAMAGE)
def test_damaged_features_are_the_same_or_not_used(cache, damage):
    cache, whole = cache
    cache.path("stats").write_bytes(damaged(whole, damage))
    found, problem = answer(lambda: cache.load("stats", FEATURES.shape))
    assert "\n" not in problem and (found is None) == (problem != "")
    assert found is None or found["features"].dtype == np.float32
    assert found is None or np.array_equal(found["features"], FEATURES)


SAME_BYTES = [
    (b"[3,4]", b"[4,3]"),
    (b"[3,4]", b"[12] "),
    (b'"F32"', b'"I32"'),
    (b'"F32"', b'"U32"'),
    (b'"stats"', b'"statt"'),
]


@pytest.mark.parametrize("old, new", SAME_BYTES[:4])
def test_features_of_another_shape_or_type_with_the_same_bytes_are_not_used(cache, old, new):
    cache, whole = cache
    assert old in whole
    cache.path("stats").write_bytes(whole.replace(old, new))
    found, problem = cache.load("stats", FEATURES.shape)
    assert found is None and problem


@pytest.fixture(scope="module", params=[1, 2])
def part(tmp_path_factory, request):
    """Unfinished work of one array or of two, its file's bytes and its arrays."""
    unfinished = Unfinished(tmp_path_factory.mktemp("unfinished"), "part", {"version": 1})
    arrays = {"stats": FEATURES, "more": np.arange(5)} if request.param == 2 else {"stats": FEATURES}
    unfinished.save("0", arrays)
    return unfinished, unfinished.path("0").read_bytes(), arrays


def is_same(arrays, others):
    return arrays.keys() == others.keys() and all(
        x.dtype == others[name].dtype and np.array_equal(x, others[name]) for name, x in arrays.items()
    )


@limited(150)
@given(damage=DAMAGE)
def test_a_damaged_part_is_the_same_or_not_used(part, damage):
    unfinished, whole, arrays = part
    unfinished.path("0").write_bytes(damaged(whole, damage))
    found = answer(lambda: unfinished.load("0"))
    assert found is None or is_same(found, arrays)


@pytest.mark.parametrize("old, new", SAME_BYTES)
def test_a_part_of_another_shape_type_or_name_with_the_same_bytes_is_not_used(part, old, new):
    unfinished, whole, _ = part
    assert old in whole
    unfinished.path("0").write_bytes(whole.replace(old, new))
    assert unfinished.load("0") is None


# --- adapter files


MODULE = "base_model.model.down_blocks.0.attn1.to_q"
ADAPTER = {
    f"{MODULE}.lora_A.weight": np.arange(12, dtype=np.float32).reshape(2, 6),
    f"{MODULE}.lora_B.weight": np.arange(12, dtype=np.float32).reshape(6, 2),
}


def adapter_folder(place, config='{"lora_alpha": 4}', content=None):
    path = place / "adapter_model.safetensors"
    path.write_bytes(save(ADAPTER) if content is None else content)
    (place / "adapter_config.json").write_text(config)
    return path


def matrices_of(path):
    """An adapter whose matrices were made."""
    adapter = read_adapter(path)
    assert adapter.matrices
    return adapter


SHAPES = {  # of every kind of adapter but a plain LoRA, in one file of LyCORIS's names
    "a.lora_down.weight": (2, 3, 1, 1), "a.lora_mid.weight": (2, 2, 3, 3), "a.lora_up.weight": (4, 2, 1, 1),
    "b.hada_w1_a": (4, 2), "b.hada_w1_b": (2, 3), "b.hada_w2_a": (4, 2), "b.hada_w2_b": (2, 3),
    "c.lokr_w1": (2, 2), "c.lokr_w2_a": (2, 1), "c.lokr_w2_b": (1, 3), "c.alpha": (),
    "d.lora_down.weight": (2, 3), "d.lora_up.weight": (4, 2), "d.dora_scale": (4, 1), "d.alpha": (1,),
    "e.lora_A": (2, 3), "e.lora_B": (4, 2), "e.lora_E": (2, 1), "e.ranknum": (1,), "e.alpha": (),
}  # fmt: skip
ALL_KINDS = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}


@limited(200)
@given(damage=DAMAGE, which=st.sampled_from([ADAPTER, ALL_KINDS]))
def test_a_damaged_adapter_has_finite_matrices_of_its_layout_or_is_a_bad_file(
    tmp_path_factory, damage, which
):
    path = adapter_folder(tmp_path_factory.getbasetemp(), content=damaged(save(which), damage))
    surveyed = answer(lambda: survey_file(path), BadFile)
    adapter = answer(lambda: matrices_of(path), BadFile)
    if adapter is not None:
        assert surveyed == adapter.layout
        for column, rows, cols in adapter.layout.columns:
            matrix = adapter.matrices[column]
            assert matrix.shape == (rows, cols) and matrix.dtype == np.float32 and np.isfinite(matrix).all()


def test_the_files_of_the_fuzz_are_whole(tmp_path):
    """Undamaged they are read, so that the test above can tell."""
    for which, modules in ((ADAPTER, 1), (ALL_KINDS, 5)):
        path = adapter_folder(tmp_path, content=save(which))
        assert len(matrices_of(path).layout.modules) == modules


@limited(60)
@given(damage=DAMAGE)
def test_a_damaged_pickle_has_finite_matrices_or_is_a_bad_file(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "adapter.pt"
    torch.save(
        {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(4, 2)},
        path,
    )
    path.write_bytes(damaged(path.read_bytes(), damage))
    adapter = answer(lambda: matrices_of(path), BadFile)
    assert adapter is None or all(np.isfinite(w).all() for w in adapter.matrices.values())


def test_hostile_adapters_are_bad_files(tmp_path):
    for content in hostile_safetensors():
        path = adapter_folder(tmp_path, content=content)
        for read in (survey_file, matrices_of):
            assert answer(lambda: read(path), BadFile) is None


@limited(100)
@given(config=st.dictionaries(st.sampled_from(["lora_alpha", "use_rslora", "r"]), JSON) | JSON)
def test_any_configuration_of_an_adapter_gives_a_finite_scale_or_a_bad_file(tmp_path_factory, config):
    path = adapter_folder(tmp_path_factory.getbasetemp(), json.dumps(config))
    adapter = answer(lambda: matrices_of(path), BadFile)
    assert adapter is None or all(np.isfinite(scale) for scale in adapter.scales.values())


CONFIGURATIONS = [
    "[" * 100_000,
    '{"lora_alpha": 1' + "0" * 400 + "}",
    *(json.dumps({"lora_alpha": 4, "alpha_pattern": {end: 2}}) for end in ("(", "*", "a{99999999999}", "\\")),
]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: config[:60])
@pytest.mark.parametrize("style", ["peft", "diffusers"])
def test_a_hostile_configuration_is_a_bad_file(tmp_path, config, style):
    path = adapter_folder(tmp_path, config)
    if style == "diffusers":
        module = MODULE.removeprefix("base_model.model.")
        tensors = {
            f"{module}.lora.down.weight": ADAPTER[f"{MODULE}.lora_A.weight"],
            f"{module}.lora.up.weight": ADAPTER[f"{MODULE}.lora_B.weight"],
        }
        save_file(tensors, path, metadata={"lora_adapter_metadata": config})
    assert answer(lambda: matrices_of(path), BadFile) is None


# --- data sets


LAYERS = [f"down_blocks.0.attn1.to_q.lora.{side}.weight" for side in ("down", "up")]


def small_dataset():
    dataset = lora_dataset(n=12, rank=1, width=2)
    layers = [name for name in dataset.column_names if "attn1.to_q" in name or "attn1.to_v" in name]
    return dataset.select_columns([*layers[:2], "category_label"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows as Parquet, as an Arrow stream (which save_to_disk wrote), and as Arrow with a footer."""
    place, dataset = tmp_path_factory.mktemp("files"), small_dataset()
    dataset.to_parquet(str(place / "rows.parquet"))
    dataset.save_to_disk(str(place / "saved"))
    table = dataset.data.table.combine_chunks()
    with pa.ipc.new_file(str(place / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    (stream,) = (place / "saved").glob("*.arrow")
    return {"parquet": place / "rows.parquet", "stream": stream, "footer": place / "rows.arrow"}


@pytest.mark.parametrize("kind", ["parquet", "stream", "footer"])
def test_headers_of_a_damaged_file_are_read_or_refused(files, tmp_path, kind):
    whole, file = files[kind].read_bytes(), tmp_path / f"rows{files[kind].suffix}"

    @limited(700)
    @given(damage=DAMAGE)
    def check(damage):
        file.write_bytes(damaged(whole, damage))
        headers = answer(lambda: headers_of("rows", [file]), InputError)
        assert headers is None or (headers.rows[file] >= 0 and headers.first.num_rows == 1)

    in_child(check)


def test_rows_of_a_damaged_folder_are_matrices_of_one_shape_or_refused(files, tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(files["stream"].parent, folder)
    (file,) = folder.glob("*.arrow")
    whole = file.read_bytes()

    @limited(150)
    @given(damage=DAMAGE)
    def check(damage):
        file.write_bytes(damaged(whole, damage))
        data = answer(lambda: collect(open_dataset(str(folder))), InputError)
        for layer in data.layers.names if data else []:
            layout = data.layers.layouts[layer]
            rows = answer(lambda: data.weights.read_layer(layer, 0, data.num_rows), InputError)
            assert rows is None or rows.shape == (data.num_rows, layout.rows, layout.cols)
        assert data is None or len(data.labels) == len(load_from_disk(folder))

    in_child(check)


@pytest.mark.parametrize("kind", ["parquet", "stream", "footer"])
def test_a_file_that_is_cut_off_is_refused(files, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    whole, file = files[kind].read_bytes(), tmp_path / f"rows{files[kind].suffix}"
    for length in range(0, len(whole) - 8, max(1, len(whole) // 12)):
        file.write_bytes(whole[:length])
        assert answer(lambda: open_dataset(str(file)), InputError) is None, length
    file.write_bytes(whole)
    assert open_dataset(str(file)).to_dict() == small_dataset().to_dict()
