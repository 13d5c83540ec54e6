"""Text from data that attacks the place where it is shown: formulas, control characters, marks of direction,
mathtext, very long names; and a results.json that is damaged.
"""

import csv
import io
import json
import os
import re
import unicodedata
from xml.etree import ElementTree

import inspect_dataset
import numpy as np
import pytest
import report
from builders import scored_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_inspect_dataset import look

from ablation.cells import Cell
from ablation.collection import View
from ablation.inspection.text import print_report
from ablation.log import LINE_LENGTH, visible
from ablation.report import accuracy_figures, figures, style, tables, training_figures, write
from ablation.report.page import render_page
from ablation.results import collect
from ablation.results_text import results_text
from ablation.scores import cell_record
from ablation.splits import Split
from ablation.text_table import NAME_LENGTH, TEXT_LENGTH, shortened, showable
from checkpointing import with_checksum

FORMULAS = ("=1+1", "  -2+3", "\t=cmd", "\r4", "+5", "@SUM(A1)")
UNSEEN = ("nul \0", "a\u202eb", "half \ud800", "\x1b[31mred", "line\nbreak | c")
MARKUP = ("$\\frac", "a$b$", "<script>&\"'", '#1b1e23 id="x"', "url(#y) --> ]]>", "{{ 1 }} \\input{x} %")
LONG = ("x" * 60_000 + "1" + "y" * 60_000, "x" * 60_000 + "2" + "y" * 60_000)
NAMES = (*FORMULAS, *UNSEEN, *MARKUP, "é ж 😀", *LONG)
ESCAPED = ("\\x00", "\\u202e", "\\ud800", "\\x1b", "\\n")


def is_clean(text):
    """True if every character but line breaks and tabs can be seen, and so be encoded."""
    return all(c in "\n\t" or unicodedata.category(c)[0] != "C" for c in text)


def class_record(cell):
    """The record of a cell whose first two classes have rows."""
    runs, labels = scored_runs([0.9, 0.8])
    for run in runs.runs:
        run.train_loss, run.val_accuracy, run.learning_rate = [1.0] * 3, [0.5] * 3, [0.1] * 3
    rows = np.arange(40)
    view = View(labels["train"], Split(rows, rows, rows, False))
    record = cell_record(cell, runs, view, len(NAMES), {"num_layers": 8, "feature_dim": 40})
    return record | {"cell": cell.name}


def hostile_results(names=NAMES):
    """The content of a results.json whose every text from data is hostile."""
    cells = [Cell("stats", "all_layers"), Cell("stats", "visual_only")]
    header = {
        "dataset": f"./data \u202e\0 <b>$\\frac$ {LONG[0]}",
        "num_runs": 2,
        "num_classes": len(names),
        "num_all_layers": 8,
        "num_visual_layers": 4,
        "num_text_layers": 4,
        "label_mapping": {name: number for number, name in enumerate(names)},
        "splits_overlap": False,
        "settings": {},
        "data": {
            "rows": 120,
            "identity": "0",
            "weights_per_row": 100,
            "split": {"train": 40, "val": 40, "test": 40},
            "rows_per_class": dict.fromkeys(names, 6),
        },
        "inference": {},
        "verdict": "No verdict \x1b.",
    }
    failed = {Cell("stats", "text_only"): f"ValueError: '\0 \u202e <i>' in\n{LONG[0]}"}
    skipped = {Cell("cnn_down", "all_layers"): "because of\n'\ud800 $\\frac'"}
    return collect({cell: class_record(cell) for cell in cells}, failed, skipped, header)


def with_classes(results):
    """The results with an inference that has every class."""
    entries = [
        {
            "representation": "stats",
            "class": number,
            "rows": 6,
            "first": 0.5,
            "second": 0.4,
            "drop": -0.1,
            "interval": [-0.2, 0.3],
        }
        for number in range(len(results["label_mapping"]))
    ]
    return results | {"inference": {"classes": entries, "chance": 0.1}}


