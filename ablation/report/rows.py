"""What the figures and tables of a report hold: functions of results.json as a dict, without matplotlib.

A function `<name>_rows(results)` gives a list of flat dicts, [] where an experiment has nothing for it.
`tables/<name>.csv` holds these rows, and a function of the figure modules draws them. Accuracies are
fractions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ablation.catalogue import CHOICES, LAYER_SETS, MAIN_COMPARISON, PARTS, group_of
from ablation.report.load import Results
from ablation.text_table import shortened

Rows = list[dict[str, Any]]


def layer_sets(results: Results) -> list[str]:
    """Layer sets with a finished cell, in the order of the results; single blocks are not among them."""
    names = [
        key.removesuffix("_results") for key, rows in results.items() if key.endswith("_results") and rows
    ]
    return [
        name
        for name in dict.fromkeys([*LAYER_SETS, *names])
        if name in names and group_of(name) != "by_block"
    ]


def rows_of(results: Results, layer_set: str) -> dict[str, dict]:
    """Records of a layer set's finished cells by representation."""
    return {
        row["representation"].removesuffix(f"_{layer_set}"): row
        for row in results.get(f"{layer_set}_results", [])
    }


def accuracy_of(results: Results, layer_set: str, representation: str) -> float | None:
    """Test accuracy of a cell: over all splits of the first kind,
    as the inference has it; without one, of the runs.
    """
    known = (results.get("inference") or {}).get("accuracies", {}).get(f"{layer_set}_{representation}")
    row = rows_of(results, layer_set).get(representation)
    return known["accuracy"] if known else row["test_acc_mean"] if row else None


def accuracies_of(results: Results, layer_set: str) -> dict[str, float]:
    """Test accuracy of each finished cell of a layer set, by representation."""
    accuracies = {name: accuracy_of(results, layer_set, name) for name in rows_of(results, layer_set)}
    return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}


def representations(results: Results) -> list[str]:
    """Representations with a finished cell, in the order of the catalogue."""
    found = {name for layer_set in layer_sets(results) for name in rows_of(results, layer_set)}
    return [name for name in CHOICES if name in found]


def best_representation(results: Results) -> str:
    """The one of the highest test accuracy with all layers;
    of whatever layer set there is, if that is not there.
    """
    sets = layer_sets(results)
    layer_set = MAIN_COMPARISON.first if MAIN_COMPARISON.first in sets else sets[0]
    accuracies = accuracies_of(results, layer_set)
    return max(accuracies, key=lambda name: accuracies[name])


def accuracy_rows(results: Results) -> Rows:
    """Test accuracy of every cell of the table with its 95 % interval for new examples and runs."""
    known = (results.get("inference") or {}).get("accuracies", {})
    found = []
    for layer_set in layer_sets(results):
        for name, row in rows_of(results, layer_set).items():
            entry = known.get(f"{layer_set}_{name}")
            low, high = entry["interval"] if entry else (None, None)
            found.append(
                {
                    "layer_set": layer_set,
                    "representation": name,
                    "accuracy": accuracy_of(results, layer_set, name),
                    "low": low,
                    "high": high,
                    "std_over_runs": row["test_acc_std"],
                }
            )
    return found


def main_comparison(results: Results) -> Rows:
    """Entries of the main comparison (all layers against visual only), the largest drop first."""
    entries = MAIN_COMPARISON.entries_in(results.get("inference") or {})
    return sorted(entries, key=lambda entry: -entry["drop"])


def drop_rows(results: Results) -> Rows:
    """The drops of the main comparison, the largest first."""
    return [
        {
            "representation": entry["representation"],
            "drop": entry["drop"],
            "low": entry["interval"][0],
            "high": entry["interval"][1],
            "p_max_t": entry["p_max_t"],
            "p_holm": entry["p_holm"],
            "p_equivalence_max_t": entry["p_equivalence_max_t"],
            "margin": entry["margin"],
        }
        for entry in main_comparison(results)
    ]


