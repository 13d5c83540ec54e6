"""Figures against the numbers that they draw, the report's files,
and the page in a browser where there is one.
"""

import csv
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import report
from builders import lora_dataset
from conftest import ROOT
from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

import visual_ablation_experiment as experiment
from ablation.catalogue import NINE, PARTS
from ablation.cells import Cell
from ablation.report import (
    accuracy_figures,
    comparison_figures,
    control_figures,
    figures,
    style,
    tables,
    training_figures,
    write,
)
from ablation.report import load as load_module
from ablation.report import rows as rows_module
from checkpointing import ResultStore

DRAWS = {name: drawing.draw for name, drawing in figures.FIGURES.items()}

LAYER_SETS = ("all_layers", "visual_only", "text_only")


@pytest.fixture(scope="module", autouse=True)
def coarse_figures():
    """Files of figures in a resolution that is soon drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "RESOLUTION", 40)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, coarse_figures):
    """The folder of a small run with everything that a report has a section for, and a class whose name is
    not fit for HTML.
    """
    place = tmp_path_factory.mktemp("report")
    rows = lora_dataset(n=150, signal=4.0, knowing=("attn1", "attn2")).to_dict()
    rows["category_label"] = [
        "<b>a & 'b'</b>" if label == "cat" else label for label in rows["category_label"]
    ]
    rows["num_images"] = [i % 4 for i in range(150)]
    Dataset.from_dict(rows).save_to_disk(place / "loras")
    arguments = [
        "--dataset",
        str(place / "loras"),
        "--output-dir",
        str(place / "out"),
        "--cache-dir",
        str(place / "cache"),
        "--num-runs",
        "3",
        "--max-epochs",
        "10",
        "--hidden-dim",
        "32",
        "--batch-size",
        "64",
        "--learning-rate",
        "0.01",
        "--representations",
        "stats",
        "frequency",
        "product_norms",
        "--layer-sets",
        *LAYER_SETS,
        "random_half",
        "by_block",
        "--random-halves",
        "2",
        "--audit",
        "gauge",
        "noise",
        "--controls",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "refresh", lambda *rest: None)  # test_status.py reads the pages of a run
        assert experiment.main(arguments) == 0
    return place / "out" / "visual_ablation_loras"


@pytest.fixture
def results(finished):
    return load_module.load_results(finished)


def parts(figure, gid):
    """What a figure drew under a name, in order of drawing."""
    return [
        artist for axes in figure.axes for artist in (*axes.lines, *axes.patches) if artist.get_gid() == gid
    ]


def test_one_core_or_several_draw_the_same_files(finished, tmp_path, monkeypatch):
    shown = ("accuracy", "learning_curves", "confusion")  # the others take long
    monkeypatch.setattr(figures, "FIGURES", {name: figures.FIGURES[name] for name in shown})
    made = []
    for count in (1, 3):
        monkeypatch.setattr(write, "cores", lambda count=count: count)
        copy = tmp_path / str(count)
        shutil.copytree(finished, copy / finished.name, ignore=shutil.ignore_patterns("figures", "tables"))
        written = write.write_report(copy / finished.name)
        made.append({str(path.relative_to(copy)): path.read_bytes() for path in written})
    assert made[0].keys() == made[1].keys() and len(made[0]) > 10
    differing = [name for name, content in made[0].items() if content != made[1][name]]
    assert differing == []


def test_layer_sets_have_their_colours_before_figures_are_drawn_apart(monkeypatch):
    monkeypatch.setattr(style, "NAMED_COLOURS", {})
    write.draw_all({}, {"ours_results": [{}], "mine_results": [{}]}, ())
    assert list(style.NAMED_COLOURS) == ["ours", "mine"]


# --- figures


def test_accuracies_stand_where_their_numbers_say(results):
    figure, rows = accuracy_figures.accuracy(results), rows_module.accuracy_rows(results)
    assert len(rows) == 3 * 5 and {row["layer_set"] for row in rows} == {
        *LAYER_SETS,
        "random_half.0",
        "random_half.1",
    }
    for row, point, interval in zip(rows, parts(figure, "point"), parts(figure, "interval"), strict=True):
        entry = results["inference"]["accuracies"][f"{row['layer_set']}_{row['representation']}"]
        assert point.get_xdata() == pytest.approx([100 * entry["accuracy"]])
        assert list(interval.get_xdata()) == pytest.approx([100 * end for end in entry["interval"]])
        assert round(point.get_ydata()[0]) == ["stats", "frequency", "product_norms"].index(
            row["representation"]
        )
        assert (
            to_hex(point.get_color())
            == style.colour_of(row["layer_set"]).lower()
            == to_hex(interval.get_color())
        )
    (chance,) = parts(figure, "chance")
    assert chance.get_xdata()[0] == pytest.approx(100 * results["inference"]["chance"])
    assert (
        style.colour_of("random_half.0") == style.colour_of("random_half.1")
        and style.colour_of("mine") in style.FURTHER_COLOURS
    )
    assert len({style.colour_of(name) for name in ("ab", "ba", "ab")}) == 2 and style.colour_of(
        "mine"
    ) == style.colour_of("mine")
    results["inference"]["chance"] = 0.99
    assert accuracy_figures.accuracy(results).axes[0].get_xlim()[1] > 99  # the line stays in sight


def test_drops_are_sorted_and_filled_where_they_are_shown(results):
    entries = results["inference"]["comparisons"][0]["entries"]
    for entry, p in zip(entries, (0.5, 0.001, 0.04), strict=True):
        entry["p_max_t"] = p
    figure, ordered = accuracy_figures.drop(results), sorted(entries, key=lambda entry: -entry["drop"])
    for y, (entry, point, interval) in enumerate(
        zip(ordered, parts(figure, "point"), parts(figure, "interval"), strict=True)
    ):
        assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((100 * entry["drop"], y))
        assert list(interval.get_xdata()) == pytest.approx([100 * end for end in entry["interval"]])
        assert (to_hex(point.get_markerfacecolor()) != style.PAPER) == (entry["p_max_t"] < 0.05)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        entry["representation"] for entry in ordered
    ]


def test_the_drop_by_class_is_counted_from_the_confusion_matrices(results):
    rows = rows_module.class_drop_rows(results)
    assert len(rows) == 3 * 3
    every = {row["representation"]: row for row in results["all_layers_results"]}
    for row in rows:
        number = results["label_mapping"][row["class"]]
        shares = [
            matrix[number][number] / sum(matrix[number])
            for matrix in every[f"{row['representation']}_all_layers"]["test_confusion_matrices"]
        ]
        assert (
            row["all_layers"] == pytest.approx(np.mean(shares)) and row["low"] <= row["drop"] <= row["high"]
        )
    figure, best = accuracy_figures.class_drop(results), rows_module.best_representation(results)
    shown = [point.get_xdata()[0] for point in parts(figure, "point")]
    assert shown == pytest.approx(
        sorted((100 * row["drop"] for row in rows if row["representation"] == best), reverse=True)
    )


def test_learning_curves_have_every_best_epoch_and_the_mean_of_the_runs(results):
    figure = training_figures.learning_curves(results)
    best = parts(figure, "best")
    assert len(best) == 3 * 3 * 3
    record = results["all_layers_results"][0]
    histories = [curve["val_acc_history"] for curve in record["learning_curves"]]
    mean = parts(figure, "mean")[0].get_ydata()
    assert mean[0] == pytest.approx(100 * np.mean([history[0] for history in histories]))
    assert [point.get_xdata()[0] for point in best[:3]] == [
        curve["best_epoch"] for curve in record["learning_curves"]
    ]
    assert best[0].get_ydata()[0] == pytest.approx(100 * max(histories[0]))


def test_confusion_matrices_are_shares_of_the_true_class(results):
    images = [
        axes.images[0].get_array() for axes in training_figures.confusion_all(results).axes if axes.images
    ]
    assert len(images) == 9 and all(np.allclose(image.sum(1), 1) for image in images)
    total = np.array(results["all_layers_results"][0]["test_confusion_matrices"]).sum(0)
    assert np.allclose(images[0], total / total.sum(1, keepdims=True))
    best = rows_module.rows_of(results, "text_only")[rows_module.best_representation(results)]
    large = [axes for axes in training_figures.confusion(results).axes if axes.images]
    assert len(large) == 3 and np.allclose(large[2].images[0].get_array(), rows_module.shares(best))
    assert [label.get_text() for label in large[0].get_yticklabels()] == rows_module.shortened(
        list(results["label_mapping"]), 12
    )
    absent = {"test_confusion_matrices": [[[2, 1], [0, 0]]]}
    assert np.isnan(rows_module.shares(absent)[1]).all() and rows_module.shares(absent)[0].tolist() == [
        2 / 3,
        1 / 3,
    ]
    rows = rows_module.confusion_rows(results)
    assert (
        sum(
            row["count"]
            for row in rows
            if (row["layer_set"], row["representation"]) == ("all_layers", "stats")
        )
        == total.sum()
    )


def test_the_other_figures_draw_their_rows(results):
    table = {
        (row["layer_set"], row["representation"]): row["retention"]
        for row in rows_module.retention_rows(results)
    }
    name = next(representation for layer_set, representation in table if layer_set == "text_only")
    every, text = (
        results["inference"]["accuracies"][f"{layer_set}_{name}"]["accuracy"] - results["inference"]["chance"]
        for layer_set in ("all_layers", "text_only")
    )
    assert table["text_only", name] == pytest.approx(text / every)
    # No share of what is not above chance.
    assert {representation for _, representation in table} == set(results["inference"]["above_chance"])
    assert f"{100 * text / every:.0f}" in [
        shown.get_text() for shown in accuracy_figures.retention(results).axes[0].texts
    ]
    for part in PARTS:
        shown = [point.get_xdata()[0] for point in parts(training_figures.gaps(results), part)]
        assert shown == pytest.approx([100 * row[part] for row in rows_module.gaps_rows(results)])
    rows = rows_module.scatter_rows(results)
    for name, x, y in (("precision_recall", "recall", "precision"), ("cost", "feature_dim", "accuracy")):
        points = parts(DRAWS[name](results), "point")[: len(rows)]
        scale = 100 if x == "recall" else 1
        assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in points] == [
            pytest.approx((scale * row[x], 100 * row[y])) for row in rows
        ]
        named = [text.get_text() for text in DRAWS[name](results).axes[0].texts]
        assert named == ["stats", "frequency", "product_norms"], name
    assert (
        len(parts(control_figures.blocks(results), "block"))
        == 4
        == len({(row["block"], row["attention"]) for row in rows_module.blocks_rows(results)})
    )
    shown = [point.get_xdata()[0] for point in parts(control_figures.controls(results), "point")]
    assert (
        shown == pytest.approx([100 * row["accuracy"] for row in rows_module.controls_rows(results)])
        and len(shown) == 1 + 3 + 2 + 2 + 9
    )
    noise = [
        row
        for row in rows_module.audits_rows(results)
        if row["layer_set"] == "all_layers" and row["variant"] == "20%"
    ]
    assert [point.get_xdata()[0] for point in parts(control_figures.audits(results), "20%")] == pytest.approx(
        [100 * row["agreement"] for row in noise]
    )


def large(results, names, classes):
    """Results with other representations, all like the first, and that many classes."""
    rng = np.random.default_rng(0)
    labels = {f"a class with number {i}": i for i in range(classes)}
    grown = {key: value for key, value in results.items() if not key.endswith("_results")} | {
        "label_mapping": labels,
        "num_classes": classes,
    }
    for layer_set in LAYER_SETS:
        grown[f"{layer_set}_results"] = [
            results[f"{layer_set}_results"][0]
            | {
                "representation": f"{name}_{layer_set}",
                "test_confusion_matrices": rng.integers(0, 4, (3, classes, classes)).tolist(),
            }
            for name in names
        ]
    first = results["inference"]["accuracies"]["all_layers_stats"] | {"p_above_chance": 0.0, "accuracy": 0.9}
    one = results["inference"]["classes"][0]
    by_class = [one | {"representation": name, "class": i} for name in names for i in range(classes)]
    accuracies = {f"{layer_set}_{name}": first for layer_set in LAYER_SETS for name in names}
    entries = [
        results["inference"]["comparisons"][0]["entries"][0] | {"representation": name} for name in names
    ]
    return grown | {
        "inference": results["inference"]
        | {
            "accuracies": accuracies,
            "above_chance": names,
            "classes": by_class,
            "comparisons": [{"first": "all_layers", "second": "visual_only", "entries": entries}],
        }
    }


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 100])
def test_nothing_overlaps_with_twelve_long_names_and_many_classes(results, classes, monkeypatch):
    names = [f"representation_no_{i:03}" for i in range(12)]
    monkeypatch.setattr(rows_module, "CHOICES", dict.fromkeys(names))
    grown = large(results, names, classes)
    by_class = ("class_drop", "confusion", "confusion_all")  # the others are the same with few
    for name in DRAWS if classes == 100 else by_class:
        figure = DRAWS[name](grown)
        if figure is None:
            continue
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frame = figure.bbox
        for axes in figure.axes:
            labels = [
                label
                for label in (*axes.get_yticklabels(), *axes.texts, axes.title, axes.xaxis.label)
                if label.get_text()
            ]
            labels = [label for label in labels if axes.axison or label in axes.texts]
            # A name without its line.
            boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in labels]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:i]), (name, labels[i].get_text())
                assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, (name, labels[i].get_text())


# --- files


def test_a_run_ends_with_its_report_and_an_unchanged_one_leaves_it(finished):
    assert {"report.html", "figures", "tables"} <= {path.name for path in finished.iterdir()}
    shown = {name: drawing for name, drawing in figures.FIGURES.items() if name != "halves"}  # too few blocks
    for name, rows, draw in ((name, drawing.rows, drawing.draw) for name, drawing in shown.items()):
        assert draw(load_module.load_results(finished)) is not None, name
        for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
            assert (finished / "figures" / f"{name}.{kind}").read_bytes()[:4] == magic, name
        expected = rows(load_module.load_results(finished))
        if not expected:
            assert not (finished / "tables" / f"{name}.csv").exists()
            continue
        with (finished / "tables" / f"{name}.csv").open() as file:
            read = list(csv.DictReader(file))
        assert len(read) == len(expected) and list(read[0]) == list(expected[0])
        for column, value in expected[-1].items():
            assert read[-1][column] == ("" if value is None else str(value)), (name, column)  # all digits
    assert write.is_current(finished)
    assert b"/FontFile2" in (finished / "figures" / "accuracy.pdf").read_bytes()  # TrueType, embedded


class Page(html.parser.HTMLParser):
    """Tags, links and the cells of the first table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_one_file_that_escapes_what_comes_from_data(finished, results):
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert (
        all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
        and "<b>a &" not in text
        and "&lt;b&gt;a &amp;" in text
    )
    assert page.tags.count("tr") == 1 + 3 * (3 + 2 + 4) + 1 + 17 and page.tags.count("svg") == (
        len(figures.FIGURES) - 1  # that of random halves
    )
    words = " ".join("".join(page.text).split())
    for sentence in results["verdict_parts"]["reservations"]:
        assert sentence in words
    assert " ".join(results["verdict_parts"]["opening"]) in words
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and "@import" not in text and "http-equiv" not in text
    first = results["inference"]["accuracies"]["all_layers_stats"]
    assert f'<td data-value="{first["accuracy"]!r}">{100 * first["accuracy"]:.1f}</td>' in text