def saved(folder, content):
    """An output folder without checkpoints whose results.json has this content: an object, or bytes."""
    (folder / "checkpoints").mkdir(parents=True)
    if not isinstance(content, bytes):
        content = json.dumps(with_checksum(content)).encode()
    (folder / "results.json").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder with the whole report of hostile results."""
    folder = saved(tmp_path_factory.mktemp("hostile") / "out", with_classes(hostile_results()))
    manifest = {
        "command": "run --dataset '\u202e\0<b>'",
        "started": "",
        "settings": {"dataset": "\x1b"},
        "seconds": {"load": 1.0},
        "machine": {"gpu": "\x07"},
        "versions": {"torch": "\0"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "RESOLUTION", 40)
        write.write_report(folder)
    return folder


# --- CSV


def table_of(folder, name):
    with open(folder / "tables" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def test_csv_has_every_name_in_full_and_no_formula(reported):
    names = [row["class"] for row in table_of(reported, "class_drop")]
    assert len(names) == len(NAMES)
    for name, written in zip(NAMES, names, strict=True):
        assert written.startswith("'") == (name in FORMULAS)
        assert written.removeprefix("'") == name.replace("\0", "\\x00").replace("\ud800", "\\ud800")
    assert {row["true"] for row in table_of(reported, "confusion")} == {f"'{name}" for name in NAMES[:2]}
    content = (reported / "tables" / "class_drop.csv").read_bytes()
    assert b"\0" not in content and content.count(LONG[0].encode()) == 1


def test_numbers_of_csv_stay_numbers(reported):
    rows = table_of(reported, "class_drop")
    assert {(row["drop"], row["low"], row["test_rows"]) for row in rows} == {("-0.1", "-0.2", "6")}
    written = tables.csv_table([{"a": -1, "b": -0.5, "c": None, "d": "-1", "e": " \t", "f": "a\rb", "g": ""}])
    assert written == b"a,b,c,d,e,f,g\n-1,-0.5,,'-1,' \t,\"a\rb\",\n"
    assert next(csv.DictReader(io.StringIO(written.decode(), newline="")))["f"] == "a\rb"


# --- the page, LaTeX, Markdown


def svgs_of(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", page, flags=re.S)]


def test_the_page_shows_what_cannot_be_seen_as_its_code(reported):
    content = (reported / "report.html").read_bytes()
    page = content.decode()
    assert is_clean(page) and all(code in page for code in ESCAPED)
    assert "<script>&" not in page and "<b>" not in page and "<i>" not in page
    assert len(page) < 1_000_000 and "x" * (TEXT_LENGTH + 1) not in page
    data = re.search(r"<dt>LoRAs a class</dt><dd>(.*?)</dd>", page, re.S)[1]
    assert f"({len(NAMES) - 2}) 6" in data and f"({len(NAMES) - 1}) 6" in data
    assert "…" in data and len(data) < 3 * NAME_LENGTH + 1000
    manifest = page.partition('<section id="manifest">')[2]
    assert "run --dataset &#39;\\u202e\\x00&lt;b&gt;&#39;" in manifest and "gpu \\x07" in manifest


def test_no_text_enters_the_page_with_unseen_characters(tmp_path):
    block = {"name": "x", "title": "a\0", "text": "b\u202e\nc\td", "entries": [("\x1b", "\ud800")]}
    page = render_page([{"name": "n", "verdict": "v\x07"}], "t\0", [], [], [block]).decode()
    assert is_clean(page) and all(code in page for code in ("a\\x00", "b\\u202e\nc\td", "\\ud800", "v\\x07"))
    manifest = {"settings": {}, "seconds": {}, "machine": {}, "versions": {}, "started": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"command": "a\n" + LONG[0]}))
    entries = dict(write.manifest_block(tmp_path)["entries"])
    assert entries["command"].startswith("a\\nxx") and len(entries["command"]) == TEXT_LENGTH


def test_the_svg_of_the_page_is_xml_whose_labels_are_the_names(reported):
    images = svgs_of((reported / "report.html").read_text())
    assert len(images) >= 6
    labels = {text for image in images for text in image.itertext() if text.strip()}
    for name in ("$\\frac", "a$b$", "<script>&\"'", "nul \\x00", "a\\u202eb", "half \\ud800", "+5"):
        assert name in labels, name
    assert {'#1b1e23 id="x"', "url(#y) --> ]]>", "é ж 😀"} <= labels  # in no own colour
    long = [label for label in labels if label.startswith("xxxxxx")]
    assert any("(18)" in label for label in long) and any("(19)" in label for label in long)
    assert max(map(len, long)) <= style.CLASS_LENGTH


def test_figures_are_files_and_draw_mathtext_literally(reported):
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        for name in ("class_drop", "confusion", "accuracy"):
            assert (reported / "figures" / f"{name}.{kind}").read_bytes().startswith(start)
    results = with_classes(hostile_results())  # as they are, and outside of the style
    for draw in (accuracy_figures.class_drop, training_figures.confusion):
        canvas = FigureCanvasAgg(draw(results))
        canvas.draw()
        labels = canvas.figure.axes[0].get_yticklabels()
        shown = [label.get_text() for label in labels]
        assert len(set(shown)) == len(NAMES) and all(map(is_clean, shown)) and "a$b$" in shown
        assert not any(label.get_parse_math() for label in labels if "$" in label.get_text())


def test_latex_and_markdown_tables_are_lines_of_seen_characters(reported):
    latex, markdown = ((reported / "tables" / f"results.{kind}").read_text() for kind in ("tex", "md"))
    assert is_clean(latex) and is_clean(markdown) and "No verdict \\x1b." in markdown
    odd = showable(
        hostile_results() | {"we|rd*\n\u202e$<b>_results": [class_record(Cell("stats", "all_layers"))]}
    )
    for made, sign in (
        (tables.latex_table(odd), "\\textbackslash{}u202e\\$$<$b$>$"),
        (tables.markdown_table(odd), "\\|rd"),
    ):
        assert is_clean(made) and sign in made.replace("\\textbackslash{}n", "").replace("We", "we"), made
    lines = tables.markdown_table(odd).splitlines()
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(cells) == 1 and "\\<b>" in lines[0]


def test_a_comparison_is_of_folders_with_any_name(tmp_path):
    folders = []
    for name in ("\u202e$\\frac <b>|", "two"):
        content = hostile_results() | {"dataset": name}
        folders.append(saved(tmp_path / name / "visual_ablation_x", content))
    write.write_comparison(folders, tmp_path / "both", ("html", "markdown", "csv"))
    page, markdown = ((tmp_path / "both" / name).read_text() for name in ("report.html", "tables/results.md"))
    assert is_clean(page) and is_clean(markdown) and svgs_of(page)
    assert "### \\\\u202e$\\\\frac \\<b>\\|" in markdown.splitlines()
    assert {row["run"] for row in table_of(tmp_path / "both", "cells")} == {"\u202e$\\frac <b>|", "two"}


# --- text


def test_results_txt_has_one_line_where_it_had_one(capsys):
    text, plain = results_text(hostile_results()), results_text(hostile_results() | {"dataset": "x"})
    assert is_clean(text) and "…" in text and len(text) < 5 * TEXT_LENGTH
    assert len(text.splitlines()) == len(plain.splitlines()) == text.count("\n")
    (failure,) = [line for line in text.splitlines() if "FAILED: ValueError" in line]
    assert "'\\x00 \\u202e <i>' in\\nxxx" in failure and failure.endswith("yyy")
    assert "Skipped: all_layers_cnn_down, because of\\n'\\ud800 $\\frac'" in text


def test_the_text_of_a_data_set_shows_its_hostile_classes(capsys):
    found = look({name: w[:20] for name, w in columns().items()}, [0] * 10 + [1] * 10)
    found["classes"]["rows"] = dict.fromkeys(NAMES, 1)
    found["dataset"] = "a\0\u202e\nb"
    print_report(found)
    text = capsys.readouterr().out
    assert is_clean(text) and all(code in text for code in ESCAPED) and "a\\x00\\u202e\\nb: 20 rows" in text
    assert "(18) 1" in text and "(19) 1" in text and len(text) < 10_000


def columns():
    """The smallest collection that can be inspected."""
    rng = np.random.default_rng(0)
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    shapes = {"down": (2, 6), "up": (6, 2)}
    return {
        f"{module}.{side}.weight": rng.normal(size=(20, *shape)).astype(np.float32)
        for side, shape in shapes.items()
    }


def test_errors_of_the_commands_are_one_line_of_seen_characters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (report, inspect_dataset):
        assert command.main(["./no\u202e\nsuch\x1b"]) == 2
        said = capsys.readouterr().err
        assert is_clean(said) and said.count("\n") == 1 and "no\\u202e\\nsuch\\x1b" in said


def test_report_prints_the_paths_of_a_hostile_folder(tmp_path, capsys):
    folder = saved(tmp_path / "a\x1b\n\u202eb", hostile_results())
    assert report.main([str(folder), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert out == f"{tmp_path}/a\\x1b\\n\\u202eb/tables/results.md\n"


def test_the_length_of_text_that_is_shown():
    assert visible("a\tb\nc\0") == "a\tb\nc\\x00" and visible("a\tb\nc\0", 50) == "a\\tb\\nc\\x00"
    assert visible("ab" * 50, 20) == "ababababa…babababab" + "b" or len(visible("ab" * 50, 20)) == 20
    log = visible(f"first\n{LONG[0]}\nlast").split("\n")
    assert [len(line) for line in log] == [5, LINE_LENGTH, 4]
    assert visible("x" * NAME_LENGTH, NAME_LENGTH) == "x" * NAME_LENGTH
    ordinary = {"stats_all_layers": {"cat": 1, "dog, é": [0.5, -1]}, "why": ["a b", None, {"c": (1, 2)}]}
    assert showable(ordinary) == ordinary and list(showable(ordinary)) == list(ordinary)


def test_names_stay_apart_however_they_are_shortened():
    for names in (
        LONG,
        ["a\0", "a\\x00", "a"],
        ["a\0", "a\\x00", "a\\x00 (0)"],
        [f"{'x' * 300}{i}{'y' * 300}" for i in range(2000)],
    ):
        for length in (12, 20, NAME_LENGTH):
            short = shortened(list(names), length)
            assert len(set(short)) == len(names) and max(map(len, short)) <= length
            assert all(map(is_clean, short))
    assert len(showable(dict.fromkeys(["a\0", "a\\x00"], 1))) == 2
    assert "(1)" in shortened(list(LONG))[1]


# --- a damaged results.json

WHOLE = json.dumps(hostile_results())
SHAPES = {
    "a list": b"[1, 2]",
    "null": b"null",
    "cut off": WHOLE[: len(WHOLE) // 2].encode(),
    "empty": b"",
    "no UTF-8": b'{"dataset": "\xff"}',
    "NaN": b'{"dataset": NaN}',
    "nested deeply": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep list": b'{"failed_cells": ' + b"[" * 400 + b"]" * 400 + b', "dataset": "x"}',
    "another hash": json.dumps(json.loads(WHOLE) | {"data": 5, "checksum": "0"}).encode(),
    "nothing of ours": b'{"a": 1}',
    "records that are numbers": json.dumps(json.loads(WHOLE) | {"all_layers_results": [1]}).encode(),
    "records that are no list": json.dumps(json.loads(WHOLE) | {"all_layers_results": 5}).encode(),
    "records without scores": json.dumps(
        json.loads(WHOLE) | {"all_layers_results": [{"cell": "a"}]}
    ).encode(),
    "failures that are text": json.dumps(json.loads(WHOLE) | {"failed_cells": "ab"}).encode(),
    "data that is a list": json.dumps(json.loads(WHOLE) | {"data": [1]}).encode(),
    "inference that is text": json.dumps(json.loads(WHOLE) | {"inference": "a"}).encode(),
    "fewer classes": json.dumps(json.loads(WHOLE) | {"label_mapping": {}}).encode(),
    "a verdict that is a list": json.dumps(json.loads(WHOLE) | {"verdict_parts": [1]}).encode(),
}


@pytest.mark.parametrize("content", SHAPES.values(), ids=SHAPES)
def test_a_damaged_results_json_is_refused_in_one_line(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FIGURES", {"confusion": figures.FIGURES["confusion"]})
    monkeypatch.setattr(write, "cores", lambda: 2)  # errors of a drawing come from its process
    refused(saved(tmp_path / "out", content), capsys)


def refused(folder, capsys):
    """`scripts/report.py` names the file and the remedy, and writes nothing."""
    before = sorted(folder.rglob("*"))
    assert report.main([str(folder), "--format", "html,csv"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 1000
    assert f"error: '{folder / 'results.json'}' " in said.err and "rerun the experiment's command" in said.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_place_of_results_json_is_refused(make, tmp_path, capsys):
    folder = saved(tmp_path / "out", b"")
    (folder / "results.json").unlink()
    make(folder / "results.json")
    refused(folder, capsys)
    assert not write.is_current(folder)


def test_one_damaged_folder_of_several_is_named(tmp_path, capsys):
    good, bad = (
        saved(tmp_path / "good", hostile_results()),
        saved(tmp_path / "bad", SHAPES["data that is a list"]),
    )
    assert report.main([str(good), str(bad), "--output", str(tmp_path / "both")]) == 2
    said = capsys.readouterr().err
    assert f"'{bad}/results.json'" in said and str(good) not in said and not (tmp_path / "both").exists()


def test_an_error_of_the_program_is_not_blamed_on_whole_results(tmp_path, monkeypatch):
    folder = saved(tmp_path / "out", hostile_results())
    monkeypatch.setattr(write, "page_tables", lambda results: {}["a mistake"])
    monkeypatch.setattr(write, "draw_all", lambda *arguments: ([], {}))
    with pytest.raises(KeyError, match="a mistake"):
        report.main([str(folder), "--format", "html"])


def test_a_damaged_manifest_costs_its_block_alone(tmp_path):
    folder = saved(tmp_path / "out", hostile_results())
    for content in (b"[]", b"{}", b'{"settings": 1}', b"{", b"[" * 100_000):
        (folder / "manifest.json").write_bytes(content)
        assert "damaged" in write.manifest_block(folder)["text"]
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "damaged" in write.manifest_block(folder)["text"]


def test_a_place_that_takes_no_report_is_said_in_one_line(tmp_path, capsys):
    folder = saved(tmp_path / "out", json.loads(WHOLE))
    (folder / "tables").write_text("")
    assert report.main([str(folder), "--format", "csv"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write ") and "tables" in said and said.count("\n") == 1