def null_entries(results: Results) -> Rows:
    """The null's mean, its representations and its product, each once."""
    null = (results.get("inference") or {}).get("null")
    if not null:
        return []
    entries = [{"representation": "mean", **null["mean"]}, *null["entries"]]
    product = null["product"]
    is_further = product and product["representation"] not in null["representations"]
    return [*entries, product] if is_further else entries


def null_rows(results: Results) -> Rows:
    """What a closed-form reader makes of all layers and of each half, where the visual half stands among the
    random ones, and text less visual with its interval.
    """
    return [
        {
            "representation": entry["representation"],
            "all_layers": entry["all_layers"],
            "visual_only": entry["visual_only"],
            "text_only": entry["text_only"],
            "random_half": entry["random_half"],
            "place": entry["visual"]["rank"],
            "p_lower": entry["visual"]["p_lower"],
            "p_two_sided": entry["visual"]["p_two_sided"],
            "place_of_text": entry["text"]["rank"],
            "text_minus_visual": contrast["drop"],
            "low": contrast["interval"][0],
            "high": contrast["interval"][1],
        }
        for entry in null_entries(results)
        for contrast in [entry["text_minus_visual"] or {"drop": None, "interval": (None, None)}]
    ]


def halves_rows(results: Results) -> Rows:
    """The score of every random half."""
    return [
        {"representation": entry["representation"], "half": f"random_half.{draw}", "score": score}
        for entry in null_entries(results)
        for draw, score in enumerate(entry["halves"])
    ]


def class_drop_rows(results: Results) -> Rows:
    """Recall of each class with all layers and with the visual ones, by representation, the difference and
    its 95 % interval, one at a time: paired by row, and of whole groups where there are groups.
    """
    classes = list(results.get("label_mapping", {}))
    return [
        {
            "representation": entry["representation"],
            "class": classes[entry["class"]],
            "test_rows": entry["rows"],
            MAIN_COMPARISON.first: entry["first"],
            MAIN_COMPARISON.second: entry["second"],
            "drop": entry["drop"],
            "low": entry["interval"][0],
            "high": entry["interval"][1],
        }
        for entry in (results.get("inference") or {}).get("classes", [])
    ]


def class_names(results: Results, length: int) -> list[str]:
    """The names of the classes in the order of their numbers, each of at most `length` characters."""
    return shortened(list(results.get("label_mapping", {})), length)


def confusion_rows(results: Results) -> Rows:
    """Counts summed over the runs, every pair of classes that occurred."""
    found = []
    classes = list(results.get("label_mapping", {}))
    for layer_set in layer_sets(results):
        for name, record in rows_of(results, layer_set).items():
            total = np.array(record["test_confusion_matrices"]).sum(0)
            found += [
                {
                    "layer_set": layer_set,
                    "representation": name,
                    "true": classes[i],
                    "predicted": classes[j],
                    "count": int(total[i, j]),
                }
                for i, j in np.argwhere(total)
            ]
    return found


def shares(record: dict) -> np.ndarray:
    """Of each true class's test rows, all runs together, the part that was given each class, (C, C); NaN for
    a class without a row.
    """
    total = np.array(record["test_confusion_matrices"], dtype=float).sum(0)
    support = total.sum(1, keepdims=True)
    return np.divide(total, support, out=np.full_like(total, np.nan), where=support > 0)


def retention_rows(results: Results) -> Rows:
    """What each layer set keeps of the accuracy above chance, where all layers are shown to be above it."""
    found = results.get("inference") or {}
    whole, chance = MAIN_COMPARISON.first, found.get("chance", 0.0)
    above = {
        name: entry["accuracy"] - chance
        for name in representations(results)
        if (entry := found.get("accuracies", {}).get(f"{whole}_{name}"))
        and name in found.get("above_chance", [])
    }
    return [
        {"representation": name, "layer_set": layer_set, "retention": (accuracy - chance) / above[name]}
        for layer_set in layer_sets(results)
        if layer_set != whole
        for name, accuracy in accuracies_of(results, layer_set).items()
        if name in above
    ]


def gaps_rows(results: Results) -> Rows:
    """Mean accuracy of each part of the split."""
    return [
        {"layer_set": layer_set, "representation": name, **{part: row[f"{part}_acc_mean"] for part in PARTS}}
        for layer_set in layer_sets(results)
        if not group_of(layer_set)
        for name, row in rows_of(results, layer_set).items()
    ]


