"""What the tests of the program share: its flags for a quick run, and looks at what it wrote."""

import json
import os
import time

from builders import load
from conftest import ROOT

from ablation import cells_at_work
from ablation.catalogue import NINE
from ablation.cells import cells_of
from checkpointing import SETTLED

SCRIPT = ROOT / "visual_ablation_experiment.py"
FAST = ["--num-runs", "2", "--max-epochs", "3", "--hidden-dim", "8", "--batch-size", "8", "--no-report"]
BOTH = cells_of(("all_layers", "visual_only"), NINE)


def folder(place, name="loras", output="visual-ablation-results"):
    return place / output / f"visual_ablation_{name}"


def checkpoints(place, **kwargs):
    return sorted(os.listdir(folder(place, **kwargs) / "checkpoints"))


def visible(path):
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def snapshot(path):
    return {
        file.name: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes())
        for file in sorted(path.iterdir())
        if file.name[0] != "."
    }


UNKEYED = ("checksum", "predictions_hash", "made_on")


def without_times(record):
    """A record less what may differ between two runs that are the same:
    seconds, and hashes that cover them.
    """
    if isinstance(record, dict):
        return {
            k: without_times(v) for k, v in record.items() if k[:13] != "training_time" and k not in UNKEYED
        }
    return [without_times(v) for v in record] if isinstance(record, list) else record


def cell_files(place, **kwargs):
    return {
        name: without_times(json.loads((folder(place, **kwargs) / "checkpoints" / name).read_text()))
        for name in visible(folder(place, **kwargs) / "checkpoints")
    }


def never(*arguments, **kwargs):
    raise AssertionError("this must not be called")


def experiment_data():
    return load("./loras")


def interfere(monkeypatch, action):
    """Do something to the output folder before the third cell is saved."""
    act, real = at_the_third_call(action), cells_at_work.save_cell
    monkeypatch.setattr(cells_at_work, "save_cell", lambda *given: act() or real(*given))


def at_the_third_call(action):
    calls = []

    def act():
        calls.append(1)
        if len(calls) == 3:
            action()

    return act


def as_cells_begin(monkeypatch, action):
    """Do something whenever a cell, or a cell with its audits, begins."""
    real = cells_at_work.prepare_cells
    monkeypatch.setattr(cells_at_work, "prepare_cells", lambda *given: action() or real(*given))


def settle(*files):
    """Wait until files are old enough for their content hash to be remembered."""
    newest = max(os.stat(file).st_ctime for file in files)
    while time.time() <= newest + SETTLED:
        time.sleep(0.05)
