"""Settings: defaults, ranges, conversion,
precedence of files and flags, and errors that say what would do.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import visual_ablation_experiment as experiment
from ablation.catalogue import (
    CHOICES,
    CLASSIFIERS,
    CONTROLS,
    LAYER_SET_GROUPS,
    LAYER_SETS,
    NINE,
    REPRESENTATION_GROUPS,
    SPECS,
    title_of,
)
from ablation.cells import Cell, cells_of
from ablation.command_line import find_device, parse_command_line, read_yaml
from ablation.controls import CONTROL_CELLS
from ablation.conversion import build_settings
from ablation.selection import list_cells
from ablation.settings import InputError, Settings, TrainingSettings, setting_fields
from ablation.splits import split_names, split_spec


def test_the_defaults_are_the_published_ones():
    training = TrainingSettings()
    assert dataclasses.asdict(training) == {
        "num_runs": 10,
        "seed": 42,
        "hidden_dim": 512,
        "dropout": 0.5,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "max_epochs": 300,
        "patience": 15,
        "trainer": "auto",
        "precision": "float32",
    }
    assert Settings().dataset == "digits"  # the origin has no default: this one needs no network
    assert (
        Settings().output_dir == "visual-ablation-results"
        and Settings().cache_dir == ".feature_cache"
        and Settings().cache_features
    )
    cells = list_cells(Settings(), Settings().layer_sets)
    assert len(cells) == 18 and cells[-1].name == "visual_only_ensemble"


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("dropout", 1.0, r"--dropout 1.0 is out of range: use a value in \[0, 1\)"),
        ("dropout", "nan", "out of range"),
        ("dropout", "half", "'half' is not a number"),
        ("num_runs", 0, r"use a value in \[1, 100000\]"),
        ("num_runs", 2.5, "2.5 is not a whole number"),
        ("num_runs", True, "not a whole number"),
        ("batch_size", 1, "BatchNorm needs two"),
        ("learning_rate", 0, "above 0"),
        ("weight_decay", -1, "at least 0"),
        ("trainer", "fast", "unknown --trainer 'fast': use auto, sequential, packed"),
        ("precision", "float16", "use float32, tf32, bfloat16"),
        (
            "representations",
            ["stats", "magic"],
            "unknown --representations 'magic': use nine, product, fitted, all, simple_stats, rank_based",
        ),
        ("representations", ["stats", "stats"], "one twice"),
        ("layer_sets", [], "nothing"),
        ("cache_features", "yes", "not true or false"),
        ("dropuot", 0.1, "unknown setting 'dropuot' in a.yaml: did you mean 'dropout'"),
        ("quick", True, "unknown setting 'quick'"),
        ("training", {}, "unknown setting 'training'"),
        ("dataset", "", "--dataset is empty"),
        ("dataset", None, "not text"),
    ],
)
def test_values_that_cannot_be_are_refused_with_what_could(name, value, reason):
    with pytest.raises(InputError, match=reason):
        build_settings({name: value}, "a.yaml")


def test_values_are_converted_as_yaml_and_flags_write_them():
    settings = build_settings(
        {
            "weight_decay": "1e-4",
            "num_runs": "3",
            "dropout": 0,
            "dataset": 10,
            "layer_sets": "text_only",
            "max_epochs": 5.0,
        }
    )
    assert (
        settings.training.weight_decay == 1e-4
        and settings.training.num_runs == 3
        and settings.training.max_epochs == 5
    )
    assert (
        settings.training.dropout == 0.0
        and settings.dataset == "10"
        and settings.layer_sets == ("text_only",)
    )


def parse(*argv):
    return parse_command_line(list(argv), experiment.__doc__)[0]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("num_runs: 4\ndropout: 0.25\nweight_decay: 1e-3\ncache_features: false\n")
    settings = parse("--config", str(path), "--dropout", "0.1", "--cache-features")
    assert (settings.training.num_runs, settings.training.dropout, settings.training.weight_decay) == (
        4,
        0.1,
        1e-3,
    )
    assert settings.training.batch_size == 64 and settings.cache_features
    assert parse("--config", str(path), "--quick").training.num_runs == 3
    assert not parse("--no-cache-features").cache_features
    assert parse("--seed", "7", "--num-runs", "2").training.seeds == [7, 8]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("dropout: 2\n", "out of range.*a.yaml"),
        ("- a\n", "not a mapping"),
        ("a: [\n", "cannot read"),
        ("droput: 1\n", "did you mean 'dropout'"),
        ("num_runs: 3\nnum_runs: 10\n", "stands twice"),
        ("output_dir: 2024-13-45\n", "cannot read"),
        ("seed: 0x_\n", "cannot read"),
        ("!!python/object/apply:os.system ['true']\n", "cannot read"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, reason):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(InputError, match=reason):
        parse("--config", str(tmp_path / "a.yaml"), "--dropout", "0.5")
    for absent in (str(tmp_path / "absent.yaml"), ""):
        with pytest.raises(InputError, match=r"--config is empty|cannot read --config"):
            parse("--config", absent)


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--quick", "--num-runs", "5"], "leave one out"),
        (["--quik"], "unrecognized arguments: --quik"),
        (["--num-runs"], "expected one argument"),
        (["--drop", "0.1"], "unrecognized"),
        (["stray"], "unrecognized"),
    ],
)
def test_bad_command_lines_are_refused(argv, reason):
    with pytest.raises(InputError, match=reason):
        parse(*argv)


def test_the_embedded_collections_are_cross_validated_unless_something_says_otherwise():
    for dataset in ("digits", "digits-named"):
        chosen = parse("--dataset", dataset)
        assert (
            chosen.folds == 5
            and chosen.split == ("auto",)
            and chosen == parse("--dataset", dataset, "--folds", "5")
        )
        assert parse("--dataset", dataset, "--num-runs", "20").folds == 5
    for other in (
        ["--folds", "0"],
        ["--split", "random"],
        ["--num-splits", "2"],
        ["--num-runs", "3"],
        ["--quick"],
    ):
        assert parse(*other).folds == 0 and parse(*other).split == ("random",)
    assert parse("--dataset", "1k").folds == 0 and parse("--dataset", "./digits").folds == 0


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_a_device_is_there_or_the_error_names_those_that_are(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"NVIDIA H{i + 1}00")
    seen = ["cpu alone", "cpu, cuda:0 (NVIDIA H100)", "cpu, cuda:0 (NVIDIA H100), cuda:1 (NVIDIA H200)"][gpus]
    named = {"cpu": "cpu", "cpu:0": "cpu", "auto": "cuda" if gpus else "cpu"}
    named |= {"cuda": "cuda", "cuda:0": "cuda:0", "cuda:00": "cuda:0"} if gpus else {}
    assert {name: find_device(name) for name in named} == named
    for absent in ("cuda:9", f"cuda:{gpus}", *([] if gpus else ["cuda"])):
        with pytest.raises(InputError) as refused:
            find_device(absent)
        assert str(refused.value) == f"--device {absent} is not there: torch sees {seen}"


@pytest.mark.parametrize("backend", ["mps", "xpu"])
def test_devices_that_do_not_give_these_numbers_are_not_taken(backend, monkeypatch):
    """Not by name, nor by auto where torch has such a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(getattr(torch, backend), "is_available", lambda: True)
    assert find_device("auto") == "cpu"
    for name in (backend, f"{backend}:0", f"{backend}:1"):
        with pytest.raises(InputError, match=f"^--device {name} is refused: .* float64.*; use auto, cpu"):
            find_device(name)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert parse("--config", str(tmp_path / "a.yaml")) == parse()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid_and_say_what_they_are(path):
    settings = build_settings(read_yaml(str(path)), str(path))
    assert path.read_text().startswith("# ")
    if path.stem[0].isdigit():
        assert settings.dataset == path.stem and settings.training == TrainingSettings()


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, f in setting_fields().items():
        if name not in ("named_layer_sets", "layer_sides"):  # mappings: for YAML
            assert "--" + name.replace("_", "-") in text and f.metadata["help"].split()[0] in text
    for flag in ("--config", "--quick", "--rerun-stale", "--dry-run", "--status"):
        assert flag in text


