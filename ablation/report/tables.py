"""Tables of a report: CSV, LaTeX, Markdown, and those of the page."""

from __future__ import annotations

import csv
from types import SimpleNamespace
from typing import Any, NamedTuple

from ablation.catalogue import MAIN_COMPARISON, group_of, title_of
from ablation.cells import Cell
from ablation.report.rows import (
    Results,
    Rows,
    accuracy_of,
    accuracy_rows,
    layer_sets,
    main_comparison,
    null_rows,
    representations,
)

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
}
FORMULA_SIGNS = ("=", "+", "-", "@")
MARKDOWN = {sign: f"\\{sign}" for sign in "\\|*`<["}
RUNS_NOTE = "± runs is the std over seeds: training noise, not the uncertainty of the accuracy."


# --- rows


def cell_rows(results: Results) -> Rows:
    """Every finished cell of the table, with all digits.

    Accuracy, interval and drop are over all splits, everything else is of the first split.
    """
    inference = results.get("inference") or {}
    drops = {entry["representation"]: entry for entry in main_comparison(results)}
    rows = []
    for key in (key for key in results if key.endswith("_results")):
        layer_set = key.removesuffix("_results")
        for record in results[key]:
            name = record["representation"].removesuffix(f"_{layer_set}")
            low, high = interval_of(inference, f"{layer_set}_{name}")
            drop = drops.get(name, {}) if layer_set == MAIN_COMPARISON.second else {}
            rows.append(
                {
                    "representation": name,
                    "layer_set": layer_set,
                    "test_acc": accuracy_of(results, layer_set, name),
                    "low": low,
                    "high": high,
                    "drop": drop.get("drop"),
                    "p_max_t": drop.get("p_max_t"),
                    "std_over_runs": record["test_acc_std"],
                    "val_acc": record["val_acc_mean"],
                    "train_acc": record["train_acc_mean"],
                    "test_f1": record["test_f1_mean"],
                    "feature_dim": record["feature_dim"],
                    "best_epoch": record["best_epoch_mean"],
                    "seconds_a_run": record["training_time_mean"],
                }
            )
    return rows


def further_rows(results: Results) -> Rows:
    """Every finished cell beside the table: of other splits, by other classifiers, controls."""
    inference = results.get("inference") or {}
    shuffled = (inference.get("shuffled") or {}).get("cells", {})
    rows = []
    for record in results.get("further_cells", []):
        low, high = interval_of(inference, record["cell"])
        rows.append(
            {
                "cell": record["cell"],
                "test_acc": record["test_acc_mean"],
                "low": low,
                "high": high,
                "std_over_runs": record["test_acc_std"],
                "val_acc": record["val_acc_mean"],
                "train_acc": record["train_acc_mean"],
                "expected": shuffled.get(record["cell"], {}).get("expected"),
                "columns": record["feature_dim"],
            }
        )
    return rows


def interval_of(inference: Results, cell: str) -> tuple[float | None, float | None]:
    """The interval of a cell's accuracy; (None, None) where there is no inference."""
    entry = inference.get("accuracies", {}).get(cell)
    return tuple(entry["interval"]) if entry else (None, None)


def joint_rows(runs: list[Results]) -> Rows:
    """The cells of several runs, each line with its run and rows."""
    return [
        {"run": results["name"], "rows": results["data"].get("rows"), **row}
        for results in runs
        for row in cell_rows(results)
    ]


def csv_table(rows: Rows) -> bytes:
    """Rows with full precision and whole names; an empty field where there is no value."""
    lines: list[str] = []
    # The writer quotes the characters that end its lines, so that a name may hold any line break.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerow(rows[0])
    writer.writerows(map(csv_field, row.values()) for row in rows)
    text = "".join(f"{line[:-2]}\n" for line in lines)
    return text.encode(errors="backslashreplace")


def csv_field(value: Any) -> Any:
    """A value for CSV. Text that a spreadsheet would take for a formula gets an apostrophe before it, and
    NUL, at which readers stop, is escaped.
    """
    if not isinstance(value, str):
        return value
    is_formula = value.lstrip().startswith(FORMULA_SIGNS) or value.lstrip(" ").startswith(("\t", "\r"))
    return "'" * is_formula + value.replace("\0", "\\x00")


