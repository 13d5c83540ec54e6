"""The inference and the audits of results.json -> the
tables of results.txt that tell what accuracies mean.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from ablation.catalogue import CLASSIFIERS, title_of
from ablation.cells import Cell
from ablation.text_table import (
    TEXT_WIDTH,
    Column,
    accuracy_with_interval,
    interval_text,
    margin_text,
    percent,
    points,
    probability,
    table,
)


def inference_lines(inference: dict[str, Any]) -> list[str]:
    """What the accuracies and their differences mean for new examples and runs."""
    if not inference:
        return []
    return [
        *general_lines(inference),
        *[
            line
            for comparison in inference["comparisons"]
            for line in comparison_lines(comparison, inference)
        ],
        *null_lines(inference.get("null")),
        *half_lines(inference["random_halves"]),
        *ranking_lines(inference),
        *classifier_lines(inference),
        *curve_lines(inference),
        *neighbour_lines(inference["neighbours"]),
        *inflation_lines(inference["inflation"]),
        *shuffled_lines(inference["shuffled"]),
        *control_lines(inference),
    ]


def general_lines(inference: dict[str, Any]) -> list[str]:
    """The chance level, groups, and how the spread over seeds compares with the test set's own error."""
    chance, rows = percent(inference["chance"]), inference["test_rows"]
    lines = ["", f"Chance: {chance} (the best of three rules that know the training labels alone)"]
    folds = inference["folds"]
    if folds is not None:
        lines.append(
            f"Folds: {folds['folds']}; each of {rows} rows is tested {folds['rounds']} times, by "
            f"{inference['runs']} runs in all, which are trained on the other rows. Above, runs weigh alike; "
            "below, rows do."
        )
    if inference["groups"] is not None:
        shared = inference["test_rows_that_share_a_group_with_training"]
        lines.append(
            f"Groups: {inference['groups']} among the test rows; {shared} of {rows} test rows share their "
            "group with a training row. Tests and intervals take whole groups."
        )
    accuracies = inference["accuracies"].values()
    narrow = [entry["binomial_error"] for entry in accuracies if entry["seeds_narrower_than_test_set"]]
    if narrow:
        lines.append(
            f"In {len(narrow)} of {len(accuracies)} cells the spread over seeds is narrower than the test "
            "set's own "
            f"standard error (up to {percent(max(narrow))}): ± above is not an interval of the accuracy."
        )
    return lines


COMPARISON_COLUMNS = (
    Column("representation", -20, lambda entry: entry["representation"]),
    Column("points", 8, lambda entry: points(entry["drop"])),
    Column("95 % interval", 18, lambda entry: interval_text(entry["interval"])),
    Column("p (max-T)", 11, lambda entry: probability(entry["p_max_t"])),
    Column("p (Holm)", 10, lambda entry: probability(entry["p_holm"])),
    Column("equal (max-T)", 15, lambda entry: probability(entry["p_equivalence_max_t"])),
    Column("smallest", 10, lambda entry: percent(entry["smallest"])),
    Column("h", 7, lambda entry: f"{entry['cohens_h']:+.2f}"),
    Column("training noise", 18, lambda entry: interval_text(entry["training_noise_interval"])),
)


def comparison_lines(comparison: dict, inference: dict[str, Any]) -> list[str]:
    """Two layer sets, representation by representation."""
    names = [
        "Random Halves" if name == "random_half" else title_of(name)
        for name in (comparison["first"], comparison["second"])
    ]
    scope = "for new examples and runs" if inference["runs"] > 2 else "for new examples, of these runs alone"
    title = f"{names[0]} minus {names[1]}: {scope}{over_splits(comparison['entries'])}"
    explained = (
        f"(intervals one at a time; p corrected for all; equal: within {margin_text(inference)}; "
        f"smallest: found with {100 * inference['power']:.0f} %)"
    )
    return ["", title, explained, *table(COMPARISON_COLUMNS, comparison["entries"])]


