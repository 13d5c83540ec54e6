"""The content of results.json -> results.txt, the text that also ends the log."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from ablation.catalogue import LAYER_SETS, MAIN_COMPARISON, group_of, title_of
from ablation.cells import Cell
from ablation.inference_text import audit_lines, inference_lines
from ablation.text_table import TEXT_WIDTH, Column, percent, showable, table

SHOWN_CELLS = 4  # of those that were skipped for one reason; results.json has all
SELECTED_ON = "* the epoch was selected on these rows, so accuracy on them is too high; balanced: mean recall"


def results_text(results: dict[str, Any]) -> str:
    """results.txt: what was run, accuracies of each layer set, the drop, what it means, and the verdict."""
    results = showable(results)
    lines = [
        *head_lines(results),
        *layer_set_lines(results),
        *drop_lines(results),
        *block_lines(results),
        *inference_lines(results["inference"]),
        *audit_lines(results["audits"]),
        *closing_lines(results),
        "",
        "VERDICT",
        "",
        *verdict_lines(results),
    ]
    return "\n".join(lines) + "\n"


def verdict_lines(results: dict[str, Any]) -> list[str]:
    """The verdict: the answer, its numbers, and a list of reservations."""
    parts = results.get("verdict_parts") or {"opening": [results["verdict"]]}
    lines = []
    for name in ("opening", "numbers"):
        if parts.get(name):
            lines += ["", *textwrap.wrap(" ".join(parts[name]), TEXT_WIDTH)]
    if parts.get("reservations"):
        lines.append("")
    for sentence in parts.get("reservations", []):
        lines += textwrap.wrap(f"- {sentence}", TEXT_WIDTH, subsequent_indent="  ")
    return lines[1:]


def head_lines(results: dict[str, Any]) -> list[str]:
    """The data set, its layers, and how many runs the numbers are from."""
    sizes = ", ".join(f"{part} {n}" for part, n in results["data"]["split"].items())
    if results.get("settings", {}).get("folds"):
        sizes = f"first fold: {sizes}"
    rows = [row for key, of_set in results.items() if key.endswith("_results") for row in of_set]
    has_ridge = any(row["representation"].startswith("kernel_ridge") for row in rows)
    lines = [
        "VISUAL ABLATION EXPERIMENT",
        "",
        f"Data set:  {results['dataset']} ({results['data']['rows']} rows, {results['num_classes']} classes; "
        f"{sizes})",
        f"Layers:    {results['num_all_layers']} ({kinds_text(results)})",
        f"Runs:      {results['num_runs']} a cell{' (kernel_ridge has one)' * has_ridge}; values are "
        "percent, mean±std over runs (training noise only)",
    ]
    if results["splits_overlap"]:
        lines.append(
            "WARNING:   ten rows or fewer: train, validation and test are the same rows; no accuracy here "
            "means anything"
        )
    return lines


def kinds_text(results: dict[str, Any]) -> str:
    """How many layers are visual and text, and of which architecture, if that is not Stable Diffusion."""
    layers = results["data"].get("layers")
    if not layers:
        return f"{results['num_visual_layers']} visual, {results['num_text_layers']} text"
    kinds = ", ".join(f"{count} {word}" for word, count in layers.items() if word != "other")
    return kinds if "attn1" in layers else f"{kinds}; {results['data'].get('architecture', '')}"


def layer_set_names(results: dict[str, Any]) -> list[str]:
    """Layer sets that have a list of results, the catalogue's first."""
    named = [key.removesuffix("_results") for key in results if key.endswith("_results")]
    return list(dict.fromkeys([*LAYER_SETS, *named]))


def mean_and_std_of(key: str) -> Callable[[dict], str]:
    """The text of a score's mean and std over the runs."""
    return lambda row: percent(row[f"{key}_mean"], row[f"{key}_std"])


def layer_set_columns(layer_set: str) -> tuple[Column, ...]:
    """The columns of a layer set's table; its rows are records of cells."""
    suffix = f"_{layer_set}"
    return (
        Column("representation", -20, lambda row: row["representation"].removesuffix(suffix)),
        Column("columns", 8, lambda row: str(row["feature_dim"])),
        Column("trained", 8, lambda row: str(row["trained_dim"])),
        Column("train", 12, mean_and_std_of("train_acc")),
        Column("val*", 12, mean_and_std_of("val_acc")),
        Column("test", 12, mean_and_std_of("test_acc")),
        Column("balanced", 12, mean_and_std_of("test_balanced_acc")),
        Column("test F1", 12, mean_and_std_of("test_f1")),
        Column("epoch", 7, lambda row: f"{row['best_epoch_mean']:.0f}"),
        Column("s/run", 8, lambda row: f"{row['training_time_mean']:.1f}"),
    )