@pytest.mark.parametrize(
    "dataset, name",
    [
        ("50k", "50k"),
        ("digits", "digits"),
        ("a/b-c", "b-c"),
        ("./x/loras/", "loras"),
        ("x.parquet", "x.parquet"),
    ],
)
def test_the_output_folder_ends_in_the_last_part_of_the_name(dataset, name):
    assert Settings(dataset="..").output_folder.name == f"visual_ablation_{Path.cwd().parent.name}"
    assert Settings(output_dir="~/x").output_folder.is_relative_to(Path.home())
    assert (
        Settings(dataset=dataset).output_folder == Path("visual-ablation-results") / f"visual_ablation_{name}"
    )


def test_groups_of_representations_stand_for_their_names():
    chosen = lambda *names: build_settings({"representations": list(names)}).representations
    assert chosen("nine") == NINE == Settings().representations and len(NINE) == 9
    assert chosen("nine", "product") == NINE + REPRESENTATION_GROUPS["product"]
    # Nothing twice where a group is named.
    assert chosen("product_norms", "product")[:2] == ("product_norms", "product_spectral")
    assert set(chosen("all")) == set(CHOICES)
    groups = [REPRESENTATION_GROUPS[group] for group in ("nine", "product", "fitted")]
    members = [name for group in groups for name in group]
    assert len(members) == len(set(members)) and set(members) <= set(CHOICES)
    with pytest.raises(InputError, match="names one twice"):
        chosen("stats", "stats")


