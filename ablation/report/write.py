"""Writing a report: of one folder, of several beside each other, and of an experiment that goes on."""

from __future__ import annotations

import functools
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation.cells import Cell
from ablation.forked import cores, each_done
from ablation.report.load import Results, load_results, made_from, partial_results
from ablation.report.page import (
    data_block,
    differences_block,
    failure_block,
    flat_settings,
    manifest_block,
    render_page,
    render_running_page,
)
from ablation.report.rows import layer_sets, null_rows
from ablation.report.tables import (
    RUNS_NOTE,
    cell_rows,
    csv_table,
    further_rows,
    joint_rows,
    latex_table,
    markdown_escaped,
    markdown_table,
    page_table,
    page_tables,
)
from ablation.text_table import showable
from checkpointing import hash_of, make_folder, parse_json, read_bytes, utc_now, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ablation.report.figures import Drawing

FORMATS = ("html", "png", "pdf", "latex", "csv", "markdown")
RESOLUTION = 300  # dots an inch
STAMP = ".report.json"  # what a report was made from, and the hashes of its files
# Settings in which two runs may differ and yet be joined by a line.
OWN_SETTINGS = (
    "dataset",
    "data_split",
    "revision",
    "output_dir",
    "cache_dir",
    "cache_features",
    "device",
    "representations",
    "layer_sets",
    "named_layer_sets",
    "controls",
    "classifiers",
    "audit",
    "metadata_columns",
)
Files = dict[str, bytes]  # content by the path below the folder


# --- one folder


