"""The report of a collection as text, and its findings: what a reader should not miss."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from ablation.inspection.columns import REDUNDANCIES
from ablation.text_table import showable

COPY = 0.99  # cosine of the most alike rows from which one counts as nearly a copy of the other
LINE_WIDTH = 150  # columns at most
MAX_CLASSES = 20  # shown by name

Report = dict[str, Any]


# --- findings


def findings(report: Report) -> list[str]:
    """Sentences about what could mislead."""
    return [
        *row_findings(report),
        *factor_findings(report),
        *group_findings(report["groups"]),
        *class_findings(report["classes"]),
        *column_findings(report["representations"]),
    ]


def row_findings(report: Report) -> list[str]:
    """Too few rows, equal rows, untrained modules."""
    sentences = []
    same = report["duplicate_rows"]
    if report["split_overlaps"]:
        sentences.append("ten rows or fewer: train, validation and test are the same rows")
    if same["sets"]:
        sentences.append(
            f"{same['too_many']} rows are copies of others; {same['sets_on_both_sides']} sets of equal rows "
            f"lie on both sides of the split, {same['sets_of_several_classes']} have several labels"
        )
    zeros = report["zero_matrices"].get("up")
    if zeros:
        sentences.append(f"{zeros} `up` matrices are zero: those modules were not trained")
    return sentences


def factor_findings(report: Report) -> list[str]:
    """What `down` and `up` alone tell, and whether `down` is more than its initialisation."""
    sentences = []
    down, signal = report["initialisation"], report["class_signal"]
    if down:
        rows = down["between_rows"]
        is_initial = down["std_is_that_of"] and not down["rows_are_correlated"]
        if is_initial and not signal["down"]["significant"]:
            sentences.append(
                f"`down` looks like its {down['std_is_that_of']} initialisation and nothing else: its std is "
                "the initialisation's, rows are uncorrelated, no class signal; what was learnt is in `up`, "
                "or in the product up @ down"
            )
        if down["rows_are_correlated"]:
            sentences.append(
                f"`down` is alike in all rows (mean cosine {rows['mean']:.2f}): a common seed, or a common "
                "part that was learnt"
            )
        if rows["largest"] > COPY and rows["mean"] < COPY / 2:
            sentences.append(
                f"two rows have nearly the same `down` (cosine {rows['largest']:.4f}): copies, or one was "
                "trained on from the other"
            )
    for side in ("down", "up"):
        if side in signal and signal[side]["significant"]:
            size, direction = signal[side]["size"], signal[side]["direction"]
            sentences.append(
                f"`{side}` knows the class: direction p = {direction['p']:.3f}, size p = {size['p']:.3f}"
            )
    return sentences


def group_findings(groups: Report | None) -> list[str]:
    """Groups that cross the split."""
    if not groups or not groups["on_both_sides"] or groups["is_the_label"]:
        return []
    return [
        f"{groups['on_both_sides']} of {groups['groups']} groups ({groups['column']}) lie in train and "
        f"elsewhere; so do {groups['test_rows_with_their_group_in_train']} of {groups['test_rows']} test "
        "rows: accuracy may be knowledge of the group"
    ]


def class_findings(classes: Report) -> list[str]:
    """Unequal classes, and classes without a row in a part of the split."""
    sentences = []
    if classes["largest"] > 2 * classes["smallest"]:
        sentences.append(
            f"classes are unequal: {classes['smallest']} to {classes['largest']} rows; always guessing the "
            f"largest is right in {classes['always_guessing_the_largest']:.0%} of the test rows"
        )
    for part, names in classes["missing_in"].items():
        sentences.append(f"{len(names)} classes have no {part} row, the first {names[0]}")
    return sentences


def column_findings(representations: Report) -> list[str]:
    """Representations most of whose columns say nothing of their own."""
    few = []
    for name, census in representations.items():
        free, width = census["degrees_of_freedom"], census["width"]
        if not census["too_few_rows"] and free < width / 2:
            few.append(f"{name} ({free:.0f} of {width})")
    return [f"less than half of the columns are free at this rank in {', '.join(few)}"] if few else []


# --- the text


def print_report(report: Report) -> None:
    """Print the report, wrapped to the terminal's width."""
    report = showable(report)
    for line in collection_lines(report):
        print_wrapped(line)
    for line in factor_lines(report):
        print_wrapped(line)
    print_columns(report["representations"])
    if report["findings"]:
        print("\nFindings")
        for sentence in report["findings"]:
            print_wrapped(sentence, "  * ")


