#!/usr/bin/env python3
"""Write the report of finished or unfinished runs: report.html, figures/ and tables/ beside results.json.

Of one output folder the page stands in it; of several, `--output` gets a page that sets them beside each other. Nothing is
computed anew but what a figure shows: every number is one of results.json or of the checkpoints.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from report_rows import accuracy_of, accuracy_rows, layer_sets, main_comparison, representations  # noqa: E402

from checkpointing import ResultStore, hash_of, utc_now, write_bytes  # noqa: E402
from settings import Cell, InputError, TrainingSettings, group_of, title_of  # noqa: E402

FORMATS = ("html", "png", "pdf", "latex", "csv", "markdown")
RESOLUTION = 300           # dots an inch
STAMP = ".report.json"     # what a report was made from, and the hashes of its files
LEADING = ("accuracy", "drop", "scaling", "scaling_drop", "scaling_retention")     # stand above the table
OVER_SPLITS = ("accuracy", "drop", "retention", "controls")               # speak of all splits, the other figures of the first
# that two runs may differ in and yet be joined by a line
OWN_SETTINGS = ("dataset", "data_split", "revision", "output_dir", "cache_dir", "cache_features", "device", "representations", "layer_sets",
                "named_layer_sets", "controls", "classifiers", "audit", "metadata_columns")
NARROW = ("accuracy", "drop", "class_drop", "retention", "precision_recall", "blocks", "controls")
CAPTIONS = {
    "accuracy": "Points: mean test accuracy; lines: 95 % intervals for new examples and runs; broken line: chance.",
    "drop": "Accuracy with all layers less that with the visual layers alone, with 95 % intervals for new examples and runs; filled: p < 0.05 "
            "after Holm's correction; band: the margin within which the two count as equal.",
    "class_drop": "From the confusion matrices. Intervals (Newcombe) take rows and the two sets of predictions as independent: too wide where both "
                  "are right about the same rows, too narrow where test rows come in groups.",
    "retention": "Test accuracy of a layer set over that with all layers. A ratio of two accuracies: near chance it says little.",
    "learning_curves": "Validation accuracy of every run (faint), their mean while half of them go on (bold), and best epochs (points).",
    "confusion": "Test rows of all runs; lines are true classes and add up to one, empty where no test row is of a class.",
    "confusion_all": "The same for every representation; classes in the same order.",
    "gaps": "Means over runs.",
    "precision_recall": "Macro averages over the classes, means over runs.",
    "cost": "Columns before constant ones are left out; seconds are a run's own (of a packed run: its part).",
    "controls": "What is not, or only a part of, the weights. Strokes: chance; for shuffled labels what is due to their frequencies, and in grey the "
                "range of 95 % of orders of the test labels, for each cell alone. All cells share their labels and rows, so they err together.",
    "audits": "Predictions of the trained runs that stay the same when the test rows' weights are changed.",
    "blocks": "One block's attention layers of one kind alone.",
    "scaling": "Lines join runs of equal settings, classes and layers; sizes are drawn a little apart where runs stand beside each other.",
    "scaling_drop": "All layers less visual only, with 95 % intervals.",
    "scaling_retention": "Test accuracy of a layer set over that with all layers.",
}


# --- what is to be shown


def result_folders(path: Path) -> list[Path]:
    """Folders of results that an argument names: itself, or those in an output directory. Raises InputError if there is none."""
    found = [path] if (path / "checkpoints").is_dir() else sorted(folder.parent for folder in path.glob("visual_ablation_*/checkpoints"))
    if not found:
        raise InputError(f"'{path}' holds no results: give an --output-dir of the experiment, or a folder visual_ablation_<data set> in it")
    return found


def load_results(folder: Path) -> dict:
    """results.json, with what the same settings have finished since it was written; from the checkpoints alone where it is not there.

    What its own run left out, made with other settings or damaged, stays out and is said.
    """
    path, store = folder / "results.json", ResultStore(folder)
    content = path.read_bytes() if path.exists() else b""
    results = json.loads(content) if content else {}
    known = {row["cell"]: row for key, rows in results.items() if key.endswith("_results") or key == "further_cells" for row in rows}
    known |= {entry["cell"]: entry for entry in results.get("audits", [])}
    records, left_out = {}, {}
    for cell in store.cells():
        try:
            records[cell] = store.load(cell)
        except (OSError, ValueError, KeyError) as error:
            left_out[cell] = f"its files cannot be read: {error}"
            continue
        if cell.name not in known and known and common_settings(records[cell]) not in map(common_settings, known.values()):
            left_out[cell] = "finished with other settings, and not among these results"
            del records[cell]
    if not records and not results:
        raise InputError(f"'{folder}' has no finished cell yet")
    if any(cell.name not in known for cell in records):
        results = partial_results(results, records, folder)
    reported = {entry["cell"] for entry in results["failed_cells"]}
    results["failed_cells"] = results["failed_cells"] + [{"cell": cell.name, "error": error} for cell, error in left_out.items()
                                                         if cell.name not in reported]
    return results | {"name": folder.resolve().parent.name, "made_from": made_from(content)}


def common_settings(record: dict) -> str:
    """What all cells of a command share: the data and how it trains."""
    shared = {"data", *(field.name for field in dataclasses.fields(TrainingSettings))}
    return hash_of({name: value for name, value in record.get("made_with", {}).items() if name in shared})


def partial_results(header: dict, records: dict[Cell, dict], folder: Path, failures: dict[Cell, str] | None = None) -> dict:
    """results.json of a run that goes on or was ended: what is finished, and no inference. `header` has what else is known."""
    from reporting import collect

    first = next(iter(records.values()))
    classes = len(first["test_confusion_matrices"][0])
    kept = {key: value for key, value in header.items() if not key.endswith("_results")}
    known = {"dataset": folder.name.removeprefix("visual_ablation_"), "num_runs": len(first["per_run_results"]), "num_classes": classes,
             "label_mapping": {str(number): number for number in range(classes)}, "data": {}, "settings": {}} | kept
    failed = {Cell.named(entry["cell"]): entry["error"] for entry in header.get("failed_cells", [])}
    skipped = {Cell.named(entry["cell"]): entry["reason"] for entry in header.get("skipped_cells", [])}
    failed = {cell: error for cell, error in (failed | (failures or {})).items() if cell is not None and cell not in records}
    skipped = {cell: reason for cell, reason in skipped.items() if cell is not None and cell not in records}
    verdict = f"Not finished: {len(records)} cells so far. Intervals, tests and the verdict are made when the run ends."
    return collect(records, failed, skipped, known | {"inference": {}, "verdict": verdict})


# --- tables


def number(value: float | None, digits: int = 1, factor: float = 100, sign: bool = False) -> dict:
    shown = "–" if value is None else f"{factor * value:{'+' if sign else ''}.{digits}f}"
    return {"shown": shown, "value": "" if value is None else repr(float(value)), "text": False}


def text(value: str) -> dict:
    return {"shown": value, "value": value, "text": True}


def cell_rows(results: dict) -> list[dict]:
    """Every finished cell of the table, with all digits; accuracy, interval and drop are over all splits, the rest is of the first."""
    inference, found = results.get("inference") or {}, []
    drops = {entry["representation"]: entry for entry in main_comparison(results)}
    for key in (key for key in results if key.endswith("_results")):
        layer_set = key.removesuffix("_results")
        for row in results[key]:
            name = row["representation"].removesuffix(f"_{layer_set}")
            low, high = (inference.get("accuracies", {}).get(f"{layer_set}_{name}") or {"interval": (None, None)})["interval"]
            drop = drops.get(name, {}) if layer_set == "visual_only" else {}
            found.append({
                "representation": name, "layer_set": layer_set, "test_acc": accuracy_of(results, layer_set, name), "low": low, "high": high,
                "drop": drop.get("drop"), "p_holm": drop.get("p_holm"), "std_over_runs": row["test_acc_std"], "val_acc": row["val_acc_mean"],
                "train_acc": row["train_acc_mean"], "test_f1": row["test_f1_mean"], "feature_dim": row["feature_dim"],
                "best_epoch": row["best_epoch_mean"], "seconds_a_run": row["training_time_mean"]})
    return found


def further_rows(results: dict) -> list[dict]:
    """Every finished cell beside the table: of other splits, by other classifiers, controls."""
    inference, found = results.get("inference") or {}, []
    known, shuffled = inference.get("accuracies", {}), (inference.get("shuffled") or {}).get("cells", {})
    for row in results.get("further_cells", []):
        low, high = (known.get(row["cell"]) or {"interval": (None, None)})["interval"]
        found.append({"cell": row["cell"], "test_acc": row["test_acc_mean"], "low": low, "high": high, "std_over_runs": row["test_acc_std"],
                      "val_acc": row["val_acc_mean"], "train_acc": row["train_acc_mean"], "expected": shuffled.get(row["cell"], {}).get("expected"),
                      "columns": row["feature_dim"]})
    return found


COLUMNS = {   # of a page's tables: heading, digits, factor
    "run": ("run", None, None), "rows": ("LoRAs", 0, 1), "representation": ("representation", None, None), "layer_set": ("layer set", None, None),
    "cell": ("cell", None, None), "test_acc": ("test, %", 1, 100), "interval": ("95 % interval", 1, 100), "drop": ("drop, points", 1, 100),
    "p_holm": ("p (Holm)", 4, 1), "std_over_runs": ("± runs", 1, 100), "val_acc": ("val, %", 1, 100), "train_acc": ("train, %", 1, 100),
    "test_f1": ("macro F1, %", 1, 100), "feature_dim": ("columns", 0, 1), "columns": ("columns", 0, 1), "best_epoch": ("best epoch", 0, 1),
    "seconds_a_run": ("s a run", 2, 1), "expected": ("due by chance, %", 1, 100),
}


def page_table(name: str, title: str, note: str, rows: list[dict]) -> dict:
    """Rows as the page shows and sorts them; `low` and `high` become one column, sorted by its width."""
    columns = ["interval" if column == "low" else column for column in rows[0] if column != "high"]
    lines = []
    for row in rows:
        interval = {"shown": "–", "value": "", "text": False}
        if row["low"] is not None:
            interval = {"shown": f"{100 * row['low']:.1f} – {100 * row['high']:.1f}", "value": repr(row["high"] - row["low"]), "text": False}
        lines.append([interval if column == "interval" else text(row[column]) if COLUMNS[column][1] is None
                      else number(row[column], *COLUMNS[column][1:], sign=column == "drop") for column in columns])
    heads = [{"title": COLUMNS[column][0], "text": COLUMNS[column][1] is None} for column in columns]
    return {"name": name, "title": title, "note": note, "columns": heads, "rows": lines}


def page_tables(results: dict) -> list[dict]:
    splits = (results.get("inference") or {}).get("splits", 1)
    note = "± runs is the std over seeds: training noise, not the uncertainty of the accuracy."
    if splits > 1:
        note += f" Accuracy, interval and drop are over {splits} splits, all else is of the first."
    tables = [page_table("cells", "The table", note, rows)] if (rows := cell_rows(results)) else []
    if further := further_rows(results):
        tables.append(page_table("further", "Beside the table", "Other splits, other classifiers and controls, each cell by itself.", further))
    return tables


def joint_rows(runs: list[dict]) -> list[dict]:
    """The cells of several runs, each line with its run and rows."""
    return [{"run": results["name"], "rows": results["data"].get("rows"), **row} for results in runs for row in cell_rows(results)]


def summary_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """For a paper: a line a representation, accuracy ± half of its 95 % interval for each layer set, the drop and what it is worth."""
    sets = [name for name in layer_sets(results) if not group_of(name)]
    accuracies = {(row["representation"], row["layer_set"]): row for row in accuracy_rows(results)}
    drops, lines = {entry["representation"]: entry for entry in main_comparison(results)}, []
    for name in representations(results):
        line = [name]
        for layer_set in sets:
            row = accuracies.get((name, layer_set))
            line.append("–" if row is None else f"{100 * row['accuracy']:.1f}{half_interval(row)}")
        entry = drops.get(name)
        lines.append(line + ["–" if entry is None else f"{100 * entry['drop']:+.1f}{stars(entry)}"])
    return ["representation", *(title_of(name) for name in sets), "drop"], lines


def half_interval(row: dict) -> str:
    """± half of it; where it ends at 0 or 100 %, and is not half as wide to that side, both ends."""
    if row["low"] is None:
        return ""
    if row["low"] <= 0 or row["high"] >= 1:
        return f" ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return f" ± {50 * (row['high'] - row['low']):.1f}"


def stars(entry: dict) -> str:
    """Marks of the adjusted p-value; = where the two are shown to be equal to within the margin."""
    p = entry["p_holm"]
    return "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "=" if entry["p_equivalence_holm"] < 0.05 else ""


def caption(results: dict) -> str:
    """What the table's signs mean, of those that are in it."""
    words = "Test accuracy in percent"
    if any(row["low"] is not None for row in accuracy_rows(results)):
        words += " ± half of its 95 % interval for new examples and runs, or both ends where it meets 0 or 100"
    if main_comparison(results):
        margin = 100 * main_comparison(results)[0]["margin"]
        words += ("; drop: all layers minus visual only, points; * p < 0.05, ** p < 0.01, *** p < 0.001 after Holm's correction; = equal to within "
                  f"{margin:g} points (two one-sided tests, p < 0.05)")
    return words + "."


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$"}