# --- the tables of the page


class PageColumn(NamedTuple):
    """A column of a page's table. Numbers have `digits` after multiplication by `factor`; None means text."""

    heading: str
    digits: int | None = None
    factor: float = 100
    is_signed: bool = False


PAGE_COLUMNS = {
    "run": PageColumn("run"),
    "rows": PageColumn("LoRAs", 0, 1),
    "representation": PageColumn("representation"),
    "layer_set": PageColumn("layer set"),
    "cell": PageColumn("cell"),
    "test_acc": PageColumn("test, %", 1),
    "interval": PageColumn("95 % interval", 1),
    "drop": PageColumn("drop, points", 1, is_signed=True),
    "p_max_t": PageColumn("p (max-T)", 4, 1),
    "std_over_runs": PageColumn("± runs", 1),
    "val_acc": PageColumn("val (selected on), %", 1),
    "train_acc": PageColumn("train, %", 1),
    "test_f1": PageColumn("macro F1, %", 1),
    "feature_dim": PageColumn("columns", 0, 1),
    "columns": PageColumn("columns", 0, 1),
    "best_epoch": PageColumn("best epoch", 0, 1),
    "seconds_a_run": PageColumn("s a run", 2, 1),
    "expected": PageColumn("due by chance, %", 1),
    "all_layers": PageColumn("all layers, %", 1),
    "visual_only": PageColumn("visual, %", 1),
    "text_only": PageColumn("text, %", 1),
    "random_half": PageColumn("random halves, %", 1),
    "place": PageColumn("place of visual", 0, 1),
    "p_lower": PageColumn("p (lower)", 3, 1),
    "p_two_sided": PageColumn("p (both sides)", 3, 1),
    "place_of_text": PageColumn("place of text", 0, 1),
    "text_minus_visual": PageColumn("text - visual, points", 1, is_signed=True),
}


def number_cell(value: float | None, column: PageColumn) -> dict[str, Any]:
    """A number of a page's table, with the value that it is sorted by."""
    if value is None:
        return {"shown": "–", "value": "", "text": False}
    sign = "+" if column.is_signed else ""
    shown = f"{column.factor * value:{sign}.{column.digits}f}"
    return {"shown": shown, "value": repr(float(value)), "text": False}


def text_cell(name: str, value: str) -> dict[str, Any]:
    """A text of a page's table; names of cells are written as people say them."""
    cell = Cell.named(value) if name == "cell" else None
    return {"shown": cell.spoken if cell else value, "value": value, "text": True}


def interval_cell(low: float | None, high: float | None) -> dict[str, Any]:
    """An interval in percent, sorted by its width."""
    if low is None or high is None:
        return {"shown": "–", "value": "", "text": False}
    shown = f"{100 * low:.1f} – {100 * high:.1f}"
    return {"shown": shown, "value": repr(high - low), "text": False}


def page_table(name: str, title: str, note: str, rows: Rows) -> dict[str, Any]:
    """Rows as the page shows and sorts them; `low` and `high` become one column."""
    names = ["interval" if column == "low" else column for column in rows[0] if column != "high"]

    def cell(row: dict[str, Any], column: str) -> dict[str, Any]:
        if column == "interval":
            return interval_cell(row["low"], row["high"])
        if PAGE_COLUMNS[column].digits is None:
            return text_cell(column, row[column])
        return number_cell(row[column], PAGE_COLUMNS[column])

    heads = [
        {"title": PAGE_COLUMNS[column].heading, "text": PAGE_COLUMNS[column].digits is None}
        for column in names
    ]
    lines = [[cell(row, column) for column in names] for row in rows]
    return {"name": name, "title": title, "note": note, "columns": heads, "rows": lines}


