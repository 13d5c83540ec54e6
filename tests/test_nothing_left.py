"""A finished command, given again: answered without its data set, if nothing at all has changed.

The usual way, which opens the data set, is the oracle: whatever changed, the exit status, the log and the
files must be those of a command that has no record of an earlier one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import lora_dataset
from conftest import ROOT
from running import FAST, SCRIPT, experiment_data, folder, never, visible

import visual_ablation_experiment as experiment
from ablation import nothing_left
from ablation.catalogue import SPECS
from ablation.nothing_left import RECORD
from checkpointing import CRASH, append_event, read_events

CHOSEN = ("--representations", "stats")
TIMES = ("Seconds: ", "Content hash of ", "[", "Run ", "Results: Train=", "Progress: ")


@pytest.fixture
def opened(monkeypatch):
    """The commands that open their data set, in a list."""
    seen, real = [], experiment.open_context
    monkeypatch.setattr(experiment, "open_context", lambda *given: seen.append(given) or real(*given))
    return seen


@pytest.fixture
def settled(monkeypatch):
    """Data files are old enough as soon as they are written, but for a second's fraction."""
    monkeypatch.setattr(nothing_left, "SETTLED", 0.0)


@pytest.fixture
def finished(run, place, settled):
    """The folder of a finished command, which left its record."""
    assert run(*CHOSEN)[0] == 0 and (folder(place) / RECORD).exists()
    return folder(place)


def told(log):
    """The lines of a log, less those with times and less the times in others."""
    lines = [line for line in log.splitlines() if line and not line.startswith((*TIMES, "Features of "))]
    return [re.sub(r"\b[0-9.]+ ?s\b|\b0\.[0-9]\b", "", line) for line in lines]  # 0.1: seconds a run