def write_report(folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write the report of one folder of results; returns the files.
    Raises InputError if nothing is finished.
    """
    from ablation.report.figures import FIGURES

    results = load_results(folder)
    sections, files = draw_all(FIGURES, results, formats)
    if "html" in formats:
        shown = showable(results)
        title = f"Visual ablation: {shown['dataset']}"
        blocks = [data_block(shown), manifest_block(folder), failure_block(shown)]
        files["report.html"] = render_page([shown], title, sections, page_tables(shown), blocks)
    files |= table_files(results, formats)
    written = write_files(folder, files)
    remove_earlier(folder, list(FIGURES), files, formats)
    stamp = {
        "made_from": results["made_from"],
        "formats": sorted(formats),
        "files": {name: hash_of(content) for name, content in files.items()},
    }
    write_bytes(folder / STAMP, json.dumps(stamp).encode())
    return written


def table_files(results: Results, formats: tuple[str, ...]) -> Files:
    """The tables of an experiment besides those of its figures."""
    files, shown = {}, showable(results)
    if "latex" in formats:
        files["tables/results.tex"] = latex_table(shown).encode()
    if "markdown" in formats:
        files["tables/results.md"] = markdown_table(shown).encode()
    tables = {"cells": cell_rows(results), "further_cells": further_rows(results), "null": null_rows(results)}
    for name, rows in tables.items():
        if rows and "csv" in formats:
            files[f"tables/{name}.csv"] = csv_table(rows)
    return files


def remove_earlier(folder: Path, names: list[str], files: Files, formats: tuple[str, ...]) -> None:
    """Remove figures and tables of an earlier report that this one does not have."""
    for name in names:
        for old in (f"figures/{name}.png", f"figures/{name}.pdf", f"tables/{name}.csv"):
            if old not in files and old.rpartition(".")[2] in formats:
                (folder / old).unlink(missing_ok=True)


def is_current(folder: Path) -> bool:
    """True if the whole report is there, as it was written, and made from the folder's present results."""
    try:
        stamp = parse_json(read_bytes(folder / STAMP))
        return (
            stamp["made_from"] == made_from(read_bytes(folder / "results.json"))
            and stamp["formats"] == sorted(FORMATS)
            and all(hash_of(read_bytes(folder / name)) == own for name, own in stamp["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def refresh(
    folder: Path, header: Results, records: dict[Cell, dict], failures: dict[Cell, str], total: int
) -> None:
    """While cells are computed: write the page with its table alone. `total` cells are to be finished."""
    results = partial_results(header, records, folder, failures)
    results["name"] = folder.resolve().parent.name
    results.pop("verdict_parts", None)
    results["verdict"] = (
        f"Running: {len(records)} of {total} cells were finished at {utc_now()}. Figures, intervals and the "
        "verdict are made when the run ends. If that time is long past, it was ended: rerun the same command "
        "to resume."
    )
    (folder / STAMP).unlink(missing_ok=True)
    results = showable(results)
    title = f"Visual ablation: {results['dataset']}"
    blocks = [data_block(results), failure_block(results)]
    write_bytes(folder / "report.html", render_running_page(results, title, page_tables(results), blocks))


# --- several folders


def write_comparison(folders: list[Path], output: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write a report of several runs beside each other; returns the files.

    Lines join runs that differ in nothing but the data set and its size.
    """
    from ablation.report.figures import COMPARISON_FIGURES

    runs = [load_results(folder) for folder in folders]
    names = [results["name"] for results in runs]
    for results, folder in zip(runs, folders, strict=True):
        if names.count(results["name"]) > 1:
            results["name"] = str(folder)
    number_comparable_runs(runs)
    sections, files = draw_all(COMPARISON_FIGURES, runs, formats)
    rows, shown = joint_rows(runs), showable(runs)
    if "html" in formats:
        cards = [
            data_block(results) | {"name": f"data{i}", "title": f"Data set of {results['name']}"}
            for i, results in enumerate(shown)
        ]
        title = "Visual ablation: " + ", ".join(results["name"] for results in shown)
        tables = [page_table("cells", "The tables", RUNS_NOTE, joint_rows(shown))]
        files["report.html"] = render_page(shown, title, sections, tables, [differences_block(shown), *cards])
    if "csv" in formats:
        files["tables/cells.csv"] = csv_table(rows)
    if "markdown" in formats:
        parts = [f"### {markdown_escaped(results['name'])}\n\n{markdown_table(results)}" for results in shown]
        files["tables/results.md"] = "\n".join(parts).encode()
    if "latex" in formats:
        files["tables/results.tex"] = "\n".join(map(latex_table, shown)).encode()
    return write_files(output, files)


def number_comparable_runs(runs: list[Results]) -> None:
    """Give each run the number of its `group`: runs of one group have equal settings and different sizes."""
    groups: list[tuple[str, set]] = []  # what the group's runs share, and their numbers of rows
    for results in runs:
        settings = flat_settings(results["settings"])
        own = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
        shared = results["name"]
        if own:
            shared = hash_of([own, results.get("label_mapping"), results.get("layer_names")])
        rows = results["data"].get("rows")
        fitting = (i for i, (other, sizes) in enumerate(groups) if other == shared and rows not in sizes)
        number = next(fitting, len(groups))
        if number == len(groups):
            groups.append((shared, set()))
        groups[number][1].add(rows)
        results["group"] = number


# --- figures and files


def draw_all(
    drawings: dict[str, Drawing], results: Any, formats: tuple[str, ...]
) -> tuple[list[dict], Files]:
    """The sections of the page and the files of some figures, each drawn on a core of its own."""
    from ablation.report.style import colour_of

    for run in results if isinstance(results, list) else [results]:
        for layer_set in layer_sets(run):
            colour_of(layer_set)  # one for all figures, whichever is drawn first
    shown = showable(results)
    jobs = [functools.partial(draw_one, item, results, shown, formats) for item in drawings.items()]
    sections, files = [], Files()
    for (name, drawing), of_figure in zip(
        drawings.items(), each_done(jobs, FilesAsBytes(), cores()), strict=True
    ):
        svg = of_figure.pop(INLINE, b"").decode()
        files |= of_figure
        if svg:
            table = f" Data: tables/{name}.csv." if f"tables/{name}.csv" in files else ""
            caption = scope_of(drawing, results) + drawing.caption + table
            sections.append(page_section(name, drawing, svg, caption))
    return sections, files


INLINE = "svg"  # what the page shows among the files of a figure


def draw_one(item: tuple[str, Drawing], results: Any, shown: Any, formats: tuple[str, ...]) -> Files:
    """The files of a figure. The table has every name in full, the figure as it is `shown`."""
    name, drawing = item
    rows, figure, files = drawing.rows(results), drawing.draw(shown), {}
    if rows and "csv" in formats:
        files[f"tables/{name}.csv"] = csv_table(rows)
    if figure is None:
        return files
    for kind in ("png", "pdf"):
        if kind in formats:
            files[f"figures/{name}.{kind}"] = figure_file(figure, kind)
    if "html" in formats:
        files[INLINE] = inline_svg(figure, name, drawing.title).encode()
    return files


class FilesAsBytes:
    """How the files of a figure travel from the process that drew it."""

    def to_bytes(self, result: Files) -> bytes:
        """JSON, whose characters are the bytes of the files."""
        texts = {name: content.decode("latin-1") for name, content in result.items()}
        return json.dumps(texts, ensure_ascii=False).encode()

    def from_bytes(self, content: bytes) -> Files:
        """The files again."""
        return {name: text.encode("latin-1") for name, text in json.loads(content).items()}


def scope_of(drawing: Drawing, results: Any) -> str:
    """Words before the caption of a figure that shows the first of several splits alone, else ''."""
    if isinstance(results, list) or drawing.is_of_all_splits:
        return ""
    several = (results.get("inference") or {}).get("splits", 1) > 1
    return "Of the first split. " if several else ""


def page_section(name: str, drawing: Drawing, svg: str, caption: str) -> dict[str, Any]:
    """A figure as the page shows it."""
    from markupsafe import Markup

    return {
        "name": name,
        "title": drawing.title,
        "svg": Markup(svg),
        "caption": caption,
        "narrow": drawing.is_narrow,
        "leads": drawing.leads,
    }


def figure_file(figure: Figure, kind: str) -> bytes:
    """A figure as PNG or PDF."""
    import matplotlib

    from ablation.report.style import STYLE

    out = io.BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    with matplotlib.rc_context(STYLE):  # which embeds TrueType fonts
        figure.savefig(out, format=kind, dpi=RESOLUTION, metadata=metadata)
    return out.getvalue()


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as an svg element whose text takes the page's colour, and whose ids are its own."""
    import matplotlib

    from ablation.report.style import INK, PAPER

    out = io.StringIO()
    literal: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context(literal):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))

    def with_own_ids(tag: re.Match) -> str:
        text = tag.group(0).replace(INK, "currentColor").replace(PAPER, "var(--paper)")
        text = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in used else "", text)
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)

    svg = re.sub(r"<[^>]+>", with_own_ids, svg)  # and not in the labels, which are text from data
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Labels without a colour of their own are black in SVG, so the page's colour is set on the whole element.
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" fill="currentColor" ', svg, count=1)


def write_files(folder: Path, files: Files) -> list[Path]:
    """Write all files, the page last, when everything that it names is there."""
    for name, content in sorted(files.items(), key=lambda entry: entry[0] == "report.html"):
        make_folder((folder / name).parent)
        write_bytes(folder / name, content)
    return [folder / name for name in files]