def test_tables_for_a_paper_and_for_a_pull_request(finished, results):
    tex, markdown = ((finished / "tables" / f"results.{kind}").read_text() for kind in ("tex", "md"))
    entry, drop = (
        results["inference"]["accuracies"]["all_layers_product_norms"],
        results["inference"]["comparisons"][0]["entries"][2],
    )
    low, high = entry["interval"]
    half = (
        rf" ({100 * low:.1f} to {100 * high:.1f})"
        if low <= 0 or high >= 1
        else rf" $\pm$ {50 * (high - low):.1f}"
    )
    assert (
        tex.count(r"\\") == 4
        and r"\toprule" in tex
        and rf"product\_norms & {100 * entry['accuracy']:.1f}{half} & " in tex
    )
    assert (
        tables.half_interval({"low": 0.2, "high": 0.3}) == " ± 5.0"
        and tables.half_interval({"low": 0.7, "high": 1.0}) == " (70.0 to 100.0)"
    )
    assert f"{100 * drop['drop']:+.1f}{tables.stars(drop)} " in tex and "max-T" in tex
    assert (
        markdown.startswith("| representation | All Layers | Visual-Only | Text-Only | drop |")
        and results["verdict"] in markdown
    )
    assert [
        tables.stars({"p_max_t": p, "p_equivalence_max_t": q})
        for p, q in ((1e-4, 1), (0.005, 1), (0.03, 1), (0.5, 0.01), (0.5, 0.5))
    ] == ["***", "**", "*", "=", ""]


