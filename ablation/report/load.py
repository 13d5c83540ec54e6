"""An output folder -> what a report shows of it: results.json, and cells that were finished since."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ablation.cells import Cell, cells_named
from ablation.fields import InputError
from ablation.log import describe_error
from ablation.results import collect
from ablation.settings import TrainingSettings
from checkpointing import ResultStore, has_checksum, hash_of, parse_json, read_bytes

Results = dict[str, Any]


def result_folders(path: Path) -> list[Path]:
    """The folders of results that an argument names: itself, or those in an output directory.

    Raises InputError if there is none.
    """
    if (path / "checkpoints").is_dir():
        return [path]
    folders = sorted(folder.parent for folder in path.glob("visual_ablation_*/checkpoints"))
    if not folders:
        raise InputError(
            f"'{path}' holds no results: give an --output-dir of the experiment, or a folder "
            "visual_ablation_<data set> in it"
        )
    return folders


def load_results(folder: Path) -> Results:
    """results.json, with the cells that the same settings have finished since it was written.

    Where there is no results.json, the checkpoints alone. Cells made with other settings or damaged are
    listed as failed. Raises InputError if nothing is finished or results.json is damaged.
    """
    content, results = read_results(folder / "results.json")
    reported = reported_records(results)
    records, left_out = finished_since(ResultStore(folder), reported)
    if not records and not results:
        raise InputError(f"'{folder}' has no finished cell yet")
    if any(cell.name not in reported for cell in records):
        results = partial_results(results, records, folder)
    failed = {entry["cell"] for entry in results["failed_cells"]}
    results["failed_cells"] = results["failed_cells"] + [
        {"cell": cell.name, "error": error} for cell, error in left_out.items() if cell.name not in failed
    ]
    return results | {"name": folder.resolve().parent.name, "made_from": made_from(content)}


def read_results(path: Path) -> tuple[bytes, Results]:
    """results.json as bytes and as a mapping, both empty if there is none.

    Raises InputError if it is damaged.
    """
    try:
        content = read_bytes(path)
        return content, parse_json(content)
    except FileNotFoundError:
        return b"", {}
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror or error}): {REMEDY}") from error
    except ValueError as error:
        raise InputError(f"'{path}' is damaged ({error}): {REMEDY}") from error


REMEDY = "rerun the experiment's command, which makes it anew from the checkpoints"


@contextlib.contextmanager
def refusing_other_shapes(folders: list[Path]) -> Iterator[None]:
    """Raise InputError for an error over a results.json that was not left as this program wrote it.

    Over one that was, by its checksum, the error is the program's own and goes on.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        foreign = [str(folder / "results.json") for folder in folders if is_foreign(folder)]
        if not foreign:
            raise
        names, what = "' or '".join(foreign), describe_error(error)
        raise InputError(f"'{names}' has entries of another shape ({what}): {REMEDY}") from error


def is_foreign(folder: Path) -> bool:
    """True for a folder's results.json whose checksum is not that of its content."""
    try:
        return not has_checksum(parse_json(read_bytes(folder / "results.json")))
    except FileNotFoundError:
        return False
    except ValueError:  # this program nests nothing too deeply
        return True


def reported_records(results: Results) -> dict[str, dict]:
    """The records in results.json by the cell's name."""
    lists = [rows for key, rows in results.items() if key.endswith("_results") or key == "further_cells"]
    reported = {row["cell"]: row for rows in lists for row in rows}
    return reported | {entry["cell"]: entry for entry in results.get("audits", [])}


def finished_since(store: ResultStore, reported: dict[str, dict]) -> tuple[dict[Cell, dict], dict[Cell, str]]:
    """Records of the finished cells, and why others are left out."""
    records, left_out = {}, {}
    settings = {shared_settings(record) for record in reported.values()}
    for cell in cells_named(store.names()):
        try:
            record = store.load(cell.name)
        except (OSError, ValueError, KeyError) as error:
            left_out[cell] = f"its files cannot be read: {error}"
            continue
        if cell.name not in reported and reported and shared_settings(record) not in settings:
            left_out[cell] = "finished with other settings, and not among these results"
        else:
            records[cell] = record
    return records, left_out


def shared_settings(record: dict) -> str:
    """A hash of what all cells of a command share: the data and the training settings."""
    shared = {"data", *(field.name for field in dataclasses.fields(TrainingSettings))}
    return hash_of({name: value for name, value in record.get("made_with", {}).items() if name in shared})


def partial_results(
    header: Results, records: dict[Cell, dict], folder: Path, failures: dict[Cell, str] | None = None
) -> Results:
    """results.json of an experiment that is not finished: its cells, and no inference.
    `header` has what else is known.
    """
    first = next(iter(records.values()))
    classes = len(first["test_confusion_matrices"][0])
    defaults = {
        "dataset": folder.name.removeprefix("visual_ablation_"),
        "num_runs": len(first["per_run_results"]),
        "num_classes": classes,
        "label_mapping": {str(number): number for number in range(classes)},
        "data": {},
        "settings": {},
    }
    kept = {key: value for key, value in header.items() if not key.endswith("_results")}
    failed = earlier_reports(header, "failed_cells", "error", records) | {
        cell: error for cell, error in (failures or {}).items() if cell not in records
    }
    skipped = earlier_reports(header, "skipped_cells", "reason", records)
    count = f"Not finished: {len(records)} cells so far."
    verdict = f"{count} Intervals, tests and the verdict are made when the run ends."
    return collect(records, failed, skipped, defaults | kept | {"inference": {}, "verdict": verdict})


def earlier_reports(header: Results, key: str, text: str, records: dict[Cell, dict]) -> dict[Cell, str]:
    """Cells under a key of an earlier results.json that are not finished, with the field `text` of each."""
    by_cell = {Cell.named(entry["cell"]): entry[text] for entry in header.get(key, [])}
    return {cell: reason for cell, reason in by_cell.items() if cell is not None and cell not in records}


def made_from(content: bytes) -> str:
    """A hash of results.json and of the report's own modules and template."""
    own = sorted(file for file in Path(__file__).parent.iterdir() if file.is_file())
    return hash_of([hash_of(content), *(hash_of(file.read_bytes()) for file in own)])