def latex_escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex_table(results: dict) -> str:
    """For \\usepackage{booktabs}."""
    header, lines = summary_rows(results)
    lines = [" & ".join(map(latex_escaped, line)) + r" \\" for line in [header, *lines]]
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{latex_escaped(caption(results))}}}",
                      rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
                      r"\end{tabular}", r"\end{table}", ""])


def markdown_table(results: dict) -> str:
    header, lines = summary_rows(results)
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *([cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{caption(results).replace('*', chr(92) + '*')}\n\n{results['verdict']}\n"


def csv_text(rows: list[dict]) -> str:
    """Full precision; an empty field where there is no value."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- the page


def sections_and_files(drawings: dict, formats: tuple[str, ...]) -> tuple[list[dict], dict[str, bytes]]:
    """Of {name: (title, rows, figure)}: what the page shows, and the files by their path under the folder."""
    import matplotlib
    from figures import STYLE
    from markupsafe import Markup

    sections, files = [], {}
    for name, (title, rows, figure) in drawings.items():
        if rows and "csv" in formats:
            files[f"tables/{name}.csv"] = csv_text(rows).encode()
        if figure is None:
            continue
        for kind in ("png", "pdf"):
            if kind in formats:
                out = io.BytesIO()
                with matplotlib.rc_context(STYLE):                       # which embeds TrueType fonts
                    figure.savefig(out, format=kind, dpi=RESOLUTION, metadata={"CreationDate": None} if kind == "pdf" else {})
                files[f"figures/{name}.{kind}"] = out.getvalue()
        if "html" in formats:
            data = f" Data: tables/{name}.csv." if rows and "csv" in formats else ""
            sections.append({"name": name, "title": title, "svg": Markup(inline_svg(figure, name, title)), "caption": CAPTIONS[name] + data,
                             "narrow": name in NARROW})
    return sections, files


def inline_svg(figure, name: str, title: str) -> str:
    """An svg element whose text takes the page's colour, and whose ids are its own."""
    import matplotlib
    from figures import INK, PAPER

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # labels without a colour of their own are black in SVG
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" fill="currentColor" ', svg, count=1)


def page(runs: list[dict], sections: list[dict], tables: list[dict], blocks: list[dict], title: str, running: bool = False) -> bytes:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined)
    checks = [(results.get("inference") or {}).get("shuffled") for results in runs]
    shown = [{"name": results["name"], "verdict": results["verdict"], "suspect": bool(check and check["suspect"])}
             for results, check in zip(runs, checks, strict=True)]
    return environment.get_template("report.html.j2").render(
        runs=shown, sections=sections, tables=tables, blocks=blocks, title=title, leading=LEADING, running=running).encode()


def card_block(results: dict) -> dict:
    """The data set."""
    data = results.get("data") or {}
    counted = {part: ", ".join(f"{name} {n}" for name, n in data.get(part, {}).items() if n) for part in ("split", "layers", "rows_per_class")}
    entries = [("name", results["dataset"]), ("LoRAs", data.get("rows", "–")), ("split", counted["split"]), ("layers", counted["layers"]),
               ("rank", ", ".join(map(str, data.get("ranks", [])))), ("weights a LoRA", f"{data['weights_per_row']:,}" if data else "–"),
               ("classes", results["num_classes"]), ("LoRAs a class", counted["rows_per_class"]), ("content hash", data.get("identity", "–"))]
    return {"name": "data", "title": "Data set", "entries": [(name, value) for name, value in entries if value not in ("", "–")], "text": ""}


def manifest_block(folder: Path) -> dict:
    """How it was made."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"name": "manifest", "title": "How it was made", "entries": [], "text": "The run has not ended: there is no manifest yet."}
    manifest = json.loads(path.read_bytes())
    settings = {name: value for name, value in manifest["settings"].items() if name != "training"} | manifest["settings"]["training"]
    entries = [("command", manifest["command"]), ("started", manifest["started"]),
               ("seconds", ", ".join(f"{stage} {spent:.1f}" for stage, spent in manifest["seconds"].items())),
               ("machine", ", ".join(f"{name} {value}" for name, value in manifest["machine"].items() if value)),
               ("versions", ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())),
               ("settings", ", ".join(f"{name} {shown(value)}" for name, value in settings.items() if value not in ("", [], {})))]
    return {"name": "manifest", "title": "How it was made", "entries": entries, "text": ""}


def shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def failure_block(results: dict) -> dict | None:
    entries = [(entry["cell"], entry["error"]) for entry in results.get("failed_cells", [])]
    entries += [(entry["cell"], f"skipped: {entry['reason']}") for entry in results.get("skipped_cells", [])]
    return {"name": "failures", "title": "Failed and skipped cells", "entries": entries, "text": ""} if entries else None


def write_report(folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """The report of one folder of results; the files that were written. Raises InputError if nothing is finished."""
    results = load_results(folder)
    from figures import FIGURES

    drawings = {name: (title, rows(results), draw(results)) for name, (title, rows, draw) in FIGURES.items()}
    sections, files = sections_and_files(drawings, formats)
    if (results.get("inference") or {}).get("splits", 1) > 1:
        for section in (section for section in sections if section["name"] not in OVER_SPLITS):
            section["caption"] = f"Of the first split. {section['caption']}"
    if "html" in formats:
        blocks = [card_block(results), manifest_block(folder), failure_block(results)]
        files["report.html"] = page([results], sections, page_tables(results), list(filter(None, blocks)), f"Visual ablation: {results['dataset']}")
    if "latex" in formats:
        files["tables/results.tex"] = latex_table(results).encode()
    if "markdown" in formats:
        files["tables/results.md"] = markdown_table(results).encode()
    for name, rows in (("cells", cell_rows(results)), ("further_cells", further_rows(results))):
        if rows and "csv" in formats:
            files[f"tables/{name}.csv"] = csv_text(rows).encode()
    written = write_files(folder, files)
    for name in FIGURES:                                                 # of an earlier report, and not of this one
        for old in (f"figures/{name}.png", f"figures/{name}.pdf", f"tables/{name}.csv"):
            if old not in files and old.rpartition(".")[2] in formats:
                (folder / old).unlink(missing_ok=True)
    stamp = {"made_from": results["made_from"], "formats": sorted(formats), "files": {name: hash_of(content) for name, content in files.items()}}
    write_bytes(folder / STAMP, json.dumps(stamp).encode())
    return written




def made_from(content: bytes) -> str:
    """The hash of results.json and of this program's own files."""
    own = [*sorted(Path(__file__).parent.glob("report*")), Path(__file__).parent / "figures.py"]   # report_rows.py and the page's template too
    return hash_of([hash_of(content), *(hash_of(file.read_bytes()) for file in own if file.is_file())])


def is_current(folder: Path) -> bool:
    """Whether the whole report is there, as it was written, and made from what is in the folder now."""
    try:
        stamp = json.loads((folder / STAMP).read_bytes())
        return (stamp["made_from"] == made_from((folder / "results.json").read_bytes()) and stamp["formats"] == sorted(FORMATS)
                and all(hash_of((folder / name).read_bytes()) == of_file for name, of_file in stamp["files"].items()))
    except (OSError, ValueError, KeyError):
        return False


def refresh(folder: Path, header: dict, records: dict[Cell, dict], failures: dict[Cell, str], total: int) -> None:
    """While a run goes on: the page with its table alone."""
    results = partial_results(header, records, folder, failures) | {"name": folder.resolve().parent.name}
    results["verdict"] = (f"Running: {len(records)} of {total} cells were finished at {utc_now()}. Figures, intervals and the verdict are made when "
                          "the run ends. If that time is long past, it was ended: rerun the same command to resume.")
    blocks = [card_block(results), failure_block(results)]
    title = f"Visual ablation: {results['dataset']}"
    (folder / STAMP).unlink(missing_ok=True)
    write_bytes(folder / "report.html", page([results], [], page_tables(results), list(filter(None, blocks)), title, running=True))


def write_comparison(folders: list[Path], output: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Several runs beside each other. Lines join those that differ in nothing but the data set and its size."""
    from figures import COMPARISONS

    runs = [load_results(folder) for folder in folders]
    names = [results["name"] for results in runs]
    for results, folder in zip(runs, folders, strict=True):
        if names.count(results["name"]) > 1:
            results["name"] = str(folder)
    joined: list[tuple[str, set]] = []                                   # groups of runs, and their numbers of rows
    for results in runs:
        own = {name: value for name, value in flat(results["settings"]).items() if name not in OWN_SETTINGS}
        kind = hash_of([own, results.get("label_mapping"), results.get("layer_names")]) if own else results["name"]
        place = next((i for i, (other, sizes) in enumerate(joined) if other == kind and results["data"].get("rows") not in sizes), len(joined))
        if place == len(joined):
            joined.append((kind, set()))
        joined[place][1].add(results["data"].get("rows"))
        results["group"] = place
    sections, files = sections_and_files({name: (title, rows(runs), draw(runs)) for name, (title, rows, draw) in COMPARISONS.items()}, formats)
    rows = joint_rows(runs)
    if "html" in formats:
        differing = [(f"{results['name']}: {name}", shown(value)) for results in runs for name, value in flat(results["settings"]).items()
                     if any(flat(other["settings"]).get(name) != value for other in runs)]
        blocks = [{"name": "differences", "title": "Settings that differ", "text": "", "entries": differing}]
        blocks += [card_block(results) | {"name": f"data{i}", "title": f"Data set of {results['name']}"} for i, results in enumerate(runs)]
        table = page_table("cells", "The tables", "± runs is the std over seeds: training noise, not the uncertainty of the accuracy.", rows)
        files["report.html"] = page(runs, sections, [table], blocks, "Visual ablation: " + ", ".join(results["name"] for results in runs))
    if "csv" in formats:
        files["tables/cells.csv"] = csv_text(rows).encode()
    if "markdown" in formats:
        files["tables/results.md"] = "\n".join(f"### {results['name']}\n\n{markdown_table(results)}" for results in runs).encode()
    if "latex" in formats:
        files["tables/results.tex"] = "\n".join(latex_table(results) for results in runs).encode()
    return write_files(output, files)


def flat(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "training"} | settings.get("training", {})


def write_files(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in sorted(files.items(), key=lambda entry: entry[0] == "report.html"):   # the page last: then all is there
        write_bytes(folder / name, content)
    return [folder / name for name in files]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", metavar="OUTPUT_DIR", nargs="+", type=Path, help="output folders of the experiment; several are compared")
    parser.add_argument("--format", default=",".join(FORMATS), help=f"what to write, with commas between (default: all of {', '.join(FORMATS)})")
    parser.add_argument("--output", type=Path, default=Path("report_comparison"), help="folder of a comparison (default: report_comparison)")
    arguments = parser.parse_args(argv)
    formats = tuple(filter(None, arguments.format.split(",")))
    unknown = [name for name in formats if name not in FORMATS]
    try:
        if unknown or not formats:
            raise InputError(f"unknown --format '{','.join(unknown)}': use {', '.join(FORMATS)}")
        folders = [folder for path in arguments.folders for folder in result_folders(path)]
        written = write_report(folders[0], formats) if len(folders) == 1 else write_comparison(folders, arguments.output, formats)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
