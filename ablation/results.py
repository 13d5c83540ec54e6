"""Records of finished cells -> results.json and results.txt of an output folder."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablation.analysis_plan import analysis_plan, stated_plan
from ablation.catalogue import CHOICES, INFERENCE_VERSION, LAYER_SETS, MAIN_COMPARISON
from ablation.cells import Cell
from ablation.results_text import results_text
from ablation.scores import mean_and_std, with_derived_scores
from ablation.splits import split_spec
from checkpointing import (
    ResultStore,
    hash_of,
    hash_of_arrays,
    read_own,
    with_checksum,
    write_bytes,
    write_json,
)

if TYPE_CHECKING:
    from ablation.context import Context, Ledger, NullAnswers

log = logging.getLogger("visual_ablation")

AUDIT_KEYS = ("test_acc_mean", "test_acc_std", "test_acc_all_runs", "audited_rows", "variants")
INFERENCE_KEYS = ("inference", "verdict", "verdict_parts", "inference_made_from")


def compare(records: dict[Cell, dict], inference: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each representation that has both layer sets of the main comparison, matched by name.

    It has the test accuracies, the drop and what is retained. `drop` is the first set's accuracy minus the
    second's, a fraction; `drop_std` is its std over runs of the same seed: training noise, not the
    uncertainty of the test set. `retention` is the inference's: of the accuracy above chance, None where
    that is not shown. An accuracy is None where a layer set was not run.
    """
    table = []
    known = {
        entry["representation"]: entry.get("retained") for entry in MAIN_COMPARISON.entries_in(inference)
    }
    for representation in CHOICES:
        by_set = {layer_set: records.get(Cell(representation, layer_set)) for layer_set in LAYER_SETS}
        first, second = by_set[MAIN_COMPARISON.first], by_set[MAIN_COMPARISON.second]
        if first is None or second is None:
            continue
        a, b = np.array(first["test_acc_all_runs"]), np.array(second["test_acc_all_runs"])
        drop, drop_std = mean_and_std(a - b)
        entry: dict[str, Any] = {"representation": representation}
        for layer_set, record in by_set.items():
            entry[layer_set] = record["test_acc_mean"] if record else None
            entry[f"{layer_set}_std"] = record["test_acc_std"] if record else None
        kept = known.get(representation) or {"share": None, "interval": None}
        entry |= {"retention": kept["share"], "retention_interval": kept["interval"]}
        table.append(entry | {"drop": drop, "drop_std": drop_std})
    return table


def collect(
    records: dict[Cell, dict], failures: dict[Cell, str], skipped: dict[Cell, str], header: dict[str, Any]
) -> dict[str, Any]:
    """The content of results.json.

    `header` says what was run on what. `failures` and `skipped` map cells to their error or reason, a line
    each.
    """
    records = {cell: with_derived_scores(record) for cell, record in records.items()}
    results = dict(header)
    layer_sets = dict.fromkeys([*LAYER_SETS, *(cell.layer_set for cell in records if cell.is_plain)])
    for layer_set in layer_sets:
        cells = [Cell(name, layer_set) for name in CHOICES]
        rows = [records[cell] for cell in cells if cell in records]
        if rows or layer_set in (MAIN_COMPARISON.first, MAIN_COMPARISON.second):
            results[f"{layer_set}_results"] = rows
    further = [cell for cell in records if not cell.is_plain and not cell.audit]
    audits = [cell for cell in records if cell.audit]
    results["comparison"] = compare(records, results.get("inference") or {})
    results["null"] = (results.get("inference") or {}).get("null")
    results["further_cells"] = [{**records[cell], **cell.identified()} for cell in further]
    results["audits"] = [
        {**cell.identified(), **{key: records[cell][key] for key in AUDIT_KEYS if key in records[cell]}}
        for cell in audits
    ]
    results["failed_cells"] = [{**cell.identified(), "error": error} for cell, error in failures.items()]
    results["skipped_cells"] = [{**cell.identified(), "reason": reason} for cell, reason in skipped.items()]
    return results


def save_results(context: Context, ledger: Ledger) -> str:
    """Write results.json and results.txt of every current cell in the folder. Returns the text.

    Cells that an earlier command reported as failed or skipped stay reported.
    """
    store = context.store
    states = {cell: store.state(cell.name, inputs) for cell, inputs in ledger.inputs.items()}
    records = {cell: state.record for cell, state in states.items() if state.kind == "done" and state.record}
    left_out = [cell.name for cell, state in states.items() if state.kind == "stale"]
    if left_out:
        log.warning(f"left out of the results, made with other settings: {', '.join(left_out)}")
    earlier = earlier_results(store)
    skipped = {
        cell: reason
        for cell, reason in entries_of(earlier, "skipped_cells", "reason").items()
        if cell not in ledger.inputs
    }
    failed = {
        cell: error
        for cell, error in entries_of(earlier, "failed_cells", "error").items()
        if cell not in records
    }
    header = header_of(context) | inference_of(context, ledger.null, records, earlier)
    results = collect(records, failed | ledger.failures, skipped | ledger.skipped, header)
    text = results_text(results)
    write_json(store.folder / "results.json", with_checksum(results), indent=2)
    write_bytes(store.folder / "results.txt", text.encode())
    return text