def test_only_what_was_asked_for_is_written(finished, tmp_path, capsys):
    copy = tmp_path / "out" / finished.name
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("report.html", "figures", "tables"))
    assert report.main([str(tmp_path / "out"), "--format", "png,csv"]) == 0
    assert (
        not (copy / "report.html").exists()
        and not list(copy.glob("figures/*.pdf"))
        and list(copy.glob("figures/*.png"))
    )
    assert (
        report.main([str(tmp_path / "out"), "--format", "docx"]) == 2
        and "unknown --format 'docx'" in capsys.readouterr().err
    )
    assert report.main([str(tmp_path / "nothing")]) == 2 and "holds no results" in capsys.readouterr().err


def test_an_unfinished_run_and_one_with_failures_are_shown_as_they_are(finished, tmp_path):
    copy = tmp_path / "out" / finished.name
    shutil.copytree(
        finished, copy, ignore=shutil.ignore_patterns("results.*", "manifest.json", "report.html")
    )
    for path in [*copy.glob("checkpoints/visual_only_*.json"), copy / "checkpoints" / "text_only_stats.json"]:
        path.unlink()
    (copy / "checkpoints" / "text_only_frequency.json").write_text("{")
    write.write_report(copy, ("html",))
    words = " ".join("".join(Page((copy / "report.html").read_text()).text).split())
    assert (
        "Not finished: " in words
        and "The run has not ended" in words
        and "text_only_frequencyits files cannot be read" in words
    )
    results = load_module.load_results(copy)
    assert (
        rows_module.accuracy_rows(results)[0]["low"] is None
        and accuracy_figures.drop(results) is None
        and accuracy_figures.class_drop(results) is None
    )
    assert len(parts(accuracy_figures.accuracy(results), "interval")) == 0 and not write.is_current(
        finished.parent
    )