def over_splits(entries: list[dict]) -> str:
    """From how many splits a comparison's entries are, if from several."""
    numbers = sorted({entry["splits"] for entry in entries})
    if numbers == [1]:
        return ""
    return f", corrected for {' or '.join(map(str, numbers))} overlapping splits"


def ranking_lines(inference: dict[str, Any]) -> list[str]:
    """Which representations are above which, with all layers."""
    ranking, level = inference["ranking"], inference["level"]
    if not ranking:
        return []
    clear = [pair for pair in ranking if pair["p_holm"] < level]
    lines = [
        "",
        f"Of {len(ranking)} pairs of representations with all layers, {len(clear)} differ (p < {level:g} "
        "after Holm's correction):",
    ]
    for better in dict.fromkeys(pair["better"] for pair in clear):
        worse = ", ".join(pair["worse"] for pair in clear if pair["better"] == better)
        text = f"{better} is above {worse}"
        lines += textwrap.wrap(text, TEXT_WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def classifier_lines(inference: dict[str, Any]) -> list[str]:
    """Accuracies of other classifiers on the same columns and rows, and their drops."""
    if not inference["classifiers"]:
        return []
    accuracies = {Cell.named(name): entry for name, entry in inference["accuracies"].items()}
    names = [comparison["classifier"] for comparison in inference["classifiers"]]

    def accuracy_by(name: str) -> Callable[[Cell], str]:
        return lambda cell: accuracy_with_interval(accuracies.get(cell._replace(classifier=name)))

    columns = [
        Column("representation", -20, lambda cell: cell.representation),
        Column("layer set", -24, lambda cell: cell.layer_set),
        Column("MLP", 22, accuracy_by("")),
        *(Column(CLASSIFIERS[name], 22, accuracy_by(name)) for name in names),
    ]
    cells = [
        cell
        for cell in accuracies
        if cell and cell.is_plain and any(cell._replace(classifier=name) in accuracies for name in names)
    ]
    lines = ["", "Test accuracy by other classifiers, with 95 % intervals", *table(columns, cells)]
    for comparison in inference["classifiers"]:
        entries = comparison["entries"]
        if entries:
            names_of_sets = f"{title_of(comparison['first'])} minus {title_of(comparison['second'])}"
            title = f"{CLASSIFIERS[comparison['classifier']]}: {names_of_sets}"
            scope = f"{title}, one run a cell: for new examples{over_splits(entries)}"
            lines += ["", scope, *table(COMPARISON_COLUMNS, entries)]
    return lines


NULL_COLUMNS = (
    Column("representation", -20, lambda entry: entry["representation"]),
    Column("all", 7, lambda entry: percent(entry["all_layers"])),
    Column("visual", 8, lambda entry: percent(entry["visual_only"])),
    Column("text", 7, lambda entry: percent(entry["text_only"])),
    Column("halves", 8, lambda entry: percent(entry["random_half"])),
    Column("middle 95 %", 15, lambda entry: middle_text(entry)),
    Column("place", 7, lambda entry: str(entry["visual"]["rank"])),
    Column("p (lower)", 11, lambda entry: probability(entry["visual"]["p_lower"])),
    Column("p (both)", 10, lambda entry: probability(entry["visual"]["p_two_sided"])),
    Column("text-visual", 13, lambda entry: contrast_text(entry)[0]),
    Column("95 % interval", 18, lambda entry: contrast_text(entry)[1]),
)


def middle_text(entry: dict[str, Any]) -> str:
    """The middle 95 % of the halves' scores, in percent."""
    low, high = (100 * (entry["all_layers"] - end) for end in reversed(entry["fall_of_halves"]["middle"]))
    return f"{low:.1f} .. {high:.1f}"


def contrast_text(entry: dict[str, Any]) -> tuple[str, str]:
    """Text less visual, and its interval; dashes where the text layers are not as many."""
    found = entry["text_minus_visual"]
    return ("-", "-") if found is None else (points(found["drop"]), interval_text(found["interval"]))


def null_lines(null: dict[str, Any] | None) -> list[str]:
    """The visual and the text half among random halves, by the closed-form reader."""
    if not null:
        return []
    count = null["halves"]
    rows = [{"representation": "mean", **null["mean"]}, *null["entries"]]
    product = null["product"]
    if product is not None and product["representation"] not in null["representations"]:
        rows.append(product)
    return [
        "",
        f"Visual layers among {count} random halves of as many modules, by {null['reader']} (place 1 of "
        f"{count + 1}: lowest)",
        f"(trained on {null['train_rows']:,} rows at most, tested on {null['test_rows']:,}; p one at a time)",
        *table(NULL_COLUMNS, rows),
    ]


HALF_COLUMNS = (
    Column("representation", -20, lambda entry: entry["representation"]),
    Column("visual", 8, lambda entry: percent(entry["visual"])),
    Column("lowest", 8, lambda entry: percent(min(entry["halves"]))),
    Column("mean", 8, lambda entry: percent(sum(entry["halves"]) / len(entry["halves"]))),
    Column("highest", 9, lambda entry: percent(max(entry["halves"]))),
    Column("place", 10, lambda entry: f"{entry['rank']} of {1 + len(entry['halves'])}"),
    Column("p (lower)", 11, lambda entry: probability(entry["p_lower"])),
    Column("p (higher)", 12, lambda entry: probability(entry["p_higher"])),
)


def half_lines(halves: dict | None) -> list[str]:
    """Where the visual layers stand among random halves of the modules."""
    if halves is None:
        return []
    by = CLASSIFIERS.get(halves["classifier"], "MLP")
    title = f"Visual-Only among {halves['draws']} random halves of the modules (place 1: lowest; by {by})"
    return [
        "",
        title,
        *table(HALF_COLUMNS, [*halves["entries"], {"representation": "mean", **halves["mean"]}]),
    ]


CURVE_COLUMNS = (
    Column("training rows", -16, lambda entry: f"{100 * entry['share']:.0f} %"),
    Column("all layers", 12, lambda entry: percent(entry["accuracy"])),
    Column("visual only", 13, lambda entry: percent(entry["accuracy_of_second"])),
    Column("drop", 8, lambda entry: points(entry["drop"])),
    Column("95 % interval", 18, lambda entry: interval_text(entry["interval"])),
    Column("p", 9, lambda entry: probability(entry["p"])),
)


def curve_lines(inference: dict[str, Any]) -> list[str]:
    """The mean over the representations on smaller training sets, and on the whole one."""
    curve, primary = inference["learning_curve"], inference["primary"]
    if not curve:
        return []
    title = f"Mean over {len(curve[-1]['representations'])} representations by the share of the training rows"
    title += ", none of which is shown to be above chance on all of them" if primary is None else ""
    whole = [] if primary is None else [{"share": 1.0, **primary}]
    return ["", title, *table(CURVE_COLUMNS, [*curve, *whole])]


NEIGHBOUR_COLUMNS = (
    Column("cell", -48, lambda entry: entry["cell"]),
    Column("same class", 12, lambda entry: percent(entry["same_class"])),
    Column("same group", 12, lambda entry: percent(entry["same_group"])),
)


def neighbour_lines(entries: list[dict]) -> list[str]:
    """How often a test row's nearest training row is of its class, and of its group."""
    if not entries:
        return []
    return ["", "Nearest training row of each test row, percent", *table(NEIGHBOUR_COLUMNS, entries)]


INFLATION_COLUMNS = (
    Column("cell", -48, lambda entry: entry["cell"]),
    Column("split", 12, lambda entry: entry["split"]),
    Column("accuracy", 10, lambda entry: percent(entry["accuracy"])),
    Column("grouped", 10, lambda entry: percent(entry["grouped"])),
    Column("inflation", 11, lambda entry: points(entry["inflation"])),
    Column("95 % interval", 18, lambda entry: interval_text(entry["interval"])),
    Column("p (Holm)", 11, lambda entry: probability(entry["p_holm"])),
)


def inflation_lines(entries: list[dict]) -> list[str]:
    """What a split that divides groups has above a grouped one."""
    if not entries:
        return []
    title = "Inflation: test accuracy where groups are divided, less that on grouped splits (points)"
    return ["", title, *table(INFLATION_COLUMNS, entries)]


def shuffled_lines(check: dict | None) -> list[str]:
    """Whether cells with shuffled labels are at chance."""
    if not check:
        return []
    columns = (
        Column("cell", -48, lambda entry: entry[0]),
        Column("test", 8, lambda entry: percent(entry[1]["accuracy"])),
        Column("due", 8, lambda entry: percent(entry[1]["expected"])),
        Column("p (max-T)", 12, lambda entry: f"{entry[1]['p_adjusted']:.4f}"),
    )
    state = "SUSPECT, above chance" if check["suspect"] else "at chance"
    p, level = check["p"], check["level"]
    title = f"Shuffled labels: {state} (p = {p:.4f} for all cells together, suspect below {level:g})"
    return ["", title, *table(columns, check["cells"].items())]


def control_lines(inference: dict[str, Any]) -> list[str]:
    """Accuracies of the other controls."""
    if not inference["controls"]:
        return []
    columns = (
        Column("cell", -48, lambda entry: entry["cell"]),
        Column("accuracy", 22, accuracy_with_interval),
        Column("p above chance", 16, lambda entry: probability(entry["p_above_chance"])),
    )
    title = (
        "Controls: what a part, or what is no weight, tells of the class "
        f"(chance {percent(inference['chance'])})"
    )
    return ["", title, *table(columns, inference["controls"])]


# --- audits

AUDIT_TITLES = {
    "gauge": "Gauge audit: the same adapters as other pairs (up G, inv(G) down); changes in units of a "
    "column's spread over the rows",
    "noise": "Noise audit: test rows with Gaussian noise, its std as a part of each layer's; in brackets the "
    "predictions that stay",
}


def audit_lines(audits: list[dict]) -> list[str]:
    """A table for each audit that was run."""
    lines = []
    for audit, title in AUDIT_TITLES.items():
        rows = [row for row in audits if row["audit"] == audit]
        if rows:
            count = rows[0].get("audited_rows")
            on_rows = f", {count} rows" if count else ""
            lines += ["", title.replace(":", f"{on_rows}:", 1), *table(audit_columns(rows), rows)]
    return lines


def unchanged_accuracy(row: dict) -> float:
    """Accuracy on the audited rows as they are; of a record without it, on all test rows."""
    first = next(iter(row["variants"].values()))
    return first.get("unchanged_acc_mean", row["test_acc_mean"])


def audit_columns(rows: list[dict]) -> list[Column]:
    """The columns of an audit's table: accuracy on the audited rows as they are, then accuracy and agreement
    on each variant.
    """
    audit, variants = rows[0]["audit"], list(rows[0]["variants"])

    def variant_text(variant: str) -> Callable[[dict], str]:
        def text(row: dict) -> str:
            scored = row["variants"][variant]
            return f"{percent(scored['test_acc_mean'])} ({percent(scored['agreement'])}%)"

        return text

    columns = [
        Column("representation", -20, lambda row: row["representation"]),
        Column("layer set", -14, lambda row: row["layer_set"]),
        Column("as it is", 10, lambda row: percent(unchanged_accuracy(row))),
        *(Column(variant, 16, variant_text(variant)) for variant in variants),
    ]
    if audit == "gauge":
        (variant,) = variants
        columns += [
            Column("largest change", 16, lambda row: f"{row['variants'][variant]['change']['largest']:.2g}"),
            Column("rms change", 12, lambda row: f"{row['variants'][variant]['change']['rms']:.2g}"),
        ]
    return columns