def header_of(context: Context) -> dict[str, Any]:
    """The top of results.json: what was run on what."""
    data, settings = context.data, context.settings
    summary = data.summary()
    return {
        "dataset": settings.dataset,
        "num_runs": settings.training.num_runs,
        "layer_names": data.layers.names,
        "num_classes": len(data.classes),
        "num_all_layers": len(data.layers),
        "num_visual_layers": data.layers.kinds.count("visual"),
        "num_text_layers": data.layers.kinds.count("text"),
        "architecture": summary["architecture"],
        "label_mapping": {str(name): index for index, name in enumerate(data.classes)},
        "splits_overlap": data.split.overlap,
        "data": {"identity": data.files.identity, **summary},
        "settings": dataclasses.asdict(settings),
        "analysis_plan": stated_plan(context.store.folder, analysis_plan(settings, data)),
    }


def inference_of(
    context: Context, null: NullAnswers, records: dict[Cell, dict], old: dict[str, Any]
) -> dict[str, Any]:
    """`inference` and `verdict`:
    those of `old` results if they were made from the same predictions, else new ones.
    """
    settings, data = context.settings, context.data
    kind = split_spec(settings, "").resolved(data.groups is not None).kind
    overlap, margin = data.split.overlap, (settings.margin, settings.margin_share)
    groups = None if data.groups is None else [data.group_column, hash_of(data.groups)]
    predictions = [[cell.name, record["predictions_hash"]] for cell, record in records.items()]  # in order
    halves = [[name, hash_of_arrays(arrays)] for name, arrays in null.arrays.items()]
    problem = null.failed or null.skipped
    made_from = hash_of([INFERENCE_VERSION, *margin, kind, overlap, groups, predictions, halves, problem])
    kept = {key: old.get(key) for key in INFERENCE_KEYS}
    if kept["inference_made_from"] == made_from and old.get("inference_check") == hash_of(kept):
        return kept | {"inference_check": old["inference_check"]}
    from ablation.family import Margin  # scipy.stats takes a second to import
    from ablation.inference import infer
    from ablation.null import null_evidence
    from ablation.verdict import verdict

    arrays = {cell: context.store.load_predictions(cell.name) for cell in records}
    inference = {} if overlap else infer(arrays, data.groups, Margin(*margin), kind)
    if inference:
        names = [entry["representation"] for entry in MAIN_COMPARISON.entries_in(inference)]
        if inference["primary"] is not None:
            names = inference["primary"]["representations"]
        labels = None if inference["score"] == "accuracy" else data.labels
        inference["null"] = null_evidence(null.arrays, names, data.groups, labels, inference["score_chance"])
        inference |= {"null_problem": problem, "group_column": data.group_column}
    said = verdict(inference, overlap)
    made = dict(zip(INFERENCE_KEYS, (inference, said.text, said._asdict(), made_from), strict=True))
    return made | {"inference_check": hash_of(made)}


def earlier_results(store: ResultStore) -> dict[str, Any]:
    """results.json as an earlier command left it, or {}. A damaged one is set aside: checkpoints have it all
    but the cells that failed.
    """
    results = store.read_own("results.json")
    try:
        for key, text in (("skipped_cells", "reason"), ("failed_cells", "error")):
            entries_of(results, key, text)
    except (TypeError, KeyError, AttributeError):
        path = store.folder / "results.json"
        log.warning(f"{path} is not as this program writes it: it is set aside, and made anew")
        store.set_aside_path(path, "damaged: its entries are not as this program writes them")
        return {}
    return results


def entries_of(results: dict[str, Any], key: str, text: str) -> dict[Cell, str]:
    """What is under a key of results.json: cells, and the field `text` of each.

    Raises TypeError, KeyError or AttributeError if it is not as this program writes it.
    """
    by_cell = {Cell.named(entry["cell"]): entry[text] for entry in results.get(key, [])}
    return {cell: reported for cell, reported in by_cell.items() if cell is not None}


def reported_entries(folder: Path, key: str, text: str) -> dict[Cell, str]:
    """`entries_of` a folder's results.json, which is only looked at: of a damaged one nothing."""
    try:
        return entries_of(read_own(folder / "results.json"), key, text)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