def test_the_page_is_refreshed_while_a_run_goes_on(finished, tmp_path):
    store = ResultStore(finished)
    records = {Cell(name, "all_layers"): store.load(f"all_layers_{name}") for name in ("stats", "frequency")}
    header = {
        key: value
        for key, value in load_module.load_results(finished).items()
        if not key.endswith(("_results", "_cells"))
    }
    write.refresh(tmp_path, header, records, {Cell("product_norms", "all_layers"): "lost"}, 18)
    text = (tmp_path / "report.html").read_text()
    assert "Running: 2 of 18 cells were finished at 20" in text and 'http-equiv="refresh"' in text
    assert Page(text).tags.count("tr") == 3 and "lost" in text and not write.is_current(tmp_path)


def test_a_refreshed_page_needs_no_matplotlib(finished, tmp_path):
    program = (
        "import json, sys; from pathlib import Path; from ablation.report import write; from ablation.cells "
        "import Cell\n"
        "record = json.loads(Path(sys.argv[1]).read_text())\n"
        "write.refresh(Path(sys.argv[2]), {}, {Cell('stats', 'all_layers'): record}, {}, 18)\n"
        "assert write.is_current(Path(sys.argv[2])) is False and not {'matplotlib', 'torch', 'datasets', "
        "'scipy'} & set(sys.modules)"
    )
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            str(finished / "checkpoints" / "all_layers_stats.json"),
            str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Running: 1 of 18" in (tmp_path / "report.html").read_text()