def test_audits_are_cells_beside_those_they_audit():
    settings = build_settings({"representations": ["stats"], "audit": ["noise"]})
    cells = list_cells(settings, settings.layer_sets)
    assert [cell.name for cell in cells] == [
        "all_layers_stats",
        "all_layers_stats.noise",
        "visual_only_stats",
        "visual_only_stats.noise",
    ]
    assert cells[1].trained == cells[0] and Settings().audit == ()
    with pytest.raises(InputError, match="unknown --audit 'rain': use gauge, noise"):
        build_settings({"audit": ["rain"]})


def test_splits_classifiers_and_controls_are_further_cells():
    chosen = {
        "representations": ["stats", "kernel_ridge"],
        "layer_sets": ["all_layers", "random_half"],
        "split": ["grouped", "random"],
        "num_splits": 2,
        "classifiers": ["linear"],
        "split_seed": 7,
    }
    chosen["controls"] = ["shuffled", "metadata", "norms", "down", "up"]
    settings = build_settings(chosen)
    assert split_names(settings) == ["", "grouped1", "random0", "random1"]
    assert [split_spec(settings, name)[:2] for name in split_names(settings)] == [
        ("grouped", 7),
        ("grouped", 8),
        ("random", 7),
        ("random", 8),
    ]
    cells = list_cells(settings, ["all_layers", "random_half.0"])
    assert len(cells) == len(set(cells)) == 4 * (4 + 2) + 2 + 1 + 1 + 2
    assert [cell.name for cell in cells[:6]] == [
        "all_layers_stats",
        "all_layers_kernel_ridge",
        "random_half.0_stats",
        "random_half.0_kernel_ridge",
        "all_layers_stats.grouped1",
        "all_layers_kernel_ridge.grouped1",
    ]
    assert [cell.name for cell in cells if cell.is_control] == [
        "all_layers_stats.shuffled",
        "all_layers_kernel_ridge.shuffled",
        "no_layers_metadata",
        "all_layers_norms",
        "down_only_stats",
        "up_only_stats",
    ]
    assert sum(cell.classifier == "linear" for cell in cells) == 2 * 4 and all(
        cell.representation == "stats" for cell in cells if cell.classifier
    )
    assert {cell.title for cell in cells} == {
        "All Layers Config",
        "Random Half Config",
        "Further Splits",
        "Linear Probe",
        "Controls",
    }
    assert list_cells(Settings(), ["all_layers", "visual_only"]) == cells_of(
        ("all_layers", "visual_only"), NINE
    )
    needs = "need one of --representations"
    for wrong, reason in (
        ({"controls": ["up"], "representations": ["product_norms"]}, needs),
        ({"classifiers": ["linear"], "representations": ["kernel_ridge"]}, needs),
        ({"classifiers": ["forest"]}, "unknown --classifiers 'forest': use linear, boosting"),
        ({"num_splits": 0}, "out of range"),
        ({"controls": ["placebo"]}, "unknown --controls 'placebo': use all, shuffled"),
        ({"split": []}, "split names nothing"),
        ({"representations": ["norms"]}, "unknown --representations 'norms'"),
        ({"layer_sets": ["up_only"]}, "unknown"),
    ):
        with pytest.raises(InputError, match=reason):
            build_settings(wrong)