def contents(root):
    """What is in an output folder, less times and what names them."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix in (".json", ".npz", ".txt") and path.name[0] != "."
    }


def events_of(root):
    return [{**event, "time": "", "check": "", "seconds": 0} for event in read_events(root / "events.jsonl")]


def same_as_the_usual_way(run, root, *flags, **kwargs):
    """Give a command with the record and, from the same files, without it. Returns its status and log."""
    before = root.with_name("before")
    shutil.copytree(root, before, symlinks=True)
    (before / RECORD).unlink(missing_ok=True)
    status, log = run(*flags, **kwargs)
    found = contents(root), events_of(root)
    with_record = root.rename(root.with_name("with"))
    before.rename(root)
    usual, usual_log = run(*flags, **kwargs)
    assert status == usual
    assert sorted(set(told(log)) ^ set(told(usual_log))) == []
    assert told(log) == told(usual_log)
    assert found[1] == events_of(root)
    assert found[0].keys() == contents(root).keys()
    changed = {name for name, content in contents(root).items() if found[0][name] != content}
    assert not {name for name in changed if name.startswith("set_aside")}
    assert "results.txt" not in changed or "Run 1/" in log  # cells that ran have times of their own
    shutil.rmtree(with_record)
    return status, log


def test_the_second_time_nothing_is_opened_and_the_log_and_files_are_those_of_the_usual_way(
    run, finished, opened
):
    status, log = same_as_the_usual_way(run, finished, *CHOSEN)
    assert status == 0 and len(opened) == 1, "the one without a record"
    assert "All experiments already completed! Loading results from checkpoints..." in log
    assert log.splitlines()[0].startswith("Data set: ./loras | 40 rows, ")
    assert "Plan of analysis " in log and "Content hash of " not in log
    opened.clear()
    for flags in (CHOSEN, (*CHOSEN, "--rerun-stale")):
        assert run(*flags)[0] == 0 and not opened, "the usual way left a record, too"


def test_warnings_are_told_again(run, place, settled, opened):
    lora_dataset(n=8, signal=True).save_to_disk("few")
    first = run(*CHOSEN, dataset="./few")[1]
    again = run(*CHOSEN, dataset="./few")[1]
    assert len(opened) == 1 and "WARNING: ten rows or fewer" in again
    opening = told(first)[: told(first).index("PROGRESS SUMMARY")]
    assert told(again)[: len(opening)] == opening


def test_a_command_killed_and_resumed_leaves_a_record_at_its_end(run, place, settled, opened):
    command = [sys.executable, str(SCRIPT), "--dataset", "./loras", *FAST, *CHOSEN]
    subprocess.run(command, capture_output=True, env={**os.environ, CRASH: "committed 2"})
    assert not (folder(place) / RECORD).exists()
    assert run(*CHOSEN)[0] == 0 and run(*CHOSEN)[0] == 0 and len(opened) == 1


def test_neither_torch_nor_datasets_is_imported(finished):
    code = (
        f"import sys; sys.argv = {['x', '--dataset', './loras', *FAST, *CHOSEN]!r}\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import visual_ablation_experiment as e\n"
        "status = e.main(); heavy = {'torch', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "All experiments already completed!" in done.stdout


def test_a_parquet_file_whose_copy_was_just_made_is_not_opened_again(run, place, settled, opened):
    lora_dataset(n=40).to_parquet("loras.parquet")
    assert [run(*CHOSEN, dataset="loras.parquet")[0] for _ in range(2)] == [0, 0] and len(opened) == 1
    (copy,) = (place / "hf").rglob("*.arrow")
    os.utime(copy)
    assert run(*CHOSEN, dataset="loras.parquet")[0] == 0 and len(opened) == 2


# --- whatever is not certain goes the usual way


def edit_a_weight(place):
    """Change one weight in place, with the size and the time of before."""
    (file,) = (place / "loras").glob("*.arrow")
    data = experiment_data()
    weight = np.float32(data.weights.read_layer(data.layers.names[0], 7, 8)[0, 1, 2]).tobytes()
    found, content = file.stat(), file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(content.index(weight))
        opened.write(np.float32(0.123).tobytes())
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def other_data(place):
    shutil.rmtree("loras")
    lora_dataset(n=40, signal=True, seed=9).save_to_disk("loras")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


CHANGES = {
    "a data file was touched": lambda place: os.utime(next((place / "loras").glob("*.arrow")), (1, 1)),
    "a weight was edited": edit_a_weight,
    "another data set": other_data,
    "a file more": lambda place: (place / "loras" / "notes.txt").write_text("mine"),
    "a description was edited": lambda place: cut(place / "loras" / "dataset_info.json"),
    "the data set is gone": lambda place: shutil.rmtree(place / "loras"),
    "a damaged checkpoint": lambda place: cut(folder(place) / "checkpoints" / "all_layers_stats.json"),
    "a deleted cell": lambda place: (folder(place) / "checkpoints" / "all_layers_stats.json").unlink(),
    "removed predictions": lambda place: (folder(place) / "predictions" / "all_layers_stats.npz").unlink(),
    "other predictions": lambda place: shutil.copy(
        folder(place) / "predictions" / "visual_only_stats.npz",
        folder(place) / "predictions" / "all_layers_stats.npz",
    ),
    "a foreign checkpoint": lambda place: (folder(place) / "checkpoints" / "a.txt").write_text("mine"),
    "damaged results and a damaged checkpoint": lambda place: (
        cut(folder(place) / "results.json"),
        cut(folder(place) / "checkpoints" / "all_layers_stats.json"),
    ),
    "results removed": lambda place: (folder(place) / "results.json").unlink(),
    "results edited": lambda place: (folder(place) / "results.txt").write_text("better"),
    "the manifest removed": lambda place: (folder(place) / "manifest.json").unlink(),
    "events removed": lambda place: (folder(place) / "events.jsonl").unlink(),
    "events damaged": lambda place: cut(folder(place) / "events.jsonl"),
    "another plan was stated": lambda place: append_event(
        folder(place) / "events.jsonl", event="started", command="", cells=[], plan="another"
    ),
    "runs of an unfinished cell": lambda place: (folder(place) / ".unfinished" / "a").mkdir(parents=True),
    "a damaged record": lambda place: cut(folder(place) / RECORD),
    "an empty record": lambda place: (folder(place) / RECORD).write_text("{}"),
    "a record of others": lambda place: (folder(place) / RECORD).write_text('{"depends_on": 3}'),
}


REFUSED = ("a weight was edited", "another data set", "a description was edited", "the data set is gone")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_sends_the_command_the_usual_way(run, place, finished, opened, change):
    CHANGES[change](place)
    status, _ = same_as_the_usual_way(run, finished, *CHOSEN)
    assert len(opened) == 2 or change == "the data set is gone"  # which is refused before
    assert status == (2 if change in REFUSED else 0)
    if status == 0 and change != "runs of an unfinished cell":
        same_as_the_usual_way(run, finished, *CHOSEN)  # with nothing of that command's own in the log
        assert len(opened) == 3, "and then there is nothing left"


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-runs", "3"),
        ("--dropout", "0.4"),
        ("--split-seed", "7"),
        ("--margin", "0.03"),
        ("--label-column", "group"),
        ("--representations", "frequency"),
        ("--representations", "stats", "frequency"),
        ("--cache-dir", "elsewhere"),
        ("--device", "cpu"),
        ("--trainer", "packed", "--rerun-stale"),
        ("--report",),
    ],
    ids=" ".join,
)
def test_another_command_goes_the_usual_way(run, finished, opened, monkeypatch, flags):
    monkeypatch.setattr("ablation.report.write.write_report", lambda folder: None)
    run(*CHOSEN, *flags)
    assert len(opened) == 1


@pytest.mark.parametrize(
    "flags", [("--cells", "1/2"), ("--results-only",), ("--devices", "cpu")], ids=" ".join
)
def test_a_part_and_a_command_with_workers_go_the_usual_way_each_time(run, finished, opened, flags):
    assert [run(*CHOSEN, *flags)[0] for _ in range(2)] == [0, 0] and len(opened) == 2


def test_streamed_rows_are_opened_each_time(run, place, settled, opened):
    lora_dataset(n=40, signal=True).to_parquet("loras.parquet")
    assert [run(*CHOSEN, "--streaming", dataset="loras.parquet")[0] for _ in range(2)] == [0, 0]
    assert len(opened) == 2


def test_another_version_of_a_representation_goes_the_usual_way(run, finished, opened, monkeypatch):
    monkeypatch.setitem(SPECS, "stats", SPECS["stats"]._replace(version=99))
    status, log = same_as_the_usual_way(run, finished, *CHOSEN)
    assert status == 2 and "2 finished cells" in log and len(opened) == 2
    opened.clear()
    status, log = run(*CHOSEN, "--rerun-stale")
    assert status == 0 and len(opened) == 1 and log.count("Set aside stale checkpoint") == 2
    assert run(*CHOSEN)[0] == 0 and len(opened) == 1, "and then there is nothing left"


@pytest.mark.parametrize("changed", ["program", "packages", "host", "GPUs", "variables"])
def test_another_program_or_machine_goes_the_usual_way(run, finished, opened, monkeypatch, tmp_path, changed):
    if changed == "program":
        (tmp_path / "program" / "ablation").mkdir(parents=True)
        (tmp_path / "program" / "ablation" / "mlp.py").write_text("faster = True")
        monkeypatch.setattr(nothing_left, "PROGRAM_FOLDER", tmp_path / "program")
    elif changed == "packages":
        monkeypatch.setattr(nothing_left, "versions", lambda: {"torch": "9.9"})
    elif changed == "host":
        monkeypatch.setattr(nothing_left.socket, "gethostname", lambda: "another")
    elif changed == "GPUs":
        (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(nothing_left, "DEVICE_FILES", (str(tmp_path / "nvidia*"),))
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    status, _ = same_as_the_usual_way(run, finished, *CHOSEN)
    assert status == 0 and len(opened) == 2


def test_a_missing_page_is_written(run, place, settled, opened, monkeypatch):
    from ablation.report import figures, write

    monkeypatch.setattr(figures, "FIGURES", {"accuracy": figures.FIGURES["accuracy"]})
    monkeypatch.setattr(write, "RESOLUTION", 40)
    for removed, times in ((None, 1), ("report.html", 2), ("figures/accuracy.png", 3), (None, 3)):
        if removed:
            (folder(place) / removed).unlink()
        assert run(*CHOSEN, "--report")[0] == 0 and len(opened) == times
        assert (folder(place) / "report.html").exists() and write.is_current(folder(place))


# --- what leaves no record


def test_data_files_that_may_change_within_their_time_stamp_leave_no_record(run, place, opened):
    os.utime(next(Path("loras").glob("*.arrow")))
    assert [run(*CHOSEN)[0] for _ in range(2)] == [0, 0]
    assert len(opened) == 2


def test_data_that_change_while_they_are_read_leave_no_record(run, place, settled, monkeypatch):
    real = experiment.finish

    def finish(*given):
        (place / "loras" / "notes.txt").write_text("mine")
        return real(*given)

    monkeypatch.setattr(experiment, "finish", finish)
    assert run(*CHOSEN)[0] == 0 and not (folder(place) / RECORD).exists()


def test_a_failed_cell_leaves_no_record(run, place, settled, monkeypatch):
    monkeypatch.setattr("ablation.training.train_one", never)
    assert run(*CHOSEN)[0] == 1 and not (folder(place) / RECORD).exists()


def test_stale_cells_of_another_command_leave_no_record(run, finished, opened):
    """They are named in the log each time."""
    assert run("--representations", "frequency", "--num-runs", "3")[0] == 0
    (finished / RECORD).unlink(missing_ok=True)
    for _ in range(2):
        assert "left out of the results" in run("--representations", "frequency", "--num-runs", "3")[1]
    assert len(opened) == 3 and not (finished / RECORD).exists()


def test_generated_data_leave_no_record(run, place, settled, opened):
    assert [run(*CHOSEN, dataset="sanity-check")[0] for _ in range(2)] == [0, 0] and len(opened) == 2
    assert visible(folder(place, "sanity-check") / "checkpoints")


def test_a_disk_that_takes_no_record_costs_nothing_else(run, place, settled, monkeypatch):
    from checkpointing import CannotWrite

    def write(path, value):
        raise CannotWrite.to(path, OSError(28, "No space left on device"))

    monkeypatch.setattr(nothing_left, "write_json", write)
    status, log = run(*CHOSEN)
    assert status == 0 and "the next command will open the data set again: cannot write" in log
    assert json.loads((folder(place) / "manifest.json").read_text())["ended"] == "finished"