def test_several_runs_stand_beside_each_other_and_are_never_averaged(finished, tmp_path, capsys):
    for name, rows, patience in (("results_1k", 1000, 15), ("results_10k", 10_000, 15), ("other", 50_000, 3)):
        shutil.copytree(
            finished, tmp_path / name / finished.name, ignore=shutil.ignore_patterns("figures", "tables")
        )
        path = tmp_path / name / finished.name / "results.json"
        changed = json.loads(path.read_text())
        changed["data"]["rows"], changed["settings"]["training"]["patience"] = rows, patience
        path.write_text(json.dumps(changed))
    assert (
        report.main(
            [str(tmp_path / name) for name in ("results_1k", "results_10k", "other")]
            + ["--output", str(tmp_path / "both")]
        )
        == 0
    )
    page = Page((tmp_path / "both" / "report.html").read_text())
    assert (
        page.tags.count("tr") == 1 + 3 * 3 * (3 + 2 + 4)
        and "other: patience" in page.text
        and page.tags.count("svg") == 3
    )
    with (tmp_path / "both" / "tables" / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["run"], row["rows"], row["group"]) for row in rows} == {
        ("results_1k", "1000", "0"),
        ("results_10k", "10000", "0"),
        ("other", "50000", "1"),
    }
    runs = [
        load_module.load_results(tmp_path / name / finished.name)
        for name in ("results_1k", "results_10k", "other")
    ]
    for results, group in zip(runs, (0, 0, 1), strict=True):
        results["group"] = group
    curves = parts(comparison_figures.scaling(runs), "curve")
    assert {len(curve.get_xdata()) for curve in curves} == {1, 2}
    first = runs[0]["inference"]["accuracies"]["all_layers_stats"]["accuracy"]
    assert curves[0].get_ydata()[0] == pytest.approx(100 * first)
    drops = parts(comparison_figures.scaling_drop(runs), "curve")[0].get_ydata()
    assert drops[0] == pytest.approx(100 * runs[0]["inference"]["comparisons"][0]["entries"][0]["drop"])