def scatter_rows(results: Results) -> Rows:
    """What each cell's accuracy is set against: macro precision and recall, columns and seconds."""
    return [
        {
            "layer_set": layer_set,
            "representation": name,
            "accuracy": row["test_acc_mean"],
            "precision": row["test_precision_mean"],
            "recall": row["test_recall_mean"],
            "feature_dim": row["feature_dim"],
            "trained_dim": row["trained_dim"],
            "seconds_a_run": row["training_time_mean"],
        }
        for layer_set in layer_sets(results)
        if not group_of(layer_set)
        for name, row in rows_of(results, layer_set).items()
    ]


def learning_curves_rows(results: Results) -> Rows:
    """Validation accuracy and training loss of every run and epoch; epochs count from 1."""
    return [
        {
            "layer_set": layer_set,
            "representation": name,
            "run": run,
            "epoch": epoch,
            "val_acc": value,
            "train_loss": loss,
            "best": epoch == curve["best_epoch"],
        }
        for layer_set in layer_sets(results)
        if not group_of(layer_set)
        for name, row in rows_of(results, layer_set).items()
        for run, curve in enumerate(row["learning_curves"], 1)
        for epoch, (value, loss) in enumerate(
            zip(curve["val_acc_history"], curve["train_loss_history"], strict=True), 1
        )
    ]


def controls_rows(results: Results) -> Rows:
    """The null battery: accuracies, and what chance gives."""
    found = results.get("inference") or {}
    rows = [
        {
            "cell": entry["cell"],
            "accuracy": entry["accuracy"],
            "low": entry["interval"][0],
            "high": entry["interval"][1],
            "chance": found["chance"],
            "spread_of_chance": None,
        }
        for entry in found.get("controls", [])
    ]
    check = found.get("shuffled")
    return rows + (
        [
            {
                "cell": name,
                "accuracy": cell["accuracy"],
                "low": None,
                "high": None,
                "chance": cell["expected"],
                "spread_of_chance": cell.get("spread"),
            }
            for name, cell in check["cells"].items()
        ]
        if check
        else []
    )


def audits_rows(results: Results) -> Rows:
    """Accuracy of the same runs on changed test rows, and the part of predictions that stay."""
    return [
        {
            "audit": entry["audit"],
            "layer_set": entry["layer_set"],
            "representation": entry["representation"],
            "variant": variant,
            "accuracy": found["test_acc_mean"],
            "agreement": found["agreement"],
            "unchanged": found.get("unchanged_acc_mean", entry["test_acc_mean"]),
        }
        for entry in results.get("audits", [])
        for variant, found in entry["variants"].items()
    ]


def blocks_rows(results: Results) -> Rows:
    """Accuracy of every block and kind of layer alone, by representation."""
    names = [key.removesuffix("_results") for key in results if key.startswith("by_block.")]
    return [
        {
            "block": name.removeprefix("by_block.").rpartition(".")[0],
            "attention": name.rpartition(".")[2],
            "representation": representation,
            "accuracy": row["test_acc_mean"],
        }
        for name in names
        for representation, row in rows_of(results, name).items()
    ]


def scaling_rows(runs: list[Results]) -> Rows:
    """Accuracy of every cell of every experiment, what is lost against all layers, and what is retained."""
    found = []
    for results in runs:
        drops = {row["representation"]: row for row in drop_rows(results)}
        kept = {
            (row["representation"], row["layer_set"]): row["retention"] for row in retention_rows(results)
        }
        for row in accuracy_rows(results):
            is_second = row["layer_set"] == MAIN_COMPARISON.second
            drop_of = drops.get(row["representation"], {}) if is_second else {}
            found.append(
                {
                    "run": results["name"],
                    "group": results["group"],
                    "rows": results["data"].get("rows"),
                    **row,
                    "drop": drop_of.get("drop"),
                    "drop_low": drop_of.get("low"),
                    "drop_high": drop_of.get("high"),
                    "retention": kept.get((row["representation"], row["layer_set"])),
                }
            )
    return found
