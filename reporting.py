"""Confusion counts -> scores -> a cell's record, results.json and results.txt.

Training hands over predictions; what is counted and what a score means stands here and nowhere else. C classes, R runs.
"""

from __future__ import annotations

import textwrap

import numpy as np

from settings import CHOICES, CLASSIFIERS, LAYER_SETS, Cell, group_of, title_of

SCORED_PARTS = ("val", "test")
SCORES = ("acc", "f1", "precision", "recall")
AUDIT_KEYS = ("test_acc_mean", "test_acc_std", "test_acc_all_runs", "variants")


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C): rows are true classes, columns predicted ones, all C of them whether they occur or not."""
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> dict[str, float]:
    """acc, and the macro averages f1, precision and recall, as fractions.

    Averages run over the classes that occur among the labels or the predictions; a ratio of 0/0 counts as 0
    (scikit-learn's macro average with zero_division=0).
    """
    true, predicted, hits = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    occurs = (true + predicted) > 0

    def mean_ratio(numerator, denominator) -> float:
        ratios = np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
        return float(ratios[occurs].mean()) if occurs.any() else 0.0

    return {
        "acc": float(hits.sum() / confusion.sum()),
        "f1": mean_ratio(2 * hits, true + predicted),
        "precision": mean_ratio(hits, predicted),
        "recall": mean_ratio(hits, true),
    }


def run_scores(labels: dict[str, np.ndarray], run, num_classes: int) -> tuple[dict, dict[str, np.ndarray]]:
    """A run's scores (`train_acc`; acc, f1, precision, recall of val and test) and its confusion counts by part."""
    confusions = {part: confusion_matrix(labels[part], run.predictions[part], num_classes) for part in labels}
    found = {"train_acc": scores(confusions["train"])["acc"]}
    for score in SCORES:
        for part in SCORED_PARTS:
            found[f"{part}_{score}"] = scores(confusions[part])[score]
    return found, confusions


def mean_and_std(values) -> tuple[float, float]:
    """Mean and population std over the runs (0 for one run)."""
    return float(np.mean(values)), float(np.std(values))


def cell_record(cell: Cell, trained, labels: dict[str, np.ndarray], num_classes: int, num_layers: int, feature_dim: int) -> dict:
    """A finished cell under the origin's keys. `labels` are the class numbers of the rows of each part of the split."""
    per_run, confusions = [], []
    for number, run in enumerate(trained.runs, 1):
        found, counts = run_scores(labels, run, num_classes)
        per_run.append({"run": number, **found, "training_time": run.seconds, "best_epoch": run.best_epoch, "feature_dim": feature_dim})
        confusions.append(counts)
    record = {
        "representation": f"{cell.representation}_{cell.layer_set}",
        "num_layers": num_layers,
        "feature_dim": feature_dim,
        "trained_dim": trained.trained_dim,
    }
    for key in (key for key in per_run[0] if key not in ("run", "feature_dim")):
        record[f"{key}_mean"], record[f"{key}_std"] = mean_and_std([run[key] for run in per_run])
    record["training_time_total"] = sum(run["training_time"] for run in per_run)
    record["per_run_results"] = per_run
    record["learning_curves"] = [
        {"val_acc_history": run.val_accuracy, "train_loss_history": run.train_loss, "learning_rate_history": run.learning_rate,
         "best_epoch": run.best_epoch}
        for run in trained.runs
    ]
    for part in SCORED_PARTS:
        record[f"{part}_confusion_matrices"] = [counts[part].tolist() for counts in confusions]
    for part in labels:
        record[f"{part}_acc_all_runs"] = [run[f"{part}_acc"] for run in per_run]
    return record


def stacked(trained, part: str) -> np.ndarray:
    """Predictions (R, n) of a part of the rows."""
    return np.stack([run.predictions[part] for run in trained.runs]).astype(np.int32)


def prediction_arrays(trained, labels: dict[str, np.ndarray], split) -> dict[str, np.ndarray]:
    """For predictions/<cell>.npz: of each part the row numbers (n,), class numbers (n,) and predictions (R, n)."""
    arrays = {}
    for part, of_part in labels.items():
        arrays[f"{part}_rows"] = getattr(split, part)
        arrays[f"{part}_labels"] = of_part.astype(np.int32)
        arrays[f"{part}_predictions"] = stacked(trained, part)
    arrays["seeds"] = np.array([run.seed for run in trained.runs])
    return arrays


def audit_record(cell: Cell, trained, test_labels: np.ndarray, changes: dict[str, dict]) -> dict:
    """What an audit adds to the record of the runs that it scores: test accuracies on each variant of the test rows.

    `changes` has by variant how far the features moved. `agreement` is the part of test predictions that stay the same.
    """
    runs = [run.predictions for run in trained.runs]

    def scored(part: str) -> dict:
        accuracies = [float(np.mean(run[part] == test_labels)) for run in runs]
        mean, std = mean_and_std(accuracies)
        return {"test_acc_mean": mean, "test_acc_std": std, "test_acc_all_runs": accuracies}

    variants = {
        variant: {**scored(f"{cell.audit} {variant}"), "change": change,
                  "agreement": float(np.mean([np.mean(run[f"{cell.audit} {variant}"] == run["test"]) for run in runs]))}
        for variant, change in changes.items()
    }
    return {"audit": cell.audit, "layer_set": cell.layer_set, "variants": variants}


def variant_arrays(cell: Cell, trained, variants) -> dict[str, np.ndarray]:
    """What an audit adds to predictions/<cell>.npz: predictions (R, n) of each variant of the test rows."""
    return {f"{variant}_predictions": stacked(trained, f"{cell.audit} {variant}") for variant in variants}


# --- the whole folder


def compare(records: dict[Cell, dict]) -> list[dict]:
    """One entry a representation that has both layer sets, matched by name: test accuracies, the drop and what is retained.

    `drop` is all_layers minus visual_only, a fraction; `drop_std` its std over runs of the same seed: training noise, not
    the uncertainty of the test set. `text_only` is None where it was not run.
    """
    table = []
    for representation in CHOICES:
        found = {layer_set: records.get(Cell(representation, layer_set)) for layer_set in LAYER_SETS}
        if not (found["all_layers"] and found["visual_only"]):
            continue
        every, visual = (np.array(found[layer_set]["test_acc_all_runs"]) for layer_set in ("all_layers", "visual_only"))
        drop, drop_std = mean_and_std(every - visual)
        entry = {"representation": representation}
        for layer_set, record in found.items():
            entry[layer_set] = record["test_acc_mean"] if record else None
            entry[f"{layer_set}_std"] = record["test_acc_std"] if record else None
        retention = float(visual.mean() / every.mean()) if every.mean() > 0 else None
        table.append(entry | {"drop": drop, "drop_std": drop_std, "retention": retention})
    return table


def collect(records: dict[Cell, dict], failures: dict[Cell, str], skipped: dict[Cell, str], header: dict) -> dict:
    """results.json. `header` says what was run on what; `failures` and `skipped` map cells to their error or reason in a line."""
    results = dict(header)
    for layer_set in dict.fromkeys([*LAYER_SETS, *(cell.layer_set for cell in records if cell.plain)]):
        of_set = [records[Cell(r, layer_set)] for r in CHOICES if Cell(r, layer_set) in records]
        if of_set or layer_set in ("all_layers", "visual_only"):
            results[f"{layer_set}_results"] = of_set
    results["comparison"] = compare(records)
    results["further_cells"] = [{**record, **named(cell)} for cell, record in records.items() if not cell.plain and not cell.audit]
    results["audits"] = [{**named(cell), **{key: record[key] for key in AUDIT_KEYS}} for cell, record in records.items() if cell.audit]
    results["failed_cells"] = [{**named(cell), "error": error} for cell, error in failures.items()]
    results["skipped_cells"] = [{**named(cell), "reason": reason} for cell, reason in skipped.items()]
    return results


def named(cell: Cell) -> dict[str, str]:
    """Its name and every way in which it is not plain."""
    return {"cell": cell.name} | {field: value for field, value in cell._asdict().items() if value}


def percent(mean: float | None, std: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if std is None else f"±{100 * std:.1f}")


def results_text(results: dict) -> str:
    """results.txt and the log's last table: accuracies of each layer set, then the drop."""
    ridge = any(row["representation"].startswith("kernel_ridge") for key in results if key.endswith("_results") for row in results[key])
    lines = [
        "VISUAL ABLATION EXPERIMENT",
        "",
        f"Data set:  {results['dataset']} ({results['data']['rows']} rows, {results['num_classes']} classes; "
        + ", ".join(f"{part} {n}" for part, n in results["data"]["split"].items()) + ")",
        f"Layers:    {results['num_all_layers']} ({results['num_visual_layers']} attn1, {results['num_text_layers']} attn2)",
        f"Runs:      {results['num_runs']} a cell{' (kernel_ridge has one)' * ridge}; values are percent, mean±std over runs (training noise only)",
    ]
    if results["splits_overlap"]:
        lines.append("WARNING:   ten rows or fewer: train, validation and test are the same rows; no accuracy here means anything")
    header = f"{'representation':<20}{'columns':>8}{'trained':>8}{'train':>12}{'val':>12}{'test':>12}{'test F1':>12}{'epoch':>7}{'s/run':>8}"
    alone = dict.fromkeys([*LAYER_SETS, *(key.removesuffix("_results") for key in results if key.endswith("_results"))])
    for layer_set in (name for name in alone if group_of(name) != "by_block"):
        rows = results.get(f"{layer_set}_results") or []
        title = title_of(layer_set) + (f": {layer_set}" if group_of(layer_set) else "")
        failed = [failure for failure in results["failed_cells"] if Cell.named(failure["cell"]).plain and failure["layer_set"] == layer_set]
        if not rows and not failed:
            continue
        lines += ["", title, header, "-" * len(header)]
        for row in rows:
            name = row["representation"].removesuffix(f"_{layer_set}")
            cells = "".join(f"{percent(row[f'{k}_mean'], row[f'{k}_std']):>12}" for k in ("train_acc", "val_acc", "test_acc", "test_f1"))
            lines.append(f"{name:<20}{row['feature_dim']:>8}{row['trained_dim']:>8}{cells}{row['best_epoch_mean']:>7.0f}{row['training_time_mean']:>8.1f}")
        lines += [f"{failure['representation']:<20}FAILED: {failure['error']}" for failure in failed]
    if results["comparison"]:
        text = any(row["text_only"] is not None for row in results["comparison"])
        header = f"{'representation':<20}{'all layers':>12}{'visual only':>13}" + f"{'text only':>12}" * text + f"{'drop':>12}{'retained':>10}"
        lines += ["", "Test accuracy, all layers against visual only (drop in points)", header, "-" * len(header)]
        for row in results["comparison"]:
            shown = f"{percent(row['all_layers'], row['all_layers_std']):>12}{percent(row['visual_only'], row['visual_only_std']):>13}"
            shown += f"{percent(row['text_only'], row['text_only_std']):>12}" * text
            retained = "-" if row["retention"] is None else f"{percent(row['retention'])}%"
            lines.append(f"{row['representation']:<20}{shown}{percent(row['drop'], row['drop_std']):>12}{retained:>10}")
    lines += block_lines({name: results[f"{name}_results"] for name in alone if group_of(name) == "by_block"})
    lines += inference_lines(results["inference"]) + audit_lines(results["audits"])
    if results["skipped_cells"]:
        lines += [""] + [f"Skipped: {entry['cell']}, {entry['reason']}" for entry in results["skipped_cells"]]
    if results["further_cells"] and not results["inference"]:
        lines += ["", f"{len(results['further_cells'])} cells of other splits, classifiers or controls are in results.json only"]
    if results["failed_cells"]:
        beside = [failure for failure in results["failed_cells"] if not Cell.named(failure["cell"]).plain]
        lines += [""] * bool(beside) + [f"{failure['cell']} FAILED: {failure['error']}" for failure in beside]
        lines += ["", f"{len(results['failed_cells'])} cells FAILED: " + ", ".join(failure["cell"] for failure in results["failed_cells"])]
    lines += ["", "VERDICT", "", *textwrap.wrap(results["verdict"], 110)]
    return "\n".join(lines) + "\n"


def block_lines(blocks: dict[str, list[dict]]) -> list[str]:
    """A line for each block of the U-Net and kind of attention that was trained on alone."""
    header = f"{'block':<48}{'columns':>8}{'best test':>12}  {'by':<20}{'mean test':>10}"
    lines = ["", "Single blocks (every representation is in results.json)", header, "-" * len(header)]
    for name, rows in blocks.items():
        best = max(rows, key=lambda row: row["test_acc_mean"])
        mean = np.mean([row["test_acc_mean"] for row in rows])
        lines.append(f"{name.removeprefix('by_block.'):<48}{best['feature_dim']:>8}{percent(best['test_acc_mean'], best['test_acc_std']):>12}  "
                     f"{best['representation'].removesuffix(f'_{name}'):<20}{percent(mean):>10}")
    return lines if blocks else []


def inference_lines(found: dict) -> list[str]:
    """What the accuracies and their differences mean for new examples and runs."""
    if not found:
        return []
    return general_lines(found) + classifier_lines(found) + inflation_lines(found["inflation"]) + control_lines(found)


def general_lines(found: dict) -> list[str]:
    """The chance level, two layer sets beside each other, and the ranking."""
    lines = ["", f"Chance: {percent(found['chance'])} (the most frequent class of {found['test_rows']} test rows)"]
    if found["groups"] is not None:
        lines.append(f"Groups: {found['groups']} among the test rows; {found['test_rows_that_share_a_group_with_training']} of "
                     f"{found['test_rows']} test rows share their group with a training row. Tests and intervals take whole groups.")
    narrow = [one for one in found["accuracies"].values() if one["seeds_narrower_than_test_set"]]
    if narrow:
        lines.append(f"In {len(narrow)} of {len(found['accuracies'])} cells the spread over seeds is narrower than the test set's own standard error "
                     f"(up to {percent(max(one['binomial_error'] for one in narrow))}): ± above is not an interval of the accuracy.")
    for comparison in found["comparisons"]:
        first, second = ("Random Halves" if one == "random_half" else title_of(one) for one in (comparison["first"], comparison["second"]))
        title = f"{first} minus {second}"
        scope = "for new examples and runs" if found["runs"] > 2 else "for new examples, of these runs alone"
        lines += ["", f"{title}: {scope}{over_splits(comparison['entries'])}; equal: within {100 * found['margin']:g} points; smallest: found with "
                  f"{100 * found['power']:.0f} % probability", *comparison_lines(comparison["entries"])]
    clear = [pair for pair in found["ranking"] if pair["p_holm"] < found["level"]]
    if found["ranking"]:
        lines += ["", f"Of {len(found['ranking'])} pairs of representations with all layers, {len(clear)} differ (p < {found['level']:g} after "
                  "Holm's correction):"]
        for better in dict.fromkeys(pair["better"] for pair in clear):
            worse = [pair["worse"] for pair in clear if pair["better"] == better]
            lines += textwrap.wrap(f"{better} is above {', '.join(worse)}", 110, initial_indent="  ", subsequent_indent="    ")
    return lines


def over_splits(entries: list[dict]) -> str:
    """From how many splits a comparison's entries are."""
    numbers = sorted({entry["splits"] for entry in entries})
    return "" if numbers == [1] else f", corrected for {' or '.join(map(str, numbers))} overlapping splits"


def comparison_lines(entries: list[dict]) -> list[str]:
    header = (f"{'representation':<20}{'points':>8}{'95 % interval':>18}{'p (Holm)':>11}{'equal (Holm)':>14}{'smallest':>10}"
              f"{'h':>7}{'training noise':>18}")
    lines = [header, "-" * len(header)]
    for entry in entries:
        noise = "-" if entry["training_noise_interval"] is None else span(entry["training_noise_interval"])
        lines.append(f"{entry['representation']:<20}{100 * entry['drop']:>+8.1f}{span(entry['interval']):>18}{probability(entry['p_holm']):>11}"
                     f"{probability(entry['p_equivalence_holm']):>14}{percent(entry['smallest']):>10}{entry['cohens_h']:>+7.2f}{noise:>18}")
    return lines


def classifier_lines(found: dict) -> list[str]:
    """What other classifiers make of the same columns and rows."""
    if not found["classifiers"]:
        return []
    accuracies = {Cell.named(name): entry for name, entry in found["accuracies"].items()}
    shown = [one["classifier"] for one in found["classifiers"]]
    header = f"{'representation':<20}{'layer set':<24}{'MLP':>22}" + "".join(f"{CLASSIFIERS[name]:>22}" for name in shown)
    lines = ["", "Test accuracy by other classifiers, with 95 % intervals", header, "-" * len(header)]
    for cell in accuracies:
        others = [accuracies.get(cell._replace(classifier=name)) for name in shown]
        if cell.plain and any(others):
            shown_here = "".join(f"{with_interval(one):>22}" for one in (accuracies[cell], *others))
            lines.append(f"{cell.representation:<20}{cell.layer_set:<24}{shown_here}")
    for one in found["classifiers"]:
        if one["entries"]:
            title = f"{CLASSIFIERS[one['classifier']]}: {title_of(one['first'])} minus {title_of(one['second'])}"
            lines += ["", f"{title}, one run a cell: for new examples{over_splits(one['entries'])}", *comparison_lines(one["entries"])]
    return lines


def inflation_lines(entries: list[dict]) -> list[str]:
    """What a split that divides groups has above one that does not."""
    header = f"{'cell':<48}{'split':>12}{'accuracy':>10}{'grouped':>10}{'inflation':>11}{'95 % interval':>18}{'p (Holm)':>11}"
    lines = ["", "Inflation: test accuracy where groups are divided, less that on grouped splits (points)", header, "-" * len(header)]
    for entry in entries:
        lines.append(f"{entry['cell']:<48}{entry['split']:>12}{percent(entry['accuracy']):>10}{percent(entry['grouped']):>10}"
                     f"{100 * entry['inflation']:>+11.1f}{span(entry['interval']):>18}{probability(entry['p_holm']):>11}")
    return lines if entries else []


def control_lines(found: dict) -> list[str]:
    """The null battery."""
    lines = []
    if found["shuffled"]:
        check = found["shuffled"]
        header = f"{'cell':<48}{'test':>8}{'due':>8}{'p (max-T)':>12}"
        state = "SUSPECT, above chance" if check["suspect"] else "at chance"
        lines += ["", f"Shuffled labels: {state} (p = {check['p']:.4f} for all cells together, suspect below {check['level']:g})"]
        lines += [header, "-" * len(header)]
        lines += [f"{name:<48}{percent(cell['accuracy']):>8}{percent(cell['expected']):>8}{cell['p_adjusted']:>12.4f}"
                  for name, cell in check["cells"].items()]
    if found["controls"]:
        header = f"{'cell':<48}{'accuracy':>22}{'p above chance':>16}"
        title = f"Controls: what a part, or what is no weight, tells of the class (chance {percent(found['chance'])})"
        lines += ["", title, header, "-" * len(header)]
        lines += [f"{entry['cell']:<48}{with_interval(entry):>22}{probability(entry['p_above_chance']):>16}" for entry in found["controls"]]
    return lines


def with_interval(entry: dict | None) -> str:
    return "-" if entry is None else f"{percent(entry['accuracy'])} [{percent(entry['interval'][0])}, {percent(entry['interval'][1])}]"


def span(interval) -> str:
    return f"{100 * interval[0]:+.1f} .. {100 * interval[1]:+.1f}"


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


AUDIT_TEXTS = {
    "gauge": "Gauge audit: the same adapters as other pairs (up G, inv(G) down); changes in units of a column's spread over the rows",
    "noise": "Noise audit: test rows with Gaussian noise, its std as a part of each layer's; in brackets the predictions that stay",
}


def audit_lines(audits: list[dict]) -> list[str]:
    """A table for each audit that was run."""
    lines = []
    for audit, text in AUDIT_TEXTS.items():
        rows = [row for row in audits if row["audit"] == audit]
        if not rows:
            continue
        header = f"{'representation':<20}{'layer set':<14}{'test':>8}" + "".join(f"{variant:>16}" for variant in rows[0]["variants"])
        if audit == "gauge":
            header += f"{'largest change':>16}{'rms change':>12}"
        lines += ["", text, header, "-" * len(header)]
        for row in rows:
            line = f"{row['representation']:<20}{row['layer_set']:<14}{percent(row['test_acc_mean']):>8}"
            for variant in row["variants"].values():
                line += f"{percent(variant['test_acc_mean']) + ' (' + percent(variant['agreement']) + '%)':>16}"
            if audit == "gauge":
                line += f"{variant['change']['largest']:>16.2g}{variant['change']['rms']:>12.2g}"
            lines.append(line)
    return lines