def test_scripts_for_the_origins_results_read_ours(finished):
    """The keys of DESIGN 8, as they were."""
    results = json.loads((finished / "results.json").read_text())
    assert {
        "dataset",
        "num_runs",
        "num_classes",
        "num_all_layers",
        "num_visual_layers",
        "num_text_layers",
        "all_layers_results",
        "visual_only_results",
        "label_mapping",
    } <= set(results)
    scores = [
        f"{part}_{score}" for score in ("acc", "f1", "precision", "recall") for part in ("val", "test")
    ] + ["train_acc"]
    record = results["visual_only_results"][0]
    assert record["representation"] == "stats_visual_only" and [
        row["representation"] for row in results["all_layers_results"]
    ] == ["stats_all_layers", "frequency_all_layers", "product_norms_all_layers"]
    for key in [
        f"{name}_{how}" for name in (*scores, "training_time", "best_epoch") for how in ("mean", "std")
    ]:
        assert isinstance(record[key], float), key
    assert isinstance(record["training_time_total"], float) and {"num_layers", "feature_dim"} <= set(record)
    assert [run["run"] for run in record["per_run_results"]] == [1, 2, 3]
    assert {"run", *scores, "training_time", "best_epoch", "feature_dim"} <= set(record["per_run_results"][0])
    assert {"val_acc_history", "train_loss_history", "best_epoch"} <= set(record["learning_curves"][0])
    assert (
        np.array(record["val_confusion_matrices"]).shape
        == np.array(record["test_confusion_matrices"]).shape
        == (3, 3, 3)
    )
    assert all(len(record[f"{part}_acc_all_runs"]) == 3 for part in ("train", "val", "test"))
    assert (
        json.loads((finished / "checkpoints" / "visual_only_stats.json").read_text())["test_acc_all_runs"]
        == record["test_acc_all_runs"]
    )


def test_the_full_report_of_18_cells_has_its_sections_and_files(results):
    grown = large(results, NINE, 10)
    for layer_set in LAYER_SETS[:2]:
        for row in grown[f"{layer_set}_results"]:
            row["learning_curves"] = [
                {"val_acc_history": [0.5] * 40, "train_loss_history": [1.0] * 40, "best_epoch": 25}
            ] * 10
    del grown["text_only_results"]
    sections, files = write.draw_all(figures.FIGURES, grown, write.FORMATS)
    names = [section["name"] for section in sections]
    assert names[:5] == ["accuracy", "drop", "class_drop", "learning_curves", "confusion"] and len(names) >= 8
    for name in names:
        assert files[f"figures/{name}.png"].startswith(b"\x89PNG") and files[
            f"figures/{name}.pdf"
        ].startswith(b"%PDF")
    assert "retention" not in names and "tables/retention.csv" in files  # one column is no figure


