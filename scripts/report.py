#!/usr/bin/env python3
"""Write the report of finished or unfinished runs: report.html, figures/ and tables/ beside results.json.

Of one output folder the page stands in it; of several, `--output` gets a page that sets them beside each other. Nothing is
computed anew but what a figure shows: every number is one of results.json or of the checkpoints.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from checkpointing import ResultStore, hash_of, write_bytes  # noqa: E402
from settings import Cell, InputError, group_of, title_of  # noqa: E402

FORMATS = ("html", "png", "pdf", "latex", "csv", "markdown")
RESOLUTION = 300           # dots an inch
LEADING = ("accuracy", "drop", "scaling")     # stand above the table
NARROW = ("accuracy", "drop", "class_drop", "retention", "precision_recall", "blocks", "controls")
CAPTIONS = {
    "accuracy": "Points: mean test accuracy; lines: 95 % intervals for new examples and runs; broken line: chance.",
    "drop": "Accuracy with all layers less that with the visual layers alone, with 95 % intervals for new examples and runs; filled: p < 0.05 "
            "after Holm's correction; band: the margin within which the two count as equal.",
    "class_drop": "From the confusion matrices; intervals take the two sets of predictions as independent and are rather too wide.",
    "retention": "Test accuracy of a layer set over that with all layers. A ratio of two accuracies: near chance it says little.",
    "learning_curves": "Validation accuracy of every run (faint), their mean while half of them go on (bold), and best epochs (points).",
    "confusion": "Test rows of all runs; lines are true classes and add up to one.",
    "gaps": "Means over runs.",
    "precision_recall": "Macro averages over the classes, means over runs.",
    "cost": "Columns before constant ones are left out; seconds are a run's own (of a packed run: its part).",
    "controls": "What is not, or only a part of, the weights. Strokes: chance; for shuffled labels, what is due to their frequencies.",
    "audits": "Predictions of the trained runs that stay the same when the test rows' weights are changed.",
    "blocks": "One block's attention layers of one kind alone.",
    "scaling": "Runs whose settings differ in more than the data set are not joined by lines.",
}


# --- what is to be shown


def result_folders(path: Path) -> list[Path]:
    """Folders of results that an argument names: itself, or those in an output directory. Raises InputError if there is none."""
    found = [path] if (path / "checkpoints").is_dir() else sorted(folder.parent for folder in path.glob("visual_ablation_*/checkpoints"))
    if not found:
        raise InputError(f"'{path}' holds no results: give an --output-dir of the experiment, or a folder visual_ablation_<data set> in it")
    return found


def load_results(folder: Path) -> dict:
    """results.json, with what has been finished since it was written; from the checkpoints alone where it is not there."""

    path, store = folder / "results.json", ResultStore(folder)
    results = json.loads(path.read_bytes()) if path.exists() else {}
    known = {f"{row['representation'].removesuffix('_' + key[:-8])}|{key[:-8]}" for key, rows in results.items() if key.endswith("_results")
             for row in rows} | {entry["cell"] for key in ("further_cells", "audits") for entry in results.get(key, [])}
    newer = [cell for cell in store.cells() if not {cell.name, f"{cell.representation}|{cell.layer_set}"} & known]
    if newer:
        records, unread = {}, {}
        for cell in store.cells():
            try:
                records[cell] = store.load(cell)
            except (OSError, ValueError, KeyError) as error:
                unread[cell] = f"its files cannot be read: {error}"
        if records:
            results = partial_results(results, records, unread, folder)
    if not results:
        raise InputError(f"'{folder}' has no finished cell yet")
    return results | {"name": folder_name(folder)}


def partial_results(header: dict, records: dict[Cell, dict], failures: dict[Cell, str], folder: Path) -> dict:
    """results.json of a run that goes on or was ended: what is finished, and no inference."""
    from reporting import collect

    first = next(iter(records.values()))
    classes = len(first["test_confusion_matrices"][0])
    kept = {key: value for key, value in header.items() if not key.endswith("_results")}
    known = {"dataset": folder.name.removeprefix("visual_ablation_"), "num_runs": len(first["per_run_results"]), "num_classes": classes,
             "label_mapping": {str(number): number for number in range(classes)}, "data": {}, "settings": {}} | kept
    return collect(records, failures, {}, known | {"inference": {}, "verdict": f"Not finished: {len(records)} cells so far. Intervals, tests and the "
                                                   "verdict are made when the run ends."})


def folder_name(folder: Path) -> str:
    return folder.resolve().parent.name


# --- tables


def number(value: float | None, digits: int = 1, factor: float = 100, sign: bool = False) -> dict:
    shown = "–" if value is None else f"{factor * value:{'+' if sign else ''}.{digits}f}"
    return {"shown": shown, "value": "" if value is None else repr(float(value)), "text": False}


def text(value: str) -> dict:
    return {"shown": value, "value": value, "text": True}


def main_table(results: dict) -> dict:
    """Every finished cell of the table, one a line."""
    inference = results.get("inference") or {}
    drops = {entry["representation"]: entry for comparison in inference.get("comparisons", [])
             if (comparison["first"], comparison["second"]) == ("all_layers", "visual_only") for entry in comparison["entries"]}
    columns = [("representation", True), ("layer set", True), ("test, %", False), ("95 % interval", False), ("drop, points", False),
               ("p (Holm)", False), ("± runs", False), ("val, %", False), ("train, %", False), ("macro F1, %", False), ("columns", False),
               ("best epoch", False), ("s a run", False)]
    rows = []
    for key in (key for key in results if key.endswith("_results")):
        layer_set = key.removesuffix("_results")
        for row in results[key]:
            name = row["representation"].removesuffix(f"_{layer_set}")
            entry, drop = inference.get("accuracies", {}).get(f"{layer_set}_{name}"), drops.get(name) if layer_set == "visual_only" else None
            accuracy = entry["accuracy"] if entry else row["test_acc_mean"]
            interval = {"shown": "–", "value": "", "text": False}
            if entry:
                low, high = entry["interval"]
                interval = {"shown": f"{100 * low:.1f} – {100 * high:.1f}", "value": repr(high - low), "text": False}
            rows.append([text(name), text(layer_set), number(accuracy), interval, number(drop["drop"] if drop else None, sign=True),
                         number(drop["p_holm"] if drop else None, 4, 1), number(row["test_acc_std"]), number(row["val_acc_mean"]),
                         number(row["train_acc_mean"]), number(row["test_f1_mean"]), number(row["feature_dim"], 0, 1),
                         number(row["best_epoch_mean"], 0, 1), number(row["training_time_mean"], 2, 1)])
    return {"name": "cells", "title": "All cells", "columns": [{"title": title, "text": is_text} for title, is_text in columns], "rows": rows,
            "note": "± runs is the std over seeds: training noise, not the uncertainty of the accuracy. Click a heading to sort."}


def joint_table(runs: list[dict]) -> dict:
    """The cells of several runs, each line with its run and rows."""
    tables = [main_table(results) for results in runs]
    rows = [[text(results["name"]), number(results["data"].get("rows"), 0, 1), *row] for results, table in zip(runs, tables, strict=True)
            for row in table["rows"]]
    return tables[0] | {"columns": [{"title": "run", "text": True}, {"title": "LoRAs", "text": False}, *tables[0]["columns"]], "rows": rows}


def summary_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """For a paper: a line a representation, accuracy ± half of its 95 % interval for each layer set, the drop and what it is worth."""
    from figures import accuracy_rows, layer_sets, main_comparison, representations

    sets = [name for name in layer_sets(results) if not group_of(name)]
    accuracies = {(row["representation"], row["layer_set"]): row for row in accuracy_rows(results)}
    drops, lines = {entry["representation"]: entry for entry in main_comparison(results)}, []
    for name in representations(results):
        line = [name]
        for layer_set in sets:
            row = accuracies.get((name, layer_set))
            half = "" if row is None or row["low"] is None else f" ± {50 * (row['high'] - row['low']):.1f}"
            line.append("–" if row is None else f"{100 * row['accuracy']:.1f}{half}")
        entry = drops.get(name)
        lines.append(line + ["–" if entry is None else f"{100 * entry['drop']:+.1f}{stars(entry)}"])
    return ["representation", *(title_of(name) for name in sets), "drop"], lines


def stars(entry: dict) -> str:
    """Marks of the adjusted p-value; = where the two are shown to be equal to within the margin."""
    p = entry["p_holm"]
    return "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "=" if entry["p_equivalence_holm"] < 0.05 else ""


def caption(results: dict) -> str:
    margin = 100 * results.get("settings", {}).get("margin", 0.02)
    return ("Test accuracy in percent ± half of its 95 % interval for new examples and runs; drop: all layers minus visual only, points; * p < 0.05, "
            f"** p < 0.01, *** p < 0.001 after Holm's correction; = equal to within {margin:g} points (two one-sided tests, p < 0.05).")


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
            sections.append({"name": name, "title": title, "svg": Markup(inline_svg(figure, name, title)), "caption": CAPTIONS[name],
                             "narrow": name in NARROW})
    return sections, files


def inline_svg(figure, name: str, title: str) -> str:
    """An svg element whose text takes the page's colour, and whose ids are its own."""
    import matplotlib
    from figures import INK

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # labels without a colour of their own are black in SVG
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" fill="currentColor" ', svg, count=1)