def page_tables(results: Results) -> list[dict[str, Any]]:
    """The page's table of cells, and that of the cells beside it."""
    splits = (results.get("inference") or {}).get("splits", 1)
    note = RUNS_NOTE
    if splits > 1:
        note += f" Accuracy, interval and drop are over {splits} splits, all else is of the first."
    tables = []
    rows, further, null = cell_rows(results), further_rows(results), null_rows(results)
    if rows:
        tables.append(page_table("cells", "The table", note, rows))
    if null:
        places = 1 + len(results["inference"]["null"]["mean"]["halves"])
        beside = (
            f"Read by {results['inference']['null']['reader']}. Places are among the visual half and random "
            f"halves, 1 of {places} is the lowest; p one at a time; the interval is of text - visual."
        )
        tables.append(page_table("null", "Beside random halves", beside, null))
    if further:
        beside = "Other splits, other classifiers and controls, each cell by itself."
        tables.append(page_table("further", "Beside the table", beside, further))
    return tables


# --- for a paper


def summary_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each representation:
    accuracy ± half of its 95 % interval by layer set, and the drop.
    """
    sets = [name for name in layer_sets(results) if not group_of(name)]
    accuracies = {(row["representation"], row["layer_set"]): row for row in accuracy_rows(results)}
    drops = {entry["representation"]: entry for entry in main_comparison(results)}
    lines = []
    for name in representations(results):
        line = [name]
        for layer_set in sets:
            row = accuracies.get((name, layer_set))
            line.append("–" if row is None else f"{100 * row['accuracy']:.1f}{half_interval(row)}")
        entry = drops.get(name)
        drop = "–" if entry is None else f"{100 * entry['drop']:+.1f}{stars(entry)}"
        lines.append([*line, drop])
    return ["representation", *(title_of(name) for name in sets), "drop"], lines


def half_interval(row: dict[str, Any]) -> str:
    """± half of an interval; both ends if it ends at 0 or 100 % and so is not symmetric."""
    if row["low"] is None:
        return ""
    if row["low"] <= 0 or row["high"] >= 1:
        return f" ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return f" ± {50 * (row['high'] - row['low']):.1f}"


def stars(entry: dict[str, Any]) -> str:
    """Marks of the adjusted p-value; = where the two are shown to be equal to within the margin."""
    p = entry["p_max_t"]
    for limit, mark in ((0.001, "***"), (0.01, "**"), (0.05, "*")):
        if p < limit:
            return mark
    return "=" if entry["p_equivalence_max_t"] < 0.05 else ""


def caption(results: Results) -> str:
    """The meaning of the signs that the table has."""
    words = "Test accuracy in percent"
    if any(row["low"] is not None for row in accuracy_rows(results)):
        words += (
            " ± half of its 95 % interval for new examples and runs, or both ends where it meets 0 or 100"
        )
    entries = main_comparison(results)
    if entries:
        margin = 100 * entries[0]["margin"]
        words += (
            "; drop: all layers minus visual only, points; * p < 0.05, ** p < 0.01, *** p < 0.001, corrected "
            f"for all (max-T); = equal to within {margin:g} points (two one-sided tests, p < 0.05)"
        )
    return words + "."


def latex_escaped(text: str) -> str:
    """Text for LaTeX."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex_table(results: Results) -> str:
    r"""A table for \usepackage{booktabs}."""
    header, lines = summary_rows(results)
    body = [" & ".join(map(latex_escaped, line)) + r" \\" for line in [header, *lines]]
    parts = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_escaped(caption(results))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]
    return "\n".join(parts)


def markdown_escaped(text: str) -> str:
    """Text for Markdown, as far as it could end a cell, or be taken for emphasis, a link or HTML."""
    return "".join(MARKDOWN.get(letter, letter) for letter in text)


def markdown_table(results: Results) -> str:
    """The same as a Markdown table, with the verdict below it."""
    header, lines = summary_rows(results)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    rows = [[*map(markdown_escaped, header)], rule, *([*map(markdown_escaped, line)] for line in lines)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    explained = caption(results).replace("*", "\\*")
    return f"{table}\n\n{explained}\n\n{results['verdict']}\n"