@pytest.mark.slow
def test_what_other_settings_left_in_the_folder_stays_out_and_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"accuracy": figures.FIGURES["accuracy"]})  # the others take long
    lora_dataset(n=40, signal=1.0).save_to_disk(tmp_path / "loras")
    fixed = [
        "--dataset",
        str(tmp_path / "loras"),
        "--output-dir",
        str(tmp_path / "out"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--num-runs",
        "3",
        "--max-epochs",
        "2",
        "--hidden-dim",
        "8",
        "--layer-sets",
        "all_layers",
    ]
    folder = tmp_path / "out" / "visual_ablation_loras"
    assert experiment.main([*fixed, "--representations", "stats"]) == 0
    assert experiment.main([*fixed, "--representations", "frequency", "--dropout", "0.1"]) == 0
    results = load_module.load_results(folder)
    assert [row["representation"] for row in results["all_layers_results"]] == ["frequency_all_layers"]
    assert not results["verdict"].startswith("Not finished") and results["failed_cells"] == [
        {"cell": "all_layers_stats", "error": "finished with other settings, and not among these results"}
    ]
    assert write.is_current(folder)
    (folder / "figures" / "accuracy.png").write_bytes(b"older")
    assert not write.is_current(folder)
    write.write_report(folder)
    assert write.is_current(folder)
    write.write_report(folder, ("html",))
    assert not write.is_current(folder)
    assert experiment.main(
        [*fixed, "--representations", "frequency", "--dropout", "0.1"]
    ) == 0 and write.is_current(folder)
    (folder / "results.json").write_text((folder / "results.json").read_text() + " ")
    assert not write.is_current(folder)


def test_names_from_data_are_text_and_stay_apart(results):
    assert rows_module.shortened(["a class with number 1", "a class with number 2"]) == [
        "a class w…h number 1",
        "a class w…h number 2",
    ]
    long = [f"{i:03} is one of very many {i % 2}" for i in range(0, 100, 7)] + [
        "x" * 30,
        "x" * 15 + "y" + "x" * 14,
    ]
    assert len(set(rows_module.shortened(long))) == 17 and max(map(len, rows_module.shortened(long))) == 20
    odd = {"$x_{$": 0, r"$\\frac$": 1, "<b>": 2}
    grown = results | {"label_mapping": odd}
    for draw in (accuracy_figures.class_drop, training_figures.confusion):
        canvas = FigureCanvasAgg(draw(grown))
        canvas.draw()
    only_halves = {key: value for key, value in results.items() if not key.endswith("_results")} | {
        "random_half.0_results": results["random_half.0_results"],
        "inference": results["inference"] | {"comparisons": [], "classes": []},
    }
    assert [name for name, draw in DRAWS.items() if draw(only_halves) is not None] == [
        "accuracy",
        "controls",
        "audits",
    ]
    nothing = {key: value for key, value in results.items() if not key.endswith("_results")} | {
        "inference": {},
        "audits": [],
        "further_cells": [],
    }
    only_blocks = nothing | {key: rows for key, rows in results.items() if key.startswith("by_block.")}
    assert [name for name, draw in DRAWS.items() if draw(only_blocks) is not None] == ["blocks"]
    assert (
        tables.summary_rows(only_blocks) == (["representation", "drop"], [])
        and len(tables.cell_rows(only_blocks)) == 3 * 4
    )
    only_text = nothing | {"text_only_results": results["text_only_results"][:1]}
    assert [name for name, draw in DRAWS.items() if draw(only_text) is not None] == [
        "accuracy",
        "learning_curves",
        "confusion",
        "gaps",
        "precision_recall",
        "cost",
    ]


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the page is not opened in a browser"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not opened in a browser")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, finished):
    page, problems = browser.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: problems.append(request.url) if not request.url.startswith("file:") else None,
    )
    page.goto((finished / "report.html").as_uri())
    yield page
    assert problems == []
    page.close()


def test_the_table_sorts_on_click(opened):
    table = opened.locator("#cells table")
    column = table.locator("tbody tr td:nth-child(3)")
    before = column.all_text_contents()
    table.get_by_role("button", name="test, %").click()
    assert list(map(float, column.all_text_contents())) == sorted(map(float, before), reverse=True)
    table.get_by_role("button", name="test, %").click()
    assert list(map(float, column.all_text_contents())) == sorted(map(float, before))
    table.get_by_role("button", name="representation").click()
    names = table.locator("tbody tr td:nth-child(1)").all_text_contents()
    assert names == sorted(names) and table.locator("th[aria-sort]").count() == 1


@pytest.mark.parametrize("width", [375, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(opened, width, scheme):
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        opened.evaluate(f"getComputedStyle(document.body).{which}") for which in ("color", "backgroundColor")
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert light[0] < light[1] if scheme == "light" else light[0] > light[1]
    assert opened.evaluate("getComputedStyle(document.querySelector('figure svg')).color") == ink


def test_the_page_prints(opened):
    printed = opened.pdf(format="A4")
    assert (
        printed[:4] == b"%PDF" and 3 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 40
    )
