"""The page of a report: one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ablation.log import escaped
from ablation.report.load import Results
from ablation.text_table import showable
from checkpointing import parse_json, read_bytes

TextSection = dict[str, Any]  # a section of text: name, title, entries [(name, value)], text


def render_page(
    runs: list[Results],
    title: str,
    sections: list[dict],
    tables: list[dict],
    blocks: list[TextSection | None],
) -> bytes:
    """The page of one run or several: figures (`sections`), tables, and blocks of text."""
    return render(runs, title, sections=sections, tables=tables, blocks=blocks, running=False)


def render_running_page(
    results: Results, title: str, tables: list[dict], blocks: list[TextSection | None]
) -> bytes:
    """The page of an experiment that goes on: it reloads itself and has no figure."""
    return render([results], title, sections=[], tables=tables, blocks=blocks, running=True)


def render(runs: list[Results], title: str, **parts: Any) -> bytes:
    """Fill in the template."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names come from the data
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escaped(value, "\n\t") if type(value) is str else value,  # not Markup, the SVG
    )
    shown = []
    for results in runs:
        check = (results.get("inference") or {}).get("shuffled")
        suspect = bool(check and check["suspect"])
        spoken = results.get("verdict_parts") or {"opening": [results["verdict"]]}
        said = {name: spoken.get(name, []) for name in ("opening", "numbers", "reservations")}
        shown.append({"name": results["name"], "verdict": said, "suspect": suspect})
    parts["blocks"] = [block for block in parts["blocks"] if block]
    template = environment.get_template("report.html.j2")
    return template.render(runs=shown, title=title, **parts).encode()


# --- blocks of text


def data_block(results: Results) -> TextSection:
    """The data set."""
    data = results.get("data") or {}
    counted = {
        part: ", ".join(f"{name} {n}" for name, n in data.get(part, {}).items() if n)
        for part in ("split", "layers", "rows_per_class")
    }
    entries = [
        ("name", results["dataset"]),
        ("LoRAs", data.get("rows", "")),
        ("split", counted["split"]),
        ("architecture", data.get("architecture", "")),
        ("layers", counted["layers"]),
        ("rank", ", ".join(map(str, data.get("ranks", [])))),
        ("weights a LoRA", f"{data['weights_per_row']:,}" if data else ""),
        ("classes", results["num_classes"]),
        ("LoRAs a class", counted["rows_per_class"]),
        ("content hash", data.get("identity", "")),
    ]
    stated = [(name, value) for name, value in entries if value != ""]
    return {"name": "data", "title": "Data set", "entries": stated, "text": ""}


def manifest_block(folder: Path) -> TextSection:
    """How the results were made."""
    block: TextSection = {"name": "manifest", "title": "How it was made", "entries": [], "text": ""}
    path = folder / "manifest.json"
    try:
        entries = manifest_entries(showable(parse_json(read_bytes(path))))
    except FileNotFoundError:
        return block | {"text": "The run has not ended: there is no manifest yet."}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        remedy = "rerun the experiment's command, which makes it anew"
        return block | {"text": f"manifest.json is damaged: {remedy}."}
    return block | {"entries": entries}


def manifest_entries(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page tells of a manifest."""
    settings = flat_settings(manifest["settings"])
    stated = [f"{name} {shown(value)}" for name, value in settings.items() if value not in ("", [], {})]
    seconds = [f"{stage} {spent:.1f}" for stage, spent in manifest["seconds"].items()]
    return [
        ("command", manifest["command"]),
        ("started", manifest["started"]),
        ("seconds", ", ".join(seconds)),
        ("machine", ", ".join(f"{name} {value}" for name, value in manifest["machine"].items() if value)),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())),
        ("settings", ", ".join(stated)),
    ]


def failure_block(results: Results) -> TextSection | None:
    """Failed and skipped cells, if there are any."""
    entries = [(entry["cell"], entry["error"]) for entry in results.get("failed_cells", [])]
    skipped = results.get("skipped_cells", [])
    entries += [(entry["cell"], f"skipped: {entry['reason']}") for entry in skipped]
    if not entries:
        return None
    return {"name": "failures", "title": "Failed and skipped cells", "entries": entries, "text": ""}


def differences_block(runs: list[Results]) -> TextSection:
    """The settings in which several runs differ."""
    settings = [flat_settings(results["settings"]) for results in runs]
    entries = [
        (f"{results['name']}: {name}", shown(value))
        for results, own in zip(runs, settings, strict=True)
        for name, value in own.items()
        if any(other.get(name) != value for other in settings)
    ]
    return {"name": "differences", "title": "Settings that differ", "text": "", "entries": entries}


def flat_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of training among them."""
    rest = {name: value for name, value in settings.items() if name != "training"}
    return rest | settings.get("training", {})


def shown(value: Any) -> str:
    """A setting as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