def print_wrapped(text: str, indent: str = "") -> None:
    """Print a paragraph whose further lines are indented."""
    width = min(shutil.get_terminal_size((LINE_WIDTH, 24)).columns, LINE_WIDTH)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=" " * (len(indent) + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )
    print("\n".join(lines))


def collection_lines(report: Report) -> list[str]:
    """Rows, layers, memory, split, classes, copies and groups."""
    classes, size, same = report["classes"], report["bytes"], report["duplicate_rows"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["layers"].items())
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in report["ranks"].items())
    shapes = [
        f"    {shape['layers']:5} {shape['kind']:5} {shape['side']:5} {shape['rows']} x {shape['cols']}"
        for shape in report["shapes"]
    ]
    named = list(classes["rows"].items())[:MAX_CLASSES]
    names = ", ".join(f"{name} {count}" for name, count in named)
    more = ", ..." if classes["count"] > len(named) else ""
    first = "; ".join(", ".join(map(str, rows[:5])) for rows in same["first"])
    lines = [
        f"{report['dataset']}: {report['rows']} rows, {classes['count']} classes, "
        f"{report['weights_per_row']:,} weights a row",
        f"Architecture: {report['architecture']}",
        f"Layers:  {kinds}; rank {ranks}",
        *shapes,
        f"Memory:  {size['row'] / 1e6:.2f} MB a row, {size['weights'] / 1e9:.2f} GB of weights, "
        f"{size['features'] / 1e9:.2f} GB of features",
        "Split:   " + ", ".join(f"{part} {count}" for part, count in report["split"].items()),
        f"Classes: {classes['smallest']} to {classes['largest']} rows; {names}{more}",
        f"Copies:  {same['too_many']} rows too many in {same['sets']} sets of equal rows"
        + (f", the first {first}" if same["sets"] else ""),
    ]
    groups = report["groups"]
    if groups:
        lines.append(
            f"Groups:  {groups['groups']} in {groups['column']}, {groups['on_both_sides']} of them in train "
            f"and elsewhere; {groups['test_rows_with_their_group_in_train']} of {groups['test_rows']} test "
            "rows have their group in "
            "train" + ("; the groups are the classes" if groups["is_the_label"] else "")
        )
    return lines


def factor_lines(report: Report) -> list[str]:
    """How `down` compares with its initialisation, and what each factor tells of the class."""
    lines = []
    down = report["initialisation"]
    if down:
        ratios = ", ".join(
            f"{ratio['mean']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f}) of {name}'s"
            for name, ratio in down["std_over_initial"].items()
        )
        rows = down["between_rows"]
        lines.append(
            f"Initial: std(down) {down['std']:.4g} is {ratios}; cosine between rows {rows['mean']:+.4f} in "
            f"the mean, {rows['largest']:+.4f} at most (by chance 0 with std {rows['by_chance']:.4f} a pair)"
        )
    for side, signal in report["class_signal"].items():
        direction, norm = signal["direction"], signal["size"]
        lines.append(
            f"Signal:  `{side}` of {signal['rows']} rows: cosine within classes minus between "
            f"{direction['within_minus_between']:+.5f} (p {direction['p']:.3f}); "
            f"{norm['variance_between_classes']:.3f} of the variance of its log norm lies between classes, "
            f"by chance {norm['by_chance']:.3f} (p {norm['p']:.3f})"
        )
    return lines


def print_columns(representations: Report) -> None:
    """Print the table of columns, then the names of the columns that are of a kind in every layer."""
    print(
        "\nColumns a layer (mean over the layers); duplicate: an earlier one up to scale; collinear: "
        "determined by "
        "several earlier ones;\nfree: the rest; effective: participation ratio of the correlations\n"
    )
    print(
        f"{'representation':15} {'width':>6} {'constant':>9} {'rounding':>9} {'duplicate':>10} "
        f"{'collinear':>10} {'free':>7} {'effective':>10}"
    )
    for name, census in representations.items():
        constant, rounding, duplicate, collinear = (census[kind]["a_layer"] for kind in REDUNDANCIES)
        print(
            f"{name:15} {census['width']:6} {constant:9.1f} {rounding:9.1f} {duplicate:10.1f} "
            f"{collinear:10.1f} {census['degrees_of_freedom']:7.1f} {census['effective']:10.1f}"
            + ("  (too few rows to tell)" if census["too_few_rows"] else "")
        )
    print()
    for name, census in representations.items():
        if name == "ensemble":  # its parts have lines of their own
            continue
        for kind in REDUNDANCIES:
            columns = [
                f"{column} = {census['same_as'][column]}" if kind == "duplicate" else column
                for column in census[kind]["in_every_layer"]
            ]
            if columns:
                print_wrapped(f"{name}: {kind} in every layer: {', '.join(columns)}")