def page(runs: list[dict], sections: list[dict], tables: list[dict], blocks: list[dict], title: str, made_from: str, running: bool = False) -> bytes:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined)
    checks = [(results.get("inference") or {}).get("shuffled") for results in runs]
    shown = [{"name": results["name"], "verdict": results["verdict"], "suspect": bool(check and check["suspect"])}
             for results, check in zip(runs, checks, strict=True)]
    return environment.get_template("report.html.j2").render(
        runs=shown, sections=sections, tables=tables, blocks=blocks, title=title, leading=LEADING, made_from=made_from, running=running).encode()


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
    if "html" in formats:
        blocks = [card_block(results), manifest_block(folder), failure_block(results)]
        files["report.html"] = page([results], sections, [main_table(results)], list(filter(None, blocks)), f"Visual ablation: {results['dataset']}",
                                    made_from(folder))
    if "latex" in formats:
        files["tables/results.tex"] = latex_table(results).encode()
    if "markdown" in formats:
        files["tables/results.md"] = markdown_table(results).encode()
    return write_files(folder, files)


def made_from(folder: Path) -> str:
    """Of what a page is made: the hash of results.json and of this program's own files."""
    path = folder / "results.json"
    own = [file.read_bytes().hex() for file in sorted(Path(__file__).parent.glob("report*")) if file.is_file()]
    own.append((Path(__file__).parent / "figures.py").read_bytes().hex())
    return hash_of([hash_of(path.read_bytes()) if path.exists() else "", hash_of(own)])