def layer_set_lines(results: dict[str, Any]) -> list[str]:
    """A table for each layer set; single blocks have a table of their own (`block_lines`)."""
    lines = []
    for layer_set in layer_set_names(results):
        if group_of(layer_set) == "by_block":
            continue
        rows = results.get(f"{layer_set}_results") or []
        failed = [failure for failure in failed_plain(results) if failure["layer_set"] == layer_set]
        if rows or failed:
            title = title_of(layer_set) + (f": {layer_set}" if group_of(layer_set) else "")
            lines += ["", title, *table(layer_set_columns(layer_set), rows)]
            lines += [f"{failure['representation']:<20}FAILED: {failure['error']}" for failure in failed]
    return [*lines, SELECTED_ON] if lines else []


def is_plain_failure(failure: dict) -> bool:
    """True if the failed cell is one of the tables' own."""
    cell = Cell.named(failure["cell"])
    return cell is not None and cell.is_plain


def failed_plain(results: dict[str, Any]) -> list[dict]:
    """The failed cells of the tables themselves."""
    return [failure for failure in results["failed_cells"] if is_plain_failure(failure)]


def drop_lines(results: dict[str, Any]) -> list[str]:
    """Test accuracies of the main comparison side by side, and what is kept of the accuracy above chance."""
    comparison = results["comparison"]
    if not comparison:
        return []
    first, second = MAIN_COMPARISON.first, MAIN_COMPARISON.second
    columns = [
        Column("representation", -20, lambda row: row["representation"]),
        Column(spoken(first), 12, lambda row: percent(row[first], row[f"{first}_std"])),
        Column(spoken(second), 13, lambda row: percent(row[second], row[f"{second}_std"])),
    ]
    if any(row["text_only"] is not None for row in comparison):
        columns.append(Column("text only", 12, lambda row: percent(row["text_only"], row["text_only_std"])))
    columns += [
        Column("drop", 12, lambda row: percent(row["drop"], row["drop_std"])),
        Column("kept", 10, lambda row: kept_text(row["retention"])),
        Column("95 % interval", 18, lambda row: kept_interval(row["retention_interval"])),
    ]
    title = (
        f"Test accuracy, {spoken(first)} against {spoken(second)} (drop in points; kept: of the "
        "accuracy above chance)"
    )
    return ["", title, *table(columns, comparison)]


def spoken(layer_set: str) -> str:
    """A layer set's name in a sentence: `all layers`."""
    return layer_set.replace("_", " ")


def kept_text(share: float | None) -> str:
    """The share of the accuracy above chance that is kept."""
    return "-" if share is None else f"{percent(share)}%"


def kept_interval(interval: tuple[float, float] | None) -> str:
    """The interval of what is kept, in percent."""
    return "-" if interval is None else " .. ".join(percent(end) for end in interval)


def block_lines(results: dict[str, Any]) -> list[str]:
    """A line for each block and kind of layer that was trained on alone."""
    blocks = []
    for name in layer_set_names(results):
        if group_of(name) == "by_block":
            rows = results[f"{name}_results"]
            best = max(rows, key=lambda row: row["test_acc_mean"])
            mean = float(np.mean([row["test_acc_mean"] for row in rows]))
            blocks.append({"name": name, "best": best, "mean": mean})
    if not blocks:
        return []
    columns = (
        Column("block", -48, lambda block: block["name"].removeprefix("by_block.")),
        Column("columns", 8, lambda block: str(block["best"]["feature_dim"])),
        Column("best test", 12, lambda block: mean_and_std_of("test_acc")(block["best"])),
        Column("", 2, lambda block: ""),
        Column("by", -20, lambda block: block["best"]["representation"].removesuffix(f"_{block['name']}")),
        Column("mean test", 10, lambda block: percent(block["mean"])),
    )
    return ["", "Single blocks (every representation is in results.json)", *table(columns, blocks)]


def closing_lines(results: dict[str, Any]) -> list[str]:
    """Skipped cells, cells that no table shows, failed cells."""
    lines = []
    by_reason: dict[str, list[str]] = {}
    for entry in results["skipped_cells"]:
        by_reason.setdefault(entry["reason"], []).append(entry["cell"])
    lines += [""] * bool(by_reason)
    for reason, cells in by_reason.items():
        more = f" and {len(cells) - SHOWN_CELLS} more" if len(cells) > SHOWN_CELLS else ""
        lines.append(f"Skipped: {', '.join(cells[:SHOWN_CELLS])}{more}, {reason}")
    if results["further_cells"] and not results["inference"]:
        count = len(results["further_cells"])
        lines += ["", f"{count} cells of other splits, classifiers or controls are in results.json only"]
    failed = results["failed_cells"]
    if failed:
        further = [failure for failure in failed if not is_plain_failure(failure)]
        lines += [""] * bool(further) + [f"{one['cell']} FAILED: {one['error']}" for one in further]
        names = ", ".join(failure["cell"] for failure in failed)
        lines += ["", f"{len(failed)} cells FAILED: {names}"]
    return lines