def test_every_control_lists_its_cells_and_a_bare_flag_asks_for_all_of_them():
    assert tuple(CONTROL_CELLS) == CONTROLS
    for flags in ("--controls", "--classifiers"), ("--controls", "all", "--classifiers", *CLASSIFIERS):
        settings = parse_command_line(["--dataset", "x", *flags], experiment.__doc__)[0]
        assert settings.controls == CONTROLS and settings.classifiers == tuple(CLASSIFIERS)
    for control in CONTROLS:
        cells = list_cells(build_settings({"controls": [control]}), ["all_layers", "visual_only"])[18:]
        assert cells and all(cell.is_control and Cell.named(cell.name) == cell for cell in cells), control
    everything = build_settings({"controls": list(CONTROLS), "layer_sets": ["all_layers", "text_only"]})
    cells = list_cells(everything, ["all_layers", "text_only"])
    assert len(set(cells)) == len(cells)


def test_a_cell_that_two_controls_ask_for_is_listed_once(monkeypatch):
    monkeypatch.setitem(CONTROL_CELLS, "up", lambda settings, layer_sets: [Cell("norms", "all_layers")])
    settings = build_settings({"controls": ["norms", "up"], "layer_sets": ["all_layers"]})
    cells = list_cells(settings, ["all_layers"])
    assert cells.count(Cell("norms", "all_layers")) == 1


def test_options_belong_to_the_representations_that_they_change():
    settings = build_settings({"sketch_size": 5, "pca_components": 7})
    assert settings.width_of("product_sketch") == 25 and settings.width_of("stats") == 7
    assert {name: settings.options_of(name) for name in SPECS if settings.options_of(name)} == {
        "product_sketch": {"sketch_size": 5},
        "pca": {"pca_components": 7},
        "kernel_pca": {"pca_components": 7},
    }


def test_every_cell_is_found_again_by_the_name_of_its_files():
    sets = [
        "all_layers",
        "random_half.3",
        "by_block.down_blocks.0.attentions.1.attn1",
        "queries",
        "to_q-only",
    ]
    for cell in cells_of(sets, SPECS, ("gauge", "noise")):
        for way in (
            {},
            {"split": "grouped12"},
            {"classifier": "linear"},
            {"split": "random1", "classifier": "boosting"},
            {"labels": "shuffled"},
        ):
            assert Cell.named(cell._replace(**way).name) == cell._replace(**way)
    for name in ("stats", "_stats", "notes", "all_layers_", "all_layers_unknown"):
        assert Cell.named(name) is None, name


@pytest.mark.parametrize(
    "name, spoken",
    [
        ("all_layers_stats", "stats of all layers"),
        ("by_block.mid_block.attentions.0.attn1_stats", "stats of mid_block.attentions.0.attn1"),
        (
            "visual_only_simple_stats.random1.linear",
            "simple_stats of visual only, split random1, linear probe",
        ),
        ("random_half.3_stats", "stats of random half 3"),
        ("text_only_pca.shuffled", "pca of text only, shuffled labels"),
        ("up_only_stats.gauge", "stats of up only, gauge audit"),
    ],
)
def test_cells_are_spoken_as_people_say_them(name, spoken):
    assert Cell.named(name).spoken == spoken


@pytest.mark.parametrize(
    "named, reason",
    [
        ({"by_block": ["*"]}, "'by_block' is no name for a layer set"),
        ({"a b": ["*"]}, "'a b' is no name"),
        ({"mine": []}, "'mine' has no pattern"),
        ({"my_simple": ["*"]}, "would be taken for another representation's"),
        ({"my_kernel": ["*"]}, "would be taken for another"),
        (["*"], "is not a mapping"),
    ],
)
def test_layer_sets_are_named_so_that_their_files_can_be_told_apart(named, reason):
    with pytest.raises(InputError, match=reason):
        build_settings({"named_layer_sets": named}, "a.yaml")


def test_a_layer_set_must_be_known():
    settings = build_settings(
        {"layer_sets": ["all_layers", "random_half", "mine"], "named_layer_sets": {"mine": "*.to_q.*"}}
    )
    assert (
        settings.named_layer_sets == {"mine": ("*.to_q.*",)}
        and title_of("random_half.3") == "Random Half"
        and title_of("mine") == "mine"
    )
    with pytest.raises(
        InputError,
        match=f"unknown --layer-sets 'yours': use {', '.join([*LAYER_SETS, *LAYER_SET_GROUPS])}, "
        "or name one in named_layer_sets",
    ):
        build_settings({"layer_sets": ["yours"]})