def is_current(folder: Path) -> bool:
    """Whether report.html was made from what is in the folder now."""
    path = folder / "report.html"
    return path.exists() and f'name="made-from" content="{made_from(folder)}"' in path.read_text(errors="replace")


def refresh(folder: Path, header: dict, records: dict[Cell, dict], failures: dict[Cell, str], total: int) -> None:
    """While a run goes on: the page with its table alone."""
    results = partial_results(header, records, failures, folder) | {"name": folder_name(folder)}
    results["verdict"] = f"Running: {len(records)} of {total} cells are finished. Figures, intervals and the verdict are made when the run ends."
    blocks = [card_block(results), failure_block(results)]
    title = f"Visual ablation: {results['dataset']}"
    write_bytes(folder / "report.html", page([results], [], [main_table(results)], list(filter(None, blocks)), title, "", running=True))


def write_comparison(folders: list[Path], output: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Several runs beside each other."""
    from figures import scaling, scaling_rows

    runs = [load_results(folder) for folder in folders]
    for results in runs:
        places = ("dataset", "output_dir", "cache_dir")
        results["settings_group"] = hash_of({name: value for name, value in flat(results["settings"]).items() if name not in places})
    names = [results["name"] for results in runs]
    for results, folder in zip(runs, folders, strict=True):
        if names.count(results["name"]) > 1:
            results["name"] = f"{results['name']}/{folder.name}"
    sections, files = sections_and_files({"scaling": ("Accuracy and size", scaling_rows(runs), scaling(runs))}, formats)
    if "html" in formats:
        first = runs[0]["settings"]
        blocks = [{"name": "differences", "title": "Settings that differ", "text": "", "entries": [
            (f"{results['name']}: {name}", shown(value)) for results in runs for name, value in flat(results["settings"]).items()
            if any(flat(other["settings"]).get(name) != value for other in runs)]}] if first else []
        files["report.html"] = page(runs, sections, [joint_table(runs)], blocks, "Visual ablation: " + ", ".join(results["name"] for results in runs),
                                    hash_of(names))
    if "csv" in formats:
        table = joint_table(runs)
        columns = [column["title"] for column in table["columns"]]
        files["tables/cells.csv"] = csv_text([dict(zip(columns, (cell["value"] for cell in row), strict=True)) for row in table["rows"]]).encode()
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
